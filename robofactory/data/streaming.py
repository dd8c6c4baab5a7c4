"""A dataset that is too large for this machine: it stays where it is, behind a URL, and passes through.

An episode's file is fetched when one of its frames is asked for, and a bounded number of files is kept on the disk. What
is kept decides how soon a frame is here, and never which one. All processes of a machine share these files.
"""

import collections
import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64
from pydantic import Field

from robofactory import documents, files
from robofactory.data import lerobot
from robofactory.data.description import (
    INFO,
    OWN,
    DatasetDescription,
    Info,
    foreign_kind,
    import_first,
    require_views,
)
from robofactory.data.episodes import OpenEpisode, read_episode, read_pictures
from robofactory.documents import Document
from robofactory.errors import UserError
from robofactory.shapes import Action, Observation

META = (INFO, OWN, lerobot.STATS, lerobot.TASKS, lerobot.EPISODES)
MAX_BYTES = 2**31  # of a file: it is in memory while it is fetched
SPARE_EPISODES = 16  # on the disk, beside a window: data workers run ahead, and validation looks at others
SECONDS_BETWEEN_TRIES = (1.0, 5.0, 20.0)


class Feature(Document):
    """Statistics of a vector, a number for each dimension."""

    min: tuple[float, ...] = ()
    max: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    q01: tuple[float, ...] = ()
    q99: tuple[float, ...] = ()


class Statistics(Document):
    """What is used of `meta/stats.json`."""

    action: Feature
    state: Feature = Field(Feature(), alias="observation.state")


