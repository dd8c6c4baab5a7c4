"""LeRobot's dataset format v3.0 in Parquet and JSON: its tables and files, and nothing of ours.

Written from the format as LeRobot 0.4.4 and 0.6.1 load it, with pyarrow alone (no pandas, no lerobot).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Shaped

from robofactory.errors import UserError

FILES_PER_CHUNK = 1000
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
    for view, files in images.items():
        content = pa.array(list(files), type=pa.binary())
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


def data_file(directory: Path, episode: int) -> Path:
    """Where an episode lies: one file each."""
    chunk, file = divmod(episode, FILES_PER_CHUNK)
    return directory / "data" / f"chunk-{chunk:03d}" / f"file-{file:03d}.parquet"


def episodes_file(directory: Path) -> Path:
    """Where the lengths and instructions of all episodes lie."""
    return directory / "meta" / "episodes" / "chunk-000" / "file-000.parquet"


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def to_parquet(table: pa.Table) -> bytes:
    """One row group, neither compressed nor in a dictionary: PNG gains nothing, and each image stays in one piece."""
    sink = pa.BufferOutputStream()
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, sink, row_group_size=max(1, table.num_rows), **options)
    return sink.getvalue().to_pybytes()


def open_parquet(path: Path, advice: str = RECORD_AGAIN) -> pq.ParquetFile:
    """Raises UserError where the file is missing or does not end as a Parquet file does."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {advice}")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError):
        raise UserError(f"{path} is truncated or no Parquet file; {advice}") from None


def read_parquet(
    path: Path, columns: Sequence[str], row_groups: Sequence[int] | None = None, advice: str = RECORD_AGAIN
) -> pa.Table:
    """Some columns, of some row groups or all. Raises UserError where the file is missing or broken, or has no such column."""
    file = open_parquet(path, advice)
    groups = range(file.num_row_groups) if row_groups is None else row_groups
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; {advice}")
    try:
        return file.read_row_groups(list(groups), list(columns), use_threads=False)
    except (pa.ArrowInvalid, OSError):
        raise UserError(f"{path} is damaged; {advice}") from None


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


def to_vectors(table: pa.Table, column: str) -> Float32[np.ndarray, "n d"]:
    """A column of vectors; of no dimension where the table has no such column."""
    if column not in table.column_names:
        return np.zeros((len(table), 0), np.float32)
    return to_numpy(table[column]).reshape(len(table), -1)


def _vectors(values: np.ndarray) -> pa.Array:
    """A vector a row; LeRobot keeps those of one number as plain numbers."""
    if values.shape[1] == 1:
        return pa.array(values[:, 0])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
