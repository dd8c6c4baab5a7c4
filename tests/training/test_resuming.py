"""A run that was stopped anywhere goes on as if nothing had happened: the same bits, in weights, optimizer and metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.small_runs import NUM_EPISODES, TASK, differences, everything, start
from robofactory import checkpoint
from robofactory.errors import EXIT_STOPPED, UserError
from robofactory.paths import run_dir
from tests.training.conftest import stop_during


@pytest.fixture
def run(home):
    return run_dir("openvla", TASK, 0, NUM_EPISODES)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def dropout(monkeypatch):
    """The model as LoRA with dropout has it: its forward pass draws random numbers."""
    build = checkpoint.build_model

    def with_dropout(recipe, codec, device):
        model = build(recipe, codec, device)
        model.projector.fc2.register_forward_hook(
            lambda module, _, output: torch.nn.functional.dropout(output, 0.1, module.training)
        )
        return model

    monkeypatch.setattr(checkpoint, "build_model", with_dropout)


# 3 epochs of 7 steps; a line of metrics comes every 10. name: (optimizer step, workers, micro-batch in it)
STOPS = {"epoch_end": (6, 0, 0), "mid_epoch": (8, 0, 0), "mid_accumulation": (9, 0, 1), "two_workers": (3, 2, 0)}


@pytest.mark.parametrize("at", STOPS)
def test_a_resumed_run_equals_one_that_was_never_stopped(run, home, monkeypatch, dropout, at):
    update, num_workers, micro = STOPS[at]
    overrides = [f"dataloader.num_workers={num_workers}"]
    if at == "mid_accumulation":
        overrides += ["dataloader.batch_size=4", "training.gradient_accumulate_every=2"]
    start(*overrides)
    undisturbed = everything(run)
    run.rename(home / "undisturbed")

    with monkeypatch.context() as during:
        stop_during(during, update, micro)
        with pytest.raises(SystemExit) as stopped:
            start(*overrides)
    assert stopped.value.code == EXIT_STOPPED
    assert (run / "latest").resolve().name == f"step_{update + 1}"
    start(*overrides, resume=True)
    assert differences(everything(run), undisturbed) == []
    assert not (run / f"step_{update + 1}").exists(), "superseded by the epoch's checkpoint"


def test_the_benchmark_of_resuming_answers_help():
    """It began to measure, for minutes."""
    command = [sys.executable, "-m", "benchmarks.resuming", "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_a_run_whose_checkpoint_lost_its_manifest_is_not_begun_anew(run):
    """It began from nothing, said nothing, and replaced what was left (an interrupted copy)."""
    start("training.max_steps=2")
    (run / "epoch_1" / "manifest.json").unlink()
    before = (run / "epoch_1" / "modules.safetensors").read_bytes()
    for resume in (True, False):
        with pytest.raises(UserError, match=r"epoch_1 is no complete checkpoint: it has no manifest\.json"):
            start("training.max_steps=4", "training.seed=7", resume=resume)
    assert (run / "epoch_1" / "modules.safetensors").read_bytes() == before


def test_another_global_batch_is_refused_and_the_line_says_what_to_set(run):
    start("training.max_steps=2")
    with pytest.raises(UserError, match=r"trained with 8 samples a step .* have 16; set dataloader\.batch_size=4"):
        start("training.max_steps=4", "training.gradient_accumulate_every=2", resume=True)
    start("training.max_steps=4", "training.gradient_accumulate_every=2", "dataloader.batch_size=4", resume=True)
    assert checkpoint.load_training_state(run / "latest")["update"] == 4


def test_a_lower_learning_rate_takes_effect_after_a_resume(run):
    """It did not: the schedule's saved state brought the old one back."""
    start("training.max_steps=5")
    start("training.max_steps=10", "training.learning_rate=1e-5", resume=True)
    assert max(line["lr"] for line in lines_of(run) if "lr" in line and line["step"] > 5) <= 1e-5


def test_a_line_that_a_kill_cut_off_is_made_again(run):
    start("training.max_steps=5")
    before = (run / "metrics.jsonl").read_text()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "train_lo')
    start("training.max_steps=10", resume=True)
    assert (run / "metrics.jsonl").read_text().startswith(before) and lines_of(run)[-1]["step"] == 10


def test_only_kept_latest_and_best_checkpoints_stay(run):
    start("training.num_epochs=5", "training.checkpoint_every=2")
    names = {path.name for path in run.glob("epoch_*")}
    best = os.readlink(run / "best")
    assert names == {"epoch_2", "epoch_4", "epoch_5", best}
    val = {line["epoch"]: line["val_loss"] for line in lines_of(run) if "val_loss" in line}
    assert best == f"epoch_{min(val, key=val.get)}"
