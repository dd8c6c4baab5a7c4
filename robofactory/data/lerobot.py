"""LeRobot's dataset format v3.0 in Parquet and JSON: its tables and files, and nothing of ours.

Written from the format as LeRobot 0.4.4 and 0.6.1 load it, with pyarrow alone (no pandas, no lerobot).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64, Shaped

from robofactory import files
from robofactory.errors import UserError

FILES_PER_CHUNK = 1000
MAX_ROWS = 10_000_000  # of a file: 92 hours at 30 fps
MAX_UNPACKED, MAX_RATIO = (
    2**30,
    8,
)  # bytes of what is read of a file at once; PNG, JPEG and most numbers are packed at most so
RECORD_AGAIN = "delete it, if it is there, and record again"
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCALARS = {
    "timestamp": pa.float32(),
    "frame_index": pa.int64(),
    "episode_index": pa.int64(),
    "index": pa.int64(),
    "task_index": pa.int64(),
}

# ----------------------------------------------------------------------------------------------------------- content


def image_key(view: str) -> str:
    return f"observation.images.{view}"


def info(
    *,
    robot_type: str,
    fps: int | float,
    action_names: Sequence[str],
    proprio_names: Sequence[str],
    image_sizes: Mapping[str, tuple[int, int]],
    num_episodes: int,
    num_frames: int,
    num_tasks: int,
) -> dict[str, Any]:
    """`meta/info.json`. All keys are there: LeRobot 0.4 indexes them without a default."""
    vectors = {"observation.state": proprio_names, "action": action_names}
    features: dict[str, Any] = {
        key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
        for key, names in vectors.items()
        if names
    }
    for view, (height, width) in image_sizes.items():
        names = ["height", "width", "channels"]
        features[image_key(view)] = {"dtype": "image", "shape": [height, width, 3], "names": names}
    features["perturbed"] = {"dtype": "bool", "shape": [1], "names": None}
    for name, kind in SCALARS.items():
        features[name] = {"dtype": "float32" if kind == pa.float32() else "int64", "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "total_episodes": num_episodes,
        "total_frames": num_frames,
        "total_tasks": num_tasks,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{num_episodes}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": features,
    }


def frames_table(
    *,
    episode: int,
    first_index: int,
    task: int,
    fps: int | float,
    state: np.ndarray,
    actions: np.ndarray,
    perturbed: np.ndarray,
    images: Mapping[str, Sequence[bytes]],
) -> pa.Table:
    """One episode's frames. `first_index` counts frames over the whole dataset; `images` are encoded files."""
    frames = np.arange(len(actions))
    vectors = {"observation.state": state, "action": actions}
    columns: dict[str, pa.Array] = {
        **{key: _vectors(values) for key, values in vectors.items() if values.shape[1]},
        "perturbed": pa.array(perturbed),
        "timestamp": pa.array((frames / fps).astype(np.float32)),
        "frame_index": pa.array(frames),
        "episode_index": pa.array(np.full(len(frames), episode)),
        "index": pa.array(first_index + frames),
        "task_index": pa.array(np.full(len(frames), task)),
    }
    names = pa.array([f"frame-{frame:06d}.png" for frame in frames])
    for view, encoded in images.items():
        content = pa.array(list(encoded), type=pa.binary())
        columns[image_key(view)] = pa.StructArray.from_arrays([content, names], fields=list(IMAGE_TYPE))
    return pa.table(columns)


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """`meta/tasks.parquet`: pandas reads it with the instruction as index, which is how LeRobot looks tasks up."""
    column = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    index = {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"}
    labels = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [labels | {"metadata": {"encoding": "UTF-8"}}],
        "columns": [column | {"metadata": None}, index | {"metadata": None}],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def episodes_table(lengths: Sequence[int], tasks: Sequence[str]) -> pa.Table:
    """`meta/episodes/...`, one row an episode: its frames, its instruction, its file."""
    episodes, ends = np.arange(len(lengths)), np.cumsum(lengths)
    zeros = np.zeros(len(lengths), np.int64)
    columns = {
        "episode_index": episodes,
        "length": np.asarray(lengths, np.int64),
        "data/chunk_index": episodes // FILES_PER_CHUNK,
        "data/file_index": episodes % FILES_PER_CHUNK,
        "dataset_from_index": ends - lengths,
        "dataset_to_index": ends,
        "meta/episodes/chunk_index": zeros,
        "meta/episodes/file_index": zeros,
    }
    return pa.table(
        {"tasks": pa.array([[task] for task in tasks], pa.list_(pa.string()))}
        | {name: pa.array(values) for name, values in columns.items()}
    )


def statistics(values: Shaped[np.ndarray, "n *rest"]) -> dict[str, list]:
    """Of one feature over all frames, per dimension. The quantiles are the true ones; LeRobot averages episodes'."""
    values = values.astype(np.float64)
    stats = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    stats |= {name: np.quantile(values, share, axis=0) for name, share in QUANTILES.items()}
    return {name: np.atleast_1d(value).tolist() for name, value in stats.items()} | {"count": [len(values)]}


def image_statistics(images: Shaped[np.ndarray, "n h w 3"]) -> dict[str, list]:
    """Of one view per colour, for RGB in [0, 255], as LeRobot keeps them: shape (3, 1, 1), range [0, 1]."""
    stats = statistics(images.reshape(-1, 3) / np.float32(255.0))
    return {name: np.reshape(value, (3, 1, 1)).tolist() for name, value in stats.items() if name != "count"} | {
        "count": [len(images)]
    }


# ------------------------------------------------------------------------------------------------------------- files

TASKS, EPISODES, STATS = "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/stats.json"


def data_file(directory: Path, episode: int) -> Path:
    """Where an episode lies: one file each."""
    chunk, file = divmod(episode, FILES_PER_CHUNK)
    return directory / "data" / f"chunk-{chunk:03d}" / f"file-{file:03d}.parquet"


def find_data_file(directory: Path, episode: int) -> Path:
    """The same file, known to be there and in the directory. Raises UserError where it is not."""
    name = data_file(directory, episode).relative_to(directory)
    return files.inside(directory, str(name), directory / "meta/info.json", RECORD_AGAIN)


def episodes_file(directory: Path) -> Path:
    """Where the lengths and instructions of all episodes lie."""
    return directory / EPISODES


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def to_parquet(table: pa.Table) -> bytes:
    """One row group, neither compressed nor in a dictionary: PNG gains nothing, and each image stays in one piece."""
    sink = pa.BufferOutputStream()
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, sink, row_group_size=max(1, table.num_rows), **options)
    return sink.getvalue().to_pybytes()


