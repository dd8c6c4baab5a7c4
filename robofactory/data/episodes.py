"""Demonstrations on disk: writer and reader side by side. The format is LeRobot v3.0; one dataset is one agent's.

    data/chunk-000/file-000.parquet     one episode each, images embedded as PNG
    meta/info.json                      what is in it; written last, so its presence says that recording finished
    meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet  meta/stats.json
    meta/robofactory.json               our own: the resolved scene, the share of noise, the seed of every episode

An episode's file appears whole or not at all, and carries its seed and instruction, so everything under meta/ but the
description can be made again from the episodes: nothing is lost when recording is killed.
"""

import dataclasses
import errno
import io
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image

from robofactory import files
from robofactory.config import SceneConfig, from_yaml, to_yaml
from robofactory.data import lerobot
from robofactory.errors import UserError
from robofactory.shapes import Action, Observation

PNG_COMPRESS_LEVEL = 1  # 128x96: 0.36 ms to write, level 6 takes 0.76 ms for 20 % fewer bytes; both read in 0.14 ms
STATS_IMAGES = 64  # frames per view, spread evenly over the dataset, that the image statistics are taken from


@dataclass(frozen=True)
class DatasetDescription:
    """What all episodes of a dataset share; recording only continues a dataset with the same description.

    scene_yaml: the resolved scene (`config.to_yaml`), with its `visual_detail`, shader and cameras; empty where nobody
        knows it, as of data that was recorded elsewhere.
    image_sizes: view -> (height, width) in px.
    joint_names: of the dimensions of an action.
    proprio_names: of the dimensions of proprio, none where it was not measured; None: the same as the action's.
    noise_share: of the episodes that are recorded with perturbed actions.
    driver: who acts in them; the labels are the expert's. Of imported data: what they were imported from, and how.
    """

    scene_yaml: str
    agent_id: int
    image_sizes: dict[str, tuple[int, int]]
    joint_names: tuple[str, ...]
    fps: int | float
    robot_type: str = "panda"
    noise_share: float = 0.0
    first_seed: int = 0
    driver: str = "expert"
    proprio_names: tuple[str, ...] | None = None

    def names_of_proprio(self) -> tuple[str, ...]:
        return self.joint_names if self.proprio_names is None else self.proprio_names

    def vector_columns(self) -> list[str]:
        """The columns with a vector a frame; without proprio there is one less, as LeRobot has no empty feature."""
        return ["observation.state", "action"] if self.names_of_proprio() else ["action"]


@dataclass(frozen=True)
class Episode:
    """One agent's part of one demonstration.

    images: view -> the frames, each encoded by `encode_png`.
    proprio: measured joint positions (rad) and gripper in [-1, 1], before the action.
    actions: the expert's answer to each frame, which is what a policy learns.
    perturbed: True where another action than that one was executed.
    """

    images: Mapping[str, Sequence[bytes]]
    proprio: Float32[np.ndarray, "n s"]
    actions: Float32[np.ndarray, "n a"]
    perturbed: Bool[np.ndarray, " n"]
    instruction: str
    seed: int


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """RGB in [0, 255] as PNG, without loss."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=PNG_COMPRESS_LEVEL)
    return stream.getvalue()


def decode_png(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The inverse of `encode_png`; the array is the caller's own. FFmpeg takes two thirds of Pillow's time."""
    decoder = av.CodecContext.create("png", "r")  # a new one each time: it would go on from the picture before
    decoder.thread_count = 1
    (frame,) = decoder.decode(av.Packet(data))
    return frame.to_ndarray(format="rgb24")  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------- writing


