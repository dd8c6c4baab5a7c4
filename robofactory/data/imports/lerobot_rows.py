"""Rows of others' Parquet files: a few at a time, of the types that are asked for, or refused with file, row and column.

Nothing is believed of a file before it is bounded: how many rows it claims, how far it unpacks, how long its lists are.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64, Shaped

from robofactory import files
from robofactory.data.imports.frames import Frame
from robofactory.data.imports.source import FETCH_AGAIN
from robofactory.errors import UserError

MAX_ROWS = 300_000_000  # of a dataset: months at 30 Hz, and 3 s for one column that is the same number throughout
MAX_FRAMES = 1_000_000  # of an episode: 9 h at 30 Hz
MAX_NUMBERS = 2**28  # of an episode's vectors together: 2 GB
BOMB_BYTES, BOMB_RATIO = 2**28, 100  # a column of a row group that unpacks to more than both is refused; pictures: 1.0
ROWS, PICTURES = 4096, 16  # read at a time, of numbers and of pictures


@dataclass(frozen=True)
class Part:
    """Rows of a file that follow each other."""

    file: Path
    first: int
    count: int


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[pq.ParquetFile]:
    """An open Parquet file; what turns out broken while it is read is a UserError, too."""
    files.require_regular(path, FETCH_AGAIN)
    try:
        with pq.ParquetFile(path) as table:
            if table.metadata.num_rows > MAX_ROWS:
                raise UserError(
                    f"{path} claims {table.metadata.num_rows:,} rows, more than the {MAX_ROWS:,} that are read"
                )
            yield table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"{path} is truncated, damaged or no Parquet file ({reason}); {FETCH_AGAIN}") from None


def columns_of(path: Path) -> tuple[list[str], int]:
    """A file's columns, and how many rows it claims."""
    with open_table(path) as table:
        return table.schema_arrow.names, table.metadata.num_rows


def require_columns(table: pq.ParquetFile, path: Path, columns: Sequence[str], groups: Sequence[int]) -> None:
    """Raises UserError where one is missing, twice there, or would unpack beyond all measure in these row groups."""
    names = table.schema_arrow.names
    for column in columns:
        if column not in names:
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(names) or 'none'}")
        if names.count(column) > 1:
            raise UserError(f"{path} has {names.count(column)} columns called {column!r}")
    paths = [table.metadata.schema.column(index).path for index in range(table.metadata.num_columns)]
    indices = [index for index, name in enumerate(paths) if name.startswith(tuple(columns))]
    for group in groups:
        for index in indices:
            chunk, name = table.metadata.row_group(group).column(index), paths[index]
            packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            if unpacked > max(BOMB_BYTES, BOMB_RATIO * packed):
                raise UserError(f"{path}: {name} unpacks from {packed:,} to {unpacked:,} bytes; it is refused")
            if chunk.num_values > MAX_NUMBERS:
                raise UserError(f"{path}: {name} claims {chunk.num_values:,} values in one piece; it is refused")


def read_rows(part: Part, columns: Sequence[str], size: int = ROWS) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The number of the first row in its file, and the rows, up to `size` at a time; each column once."""
    stop = part.first + part.count
    with open_table(part.file) as table:
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes]).tolist()
        groups = [g for g, start in enumerate(starts[:-1]) if start < stop and starts[g + 1] > part.first]
        require_columns(table, part.file, columns, groups)
        row = starts[groups[0]] if groups else 0
        for batch in table.iter_batches(size, row_groups=groups, columns=list(columns), use_threads=False):
            low, high = max(part.first - row, 0), min(stop - row, len(batch))
            if low < high:
                yield row + low, batch.slice(low, high - low)
            row += len(batch)
            if row >= stop:
                return
    raise UserError(f"{part.file} ends before row {stop}; {FETCH_AGAIN}")


def read_numbers(parts: Sequence[Part], sizes: dict[str, int]) -> dict[str, Float64[np.ndarray, "n d"]]:
    """Columns of vectors or of numbers; `sizes`: how long each vector is.

    Raises:
        UserError: a column is missing, of another type or length, or has an empty place; the episode is too long.
    """
    count = sum(part.count for part in parts)
    if count > MAX_FRAMES or count * sum(sizes.values()) > MAX_NUMBERS:
        raise UserError(
            f"{parts[0].file} has {count:,} rows of {sum(sizes.values()):,} numbers for one episode, "
            f"more than the {MAX_FRAMES:,} rows or {MAX_NUMBERS:,} numbers that are read"
        )
    found: dict[str, list[np.ndarray]] = {column: [] for column in sizes}
    for part in parts:
        for row, batch in read_rows(part, list(sizes)):
            for column, size in sizes.items():
                found[column].append(matrix(storage(batch.column(column)), size, part.file, row, column))
    return {column: np.concatenate(values) for column, values in found.items()}


def matrix(values: pa.Array, size: int, file: Path, row: int, column: str) -> Float64[np.ndarray, "n d"]:
    """Vectors in lists of whatever kind, or plain numbers where `size` is 1."""
    name = f"{file}: column {column!r}"
    require_filled(values, file, row, column)
    kind = values.type
    if is_list(kind):
        lengths = _lengths(values)
        if (wrong := np.flatnonzero(lengths != size)).size:
            raise UserError(f"{name} has {lengths[wrong[0]]} numbers in row {row + wrong[0]}; needed: {size}")
        values = storage(values.flatten())
    elif size != 1:
        raise UserError(f"{name} holds {kind}; needed: lists of {size} numbers")
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type)):
        raise UserError(f"{name} holds {kind}; needed: {'numbers' if size == 1 else f'lists of {size} numbers'}")
    if values.null_count:
        empty = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // size
        raise UserError(f"{name} has an empty number in row {row + empty}")
    return values.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, size)


def whole(numbers: Float64[np.ndarray, "n 1"], name: str) -> Int64[np.ndarray, " n"]:
    """A column of whole numbers, whatever type it was stored in. `name`: of file and column."""
    values = numbers[:, 0]
    if (wrong := np.flatnonzero(~(np.abs(values) < 2**53) | (values != np.floor(values)))).size:
        raise UserError(f"{name} is {values[wrong[0]]:g} in row {wrong[0]}; needed: a whole number")
    return values.astype(np.int64)


def require_filled(values: pa.Array, file: Path, row: int, column: str) -> None:
    """Raises UserError where a row is null."""
    if values.null_count:
        empty = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{file}: column {column!r} is empty in row {row + empty}")


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def to_list(values: pa.Array, name: str) -> list[Any]:
    """Of Python's values. `name`: of file and column."""
    try:
        return storage(values).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"{name} cannot be read ({error}); {FETCH_AGAIN}") from None