def open_parquet(path: Path | str, advice: str = RECORD_AGAIN, content: bytes | None = None) -> pq.ParquetFile:
    """A Parquet file, of which only the end has been read.

    Args:
        content: of the file, where it is not on this disk; `path` is then its name in messages.
    Raises:
        UserError: the file is missing, does not end as a Parquet file does, or says that it has more than `MAX_ROWS`.
    """
    source = files.require_regular(Path(path), advice) if content is None else pa.BufferReader(content)
    try:
        file = pq.ParquetFile(source)
        assert file.schema_arrow is not None
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise UserError(f"{path} is truncated or no Parquet file; {advice}") from None
    if not 0 <= file.metadata.num_rows <= MAX_ROWS:
        raise UserError(f"{path} says that it has {file.metadata.num_rows:,} rows; {MAX_ROWS:,} are possible; {advice}")
    return file


def read_parquet(
    path: Path | str,
    columns: Sequence[str],
    row_groups: Sequence[int] | None = None,
    advice: str = RECORD_AGAIN,
    content: bytes | None = None,
) -> pa.Table:
    """Some columns, of some row groups or all. Raises UserError as `open_parquet` and `read_columns`."""
    return read_columns(open_parquet(path, advice, content), path, columns, row_groups, advice)


def read_columns(
    file: pq.ParquetFile,
    path: Path | str,
    columns: Sequence[str],
    row_groups: Sequence[int] | None = None,
    advice: str = RECORD_AGAIN,
) -> pa.Table:
    """The same of an open file.

    Raises:
        UserError: the file has no such column, is damaged, or would be far larger in memory than it is on the disk.
    """
    groups = list(range(file.num_row_groups) if row_groups is None else row_groups)
    names = file.schema_arrow.names
    missing = [column for column in columns if column not in names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; {advice}")
    if doubled := [column for column in columns if names.count(column) > 1]:
        raise UserError(f"{path} has several columns {doubled[0]}; {advice}")
    _require_moderate(file, path, columns, groups, advice)
    try:
        return file.read_row_groups(groups, list(columns), use_threads=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged; {advice}") from None


def _require_moderate(
    file: pq.ParquetFile, path: Path | str, columns: Sequence[str], groups: Sequence[int], advice: str
) -> None:
    """Raises UserError where columns unpack to more than `MAX_UNPACKED` and many times what is packed."""
    packed = unpacked = numbers = 0
    for group in groups:
        row_group = file.metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            name = chunk.path_in_schema
            if any(name == column or name.startswith(f"{column}.") for column in columns):
                packed += chunk.total_compressed_size
                unpacked += chunk.total_uncompressed_size
                numbers += chunk.num_values
    if numbers * 8 > MAX_UNPACKED or unpacked > max(MAX_UNPACKED, MAX_RATIO * packed):
        raise UserError(f"{path} would unpack to more than {max(unpacked, numbers * 8):,} bytes, which is no recording; {advice}")  # fmt: skip


def read_json(path: Path, advice: str = RECORD_AGAIN) -> dict[str, Any]:
    """Raises UserError where the file is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged; {advice}") from None


def to_numpy(column: pa.ChunkedArray) -> Shaped[np.ndarray, "n *rest"]:
    """A column of numbers, or of vectors of one length."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(len(array), -1)
    return array.to_numpy(zero_copy_only=False)


def to_vectors(table: pa.Table, column: str, size: int, path: Path) -> Float32[np.ndarray, "n d"]:
    """A column of vectors of this size, not all of them finite; of size 0 the column need not be there.

    Raises:
        UserError: its values are no vectors of numbers, have another length, or some are missing.
    """
    if size == 0:
        return np.zeros((len(table), 0), np.float32)
    array = _without_nulls(table, column, path)
    kind, numbers = array.type, array
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind, numbers = kind.value_type, array.flatten()
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise UserError(
            f"{path}: column {column} is {array.type}; {size} numbers in each row are needed; {RECORD_AGAIN}"
        )
    lengths = np.ones(len(array), int) if numbers is array else to_numpy(pa.chunked_array([array.value_lengths()]))
    if (lengths != size).any():
        row = int((lengths != size).argmax())
        raise UserError(
            f"{path}: column {column} has {lengths[row]} numbers in row {row}; {size} are needed; {RECORD_AGAIN}"
        )
    if numbers.null_count:
        raise UserError(f"{path}: column {column} has numbers that are missing; {RECORD_AGAIN}")
    with np.errstate(over="ignore"):  # infinity then, which is refused as such
        return numbers.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, size)


def to_scalars(table: pa.Table, column: str, path: Path | str) -> Shaped[np.ndarray, " n"]:
    """A column of one value in each row. Raises UserError where it is of another kind or some are missing."""
    array, needed = (
        _without_nulls(table, column, path),
        (SCALARS | {"perturbed": pa.bool_(), "length": pa.int64()})[column],
    )
    kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean)
    if not any(is_kind(array.type) and is_kind(needed) for is_kind in kinds):
        raise UserError(f"{path}: column {column} is {array.type}; {needed} is needed; {RECORD_AGAIN}")
    return array.to_numpy(zero_copy_only=False)


