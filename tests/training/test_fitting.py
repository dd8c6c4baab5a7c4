"""Out of memory is explained, or avoided before training starts."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.small_runs import NUM_EPISODES, SMALL, TASK, differences, everything, start
from robofactory.config import UserError, load_recipe, run_dir
from robofactory.model.openvla import OpenVLA
from robofactory.training import fitting


@pytest.fixture
def run(home):
    return run_dir("openvla", TASK, 0, NUM_EPISODES)


@pytest.fixture
def small_gpu(monkeypatch):
    """A device that has no room for more than 2 samples."""
    forward = OpenVLA.forward

    def limited(self, batch, *given):
        is_real = not isinstance(batch.pixel_values, FakeTensor)  # the memory predictor's are not
        if self.training and is_real and len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return forward(self, batch, *given)

    monkeypatch.setattr(OpenVLA, "forward", limited)


def test_out_of_memory_is_one_line_with_both_remedies(run, small_gpu):
    recipe = load_recipe("robot_openvla_tiny", SMALL)
    with (
        pytest.raises(UserError) as raised,
        fitting.out_of_memory_explained(recipe),
    ):
        start()
    line = str(raised.value)
    assert "\n" not in line and "CUDA out of memory" in line
    assert "dataloader.batch_size=4 training.gradient_accumulate_every=2" in line and "auto_batch" in line
    assert re.search(r"\(\d+\.\d GB predicted\)", line)


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
