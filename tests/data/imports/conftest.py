import sys
from pathlib import Path

import pytest

from robofactory.data.episodes import DatasetReader
from robofactory.data.imports.__main__ import main


@pytest.fixture
def run_import(tmp_path, monkeypatch):
    """Runs the command in this process, and opens the dataset that it made."""

    def run(
        kind: str, source: Path, *arguments: str, task: str = "Push", num: int = 2, agent: int = 0
    ) -> DatasetReader:
        monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path / "home"))
        given = [kind, str(source), "--task", task, "--agent_id", str(agent), *arguments]
        if "--workers" not in arguments:
            given += ["--workers", "0"]
        monkeypatch.setattr(sys, "argv", ["robofactory import", *given])
        main()
        return DatasetReader(tmp_path / "home" / "data" / f"{task}_Agent{agent}_{num}")

    return run
