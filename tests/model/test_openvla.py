from dataclasses import replace

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from robofactory.config import ArchitectureConfig, LanguageConfig, TowerConfig
from robofactory.errors import UserError
from robofactory.model.openvla import OpenVLA, action_loss, build_from_config, build_from_scratch
from robofactory.model.weights import OPENVLA_7B
from robofactory.shapes import Batch

SIZES = ArchitectureConfig(
    image_size=28,
    dino=TowerConfig(embed_dim=32, depth=3, num_heads=2),
    siglip=TowerConfig(embed_dim=48, depth=3, num_heads=2),
    language=LanguageConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4),
)
VOCAB, BOS = 400, 1
FIRST_ACTION_ID = VOCAB - 256


def make_model(global_token: bool = True, proprio_dim: int | None = 8) -> OpenVLA:
    torch.manual_seed(0)
    model = build_from_scratch(SIZES, VOCAB, proprio_dim, global_token)
    with torch.no_grad():  # far from a fresh model's near-uniform outputs, so that differences show
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def make_batch(num_samples: int = 3, num_views: int = 2, text_length: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, FIRST_ACTION_ID, (num_samples, text_length), generator=generator)
    ids[:, 0] = BOS
    return Batch(
        pixel_values=torch.randn(num_samples, num_views, 6, 28, 28, generator=generator),
        input_ids=ids,
        text_mask=torch.ones_like(ids, dtype=torch.bool),
        proprio=torch.randn(num_samples, 8, generator=generator),
        action_tokens=torch.randint(FIRST_ACTION_ID, VOCAB, (num_samples, 8), generator=generator),
    )


def take(batch: Batch, rows: slice) -> Batch:
    assert batch.proprio is not None and batch.action_tokens is not None
    return Batch(
        batch.pixel_values[rows],
        batch.input_ids[rows],
        batch.text_mask[rows],
        batch.proprio[rows],
        batch.action_tokens[rows],
    )


def with_padding(batch: Batch, lengths: list[int], side: str) -> Batch:
    """The first `lengths[i]` prompt tokens of row i, padded to a common length plus one column of padding."""
    width = max(lengths) + 1
    ids, mask = torch.full((len(lengths), width), 2), torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        columns = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, columns], mask[row, columns] = batch.input_ids[row, :length], True
    return replace(batch, input_ids=ids, text_mask=mask)


# --------------------------------------------------------------------------------------------------------- full size


@pytest.fixture(scope="module")
def published() -> OpenVLA:
    with torch.device("meta"):
        return build_from_config(OPENVLA_7B, global_token=True)


def test_the_published_size_has_exactly_7541237184_parameters(published: OpenVLA):
    assert sum(parameter.numel() for parameter in published.parameters()) == 7_541_237_184
    assert len(published.state_dict()) == 982


def test_three_views_at_the_published_size_make_771_visual_tokens(published: OpenVLA):
    with torch.device("meta"):
        features = published.vision_backbone(torch.empty(2, 3, 6, 224, 224))
    assert features.shape == (2, 771, 1024 + 1152)


def test_the_published_action_ids_are_31744_to_31999(published: OpenVLA):
    assert (published.first_action_id, published.first_action_id + 255) == (31_744, 31_999)


