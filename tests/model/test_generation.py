"""Drafts make generation faster and never another: property tests over random models, batches, paddings and drafts."""

import contextlib
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robofactory.config import ArchitectureConfig, LanguageConfig, TowerConfig
from robofactory.model.openvla import LayerCache, OpenVLA, build_from_scratch
from robofactory.shapes import Batch

BOS, PAD, VOCAB, NUM_TOKENS = 1, 2, 320, 8
FIRST_ACTION_ID = VOCAB - 256


@dataclass
class Case:
    model: OpenVLA
    batch: Batch
    autocast: bool
    temperature: float

    def generate(self, draft: Tensor | None = None) -> Tensor:
        generators = [torch.Generator().manual_seed(row) for row in range(len(self.batch.input_ids))]
        with self.precision():
            return self.model.generate(self.batch, NUM_TOKENS, self.temperature, generators, draft)

    def precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()


def random_case(seed: int, temperature: float = 0.0, precision: str | None = None) -> Case:
    """A model of random sizes and weights, and a batch that may be padded on either side."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    heads = pick.choice([1, 2, 4])
    language = LanguageConfig(heads * pick.choice([16, 24]), pick.choice([40, 96]), pick.choice([1, 2, 3]), heads)
    towers = [TowerConfig(32, pick.choice([2, 3]), 2) for _ in range(2)]
    sizes = ArchitectureConfig(28, *towers, language)
    proprio_dim = pick.choice([None, 8])
    model = build_from_scratch(sizes, VOCAB, proprio_dim, pick.choice([True, False])).eval()
    with torch.no_grad():  # so that a token depends on those before it
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    precision = precision or pick.choice(["float32", "autocast", "bfloat16"])
    size, width, views = pick.choice([1, 2, 3, 5]), pick.choice([4, 7, 12]), pick.choice([1, 2, 3])
    lengths = torch.tensor([pick.randint(2, width) for _ in range(size)])[:, None]
    columns = torch.arange(width)[None]
    mask = {"none": columns >= 0, "right": columns < lengths, "left": columns >= width - lengths}[
        pick.choice(["none", "right", "left"])
    ].expand(size, width)
    ids = torch.randint(3, FIRST_ACTION_ID, (size, width)).where(mask, PAD)
    ids[torch.arange(size), mask.long().argmax(dim=1)] = BOS
    pixels, proprio = torch.randn(size, views, 6, 28, 28), None if proprio_dim is None else torch.randn(size, 8)
    if precision == "bfloat16":
        model, pixels = model.bfloat16(), pixels.bfloat16()
    return Case(model, Batch(pixels, ids, mask, proprio), precision == "autocast", temperature)


def drafts_for(tokens: Tensor, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anything = torch.randint(FIRST_ACTION_ID, VOCAB, tokens.shape, generator=generator)
    drafts = {"none": None, "perfect": tokens, "random": anything, "one bin off": (tokens + 1).clamp_max(VOCAB - 1)}
    for position in range(0, NUM_TOKENS, 3):
        drafts[f"right up to {position}"] = torch.cat([tokens[:, :position], anything[:, position:]], dim=1)
        drafts[f"wrong at {position}"] = tokens.index_copy(1, torch.tensor([position]), anything[:, [position]])
    drafts["each row another"] = torch.where(torch.rand(tokens.shape, generator=generator) < 0.5, tokens, anything)
    return drafts  # type: ignore[return-value]


@torch.no_grad()
def one_token_at_a_time(case: Case) -> Tensor:
    """Greedy decoding without any draft: a token is read when all before it are known, after them stands noise."""
    model, language = case.model, case.model.language_model.model
    rows = model.language_model.lm_head.weight[FIRST_ACTION_ID:VOCAB]
    with case.precision():
        prompt, visible = model.embed_inputs(case.batch)
        if visible is not None:
            visible = F.pad(visible, (0, NUM_TOKENS - 1), value=True)
        caches = [LayerCache(prompt.shape[1] - 1 + NUM_TOKENS) for _ in language.layers]
        tokens = torch.randint(FIRST_ACTION_ID, VOCAB, (len(prompt), NUM_TOKENS))
        model.run_layers(torch.cat([prompt, language.embed_tokens(tokens[:, 1:])], dim=1), visible, NUM_TOKENS, caches)
        for position in range(NUM_TOKENS):
            for cache in caches:
                cache.length = prompt.shape[1] - 1
            inputs = torch.cat([prompt[:, -1:], language.embed_tokens(tokens[:, :-1])], dim=1)
            hidden = model.run_layers(inputs, visible, NUM_TOKENS, caches)
            tokens[:, position] = FIRST_ACTION_ID + F.linear(hidden, rows)[:, position].argmax(dim=-1)
    return tokens


@torch.no_grad()
def textbook(case: Case) -> Tensor:
    """Greedy decoding with no cache and no rows that nobody reads: the whole sequence anew for each token."""
    model = case.model
    hidden, visible = model.embed_inputs(case.batch)
    tokens = []
    for _ in range(NUM_TOKENS):
        logits = model.language_model.lm_head(model.run_layers(hidden, visible, 1))[:, 0, FIRST_ACTION_ID:VOCAB]
        tokens.append(FIRST_ACTION_ID + logits.argmax(dim=-1, keepdim=True))
        hidden = torch.cat([hidden, model.language_model.model.embed_tokens(tokens[-1])], dim=1)
        visible = None if visible is None else F.pad(visible, (0, 1), value=True)
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("seed", range(18))
def test_a_draft_never_changes_a_token(seed):
    """In float32, under bf16 autocast and with bf16 weights alike: equal, not nearly equal."""
    case = random_case(seed, precision=["float32", "autocast", "bfloat16"][seed % 3])
    expected = one_token_at_a_time(case)
    for name, draft in drafts_for(expected, seed).items():
        assert case.generate(draft).tolist() == expected.tolist(), f"draft: {name}"


@pytest.mark.parametrize("seed", range(100, 106))
def test_a_draft_never_changes_a_sampled_token(seed):
    case = random_case(seed, temperature=1.0)
    expected = case.generate()
    for name, draft in drafts_for(expected, seed).items():
        assert case.generate(draft).tolist() == expected.tolist(), f"draft: {name}"


@pytest.mark.parametrize("seed", range(200, 208))
def test_tokens_are_those_of_textbook_greedy_decoding(seed):
    """In float32, where two likeliest tokens are never as close as rounding."""
    case = random_case(seed, precision="float32")
    assert case.generate().tolist() == textbook(case).tolist()


@pytest.mark.parametrize("seed", range(300, 306))
def test_a_batch_generates_what_its_rows_generate_alone(seed):
    case = random_case(seed, precision="float32")
    for row, expected in enumerate(case.generate().tolist()):
        pixels, ids, mask, proprio = (case.batch.pixel_values, case.batch.input_ids, case.batch.text_mask, case.batch.proprio)  # fmt: skip
        keep = mask[row]
        alone = Batch(pixels[[row]], ids[[row]][:, keep], mask[[row]][:, keep], None if proprio is None else proprio[[row]])  # fmt: skip
        assert case.model.generate(alone, NUM_TOKENS).tolist() == [expected]


@pytest.mark.parametrize("seed", range(400, 404))
def test_a_better_draft_takes_fewer_passes(seed):
    case = random_case(seed)
    tokens = case.generate()

    def passes(draft: Tensor | None) -> int:
        before = case.model.num_passes
        case.generate(draft)
        return case.model.num_passes - before

    anything = drafts_for(tokens, seed)["random"]
    assert passes(tokens) <= 3, "the prompt's pass and one, or two where the prompt's rounds differently"
    counts = [passes(torch.cat([tokens[:, :n], anything[:, n:]], dim=1)) for n in (0, 4, 8)]
    assert counts[0] >= counts[1] >= counts[2] and counts[0] <= 1 + NUM_TOKENS, counts


@torch.no_grad()
def test_draws_follow_the_softmax_of_the_logits():
    case, temperature, num_draws = random_case(7, precision="float32"), 0.5, 2000
    proprio = None if case.batch.proprio is None else case.batch.proprio[:1]
    ids = torch.tensor([[BOS, 5, 6]])
    row = Batch(case.batch.pixel_values[:1], ids, torch.ones_like(ids, dtype=torch.bool), proprio)
    hidden, visible = case.model.embed_inputs(row)
    logits = case.model.language_model.lm_head(case.model.run_layers(hidden, visible, 1))[0, 0, FIRST_ACTION_ID:VOCAB]
    expected = (logits / temperature).softmax(dim=-1)

    many = [None if each is None else each.expand(num_draws, *each.shape[1:]) for each in vars(row).values()]
    draws = case.model.generate(Batch(*many), 1, temperature, [torch.Generator().manual_seed(0)] * num_draws)[:, 0]  # type: ignore
    seen = torch.bincount(draws - FIRST_ACTION_ID, minlength=256) / num_draws
    chance = (2 / torch.pi * expected * (1 - expected) / num_draws).sqrt().sum()  # mean distance by chance
    assert (seen - expected).abs().sum() < 1.3 * chance
    assert (seen - 1 / 256).abs().sum() > 3 * chance, "a flat distribution would prove nothing"
