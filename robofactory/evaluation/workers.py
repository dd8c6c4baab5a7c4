"""Episodes in parallel processes, any of which may crash without ending the evaluation."""

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from robofactory.config import UserError
from robofactory.evaluation.results import CRASH, EpisodeResult


def play_episodes(
    setup: Callable[[], Callable[[int], EpisodeResult]], seeds: Sequence[int], num_workers: int
) -> Iterator[EpisodeResult]:
    """Episodes in the order they end, played in parallel.

    An exception in an episode ends its process, is reported as that episode's crash, and a fresh process takes the next
    seed; so does a process that dies (a fault in a driver, no memory left).

    Args:
        setup: called in every process (it is pickled); what it returns plays one seed.
        seeds: each once.
    Raises:
        UserError: `setup` failed: no episode could be played at all.
    """
    queue = list(reversed(seeds))
    workers = [_Worker(setup) for _ in range(min(num_workers, len(seeds)))]
    try:
        while workers:
            ready = wait([worker.pipe for worker in workers])
            for worker in [worker for worker in workers if worker.pipe in ready]:
                kind, content = worker.receive()
                if kind == "setup failed":
                    raise UserError(f"the simulator or the policies could not be set up: {content}")
                if kind == "user error":
                    raise UserError(content)
                if kind == "episode":
                    yield content
                if kind == "crash":
                    assert worker.seed is not None
                    yield crash(worker.seed, time.perf_counter() - worker.started, content)
                if kind == "crash" and queue:
                    workers[workers.index(worker)] = _Worker(setup)
                elif kind != "crash" and queue:
                    worker.play(queue.pop())
                else:
                    worker.stop()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.process.terminate()


def crash(seed: int, seconds: float, message: str) -> EpisodeResult:
    """The record of an episode that an exception ended."""
    return EpisodeResult(seed, CRASH, 0, round(seconds, 3), False, [], message, {}, None, None, None)


class _Worker:
    def __init__(self, setup: Callable[[], Callable[[int], EpisodeResult]]):
        context = multiprocessing.get_context("spawn")  # fork copies neither Vulkan nor CUDA
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        self.process.start()
        theirs.close()  # so that its death reads as the end of the pipe
        self.seed: int | None = None
        self.started = 0.0

    def play(self, seed: int) -> None:
        self.seed, self.started = seed, time.perf_counter()
        self.pipe.send(seed)

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()

    def receive(self) -> tuple[str, Any]:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return "setup failed" if self.seed is None else "crash", f"the process died ({died})"


def _serve(pipe: Connection, setup: Callable[[], Callable[[int], EpisodeResult]]) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it keeps what is complete and ends us
    with _Reported(pipe, "setup failed"):
        play = setup()
    pipe.send(("ready", None))
    while True:
        try:
            seed = pipe.recv()
        except EOFError:  # the parent is gone
            return
        with _Reported(pipe, "crash"):
            result = play(seed)
        pipe.send(("episode", result))


class _Reported:
    """Sends the exception that ends its block to the parent, and then ends the process."""

    def __init__(self, pipe: Connection, kind: str):
        self.pipe, self.kind = pipe, kind

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            self.pipe.send(("user error", str(error)))
        elif error is not None:
            traceback.print_exception(error, file=sys.stderr)
            self.pipe.send((self.kind, f"{type(error).__name__}: {' '.join(str(error).split())}"))
        if error is not None:
            sys.exit(1)
