"""What is measured beside the loss: token accuracy and the error of the decoded action in physical units."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from robofactory.codec.codec import Codec
from robofactory.model.openvla import OpenVLA
from robofactory.model.precision import autocast
from robofactory.shapes import Batch
from robofactory.training.distributed import Topology, sum_over_ranks


def score(codec: Codec, predicted_tokens: Int64[Tensor, "b a"], batch: Batch) -> dict[str, float]:
    """Means over a batch: accuracy of the action tokens, absolute error over the joints in rad (gripper left out).

    The predictions are teacher-forced: each token is predicted from the true ones before it.
    """
    assert batch.action_tokens is not None
    predicted = predicted_tokens[:, : codec.action_dim].cpu().numpy()
    target = batch.action_tokens[:, : codec.action_dim].cpu().numpy()
    error = np.abs(codec.decode_actions(predicted) - codec.decode_actions(target))
    joints = codec.action_statistics.normalized
    return {
        "action_accuracy": float((predicted == target).mean()),
        "action_mae_rad": float(error[:, joints].mean()),
        "gripper_accuracy": float((error[:, ~joints] < 0.5).mean()),
    }


def mean(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Name by name."""
    return {name: sum(each[name] for each in measured) / len(measured) for name in measured[0]}


@torch.no_grad()
def validate(
    model: OpenVLA, codec: Codec, batches: Iterable[Batch], soft_target_sigma_bins: float, topology: Topology
) -> dict[str, float]:
    """`val_loss` and the `val_` scores over the held-out episodes, weighted by samples, over all processes."""
    model.eval()
    names, sums, count = ["loss"], np.zeros(1), 0
    for batch in batches:
        batch = batch.to(topology.device)
        with autocast(model):
            loss, predicted = model(batch, soft_target_sigma_bins)
        scores = {"loss": loss.item()} | score(codec, predicted, batch)
        size = len(batch.input_ids)
        names = list(scores)
        sums = sums + size * np.array(list(scores.values()))
        count += size
    *totals, samples = sum_over_ranks(torch.tensor([*sums, count], dtype=torch.float64), topology).tolist()
    return {f"val_{name}": total / samples for name, total in zip(names, totals, strict=True)}
