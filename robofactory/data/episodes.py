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
import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64, UInt8
from pydantic import Field

from robofactory import documents, files
from robofactory.data import lerobot
from robofactory.data.description import (
    INFO,
    OWN,
    DatasetDescription,
    Finished,
    is_complete,
    read_description,
    read_finished,
    require_same,
    require_views,
)
from robofactory.data.png import decode_png, first_unlike, png_files
from robofactory.data.png import encode_png as encode_png  # for those who make episodes
from robofactory.documents import Document
from robofactory.errors import UserError
from robofactory.shapes import Action, Observation

OWN_KEY = b"robofactory"  # of the metadata of an episode's file
MAX_SEEDS = 10_000_000  # of a dataset, recorded or dropped
STATS_IMAGES = 64  # frames per view, spread evenly over the dataset, that the image statistics are taken from


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


class OfEpisode(Document):
    """What an episode's file says beside its table."""

    seed: Annotated[int, Field(ge=0, lt=MAX_SEEDS)]
    instruction: str


# ---------------------------------------------------------------------------------------------------------- writing


class DatasetWriter:
    """Appends episodes to a dataset, a new one or one that recording left unfinished.

    Raises:
        UserError: the directory holds something else, or episodes of another description; an episode's file is broken.
    """

    def __init__(self, directory: Path, description: DatasetDescription):
        self.directory = directory
        self.description = description
        self._begin()
        self.seeds: list[int] = []
        self._lengths: list[int] = []
        self._instructions: list[str] = []
        while lerobot.data_file(directory, self.num_episodes).exists():
            file = lerobot.find_data_file(directory, self.num_episodes)
            footer = lerobot.open_parquet(file)
            stated = (footer.schema_arrow.metadata or {}).get(OWN_KEY, b"{}")
            own = documents.parse_json(
                stated, OfEpisode, f"{file}: metadata {OWN_KEY.decode()!r}", lerobot.RECORD_AGAIN
            )
            self._count(footer.metadata.num_rows, own.instruction, own.seed)

    def _begin(self) -> None:
        """Make sure that the directory is this dataset's; a description without any episode is replaced."""
        directory, path = self.directory, self.directory / OWN
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory} is a file, and a dataset is a directory; move it away or delete it")
        leftovers = [each for each in directory.glob("*/**/*.tmp") if _is_leftover(each.relative_to(directory))]
        known = {path, *leftovers}
        is_begun = any(each not in known and (each.is_symlink() or not each.is_dir()) for each in directory.rglob("*"))
        if is_begun and not path.is_file():
            raise UserError(f"{directory} is not empty and no dataset of RoboFactory's; move it away or delete it")
        if is_begun:
            require_same(self.description, read_description(directory), directory)
        for leftover in leftovers:
            leftover.unlink()
        if not is_begun:
            content = lerobot.to_json(dataclasses.asdict(self.description))
            documents.parse_json(content, DatasetDescription, f"the description of {directory}")
            self._write(path, content)

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
        length, name = len(episode.actions), f"{self.directory}: episode {self.num_episodes} (seed {episode.seed})"
        _require_writable(episode, name)
        own = {"seed": episode.seed, "instruction": episode.instruction}
        documents.check(own, OfEpisode, name, "it is not written")
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
        table = table.replace_schema_metadata({OWN_KEY: json.dumps(own)})
        self._write(lerobot.data_file(self.directory, self.num_episodes), lerobot.to_parquet(table))
        self._count(length, episode.instruction, episode.seed)

    def finalize(self) -> None:
        """Write what the format wants to know about all episodes together; `meta/info.json` is the last."""
        if self.num_episodes == 0:
            raise UserError(f"{self.directory} has no episode; there is nothing to finish")
        d, tasks, seeds = self.description, _unique(self._instructions), set(self.seeds)
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
        dropped = [seed for seed in range(d.first_seed, self.seeds[-1]) if seed not in seeds]
        own = {"seeds": self.seeds, "dropped_seeds": dropped, "versions": _versions()}
        episodes = lerobot.episodes_table(self._lengths, self._instructions)
        self._write(self.directory / OWN, lerobot.to_json(dataclasses.asdict(d) | own))
        self._write(self.directory / lerobot.TASKS, lerobot.to_parquet(lerobot.tasks_table(tasks)))
        self._write(self.directory / lerobot.EPISODES, lerobot.to_parquet(episodes))
        self._write(self.directory / lerobot.STATS, lerobot.to_json(self._statistics()))
        self._write(self.directory / INFO, lerobot.to_json(info))

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
        files = [lerobot.find_data_file(self.directory, episode) for episode in range(self.num_episodes)]
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
        self.directory = directory
        self.description, info = read_finished(directory)
        self.seeds = documents.read_json(files.inside(directory, OWN, directory), Finished).seeds
        self.views = tuple(self.description.image_sizes if views is None else views)
        require_views(self.views, self.description, str(directory))
        if info.total_episodes == 0:
            raise UserError(f"{directory} has no episode; delete it and record again")
        tasks = lerobot.read_tasks(files.inside(directory, lerobot.TASKS, directory, lerobot.RECORD_AGAIN))
        opened = [self._read_episode(episode, tasks) for episode in range(info.total_episodes)]
        self.instructions: list[str] = [each.instruction for each in opened]
        self.episode_lengths: Int64[np.ndarray, " e"] = np.array([len(each.actions) for each in opened], np.int64)
        self.episode_starts: Int64[np.ndarray, " e"] = np.cumsum(self.episode_lengths) - self.episode_lengths
        self.all_actions: Float32[np.ndarray, "n a"] = np.concatenate([each.actions for each in opened])
        self.all_proprio: Float32[np.ndarray, "n s"] = np.concatenate([each.proprio for each in opened])
        self.all_perturbed: Bool[np.ndarray, " n"] = np.concatenate([each.perturbed for each in opened])
        self._places: Int64[np.ndarray, "n v 2"] = np.concatenate([each.places for each in opened])

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
        """What the agent saw at a step of an episode, and what the expert answered.

        Raises:
            UserError: a picture does not decode; the line names the file, the episode, the frame and the view.
        """
        assert 0 <= index < self.episode_lengths[episode], (episode, index)
        row, path = int(self.episode_starts[episode]) + index, lerobot.data_file(self.directory, episode)
        with open(path, "rb", buffering=0) as file:
            where = f"{path}: episode {episode}, frame {index}"
            images = read_pictures(file, self.views, self._places[row], self.description, where)
        observation = Observation(images, self.all_proprio[row].copy(), self.instructions[episode])
        return observation, self.all_actions[row].copy()

    def _read_episode(self, episode: int, tasks: Mapping[int, str]) -> "OpenEpisode":
        path = lerobot.find_data_file(self.directory, episode)
        return read_episode(path, episode, self.description, self.views, tasks)


