"""Arrays of zarr's formats 2 and 3, in a directory or a .zip, read without trusting them.

Metadata are checked before anything is unpacked; only decompressors are run, never a codec that could run code; a chunk
that is missing or does not unpack to its size is an error: zarr would read the first as fill values, so as zeros, and
the second as whatever lies in memory.

Source: zarr's specifications of both formats; the header of a Blosc frame, c-blosc, README_CHUNK_FORMAT.rst.
"""

import bz2
import itertools
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped
from pydantic import Field

from robofactory import files
from robofactory.data.imports.frames import Unsuitable
from robofactory.data.imports.source import FETCH_AGAIN, needs
from robofactory.documents import Count, Document, PositiveCount, parse_json
from robofactory.errors import UserError

try:
    import numcodecs.blosc
except ImportError:
    raise needs("numcodecs") from None

MAX_METADATA_BYTES = 1_000_000  # of an array
MAX_CHUNK_BYTES = 512_000_000  # unpacked, and so many that are read at once
BLOSC_HEADER_BYTES = 16
KINDS = {"b": "bool", "i": "int", "u": "uint", "f": "float"}  # numpy's letters, zarr 3's words
MISSING = f"zarr would read it as zeros; {FETCH_AGAIN}"

Kind = TypeVar("Kind")
Chunks = Annotated[list[PositiveCount], Field(max_length=8)]


class Compressor(Document):
    id: str


class Format2(Document):
    """`.zarray`."""

    zarr_format: Literal[2]
    shape: Annotated[list[Count], Field(max_length=8)]
    chunks: Chunks
    dtype: str | list[Any]
    compressor: Compressor | None
    filters: list[Compressor] | None = None
    order: Literal["C", "F"] = "C"
    dimension_separator: Literal[".", "/"] = "."


class ChunkShape(Document):
    chunk_shape: Chunks


class ChunkGrid(Document):
    name: Literal["regular"]
    configuration: ChunkShape


class Separator(Document):
    separator: Literal[".", "/"] | None = None


class KeyEncoding(Document):
    name: Literal["default", "v2"]
    configuration: Separator | None = None


class Codec(Document):
    name: str
    configuration: dict[str, Any] | None = None


class Node(Document):
    """What `zarr.json` says first."""

    node_type: Literal["array", "group"]


