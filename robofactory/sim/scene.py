"""What all tasks share, built from the scene file: robots, table, light, cameras, and how they are reset."""

# SAPIEN's and ManiSkill's annotations are narrower than what they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportAssignmentType=false, reportIncompatibleMethodOverride=false

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sapien
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from mani_skill.agents import REGISTERED_AGENTS, BaseAgent, MultiAgent
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.building.ground import build_ground
from mani_skill.utils.scene_builder.table import TableSceneBuilder
from mani_skill.utils.structs import Actor
from mani_skill.utils.structs.pose import Pose
from mani_skill.utils.structs.types import SimConfig

from robofactory import robots
from robofactory.config import ObjectConfig, SceneConfig
from robofactory.errors import UserError
from robofactory.shapes import Action
from robofactory.sim.cameras import rendered_cameras, sensor_config, take_pictures
from robofactory.sim.meshes import with_light_visuals

# RoboFactory's table: its mesh ships with ManiSkill; top at z = 0.
TABLE_HEIGHT_M, TABLE_HALF_X_M, TABLE_HALF_Y_M = 0.9196429, 1.51125, 3.0225
TABLE_CENTRE_X_M = -0.12
TABLE_MESH_SCALE = [4.375, 4.375, 1.75]


class TableEnv(BaseEnv):
    """Robots around a table. A task adds its objects, `evaluate` and, in the same file, its expert.

    All state is batched over environments, so the same code runs on the CPU and on ManiSkill's GPU backend. Nothing is
    rendered unless `pictures` is called.
    """

    SUPPORTED_ROBOTS = None

    def __init__(self, *args, scene: SceneConfig, **kwargs):
        self.config = scene
        self.robots = robots_of(scene)
        classes = [REGISTERED_AGENTS[robot.uid].agent_cls for robot in self.robots]
        if scene.visual_detail == "low":
            classes = [with_light_visuals(*each) for each in zip(classes, self.robots, strict=True)]
        super().__init__(*args, robot_uids=tuple(classes), **kwargs)

    # ------------------------------------------------------------------------------------------ ManiSkill's hooks

    @property
    def _default_sim_config(self):
        # On a GPU environments stand side by side in one world: no table may reach the next one's.
        spacing_m = 3 * TABLE_HALF_Y_M
        return SimConfig(spacing_m, sim_freq=self.config.sim_freq_hz, control_freq=self.config.control_freq_hz)

    @property
    def _default_sensor_configs(self):
        configs = []
        for camera in rendered_cameras(self.config):
            links = [] if camera.mount_agent is None else self.arms[camera.mount_agent].robot.get_links()
            configs.append(sensor_config(camera, links, self.config.shader))
        return configs

    def _load_agent(self, options):
        super()._load_agent(options, self._robot_poses())

    def _load_lighting(self, options):
        self.scene.set_ambient_light(self.config.lighting.ambient_rgb)
        for lamp in self.config.lighting.lamps:
            self.scene.add_directional_light(lamp.direction, lamp.rgb)

    def _load_scene(self, options):
        self._build_table()
        self._build_objects()

    def _initialize_episode(self, env_idx, options):
        for arm, robot, pose in zip(self.arms, self.config.robots, self._robot_poses(), strict=True):
            arm.reset(np.array(robot.rest_qpos))
            arm.robot.set_pose(pose)
        self._place_objects(env_idx)

    def _get_obs_extra(self, info):
        return {}

    # ------------------------------------------------------------------------------------------ for the task files

    def _build_objects(self) -> None:
        raise NotImplementedError

    def _place_objects(self, env_idx: torch.Tensor) -> None:
        raise NotImplementedError

    def draw_pose(self, thing: ObjectConfig, env_idx: torch.Tensor) -> Pose:
        """A random pose for each of these environments: a function of its own seed, whatever the backend or number."""
        draws = np.array([self._batched_episode_rng[int(i)].uniform(size=3) for i in env_idx])
        position = np.array(thing.position) + np.array(thing.randomize_position) * draws
        quaternion = np.array(thing.quaternion) / np.linalg.norm(thing.quaternion)
        return Pose.create_from_pq(
            torch.tensor(position, dtype=torch.float32, device=self.device),
            torch.tensor(quaternion, dtype=torch.float32, device=self.device).expand(len(draws), 4),
        )

    def holding(self, thing: Actor, min_finger_force_n: float) -> Bool[torch.Tensor, "b agents"]:
        """Which arms press both fingers on it. None before the first step: contacts are what the last step left."""
        held = []
        for arm, robot in zip(self.arms, self.robots, strict=True):
            forces = [
                torch.linalg.norm(self.scene.get_pairwise_contact_forces(arm.robot.links_map[link], thing), dim=-1)
                for link in robot.finger_links
            ]
            held.append(torch.stack(forces).amin(dim=0) >= min_finger_force_n)
        return torch.stack(held, dim=1) & (self._elapsed_steps > 0)[:, None]

    # ------------------------------------------------------------------------------------------ for everyone

    @property
    def arms(self) -> list[BaseAgent]:
        """In the order of the agents. ManiSkill hands out a single robot by itself."""
        return self.agent.agents if isinstance(self.agent, MultiAgent) else [self.agent]

    def as_maniskill(self, actions: Iterable[Action | Float32[np.ndarray, "b a"]]) -> Any:
        """The agents' actions as ManiSkill's `step` takes them: by name, or that of a single robot by itself."""
        if not isinstance(self.agent, MultiAgent):
            (action,) = actions
            return action
        return dict(zip(self.agent.agents_dict, actions, strict=True))

    def pictures(self) -> dict[str, UInt8[torch.Tensor, "b h w 3"]]:
        """uid -> RGB of every camera that some view needs, now."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        return take_pictures(self._sensors)

    def proprio(self, agent: int) -> Float32[np.ndarray, "b s"]:
        """Measured joints in rad, then the measured finger width as a gripper command (Panda: 0.04 m -> 1, 0 -> -0.6)."""
        return self.robots[agent].proprio(self.arms[agent].robot.get_qpos().cpu().numpy().astype(np.float32))

    # ------------------------------------------------------------------------------------------ building

    def _robot_poses(self) -> list[sapien.Pose]:
        return [sapien.Pose(robot.position, yaw_quaternion(np.deg2rad(robot.yaw_deg))) for robot in self.config.robots]

    def _build_table(self) -> None:
        half_size = [TABLE_HALF_X_M, TABLE_HALF_Y_M, TABLE_HEIGHT_M / 2]
        centre = sapien.Pose([0, 0, TABLE_HEIGHT_M / 2])
        builder = self.scene.create_actor_builder()
        builder.add_box_collision(centre, half_size)
        if self.config.visual_detail == "low":
            builder.add_box_visual(centre, half_size, material=material([0.55, 0.42, 0.30], roughness=0.8))
        else:
            mesh = Path(inspect.getfile(TableSceneBuilder)).parent / "assets/table.glb"
            turned = sapien.Pose(q=yaw_quaternion(np.pi))
            builder.add_visual_from_file(str(mesh), scale=TABLE_MESH_SCALE, pose=turned)
            build_ground(self.scene, floor_width=100, altitude=-TABLE_HEIGHT_M)
        builder.initial_pose = sapien.Pose([TABLE_CENTRE_X_M, 0, -TABLE_HEIGHT_M])
        self.table = builder.build_kinematic("table")


def robots_of(scene: SceneConfig) -> list[robots.Robot]:
    """Of each agent. Raises UserError, naming the key, for a uid that is unknown."""
    found = []
    for index, placed in enumerate(scene.robots):
        try:
            found.append(robots.find(placed.uid))
        except UserError as error:
            raise UserError(f"scene {scene.task}: key 'robots[{index}].uid': {error}") from None
    return found


def material(rgb: list[float], roughness: float = 0.5, metallic: float = 0.0) -> sapien.render.RenderMaterial:
    return sapien.render.RenderMaterial(base_color=[*rgb, 1.0], roughness=roughness, metallic=metallic, specular=0.4)


def yaw_quaternion(yaw_rad: float) -> Float[np.ndarray, " 4"]:
    """wxyz of a turn about z."""
    return np.array([np.cos(yaw_rad / 2), 0.0, 0.0, np.sin(yaw_rad / 2)])
