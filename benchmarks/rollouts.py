"""What a control step costs an evaluation: with one environment, without batches, and in batches of several sizes.

    python benchmarks/rollouts.py --checkpoint latest

A step is one of an episode: physics, every camera, and an action of every agent by its trained policy. Measured after the
start, while every environment plays. Steps a second are comparable within a run on a machine with nothing else on; CPU
time a step, of all processes together, is disturbed less. No rate is above cores / CPU time a step.
"""

import argparse
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from robofactory.config import SceneConfig, load_task_scene, with_look
from robofactory.errors import run_command
from robofactory.evaluation.rollout import Answer, Plan, Rollout
from robofactory.evaluation.workers import NUM_GROUPS, play_episodes
from robofactory.paths import find_checkpoints
from robofactory.policy import Policies, Policy

FIRST_SEED = 10_000
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Measured(NamedTuple):
    steps: int
    seconds: float
    cpu_seconds: float
    passes: int  # through the language layers


class Window:
    """Counts steps from its start until its time is over."""

    def __init__(self, seconds: float):
        self.seconds, self.steps, self.passes, self.started = seconds, 0, 0, 0.0

    def start(self) -> None:
        self.started, self.cpu_at_start = time.perf_counter(), cpu_seconds()

    def add(self, steps: int, passes: int) -> Measured | None:
        """What was measured, when the time is over."""
        self.steps, self.passes = self.steps + steps, self.passes + passes
        elapsed = time.perf_counter() - self.started
        if elapsed < self.seconds:
            return None
        return Measured(self.steps, elapsed, cpu_seconds() - self.cpu_at_start, self.passes)


def cpu_seconds() -> float:
    """Of this process and those it has started, as long as they live."""
    total = time.process_time()
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S
    return total


class WindowEnded(Exception):
    """The measurement is over: `args[0]`."""


class WatchedPolicies(Policies):
    """Begins to count when every environment asks in every round."""

    window: Window
    rounds: tuple[int, ...] = ()

    def act(self, asked: Any) -> Any:
        answers = super().act(asked)
        if self.rounds != (self.num_rows,) * 3 * NUM_GROUPS:
            self.rounds = (*self.rounds, len(asked))[-3 * NUM_GROUPS :]
            self.window.start()
        elif measured := self.window.add(len(asked), sum(passes for _, passes in answers.values())):
            raise WindowEnded(measured)
        return answers


def in_batches(scene: SceneConfig, checkpoints: dict[int, Path], batch_size: int, seconds: float) -> Measured:
    """As an evaluation plays: policies in this process, environments in others."""
    policies = WatchedPolicies.load(checkpoints, batch_size)
    assert isinstance(policies, WatchedPolicies)
    policies.window = Window(seconds)
    setup = partial(Rollout, Plan(scene, list(checkpoints), None, num_threads=1))
    try:
        for _ in play_episodes(setup, range(FIRST_SEED, 10 * FIRST_SEED), num_cores(), 600.0, policies):
            pass
    except WindowEnded as end:
        return end.args[0]
    raise AssertionError("the episodes ended before the measurement")


def alone(
    scene: SceneConfig, checkpoints: dict[int, Path], num_threads: int, seconds: float, first_seed: int, out: Any
) -> None:
    """Sends what was measured of one environment, whose policies are in the same process and answer it alone."""
    rollout = Rollout(Plan(scene, list(checkpoints), None, num_threads))
    policies = {agent: Policy.load(checkpoint) for agent, checkpoint in checkpoints.items()}
    window, is_warm = Window(seconds), False
    for seed in range(first_seed, 10 * first_seed):
        episode = rollout(0, seed)
        for policy in policies.values():
            policy.start_episode(seed)
        try:
            observations = next(episode)
            while True:
                before = sum(policy.num_passes for policy in policies.values())
                actions = {agent: policy.act([observations[agent]])[0] for agent, policy in policies.items()}
                observations = episode.send(Answer(actions, 0.0, 0))
                if not is_warm:
                    window.start()
                    is_warm = True
                elif measured := window.add(1, sum(policy.num_passes for policy in policies.values()) - before):
                    out.send(measured)
                    return
        except StopIteration:
            continue


def side_by_side(
    scene: SceneConfig, checkpoints: dict[int, Path], num_processes: int, num_threads: int, seconds: float
) -> Measured:
    """Several processes, each with an environment and policies of its own."""
    context = multiprocessing.get_context("spawn")
    set_threads(num_threads)
    pipes, processes = [], []
    for index in range(num_processes):
        ours, theirs = context.Pipe()
        arguments = (scene, checkpoints, num_threads, seconds, FIRST_SEED + 1000 * index, theirs)
        processes.append(context.Process(target=alone, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(ours)
    steps, elapsed, cpu, passes = zip(*(pipe.recv() for pipe in pipes), strict=True)
    for process in processes:
        process.join()
    return Measured(sum(steps), sum(elapsed) / len(elapsed), sum(cpu), sum(passes))


def set_threads(num_threads: int) -> None:
    """Of the processes that are started from now on."""
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):  # of numpy and torch; of Mesa's software renderer
        os.environ[name] = str(num_threads)


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

    cores = num_cores()
    print(f"{cores} cores; {len(agents)} policies on the CPU drive every environment")
    print(f"{'':52}{'steps/s':>9}{'CPU ms/step':>13}{'passes an action':>18}")

    def line(name: str, measured: Measured) -> None:
        steps, seconds, cpu, passes = measured
        numbers = f"{steps / seconds:9.1f}{1000 * cpu / steps:13.1f}{passes / steps / len(agents):18.2f}"
        print(f"{name:52}{numbers}", flush=True)

    line("1 environment, 1 thread", side_by_side(scene, checkpoints, 1, 1, args.seconds))
    line(f"1 environment, {cores} threads", side_by_side(scene, checkpoints, 1, cores, args.seconds))
    line(f"{cores} environments, no batches", side_by_side(scene, checkpoints, cores, 1, args.seconds))
    set_threads(1)
    for batch_size in args.batch:
        measured = in_batches(scene, checkpoints, batch_size, args.seconds)
        line(f"{NUM_GROUPS * batch_size} environments, in batches of {batch_size}", measured)


if __name__ == "__main__":
    run_command(main)
