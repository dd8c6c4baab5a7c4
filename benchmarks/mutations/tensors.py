"""Damage to safetensors: the header's text, and the tensors."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from benchmarks.mutations.damage import FILE, Damage, Kinds
from benchmarks.mutations.trees import JSON, written_json

SAFETENSORS = Kinds(FILE)


def of_header(damage: Damage) -> Damage:
    """A damage to JSON, done to the file's header."""

    def apply(path: Path, random: Random) -> str:
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        text = path.with_name("header.json")
        text.write_bytes(content[8 : 8 + size])
        what = damage.apply(text, random)
        header = text.read_bytes()
        text.unlink()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
        return f"header: {what}"

    return Damage(f"header_{damage.name}", apply)


for each in JSON.values():
    if each.name not in FILE and each.name != "unknown_key":
        SAFETENSORS[f"header_{each.name}"] = of_header(each)


def of_tensors(is_harmless: bool = False, is_loss: bool = False) -> Callable:
    def register(change: Callable[[dict[str, torch.Tensor], str, Random], str]) -> Callable:
        def apply(path: Path, random: Random) -> str:
            content = path.read_bytes()
            metadata = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).get("__metadata__")
            tensors = load_file(path)
            name = random.choice(sorted(tensors))
            what = change(tensors, name, random)
            save_file(tensors, path, metadata)
            return f"{name} {what}"

        SAFETENSORS[change.__name__] = Damage(change.__name__, apply, is_harmless, is_loss)
        return change

    return register


@of_tensors(is_loss=True)
def tensor_dropped(tensors, name, random):
    del tensors[name]
    return ""


@of_tensors(is_loss=True)
def tensor_renamed(tensors, name, random):
    tensors[name + "_"] = tensors.pop(name)
    return ""


@of_tensors()
def tensor_added(tensors, name, random):
    tensors["of_a_later_version"] = torch.zeros(3)
    return ""


@of_tensors()
def tensor_retyped(tensors, name, random):
    kind = random.choice([torch.int64, torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.uint8])
    tensors[name] = tensors[name].to(kind)
    return str(kind)


@of_tensors(is_loss=True)
def tensor_not_finite(tensors, name, random):
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[random.randrange(tensors[name].numel())] = bad = random.choice([torch.nan, torch.inf])
    return str(bad)


@of_tensors(is_loss=True)
def tensor_reshaped(tensors, name, random):
    tensor, how = tensors[name], random.choice(["flat", "longer", "shorter", "nothing", "scalar"])
    changed = {
        "flat": lambda: tensor.reshape(-1)[:-1],
        "longer": lambda: torch.cat([tensor, tensor]),
        "shorter": lambda: tensor[:-1],
        "nothing": lambda: tensor[:0],
        "scalar": lambda: tensor.reshape(-1)[0],
    }[how]()
    tensors[name] = changed.contiguous().clone()
    return how


def declared_header(path: Path, random: Random) -> str:
    size = random.choice([2**63, 2**40, 2**24, 0, 3])
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    return f"a header of {size} bytes"


SAFETENSORS["declared_header"] = Damage("declared_header", declared_header, is_loss=True)


def declared_tensor(path: Path, random: Random) -> str:
    """A tensor of terabytes."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    name = random.choice([name for name in header if name != "__metadata__"])
    header[name]["shape"] = [10**6, 10**6]
    header[name]["data_offsets"] = [0, 2 * 10**12]
    text = written_json(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"{name}: 10^12 numbers"


SAFETENSORS["declared_tensor"] = Damage("declared_tensor", declared_tensor, is_loss=True)
