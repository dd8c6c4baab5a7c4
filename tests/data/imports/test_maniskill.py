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
    with pytest.raises(
        UserError, match=r"has no instructions, and LiftBarier is no task of this project; say --instruction"
    ):
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
    with pytest.raises(
        UserError, match="episode 4: view side, frame 0: it has 16x6 px, the first episode has 16x12; all must be alike"
    ) as caught:
        run_import("maniskill", path, task="LiftBarrier-rf")
    assert "\n" not in str(caught.value)
    path = write(tmp_path / "other.h5")
    with h5py.File(path, "a") as file:
        del file["traj_4/actions/panda-1"]
        file["traj_4/actions/panda-1"] = np.zeros((40, 7), np.float32)
    with pytest.raises(UserError, match="episode 4: its action has 7 dimensions, that of the first has 8"):
        run_import("maniskill", path, task="LiftBarrier-rf", agent=1)


# ------------------------------------------------------------------------------------------------------- what others wrote


def change_json(path: Path, change) -> None:
    file = path.with_suffix(".json")
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("episodes"), "key 'episodes' is missing"),
        (lambda c: c.update(episodes=None), "key 'episodes' is null; needed: a valid array"),
        (lambda c: c.update(episodes=[]), "has no successful episode of 0"),
        (
            lambda c: c["episodes"][0].update(success="false"),
            r"key 'episodes\.0\.success' is \"false\"; needed: a valid b",
        ),
        (
            lambda c: c["episodes"][0].update(success=None),
            r"key 'episodes\.0\.success' is null; needed: a valid boolean",
        ),
        (
            lambda c: c["episodes"][0].update(episode_id="0"),
            r"key 'episodes\.0\.episode_id' is \"0\"; needed: a valid in",
        ),
        (
            lambda c: c["episodes"][0].update(episode_id=-1),
            r"key 'episodes\.0\.episode_id' is -1; needed: greater than",
        ),
        (lambda c: c["episodes"][2].update(episode_id=0), r"demo\.json lists episode 0 2 times"),
        (
            lambda c: c["episodes"][0].update(control_mode=7),
            r"key 'episodes\.0\.control_mode' is 7; needed: a valid st",
        ),
        (
            lambda c: c["env_info"].update(env_kwargs={"sim_config": {"control_freq": 0}}),
            "is 0; needed: greater than 0",
        ),
        (lambda c: c["env_info"].update(env_kwargs={"sim_config": {"control_freq": 1e6}}), "1e.06 frames per second"),
    ],
)
def test_a_json_that_is_damaged_is_one_line_that_names_the_key(run_import, tmp_path, change, message):
    path = write(tmp_path / "demo.h5")
    change_json(path, change)
    with pytest.raises(UserError, match=message) as caught:
        run_import("maniskill", path, task="LiftBarrier-rf")
    assert "\n" not in str(caught.value) and not (tmp_path / "home").exists()


@pytest.mark.parametrize("env_info", [None, {}, {"env_kwargs": None}, {"env_kwargs": {"sim_config": None}}])
def test_a_json_that_says_nothing_of_the_simulation_is_at_20_hz(run_import, tmp_path, env_info):
    path = write(tmp_path / "demo.h5")
    change_json(path, lambda content: content.update(env_info=env_info))
    assert run_import("maniskill", path, task="LiftBarrier-rf").description.fps == 20


def test_trajectories_that_the_json_does_not_list_are_said(run_import, tmp_path, capsys):
    path = write(tmp_path / "demo.h5")
    change_json(path, lambda content: content["episodes"].pop(1))
    run_import("maniskill", path, task="LiftBarrier-rf")
    assert "1 trajectories that its .json does not list are left out (traj_1, ...)" in capsys.readouterr().err


PLACE = "traj_0/obs/sensor_data/head_camera_agent0/rgb"


def put(path: Path, name: str, **options) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        if "link" in options:
            file[name] = options["link"]
        elif "layout" in options:
            file.create_virtual_dataset(name, options["layout"])
        else:
            file.create_dataset(name, **options)


