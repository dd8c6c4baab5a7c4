"""Small evaluations and episodes for the tests of this room."""

from pathlib import Path

import numpy as np
from worker_samples import sample_episode

from robofactory.config import load_scene, scene_file, to_yaml
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
        ablation=None, scene=to_yaml(sample_scene()), renderer="llvmpipe", device="cpu, some chip, 1 threads",
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
