"""Peak memory of a training step, without the memory: the real step on fake tensors, every allocation counted.

A fake tensor has a shape, a dtype and a storage of some size, but no data. The step is the trainer's: the same model,
adapters, loss, gradients, clipping and optimizer. It runs as on a CPU, where PyTorch's fused attention keeps the same
tensors for the backward pass as on a GPU. What is counted are the bytes asked for, as torch.cuda.max_memory_allocated
counts them. The CUDA context, cuBLAS's workspace and what the allocator cannot reuse come on top; so does a copy in
float32 that a GPU's autocast makes in the layer norms of vision towers, where these are trained. Of the 7B at batch 16 x
3 views 22.2 GB are predicted, and 22.3 GB were measured on an H200.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robofactory.codec.prompt import Prompt
from robofactory.config import RecipeConfig
from robofactory.errors import UserError
from robofactory.model.lora import choose_trained, language_linears
from robofactory.model.openvla import OpenVLA, build_from_config, build_from_scratch
from robofactory.model.weights import published_config
from robofactory.shapes import Batch
from robofactory.training.optim import make_optimizer

BLOCK_BYTES = 512  # CUDA's allocator rounds up to it
TEXT_TOKENS = 21  # of a prompt on Llama's tokenizer: BOS, "In: What action ... lift the barrier?\nOut:", the lone space
STATE_DIM = 8  # numbers of an action and of a proprio vector, unless said otherwise: seven joints and the gripper
PARTS = ("weights", "adapters", "optimizer", "gradients", "activations", "logits", "batch")


# ------------------------------------------------------------------------------------------------------ allocations


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that live, by label, and keeps the moment when they were most.

    A storage is labelled as `labelled` says when it is made. Works on fake and on real tensors alike.

    num_logits: what is made among the activations and is this long in its last dimension, is labelled "logits".
    """

    def __init__(self, num_logits: int | None = None):
        super().__init__()
        self.num_logits = num_logits
        self.label, self.phase = "activations", "forward"
        self.live: dict[int, tuple[str, int]] = {}
        self.total: Counter[str] = Counter()
        self.current = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.most: Counter[str] = Counter()  # of each label, at its own time
        self.peak_operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True  # the one value that a step looks at: there is no padding
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                is_logits = self.label == "activations" and tensor.shape[-1:] == (self.num_logits,)
                self.add(tensor, "logits" if is_logits else self.label)
                if self.current > self.peak:
                    self.peak, self.at_peak = self.current, self.total.copy()
                    shape = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                    self.peak_operation = f"{func} -> {shape}, {self.phase}"
        return result

    def add(self, tensor: Tensor, label: str) -> None:
        """Count a tensor's storage unless it is counted already: the tensor is a view, or was changed in place."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
            self.live[key] = label, size
            self._count(label, size)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        label, size = self.live.pop(key)
        self._count(label, -size)

    def _count(self, label: str, size: int) -> None:
        self.total[label] += size
        self.current += size
        self.most[label] = max(self.most[label], self.total[label])

    def relabel(self, tensor: Tensor, label: str) -> None:
        key = tensor.untyped_storage()._cdata
        before, size = self.live[key]
        self.live[key] = label, size
        self._count(before, -size)
        self._count(label, size)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        before, self.label = self.label, label
        yield
        self.label = before


# ------------------------------------------------------------------------------------------------------- prediction


@dataclass(frozen=True)
class Footprint:
    """What a training step holds in bytes: each part at the common peak, and at its own."""

    at_peak: dict[str, int]
    most: dict[str, int]
    operation: str  # that reached the peak
    batch_size: int
    num_tokens: int  # of one sample's sequence
    num_layers: int
    num_recomputed: int

    @property
    def peak_gb(self) -> float:
        return sum(self.at_peak.values()) / 1e9


def is_predictable(recipe: RecipeConfig) -> bool:
    """Whether every process has all weights."""
    return recipe.training.parallel == "ddp"


def predict(
    recipe: RecipeConfig, text_tokens: int = TEXT_TOKENS, action_dim: int = STATE_DIM, proprio_dim: int = STATE_DIM
) -> Footprint:
    """A training step by this recipe on a GPU, once the optimizer has its state.

    Args:
        text_tokens: of the prompt, BOS included.
    Raises:
        UserError: the recipe's model is not known here, or it is in parts.
    """
    if not is_predictable(recipe):
        raise UserError(f"training.parallel={recipe.training.parallel}: memory is predicted for whole weights only; leave it out")  # fmt: skip
    model = build_on_meta(recipe, proprio_dim)
    layers, recomputed = len(model.language_model.model.layers), recipe.training.num_recomputed_layers
    with FakeTensorMode():
        allocations, batch = count_step(model, recipe, text_tokens, action_dim, proprio_dim)
    assert batch.action_tokens is not None and allocations.total.keys() <= set(PARTS), allocations.total
    num_visual = len(recipe.data.views) * model.vision_backbone.tokens_per_view
    return Footprint(
        at_peak={part: allocations.at_peak[part] for part in PARTS},
        most={part: allocations.most[part] for part in PARTS},
        operation=allocations.peak_operation,
        batch_size=len(batch.input_ids),
        num_tokens=num_visual + int(recipe.model.use_proprio) + text_tokens + batch.action_tokens.shape[1] - 1,
        num_layers=layers,
        num_recomputed=layers if recomputed is None else min(recomputed, layers),
    )


def build_on_meta(recipe: RecipeConfig, proprio_dim: int = STATE_DIM) -> OpenVLA:
    """The recipe's model, with what it trains, without data."""
    m, num_proprio = recipe.model, proprio_dim if recipe.model.use_proprio else None
    with torch.device("meta"):
        if m.architecture is not None:
            return build_from_scratch(m.architecture, Prompt.tiny().vocab_size, num_proprio, m.global_token)
        model = build_from_config(published_config(m.model_name), m.global_token, num_proprio)
        model.to(getattr(torch, m.torch_dtype))
        if m.quantize is not None:
            for name, linear in language_linears(model).items():
                model.language_model.set_submodule(name, LinearIn4Bits(linear))
        choose_trained(model, m)
    return model


