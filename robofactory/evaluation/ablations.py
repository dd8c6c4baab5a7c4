"""What is taken from a policy, or done to it, to see what its success rests on.

An ablation is a small function that begins an episode: it may change the scene, what is observed and what is executed.
It draws from the episode's seed alone, so it is the same whoever plays the episode.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robofactory import robots
from robofactory.config import CameraConfig, LightingConfig, SceneConfig
from robofactory.evaluation.asked_ablations import Ablation
from robofactory.shapes import Action, Observation

STREAM = 2  # keeps these draws apart from the layout's, which come from the same seed
ABLATIONS = "ablations"  # the folder of their results, below those of the unchanged evaluation


@dataclass
class Perturbation:
    """What is different in one episode. Every step goes through `observe`, then through `act`, once and in order."""

    scene: SceneConfig
    observe: Callable[[list[Observation]], list[Observation]] = list
    act: Callable[[list[Action]], list[Action]] = list


@dataclass(frozen=True)
class Episode:
    """Where an ablation begins."""

    scene: SceneConfig
    agents: list[int]  # whose actions are changed
    random: np.random.Generator


def begin(ablation: Ablation | None, scene: SceneConfig, learned: Sequence[int], seed: int) -> Perturbation:
    """What is different in the episode of this seed; nothing without an ablation.

    Args:
        learned: the agents that policies drive. Their actions alone are changed, not those of the expert beside them;
            where the expert drives all, all are.
    """
    if ablation is None:
        return Perturbation(scene)
    agents = list(learned) or list(range(scene.num_agents))
    episode = Episode(scene, agents, np.random.default_rng([seed, STREAM]))
    return BEGINNINGS[ablation.name](episode, ablation.kind.read(ablation.value))


# ---------------------------------------------------------------------------------------------------- what it sees


def black_out(episode: Episode, view: str) -> Perturbation:
    def observe(observations: list[Observation]) -> list[Observation]:
        return [with_image(each, view, np.zeros_like(each.images[view])) for each in observations]

    return Perturbation(episode.scene, observe=observe)


def freeze(episode: Episode, view: str) -> Perturbation:
    first: list[np.ndarray] = []

    def observe(observations: list[Observation]) -> list[Observation]:
        if not first:
            first.extend(each.images[view] for each in observations)
        return [with_image(each, view, image) for each, image in zip(observations, first, strict=True)]

    return Perturbation(episode.scene, observe=observe)


def instruct(episode: Episode, instruction: str) -> Perturbation:
    def observe(observations: list[Observation]) -> list[Observation]:
        return [dataclasses.replace(each, instruction=instruction) for each in observations]

    return Perturbation(episode.scene, observe=observe)


def with_image(observation: Observation, view: str, image: np.ndarray) -> Observation:
    return dataclasses.replace(observation, images={**observation.images, view: image})


# ---------------------------------------------------------------------------------------------------- what it does


def add_noise(episode: Episode, noise_rad: float) -> Perturbation:
    """White noise of this standard deviation on the joint targets; the gripper's command is left alone."""

    def act(actions: list[Action]) -> list[Action]:
        noisy = list(actions)
        for agent in episode.agents:
            noise = np.append(episode.random.normal(0.0, noise_rad, len(actions[agent]) - 1), 0.0)
            noisy[agent] = (actions[agent] + noise).astype(np.float32)
        return noisy

    return Perturbation(episode.scene, act=act)


def delay(episode: Episode, delay_steps: int) -> Perturbation:
    """Every action is executed so many steps late; before the first one arrives, an arm keeps its posture."""
    pending: dict[int, deque[Action]] = {}
    for agent in episode.agents:
        placed = episode.scene.robots[agent]
        posture = robots.find(placed.uid).proprio(np.array(placed.rest_qpos))
        pending[agent] = deque([posture] * delay_steps)

    def act(actions: list[Action]) -> list[Action]:
        late = list(actions)
        for agent, queue in pending.items():
            queue.append(actions[agent])
            late[agent] = queue.popleft()
        return late

    return Perturbation(episode.scene, act=act)


# ------------------------------------------------------------------------------------------------------- the scene


def dim(episode: Episode, factor: float) -> Perturbation:
    def scaled(rgb: list[float]) -> list[float]:
        return [factor * value for value in rgb]

    lighting = episode.scene.lighting
    lamps = [dataclasses.replace(lamp, rgb=scaled(lamp.rgb)) for lamp in lighting.lamps]
    return _lit(episode.scene, LightingConfig(scaled(lighting.ambient_rgb), lamps))


def turn_lamps(episode: Episode, angle_deg: float) -> Perturbation:
    """About the vertical; light from straight above stays."""
    c, s = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))

    def turned(xyz: list[float]) -> list[float]:
        return [float(c * xyz[0] - s * xyz[1]), float(s * xyz[0] + c * xyz[1]), xyz[2]]

    lighting = episode.scene.lighting
    lamps = [dataclasses.replace(lamp, direction=turned(lamp.direction)) for lamp in lighting.lamps]
    return _lit(episode.scene, LightingConfig(lighting.ambient_rgb, lamps))


def _lit(scene: SceneConfig, lighting: LightingConfig) -> Perturbation:
    return Perturbation(dataclasses.replace(scene, lighting=lighting))


def shift_cameras(episode: Episode, distance_m: float) -> Perturbation:
    """Every camera by this distance, each in a random direction of its own; what it looks at is shifted along."""
    from robofactory.sim.cameras import moved

    return _with_cameras(episode, lambda camera, direction: moved(camera, distance_m * direction, np.zeros(3)))


def turn_cameras(episode: Episode, angle_deg: float) -> Perturbation:
    """Every camera by this angle, each about a random axis of its own."""
    from robofactory.sim.cameras import moved

    return _with_cameras(episode, lambda camera, axis: moved(camera, np.zeros(3), np.deg2rad(angle_deg) * axis))


def _with_cameras(episode: Episode, change: Callable[[CameraConfig, np.ndarray], CameraConfig]) -> Perturbation:
    directions = episode.random.normal(size=(len(episode.scene.cameras), 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cameras = [change(*each) for each in zip(episode.scene.cameras, directions, strict=True)]
    return Perturbation(dataclasses.replace(episode.scene, cameras=cameras))


# ------------------------------------------------------------------------------------------------------- their names

BEGINNINGS: dict[str, Callable[[Episode, Any], Perturbation]] = {
    "blackout": black_out,
    "freeze": freeze,
    "instruction": instruct,
    "action_noise_rad": add_noise,
    "action_delay_steps": delay,
    "light": dim,
    "lamp_turn_deg": turn_lamps,
    "camera_shift_m": shift_cameras,
    "camera_turn_deg": turn_cameras,
}
