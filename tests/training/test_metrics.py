"""What is measured is what a person would compute by hand."""

import json
import re

import numpy as np
import pytest
import torch

from benchmarks.small_runs import NUM_EPISODES, TASK, start
from robofactory.config import dataset_dir, run_dir
from robofactory.data.dataset import load_splits
from robofactory.training import log
from robofactory.training.metrics import Meter

CPU = torch.device("cpu")


@pytest.fixture
def data(home, recipe):
    return load_splits(dataset_dir(TASK, 0, NUM_EPISODES), recipe)


def measured(meter, batch, shift, loss=2.0):
    """The meter's means when every token is predicted some ids too high."""
    predicted = batch.action_tokens + torch.tensor(shift)
    entropy = torch.full(predicted.shape, 0.5)
    return meter.measure(torch.tensor(loss), predicted, entropy, batch)


def test_errors_are_those_of_the_decoded_actions(data):
    meter, codec = Meter(data.codec, CPU), data.codec
    batch, _ = data.examples(6, CPU)
    shift = [0, 1, 2, -1, 0, 3, 0, 1]
    means = meter.means(measured(meter, batch, shift).numpy())
    true = codec.decode_actions(batch.action_tokens.numpy())
    error = np.abs(codec.decode_actions((batch.action_tokens + torch.tensor(shift)).numpy()) - true).mean(axis=0)
    names = codec.action_statistics.names
    for k, name in enumerate(names):
        assert means[f"mae/{name}"] == pytest.approx(error[k], rel=1e-4, abs=1e-6)
        assert means[f"accuracy/{name}"] == float(shift[k] == 0)
        assert means[f"within_one_bin/{name}"] == float(abs(shift[k]) <= 1)
        assert means[f"entropy/{name}"] == 0.5
    assert means["action_mae_rad"] == pytest.approx(error[:7].mean(), rel=1e-4)
    assert means["gripper_mae"] == pytest.approx(error[7], rel=1e-4) and means["gripper_accuracy"] == 1.0
    assert means["action_accuracy"] == 3 / 8 and means["loss"] == 2.0


def test_sums_of_uneven_batches_are_means_over_samples_not_over_batches(data):
    """One sample that is right and three that are wrong: 1 of 4, where the mean of the two means is 1 of 2."""
    meter = Meter(data.codec, CPU)
    one, three = data.examples(1, CPU)[0], data.examples(3, CPU)[0]
    sums = measured(meter, one, [0] * 8, loss=1.0) + measured(meter, three, [1] * 8, loss=3.0)
    means = meter.means(sums.numpy())
    assert means["action_accuracy"] == 0.25 and means["loss"] == 2.5


def test_every_step_is_in_a_line_and_all_lines_count_epochs_from_one(home):
    """The last steps of a run were in no line, those of a short run in none at all, and `epoch` began at 0 or at 1."""
    start("training.num_epochs=2")
    run = run_dir("openvla", TASK, 0, NUM_EPISODES)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["epoch"]) for line in lines if "train_loss" in line]
    assert steps == [(7, 1), (10, 2), (14, 2)]
    assert [(line["step"], line["epoch"]) for line in lines if "val_loss" in line] == [(7, 1), (14, 2)]


def test_without_a_terminal_a_line_says_now_and_then_where_it_is(home, monkeypatch, capsys):
    monkeypatch.setattr(log, "SECONDS_BETWEEN_REPORTS", 0.0)
    start("training.max_steps=3")
    number = r"\d+(\.\d+)?(e-\d+)?"
    shown = rf"loss {number}, acc {number}, mae_rad {number}, samples/s {number}, about \d\d:\d\d left"
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 3, " in line]
    assert len(lines) == 3
    for step, line in enumerate(lines, start=1):
        assert re.fullmatch(rf"LiftBarrier-rf_Agent0_6: step {step} of 3, {shown}", line), line


def test_a_run_leaves_curves_a_page_and_every_joints_numbers(home):
    start("training.num_epochs=2", draws=True)
    run = run_dir("openvla", TASK, 0, NUM_EPISODES)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train, val = ([line for line in lines if name in line] for name in ("train_loss", "val_loss"))
    assert {"lr", "epoch", "grad_norm", "samples_per_s", "data_wait_share", "peak_memory_gb"} <= train[0].keys()
    for joint in (*(f"joint{k}" for k in range(1, 8)), "gripper"):
        assert {f"{name}/{joint}" for name in ("accuracy", "within_one_bin", "mae", "entropy")} <= train[0].keys()
        assert 0.0 <= val[-1][f"val_accuracy/{joint}"] <= val[-1][f"val_within_one_bin/{joint}"] <= 1.0
    assert 0.0 < train[0]["data_wait_share"] < 1.0 and train[0]["samples_per_s"] > 0.0
    assert val[-1]["open_loop_mae_rad"] > 0.0
    for picture in ("curves.png", "open_loop.png", "input_images.png"):
        assert (run / picture).stat().st_size > 1000, picture
    page = (run / "run.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "joint4" in page and "num_epochs: 2" in page
    assert "http" not in page.replace("http-equiv", "")
