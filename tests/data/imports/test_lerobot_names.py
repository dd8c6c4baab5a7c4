"""The names of dimensions, in every shape in which public LeRobot datasets write them."""

import json

import pytest
from small_lerobot import change_feature, change_info, old_data, open_source, rows, write_old, write_table

from robofactory.codec.statistics import grippers
from robofactory.errors import UserError

ARM = ("shoulder", "elbow", "gripper")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["shoulder", "elbow", "gripper"], ARM),
        ([["shoulder", "elbow", "gripper"]], ARM),
        ([["shoulder", "elbow"], ["gripper"]], ARM),
        ({"motors": ["shoulder", "elbow", "gripper"]}, ARM),
        ({"axes": ["shoulder", "elbow", "gripper"]}, ARM),
        ({"motors": [["shoulder", "elbow", "gripper"]]}, ARM),
        ({"shoulder": 0, "elbow": 1, "gripper": 2}, ARM),
        ({"gripper": 2, "shoulder": 0, "elbow": 1}, ARM),
        ({"0": "shoulder", "1": "elbow", "2": "gripper"}, ARM),
        ({"shoulder": "float32", "elbow": [2, "sts3215"], "gripper": [6, "sts3215"]}, ARM),
        ({"shoulder": None, "elbow": None, "gripper": None}, ARM),
        ({"arm": ["shoulder", "elbow"], "hand": ["gripper"]}, ARM),
        ({"left": ["x", "y"], "right": ["x"]}, ("left_x", "y", "right_x")),
        ({"arm": ["shoulder", "elbow"], "gripper": ["position"]}, ("shoulder", "elbow", "gripper_position")),
        ({"motors": ["x", "gripper", "gripper"]}, ("x", "gripper_0", "gripper_1")),
        (["gripper", "gripper", "gripper_0"], ("gripper_1", "gripper_2", "gripper_0")),
        ([0, 1, 2], ("0", "1", "2")),
        (None, ("action_0", "action_1", "action_2")),
    ],
)
def test_names_are_read_in_whatever_shape_they_come(tmp_path, names, expected):
    source = open_source(change_feature(write_old(tmp_path / "source"), "action", names=names))
    assert source.action_names == expected
    assert source.notes == []


@pytest.mark.parametrize(
    "names",
    [["state"], ["a", "b", "c", "gripper"], {"motors": ["a", "gripper"]}, "joints", ["a", "b", ""], [1.5, 2, 3]],
)
def test_names_that_do_not_fit_are_numbers_and_said(tmp_path, names):
    source = open_source(change_feature(write_old(tmp_path / "source"), "action", names=names))
    assert source.action_names == ("action_0", "action_1", "action_2")
    (note,) = source.notes
    assert note.startswith("the names of action in meta/info.json do not fit its 3 dimensions")


def test_the_spans_of_modality_json_name_what_info_json_does_not(tmp_path):
    root = change_feature(write_old(tmp_path / "source"), "action", names=None)
    spans = {"action": {"gripper": {"start": 2, "end": 3}, "arm": {"start": 0, "end": 2, "original_key": "action"}}}
    (root / "meta/modality.json").write_text(json.dumps(spans))
    assert open_source(root).action_names == ("arm_0", "arm_1", "gripper")
    spans["action"]["arm"]["end"] = 1  # a dimension that none names
    (root / "meta/modality.json").write_text(json.dumps(spans))
    assert open_source(root).action_names == ("action_0", "action_1", "action_2")
    spans["action"]["arm"]["end"] = "two"
    (root / "meta/modality.json").write_text(json.dumps(spans))
    with pytest.raises(UserError, match=r"modality\.json: key 'action\.arm\.end' is \"two\"; needed: a valid integer"):
        open_source(root)


def test_one_feature_for_each_joint_is_joined_under_its_own_name(tmp_path):
    """As recorded by LeRobot's robots before their features are put together; the names may be anything or nothing."""
    root = write_old(tmp_path / "source", lengths=(4,))
    scalars = {
        "action.shoulder_pan.pos": None,
        "action.elbow.pos": ["pos"],
        "action.gripper": ["value"],
        "observation.state.gripper.pos": ["pos"],
    }
    table = rows(0, 4)
    for number, key in enumerate(scalars):
        table = table.append_column(key, [[number + 0.5] * 4])
    write_table(old_data(root, 0), table)
    features = {key: {"dtype": "float32", "shape": [1], "names": names} for key, names in scalars.items()}
    change_info(root, lambda info: info["features"].update(features))

    actions = ("action.shoulder_pan.pos", "action.elbow.pos", "action.gripper")
    source = open_source(root, action_keys=actions, proprio_keys=("observation.state.gripper.pos",))
    assert source.action_names == ("shoulder_pan.pos", "pos", "gripper_value")
    assert source.proprio_names == ("gripper.pos_pos",)
    assert grippers(source.action_names) == ["gripper_value"] and grippers(source.proprio_names)
    recording = source.read(0)
    assert recording.actions.tolist() == [[0.5, 1.5, 2.5]] * 4 and recording.proprio.tolist() == [[3.5]] * 4


def test_joined_vectors_give_no_two_dimensions_one_name(tmp_path):
    source = open_source(write_old(tmp_path / "source"), action_keys=("action", "observation.state"))
    assert len(set(source.action_names)) == 6
    assert grippers(source.action_names) == ["action.gripper", "observation.state.gripper"]


def test_a_vector_of_another_kind_is_named_with_what_it_is(tmp_path):
    root = change_feature(write_old(tmp_path / "source"), "action", shape=[2, 3])
    with pytest.raises(UserError, match=r"action is 'float32' of shape \[2, 3\]; needed: numbers in one dimension"):
        open_source(root)
