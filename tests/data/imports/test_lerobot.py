"""What LeRobot itself wrote (tests/data/fixtures) becomes ours, frame by frame."""

import json
import shutil
from pathlib import Path

import content
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robofactory.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
VIDEO_TOLERANCE = 12  # colour levels; AV1 at LeRobot's own settings leaves 7 of these pictures


@pytest.fixture
def source(tmp_path):
    """A copy of a fixture, to be changed."""
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def change_info(directory: Path, **changes) -> Path:
    path = directory / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_images_come_back_to_the_bit(run_import, version):
    reader = run_import("lerobot", FIXTURES / f"lerobot_{version}_image")
    content.check(reader)
    description = reader.description
    assert (description.fps, description.robot_type) == (content.FPS, "arm")
    assert description.joint_names == description.names_of_proprio() == tuple(content.JOINTS)
    assert description.scene_yaml == ""


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_videos_come_back_at_their_frames(run_import, version):
    reader = run_import("lerobot", FIXTURES / f"lerobot_{version}_video")
    content.check(reader, tolerance=VIDEO_TOLERANCE)


def test_cameras_and_vectors_are_chosen_by_name(run_import):
    wrist = "side=observation.images.wrist"
    source = FIXTURES / "lerobot_v3.0_image"
    reader = run_import("lerobot", source, "--camera", wrist, "--proprio_key", "none", "--instruction", "push")
    assert reader.views == ("side",)
    content.check(reader, has_proprio=False, instructions=("push", "push"), side="wrist")

    reader = run_import("lerobot", source, "--action_key", "action", "observation.state", task="Joined")
    np.testing.assert_array_equal(reader.all_actions[:, :3], reader.all_actions[:, 3:] + np.float32(0.05))
    names = [f"{key}.{joint}" for key in ("action", "observation.state") for joint in content.JOINTS]
    assert reader.description.joint_names == tuple(names), "two dimensions have one name"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--camera", "side=observation.images.top"],
            r"no camera 'observation\.images\.top'; it has observation\.images\.front, observation\.images\.wrist",
        ),
        (["--action_key", "actions"], r"no action 'actions'; it has observation\.state, action \(--action_key NAME\)"),
        (["--proprio_key", "state"], r"no proprio 'state'; it has .* \(--proprio_key NAME, or none to go without\)"),
        (["--fps", "20"], r"was recorded at 10 frames per second, not 20; omit --fps"),
        (["--num", "3"], r"--num 3: .* has 2 episodes"),
    ],
)
def test_a_wrong_name_is_answered_with_those_there_are(run_import, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        run_import("lerobot", FIXTURES / "lerobot_v3.0_image", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "home").exists()


def test_an_episode_at_another_rate_is_refused(run_import, source):
    """The third frame comes late: another control frequency, or a frame that was dropped."""
    directory = source("lerobot_v2.1_image")
    path = directory / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    times = table["timestamp"].to_numpy().copy()
    times[2:] += 0.1
    table = table.set_column(table.column_names.index("timestamp"), "timestamp", pa.array(times))
    pq.write_table(table, path)
    with pytest.raises(
        UserError,
        match=r"episode 1: its timestamps are not 10 frames per second: 0\.300 s comes after 0\.100 s in .*: row 2",
    ):
        run_import("lerobot", directory)


def test_a_dataset_that_is_incomplete_is_refused_by_name(run_import, source):
    directory = source("lerobot_v3.0_video")
    (directory / "videos/observation.images.wrist/chunk-000/file-000.mp4").unlink()
    with pytest.raises(UserError, match=r"wrist/chunk-000/file-000\.mp4 is missing; the source is incomplete"):
        run_import("lerobot", directory)
    directory = source("lerobot_v2.1_image")
    (directory / "data/chunk-000/episode_000001.parquet").unlink()
    with pytest.raises(UserError, match=r"episode_000001\.parquet is missing; the source is incomplete"):
        run_import("lerobot", directory, task="Other")
    directory = change_info(source("lerobot_v3.0_image"), total_episodes=3)
    with pytest.raises(UserError, match="lists 2 episodes of 3"):
        run_import("lerobot", directory)


def test_a_shorter_video_is_no_shorter_episode(run_import, source):
    directory = source("lerobot_v2.1_video")
    videos = directory / "videos/chunk-000/observation.images.front"
    shutil.copy(videos / "episode_000000.mp4", videos / "episode_000001.mp4")  # 5 pictures for 8 frames
    with pytest.raises(UserError, match=r"episode_000001\.mp4 has no picture at 0\.500 s"):
        run_import("lerobot", directory)


def test_another_version_or_no_dataset_is_refused(run_import, source, tmp_path):
    with pytest.raises(UserError, match=r"version v1\.6; v2\.0, v2\.1 and v3\.0 can be imported"):
        run_import("lerobot", change_info(source("lerobot_v2.1_image"), codebase_version="v1.6"))
    with pytest.raises(UserError, match="does not exist, and is no hub id"):
        run_import("lerobot", tmp_path / "nowhere")
