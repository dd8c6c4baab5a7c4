"""Checkpoints: a directory that appears whole or not at all.

{run}/epoch_50/  adapter_model.safetensors  adapter_config.json    the language model's adapters, as plain peft reads them
                 modules.safetensors    what else is trained (the whole model when trained from scratch)
                 codec.json             preprocessing and statistics, see robofactory.codec
                 config.yaml            the resolved recipe
                 training_state.pt      optimizer, position, what the log and the guard remember; loads with weights_only
                 manifest.json          size and SHA-256 of every file; written last
{run}/latest     a relative link to the newest complete one, switched atomically
{run}/best       the same, to the one with the lowest validation loss

Published weights are not stored: config.yaml says which they were, the safetensors files hold a fingerprint of them.

Written as `.epoch_50.tmp`, flushed to the disk, renamed, then linked. `settle` finishes or undoes what was cut off.
Nothing else in a run is touched: whatever has another name is the user's.
"""

import contextlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from robofactory import files
from robofactory.codec.codec import Codec
from robofactory.config import RecipeConfig, from_yaml, to_yaml
from robofactory.errors import UserError
from robofactory.manifest import STATE, flush_to_disk, instead_of, read_manifest, verify, write_manifest
from robofactory.model.lora import adapter_name, load_untrained, save_adapter_config, trained_tensors, twin
from robofactory.model.openvla import OpenVLA, build_from_scratch
from robofactory.model.weights import FLOATS, is_finite
from robofactory.paths import MANIFEST, find_weights

ADAPTER, WEIGHTS, CONFIG = "adapter_model.safetensors", "modules.safetensors", "config.yaml"
NAME = re.compile("(epoch|step)_[0-9]+")  # of a checkpoint in its run
LEFTOVER = re.compile(rf"\.({NAME.pattern})\.(tmp|old)")  # what a kill leaves of one
LINKS = ("latest", "best")
MAX_RECIPE_BYTES = 1_000_000

# What damaged bytes make of an unpickler: it stumbles over whatever they seem to be.
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    EOFError, AssertionError, ArithmeticError, NotImplementedError,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the model


def build_model(recipe: RecipeConfig, codec: Codec, device: torch.device | str = "cpu") -> OpenVLA:
    """The model that a recipe describes, untrained, for the inputs and outputs that a codec describes.

    Raises:
        UserError: the recipe's published weights are not there, damaged, or of another model than the codec is for.
    """
    m, proprio_dim = recipe.model, codec.proprio_dim if codec.use_proprio else None
    if m.architecture is None:
        model = load_untrained(m, find_weights(m.model_name), proprio_dim, device)
    else:
        model = build_from_scratch(m.architecture, codec.vocab_size, proprio_dim, m.global_token).to(device)
        model.in_float32 = m.torch_dtype == "float32"
    rows = model.language_model.config.vocab_size
    if model.first_action_id != codec.action_tokens.first_id or codec.prompt.highest_id >= rows:
        raise UserError(f"{m.model_name} has {rows} token ids and its actions from {model.first_action_id} on; the codec has text up to {codec.prompt.highest_id} and actions from {codec.action_tokens.first_id} on: they are not of one model")  # fmt: skip
    return model


def saved_tensors(model: OpenVLA) -> dict[str, dict[str, torch.Tensor]]:
    """File -> name in it -> tensor: what is trained on published weights, everything of a model without them."""
    tensors = model.state_dict() if model.base_fingerprint is None else trained_tensors(model)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        in_adapter = adapter_name(name)
        parts.setdefault(ADAPTER if in_adapter else WEIGHTS, {})[in_adapter or name] = tensor.detach()
    return parts


# ----------------------------------------------------------------------------------------------------------- saving


