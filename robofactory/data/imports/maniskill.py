"""ManiSkill's trajectories, `.h5` beside `.json`, as its RecordEpisode and RoboFactory's generator write them.

    traj_{i}/actions [t, a]                  or actions/{agent} of several agents
    traj_{i}/obs/agent/{qpos, qvel, ...}     or agent/{agent}/qpos, ..., [t + 1, ...]: the last one has no action
    traj_{i}/obs/sensor_data/{uid}/rgb       uint8 [t + 1, h, w, 3]
    .json: env_info, episodes [{episode_id, success, control_mode, ...}]

Source: ManiSkill 3, mani_skill/utils/wrappers/record.py; RoboFactory, utils/wrappers/record.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from robofactory.data import lerobot
from robofactory.data.imports.source import (
    FETCH_AGAIN,
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
    import h5py
except ImportError:
    raise needs("h5py") from None

CONTROL_FREQ_HZ = 20  # ManiSkill's, where env_info does not say another
CONTROL_MODE = "pd_joint_pos"  # what our tasks execute
FRAMES_AT_ONCE = 32  # read and unpacked together
PANDA_QPOS_DIM = 9  # the last two are the fingers, in m


class ManiSkill(Source):
    """Successful episodes only, where the `.json` says which are. A Panda's qpos becomes joints and gripper, as ours."""

    def __init__(self, path: Path, options: Options):
        self.path = _find(path)
        self._instruction = instruction_of_task(options, path)
        described = self.path.with_suffix(".json")
        if not described.is_file():
            raise UserError(f"{described} is missing; it belongs to {self.path}")
        content = lerobot.read_json(described, FETCH_AGAIN)
        recorded = content["episodes"]
        self.episode_ids = sorted(e["episode_id"] for e in recorded if e.get("success", True))
        if not self.episode_ids:
            raise UserError(f"{self.path} has no successful episode of {len(recorded)}")
        simulation = content.get("env_info", {}).get("env_kwargs", {}).get("sim_config") or {}
        self.fps = choose_fps(simulation.get("control_freq"), options, CONTROL_FREQ_HZ, self.path)
        with _open(self.path) as file:
            first = _trajectory(file, self.episode_ids[0], self.path)
            self._agent = _choose_agent(first["actions"], options.agent_id, self.path)
            action_dim = first[self._actions_key].shape[1]
            cameras = [uid for uid, data in first["obs/sensor_data"].items() if "rgb" in data]
            self.cameras = choose_cameras(cameras, options, self.path)
            self.image_sizes = {view: first[_frames_key(uid)].shape[1:3] for view, uid in self.cameras.items()}
            vectors = {key: _names(key, first[data]) for key, data in self._vector_keys(first).items()}

        modes = sorted({e.get("control_mode", CONTROL_MODE) for e in recorded})
        is_panda = modes == [CONTROL_MODE] and action_dim == len(PANDA.names)
        self.action_names = tuple(PANDA.names if is_panda else numbered("action", action_dim))
        self._proprio_keys = options.proprio_keys or ("qpos",)
        if options.action_keys is not None:
            raise UserError(f"{self.path} has the actions of --agent_id and no others; leave --action_key away")
        if self._proprio_keys == NONE:
            self._proprio_keys = ()
        self.proprio_names = choose_vectors(self._proprio_keys, vectors, "proprio", self.path)
        if self._agent is not None:
            self.robot_type = re.sub(r"-\d+$", "", self._agent)
        notes = []
        if modes != [CONTROL_MODE]:
            notes.append(
                f"the actions are {', '.join(modes)}; our tasks execute {CONTROL_MODE} and cannot play what learns them"
            )
        if len(self.episode_ids) < len(recorded):
            notes.append(f"{len(recorded) - len(self.episode_ids)} of {len(recorded)} episodes failed and are left out")
        self.notes = tuple(notes)

    def read(self, episode: int) -> Recording:
        with _open(self.path) as file:
            trajectory = _trajectory(file, episode, self.path)
            actions = trajectory[self._actions_key][:]
            keys = self._vector_keys(trajectory)
            parts = [_values(key, trajectory[keys[key]][: len(actions)]) for key in self._proprio_keys]
        return Recording(
            frames={view: self._frames(episode, uid, len(actions)) for view, uid in self.cameras.items()},
            actions=actions,
            proprio=np.concatenate(parts, axis=1) if parts else np.zeros((len(actions), 0), np.float32),
            instruction=self._instruction,
        )

    def _frames(self, episode: int, uid: str, length: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        with _open(self.path) as file:
            frames = _trajectory(file, episode, self.path)[_frames_key(uid)]
            for start in range(0, length, FRAMES_AT_ONCE):
                yield from frames[start : min(start + FRAMES_AT_ONCE, length)]

    @property
    def _actions_key(self) -> str:
        return "actions" if self._agent is None else f"actions/{self._agent}"

    def _vector_keys(self, trajectory: Any) -> dict[str, str]:
        """What this agent measured: short name -> place in the trajectory."""
        agent = "obs/agent" if self._agent is None else f"obs/agent/{self._agent}"
        found = {}
        for prefix, group in (("", agent), ("extra/", "obs/extra")):
            for name, data in trajectory.get(group, {}).items():
                if isinstance(data, h5py.Dataset) and data.ndim == 2:
                    found[prefix + name] = f"{group}/{name}"
        return found


def _find(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.h5"))
        if len(files) != 1:
            raise UserError(f"{path} has {len(files)} .h5 files; give the one to import")
        return files[0]
    if path.suffix != ".h5" or not path.is_file():
        raise UserError(f"{path} is no .h5 file, and no directory with one")
    return path


def _open(path: Path) -> "h5py.File":
    try:
        return h5py.File(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read as HDF5: {error}") from None


def _trajectory(file: Any, episode: int, path: Path) -> Any:
    name = f"traj_{episode}"
    if name not in file:
        raise UserError(f"{path} has no {name}, which its .json lists; it is incomplete, record it again")
    if "obs/sensor_data" not in file[name]:
        raise UserError(f"{path} has no pictures in {name}; python -m mani_skill.trajectory.replay_trajectory -o rgb makes them")  # fmt: skip
    return file[name]


def _choose_agent(actions: Any, agent_id: int, path: Path) -> str | None:
    """The agent's name where there are several."""
    is_alone = isinstance(actions, h5py.Dataset)
    names = ["the only one"] if is_alone else sorted(actions, key=lambda name: (len(name), name))
    if not 0 <= agent_id < len(names):
        raise UserError(
            f"{path} has no agent {agent_id}; it has {', '.join(f'{i} ({n})' for i, n in enumerate(names))}"
        )
    return None if is_alone else names[agent_id]


def _frames_key(uid: str) -> str:
    return f"obs/sensor_data/{uid}/rgb"


def _is_panda(key: str, width: int) -> bool:
    return key == "qpos" and width == PANDA_QPOS_DIM


def _names(key: str, data: Any) -> list[str]:
    return list(PANDA.names) if _is_panda(key, data.shape[1]) else numbered(key, data.shape[1])


def _values(key: str, values: Shaped[np.ndarray, "n s"]) -> Float[np.ndarray, "n s2"]:
    return PANDA.proprio(values) if _is_panda(key, values.shape[1]) else values
