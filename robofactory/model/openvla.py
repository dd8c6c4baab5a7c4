"""OpenVLA from pixels to action tokens, top to bottom: projector, language layers, sequence, loss, generation.

The sequence is [BOS][visual tokens of every view][proprio?][text][action tokens]. Action tokens are the last columns of
every row, so only these columns get logits, and the last language layer computes only them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from robofactory import documents
from robofactory.config import ArchitectureConfig
from robofactory.errors import UserError
from robofactory.model.attention import attend, causal_weights, rotary_embedding, rotate
from robofactory.model.vision import FusedVision, build_tower, build_towers_from_scratch
from robofactory.published import MOST_LAYERS, MOST_WIDE, PublishedConfig
from robofactory.shapes import Batch

NUM_BINS = 256
NUM_OCTAVES = 8  # of the proprio features: 2**7 half-waves over [-1, 1] tell 256 bins apart

# ------------------------------------------------------------------------------------------------------- projectors


class Projector(nn.Module):
    """Visual features -> language embeddings, by three layers."""

    def __init__(self, vision_width: int, language_width: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, language_width)
        self.fc3 = nn.Linear(language_width, language_width)

    def forward(self, features: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


class ProprioProjector(nn.Module):
    """The normalised joint positions -> one token.

    Each position goes in beside its sine and cosine at doubling frequencies (Fourier features, Tancik et al. 2020), the
    finest with a period of two bins. An action is the present position plus a few bins, and an MLP over the bare numbers
    learns to tell neighbouring bins apart only slowly.
    """

    def __init__(self, proprio_dim: int, language_width: int):
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim * (1 + 2 * NUM_OCTAVES), language_width)
        self.fc2 = nn.Linear(language_width, language_width)

    def forward(self, proprio: Float[Tensor, "b s"]) -> Float[Tensor, "b 1 d"]:
        octaves = torch.arange(NUM_OCTAVES, device=proprio.device)
        angles = torch.pi * proprio.float()[..., None] * 2.0**octaves  # [b, s, octaves]
        features = torch.cat([proprio[..., None], angles.sin(), angles.cos()], dim=-1).flatten(1)
        return self.fc2(F.gelu(self.fc1(features.to(self.fc1.weight.dtype))))[:, None]


# --------------------------------------------------------------------------------------------------- language layers


class LayerCache:
    """Keys and values of one layer, allocated once for the whole sequence; setting `length` back forgets the end."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Everything up to now, the new keys and values (both [b, heads, n, head_dim]) included."""
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        end = self.length + keys.shape[2]
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class LanguageLayer(LlamaDecoderLayer):
    """A Llama layer (its weights and names) that can leave out positions whose output nobody reads."""

    def forward(  # type: ignore[override]
        self,
        hidden: Float[Tensor, "b n d"],
        rotary: tuple[Tensor, Tensor],
        visible: Bool[Tensor, "b _n_keys"] | None,
        fused: bool,
        num_kept: int,
        cache: LayerCache | None = None,
        attention_weights: list[Tensor] | None = None,
    ) -> Float[Tensor, "b k d"]:
        """The layer's output at the last `num_kept` positions; `attention_weights` gets those of `causal_weights`."""
        attention, (cos, sin) = self.self_attn, rotary
        normed = self.input_layernorm(hidden)
        kept, kept_normed = hidden[:, -num_kept:], normed[:, -num_kept:]
        query = attention.q_proj(kept_normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        keys = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        query = rotate(query, cos[:, :, -num_kept:], sin[:, :, -num_kept:])
        keys = rotate(keys, cos, sin)
        if cache is not None:
            keys, values = cache.append(keys, values)
        if attention.num_key_value_groups > 1:
            keys = keys.repeat_interleave(attention.num_key_value_groups, dim=1)
            values = values.repeat_interleave(attention.num_key_value_groups, dim=1)
        if attention_weights is not None:
            attention_weights.append(causal_weights(query, keys, visible))
        attended = attend(query, keys, values, visible, fused)  # [b, heads, k, head_dim]
        attended = attended.transpose(1, 2).flatten(2)  # [b, k, d]
        kept = kept + attention.o_proj(attended)
        return kept + self.mlp(self.post_attention_layernorm(kept))


def build_language_model(config: LlamaConfig) -> LlamaForCausalLM:
    """transformers' Llama under its own names, with our layers in it."""
    language_model = LlamaForCausalLM(config)
    language_model.model.layers = nn.ModuleList(LanguageLayer(config, i) for i in range(config.num_hidden_layers))
    del language_model.model.rotary_emb  # computed from the configuration, so that no buffer can be left uninitialised
    return language_model


# ------------------------------------------------------------------------------------------------------------- model


class OpenVLA(nn.Module):
    """Images, instruction (and joint positions) in; logits, a loss or action tokens out.

    Args:
        first_action_id: the 256 action ids are this one and the 255 after it; the first bin has the highest id.
        proprio_dim: size of the proprio vector; None leaves its token out.
    """

    def __init__(
        self, vision: FusedVision, language_model: LlamaForCausalLM, first_action_id: int, proprio_dim: int | None
    ):
        super().__init__()
        width = language_model.config.hidden_size
        self.vision_backbone = vision
        self.projector = Projector(vision.width, width)
        self.proprio_projector = None if proprio_dim is None else ProprioProjector(proprio_dim, width)
        self.language_model = language_model
        self.first_action_id = first_action_id
        self.base_fingerprint: str | None = None  # of the published weights it is made of, if any
        self.in_float32 = False  # computed so on every device; else see precision.py
        self.fused_attention: bool | None = None  # None: PyTorch's fused kernel on a GPU, plain matmuls on a CPU
        self.num_recomputed_layers: int | None = 0  # see TrainingConfig
        self.num_passes = 0  # through the language layers for generation, since this object exists
        self.row_passes: list[int] = []  # of the last generation: after how many each row's tokens were final

    # ----- sequence

    def embed_inputs(self, batch: Batch) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"] | None]:
        """[BOS][visual tokens][proprio?][text], and which of them are no padding (None: all are).

        Padding may stand on either side of `batch.input_ids`; it is moved between the proprio token and the text, so
        that the text ends in the same column in every row.
        """
        visual = self.projector(self.vision_backbone(batch.pixel_values))
        parts = [visual]
        if self.proprio_projector is not None:
            assert batch.proprio is not None, "this model takes proprio and the batch has none"
            parts.append(self.proprio_projector(batch.proprio))
        ids, mask = batch.input_ids, batch.text_mask
        if mask.all():
            bos, text, visible = ids[:, :1], ids[:, 1:], None
        else:
            order = mask.long().argsort(dim=1, stable=True)  # padding first, then BOS and the text
            ids, mask = ids.gather(1, order), mask.gather(1, order)
            bos = ids.gather(1, (~mask).sum(dim=1, keepdim=True))
            text, text_mask = ids[:, 1:], mask[:, :-1]  # a row without padding loses BOS, any other one pad
            visible = torch.cat([mask.new_ones(len(ids), 1 + sum(part.shape[1] for part in parts)), text_mask], dim=1)
        embed = self.language_model.model.embed_tokens
        return torch.cat([embed(bos), *parts, embed(text)], dim=1), visible

    def part_sizes(self, batch: Batch) -> list[int]:
        """How many columns of the sequence are BOS, each view's (its global token first, if any), proprio, text, actions."""
        assert batch.action_tokens is not None
        views = [self.vision_backbone.tokens_per_view] * batch.pixel_values.shape[1]
        num_text, num_given = batch.input_ids.shape[1] - 1, batch.action_tokens.shape[1] - 1
        return [1, *views, int(self.proprio_projector is not None), num_text, num_given]

    def run_layers(
        self,
        hidden: Float[Tensor, "b n d"],
        visible: Bool[Tensor, "b _n_keys"] | None,
        num_kept: int,
        caches: list[LayerCache] | None = None,
        attention_weights: list[Tensor] | None = None,
    ) -> Float[Tensor, "b k d"]:
        """Normed output of the language layers at the last `num_kept` positions.

        Args:
            visible: False on padding, over everything in the caches and `hidden`; None when there is no padding.
            attention_weights: gets those of each layer at these positions: Float32 [b, k, n], the mean over its heads.
        """
        model = self.language_model.model
        length = hidden.shape[1]
        if visible is None:
            start = caches[0].length if caches else 0
            positions = torch.arange(start, start + length, device=hidden.device)[None]
        else:
            positions = (visible.cumsum(dim=1) - 1)[:, -length:].clamp_min(0)
        cos, sin = rotary_embedding(positions, model.config)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rotary = cos.to(dtype), sin.to(dtype)
        fused = hidden.is_cuda if self.fused_attention is None else self.fused_attention
        num_recomputed = len(model.layers) if self.num_recomputed_layers is None else self.num_recomputed_layers
        for index, layer in enumerate(model.layers):
            is_last = index == len(model.layers) - 1
            kept = num_kept if is_last else length
            if caches:
                hidden = layer(hidden, rotary, visible, fused, kept, caches[index])
            elif index < num_recomputed and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, rotary, visible, fused, kept, use_reentrant=False)  # type: ignore
            else:
                hidden = layer(hidden, rotary, visible, fused, kept, None, attention_weights)
            if attention_weights is not None:  # those of all positions and heads are held of one layer at a time
                attention_weights[index] = attention_weights[index][:, :, -num_kept:].float().mean(dim=1)
        return model.norm(hidden)

    # ----- training

    def action_logits(self, batch: Batch, attention_weights: list[Tensor] | None = None) -> Float[Tensor, "b a vocab"]:
        """Logits over the whole vocabulary at the positions that predict `batch.action_tokens`.

        Args:
            attention_weights: gets those of each layer at these positions, see `run_layers`; not while training.
        """
        assert batch.action_tokens is not None, "the batch has no action tokens to predict"
        hidden, visible = self.embed_inputs(batch)
        given = batch.action_tokens[:, :-1]  # the last one is predicted, never read
        hidden = torch.cat([hidden, self.language_model.model.embed_tokens(given)], dim=1)
        if visible is not None:
            visible = torch.cat([visible, torch.ones_like(given, dtype=torch.bool)], dim=1)
        kept = self.run_layers(hidden, visible, batch.action_tokens.shape[1], attention_weights=attention_weights)
        return self.language_model.lm_head(kept)

    def forward(
        self, batch: Batch, soft_target_sigma_bins: float = 0.0
    ) -> tuple[Float[Tensor, ""], Int64[Tensor, "b a"], Float[Tensor, "b a"]]:
        """Mean cross-entropy over the action tokens; at each of them, teacher-forced, the likeliest token and the entropy.

        The entropy (nats) is that of the 256 action ids among themselves.
        """
        assert batch.action_tokens is not None, "the batch has no action tokens to learn from"
        logits = self.action_logits(batch)
        loss = action_loss(logits, batch.action_tokens, self.first_action_id, soft_target_sigma_bins)
        bins = logits.detach()[..., self.first_action_id : self.first_action_id + NUM_BINS]
        log_probabilities = bins.float().log_softmax(dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
        return loss, logits.detach().argmax(dim=-1), entropy

    # ----- generation

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        num_tokens: int,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] = (),
        draft: Int64[Tensor, "b _n"] | None = None,
    ) -> Int64[Tensor, "b _n"]:
        """Action tokens, each the likeliest after those before it; only the 256 action ids can come out.

        A draft, the better the nearer it is to the answer, saves passes and never changes a token. Every pass reads a
        whole guess and answers, at each position, with the token that follows what the guess has before it. Where the
        guess agrees with the answer from its start on, the answer is final, one token more each time at least; beyond,
        it is the next guess (Jacobi decoding, Song et al. 2021; Santilli et al. 2023). The first guess is the draft,
        which rides along with the prompt. What it is answered there is a guess too, not final: a matmul of 800 rows
        rounds differently from one of 8. All final tokens come from passes of the same shape, in which a token has the
        same row whatever the guess was: the same arithmetic bit for bit, in any precision.

        Args:
            temperature: 0 takes the likeliest token; above 0, draws from softmax(logits / temperature).
            generators: of the draws, one for each row (one may serve several), so that none depends on another row.
            draft: action tokens to begin with, e.g. those of the previous time step.
        """
        model = self.language_model.model
        prompt, visible = self.embed_inputs(batch)
        if visible is not None:
            visible = torch.cat([visible, visible.new_ones(len(visible), num_tokens - 1)], dim=1)
        num_given = prompt.shape[1] - 1  # the last prompt token answers with the first action token
        caches = [LayerCache(num_given + num_tokens) for _ in model.layers]
        action_rows = self.language_model.lm_head.weight[self.first_action_id : self.first_action_id + NUM_BINS]
        noise = torch.zeros(len(prompt), num_tokens, NUM_BINS, device=prompt.device)
        if temperature > 0.0:  # the largest of logits + Gumbel noise is a draw from their softmax
            for row, generator in zip(noise, generators, strict=True):
                row.exponential_(generator=generator)
            noise.log_().mul_(-temperature)

        def answer(hidden: Tensor) -> Int64[Tensor, "b _n"]:
            self.num_passes += 1
            logits = F.linear(self.run_layers(hidden, visible, num_tokens, caches), action_rows).float()
            return self.first_action_id + (logits + noise).argmax(dim=-1)

        guess = prompt.new_full(noise.shape[:2], self.first_action_id, dtype=torch.int64) if draft is None else draft
        tokens = answer(torch.cat([prompt, model.embed_tokens(guess[:, :-1])], dim=1))
        passes, is_open = torch.ones_like(tokens[:, 0]), torch.ones_like(tokens[:, 0], dtype=torch.bool)
        for _ in range(num_tokens):
            guess = tokens
            for cache in caches:
                cache.length = num_given
            tokens = answer(torch.cat([prompt[:, -1:], model.embed_tokens(guess[:, :-1])], dim=1))
            passes += is_open
            is_open = (tokens[:, :-1] != guess[:, :-1]).any(dim=1)  # never again once a row's guess was its answer
            if not is_open.any():
                break
        self.row_passes = passes.tolist()
        return tokens


