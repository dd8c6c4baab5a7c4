"""The preflight finds, in seconds, what would otherwise cost a training run."""

import dataclasses

import numpy as np
import pytest
import torch

from robofactory.checkpoint import build_model
from robofactory.data.dataset import load_splits
from robofactory.errors import UserError
from robofactory.paths import dataset_dir
from robofactory.shapes import Batch
from robofactory.training.preflight import _labels_decode_to_the_actions, preflight
from tests.codec.codec_samples import NAMES, create, make_recipe
from tests.training.conftest import NUM_EPISODES, TASK

CPU = torch.device("cpu")


@pytest.fixture
def data(home, recipe):
    return load_splits(dataset_dir(TASK, 0, NUM_EPISODES), recipe)


@pytest.fixture
def model(data, recipe):
    return build_model(recipe, data.codec)


def test_a_sound_set_up_passes_and_is_left_as_it_was(data, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    preflight(model, model, data.codec, *data.examples(8, CPU))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labels_of_another_dataset_are_found(data, model):
    batch, actions = data.examples(8, CPU)
    with pytest.raises(UserError, match="labels do not decode back"):
        preflight(model, model, data.codec, batch, np.roll(actions, 3, axis=1))


@pytest.mark.parametrize("method", ["mean_std", "q01_q99", "min_max"])
@pytest.mark.parametrize("offset", [3000.0, 1e6])
def test_labels_of_servo_ticks_with_a_large_offset_pass(method, offset):
    """Joints of 3000 +- 2 were refused: half a bin is 0.008, and float32 is off by 0.0001 there."""
    ticks = np.float32(offset) + np.random.default_rng(0).integers(-2, 3, (400, 8)).astype(np.float32)
    codec = create(make_recipe(method), ticks, ticks, NAMES, {}, pass_through=[])
    tokens = torch.from_numpy(codec.encode_actions(ticks))
    batch = Batch(torch.zeros(400, 3, 6, 2, 2), torch.zeros(400, 3).long(), torch.ones(400, 3).bool(), None, tokens, torch.zeros(400).long())  # fmt: skip
    _labels_decode_to_the_actions(codec, batch, ticks)
    with pytest.raises(UserError, match=r"labels do not decode back to the actions: dimension \d is off by [1-4]"):
        _labels_decode_to_the_actions(codec, batch, np.roll(ticks, 1, axis=0))


@pytest.mark.parametrize("view", [0, 2])
def test_a_view_that_the_model_does_not_see_is_found(data, model, monkeypatch, view):
    see = model.action_logits

    def blind(batch):
        pixels = batch.pixel_values.clone()
        pixels[:, view] = 0.0
        return see(dataclasses.replace(batch, pixel_values=pixels))

    monkeypatch.setattr(model, "action_logits", blind)
    with pytest.raises(UserError, match=f"view '{data.codec.views[view]}' does not change the logits"):
        preflight(model, model, data.codec, *data.examples(8, CPU))


def test_a_deaf_proprio_token_is_found(data, model):
    with torch.no_grad():
        model.proprio_projector.fc2.weight.zero_()
    with pytest.raises(UserError, match="proprio does not change the logits"):
        preflight(model, model, data.codec, *data.examples(8, CPU))


def test_a_tensor_without_gradient_is_found_by_name(data, model):
    model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"no gradient reaches 2 trainable tensors: unused\.weight, unused\.bias"):
        preflight(model, model, data.codec, *data.examples(8, CPU))
