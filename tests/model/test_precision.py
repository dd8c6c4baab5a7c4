"""bfloat16 where it is fast, and never silently somewhere else."""

import numpy as np
import pytest
import torch

from robofactory.config import ArchitectureConfig, LanguageConfig, ModelConfig, RecipeConfig, TowerConfig
from robofactory.model.lora import load_untrained
from robofactory.model.openvla import OpenVLA, build_from_scratch
from robofactory.model.precision import autocast, computes_bfloat16
from tests.published import write_published

TOWER = TowerConfig(embed_dim=16, depth=2, num_heads=1)
SIZES = ArchitectureConfig(28, TOWER, TOWER, LanguageConfig(16, 16, 1, 1))


@pytest.fixture
def model() -> OpenVLA:
    return build_from_scratch(SIZES, 300, None, global_token=True)


def computes_in(model: OpenVLA) -> torch.dtype:
    """The format of a product of float32 numbers in the model's context."""
    with autocast(model):
        return (torch.ones(4, 4) @ torch.ones(4, 4)).dtype


def capabilities(monkeypatch, **given: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "made up"} | given)


@pytest.mark.parametrize("instructions, expected", [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx512_vnni", torch.float32)])  # fmt: skip
def test_a_cpu_multiplies_in_bfloat16_only_where_it_has_instructions_for_it(monkeypatch, model, instructions, expected):
    """On a CPU that emulates it, training was 2.7 times slower in bfloat16 (14 against 37 samples/s a core)."""
    capabilities(monkeypatch, **({"amx_bf16": False, "avx512_bf16": False} | {instructions: True}))
    assert computes_in(model) == expected


def test_bfloat16_weights_are_computed_with_anywhere(monkeypatch, model):
    """Else float32 inputs would meet bfloat16 weights, which PyTorch refuses."""
    capabilities(monkeypatch, amx_bf16=False, avx512_bf16=False)
    assert computes_in(model.bfloat16()) == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_recipe_says_what_a_model_from_scratch_computes_in(monkeypatch, dtype):
    """`model.torch_dtype=float32` was ignored by models from scratch, and overruled by autocast on a GPU."""
    from robofactory import checkpoint
    from robofactory.codec.codec import Codec
    from robofactory.codec.statistics import DatasetStatistics

    capabilities(monkeypatch, amx_bf16=True)
    recipe = RecipeConfig(model=ModelConfig(use_lora=False, torch_dtype=dtype, architecture=SIZES))
    numbers = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    statistics = DatasetStatistics.measure(numbers, numbers, ["x", "y"], "min_max", {}, 2)
    model = checkpoint.build_model(recipe, Codec.create(recipe, {"some": statistics}))
    assert computes_in(model) == getattr(torch, dtype)


def test_gpus_compute_in_bfloat16():
    assert computes_bfloat16("cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_recipe_says_what_published_weights_compute_in(monkeypatch, tmp_path, dtype):
    capabilities(monkeypatch, amx_bf16=True)
    model = load_untrained(ModelConfig(torch_dtype=dtype), write_published(tmp_path / "openvla"), proprio_dim=None)
    assert computes_in(model) == getattr(torch, dtype)
