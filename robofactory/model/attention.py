"""Causal attention with rotary positions, as the language layers use it."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.llama.configuration_llama import LlamaConfig

QUERIES_AT_ONCE = 160  # on a CPU: few enough to skip most of the future, enough for a fast matrix product


def rotary_embedding(positions: Int64[Tensor, "b n"], config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [b, 1, n, head_dim] in float32; the sine's first half is negated, as `rotate` wants it."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    theta: float = config.rope_parameters["rope_theta"]  # type: ignore[index, typeddict-item]
    angles = positions[:, None, :, None] * theta**-exponents  # [b, 1, n, head_dim / 2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Float[Tensor, "b h n d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b h n d"]:
    """Rotary position embedding (Su et al. 2021)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def attend(
    query: Float[Tensor, "b h n d"],
    keys: Float[Tensor, "b h m d"],
    values: Float[Tensor, "b h m d"],
    visible: Bool[Tensor, "b m"] | None,
    fused: bool,
) -> Float[Tensor, "b h n d"]:
    """Causal attention; the queries are the last n of the keys' m positions.

    Args:
        visible: False on padding; None when there is none.
        fused: PyTorch's fused kernel; else `CausalAttention`, several times faster in bf16 on a CPU.
    """
    if not fused:
        return CausalAttention.apply(query, keys, values, visible)
    num_queries, num_keys = query.shape[2], keys.shape[2]
    if visible is None and num_queries == num_keys:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    mask = None
    if num_queries > 1:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    if visible is not None:
        mask = visible[:, None, None] if mask is None else mask & visible[:, None, None]  # [b, 1, n, m]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


@torch.no_grad()
def causal_weights(
    query: Float[Tensor, "b h n d"], keys: Float[Tensor, "b h m d"], visible: Bool[Tensor, "b m"] | None
) -> Float[Tensor, "b h n m"]:
    """How much each query looks at each key; see `attend`. No gradient goes through them."""
    num_queries = query.shape[2]
    scores = (query * query.shape[-1] ** -0.5) @ keys.mT
    if num_queries > 1:  # a key of the future is one above the diagonal of the last n columns
        scores[..., -num_queries:] += scores.new_full((num_queries, num_queries), float("-inf")).triu(1)
    if visible is not None:
        scores += torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, float("-inf"))[:, None, None]
    return scores.softmax(dim=-1)


class CausalAttention(torch.autograd.Function):
    """`attend` by plain matrix products: a few queries at a time, each time over the keys that they may see.

    At 800 tokens 40 % of the products are with keys of the future, and are never made. The backward pass is written out:
    autograd would fill and add up a whole gradient of the keys for every part.
    """

    @staticmethod
    def forward(ctx, query, keys, values, visible) -> Tensor:
        attended = torch.empty_like(query, dtype=values.dtype, memory_format=torch.contiguous_format)
        columns, parts = keys.mT.contiguous().mT, []  # laid out as the product wants them, once and not for every part
        for start, end, seen in _spans(query, keys):
            visible_here = None if visible is None else visible[:, :seen]
            weights = causal_weights(query[:, :, start:end], columns[:, :, :seen], visible_here).to(values.dtype)
            attended[:, :, start:end] = weights @ values[:, :, :seen]
            parts.append(weights)
        ctx.save_for_backward(query, keys, values, *parts)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        shapes, spans = [tensor.shape for tensor in saved[:3]], _spans(*saved[:2])
        grad, query, keys, values, *parts = (x.flatten(0, 1) for x in (*grads, *saved))  # [b*h, .., ..]
        grad_query, grad_keys, grad_values = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        scale = query.shape[-1] ** -0.5
        for (start, end, seen), weights in zip(spans, parts, strict=True):
            grad_values[:, :seen].baddbmm_(weights.mT, grad[:, start:end])
            grad_weights = grad[:, start:end] @ values[:, :seen].mT
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # type: ignore[attr-defined]
            grad_query[:, start:end] = grad_scores @ keys[:, :seen]
            grad_keys[:, :seen].baddbmm_(grad_scores.mT, query[:, start:end], alpha=scale)
        grad_query *= scale
        return *(x.view(shape) for x, shape in zip((grad_query, grad_keys, grad_values), shapes, strict=True)), None


def _spans(query: Tensor, keys: Tensor) -> list[tuple[int, int, int]]:
    """(first query, the one after the last, number of keys these may see)."""
    num_queries, num_before = query.shape[2], keys.shape[2] - query.shape[2]
    starts = range(0, num_queries, QUERIES_AT_ONCE)
    ends = [min(start + QUERIES_AT_ONCE, num_queries) for start in starts]
    return [(start, end, num_before + end) for start, end in zip(starts, ends, strict=True)]
