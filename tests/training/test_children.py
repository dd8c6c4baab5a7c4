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
children.run([["-c", program] for program in sys.argv[1:]])
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
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, *programs], env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    )


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
