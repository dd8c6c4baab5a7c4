"""Episodes of a source, read ahead in processes, become a dataset: `import_episodes`."""

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped
from tqdm import tqdm

from robofactory import files
from robofactory.data.episodes import DatasetDescription, DatasetWriter, Episode
from robofactory.data.imports.frames import to_png
from robofactory.data.imports.source import Source
from robofactory.errors import UserError, shown
from robofactory.processes import Lost, Pool

SECONDS_OF_AN_EPISODE = 3600.0  # of reading one: a process that says nothing for so long hangs


def import_episodes(
    source: Source, description: DatasetDescription, ids: Sequence[int], directory: Path, workers: int
) -> Generator[int, None, None]:
    """Writes what is missing of these episodes into a dataset, and then its end. Yields the number there is by now.

    Raises:
        UserError: as `episodes` and `DatasetWriter`; the dataset has other episodes; another process writes it.
    """
    with files.owned(directory):
        writer = DatasetWriter(directory, description)
        try:
            if writer.seeds != list(ids[: writer.num_episodes]):
                raise UserError(
                    f"{directory} holds other episodes than the ones to import from {source.path}; delete it"
                )
            yield writer.num_episodes
            for episode in episodes(source, ids[writer.num_episodes :], workers):
                writer.append(episode)
                yield writer.num_episodes
        finally:
            if writer.num_episodes == 0:
                _forget_description(directory)
        if not writer.is_finished:
            writer.finalize()


def _forget_description(directory: Path) -> None:
    """Of an import that ended before its first episode nothing stays that could stand in the way of another."""
    described = directory / "meta/robofactory.json"
    if [path for path in directory.rglob("*") if not path.is_dir()] == [described]:
        described.unlink()
        with contextlib.suppress(OSError):  # a directory of ours that holds other directories
            described.parent.rmdir()
            directory.rmdir()


# ------------------------------------------------------------------------------------------------------- one episode


def read_episode(source: Source, episode: int) -> tuple[Episode, list[str]]:
    """One episode, with its pictures as PNG, and what the user should know of it, a line each.

    Raises:
        UserError: it is broken, its lengths do not fit each other, or its sizes not those of the first; the line ends
            with how to import the others.
    """
    try:
        return _read_episode(source, episode)
    except UserError as error:
        raise UserError(f"{error}; add --skip {episode} to leave it out") from None
    except MemoryError:
        raise UserError(
            f"{source.path}: episode {episode} does not fit into the memory that is free; use fewer --workers, or add "
            f"--skip {episode} to leave it out"
        ) from None


def _read_episode(source: Source, episode: int) -> tuple[Episode, list[str]]:
    recording = source.read(episode)
    file = "" if recording.file in (None, source.path) else f" ({recording.file})"
    name = f"{source.path}: episode {episode}{file}"
    actions = _numbers(recording.actions, source.action_names, f"{name}: its action")
    proprio = _numbers(recording.proprio, source.proprio_names, f"{name}: its proprio")
    images: dict[str, list[bytes]] = {}
    for view, frames in recording.frames.items():
        images[view] = []
        for index, frame in enumerate(frames):
            try:
                images[view].append(to_png(frame, source.image_sizes[view], source.whites.get(view)))
            except UserError as error:
                place = f" {frame}" if isinstance(frame, Path) else ""
                raise UserError(f"{name}: view {view}, frame {index}{place}: {error}") from None
    lengths = {"actions": len(actions), "proprio": len(proprio), **{view: len(files) for view, files in images.items()}}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{name}: " + ", ".join(f"{count} {what}" for what, count in lengths.items()) + "; the lengths do not fit")  # fmt: skip
    if len(actions) == 0:
        raise UserError(f"{name} has no frame")
    unperturbed = np.zeros(len(actions), bool)
    notes = [f"{name}: {note}" for note in recording.notes]
    return Episode(images, proprio, actions, unperturbed, recording.instruction, seed=episode), notes


def _numbers(values: Shaped[np.ndarray, "..."], names: Sequence[str], what: str) -> Float32[np.ndarray, "n d"]:
    if values.dtype.kind not in "fiub" or values.ndim != 2:
        raise UserError(f"{what} is {values.dtype} {list(values.shape)}; needed: a row of numbers for each frame")
    if values.shape[1] != len(names):
        raise UserError(f"{what} has {values.shape[1]} dimensions, that of the first has {len(names)}")
    with np.errstate(over="ignore"):  # found just below
        numbers = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(numbers).all():
        frame = int(np.argwhere(~np.isfinite(numbers))[0, 0])
        raise UserError(f"{what} in frame {frame} is not finite: {values[frame].tolist()}")
    return numbers


# -------------------------------------------------------------------------------------------------------- in processes


def episodes(source: Source, ids: Sequence[int], workers: int) -> Iterator[Episode]:
    """These episodes of a source, in this order, ready to be written; what is to be known of them is printed.

    They are decoded and encoded ahead in processes; 0: in this one.

    Raises:
        UserError: an episode is broken or unlike the first; a process died or hangs.
    """
    read = partial(read_episode, source)
    if workers == 0 or not ids:  # of a finished import none are left
        yield from map(_warned, map(read, ids))
        return
    pool = Pool(partial(_reader, read), min(workers, len(ids)), SECONDS_OF_AN_EPISODE)
    try:
        yield from map(_warned, pool.results(ids))
    except Lost as lost:
        raise UserError(
            f"the process that read episode {lost.task} was lost ({lost.how}); use fewer --workers, 0 for none but "
            "this one; the same command continues"
        ) from None
    finally:
        pool.close()


def _reader(read: Callable[[int], tuple[Episode, list[str]]]) -> Callable[[int], tuple[Episode, list[str]]]:
    return read


def _warned(read: tuple[Episode, list[str]]) -> Episode:
    episode, notes = read
    for note in notes:
        tqdm.write(shown(f"warning: {note}"), file=sys.stderr)  # which does not disturb a bar
    return episode