def test_a_config_of_another_architecture_is_refused_by_name():
    with pytest.raises(
        UserError, match="'arch_specifier' is \"no-align\\+gelu-mlp\"; needed: 'no-align\\+fused-gelu-mlp'"
    ):
        build_from_config(OPENVLA_7B | {"arch_specifier": "no-align+gelu-mlp"}, global_token=True)
    with pytest.raises(UserError, match="'timm_model_ids' is missing"):
        build_from_config({k: v for k, v in OPENVLA_7B.items() if k != "timm_model_ids"}, global_token=True)


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        (replace(SIZES, image_size=30), "image_size=30"),
        (replace(SIZES, siglip=TowerConfig(embed_dim=30, depth=3, num_heads=2)), "siglip.embed_dim=30"),
        (replace(SIZES, language=replace(SIZES.language, num_attention_heads=5)), "language.hidden_size=64"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_by_its_key(sizes: ArchitectureConfig, key: str):
    with pytest.raises(UserError, match=key):
        build_from_scratch(sizes, VOCAB, proprio_dim=8, global_token=True)


def test_patches_start_with_their_place_in_the_image():
    """With timm's tiny random position embeddings, 300 steps on LiftBarrier end half as far again off."""
    positions = build_from_scratch(SIZES, VOCAB, 8, global_token=True).vision_backbone.featurizer.pos_embed[0]
    assert torch.cdist(positions, positions).add(torch.eye(len(positions))).min() > 0.1
    assert 0.2 < positions.pow(2).mean().sqrt() < 0.5


# ---------------------------------------------------------------------------------------------------------- sequence


@pytest.mark.parametrize("global_token", [True, False])
@pytest.mark.parametrize("num_views", [1, 3])
def test_the_sequence_has_every_token_once(global_token: bool, num_views: int):
    model, batch = make_model(global_token), make_batch(num_views=num_views)
    hidden, visible = model.embed_inputs(batch)
    assert hidden.shape[1] == 1 + num_views * (4 + global_token) + 1 + 5  # BOS, views, proprio, rest of the prompt
    assert visible is None, "a batch without padding must take the path without a mask"


@torch.no_grad()
def test_every_input_changes_the_logits():
    model, batch = make_model(), make_batch(num_views=3)
    logits = model.action_logits(batch)
    assert batch.proprio is not None and batch.action_tokens is not None
    changed = {}
    for view in range(3):
        for name, channels in {"dino": slice(0, 3), "siglip": slice(3, 6)}.items():
            pixels = batch.pixel_values.clone()
            pixels[:, view, channels] += 1.0
            changed[f"{name} view {view}"] = replace(batch, pixel_values=pixels)
    changed["text"] = replace(batch, input_ids=batch.input_ids.clone().index_fill_(1, torch.tensor([3]), 7))
    changed["proprio"] = replace(batch, proprio=batch.proprio + 1.0)
    changed["order of views"] = replace(batch, pixel_values=batch.pixel_values.flip(1))
    for name, other in changed.items():
        difference = (model.action_logits(other) - logits).abs().amax(dim=(1, 2))
        assert (difference > 1e-4).all(), f"{name} has no influence on some sample"


@torch.no_grad()
def test_logits_depend_on_earlier_actions_only():
    model, batch = make_model(), make_batch()
    assert batch.action_tokens is not None
    tokens = batch.action_tokens.clone()
    tokens[:, 4] = FIRST_ACTION_ID + (tokens[:, 4] - FIRST_ACTION_ID + 100) % 256
    difference = (model.action_logits(replace(batch, action_tokens=tokens)) - model.action_logits(batch)).abs().amax(-1)
    assert (difference[:, :5] < 1e-5).all() and (difference[:, 5:] > 1e-4).all()


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other():
    model, batch = make_model(), make_batch(4)
    together = model.action_logits(batch)
    apart = torch.cat([model.action_logits(take(batch, slice(i, i + 1))) for i in range(4)])
    torch.testing.assert_close(together, apart, atol=5e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_generated_tokens(side: str):
    model, batch, lengths = make_model(), make_batch(), [6, 3, 5]
    padded = with_padding(batch, lengths, side)
    rows = [take(batch, slice(i, i + 1)) for i in range(3)]
    rows = [
        replace(row, input_ids=row.input_ids[:, :length], text_mask=row.text_mask[:, :length])
        for row, length in zip(rows, lengths, strict=True)
    ]
    alone = torch.cat([model.action_logits(row) for row in rows])
    torch.testing.assert_close(model.action_logits(padded), alone, atol=5e-5, rtol=1e-5)
    assert model.generate(padded, 8).tolist() == torch.cat([model.generate(row, 8) for row in rows]).tolist()


@torch.no_grad()
def test_language_layers_equal_transformers_own():
    """Grouped keys, another rope base and epsilon: whatever a text_config may say."""
    torch.manual_seed(0)
    text = {"vocab_size": VOCAB + 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5000.0, "rms_norm_eps": 1e-5}
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    overrides = {model_id: small for model_id in OPENVLA_7B["timm_model_ids"]}
    config = OPENVLA_7B | {"text_config": text, "image_sizes": [28, 28]}
    model = build_from_config(config, global_token=False, timm_overrides=overrides).eval()
    reference = LlamaForCausalLM(LlamaConfig(**text)).eval()
    reference.load_state_dict(model.language_model.state_dict())
    batch = replace(make_batch(), proprio=None)
    assert batch.action_tokens is not None
    hidden, _ = model.embed_inputs(batch)
    embedded_actions = model.language_model.model.embed_tokens(batch.action_tokens[:, :-1])
    expected = reference(inputs_embeds=torch.cat([hidden, embedded_actions], dim=1)).logits[:, -8:]
    torch.testing.assert_close(model.action_logits(batch), expected, atol=5e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_attention_weights_are_those_that_transformers_computes_and_change_no_logit(side: str):
    torch.manual_seed(0)
    text = {"vocab_size": VOCAB + 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    overrides = {model_id: small for model_id in OPENVLA_7B["timm_model_ids"]}
    config = OPENVLA_7B | {"text_config": text, "image_sizes": [28, 28]}
    model = build_from_config(config, global_token=True, timm_overrides=overrides).eval()
    for parameter in model.parameters():  # far from even attention
        parameter.add_(0.1 * torch.randn_like(parameter))
    batch = replace(make_batch(), proprio=None)
    if side != "none":
        batch = with_padding(batch, [6, 3, 5], side)
    assert batch.action_tokens is not None
    model.fused_attention = True
    weights: list[torch.Tensor] = []
    logits = model.action_logits(batch, weights)
    torch.testing.assert_close(logits, model.action_logits(batch), atol=5e-5, rtol=1e-5)

    reference = LlamaForCausalLM(LlamaConfig(**text, attn_implementation="eager")).eval()
    reference.load_state_dict(model.language_model.state_dict())
    hidden, visible = model.embed_inputs(batch)
    hidden = torch.cat([hidden, model.language_model.model.embed_tokens(batch.action_tokens[:, :-1])], dim=1)
    mask = torch.ones(hidden.shape[:2], dtype=torch.long)
    if visible is not None:
        mask[:, : visible.shape[1]] = visible
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    expected = reference(inputs_embeds=hidden, attention_mask=mask, position_ids=positions, output_attentions=True)
    assert len(weights) == len(expected.attentions) == 3
    for ours, theirs in zip(weights, expected.attentions, strict=True):
        assert ours.shape == (3, 8, hidden.shape[1])
        torch.testing.assert_close(ours, theirs[:, :, -8:].mean(dim=1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.sum(dim=-1), torch.ones(3, 8))
    assert weights[0].max() > 3 / hidden.shape[1], "even attention would prove little"


@pytest.mark.parametrize(("global_token", "proprio_dim"), [(True, 8), (False, None)])
def test_the_parts_of_a_sequence_are_all_of_it(global_token: bool, proprio_dim: int | None):
    model, batch = make_model(global_token, proprio_dim), make_batch(num_views=3)
    bos, *views, proprio, text, given = model.part_sizes(batch)
    assert (bos, views, proprio, text, given) == (1, [4 + global_token] * 3, int(proprio_dim is not None), 5, 7)
    assert bos + sum(views) + proprio + text == model.embed_inputs(batch)[0].shape[1]


@torch.no_grad()
def test_fused_and_plain_attention_agree():
    model, batch = make_model(), make_batch()
    for inputs in (batch, with_padding(batch, [6, 3, 5], "left")):
        results = []
        for fused in (True, False):
            model.fused_attention = model.vision_backbone.fused_attention = fused
            results.append(model.action_logits(inputs))
        torch.testing.assert_close(*results, atol=5e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("global_token", [True, False])
def test_every_trainable_tensor_gets_a_gradient(global_token: bool):
    torch.manual_seed(0)
    model = build_from_scratch(SIZES, VOCAB, 8, global_token)
    model(make_batch())[0].backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not dead, f"no gradient reaches {dead}"


@pytest.mark.parametrize("global_token", [True, False])
def test_layers_that_official_weights_bring_and_nobody_uses_are_frozen(global_token: bool):
    text = {"vocab_size": VOCAB + 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    overrides = {model_id: small for model_id in OPENVLA_7B["timm_model_ids"]}
    config = OPENVLA_7B | {"text_config": text | {"num_attention_heads": 4}, "image_sizes": [28, 28]}
    model = build_from_config(config, global_token, timm_overrides=overrides)
    model(replace(make_batch(), proprio=None))[0].backward()
    wrong = [n for n, p in model.named_parameters() if p.requires_grad != (p.grad is not None)]
    assert not wrong, f"trainable without a gradient: {wrong}"


def test_a_few_steps_learn_a_batch_by_heart_in_bfloat16_autocast():
    torch.manual_seed(0)
    model, batch = build_from_scratch(SIZES, VOCAB, 8, global_token=True), make_batch(2, num_views=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            loss, predicted, _ = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5 and (predicted == batch.action_tokens).float().mean() > 0.95


def test_loss_is_the_mean_cross_entropy_over_the_action_tokens():
    model, batch = make_model(), make_batch()
    loss, predicted, _ = model(batch)
    logits = model.action_logits(batch)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.action_tokens.flatten())
    torch.testing.assert_close(loss, expected)
    assert predicted.equal(logits.argmax(-1))


def test_soft_targets_are_a_normalised_gaussian_over_neighbouring_bins():
    logits = torch.randn(1, 2, VOCAB, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[FIRST_ACTION_ID + 1, FIRST_ACTION_ID + 100]])
    weights = torch.exp(-0.5 * ((torch.arange(256) - torch.tensor([[1], [100]])) / 2.0) ** 2)
    targets = torch.zeros(2, VOCAB)
    targets[:, FIRST_ACTION_ID:] = weights / weights.sum(-1, keepdim=True)
    expected = torch.nn.functional.cross_entropy(logits[0], targets)
    torch.testing.assert_close(action_loss(logits, tokens, FIRST_ACTION_ID, soft_target_sigma_bins=2.0), expected)


def test_an_end_token_keeps_its_one_hot_target_among_soft_ones():
    logits = torch.randn(1, 1, VOCAB, generator=torch.Generator().manual_seed(0))
    end = torch.tensor([[2]])
    soft = action_loss(logits, end, FIRST_ACTION_ID, soft_target_sigma_bins=2.0)
    torch.testing.assert_close(soft, action_loss(logits, end, FIRST_ACTION_ID))


# -------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def test_generated_tokens_are_the_argmax_of_the_training_logits():
    model, batch = make_model(), make_batch()
    tokens = model.generate(batch, 8)
    logits = model.action_logits(replace(batch, action_tokens=tokens))[..., FIRST_ACTION_ID:]
    assert tokens.equal(logits.argmax(-1) + FIRST_ACTION_ID)
    assert tokens.unique().numel() > 8, "nearly constant tokens would prove nothing"


def test_a_batch_generates_what_its_samples_generate_alone():
    model, batch = make_model(), make_batch(5)
    alone = torch.cat([model.generate(take(batch, slice(i, i + 1)), 8) for i in range(5)])
    assert model.generate(batch, 8).tolist() == alone.tolist()


def test_sampling_follows_the_generator_and_turns_greedy_as_it_cools():
    model, batch = make_model(), make_batch()
    generators = [[torch.Generator().manual_seed(seed) for _ in batch.input_ids] for seed in (0, 0, 1, 0)]
    draws = [model.generate(batch, 8, 1.0, each) for each in generators[:3]]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])
    assert all((draw >= FIRST_ACTION_ID).all() and (draw < VOCAB).all() for draw in draws)
    assert model.generate(batch, 8, 1e-4, generators[3]).equal(model.generate(batch, 8))