def save(
    run: Path,
    name: str,
    model: OpenVLA,
    codec: Codec,
    recipe: RecipeConfig,
    state: dict[str, Any],
    *,
    keep: bool = True,
    best: bool = False,
) -> Path:
    """Write `{run}/{name}` under a temporary name, rename it into place, then point `latest` at it.

    All processes call it together, the main one writes. Checkpoints that were saved with `keep=False` and are neither
    the latest nor the best any more are deleted afterwards.

    Args:
        best: point `best` at it too.
    Raises:
        UserError: the disk is full or not writable, or the weights are not finite; the previous checkpoint and `latest`
            are untouched. The other processes end with the same exit code.
    """
    tensors_of = {file: {key: whole(t) for key, t in tensors.items()} for file, tensors in saved_tensors(model).items()}
    dead = [key for tensors in tensors_of.values() for key, tensor in tensors.items() if not is_finite(tensor)]
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            if not dead:
                _save(run, name, tensors_of, model, codec, recipe, state, keep, best)
            else:
                error = f"cannot save {run / name}: {len(dead)} of its tensors have NaN or infinity, {dead[0]} for one; earlier checkpoints are untouched, continue with --resume and a lower training.learning_rate"  # fmt: skip
        except (OSError, SafetensorError) as problem:
            with contextlib.suppress(OSError, UserError):
                settle(run)
            error = f"cannot save {run / name} ({problem}); earlier checkpoints are untouched, make room and continue with --resume"  # fmt: skip
    failed = error is not None
    if dist.is_initialized():  # nobody goes on, or ends, before the main process has saved
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        verdict = torch.tensor([float(failed)], device=device)
        dist.broadcast(verdict, src=0)
        failed = bool(verdict.item())
    if error is not None:
        raise UserError(error)
    if failed:
        raise SystemExit(2)
    return run / name


