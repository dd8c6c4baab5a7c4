"""What goes wrong on purpose while demonstrations are recorded, so that the way back is in the data.

The labels stay the expert's answers to the states that follow. Source of the idea: DART (Laskey et al., 2017), which
draws white noise; here the disturbances also last, as a policy's own mistakes do, and the arms wait for each other.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Float64

from robofactory.shapes import Action
from robofactory.sim.task import Disturbances


@dataclass
class _Arm:
    """What is happening to one arm now."""

    start_offset_rad: Float64[np.ndarray, " j"]
    start_steps: int
    hold_from: int
    hold_steps: int
    push_rad: list[np.ndarray] = field(default_factory=list)  # of the steps that are left of a push
    flip_steps: int = 0
    start_rad: Float32[np.ndarray, " j"] | None = None  # where it was at the first step
    held_rad: Float32[np.ndarray, " j"] | None = None  # where it was when it was told to stay
    gripper: float = 1.0  # last command that was executed


class Disturber:
    """Disturbs one episode: every arm independently, a pure function of the generator and the steps asked for."""

    def __init__(self, how: Disturbances, num_arms: int, num_joints: int, random: np.random.Generator):
        """num_joints: of each arm, before the gripper."""
        self._how, self._num_joints, self._random = how, num_joints, random
        self._step = 0
        held = int(random.integers(num_arms)) if random.random() < how.hold_chance else None
        self._arms = []
        for arm in range(num_arms):
            moves_aside = random.random() < how.start_chance
            self._arms.append(
                _Arm(
                    start_offset_rad=self._direction(how.start_rad),
                    start_steps=self._integer(how.start_steps) if moves_aside else 0,
                    hold_from=self._integer(how.hold_first_step),
                    hold_steps=self._integer(how.hold_steps) if arm == held else 0,
                )
            )

    def disturb(self, labels: list[Action], measured: list[Float32[np.ndarray, " s"]]) -> list[Action]:
        """The actions that are executed instead of the expert's; called once a step.

        Args:
            labels: the expert's action of each arm.
            measured: joint positions (rad) and gripper of each arm before the action.
        """
        executed = [self._disturb(*each) for each in zip(self._arms, labels, measured, strict=True)]
        self._step += 1
        return executed

    def _disturb(self, arm: _Arm, label: Action, measured: Float32[np.ndarray, " s"]) -> Action:
        how = self._how
        joints, gripper = label[: self._num_joints].astype(np.float64), float(label[self._num_joints])
        if self._step < arm.start_steps:
            if arm.start_rad is None:
                arm.start_rad = measured[: self._num_joints].copy()
            joints = arm.start_rad + arm.start_offset_rad
        elif arm.hold_from <= self._step < arm.hold_from + arm.hold_steps:
            if arm.held_rad is None:
                arm.held_rad = measured[: self._num_joints].copy()
            joints, gripper = arm.held_rad, arm.gripper
        else:
            may_begin = self._step < how.last_step
            if may_begin and not arm.push_rad and self._random.random() < how.push_chance:
                steps = self._integer(how.push_steps)
                ramp = np.sin(np.pi * (np.arange(steps) + 0.5) / steps)  # up and down again
                arm.push_rad = list(ramp[:, None] * self._direction(how.push_rad))
            if arm.push_rad:
                joints += arm.push_rad.pop(0)
            if may_begin and arm.flip_steps == 0 and self._random.random() < how.flip_chance:
                arm.flip_steps = self._integer(how.flip_steps)
            if arm.flip_steps > 0:
                arm.flip_steps -= 1
                gripper = -gripper
        joints = joints + self._random.normal(0.0, how.shake_rad, self._num_joints)
        arm.gripper = gripper
        return np.append(joints, gripper).astype(np.float32)

    def _direction(self, size_rad: tuple[float, float]) -> Float64[np.ndarray, " j"]:
        """Random joint offsets, the largest of them of a size within these bounds."""
        offsets = self._random.uniform(-1.0, 1.0, self._num_joints)
        return offsets / np.abs(offsets).max() * self._random.uniform(*size_rad)

    def _integer(self, bounds: tuple[int, int]) -> int:
        return int(self._random.integers(bounds[0], bounds[1] + 1))
