"""Processes that work for this one: they end with it, it is known how they ended, and none waits for ever."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from robofactory import files
from robofactory.errors import UserError
from robofactory.processes import Lost, Pool, how_it_ended

PATIENT_S = 600.0


def doing(work):
    """A setup for what can be forked."""
    return lambda: work


def pool(work, num_workers=2, time_limit_s=PATIENT_S, **named) -> Pool:
    return Pool(doing(work), num_workers, time_limit_s, "fork", **named)


def test_results_come_in_the_order_of_the_tasks_whoever_is_ready_first():
    def work(number):
        time.sleep(0.05 * (number % 3 == 0))
        return number, os.getpid()

    results = list(pool(work).results(range(12)))
    assert [number for number, _ in results] == list(range(12))
    assert len({pid for _, pid in results}) == 2


def test_no_more_tasks_are_begun_than_are_wanted(tmp_path):
    """An episode that nobody needs any more takes as long as any."""
    left = {"episodes": 3}

    def work(number):
        (tmp_path / str(number)).touch()
        return number

    crew = pool(work)
    for number in crew.results(range(100), lambda: left["episodes"]):
        assert number == 3 - left["episodes"]
        left["episodes"] -= 1
    crew.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_what_was_left_half_way_is_not_mixed_into_what_comes_next():
    crew = pool(lambda number: number, in_hand=2)
    assert next(crew.results(range(0, 50))) == 0
    assert list(crew.results(range(100, 110))) == list(range(100, 110))


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_arrays_arrive_whole_and_may_be_written_to(size):
    arrays = list(
        pool(lambda seed: {"x": np.random.default_rng(seed).normal(size=size), "none": None}).results(range(3))
    )
    for seed, result in enumerate(arrays):
        result["x"] += 1.0
        np.testing.assert_array_equal(result["x"], np.random.default_rng(seed).normal(size=size) + 1.0)


def refuse(number):
    """The first of those that it refuses takes longest."""
    time.sleep(0.3 * (number == 2))
    if number >= 2:
        raise UserError(f"episode {number} is broken")
    return number


def fill_a_disk(number):
    if number >= 2:
        raise OSError(28, "No space left on device", "/tmp/cache/x")
    return number


@pytest.mark.parametrize(
    ("work", "line"),
    [(refuse, "episode 2 is broken"), (fill_a_disk, "No space left on device: /tmp/cache/x")],
)
def test_what_a_user_can_mend_is_the_same_line_here_after_all_that_comes_before_it(work, line, capfd):
    before = []
    with pytest.raises(UserError) as error:
        before.extend(pool(work, in_hand=2).results(range(8)))
    assert before == [0, 1]
    assert str(error.value) == line and capfd.readouterr().err == ""
    assert not multiprocessing.active_children()


def die_of_sigbus():
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # pytest prints where it was
    os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.parametrize(
    ("death", "how"),
    [
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL, as when no memory is left"),
        (die_of_sigbus, "killed by SIGBUS, as when a disk or /dev/shm is full"),
        (lambda: time.sleep(3600), "no answer within 1 s"),
    ],
)
def test_a_process_that_dies_or_hangs_is_told_with_its_task_and_how(death, how):
    with pytest.raises(Lost) as lost:
        list(pool(lambda number: death() if number == 2 else number, 1, time_limit_s=1.0).results(range(5)))
    assert (lost.value.task, lost.value.how) == (2, how)
    assert not multiprocessing.active_children()


def test_ctrl_c_and_what_a_scheduler_sends_to_all_are_not_heard_by_the_children():
    """Their tracebacks were printed; a trainer that was told to finish its step lost its data workers first."""

    def work(number):
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), each)
        return number

    assert list(pool(work).results(range(3))) == [0, 1, 2]


def test_an_exit_code_is_told_in_words():
    assert [how_it_ended(code) for code in (1, -signal.SIGSEGV)] == ["exit code 1", "killed by SIGSEGV"]


PARENT = """
import os, sys, time
from robofactory.processes import Pool
def setup():
    os.write(1, b"%d\\n" % os.getpid())
    return time.sleep
if __name__ == "__main__":
    list(Pool(setup, 2, 600.0, sys.argv[1]).results([3600, 3600]))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_end_with_a_parent_that_is_killed(tmp_path, method):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, str(script), method], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    children = [Path("/proc", parent.stdout.readline().decode().strip(), "exe") for _ in range(2)]
    assert all(child.exists() for child in children)
    parent.kill()
    parent.communicate(timeout=20)  # until they have closed its pipe too
    assert not any(child.exists() for child in children)


def test_what_a_killed_process_held_is_free_again_and_what_a_live_one_holds_is_not(tmp_path):
    held = tmp_path / "run"
    source = "import sys, time; from pathlib import Path; from robofactory import files\n"
    source += "with files.owned(Path(sys.argv[1])): print(flush=True); time.sleep(3600)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    owner = subprocess.Popen([sys.executable, "-c", source, str(held)], env=environment, stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline()
    with pytest.raises(UserError, match=f"run is being written by process {owner.pid} on"), files.owned(held):
        pass
    owner.kill()
    owner.wait()
    with files.owned(held):
        assert (tmp_path / ".run.lock").exists()
    assert list(tmp_path.iterdir()) == []
