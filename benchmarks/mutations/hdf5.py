"""Damage to HDF5: datasets, groups, and links that lead elsewhere."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

from benchmarks.mutations.damage import FILE, Damage, Inapplicable, Kinds, outside

HDF5 = Kinds(FILE)


def of_hdf5(is_harmless: bool = False, is_loss: bool = False) -> Callable:
    def register(change: Callable[[h5py.File, str, Random, Path], str]) -> Callable:
        def apply(path: Path, random: Random) -> str:
            with h5py.File(path, "r+") as file:
                names: list[str] = []
                file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
                name = random.choice(names)
                return f"{name} {change(file, name, random, path)}"

        HDF5[change.__name__] = Damage(change.__name__, apply, is_harmless, is_loss)
        return change

    return register


def put(file: h5py.File, name: str, values: Any) -> None:
    del file[name]
    file[name] = values


@of_hdf5()
def dataset_dropped(file, name, random, path):
    del file[name]
    return ""


@of_hdf5()
def group_dropped(file, name, random, path):
    group = file[name].parent.name
    del file[group]
    return group


@of_hdf5()
def group_instead(file, name, random, path):
    del file[name]
    file.create_group(name)
    return ""


@of_hdf5()
def dataset_instead_of_its_group(file, name, random, path):
    group = file[name].parent.name
    put(file, group, np.zeros(3))
    return group


@of_hdf5(is_harmless=True)
def dataset_added(file, name, random, path):
    file["of_a_later_version"] = np.arange(3)
    return ""


@of_hdf5()
def dataset_retyped(file, name, random, path):
    values, kind = file[name][:], random.choice(["S8", "bool", "complex64", "f8", "i8", "compound", "text"])
    if kind == "compound":
        put(file, name, np.zeros(len(values), [("a", "f4"), ("b", "i4")]))
    elif kind == "text":
        put(file, name, ["words"] * len(values))
    else:
        put(file, name, values.astype(kind))
    return kind


@of_hdf5()
def dataset_reshaped(file, name, random, path):
    values = file[name][:]
    shape = random.choice(["longer", "shorter", "flat", "deeper", "scalar", "nothing", "wider", "narrower"])
    changed = {
        "longer": lambda: np.concatenate([values, values]),
        "shorter": lambda: values[: len(values) // 2],
        "flat": lambda: values.reshape(-1),
        "deeper": lambda: values[..., None],
        "scalar": lambda: values.reshape(-1)[0],
        "nothing": lambda: values[:0],
        "wider": lambda: np.concatenate([values, values], axis=-1),
        "narrower": lambda: values[..., :1],
    }[shape]()
    put(file, name, changed)
    return shape


@of_hdf5(is_loss=True)
def dataset_not_finite(file, name, random, path):
    values = file[name][:]
    if values.dtype.kind != "f":
        raise Inapplicable
    values.reshape(-1)[random.randrange(values.size)] = bad = random.choice([np.nan, np.inf])
    put(file, name, values)
    return str(bad)


@of_hdf5(is_loss=True)
def dataset_without_storage(file, name, random, path):
    """Declared sizes of terabytes that take no byte."""
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    chunks = (1, *shape[1:])
    file.create_dataset(name, shape=(10**9, *shape[1:]), dtype=kind, chunks=chunks)
    return "10^9 rows"


@of_hdf5(is_loss=True)
def dataset_is_huge(file, name, random, path):
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape=(*shape[:-1], 10**10), dtype=kind, chunks=(*(1 for _ in shape[:-1]), 1000))
    return "10^10 columns"


@of_hdf5(is_loss=True)
def external_link(file, name, random, path):
    del file[name]
    file[name] = h5py.ExternalLink(str(outside(path) / "secret.h5"), "/data")
    return ""


@of_hdf5(is_loss=True)
def external_storage(file, name, random, path):
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    size = int(np.prod(shape)) * kind.itemsize
    file.create_dataset(name, shape=shape, dtype=kind, external=[(str(outside(path) / "secret.txt"), 0, size)])
    return ""


@of_hdf5(is_loss=True)
def virtual_dataset(file, name, random, path):
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    layout = h5py.VirtualLayout(shape=shape, dtype=kind)
    layout[:] = h5py.VirtualSource(str(outside(path) / "secret.h5"), "data", shape=shape)
    file.create_virtual_dataset(name, layout)
    return ""


@of_hdf5(is_loss=True)
def soft_link(file, name, random, path):
    del file[name]
    target = random.choice(["/nowhere", f"/{name}", "/"])
    file[name] = h5py.SoftLink(target)
    return target
