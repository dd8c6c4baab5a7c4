"""Diffusion Policy's zarr, as RoboFactory's scripts make them: all episodes of one agent, one behind the other.

    data/{camera}   uint8 [n, 3, h, w] or [n, h, w, 3]
    data/{vector}   float [n, d]: action, state, ...
    meta/episode_ends

In RoboFactory's the state is no measurement but the action once more: what learns from it copies its input and stands
still on the robot. Such a vector is found by its numbers and never imported as proprio.

Source: RoboFactory, policy/Diffusion-Policy, and OpenMARL's fork of it, which adds wrist_camera and one more zarr with
the pictures of the global camera, `{task}_global_{num}.zarr`; it is used where it lies beside SOURCE.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from robofactory.data.imports.source import (
    NONE,
    Options,
    Recording,
    Source,
    choose_cameras,
    choose_fps,
    choose_vectors,
    instruction_of_task,
    needs,
    numbered,
)
from robofactory.errors import UserError
from robofactory.robots.panda import ROBOT as PANDA

try:
    import zarr
except ImportError:
    raise needs("zarr") from None

CONTROL_FREQ_HZ = 20  # RoboFactory's; the format does not say
GLOBAL_CAMERA = "head_camera_global"


class DiffusionPolicy(Source):
    def __init__(self, path: Path, options: Options):
        self.path = path
        self._instruction = instruction_of_task(options, path)
        arrays = _arrays(path)
        ends = _ends(path)
        self._starts, self._ends = np.concatenate([[0], ends[:-1]]).tolist(), ends.tolist()
        self.episode_ids = list(range(len(ends)))
        for name, array in arrays.items():
            if array.shape[0] != ends[-1]:
                raise UserError(
                    f"{path}: {name} has {array.shape[0]} frames, its episodes {ends[-1]}; it is incomplete"
                )
        self.fps = choose_fps(None, options, CONTROL_FREQ_HZ, path)

        self._places = {name: (path, name) for name, array in arrays.items() if _is_camera(array)}
        beside = _global_beside(path)
        if beside is not None and GLOBAL_CAMERA not in self._places:
            if _ends(beside).tolist() != self._ends:
                raise UserError(f"{beside} has other episodes than {path}; move it away")
            self._places[GLOBAL_CAMERA] = (beside, "head_camera")
        self.cameras = choose_cameras(list(self._places), options, path)
        self.image_sizes = {view: self._size(name) for view, name in self.cameras.items()}

        vectors = {name: numbered(name, array.shape[1]) for name, array in arrays.items() if array.ndim == 2}
        self._action_keys = options.action_keys or ("action",)
        self.action_names = choose_vectors(self._action_keys, vectors, "action", path)
        if self._action_keys == ("action",) and len(self.action_names) == len(PANDA.names):
            self.action_names = PANDA.names  # what RoboFactory's eight are
        self._proprio_keys = options.proprio_keys or ("state",)
        if self._proprio_keys == NONE:
            self._proprio_keys = ()
        self.proprio_names = choose_vectors(self._proprio_keys, vectors, "proprio", path)
        copies = [
            f"{key} is a copy of {action}"
            for key in self._proprio_keys
            for action in self._action_keys
            if np.array_equal(arrays[key][:], arrays[action][:])
        ]
        if copies and options.proprio_keys is not None:
            raise UserError(f"{path}: {copies[0]}, no measurement; leave --proprio_key away")
        if copies:
            self._proprio_keys, self.proprio_names = (), ()
            self.notes = (
                f"{copies[0]}, no measurement: imported without proprio (train with model.use_proprio=false)",
            )

    def read(self, episode: int) -> Recording:
        rows = slice(self._starts[episode], self._ends[episode])
        arrays = _arrays(self.path)
        actions = np.concatenate([arrays[key][rows] for key in self._action_keys], axis=1)
        proprio = [arrays[key][rows] for key in self._proprio_keys]
        return Recording(
            frames={view: self._frames(name, rows) for view, name in self.cameras.items()},
            actions=actions,
            proprio=np.concatenate(proprio, axis=1) if proprio else np.zeros((len(actions), 0), np.float32),
            instruction=self._instruction,
        )

    def _frames(self, camera: str, rows: slice) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        path, name = self._places[camera]
        array = _arrays(path)[name]
        at_once = array.chunks[0]  # a chunk is unpacked as a whole: read along its borders
        for start in range(rows.start - rows.start % at_once, rows.stop, at_once):
            block = array[max(start, rows.start) : min(start + at_once, rows.stop)]
            yield from block if block.shape[-1] == 3 else block.transpose(0, 2, 3, 1)

    def _size(self, camera: str) -> tuple[int, int]:
        path, name = self._places[camera]
        shape = _arrays(path)[name].shape
        return shape[1:3] if shape[-1] == 3 else shape[2:4]


def _open(path: Path) -> Any:
    try:
        return zarr.open_group(path, mode="r")
    except (FileNotFoundError, ValueError):
        raise UserError(f"{path} is no zarr directory") from None


def _arrays(path: Path) -> dict[str, Any]:
    root = _open(path)
    if "data" not in root:
        raise UserError(f"{path} has no data/; is it a Diffusion Policy zarr?")
    return dict(sorted(root["data"].arrays()))  # a directory has no order


def _ends(path: Path) -> np.ndarray:
    root = _open(path)
    if "meta/episode_ends" not in root:
        raise UserError(f"{path} has no meta/episode_ends; is it a Diffusion Policy zarr?")
    ends = root["meta/episode_ends"][:]
    if len(ends) == 0 or (np.diff(ends, prepend=0) <= 0).any():
        raise UserError(f"{path}: meta/episode_ends must grow, got {ends[:8].tolist()}")
    return ends


def _is_camera(array: Any) -> bool:
    return array.ndim == 4 and array.dtype == np.uint8 and 3 in (array.shape[1], array.shape[3])


def _global_beside(path: Path) -> Path | None:
    name, count = re.subn(r"_Agent\d+_(\d+)\.zarr$", r"_global_\1.zarr", path.name)
    beside = path.with_name(name)
    return beside if count and beside.is_dir() else None
