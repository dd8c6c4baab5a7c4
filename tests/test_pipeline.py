"""The whole road at small size, by the command that users type; `bash test.sh --all` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TASK, NUM, RELABELLED, ROUNDS, EPISODES, STEPS = "LiftBarrier-rf", 6, 2, 1, 2, 30

pytestmark = [pytest.mark.slow, pytest.mark.sim]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("robofactory_home")


def run(home: Path, *command: str) -> str:
    environment = os.environ | {"ROBOFACTORY_HOME": str(home), "WANDB_MODE": "offline"}
    environment.pop("OMP_NUM_THREADS", None)  # test.sh sets it for tests that run side by side
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def laptop(home: Path) -> str:
    overrides = [f"training.max_steps={STEPS}", "training.warmup_ratio=0.1"]
    overrides += [f"relabel.num_rounds={ROUNDS}", f"relabel.num_episodes={RELABELLED}"]
    return run(home, "bash", "runs/laptop.sh", "--num", str(NUM), "--episodes", str(EPISODES), *overrides)


@pytest.fixture(scope="module")
def said(home: Path) -> str:
    """What the first run printed."""
    return laptop(home)


def dataset(home: Path, agent: int) -> Path:
    return home / "data" / f"{TASK}_Agent{agent}_{NUM}"


def policy(home: Path, agent: int) -> Path:
    return home / "checkpoints" / "openvla" / f"{TASK}_Agent{agent}_{NUM}"


def metrics(home: Path, agent: int) -> list[dict[str, float]]:
    return [json.loads(line) for line in (policy(home, agent) / "metrics.jsonl").read_text().splitlines()]


def evaluations(home: Path) -> list[Path]:
    return sorted((home / "results" / "openvla").rglob("summary.json"))


def contents(folder: Path) -> dict[str, int]:
    """When each file was last written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_demonstrations_of_both_agents_are_whole(home, said):
    for agent in (0, 1):
        info = json.loads((dataset(home, agent) / "meta" / "info.json").read_text())
        assert info["total_episodes"] == NUM
        assert info["total_frames"] > NUM * 30


@pytest.mark.parametrize("agent", [0, 1])
def test_the_policies_own_attempts_are_relabelled_and_trained_on(home, said, agent):
    relabelled = dataset(home, agent).with_name(f"{dataset(home, agent).name}_relabelled_1")
    assert json.loads((relabelled / "meta" / "info.json").read_text())["total_episodes"] == RELABELLED
    assert json.loads((relabelled / "meta" / "robofactory.json").read_text())["driver"].startswith("openvla")
    assert max(line["step"] for line in metrics(home, agent)) == (1 + ROUNDS) * STEPS


@pytest.mark.parametrize("agent", [0, 1])
def test_training_lowers_the_loss_and_leaves_a_checkpoint(home, said, agent):
    losses = [line["train_loss"] for line in metrics(home, agent) if "train_loss" in line]
    assert losses[-1] < 0.95 * losses[0], losses
    assert np.isfinite([line["val_loss"] for line in metrics(home, agent) if "val_loss" in line]).all()
    files = {path.name for path in (policy(home, agent) / "latest").iterdir()}
    assert {"modules.safetensors", "codec.json", "config.yaml", "training_state.pt"} <= files
    assert (policy(home, agent) / "curves.png").stat().st_size > 1000


def test_both_together_and_each_alone_are_evaluated(home, said):
    summaries = [json.loads(path.read_text()) for path in evaluations(home)]
    drivers = [summary["protocol"]["drivers"] for summary in summaries]
    assert sorted(drivers) == [["expert", "openvla"], ["openvla", "expert"], ["openvla", "openvla"]]
    for summary in summaries:
        results = summary["results"]
        assert summary["complete"]
        assert results["crashes"] == 0, results["crashed_because"]
        assert results["successes"] + results["failures"] == results["episodes"] == EPISODES
        low, high = results["success"]["interval_95"]
        assert 0.0 <= low < high <= 1.0


def test_the_report_is_found_and_needs_no_network(home, said):
    (line,) = [line for line in said.splitlines() if line.startswith("The report")]
    report = Path(line.partition(": ")[2])
    page = report.read_text()
    for agent in (0, 1):
        assert f"Agent {agent} by its learned policy" in page
    assert "data:video/mp4;base64," in page and "Worst: " in page
    assert "with heat" in page and "Nobody looked" not in page
    assert "Success over checkpoints" in (report.parents[1] / "report.html").read_text()
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_the_run_says_how_long_and_how_much_memory_each_stage_took(said):
    table = said.partition("== all stages")[2]
    stages = [line for line in table.splitlines() if "GB of memory" in line]
    assert len(stages) == 2 + 2 * ROUNDS + 3
    assert all(float(line.split("at most ")[1].split()[0]) < 8.0 for line in stages), table


def test_a_second_run_does_nothing_again(home, said):
    folders = [dataset(home, agent) for agent in (0, 1)] + [policy(home, agent) / "latest" for agent in (0, 1)]
    before = [contents(folder) for folder in folders]
    played = [json.loads(path.with_name("episodes.json").read_text()) for path in evaluations(home)]
    laptop(home)
    assert [contents(folder) for folder in folders] == before
    assert [json.loads(path.with_name("episodes.json").read_text()) for path in evaluations(home)] == played


def test_training_goes_on_where_it_stopped(home, said):
    before = metrics(home, 0)
    arguments = ["--policy", "openvla", "--task", TASK, "--agent_id", "0", "--recipe", "robot_openvla_tiny"]
    overrides = [f"data.num_episodes={NUM}", f"training.max_steps={STEPS + 10}", "training.warmup_ratio=0.1"]
    run(home, "bash", "train.sh", *arguments, "--round", "1", "--resume", *overrides)
    after = metrics(home, 0)
    assert after[: len(before)] == before, "what was measured stays"
    assert after[-1]["step"] == 2 * STEPS + 10, "a round counts on from the one before"
    losses = [line["train_loss"] for line in after if "train_loss" in line]
    assert losses[-1] < losses[0], "it went on with the trained weights"


def test_the_seeds_evaluation_command_runs(home, said):
    kept = [{path.name for path in policy(home, agent).glob("epoch_*")} for agent in (0, 1)]
    name = max(set.intersection(*kept))  # agent 0 has been trained further, see above
    scene = "robofactory/configs/table/lift_barrier.yaml"
    arguments = ["--policy", "openvla", "--task", TASK, "--config", scene, "--checkpoint", name]
    run(home, "bash", "eval.sh", *arguments, "--episodes", "1", "--max_steps", "5", "--output", str(home / "once"))
    assert list((home / "once").rglob("summary.json"))


def test_a_missing_checkpoint_is_one_line(home, said):
    command = [sys.executable, "-m", "robofactory.evaluation.evaluate", "--task", TASK, "--checkpoint", "epoch_999"]
    environment = os.environ | {"ROBOFACTORY_HOME": str(home)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "epoch_999" in done.stderr
    assert len(done.stderr.splitlines()) == 1
