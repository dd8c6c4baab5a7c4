"""The scripted expert: reach above the grip, sink onto it, close, lift together."""

# SAPIEN's and ManiSkill's annotations are narrower than what they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from dataclasses import dataclass

import numpy as np
import sapien
from jaxtyping import Float32, Float64
from transforms3d.quaternions import mat2quat, quat2mat

from robofactory.sim.arm import Arm
from robofactory.sim.tasks.lift_barrier.environment import GRIP_X_M, RAIL_Z_M, LiftBarrierEnv

# Motion. Speed and lead: see Arm.step_towards. Three steps from rest to full speed.
MAX_SPEED = 0.6  # rad/s, fastest joint
MAX_ACCELERATION = 6.0  # rad/s^2
LIFT_AIM_M = 0.25  # above rest: far enough beyond the success height that nothing slows down before it
LEVEL_MARGIN_M = 0.035  # how far an arm lifts its end above the partner's: 4.5 degrees of tilt

# The way in is a funnel over the grip: how high the hand should be, given how far it is beside.
APPROACH_HEIGHT_M = 0.10
# Beside by less than inner: all the way down; more than outer: stay up. From 2.8 cm across, an open finger is above the
# rail, and there the funnel keeps the finger tips (1 cm below the TCP) above the rail's top (1.5 cm above the grip).
FUNNEL_INNER_M, FUNNEL_OUTER_M = 0.015, 0.035
OVERSHOOT_M = 0.015  # the way down aims this far below the grip, so the hand is still moving when the fingers close
ALONG_WEIGHT = 0.4  # an error along the rail is less harmful than one across it
YAW_WEIGHT_M = 0.06  # m per rad
RISE_FIRST_M = 0.03  # a hand this far below the funnel only rises until it is back; the fingers would sweep the rail

# The grasp: close within the zone; once the fingers have begun to close, within the wide zone.
ZONE_HEIGHT_M, WIDE_ZONE_HEIGHT_M = 0.010, 0.020
WIDE_ZONE_M = 0.030
OPEN_WIDTH_M = 0.036  # of one finger; 0.04 is fully open
CLOSED_ON_NOTHING_M = 0.009  # a finger on the rail stands at 0.012
FINGERS_CLOSED_PENALTY = 2.0  # m beside per m that the fingers lack to open: a closed hand does not descend


@dataclass(frozen=True)
class Situation:
    """One arm and its end of the rail, all an expert needs to know of it. m and rad, world frame."""

    tcp: sapien.Pose
    grip: Float64[np.ndarray, " 3"]  # where to grip
    closing: Float64[np.ndarray, " 3"]  # horizontal closing axis there
    along: float  # hand beside the grip, along the rail
    across: float
    height: float  # hand above the grip
    yaw: float  # hand's closing axis against the rail's
    finger_width: float
    held: bool

    @property
    def beside(self) -> float:
        """How far from being right above the grip."""
        return float(np.hypot(self.across, ALONG_WEIGHT * self.along)) + YAW_WEIGHT_M * abs(self.yaw)

    @property
    def closed_on_nothing(self) -> bool:
        return self.finger_width < CLOSED_ON_NOTHING_M

    @property
    def in_grasp_zone(self) -> bool:
        closing = self.finger_width < OPEN_WIDTH_M
        beside, height = (WIDE_ZONE_M, WIDE_ZONE_HEIGHT_M) if closing else (FUNNEL_INNER_M, ZONE_HEIGHT_M)
        return self.beside < beside and abs(self.height + OVERSHOOT_M / 2) < height + OVERSHOOT_M / 2


