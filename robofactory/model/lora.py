"""Fine-tuning published weights: which tensors are trained, LoRA through peft, and merging it back.

What is trained is float32, so that small updates are not lost; what is frozen keeps the dtype it was loaded in. Call the
model under autocast when the two differ.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

from robofactory.config import ModelConfig
from robofactory.errors import UserError
from robofactory.model.openvla import OpenVLA, build_from_config
from robofactory.model.weights import load_openvla

LANGUAGE_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = "default"  # peft's name for the one adapter there is


def build_untrained(m: ModelConfig, config: dict[str, Any], proprio_dim: int | None) -> OpenVLA:
    """The model that a recipe fine-tunes, on the meta device: every shape and dtype, no weights, in seconds.

    Args:
        config: an official `config.json`.
    """
    with torch.device("meta"):
        model = build_from_config(config, m.global_token, proprio_dim).to(getattr(torch, m.torch_dtype))
        choose_trained(model, m)
    return model


def load_untrained(
    m: ModelConfig, directory: Path, proprio_dim: int | None, device: torch.device | str = "cpu"
) -> OpenVLA:
    """The same with published weights, on a device; adapters and proprio projector are freshly initialised."""
    loaded_to = "cpu" if m.quantize else device
    model = load_openvla(directory, m.global_token, proprio_dim, getattr(torch, m.torch_dtype), loaded_to)
    if m.quantize:
        quantize_language_layers(model, device)
    choose_trained(model, m)
    return model


def quantize_language_layers(model: OpenVLA, device: torch.device | str) -> None:
    """Move the model to a device, with the matrices of its language layers in 4 bits (NF4 of QLoRA, Dettmers 2023).

    Raises:
        UserError: bitsandbytes is not installed, or cannot do it on this device.
    """
    without = "leave model.quantize out"
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(f"model.quantize=nf4 needs bitsandbytes: pip install bitsandbytes, or {without}") from None
    for name, linear in language_linears(model).items():
        bits = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, device="meta"
        )
        bits.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=bits)
        model.language_model.set_submodule(name, bits)
    try:
        model.to(device)  # the matrices are quantized on the way
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"model.quantize=nf4: bitsandbytes cannot do it on {device} ({reason}); {without}") from None
    model.language_model.is_loaded_in_4bit = True  # type: ignore  # peft looks here


def language_linears(model: OpenVLA) -> dict[str, nn.Linear]:
    """The matrices of the language layers, by their names in the language model."""
    modules = model.language_model.named_modules()
    return {name: each for name, each in modules if name.endswith(LANGUAGE_LINEARS) and isinstance(each, nn.Linear)}


def choose_trained(model: OpenVLA, m: ModelConfig) -> None:
    """Prepare freshly loaded weights for what the recipe trains of them."""
    if m.use_lora:
        train_adapters(model, m.lora_rank, m.lora_alpha, m.lora_dropout, m.lora_vision)
    _keep_trained_in_float32(model)  # without adapters: full fine-tuning, of all that is used


def train_adapters(model: OpenVLA, rank: int, alpha: int, dropout: float = 0.0, vision: bool = False) -> None:
    """Freeze the model, then add what is trained: adapters at all linear layers of the language layers.

    A proprio projector, which is new, is trained too. A fresh adapter changes nothing: its B is zero.

    Args:
        alpha: the adapter's product is scaled by alpha / rank.
        vision: adapters also at the linear layers of every vision block whose output is used. Source: with a frozen
            vision encoder OpenVLA reached 47 % instead of 68-70 % (Kim et al. 2024, table 1).
    """
    towers = model.vision_backbone
    used = [
        name
        for name, module in towers.named_modules()
        if ".blocks." in name and isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    model.requires_grad_(False)
    for module, targets in ((model.language_model, list(LANGUAGE_LINEARS)), (towers, used if vision else [])):
        if targets:
            config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
            config._register_custom_module({nn.Linear: fast_layer})  # type: ignore[dict-item]  # any callable will do
            inject_adapter_in_model(config, module, ADAPTER)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Autocast does it in bf16; peft would copy every input to float32 first: 13 GiB at batch 16 x 3 views.
            module.cast_input_dtype_enabled = False
    if model.proprio_projector is not None:
        model.proprio_projector.requires_grad_(True)


def _keep_trained_in_float32(model: OpenVLA) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_name(name: str) -> str | None:
    """peft's name, in `adapter_model.safetensors`, of one of our tensors; None if it is no adapter of a language layer.

    Adapters of the vision towers are none: the file is one of the language model alone, as plain peft reads it.
    """
    prefix, suffix = "language_model.", f".{ADAPTER}.weight"
    if not (name.startswith(prefix) and ".lora_" in name):
        return None
    return f"base_model.model.{name.removeprefix(prefix).removesuffix(suffix)}.weight"


def save_adapter_config(model: OpenVLA, model_name: str, directory: Path) -> None:
    """Write `adapter_config.json`, with which plain peft puts `adapter_model.safetensors` on the language model."""
    config = model.language_model.peft_config[ADAPTER]
    config.base_model_name_or_path = model_name
    config.save_pretrained(directory)


@torch.no_grad()
def merge_adapters(model: OpenVLA) -> None:
    """Add every adapter's product to the weight it belongs to, in place, and take the adapters out.

    Computed in float32 and rounded once, to the dtype of the base.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            base, a, b = layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            assert type(base) is nn.Linear, f"{name} is a {type(base).__name__}; it cannot be merged"
            assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
            merged = base.weight.float() + layer.scaling[ADAPTER] * (b.weight.float() @ a.weight.float())
            base.weight = nn.Parameter(merged.to(base.weight.dtype), requires_grad=False)
            model.set_submodule(name, base)
    for module in (model.language_model, model.vision_backbone):
        if hasattr(module, "peft_config"):
            del module.peft_config


