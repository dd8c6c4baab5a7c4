"""A checkpoint appears whole or not at all, and a damaged one is refused by the name of its file."""

import contextlib
import os
import shutil

import numpy as np
import pytest
import torch

from robofactory import checkpoint
from robofactory.codec.codec import Codec
from robofactory.codec.statistics import DatasetStatistics
from robofactory.config import load_recipe
from robofactory.errors import UserError
from robofactory.paths import find_checkpoint
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
    names = [f"joint{i}" for i in range(1, 8)] + ["gripper"]
    codec = Codec.create(recipe, {"some": DatasetStatistics.measure(actions, actions, names, "mean_std", {}, 5)})
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

    save = torch.save
    monkeypatch.setattr(checkpoint.torch, "save", lambda state, _: save(state, "/dev/full"))
    with pytest.raises(UserError, match=r"cannot save .*epoch_2 .*is the disk full\?"):
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
    with pytest.raises(UserError, match=r"modules\.safetensors has \d+ bytes instead of \d+: it is truncated"):
        Policy.load(tmp_path / "epoch_1")


@pytest.mark.parametrize("name", ["modules.safetensors", "codec.json", "config.yaml", "training_state.pt"])
def test_one_flipped_bit_is_found_and_another_checkpoint_named(parts, tmp_path, name):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, f"epoch_{epoch}", *parts, STATE)
    path = tmp_path / "epoch_2" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"epoch_2/{name} is damaged: .*another checkpoint \(epoch_1\), or delete"):
        checkpoint.verify(tmp_path / "epoch_2", name)
    load = checkpoint.load_training_state if name == "training_state.pt" else checkpoint.load_model
    with pytest.raises(UserError, match=name):
        load(tmp_path / "epoch_2")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 2}', "\0", '{"format": 2, "update": 1, "keep": true, "files": {}}'])  # fmt: skip
def test_a_foreign_manifest_is_refused(parts, tmp_path, content):
    checkpoint.save(tmp_path, "epoch_1", *parts, STATE)
    (tmp_path / "epoch_1" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json(: key 'format' is| is not valid JSON|: there is \[\])"):
        Policy.load(tmp_path / "epoch_1")


def test_a_recipe_of_another_version_is_one_line(parts, tmp_path):
    """A key that this version does not know was a trace from deep inside."""
    checkpoint.save(tmp_path, "epoch_1", *parts, STATE)
    path = tmp_path / "epoch_1" / "config.yaml"
    path.write_text(path.read_text() + "deployment:\n  robot: panda\n")
    (tmp_path / "epoch_1" / "manifest.json").unlink()
    checkpoint.write_manifest(tmp_path / "epoch_1", update=1, keep=True)
    with pytest.raises(UserError, match=r"config\.yaml: unknown key 'deployment'.*; use the version of robofactory"):
        Policy.load(tmp_path / "epoch_1")


def test_a_directory_without_a_manifest_is_no_checkpoint(parts, tmp_path):
    checkpoint.save(tmp_path, "epoch_1", *parts, STATE)
    (tmp_path / "epoch_1" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        Policy.load(tmp_path / "epoch_1")


def test_nothing_on_disk_is_a_pickle_that_runs_code(parts, tmp_path):
    checkpoint.save(tmp_path, "epoch_1", *parts, STATE)
    for path in (tmp_path / "epoch_1").iterdir():
        assert path.suffix in (".safetensors", ".json", ".yaml", ".pt"), path
    torch.load(tmp_path / "epoch_1" / "training_state.pt", weights_only=True)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def kill_at(monkeypatch, nth):
    """The process ends right before the n-th time that it touches the disk in a way that lasts; whether it did."""
    count = [0]

    def guarded(function):
        def call(*given, **named):
            count[0] += 1
            if count[0] == nth:
                raise Killed
            return function(*given, **named)

        return call

    for place, name in [(os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (checkpoint, "save_file")]:
        monkeypatch.setattr(place, name, guarded(getattr(place, name)))
    monkeypatch.setattr(torch, "save", guarded(torch.save))
    return lambda: count[0] >= nth


@pytest.mark.parametrize("again", [False, True], ids=["new", "replaced"])
def test_a_kill_between_any_two_steps_of_saving_leaves_a_whole_checkpoint(parts, tmp_path, monkeypatch, again):
    """`replaced`: the name is there already, as when a run goes on that had ended within an epoch."""
    for nth in range(1, 100):
        run = tmp_path / str(nth)
        checkpoint.save(run, "epoch_1", *parts, STATE | {"update": 1}, keep=False)
        name = "epoch_1" if again else "epoch_2"
        with monkeypatch.context() as during:
            was_killed = kill_at(during, nth)
            with contextlib.suppress(Killed):
                checkpoint.save(run, name, *parts, STATE | {"update": 2})
        newest = checkpoint.settle(run)
        assert newest is not None and newest == (run / "latest").resolve(), nth
        checkpoint.load_model(newest)
        update = checkpoint.load_training_state(newest)["update"]
        assert update in (1, 2), nth
        assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [], nth
        if not was_killed():
            assert update == 2 and nth > 10, "it was tried at every one of them"
            return
    raise AssertionError("it never got to the end")


def test_a_complete_checkpoint_that_was_not_linked_yet_is_the_newest(parts, tmp_path):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, f"epoch_{epoch}", *parts, STATE | {"update": epoch})
    checkpoint._link(tmp_path, "latest", "epoch_1")
    assert checkpoint.settle(tmp_path) == tmp_path / "epoch_2" == (tmp_path / "latest").resolve()


def test_only_what_was_saved_to_go_is_deleted(parts, tmp_path):
    (tmp_path / "mine").mkdir()
    for epoch, keep, best in [(1, False, True), (2, True, False), (3, False, False), (4, False, False)]:
        checkpoint.save(tmp_path, f"epoch_{epoch}", *parts, STATE | {"update": epoch}, keep=keep, best=best)
    names = ["best", "epoch_1", "epoch_2", "epoch_4", "latest", "mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    checkpoint.save(tmp_path, "epoch_5", *parts, STATE | {"update": 5}, keep=False, best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "epoch_2", "epoch_5", "latest", "mine"]


def test_an_unknown_checkpoint_lists_those_there_are(parts, tmp_path):
    """And nothing else: a run has its offline W&B runs and the steps to replay beside them."""
    checkpoint.save(tmp_path / "run", "epoch_1", *parts, STATE)
    for other in ("wandb", "replay/step_3"):
        (tmp_path / "run" / other).mkdir(parents=True)
    with pytest.raises(UserError, match=r"no checkpoint 'epoch_7'; .* has latest, epoch_1$"):
        find_checkpoint(tmp_path / "run", "epoch_7")
    with pytest.raises(UserError, match="train it first"):
        find_checkpoint(tmp_path / "nothing", "latest")
