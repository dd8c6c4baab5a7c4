import dataclasses

import pytest
import torch

from robofactory.config import SceneConfig, load_scene, scene_file

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scene() -> SceneConfig:
    return load_scene(scene_file("LiftBarrier-rf"))


@pytest.fixture(scope="session")
def small_scene(scene: SceneConfig) -> SceneConfig:
    """Light meshes and small pictures."""
    cameras = [dataclasses.replace(camera, width=128, height=96) for camera in scene.cameras]
    return dataclasses.replace(scene, visual_detail="low", cameras=cameras)


@pytest.fixture(scope="session")
def env(scene: SceneConfig):
    """Physics alone."""
    from robofactory.sim.env import make_env

    return make_env(scene, render=False)


@pytest.fixture(scope="session")
def seeing_env(small_scene: SceneConfig):
    from robofactory.sim.env import make_env

    return make_env(small_scene)
