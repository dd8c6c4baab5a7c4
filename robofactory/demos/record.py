"""Record expert demonstrations in simulation: one LeRobot v3.0 dataset for each agent of the task.

With --round, learned policies drive instead, and what is recorded is what the expert would have done in their place: what
the next round of training learns from (DAgger).
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from robofactory import arguments
from robofactory.config import (
    FIRST_EVALUATION_SEED,
    SEEDS_A_ROUND,
    DataConfig,
    RecipeConfig,
    SceneConfig,
    Within,
    from_yaml,
    load_recipe,
    load_task_scene,
    of_round,
    overridden,
    to_yaml,
    with_pictures,
)
from robofactory.errors import UserError, run_command
from robofactory.paths import dataset_dir, find_checkpoints, find_data_num, relabelled_dir

if TYPE_CHECKING:
    from robofactory import processes
    from robofactory.data.episodes import DatasetDescription, DatasetWriter, Episode

MAX_FAILURES_IN_A_ROW = 50
POLICY = "openvla"  # the kind that --round lets drive
TIME_LIMIT_S = 600.0
SECONDS_PER_LINE = 20.0  # of progress, where there is no terminal to draw a bar on


def parse_arguments() -> argparse.Namespace:
    parser = arguments.Parser(
        prog="robofactory record",
        description=__doc__,
        epilog="""\
examples:
  robofactory record --task LiftBarrier-rf --num 150
  robofactory record --task LiftBarrier-rf --num 20 --visual_detail low --width 128 --height 96
  robofactory record --task LiftBarrier-rf --num 10 objects.barrier.mass_kg=0.5
  robofactory record --task LiftBarrier-rf --recipe robot_openvla_tiny
  robofactory record --task LiftBarrier-rf --recipe robot_openvla_tiny --round 1

Seeds are taken in order; those where the expert fails are dropped. Interrupted, even killed, the same command
continues; the result is the same, bit for bit, for any number of workers and interruptions.""",
    )
    parser.add_argument("--task", type=arguments.name, required=True, help="for instance LiftBarrier-rf")
    parser.add_argument("--recipe", help="take the number of episodes, the noise and the pictures from its data section (with --round the number from its relabel section), where no option or override here says otherwise")  # fmt: skip
    parser.add_argument("--num", type=arguments.whole(1), help=f"episodes (default: {DataConfig.num_episodes})")
    parser.add_argument(
        "--workers", type=arguments.whole(1, arguments.MOST_WORKERS), help="processes (default: one for each core)"
    )
    parser.add_argument("--time_limit", type=arguments.number(Within("(0, 1e6]")), default=TIME_LIMIT_S, metavar="SECONDS", help="a process that plays an episode for longer hangs, and ends the recording (default: %(default)g)")  # fmt: skip
    parser.add_argument("--noise", type=arguments.number(Within("[0, 1]")), metavar="SHARE", help=f"share of the episodes with perturbed actions, the labels stay the expert's (default: {DataConfig.noise_share}; with --round 0)")  # fmt: skip
    parser.add_argument(
        "--config", type=arguments.path, metavar="SCENE.yaml", help="scene of the task (default: the task's own)"
    )
    parser.add_argument(
        "--seed",
        type=arguments.whole(0, FIRST_EVALUATION_SEED - 1, above="those above are for evaluation"),
        default=0,
        metavar="START",
        help="first seed (default: %(default)s)",
    )
    parser.add_argument("--visual_detail", choices=["low", "full"], help="meshes to render (default: the scene's)")
    parser.add_argument("--width", type=arguments.whole(1, 8192), help="of every camera, in px (default: the scene's)")
    parser.add_argument("--height", type=arguments.whole(1, 8192), help="of every camera, in px (default: the scene's)")
    parser.add_argument("--round", type=arguments.whole(0), default=0, help="0: demonstrations of the expert. N: what training adds in its round N, the latest policies drive and the expert says what it would have done (default: 0)")  # fmt: skip
    parser.add_argument("--data_num", type=arguments.whole(1), help="with --round: demonstrations the policies were trained on, the end of the run's name (default: the only one there is)")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the scene, or the recipe")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_arguments()
    if args.round == 0 and args.data_num is not None:
        raise UserError("--data_num says whose policies drive, and goes with --round 1 or above; omit it")
    if args.round > 0:
        given = [args.config, args.visual_detail, args.width, args.height, args.seed or None]
        if any(value is not None for value in given) or any(map(is_of_the_scene, args.overrides)):
            raise UserError("--round records the scene and pictures of the demonstrations; omit what changes them")
    if args.recipe is not None:
        fill_in(args, load_recipe(args.recipe, [o for o in args.overrides if not is_of_the_scene(o)]))
    elif any(not is_of_the_scene(override) for override in args.overrides):
        raise UserError(f"{' '.join(args.overrides)}: only a recipe has such keys; name it with --recipe")
    num_episodes = DataConfig.num_episodes if args.num is None else args.num
    if args.round > 0:
        if num_episodes > SEEDS_A_ROUND:
            raise UserError(f"--num {num_episodes}: a round has at most {SEEDS_A_ROUND}, so that the next has layouts of its own")  # fmt: skip
        relabel(args.task, num_episodes, args.round, args.data_num, noise_share=args.noise or 0.0, workers=args.workers, time_limit_s=args.time_limit)  # fmt: skip
        return
    scene = load_task_scene(args.task, args.config)
    scene = with_pictures(scene, args.visual_detail, args.width, args.height)
    scene = overridden(scene, [o for o in args.overrides if is_of_the_scene(o)])  # last, as they say most exactly what
    noise_share = DataConfig.noise_share if args.noise is None else args.noise
    record(scene, num_episodes, noise_share=noise_share, workers=args.workers, first_seed=args.seed, time_limit_s=args.time_limit)  # fmt: skip


def is_of_the_scene(override: str) -> bool:
    """Whether a `section.key=value` belongs to the scene; otherwise it is one of the recipe's sections."""
    return override.partition("=")[0].partition(".")[0] not in {
        field.name for field in dataclasses.fields(RecipeConfig)
    }


