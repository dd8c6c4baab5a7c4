"""Episodes in parallel processes, any of which may crash or hang and end nothing else; one process has the policies.

An episode is played at a seat: a simulator in a worker process. It asks this process what the policies do next. The
seats are in two groups, each of which asks in one batch, so that the one steps while the other is answered. Which
episodes meet in a batch is a matter of time and changes nothing (see `robofactory.policy.Policies`): the seed decides
the row.
"""

import contextlib
import errno
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any

from robofactory.errors import UserError, explained
from robofactory.evaluation.results import CRASH, TIME_OUT, EpisodeResult
from robofactory.processes import Child

if TYPE_CHECKING:
    from robofactory.evaluation.looking import Onlooker
    from robofactory.policy import Memory, Policies
    from robofactory.shapes import Observation

NUM_GROUPS = 2
SET_UP_FAILED = "the simulator or the policies could not be set up: {}"
DEATH, MAX_DEATHS = "death", 3  # of a process while it is set up; in a row
WHAT_HELPS = "if memory was short, use fewer --workers; the same command continues"
# What a seat plays: a `rollout.Play` of a seed, or a `parallel.Round` of several.
Setup = Callable[[], Callable[[int, Any], Generator[Any, Any, Any]]]


def play_episodes(
    setup: Setup,
    seeds: Sequence[int],
    num_workers: int,
    time_limit_s: float,
    policies: "Policies | Onlooker | None" = None,
) -> Iterator[EpisodeResult]:
    """Episodes in the order they end, played in parallel.

    An exception in an episode ends its process, and is reported as that episode's crash; so is the death of a process
    (a fault in a driver, no memory left) while it steps. A process that has something to do and says nothing for
    `time_limit_s` is killed, and the episode that it was to step has timed out. A fresh process takes the next seed, and
    plays the other episodes of the old one again from their start.

    Args:
        setup: called in every process (it is pickled); what it returns plays a seed at a seat.
        seeds: each once.
        policies: answer the episodes' questions, and say how many there are at a time; None: they have none.
    Raises:
        UserError: `setup` failed, hangs, or its process died several times; a disk is full.
    """
    num_rows = 1 if policies is None else policies.num_rows
    num_seats = num_workers if policies is None else NUM_GROUPS * num_rows
    queues = [deque(seed for seed in seeds if seed % num_rows == row) for row in range(num_rows)]
    seats = [Seat(number, num_rows) for number in range(num_seats)]
    num_workers = min(num_workers, num_seats, len(seeds))
    workers = [
        Worker(setup, [seat for seat in seats if seat.number * num_workers // num_seats == index])
        for index in range(num_workers)
    ]
    try:
        while workers:
            patience_s = time_limit_s - max(worker.silence_s for worker in workers)
            pipes = wait([worker.pipe for worker in workers], max(0.0, patience_s))
            hanging = [each for each in workers if each.pipe not in pipes and each.silence_s > time_limit_s]
            for worker in [*(worker for worker in workers if worker.pipe in pipes), *hanging]:
                kind, seat, content = worker.kill(time_limit_s) if worker in hanging else worker.receive()
                if kind == "question":
                    assert seat is not None
                    seat.question = content
                    continue
                if kind == DEATH:
                    workers[workers.index(worker)] = worker.again(content)
                    continue
                if kind in (CRASH, TIME_OUT):
                    assert seat is not None and seat.seed is not None
                    yield lost(seat.seed, kind, time.perf_counter() - seat.started, content)
                    for other in worker.seats:
                        if other is not seat and other.seed is not None:
                            queues[other.row].appendleft(other.seed)
                        other.leave()
                    workers.remove(worker)
                    if any(queues[other.row] for other in worker.seats):
                        workers.append(Worker(setup, worker.seats))
                    continue
                if kind == "episode":
                    assert seat is not None
                    seat.leave()
                    yield content
                for free in [seat] if seat is not None else worker.seats:  # all of them when it is "ready"
                    if queues[free.row]:
                        worker.play(free, queues[free.row].popleft())
                if all(each.seed is None for each in worker.seats):
                    worker.end()
                    workers.remove(worker)
            for group in range(NUM_GROUPS):
                _answer([seat for seat in seats if seat.group == group], workers, policies)
    finally:
        for worker in workers:
            worker.end()


def lost(seed: int, outcome: str, seconds: float, message: str) -> EpisodeResult:
    """The record of an episode that did not come to its end: a crash or a time-out."""
    return EpisodeResult(seed, outcome, 0, round(seconds, 3), False, [], [], message, {}, None, None, "", None)


class Seat:
    """Where one episode at a time is played: a row of a group's batch."""

    def __init__(self, number: int, num_rows: int):
        self.number, self.group, self.row = number, number // num_rows, number % num_rows
        self.leave()

    def take(self, seed: int) -> None:
        self.seed, self.started = seed, time.perf_counter()

    def leave(self) -> None:
        self.seed: int | None = None
        self.started = 0.0
        self.memory: dict[int, Memory] | None = None  # of the policies; None until the episode asks for the first time
        self.question: list[Observation] | None = None


def _answer(group: Sequence[Seat], workers: Sequence["Worker"], policies: "Policies | Onlooker | None") -> None:
    """Answer all questions of a group in one batch, unless one more is about to come.

    For an episode that has not begun yet nobody waits: the first picture of a process takes ten seconds.
    """
    asking = {seat.row: seat for seat in group if seat.question is not None}
    if not asking or any(seat.memory is not None and seat.question is None for seat in group):
        return
    assert policies is not None, "an episode asks, and there are no policies"
    from robofactory.evaluation.rollout import Answer

    started = time.perf_counter()
    asked = {}
    for row, seat in asking.items():
        assert seat.seed is not None and seat.question is not None
        seat.memory = seat.memory or policies.start_episode(seat.seed)
        asked[row] = seat.memory, seat.question
    answers = policies.act(asked)
    seconds = (time.perf_counter() - started) / len(asking)
    for worker in workers:
        for seat in worker.seats:
            if seat in asking.values():
                actions, num_passes = answers[seat.row]
                seat.question = None
                worker.tell(seat, Answer(actions, seconds, num_passes))


class Worker(Child):
    def __init__(self, setup: Setup, seats: "list[Seat]", num_deaths: int = 0):
        super().__init__(_serve, setup)  # in a fresh interpreter: fork copies neither Vulkan nor CUDA
        self.setup, self.seats = setup, seats
        self.num_deaths = num_deaths  # of those that were to be in its place, while they were set up
        self.is_ready = False
        self.told: list[Seat] = []  # seats that it has to step, in the order in which it does
        self.heard = time.perf_counter()  # when it last said something, or was told something after it had waited

    def again(self, how: str) -> "Worker":
        """One in the place of this one, which died while it was set up.

        Raises:
            UserError: too many have.
        """
        if self.num_deaths + 1 == MAX_DEATHS:
            raise UserError(SET_UP_FAILED.format(f"{MAX_DEATHS} processes in a row died ({how}); {WHAT_HELPS}"))
        print(f"a process died while it was set up ({how}); a fresh one takes its place", file=sys.stderr)
        return Worker(self.setup, self.seats, self.num_deaths + 1)

    def play(self, seat: Seat, seed: int) -> None:
        seat.take(seed)
        self.tell(seat, seed)

    def tell(self, seat: Seat, content: Any) -> None:
        """What a seat is to play, or the answer to its question."""
        if not self.told:
            self.heard = time.perf_counter()
        self.told.append(seat)
        with contextlib.suppress(ConnectionError):  # it is dead: `receive` will say so
            self.pipe.send((seat.number, content))

    @property
    def silence_s(self) -> float:
        """How long it has been silent with something to do: to set up, or to step a seat."""
        return time.perf_counter() - self.heard if self.told or not self.is_ready else 0.0

    def kill(self, time_limit_s: float) -> tuple[str, Seat | None, Any]:
        """End it although it may listen to no signal; what there is to say in its place, as of `receive`."""
        self.end()
        message = f"no answer within {time_limit_s:g} s"
        if not self.is_ready:
            raise UserError(SET_UP_FAILED.format(f"{message}; a higher --time_limit gives it longer"))
        return TIME_OUT, self.told.pop(0), message

    def receive(self) -> tuple[str, Seat | None, Any]:
        """What kind of news ("ready", "question", "episode", DEATH in set-up or a crash), of which seat, and what it is.

        Raises:
            UserError: it could not be set up, or met what a user can mend.
        """
        self.heard = time.perf_counter()
        try:
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            if not self.is_ready:
                return DEATH, None, self.how_it_ended()
            kind, content = CRASH, f"the process died ({self.how_it_ended()})"
        if kind == "setup failed":
            raise UserError(SET_UP_FAILED.format(content))
        if kind == "user error":
            raise UserError(content)
        if kind == "ready":
            self.is_ready = True
            return kind, None, content
        if self.told:
            return kind, self.told.pop(0), content
        return kind, next(seat for seat in self.seats if seat.seed is not None), content  # it died while all waited


def _serve(pipe: Connection, setup: Setup) -> None:
    """The life of a worker process: each message moves one seat's episode on, to its next question or its end."""
    with _Reported(pipe, "setup failed"):
        start = setup()
    pipe.send(("ready", None))
    episodes: dict[int, Generator[Any, Any, Any]] = {}
    while True:
        try:
            seat, content = pipe.recv()
        except EOFError:  # the parent is gone
            return
        with _Reported(pipe, CRASH):
            try:
                if seat in episodes:
                    news = "question", episodes[seat].send(content)
                else:
                    episodes[seat] = start(seat, content)
                    news = "question", next(episodes[seat])
            except StopIteration as end:
                del episodes[seat]
                news = "episode", end.value
        pipe.send(news)


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
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.pipe.send(("user error", explained(error)))  # no crash: the next episode would end as this one
        elif error is not None:
            traceback.print_exception(error, file=sys.stderr)
            self.pipe.send((self.kind, f"{type(error).__name__}: {' '.join(str(error).split())}"))
        if error is not None:
            sys.exit(1)
