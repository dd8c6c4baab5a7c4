"""LeRobot's datasets of the versions 2.0, 2.1 and 3.0, with embedded images or videos; a directory or a hub id.

Both are Parquet with a row a frame. 2.x: a file an episode, JSON lines under meta/. 3.0: files and videos hold many
episodes one after the other, and meta/episodes says where each lies. Where that and the rows differ, the rows' own
`episode_index` decides: LeRobot's converter wrote another file there for the episode at each file's end.

Source: lerobot 0.3.3 (2.1) and 0.4.4 (3.0), lerobot/datasets/lerobot_dataset.py.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Shaped

from robofactory import files
from robofactory.data.imports import lerobot_meta as meta
from robofactory.data.imports import lerobot_rows as rows
from robofactory.data.imports.frames import MAX_BYTES, Frame, open_picture, size_of, white_of
from robofactory.data.imports.lerobot_rows import Part
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
    one_instruction,
)
from robofactory.data.imports.videos import LARGEST_DRIFT, end_s, pictures_at, video_size
from robofactory.errors import UserError

OLD_FIELDS = ("episode_chunk", "episode_index", "chunk_index", "file_index")
NEW_FIELDS = ("chunk_index", "file_index")
SHOWN = 5  # episodes in a note


class LeRobot(Source):
    def __init__(self, path: Path, options: Options):
        self.path = path = path if path.is_dir() else _download(str(path))
        self._options = options
        self._info = info = meta.read_info(path)
        self.notes = notes = []
        fps = int(info.fps) if info.fps is not None and info.fps.is_integer() else info.fps
        self.fps = choose_fps(fps, options, None, path, notes)
        self.robot_type = info.robot_type or "unknown"
        self._choose_cameras(notes)
        self._choose_vectors(notes)
        if options.instruction_key is not None:
            raise UserError("LeRobot's instructions are its tasks; omit --instruction_key")
        self._tasks_file, self._tasks = meta.read_tasks(path) if options.instruction is None else (path, {})

        self._is_new = info.codebase_version == "v3.0"
        fields, name = (NEW_FIELDS if self._is_new else OLD_FIELDS), f"{path / 'meta/info.json'}:"
        self._data_path = meta.PathTemplate(info.data_path, fields, f"{name} data_path")
        if self._videos and info.video_path is None:
            raise UserError(f"{name} has no video_path, but camera {self._videos[0]} is a video")
        if self._videos and info.video_path is not None:
            self._video_path = meta.PathTemplate(info.video_path, (*fields, "video_key"), f"{name} video_path")
        if self._is_new:
            self._new_episodes = meta.read_new_episodes(path, self._videos)
            self._episodes: Mapping[int, meta.Episode] = self._new_episodes
        else:
            self._new_episodes, self._episodes = {}, meta.read_old_episodes(path)
            used = self._data_path.fields | (self._video_path.fields if self._videos else set())
            if info.chunks_size is None and used & {"episode_chunk", "chunk_index"}:
                raise UserError(f"{name} key 'chunks_size' is missing; its paths need it")
        if info.total_episodes not in (None, len(self._episodes)):
            raise UserError(f"{path} lists {len(self._episodes)} episodes of {info.total_episodes}; {FETCH_AGAIN}")
        self.episode_ids = choose_episodes(self._episodes, options, path)
        if self._is_new:
            self._found = rows.find_episodes(self._data_path.find(path))
            self._moved = self._find_moved_videos()
            self._note_what_differs(notes)
        self._look_at_first_pictures(notes)

    def _choose_cameras(self, notes: list[str]) -> None:
        usable, unusable = meta.cameras(self._info.features)
        self.cameras = choose_cameras([*usable], unusable, self._options, self.path, notes)
        self.image_sizes = {view: usable[key] for view, key in self.cameras.items()}
        self._videos = [key for key in self.cameras.values() if self._info.features[key].dtype == "video"]

    def _choose_vectors(self, notes: list[str]) -> None:
        features = self._info.features
        lengths = {key: meta.vector_length(key, feature) for key, feature in features.items()}
        self._lengths = {key: length for key, length in lengths.items() if length is not None}
        self._action_keys = self._options.action_keys or ("action",)
        self._proprio_keys = self._options.proprio_keys or ("observation.state",)
        if self._proprio_keys == NONE:
            self._proprio_keys = ()
        for key in (*self._action_keys, *self._proprio_keys):
            if key in features and key not in self._lengths:
                there = f"{features[key].dtype!r} of shape {features[key].shape}"
                raise UserError(f"{self.path}: {key} is {there}; needed: numbers in one dimension")
        keys = (*self._action_keys, *self._proprio_keys)
        named: dict[str, Sequence[str]] = {key: () for key in self._lengths}
        named |= {k: meta.names_of(self.path, k, features[k], notes) for k in dict.fromkeys(keys) if k in named}
        self.action_names = choose_vectors(self._action_keys, named, "action", self.path)
        self.proprio_names = choose_vectors(self._proprio_keys, named, "proprio", self.path)

    def read(self, episode: int) -> Recording:
        name, notes = f"{self.path}: episode {episode}", []
        parts = self._rows_of(episode)
        columns, _ = rows.columns_of(parts[0].file)
        extra = [column for column in ("frame_index", "task_index") if column in columns]
        if self._options.instruction is not None:
            extra = [column for column in extra if column != "task_index"]
        vectors = {key: self._lengths[key] for key in (*self._action_keys, *self._proprio_keys)}
        numbers = rows.read_numbers(parts, vectors | {key: 1 for key in ("timestamp", "episode_index", *extra)})
        times_s = numbers["timestamp"][:, 0]
        self._require_one_episode(episode, parts, numbers)
        self._require_a_grid(times_s, parts, name)
        length = self._episodes[episode].length
        if length not in (None, len(times_s)):
            notes.append(f"it has {len(times_s)} rows, meta/ says {length}; the rows are taken")
        frames: dict[str, Iterable[Frame]] = {}
        for view, key in self.cameras.items():
            if key in self._videos:
                frames[view] = self._video(episode, key, times_s, notes)
            else:
                frames[view] = self._pictures(parts, key)
        return Recording(
            frames=frames,
            actions=np.concatenate([numbers[key] for key in self._action_keys], axis=1),
            proprio=np.concatenate([np.zeros((len(times_s), 0)), *(numbers[k] for k in self._proprio_keys)], axis=1),
            instruction=one_instruction(self._options, self._words(numbers, name), self.path, episode),
            file=parts[0].file,
            notes=notes,
        )

    def _rows_of(self, episode: int) -> tuple[Part, ...]:
        """Where they lie, at least one of them."""
        if self._is_new:
            if episode not in self._found:
                raise UserError(f"{self.path}: episode {episode} of meta/ has no rows; {FETCH_AGAIN}")
            return self._found[episode]
        name = self._data_path.fill(self._fields(episode))
        file = files.inside(self.path, name, self.path / "meta/info.json", FETCH_AGAIN)
        _, count = rows.columns_of(file)
        if count == 0:
            raise UserError(f"{file} has no rows; {FETCH_AGAIN}")
        return (Part(file, 0, count),)

    def _fields(self, episode: int) -> dict[str, int | str]:
        """Of the paths of 2.x."""
        chunk = episode // (self._info.chunks_size or 1)
        return {"episode_chunk": chunk, "chunk_index": chunk, "episode_index": episode, "file_index": episode}

    def _require_one_episode(self, episode: int, parts: Sequence[Part], numbers: Mapping[str, np.ndarray]) -> None:
        """That all rows are of this episode, and in order."""
        others = np.flatnonzero(numbers["episode_index"] != episode)
        if others.size:
            there = numbers["episode_index"][others[0], 0]
            raise UserError(
                f"{_row(parts, int(others[0]))} is of episode {there:g}, not {episode} as its file's name says"
            )
        if "frame_index" in numbers:
            frames = numbers["frame_index"][:, 0]
            wrong = np.flatnonzero(~(np.diff(frames) == 1))
            if wrong.size:
                before, after = frames[wrong[0]], frames[wrong[0] + 1]
                raise UserError(f"{_row(parts, int(wrong[0]) + 1)} of episode {episode} has frame_index {after:g} after {before:g}; rows are missing, doubled or in disorder")  # fmt: skip

    def _require_a_grid(self, times_s: Float64[np.ndarray, " n"], parts: Sequence[Part], name: str) -> None:
        """That the rows' times are numbers and `fps` apart."""
        if (wrong := np.flatnonzero(~np.isfinite(times_s))).size:
            raise UserError(f"{_row(parts, int(wrong[0]))} has timestamp {times_s[wrong[0]]}; needed: a time in s")
        if (wrong := np.flatnonzero(np.abs(np.diff(times_s) * self.fps - 1.0) > LARGEST_DRIFT)).size:
            before, after = times_s[wrong[0]], times_s[wrong[0] + 1]
            raise UserError(
                f"{name}: its timestamps are not {self.fps:g} frames per second: "
                f"{after:.3f} s comes after {before:.3f} s in {_row(parts, int(wrong[0]) + 1)}"
            )

    def _words(self, numbers: Mapping[str, np.ndarray], name: str) -> list[str]:
        """The instructions of the rows; none where the user says it."""
        if self._options.instruction is not None:
            return []
        if "task_index" not in numbers:
            raise UserError(f"{name}: its rows have no task_index; say --instruction WORDS")
        words = []
        for task in np.unique(rows.whole(numbers["task_index"], f"{name}: task_index")).tolist():
            if task not in self._tasks:
                raise UserError(f"{name}: its task_index {task} is not in {self._tasks_file}; say --instruction WORDS")
            if not (self._tasks[task] or "").strip():
                raise UserError(f"{name}: task {task} of {self._tasks_file} has no words; say --instruction WORDS")
            words.append(self._tasks[task])
        return words

    # ------------------------------------------------------------------------------------------------- pictures

    def _look_at_first_pictures(self, notes: list[str]) -> None:
        """What meta/ declares of them is wrong in some datasets; the first episode decides, where it can be read."""
        self.whites, first = {}, self.episode_ids[0]
        for view, key in self.cameras.items():
            declared = size = self.image_sizes[view]
            with contextlib.suppress(UserError):  # reading says so
                if key in self._videos:
                    size = video_size(self._video_place(first, key)[0])
                else:
                    size, self.whites[view] = first_look(self._pictures(self._rows_of(first), key))
                if size != declared:
                    self.image_sizes[view] = size
                    notes.append(f"camera {key} is declared {declared[1]}x{declared[0]} px, its pictures have {size[1]}x{size[0]}")  # fmt: skip

    def _pictures(self, parts: Sequence[Part], key: str) -> Iterator[Frame]:
        return rows.read_pictures(self.path, parts, key, tuple(self._info.features[key].shape or ()))

    def _video_place(self, episode: int, key: str) -> tuple[Path, float]:
        """An episode's video, and when it begins there."""
        info = self.path / "meta/info.json"
        if not self._is_new:
            name = self._video_path.fill(self._fields(episode) | {"video_key": key})
            return files.inside(self.path, name, info, FETCH_AGAIN), 0.0
        place = self._new_episodes[episode].videos[key]
        if place.chunk_index is None or place.file_index is None or place.from_timestamp is None:
            raise UserError(f"{self.path}: episode {episode} has no video of camera {key} (meta/episodes)")
        if (episode, key) in self._moved:
            return self._video_file(key, self._moved[episode, key]), 0.0
        return self._video_file(key, (place.chunk_index, place.file_index)), place.from_timestamp

    def _video(
        self, episode: int, key: str, times_s: Float64[np.ndarray, " n"], notes: list[str]
    ) -> Iterable[Shaped[np.ndarray, "h w 3"]]:
        file, start_s = self._video_place(episode, key)
        if not self._is_new:
            return pictures_at(file, times_s, self.fps, True, notes)
        place = self._new_episodes[episode].videos[key]
        if place.to_timestamp is not None:
            count = round((place.to_timestamp - (place.from_timestamp or 0.0)) * self.fps)
            if count < len(times_s):
                raise UserError(f"{self.path}: episode {episode} has {len(times_s)} rows, but {count} pictures of camera {key} (meta/episodes)")  # fmt: skip
            if count > len(times_s):
                notes.append(f"it has {count} pictures of camera {key} for {len(times_s)} rows; those at the rows' times are taken")  # fmt: skip
            elif abs(times_s[0]) * self.fps > LARGEST_DRIFT:  # as many pictures as rows: they belong together
                times_s = times_s - times_s[0]
        return pictures_at(file, start_s + times_s, self.fps, False, notes)

    def _find_moved_videos(self) -> dict[tuple[int, str], tuple[int, int]]:
        """(episode, camera) -> chunk and file that its video begins, where meta/episodes names the file before.

        LeRobot's converter wrote that for the first episode of each file: the file that was full, and its end as the
        time. So the file named ends there, and the one that follows has room for the episode at its beginning.
        """
        moved, half_s = {}, 0.5 / self.fps
        for key in self._videos:
            places = {episode: row.videos[key] for episode, row in self._new_episodes.items()}
            named = {(place.chunk_index, place.file_index) for place in places.values()}
            followers = [*places.values()][1:]
            for (episode, place), follower in zip(places.items(), [*followers, None], strict=True):
                chunk, number, start_s, stop_s = place.chunk_index, place.file_index, place.from_timestamp, place.to_timestamp  # fmt: skip
                if chunk is None or number is None or not start_s or stop_s is None:
                    continue
                if follower is None:  # the last one, in a file that none names
                    candidates = [other for other in ((chunk, number + 1), (chunk + 1, 0)) if other not in named]
                else:
                    there, room_s = (follower.chunk_index, follower.file_index), follower.from_timestamp or 0.0
                    is_room = there != (chunk, number) and room_s > stop_s - start_s - half_s and room_s > half_s
                    candidates = [there] if is_room else []
                for other in candidates:
                    with contextlib.suppress(UserError):  # no such file, or broken: reading says so
                        self._video_file(key, other)
                        end = end_s(self._video_file(key, (chunk, number)))
                        if end is not None and end < start_s + half_s:
                            moved[episode, key] = other
                            break
        return moved

    def _video_file(self, key: str, place: tuple[int | None, int | None]) -> Path:
        values = {"video_key": key, "chunk_index": place[0] or 0, "file_index": place[1] or 0}
        return files.inside(self.path, self._video_path.fill(values), self.path / "meta/info.json", FETCH_AGAIN)

    # ---------------------------------------------------------------------------------------------------- notes

    def _note_what_differs(self, notes: list[str]) -> None:
        """Between meta/ and the rows of 3.0."""
        listed = [episode for episode in self._new_episodes if episode in self._found]
        total = sum(part.count for episode in listed for part in self._found[episode])
        if self._info.total_frames not in (None, total):
            notes.append(f"meta/info.json says {self._info.total_frames} frames, the rows of all episodes are {total}")
        elsewhere = []
        for episode, row in self._new_episodes.items():
            if row.data_place is not None and episode in self._found:
                name = self._data_path.fill(dict(zip(NEW_FIELDS, row.data_place, strict=True)))
                if self.path / name != self._found[episode][0].file:
                    elsewhere.append(episode)
        if elsewhere:
            notes.append(f"meta/episodes names another file than the one with the rows of {_listed(elsewhere)}; the rows decide")  # fmt: skip
        if self._moved:
            moved = sorted({episode for episode, _ in self._moved})
            notes.append(f"meta/episodes names the video before the right one for {_listed(moved)}; the right one is read")  # fmt: skip
        if unlisted := sorted(set(self._found) - set(self._new_episodes)):
            notes.append(f"the rows of {_listed(unlisted)} are omitted, which meta/episodes does not list")


def first_look(pictures: Iterator[Frame]) -> tuple[tuple[int, int], float | None]:
    """(height, width) of a camera's pictures by the first of them, and what white is, by all."""
    first = next(pictures)
    if isinstance(first, np.ndarray):
        return size_of(first.shape), white_of(
            chain([first], (each for each in pictures if isinstance(each, np.ndarray)))
        )
    if isinstance(first, Path) and first.stat().st_size > MAX_BYTES:
        raise UserError(f"{first} is larger than a picture may be")
    with open_picture(first if isinstance(first, bytes) else first.read_bytes()) as image:
        return (image.height, image.width), None


def _listed(episodes: Sequence[int]) -> str:
    shown = ", ".join(map(str, episodes[:SHOWN]))
    return f"{len(episodes)} episodes ({shown}{', ...' if len(episodes) > SHOWN else ''})"


def _row(parts: Sequence[Part], index: int) -> str:
    """The file and row of an episode's frame, for messages."""
    for part in parts:
        if index < part.count:
            return f"{part.file}: row {part.first + index}"
        index -= part.count
    raise AssertionError(index)


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
