"""Small made-up demonstrations for tests: every number and pixel differs from every other place."""

import functools
from collections.abc import Callable
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


@functools.cache
def sound_episode(seed: int, length: int = 40) -> Episode:
    """As a real one: smooth motion that the measured state follows, a gripper that closes, a scene that moves with it."""
    random = np.random.default_rng([seed, 2])
    start, goal = random.uniform(-0.6, 0.0, 8), random.uniform(0.3, 0.9, 8)
    way = np.linspace(0.0, 1.0, length + 1)
    path = start + (goal - start) * (10 * way**3 - 15 * way**4 + 6 * way**5)[:, None]  # the least jerk
    path[:, 7] = np.where(way < 0.6, 1.0, -1.0)
    proprio = path[:-1] + random.normal(0.0, 1e-3, (length, 8))
    proprio[:, 7] = np.clip(1.0 - 8.0 * np.maximum(0.0, way[:-1] - 0.6), -0.6, 1.0)
    actions = path[1:] + random.normal(0.0, 2e-3, (length, 8)) * (np.arange(8) < 7)
    return Episode(
        images={view: [encode_png(image) for image in scene(view, proprio)] for view in VIEWS},
        proprio=proprio.astype(np.float32),
        actions=actions.astype(np.float32),
        perturbed=np.zeros(length, bool),
        instruction="lift the barrier",
        seed=seed,
    )


def scene(view: str, proprio: np.ndarray) -> np.ndarray:
    """What a view shows: a pattern of its own, and a bright arm where the first two joints are."""
    pattern = np.random.default_rng([VIEWS.index(view), 3]).integers(0, 200, (HEIGHT // 6, WIDTH // 8, 3), np.uint8)
    images = np.tile(np.kron(pattern, np.ones((6, 8, 1), np.uint8)), (len(proprio), 1, 1, 1))
    for image, (across, down) in zip(images, (proprio[:, :2] + 1.0) / 2.0, strict=True):
        top, left = int(down * (HEIGHT - 6)), int(across * (WIDTH - 6))
        image[top : top + 6, left : left + 6] = 255 - (100 * np.array([across, down, 0.0])).astype(np.uint8)
    return images


def write_sound_dataset(directory: Path, num_episodes: int = 6, change: Callable[[Episode], Episode] | None = None) -> Path:  # fmt: skip
    """Episodes with the seeds 0, 1, 2, ..., each as `change` leaves it."""
    writer = DatasetWriter(directory, description())
    for seed in range(num_episodes):
        writer.append(change(sound_episode(seed)) if change else sound_episode(seed))
    writer.finalize()
    return directory


def write_dataset(directory: Path, num_episodes: int = 3, **changes) -> Path:
    """Episodes of 5, 6, 7, ... frames with the seeds 0, 1, 2, ..."""
    writer = DatasetWriter(directory, description(**changes))
    for seed in range(num_episodes):
        writer.append(episode(seed, 5 + seed))
    writer.finalize()
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.glob("**/*")) if p.is_file()}
