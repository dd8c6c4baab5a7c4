"""The optimizer and its learning-rate schedule."""

import math

import torch
from torch import nn


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, vectors (norms, biases, single tokens) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, num_updates: int, warmup_ratio: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up to the learning rate, then half a cosine down to zero at the last of `num_updates`."""
    num_warmup = max(1, round(num_updates * warmup_ratio))

    def factor(update: int) -> float:
        if update < num_warmup:
            return (update + 1) / num_warmup
        progress = (update - num_warmup) / max(1, num_updates - num_warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
