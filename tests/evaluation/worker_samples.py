"""What worker processes run in tests: they import it by name, so it imports little."""

import errno
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robofactory.errors import UserError
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS, TIME_OUT, EpisodeResult
from robofactory.evaluation.workers import lost
from robofactory.sim.tasks.lift_barrier.stages import DID_ITS_PART, NEVER_HELD

if TYPE_CHECKING:
    from robofactory.evaluation.parallel import Round
    from robofactory.evaluation.rollout import Play


def sample_episode(seed: int, outcome: str = SUCCESS, video: str | None = None) -> EpisodeResult:
    if outcome in (CRASH, TIME_OUT):
        why = {CRASH: "RuntimeError: <the simulator> & its driver", TIME_OUT: "no answer within 600 s"}
        return lost(seed, outcome, 1.0, why[outcome])
    failed_at, reason = ([], None) if outcome == SUCCESS else ([NEVER_HELD, DID_ITS_PART], "agent 0 never held it")
    measures = {"end_height_m_0": 0.21, "end_height_m_1": 0.2, "tilt_deg": 1.5}
    return EpisodeResult(
        seed, outcome, 70, 2.5, True, ["hold", "hold"], failed_at, reason, measures, 31.0, 2.75, "ef" * 32, video
    )


def play_all_well():
    def play(seat: int, seed: int) -> "Play":
        return sample_episode(seed)
        yield []  # a generator that asks for nothing, as where the expert drives every agent

    return play


def play_with_trouble():
    """Seed 1 raises, seed 3 kills its process, seed 2 fails, the others succeed."""

    def play(seat: int, seed: int) -> "Play":
        get_into_trouble(seed)
        return sample_episode(seed, FAILURE if seed == 2 else SUCCESS)
        yield []

    return play


def play_by_turns():
    """Even seeds succeed and are slow, so that odd ones, which fail, are ahead of them."""

    def play(seat: int, seed: int) -> "Play":
        time.sleep(0.1 * (1 - seed % 2))
        return sample_episode(seed, FAILURE if seed % 2 else SUCCESS)
        yield []

    return play


def get_into_trouble(seed: int) -> None:
    if seed == 1:
        raise RuntimeError("the simulator\nexploded")
    if seed == 3:
        os.kill(os.getpid(), signal.SIGSEGV)


# ----------------------------------------------------------------------------------------------- with learned policies

NUM_STEPS = 6


def play_asking(has_trouble: bool, pause_s: float, hanging_seed: int | None = None):
    """Two agents add what they are answered to where they are; episodes are of different lengths and paces.

    One may hang half way, and listens to no signal then.
    """

    from robofactory.shapes import Observation

    def play(seat: int, seed: int) -> "Play":
        pictures = np.random.default_rng(seed).integers(0, 255, (2, 28, 28, 3), np.uint8)
        places = np.zeros((2, 8), np.float32)
        passes = 0
        steps = NUM_STEPS + seed % 3
        for step in range(steps):
            if has_trouble and step == NUM_STEPS // 2:
                get_into_trouble(seed)
            if seed == hanging_seed and step == NUM_STEPS // 2:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(3600)
            seen = [
                Observation({"wrist": picture}, place, "lift") for picture, place in zip(pictures, places, strict=True)
            ]
            answer = yield seen
            time.sleep(pause_s * ((seed + step) % 3))
            places = np.clip(places + 0.1 * np.stack([answer.actions[agent] for agent in (0, 1)]), -1, 1)
            passes += answer.num_passes
        measures = {f"place_{k}": float(place) for k, place in enumerate(places.flatten())}
        digest = hashlib.sha256(places.tobytes()).hexdigest()
        return EpisodeResult(
            seed, SUCCESS, steps, 0.0, True, [], [], None, measures, None, passes / (2 * steps), digest, None
        )

    return play


def play_asking_together(crashing_turn: int | None = None, hanging_seed: int | None = None):
    """The same episodes in lockstep; the simulator of seed 1 may crash before one of its turns."""
    from robofactory.evaluation.parallel import Turn

    play = play_asking(False, 0.0, hanging_seed)

    def play_together(seat: int, seeds: dict[int, int]) -> "Round":
        episodes = {row: play(seat, seed) for row, seed in seeds.items()}
        answers = dict.fromkeys(episodes)
        number = 0
        while True:
            if number == crashing_turn and 1 in seeds.values():
                get_into_trouble(1)
            turn = Turn({}, [])
            for row, answer in answers.items():
                try:
                    turn.observations[row] = episodes[row].send(answer)
                except StopIteration as end:
                    turn.ended.append(end.value)
            if not turn.observations:
                return turn
            answers = yield turn
            number += 1

    return play_together


def play_asking_as_planned(plan):
    """In the place of a `Rollout`."""
    return play_asking(False, 0.0)


def fail_as_planned(plan):
    raise AssertionError("nothing was to be played")


def hang_in_set_up():
    time.sleep(3600)


def fail_to_set_up():
    raise RuntimeError("no Vulkan device")


def refuse_the_checkpoint():
    raise UserError("modules.safetensors cannot be read")


def refuse_the_observation():
    def play(seat: int, seed: int) -> "Play":
        raise UserError("the observation has no view 'wrist'")
        yield []

    return play


def die_in_set_up(left: Path, times: int):
    """So many times; what it has died already is written down there."""
    died = len(left.read_text()) if left.exists() else 0
    if died < times:
        left.write_text("x" * (died + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return play_all_well()


def fill_the_disk():
    def play(seat: int, seed: int) -> "Play":
        raise OSError(errno.ENOSPC, "No space left on device", "/results/videos/.seed_0.tmp.mp4")
        yield []

    return play


def sleep_in_set_up(pids: str):
    Path(pids, str(os.getpid())).touch()
    time.sleep(3600)
