"""Out of memory is explained, or avoided before training starts."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.small_runs import NUM_EPISODES, SMALL, TASK, differences, everything, start
from robofactory.config import load_recipe
from robofactory.errors import UserError
from robofactory.model.openvla import OpenVLA
from robofactory.paths import run_dir
from robofactory.training import fitting, proposal
from robofactory.training.footprint import predict


@pytest.fixture
def run(home):
    return run_dir("openvla", TASK, 0, NUM_EPISODES)


@pytest.fixture
def small_gpu(monkeypatch):
    """A device that has no room for more than 2 samples; its memory in GB."""
    forward = OpenVLA.forward

    def limited(self, batch, *given):
        is_real = not isinstance(batch.pixel_values, FakeTensor)  # the memory predictor's are not
        if self.training and is_real and len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return forward(self, batch, *given)

    two = proposal.with_settings(load_recipe("robot_openvla_tiny", SMALL), samples=8, batch_size=2, num_recomputed=0)
    gpu_gb = proposal.needed_gb(predict(two).peak_gb)
    monkeypatch.setattr(OpenVLA, "forward", limited)
    monkeypatch.setattr(fitting, "card_gb", lambda: gpu_gb)
    return gpu_gb


def explained(recipe):
    """The one line that a user reads when CUDA has no more memory."""
    with pytest.raises(UserError) as raised, fitting.out_of_memory_explained(recipe):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    line = str(raised.value)
    assert "\n" not in line and "CUDA out of memory" in line
    return line


def settings_in(line):
    return re.findall(r"(?:dataloader|training)\.(?:batch_size|gradient_accumulate_every|num_recomputed_layers)=\d+", line.partition(";")[2])  # fmt: skip


def test_out_of_memory_is_one_line_with_settings_that_fit_the_card(run, small_gpu):
    """It named half the batch, whether or not that fits."""
    recipe = load_recipe("robot_openvla_tiny", SMALL)
    with pytest.raises(UserError) as raised, fitting.out_of_memory_explained(recipe):
        start()
    line = str(raised.value)
    assert "\n" not in line and "CUDA out of memory" in line and "auto_batch" in line
    assert re.search(r"\(\d+\.\d GB predicted\)", line)
    chosen = load_recipe("robot_openvla_tiny", [*SMALL, *settings_in(line)])
    assert chosen.dataloader.batch_size * chosen.training.gradient_accumulate_every == 8
    assert proposal.needed_gb(predict(chosen).peak_gb) <= small_gpu < proposal.needed_gb(predict(recipe).peak_gb)


def test_without_a_prediction_any_batch_is_made_smaller_at_the_same_steps(monkeypatch):
    """Half of 9 is 4, and twice that is no 9."""
    recipe = load_recipe("robot_openvla", ["training.parallel=fsdp", "dataloader.batch_size=9"])
    assert settings_in(explained(recipe)) == ["dataloader.batch_size=3", "training.gradient_accumulate_every=3"]
    recipe = load_recipe("robot_openvla", ["training.parallel=fsdp", "dataloader.batch_size=16"])
    assert settings_in(explained(recipe)) == ["dataloader.batch_size=8", "training.gradient_accumulate_every=2"]


def test_what_should_have_fitted_and_what_never_will_are_told_apart(monkeypatch):
    recipe = load_recipe("robot_openvla_tiny", SMALL)
    monkeypatch.setattr(fitting, "card_gb", lambda: 80.0)
    assert "it should fit" in explained(recipe) and "nvidia-smi" in explained(recipe)
    monkeypatch.setattr(fitting, "card_gb", lambda: 0.5)
    assert "use a GPU with more memory" in explained(recipe) and settings_in(explained(recipe)) == []


def test_auto_batch_trains_as_if_the_batch_that_fits_had_been_given(run, home, small_gpu):
    start("training.auto_batch=true", "training.num_epochs=2")
    found = everything(run)
    run.rename(home / "found")
    start("dataloader.batch_size=2", "training.gradient_accumulate_every=4", "training.num_epochs=2")
    assert differences(found, everything(run)) == []


def test_a_batch_that_cannot_be_halved_is_refused(run, small_gpu):
    with pytest.raises(UserError, match=r"batch_size=3, which cannot be halved"):
        start("training.auto_batch=true", "dataloader.batch_size=3")


def test_a_sharded_model_is_not_tried_alone():
    with pytest.raises(UserError, match=r"training\.auto_batch.*needs training\.parallel=ddp"):
        load_recipe("robot_openvla_tiny", ["training.auto_batch=true", "training.parallel=fsdp"])
