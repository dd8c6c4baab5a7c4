import dataclasses
import json
import re
import subprocess

import numpy as np
import pytest
from evaluation_samples import sample_evaluation
from worker_samples import sample_episode

from robofactory.errors import UserError
from robofactory.evaluation import results
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS, TIME_OUT, episodes_enough, wilson_interval
from robofactory.sim.tasks.lift_barrier.stages import DID_ITS_PART, LIFTED_TOO_LITTLE, NEVER_HELD, NEVER_REACHED


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 20, 0.0, 0.1611),
        (50, 50, 0.9287, 1.0),
        (1, 2, 0.0945, 0.9055),
        (40, 50, 0.6696, 0.8876),
    ],
)
def test_wilson_interval_is_the_published_one(successes, trials, low, high):
    """Values of the formula as R's binom.confint(method="wilson") and statsmodels give them."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_no_trials_say_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_crash_and_a_time_out_are_no_failures_and_are_in_no_rate():
    summary = sample_evaluation([SUCCESS, SUCCESS, SUCCESS, FAILURE, CRASH, TIME_OUT]).summary()
    counts = [summary[name] for name in ("successes", "failures", "crashes", "timeouts")]
    assert counts == [3, 1, 1, 1]
    assert summary["success"]["of"] == 4
    assert summary["success"]["rate"] == 0.75
    assert summary["success"]["interval_95"] == list(wilson_interval(3, 4))
    assert summary["mean_steps"] == 70, "the crash's 0 steps must not be averaged in"
    assert summary["failed_because"] == {"agent 0 never held it": 1}
    assert summary["failed_at"] == {NEVER_HELD: [1, 0], DID_ITS_PART: [0, 1]}
    assert set(summary["crashed_because"]) == {"RuntimeError: <the simulator> & its driver", "no answer within 600 s"}


# --------------------------------------------------------------------------------------------------- best and worst


def ended(seed: int, *failed_at: str, steps: int = 300) -> results.EpisodeResult:
    outcome = FAILURE if failed_at else SUCCESS
    return dataclasses.replace(sample_episode(seed, outcome), failed_at=list(failed_at), steps=steps)


def test_fast_successes_are_the_best_and_failures_at_the_earliest_stage_the_worst():
    episodes = [
        ended(0, NEVER_HELD, DID_ITS_PART),
        ended(1, steps=80),
        sample_episode(2, CRASH),
        ended(3, NEVER_REACHED, DID_ITS_PART),
        ended(4, steps=60),
        ended(5, NEVER_REACHED, NEVER_REACHED),
        ended(6, LIFTED_TOO_LITTLE, LIFTED_TOO_LITTLE),
        ended(7, steps=60),
    ]
    evaluation = dataclasses.replace(sample_evaluation([]), episodes=episodes)
    assert [episode.seed for episode in evaluation.best_to_worst] == [4, 7, 1, 6, 0, 3, 5], "the crash is not judged"
    called = {title: episode.seed for title, episode in evaluation.best_and_worst.items()}
    assert called == {"Best: the fastest success": 4, "Worst: the earliest failure": 5}


@pytest.mark.parametrize(
    ("outcomes", "titles"),
    [
        ([SUCCESS, SUCCESS], ["Best: the fastest success", "Worst: the slowest success"]),
        ([FAILURE, FAILURE], ["Best: the failure that came furthest", "Worst: the earliest failure"]),
        ([SUCCESS, CRASH], ["Best: the fastest success"]),
        ([CRASH, TIME_OUT], []),
    ],
)
def test_best_and_worst_are_called_what_they_are(outcomes, titles):
    assert list(sample_evaluation(outcomes).best_and_worst) == titles


# ------------------------------------------------------------------------------------------------------------ until


def until(points: float, outcomes: list[str], num_episodes: int = 400) -> results.Evaluation:
    evaluation = sample_evaluation(outcomes)
    protocol = dataclasses.replace(evaluation.protocol, until=points, num_episodes=num_episodes)
    return results.Evaluation(protocol, evaluation.episodes)


def test_it_stops_at_the_first_seed_that_makes_the_interval_narrow_enough():
    """35 of 35 is the first whole success with 5 points to each side: 1 - 35 / (35 + z^2) = 0.0989 wide."""
    assert until(5.0, [SUCCESS] * 34).stopped is None and not until(5.0, [SUCCESS] * 34).is_complete
    stopped = until(5.0, [SUCCESS] * 50).stopped
    assert stopped is not None and stopped.seeds == list(range(10_000, 10_035)) and stopped.is_complete
    assert not until(5.0, [SUCCESS] * 50).is_complete, "what was played beyond is no part of it"


def test_where_it_stops_does_not_depend_on_which_episodes_ended_first():
    whole = until(20.0, [SUCCESS, FAILURE, SUCCESS, FAILURE] * 8)
    late = results.Evaluation(whole.protocol, [e for e in whole.episodes if e.seed != 10_003])
    assert late.stopped is None, "it may only decide once 10003 has ended"
    assert whole.stopped is not None and len(whole.stopped.episodes) == episodes_enough(20.0) == 21


def test_crashes_make_no_interval_narrower():
    stopped = until(5.0, [CRASH] * 3 + [SUCCESS] * 40).stopped
    assert stopped is not None and len(stopped.episodes) == 38


@pytest.mark.parametrize("points", [1.0, 3.0, 5.0, 20.0, 50.0])
def test_the_default_maximum_is_enough_for_every_rate_and_no_more(points):
    enough = episodes_enough(points)
    widths = [high - low for low, high in (wilson_interval(k, enough) for k in range(enough + 1))]
    assert max(widths) * 50 <= points + 1e-9
    if enough > 2:
        low, high = wilson_interval((enough - 2) // 2, 2 * ((enough - 2) // 2))
        assert (high - low) * 50 > points


def test_what_the_report_says_of_intervals_that_decide_when_to_stop():
    """Exactly, by the distribution of the number of successes after every episode: 93.2 % and 94.2 % at the worst."""
    enough, rates = episodes_enough(5.0), np.arange(0.05, 0.951, 0.01)[:, None]
    coverage = {"until": np.zeros(len(rates)), "fixed": np.zeros(len(rates))}
    mass = {how: np.ones((len(rates), 1)) for how in coverage}  # of each number of successes, while it goes on
    for n in range(1, enough + 1):
        low, high = np.array([wilson_interval(k, n) for k in range(n + 1)]).T
        for how in coverage:
            grown = np.pad(mass[how] * (1 - rates), ((0, 0), (0, 1))) + np.pad(mass[how] * rates, ((0, 0), (1, 0)))
            ends = (50 * (high - low) <= 5.0) & (how == "until") | (n == enough)
            coverage[how] += (grown * (ends & (low <= rates) & (rates <= high))).sum(axis=1)
            mass[how] = np.where(ends, 0.0, grown)
    assert round(coverage["until"].min(), 2) == 0.93 and round(coverage["fixed"].min(), 2) == 0.94


# ------------------------------------------------------------------------------------------------------------ files


def test_what_is_saved_is_what_is_loaded(tmp_path):
    evaluation = sample_evaluation([SUCCESS, FAILURE, CRASH])
    results.save(evaluation, tmp_path)
    assert results.load(tmp_path) == evaluation


def test_the_files_hold_what_the_readme_promises(tmp_path):
    results.save(sample_evaluation([SUCCESS, CRASH]), tmp_path)
    episode, crash = json.loads((tmp_path / "episodes.json").read_text())
    names = "seed outcome steps seconds success_robofactory phases failed_at reason measures policy_ms"
    assert set(episode) == set(names.split()) | {"passes_per_action", "digest", "video"}
    assert (episode["seed"], episode["outcome"], crash["outcome"]) == (10_000, "success", "crash")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"format_version", "complete", "title", "results", "protocol"}
    decides = "task scene first_seed num_episodes fingerprints weights versions renderer device ablation max_steps"
    assert set(decides.split()) <= set(summary["protocol"])
    assert not list(tmp_path.glob(".*")), "temporary files stay behind"


def test_the_commit_is_that_of_a_checkout_not_of_what_surrounds_it(tmp_path):
    """A package in the .venv of a user's repository told that repository's commit."""
    package = tmp_path / ".venv" / "site-packages"
    package.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=some", "-c", "user.email=body"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert results.commit_of(package) == "unknown"
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", results.commit_of(tmp_path))


def test_an_interrupted_evaluation_says_so(tmp_path):
    evaluation = sample_evaluation([SUCCESS, SUCCESS, SUCCESS])
    results.save(dataclasses.replace(evaluation, episodes=evaluation.episodes[:2]), tmp_path)
    assert not results.load(tmp_path).is_complete
    assert json.loads((tmp_path / "summary.json").read_text())["complete"] is False


def test_a_truncated_file_is_named(tmp_path):
    results.save(sample_evaluation([SUCCESS]), tmp_path)
    text = (tmp_path / "episodes.json").read_text()
    (tmp_path / "episodes.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"episodes\.json is not valid JSON"):
        results.load(tmp_path)
