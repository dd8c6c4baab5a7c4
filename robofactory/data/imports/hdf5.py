"""What an HDF5 file has within itself, and all of it: no link, no other file, nothing that was never written.

HDF5 can store a dataset in any local file, link to others, and declare terabytes that are nowhere: what was never
written reads as zeros. None of that is in a recording, so each is refused before it is read.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from robofactory import files
from robofactory.data.imports.source import FETCH_AGAIN, needs
from robofactory.errors import UserError

try:
    import h5py
except ImportError:
    raise needs("h5py") from None

MAX_BYTES = 512_000_000  # of a chunk, and of what is read at once
# What h5py raises of a damaged file, besides OSError.
DAMAGED = (RuntimeError, KeyError, ValueError, TypeError, OverflowError)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator["h5py.File"]:
    """A file to read; whatever HDF5 says against it within the context is one line.

    Raises:
        UserError: it is no whole HDF5 file.
    """
    files.require_regular(path)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except UserError:
        raise
    except (OSError, *DAMAGED) as error:
        raise UserError(f"{path} cannot be read as HDF5 ({' '.join(str(error).split())}); {FETCH_AGAIN}") from None


def is_group(place: Any) -> bool:
    return isinstance(place, h5py.Group)


def names(place: Any) -> list[str]:
    """What is in a group, without following a link; of what is none, nothing."""
    return sorted(place) if is_group(place) else []


def find(group: Any, name: str) -> Any:
    """A group or a dataset at a path below a group; None: there is none.

    Raises:
        UserError: a link is on the way.
    """
    for part in name.split("/"):
        link = group.get(part, getlink=True) if is_group(group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            where = f"{group.file.filename}: {group.name.rstrip('/')}/{part}"
            raise UserError(f"{where} is a link; only what is in this file itself is read")
        group = group[part]
    return group


def find_dataset(group: Any, name: str, num_axes: int | None = None) -> Any:
    """A dataset of numbers that is whole.

    Raises:
        UserError: it is missing, something else, or not all of it is in this file.
    """
    data = find(group, name)
    where = f"{group.file.filename}: {group.name.rstrip('/')}/{name}"
    if data is None:
        raise UserError(f"{where} is missing; {FETCH_AGAIN}")
    if not isinstance(data, h5py.Dataset):
        raise UserError(f"{where} is a group; needed: a dataset of numbers")
    if data.shape is None or data.dtype.kind not in "fiub" or data.dtype.itemsize > 8:
        raise UserError(f"{where} has values of type {data.dtype}; needed: numbers")
    if num_axes is not None and data.ndim != num_axes:
        raise UserError(f"{where} has the shape {list(data.shape)}; needed: {num_axes} axes")
    if data.external or data.is_virtual:
        raise UserError(f"{where} is kept in another file; only what is in this one is read")
    if not _is_whole(data):
        raise UserError(f"{where} of the shape {list(data.shape)} was never written as a whole; {FETCH_AGAIN}")
    if data.chunks is not None and math.prod(data.chunks) * data.dtype.itemsize > MAX_BYTES:
        raise UserError(f"{where} has chunks of more than {MAX_BYTES:,} bytes")
    return data


def _is_whole(data: Any) -> bool:
    if data.size == 0:
        return True
    if data.chunks is None:
        return data.id.get_storage_size() >= data.size * data.dtype.itemsize
    wanted = math.prod(-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True))
    return data.id.get_num_chunks() >= wanted


def row_bytes(data: Any) -> int:
    return math.prod(data.shape[1:]) * data.dtype.itemsize


def read(data: Any, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
    """These rows. Raises UserError where they are too large for memory."""
    if (stop - start) * row_bytes(data) > MAX_BYTES:
        raise UserError(f"{data.file.filename}: {data.name} has more than {MAX_BYTES:,} bytes in {stop - start} rows")
    return data[start:stop]
