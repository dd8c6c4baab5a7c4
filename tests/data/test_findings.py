"""Each finding is found in data with exactly that fault, alone, and nothing is found in sound data."""

import functools

import numpy as np
import pytest
from demonstrations import write_dataset, write_sound_dataset
from faults import BAD, FAULTS

from robofactory.codec.statistics import Statistics
from robofactory.data import lerobot
from robofactory.data.episodes import DatasetReader
from robofactory.data.findings import ERROR, KINDS, NOTE, WARNING, find, require_sound
from robofactory.data.survey import survey
from robofactory.errors import UserError

ERRORS = [name for name, kind in KINDS.items() if kind.level == ERROR]
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


@pytest.mark.parametrize("name", ERRORS)
def test_training_does_not_begin_with_an_error_that_is_not_accepted(name, faulty):
    directory = faulty(name)
    with pytest.raises(UserError, match=rf"{name}: .*data\.accept='\[{name}\]'") as stopped:
        require_sound([directory], VIEWS, [])
    assert "\n" not in str(stopped.value)
    require_sound([directory], VIEWS, [name])


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
