"""LoRA adapters: exact counts at full size, a fresh adapter changes nothing, plain peft reads what is saved."""

import re
import subprocess
import sys

import pytest
import torch

from robofactory.config import ModelConfig
from robofactory.model.lora import build_untrained, count_parameters, parameter_table, trained_tensors
from robofactory.model.weights import OPENVLA_7B

# --------------------------------------------------------------------------------------------------------- full size


def sums(m: ModelConfig, proprio_dim: int | None = None) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    total, trained = zip(*count_parameters(build_untrained(m, OPENVLA_7B, proprio_dim)).values(), strict=True)
    return sum(total), sum(trained)


def test_the_7b_with_lora_has_exactly_the_parameters_of_the_specification():
    model = build_untrained(ModelConfig(), OPENVLA_7B, proprio_dim=None)
    counts = count_parameters(model)
    assert {part: total for part, (total, _) in counts.items()} == {
        "DINOv2": 303_230_976,
        "SigLIP": 427_680_704,
        "projector": 71_385_600,
        "language model": 6_738_939_904,
        "LoRA, language model": 79_953_920,
    }
    total, trained = (sum(column) for column in zip(*counts.values(), strict=True))
    assert (total, trained, total - trained) == (7_621_191_104, 79_953_920, 7_541_237_184)
    table = parameter_table(model)
    assert re.search(r"total +7,621,191,104 +trained 79,953,920 \(1\.05%\)", table) and "7,541,237,184" in table
    assert {tensor.dtype for tensor in trained_tensors(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_what_is_trained_beside_the_language_adapters_is_counted():
    total, trained = sums(ModelConfig(), proprio_dim=8)
    proprio = (8 * 17 + 1) * 4096 + (4096 + 1) * 4096  # 17 = a number, 8 sines, 8 cosines
    assert (total, trained) == (7_621_191_104 + proprio, 79_953_920 + proprio)
    # The official all-linear adapters have 12,582,912 in DINOv2's 24 blocks, the last of which feeds nothing.
    dino, siglip = 12_582_912 * 23 // 24, 15_399_936
    assert sums(ModelConfig(lora_vision=True))[1] == 79_953_920 + dino + siglip
    without_global_token = ModelConfig(lora_vision=True, global_token=False)
    assert sums(without_global_token)[1] == 79_953_920 + dino + siglip * 26 // 27


def test_without_adapters_all_that_is_used_is_trained():
    total, trained = sums(ModelConfig(use_lora=False))
    assert total == 7_541_237_184 and trained == total - 12_598_272 - 2048, "DINOv2's last block and norm feed nothing"


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ([], [r"total +7,621,191,104 +trained 79,953,920 \(1\.05%\)", r"visual +771 +3 x 257", r"before .* 792 "]),
        (["model.global_token=false", "data.views=[side]"], [r"visual +256 +1 x 256"]),
    ],
)
def test_the_summary_prints_counts_and_tokens(overrides: list[str], lines: list[str]):
    command = [sys.executable, "-m", "robofactory.model.summary", *overrides]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in lines:
        assert re.search(line, printed), printed
