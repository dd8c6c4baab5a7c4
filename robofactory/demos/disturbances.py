"""What goes wrong on purpose while demonstrations are recorded, so that the way back is in the data.

The labels stay the expert's answers to the states that follow. Source of the idea: DART (Laskey et al., 2017), which
draws white noise; here the disturbances also last, as a policy's own mistakes do, and the arms wait for each other.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Float64

from robofactory.shapes import NUM_JOINTS, Action

# LiftBarrier's expert succeeded in 60 of 60 disturbed episodes, in 70 steps on average (126 at most). With pushes
# of up to 0.12 rad, a chance of 0.06 a step and no last step: 36 of 50, in 117 steps.
START_CHANCE, START_STEPS, START_RAD = 0.5, (3, 7), (0.03, 0.10)  # an episode; an arm moves aside before it begins
PUSH_CHANCE, PUSH_STEPS, PUSH_RAD = 0.03, (3, 8), (0.02, 0.08)  # a step; of the joint that is pushed furthest
FLIP_CHANCE, FLIP_STEPS = 0.005, (2, 6)  # a step; the gripper does the opposite
HOLD_CHANCE, HOLD_FIRST_STEP, HOLD_STEPS = 0.5, (0, 30), (5, 30)  # an episode; one arm stays where it is
LAST_STEP = 80  # no push or flip begins later: all that is left then is to finish
SHAKE_RAD = 0.005  # standard deviation of the white noise on every joint


@dataclass
class _Arm:
    """What is happening to one arm now."""

    start_offset_rad: Float64[np.ndarray, " 7"]
    start_steps: int
    hold_from: int
    hold_steps: int
    push_rad: list[np.ndarray] = field(default_factory=list)  # of the steps that are left of a push
    flip_steps: int = 0
    start_rad: Float32[np.ndarray, " 7"] | None = None  # where it was at the first step
    held_rad: Float32[np.ndarray, " 7"] | None = None  # where it was when it was told to stay
    gripper: float = 1.0  # last command that was executed


class Disturbances:
    """Of one episode, for all arms, independently; a pure function of the generator and the steps asked for."""

    def __init__(self, num_arms: int, random: np.random.Generator):
        self._random = random
        self._step = 0
        held = int(random.integers(num_arms)) if random.random() < HOLD_CHANCE else None
        self._arms = []
        for arm in range(num_arms):
            moves_aside = random.random() < START_CHANCE
            self._arms.append(
                _Arm(
                    start_offset_rad=self._direction(START_RAD),
                    start_steps=self._integer(START_STEPS) if moves_aside else 0,
                    hold_from=self._integer(HOLD_FIRST_STEP),
                    hold_steps=self._integer(HOLD_STEPS) if arm == held else 0,
                )
            )

    def disturb(self, labels: list[Action], measured: list[Float32[np.ndarray, " 8"]]) -> list[Action]:
        """The actions that are executed instead of the expert's; called once a step.

        Args:
            labels: the expert's action of each arm.
            measured: joint positions (rad) and gripper of each arm before the action.
        """
        executed = [self._disturb(*each) for each in zip(self._arms, labels, measured, strict=True)]
        self._step += 1
        return executed

    def _disturb(self, arm: _Arm, label: Action, measured: Float32[np.ndarray, " 8"]) -> Action:
        joints, gripper = label[:NUM_JOINTS].astype(np.float64), float(label[NUM_JOINTS])
        if self._step < arm.start_steps:
            if arm.start_rad is None:
                arm.start_rad = measured[:NUM_JOINTS].copy()
            joints = arm.start_rad + arm.start_offset_rad
        elif arm.hold_from <= self._step < arm.hold_from + arm.hold_steps:
            if arm.held_rad is None:
                arm.held_rad = measured[:NUM_JOINTS].copy()
            joints, gripper = arm.held_rad, arm.gripper
        else:
            may_begin = self._step < LAST_STEP
            if may_begin and not arm.push_rad and self._random.random() < PUSH_CHANCE:
                steps = self._integer(PUSH_STEPS)
                ramp = np.sin(np.pi * (np.arange(steps) + 0.5) / steps)  # up and down again
                arm.push_rad = list(ramp[:, None] * self._direction(PUSH_RAD))
            if arm.push_rad:
                joints += arm.push_rad.pop(0)
            if may_begin and arm.flip_steps == 0 and self._random.random() < FLIP_CHANCE:
                arm.flip_steps = self._integer(FLIP_STEPS)
            if arm.flip_steps > 0:
                arm.flip_steps -= 1
                gripper = -gripper
        joints = joints + self._random.normal(0.0, SHAKE_RAD, NUM_JOINTS)
        arm.gripper = gripper
        return np.append(joints, gripper).astype(np.float32)

    def _direction(self, size_rad: tuple[float, float]) -> Float64[np.ndarray, " 7"]:
        """Random joint offsets, the largest of them of a size within these bounds."""
        offsets = self._random.uniform(-1.0, 1.0, NUM_JOINTS)
        return offsets / np.abs(offsets).max() * self._random.uniform(*size_rad)

    def _integer(self, bounds: tuple[int, int]) -> int:
        return int(self._random.integers(bounds[0], bounds[1] + 1))