def virtual_of(file: Path) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((6, HEIGHT, WIDTH, 3), "u1")
    layout[:] = h5py.VirtualSource(str(file), "secret", (6, HEIGHT, WIDTH, 3))
    return layout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            lambda secret: {"shape": (6, HEIGHT, WIDTH, 3), "dtype": "u1", "external": [(str(secret), 0, 6 * 576)]},
            "is kept in another file",
        ),
        (lambda secret: {"layout": virtual_of(secret)}, "is kept in another file"),
        (
            lambda secret: {"link": h5py.ExternalLink(str(secret), "/secret")},
            "is a link; only what is in this file itself",
        ),
        (lambda secret: {"link": h5py.SoftLink("/traj_1")}, "is a link; only what is in this file itself"),
        (
            lambda secret: {"shape": (6, 2**20, 2**20, 3), "dtype": "u1", "chunks": (1, 64, 64, 3)},
            "was never written as a",
        ),
        (lambda secret: {"shape": (6, HEIGHT, WIDTH, 3), "dtype": "u1"}, "was never written as a whole"),
        (
            lambda secret: {"data": np.full((6, HEIGHT), b"text", object), "dtype": h5py.string_dtype()},
            "needed: numbers",
        ),
    ],
    ids=["external storage", "virtual", "external link", "soft link", "terabytes", "unwritten", "texts"],
)
@pytest.mark.parametrize("name", [PLACE, "traj_4/obs/agent/panda-0/qpos"])
def test_nothing_but_what_is_in_the_file_itself_is_read(run_import, tmp_path, options, message, name):
    """A dataset that was stored in a local file was in the imported pictures."""
    path, secret = write(tmp_path / "demo.h5"), tmp_path / "secret"
    secret.write_bytes(b"a local secret, " * 300)
    given = options(secret)
    put(path, name, **given)
    if name != PLACE:  # of vectors the number of axes is found first
        message = rf"({message}|has the shape .*; needed: 2 axes).*; add --skip 4 to leave it out"
    with pytest.raises(UserError, match=message) as caught:
        run_import("maniskill", path, task="LiftBarrier-rf")
    assert "\n" not in str(caught.value)


def test_color_with_alpha_is_read_where_there_is_no_rgb(run_import, tmp_path):
    path = write(tmp_path / "demo.h5")
    with h5py.File(path, "a") as file:
        for episode in LENGTHS:
            camera = file[f"traj_{episode}/obs/sensor_data/head_camera_agent0"]
            pictures = camera["rgb"][:]
            del camera["rgb"]
            alpha = np.ones((*pictures.shape[:3], 1), np.float32)
            camera["Color"] = np.concatenate([pictures / np.float32(255), alpha], axis=3)
    reader = run_import("maniskill", path, task="LiftBarrier-rf")
    expected = frames("head_camera_agent0", 4, LENGTHS[4] + 1)
    np.testing.assert_array_equal(reader.frame(1, 3)[0].images["side"], expected[3])


def test_a_camera_without_colours_is_named(run_import, tmp_path, capsys):
    path = write(tmp_path / "demo.h5")
    with h5py.File(path, "a") as file:
        camera = file["traj_0/obs/sensor_data/head_camera_global"]
        camera.move("rgb", "depth")
    reader = run_import("maniskill", path, task="LiftBarrier-rf")
    assert reader.views == ("side",)
    assert (
        "'head_camera_global' is no camera that can be imported, and left out: it has depth, and no rgb or Color"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("traj_4/actions/panda-0", np.zeros(40), r"actions/panda-0 has the shape \[40\]; needed: 2 axes; add --skip 4"),
        ("traj_4/actions/panda-0", np.full((40, 8), np.nan), "episode 4: its action in frame 0 is not finite"),
        ("traj_4/actions/panda-0", np.zeros((0, 8)), r"has 41 rows for 0 actions; needed: 1; add --skip 4"),
        (
            "traj_4/obs/agent/panda-0/qpos",
            np.zeros((20, 9)),
            r"qpos has 20 rows for 40 actions; needed: 41; add --skip 4",
        ),
        (PLACE.replace("0/", "4/", 1), np.zeros((90, HEIGHT, WIDTH, 3), np.uint8), "rgb has 90 rows for 40 actions"),
        (
            PLACE.replace("0/", "4/", 1),
            np.zeros((41, HEIGHT, WIDTH, 3)),
            r"view side, frame 0: it is float64 \[12, 16, 3\]",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_that_offers_to_skip_it(run_import, tmp_path, name, data, message):
    path = write(tmp_path / "demo.h5")
    put(path, name, data=data)
    with pytest.raises(UserError, match=message):
        run_import("maniskill", path, task="LiftBarrier-rf")
    assert run_import("maniskill", path, "--skip", "4", task="LiftBarrier-rf", num=1).seeds == [0]


def test_a_damaged_chunk_of_pictures_is_one_line(run_import, tmp_path):
    path = write(tmp_path / "demo.h5")
    with h5py.File(path) as file:
        offset = file[PLACE].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 10 : offset + 40] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"cannot be read as HDF5 \(.*\); the source is incomplete; get it again; add --skip 0"
    ):
        run_import("maniskill", path, task="LiftBarrier-rf")
