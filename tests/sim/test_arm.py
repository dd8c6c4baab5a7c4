import numpy as np
import pytest
import sapien

from robofactory.robots.panda import ROBOT as PANDA
from robofactory.sim.arm import Arm

pytestmark = pytest.mark.sim


@pytest.fixture
def arm(env) -> Arm:
    env.reset(seed=0)
    robot = env.unwrapped.config.robots[0]
    return Arm(env.unwrapped.arms[0], PANDA, np.array(robot.rest_qpos), 0.05)


def reachable(arm: Arm) -> list[sapien.Pose]:
    rng = np.random.default_rng(0)
    return [sapien.Pose(arm.rest_tcp.p + rng.uniform(-0.12, 0.12, 3), arm.rest_tcp.q) for _ in range(20)]


def test_inverse_kinematics_reach_the_pose(arm):
    for goal in reachable(arm):
        reached = arm.forward(np.append(arm.inverse(goal), [0.04, 0.04]))
        assert np.linalg.norm(reached.p - goal.p) < 1e-3
        assert 1 - abs(float(reached.q @ goal.q)) < 1e-5


def test_the_solution_depends_on_the_pose_and_not_on_where_the_arm_is(arm, env):
    goal = reachable(arm)[0]
    before = arm.inverse(goal)
    moved = arm.qpos
    moved[:7] += 0.2
    env.unwrapped.arms[0].robot.set_qpos(moved)
    np.testing.assert_array_equal(arm.inverse(goal), before)


def test_an_unreachable_pose_gets_the_nearest_joints_within_their_limits(arm):
    """A barrier knocked out of reach: the undamped iteration diverged to joints of 20 rad there."""
    for beyond in ([0.0, 1.05, 0.1], [0.4, 0.9, 0.1], [0.0, 3.0, 0.5]):
        goal = sapien.Pose(arm.base.p + np.array(beyond), arm.rest_tcp.q)
        joints = arm.inverse(goal)
        assert np.all(joints >= arm._limits[:, 0]) and np.all(joints <= arm._limits[:, 1])
        reached = arm.forward(np.append(joints, [0.04, 0.04]))
        assert np.linalg.norm(reached.p - goal.p) < np.linalg.norm(arm.rest_tcp.p - goal.p)


def test_a_step_is_bounded_by_speed_and_acceleration(arm):
    goal = reachable(arm)[1]
    for speed, acceleration, lead in ((0.6, 100.0, 0.06), (0.6, 6.0, 0.03)):  # the arm rests: 6 rad/s^2 * 0.05 s
        target = arm.step_towards(goal, speed, acceleration)
        assert np.abs(target - arm.qpos[:7]).max() == pytest.approx(lead, abs=1e-6)


def test_proprio_says_in_commands_how_far_the_fingers_are_open(env):
    env.reset(seed=0)
    assert env.unwrapped.proprio(0)[0, 7] == pytest.approx(1.0, abs=1e-4)
    assert PANDA.gripper_command(0.04) == pytest.approx(1.0)
    assert PANDA.gripper_command(-0.01) == pytest.approx(-1.0)
    assert PANDA.gripper_command(0.0) == pytest.approx(-0.6)
