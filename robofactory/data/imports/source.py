"""What every foreign format gives, and how that becomes a dataset of ours: `episodes(source, ids, workers)`.

A format is one file with one class, a `Source`. It says in its constructor what all episodes share, so that a wrong name
or an odd dataset is one line before anything is written, and reads one episode at a time, so that memory does not grow
with the dataset.
"""

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from robofactory.config import load_scene, scene_file
from robofactory.data.episodes import DatasetDescription, DatasetWriter, Episode, encode_png
from robofactory.errors import UserError

# Our view -> the names that RoboFactory's recordings have for it; {agent} stands for the agent's number.
KNOWN_CAMERAS = {
    "side": ("head_camera_agent{agent}", "head_camera", "side_image"),
    "overhead": ("head_camera_global", "global_image"),
    "wrist": ("wrist_camera_agent{agent}", "wrist_camera", "wrist_image"),
}
NONE = ("none",)  # what --proprio_key says for: without
FETCH_AGAIN = "the source is incomplete; get it again"


@dataclass(frozen=True)
class Options:
    """What the user says about a source. None: what the format has by default.

    cameras: our view -> the source's name of the camera.
    action_keys, proprio_keys: names in the source; of several, the vectors are joined in this order.
    instruction_key: the name of the text in the source that is the instruction.
    instruction: of all episodes, instead of what the source says.
    """

    task: str
    agent_id: int = 0
    cameras: Mapping[str, str] | None = None
    action_keys: tuple[str, ...] | None = None
    proprio_keys: tuple[str, ...] | None = None
    instruction_key: str | None = None
    instruction: str | None = None
    fps: int | None = None


@dataclass(frozen=True)
class Recording:
    """One episode as its source has it.

    frames: view -> pictures one after the other, each an array or an encoded file (PNG, JPEG).
    """

    frames: Mapping[str, Iterable[UInt8[np.ndarray, "h w 3"] | bytes]]
    actions: Float[np.ndarray, "n a"]
    proprio: Float[np.ndarray, "n s"]
    instruction: str


class Source(ABC):
    """A dataset in a foreign format. Holds no open file: it goes to worker processes as it is.

    cameras: view -> name in the source.
    image_sizes: view -> (height, width) in px, of all episodes.
    action_names, proprio_names: of their dimensions; no proprio has none.
    episode_ids: what can be imported, ascending; numbers that the source itself has, or counts.
    notes: what the user should know, a line each.
    """

    path: Path
    cameras: dict[str, str]
    image_sizes: dict[str, tuple[int, int]]
    action_names: tuple[str, ...]
    proprio_names: tuple[str, ...]
    fps: int
    episode_ids: list[int]
    robot_type: str = "unknown"
    notes: tuple[str, ...] = ()

    @abstractmethod
    def read(self, episode: int) -> Recording: ...


def describe(source: Source, options: Options, kind: str) -> DatasetDescription:
    """What all imported episodes share, with where they are from: another source or mapping is never mixed in."""
    mapping = [f"{view}={name}" for view, name in source.cameras.items()]
    mapping += [f"{name}={value}" for name, value in vars(options).items() if value and name not in ("cameras", "task")]
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
        UserError: it has not; the line lists what there is.
    """
    names = list(available)
    if name not in names:
        raise UserError(f"{source} has no {what} {name!r}; it has {', '.join(names) or 'none'} ({option})")
    return name


def choose_cameras(available: Sequence[str], options: Options, source: Path) -> dict[str, str]:
    """View -> camera: as the options say, or all cameras but those of other agents.

    Without options, RoboFactory's cameras get our views' names, and others the last part of their own.
    """
    if options.cameras is not None:
        return {
            view: choose(name, available, "camera", f"--camera {view}=NAME", source)
            for view, name in options.cameras.items()
        }
    known = {name.format(agent=options.agent_id): view for view, names in KNOWN_CAMERAS.items() for name in names}
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
        views[view] = name
    if not views:
        raise UserError(f"{source} has no camera of agent {options.agent_id}; it has {', '.join(available) or 'none'}")
    return views


def choose_vectors(
    keys: tuple[str, ...], available: Mapping[str, Sequence[str]], what: str, source: Path
) -> tuple[str, ...]:
    """The names of the dimensions of these vectors, joined.

    Args:
        available: each vector's names of its dimensions.
        what: action or proprio.
    """
    option = f"--{what}_key NAME" + (", or none to go without" if what == "proprio" else "")
    return tuple(name for key in keys for name in available[choose(key, available, what, option, source)])


def numbered(key: str, size: int) -> list[str]:
    """Names of dimensions that the source has none for."""
    return [f"{key}_{index}" for index in range(size)]


def choose_fps(recorded: float | int | None, options: Options, usual: int | None, source: Path) -> int:
    """Frames a second: what the source says, else the options, else what is usual in its format.

    Raises:
        UserError: nobody knows, they say different things, or it is no whole number.
    """
    if recorded is not None and options.fps not in (None, recorded):
        raise UserError(f"{source} was recorded at {recorded:g} frames a second, not {options.fps}; leave --fps away")
    fps = next((value for value in (recorded, options.fps, usual) if value is not None), None)
    if fps is None:
        raise UserError(f"{source} does not say how many frames a second it has; say --fps N")
    if fps <= 0 or fps != int(fps):
        raise UserError(f"{source}: {fps:g} frames a second; a positive whole number is needed")
    return int(fps)


def instruction_of_task(options: Options, source: Path) -> str:
    """For formats that have no words: the user's, or those of the task's scene."""
    if options.instruction is not None:
        return options.instruction
    try:
        return load_scene(scene_file(options.task)).instruction
    except UserError:
        raise UserError(f"{source} has no instructions, and {options.task} is none of our tasks; say --instruction WORDS") from None  # fmt: skip


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


# ---------------------------------------------------------------------------------------------------------- reading


def episodes(source: Source, ids: Sequence[int], workers: int) -> Iterator[Episode]:
    """These episodes of a source, in this order, ready to be written.

    They are decoded and encoded ahead in processes, one episode in each; 0: in this one. No process survives this one,
    however it ends.

    Raises:
        UserError: an episode is broken or unlike the first; a worker died.
    """
    workers = min(workers, len(ids))
    ahead: dict[str, Any] = {"prefetch_factor": 1, "multiprocessing_context": "spawn"} if workers else {}
    loader = DataLoader(
        _Episodes(source), batch_size=None, sampler=ids, collate_fn=_as_it_is, num_workers=workers, **ahead
    )
    try:
        for episode in loader:
            if isinstance(episode, UserError):
                raise episode
            yield episode
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError("a process that read episodes died; if it was killed for memory, use fewer --workers; the same command continues") from None  # fmt: skip


class _Episodes(Dataset[Episode | UserError]):
    """Mistakes come back as values: an exception from a worker would come with its traceback in the message."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, episode: int) -> Episode | UserError:
        try:
            return read_episode(self.source, episode)
        except UserError as error:
            return error