class LiftBarrierExpert:
    """Where each arm should go next, read off the present simulator state; no memory, no clock.

    Reach above the grip, sink onto it, close, and lift: by `LEVEL_MARGIN_M` alone, further once the partner holds its
    end too, and then never more than `LEVEL_MARGIN_M` above it. So the arms wait for each other, for reasons that show
    in the picture (the partner's hand, the tilt), and never both at once. Either arm may be driven by something else.
    """

    def __init__(self, env):
        self._env: LiftBarrierEnv = env.unwrapped
        scene = self._env.config
        step_s = 1.0 / scene.control_freq_hz
        self._arms = [
            Arm(agent, robot, np.array(placed.rest_qpos), step_s)
            for agent, robot, placed in zip(self._env.arms, self._env.robots, scene.robots, strict=True)
        ]

    def act(self) -> list[Float32[np.ndarray, " 8"]]:
        """The next action of each agent: 7 joint targets (rad), gripper command (-1 or +1)."""
        situations = self._situations()
        actions = []
        for arm, situation, partner in zip(self._arms, situations, reversed(situations), strict=True):
            _, goal, gripper = self._decide(situation, partner)
            target = arm.step_towards(goal, MAX_SPEED, MAX_ACCELERATION)
            actions.append(np.append(target, gripper).astype(np.float32))
        return actions

    def phases(self) -> list[str]:
        """What each arm is about: reach, descend, close, lift, wait, hold or recover."""
        situations = self._situations()
        return [self._decide(s, p)[0] for s, p in zip(situations, reversed(situations), strict=True)]

    def _decide(self, own: Situation, partner: Situation) -> tuple[str, sapien.Pose, float]:
        """(phase, TCP goal, gripper command) of one arm."""
        if own.held and own.in_grasp_zone:
            lifted, partner_lifted = own.grip[2] - RAIL_Z_M, partner.grip[2] - RAIL_Z_M
            together = partner.held and partner.in_grasp_zone
            rise = min(LIFT_AIM_M, LEVEL_MARGIN_M + (partner_lifted if together else 0.0)) - lifted
            high = lifted >= self._env.config.success["lift_height_m"]
            phase = "hold" if high else "lift" if rise > 0.01 else "wait"
            # Straight up from where the hand is: following the rail's yaw would turn the rail along with the hand.
            return phase, grasp_pose(own.tcp.p + np.array([0.0, 0.0, rise]), turn_about_z(own.closing, own.yaw)), -1.0
        if own.in_grasp_zone and not own.closed_on_nothing:
            return "close", grasp_pose(own.grip, own.closing), -1.0

        beside = own.beside + FINGERS_CLOSED_PENALTY * max(0.0, OPEN_WIDTH_M - own.finger_width)
        wanted = funnel_height(beside)
        # 1 inside the funnel, 0 at RISE_FIRST_M below it: there the hand keeps its place and only rises.
        free = float(np.clip(1.5 - (wanted - own.height) / RISE_FIRST_M, 0.0, 1.0))
        position = own.tcp.p + free * (own.grip - own.tcp.p)
        position[2] = own.grip[2] + wanted
        yaw_left = (1.0 - free) * own.yaw
        phase = "recover" if free < 1.0 else "descend" if beside < FUNNEL_OUTER_M else "reach"
        return phase, grasp_pose(position, turn_about_z(own.closing, yaw_left)), 1.0

    def _situations(self) -> list[Situation]:
        pose = self._env.barrier.pose.sp
        matrix = pose.to_transformation_matrix().astype(np.float64)
        held = self._env.holding(self._env.barrier, self._env.config.success["min_finger_force_n"])[0].tolist()
        rail = np.array([*matrix[:2, 0], 0.0])
        rail /= np.linalg.norm(rail)
        situations = []
        for index, arm in enumerate(self._arms):
            grip = matrix[:3, :3] @ [GRIP_X_M[index], 0.0, RAIL_Z_M] + matrix[:3, 3]
            closing = np.cross([0.0, 0.0, 1.0], rail)
            if closing @ quat2mat(arm.rest_tcp.q)[:, 1] < 0:  # of both, the turn nearer to the rest posture
                closing = -closing
            tcp = arm.tcp
            beside = tcp.p - grip
            hand = quat2mat(tcp.q)[:, 1]
            situations.append(
                Situation(
                    tcp=tcp,
                    grip=grip,
                    closing=closing,
                    along=float(beside @ rail),
                    across=float(beside @ closing),
                    height=float(beside[2]),
                    yaw=float(np.arctan2(np.cross(closing, hand)[2], closing @ hand)),
                    finger_width=arm.finger_width_m,
                    held=held[index],
                )
            )
        return situations


def funnel_height(beside_m: float) -> float:
    """Wanted height above the grip: `APPROACH_HEIGHT_M` when far beside, falling smoothly to below the grip."""
    x = float(np.clip((beside_m - FUNNEL_INNER_M) / (FUNNEL_OUTER_M - FUNNEL_INNER_M), 0.0, 1.0))
    return -OVERSHOOT_M + (APPROACH_HEIGHT_M + OVERSHOOT_M) * x * x * (3.0 - 2.0 * x)


def grasp_pose(position: Float64[np.ndarray, " 3"], closing: Float64[np.ndarray, " 3"]) -> sapien.Pose:
    """A TCP that approaches straight down with its fingers closing along this axis."""
    down = np.array([0.0, 0.0, -1.0])
    return sapien.Pose(position, mat2quat(np.stack([np.cross(closing, down), closing, down], axis=1)))


def turn_about_z(vector: Float64[np.ndarray, " 3"], angle_rad: float) -> Float64[np.ndarray, " 3"]:
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    return np.array([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1], vector[2]])
