"""Processes that work for this one: they end with it, whatever ends it, and it is known how they ended.

What is large travels through memory of its own, not through `/dev/shm`, of which a container may have next to nothing.
"""

import contextlib
import ctypes
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import reduction, util
from multiprocessing.connection import Connection, wait
from typing import Any

from robofactory.errors import UserError, explained

PR_SET_PDEATHSIG = 1  # of Linux' prctl
NOT_THEIRS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # a terminal or a scheduler sends them to the children too
BECOME = """\
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback, as long as nobody handles it
import sys
from robofactory.processes import _become
_become(int(sys.argv[1]), sys.argv[2:])
"""
LARGE_BYTES = 1 << 16  # from here on an array does not go through the pipe


def end_with(parent: int) -> None:
    """Kill this process as soon as the thread that started it ends, whatever ends that.

    Args:
        parent: number of its process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def attached(command: Sequence[str]) -> list[str]:
    """Arguments of the Python interpreter with which a command ends with this process. To be started by this thread."""
    return ["-c", BECOME, str(os.getpid()), *command]


def _become(parent: int, command: list[str]) -> None:
    end_with(parent)
    os.execv(sys.executable, [sys.executable, *command])


def how_it_ended(code: int | None) -> str:
    """An exit code in words, the negative ones of signals too."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    reasons = {signal.SIGKILL: ", as when no memory is left", signal.SIGBUS: ", as when a disk or /dev/shm is full"}
    return f"killed by {name}{reasons.get(signal.Signals(-code), '')}"


class Child:
    """A process at the other end of a pipe. Ctrl-C and the like are this process's to handle, the child hears none of it."""

    def __init__(self, work: Callable[..., None], *arguments: Any, method: str = "spawn"):
        """
        Args:
            work: called in the child with its end of the pipe and the arguments.
            method: "spawn", a fresh interpreter, or "fork".
        """
        context: Any = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        # Unpickling may import for many seconds: not before the child is bound to this process.
        task = pickle.dumps((work, arguments)) if method == "spawn" else (work, arguments)
        self.process = context.Process(target=_begin, args=(os.getpid(), theirs, task), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_THEIRS)  # a child has the mask of who starts it
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that its death reads as the end of the pipe
        util.Finalize(self, _end, (self.process,))  # when nobody knows it any more

    def end(self) -> None:
        """Kill it, if it has not ended yet."""
        _end(self.process)

    def how_it_ended(self) -> str:
        """Once its pipe has come to its end."""
        self.process.join()
        return how_it_ended(self.process.exitcode)


def _end(process: Any) -> None:
    process.kill()
    process.join()


def _begin(parent: int, pipe: Connection, task: Any) -> None:
    end_with(parent)
    if isinstance(task, bytes):  # spawned: locks that libraries make are then nameless, and nobody has to remove them
        multiprocessing.set_start_method("fork", force=True)
    work, arguments = pickle.loads(task) if isinstance(task, bytes) else task
    work(pipe, *arguments)


