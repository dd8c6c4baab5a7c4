"""A kill at any moment loses nothing that was saved, and changes nothing; benchmarks/kills.py does it fifty times."""

import pytest

from benchmarks.kills import STAGES, kill_and_repeat, kill_and_resume


def test_five_kills_at_random_moments(tmp_path):
    assert kill_and_resume(tmp_path, num_kills=5) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["import", "merge", *(pytest.param(name, marks=pytest.mark.sim) for name in ("record", "evaluate"))]
)
def test_a_killed_command_or_one_of_its_processes_changes_nothing_and_leaves_nothing(tmp_path, name):
    assert kill_and_repeat(STAGES[name], name, tmp_path, num_kills=2) == []