class DatasetWriter:
    """Appends episodes to a dataset, a new one or one that recording left unfinished.

    Raises:
        UserError: the directory holds something else, or episodes of another description; an episode's file is broken.
    """

    def __init__(self, directory: Path, description: DatasetDescription):
        self.directory = directory
        self.description = description
        path = directory / "meta" / "robofactory.json"
        for leftover in directory.glob("**/*.tmp"):
            leftover.unlink()
        if path.is_file():
            _require_same(description, _read_description(path), directory)
        elif any(file.is_file() for file in directory.glob("**/*")):
            raise UserError(f"{directory} is not empty and no dataset of ours; move it away or delete it")
        else:
            self._write(path, lerobot.to_json(dataclasses.asdict(description)))
        self.seeds: list[int] = []
        self._lengths: list[int] = []
        self._instructions: list[str] = []
        while (file := lerobot.data_file(directory, self.num_episodes)).is_file():
            footer = lerobot.open_parquet(file)
            own = json.loads(footer.schema_arrow.metadata[b"robofactory"])
            self._count(footer.metadata.num_rows, own["instruction"], own["seed"])

    @property
    def num_episodes(self) -> int:
        return len(self.seeds)

    @property
    def num_frames(self) -> int:
        return sum(self._lengths)

    @property
    def is_finished(self) -> bool:
        """Whether `finalize` was called after the last episode."""
        return is_complete(self.directory, self.num_episodes)

    def append(self, episode: Episode) -> None:
        """Write the next episode, whole or not at all.

        Raises:
            UserError: an action or a joint position is no finite number; the disk is full.
        """
        length = len(episode.actions)
        _require_finite(episode, f"{self.directory}: episode {self.num_episodes} (seed {episode.seed})")
        assert set(episode.images) == set(self.description.image_sizes), (set(episode.images), self.description)
        assert length > 0 and {len(frames) for frames in episode.images.values()} == {length}
        assert episode.actions.shape[1] == len(self.description.joint_names), episode.actions.shape
        assert episode.proprio.shape == (length, len(self.description.names_of_proprio())), episode.proprio.shape
        tasks = _unique([*self._instructions, episode.instruction])
        table = lerobot.frames_table(
            episode=self.num_episodes,
            first_index=self.num_frames,
            task=tasks.index(episode.instruction),
            fps=self.description.fps,
            state=episode.proprio,
            actions=episode.actions,
            perturbed=episode.perturbed,
            images={view: episode.images[view] for view in self.description.image_sizes},
        )
        own = {"seed": episode.seed, "instruction": episode.instruction}
        table = table.replace_schema_metadata({"robofactory": json.dumps(own)})
        self._write(lerobot.data_file(self.directory, self.num_episodes), lerobot.to_parquet(table))
        self._count(length, episode.instruction, episode.seed)

    def finalize(self) -> None:
        """Write what the format wants to know about all episodes together; `meta/info.json` is the last."""
        if self.num_episodes == 0:
            raise UserError(f"{self.directory} has no episode; there is nothing to finish")
        d, meta, tasks = self.description, self.directory / "meta", _unique(self._instructions)
        info = lerobot.info(
            robot_type=d.robot_type,
            fps=d.fps,
            action_names=d.joint_names,
            proprio_names=d.names_of_proprio(),
            image_sizes=d.image_sizes,
            num_episodes=self.num_episodes,
            num_frames=self.num_frames,
            num_tasks=len(tasks),
        )
        dropped = [seed for seed in range(d.first_seed, self.seeds[-1]) if seed not in set(self.seeds)]
        own = {"seeds": self.seeds, "dropped_seeds": dropped, "versions": _versions()}
        episodes = lerobot.episodes_table(self._lengths, self._instructions)
        self._write(meta / "robofactory.json", lerobot.to_json(dataclasses.asdict(d) | own))
        self._write(meta / "tasks.parquet", lerobot.to_parquet(lerobot.tasks_table(tasks)))
        self._write(lerobot.episodes_file(self.directory), lerobot.to_parquet(episodes))
        self._write(meta / "stats.json", lerobot.to_json(self._statistics()))
        self._write(meta / "info.json", lerobot.to_json(info))

    def _count(self, length: int, instruction: str, seed: int) -> None:
        self.seeds.append(seed)
        self._lengths.append(length)
        self._instructions.append(instruction)

    def _write(self, path: Path, data: bytes) -> None:
        try:
            files.write_atomically(path, data)
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise UserError(
                f"cannot write {path}: {reason}; every complete episode is kept, the same command continues"
            ) from None

    def _statistics(self) -> dict[str, Any]:
        """Over all frames; of the images over a sample of them."""
        files = [lerobot.data_file(self.directory, episode) for episode in range(self.num_episodes)]
        numbers = [*self.description.vector_columns(), "perturbed", *lerobot.SCALARS]
        table = pa.concat_tables([lerobot.read_parquet(file, numbers) for file in files])
        statistics = {name: lerobot.statistics(lerobot.to_numpy(table[name])) for name in numbers}

        rows = np.linspace(0, self.num_frames - 1, min(STATS_IMAGES, self.num_frames)).astype(int)
        ends = np.cumsum(self._lengths)
        episode_of_row = np.searchsorted(ends, rows, side="right")
        keys = [lerobot.image_key(view) for view in self.description.image_sizes]
        images: dict[str, list[np.ndarray]] = {key: [] for key in keys}
        for episode in np.unique(episode_of_row):
            columns = lerobot.read_parquet(files[episode], keys)
            start = ends[episode] - self._lengths[episode]
            for key in keys:
                for row in rows[episode_of_row == episode]:
                    images[key].append(decode_png(columns[key][int(row - start)]["bytes"].as_py()))
        return statistics | {key: lerobot.image_statistics(np.stack(images[key])) for key in keys}


# ---------------------------------------------------------------------------------------------------------- reading


