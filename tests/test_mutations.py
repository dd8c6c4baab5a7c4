"""Damaged input, at every door: one line or a right result, and nothing else happens."""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.mutations import trial
from benchmarks.mutations.__main__ import Mutation, damage_input, plan
from benchmarks.mutations.damage import SECRET
from benchmarks.mutations.doors import DOORS, cells
from benchmarks.mutations.trial import HANG, LINES, MEMORY, OBEYED, OUTSIDE, REFUSED, RIGHT, TRACEBACK, Trial
from robofactory.errors import UserError

ROOT = Path(__file__).parents[1]
COUNT = 200


def test_damaged_input_is_refused_in_one_line_or_read_right(tmp_path):
    """The benchmark does ten times as many; each of these can be done again by its id, with `--only`."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.mutations",
        "--count",
        str(COUNT),
        "--json",
        str(tmp_path / "rows.json"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    outcomes = Counter(row["outcome"] for row in json.loads((tmp_path / "rows.json").read_text()))
    assert outcomes.total() == COUNT and outcomes[REFUSED] > COUNT / 3 and outcomes[RIGHT] > COUNT / 10, outcomes


def test_the_mutations_are_spread_over_all_doors_and_kinds():
    planned = plan(list(DOORS), COUNT)
    assert len(set(planned)) == COUNT
    assert set(Counter(mutation.door for mutation in planned)) == set(DOORS)
    kinds = Counter(cells(mutation.door)[mutation.number].kind for mutation in planned)
    there_are = {kind for door in DOORS.values() for each in door.files.values() for kind in each}
    assert len(kinds) > 0.7 * len(there_are) and max(kinds.values()) <= 5, kinds


def test_a_mutation_is_a_function_of_its_id(tmp_path):
    made = []
    for place in (tmp_path / "first", tmp_path / "again"):
        (place / "outside").mkdir(parents=True)
        DOORS["lerobot-3.0-image"].make(place)
        _, damage, what = damage_input(place, Mutation("lerobot-3.0-image", 17))
        files = {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.glob("**/*")) if p.is_file()}
        made.append((damage.name, what.replace(str(place), ""), files))
    assert made[0] == made[1]


# ------------------------------------------------------------------------------------------------- what would be found


def refuse():
    raise UserError("the file is damaged")


def refuse_in_two_lines():
    print("a note", file=sys.stderr)
    refuse()


def refuse_at_length():
    raise UserError("x" * 10_000)


def break_down():
    raise KeyError("fps")


def die():
    os.abort()


def wait():
    time.sleep(60)


def take_memory():
    held = [np.ones(1_000_000) for _ in range(100)]
    time.sleep(60)
    return held


def read_outside():
    Path("outside/secret.txt").read_text()


def read_outside_in_c():
    libc = ctypes.CDLL(None)
    libc.open(b"outside/secret.txt", os.O_RDONLY)


def read_somewhere_else():
    Path("../mine").read_text()


def write_somewhere_else():
    Path("../mine").write_text("")


def run_a_program():
    subprocess.run(["true"], check=True)


def show_the_secret():
    Path("home").mkdir()
    Path("home/page.html").write_bytes(SECRET)


def clear_the_screen():
    os.write(1, b"\x1b[2J\n")  # what is printed is made harmless


def write_markup():
    Path("home").mkdir()
    Path("home/page.html").write_text("<p><script>alert(1)</script>")


def leave_a_process():
    if os.fork() == 0:
        time.sleep(60)


@pytest.mark.parametrize(
    ("command", "outcome"),
    [
        (lambda: print("a result"), RIGHT), (refuse, REFUSED), (refuse_in_two_lines, LINES), (refuse_at_length, LINES),
        (break_down, TRACEBACK), (die, TRACEBACK), (wait, HANG), (leave_a_process, HANG), (take_memory, MEMORY),
        (read_outside, OUTSIDE), (read_outside_in_c, OUTSIDE), (read_somewhere_else, OUTSIDE),
        (write_somewhere_else, OUTSIDE), (run_a_program, OUTSIDE), (show_the_secret, OUTSIDE),
        (clear_the_screen, OBEYED), (write_markup, OBEYED),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)  # fmt: skip
def test_what_a_command_must_not_do_is_found(tmp_path, monkeypatch, command, outcome):
    monkeypatch.setattr(trial, "HANG_S", 1.0)
    monkeypatch.setattr(trial, "MEMORY_BYTES", trial.LIBRARIES_BYTES + 200_000_000)
    (tmp_path / "mine").write_text("a file of the user's")
    one = Trial(tmp_path / "root", lambda: None, command, ("stdout",))
    while (ending := one.poll()) is None:
        time.sleep(0.01)
    assert ending.outcome == outcome, ending


def test_results_are_told_apart(tmp_path):
    endings = []
    for number in (1, 1, 2):
        one = Trial(tmp_path / "root", lambda: None, lambda number=number: print(number), ("stdout",))
        while (ending := one.poll()) is None:
            time.sleep(0.01)
        endings.append(ending.result)
        one.clear()
    assert endings[0] == endings[1] != endings[2]