def _as_it_is(episode: Any) -> Any:
    return episode


def read_episode(source: Source, episode: int) -> Episode:
    """One episode, with its pictures as PNG.

    Raises:
        UserError: its lengths do not fit each other, or its sizes not those of the first.
    """
    recording, name = source.read(episode), f"{source.path}: episode {episode}"
    actions = np.ascontiguousarray(recording.actions, np.float32)
    proprio = np.ascontiguousarray(recording.proprio, np.float32)
    for what, values, names in (
        ("action", actions, source.action_names),
        ("proprio", proprio, source.proprio_names),
    ):
        if values.shape[1] != len(names):
            raise UserError(f"{name}: its {what} has {values.shape[1]} dimensions, that of the first has {len(names)}")
    images = {}
    for view, frames in recording.frames.items():
        images[view] = [_to_png(frame, source.image_sizes[view], f"{name}, view {view}") for frame in frames]
    lengths = {"actions": len(actions), "proprio": len(proprio), **{view: len(files) for view, files in images.items()}}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{name}: " + ", ".join(f"{count} {what}" for what, count in lengths.items()) + "; the lengths do not fit")  # fmt: skip
    if len(actions) == 0:
        raise UserError(f"{name} has no frame")
    perturbed = np.zeros(len(actions), bool)
    return Episode(images, proprio, actions, perturbed, recording.instruction, seed=episode)


def _to_png(frame: Shaped[np.ndarray, "..."] | bytes, size: tuple[int, int], name: str) -> bytes:
    """A picture as `encode_png` writes it; a file that is PNG already stays what it is."""
    if isinstance(frame, bytes):
        with open_image(frame, name) as image:
            is_done = image.format == "PNG" and image.mode == "RGB"
            found, pixels = (image.height, image.width), None if is_done else np.asarray(image.convert("RGB"))
    else:
        found, pixels = frame.shape[:2], frame
        if frame.dtype != np.uint8 or frame.shape[2:] != (3,):
            raise UserError(f"{name}: its pictures are {frame.dtype} {list(frame.shape)}; expected uint8 [h, w, 3]")
    if tuple(found) != size:
        raise UserError(f"{name}: {found[1]}x{found[0]} px, but the first episode has {size[1]}x{size[0]}; all must be alike")  # fmt: skip
    if pixels is None:
        assert isinstance(frame, bytes)
        return frame
    return encode_png(pixels)


def open_image(content: bytes, name: str) -> Image.Image:
    """An encoded picture. Raises UserError where it is none."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError):  # what Pillow says of a broken PNG
        raise UserError(f"{name}: a picture of {len(content)} bytes cannot be read") from None
    return image


# ---------------------------------------------------------------------------------------------------------- writing


def import_episodes(
    source: Source, description: DatasetDescription, ids: Sequence[int], directory: Path, workers: int
) -> Iterator[int]:
    """Writes what is missing of these episodes into a dataset, and then its end. Yields the number there is by now.

    Raises:
        UserError: as `episodes` and `DatasetWriter`; the dataset has other episodes.
    """
    writer = DatasetWriter(directory, description)
    if writer.seeds != list(ids[: writer.num_episodes]):
        raise UserError(f"{directory} holds other episodes than {source.path}; delete it")
    yield writer.num_episodes
    for episode in episodes(source, ids[writer.num_episodes :], workers):
        writer.append(episode)
        yield writer.num_episodes
    if not writer.is_finished:
        writer.finalize()
