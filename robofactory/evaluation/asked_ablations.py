"""What `--ablate` may ask for. The standard library alone, so that a mistake is found before anything heavy is loaded."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from robofactory.config import SceneConfig
from robofactory.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Ablation:
    """As it is asked for and named: `blackout=side`."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"

    @property
    def kind(self) -> "Kind":
        return KINDS[self.name]

    @property
    def directory(self) -> str:
        """Its name for a file system; words that had to be changed for it are told apart by a digest."""
        plain = re.sub(r"[^\w.=-]+", "_", str(self))[:60]
        return plain if plain == str(self) else f"{plain}-{sha256(str(self).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Kind:
    """What may be asked of one; what it does is in `ablations`."""

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
    "blackout": Kind(str, "a view", None),
    "freeze": Kind(str, "a view", None),
    "instruction": Kind(words, "other words", "open the drawer"),
    "action_noise_rad": Kind(size, "0 or more", "0.02", is_felt_by_expert=True),
    "action_delay_steps": Kind(steps, "1, 2, ...", "2", is_felt_by_expert=True),
    "light": Kind(size, "a factor, 0 or more", "0.5"),
    "lamp_turn_deg": Kind(number, "an angle", "90"),
    "camera_shift_m": Kind(size, "0 or more", "0.02", has_scene_per_episode=True),
    "camera_turn_deg": Kind(size, "0 or more", "2", has_scene_per_episode=True),
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
