"""A kill at any moment loses nothing that was saved, and changes nothing; benchmarks/kills.py does it fifty times."""

from benchmarks.kills import kill_and_resume


def test_five_kills_at_random_moments(tmp_path):
    assert kill_and_resume(tmp_path, num_kills=5) == []
