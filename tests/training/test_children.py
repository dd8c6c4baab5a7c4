"""Commands in processes of their own end with the one that started them, however it is told to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from robofactory.errors import EXIT_STOPPED

PARENT = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
from robofactory.training import children
children.run({f"the training of agent {n}": ["-c", program] for n, program in enumerate(sys.argv[1:])})
"""
# Counts the signals that come within a second, says so, and ends as a training that has saved.
STOPS = f"""
import os, signal, time
told = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: told.append(number))
os.write(1, b"ready\\n")
ends = time.monotonic() + 60.0
while not told and time.monotonic() < ends:
    time.sleep(0.05)
ends = time.monotonic() + 1.0
while time.monotonic() < ends:
    time.sleep(0.05)
os.write(1, b"told %d\\n" % len(told))
raise SystemExit({EXIT_STOPPED})
"""


def start(*programs: str) -> subprocess.Popen:
    """In a process group of its own, as a terminal's foreground job is."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PARENT, *programs]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, process_group=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("tell", [os.kill, os.killpg], ids=["the parent alone", "the terminal's whole group"])
def test_every_child_is_told_to_stop_exactly_once(number, tell):
    """A training that is told twice stops at once, without saving; one that is never told is orphaned."""
    parent = start(STOPS, STOPS)
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    tell(parent.pid, number)
    said, _ = parent.communicate(timeout=60)  # until the children have closed it too
    assert said.splitlines() == ["told 1", "told 1"]
    assert parent.returncode == EXIT_STOPPED


@pytest.mark.parametrize(
    ("programs", "code"),
    [
        (["", ""], 0),
        (["", f"raise SystemExit({EXIT_STOPPED})"], EXIT_STOPPED),
        ([f"raise SystemExit({EXIT_STOPPED})", "raise SystemExit(2)"], 2),
        (["import os; os.kill(os.getpid(), 9)", ""], 128 + 9),
    ],
)
def test_it_ends_as_its_children_did(programs, code):
    assert start(*programs).wait(timeout=60) == code


def test_a_child_that_is_killed_is_named_with_the_signal_and_what_helps():
    parent = start("", "import os; os.kill(os.getpid(), 9)")
    _, errors = parent.communicate(timeout=60)
    assert errors == (
        "error: the training of agent 1 ended: killed by SIGKILL, as when no memory is left; run them one after the "
        "other, use a smaller dataloader.batch_size or fewer dataloader.num_workers; what was saved is kept\n"
    )


def test_children_end_with_a_parent_that_is_killed():
    """They went on as orphans, and the same command put a second trainer into each run."""
    parent = start(*["import os, time; os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)"] * 2)
    assert parent.stdout is not None
    children = [Path("/proc", parent.stdout.readline().strip(), "exe") for _ in range(2)]
    assert all(child.exists() for child in children)
    parent.kill()
    parent.communicate(timeout=20)  # until the children have closed its pipes too
    assert not any(child.exists() for child in children)