def _lengths(values: pa.Array) -> Int64[np.ndarray, " n"]:
    """Of lists, none of which is null."""
    return pc.call_function("list_value_length", [values]).to_numpy(zero_copy_only=False).astype(np.int64)


def storage(values: pa.Array) -> pa.Array:
    """Without what pyarrow itself wraps around it: extension types, dictionaries."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    return values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values


# --------------------------------------------------------------------------------------------------------- episodes


def find_episodes(tables: Sequence[Path]) -> dict[int, tuple[Part, ...]]:
    """Where the rows of each episode lie, by the rows' own `episode_index`. Raises UserError where a file is broken."""
    found: dict[int, list[Part]] = {}
    total = changes = 0
    for path in tables:
        _, count = columns_of(path)
        if (total := total + count) > MAX_ROWS:
            raise UserError(f"{path.parent} and its neighbours claim more than the {MAX_ROWS:,} rows that are read")
        runs: list[list[int]] = []  # [episode, first, stop]
        for row, batch in read_rows(Part(path, 0, count), ["episode_index"], 2**16) if count else ():
            numbers = matrix(storage(batch.column("episode_index")), 1, path, row, "episode_index")
            episodes = whole(numbers, f"{path}: from row {row}: episode_index")
            starts = np.flatnonzero(np.diff(episodes, prepend=episodes[0] - 1)).tolist()
            for start, stop in zip(starts, [*starts[1:], len(episodes)], strict=True):
                episode = int(episodes[start])
                if runs and runs[-1][0] == episode:
                    runs[-1][2] = row + stop
                else:
                    runs.append([episode, row + start, row + stop])
            if (changes + len(runs)) > 10 * MAX_FRAMES:
                raise UserError(f"{path}: its rows change episode {changes + len(runs):,} times; they are in disorder")
        changes += len(runs)
        for episode, first, stop in runs:
            found.setdefault(episode, []).append(Part(path, first, stop - first))
    return {episode: tuple(parts) for episode, parts in found.items()}


# --------------------------------------------------------------------------------------------------------- pictures


def read_pictures(root: Path, parts: Sequence[Part], column: str, shape: tuple[int, ...]) -> Iterator[Frame]:
    """One camera's pictures: embedded files, files below `root`, or the pixels themselves, which have this shape."""
    for part in parts:
        for row, batch in read_rows(part, [column], PICTURES):
            values = storage(batch.column(column))
            require_filled(values, part.file, row, column)
            if is_list(values.type):
                yield from _pixels(values, shape, f"{part.file}: column {column!r}, from row {row}")
                continue
            for number, value in enumerate(to_list(values, f"{part.file}: column {column!r}"), row):
                yield _picture_file(root, value, f"{part.file}: column {column!r}, row {number}")


def _picture_file(root: Path, value: object, name: str) -> bytes | Path:
    """A picture is its bytes, a path, or a dictionary with one of both."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(content, str):
        content, path = None, content
    if isinstance(content, bytes):
        return content
    if isinstance(path, str) and content is None:
        return files.inside(root, path, name, FETCH_AGAIN)
    there = "neither bytes nor a path" if isinstance(value, dict) else f"a {type(value).__name__}"
    raise UserError(f"{name}: there is {there}; needed: an encoded picture")


def _pixels(values: pa.Array, shape: tuple[int, ...], name: str) -> Shaped[np.ndarray, "..."]:
    """All of these pictures, of nested lists, one level for each axis of the declared shape."""
    count = len(values)
    for size in shape:
        if not is_list(values.type) or values.null_count or (_lengths(values) != size).any():
            raise UserError(f"{name}: its pictures are no lists of {' x '.join(map(str, shape))} numbers")
        values = storage(values.flatten())
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)) or values.null_count:
        raise UserError(f"{name}: its pictures hold {values.type}; needed: numbers")
    return values.to_numpy(zero_copy_only=False).reshape(count, *shape)
