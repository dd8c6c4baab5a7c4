"""A checkpoint appears whole or not at all, and a damaged one is refused by the name of its file."""

import numpy as np
import pytest
import torch

from robofactory import checkpoint
from robofactory.codec.codec import Codec
from robofactory.config import UserError, find_checkpoint, load_recipe
from robofactory.policy import Policy
from robofactory.shapes import Observation

VIEWS = ("side", "overhead", "wrist")
STATE = {"update": 3, "epoch": 1, "micro": 0}


@pytest.fixture(scope="module")
def parts():
    """(model, codec, recipe) of a very small model."""
    sizes = {"dino": "{embed_dim: 32, depth: 2, num_heads: 2}", "siglip": "{embed_dim: 32, depth: 2, num_heads: 2}"}
    sizes["language"] = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
    overrides = [f"model.architecture.{name}={size}" for name, size in sizes.items()]
    recipe = load_recipe("robot_openvla_tiny", ["model.architecture.image_size=28", *overrides])
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 8))
    codec = Codec.create(recipe, actions, actions, [f"joint{i}" for i in range(1, 8)] + ["gripper"], {})
    torch.manual_seed(0)
    return checkpoint.build_model(recipe, codec).eval(), codec, recipe


def observation(seed=0):
    random = np.random.default_rng(seed)
    images = {view: random.integers(0, 256, (24, 32, 3), np.uint8) for view in VIEWS}
    return Observation(images, random.uniform(-1, 1, 8).astype(np.float32), "lift the barrier")


def test_a_saved_policy_acts_as_the_model_in_memory(parts, tmp_path):
    model, codec, recipe = parts
    checkpoint.save(tmp_path, "epoch_1", model, codec, recipe, STATE)
    observations = [observation(seed) for seed in range(3)]
    actions = Policy.load(tmp_path / "latest").act(observations)
    assert actions.shape == (3, 8) and actions.dtype == np.float32
    np.testing.assert_array_equal(actions, Policy(model, codec).act(observations))


def test_a_policy_answers_each_observation_of_a_batch_as_if_alone(parts):
    model, codec, _ = parts
    observations = [observation(seed) for seed in range(4)]
    one_by_one = np.concatenate([Policy(model, codec).act([each]) for each in observations])
    bins_off = np.abs(codec.encode_actions(Policy(model, codec).act(observations)) - codec.encode_actions(one_by_one))
    assert (bins_off == 0).mean() > 0.9, "bf16 rounding may turn a near tie, no more"


def test_the_last_action_makes_the_next_one_faster_and_never_another(parts):
    """A policy remembers it as a draft; what it remembers may be of another episode, or of another robot."""
    model, codec, _ = parts
    observations = [observation(seed) for seed in (0, 0, 1, 1)]
    policy, fresh, passes = Policy(model, codec), Policy(model, codec), []
    for each in observations:
        fresh.start_episode(seed=0)
        expected = fresh.act([each])
        before = policy.num_passes
        np.testing.assert_array_equal(policy.act([each]), expected)
        passes.append(policy.num_passes - before)
    assert passes[1] <= passes[0] and passes[3] <= passes[2], "the same observation again: its draft is right"
    assert policy.act(observations).shape == (4, 8), "a batch of another size starts without a draft"


def test_a_full_disk_leaves_the_previous_checkpoint(parts, tmp_path, monkeypatch):
    model, codec, recipe = parts
    checkpoint.save(tmp_path, "epoch_1", model, codec, recipe, STATE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match=r"cannot save .*epoch_2 .*No space left"):
        checkpoint.save(tmp_path, "epoch_2", model, codec, recipe, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1", "latest"]
    assert (tmp_path / "latest").resolve().name == "epoch_1"
    checkpoint.load_model(tmp_path / "latest")


def test_saving_the_same_epoch_again_replaces_it(parts, tmp_path):
    model, codec, recipe = parts
    checkpoint.save(tmp_path, "epoch_1", model, codec, recipe, STATE)
    checkpoint.save(tmp_path, "epoch_1", model, codec, recipe, STATE | {"update": 9})
    assert checkpoint.load_training_state(tmp_path / "latest")["update"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1", "latest"]


@pytest.mark.parametrize("name", ["modules.safetensors", "codec.json", "config.yaml"])
def test_a_missing_file_is_named(parts, tmp_path, name):
    checkpoint.save(tmp_path, "epoch_1", *parts, STATE)
    (tmp_path / "epoch_1" / name).unlink()
    with pytest.raises((UserError, FileNotFoundError), match=name):
        Policy.load(tmp_path / "epoch_1")


def test_truncated_weights_are_refused(parts, tmp_path):
    checkpoint.save(tmp_path, "epoch_1", *parts, STATE)
    path = tmp_path / "epoch_1" / "modules.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"modules\.safetensors cannot be read"):
        Policy.load(tmp_path / "epoch_1")


def test_an_unknown_checkpoint_lists_those_there_are(parts, tmp_path):
    checkpoint.save(tmp_path / "run", "epoch_1", *parts, STATE)
    with pytest.raises(UserError, match=r"no checkpoint 'epoch_7'; .*latest, epoch_1"):
        find_checkpoint(tmp_path / "run", "epoch_7")
    with pytest.raises(UserError, match="train it first"):
        find_checkpoint(tmp_path / "nothing", "latest")