class StreamedReader:
    """Random access to every frame of a finished dataset, as `DatasetReader` has it, in bounded memory and disk.

    Opening reads `meta/` alone. In memory are a few numbers an episode, and those of `window + 16` episodes in full; on
    the disk are these episodes' files. Holds no open file: it may be pickled, and used after a fork.

    statistics: of `action` and `observation.state`, from the dataset's `meta/stats.json`.

    Args:
        url: of the directory, on any file system that fsspec knows: s3://, gs://, hf://, file://, ...
        cache: directory for fetched files.
        window: in how many episodes at a time frames will be asked for; see `order.Passes`.
    Raises:
        UserError: there is no dataset, or no way to read it; an unknown view.
    """

    def __init__(self, url: str, views: Sequence[str], cache: Path, window: int):
        self.url, self.views = url.rstrip("/"), tuple(views)
        meta = {name: self._fetch(name) for name in META}
        digest = hashlib.sha256(b"".join(meta.values())).hexdigest()[:12]  # another dataset, other files
        name = re.sub(r"[^\w.=+-]", "_", self.url.rpartition("/")[2])[-100:]
        self.cache, self.num_kept = cache / f"{name}-{digest}", window + SPARE_EPISODES
        self.description = documents.parse_json(meta[OWN], DatasetDescription, f"{self.url}/{OWN}")
        require_views(self.views, self.description, url)
        self._tasks = lerobot.read_tasks(f"{self.url}/{lerobot.TASKS}", meta[lerobot.TASKS])
        table = f"{self.url}/{lerobot.EPISODES}", meta[lerobot.EPISODES]
        self.episode_lengths: Int64[np.ndarray, " e"]
        self.instructions: list[str]
        self.episode_lengths, self.instructions = lerobot.read_episodes(*table)
        stated = documents.parse_json(meta[INFO], Info, f"{self.url}/{INFO}").total_episodes
        if not 0 < self.num_episodes == stated:
            raise UserError(f"{self.url} has {self.num_episodes} episodes in {lerobot.EPISODES}, {stated} in {INFO}")
        self.statistics = self._read_statistics(meta[lerobot.STATS])
        self._opened: collections.OrderedDict[int, OpenEpisode] = collections.OrderedDict()

    @property
    def num_episodes(self) -> int:
        return len(self.episode_lengths)

    @property
    def num_frames(self) -> int:
        return int(self.episode_lengths.sum())

    def actions(self, episode: int) -> Float32[np.ndarray, "n a"]:
        return self._open(episode).actions

    def proprio(self, episode: int) -> Float32[np.ndarray, "n s"]:
        return self._open(episode).proprio

    def frame(self, episode: int, index: int) -> tuple[Observation, Action]:
        """What the agent saw at a step of an episode, and what the expert answered.

        Raises:
            UserError: the episode cannot be fetched, or its file is broken.
        """
        assert 0 <= index < self.episode_lengths[episode], (episode, index)
        content, path = self._open(episode), self._file(episode)
        with open(path, "rb", buffering=0) as file:
            where = f"{path}: episode {episode}, frame {index}"
            images = read_pictures(file, self.views, content.places[index], self.description, where)
        observation = Observation(images, content.proprio[index].copy(), self.instructions[episode])
        return observation, content.actions[index].copy()

    def _open(self, episode: int) -> OpenEpisode:
        if episode not in self._opened:
            path = self._file(episode)
            content = read_episode(path, episode, self.description, self.views, self._tasks)
            found = len(content.actions), content.instruction
            if found != (int(self.episode_lengths[episode]), self.instructions[episode]):
                raise UserError(f"{path}: episode {episode} has {found[0]} frames and the instruction {found[1]!r}, in {self.url}/{lerobot.EPISODES} it has {self.episode_lengths[episode]} and {self.instructions[episode]!r}")  # fmt: skip
            self._opened[episode] = content
            if len(self._opened) > self.num_kept:
                self._opened.popitem(last=False)
        self._opened.move_to_end(episode)
        return self._opened[episode]

    def _read_statistics(self, content: bytes) -> dict[str, dict[str, Float64[np.ndarray, " d"]]]:
        path, d = f"{self.url}/{lerobot.STATS}", self.description
        stated = documents.parse_json(content, Statistics, path)
        features = {"action": (stated.action, d.joint_names), "observation.state": (stated.state, d.names_of_proprio())}
        statistics = {}
        for column, (feature, names) in features.items():
            numbers = {name: np.array(values, np.float64) for name, values in vars(feature).items()}
            if wrong := [name for name, values in numbers.items() if len(values) != len(names)]:
                raise UserError(f"{path}: {column}.{wrong[0]} has {len(numbers[wrong[0]])} numbers; {len(names)} are needed")  # fmt: skip
            low, high = numbers["min"], numbers["max"]
            slack = 1e-6 * (high - low) + 1e-9 * np.abs(high)  # a mean is rounded
            inner = np.stack([numbers[name] for name in ("mean", "q01", "q99")])
            if ((low > high) | (inner < low - slack) | (inner > high + slack)).any():
                raise UserError(
                    f"{path}: {column} has a minimum above its maximum, or a mean or a quantile beyond them"
                )
            statistics[column] = numbers
        return statistics

    # ----- files

    def _file(self, episode: int) -> Path:
        """An episode's file on this disk; it is the one that makes room last."""
        path = lerobot.data_file(self.cache, episode)
        try:
            os.utime(path)
        except FileNotFoundError:
            content = self._fetch(str(path.relative_to(self.cache)))
            try:
                self._make_room()
                files.write_atomically(path, content)
            except OSError as error:
                raise UserError(f"cannot keep {path}: {error.strerror}; make room, or set a smaller data.stream_window") from None  # fmt: skip
        return path

    def _make_room(self) -> None:
        """Delete what was not asked for longest, also what a killed process left half-written."""
        ages = []
        for path in self.cache.glob("data/chunk-*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process did it
                ages.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(ages)[: max(0, len(ages) + 1 - self.num_kept)]:
            path.unlink(missing_ok=True)

    def _fetch(self, name: str) -> bytes:
        """A file's content, after some tries if need be: a network may fail for a while."""
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        for seconds in (*SECONDS_BETWEEN_TRIES, None):
            try:
                system, directory = url_to_fs(self.url)  # fsspec keeps them, for each process its own
                if isinstance(system, LocalFileSystem) and os.path.lexists(f"{directory}/{name}"):
                    files.inside(Path(directory), name, self.url)
                stated = system.info(f"{directory}/{name}")
                if stated["type"] != "file" or (stated.get("size") or 0) > MAX_BYTES:
                    raise UserError(f"{self.url}/{name} is no file of at most {MAX_BYTES:,} bytes")
                content = system.cat_file(f"{directory}/{name}")
                assert isinstance(content, bytes)
                return content
            except UserError:
                raise
            except (FileNotFoundError, NotADirectoryError):
                raise self._missing(name) from None
            except (
                ValueError,
                ImportError,
                PermissionError,
            ) as error:  # an unknown protocol, or one that needs a package
                raise UserError(f"cannot read {self.url}: {error}") from None
            except _network_errors() as error:
                if seconds is None:
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    raise UserError(f"cannot read {self.url}/{name} ({reason}); check the network, then continue") from None  # fmt: skip
                time.sleep(seconds)
        raise AssertionError("the last try returns or raises")

    def _missing(self, name: str) -> UserError:
        """For a file that is not there: what is there may be a dataset of another format."""
        from fsspec.core import url_to_fs

        system, directory = url_to_fs(self.url)

        def has(other: str) -> bool:
            try:
                return bool(system.exists(f"{directory}/{other}"))
            except _network_errors():
                return False

        kind = None if has(OWN) else foreign_kind(self.url, has)
        if kind is not None:
            return import_first(self.url, kind)
        return UserError(f"no finished dataset at {self.url}: it has no {name}")


def _network_errors() -> tuple[type[Exception], ...]:
    """What a file system raises when its network fails, of those that are in use."""
    known = {
        "aiohttp": "ClientError",
        "azure.core.exceptions": "AzureError",
        "botocore.exceptions": "BotoCoreError",
        "gcsfs.retry": "HttpError",
        "google.auth.exceptions": "GoogleAuthError",
        "httpx": "HTTPError",
    }
    return (OSError, *(getattr(sys.modules[module], name) for module, name in known.items() if module in sys.modules))