def _end_children() -> None:
    """At exit, where multiprocessing would wait for children that do not hear its SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


util.Finalize(None, _end_children, exitpriority=0)


# ------------------------------------------------------------------------------------------------- many tasks, in order


class Lost(Exception):
    """A process of a pool has died, or hangs and was killed.

    task: what it was to do.
    how: in words, for instance "killed by SIGSEGV".
    """

    def __init__(self, task: Any, how: str):
        super().__init__(f"{task}: {how}")
        self.task, self.how = task, how


class Pool:
    """Processes that do tasks ahead of when their results are wanted. Ends with `close`, on an error, or with this one."""

    def __init__(
        self,
        setup: Callable[[], Callable[[Any], Any]],
        num_workers: int,
        time_limit_s: float,
        method: str = "spawn",
        in_hand: int = 1,
    ):
        """
        Args:
            setup: called in every process; what it returns does one task.
            time_limit_s: for a task, the first one with the setup.
            method: as of `Child`.
            in_hand: tasks that a process has at most, so that it need not wait for the next.
        """
        assert num_workers > 0, num_workers
        self._setup, self._num_workers, self._method = setup, num_workers, method
        self._time_limit_s, self._in_hand = time_limit_s, in_hand
        self._workers: list[_Worker] = []
        self._given = 0  # tasks, ever

    def results(self, tasks: Iterable[Any], most: Callable[[], float] = lambda: math.inf) -> Iterator[Any]:
        """The result of each task, in order. It may be left half way, for other tasks.

        Args:
            most: how many there may be at a time that are begun and not handed out yet; twice what the processes have
                in hand anyway.
        Raises:
            UserError: what a task raised, once those before it are handed out.
            Lost: one of them died, or took too long.
        """
        source, has_more, next_out, done = iter(tasks), True, self._given, {}
        limit = 2 * self._in_hand * self._num_workers
        try:
            while True:
                while has_more and self._given - next_out < min(limit, most()) and (worker := self._free()) is not None:
                    try:
                        worker.give(self._given, next(source))
                        self._given += 1
                    except StopIteration:
                        has_more = False
                if next_out in done:
                    result = done.pop(next_out)
                    if isinstance(result, UserError):  # in its turn: what comes before it is not lost
                        raise result
                    yield result
                    next_out += 1
                elif next_out < self._given or (has_more and most() >= 1):  # busy with what was left half way
                    done |= {number: result for number, result in self._receive() if number >= next_out}
                else:
                    return
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def _free(self) -> "_Worker | None":
        """The process with the fewest tasks, a new one rather than one that has any; None if all have enough."""
        worker = min(self._workers, key=lambda worker: len(worker.tasks), default=None)
        if (worker is None or worker.tasks) and len(self._workers) < self._num_workers:
            worker = _Worker(self._setup, self._method)
            self._workers.append(worker)
        return worker if worker is not None and len(worker.tasks) < self._in_hand else None

    def _receive(self) -> Iterator[tuple[int, Any]]:
        """What comes next, of any process."""
        busy = [worker for worker in self._workers if worker.tasks]
        longest_s = max(worker.silence_s for worker in busy)
        speaking = wait([worker.pipe for worker in busy], max(0.0, self._time_limit_s - longest_s))
        for worker in busy:
            if worker.pipe in speaking:
                yield worker.receive()
            elif worker.silence_s > self._time_limit_s:
                raise Lost(worker.task, f"no answer within {self._time_limit_s:g} s")


class _Worker(Child):
    def __init__(self, setup: Callable[[], Callable[[Any], Any]], method: str):
        super().__init__(_serve, setup, method=method)
        self.tasks: dict[int, Any] = {}  # in hand, by number
        self.heard = time.monotonic()

    @property
    def task(self) -> Any:
        """What it is doing now."""
        return next(iter(self.tasks.values()))

    @property
    def silence_s(self) -> float:
        return time.monotonic() - self.heard

    def give(self, number: int, task: Any) -> None:
        if not self.tasks:
            self.heard = time.monotonic()
        self.tasks[number] = task
        with contextlib.suppress(ConnectionError):  # it has ended: `receive` will say why
            self.pipe.send(task)

    def receive(self) -> tuple[int, Any]:
        self.heard = time.monotonic()
        try:
            result = _receive(self.pipe)
        except (EOFError, ConnectionError):
            raise Lost(self.task, self.how_it_ended()) from None
        number = next(iter(self.tasks))
        del self.tasks[number]
        return number, result


def _serve(pipe: Connection, setup: Callable[[], Callable[[Any], Any]]) -> None:
    """The life of a pool's process. What no user can mend ends it with its traceback."""
    work = None
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            work = work or setup()
            result = work(task)
        except UserError as error:
            result = UserError(str(error))
        except OSError as error:
            if (line := explained(error)) is None:
                raise
            result = UserError(line)
        _send(pipe, result)


def _send(pipe: Connection, content: Any) -> None:
    """Through the pipe, but for large arrays: each in memory of its own, whose handle goes through the pipe."""
    apart: list[pickle.PickleBuffer] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        is_small = buffer.raw().nbytes < LARGE_BYTES or sys.platform != "linux"
        if not is_small:
            apart.append(buffer)
        return is_small

    pickled = pickle.dumps(content, protocol=5, buffer_callback=stays)
    pipe.send((pickled, [buffer.raw().nbytes for buffer in apart]))
    for buffer in apart:
        memory = os.memfd_create("array")
        with open(memory, "wb") as file:
            file.write(buffer.raw())
            file.flush()
            reduction.send_handle(pipe, memory, None)


def _receive(pipe: Connection) -> Any:
    pickled, sizes = pipe.recv()
    buffers = []
    for size in sizes:
        memory = reduction.recv_handle(pipe)
        buffers.append(mmap.mmap(memory, size))
        os.close(memory)
    return pickle.loads(pickled, buffers=buffers)
