"""LeRobot's datasets of the versions 2.0, 2.1 and 3.0, with embedded images or videos; a directory or a hub id.

Both are Parquet with a row a frame. 2.x: a file an episode, JSON lines under meta/. 3.0: files and videos hold many
episodes one after the other, and meta/episodes says where each lies.

Source: lerobot 0.3.3 (2.1) and 0.4.4 (3.0), lerobot/datasets/lerobot_dataset.py.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Shaped, UInt8

from robofactory.data import lerobot
from robofactory.data.imports.source import (
    FETCH_AGAIN,
    NONE,
    Options,
    Recording,
    Source,
    choose_cameras,
    choose_episodes,
    choose_fps,
    choose_vectors,
    needs,
    numbered,
    one_instruction,
)
from robofactory.errors import UserError

OLD, NEW = ("v2.0", "v2.1"), "v3.0"
LARGEST_DRIFT = 0.1  # of a frame: how far a timestamp may be from its place on the grid, and a picture from both
PICTURES = ("image", "video")


@dataclass(frozen=True)
class Place:
    """Where an episode lies: rows of a file, and for each video its file and the time in s at which it begins there."""

    file: Path
    first_row: int
    length: int
    videos: Mapping[str, tuple[Path, float]]


class LeRobot(Source):
    def __init__(self, path: Path, options: Options):
        self.notes = notes = []
        self.path = path = path if path.is_dir() else _download(str(path))
        if not (path / "meta/info.json").is_file():
            raise UserError(f"{path} has no meta/info.json; is it a LeRobot dataset?")
        info = lerobot.read_json(path / "meta/info.json", FETCH_AGAIN)
        version = info["codebase_version"]
        if version not in (*OLD, NEW):
            raise UserError(f"{path} is of LeRobot's version {version}; {', '.join(OLD)} and {NEW} can be imported")
        self.fps = choose_fps(info["fps"], options, None, path, notes)
        self.robot_type = info.get("robot_type") or "unknown"

        self._features: dict[str, dict[str, Any]] = info["features"]
        self.cameras = choose_cameras([k for k, f in self._features.items() if _is_camera(f)], {}, options, path, notes)
        self.image_sizes = {view: _size(self._features[key]) for view, key in self.cameras.items()}
        vectors = {key: _names(key, f) for key, f in self._features.items() if _is_vector(key, f)}
        self._action_keys = options.action_keys or ("action",)
        self.action_names = choose_vectors(self._action_keys, vectors, "action", path)
        self._proprio_keys = options.proprio_keys or ("observation.state",)
        if self._proprio_keys == NONE:
            self._proprio_keys = ()
        self.proprio_names = choose_vectors(self._proprio_keys, vectors, "proprio", path)
        if options.instruction_key is not None:
            raise UserError("LeRobot's instructions are its tasks; leave --instruction_key away")

        self._options = options
        self._tasks = _read_tasks(path, is_new=version == NEW)
        self._videos = [key for key in self.cameras.values() if self._features[key]["dtype"] == "video"]
        self._places = (
            _new_places(path, info, self._videos) if version == NEW else _old_places(path, info, self._videos)
        )
        self.episode_ids = choose_episodes(self._places, options, path)
        if len(self._places) != info["total_episodes"]:
            raise UserError(f"{path} lists {len(self._places)} episodes of {info['total_episodes']}; {FETCH_AGAIN}")

    def read(self, episode: int) -> Recording:
        place, name = self._places[episode], f"{self.path}: episode {episode}"
        images = [key for key in self.cameras.values() if key not in self._videos]
        columns = [*self._action_keys, *self._proprio_keys, "timestamp", "episode_index", "task_index", *images]
        table = _read_rows(place, list(dict.fromkeys(columns)))
        if table["episode_index"].unique().to_pylist() != [episode]:
            raise UserError(f"{name} is not where meta/ says, in {place.file}; {FETCH_AGAIN}")
        times_s = lerobot.to_numpy(table["timestamp"]).astype(np.float64).reshape(-1)
        if np.abs(np.diff(times_s) * self.fps - 1.0).max(initial=0.0) > LARGEST_DRIFT:
            raise UserError(f"{name}: its timestamps are not {self.fps} frames a second")
        frames: dict[str, Iterable[UInt8[np.ndarray, "h w 3"] | bytes]] = {}
        for view, key in self.cameras.items():
            if key in self._videos:
                file, start_s = place.videos[key]
                frames[view] = _video_frames(file, start_s + times_s, self.fps)
            else:
                frames[view] = self._image_files(table[key])
        tasks = (self._tasks[task] for task in table["task_index"].unique().to_pylist())
        return Recording(
            frames=frames,
            actions=np.concatenate([_matrix(table[key]) for key in self._action_keys], axis=1),
            proprio=np.concatenate(
                [np.zeros((len(table), 0), np.float32), *(_matrix(table[key]) for key in self._proprio_keys)], axis=1
            ),
            instruction=one_instruction(self._options, tasks, self.path, episode),
        )

    def _image_files(self, column: pa.ChunkedArray) -> Iterator[bytes]:
        """Embedded, or beside the table under a path."""
        for value in column:
            content = value["bytes"].as_py()
            yield content if content is not None else (self.path / value["path"].as_py()).read_bytes()


# ------------------------------------------------------------------------------------------------------------- meta


def _download(name: str) -> Path:
    """The hub's snapshot of a dataset. Raises UserError where it gives none."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name} is no directory, and no hub id such as lerobot/pusht")
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    parts = ["meta/*", "data/*", "videos/*", "images/*"]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=parts))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{name} is no directory, and the hub has no such dataset for us: {reason!r}") from None


