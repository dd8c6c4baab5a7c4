"""Control steps a second that an evaluation plays: with one environment, without batches, and in batches of several sizes.

    python benchmarks/rollouts.py --checkpoint latest

A step is one of an episode: physics, every camera, and an action of every agent by its trained policy. Rates are taken
after the start, while every environment plays, and are ratios of one run: other work on the machine disturbs them.
"""

import argparse
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from robofactory.config import SceneConfig, find_checkpoints, load_task_scene, run_command, with_look
from robofactory.evaluation.rollout import Answer, Plan, Rollout
from robofactory.evaluation.workers import NUM_GROUPS, play_episodes
from robofactory.policy import Policies, Policy

FIRST_SEED = 10_000


class WindowEnded(Exception):
    """The measurement is over."""


class Counted(Policies):
    """Counts the steps that are answered, from when every environment has asked for some."""

    def act(self, asked: Any) -> Any:
        answers = super().act(asked)
        now = time.perf_counter()
        if self.started is None:
            self.calls = [*self.calls, len(asked)]
            is_warm = self.calls[-NUM_GROUPS * 3 :] == [self.num_rows] * NUM_GROUPS * 3
            self.started = now if is_warm else None
        elif now - self.started < self.seconds:
            self.steps += len(asked)
            self.passes += sum(passes for _, passes in answers.values())
        else:
            self.rate = self.steps / (now - self.started)
            raise WindowEnded
        return answers

    def measure_for(self, seconds: float) -> None:
        self.seconds, self.started, self.steps, self.passes, self.calls = seconds, None, 0, 0, []


def in_batches(
    scene: SceneConfig, checkpoints: dict[int, Path], batch_size: int, seconds: float
) -> tuple[float, float]:
    """Steps a second, and passes an action."""
    policies = Counted.load(checkpoints, batch_size)
    assert isinstance(policies, Counted)
    policies.measure_for(seconds)
    setup = partial(Rollout, Plan(scene, list(checkpoints), None, num_threads=1))
    try:
        for _ in play_episodes(setup, range(FIRST_SEED, 10 * FIRST_SEED), num_cores(), policies):
            pass
    except WindowEnded:
        return policies.rate, policies.passes / policies.steps / len(checkpoints)
    raise AssertionError("the episodes ended before the measurement")


def alone(
    scene: SceneConfig, checkpoints: dict[int, Path], num_threads: int, seconds: float, first_seed: int, out: Any
) -> None:
    """Puts steps a second, and passes an action, of one environment whose policies answer it alone."""
    rollout = Rollout(Plan(scene, list(checkpoints), None, num_threads))
    policies = {agent: Policy.load(checkpoint) for agent, checkpoint in checkpoints.items()}
    steps, started, passes = 0, None, 0
    for seed in range(first_seed, 10 * first_seed):
        episode = rollout(0, seed)
        for policy in policies.values():
            policy.start_episode(seed)
        try:
            observations = next(episode)
            while True:
                before = sum(policy.num_passes for policy in policies.values())
                actions = {agent: policy.act([observations[agent]])[0] for agent, policy in policies.items()}
                if started is None:
                    started = time.perf_counter()
                else:
                    steps += 1
                    passes += sum(policy.num_passes for policy in policies.values()) - before
                    if (elapsed := time.perf_counter() - started) > seconds:
                        out.send((steps / elapsed, passes / steps / len(policies)))
                        return
                observations = episode.send(Answer(actions, 0.0, 0))
        except StopIteration:
            continue


def side_by_side(
    scene: SceneConfig, checkpoints: dict[int, Path], num_processes: int, num_threads: int, seconds: float
) -> tuple[float, float]:
    """Steps a second of several processes together, each with an environment and policies of its own."""
    context = multiprocessing.get_context("spawn")
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    pipes, processes = [], []
    for index in range(num_processes):
        ours, theirs = context.Pipe()
        arguments = (scene, checkpoints, num_threads, seconds, FIRST_SEED + 1000 * index, theirs)
        processes.append(context.Process(target=alone, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(ours)
    rates, passes = zip(*(pipe.recv() for pipe in pipes), strict=True)
    for process in processes:
        process.join()
    return sum(rates), sum(passes) / len(passes)


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="LiftBarrier-rf", help="(default: %(default)s)")
    parser.add_argument("--checkpoint", default="latest", help="as for eval.sh (default: %(default)s)")
    parser.add_argument("--data_num", type=int, help="as for eval.sh")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 4, 8], help="sizes (default: 2 4 8)")
    args = parser.parse_args()
    import torch

    scene = load_task_scene(args.task, None)
    agents = list(range(scene.num_agents))
    checkpoints = find_checkpoints("openvla", args.task, agents, args.checkpoint, args.data_num)
    scene = with_look(scene, Policy.load(checkpoints[0]).codec.look)
    torch.set_num_threads(max(1, num_cores() // 2))  # as evaluation does

    measured = [scene, checkpoints]
    one, passes = side_by_side(*measured, 1, num_cores(), args.seconds)
    print(f"{num_cores()} cores; every environment by {len(agents)} policies on the CPU")
    print(f"{'':58}{'steps/s':>8}{'ratio':>7}{'passes an action':>18}")

    def line(name: str, rate: float, passes: float) -> None:
        print(f"{name:58}{rate:8.1f}{rate / one:7.2f}{passes:18.2f}", flush=True)

    line("1 environment, one process", one, passes)
    line(
        f"{num_cores()} processes, an environment and policies in each",
        *side_by_side(*measured, num_cores(), 1, args.seconds),
    )
    for batch_size in args.batch:
        line(
            f"batches of {batch_size}, {NUM_GROUPS * batch_size} environments in {num_cores()} processes",
            *in_batches(*measured, batch_size, args.seconds),
        )


if __name__ == "__main__":
    run_command(main)