def _save(
    run: Path,
    name: str,
    tensors_of: dict[str, dict[str, torch.Tensor]],
    model: OpenVLA,
    codec: Codec,
    recipe: RecipeConfig,
    state: dict[str, Any],
    keep: bool,
    best: bool,
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    final, temporary, old = run / name, run / f".{name}.tmp", run / f".{name}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    base = {} if model.base_fingerprint is None else {"base_fingerprint": model.base_fingerprint}
    for file, tensors in tensors_of.items():
        save_file(tensors, temporary / file, {"format": "pt"} | base)
    if recipe.model.use_lora:
        save_adapter_config(model, recipe.model.model_name, temporary)
    codec.save(temporary)
    (temporary / CONFIG).write_text(to_yaml(recipe), encoding="utf-8", newline="\n")
    try:
        torch.save(state, temporary / STATE)
    except RuntimeError as error:  # how it tells of a full disk
        raise OSError(f"{STATE} could not be written whole; is the disk full?") from error
    write_manifest(temporary, update=state["update"], keep=keep)
    if final.exists():  # the same epoch again, when a run goes on that had ended in the middle of it
        os.rename(final, old)
    os.rename(temporary, final)
    flush_to_disk(run)
    _link(run, "latest", name)
    if best:
        _link(run, "best", name)
    shutil.rmtree(old, ignore_errors=True)
    _delete_superseded(run)


def _link(run: Path, link: str, name: str) -> None:
    temporary = run / f".{link}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, run / link)
    flush_to_disk(run)


def _delete_superseded(run: Path) -> None:
    linked = {os.readlink(run / link) for link in LINKS if (run / link).is_symlink()}
    for directory in _complete(run):
        if not read_manifest(directory).keep and directory.name not in linked:
            old = run / f".{directory.name}.old"
            os.rename(directory, old)  # gone at once, not file by file
            shutil.rmtree(old)


def _complete(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    directories = [path for path in run.iterdir() if NAME.fullmatch(path.name) and not path.is_symlink()]
    return sorted((d for d in directories if (d / MANIFEST).is_file()), key=lambda d: read_manifest(d).update)


def settle(run: Path) -> Path | None:
    """Finish or undo what a kill cut off while a checkpoint was saved or deleted; the newest one, if there is any.

    A checkpoint that was complete but not in its place yet gets there, half ones go, and `latest` and `best` point at
    something that exists. Only the process that trains a run may do this.

    Raises:
        UserError: something in the run is not as a kill can leave it; nothing was changed.
    """
    if not run.is_dir():
        return None
    _require_whole(run)
    for link in LINKS:
        if (path := run / f".{link}.tmp").is_symlink():
            path.unlink()
    for path in sorted(run.iterdir()):
        if (match := LEFTOVER.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
            final = run / match[1]
            if match[3] == "tmp" and (path / MANIFEST).is_file() and not final.exists():
                os.rename(path, final)
            else:  # a half one; one that was about to replace another, and is made again; one that was replaced
                shutil.rmtree(path)
    complete, latest = _complete(run), run / "latest"
    if not latest.is_dir() and latest.is_symlink():
        where = f"{latest} leads to {os.readlink(latest)}, which is not there"
        if not complete:
            raise UserError(f"{where}; put it back, or delete the link to begin anew")
        print(f"{where}: going on from {complete[-1].name}")
    if not complete and not latest.is_dir():
        return None
    if complete and (not latest.is_dir() or read_manifest(latest).update < read_manifest(complete[-1]).update):
        _link(run, "latest", complete[-1].name)
    if (run / "best").is_symlink() and not (run / "best").is_dir():
        (run / "best").unlink()
    return latest.resolve()


def _require_whole(run: Path) -> None:
    """Raises UserError where a run holds what no training leaves, not even one that was killed.

    That is what interrupted copies and hands make: what it holds may be all that is left of a training.
    """
    for path in (run / link for link in LINKS):
        if path.is_symlink():
            target = path.resolve() if Path(os.readlink(path)).parent != Path() else run.resolve() / os.readlink(path)
            if target.parent != run.resolve() or not NAME.fullmatch(target.name):
                raise UserError(f"{path} leads to {os.readlink(path)}, which is no checkpoint of this run; delete the link, training makes it again")  # fmt: skip
        elif path.exists():
            copies = [d.name for d in _complete(run) if path.is_dir() and (path / MANIFEST).is_file() and read_manifest(d) == read_manifest(path)]  # fmt: skip
            is_checkpoint = path.is_dir() and (path / MANIFEST).is_file()
            fix = f"rename it to step_{read_manifest(path).update}" if is_checkpoint else "move it away"
            if copies:
                fix = f"delete it, it is a copy of {copies[0]}, and training makes the link again"
            raise UserError(f"{path} is no link to a checkpoint, as training makes it (scp -r and cp -L copy links as directories): {fix}")  # fmt: skip
    for path in sorted(run.iterdir()):
        if NAME.fullmatch(path.name) and not (path / MANIFEST).is_file():
            found = ", ".join(sorted(each.name for each in path.iterdir())) if path.is_dir() else "it is no directory"
            others = [d.name for d in _complete(run)]
            instead = f"to go on from {others[-1]}" if others else f"(all of {run}, to begin anew)"
            raise UserError(f"{path} is no complete checkpoint: it has no {MANIFEST} (there is {found or 'nothing'}); copy it again, or move it away {instead}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- loading


def load_model(directory: Path, device: torch.device | str = "cpu") -> tuple[OpenVLA, Codec, RecipeConfig]:
    """The model, its codec and its recipe from a checkpoint directory; in evaluation mode.

    Raises:
        UserError: a file is missing, unreadable or of another model, or the published weights are not those that it was
            trained on; the line names the file.
    """
    (loaded,) = load_models([directory], device)
    return loaded


def load_models(
    directories: Sequence[Path], device: torch.device | str = "cpu"
) -> list[tuple[OpenVLA, Codec, RecipeConfig]]:
    """As `load_model`, of several directories; models with adapters of the same size on the same base share it."""
    loaded: list[tuple[OpenVLA, Codec, RecipeConfig]] = []
    for directory in directories:
        verify(directory)
        recipe, codec = load_recipe_of(directory), Codec.load(directory)
        if recipe.model.architecture is not None:
            with torch.device("meta"):  # before memory is taken: what it says about its size is so
                _require_fit(directory, saved_tensors(build_model(recipe, codec, "meta")))
        sizes = recipe.model, codec.proprio_dim
        alike = [m for m, c, r in loaded if recipe.model.use_lora and (r.model, c.proprio_dim) == sizes]
        model = twin(alike[0]) if alike else build_model(recipe, codec, device)
        load_trained(directory, model)
        loaded.append((model.eval(), codec, recipe))
    return loaded


def load_trained(directory: Path, model: OpenVLA) -> None:
    """Read what a checkpoint holds, once verified, into a model that `build_model` made of its recipe, maybe in parts.

    Raises as `load_model`.
    """
    parts = saved_tensors(model)
    _require_fit(directory, parts)
    for file, tensors in parts.items():
        path = directory / file
        with safe_open(path, framework="pt") as saved:
            base = (saved.metadata() or {}).get("base_fingerprint")
            if base != model.base_fingerprint:
                name = load_recipe_of(directory).model.model_name
                raise UserError(f"{path} was trained on other weights (fingerprint {str(base)[:12]}) than {name} has now ({str(model.base_fingerprint)[:12]}); put those back there")  # fmt: skip
            for name, tensor in tensors.items():
                stored = saved.get_tensor(name)
                if not is_finite(stored):
                    raise UserError(f"{path}: {name} has NaN or infinity; {instead_of(directory)}")
                tensor.copy_(placed_like(stored, tensor))


def _require_fit(directory: Path, parts: dict[str, dict[str, torch.Tensor]]) -> None:
    """Raises UserError unless a checkpoint's files hold these tensors: the same names, shapes, and all floating point."""
    for file, tensors in parts.items():
        path = files.require_regular(directory / file, "use another checkpoint")
        try:
            with safe_open(path, framework="pt") as saved:
                there = {n: (saved.get_slice(n).get_shape(), saved.get_slice(n).get_dtype()) for n in saved.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read ({str(error)[:120]}); use another checkpoint") from None
        wrong = there.keys() ^ tensors.keys()
        wrong |= {n for n, (shape, kind) in there.items() if n in tensors and (shape != list(tensors[n].shape) or kind not in FLOATS)}  # fmt: skip
        if wrong:
            raise UserError(f"{path} does not fit {CONFIG} beside it: {', '.join(sorted(wrong)[:5])}")


def load_recipe_of(directory: Path) -> RecipeConfig:
    """The resolved recipe that a checkpoint was trained with. Raises UserError where this version does not know it."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} is no checkpoint: it has no {CONFIG}")
    try:
        return from_yaml(RecipeConfig, files.read_text(path, MAX_RECIPE_BYTES), str(path))
    except UserError as error:
        raise UserError(f"{error}; use the version of robofactory that wrote it") from None


def load_training_state(directory: Path) -> dict[str, Any]:
    """What `--resume` needs beside the weights.

    Raises:
        UserError: it is not there or damaged.
    """
    path = directory / STATE
    if not path.exists():
        raise UserError(f"no {STATE} in {directory}; it cannot be resumed, only evaluated; {instead_of(directory)}")
    verify(directory, STATE)
    try:
        with zipfile.ZipFile(path) as archive:
            is_plain = all(each.compress_type == zipfile.ZIP_STORED for each in archive.infolist())
        state = torch.load(path, map_location="cpu", weights_only=True) if is_plain else None
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:120]}); {instead_of(directory)}") from None  # fmt: skip
    if not isinstance(state, dict):
        raise UserError(f"{path} is no training state; {instead_of(directory)}")
    return state


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be in parts, as one, on the CPU. All processes have to ask for it together."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous().cpu()


def placed_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `whole`: on the device of another tensor, in parts as that one is. Every process has it all."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