@dataclass(frozen=True)
class OpenEpisode:
    """What is in memory of an episode: all but its pictures.

    places: where its pictures are in the file: offset and size in bytes.
    """

    actions: Float32[np.ndarray, "n a"]
    proprio: Float32[np.ndarray, "n s"]
    perturbed: Bool[np.ndarray, " n"]
    instruction: str
    places: Int64[np.ndarray, "n v 2"]


def read_episode(
    path: Path, episode: int, description: DatasetDescription, views: Sequence[str], tasks: Mapping[int, str]
) -> OpenEpisode:
    """An episode from its file, of which each picture's first bytes are looked at.

    Raises:
        UserError: the file is broken, a number in it is not finite, or a picture is not what the description says.
    """
    keys = [lerobot.image_key(view) for view in views]
    file = lerobot.open_parquet(path)
    columns = [*description.vector_columns(), "perturbed", "timestamp", "task_index", *keys]
    table = lerobot.read_columns(file, path, columns)
    if len(table) == 0:
        raise UserError(f"{path} has no frame; delete it and record again")
    actions = lerobot.to_vectors(table, "action", len(description.joint_names), path)
    proprio = lerobot.to_vectors(table, "observation.state", len(description.names_of_proprio()), path)
    perturbed, times = (lerobot.to_scalars(table, name, path) for name in ("perturbed", "timestamp"))
    for column, values in (("action", actions), ("observation.state", proprio), ("timestamp", times)):
        if not np.isfinite(values).all():
            raise UserError(f"{path}: {column} is not finite; delete it and record again")
    instruction = lerobot.instruction_of(table, tasks, path)
    places = []
    for view, key in zip(views, keys, strict=True):
        encoded = lerobot.to_encoded(table, key, path)
        if odd := first_unlike(encoded, description.image_sizes[view]):
            height, width = description.image_sizes[view]
            raise UserError(
                f"{path}: episode {episode}, frame {odd[0]}, view {view!r}: the picture {odd[1]}, not {width}x{height} "
                f"px, 8-bit RGB; {lerobot.RECORD_AGAIN}"
            )
        places.append(_find_images(file, path, key, encoded))
    return OpenEpisode(actions, proprio, perturbed, instruction, np.stack(places, axis=1))


