"""The best and the worst episode played once more, with someone who looks at the policies while they act.

An episode repeats to the last bit under its protocol, and its digest proves that it did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from robofactory.evaluation import looks
from robofactory.evaluation.results import Evaluation
from robofactory.evaluation.rollout import Plan, Rollout
from robofactory.evaluation.workers import play_episodes
from robofactory.policy import Look, Memory, Policies
from robofactory.shapes import Action, Observation

NUM_STEPS, NUM_MOMENTS = 40, 4  # of an episode, where the shares of attention are taken; where all is kept


def look_at_best_and_worst(
    evaluation: Evaluation, plan: Plan, directory: Path, num_workers: int, time_limit_s: float, policies: Policies
) -> None:
    """Keep what there is to see in these two episodes; what is there already is not played again."""
    episodes = {episode.seed: episode for episode in evaluation.best_and_worst.values()}
    paths = {(seed, agent): looks.path_of(directory, seed, agent) for seed in episodes for agent in plan.learned}
    for path in (directory / looks.LOOKS).glob("*.npz"):
        if path not in paths.values():
            path.unlink()
    seeds = sorted({seed for (seed, _), path in paths.items() if looks.load(path, episodes[seed].digest) is None})
    if not seeds:
        return
    print(f"looking at the policies in the best and the worst episode: seeds {', '.join(map(str, seeds))}")
    onlooker = Onlooker(policies, {seed: spread(episodes[seed].steps, NUM_STEPS) for seed in seeds})
    setup = partial(Rollout, replace(plan, directory=None))  # films nothing
    for again in play_episodes(setup, seeds, num_workers, time_limit_s, onlooker):
        digest = episodes[again.seed].digest
        if again.digest != digest:
            print(
                f"warning: seed {again.seed} went otherwise when it was played again ({again.outcome}): nobody looked"
            )
            continue
        for agent in plan.learned:
            seen = {step: of_agents[agent] for step, of_agents in onlooker.looks[again.seed].items()}
            looks.save(collect(digest, seen), paths[again.seed, agent])


class Onlooker:
    """Policies that act as ever, with someone who looks at them at some steps of each episode."""

    def __init__(self, policies: Policies, steps: Mapping[int, Sequence[int]]):
        """`steps` are by seed."""
        self.policies, self.steps, self.num_rows = policies, steps, policies.num_rows
        self.looks: dict[int, dict[int, dict[int, Look]]] = {}  # seed -> step -> agent -> what was seen
        self.playing: list[_Playing] = []

    def start_episode(self, seed: int) -> dict[int, Memory]:
        self.playing.append(_Playing(seed, self.policies.start_episode(seed)))
        self.looks[seed] = {}  # anew, if a worker died half way
        return self.playing[-1].memory

    def act(
        self, asked: Mapping[int, tuple[dict[int, Memory], Sequence[Observation]]]
    ) -> dict[int, tuple[dict[int, Action], int]]:
        """As `Policies.act`."""
        answers = self.policies.act(asked)
        for memory, observations in asked.values():
            (episode,) = (each for each in self.playing if each.memory is memory)
            if episode.step in self.steps[episode.seed]:
                self.looks[episode.seed][episode.step] = self.policies.look(memory, observations)
            episode.step += 1
        return answers


@dataclass
class _Playing:
    """An episode on its way."""

    seed: int
    memory: dict[int, Memory]
    step: int = 0


def spread(count: int, most: int) -> list[int]:
    """At most so many of 0 .. count - 1, evenly, the ends among them."""
    return sorted({round(number) for number in np.linspace(0, count - 1, min(count, most))})


def collect(digest: str, seen: Mapping[int, Look]) -> looks.Looks:
    """What is kept of an agent's looks, which are by step."""
    steps = list(seen)
    moments = [steps[index] for index in spread(len(steps), NUM_MOMENTS)]
    first, chosen = seen[steps[0]], [seen[step] for step in moments]
    return looks.Looks(
        digest=digest,
        steps=np.array(steps),
        parts=list(first.parts),
        attention=np.stack([look.attention.mean(axis=1) for look in seen.values()]),
        moments=np.array(moments),
        views=list(first.views),
        pictures=np.stack([look.pictures for look in chosen]),
        heat=np.stack([look.heat for look in chosen]),
        names=list(first.names),
        values=first.values,
        probabilities=np.stack([look.probabilities for look in chosen]),
        chosen=np.stack([look.chosen for look in chosen]),
    )
