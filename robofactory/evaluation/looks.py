"""What was seen of an agent's policy in one episode, on disk: `{directory}/looks/seed_10003_agent0.npz`."""

import io
import math
import re
import zipfile
import zlib
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8, jaxtyped

from robofactory.files import write_atomically

LOOKS = "looks"
MAX_BYTES = 64_000_000  # of all arrays of a file; those of the 7B with three views have some 5 MB
MAGIC = b"\x93NUMPY\x01\x00"
HEADER = re.compile(
    r"\{'descr': '([|<][ufi]\d|<U\d{1,6})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \}\s*"
)


@dataclass(frozen=True)
class Looks:
    """One agent in one episode: at `steps` how it shared its attention, at `moments`, some of them, all of `policy.Look`.

    digest: of the episode, so that what was seen in another one is not taken for it.
    attention: the mean over the action tokens.
    """

    digest: str
    steps: Int64[np.ndarray, " n"]
    parts: list[str]
    attention: Float32[np.ndarray, "n layers parts"]
    moments: Int64[np.ndarray, " m"]
    views: list[str]
    pictures: UInt8[np.ndarray, "m v side side 3"]
    heat: Float32[np.ndarray, "m v grid grid"]
    names: list[str]
    values: Float32[np.ndarray, "a bins"]
    probabilities: Float32[np.ndarray, "m a bins"]
    chosen: Int64[np.ndarray, "m a"]


def path_of(directory: Path, seed: int, agent: int) -> Path:
    return directory / LOOKS / f"seed_{seed}_agent{agent}.npz"


def save(looks: Looks, path: Path) -> None:
    """Write the file whole or not at all."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **vars(looks))
    write_atomically(path, stream.getvalue())


def load(path: Path, digest: str) -> Looks | None:
    """What was seen in the episode of this digest.

    None if nobody looked, or at another episode, or if the file is an older version's, damaged, or not as one is written.
    """
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            arrays = _read_arrays(file)
        if arrays.keys() != {field.name for field in fields(Looks)} or str(arrays["digest"]) != digest:
            return None
        words = {name: arrays[name].tolist() for name in ("digest", "parts", "views", "names")}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError):
        return None
    kept = {**arrays, **words}
    return Looks(**kept) if _is_whole(kept) else None


def _read_arrays(file: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """As `numpy.load` reads numbers and words, in memory that the file cannot choose; nothing else is read.

    Raises:
        ValueError: too large, or an array that is not as it says.
    """
    if sum(member.file_size for member in file.infolist()) > MAX_BYTES:
        raise ValueError("too large")
    arrays = {}
    for member in file.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("compressed in another way")
        data = file.read(member)
        start = len(MAGIC) + 2 + int.from_bytes(data[len(MAGIC) : len(MAGIC) + 2], "little")
        header = HEADER.fullmatch(data[len(MAGIC) + 2 : start].decode("latin-1"))
        if header is None or not data.startswith(MAGIC):
            raise ValueError("not an array of numbers or words")
        dtype, shape = np.dtype(header[1]), [int(size) for size in header[3].replace(" ", "").split(",") if size]
        if math.prod(shape) * dtype.itemsize != len(data) - start:
            raise ValueError("an array of another size")
        values = np.frombuffer(data, dtype, offset=start)
        arrays[member.filename.removesuffix(".npy")] = values.reshape(shape, order="F" if header[2] == "True" else "C")
    return arrays


def _is_whole(kept: dict[str, Any]) -> bool:
    """Whether shapes, words and numbers go together, so that all of it can be drawn."""
    arrays = [(field.type, kept[field.name]) for field in fields(Looks) if isinstance(kept[field.name], np.ndarray)]
    with jaxtyped("context"):  # a letter is one size in all of them
        if not all(isinstance(array, kind) and array.size for kind, array in arrays):  # type: ignore[arg-type]
            return False
    counts = {"parts": kept["attention"].shape[2], "views": kept["pictures"].shape[1], "names": len(kept["values"])}
    for name, count in counts.items():
        words = kept[name]
        if not (
            isinstance(words, list)
            and all(isinstance(word, str) for word in words)
            and len(set(words)) == len(words) == count
        ):
            return False
    shares = [kept[name] for name in ("attention", "heat", "probabilities")]
    return bool(
        set(kept["views"]) <= set(kept["parts"])
        and all(before < after for before, after in pairwise(kept["steps"]))
        and set(kept["moments"].tolist()) <= set(kept["steps"].tolist())
        and all(np.isfinite(each).all() and (each >= 0.0).all() for each in shares)
        and np.isfinite(kept["values"]).all()
        and kept["attention"].sum(axis=-1).all()
        and kept["probabilities"].max(axis=-1).all()
        and ((kept["chosen"] >= 0) & (kept["chosen"] < kept["values"].shape[1])).all()
    )
