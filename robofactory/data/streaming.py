"""A dataset that is too large for this machine: it stays where it is, behind a URL, and passes through.

An episode's file is fetched when one of its frames is asked for, and a bounded number of files is kept on the disk. What
is kept decides how soon a frame is here, and never which one. All processes of a machine share these files.
"""

import collections
import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from robofactory.data import lerobot
from robofactory.data.episodes import describe, read_episode, read_pictures, require_views
from robofactory.errors import UserError
from robofactory.files import write_atomically
from robofactory.shapes import Action, Observation

META = ("info.json", "robofactory.json", "stats.json", "tasks.parquet", "episodes/chunk-000/file-000.parquet")
SPARE_EPISODES = 16  # on the disk, beside a window: data workers run ahead, and validation looks at others
SECONDS_BETWEEN_TRIES = (1.0, 5.0, 20.0)


@dataclass(frozen=True)
class OpenEpisode:
    """What is in memory of an episode: all but its pictures."""

    actions: Float32[np.ndarray, "n a"]
    proprio: Float32[np.ndarray, "n s"]
    places: Int64[np.ndarray, "n v 2"]


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
        meta = {name: self._fetch(f"meta/{name}") for name in META}
        digest = hashlib.sha256(b"".join(meta.values())).hexdigest()[:12]  # another dataset, other files
        self.cache, self.num_kept = cache / f"{self.url.rpartition('/')[2]}-{digest}", window + SPARE_EPISODES
        self.description = describe(json.loads(meta["robofactory.json"]))
        require_views(self.views, self.description, url)
        episodes = pq.read_table(io.BytesIO(meta[META[-1]]), columns=["length", "tasks"])
        self.episode_lengths: Int64[np.ndarray, " e"] = lerobot.to_numpy(episodes["length"])
        self.instructions: list[str] = [tasks[0] for tasks in episodes["tasks"].to_pylist()]
        names = ("min", "max", "mean", "std", "q01", "q99")
        statistics = {"observation.state": {name: [] for name in names}} | json.loads(meta["stats.json"])
        self.statistics = {
            column: {name: np.array(statistics[column][name], np.float64) for name in names}
            for column in ("action", "observation.state")
        }
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
        content = self._open(episode)
        with open(self._file(episode), "rb", buffering=0) as file:
            images = read_pictures(file, self.views, content.places[index])
        observation = Observation(images, content.proprio[index].copy(), self.instructions[episode])
        return observation, content.actions[index].copy()

    def _open(self, episode: int) -> OpenEpisode:
        if episode not in self._opened:
            table, places = read_episode(self._file(episode), self.description, self.views)
            actions, proprio = (lerobot.to_vectors(table, name) for name in ("action", "observation.state"))
            self._opened[episode] = OpenEpisode(actions, proprio, places)
            if len(self._opened) > self.num_kept:
                self._opened.popitem(last=False)
        self._opened.move_to_end(episode)
        return self._opened[episode]

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
                write_atomically(path, content)
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

        for seconds in (*SECONDS_BETWEEN_TRIES, None):
            try:
                files, directory = url_to_fs(self.url)  # fsspec keeps them, for each process its own
                return files.cat_file(f"{directory}/{name}")
            except FileNotFoundError:
                raise UserError(f"no finished dataset at {self.url}: it has no {name}") from None
            except (ValueError, ImportError) as error:  # an unknown protocol, or one that needs a package
                raise UserError(f"cannot read {self.url}: {error}") from None
            except OSError as error:
                if seconds is None:
                    raise UserError(f"cannot read {self.url}/{name} ({error}); check the network, then continue") from None  # fmt: skip
                time.sleep(seconds)
        raise AssertionError("the last try returns or raises")
