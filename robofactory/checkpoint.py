"""Checkpoints: a directory that appears whole or not at all.

{run}/epoch_50/  modules.safetensors    the trained tensors (the whole model when trained from scratch)
                 codec.json             preprocessing and statistics, see robofactory.codec
                 config.yaml            the resolved recipe
                 training_state.pt      optimizer, schedule, position; loads with weights_only=True
{run}/latest     a relative link to the newest complete one, switched atomically
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from robofactory.codec.codec import Codec
from robofactory.config import RecipeConfig, UserError, from_yaml, to_yaml
from robofactory.model.openvla import OpenVLA, build_from_scratch

WEIGHTS, CONFIG, STATE = "modules.safetensors", "config.yaml", "training_state.pt"


def build_model(recipe: RecipeConfig, codec: Codec) -> OpenVLA:
    """The model that a recipe describes, untrained, for the inputs and outputs that a codec describes.

    Raises:
        UserError: the recipe wants published weights; adapters for them are not there yet.
    """
    if recipe.model.architecture is None:
        raise UserError(f"fine-tuning {recipe.model.model_name} is not there yet; train a small model from scratch with --recipe robot_openvla_tiny")  # fmt: skip
    return build_from_scratch(
        recipe.model.architecture,
        vocab_size=codec.vocab_size,
        proprio_dim=codec.proprio_dim if codec.use_proprio else None,
        global_token=recipe.model.global_token,
    )


def save(run: Path, name: str, model: OpenVLA, codec: Codec, recipe: RecipeConfig, state: dict[str, Any]) -> Path:
    """Write `{run}/{name}` under a temporary name, rename it into place, then point `latest` at it.

    Raises:
        UserError: the disk is full or not writable; the previous checkpoint and `latest` are untouched.
    """
    try:
        return _save(run, name, model, codec, recipe, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(run / f".{name}.tmp", ignore_errors=True)
        raise UserError(f"cannot save {run / name} ({error}); earlier checkpoints are untouched, make room and continue with --resume") from None  # fmt: skip


def _save(run: Path, name: str, model: OpenVLA, codec: Codec, recipe: RecipeConfig, state: dict[str, Any]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    final, temporary = run / name, run / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tensors = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    save_file(tensors, temporary / WEIGHTS)
    codec.save(temporary)
    (temporary / CONFIG).write_text(to_yaml(recipe))
    torch.save(state, temporary / STATE)
    for path in [*temporary.iterdir(), temporary]:
        _flush_to_disk(path)
    if final.exists():  # the same epoch again, after a resume from an earlier one
        old = run / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)
    link = run / ".latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, run / "latest")
    _flush_to_disk(run)
    return final


def load_model(directory: Path, device: torch.device | str = "cpu") -> tuple[OpenVLA, Codec, RecipeConfig]:
    """The model, its codec and its recipe from a checkpoint directory; in evaluation mode, in float32.

    Raises:
        UserError: a file is missing, unreadable or of another model; the line names the file.
    """
    recipe = load_recipe_of(directory)
    codec = Codec.load(directory)
    model = build_model(recipe, codec)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{directory / WEIGHTS} cannot be read ({error}); use another checkpoint") from None
    expected = {key: value.shape for key, value in model.state_dict().items()}
    wrong = [
        key for key in expected.keys() | tensors.keys() if key not in tensors or tensors[key].shape != expected.get(key)
    ]
    if wrong:
        raise UserError(f"{directory / WEIGHTS} does not fit {CONFIG} beside it: {', '.join(sorted(wrong)[:5])}")
    model.load_state_dict(tensors)
    return model.to(device).eval(), codec, recipe


def load_recipe_of(directory: Path) -> RecipeConfig:
    """The resolved recipe that a checkpoint was trained with."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} is no checkpoint: it has no {CONFIG}")
    return from_yaml(RecipeConfig, path.read_text())


def load_training_state(directory: Path) -> dict[str, Any]:
    """What `--resume` needs beside the weights."""
    path = directory / STATE
    if not path.is_file():
        raise UserError(f"no {STATE} in {directory}; it cannot be resumed, only evaluated")
    return torch.load(path, map_location="cpu", weights_only=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
