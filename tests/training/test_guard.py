"""A loss that dies is noticed: skipped, counted, stopped with the step saved; spikes are seen and rolled back."""

import json
import math
import os
import random

import pytest
import torch

from benchmarks.small_runs import NUM_EPISODES, TASK, differences, everything, start, start_in_processes
from robofactory import checkpoint
from robofactory.errors import UserError
from robofactory.paths import run_dir
from robofactory.training import distributed, replay
from robofactory.training.guard import FIRST_VERDICT, MAX_ROLLBACKS, PATIENCE, Guard, Verdict
from robofactory.training.train import train


@pytest.fixture
def run(home):
    return run_dir("openvla", TASK, 0, NUM_EPISODES)


def events_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["event"]) for line in lines if "event" in line]


def poison(monkeypatch, change, updates, rank=0):
    """Something happens to the model of a process right before these optimizer steps."""
    built, build, seed_step = [], checkpoint.build_model, distributed.seed_step
    monkeypatch.setattr(checkpoint, "build_model", lambda *given: built.append(build(*given)) or built[-1])

    def seed(seed, update, topology):
        if update in updates and topology.rank == rank:
            with torch.no_grad():
                change(built[-1])
        seed_step(seed, update, topology)

    monkeypatch.setattr(distributed, "seed_step", seed)