class Format3(Document):
    """`zarr.json` of an array."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Annotated[list[Count], Field(max_length=8)]
    data_type: str | dict[str, Any]
    chunk_grid: ChunkGrid
    chunk_key_encoding: KeyEncoding
    codecs: list[Codec]


# -------------------------------------------------------------------------------------------------------------- store


class Store:
    """The files of a zarr by their names; a context that closes the .zip."""

    def __init__(self, path: Path):
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        if path.is_dir():
            return
        files.require_regular(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path} is neither a directory nor a whole .zip ({error})") from None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        if self._archive is not None:
            self._archive.close()

    def list(self, folder: str) -> set[str]:
        """The names in a folder of the store."""
        if self._archive is None:
            place = self.path / folder
            return {each.name for each in place.iterdir()} if place.is_dir() else set()
        inside = (name.removeprefix(f"{folder}/") for name in self._archive.namelist() if name.startswith(f"{folder}/"))
        return {name.split("/")[0] for name in inside if name}

    def has(self, name: str) -> bool:
        if self._archive is None:
            return (self.path / name).exists()
        return name in self._archive.NameToInfo

    def read(self, name: str, max_bytes: int) -> bytes:
        """A file's content.

        Raises:
            UserError: it is missing, leads out of the store, is larger than that, or damaged.
        """
        if self._archive is None:
            path = files.inside(self.path, name, self.path, FETCH_AGAIN)
            with open(path, "rb") as file:
                content = file.read(max_bytes + 1)
        elif not self.has(name):
            raise UserError(f"{self.path} has no {name}; {FETCH_AGAIN}")
        else:
            try:
                with self._archive.open(name) as file:
                    content = file.read(max_bytes + 1)
            except (
                zipfile.BadZipFile,
                RuntimeError,
                NotImplementedError,
                EOFError,
                zlib.error,
                lzma.LZMAError,
            ) as error:
                raise UserError(f"{self.path}: {name} cannot be unpacked ({error}); {FETCH_AGAIN}") from None
        if len(content) > max_bytes:
            raise UserError(f"{self.path}: {name} has more than the {max_bytes:,} bytes that it may have")
        return content


# -------------------------------------------------------------------------------------------------------------- array


@dataclass(frozen=True)
class Array:
    """What the metadata of an array say. `order`: of the values in a chunk, C or F; `prefix`: of its chunks' names."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]
    compressors: tuple[str, ...]
    prefix: str
    separator: str

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunks) * self.dtype.itemsize

    def require_chunks(self, store: Store, start: int, stop: int) -> None:
        """Raises UserError unless all chunks of these rows are there."""
        for index in itertools.product(*self._touched([(start, stop), *((0, size) for size in self.shape[1:])])):
            if not store.has(self._file(index)):
                raise UserError(f"{store.path}: {self.name} has no chunk {self._file(index)}; {MISSING}")

    def blocks(self, store: Store, start: int, stop: int) -> Iterator[Shaped[np.ndarray, "..."]]:
        """These rows (of the first axis), in pieces that lie in one row of chunks and are not too large."""
        at_once = max(1, min(self.chunks[0], MAX_CHUNK_BYTES // max(1, self.row_bytes)))
        for piece in range(start - start % at_once, stop, at_once):
            yield self.read(store, max(piece, start), min(piece + at_once, stop))

    def read(self, store: Store, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
        """These rows. Raises UserError where a chunk is missing or damaged."""
        ranges = [(start, stop), *((0, size) for size in self.shape[1:])]
        if (stop - start) * self.row_bytes > MAX_CHUNK_BYTES:
            raise UserError(f"{store.path}: {self.name} has more than {MAX_CHUNK_BYTES:,} bytes in one episode")
        values = np.empty([last - first for first, last in ranges], self.dtype.newbyteorder("="))
        for index in itertools.product(*self._touched(ranges)):
            chunk = self._chunk(store, index)
            to, of = [], []
            for at, size, (first, last) in zip(index, self.chunks, ranges, strict=True):
                begin, end = max(first, at * size), min(last, (at + 1) * size)
                to.append(slice(begin - first, end - first))
                of.append(slice(begin - at * size, end - at * size))
            values[tuple(to)] = chunk[tuple(of)]
        return values

    def _touched(self, ranges: Sequence[tuple[int, int]]) -> list[range]:
        """Of each axis, the numbers of the chunks that lie in these ranges."""
        return [range(a // size, -(-b // size)) for (a, b), size in zip(ranges, self.chunks, strict=True)]

    def _file(self, index: Sequence[int]) -> str:
        return self.prefix + (self.separator.join(map(str, index)))

    def _chunk(self, store: Store, index: Sequence[int]) -> Shaped[np.ndarray, "..."]:
        file = self._file(index)
        content = store.read(file, 2 * self.chunk_bytes + 65536)  # what does not get smaller gets hardly larger
        try:
            for position, compressor in enumerate(self.compressors):
                trailers = sum(each == "crc32c" for each in self.compressors[position + 1 :])
                content = DECOMPRESSORS[compressor](content, self.chunk_bytes + 4 * trailers)
            if len(content) != self.chunk_bytes:
                raise ValueError(f"it has {len(content)} bytes, not {self.chunk_bytes}")
        except (ValueError, OSError, RuntimeError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{store.path}: {self.name}: chunk {file} is damaged ({error}); {FETCH_AGAIN}") from None
        return np.frombuffer(content, self.dtype).reshape(self.chunks, order=self.order)


def list_arrays(store: Store, folder: str) -> list[str]:
    """The names of the arrays in a folder, in the order of the alphabet: a directory has none.

    Raises:
        UserError: there is something whose metadata are missing.
    """
    arrays = []
    for name in sorted(store.list(folder)):
        place = f"{folder}/{name}"
        if store.has(f"{place}/.zarray"):
            arrays.append(name)
        elif store.has(f"{place}/zarr.json"):
            if _metadata(store, f"{place}/zarr.json", Node).node_type == "array":
                arrays.append(name)
        elif store.list(place) and not store.has(f"{place}/.zgroup"):
            raise UserError(f"{store.path}: {place} has neither .zarray nor zarr.json; {FETCH_AGAIN}")
    return arrays


def open_array(store: Store, name: str) -> Array:
    """An array of numbers.

    Raises:
        UserError: there is none of this name, or what it says of itself is damaged.
        Unsuitable: its values are no numbers, or packed in a way that is not read.
    """
    if store.has(f"{name}/.zarray"):
        array = _from_format_2(name, _metadata(store, f"{name}/.zarray", Format2))
    elif store.has(f"{name}/zarr.json"):
        array = _from_format_3(name, _metadata(store, f"{name}/zarr.json", Format3))
    else:
        raise UserError(f"{store.path} has no array {name}")
    source = f"{store.path}: {name}"
    if len(array.shape) != len(array.chunks) or not array.shape:
        raise UserError(f"{source} has the shape {list(array.shape)} in chunks of {list(array.chunks)}; {FETCH_AGAIN}")
    if array.chunk_bytes > MAX_CHUNK_BYTES:
        raise UserError(
            f"{source} has chunks of {array.chunk_bytes:,} bytes, more than the {MAX_CHUNK_BYTES:,} allowed"
        )
    for compressor in array.compressors:
        if compressor not in DECOMPRESSORS:
            raise Unsuitable(f"{source} is packed by {compressor!r}; {', '.join(DECOMPRESSORS)} can be read")
    return array


def _metadata(store: Store, name: str, kind: type[Kind]) -> Kind:
    content = store.read(name, MAX_METADATA_BYTES)
    return parse_json(content, kind, f"{store.path}: {name}", FETCH_AGAIN)


def _from_format_2(name: str, meta: Format2) -> Array:
    packed = [*(meta.filters or []), *([meta.compressor] if meta.compressor else [])]
    return Array(
        name=name,
        shape=tuple(meta.shape),
        chunks=tuple(meta.chunks),
        dtype=_dtype(name, meta.dtype),
        order=meta.order,
        compressors=tuple(each.id for each in reversed(packed)),
        prefix=f"{name}/",
        separator=meta.dimension_separator,
    )


def _from_format_3(name: str, meta: Format3) -> Array:
    packed = [codec for codec in meta.codecs if codec.name != "bytes"]
    endian = next((c.configuration.get("endian") for c in meta.codecs if c.name == "bytes" and c.configuration), None)
    given = meta.chunk_key_encoding.configuration
    is_default = meta.chunk_key_encoding.name == "default"
    separator = (given.separator if given else None) or ("/" if is_default else ".")
    return Array(
        name=name,
        shape=tuple(meta.shape),
        chunks=tuple(meta.chunk_grid.configuration.chunk_shape),
        dtype=_dtype(name, meta.data_type).newbyteorder(">" if endian == "big" else "<"),
        order="C",
        compressors=tuple(codec.name for codec in reversed(packed)),
        prefix=f"{name}/c{separator}" if is_default else f"{name}/",
        separator=separator,
    )


def _dtype(name: str, text: str | list[Any] | dict[str, Any]) -> np.dtype:
    """Raises Unsuitable unless it is one of numbers, with its size."""
    try:
        dtype = np.dtype(text) if isinstance(text, str) else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in KINDS or dtype.shape or dtype.itemsize > 8:
        raise Unsuitable(f"{name} has values of type {text!r}; needed: {', '.join(KINDS.values())}")
    return dtype


# ---------------------------------------------------------------------------------------------------------- unpacking


def _unblosc(content: bytes, size: int) -> bytes:
    """The header says both sizes; without looking at them, c-blosc reads beyond what is there."""
    claimed, packed = (int.from_bytes(content[at : at + 4], "little") for at in (4, 12))
    if len(content) < BLOSC_HEADER_BYTES or packed != len(content) or claimed != size:
        raise ValueError(f"{len(content)} bytes that claim to be {packed}, and {claimed} unpacked, not {size}")
    unpacked = np.empty(size, np.uint8)
    numcodecs.blosc.decompress(content, unpacked)
    return unpacked.tobytes()


def _unlz4(content: bytes, size: int) -> bytes:
    """numcodecs writes the size in front."""
    if len(content) < 4 or int.from_bytes(content[:4], "little") != size:
        raise ValueError(f"{len(content)} bytes that do not claim to be {size} unpacked")
    return pa.decompress(content[4:], size, codec="lz4_raw", asbytes=True)


def _bounded(unpacker: Any, content: bytes, size: int) -> bytes:
    unpacked = unpacker.decompress(content, size + 1)
    if len(unpacked) != size or not unpacker.eof:
        raise ValueError(f"{len(unpacked)} bytes or more unpacked, not {size}")
    return unpacked


def _uncrc32c(content: bytes, size: int) -> bytes:
    try:
        import google_crc32c
    except ImportError:
        raise needs("google-crc32c") from None
    if google_crc32c.value(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise ValueError("its checksum is wrong")
    return content[:-4]


DECOMPRESSORS: Mapping[str, Callable[[bytes, int], bytes]] = {
    "blosc": _unblosc,
    "zstd": lambda content, size: pa.decompress(content, size, codec="zstd", asbytes=True),
    "lz4": _unlz4,
    "zlib": lambda content, size: _bounded(zlib.decompressobj(), content, size),
    "gzip": lambda content, size: _bounded(zlib.decompressobj(wbits=31), content, size),
    "bz2": lambda content, size: _bounded(bz2.BZ2Decompressor(), content, size),
    "lzma": lambda content, size: _bounded(lzma.LZMADecompressor(), content, size),
    "crc32c": _uncrc32c,
}
