"""The number format that a model computes in: bfloat16 where the device is fast in it, unless it is to be float32."""

import torch

from robofactory.model.openvla import OpenVLA


def autocast(model: OpenVLA) -> torch.autocast:
    """The context for a model's forward pass: matrix products in bfloat16, everything delicate in float32.

    Off for a model that is `in_float32` (model.torch_dtype), and on CPUs that only emulate bfloat16 (a product takes four
    times as long there as in float32), unless its own weights are bfloat16.
    """
    device = next(model.parameters()).device.type
    has_bfloat16_weights = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    is_fast = computes_bfloat16(device) and not model.in_float32
    return torch.autocast(device, torch.bfloat16, enabled=has_bfloat16_weights or is_fast)


def computes_bfloat16(device: str) -> bool:
    """Whether this kind of device ("cpu", "cuda") has instructions for bfloat16."""
    return device != "cpu" or any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
