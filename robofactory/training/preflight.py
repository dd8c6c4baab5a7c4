"""Seconds that save days: before the first step, prove that labels, inputs and gradients are connected."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from robofactory.codec.codec import Codec
from robofactory.errors import UserError
from robofactory.model.openvla import OpenVLA
from robofactory.model.precision import autocast
from robofactory.shapes import Batch


def preflight(
    model: OpenVLA, wrapped: nn.Module, codec: Codec, batch: Batch, actions: Float32[np.ndarray, "b a"]
) -> None:
    """Check a model and a few examples; the weights and their gradients are left as they were.

    Args:
        wrapped: the model as it is trained, which may be spread over processes. DDP orders its gradients by this first
            backward, so that a resumed run adds them up in the order of one that was never stopped.
        batch: encoded from the dataset by the codec, on the model's device.
        actions: the actions the dataset holds for these examples.
    Raises:
        UserError: the labels do not decode back to the actions, an input does not reach the logits, or a trainable
            tensor gets no gradient. The line names which.
    """
    _labels_decode_to_the_actions(codec, batch, actions)
    _every_input_changes_the_logits(model, batch, codec.views)
    _every_trainable_tensor_gets_a_gradient(model, wrapped, batch)


def _labels_decode_to_the_actions(codec: Codec, batch: Batch, actions: Float32[np.ndarray, "b a"]) -> None:
    assert batch.action_tokens is not None and batch.dataset is not None
    tokens, dataset = batch.action_tokens[:, : codec.action_dim].cpu().numpy(), batch.dataset.cpu().numpy()
    for index, name in enumerate(codec.datasets):
        rows, own = dataset == index, codec.for_dataset(name)
        error = np.abs(own.decode_actions(tokens[rows]) - actions[rows])
        rounding = np.finfo(np.float32).eps * np.abs(actions[rows])  # of both sides, which may have a large offset
        allowed = own.half_bin * 1.001 + 1e-6 + rounding
        if ((error > allowed) & ~own.clipped(actions[rows])).any():
            row, worst = np.unravel_index((error / allowed).argmax(), error.shape)
            raise UserError(
                f"preflight: the labels do not decode back to the actions: dimension {worst} is off by "
                f"{error[row, worst]:.4g}, half a bin is {allowed[row, worst]:.4g}; the statistics are not of {name}"
            )


@torch.no_grad()
def _every_input_changes_the_logits(model: OpenVLA, batch: Batch, views: tuple[str, ...]) -> None:
    reference = _logits(model, batch)
    changed = {}
    for index, view in enumerate(views):
        pixels = batch.pixel_values.clone()
        pixels[:, index] = -pixels[:, index]
        changed[f"view {view!r}"] = replace(batch, pixel_values=pixels)
    ids = batch.input_ids.clone()
    middle = ids.shape[1] // 2
    ids[:, middle] = torch.where(ids[:, middle] == ids[:, 1], ids[:, 2], ids[:, 1])
    changed["the instruction"] = replace(batch, input_ids=ids)
    if batch.proprio is not None:
        changed["proprio"] = replace(batch, proprio=batch.proprio + 1.0)
    for name, other in changed.items():
        if torch.equal(_logits(model, other), reference):
            raise UserError(f"preflight: {name} does not change the logits; the model cannot see it")


def _logits(model: OpenVLA, batch: Batch) -> Float[Tensor, "b a vocab"]:
    with autocast(model):
        return model.action_logits(batch)


def _every_trainable_tensor_gets_a_gradient(model: OpenVLA, wrapped: nn.Module, batch: Batch) -> None:
    with autocast(model):
        loss, *_ = wrapped(batch)
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    if without:
        raise UserError(f"preflight: no gradient reaches {len(without)} trainable tensors: {', '.join(without[:5])}")
