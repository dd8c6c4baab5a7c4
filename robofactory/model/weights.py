"""Published weights: the official Hugging Face layout into our modules and back. No remote code is run.

A directory with `config.json` and safetensors files, one or sharded with an index. Our names are the official ones but
for one: timm's LayerScale parameter `gamma` is `scale_factor` there.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from robofactory import documents, files
from robofactory.documents import Document
from robofactory.errors import UserError
from robofactory.model.openvla import OpenVLA, ProprioProjector, build_from_config
from robofactory.paths import find_weights
from robofactory.published import ADVICE, CONFIG, read_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROPRIO = "proprio_projector.safetensors"  # ours, beside the official files
PYTORCH = {"format": "pt"}  # what transformers wants to read in a file's metadata
FLOATS = ("BF16", "F16", "F32", "F64")  # what weights may be stored as
PROBLEMS_SHOWN = 20
SHARD_BYTES = 7_000_000_000  # the published model's
OPENVLA_7B = {  # what its config.json says about sizes; those of the language model are LlamaConfig's defaults
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "image_sizes": [224, 224],
    "use_fused_vision_backbone": True,
    "arch_specifier": "no-align+fused-gelu-mlp",
    "n_action_bins": 256,
    "pad_to_multiple_of": 64,
    "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000},
}


def official_name(name: str) -> str:
    """The published name of one of our tensors."""
    return name.replace(".ls1.gamma", ".ls1.scale_factor").replace(".ls2.gamma", ".ls2.scale_factor")


def published_config(model_name: str) -> dict[str, Any]:
    """The `config.json` of published weights. That of openvla-7b is known without them.

    Raises:
        UserError: no such directory, nor hub id.
    """
    if model_name == "openvla/openvla-7b" and not Path(model_name).is_dir():
        return OPENVLA_7B
    return read_config(find_weights(model_name, files=[CONFIG]))


def load_openvla(
    directory: Path,
    global_token: bool,
    proprio_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    timm_overrides: dict[str, dict[str, Any]] | None = None,
) -> OpenVLA:
    """The published model in evaluation mode. A proprio projector is newly initialised unless its file is there too.

    Tensors are read one at a time from memory-mapped files, straight to `device` and `dtype`: there is never a second
    copy of the model. On a CPU in the files' own dtype nothing is copied at all. Each is summed on the way, which shows
    NaN and infinity at the speed of the memory.

    Raises:
        UserError: a file is missing or damaged, or tensors are missing, unknown, of another shape or kind of number, or
            not finite; all are named.
    """
    with torch.device("meta"):
        model = build_from_config(read_config(directory), global_token, proprio_dim, timm_overrides)
    ours = {official_name(name): name for name in model.state_dict()}
    places = _tensor_files(directory)
    proprio = [name for name in ours if name.startswith("proprio_projector.")]
    if (directory / PROPRIO).exists():
        places |= dict.fromkeys(proprio, files.inside(directory, PROPRIO, directory))
    elif proprio_dim is not None:
        model.proprio_projector = ProprioProjector(proprio_dim, model.language_model.config.hidden_size).to(
            device, dtype
        )
        for name in proprio:
            del ours[name]
    shapes = {name: list(model.state_dict()[ours[name]].shape) for name in ours}
    problems = [f"unknown {name}" for name in places if name not in ours]
    problems += [f"missing {name} {shapes[name]}" for name in ours if name not in places]
    tensors: dict[str, Tensor] = {}
    for path in sorted(set(places.values())):
        with _open(path, str(device)) as file:
            for name in sorted(file.keys() & ours.keys()):
                header = file.get_slice(name)
                if header.get_shape() != shapes[name]:
                    problems.append(f"{name} has shape {header.get_shape()}, expected {shapes[name]}")
                elif header.get_dtype() not in FLOATS:
                    problems.append(f"{name} is of {header.get_dtype()}, expected one of {', '.join(FLOATS)}")
                elif not problems:
                    tensors[ours[name]] = file.get_tensor(name).to(dtype)
                    problems += [] if is_finite(tensors[ours[name]]) else [f"{name} has NaN or infinity"]
    if problems:
        shown = sorted(problems)[:PROBLEMS_SHOWN]
        more = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise UserError(f"{directory}: the weights do not fit {CONFIG}: {'; '.join(shown)}{more}")
    model.load_state_dict(tensors, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]), "a tensor was never loaded"
    model.base_fingerprint, model.in_float32 = fingerprint(directory), dtype == torch.float32
    return model.eval()


def fingerprint(directory: Path) -> str:
    """SHA-256 that tells published weights apart, in seconds: of each tensor the name, dtype, shape and 64 elements.

    The same however the tensors are distributed over files.
    """
    digest = hashlib.sha256()
    places = _tensor_files(directory)
    opened = {path: safe_open(path, framework="pt") for path in set(places.values())}
    for name in sorted(places):
        tensor = opened[places[name]].get_tensor(name)  # memory-mapped: only what is looked at is read
        step = -(-tensor.numel() // 64)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.flatten()[::step].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers are, in one pass: what is not finite never leaves a sum."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


class Index(Document):
    """Of shards: official tensor name -> the file beside the index that holds it."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Official tensor name -> the one file that holds it.

    Raises:
        UserError: a file is missing, damaged, or not below the directory; index and files disagree.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / WEIGHTS).exists():
            pickles = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(kind))]
            instead = f", only {pickles[0]}, which could run code when it is read: convert it to safetensors" if pickles else "; copy the published weights there"  # fmt: skip
            raise UserError(f"neither {WEIGHTS} nor {INDEX} in {directory}{instead}")
        path = files.inside(directory, WEIGHTS, directory)
        with _open(path) as file:
            return dict.fromkeys(file.keys(), path)
    weight_map = documents.read_json(index, Index, ADVICE).weight_map
    shards = {name: files.inside(directory, name, index, ADVICE) for name in sorted(set(weight_map.values()))}
    for name, path in shards.items():
        with _open(path) as file:
            held = set(file.keys())
        named = {tensor for tensor, shard in weight_map.items() if shard == name}
        if wrong := sorted(named - held):
            raise UserError(f"{index}: {wrong[0]} should be in {name}, and is missing there; {ADVICE}")
        if wrong := sorted(held - named):
            other = weight_map.get(wrong[0])
            says = f"names {other} for it" if other else "does not name it"
            raise UserError(f"{path} holds {wrong[0]}, and {index.name} {says}; {ADVICE}")
    return {tensor: shards[name] for tensor, name in weight_map.items()}


@contextlib.contextmanager
def _open(path: Path, device: str = "cpu") -> "Iterator[safe_open]":
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({str(error)[:120]}); {ADVICE}") from None


# ----------------------------------------------------------------------------------------------------------- writing


def save_openvla(model: OpenVLA, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model's tensors as they are published: safetensors in shards of at most `shard_bytes`, and their index.

    A proprio projector, for which the official layout has no place, goes into a file of its own; the official code does
    not read it. `config.json` is the caller's.
    """
    shards: list[dict[str, Tensor]] = [{}]
    proprio: dict[str, Tensor] = {}
    room = shard_bytes
    for name, tensor in model.state_dict().items():
        if name.startswith("proprio_projector."):
            proprio[name] = tensor
            continue
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][official_name(name)] = tensor
        room -= tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        save_file({name: tensor.cpu().contiguous() for name, tensor in shard.items()}, directory / file, PYTORCH)
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8", newline="\n")
    if proprio:
        save_file({name: tensor.cpu() for name, tensor in proprio.items()}, directory / PROPRIO, PYTORCH)
