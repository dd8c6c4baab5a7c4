"""Episodes of a source, read ahead in processes, become a dataset: `import_episodes`.

The processes talk through pipes alone, so that neither a small /dev/shm nor a full one concerns them; each ends with
this one, whatever ends it, and no Ctrl-C of a terminal reaches it.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from robofactory import files
from robofactory.data.episodes import DatasetDescription, DatasetWriter, Episode
from robofactory.data.imports.frames import to_png
from robofactory.data.imports.source import Source
from robofactory.errors import UserError, shown

SECONDS_TO_END = 2.0  # of a process that was asked to


def import_episodes(
    source: Source, description: DatasetDescription, ids: Sequence[int], directory: Path, workers: int
) -> Generator[int, None, None]:
    """Writes what is missing of these episodes into a dataset, and then its end. Yields the number there is by now.

    Raises:
        UserError: as `episodes` and `DatasetWriter`; the dataset has other episodes; another process writes it.
    """
    with files.owned(directory):
        _forget_description(directory)
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


def read_episode(source: Source, episode: int) -> Episode:
    """One episode, with its pictures as PNG.

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


def _read_episode(source: Source, episode: int) -> Episode:
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
    for note in recording.notes:
        print(shown(f"warning: {name}: {note}"), file=sys.stderr)
    lengths = {"actions": len(actions), "proprio": len(proprio), **{view: len(files) for view, files in images.items()}}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{name}: " + ", ".join(f"{count} {what}" for what, count in lengths.items()) + "; the lengths do not fit")  # fmt: skip
    if len(actions) == 0:
        raise UserError(f"{name} has no frame")
    return Episode(images, proprio, actions, np.zeros(len(actions), bool), recording.instruction, seed=episode)


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
    """These episodes of a source, in this order, ready to be written.

    They are decoded and encoded ahead in processes, one episode in each; 0: in this one. No process survives this one,
    however it ends.

    Raises:
        UserError: an episode is broken or unlike the first; a process died.
    """
    if workers == 0:
        yield from (read_episode(source, episode) for episode in ids)
        return
    readers: list[_Reader] = []
    try:
        for episode in ids[:workers]:
            readers.append(_Reader(source))
            readers[-1].begin(episode)
        for index, episode in enumerate(ids):
            reader = readers[index % len(readers)]
            result = reader.result(episode)
            if index + len(readers) < len(ids):
                reader.begin(ids[index + len(readers)])
            yield result
    finally:
        for reader in readers:
            reader.end()


class _Reader:
    """A process that reads one episode at a time."""

    def __init__(self, source: Source):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(source, theirs), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which it inherits: Ctrl-C is for us alone
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that its death is the end of the pipe

    def begin(self, episode: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died: `result` says so
            self._pipe.send(episode)

    def result(self, episode: int) -> Episode:
        """Raises UserError as `read_episode`; the process died."""
        try:
            result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._death(episode) from None
        if isinstance(result, Exception):
            raise result
        return result

    def end(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join(SECONDS_TO_END)
        self._process.kill()
        self._process.join()

    def _death(self, episode: int) -> Exception:
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        if code >= 0:  # a defect: its traceback is on the screen
            return RuntimeError(f"the process that read episode {episode} ended with code {code}; see what it printed")
        memory = ", perhaps because no memory was left" if code == -signal.SIGKILL else ""
        return UserError(
            f"the process that read episode {episode} was ended by {signal.Signals(-code).name}{memory}; "
            "use fewer --workers, 0 for this process alone; the same command continues"
        )


def _serve(source: Source, pipe: Connection) -> None:
    """A reader's process: episodes are asked for by number; mistakes come back as values, a defect ends it."""
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            episode = pipe.recv()
            try:
                result = read_episode(source, episode)
            except (UserError, OSError) as error:
                result = error
            pipe.send(result)
    except (EOFError, BrokenPipeError):  # nobody is there who would read it
        _leave()


def _leave(*_: Any) -> None:
    """Ends this process so that what libraries hold, as semaphores, is given back."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os._exit(1)  # it is busy in a library that lets no signal through
