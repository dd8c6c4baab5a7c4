"""Small evaluations and episodes for the tests of this room."""

from pathlib import Path

import numpy as np
from worker_samples import sample_episode

from robofactory.config import load_recipe, load_scene, scene_file, to_yaml
from robofactory.evaluation.results import Evaluation, Protocol
from robofactory.evaluation.rollout import EpisodeVideo, video_name
from robofactory.shapes import Observation

TASK = "LiftBarrier-rf"


def sample_scene(*overrides: str):
    return load_scene(scene_file(TASK), list(overrides))


def sample_evaluation(outcomes: list[str], checkpoint: str = "/runs/LiftBarrier-rf_Agent0_150/epoch_8") -> Evaluation:
    protocol = Protocol(
        task=TASK, policy="openvla", checkpoint="epoch_8", drivers=["openvla", "expert"],
        checkpoints=[checkpoint, None], fingerprints=["ab" * 32, None], weights=["cd" * 32, None],
        first_seed=10_000, num_episodes=len(outcomes), until=None, max_steps=300, temperature=0.0, batch_size=4,
        ablation=None, scene=to_yaml(sample_scene()), simulator="cpu", renderer="llvmpipe", device="cpu, some chip, 1 threads",
        versions={"torch": "2.14.1"},
    )  # fmt: skip
    return Evaluation(protocol, [sample_episode(10_000 + k, outcome) for k, outcome in enumerate(outcomes)])


def sample_observations(height: int = 15, width: int = 21) -> list[Observation]:
    """Two agents, each with its own grey in two views."""
    return [
        Observation(
            {view: np.full((height, width, 3), grey, np.uint8) for view in ("side", "wrist")},
            np.zeros(8, np.float32),
            "lift the barrier",
        )
        for grey in (60, 200)
    ]


def film(directory: Path, seed: int, num_frames: int) -> str:
    with EpisodeVideo(directory / video_name(seed), 20, ["agent 0", "agent 1"]) as video:
        for step in range(num_frames):
            video.add(sample_observations(), f"step {step}")
    return video_name(seed)


def untrained_policies(home: Path) -> None:
    """One for each agent, which have learned nothing: any two of their actions are far from each other."""
    import torch

    from robofactory import checkpoint
    from robofactory.codec.codec import Codec
    from robofactory.codec.statistics import DatasetStatistics

    tower, language = "{embed_dim: 32, depth: 2, num_heads: 2}", "hidden_size: 32, intermediate_size: 64"
    language = f"{{{language}, num_hidden_layers: 1, num_attention_heads: 2}}"
    sizes = {"image_size": 28, "dino": tower, "siglip": tower, "language": language}
    recipe = load_recipe("robot_openvla_tiny", [f"model.architecture.{key}={size}" for key, size in sizes.items()])
    sizes = {view: [48, 36] for view in ("side", "overhead", "wrist")}
    look = {"visual_detail": "low", "shader": "minimal", "camera_sizes": sizes}
    rest = np.array([0.0, 0.39, 0.0, -1.96, 0.0, 2.36, 0.79, 1.0])
    around = (rest + np.random.default_rng(0).normal(0.0, 0.1, (500, 8))).astype(np.float32)
    around[:, 7] = np.where(around[:, 0] > 0, 1.0, -1.0)
    names = [f"joint_{number}" for number in range(1, 8)] + ["gripper"]
    for agent in (0, 1):
        codec = Codec.create(recipe, {"some": DatasetStatistics.measure(around, around, names, "mean_std", look, 3)})
        torch.manual_seed(agent)
        model = checkpoint.build_model(recipe, codec)
        checkpoint.save(home / f"{TASK}_Agent{agent}_3", "epoch_1", model, codec, recipe, {"update": 1})