def to_encoded(table: pa.Table, column: str, path: Path) -> pa.Array:
    """The encoded pictures of a view; one may be missing. Raises UserError where it is no column of pictures."""
    kind = table[column].type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0 or kind.field("bytes").type != pa.binary():
        raise UserError(f"{path}: column {column} is {kind}; {IMAGE_TYPE} is needed; {RECORD_AGAIN}")
    return pc.struct_field(_in_one_piece(table[column]), "bytes")  # type: ignore[attr-defined]


def _in_one_piece(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies


def _without_nulls(table: pa.Table, column: str, path: Path | str) -> pa.Array:
    array = _in_one_piece(table[column])
    if array.null_count:
        row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise UserError(f"{path}: column {column} has nothing in row {row}; {RECORD_AGAIN}")
    return array


def read_tasks(path: Path | str, content: bytes | None = None) -> dict[int, str]:
    """`meta/tasks.parquet`: the instruction of each number. Raises UserError where it is not what it should be."""
    table = read_parquet(path, ["task_index", "task"], content=content)
    numbers, texts = to_scalars(table, "task_index", path).tolist(), to_texts(table["task"], path, "task")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{path} has a task_index twice; {RECORD_AGAIN}")
    return dict(zip(numbers, texts, strict=True))


def instruction_of(table: pa.Table, tasks: Mapping[int, str], path: Path | str) -> str:
    """An episode's instruction. Raises UserError where its `task_index` changes, or is none of the tasks."""
    indices = to_scalars(table, "task_index", path)
    if (indices != indices[0]).any():
        raise UserError(f"{path}: its task_index changes, and an episode has one instruction; {RECORD_AGAIN}")
    if int(indices[0]) not in tasks:
        raise UserError(f"{path}: its task_index {indices[0]} is none of {TASKS}; {RECORD_AGAIN}")
    return tasks[int(indices[0])]


def read_episodes(path: Path | str, content: bytes | None = None) -> tuple[Int64[np.ndarray, " e"], list[str]]:
    """`meta/episodes/...`: the length and the instruction of each episode. Raises UserError as `read_tasks`."""
    table = read_parquet(path, ["episode_index", "length", "tasks"], content=content)
    lengths, numbers = (to_scalars(table, name, path).astype(np.int64) for name in ("length", "episode_index"))
    if not np.array_equal(numbers, np.arange(len(table))):
        raise UserError(f"{path}: its episode_index does not count 0, 1, 2, ...; {RECORD_AGAIN}")
    if len(lengths) and not (lengths.min() > 0 and lengths.max() <= MAX_ROWS):
        raise UserError(
            f"{path}: an episode of {lengths.min() if lengths.min() < 1 else lengths.max():,} frames; {RECORD_AGAIN}"
        )
    tasks = _without_nulls(table, "tasks", path)
    if not (pa.types.is_list(tasks.type) or pa.types.is_large_list(tasks.type)) or (
        len(tasks) and min(tasks.value_lengths().to_pylist()) < 1
    ):
        raise UserError(f"{path}: column tasks has no list of instructions in each row; {RECORD_AGAIN}")
    first = pc.list_element(tasks, 0)  # type: ignore[attr-defined]
    return lengths, to_texts(first, path, "tasks")


def to_texts(array: pa.Array | pa.ChunkedArray, path: Path | str, column: str) -> list[str]:
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)) or array.null_count:
        raise UserError(f"{path}: column {column} is not text in each row; {RECORD_AGAIN}")
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        raise UserError(f"{path}: column {column} is not UTF-8; {RECORD_AGAIN}") from None
    return array.to_pylist()


def _vectors(values: np.ndarray) -> pa.Array:
    """A vector a row; LeRobot keeps those of one number as plain numbers."""
    if values.shape[1] == 1:
        return pa.array(values[:, 0])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
