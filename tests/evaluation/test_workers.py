import dataclasses
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from worker_samples import (
    die_in_set_up,
    fail_to_set_up,
    fill_the_disk,
    hang_in_set_up,
    play_all_well,
    play_asking,
    play_with_trouble,
    refuse_the_checkpoint,
    refuse_the_observation,
)

from robofactory.errors import UserError
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS, TIME_OUT, EpisodeResult
from robofactory.evaluation.workers import MAX_DEATHS, play_episodes
from robofactory.model import precision
from robofactory.policy import Policies

PATIENT_S = 600.0


def played(setup, seeds, num_workers, policies, time_limit_s=PATIENT_S) -> dict[int, EpisodeResult]:
    """By seed; without the times, which no two runs share."""
    episodes = play_episodes(setup, seeds, num_workers, time_limit_s, policies)
    return {each.seed: dataclasses.replace(each, seconds=0.0, policy_ms=None) for each in episodes}


def test_every_seed_is_played_once_by_any_number_of_workers():
    assert sorted(episode.seed for episode in play_episodes(play_all_well, range(5), 2, PATIENT_S)) == [0, 1, 2, 3, 4]


def test_an_exception_and_a_dying_process_are_crashes_and_do_not_stop_the_others(capfd):
    episodes = {episode.seed: episode for episode in play_episodes(play_with_trouble, range(5), 1, PATIENT_S)}
    assert {seed: e.outcome for seed, e in episodes.items()} == {
        0: SUCCESS, 1: CRASH, 2: FAILURE, 3: CRASH, 4: SUCCESS
    }  # fmt: skip
    assert episodes[1].reason == "RuntimeError: the simulator exploded"
    assert episodes[3].reason == "the process died (killed by SIGSEGV)"
    assert "Traceback" in capfd.readouterr().err, "where an episode crashed has to be findable"


def test_episodes_are_the_same_to_the_bit_whatever_the_timing_and_whoever_crashes(models, capfd):
    """In the number format of this machine. The episodes at the side of a crash are played again, from their start."""
    policies = Policies(*models, num_rows=2, temperature=0.5)
    calm = played(partial(play_asking, False, 0.0), range(7), 1, policies)
    assert sorted(calm) == list(range(7)) and all(each.outcome == SUCCESS for each in calm.values())
    assert len({tuple(each.measures.values()) for each in calm.values()}) == 7, "equal episodes would prove nothing"
    troubled = played(partial(play_asking, True, 0.02), range(7), 2, policies)
    assert {seed: each.reason for seed, each in troubled.items() if each.outcome == CRASH} == {
        1: "RuntimeError: the simulator exploded",
        3: "the process died (killed by SIGSEGV)",
    }
    assert troubled == calm | {seed: troubled[seed] for seed in (1, 3)}
    assert "Traceback" in capfd.readouterr().err


def test_an_episode_that_hangs_is_killed_and_timed_out_and_those_at_its_side_are_played_again(models):
    policies = Policies(*models, num_rows=2, temperature=0.5)
    started = time.perf_counter()
    calm = played(partial(play_asking, False, 0.0), range(5), 1, policies)
    limit_s = 2 + time.perf_counter() - started  # beginning a process and playing are within it, on any machine
    hung = played(partial(play_asking, False, 0.0, 2), range(5), 1, policies, limit_s)
    assert hung[2].outcome == TIME_OUT and hung[2].reason == f"no answer within {limit_s:g} s"
    assert hung == calm | {2: hung[2]}


def test_a_set_up_that_hangs_stops_the_evaluation_with_one_line():
    with pytest.raises(UserError, match="could not be set up: no answer within 2 s; a higher --time_limit"):
        list(play_episodes(hang_in_set_up, range(3), 1, 2.0))


def test_batches_play_what_single_questions_play(models, monkeypatch):
    """In float32, where two likeliest tokens are never as close as rounding."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    setup = partial(play_asking, False, 0.0)
    single, batched = (played(setup, range(5), 1, Policies(*models, num_rows=rows)) for rows in (1, 4))
    assert single == batched


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (fail_to_set_up, "could not be set up: RuntimeError: no Vulkan device"),
        (refuse_the_checkpoint, "^modules.safetensors cannot be read$"),
        (refuse_the_observation, "^the observation has no view 'wrist'$"),
        (fill_the_disk, r"^No space left on device: /results/videos/\.seed_0\.tmp\.mp4$"),
    ],
)
def test_what_fails_for_every_episode_stops_the_evaluation_with_one_line(setup, message):
    with pytest.raises(UserError, match=message):
        list(play_episodes(setup, range(3), 1, PATIENT_S))


def test_a_process_that_dies_while_it_is_set_up_is_replaced_and_ends_nothing(tmp_path, capfd):
    """One that was killed for memory meanwhile ended the whole evaluation."""
    setup = partial(die_in_set_up, tmp_path / "deaths", MAX_DEATHS - 1)
    assert sorted(each.seed for each in play_episodes(setup, range(2), 1, PATIENT_S)) == [0, 1]
    said = capfd.readouterr().err
    assert said.count("died while it was set up (killed by SIGKILL, as when no memory is left)") == MAX_DEATHS - 1


def test_processes_that_die_again_and_again_while_they_are_set_up_are_one_line(tmp_path):
    setup = partial(die_in_set_up, tmp_path / "deaths", MAX_DEATHS)
    with pytest.raises(UserError, match=r"3 processes in a row died \(killed by SIGKILL.*use fewer --workers"):
        list(play_episodes(setup, range(2), 1, PATIENT_S))


PLAYING = """
import functools, sys
sys.path.insert(0, {tests!r})
from robofactory.evaluation.workers import MAX_DEATHS, play_episodes
from worker_samples import sleep_in_set_up
if __name__ == "__main__":
    list(play_episodes(functools.partial(sleep_in_set_up, {pids!r}), range(2), 2, 600.0))
"""


def test_processes_end_with_an_evaluation_that_is_killed(tmp_path):
    """Those that were being set up outlived it by 20 to 40 s."""
    script = tmp_path / "playing.py"
    script.write_text(PLAYING.format(tests=str(Path(__file__).parent), pids=str(tmp_path)))
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    ends = time.monotonic() + 100
    while len(pids := [path.name for path in tmp_path.glob("[0-9]*")]) < 2 and time.monotonic() < ends:
        time.sleep(0.05)
    run.kill()
    run.communicate(timeout=20)  # until they have closed its pipe too
    assert len(pids) == 2 and not any(Path("/proc", pid, "exe").exists() for pid in pids)
