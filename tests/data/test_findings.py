"""Each finding is found in data with exactly that fault, alone, and nothing is found in sound data."""

import functools
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from demonstrations import write_dataset, write_sound_dataset
from faults import BAD, FAULTS, put_picture
from PIL import Image

from robofactory.codec.statistics import Statistics
from robofactory.config import load_recipe
from robofactory.data import lerobot
from robofactory.data.dataset import FrameDataset, load_splits
from robofactory.data.episodes import DatasetReader
from robofactory.data.findings import ERROR, KINDS, NOTE, WARNING, find, require_sound
from robofactory.data.order import FrameKey
from robofactory.data.survey import survey
from robofactory.errors import UserError

ERRORS = [name for name, kind in KINDS.items() if kind.level == ERROR]
FINAL = {"not_finite", "missing_episodes", "unreadable_image", "empty_instruction"}  # no policy can be trained on these
VIEWS = ("side", "overhead", "wrist")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The dataset with a fault, written once."""
    return functools.cache(lambda name: FAULTS[name](tmp_path_factory.mktemp(name) / "set"))


def test_sound_demonstrations_have_no_finding(tmp_path):
    assert find(survey(write_sound_dataset(tmp_path / "set"))) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_fault_is_found_by_its_name_and_nothing_else_is(name, faulty):
    found = find(survey(faulty(name)))
    assert [each.name for each in found] == [name], found
    assert "\n" not in found[0].what + found[0].todo


def load(directory, *overrides):
    """As training does: the door, then everything that it trains on, and a frame of each episode."""
    own = directory / "meta/robofactory.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"scene_yaml": ""}))
    recipe = load_recipe("robot_openvla_tiny", [f"data.datasets={{{directory}: 1}}", "data.val_ratio=0.3", *overrides])
    require_sound([directory], recipe.data.views, recipe.data.accept, recipe.data.pass_through)
    data = load_splits(Path("unused"), recipe)
    frames = FrameDataset(data.train, data.codec, augment_seed=None)
    return [frames[FrameKey(0, row)] for row in range(0, len(frames), 40)]


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_stops_training_and_is_accepted_exactly_where_the_line_says_so(name, faulty):
    """data.accept was offered for NaN and broken pictures, which training refuses in any case."""
    directory = faulty(name)
    with pytest.raises(UserError, match=f"{name}: ") as stopped:
        load(directory)
    assert "\n" not in str(stopped.value)
    if f"data.accept='[{name}]'" in str(stopped.value):
        assert len(load(directory, f"data.accept=[{name}]")) > 2
    else:
        with pytest.raises(UserError) as still:
            load(directory, f"data.accept=[{name}]")
        assert "\n" not in str(still.value) and name in FINAL


def test_a_gripper_in_metres_is_not_offered_to_be_accepted(tmp_path):
    """What passes through and hardly moves is refused by the codec too."""
    metres = np.where(np.arange(8) == 7, 0.02, 1.0).astype(np.float32)
    offset = np.where(np.arange(8) == 7, 0.02, 0.0).astype(np.float32)
    directory = write_sound_dataset(tmp_path / "set", change=lambda e: replace(e, actions=e.actions * metres + offset))
    with pytest.raises(UserError, match=r"gripper_range: .*data\.pass_through=\[\]\. See robofactory inspect \S+$"):
        load(directory)
    with pytest.raises(UserError, match="moves too little to be resolved"):
        load(directory, "data.accept=[gripper_range]")
    assert load(directory, "data.pass_through=[]")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_timestamp_that_is_no_number_is_an_error(tmp_path, value):
    """NaN compares with nothing, so no distance between frames was irregular."""
    file = lerobot.data_file(write_sound_dataset(tmp_path / "set"), 2)
    table = lerobot.open_parquet(file).read()
    times = lerobot.to_numpy(table["timestamp"]).copy()
    times[5] = value
    file.write_bytes(lerobot.to_parquet(table.set_column(table.schema.get_field_index("timestamp"), "timestamp", pa.array(times))))  # fmt: skip
    (found,) = find(survey(tmp_path / "set"))
    assert found.name == "not_finite" and f"the timestamp of frame 5 is {value}" in found.what
    with pytest.raises(UserError, match=r"file-002\.parquet: timestamp is not finite"):
        DatasetReader(tmp_path / "set")


def test_an_event_of_one_value_and_servo_ticks_have_no_finding_about_their_bins(tmp_path):
    """98 % of exactly one value is what q01_q99 handles; whole ticks far from zero are no noise."""

    def change(episode):
        actions = episode.actions.copy()
        actions[:, 3] = (np.arange(40) == 20) * (episode.seed == 1) * np.float32(0.5)
        actions[:, 4] = np.float32(3000) + np.random.default_rng(episode.seed).integers(-2, 3, 40)
        return replace(episode, actions=actions)

    names = {each.name for each in find(survey(write_sound_dataset(tmp_path / "set", change=change)))}
    assert not names & {"rare_event", "noise_only", "outliers"}


@pytest.mark.parametrize(
    ("picture", "what"),
    [
        (lambda image: image.resize((16, 12)), "is 16x12 px, 8-bit RGB"),
        (lambda image: image.convert("L"), "is 32x24 px, 8-bit grey"),
        (lambda image: image.convert("RGBA"), "is 32x24 px, 8-bit RGBA"),
        (lambda image: image.convert("I;16"), "is 32x24 px, 16-bit grey"),
        (lambda image: image.convert("P"), "is 32x24 px, 8-bit palette"),
    ],
)
def test_a_picture_of_another_kind_in_one_frame_is_found_and_never_trained_on(tmp_path, picture, what):
    """A quick survey decodes 4 frames of an episode; this is in another one."""
    file, stream = lerobot.data_file(write_sound_dataset(tmp_path / "set"), 4), io.BytesIO()
    picture(Image.new("RGB", (32, 24))).save(stream, "PNG")
    put_picture(file, "wrist", 7, stream.getvalue())
    (found,) = find(survey(tmp_path / "set"))
    assert found.name == "unreadable_image"
    assert found.what == f"view 'wrist' of episode 4: frame 7 {what}, not 32x24 px, 8-bit RGB"
    with pytest.raises(
        UserError, match=rf"file-004\.parquet: episode 4, frame 7, view 'wrist': the picture {what}, not"
    ):
        DatasetReader(tmp_path / "set")
    assert DatasetReader(tmp_path / "set", ["side"]).num_episodes == 6


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.level in (WARNING, NOTE)])
def test_training_begins_with_warnings_and_notes(name, faulty):
    directory = faulty(name)
    assert [each.name for each in find(survey(directory, VIEWS))] == [name]
    require_sound([directory], VIEWS, [])


def test_a_fault_in_a_view_that_is_not_used_stops_nothing(faulty):
    directory, others = faulty("black_camera"), ("side", "overhead")
    with pytest.raises(UserError, match="black_camera"):
        require_sound([directory], VIEWS, [])
    assert find(survey(directory, others)) == []
    require_sound([directory], others, [])


def test_what_passes_through_is_judged_as_the_recipe_says(tmp_path):
    """A gripper in metres is wrong where it passes through to the bins, and right where it is normalised."""
    directory = FAULTS["gripper_range"](tmp_path / "set")
    with pytest.raises(UserError, match="gripper_range"):
        require_sound([directory], VIEWS, [], pass_through=["gripper"])
    assert find(survey(directory, VIEWS, pass_through=[])) == []
    require_sound([directory], VIEWS, [], pass_through=[])


def test_an_accepted_name_that_is_no_error_is_refused():
    for name, meant in {"action_equal_state": "did you mean 'action_equals_state'", "outliers": "is no error"}.items():
        with pytest.raises(UserError, match=meant):
            require_sound([], VIEWS, [name])


def test_several_errors_are_named_at_once(tmp_path):
    directory = FAULTS["black_camera"](tmp_path / "set")
    file = lerobot.data_file(directory, 1)
    table = lerobot.open_parquet(file).read()
    file.write_bytes(lerobot.to_parquet(table.slice(0, 30)))
    with pytest.raises(
        UserError, match=r"length_mismatch: .*\(also black_camera\).*'\[length_mismatch, black_camera\]'"
    ):
        require_sound([directory], VIEWS, [])


@pytest.mark.parametrize("name", ["black_camera", "frozen_camera", "duplicated_camera", "swapped_cameras", "empty_instruction"])  # fmt: skip
def test_the_episodes_with_the_fault_are_named(name, faulty):
    (found,) = find(survey(faulty(name)))
    assert f"episodes {BAD[0]}, {BAD[1]}" in found.what


def test_random_numbers_are_no_demonstrations(tmp_path):
    """What the other tests train on jumps about."""
    assert [each.name for each in find(survey(write_dataset(tmp_path / "set")))] == ["discontinuities"]


def test_a_survey_has_the_statistics_that_the_codec_takes(tmp_path):
    directory = write_sound_dataset(tmp_path / "set")
    facts, reader = survey(directory), DatasetReader(directory)
    names = reader.description.joint_names
    for method, mine in facts.statistics().items():
        theirs = Statistics.measure(reader.all_actions, names, method, names[-1:])
        np.testing.assert_allclose(mine.bounds, theirs.bounds, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(mine.std, theirs.std, rtol=1e-9)
        assert mine.count == theirs.count and (mine.normalized == theirs.normalized).all()


def test_a_large_dataset_is_sampled_and_its_extremes_are_exact(tmp_path, monkeypatch):
    directory = write_sound_dataset(tmp_path / "set")
    monkeypatch.setattr("robofactory.data.survey.SAMPLE_FRAMES", 50)
    facts, reader = survey(directory), DatasetReader(directory)
    np.testing.assert_array_equal(facts.actions.sample, reader.all_actions[::5])
    np.testing.assert_array_equal(facts.actions.max, reader.all_actions.max(0))
    assert facts.num_frames == reader.num_frames
