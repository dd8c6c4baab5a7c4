"""Your own data: a dataset in a foreign format becomes one of ours, for one agent."""

import argparse
import importlib
import os
import re
import sys
from pathlib import Path

from robofactory.errors import UserError, run_command
from robofactory.paths import dataset_dir

# format -> its file, its class in there, what it is
FORMATS = {
    "maniskill": ("maniskill", "ManiSkill", "trajectories of ManiSkill or RoboFactory's generator, .h5 beside .json"),
    "zarr": ("diffusion_policy", "DiffusionPolicy", "RoboFactory's and Diffusion Policy's .zarr, one agent"),
    "lerobot": ("lerobot", "LeRobot", "LeRobot 2.0, 2.1 or 3.0, images or videos; a directory or a hub id"),
    "rlds": ("rlds", "RLDS", "RLDS episodes, .tfrecord files or a directory with them"),
}


def parse_arguments() -> argparse.Namespace:
    formats = "\n".join(f"  {name:<11}{what}" for name, (_, _, what) in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="robofactory import",
        description=f"{__doc__}\n\nformats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  robofactory import maniskill demos/LiftBarrier-rf/motionplanning --task LiftBarrier-rf --agent_id 1
  robofactory import zarr LiftBarrier-rf_Agent0_150.zarr --task LiftBarrier-rf --camera side=head_camera
  robofactory import lerobot lerobot/pusht --task PushT --instruction "push the T onto its outline"
  robofactory import rlds bridge/1.0.0 --task Bridge --fps 5 --camera side=observation/image_0

A name that SOURCE has not is answered with those that it has. Interrupted, even killed, the same command continues.""",
    )
    add = parser.add_argument
    add("format", metavar="FORMAT", help=", ".join(FORMATS))
    add("source", metavar="SOURCE", help="the data: a file, a directory, a hub id")
    add("--task", required=True, help="the task that our dataset is for, for instance LiftBarrier-rf")
    add("--agent_id", type=int, default=0, help="of the agent whose part is taken (default: %(default)s)")
    add("--num", type=int, help="the first so many episodes (default: all)")
    add("--camera", nargs="+", action="extend", metavar="VIEW=NAME", help="our view and the camera it is taken from (default: all, RoboFactory's as side, overhead and wrist)")  # fmt: skip
    add("--action_key", nargs="+", metavar="NAME", help="the actions; several are joined (default: the format's)")
    add("--proprio_key", nargs="+", metavar="NAME", help="what was measured, as --action_key; none: go without")
    add("--instruction_key", metavar="NAME", help="rlds: the text that is the instruction")
    add("--instruction", metavar="WORDS", help="of all episodes (default: the source's own, or the task's)")
    add("--fps", type=int, help="frames a second, where the source does not say")
    add("--workers", type=int, help="processes (default: one for each core; 0: only this one)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.format not in FORMATS:
        raise UserError(f"no format {args.format!r}; there are {', '.join(FORMATS)}")
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    for name, value, least in (("--workers", workers, 0), ("--num", args.num, 1), ("--agent_id", args.agent_id, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    module, kind, _ = FORMATS[args.format]

    from tqdm import tqdm

    from robofactory.data.episodes import DatasetReader
    from robofactory.data.imports.source import Options, describe, import_episodes

    options = Options(
        task=args.task,
        agent_id=args.agent_id,
        cameras=views(args.camera) if args.camera else None,
        action_keys=tuple(args.action_key) if args.action_key else None,
        proprio_keys=tuple(args.proprio_key) if args.proprio_key else None,
        instruction_key=args.instruction_key,
        instruction=args.instruction,
        fps=args.fps,
    )
    source = getattr(importlib.import_module(f"robofactory.data.imports.{module}"), kind)(Path(args.source), options)
    for note in source.notes:
        print(f"warning: {source.path}: {note}", file=sys.stderr)
    available = len(source.episode_ids)
    if args.num is not None and args.num > available:
        raise UserError(f"--num {args.num}: {source.path} has {available} episodes")
    ids = source.episode_ids[: args.num]

    directory = dataset_dir(args.task, args.agent_id, len(ids))
    cameras = ", ".join(f"{view} <- {name}" for view, name in source.cameras.items())
    print(f"{source.path} -> {directory}: {len(ids)} episodes, {cameras}")
    seconds_between = 0.1 if sys.stderr.isatty() else 20.0  # a line now and then where nobody watches
    with tqdm(total=len(ids), desc="import", unit="episode", mininterval=seconds_between, dynamic_ncols=True) as bar:
        counts = import_episodes(source, describe(source, options, args.format), ids, directory, workers)
        bar.initial = bar.n = next(counts)  # of a command that was stopped: no part of the pace
        for done in counts:
            bar.update(done - bar.n)

    reader = DatasetReader(directory)  # the last check that it is whole
    sizes = ", ".join(f"{view} {width}x{height}" for view, (height, width) in reader.description.image_sizes.items())
    print(
        f"{directory}: {reader.num_episodes} episodes, {reader.num_frames} frames at {source.fps} Hz, {sizes}; "
        f"actions of {reader.all_actions.shape[1]}, proprio of {reader.all_proprio.shape[1]} dimensions"
    )


def views(given: list[str]) -> dict[str, str]:
    """`side=head_camera` -> {"side": "head_camera"}."""
    pairs = [text.partition("=") for text in given]
    for view, _, name in pairs:
        if not (re.fullmatch(r"\w+", view) and name):
            raise UserError(f"--camera takes VIEW=NAME, for instance side=head_camera, not {view + _ + name!r}")
    if len({view for view, _, _ in pairs}) < len(pairs):
        raise UserError(f"--camera names a view twice: {' '.join(given)}")
    return {view: name for view, _, name in pairs}


if __name__ == "__main__":
    run_command(main)
