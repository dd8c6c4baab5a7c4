"""Checkpoints: a directory that appears whole or not at all.

{run}/epoch_50/  adapter_model.safetensors  adapter_config.json    the language model's adapters, as plain peft reads them
                 modules.safetensors    what else is trained (the whole model when trained from scratch)
                 codec.json             preprocessing and statistics, see robofactory.codec
                 config.yaml            the resolved recipe
                 training_state.pt      optimizer, schedule, position; loads with weights_only=True
{run}/latest     a relative link to the newest complete one, switched atomically

Published weights are not stored: config.yaml says which they were, the safetensors files hold a fingerprint of them.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from robofactory.codec.codec import Codec
from robofactory.config import RecipeConfig, UserError, find_weights, from_yaml, to_yaml
from robofactory.model.lora import adapter_name, load_untrained, save_adapter_config, trained_tensors
from robofactory.model.openvla import OpenVLA, build_from_scratch

ADAPTER, WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "modules.safetensors", "config.yaml", "training_state.pt"


def build_model(recipe: RecipeConfig, codec: Codec, device: torch.device | str = "cpu") -> OpenVLA:
    """The model that a recipe describes, untrained, for the inputs and outputs that a codec describes.

    Raises:
        UserError: the recipe's published weights are not there, or damaged.
    """
    m, proprio_dim = recipe.model, codec.proprio_dim if codec.use_proprio else None
    if m.architecture is None:
        return load_untrained(m, find_weights(m.model_name), proprio_dim, device)
    return build_from_scratch(m.architecture, codec.vocab_size, proprio_dim, m.global_token).to(device)


def saved_tensors(model: OpenVLA) -> dict[str, dict[str, torch.Tensor]]:
    """File -> name in it -> tensor: what is trained on published weights, everything of a model without them."""
    tensors = model.state_dict() if model.base_fingerprint is None else trained_tensors(model)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        in_adapter = adapter_name(name)
        files.setdefault(ADAPTER if in_adapter else WEIGHTS, {})[in_adapter or name] = tensor.detach()
    return files


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
    base = {} if model.base_fingerprint is None else {"base_fingerprint": model.base_fingerprint}
    for file, tensors in saved_tensors(model).items():
        tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        save_file(tensors, temporary / file, {"format": "pt"} | base)
    if recipe.model.use_lora:
        save_adapter_config(model, recipe.model.model_name, temporary)
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
    """The model, its codec and its recipe from a checkpoint directory; in evaluation mode.

    Raises:
        UserError: a file is missing, unreadable or of another model, or the published weights are not those that it was
            trained on; the line names the file.
    """
    recipe = load_recipe_of(directory)
    codec = Codec.load(directory)
    model = build_model(recipe, codec, device)
    load_trained(directory, model)
    return model.eval(), codec, recipe


def load_trained(directory: Path, model: OpenVLA) -> None:
    """Read what a checkpoint holds into a model that `build_model` made of its recipe. Raises as `load_model`."""
    for file, tensors in saved_tensors(model).items():
        path = directory / file
        try:
            with safe_open(path, framework="pt") as saved:
                base = (saved.metadata() or {}).get("base_fingerprint")
                if base != model.base_fingerprint:
                    name = load_recipe_of(directory).model.model_name
                    raise UserError(f"{path} was trained on other weights (fingerprint {str(base)[:12]}) than {name} has now ({str(model.base_fingerprint)[:12]}); put those back there")  # fmt: skip
                names = set(saved.keys())
                wrong = names ^ tensors.keys()
                wrong |= {n for n in names & tensors.keys() if saved.get_slice(n).get_shape() != list(tensors[n].shape)}
                if wrong:
                    raise UserError(f"{path} does not fit {CONFIG} beside it: {', '.join(sorted(wrong)[:5])}")
                for name, tensor in tensors.items():
                    tensor.copy_(saved.get_tensor(name))
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); use another checkpoint") from None


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
