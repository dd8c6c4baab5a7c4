"""What is seen of policies that play their best and their worst episode once more, without a simulator."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from evaluation_samples import sample_evaluation, sample_scene
from test_report import Page
from worker_samples import NUM_STEPS, fail_as_planned, play_asking, play_asking_as_planned

from robofactory.evaluation import looking, looking_report, looks
from robofactory.evaluation.results import Evaluation
from robofactory.evaluation.rollout import Plan
from robofactory.evaluation.workers import play_episodes
from robofactory.policy import Policies

PATIENT_S = 600.0
BEST, WORST = 6, 5  # of the seeds 4 to 6, which take 7, 8 and 6 steps


@pytest.fixture(scope="module")
def policies(models) -> Policies:
    return Policies(*models, num_rows=2)


@pytest.fixture(scope="module")
def evaluation(policies) -> Evaluation:
    """Of three episodes with both agents' policies."""
    episodes = play_episodes(partial(play_asking, False, 0.0), [4, 5, 6], 1, PATIENT_S, policies)
    protocol = dataclasses.replace(
        sample_evaluation([]).protocol, drivers=["openvla"] * 2, checkpoints=["/runs/a", "/runs/b"],
        fingerprints=["ab" * 32] * 2, weights=["cd" * 32] * 2, first_seed=4, num_episodes=3,
    )  # fmt: skip
    return Evaluation(protocol, sorted(episodes, key=lambda episode: episode.seed))


def look(evaluation: Evaluation, policies: Policies, directory: Path) -> None:
    plan = Plan(sample_scene(), [0, 1], None, 1)
    looking.look_at_best_and_worst(evaluation, plan, directory, 1, PATIENT_S, policies)


def seen(evaluation: Evaluation, directory: Path, seed: int, agent: int) -> looks.Looks | None:
    (digest,) = (episode.digest for episode in evaluation.episodes if episode.seed == seed)
    return looks.load(looks.path_of(directory, seed, agent), digest)


@pytest.fixture
def directory(evaluation, policies, tmp_path, monkeypatch) -> Path:
    """Where the best and the worst episode have been looked at."""
    monkeypatch.setattr(looking, "Rollout", play_asking_as_planned)
    look(evaluation, policies, tmp_path)
    return tmp_path


def test_both_agents_are_looked_at_in_the_best_and_the_worst_episode(evaluation, directory):
    assert [episode.seed for episode in evaluation.best_and_worst.values()] == [BEST, WORST]
    assert len(list((directory / "looks").iterdir())) == 4
    for seed, steps in {BEST: NUM_STEPS, WORST: NUM_STEPS + 2}.items():
        for agent in (0, 1):
            kept = seen(evaluation, directory, seed, agent)
            assert kept is not None and kept.steps.tolist() == list(range(steps))
            assert kept.parts == ["start", "wrist", "proprio", "text", "actions before"]
            np.testing.assert_allclose(kept.attention.sum(axis=-1), 1.0, atol=1e-2)  # bfloat16, where there is
            assert kept.moments[[0, -1]].tolist() == [0, steps - 1] and len(kept.moments) == looking.NUM_MOMENTS
            np.testing.assert_allclose(kept.probabilities.sum(axis=-1), 1.0, atol=1e-5)


def test_the_actions_looked_at_are_those_that_were_executed(evaluation, policies, tmp_path, monkeypatch):
    """At the end an agent is where its actions have taken it, see `play_asking`."""
    monkeypatch.setattr(looking, "Rollout", play_asking_as_planned)
    monkeypatch.setattr(looking, "NUM_MOMENTS", NUM_STEPS)
    look(evaluation, policies, tmp_path)
    places = np.zeros((2, 8), np.float32)
    kept = [seen(evaluation, tmp_path, BEST, agent) for agent in (0, 1)]
    for step in range(NUM_STEPS):
        actions = np.stack([each.values[range(8), each.chosen[step]] for each in kept if each is not None])
        places = np.clip(places + 0.1 * actions, -1, 1)
    (episode,) = (each for each in evaluation.episodes if each.seed == BEST)
    assert places.flatten().tolist() == list(episode.measures.values())
    assert np.abs(places).max() > 0.1, "standing still would prove nothing"


def test_who_looks_on_changes_no_episode(evaluation, policies):
    onlooker = looking.Onlooker(policies, {seed: [0, 3] for seed in (4, 5, 6)})
    again = list(play_episodes(partial(play_asking, False, 0.0), [4, 5, 6], 1, PATIENT_S, onlooker))
    digests = {episode.seed: episode.digest for episode in again}
    assert digests == {episode.seed: episode.digest for episode in evaluation.episodes}
    assert {seed: list(each) for seed, each in onlooker.looks.items()} == {seed: [0, 3] for seed in (4, 5, 6)}


