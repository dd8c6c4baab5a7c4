"""What worker processes run in tests: they import it by name, so it imports little."""

import os
import signal

from robofactory.config import UserError
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS, EpisodeResult
from robofactory.evaluation.workers import crash


def sample_episode(seed: int, outcome: str = SUCCESS, video: str | None = None) -> EpisodeResult:
    if outcome == CRASH:
        return crash(seed, 1.0, "RuntimeError: <the simulator> & its driver")
    reason = None if outcome == SUCCESS else "agent 0 never held it"
    measures = {"end_height_m_0": 0.21, "end_height_m_1": 0.2, "tilt_deg": 1.5}
    return EpisodeResult(seed, outcome, 70, 2.5, True, ["hold", "hold"], reason, measures, 31.0, 2.75, video)


def play_all_well():
    return sample_episode


def play_with_trouble():
    """Seed 1 raises, seed 3 kills its process, the others succeed; each process says how many episodes it played."""
    played = []

    def play(seed: int) -> EpisodeResult:
        if seed == 1:
            raise RuntimeError("the simulator\nexploded")
        if seed == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        played.append(seed)
        return sample_episode(seed, FAILURE if seed == 2 else SUCCESS)

    return play


def fail_to_set_up():
    raise RuntimeError("no Vulkan device")


def refuse_the_checkpoint():
    raise UserError("modules.safetensors cannot be read")


def refuse_the_observation():
    def play(seed: int) -> EpisodeResult:
        raise UserError("the observation has no view 'wrist'")

    return play
