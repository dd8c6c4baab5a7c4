"""Robots, a file each: all that the rest of the house knows of one. A file is found by the uid in the scene."""

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from robofactory.errors import UserError, did_you_mean

GRIPPER = "gripper"  # the last dimension of an action and of proprio


@dataclass(frozen=True)
class Robot:
    """An arm with a gripper of one degree of freedom.

    uid: in scenes and datasets; the simulator knows the robot by it too.
    joint_names: of the arm, in the order of its joint positions; behind them come the finger joints.
    gripper_closed_m, gripper_open_m: finger joint targets of the commands -1 and +1.
    control_mode: the simulator's name for absolute joint targets.
    finger_links, tcp_link: what presses on an object, and the point between.
    fine_links: parts of names of the links whose visuals stay fine with `visual_detail: low`: those a wrist camera sees.
    """

    uid: str
    joint_names: tuple[str, ...]
    gripper_closed_m: float
    gripper_open_m: float
    control_mode: str
    finger_links: tuple[str, ...]
    tcp_link: str
    fine_links: tuple[str, ...]

    @property
    def num_joints(self) -> int:
        """Of the arm."""
        return len(self.joint_names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the dimensions of an action and of proprio."""
        return (*self.joint_names, GRIPPER)

    def gripper_command(self, width_m: float | Float[np.ndarray, "*b"]) -> float | Float[np.ndarray, "*b"]:
        """The command in [-1, 1] that asks for this finger width."""
        return 2.0 * (width_m - self.gripper_closed_m) / (self.gripper_open_m - self.gripper_closed_m) - 1.0

    def proprio(self, qpos: Float[np.ndarray, "*b q"]) -> Float32[np.ndarray, "*b s"]:
        """Joints in rad, then the mean finger width as a gripper command, of joint positions (rad, fingers in m)."""
        width_m = qpos[..., self.num_joints :].mean(axis=-1, keepdims=True)
        return np.concatenate([qpos[..., : self.num_joints], self.gripper_command(width_m)], axis=-1).astype(np.float32)


def find(uid: str) -> Robot:
    """The robot of a uid.

    Raises:
        UserError: there is none; the line lists those there are.
    """
    known = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    if uid not in known:
        raise UserError(f"unknown robot {uid!r}{did_you_mean(uid, known)}; there is {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{uid}").ROBOT
