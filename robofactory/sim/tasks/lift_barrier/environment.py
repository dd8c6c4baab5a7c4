"""The barrier, where it stands, and what success is."""

# SAPIEN's and ManiSkill's annotations are narrower than what they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from pathlib import Path

import numpy as np
import sapien
import torch
from jaxtyping import Float

from robofactory.errors import UserError
from robofactory.sim.scene import TableEnv, material

# The barrier's frame is RoboFactory's: origin at the bottom centre, x along the rail, z up. Agent i grips at
# GRIP_X_M[i].
GRIP_X_M = (-0.222, 0.222)
RAIL_Z_M = 0.0746
RAIL_HALF_SIZE_M = (0.300, 0.012, 0.015)
ENVELOPE_M = (0.600, 0.126, 0.090)
REACHED_M = 0.05  # a hand this near its grip: as far as a finger opens, and one centimetre
MESH = "objects/steel_barrier_annotated/textured.obj"  # in RoboFactory's assets, unit scale below
MESH_SCALE = [0.6, 0.6, 0.2]


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
            `max_tilt_deg`, each arm pressing both fingers on it, for `hold_steps` steps in a row up to now.
        success_robofactory: its origin has been `robofactory_height_m` above the first robot's base, at any step.
            One arm by itself can do that; for comparison only.
        end_height_m [b, 2]: of each agent's end of the rail above its rest; tilt_deg [b];
        hold_steps [b]: steps in a row of all three so far.
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
