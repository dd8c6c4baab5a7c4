"""A small dataset on disk whose actions can be read off its pictures and joint positions."""

import numpy as np
import pytest

from robofactory.config import dataset_dir, load_recipe, load_scene, relabelled_dir, scene_file, to_yaml
from robofactory.data.episodes import DatasetDescription, DatasetWriter, Episode, encode_png

TASK, NUM_EPISODES, LENGTH = "LiftBarrier-rf", 6, 10
JOINTS = (*tuple(f"joint{i}" for i in range(1, 8)), "gripper")
SMALL = [
    "model.architecture.image_size=28",
    "model.architecture.dino={embed_dim: 32, depth: 2, num_heads: 2}",
    "model.architecture.siglip={embed_dim: 32, depth: 2, num_heads: 2}",
    "model.architecture.language={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}",
    f"data.num_episodes={NUM_EPISODES}",
    "data.val_ratio=0.2",
    "dataloader.batch_size=8",
    "dataloader.num_workers=0",
    "training.num_epochs=3",
    "training.checkpoint_every=1",
]


@pytest.fixture
def scene():
    return load_scene(scene_file(TASK))


@pytest.fixture
def recipe():
    return load_recipe("robot_openvla_tiny", SMALL)


@pytest.fixture
def home(tmp_path, monkeypatch, scene):
    """`$ROBOFACTORY_HOME` with the demonstrations of agent 0."""
    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_dataset(dataset_dir(TASK, 0, NUM_EPISODES), to_yaml(scene))
    return tmp_path


@pytest.fixture
def relabelled(home, scene):
    """The relabelled episodes of round 1."""
    write_dataset(relabelled_dir(TASK, 0, NUM_EPISODES, 1), to_yaml(scene))


def write_dataset(directory, scene_yaml):
    """Frames of four kinds, told apart by the pictures' colour and by the joints; each kind has its action."""
    random = np.random.default_rng(0)
    table = random.uniform(-1.0, 1.0, (4, 8)).astype(np.float32)
    sizes = {view: (24, 32) for view in ("side", "overhead", "wrist")}
    writer = DatasetWriter(directory, DatasetDescription(scene_yaml, 0, sizes, JOINTS, fps=20))
    for seed in range(NUM_EPISODES):
        kinds = random.integers(0, 4, LENGTH)
        colours = [encode_png(np.full((24, 32, 3), 60 * kind, np.uint8)) for kind in kinds]
        images = dict.fromkeys(sizes, colours)
        proprio = table[kinds] + random.normal(0.0, 0.01, (LENGTH, 8)).astype(np.float32)
        writer.append(Episode(images, proprio, table[kinds], np.zeros(LENGTH, bool), "lift the barrier", seed))
    writer.finalize()
