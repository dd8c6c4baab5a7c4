"""ManiSkill's trajectories, `.h5` beside `.json`, as its RecordEpisode and RoboFactory's generator write them.

    traj_{i}/actions [t, a]                  or actions/{agent} of several agents
    traj_{i}/obs/agent/{qpos, qvel, ...}     or agent/{agent}/qpos, ..., [t + 1, ...]: the last one has no action
    traj_{i}/obs/sensor_data/{uid}/rgb       uint8 [t + 1, h, w, 3]; or Color, with alpha, uint8 or float
    .json: env_info, episodes [{episode_id, success, control_mode, ...}]

Source: ManiSkill 3, mani_skill/utils/wrappers/record.py; RoboFactory, utils/wrappers/record.py.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Shaped
from pydantic import Field

from robofactory import documents
from robofactory.data.imports import hdf5
from robofactory.data.imports.frames import Unsuitable, size_of, white_of
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
from robofactory.documents import Count, Document
from robofactory.errors import UserError
from robofactory.robots.panda import ROBOT as PANDA

CONTROL_FREQ_HZ = 20  # ManiSkill's, where env_info does not say another
CONTROL_MODE = "pd_joint_pos"  # what our tasks execute
FRAMES_AT_ONCE = 32  # read and unpacked together
PICTURES = ("rgb", "Color")  # of a camera, the first that there is
PANDA_QPOS_DIM = 9  # the last two are the fingers, in m


class SimConfig(Document):
    control_freq: Annotated[float, Field(gt=0)] | None = None


class EnvKwargs(Document):
    sim_config: SimConfig | None = None


class EnvInfo(Document):
    env_kwargs: EnvKwargs | None = None


class RecordedEpisode(Document):
    episode_id: Count
    success: bool = True
    control_mode: str | None = None


class Recorded(Document):
    """The `.json`."""

    env_info: EnvInfo | None = None
    episodes: list[RecordedEpisode]


class ManiSkill(Source):
    """Successful episodes only, where the `.json` says which are. A Panda's qpos becomes joints and gripper, as ours."""

    def __init__(self, path: Path, options: Options):
        self.path = _find(path)
        self.notes = notes = []
        self._instruction = instruction_of_task(options, path)
        if options.action_keys is not None:
            raise UserError(f"{self.path} has the actions of --agent_id and no others; omit --action_key")
        described = self.path.with_suffix(".json")
        if not described.is_file():
            raise UserError(f"{described} is missing; it belongs to {self.path}")
        content = documents.read_json(described, Recorded, FETCH_AGAIN)
        recorded = content.episodes
        (number, count), *_ = [*Counter(e.episode_id for e in recorded).most_common(1), (0, 0)]
        if count > 1:
            raise UserError(f"{described} lists episode {number} {count} times; {FETCH_AGAIN}")
        successful = [e.episode_id for e in recorded if e.success]
        if not successful:
            raise UserError(f"{self.path} has no successful episode of {len(recorded)}")
        self.episode_ids = choose_episodes(successful, options, self.path)
        simulation = content.env_info and content.env_info.env_kwargs and content.env_info.env_kwargs.sim_config
        control_freq = simulation.control_freq if simulation else None
        self.fps = choose_fps(control_freq, options, CONTROL_FREQ_HZ, self.path, notes)
        with hdf5.open_file(self.path) as file:
            self._require_trajectories(file, recorded, notes)
            first = _trajectory(file, self.episode_ids[0], self.path)
            self._agent = _choose_agent(first, options.agent_id, self.path)
            action_dim = hdf5.find_dataset(first, self._actions_key, num_axes=2).shape[1]
            self._choose_cameras(first, options, notes)
            places = self._find_vectors(first)
            vectors = {key: _names(key, first[place].shape[1]) for key, place in places.items()}

        modes = sorted({e.control_mode or CONTROL_MODE for e in recorded})
        is_panda = modes == [CONTROL_MODE] and action_dim == len(PANDA.names)
        if action_dim > MOST_DIMENSIONS:
            raise UserError(f"{self.path}: its actions have {action_dim:,} dimensions")
        self.action_names = tuple(PANDA.names if is_panda else numbered("action", action_dim))
        self._proprio_keys = options.proprio_keys or ("qpos",)
        if self._proprio_keys == NONE:
            self._proprio_keys = ()
        self.proprio_names = choose_vectors(self._proprio_keys, vectors, "proprio", self.path)
        self._measured = {key: places[key] for key in self._proprio_keys}
        if self._agent is not None:
            self.robot_type = re.sub(r"-\d+$", "", self._agent)
        if modes != [CONTROL_MODE]:
            notes.append(
                f"the actions are {', '.join(modes)}; our tasks execute {CONTROL_MODE} and cannot play what learns them"
            )
        if len(successful) < len(recorded):
            notes.append(f"{len(recorded) - len(successful)} of {len(recorded)} episodes failed and are left out")

    def _require_trajectories(self, file: Any, recorded: list[RecordedEpisode], notes: list[str]) -> None:
        there, listed = set(hdf5.names(file)), {_group_name(e.episode_id) for e in recorded}
        for episode in self.episode_ids:
            if _group_name(episode) not in there:
                name = _group_name(episode)
                raise UserError(f"{self.path} has no {name}, which its .json lists; it is incomplete, record it again")
        unlisted = sorted(name for name in there - listed if name.startswith("traj_"))
        if unlisted:
            notes.append(f"{len(unlisted)} trajectories that its .json does not list are left out ({unlisted[0]}, ...)")

    def _choose_cameras(self, first: Any, options: Options, notes: list[str]) -> None:
        """Where the pictures of each camera are, their sizes, and what is white in them."""
        sensors = hdf5.find(first, "obs/sensor_data")
        pictures: dict[str, str] = {}
        unsuitable: dict[str, str] = {}
        whites: dict[str, float | None] = {}
        for uid in hdf5.names(sensors):
            found = hdf5.names(hdf5.find(sensors, uid))
            kind = next((kind for kind in PICTURES if kind in found), None)
            if kind is None:
                unsuitable[uid] = f"it has {', '.join(found) or 'nothing'}, and no {' or '.join(PICTURES)}"
                continue
            data = hdf5.find_dataset(sensors, f"{uid}/{kind}")
            try:
                size_of(data.shape[1:])
                whites[uid] = None if data.dtype == np.uint8 else white_of(_rows(data, len(data)))
                pictures[uid] = f"obs/sensor_data/{uid}/{kind}"
            except Unsuitable as error:
                unsuitable[uid] = str(error)
        self.cameras = choose_cameras(list(pictures), unsuitable, options, self.path, notes)
        self.whites = {view: whites[uid] for view, uid in self.cameras.items()}
        self._pictures = {view: pictures[uid] for view, uid in self.cameras.items()}
        self.image_sizes = {view: size_of(first[key].shape[1:]) for view, key in self._pictures.items()}

    def read(self, episode: int) -> Recording:
        with hdf5.open_file(self.path) as file:
            trajectory = _trajectory(file, episode, self.path)
            data = hdf5.find_dataset(trajectory, self._actions_key, num_axes=2)
            actions = hdf5.read(data, 0, len(data))
            parts = []
            for key, place in self._measured.items():
                measured = hdf5.find_dataset(trajectory, place, num_axes=2)
                _require_length(measured, len(actions))
                parts.append(_values(key, hdf5.read(measured, 0, len(actions))))
        return Recording(
            frames={view: self._frames(episode, key, len(actions)) for view, key in self._pictures.items()},
            actions=actions,
            proprio=np.concatenate(parts, axis=1) if parts else np.zeros((len(actions), 0), np.float32),
            instruction=self._instruction,
        )

    def _frames(self, episode: int, key: str, length: int) -> Iterator[Shaped[np.ndarray, "..."]]:
        with hdf5.open_file(self.path) as file:
            data = hdf5.find_dataset(_trajectory(file, episode, self.path), key)
            _require_length(data, length)
            yield from _rows(data, length)

    @property
    def _actions_key(self) -> str:
        return "actions" if self._agent is None else f"actions/{self._agent}"

    def _find_vectors(self, trajectory: Any) -> dict[str, str]:
        """What this agent measured: short name -> place in the trajectory."""
        agent = "obs/agent" if self._agent is None else f"obs/agent/{self._agent}"
        found = {}
        for prefix, group in (("", agent), ("extra/", "obs/extra")):
            place = hdf5.find(trajectory, group)
            for name in hdf5.names(place):
                data = hdf5.find(place, name)
                if len(getattr(data, "shape", None) or ()) == 2 and data.shape[1] <= MOST_DIMENSIONS:
                    found[prefix + name] = f"{group}/{name}"
        return found


