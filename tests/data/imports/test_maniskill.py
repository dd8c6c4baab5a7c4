"""Trajectories as ManiSkill and RoboFactory's generator write them, made here in their layout."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from robofactory.errors import UserError
from robofactory.robots.panda import ROBOT as PANDA

HEIGHT, WIDTH = 12, 16
CAMERAS = ("head_camera_agent0", "head_camera_agent1", "head_camera_global")
LENGTHS = {0: 5, 1: 3, 4: 40}  # by episode_id; 40 frames are more than are read at once
FINGER_M = 0.015  # half open: the command 0


def values(kind: str, agent: int, episode: int, rows: int, columns: int) -> np.ndarray:
    seed = [*kind.encode(), agent, episode]
    return np.random.default_rng(seed).uniform(-1, 1, (rows, columns)).astype(np.float32)


def frames(uid: str, episode: int, rows: int) -> np.ndarray:
    random = np.random.default_rng([*uid.encode(), episode])
    return random.integers(0, 256, (rows, HEIGHT, WIDTH, 3), dtype=np.uint8)


def write(path: Path, num_agents: int = 2, cameras=CAMERAS, env_kwargs=None, **of_episodes) -> Path:
    """Episode 1 failed."""
    with h5py.File(path, "w") as file:
        for episode, length in LENGTHS.items():
            trajectory = file.create_group(f"traj_{episode}")
            for agent in range(num_agents):
                part = f"/panda-{agent}" if num_agents > 1 else ""
                trajectory[f"actions{part}"] = values("action", agent, episode, length, 8)
                qpos = values("qpos", agent, episode, length + 1, 9)
                qpos[:, 7:] = FINGER_M
                trajectory[f"obs/agent{part}/qpos"] = qpos
                trajectory[f"obs/agent{part}/qvel"] = values("qvel", agent, episode, length + 1, 9)
            for uid in cameras:
                pictures = frames(uid, episode, length + 1)
                trajectory.create_dataset(f"obs/sensor_data/{uid}/rgb", data=pictures, compression="gzip")
                trajectory[f"obs/sensor_param/{uid}/intrinsic_cv"] = np.zeros((length + 1, 3, 3), np.float32)
            trajectory["success"] = np.zeros(length, bool)
    recorded = [
        {
            "episode_id": e,
            "episode_seed": 7 * e,
            "elapsed_steps": length,
            "control_mode": "pd_joint_pos",
            "success": e != 1,
        }
        | of_episodes
        for e, length in LENGTHS.items()
    ]
    content = {"env_info": {"env_id": "LiftBarrier-rf", "env_kwargs": env_kwargs or {}}, "episodes": recorded}
    path.with_suffix(".json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("agent", [0, 1])
def test_each_agent_gets_its_cameras_actions_and_joints(run_import, tmp_path, agent):
    write(tmp_path / "20251125_101010.h5")
    reader = run_import("maniskill", tmp_path, task="LiftBarrier-rf", agent=agent)  # the generator's folder
    assert reader.views == ("side", "overhead")
    assert reader.seeds == [0, 4], "the episode that failed was imported"
    assert reader.instructions == ["lift the barrier"] * 2  # of the task
    description = reader.description
    assert (description.fps, description.robot_type, description.agent_id) == (20, "panda", agent)
    assert description.joint_names == description.names_of_proprio() == PANDA.names
    sources = {"side": f"head_camera_agent{agent}", "overhead": "head_camera_global"}
    for index, episode in enumerate(reader.seeds):
        length = LENGTHS[episode]
        np.testing.assert_array_equal(reader.actions(index), values("action", agent, episode, length, 8))
        arm = values("qpos", agent, episode, length + 1, 9)[:length, :7]
        np.testing.assert_array_equal(reader.proprio(index)[:, :7], arm)
        np.testing.assert_allclose(reader.proprio(index)[:, 7], 0.0, atol=1e-6)
        for view, uid in sources.items():
            expected = frames(uid, episode, length + 1)
            for step in range(length):
                np.testing.assert_array_equal(reader.frame(index, step)[0].images[view], expected[step])


def test_one_agent_alone_has_no_name(run_import, tmp_path):
    path = write(tmp_path / "one.h5", num_agents=1, cameras=("head_camera", "base"))
    reader = run_import(
        "maniskill", path, "--instruction", "pick up the meat", "--proprio_key", "qvel", task="PickMeat"
    )
    assert reader.views == ("base", "side") and reader.instructions == ["pick up the meat"] * 2
    np.testing.assert_array_equal(reader.proprio(0), values("qvel", 0, 0, 6, 9)[:5])
    assert reader.description.names_of_proprio()[:2] == ("qvel_0", "qvel_1")


def test_a_wrong_name_is_answered_with_those_there_are(run_import, tmp_path):
    path = write(tmp_path / "demo.h5")
    listed = "head_camera_agent0, head_camera_agent1, head_camera_global"
    with pytest.raises(UserError, match=rf"no camera 'wrist_camera'; it has {listed} \(--camera wrist=NAME\)"):
        run_import("maniskill", path, "--camera", "wrist=wrist_camera", task="LiftBarrier-rf")
    with pytest.raises(UserError, match=r"no agent 2; it has 0 \(panda-0\), 1 \(panda-1\)"):
        run_import("maniskill", path, task="LiftBarrier-rf", agent=2)
    with pytest.raises(UserError, match=r"no proprio 'qpoz'; it has qpos, qvel"):
        run_import("maniskill", path, "--proprio_key", "qpoz", task="LiftBarrier-rf")
    with pytest.raises(UserError, match=r"has no instructions, and LiftBarier is none of our tasks; say --instruction"):
        run_import("maniskill", path, task="LiftBarier")


def test_what_our_simulator_cannot_play_is_said(run_import, tmp_path, capsys):
    simulation = {"sim_config": {"control_freq": 10}}
    path = write(tmp_path / "demo.h5", env_kwargs=simulation, control_mode="pd_ee_delta_pose")
    reader = run_import("maniskill", path, task="LiftBarrier-rf")
    assert reader.description.fps == 10 and reader.description.joint_names[0] == "action_0"
    warnings = capsys.readouterr().err
    assert "the actions are pd_ee_delta_pose; our tasks execute pd_joint_pos" in warnings
    assert "1 of 3 episodes failed and are left out" in warnings


def test_a_broken_recording_is_one_line(run_import, tmp_path):
    path = write(tmp_path / "demo.h5")
    with h5py.File(path, "a") as file:
        del file["traj_4"]
    with pytest.raises(UserError, match=r"demo\.h5 has no traj_4, which its \.json lists"):
        run_import("maniskill", path, task="LiftBarrier-rf")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"demo\.h5 cannot be read as HDF5"):
        run_import("maniskill", path, task="LiftBarrier-rf")
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"demo\.json is missing; it belongs to"):
        run_import("maniskill", path, task="LiftBarrier-rf")


def test_episodes_unlike_the_first_are_refused(run_import, tmp_path):
    path = write(tmp_path / "demo.h5")
    key = "traj_4/obs/sensor_data/head_camera_agent0/rgb"
    with h5py.File(path, "a") as file:
        small = file[key][:, :6]
        del file[key]
        file[key] = small
    with pytest.raises(UserError, match="episode 4, view side: 16x6 px, but the first episode has 16x12") as caught:
        run_import("maniskill", path, task="LiftBarrier-rf")
    assert "\n" not in str(caught.value)
    path = write(tmp_path / "other.h5")
    with h5py.File(path, "a") as file:
        del file["traj_4/actions/panda-1"]
        file["traj_4/actions/panda-1"] = np.zeros((40, 7), np.float32)
    with pytest.raises(UserError, match="episode 4: its action has 7 dimensions, that of the first has 8"):
        run_import("maniskill", path, task="LiftBarrier-rf", agent=1)
