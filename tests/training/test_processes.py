"""Several processes train one policy: the same steps as one, whoever holds which part."""

import json
import os
import signal

import pytest

from benchmarks.small_runs import NUM_EPISODES, TASK, differences, everything, start, start_in_processes
from robofactory.config import EXIT_STOPPED, run_dir
from robofactory.training import distributed

# The sums of gradients are in another order, and matrix products of other batch sizes in other blocks. Weights move by
# at most the learning rate (1e-3) a step; where a gradient is all rounding, Adam makes a whole step of it.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-3, 2e-3


@pytest.fixture
def run(home):
    return run_dir("openvla", TASK, 0, NUM_EPISODES)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def moved(run, home, name):
    result = everything(run) | {"lines": lines_of(run)}
    run.rename(home / name)
    return result


def test_two_processes_equal_one_that_accumulates_bit_for_bit(run, home):
    """The micro-batches are the same, and of two numbers the sum is the same either way round."""
    assert start_in_processes(2, "dataloader.batch_size=4", "training.num_epochs=2") == [0, 0]
    two = moved(run, home, "two")
    start("dataloader.batch_size=4", "training.gradient_accumulate_every=2", "training.num_epochs=2")
    assert differences(everything(run)["weights"], two["weights"]) == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_whole_batch(run, home, parallel):
    """50 frames in steps of 8: every step is uneven between the processes or smaller than the others."""
    assert start_in_processes(2, "dataloader.batch_size=4", f"training.parallel={parallel}") == [0, 0]
    two = moved(run, home, "two")
    start()
    one = everything(run) | {"lines": lines_of(run)}
    for a, b in zip(one["lines"], two["lines"], strict=True):
        for name in ("train_loss", "val_loss", "grad_norm", "action_mae_rad", "action_accuracy"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=0.02, abs=LOSS_TOLERANCE), (name, a["step"])
    off = {k: (v - two["weights"][k]).abs().mean().item() for k, v in one["weights"].items()}
    assert max(off.values()) < WEIGHT_TOLERANCE, off


def test_a_run_in_parts_goes_on_whole_and_the_reverse(run, home):
    """Sharded over two processes, then one, then two with copies; each time from the other's checkpoint."""
    assert start_in_processes(2, "dataloader.batch_size=4", "training.parallel=fsdp", "training.max_steps=5") == [0, 0]
    first = everything(run)
    start("training.max_steps=9", resume=True)
    assert everything(run)["state"]["update"] == 9
    overrides = ("dataloader.batch_size=4", "training.max_steps=14")
    assert start_in_processes(2, *overrides, "training.parallel=fsdp", resume=True) == [0, 0]
    last = everything(run)
    assert last["state"]["update"] == 14
    assert first["weights"].keys() == last["weights"].keys()
    assert {k: v.shape for k, v in first["weights"].items()} == {k: v.shape for k, v in last["weights"].items()}
    assert first["state"]["moments"].keys() == last["state"]["moments"].keys()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_stopped_run_of_two_processes_goes_on_exactly(run, home, monkeypatch, parallel):
    """The signal reaches one of them only."""
    overrides = ("dataloader.batch_size=4", f"training.parallel={parallel}", "training.num_epochs=2")
    assert start_in_processes(2, *overrides) == [0, 0]
    undisturbed = moved(run, home, "undisturbed")

    with monkeypatch.context() as during:
        seed_step = distributed.seed_step

        def seed(seed, update, topology):
            if update == 8 and topology.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            seed_step(seed, update, topology)

        during.setattr(distributed, "seed_step", seed)
        assert start_in_processes(2, *overrides) == [EXIT_STOPPED, EXIT_STOPPED]
    assert (run / "latest").resolve().name == "step_9"
    assert start_in_processes(2, *overrides, resume=True) == [0, 0]
    undisturbed.pop("lines")
    assert differences(everything(run), undisturbed) == []