class DatasetReader:
    """Random access to every frame of a finished dataset.

    Opening reads each file once, so that a broken one is found now and not in the third hour of training. Actions and
    proprio stay in memory; of the images only their places in the files, so a frame costs one read and one decoding a
    view. Holds no open file: it may be pickled, and used after a fork.

    Raises:
        UserError: missing, unfinished, empty or broken; an unknown view. The line names the file.
    """

    def __init__(self, directory: Path, views: Sequence[str] | None = None):
        meta = directory / "meta"
        self.directory = directory
        self.description, info = read_finished(directory)
        self.seeds: list[int] = lerobot.read_json(meta / "robofactory.json")["seeds"]
        self.views = tuple(self.description.image_sizes if views is None else views)
        require_views(self.views, self.description, str(directory))
        num_episodes = info["total_episodes"]
        if num_episodes == 0:
            raise UserError(f"{directory} has no episode; delete it and record again")
        tables, places = zip(*(self._read_episode(episode) for episode in range(num_episodes)), strict=True)
        table = pa.concat_tables(tables)
        tasks = lerobot.read_parquet(meta / "tasks.parquet", ["task"])["task"].to_pylist()
        self.instructions: list[str] = [tasks[t["task_index"][0].as_py()] for t in tables]
        self.episode_lengths: Int64[np.ndarray, " e"] = np.array([len(t) for t in tables], np.int64)
        self.episode_starts: Int64[np.ndarray, " e"] = np.cumsum(self.episode_lengths) - self.episode_lengths
        self.all_actions: Float32[np.ndarray, "n a"] = lerobot.to_vectors(table, "action")
        self.all_proprio: Float32[np.ndarray, "n s"] = lerobot.to_vectors(table, "observation.state")
        self.all_perturbed: Bool[np.ndarray, " n"] = lerobot.to_numpy(table["perturbed"])
        self._places: Int64[np.ndarray, "n v 2"] = np.concatenate(places)

    @property
    def num_episodes(self) -> int:
        return len(self.episode_lengths)

    @property
    def num_frames(self) -> int:
        return len(self.all_actions)

    def episode_frames(self, episode: int) -> slice:
        """Where an episode lies in `all_actions`, `all_proprio` and `all_perturbed`."""
        start = int(self.episode_starts[episode])
        return slice(start, start + int(self.episode_lengths[episode]))

    def actions(self, episode: int) -> Float32[np.ndarray, "n a"]:
        return self.all_actions[self.episode_frames(episode)]

    def proprio(self, episode: int) -> Float32[np.ndarray, "n s"]:
        return self.all_proprio[self.episode_frames(episode)]

    def frame(self, episode: int, index: int) -> tuple[Observation, Action]:
        """What the agent saw at a step of an episode, and what the expert answered."""
        assert 0 <= index < self.episode_lengths[episode], (episode, index)
        row = int(self.episode_starts[episode]) + index
        with open(lerobot.data_file(self.directory, episode), "rb", buffering=0) as file:
            images = read_pictures(file, self.views, self._places[row])
        observation = Observation(images, self.all_proprio[row].copy(), self.instructions[episode])
        return observation, self.all_actions[row].copy()

    def _read_episode(self, episode: int) -> tuple[pa.Table, Int64[np.ndarray, "n v 2"]]:
        return read_episode(lerobot.data_file(self.directory, episode), self.description, self.views)


def require_views(views: Sequence[str], description: DatasetDescription, dataset: str) -> None:
    """Raises UserError where the dataset has not all these views."""
    for view in views:
        if view not in description.image_sizes:
            raise UserError(f"{dataset} has no view {view!r}; it has {', '.join(description.image_sizes)}")


def read_episode(
    path: Path, description: DatasetDescription, views: Sequence[str]
) -> tuple[pa.Table, Int64[np.ndarray, "n v 2"]]:
    """The numbers of an episode, and where its pictures are in the file: offset and size in bytes.

    Raises:
        UserError: the file is broken, or a number in it is not finite.
    """
    keys = [lerobot.image_key(view) for view in views]
    vectors = description.vector_columns()
    table = lerobot.read_parquet(path, [*vectors, "perturbed", "task_index", *keys])
    if len(table) == 0:
        raise UserError(f"{path} has no frame; delete it and record again")
    for column in vectors:
        if not np.isfinite(lerobot.to_numpy(table[column])).all():
            raise UserError(f"{path}: {column} is not finite; delete it and record again")
    places = [_find_images(path, key, table[key]) for key in keys]
    return table.drop_columns(keys), np.stack(places, axis=1)


def read_pictures(
    file: BinaryIO, views: Sequence[str], places: Int64[np.ndarray, "v 2"]
) -> dict[str, UInt8[np.ndarray, "_h _w 3"]]:
    """The pictures of one frame, from where `read_episode` found them."""
    of_views = zip(views, places.tolist(), strict=True)
    return {view: decode_png(os.pread(file.fileno(), size, offset)) for view, (offset, size) in of_views}


