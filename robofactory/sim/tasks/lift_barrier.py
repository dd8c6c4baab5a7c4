"""LiftBarrier-rf: two arms lift a barrier by both ends of its rail, level, and hold it.

The scene, what success is, and the scripted expert.
"""

# SAPIEN's and ManiSkill's annotations are narrower than what they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sapien
import torch
from jaxtyping import Float, Float32, Float64
from mani_skill.utils.registration import register_env
from transforms3d.quaternions import mat2quat, quat2mat

from robofactory.errors import UserError
from robofactory.sim.arm import Arm
from robofactory.sim.scene import TableEnv, material

NUM_AGENTS = 2
REQUIRED_OBJECTS = ("barrier",)
REQUIRED_SUCCESS = ("lift_height_m", "max_tilt_deg", "min_finger_force_n", "hold_steps", "robofactory_height_m")

# The barrier's frame is RoboFactory's: origin at the bottom centre, x along the rail, z up. Agent i grips at
# GRIP_X_M[i].
GRIP_X_M = (-0.222, 0.222)
RAIL_Z_M = 0.0746
RAIL_HALF_SIZE_M = (0.300, 0.012, 0.015)
ENVELOPE_M = (0.600, 0.126, 0.090)
REACHED_M = 0.05  # a hand this near its grip: as far as a finger opens, and one centimetre
MESH = "objects/steel_barrier_annotated/textured.obj"  # in RoboFactory's assets, unit scale below
MESH_SCALE = [0.6, 0.6, 0.2]


@register_env("LiftBarrier-rf")
class LiftBarrierEnv(TableEnv):
    def _build_objects(self) -> None:
        config = self.config.objects["barrier"]
        friction = sapien.physx.PhysxMaterial(config.friction, config.friction, 0.0)
        red = material([0.75, 0.15, 0.12], metallic=0.2)
        grey = material([0.70, 0.72, 0.75], roughness=0.4, metallic=0.4)
        mesh = barrier_mesh(self.config.assets_dir)
        builder = self.scene.create_actor_builder()
        for index, (centre, half_size) in enumerate(barrier_boxes()):
            builder.add_box_collision(sapien.Pose(centre), half_size, material=friction)
            if mesh is None:
                builder.add_box_visual(sapien.Pose(centre), half_size, material=red if index == 0 else grey)
        if mesh is not None:
            builder.add_visual_from_file(str(mesh), scale=MESH_SCALE)
        length, width, height = ENVELOPE_M  # inertia of a solid box of this size
        inertia = np.array([width**2 + height**2, length**2 + height**2, length**2 + width**2]) * config.mass_kg / 12
        builder.set_mass_and_inertia(config.mass_kg, sapien.Pose([0, 0, height / 2]), inertia)
        builder.initial_pose = sapien.Pose([0, 0, 0.3])
        self.barrier = builder.build("barrier")
        self._rest_height = torch.zeros(self.num_envs, 2, device=self.device)
        self._streak = torch.zeros(self.num_envs, dtype=torch.int32, device=self.device)
        self._streak_step = torch.zeros(self.num_envs, dtype=torch.int32, device=self.device)
        self._lifted_once = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def _place_objects(self, env_idx) -> None:
        pose = self.draw_pose(self.config.objects["barrier"], env_idx)
        self.barrier.set_pose(pose)
        self._rest_height[env_idx] = grip_points(pose.to_transformation_matrix())[..., 2]
        self._streak[env_idx] = 0
        self._streak_step[env_idx] = 0
        self._lifted_once[env_idx] = False

    def evaluate(self) -> dict[str, torch.Tensor]:
        """Where the attempt stands, per environment.

        success: both ends at least `lift_height_m` above their rest, tilt (of the barrier's up axis) below
            `max_tilt_deg`, each arm pressing both fingers on it, for `hold_steps` steps on end up to now.
        success_robofactory: its origin has been `robofactory_height_m` above the first robot's base, at any step.
            One arm alone can do that; for comparison only.
        end_height_m [b, 2]: of each agent's end of the rail above its rest; tilt_deg [b];
        hold_steps [b]: steps on end of all three so far.
        reached, held, lifted [b, 2]: each agent's hand is at its grip, presses on it, its end is high enough;
        level [b]: the tilt is below its limit.
        """
        limits = self.config.success
        matrix = self.barrier.pose.to_transformation_matrix()
        grips = grip_points(matrix)
        end_height = grips[..., 2] - self._rest_height
        hands = torch.stack([arm.tcp_pose.p for arm in self.arms], dim=1)
        tilt = torch.rad2deg(torch.acos(matrix[:, 2, 2].clamp(-1.0, 1.0)))
        held = self.holding(self.barrier, limits["min_finger_force_n"])
        high, level = end_height >= limits["lift_height_m"], tilt < limits["max_tilt_deg"]
        lifted = high.all(dim=1) & level & held.all(dim=1)

        stepped = self._elapsed_steps > self._streak_step  # counts a step once, however often it is asked about
        self._streak_step = self._elapsed_steps.clone()
        self._streak = torch.where(stepped, (self._streak + 1) * lifted, self._streak)
        base_height = self.arms[0].robot.pose.p[:, 2]
        self._lifted_once |= matrix[:, 2, 3] > base_height + limits["robofactory_height_m"]
        return {
            "success": self._streak >= limits["hold_steps"],
            "success_robofactory": self._lifted_once.clone(),
            "end_height_m": end_height,
            "tilt_deg": tilt,
            "reached": torch.linalg.norm(hands - grips, dim=-1) < REACHED_M,
            "held": held,
            "lifted": high,
            "level": level,
            "hold_steps": self._streak,
        }


def grip_points(barrier: Float[torch.Tensor, "b 4 4"]) -> Float[torch.Tensor, "b 2 3"]:
    """World position of each agent's grip on the rail, from the barrier's pose as a matrix."""
    local = torch.tensor([[x, 0.0, RAIL_Z_M] for x in GRIP_X_M], dtype=barrier.dtype, device=barrier.device)
    return torch.einsum("bij,kj->bki", barrier[:, :3, :3], local) + barrier[:, None, :3, 3]


def barrier_boxes() -> list[tuple[list[float], list[float]]]:
    """(centre, half size) of each part in the barrier's frame, the rail first; the envelope is the original's."""
    boxes = [([0.0, 0.0, RAIL_Z_M], list(RAIL_HALF_SIZE_M)), ([0.0, 0.0, 0.024], [0.270, 0.006, 0.006])]
    boxes += [([x, 0.0, 0.0448], [0.007, 0.007, 0.0148]) for x in (-0.15, 0.0, 0.15)]
    for x in (-0.275, 0.275):
        boxes += [([x, 0.0, 0.0348], [0.008, 0.008, 0.0248]), ([x, 0.0, 0.005], [0.012, 0.063, 0.005])]
    return boxes


def barrier_mesh(assets_dir: str | None) -> Path | None:
    """RoboFactory's mesh if a directory with its assets is given. It is what cameras see; contacts stay the boxes'.

    Raises:
        UserError: the directory lacks the mesh.
    """
    if assets_dir is None:
        return None
    mesh = Path(assets_dir) / MESH
    if not mesh.is_file():
        raise UserError(f"assets_dir: no {MESH} in {assets_dir}; give RoboFactory's assets directory, or null")
    return mesh


# ------------------------------------------------------------------------------------------------------------ expert

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
            Arm(agent, np.array(robot.rest_qpos), step_s)
            for agent, robot in zip(self._env.arms, scene.robots, strict=True)
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


def make_expert(env) -> LiftBarrierExpert:
    return LiftBarrierExpert(env)
