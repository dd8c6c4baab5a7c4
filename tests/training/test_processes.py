"""Several processes train one policy: the same steps as one, whoever holds which part."""

import json

import pytest

from benchmarks import small_runs
from benchmarks.resuming import stopped_during
from benchmarks.small_runs import NUM_EPISODES, SMALL, TASK, differences, everything, start, start_in_processes
from robofactory.errors import EXIT_STOPPED
from robofactory.paths import run_dir
from tests.published import write_published

# The sums of gradients are in another order, and matrix products of other batch sizes in other blocks. Weights move by
# at most the learning rate (1e-3) a step; where a gradient is all rounding, Adam makes a whole step of it.
WEIGHT_TOLERANCE = 2e-3
TOLERANCES = {
    **dict.fromkeys(("train_loss", "val_loss", "grad_norm"), 2e-3),
    # Where two bins are nearly as likely, a token flips: four of the 232 of the shortest line.
    **dict.fromkeys(("action_accuracy", "action_mae_rad"), 0.02),
}


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
    require_close(moved(run, home, "one"), two)


def require_close(one, two):
    for a, b in zip(one["lines"], two["lines"], strict=True):
        for name in TOLERANCES.keys() & a.keys():
            assert a[name] == pytest.approx(b[name], rel=0.02, abs=TOLERANCES[name]), (name, a["step"])
    off = {k: (v - two["weights"][k]).abs().mean().item() for k, v in one["weights"].items()}
    assert max(off.values()) < WEIGHT_TOLERANCE, off


@pytest.fixture
def fine_tuning(tmp_path, monkeypatch):
    """What is trained as the 7B is: adapters in float32 on a base in bfloat16, all layers recomputed."""
    weights = write_published(tmp_path / "weights")
    of_the_data = [override for override in SMALL if override.startswith("data")]
    monkeypatch.setattr(small_runs, "RECIPE", "robot_openvla")
    # The norm of a gradient in parts is summed in another order: where it clips nothing, all else is the same bits.
    monkeypatch.setattr(small_runs, "SMALL", [*of_the_data, f"model.model_name={weights}", "model.lora_rank=4", "training.max_grad_norm=1e6", "training.num_epochs=2"])  # fmt: skip


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_on_a_bfloat16_base_are_trained_by_two_as_by_one_bit_for_bit(run, home, fine_tuning, parallel):
    """The path of the 7B with --gpus, against one process that accumulates the same micro-batches and recomputes nothing."""
    assert start_in_processes(2, "dataloader.batch_size=4", f"training.parallel={parallel}") == [0, 0]
    two = moved(run, home, "two")
    start("dataloader.batch_size=4", "training.gradient_accumulate_every=2", "training.num_recomputed_layers=0")
    one = moved(run, home, "one")
    assert len(one["weights"]) == 2 * 7 * 3, "A and B of seven matrices in three layers"
    assert all(tensor.count_nonzero() > 0 for tensor in one["weights"].values()), "every B began at zero"
    assert differences(one["weights"], two["weights"]) == []
    assert differences(one["state"]["moments"], two["state"]["moments"]) == []


def test_a_run_in_parts_goes_on_whole_and_the_reverse(run, home):
    """In parts in two processes, whole in one, then whole in two, each from the other's checkpoint: with the numbers of a
    run that did none of this."""
    start("training.num_epochs=2")
    undisturbed = moved(run, home, "undisturbed")
    halves = ("dataloader.batch_size=4", "training.num_epochs=2")
    with stopped_during(4, micro=0):
        assert start_in_processes(2, *halves, "training.parallel=fsdp") == [EXIT_STOPPED] * 2
    with stopped_during(9, micro=0):
        assert start_in_processes(1, "training.num_epochs=2", resume=True) == [EXIT_STOPPED]
    assert (run / "latest").resolve().name == "step_10"
    assert start_in_processes(2, *halves, "training.parallel=ddp", resume=True) == [0, 0]
    require_close(moved(run, home, "disturbed"), undisturbed)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_stopped_run_of_two_processes_goes_on_exactly(run, home, parallel):
    """The signal reaches one of them only."""
    overrides = ("dataloader.batch_size=4", f"training.parallel={parallel}", "training.num_epochs=2")
    assert start_in_processes(2, *overrides) == [0, 0]
    undisturbed = moved(run, home, "undisturbed")
    with stopped_during(8, micro=0):
        assert start_in_processes(2, *overrides) == [EXIT_STOPPED, EXIT_STOPPED]
    assert (run / "latest").resolve().name == "step_9"
    assert start_in_processes(2, *overrides, resume=True) == [0, 0]
    undisturbed.pop("lines")
    assert differences(everything(run), undisturbed) == []