def _find_images(path: Path, column: str, values: pa.ChunkedArray) -> Int64[np.ndarray, "n 2"]:
    """Offset and size in bytes of each image in the file: Parquet's plain encoding is a 4-byte size and the bytes."""
    row_group = pq.read_metadata(path).row_group(0)
    chunks = {row_group.column(i).path_in_schema: row_group.column(i) for i in range(row_group.num_columns)}
    position = chunks[f"{column}.bytes"].data_page_offset
    places = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for value in values.combine_chunks().field("bytes"):
            png = value.as_py()
            # The next image follows at once, or behind the header of the next page.
            position = content.find(len(png).to_bytes(4, "little") + png[:64], position) + 4
            if position < 4 or content[position : position + len(png)] != png:
                raise UserError(f"{path}: {column} is compressed; only datasets written by robofactory can be read")
            places.append((position, len(png)))
            position += len(png)
    return np.array(places, np.int64)


def read_finished(directory: Path) -> tuple[DatasetDescription, dict[str, Any]]:
    """The description of a finished dataset, and its `meta/info.json`.

    Raises:
        UserError: there is none, or recording has not finished.
    """
    meta = directory / "meta"
    if not (meta / "robofactory.json").is_file():
        raise UserError(f"no dataset at {directory}; robofactory record makes one")
    if not (meta / "info.json").is_file():
        complete = len(list(directory.glob("data/chunk-*/file-*.parquet")))
        command = "the command that began it, of robofactory record or import, continues it"
        raise UserError(f"{directory} is unfinished ({complete} complete episodes); {command}")
    return _read_description(meta / "robofactory.json"), lerobot.read_json(meta / "info.json")


def is_complete(directory: Path, num_episodes: int) -> bool:
    """Whether a directory holds a finished dataset of this many episodes."""
    info = directory / "meta" / "info.json"
    return info.is_file() and lerobot.read_json(info)["total_episodes"] == num_episodes


def require_scene(directory: Path, scene: SceneConfig) -> None:
    """Raises UserError unless a finished dataset was recorded in this scene; the line says what differs."""
    scene_yaml = read_finished(directory)[0].scene_yaml
    if not scene_yaml:
        raise UserError(f"{directory} was recorded in no scene of ours; leave --config away")
    recorded = from_yaml(SceneConfig, scene_yaml, f"the scene of {directory}")
    if recorded != scene:
        there, given = _only_in_each(to_yaml(recorded), to_yaml(scene))
        raise UserError(f"{directory} was recorded in another scene ({there[:100]} there, {given[:100]} by --config and the recipe); leave --config away, or delete it to record again")  # fmt: skip


def _read_description(path: Path) -> DatasetDescription:
    return describe(lerobot.read_json(path))


def describe(content: dict[str, Any]) -> DatasetDescription:
    """What is in a dataset's `meta/robofactory.json`."""
    content["image_sizes"] = {view: tuple(size) for view, size in content["image_sizes"].items()}
    content["joint_names"] = tuple(content["joint_names"])
    content.setdefault("driver", "expert")  # datasets of the first version do not say it: there was no other
    names = content.setdefault("proprio_names", None)  # nor this: it was the same as the action's
    content["proprio_names"] = None if names is None else tuple(names)
    return DatasetDescription(**{field.name: content[field.name] for field in dataclasses.fields(DatasetDescription)})


def _require_same(wanted: DatasetDescription, found: DatasetDescription, directory: Path) -> None:
    for field in dataclasses.fields(DatasetDescription):
        old, new = getattr(found, field.name), getattr(wanted, field.name)
        if old != new:
            was, now = _only_in_each(old, new)
            raise UserError(
                f"{directory} was recorded with another {field.name} ({was[:100]} there, {now[:100]} asked for); "
                "delete it or choose another --num"
            )


def _only_in_each(old: Any, new: Any) -> tuple[str, str]:
    """Of two values, what is in one alone: of a long text such as the scene, the lines that differ."""
    lines = [[line.strip() for line in str(value).splitlines()] for value in (old, new)]
    return tuple("; ".join(sorted(set(a) - set(b))) for a, b in (lines, lines[::-1]))  # type: ignore[return-value]


def _require_finite(episode: Episode, name: str) -> None:
    for what, values in (("action", episode.actions), ("proprio", episode.proprio)):
        if not np.isfinite(values).all():
            frame = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise UserError(f"{name}: the {what} of frame {frame} is {values[frame].tolist()}; it is not written")


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("robofactory", "mani_skill", "sapien", "numpy", "pyarrow", "pillow"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an imported dataset needs no simulator
    return versions