def fill_in(args: argparse.Namespace, recipe: RecipeConfig) -> None:
    """What the recipe wants recorded, where the command line does not say."""
    data, relabel = recipe.data, recipe.relabel
    of_round(recipe, args.round)  # refuses a round that it does not have
    if args.round > 0 and relabel is not None:
        wanted: dict[str, Any] = {"num": relabel.num_episodes, "data_num": data.num_episodes}
    else:
        wanted = {"num": data.num_episodes, "noise": data.noise_share, "visual_detail": data.visual_detail}
        wanted |= {"width": data.image_width, "height": data.image_height}
    for name, value in wanted.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


# ------------------------------------------------------------------------------------------------------- the recording


class Player(Protocol):
    """Plays the episode of a seed: each agent's part of it, or None where the expert failed."""

    def play(self, seed: int) -> "list[Episode] | None": ...


def record(
    scene: SceneConfig,
    num_episodes: int,
    *,
    noise_share: float = 0.0,
    workers: int | None = None,
    first_seed: int = 0,
    directories: Sequence[Path] | None = None,
    make_player: Callable[[SceneConfig, float], Player] | None = None,
    driver: str = "expert",
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Path]:
    """Record until each agent's dataset has this many episodes; continues what is there. Returns the datasets.

    Args:
        noise_share: of the episodes that execute perturbed actions; which ones, the seed decides.
        workers: processes; None: one for each core.
        directories: of the datasets, one an agent; None: where `paths.dataset_dir` says.
        make_player: where episodes come from; None: the expert in the simulator. Called in the workers, so it must be
            importable.
        driver: who acts in them, for the datasets' description.
        time_limit_s: after which a process that plays an episode hangs, for the first one with the set-up.
    Raises:
        UserError: a bad number; a dataset of another scene or share of noise, or that another process writes; no device
            that can render; a full disk; an expert that always fails; a worker that died or hangs. Complete episodes
            are kept.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _check(num_episodes, noise_share, workers, first_seed)
    from robofactory import files, processes
    from robofactory.data.episodes import DatasetWriter
    from robofactory.demos.players import ExpertPlayer

    if directories is None:
        directories = [dataset_dir(scene.task, agent, num_episodes) for agent in range(scene.num_agents)]
    with contextlib.ExitStack() as ours:
        for directory in directories:
            ours.enter_context(files.owned(directory))
        writers = [
            DatasetWriter(directory, describe(scene, agent, noise_share, first_seed, driver))
            for agent, directory in enumerate(directories)
        ]
        done = min(writer.num_episodes for writer in writers)
        seeds = writers[0].seeds[:done]
        for writer in writers:
            if writer.seeds[:done] != seeds:
                raise UserError(f"{writer.directory} and {writers[0].directory} hold other seeds; delete one of them")
        progress = Progress(num_episodes, done)
        setup = partial(start_player, make_player or ExpertPlayer, scene, noise_share)
        pool = processes.Pool(setup, max(1, min(workers, num_episodes - done)), time_limit_s)
        try:
            _append(writers, pool, seeds[-1] + 1 if seeds else first_seed, progress)
        except processes.Lost as lost:
            raise UserError(
                f"the process that recorded seed {lost.task} died ({lost.how}); if memory was short, use fewer "
                "--workers, if an episode needs longer, a higher --time_limit; the same command continues"
            ) from None
        finally:
            pool.close()
            progress.close()
        for writer in writers:
            if not writer.is_finished:
                writer.finalize()
        print(summary(directories, progress))
    return list(directories)


def _append(writers: "Sequence[DatasetWriter]", pool: "processes.Pool", first_seed: int, progress: "Progress") -> None:
    """Play seeds in order until each dataset has enough episodes.

    Raises:
        UserError: the expert always fails, or the seeds for recording are used up.
    """
    failures_in_a_row = 0
    seeds = range(first_seed, FIRST_EVALUATION_SEED)
    # Never more ahead than are missing.
    for seed, parts in zip(seeds, pool.results(seeds, lambda: progress.missing), strict=False):
        failures_in_a_row = 0 if parts else failures_in_a_row + 1
        if failures_in_a_row == MAX_FAILURES_IN_A_ROW:
            raise UserError(
                f"the expert failed on {failures_in_a_row} seeds in a row, the last is {seed}; look at the scene with "
                "robofactory preview --config SCENE.yaml --render scene.png"
            )
        if parts is not None:
            for writer, part in zip(writers, parts, strict=True):
                if writer.num_episodes == progress.done:  # a kill between two agents leaves the first with one more
                    writer.append(part)
        progress.update(progress.done + (parts is not None), dropped=parts is None)
    if progress.missing:
        raise UserError(
            f"seed {FIRST_EVALUATION_SEED} is for evaluation; record fewer demonstrations or begin at a lower one"
        )


def relabel(
    task: str,
    num_episodes: int,
    round_number: int,
    data_num: int | None,
    *,
    noise_share: float,
    workers: int | None,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Path]:
    """Record what the expert would have done in the place of the latest policies, for a round of training.

    In the scene of the policies' demonstrations, on layouts that these do not have.

    Raises:
        UserError: as `record`; an agent without a policy.
    """
    from robofactory.data.episodes import DatasetReader, is_complete
    from robofactory.demos.players import PolicyPlayer
    from robofactory.policy import digest_of_weights

    agents = list(range(load_task_scene(task, None).num_agents))
    data_num = find_data_num(POLICY, task, agents, data_num)
    directories = [relabelled_dir(task, agent, data_num, round_number) for agent in agents]
    if all(is_complete(directory, num_episodes) for directory in directories):
        print("recorded already: " + ", ".join(map(str, directories)))  # and the latest policies may be others by now
        return directories
    readers = [DatasetReader(dataset_dir(task, agent, data_num)) for agent in agents]
    checkpoints = list(find_checkpoints(POLICY, task, agents, "latest", data_num).values())
    return record(
        from_yaml(SceneConfig, readers[0].description.scene_yaml, f"the scene of {readers[0].directory}"),
        num_episodes,
        noise_share=noise_share,
        workers=workers,
        time_limit_s=time_limit_s,
        first_seed=readers[0].seeds[-1] + 1 + SEEDS_A_ROUND * (round_number - 1),
        directories=directories,
        make_player=partial(PolicyPlayer, checkpoints=checkpoints),
        driver=f"{POLICY}, weights " + ", ".join(digest_of_weights(checkpoint)[:12] for checkpoint in checkpoints),
    )


def describe(scene: SceneConfig, agent: int, noise_share: float, first_seed: int, driver: str) -> "DatasetDescription":
    """What all episodes of one agent share."""
    from robofactory import robots
    from robofactory.data.episodes import DatasetDescription

    cameras = {camera.uid: camera for camera in scene.cameras}
    views = {view: cameras[uid.format(agent=agent)] for view, uid in scene.views.items()}
    return DatasetDescription(
        scene_yaml=to_yaml(scene),
        agent_id=agent,
        image_sizes={view: (camera.height, camera.width) for view, camera in views.items()},
        joint_names=robots.find(scene.robots[agent].uid).names,
        fps=scene.control_freq_hz,
        robot_type=scene.robots[agent].uid,
        noise_share=noise_share,
        first_seed=first_seed,
        driver=driver,
    )


def summary(directories: Sequence[Path], progress: "Progress") -> str:
    """The datasets in one line each, for people. Reading them is the last check that they are whole."""
    from robofactory.data.episodes import DatasetReader

    lines = []
    for directory in directories:
        reader = DatasetReader(directory)
        lengths, starts = reader.episode_lengths, reader.episode_starts
        perturbed = sum(reader.all_perturbed[reader.episode_frames(e)].any() for e in range(reader.num_episodes))
        dropped = reader.seeds[-1] - reader.description.first_seed + 1 - reader.num_episodes
        megabytes = sum(file.stat().st_size for file in directory.glob("**/*") if file.is_file()) / 1e6
        assert starts[-1] + lengths[-1] == reader.num_frames
        lines.append(
            f"{directory}: {reader.num_episodes} episodes ({perturbed} perturbed), {dropped} seeds dropped, "
            f"{lengths.mean():.1f} steps per episode ({lengths.min()} to {lengths.max()}), {megabytes:.1f} MB"
        )
    if progress.recorded:
        lines.append(f"{progress.recorded} episodes in {progress.seconds:.0f} s, {progress.pace:.2f} s per episode")
    return "\n".join(lines)


def _check(num_episodes: int, noise_share: float, workers: int, first_seed: int) -> None:
    if num_episodes < 1:
        raise UserError(f"--num must be at least 1, got {num_episodes}")
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    if not 0.0 <= noise_share <= 1.0:
        raise UserError(f"--noise must be in [0, 1], got {noise_share}")
    if not 0 <= first_seed < FIRST_EVALUATION_SEED:
        raise UserError(
            f"--seed must be in [0, {FIRST_EVALUATION_SEED}), got {first_seed}; those from "
            f"{FIRST_EVALUATION_SEED} on are for evaluation"
        )


class Progress:
    """A bar with the time that is left; where there is no terminal, a plain line now and then."""

    def __init__(self, total: int, done: int):
        from tqdm import tqdm

        self.total, self.done, self.first, self.dropped = total, done, done, 0
        self.started = self.last_line = time.monotonic()
        self.seconds = 0.0
        self.bar = tqdm(
            total=total, initial=done, desc="demonstrations", unit="episode", disable=None, dynamic_ncols=True
        )

    @property
    def missing(self) -> int:
        return self.total - self.done

    @property
    def recorded(self) -> int:
        """Episodes of this run."""
        return self.done - self.first

    @property
    def pace(self) -> float:
        """Seconds an episode."""
        return self.seconds / max(1, self.recorded)

    def update(self, done: int, dropped: bool) -> None:
        self.bar.update(done - self.done)
        self.done, self.dropped = done, self.dropped + dropped
        self.seconds = time.monotonic() - self.started
        self.bar.set_postfix(dropped=self.dropped, refresh=False)
        if self.bar.disable and time.monotonic() - self.last_line > SECONDS_PER_LINE:
            self.last_line = time.monotonic()
            left = self.pace * self.missing
            line = f"demonstrations: {done}/{self.total}, {self.dropped} dropped, about {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


def start_player(
    make_player: Callable[[SceneConfig, float], Player], scene: SceneConfig, noise_share: float
) -> "Callable[[int], list[Episode] | None]":
    """In a process of its own: what plays a seed there."""
    os.environ["OMP_NUM_THREADS"] = "1"  # one process a core: more threads make each other wait
    import torch

    torch.set_num_threads(1)
    return make_player(scene, noise_share).play


if __name__ == "__main__":
    run_command(main)