def quiet_losses(count, level=1.0):
    chance = random.Random(0)
    return [level + chance.gauss(0.0, 0.05) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------- the judgement


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_skipped_and_too_often_ends_it(loss, norm):
    guard = Guard(max_nonfinite_steps=3, rollback_on_spike=False)
    assert [guard.judge(loss, norm) for _ in range(2)] == [Verdict.SKIP] * 2
    assert guard.judge(1.0, 1.0) is Verdict.APPLY, "a good step in between starts the count again"
    assert [guard.judge(loss, norm) for _ in range(3)] == [Verdict.SKIP, Verdict.SKIP, Verdict.GIVE_UP]
    assert guard.skipped == 5


def test_noise_is_no_spike_and_a_jump_is():
    guard = Guard(3, rollback_on_spike=False)
    assert {guard.judge(loss, 1.0) for loss in quiet_losses(500)} == {Verdict.APPLY}
    assert guard.judge(3.0, 1.0) is Verdict.SPIKE
    assert guard.judge(1.0, 1.0) is Verdict.APPLY


def test_a_falling_loss_and_the_first_steps_are_no_spikes():
    guard = Guard(3, rollback_on_spike=False)
    assert guard.judge(5.0, 1.0) is Verdict.APPLY
    assert {guard.judge(5.0 * 0.97**k, 1.0) for k in range(100)} == {Verdict.APPLY}
    young = Guard(3, rollback_on_spike=False)
    assert {young.judge(loss, 1.0) for loss in [*quiet_losses(FIRST_VERDICT - 1), 100.0]} == {Verdict.APPLY}


def test_only_a_loss_that_stays_up_is_rolled_back_and_not_for_ever():
    guard = Guard(3, rollback_on_spike=True)
    for loss in quiet_losses(64):
        guard.judge(loss, 1.0)
    state = guard.state()
    for rollback in range(MAX_ROLLBACKS):
        assert [guard.judge(9.0, 1.0) for _ in range(PATIENCE)] == [Verdict.SPIKE] * (PATIENCE - 1) + [
            Verdict.ROLL_BACK
        ]
        guard.roll_back(state)
        assert guard.learning_rate_factor == 0.5 ** (rollback + 1)
    assert [guard.judge(9.0, 1.0) for _ in range(PATIENCE)][-1] is Verdict.GIVE_UP


def test_a_restored_guard_judges_as_the_one_it_was():
    guard = Guard(3, rollback_on_spike=False)
    for loss in quiet_losses(40):
        guard.judge(loss, 1.0)
    again = Guard(3, False, json.loads(json.dumps(guard.state())))
    assert again.limit == guard.limit and again.state() == guard.state()


# ------------------------------------------------------------------------------------------------------------ training


def test_one_step_that_is_not_finite_leaves_the_weights_and_is_counted(run, monkeypatch):
    """The gradient of a dead step is NaN everywhere; none of it may reach the weights or the optimizer."""

    def break_once(model):
        handle = model.projector.register_forward_hook(lambda *given: handle.remove() or given[-1] * math.nan)

    poison(monkeypatch, break_once, {4})
    start("training.num_epochs=2")
    result = everything(run)
    assert events_of(run) == [(5, "skip")] and result["state"]["guard"]["skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in result["weights"].values())
    assert all(m["exp_avg"].isfinite().all() and m["step"] == 13 for m in result["state"]["moments"].values())
    assert [line["skipped_steps"] for line in result["metrics"] if "skipped_steps" in line] == [1, 1, 1]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_all_processes_skip_a_step_that_is_not_finite_on_one_of_them(run, home, monkeypatch, what):
    """Where only the loss is NaN, no gradient tells the other process: it has to be told, or their weights part."""

    def break_once(model):
        module = model if what == "loss" else model.projector

        def hook(module, given, output):
            handle.remove()
            return (output[0] + math.nan, *output[1:]) if what == "loss" else output * math.nan

        handle = module.register_forward_hook(hook)

    save = checkpoint.save

    def save_of_each(run, name, model, codec, recipe, state, **named):
        torch.save([model.state_dict(), state["moments"], state["guard"]], home / f"rank_{os.environ['RANK']}.pt")
        return save(run, name, model, codec, recipe, state, **named)

    monkeypatch.setattr(checkpoint, "save", save_of_each)
    poison(monkeypatch, break_once, {4}, rank=1)
    assert start_in_processes(2, "dataloader.batch_size=4", "training.num_epochs=1") == [0, 0]
    assert events_of(run) == [(5, "skip")]
    first, second = (torch.load(home / f"rank_{rank}.pt", weights_only=True) for rank in range(2))
    assert differences(first, second) == []
    weights, moments, guard = first
    assert guard["skipped"] == 1 and all(moment["step"] == 6 for moment in moments.values())
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_dead_run_stops_with_the_step_saved_and_replay_reproduces_it(run, monkeypatch):
    def blow_up(model):
        model.proprio_projector.fc1.weight.fill_(1e38)  # finite, but what it makes of its input is not

    poison(monkeypatch, blow_up, {5})
    with pytest.raises(UserError, match=r"not finite in 2 steps in a row; .* bash train\.sh --replay .*replay/step_6"):
        start("training.max_nonfinite_steps=2")
    assert events_of(run) == [(6, "skip"), (7, "give_up")]
    said = replay.run_again(run / "replay" / "step_6")
    assert said.splitlines()[0] == "step 6, 7 samples" or said.splitlines()[0] == "step 6, 8 samples"
    assert "loss nan; the first output that is not finite is that of proprio_projector.fc" in said
    with pytest.raises(UserError, match="no step to replay"):
        replay.run_again(run)


@pytest.mark.parametrize(
    ("updates", "reason"),
    [
        ({12, 13}, "ends with steps whose loss or gradient were not finite, the last 2"),
        ({13}, "not finite, the last 1"),
    ],
)
def test_a_training_that_ends_with_dead_steps_has_not_trained(run, monkeypatch, updates, reason):
    """It was called "trained", with the last steps skipped: whatever killed them had not been seen to."""

    def break_once(model):
        handle = model.projector.register_forward_hook(lambda *given: handle.remove() or given[-1] * math.nan)

    poison(monkeypatch, break_once, updates)
    with pytest.raises(UserError, match=rf"{reason}; .*latest stays what it was; --resume with a lower"):
        start("training.num_epochs=2")
    assert (run / "latest").resolve().name == "epoch_1" and not (run / "epoch_2").exists()
    assert events_of(run)[-1] == (14, "failed")


def test_weights_that_break_in_the_last_step_are_not_called_trained(run, monkeypatch):
    """No later loss of training can tell; that of the held-out episodes does."""
    step = torch.optim.AdamW.step

    def step_and_break(self, *args, **named):
        step(self, *args, **named)
        if (run / "latest").exists():
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_break)
    with pytest.raises(UserError, match=r"the loss on held-out episodes is nan; .*latest stays what it was"):
        start("training.max_steps=8")
    assert (run / "latest").resolve().name == "epoch_1"


def test_a_replay_of_a_step_that_was_fine_gives_its_very_numbers(run, home, recipe, scene, monkeypatch):
    """Otherwise a replay that finds nothing would prove nothing."""
    seen = []
    judge = Guard.judge

    def give_up_at_the_fourth(self, loss, grad_norm):
        seen.append((loss, grad_norm))
        self.skipped_in_a_row = int(len(seen) == 4)
        return Verdict.GIVE_UP if len(seen) == 4 else judge(self, loss, grad_norm)

    monkeypatch.setattr(Guard, "judge", give_up_at_the_fourth)
    with pytest.raises(UserError, match="--replay"):
        train("openvla", scene.task, 0, recipe, resume=False, bar_position=0)
    assert replay.run_again(run / "replay" / "step_3").splitlines()[-1] == (
        f"loss {seen[-1][0]:.6g}, gradient norm {seen[-1][1]:.6g}"
    )


def test_a_loss_that_stays_up_goes_back_to_the_checkpoint_at_half_the_learning_rate(run, monkeypatch):
    def lose_everything(model):
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))

    updates = {23}
    poison(monkeypatch, lambda model: lose_everything(model) or updates.clear(), updates)  # once
    start("training.num_epochs=5", "training.rollback_on_spike=true")
    assert events_of(run) == [(21, "rolled_back")], (
        "three steps stayed up after step 23; the checkpoint is that of step 21"
    )
    state = everything(run)["state"]
    assert state["update"] == 35 and state["guard"]["rollbacks"] == 1
