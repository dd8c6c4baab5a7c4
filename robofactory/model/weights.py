"""Published weights: the official Hugging Face layout into our modules and back. No remote code is run.

A directory with `config.json` and safetensors files, one or sharded with an index. Our names are the official ones but
for one: timm's LayerScale parameter `gamma` is `scale_factor` there.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from robofactory.errors import UserError
from robofactory.model.openvla import OpenVLA, ProprioProjector, build_from_config
from robofactory.paths import find_weights

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROPRIO = "proprio_projector.safetensors"  # ours, beside the official files
PYTORCH = {"format": "pt"}  # what transformers wants to read in a file's metadata
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


def read_config(directory: Path) -> dict[str, Any]:
    """The published `config.json`."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"no {CONFIG} in {directory}; it is not a published model")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy it again") from None


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
    copy of the model. On a CPU in the files' own dtype nothing is copied at all.

    Raises:
        UserError: a file is missing or damaged, or tensors are missing, unknown or of another shape; all are named.
    """
    with torch.device("meta"):
        model = build_from_config(read_config(directory), global_token, proprio_dim, timm_overrides)
    ours = {official_name(name): name for name in model.state_dict()}
    files = _tensor_files(directory)
    proprio = [name for name in ours if name.startswith("proprio_projector.")]
    if (directory / PROPRIO).is_file():
        files |= dict.fromkeys(proprio, directory / PROPRIO)
    elif proprio_dim is not None:
        model.proprio_projector = ProprioProjector(proprio_dim, model.language_model.config.hidden_size).to(
            device, dtype
        )
        for name in proprio:
            del ours[name]
    shapes = {name: list(model.state_dict()[ours[name]].shape) for name in ours}
    problems = [f"unknown {name}" for name in files if name not in ours]
    tensors: dict[str, Tensor] = {}
    missing = set(ours)
    for path in sorted(set(files.values())):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys() & ours.keys():
                    missing.discard(name)
                    shape = file.get_slice(name).get_shape()
                    if shape == shapes[name]:
                        tensors[ours[name]] = file.get_tensor(name).to(dtype)
                    else:
                        problems.append(f"{name} has shape {shape}, expected {shapes[name]}")
        except (SafetensorError, FileNotFoundError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy it again") from None
    problems += [f"missing {name} {shapes[name]}" for name in missing]
    if problems:
        raise UserError(f"{directory}: the weights do not fit {CONFIG}: {'; '.join(sorted(problems))}")
    model.load_state_dict(tensors, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]), "a tensor was never loaded"
    model.base_fingerprint, model.in_float32 = fingerprint(directory), dtype == torch.float32
    return model.eval()


def fingerprint(directory: Path) -> str:
    """SHA-256 that tells published weights apart, in seconds: of each tensor the name, dtype, shape and 64 elements.

    The same however the tensors are distributed over files.
    """
    digest = hashlib.sha256()
    files = _tensor_files(directory)
    opened = {path: safe_open(path, framework="pt") for path in set(files.values())}
    for name in sorted(files):
        tensor = opened[files[name]].get_tensor(name)  # memory-mapped: only what is looked at is read
        step = -(-tensor.numel() // 64)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.flatten()[::step].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Official tensor name -> the file that holds it."""
    if (directory / INDEX).is_file():
        try:
            weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{directory / INDEX}: no readable weight_map ({error}); copy it again") from None
        return {name: directory / file for name, file in weight_map.items()}
    path = directory / WEIGHTS
    if not path.is_file():
        raise UserError(f"neither {WEIGHTS} nor {INDEX} in {directory}; copy the published weights there")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: path for name in file.keys()}  # noqa: SIM118  # no dict
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from None


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