# ---------------------------------------------------------------------------------------------- one layer's product


class FastLoraLinear(LoraLinear):
    """peft's layer, without dropout, in fewer passes over memory."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.get_base_layer(), self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        tensors = (x, base.weight, base.bias, a.weight, b.weight)
        return LoraProduct.apply(*(t if t is None else t.to(dtype) for t in tensors), self.scaling[ADAPTER])


def fast_layer(target: nn.Module, adapter_name: str, **kwargs: Any) -> FastLoraLinear | None:
    """For peft: the layer that replaces this one; None leaves it to peft, as for 4-bit weights."""
    is_plain = type(target) is nn.Linear and kwargs["config"].lora_dropout == 0.0
    return FastLoraLinear(target, adapter_name, **kwargs) if is_plain else None


class LoraProduct(torch.autograd.Function):
    """x W' + bias + scaling * (x A') B' of a frozen W and bias; each second product is added where the first one lies."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling) -> torch.Tensor:
        rows = x.flatten(0, -2)  # [n, in]
        down = rows @ a.T  # [n, rank]
        product = F.linear(rows, weight, bias).addmm_(down, b.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, a, b, down)
        ctx.scaling, ctx.shape = scaling, x.shape
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        rows, weight, a, b, down = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)  # [n, out]
        grad_down = (grad @ b) * ctx.scaling
        grad_x = (grad @ weight).addmm_(grad_down, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_down.T @ rows, grad.T @ (down * ctx.scaling), None


# ------------------------------------------------------------------------------------- several policies, one base


def twin(model: OpenVLA) -> OpenVLA:
    """Another model on the same base: what is frozen is one memory for both, what is trained is a copy."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()] if not t.requires_grad})


class PerPart(nn.Module):
    """Equal parts of a batch, each through a module of its own."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(len(self.parts))
        return torch.cat([part(chunk) for part, chunk in zip(self.parts, chunks, strict=True)])


class MixedLinear(nn.Module):
    """One base layer for the whole batch, and for each of its equal parts the adapter of another model."""

    def __init__(self, layers: Sequence[LoraLayer]):
        super().__init__()
        self.base = layers[0].get_base_layer()
        self.down = PerPart([layer.lora_A[ADAPTER] for layer in layers])
        self.up = PerPart([layer.lora_B[ADAPTER] for layer in layers])
        (self.scaling,) = {layer.scaling[ADAPTER] for layer in layers}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x)) * self.scaling


def mix(models: Sequence[OpenVLA]) -> OpenVLA:
    """Twins as one model, for generation: of a batch in as many equal parts, each part is answered as by its twin.

    The base runs once, over the whole batch; adapters and proprio projectors switch inside it. No weight is copied.
    """
    mixed = copy.deepcopy(models[0], {id(t): t for t in [*models[0].parameters(), *models[0].buffers()]})
    for name, module in models[0].named_modules():
        if isinstance(module, LoraLayer):
            layers = [model.get_submodule(name) for model in models]
            mixed.set_submodule(name, MixedLinear(layers))  # type: ignore[arg-type]
    if mixed.proprio_projector is not None:
        mixed.proprio_projector = PerPart([m.proprio_projector for m in models])  # type: ignore[assignment, misc]
    return mixed


# ------------------------------------------------------------------------------------------------------------ counts


def count_parameters(model: OpenVLA) -> dict[str, tuple[int, int]]:
    """Part -> (all of its parameters, those that are trained); a part's adapters are a part of their own.

    Two parameters in a byte are two.
    """
    titles = {
        "vision_backbone.featurizer": "DINOv2",
        "vision_backbone.fused_featurizer": "SigLIP",
        "projector": "projector",
        "language_model": "language model",
        "proprio_projector": "proprio projector",
    }
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        (title,) = (titles[prefix] for prefix in titles if name.startswith(f"{prefix}."))
        title = f"LoRA, {title}" if ".lora_" in name else title
        total, trained = counts.get(title, (0, 0))
        quantized = getattr(parameter, "quant_state", None)
        number = parameter.numel() if quantized is None else math.prod(quantized.shape)
        counts[title] = total + number, trained + number * parameter.requires_grad
    return counts


def parameter_table(model: OpenVLA) -> str:
    """For people: parameters by part, the sums, and how much of it is trained."""
    counts = count_parameters(model)
    base = sum(total for title, (total, _) in counts.items() if not title.startswith(("LoRA", "proprio")))
    total, trained = (sum(column) for column in zip(*counts.values(), strict=True))
    rows = [(title, f"{total:,}", f"{trained:,}") for title, (total, trained) in counts.items()]
    rows += [("base", f"{base:,}", ""), ("total", f"{total:,}", f"{trained:,} ({trained / total:.2%})")]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{title:<{widths[0]}}  {number:>{widths[1]}}  trained {what}" for title, number, what in rows]
    return "\n".join(line.removesuffix("  trained ") for line in lines)