def _is_camera(feature: dict[str, Any]) -> bool:
    details = feature.get("info") or feature.get("video_info") or {}
    is_depth = details.get("video.is_depth_map", details.get("is_depth_map", False))
    return feature["dtype"] in PICTURES and not is_depth and 3 in feature["shape"]


def _size(feature: dict[str, Any]) -> tuple[int, int]:
    """(height, width); older datasets have the channels first."""
    shape = feature["shape"]
    height, width = shape[:2] if shape[-1] == 3 else shape[1:]
    return height, width


def _is_vector(key: str, feature: dict[str, Any]) -> bool:
    return key not in lerobot.SCALARS and len(feature["shape"]) == 1 and feature["dtype"].startswith(("float", "int"))


def _names(key: str, feature: dict[str, Any]) -> list[str]:
    """Of the dimensions: a list, or a dictionary with one under any key, or nothing."""
    names, size = feature.get("names"), feature["shape"][0]
    if isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    if isinstance(names, list) and len(names) == size:
        return [str(name) for name in names]
    return numbered(key.rpartition(".")[2], size)


def _read_tasks(path: Path, is_new: bool) -> dict[int, str]:
    if not is_new:
        return {line["task_index"]: line["task"] for line in _read_lines(path / "meta/tasks.jsonl")}
    table = lerobot.open_parquet(path / "meta/tasks.parquet", FETCH_AGAIN).read()
    # The column of the words is pandas' index, which has a name in some versions only.
    (words,) = (name for name in table.column_names if name != "task_index")
    return dict(zip(table["task_index"].to_pylist(), table[words].to_pylist(), strict=True))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is missing; {FETCH_AGAIN}")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except json.JSONDecodeError:
        raise UserError(f"{path} is damaged; {FETCH_AGAIN}") from None


def _old_places(path: Path, info: dict[str, Any], videos: list[str]) -> dict[int, Place]:
    places = {}
    for line in _read_lines(path / "meta/episodes.jsonl"):
        episode = line["episode_index"]
        names = {"episode_chunk": episode // info["chunks_size"], "episode_index": episode}
        places[episode] = Place(
            file=path / info["data_path"].format(**names),
            first_row=0,
            length=line["length"],
            videos={key: (path / info["video_path"].format(video_key=key, **names), 0.0) for key in videos},
        )
    return places


def _new_places(path: Path, info: dict[str, Any], videos: list[str]) -> dict[int, Place]:
    columns = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{key}/{part}" for key in videos for part in ("chunk_index", "file_index", "from_timestamp")]
    files = sorted((path / "meta/episodes").glob("chunk-*/file-*.parquet"))
    rows = [row for file in files for row in lerobot.read_parquet(file, columns, advice=FETCH_AGAIN).to_pylist()]
    first_rows: dict[Path, int] = {}  # of the whole dataset, in each file
    places = {}
    for row in sorted(rows, key=lambda row: row["dataset_from_index"]):
        file = path / info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        first_rows.setdefault(file, row["dataset_from_index"])
        places[row["episode_index"]] = Place(
            file=file,
            first_row=row["dataset_from_index"] - first_rows[file],
            length=row["length"],
            videos={key: _new_video(path, info, key, row) for key in videos},
        )
    return places


def _new_video(path: Path, info: dict[str, Any], key: str, row: dict[str, Any]) -> tuple[Path, float]:
    numbers = {part: row[f"videos/{key}/{part}"] for part in ("chunk_index", "file_index")}
    return path / info["video_path"].format(video_key=key, **numbers), row[f"videos/{key}/from_timestamp"]


# ----------------------------------------------------------------------------------------------------------- frames


def _read_rows(place: Place, columns: list[str]) -> pa.Table:
    """An episode's rows, of no more row groups than it lies in."""
    metadata = lerobot.open_parquet(place.file, FETCH_AGAIN).metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    ends = np.cumsum(sizes)
    stop = place.first_row + place.length
    if stop > metadata.num_rows:
        raise UserError(f"{place.file} has {metadata.num_rows} rows, meta/ speaks of {stop}; {FETCH_AGAIN}")
    first, last = np.searchsorted(ends, [place.first_row, stop - 1], side="right").tolist()
    table = lerobot.read_parquet(place.file, columns, range(first, last + 1), FETCH_AGAIN)
    return table.slice(place.first_row - int(ends[first] - sizes[first]), place.length)


def _matrix(column: pa.ChunkedArray) -> Shaped[np.ndarray, "n d"]:
    """A column of vectors, in lists of a fixed size or not, or of numbers."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return np.array(column.to_pylist())
    return lerobot.to_numpy(column).reshape(len(column), 1)


def _video_frames(
    path: Path, times_s: Float64[np.ndarray, " n"], fps: float | int
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The pictures of a video at these ascending times, decoded one after the other.

    Raises:
        UserError: it is missing or broken, or has no picture at one of the times.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise needs("av") from None
    if not path.is_file():
        raise UserError(f"{path} is missing; {FETCH_AGAIN}")
    done = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            container.seek(int(times_s[0] / stream.time_base), stream=stream)  # to the key frame before
            for frame in container.decode(stream):
                assert frame.time is not None
                late = (frame.time - times_s[done]) * fps
                if late > LARGEST_DRIFT:
                    break
                if late > -LARGEST_DRIFT:
                    yield frame.to_ndarray(format="rgb24")
                    done += 1
                    if done == len(times_s):
                        return
    except (FFmpegError, IndexError) as error:
        raise UserError(f"{path} cannot be decoded: {error}") from None
    raise UserError(f"{path} has no picture at {times_s[done]:.3f} s")
