"""bfloat16 where it is fast, and never silently somewhere else."""

import pytest
import torch
from torch import nn

from robofactory.model.precision import autocast, computes_bfloat16


def capabilities(monkeypatch, **given: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "made up"} | given)


@pytest.mark.parametrize("instructions, expected", [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx512_vnni", torch.float32)])  # fmt: skip
def test_a_cpu_multiplies_in_bfloat16_only_where_it_has_instructions_for_it(monkeypatch, instructions, expected):
    """On a CPU that emulates it, training was 2.7 times slower in bfloat16 (14 against 37 samples/s a core)."""
    capabilities(monkeypatch, **({"amx_bf16": False, "avx512_bf16": False} | {instructions: True}))
    model = nn.Linear(4, 4)
    with autocast(model):
        assert model(torch.ones(2, 4)).dtype == expected


def test_bfloat16_weights_are_computed_with_anywhere(monkeypatch):
    """Else float32 inputs would meet bfloat16 weights, which PyTorch refuses."""
    capabilities(monkeypatch, amx_bf16=False, avx512_bf16=False)
    model = nn.Linear(4, 4).bfloat16()
    with autocast(model):
        assert model(torch.ones(2, 4)).dtype == torch.bfloat16


def test_gpus_compute_in_bfloat16():
    assert computes_bfloat16("cuda")