def test_what_was_looked_at_is_not_played_again_and_what_is_of_another_evaluation_goes(
    evaluation, policies, directory, monkeypatch
):
    monkeypatch.setattr(looking, "Rollout", fail_as_planned)
    look(evaluation, policies, directory)
    two = dataclasses.replace(evaluation, episodes=evaluation.episodes[:2])
    (directory / "looks" / f"seed_{BEST}_agent0.npz").rename(directory / "looks" / "seed_4_agent0.npz")
    monkeypatch.setattr(looking, "Rollout", play_asking_as_planned)
    look(two, policies, directory)  # the best of these two is seed 4
    names = sorted(path.name for path in (directory / "looks").iterdir())
    assert names == [f"seed_{seed}_agent{agent}.npz" for seed in (4, 5) for agent in (0, 1)]
    assert seen(evaluation, directory, 4, 0) is not None, "what lay there was of another episode"


def test_an_episode_that_does_not_repeat_is_not_shown(evaluation, policies, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(looking, "Rollout", play_asking_as_planned)
    other = [dataclasses.replace(each, digest="00" * 32) if each.seed == BEST else each for each in evaluation.episodes]
    look(dataclasses.replace(evaluation, episodes=other), policies, tmp_path)
    assert f"warning: seed {BEST} went otherwise when it was played again" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "looks").iterdir()) == [
        f"seed_{WORST}_agent{k}.npz" for k in (0, 1)
    ]


# -------------------------------------------------------------------------------------------------------------- page


def test_the_page_shows_pictures_and_distributions_of_each_agent_at_each_moment(evaluation, directory):
    page = Page(looking_report.looks_section(directory, evaluation))
    pictures = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 2 * 2 * looking.NUM_MOMENTS, "episodes, agents, moments, one view"
    assert all(str(source).startswith("data:image/jpeg;base64,") for source in pictures)
    drawings = [attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg"]
    assert drawings.count("probability of each bin") == 2 * 2 * looking.NUM_MOMENTS
    assert "Best: the fastest success" in page.text and "Worst: the slowest success" in page.text
    kept = seen(evaluation, directory, BEST, 1)
    assert kept is not None
    nats = looking_report.entropy_nats(kept.probabilities[-1, 7])
    action = kept.values[7, kept.chosen[-1, 7]]
    assert f"{action:.3f}{kept.probabilities[-1, 7, kept.chosen[-1, 7]]:.2f}{nats:.2f}" in page.text


def test_an_older_evaluation_says_what_is_missing_and_how_to_get_it(evaluation, tmp_path):
    page = Page(looking_report.looks_section(tmp_path, evaluation))
    assert page.text.count("Nobody looked at agent 1 in this episode. The command that evaluated it does") == 2
    assert not any(tag == "img" for tag, _ in page.elements)


def test_the_expert_has_nothing_to_look_at(evaluation, tmp_path):
    alone = dataclasses.replace(evaluation.protocol, drivers=["expert"] * 2, checkpoints=[None, None])
    assert looking_report.looks_section(tmp_path, dataclasses.replace(evaluation, protocol=alone)) == ""


def test_the_entropy_of_certainty_is_0_and_of_an_even_spread_the_highest():
    sure = np.zeros(256, np.float32)
    sure[7] = 1.0
    assert looking_report.entropy_nats(sure) == 0.0
    assert looking_report.entropy_nats(np.full(256, 1 / 256, np.float32)) == pytest.approx(np.log(256), abs=1e-4)


def test_the_patch_that_gets_most_is_the_bluest_and_the_scale_is_that_of_all_views():
    pictures, heat = np.full((2, 28, 28, 3), 100, np.uint8), np.zeros((2, 2, 2), np.float32)
    heat[0, 0, 1], heat[1, 1, 0] = 0.4, 0.1
    first, second = (each.astype(int) for each in looking_report.heat_over(pictures, heat))
    size = len(first)
    corner, centre = slice(0, size // 2 - 1), slice(size // 2 + 1, size)
    assert (first[centre] == 100).all() and (first[corner, corner] == 100).all()
    blue, fainter = first[corner, centre].mean(axis=(0, 1)), second[centre, corner].mean(axis=(0, 1))
    assert blue[2] - blue[0] > 120 and 20 < fainter[2] - fainter[0] < 60
