"""Small made-up demonstrations for tests: every number and pixel differs from every other place."""

from pathlib import Path

import numpy as np

from robofactory.data.episodes import DatasetDescription, DatasetWriter, Episode, encode_png

VIEWS = ("side", "overhead", "wrist")
HEIGHT, WIDTH = 24, 32


def description(**changes) -> DatasetDescription:
    given = {
        "scene_yaml": "task: LiftBarrier-rf\nvisual_detail: low\n",
        "agent_id": 0,
        "image_sizes": {view: (HEIGHT, WIDTH) for view in VIEWS},
        "joint_names": (*(f"panda_joint{i}" for i in range(1, 8)), "gripper"),
        "fps": 20,
    }
    return DatasetDescription(**(given | changes))


def pictures(seed: int, length: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {view: random.integers(0, 256, (length, HEIGHT, WIDTH, 3), dtype=np.uint8) for view in VIEWS}


def episode(seed: int, length: int = 7, instruction: str = "lift the barrier") -> Episode:
    random = np.random.default_rng([seed, 1])
    proprio = random.uniform(-1, 1, (length, 8)).astype(np.float32)
    return Episode(
        images={view: [encode_png(image) for image in images] for view, images in pictures(seed, length).items()},
        proprio=proprio,
        actions=(proprio + random.normal(0, 0.1, (length, 8))).clip(-1, 1).astype(np.float32),
        perturbed=random.random(length) < 0.3,
        instruction=instruction,
        seed=seed,
    )


def write_dataset(directory: Path, num_episodes: int = 3, **changes) -> Path:
    """Episodes of 5, 6, 7, ... frames with the seeds 0, 1, 2, ..."""
    writer = DatasetWriter(directory, description(**changes))
    for seed in range(num_episodes):
        writer.append(episode(seed, 5 + seed))
    writer.finalize()
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.glob("**/*")) if p.is_file()}
