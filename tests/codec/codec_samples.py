"""Inputs that the tests of this folder share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from robofactory.codec.codec import Codec
from robofactory.codec.statistics import DatasetStatistics
from robofactory.config import (
    ArchitectureConfig,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    RecipeConfig,
    TowerConfig,
    TrainingConfig,
)
from robofactory.shapes import Observation
from tests.official import PARITY

NAMES = [f"joint_{number}" for number in range(1, 8)] + ["gripper"]


def make_recipe(normalization: str = "mean_std", image_aug: bool = True, crop: float = 0.9) -> RecipeConfig:
    tower = TowerConfig(48, 2, 3)
    architecture = ArchitectureConfig(84, tower, tower, LanguageConfig(64, 128, 2, 4))
    return RecipeConfig(
        model=ModelConfig(model_name="tiny", use_lora=False, use_proprio=True, architecture=architecture),
        training=TrainingConfig(image_aug=image_aug, augment_crop_ratio=crop),
        data=replace(DataConfig(), normalization=normalization),
    )


def make_actions(count: int = 2000) -> np.ndarray:
    """Skewed joint targets in rad, one joint that never moves, and a gripper that is either open or closed."""
    rng = np.random.default_rng(3)
    actions = rng.gamma(2.0, 0.3, (count, 8)).astype(np.float32) * np.linspace(0.2, 2.0, 8, dtype=np.float32) - 1.1
    actions[:, 4] = np.float32(0.1)
    actions[:, 7] = np.where(rng.random(count) < 0.5, 1.0, -1.0)
    return actions


def make_codec(recipe: RecipeConfig | None = None) -> Codec:
    look = {"visual_detail": "low", "shader": "minimal", "camera_sizes": {"side": [128, 96]}}
    return create(recipe or make_recipe(), make_actions(), make_actions() * np.float32(0.5), NAMES, look)


def create(
    recipe: RecipeConfig, actions: np.ndarray, proprio: np.ndarray, names: list[str], look: dict, **more
) -> Codec:
    """The codec of one dataset."""
    method = recipe.data.normalization
    return Codec.create(recipe, {"some": DatasetStatistics.measure(actions, proprio, names, method, look, 10, **more)})


def make_observation(seed: int = 0, instruction: str = "lift the barrier") -> Observation:
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (96, 128, 3), dtype=np.uint8) for view in ("side", "overhead", "wrist")}
    return Observation(images, make_actions()[seed] * np.float32(0.5), instruction)


def llama_lookalike(directory: Path) -> Path:
    """A directory with the fixture's configuration and a tokenizer that has Llama's ids for the LiftBarrier prompt."""
    ids = {
        "<unk>": 0, "<s>": 1, "</s>": 2, "\n": 13, "\u2581the": 278, "\u2581to": 304, "\u2581In": 512,
        "\u2581should": 881, "\u2581What": 1724, "\u2581take": 2125, "\u2581action": 3158, "Out": 3744, "rier": 4336,
        "\u2581lift": 12021, "\u2581bar": 13854, "\u2581robot": 19964, "\u2581": 29871, ":": 29901, "?": 29973,
    }  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])  # type: ignore
    words = sorted((w for w in ids if not w.startswith("<")), key=len, reverse=True)
    pattern = "|".join(word.replace("?", r"\?") for word in words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")  # type: ignore
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text((PARITY / "config.json").read_text())
    return directory
