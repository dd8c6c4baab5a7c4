"""The whole model against one put together from plain timm and transformers parts, at a shape of our own choice.

Nothing here can be fitted to the recorded fixture: grouped keys, unequal depths and widths, any number of views.
"""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from robofactory.model.weights import OPENVLA_7B, load_openvla
from robofactory.shapes import Batch
from tests.published import NUM_IDS, write_published

DINO, SIGLIP = OPENVLA_7B["timm_model_ids"]
TOWERS = {
    DINO: {"embed_dim": 40, "depth": 5, "num_heads": 5},
    SIGLIP: {"embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 3.0},
}
LANGUAGE = {"vocab_size": NUM_IDS + 64, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4}
LANGUAGE |= {"num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 20_000.0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"timm_overrides": TOWERS, "text_config": LANGUAGE, "image_sizes": [42, 42]}
    return write_published(tmp_path_factory.mktemp("weights"), seed=7, **changes)


def make_batch(num_views: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, NUM_IDS - 256, (2, 9), generator=generator)
    pixels = torch.randn(2, num_views, 6, 42, 42, generator=generator)
    actions = torch.randint(NUM_IDS - 256, NUM_IDS, (2, 8), generator=generator)
    return Batch(pixels, ids, torch.ones_like(ids, dtype=torch.bool), action_tokens=actions)


def reference_logits(weights: Path, batch: Batch, global_token: bool) -> Tensor:
    """Logits of the whole sequence, as the official model computes them: every view on its own, no cache."""
    tensors = {name: t.float() for file in weights.glob("*.safetensors") for name, t in load_file(file).items()}

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix).replace("scale_factor", "gamma"): t for n, t in tensors.items() if n.startswith(prefix)}  # fmt: skip

    towers = {}
    for model_id, prefix in {DINO: "vision_backbone.featurizer.", SIGLIP: "vision_backbone.fused_featurizer."}.items():
        towers[model_id] = timm.create_model(model_id, num_classes=0, img_size=42, **TOWERS[model_id]).eval()
        towers[model_id].load_state_dict(part(prefix))
    blocks = []
    for view in range(batch.pixel_values.shape[1]):
        halves = batch.pixel_values[:, view].split(3, dim=1)
        features = [
            tower.get_intermediate_layers(image, n=[len(tower.blocks) - 2], return_prefix_tokens=global_token)[0]
            for tower, image in zip(towers.values(), halves, strict=True)
        ]
        if global_token:
            (dino, prefix), siglip = features
            whole = torch.cat([prefix[:, 0], towers[SIGLIP](halves[1])], dim=-1)
            blocks.append(torch.cat([whole[:, None], torch.cat([dino, siglip], dim=-1)], dim=1))
        else:
            blocks.append(torch.cat(features, dim=-1))
    projector, hidden = part("projector."), torch.cat(blocks, dim=1)
    for number in (1, 2, 3):
        hidden = F.linear(hidden, projector[f"fc{number}.weight"], projector[f"fc{number}.bias"])
        hidden = F.gelu(hidden) if number < 3 else hidden
    language_model = LlamaForCausalLM(LlamaConfig(**LANGUAGE)).eval()
    language_model.load_state_dict(part("language_model."))
    assert batch.action_tokens is not None
    embed = language_model.model.embed_tokens
    text = embed(torch.cat([batch.input_ids, batch.action_tokens], dim=1))
    return language_model(inputs_embeds=torch.cat([text[:, :1], hidden, text[:, 1:]], dim=1)).logits


@torch.no_grad()
@pytest.mark.parametrize(("num_views", "global_token"), [(1, False), (3, False), (2, True)])
def test_logits_loss_and_greedy_tokens_equal_the_reference(weights: Path, num_views: int, global_token: bool):
    batch, model = make_batch(num_views), load_openvla(weights, global_token)
    assert json.loads((weights / "config.json").read_text())["timm_overrides"] == TOWERS
    expected = reference_logits(weights, batch, global_token)[:, -9:-1]
    torch.testing.assert_close(model.action_logits(batch), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.05, "nearly equal logits would prove nothing"
    loss, *_ = model(batch)
    assert batch.action_tokens is not None
    expected_loss = F.cross_entropy(expected.flatten(0, 1), batch.action_tokens.flatten())
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_token_at_a_time_as_the_reference_generates(weights: Path):
    batch, model = make_batch(3), load_openvla(weights, global_token=True)
    tokens = model.generate(batch, 8)
    given = Batch(batch.pixel_values, batch.input_ids, batch.text_mask, action_tokens=tokens)
    greedy = reference_logits(weights, given, global_token=True)[:, -9:-1, NUM_IDS - 256 : NUM_IDS].argmax(-1)
    assert tokens.equal(greedy + NUM_IDS - 256)
