"""A small dataset on disk whose actions can be read off its pictures and joint positions."""

import os
import signal

import pytest

from benchmarks import small_runs
from benchmarks.small_runs import NUM_EPISODES, SMALL, TASK
from robofactory.config import load_recipe, load_scene, scene_file
from robofactory.paths import relabelled_dir
from robofactory.training import distributed


@pytest.fixture
def scene():
    return load_scene(scene_file(TASK))


@pytest.fixture
def recipe():
    return load_recipe("robot_openvla_tiny", SMALL)


@pytest.fixture
def home(tmp_path):
    """`$ROBOFACTORY_HOME` with the demonstrations of agent 0."""
    with small_runs.home(tmp_path):
        yield tmp_path


@pytest.fixture
def relabelled(home):
    """The relabelled episodes of round 1."""
    small_runs.write_dataset(relabelled_dir(TASK, 0, NUM_EPISODES, 1))


@pytest.fixture(autouse=True)
def signals():
    """Training sets the signal handlers of its process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop_during(monkeypatch, update, micro=0):
    """SIGINT comes during a micro-batch of an optimizer step."""
    steps, micros = [], []
    seed_step, backward_of = distributed.seed_step, distributed.backward_of

    def seed(seed, now, topology):
        steps.append(now)
        micros.clear()
        seed_step(seed, now, topology)

    def backward(wrapped, is_last):
        micros.append(is_last)
        if steps[-1] == update and len(micros) == micro + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return backward_of(wrapped, is_last)

    monkeypatch.setattr(distributed, "seed_step", seed)
    monkeypatch.setattr(distributed, "backward_of", backward)