class LinearIn4Bits(nn.Linear):
    """What bitsandbytes' NF4 layer takes, and computes nothing: half a byte a weight and one more for each 64 of them,
    and for the time of a product, there and back, the whole matrix."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        num_weights = linear.weight.numel()
        self.weight = nn.Parameter(torch.empty(num_weights // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(num_weights // 64, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return ProductWithoutData.apply(x, self.out_features)


class ProductWithoutData(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out_features) -> Tensor:
        ctx.shape = out_features, x.shape[-1]
        return nn.functional.linear(x, x.new_zeros(ctx.shape))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grads[0] @ grads[0].new_zeros(ctx.shape), None


def count_step(
    model: OpenVLA,
    recipe: RecipeConfig,
    text_tokens: int,
    action_dim: int = STATE_DIM,
    proprio_dim: int = STATE_DIM,
) -> tuple[Allocations, Batch]:
    """What a step allocates, and its batch. Outside of FakeTensorMode all of it is real: how the tests check this file."""
    model.num_recomputed_layers = recipe.training.num_recomputed_layers
    model.fused_attention = model.vision_backbone.fused_attention = True  # as on a GPU
    allocations = Allocations(num_logits=model.language_model.config.vocab_size)
    with allocations:
        fill(model, allocations)
        with allocations.labelled("batch"):
            batch = empty_batch(model, recipe, text_tokens, action_dim, proprio_dim)
        take_step(model, batch, recipe, allocations)
    return allocations, batch


def fill(model: nn.Module, allocations: Allocations) -> None:
    """Replace the parameters and buffers of a model on the meta device by tensors of memory, or of fake memory."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            with allocations.labelled("adapters" if parameter.requires_grad else "weights"):
                tensor = torch.zeros(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(tensor, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            with allocations.labelled("weights"):
                module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def empty_batch(model: OpenVLA, recipe: RecipeConfig, text_tokens: int, action_dim: int, proprio_dim: int) -> Batch:
    size = recipe.dataloader.batch_size
    has_end_token = recipe.model.architecture is None
    return Batch(
        pixel_values=torch.zeros(
            size, len(recipe.data.views), 6, *model.vision_backbone.featurizer.patch_embed.img_size
        ),
        input_ids=torch.zeros(size, text_tokens, dtype=torch.int64),
        text_mask=torch.ones(size, text_tokens, dtype=torch.bool),
        proprio=torch.zeros(size, proprio_dim) if recipe.model.use_proprio else None,
        action_tokens=torch.full((size, action_dim + has_end_token), model.first_action_id),
    )


def take_step(model: OpenVLA, batch: Batch, recipe: RecipeConfig, allocations: Allocations) -> None:
    """The last micro-batch of a step, as training.train does it, after an empty step that gives the optimizer its state."""
    t, trained = recipe.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    with allocations.labelled("optimizer"):
        optimizer = make_optimizer(model, t.weight_decay)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    allocations.peak, allocations.most = 0, allocations.total.copy()  # without the empty step's gradients
    for parameter in trained:
        if t.gradient_accumulate_every > 1:  # those of the micro-batches before
            with allocations.labelled("gradients"):
                parameter.grad = torch.zeros_like(parameter)
        parameter.register_post_accumulate_grad_hook(lambda p: allocations.relabel(p.grad, "gradients"))
    with torch.autocast("cpu", torch.bfloat16):  # as on a GPU, whatever this CPU is fast in
        loss, *_ = model(batch, t.soft_target_sigma_bins)
    allocations.phase = "backward"
    loss.backward()
    allocations.phase = "optimizer"
    nn.utils.clip_grad_norm_(trained, t.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
