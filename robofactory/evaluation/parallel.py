"""Episodes in ManiSkill's parallel simulation: one object simulates several environments at a time, on a GPU.

As many episodes as the policies answer in a batch begin together and are stepped in lockstep, in a process of its own:
whatever a driver does there ends those episodes and nothing else. What has ended is stepped along and counts no more.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robofactory.evaluation.results import CRASH, TIME_OUT, EpisodeResult
from robofactory.evaluation.rollout import Answer, Episode, Plan, of_each, states_of
from robofactory.evaluation.workers import DEATH, Seat, Setup, Worker, lost
from robofactory.shapes import Observation

if TYPE_CHECKING:  # a process that simulates imports no model
    from robofactory.policy import Policies


@dataclass(frozen=True)
class Turn:
    """What has become of the episodes with a step."""

    observations: dict[int, list[Observation]]  # by row: what every agent sees, where the episode goes on
    ended: list[EpisodeResult]


Round = Generator[Turn, dict[int, Answer], Turn]  # asks for all rows that go on; the last turn has none


class Lockstep:
    """The environments of a plan, one for each row of the policies' batch."""

    def __init__(self, plan: Plan, num_rows: int, backend: str = "gpu"):
        from robofactory.sim.env import make_env

        torch.set_num_threads(plan.num_threads)
        self.plan, self.num_rows = plan, num_rows
        self.env: Any = make_env(plan.scene, num_envs=num_rows, backend=backend)

    def __call__(self, seat: int, seeds: Mapping[int, int]) -> Round:
        """Plays a seed in each of these rows; in the others, arms keep their posture. There is only one seat."""
        from robofactory.sim.env import observe_each, step

        with ExitStack() as open_videos:
            going = {row: open_videos.enter_context(Episode(self.plan, seed)) for row, seed in seeds.items()}
            scene, *others = (episode.scene for episode in going.values())
            assert all(other == scene for other in others), "one scene for all, see require_lockstep"
            table = self.env.unwrapped
            table.config = scene
            first_seed = next(iter(seeds.values()))
            all_seeds = [seeds.get(row, first_seed) for row in range(self.num_rows)]
            # Built anew, as each episode is on the CPU: nothing of the last ones is left.
            self.env.reset(seed=all_seeds, options={"reconfigure": True})
            postures = [table.proprio(agent) for agent in range(scene.num_agents)]
            actions = [list(posture) for posture in zip(*postures, strict=True)]  # by row, then by agent
            while True:
                states, seen = states_of(self.env), observe_each(self.env)
                shown = {row: episode.observe(states[row], seen[row]) for row, episode in going.items()}
                ended = [row for row, episode in going.items() if episode.is_over]
                turn = Turn(
                    {row: observations for row, observations in shown.items() if row not in ended},
                    [going.pop(row).result(phases=[]) for row in ended],
                )
                if not going:
                    return turn
                answers = yield turn
                for row, episode in going.items():
                    actions[row] = episode.act(None, answers[row])
                by_agent = [np.stack(rows) for rows in zip(*actions, strict=True)]  # [b, a] each
                infos = of_each(step(self.env, by_agent), self.num_rows)
                for row, episode in going.items():
                    episode.see(infos[row])


def play_episodes(
    setup: Setup, seeds: Sequence[int], time_limit_s: float, policies: "Policies"
) -> Iterator[EpisodeResult]:
    """Episodes in the order they end, a row of the policies' batch each, by its seed as in `workers.play_episodes`.

    An exception in the simulator, or the death of its process, is a crash of all episodes that have not ended; they have
    timed out when it says nothing for `time_limit_s`. A fresh process plays the rest.

    Args:
        setup: makes a `Lockstep` in the process (it is pickled).
        seeds: each once.
    Raises:
        UserError: `setup` failed, hangs, or its process died several times; a disk is full.
    """
    queues = [deque(seed for seed in seeds if seed % policies.num_rows == row) for row in range(policies.num_rows)]
    worker = None
    try:
        while any(queues):
            if worker is None or not worker.process.is_alive():
                worker = _set_up(setup, time_limit_s)
            together = {row: queue.popleft() for row, queue in enumerate(queues) if queue}
            yield from _play_together(worker, together, time_limit_s, policies)
    finally:
        if worker is not None:
            worker.end()


def _set_up(setup: Setup, time_limit_s: float) -> Worker:
    worker = Worker(setup, [Seat(0, 1)])
    while not worker.is_ready:
        has_news = wait([worker.pipe], max(0.0, time_limit_s - worker.silence_s))
        kind, _, content = worker.receive() if has_news else worker.kill(time_limit_s)
        if kind == DEATH:
            worker = worker.again(content)
    return worker


def _play_together(
    worker: Worker, seeds: Mapping[int, int], time_limit_s: float, policies: "Policies"
) -> Iterator[EpisodeResult]:
    """Of each row its seed; the worker has ended if they did not come to their end."""
    [seat] = worker.seats
    memories = {row: policies.start_episode(seed) for row, seed in seeds.items()}
    going, started = set(seeds.values()), time.perf_counter()
    worker.tell(seat, seeds)
    while going:
        has_news = wait([worker.pipe], max(0.0, time_limit_s - worker.silence_s))
        kind, _, content = worker.receive() if has_news else worker.kill(time_limit_s)
        if kind in (CRASH, TIME_OUT):
            worker.end()
            for seed in sorted(going):
                yield lost(seed, kind, time.perf_counter() - started, content)
            return
        for episode in content.ended:
            going.remove(episode.seed)
            yield episode
        if content.observations:
            asked = time.perf_counter()
            answers = policies.act({row: (memories[row], seen) for row, seen in content.observations.items()})
            seconds = (time.perf_counter() - asked) / len(answers)
            worker.tell(seat, {row: Answer(actions, seconds, passes) for row, (actions, passes) in answers.items()})
