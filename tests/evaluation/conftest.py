import numpy as np
import pytest
import torch

from robofactory import checkpoint
from robofactory.codec.codec import Codec
from robofactory.codec.statistics import DatasetStatistics
from robofactory.config import load_recipe


@pytest.fixture(scope="module")
def models():
    """Of two agents, by agent, and their codecs."""
    sizes = {"dino": "{embed_dim: 32, depth: 2, num_heads: 2}", "siglip": "{embed_dim: 32, depth: 2, num_heads: 2}"}
    sizes["language"] = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
    overrides = [f"model.architecture.{name}={size}" for name, size in sizes.items()]
    recipe = load_recipe("robot_openvla_tiny", ["model.architecture.image_size=28", "data.views=[wrist]", *overrides])
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 8))
    names = [f"joint{i}" for i in range(1, 8)] + ["gripper"]
    codec = Codec.create(recipe, {"some": DatasetStatistics.measure(actions, actions, names, "mean_std", {}, 5)})
    torch.manual_seed(0)
    return {agent: checkpoint.build_model(recipe, codec).eval() for agent in (0, 1)}, {0: codec, 1: codec}
