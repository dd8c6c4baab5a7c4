"""Diffusion Policy's zarr, as RoboFactory's scripts make them: all episodes of one agent, one behind the other.

    data/{camera}   uint8 or float, [n, 3, h, w], [n, h, w, 3], or with 1 or 4 channels; uint8 [n, h, w]
    data/{vector}   numbers [n, d]: action, state, ...
    meta/episode_ends

In RoboFactory's the state is no measurement but the action once more: what learns from it copies its input and stands
still on the robot. Such a vector is found by its numbers and never imported as proprio.

Source: RoboFactory, policy/Diffusion-Policy, and OpenMARL's fork of it, which adds wrist_camera and one more zarr with
the pictures of the global camera, `{task}_global_{num}.zarr`; it is used where it lies beside SOURCE.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from robofactory.data.imports.frames import Unsuitable, num_channels, size_of, white_of
from robofactory.data.imports.source import (
    FETCH_AGAIN,
    MOST_DIMENSIONS,
    NONE,
    Options,
    Recording,
    Source,
    choose_cameras,
    choose_episodes,
    choose_fps,
    choose_vectors,
    instruction_of_task,
    numbered,
)
from robofactory.data.imports.zarr_arrays import Array, Store, list_arrays, open_array
from robofactory.errors import UserError
from robofactory.robots.panda import ROBOT as PANDA

CONTROL_FREQ_HZ = 20  # RoboFactory's; the format does not say
GLOBAL_CAMERA = "head_camera_global"
MOST_EPISODES = 1_000_000
ENDS = "meta/episode_ends"


class DiffusionPolicy(Source):
    def __init__(self, path: Path, options: Options):
        self.path = path
        self.notes = notes = []
        self._instruction = instruction_of_task(options, path)
        with Store(path) as store:
            arrays, unread = _arrays(store)
            ends = _ends(store)
        self._starts, self._ends = np.concatenate([[0], ends[:-1]]).tolist(), ends.tolist()
        self.episode_ids = choose_episodes(range(len(ends)), options, path)
        for name, array in arrays.items():
            if array.shape[0] != ends[-1]:
                raise UserError(
                    f"{path}: {name} has {array.shape[0]} frames, its episodes {ends[-1]}; it is incomplete"
                )
        self.fps = choose_fps(None, options, CONTROL_FREQ_HZ, path, notes)

        self._choose_cameras(arrays, unread, options, notes)
        vectors = {
            name: numbered(name, array.shape[1])
            for name, array in arrays.items()
            if array.ndim == 2 and array.shape[1] <= MOST_DIMENSIONS
        }
        self._action_keys = options.action_keys or ("action",)
        self._proprio_keys = options.proprio_keys or ("state",)
        if self._proprio_keys == NONE:
            self._proprio_keys = ()
        for name in (*self._action_keys, *self._proprio_keys):
            if name in unread:
                raise unread[name]
        self.action_names = choose_vectors(self._action_keys, vectors, "action", path)
        if self._action_keys == ("action",) and len(self.action_names) == len(PANDA.names):
            self.action_names = PANDA.names  # what RoboFactory's eight are
        self.proprio_names = choose_vectors(self._proprio_keys, vectors, "proprio", path)
        self._vectors = {name: arrays[name] for name in (*self._action_keys, *self._proprio_keys)}
        for array in self._vectors.values():
            self._require_chunks((path, array))
        copies = [
            f"{key} is a copy of {action}"
            for key in self._proprio_keys
            for action in self._action_keys
            if self._are_equal(arrays[key], arrays[action])
        ]
        if copies and options.proprio_keys is not None:
            raise UserError(f"{path}: {copies[0]}, no measurement; omit --proprio_key")
        if copies:
            self._proprio_keys, self.proprio_names = (), ()
            notes.append(f"{copies[0]}, no measurement: imported without proprio (train with model.use_proprio=false)")

    def _choose_cameras(
        self, arrays: dict[str, Array], unread: dict[str, Unsuitable], options: Options, notes: list[str]
    ) -> None:
        named = (options.cameras or {}).values()  # then a camera may also be what could be depth
        places = {name: (self.path, array) for name, array in arrays.items() if _is_camera(array, name in named)}
        beside = _global_beside(self.path)
        if beside is not None and GLOBAL_CAMERA not in places:
            with Store(beside) as store:
                if _ends(store).tolist() != self._ends:
                    raise UserError(f"{beside} has other episodes than {self.path}; move it away")
                places[GLOBAL_CAMERA] = (beside, open_array(store, "data/head_camera"))
            if places[GLOBAL_CAMERA][1].shape[0] != self._ends[-1]:
                raise UserError(f"{beside}: head_camera has other frames than its episodes; it is incomplete")
        unsuitable = {name: str(error) for name, error in unread.items()}
        whites: dict[str, float | None] = {}
        for name, place in places.items():
            try:
                size_of(place[1].shape[1:])
                is_plain = place[1].dtype == np.uint8
                whites[name] = None if is_plain else white_of(self._frames(place, self.episode_ids[0]))
            except Unsuitable as error:
                unsuitable[name] = str(error)
        self.cameras = choose_cameras(list(whites), unsuitable, options, self.path, notes)
        self.whites = {view: whites[name] for view, name in self.cameras.items()}
        self._places = {view: places[name] for view, name in self.cameras.items()}
        self.image_sizes = {view: size_of(array.shape[1:]) for view, (_, array) in self._places.items()}
        for view, place in self._places.items():
            self._require_chunks(place)
            if num_channels(place[1].shape[1:]) == 1:
                notes.append(f"camera {self.cameras[view]!r} is grey: its channel becomes red, green and blue")

    def _require_chunks(self, place: tuple[Path, Array]) -> None:
        path, array = place
        with Store(path) as store:
            for episode in self.episode_ids:
                try:
                    array.require_chunks(store, self._starts[episode], self._ends[episode])
                except UserError as error:
                    raise UserError(f"{error}; add --skip {episode} to leave its episode out") from None

    def _are_equal(self, one: Array, other: Array) -> bool:
        with Store(self.path) as store:
            return one.shape == other.shape and all(
                np.array_equal(one.read(store, *rows), other.read(store, *rows))
                for rows in ((self._starts[episode], self._ends[episode]) for episode in self.episode_ids)
            )

    def read(self, episode: int) -> Recording:
        start, stop = self._starts[episode], self._ends[episode]
        with Store(self.path) as store:
            values = {name: array.read(store, start, stop) for name, array in self._vectors.items()}
        proprio = [values[key] for key in self._proprio_keys]
        return Recording(
            frames={view: self._frames(place, episode) for view, place in self._places.items()},
            actions=np.concatenate([values[key] for key in self._action_keys], axis=1),
            proprio=np.concatenate(proprio, axis=1) if proprio else np.zeros((stop - start, 0), np.float32),
            instruction=self._instruction,
        )

    def _frames(self, place: tuple[Path, Array], episode: int) -> Iterator[Shaped[np.ndarray, "..."]]:
        path, array = place
        with Store(path) as store:
            for block in array.blocks(store, self._starts[episode], self._ends[episode]):
                yield from block


def _arrays(store: Store) -> tuple[dict[str, Array], dict[str, Unsuitable]]:
    """The arrays under data/, by name, and why those that cannot be read cannot."""
    if not store.list("data"):
        raise UserError(f"{store.path} has no data/; is it a Diffusion Policy zarr?")
    arrays: dict[str, Array] = {}
    unread: dict[str, Unsuitable] = {}
    for name in list_arrays(store, "data"):
        try:
            arrays[name] = open_array(store, f"data/{name}")
        except Unsuitable as error:
            unread[name] = error
    return arrays, unread


def _ends(store: Store) -> Int64[np.ndarray, " e"]:
    if not store.list(ENDS):
        raise UserError(f"{store.path} has no {ENDS}; is it a Diffusion Policy zarr?")
    array = open_array(store, ENDS)
    if array.ndim != 1 or not 0 < array.shape[0] <= MOST_EPISODES:
        raise UserError(f"{store.path}: {ENDS} has the shape {list(array.shape)}; needed: a number for each episode")
    array.require_chunks(store, 0, array.shape[0])
    values = array.read(store, 0, array.shape[0])
    with np.errstate(invalid="ignore"):  # NaN, found by the next line
        ends = values.astype(np.int64)
    if not np.array_equal(ends, values) or (np.diff(ends, prepend=0) <= 0).any():
        raise UserError(
            f"{store.path}: {ENDS} must be whole numbers that grow, got {values[:8].tolist()}; {FETCH_AGAIN}"
        )
    return ends


def _is_camera(array: Array, is_named: bool) -> bool:
    """Floats of one channel may be depth or points: they are a camera only where the user says so."""
    if array.ndim not in (3, 4):
        return False
    is_coloured = array.ndim == 4 and num_channels(array.shape[1:]) in (3, 4) and min(array.shape[2:]) >= 3
    return is_named or is_coloured or array.dtype == np.uint8


def _global_beside(path: Path) -> Path | None:
    name, count = re.subn(r"_Agent\d+_(\d+)\.zarr$", r"_global_\1.zarr", path.name)
    beside = path.with_name(name)
    return beside if count and beside.is_dir() else None
