"""Episodes without a simulator, for tests of the recording around them. Importable from a worker process."""

import errno
import os
import time
from pathlib import Path

import numpy as np

from robofactory.config import SceneConfig, load_scene, scene_file, with_pictures
from robofactory.data.episodes import Episode, encode_png
from robofactory.errors import UserError


def small_scene() -> SceneConfig:
    return with_pictures(load_scene(scene_file("LiftBarrier-rf")), "low", 16, 12)


class MadeUpPlayer:
    """Every fourth seed fails; later seeds may be ready before earlier ones."""

    def __init__(self, scene: SceneConfig, noise_share: float):
        self.scene = scene

    def play(self, seed: int) -> list[Episode] | None:
        if seed % 4 == 1:
            return None
        random = np.random.default_rng(seed)
        time.sleep(random.uniform(0, 0.05))
        length = 4 + seed % 3
        return [
            Episode(
                images={
                    view: [encode_png(image) for image in random.integers(0, 256, (length, 12, 16, 3), dtype=np.uint8)]
                    for view in self.scene.views
                },
                proprio=random.uniform(-1, 1, (length, 8)).astype(np.float32),
                actions=random.uniform(-1, 1, (length, 8)).astype(np.float32),
                perturbed=np.zeros(length, bool),
                instruction=self.scene.instruction,
                seed=seed,
            )
            for _ in range(self.scene.num_agents)
        ]


class SlowPlayer(MadeUpPlayer):
    """Leaves the number of its process behind, so that a test can see whether it outlives its parent."""

    def play(self, seed: int) -> list[Episode] | None:
        Path(os.environ["PIDS"], str(os.getpid())).touch()
        time.sleep(0.15)
        return super().play(seed)


class HopelessPlayer(MadeUpPlayer):
    def play(self, seed: int) -> None:
        return None


class DyingPlayer(MadeUpPlayer):
    def play(self, seed: int) -> list[Episode] | None:
        if seed == 3:
            os._exit(9)
        return super().play(seed)


class HangingPlayer(MadeUpPlayer):
    def play(self, seed: int) -> None:
        time.sleep(3600)


class CrampedPlayer(MadeUpPlayer):
    def play(self, seed: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/mesh.ply")


class BlindPlayer(MadeUpPlayer):
    def __init__(self, scene: SceneConfig, noise_share: float):
        raise UserError("no device here can render; install a Vulkan driver")
