"""What is taken from a policy, or done to it, to see what its success rests on.

An ablation is a small function that begins an episode: it may change the scene, what is observed and what is executed.
It draws from the episode's seed alone, so it is the same whoever plays the episode.
"""

import dataclasses
import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from robofactory import robots
from robofactory.config import CameraConfig, LightingConfig, SceneConfig
from robofactory.errors import UserError, did_you_mean
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


@dataclass(frozen=True)
class Ablation:
    """As it is asked for and named: `blackout=side`."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"

    @property
    def directory(self) -> str:
        """Its name for a file system; words that had to be changed for it are told apart by a digest."""
        plain = re.sub(r"[^\w.=-]+", "_", str(self))[:60]
        return plain if plain == str(self) else f"{plain}-{sha256(str(self).encode()).hexdigest()[:8]}"


def begin(ablation: Ablation | None, scene: SceneConfig, learned: Sequence[int], seed: int) -> Perturbation:
    """What is different in the episode of this seed; nothing without an ablation.

    Args:
        learned: the agents that policies drive. Their actions alone are changed, not those of the expert beside them;
            where the expert drives all, all are.
    """
    if ablation is None:
        return Perturbation(scene)
    kind = KINDS[ablation.name]
    agents = list(learned) or list(range(scene.num_agents))
    return kind.begin(Episode(scene, agents, np.random.default_rng([seed, STREAM])), kind.read(ablation.value))


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


@dataclass(frozen=True)
class Kind:
    begin: Callable[[Episode, Any], Perturbation]
    read: Callable[[str], Any]  # raises ValueError for what is not allowed
    allowed: str
    usual: str | None  # the value where none is given; None: every view in turn
    is_felt_by_expert: bool = False  # who sees no pictures and hears no words
    has_scene_per_episode: bool = False  # drawn from its seed


def number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def size(text: str) -> float:
    if (value := number(text)) < 0:
        raise ValueError(text)
    return value


def steps(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def words(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


KINDS = {
    "blackout": Kind(black_out, str, "a view", None),
    "freeze": Kind(freeze, str, "a view", None),
    "instruction": Kind(instruct, words, "other words", "open the drawer"),
    "action_noise_rad": Kind(add_noise, size, "0 or more", "0.02", is_felt_by_expert=True),
    "action_delay_steps": Kind(delay, steps, "1, 2, ...", "2", is_felt_by_expert=True),
    "light": Kind(dim, size, "a factor, 0 or more", "0.5"),
    "lamp_turn_deg": Kind(turn_lamps, number, "an angle", "90"),
    "camera_shift_m": Kind(shift_cameras, size, "0 or more", "0.02", has_scene_per_episode=True),
    "camera_turn_deg": Kind(turn_cameras, size, "0 or more", "2", has_scene_per_episode=True),
}


def read_ablations(asked: Sequence[str], scene: SceneConfig, has_policies: bool) -> list[Ablation]:
    """What `--ablate NAME[=VALUE] ...` asks for, each once and in this order; `blackout` alone is one for every view.

    Raises:
        UserError: an unknown name or value, with what is allowed; or one that the scripted expert would not notice.
    """
    found: dict[Ablation, None] = {}
    for text in asked:
        name, equals, value = text.partition("=")
        if name not in KINDS:
            guess = did_you_mean(name, KINDS)
            raise UserError(f"--ablate {text}: unknown ablation {name!r}{guess}; there are {', '.join(KINDS)}")
        kind = KINDS[name]
        if not has_policies and not kind.is_felt_by_expert:
            felt = ", ".join(name for name, kind in KINDS.items() if kind.is_felt_by_expert)
            raise UserError(f"--ablate {text}: the expert looks at no pictures and hears no words; it notices {felt}")
        usual = list(scene.views) if kind.usual is None else [kind.usual]
        for each in [value] if equals else usual:
            if kind.usual is None and each not in scene.views:
                raise UserError(f"--ablate {text}: {scene.task} has no view {each!r}; it has {', '.join(scene.views)}")
            try:
                kind.read(each)
            except ValueError:
                raise UserError(f"--ablate {text}: {name} takes {kind.allowed}, not {each!r}") from None
            found[Ablation(name, each)] = None
    return list(found)