def action_loss(
    logits: Float[Tensor, "b a vocab"],
    tokens: Int64[Tensor, "b a"],
    first_action_id: int,
    soft_target_sigma_bins: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the whole vocabulary, in float32.

    Args:
        soft_target_sigma_bins: above 0, the target of an action token is a Gaussian over the 256 action ids around it,
            normalised after it is cut off at the ends, so that a neighbouring bin is nearly right. Other tokens (the
            end token) keep their one-hot target.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    loss = -log_probabilities.gather(-1, tokens[..., None])[..., 0]  # [b, a]
    if soft_target_sigma_bins > 0.0:
        action_ids = torch.arange(first_action_id, first_action_id + NUM_BINS, device=tokens.device)
        distance_bins = (action_ids - tokens[..., None]) / soft_target_sigma_bins
        targets = (-0.5 * distance_bins**2).softmax(dim=-1)  # [b, a, 256]
        soft_loss = -(targets * log_probabilities[..., first_action_id : first_action_id + NUM_BINS]).sum(dim=-1)
        is_action = (tokens >= first_action_id) & (tokens < first_action_id + NUM_BINS)
        loss = torch.where(is_action, soft_loss, loss)
    return loss.mean()


# ------------------------------------------------------------------------------------------------------ constructors


def build_from_scratch(
    architecture: ArchitectureConfig, vocab_size: int, proprio_dim: int | None, global_token: bool
) -> OpenVLA:
    """A model of any size, initialised to be trained; the last 256 ids of its vocabulary are the action ids.

    Every parameter that requires a gradient gets one. Draws from PyTorch's global random generator.

    Raises:
        UserError: a size is no multiple of what it is divided into; the line names its key.
    """
    a = architecture
    parts = {
        "image_size": (a.image_size, 14, "patch size"),
        "dino.embed_dim": (a.dino.embed_dim, math.lcm(4, a.dino.num_heads), "4 and num_heads"),
        "siglip.embed_dim": (a.siglip.embed_dim, math.lcm(4, a.siglip.num_heads), "4 and num_heads"),
        "language.hidden_size": (a.language.hidden_size, 2 * a.language.num_attention_heads, "twice its heads"),
    }
    for key, (size, divisor, what) in parts.items():
        if size % divisor:
            raise UserError(f"model.architecture.{key}={size} must be a multiple of {divisor} ({what})")
    for part in ("dino", "siglip", "language"):
        for key, size in vars(getattr(a, part)).items():
            if size > (most := MOST_LAYERS if key in ("depth", "num_hidden_layers") else MOST_WIDE):
                raise UserError(f"model.architecture.{part}.{key}={size} must be at most {most}")
    vision = build_towers_from_scratch(architecture.image_size, architecture.dino, architecture.siglip, global_token)
    language_model = build_language_model(LlamaConfig(**vars(architecture.language), vocab_size=vocab_size))
    for module in language_model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02)
    return OpenVLA(vision, language_model, vocab_size - NUM_BINS, proprio_dim)


def build_from_config(
    config: dict[str, Any],
    global_token: bool,
    proprio_dim: int | None = None,
    timm_overrides: dict[str, dict[str, Any]] | None = None,
) -> OpenVLA:
    """The model that an official `config.json` describes, on the current default device, weights not loaded.

    Args:
        timm_overrides: keyword arguments over the timm models by their id, to make them small; None: those under this
            key in the configuration, which openvla-7b's does not have.
    Raises:
        UserError: the configuration describes another architecture, or lacks a key.
    """
    checked = documents.check(config, PublishedConfig, "config.json", "this project supports openvla-7b's architecture")
    if timm_overrides is None:
        timm_overrides = {model_id: sizes.model_dump(exclude_unset=True) for model_id, sizes in checked.timm_overrides.items()}  # fmt: skip
    dino, siglip = (
        build_tower(model_id, image_size, **timm_overrides.get(model_id, {}))
        for model_id, image_size in zip(checked.timm_model_ids, checked.image_sizes, strict=True)
    )
    language_model = build_language_model(LlamaConfig(**checked.text_config.for_llama()))
    return OpenVLA(FusedVision(dino, siglip, global_token), language_model, checked.num_ids - NUM_BINS, proprio_dim)
