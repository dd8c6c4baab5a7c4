"""The number format that a model computes in: bfloat16 where the device is fast in it."""

import torch
from torch import nn


def autocast(model: nn.Module) -> torch.autocast:
    """The context for a model's forward pass: matrix products in bfloat16, everything delicate in float32.

    Off on CPUs that only emulate bfloat16 (a product takes four times as long there as in float32), unless the model's
    own weights are bfloat16.
    """
    device = next(model.parameters()).device.type
    has_bfloat16_weights = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return torch.autocast(device, torch.bfloat16, enabled=has_bfloat16_weights or computes_bfloat16(device))


def computes_bfloat16(device: str) -> bool:
    """Whether this kind of device ("cpu", "cuda") has instructions for bfloat16."""
    return device != "cpu" or any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
