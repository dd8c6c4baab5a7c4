"""LoRA adapters: exact counts at full size, a fresh adapter changes nothing, plain peft reads what is saved."""

import re
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from robofactory.config import ModelConfig, load_recipe
from robofactory.errors import UserError
from robofactory.model.lora import (
    FastLoraLinear,
    build_untrained,
    count_parameters,
    load_untrained,
    merge_adapters,
    parameter_table,
    trained_tensors,
)
from robofactory.model.openvla import OpenVLA
from robofactory.model.precision import autocast
from robofactory.model.summary import summary
from robofactory.model.weights import OPENVLA_7B, load_openvla
from robofactory.shapes import Batch
from tests.published import NUM_IDS, write_published

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
def test_the_summary_shows_counts_and_tokens(overrides: list[str], lines: list[str]):
    printed = summary(load_recipe("robot_openvla", overrides), proprio_dim=8, text_tokens=20)
    for line in lines:
        assert re.search(line, printed), printed


# --------------------------------------------------------------------------------------------------------- small size


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("weights"))


def make_batch(num_views: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, NUM_IDS - 256, (2, 6), generator=generator)
    pixels = torch.randn(2, num_views, 6, 28, 28, generator=generator)
    actions = torch.randint(NUM_IDS - 256, NUM_IDS, (2, 8), generator=generator)
    return Batch(pixels, ids, torch.ones_like(ids, dtype=torch.bool), action_tokens=actions)


@torch.no_grad()
def logits_of(model: OpenVLA) -> torch.Tensor:
    with autocast(model):
        return model.action_logits(make_batch())


def fill_adapters(model: OpenVLA) -> None:
    """As after training: a fresh adapter's B is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained_tensors(model).items():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fresh_adapters_change_nothing_and_filled_ones_do(weights: Path, dtype: str):
    m = ModelConfig(torch_dtype=dtype, lora_vision=True)
    base = load_openvla(weights, m.global_token, dtype=getattr(torch, dtype))
    model = load_untrained(m, weights, proprio_dim=None)
    assert logits_of(model).equal(logits_of(base)), "B is zero, so every bit must be the base's"
    fill_adapters(model)
    assert (logits_of(model) - logits_of(base)).abs().max() > 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adapters_keep_no_copy_of_their_inputs(weights: Path, dropout: float):
    """peft would copy every input to the adapters' float32: 13 GiB for the 7B at batch 16 and 3 views."""
    model = load_untrained(ModelConfig(lora_vision=True, lora_dropout=dropout), weights, proprio_dim=None)
    num_tokens, kept = 2 * (1 + 2 * 5 + 5 + 7), []
    layer = model.language_model.model.layers[0].self_attn.q_proj

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with autocast(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, num_tokens // 2, layer.in_features, dtype=torch.bfloat16, requires_grad=True))
    inputs = [tensor for tensor in kept if tensor.numel() == num_tokens * layer.in_features]
    assert {tensor.dtype for tensor in inputs} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [".q_proj", ".down_proj", "fused_featurizer.blocks.0.mlp.fc1"])
def test_our_adapted_layer_computes_what_pefts_does(weights: Path, kind: str, dtype: torch.dtype):
    m = ModelConfig(torch_dtype=str(dtype).removeprefix("torch."), lora_vision=True)
    model = load_untrained(m, weights, proprio_dim=None)
    fill_adapters(model)
    layer = next(module for name, module in model.named_modules() if name.endswith(kind))
    assert isinstance(layer, FastLoraLinear)
    x = torch.randn(2, 5, layer.in_features, dtype=dtype, requires_grad=True)
    trained = [x, *trained_tensors(layer).values()]
    answers = []
    for forward in (FastLoraLinear.forward, peft.tuners.lora.Linear.forward):
        with autocast(model):
            y = forward(layer, x)
        answers.append([y, *torch.autograd.grad((y * torch.arange(y.shape[-1])).sum() / y.shape[-1], trained)])
    assert len(trained) == 3 and answers[0][2].dtype == torch.float32
    tolerance = {"atol": 0.05, "rtol": 0.03} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(answers[0], answers[1], **tolerance)


def test_a_layer_with_dropout_is_left_to_peft(weights: Path):
    model = load_untrained(ModelConfig(lora_dropout=0.1), weights, proprio_dim=None)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers and {type(layer) for layer in layers} == {peft.tuners.lora.Linear}


@pytest.mark.parametrize(("lora_vision", "global_token"), [(False, True), (True, True), (True, False)])
def test_every_adapter_gets_a_gradient_and_nothing_else_does(weights: Path, lora_vision: bool, global_token: bool):
    m = ModelConfig(torch_dtype="float32", lora_vision=lora_vision, global_token=global_token)
    model = load_untrained(m, weights, proprio_dim=None)
    fill_adapters(model)
    model(make_batch())[0].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == set(trained_tensors(model)) == {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert any(name.startswith("vision_backbone.") for name in with_gradient) == lora_vision


def test_no_graph_is_kept_for_frozen_towers(weights: Path):
    model = load_untrained(ModelConfig(torch_dtype="float32"), weights, proprio_dim=None)
    assert not model.projector(model.vision_backbone(make_batch().pixel_values)).requires_grad


def test_rank_and_alpha_change_the_model(weights: Path):
    ranks = {rank: load_untrained(ModelConfig(lora_rank=rank), weights, None) for rank in (4, 8)}
    sizes = {rank: sum(p.numel() for p in trained_tensors(model).values()) for rank, model in ranks.items()}
    assert sizes[8] == 2 * sizes[4]
    outputs = []
    for alpha in (8, 16):
        torch.manual_seed(0)
        model = load_untrained(ModelConfig(lora_alpha=alpha, torch_dtype="float32"), weights, None)
        fill_adapters(model)
        outputs.append(logits_of(model))
    assert not torch.allclose(*outputs, atol=1e-3)


def test_merged_weights_answer_as_the_adapters_did(weights: Path):
    model = load_untrained(ModelConfig(torch_dtype="float32", lora_vision=True), weights, proprio_dim=None)
    names = set(load_openvla(weights, global_token=True).state_dict())
    fill_adapters(model)
    before = logits_of(model)
    merge_adapters(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits_of(model), before, atol=1e-4, rtol=0)


def test_quantizing_without_bitsandbytes_is_one_line(weights: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match=r"pip install bitsandbytes, or leave model\.quantize out"):
        load_untrained(ModelConfig(quantize="nf4"), weights, proprio_dim=None)


def test_adapters_on_a_base_in_4_bits_learn(weights: Path):
    pytest.importorskip("bitsandbytes")
    model = load_untrained(ModelConfig(quantize="nf4", torch_dtype="float32"), weights, proprio_dim=None)
    base = load_openvla(weights, global_token=True)
    assert count_parameters(model)["language model"] == (count_parameters(base)["language model"][0], 0)
    difference = (logits_of(model) - logits_of(base)).abs().max()
    assert 0 < difference < logits_of(base).abs().max(), "4 bits are near the base, and not the base"
    fill_adapters(model)
    model(make_batch())[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in trained_tensors(model).values())
