"""What every foreign format gives, and how what it calls things is chosen; `reading` makes a dataset of it.

A format is one file with one class, a `Source`. It says in its constructor what all episodes share, so that a wrong name
or an odd dataset is one line before anything is written, and reads one episode at a time, so that memory does not grow
with the dataset.
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from robofactory.config import load_scene, scene_file
from robofactory.data.episodes import DatasetDescription
from robofactory.data.imports.frames import Frame
from robofactory.errors import UserError

# Our view -> the names that RoboFactory's recordings have for it; {agent} stands for the agent's number.
KNOWN_CAMERAS = {
    "side": ("head_camera_agent{agent}", "head_camera", "side_image"),
    "overhead": ("head_camera_global", "global_image"),
    "wrist": ("wrist_camera_agent{agent}", "wrist_camera", "wrist_image"),
}
NONE = ("none",)  # what --proprio_key says for: without
FETCH_AGAIN = "the source is incomplete; get it again"
NEAR_FPS = 0.01  # 29.97 is 0.1 % from 30: of a rate that the user states, how far it may be from the recorded one
MOST_DIMENSIONS = 4096  # of a vector: more are no joints
LEAST_FPS, MOST_FPS = 0.01, 1000.0


@dataclass(frozen=True)
class Options:
    """What the user says about a source. None: what the format has by default.

    cameras: our view -> the source's name of the camera.
    action_keys, proprio_keys: names in the source; of several, the vectors are joined in this order.
    instruction_key: the name of the text in the source that is the instruction.
    instruction: of all episodes, instead of what the source says.
    skip: the source's numbers of episodes that are not imported.
    """

    task: str
    agent_id: int = 0
    cameras: Mapping[str, str] | None = None
    action_keys: tuple[str, ...] | None = None
    proprio_keys: tuple[str, ...] | None = None
    instruction_key: str | None = None
    instruction: str | None = None
    fps: float | int | None = None
    skip: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recording:
    """One episode as its source has it. Of vectors, what is no number or not finite is found by `reading`.

    frames: view -> pictures one after the other, each an array or an encoded picture (see `frames`).
    file: where the episode lies, for messages; None: in the source itself.
    notes: what the user should know of it, a line each; complete once all frames were taken.
    """

    frames: Mapping[str, Iterable[Frame]]
    actions: Shaped[np.ndarray, "n a"]
    proprio: Shaped[np.ndarray, "n s"]
    instruction: str
    file: Path | None = None
    notes: Sequence[str] = ()


class Source(ABC):
    """A dataset in a foreign format. Holds no open file: it goes to worker processes as it is.

    cameras: view -> name in the source.
    image_sizes: view -> (height, width) in px, of all episodes.
    whites: view -> what white is, of cameras whose pictures are arrays of floats (`frames.white_of`).
    action_names, proprio_names: of their dimensions; no proprio has none.
    fps: an int where it is a whole number.
    episode_ids: what is imported, ascending; numbers that the source itself has, or counts (`choose_episodes`).
    notes: what the user should know, a line each.
    """

    path: Path
    cameras: dict[str, str]
    image_sizes: dict[str, tuple[int, int]]
    action_names: tuple[str, ...]
    proprio_names: tuple[str, ...]
    fps: float | int
    episode_ids: list[int]
    robot_type: str = "unknown"
    whites: Mapping[str, float | None] = {}
    notes: Sequence[str] = ()

    @abstractmethod
    def read(self, episode: int) -> Recording: ...


def describe(source: Source, options: Options, kind: str) -> DatasetDescription:
    """What all imported episodes share, with where they are from: another source or mapping is never mixed in.

    Which episodes are skipped is no part of it: an import that met a bad one goes on without it.
    """
    mapping = [f"{view}={name}" for view, name in source.cameras.items()]
    shown = {name: value for name, value in vars(options).items() if name not in ("cameras", "task", "skip")}
    mapping += [f"{name}={value}" for name, value in shown.items() if value]
    return DatasetDescription(
        scene_yaml="",
        agent_id=options.agent_id,
        image_sizes=source.image_sizes,
        joint_names=source.action_names,
        fps=source.fps,
        robot_type=source.robot_type,
        driver=f"imported from {kind} {source.path.name}: {', '.join(mapping)}",
        proprio_names=source.proprio_names,
    )


# --------------------------------------------------------------------------------------------------------- by name


def choose(name: str, available: Iterable[str], what: str, option: str, source: Path) -> str:
    """The name, if the source has it.

    Raises:
        UserError: it does not; the line lists what there is.
    """
    names = list(available)
    if name not in names:
        raise UserError(f"{source} has no {what} {name!r}; it has {', '.join(names) or 'none'} ({option})")
    return name


def choose_episodes(found: Iterable[int], options: Options, source: Path) -> list[int]:
    """The numbers of the episodes to import, ascending: all that the source has but those to skip.

    Raises:
        UserError: the source names one twice, has none of a number to skip, or none is left.
    """
    counts = Counter(list(found))
    doubled = [number for number, count in counts.items() if count > 1]
    if doubled:
        raise UserError(f"{source} has episode {doubled[0]} twice; {FETCH_AGAIN}")
    ids = sorted(counts)
    unknown = [number for number in options.skip if number not in counts]
    if unknown:
        is_range = len(ids) > 1 and ids == list(range(ids[0], ids[-1] + 1))
        listed = f"{ids[0]} to {ids[-1]}" if is_range else ", ".join(map(str, ids[:10])) or "none"
        raise UserError(f"--skip {unknown[0]}: {source} has no such episode to import; it has {listed}")
    left = [number for number in ids if number not in options.skip]
    if not left:
        raise UserError(f"{source} has no episode" + (" that is not skipped" if ids else f"; {FETCH_AGAIN}"))
    return left


def choose_cameras(
    available: Sequence[str], unsuitable: Mapping[str, str], options: Options, source: Path, notes: list[str]
) -> dict[str, str]:
    """View -> camera: as the options say, or all cameras but those of other agents.

    Without options, RoboFactory's cameras get our views' names, and others the last part of their own.

    Args:
        unsuitable: cameras that cannot be imported, and why, for instance "it is depth". Where none was chosen they
            are left out, and a note says so.
    """
    if options.cameras is not None:
        for name in options.cameras.values():
            if name in unsuitable:
                raise UserError(f"{source}: camera {name!r} cannot be imported: {unsuitable[name]}")
        return {
            view: choose(name, available, "camera", f"--camera {view}=NAME", source)
            for view, name in options.cameras.items()
        }
    known = {name.format(agent=options.agent_id): view for view, names in KNOWN_CAMERAS.items() for name in names}
    notes += [
        f"{name!r} is no camera that can be imported, and left out: {reason}" for name, reason in unsuitable.items()
    ]
    views: dict[str, str] = {}
    for name in available:
        short = re.split(r"[./]", name)[-1]
        if re.search(r"agent\d+$", short) and not short.endswith(f"agent{options.agent_id}"):
            continue
        view = known.get(short, short)
        if view in views:
            raise UserError(
                f"{source}: cameras {views[view]} and {name} would both be {view!r}; say --camera VIEW=NAME"
            )
        if not view.strip() or not view.isprintable():
            raise UserError(f"{source}: camera {name!r} needs a name for its view; say --camera VIEW=NAME")
        views[view] = name
    if not views:
        listed = "".join(f"; {name}: {reason}" for name, reason in list(unsuitable.items())[:3])
        listed = f"; it has {', '.join(available)}{listed}" if available else listed or "; it has none"
        raise UserError(f"{source} has no camera of agent {options.agent_id} that can be imported{listed}")
    return views


def choose_vectors(
    keys: tuple[str, ...], available: Mapping[str, Sequence[str]], what: str, source: Path
) -> tuple[str, ...]:
    """The names of the dimensions of these vectors, joined; no two are the same.

    A name that several have gets its vector's in front, and a number behind it where that is not enough.

    Args:
        available: each vector's names of its dimensions.
        what: action or proprio.
    """
    option = f"--{what}_key NAME" + (", or none to go without" if what == "proprio" else "")
    named = [(key, name) for key in keys for name in available[choose(key, available, what, option, source)]]
    counts = Counter(name for _, name in named)
    names = [name if counts[name] == 1 else f"{key}.{name}" for key, name in named]
    counts = Counter(names)
    names = [name if counts[name] == 1 else f"{name}_{index}" for index, name in enumerate(names)]
    if len(set(names)) < len(names):
        raise UserError(f"{source}: two dimensions of its {what} would both be {Counter(names).most_common(1)[0][0]!r}")
    return tuple(names)


def numbered(key: str, size: int) -> list[str]:
    """Names of dimensions that the source has none for."""
    return [f"{key}_{index}" for index in range(size)]


def choose_fps(
    recorded: float | int | None, options: Options, usual: int | None, source: Path, notes: list[str]
) -> float | int:
    """Frames per second: what the user says where it is near what the source says, else that, else what is usual.

    Raises:
        UserError: nobody knows, they say different things, or it is no rate.
    """
    fps = next((value for value in (options.fps, recorded, usual) if value is not None), None)
    if fps is None:
        raise UserError(f"{source} does not say how many frames per second it has; say --fps N")
    for value in (fps, recorded):
        if value is not None and not LEAST_FPS <= value <= MOST_FPS:
            raise UserError(f"{source}: {value:g} frames per second; needed: {LEAST_FPS:g} to {MOST_FPS:g}")
    if recorded is not None and fps != recorded:
        if not math.isclose(fps, recorded, rel_tol=NEAR_FPS):
            raise UserError(f"{source} was recorded at {recorded:g} frames per second, not {fps:g}; omit --fps")
        notes.append(f"it was recorded at {recorded:g} frames per second, and is imported as {fps:g}")
    return int(fps) if fps == int(fps) else float(fps)


def instruction_of_task(options: Options, source: Path) -> str:
    """For formats that have no words: the user's, or those of the task's scene."""
    if options.instruction is not None:
        return options.instruction
    try:
        return load_scene(scene_file(options.task)).instruction
    except UserError:
        raise UserError(f"{source} has no instructions, and {options.task} is no task of this project; say --instruction WORDS") from None  # fmt: skip


def one_instruction(options: Options, found: Iterable[str], source: Path, episode: int) -> str:
    """For formats that have words, which may be another for each episode.

    Raises:
        UserError: they change within the episode, or there are none.
    """
    if options.instruction is not None:
        return options.instruction
    instructions = sorted(set(found))
    if len(instructions) != 1:
        listed = ", ".join(map(repr, instructions[:3])) or "none"
        raise UserError(f"{source}: episode {episode} has {len(instructions)} instructions ({listed}); one is needed, say --instruction WORDS")  # fmt: skip
    return instructions[0]


def needs(package: str) -> UserError:
    """For the except clause of an import."""
    return UserError(f"this format needs {package}: pip install 'robofactory[imports]'")
