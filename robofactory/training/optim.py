"""The optimizer and its learning-rate schedule."""

import math

import torch
from torch import Tensor, nn

from robofactory.checkpoint import placed_like, whole
from robofactory.errors import UserError


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, vectors (norms, biases, single tokens) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def schedule(update: int, num_updates: int, warmup_ratio: float) -> float:
    """What the learning rate is multiplied with: linear warm-up, then half a cosine to zero at `num_updates`."""
    num_warmup = max(1, round(num_updates * warmup_ratio))
    if update < num_warmup:
        return (update + 1) / num_warmup
    progress = (update - num_warmup) / max(1, num_updates - num_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """What the optimizer remembers of each parameter, by its name, whole even where the model is in parts."""
    state = optimizer.state
    return {
        name: {key: whole(value) for key, value in state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in state
    }


def restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, dict[str, Tensor]]) -> None:
    """The inverse of `moments_of`, also for a model that is in other parts.

    Raises:
        UserError: they are not of this model.
    """
    optimizer.state.clear()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, values in moments.items():
        if {value.shape for value in values.values() if value.ndim} - {shapes.get(name)}:
            raise UserError(f"the checkpoint's training_state.pt has an optimizer's state of {name!r}, which the model does not have in that shape; use another checkpoint")  # fmt: skip
    for name, parameter in model.named_parameters():
        if name in moments:
            optimizer.state[parameter] = {
                key: placed_like(value, parameter) if value.ndim else value.to(parameter.device)
                for key, value in moments[name].items()
            }
