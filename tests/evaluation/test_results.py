import dataclasses
import json

import pytest
from evaluation_samples import sample_evaluation

from robofactory.config import UserError
from robofactory.evaluation import results
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS, wilson_interval


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


def test_a_crash_is_no_failure_and_is_in_no_rate():
    summary = sample_evaluation([SUCCESS, SUCCESS, SUCCESS, FAILURE, CRASH]).summary()
    assert (summary["successes"], summary["failures"], summary["crashes"]) == (3, 1, 1)
    assert summary["success"]["of"] == 4
    assert summary["success"]["rate"] == 0.75
    assert summary["success"]["interval_95"] == list(wilson_interval(3, 4))
    assert summary["mean_steps"] == 70, "the crash's 0 steps must not be averaged in"
    assert summary["failed_because"] == {"agent 0 never held it": 1}
    assert summary["crashed_because"] == {"RuntimeError: <the simulator> & its driver": 1}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    evaluation = sample_evaluation([SUCCESS, FAILURE, CRASH])
    results.save(evaluation, tmp_path)
    assert results.load(tmp_path) == evaluation


def test_the_files_hold_what_the_readme_promises(tmp_path):
    results.save(sample_evaluation([SUCCESS, CRASH]), tmp_path)
    episode, crash = json.loads((tmp_path / "episodes.json").read_text())
    names = "seed outcome steps seconds success_robofactory phases reason measures policy_ms passes_per_action video"
    assert set(episode) == set(names.split())
    assert (episode["seed"], episode["outcome"], crash["outcome"]) == (10_000, "success", "crash")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"format_version", "complete", "title", "results", "protocol"}
    assert {"task", "scene", "first_seed", "num_episodes", "fingerprints", "weights", "versions", "renderer"} <= set(
        summary["protocol"]
    )
    assert not list(tmp_path.glob(".*")), "temporary files stay behind"


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


@pytest.mark.parametrize("first", [0, 9_999, -1])
def test_seeds_of_the_demonstrations_are_refused(first):
    with pytest.raises(UserError, match=r"overlap the demonstrations' 0\.\.9999; use 10000 or above"):
        results.require_unseen_seeds(first, 50)


def test_the_seed_after_the_last_demonstrations_is_the_first_allowed():
    with pytest.raises(UserError, match="use 10000 or above"):
        results.require_unseen_seeds(9_999, 1)
    assert results.require_unseen_seeds(10_000, 1) is None