def _find(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.h5"))
        if len(files) != 1:
            raise UserError(f"{path} has {len(files)} .h5 files; give the one to import")
        return files[0]
    if path.suffix != ".h5":
        raise UserError(f"{path} is no .h5 file, and no directory with one")
    return path


def _group_name(episode: int) -> str:
    return f"traj_{episode}"


def _trajectory(file: Any, episode: int, path: Path) -> Any:
    name = _group_name(episode)
    trajectory = hdf5.find(file, name)
    if not hdf5.is_group(hdf5.find(file, f"{name}/obs/sensor_data")):
        raise UserError(f"{path} has no pictures in {name}; python -m mani_skill.trajectory.replay_trajectory -o rgb makes them")  # fmt: skip
    return trajectory


def _choose_agent(first: Any, agent_id: int, path: Path) -> str | None:
    """The agent's name where there are several."""
    actions = hdf5.find(first, "actions")
    is_alone = not hdf5.is_group(actions)
    names = ["the only one"] if is_alone else sorted(hdf5.names(actions), key=lambda name: (len(name), name))
    if not 0 <= agent_id < len(names):
        raise UserError(
            f"{path} has no agent {agent_id}; it has {', '.join(f'{i} ({n})' for i, n in enumerate(names)) or 'none'}"
        )
    return None if is_alone else names[agent_id]


def _require_length(data: Any, length: int) -> None:
    """The last observation, behind the last action, may be missing."""
    if len(data) not in (length, length + 1):
        raise UserError(f"{data.file.filename}: {data.name} has {len(data)} rows for {length} actions; needed: {length + 1}")  # fmt: skip


def _rows(data: Any, length: int) -> Iterator[Shaped[np.ndarray, "..."]]:
    at_once = max(1, min(FRAMES_AT_ONCE, hdf5.MAX_BYTES // max(1, hdf5.row_bytes(data))))
    for start in range(0, length, at_once):
        yield from hdf5.read(data, start, min(start + at_once, length))


def _is_panda(key: str, width: int) -> bool:
    return key == "qpos" and width == PANDA_QPOS_DIM


def _names(key: str, width: int) -> list[str]:
    return list(PANDA.names) if _is_panda(key, width) else numbered(key, width)


def _values(key: str, values: Shaped[np.ndarray, "n s"]) -> Shaped[np.ndarray, "n s2"]:
    return PANDA.proprio(values) if _is_panda(key, values.shape[1]) else values