def read_pictures(
    file: BinaryIO,
    views: Sequence[str],
    places: Int64[np.ndarray, "v 2"],
    description: DatasetDescription,
    where: str,
) -> dict[str, UInt8[np.ndarray, "_h _w 3"]]:
    """The pictures of one frame, from where `read_episode` found them.

    Args:
        where: file, episode and frame, for the message.
    Raises:
        UserError: one does not decode, or has another size by now.
    """
    images = {}
    for view, (offset, size) in zip(views, places.tolist(), strict=True):
        try:
            images[view] = decode_png(os.pread(file.fileno(), size, offset))
        except UserError as error:
            raise UserError(f"{where}, view {view!r}: {error}; {lerobot.RECORD_AGAIN}") from None
        if images[view].shape[:2] != tuple(description.image_sizes[view]):
            raise UserError(f"{where}, view {view!r}: the picture is {images[view].shape[1]}x{images[view].shape[0]} px by now; {lerobot.RECORD_AGAIN}")  # fmt: skip
    return images


def _find_images(file: pq.ParquetFile, path: Path, column: str, encoded: pa.Array) -> Int64[np.ndarray, "n 2"]:
    """Offset and size in bytes of each image in the file: Parquet's plain encoding is a 4-byte size and the bytes."""
    row_group = file.metadata.row_group(0)
    chunks = {row_group.column(i).path_in_schema: row_group.column(i) for i in range(row_group.num_columns)}
    position = chunks[f"{column}.bytes"].data_page_offset
    places = []
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for png in png_files(encoded):
            # The next image follows at once, or behind the header of the next page.
            position = content.find(len(png).to_bytes(4, "little") + png[:64], position) + 4
            if position < 4 or content[position : position + len(png)] != png:
                raise UserError(f"{path}: {column} is compressed; only datasets written by robofactory can be read")
            places.append((position, len(png)))
            position += len(png)
    return np.array(places, np.int64)


def _is_leftover(path: Path) -> bool:
    """Whether a writer that was killed left this file, which had not got its name yet."""
    whole = r"data/chunk-\d+/file-\d+\.parquet|meta/(robofactory|info|stats)\.json|meta/tasks\.parquet|meta/episodes/chunk-000/file-000\.parquet"
    return re.fullmatch(rf"({whole})\.\d+\.tmp", path.as_posix()) is not None


def _require_writable(episode: Episode, name: str) -> None:
    try:
        episode.instruction.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: the instruction {episode.instruction!r} is not Unicode; it is not written") from None
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
