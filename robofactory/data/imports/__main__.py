"""Your own data: a dataset in another format becomes one of this project's, for one agent."""

import argparse
import contextlib
import importlib
import os
import re
import sys
from pathlib import Path

from robofactory import arguments
from robofactory.config import Within
from robofactory.errors import UserError, run_command, shown
from robofactory.paths import dataset_dir

# format -> its file, its class in there, what it is
FORMATS = {
    "maniskill": ("maniskill", "ManiSkill", "trajectories of ManiSkill or RoboFactory's generator, .h5 beside .json"),
    "zarr": (
        "diffusion_policy",
        "DiffusionPolicy",
        "RoboFactory's and Diffusion Policy's .zarr or .zarr.zip, one agent",
    ),
    "lerobot": ("lerobot", "LeRobot", "LeRobot 2.0, 2.1 or 3.0, images or videos; a directory or a hub id"),
    "rlds": ("rlds", "RLDS", "RLDS episodes, .tfrecord files or a directory with them"),
}
HUB_ID = r"[\w.-]+/[\w.-]+"


def parse_arguments() -> argparse.Namespace:
    formats = "\n".join(f"  {name:<11}{what}" for name, (_, _, what) in FORMATS.items())
    parser = arguments.Parser(
        prog="robofactory import",
        description=f"{__doc__}\n\nformats:\n{formats}",
        epilog="""\
examples:
  robofactory import maniskill demos/LiftBarrier-rf/motionplanning --task LiftBarrier-rf --agent_id 1
  robofactory import zarr LiftBarrier-rf_Agent0_150.zarr --task LiftBarrier-rf --camera side=head_camera
  robofactory import lerobot lerobot/pusht --task PushT --instruction "push the T onto its outline"
  robofactory import rlds bridge/1.0.0 --task Bridge --fps 5 --camera side=observation/image_0

A name that SOURCE does not have is answered with those that it has, a broken episode with the --skip that leaves it
out. Interrupted, even killed, the same command continues.""",
    )
    add = parser.add_argument
    add("format", metavar="FORMAT", help=", ".join(FORMATS))
    add("source", metavar="SOURCE", help="the data: a file, a directory, a hub id")
    add(
        "--task",
        type=arguments.name,
        required=True,
        help="task of the new dataset, for instance LiftBarrier-rf, or a name of your own",
    )
    add("--agent_id", type=arguments.whole(0), default=0, help="agent whose part is taken (default: %(default)s)")
    add("--num", type=arguments.whole(1), help="how many episodes, from the first on (default: all)")
    add("--skip", nargs="+", action="extend", default=[], type=arguments.whole(0), metavar="EPISODE", help="episodes to leave out, by SOURCE's own numbers")  # fmt: skip
    add("--camera", nargs="+", action="extend", metavar="VIEW=NAME", help="name of the view, and the source's camera that it is taken from (default: all, RoboFactory's as side, overhead and wrist)")  # fmt: skip
    add("--action_key", nargs="+", metavar="NAME", help="the actions; several are joined (default: the format's)")
    add("--proprio_key", nargs="+", metavar="NAME", help="what was measured, as --action_key; none: go without")
    add("--instruction_key", metavar="NAME", help="rlds: the text that is the instruction")
    add("--instruction", metavar="WORDS", help="of all episodes (default: the source's own, or the task's)")
    add(
        "--fps",
        type=arguments.number(Within("[0.01, 1000]")),
        help="frames per second, where the source does not say or says about that (29.97: 30)",
    )
    add(
        "--workers",
        type=arguments.whole(0, arguments.MOST_WORKERS),
        help="processes (default: one for each core; 0: only this one)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    path, cameras = check_arguments(args)
    module, kind, _ = FORMATS[args.format]

    from tqdm import tqdm

    from robofactory.data.episodes import DatasetReader
    from robofactory.data.imports.reading import import_episodes
    from robofactory.data.imports.source import Options, describe

    options = Options(
        task=args.task,
        agent_id=args.agent_id,
        cameras=cameras,
        action_keys=tuple(args.action_key) if args.action_key else None,
        proprio_keys=tuple(args.proprio_key) if args.proprio_key else None,
        instruction_key=args.instruction_key,
        instruction=args.instruction,
        fps=args.fps,
        skip=tuple(sorted(set(args.skip))),
    )
    source = getattr(importlib.import_module(f"robofactory.data.imports.{module}"), kind)(path, options)
    for note in source.notes:
        print(shown(f"warning: {source.path}: {note}"), file=sys.stderr)
    available = len(source.episode_ids)
    if args.num is not None and args.num > available:
        raise UserError(f"--num {args.num}: {source.path} has {available} episodes")
    ids = source.episode_ids[: args.num]
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers

    directory = dataset_dir(args.task, args.agent_id, len(ids))
    listed = ", ".join(f"{view} <- {name}" for view, name in source.cameras.items())
    print(shown(f"{source.path} -> {directory}: {len(ids)} episodes, {listed}"))
    seconds_between = 0.1 if sys.stderr.isatty() else 20.0  # a line now and then where nobody watches
    with (
        tqdm(total=len(ids), desc="import", unit="episode", mininterval=seconds_between, dynamic_ncols=True) as bar,
        contextlib.closing(
            import_episodes(source, describe(source, options, args.format), ids, directory, workers)
        ) as counts,
    ):
        bar.initial = bar.n = next(counts)  # of a command that was stopped: no part of the pace
        for done in counts:
            bar.update(done - bar.n)

    reader = DatasetReader(directory)  # the last check that it is whole
    sizes = ", ".join(f"{view} {width}x{height}" for view, (height, width) in reader.description.image_sizes.items())
    print(
        shown(
            f"{directory}: {reader.num_episodes} episodes, {reader.num_frames} frames at {source.fps} Hz, {sizes}; "
            f"actions of {reader.all_actions.shape[1]}, proprio of {reader.all_proprio.shape[1]} dimensions"
        )
    )


def check_arguments(args: argparse.Namespace) -> tuple[Path, dict[str, str] | None]:
    """What the command line alone decides: SOURCE, and view -> camera where any is given.

    A whole number of `fps` becomes an int, which is what datasets say of it.

    Raises:
        UserError: the line names the argument.
    """
    if args.format not in FORMATS:
        raise UserError(f"no format {args.format!r}; there are {', '.join(FORMATS)}")
    if args.fps is not None:
        args.fps = int(args.fps) if args.fps == int(args.fps) else args.fps
    for name in ("action_key", "proprio_key"):
        keys = getattr(args, name) or []
        if len(set(keys)) < len(keys):
            raise UserError(f"--{name} names one twice: {' '.join(keys)}")
    if args.proprio_key and "none" in args.proprio_key and len(args.proprio_key) > 1:
        raise UserError(f"--proprio_key none stands for itself, without {' '.join(args.proprio_key)}")
    if args.instruction is not None and not args.instruction.strip():
        raise UserError("--instruction has no words")
    if args.instruction_key is not None:
        if args.format != "rlds":
            raise UserError(f"--instruction_key is for rlds; {args.format} has no such texts, say --instruction WORDS")
        if args.instruction is not None:
            raise UserError("--instruction and --instruction_key exclude each other")
    return find_source(args.source, args.format), views(args.camera) if args.camera else None


def find_source(given: str, format_name: str) -> Path:
    """SOURCE as a path; only LeRobot's may be a hub id, which is returned as it is."""
    if not given.strip():
        raise UserError("SOURCE is empty")
    try:
        path = Path(given).expanduser()
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown ~user, a NUL
        path, is_there = Path(given), False
    if not is_there and not (format_name == "lerobot" and re.fullmatch(HUB_ID, given)):
        also = ", and is no hub id such as lerobot/pusht" if format_name == "lerobot" else ""
        raise UserError(f"{path} does not exist{also}")
    return path


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
