"""Small evaluations of real policies in the real simulator: what a protocol promises, and what an ablation does to it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from evaluation_samples import TASK, untrained_policies

from robofactory.evaluation import evaluate, looks, results
from robofactory.evaluation.results import Evaluation

ABLATED = "blackout=wrist"
NOT_OF_THE_PROTOCOL = ("seconds", "policy_ms")  # how fast it went


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The directories of two evaluations by one protocol, with sampled actions; the second has an ablation too."""
    home = tmp_path_factory.mktemp("home")
    untrained_policies(home)
    arguments = ["--task", TASK, "--checkpoint", str(home / f"{TASK}_Agent{{agent}}_3" / "epoch_1")]
    arguments += ["--episodes", "2", "--max_steps", "6", "--temperature", "1", "--videos", "2", "--workers", "1"]
    evaluate.main([*arguments, "--output", str(home / "once")])
    evaluate.main([*arguments, "--output", str(home / "again"), "--ablate", ABLATED])
    return [home / name / "all_agents" for name in ("once", "again")]


def repeated(evaluation: Evaluation) -> list[dict]:
    """All that an episode's record says, but for how fast it went."""
    episodes = [dataclasses.asdict(episode) for episode in evaluation.episodes]
    return [{key: value for key, value in each.items() if key not in NOT_OF_THE_PROTOCOL} for each in episodes]


def tiles(video: Path) -> list[list[np.ndarray]]:
    """The pictures of each agent in the first frame, in the order of the views."""
    import av

    from robofactory.evaluation.rollout import BAR, GAP

    with av.open(str(video)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    width, height = 5 * 48, 5 * 36  # small pictures are enlarged
    rows, columns = (
        (BAR + GAP + row * (height + BAR + GAP) for row in (0, 1)),
        [GAP + c * (width + GAP) for c in range(3)],
    )
    return [[frame[y : y + height, x : x + width] for x in columns] for y in rows]


@pytest.mark.sim
def test_the_same_protocol_twice_gives_the_same_episodes_to_the_last_bit(evaluations):
    """The digest is over every state of the simulator, every picture and every action."""
    once, again = (results.load(directory) for directory in evaluations)
    assert once.protocol == again.protocol
    assert once.is_complete and [episode.steps for episode in once.episodes] == [6, 6]
    assert repeated(once) == repeated(again)
    assert once.episodes[0].digest != once.episodes[1].digest, "a digest has to tell episodes apart"
    assert once.episodes[0].measures and once.episodes[0].video


@pytest.mark.sim
def test_an_ablation_is_played_on_the_same_seeds_and_stands_beside_the_baseline(evaluations):
    baseline = results.load(evaluations[1])
    ablated = results.load(evaluations[1] / "ablations" / ABLATED)
    assert baseline.protocol.differences(ablated.protocol) == ["ablation"]
    assert ablated.protocol.ablation == ABLATED and ablated.seeds == baseline.seeds == [10_000, 10_001]
    assert all(a.digest != b.digest for a, b in zip(baseline.episodes, ablated.episodes, strict=True))
    first = {each: tiles(evaluations[1] / each / "videos" / "seed_10000.mp4") for each in ("", f"ablations/{ABLATED}")}
    for plain, black in zip(*first.values(), strict=True):  # of each agent: what its policy was shown
        assert plain[2].mean() > 20 and black[2].mean() < 4, "the wrist's picture"
        assert max(np.abs(a - b).mean() for a, b in zip(plain[:2], black[:2], strict=True)) < 2, "the other two"
    assert ABLATED in (evaluations[1].parent / "report.html").read_text()
    assert ABLATED not in (evaluations[0].parent / "report.html").read_text()


@pytest.mark.sim
def test_both_policies_are_looked_at_in_the_episodes_that_repeat(evaluations):
    """They were played once more after the evaluation; only what repeated to the last bit is kept."""
    evaluation = results.load(evaluations[1])
    for episode in evaluation.best_and_worst.values():
        for agent in (0, 1):
            seen = looks.load(looks.path_of(evaluations[1], episode.seed, agent), episode.digest)
            assert seen is not None and seen.steps.tolist() == list(range(6))
            assert seen.views == ["side", "overhead", "wrist"] and seen.pictures.shape[1:] == (3, 28, 28, 3)
    page = (evaluations[1].parent / "report.html").read_text()
    assert page.count("alt='wrist with heat'") == 2 * 2 * 4 and "Nobody looked" not in page
    assert not (evaluations[1] / "ablations" / ABLATED / "looks").exists()


@pytest.mark.sim
def test_with_output_nothing_is_written_beside_it(evaluations):
    assert not (evaluations[0].parents[1] / "report.html").exists()


@pytest.mark.sim
def test_every_failure_of_a_real_episode_has_a_stage_for_each_agent(evaluations):
    for episode in results.load(evaluations[0]).episodes:
        assert episode.failed_at == ["never reached", "never reached"]
        assert episode.reason == "agent 0 never reached it, agent 1 never reached it"
