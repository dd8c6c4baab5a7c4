"""One arm as a controller sees it: where it is, inverse kinematics, the next joint target on the way to a goal."""

# SAPIEN's and ManiSkill's annotations are narrower than what they accept.
# pyright: reportCallIssue=false

import numpy as np
import sapien
from jaxtyping import Float, Float64
from mani_skill.agents.base_agent import BaseAgent

from robofactory.robots import Robot

# The joint drives (stiffness 1000, damping 100) close 10/s of the distance to their target: over one control step of
# 0.05 s a joint moves 1 - exp(-0.5) = 39 % of it.
DRIVE_RATE_PER_S = 10.0


class Arm:
    """Reads one arm's state; world frame, m, rad. CPU simulation with one environment."""

    def __init__(self, agent: BaseAgent, robot: Robot, rest_qpos: Float[np.ndarray, " q"], control_step_s: float):
        self._articulation = agent.robot._objs[0]
        self._model = self._articulation.create_pinocchio_model()
        links = self._articulation.get_links()
        self._tcp = next(i for i, link in enumerate(links) if link.name.endswith(robot.tcp_link))
        self._limits = self._articulation.get_qlimits()[: robot.num_joints].astype(np.float64)
        self._rest = np.asarray(rest_qpos, np.float64)
        self._num_joints = robot.num_joints
        self._joint_mask = (np.arange(len(self._rest)) < robot.num_joints).astype(int)
        self._step_s = control_step_s
        self.base: sapien.Pose = self._articulation.get_root_pose()
        self.rest_tcp: sapien.Pose = self.forward(self._rest)

    @property
    def qpos(self) -> Float64[np.ndarray, " q"]:
        """Arm joints in rad, then the fingers in m."""
        return self._articulation.get_qpos().astype(np.float64)

    @property
    def joint_velocities(self) -> Float64[np.ndarray, " j"]:
        return self._articulation.get_qvel()[: self._num_joints].astype(np.float64)

    @property
    def finger_width_m(self) -> float:
        """Mean opening of one finger: 0.04 open, 0 closed on nothing."""
        return float(self._articulation.get_qpos()[self._num_joints :].mean())

    @property
    def tcp(self) -> sapien.Pose:
        """The point between the finger pads: z approaches, y is the closing axis."""
        return self.forward(self.qpos)

    def forward(self, qpos: Float[np.ndarray, " q"]) -> sapien.Pose:
        self._model.compute_forward_kinematics(qpos)
        return self.base * self._model.get_link_pose(self._tcp)

    def inverse(self, tcp: sapien.Pose) -> Float64[np.ndarray, " j"]:
        """Joints that bring the TCP there, or as near as they come within the joint limits.

        Always solved from the rest posture, so the answer depends on the pose alone: the redundant seventh degree of
        freedom does not drift with the way an arm came, and equal scenes get equal targets.
        """
        solution, reached, _ = self._solve(tcp, damping=1e-6)
        if not reached:  # near the edge of the workspace the undamped iteration runs wild
            solution, _, _ = self._solve(tcp, damping=0.1)
        return np.clip(np.asarray(solution, np.float64)[: self._num_joints], self._limits[:, 0], self._limits[:, 1])

    def _solve(self, tcp: sapien.Pose, damping: float):
        return self._model.compute_inverse_kinematics(
            self._tcp,
            self.base.inv() * tcp,
            initial_qpos=self._rest,
            active_qmask=self._joint_mask,
            eps=1e-4,
            max_iterations=100,
            dt=0.5,
            damp=damping,
        )

    def step_towards(self, tcp: sapien.Pose, max_speed: float, max_acceleration: float) -> Float64[np.ndarray, " j"]:
        """The next joint target on the straight line in joint space to a TCP pose.

        The drives chase their target at `DRIVE_RATE_PER_S`, so a target that leads the measured joints by `lead` rad
        moves them at about 10 * lead rad/s. The lead is bounded by `max_speed` (rad/s, fastest joint) and, while
        speeding up, by the measured speed along the line plus `max_acceleration` (rad/s^2) over one step.
        """
        measured = self.qpos[: self._num_joints]
        way = self.inverse(tcp) - measured
        distance = np.abs(way).max()
        if distance < 1e-9:
            return measured
        speed = max(0.0, float(self.joint_velocities @ way) / float(way @ way)) * distance
        speed = min(max_speed, speed + max_acceleration * self._step_s)
        return measured + way * min(1.0, speed / DRIVE_RATE_PER_S / distance)
