"""The command itself with two processes on CPUs: it stops when it is told to, goes on with one, and says why it fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.small_runs import NUM_EPISODES, SMALL, TASK, write_dataset
from robofactory import checkpoint, files
from robofactory.errors import EXIT_STOPPED
from robofactory.paths import dataset_dir, run_dir
from robofactory.training.log import read_metrics

pytestmark = pytest.mark.slow  # a dozen interpreters start

COMMAND = [sys.executable, "-m", "robofactory.training.train", "--task", TASK, "--recipe", "robot_openvla_tiny"]
TWO = ["--gpus", "2", *SMALL, "dataloader.batch_size=4"]


def launch(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_an_epoch(process: subprocess.Popen, *runs: Path) -> None:
    ends = time.monotonic() + 300
    while not all((run / "epoch_1").exists() for run in runs) and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.1)


def test_two_processes_stop_at_a_signal_and_one_goes_on(home):
    run = run_dir("openvla", TASK, 0, NUM_EPISODES)
    process = launch(*TWO, "training.num_epochs=2000")
    wait_for_an_epoch(process, run)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, said + errors
    update = checkpoint.load_training_state(run / "latest")["update"]
    assert f"stopped at step {update}; --resume continues" in said and said.count("stopped at step") == 1

    process = launch("--resume", *SMALL, f"training.max_steps={update + 3}")
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, said + errors
    assert checkpoint.load_training_state(run / "latest")["update"] == update + 3


def test_a_process_that_fails_ends_the_others_with_its_own_error_first(home):
    run = run_dir("openvla", TASK, 0, NUM_EPISODES)
    checkpointed = launch(*SMALL, "training.max_steps=1")
    assert checkpointed.wait(timeout=300) == 0, checkpointed.communicate()
    process = launch(*TWO)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.splitlines()[0] == f"error: {run} holds a trained policy; continue it with --resume, or move it away"


def test_all_agents_save_and_stop_at_a_signal_to_the_command_alone(home):
    """SIGTERM ended the command, nothing was saved, and its trainings went on as orphans."""
    write_dataset(dataset_dir(TASK, 1, NUM_EPISODES))
    runs = [run_dir("openvla", TASK, agent, NUM_EPISODES) for agent in (0, 1)]
    process = launch("--all_agents", *SMALL, "training.num_epochs=2000")
    wait_for_an_epoch(process, *runs)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)  # until its trainings have ended too
    assert process.returncode == EXIT_STOPPED, said + errors
    for run in runs:
        update = checkpoint.load_training_state(run / "latest")["update"]
        assert f"stopped at step {update}; --resume continues from {run / f'step_{update}'}" in said


def test_all_agents_that_are_killed_leave_no_trainer_and_the_same_command_writes_each_line_once(home):
    """Its trainings went on, the same command put a second one into each run, and every line of metrics came twice."""
    write_dataset(dataset_dir(TASK, 1, NUM_EPISODES))
    runs = [run_dir("openvla", TASK, agent, NUM_EPISODES) for agent in (0, 1)]
    process = launch("--all_agents", *SMALL, "training.num_epochs=30")
    wait_for_an_epoch(process, *runs)
    process.kill()
    process.communicate(timeout=30)  # until its trainings have closed its pipes
    process = launch("--all_agents", "--resume", *SMALL, "training.num_epochs=30")
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, said + errors
    for run in runs:
        steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "train_loss" in line]
        assert steps == sorted({*range(10, 211, 10), *range(7, 211, 7)})
        assert not list(run.parent.glob(".*.lock"))


def test_a_second_training_in_a_run_is_refused_before_the_first_library_is_loaded(home):
    run = run_dir("openvla", TASK, 0, NUM_EPISODES)
    with files.owned(run):
        process = launch(*SMALL)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert errors.startswith(f"error: {run} is being written by process {os.getpid()} on")
    assert not run.exists()
