"""What is measured beside the gradient: error and certainty of each joint, as sums that processes and steps add up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn import functional

from robofactory.codec.codec import Codec
from robofactory.model.openvla import OpenVLA
from robofactory.model.precision import autocast
from robofactory.shapes import Batch
from robofactory.training.distributed import Topology, sum_over_ranks


class Meter:
    """Batches -> sums over their samples -> named means. One vector, so that processes add theirs in one message.

    [number of samples, their loss], then for each dataset its number of samples, and for each action dimension: exact
    tokens, tokens at most one bin off, error, entropy (nats over the 256 bins), and whether the error is below 0.5. The
    predictions are teacher-forced: each token is predicted from the true ones before it.
    """

    def __init__(self, codec: Codec, device: torch.device):
        self.codec, self.device = codec, device
        self.dim = codec.action_dim
        self.length = 2 + len(codec.datasets) * (1 + 5 * self.dim)
        of_datasets = [codec.for_dataset(name) for name in codec.datasets]
        self.names, self.joints = of_datasets[0].action_statistics.names, of_datasets[0].action_statistics.joints
        # Bins are equally wide, so that an error in bins is one in rad (or, of the gripper, in [-1, 1]).
        self._bin_widths = torch.from_numpy(np.stack([2.0 * each.half_bin for each in of_datasets])).to(device)

    def nothing(self) -> Float64[Tensor, " k"]:
        """The sums of no batch."""
        return torch.zeros(self.length, dtype=torch.float64, device=self.device)

    def measure(
        self,
        loss: Float[Tensor, ""],
        predicted: Int64[Tensor, "b n"],
        entropy: Float[Tensor, "b n"],
        batch: Batch,
    ) -> Float64[Tensor, " k"]:
        """The sums of a batch, on its device: nothing waits for it."""
        assert batch.action_tokens is not None and batch.dataset is not None
        ids = torch.stack([predicted[:, : self.dim], batch.action_tokens[:, : self.dim]])
        off = (ids[0] - ids[1]).abs()
        tokens = self.codec.action_tokens
        bins = (tokens.vocab_size - 1 - ids).clamp(0, tokens.num_bins - 2)  # as they are decoded
        error = (bins[0] - bins[1]).abs() * self._bin_widths[batch.dataset]
        rows = [off == 0, off <= 1, error, entropy[:, : self.dim], error < 0.5]
        size = len(off)
        of_samples = torch.cat([torch.ones_like(error[:, :1]), *(row.double() for row in rows)], dim=1)  # [b, 1 + 5a]
        sums = functional.one_hot(batch.dataset, len(self._bin_widths)).double().T @ of_samples
        return torch.cat([torch.stack([torch.full_like(loss, size), loss.detach() * size]).double(), sums.flatten()])

    def means(self, sums: Float64[np.ndarray, " k"], prefix: str = "") -> dict[str, float]:
        """By name; `action_` over the joints without what passes through, which is the gripper."""
        count, loss = sums[:2]
        of_datasets = sums[2:].reshape(-1, 1 + 5 * self.dim)
        exact, within_one, error, entropy, near = of_datasets.sum(axis=0)[1:].reshape(5, self.dim) / count
        joints = self.joints
        values = {
            "loss": loss / count,
            "action_accuracy": exact.mean(),
            "action_within_one_bin": within_one.mean(),
            "action_mae_rad": error[joints].mean(),
            "action_entropy": entropy.mean(),
        }
        if not joints.all():
            values |= {"gripper_accuracy": near[~joints].mean(), "gripper_mae": error[~joints].mean()}
        columns = {"accuracy": exact, "within_one_bin": within_one, "mae": error, "entropy": entropy}
        for name, column in columns.items():
            values |= {f"{name}/{joint}": column[k] for k, joint in enumerate(self.names)}
        for name, (size, *numbers) in zip(self.codec.datasets, of_datasets, strict=True):
            if len(of_datasets) > 1 and size > 0:
                exact, _, error, _, _ = np.reshape(numbers, (5, self.dim)) / size
                values |= {f"action_accuracy/{name}": exact.mean(), f"action_mae/{name}": error.mean()}
        return {f"{prefix}{name}": float(value) for name, value in values.items()}


@torch.no_grad()
def validate(
    model: OpenVLA,
    meter: Meter,
    batches: Iterable[Batch],
    soft_target_sigma_bins: float,
    topology: Topology,
    is_stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """`val_loss` and the `val_` scores over the held-out episodes, over all processes.

    None when `is_stopped`, which has to say the same on every process, became true.
    """
    model.eval()
    sums = meter.nothing()
    for batch in batches:
        if is_stopped():
            return None
        batch = meter.codec.normalized(batch.to(topology.device))
        with autocast(model):
            loss, predicted, entropy = model(batch, soft_target_sigma_bins)
        sums += meter.measure(loss, predicted, entropy, batch)
    return meter.means(sum_over_ranks(sums, topology).numpy(), "val_")


@dataclass(frozen=True)
class OpenLoop:
    """One held-out episode: the action at each step, predicted from what was recorded before it. Nothing is fed back."""

    episode: int
    joint_names: tuple[str, ...]
    is_joint: Bool[np.ndarray, " a"]  # rad; the others are in [-1, 1]
    steps: Int64[np.ndarray, " n"]
    recorded: Float32[np.ndarray, "n a"]
    predicted: Float32[np.ndarray, "n a"]

    @property
    def mae_rad(self) -> float:
        """Over the joints, the gripper left out."""
        return float(np.abs(self.predicted - self.recorded)[:, self.is_joint].mean())


@torch.no_grad()
def check_open_loop(
    model: OpenVLA, codec: Codec, episode: int, stride: int, batches: Iterable[tuple[Batch, Float32[np.ndarray, "n a"]]]
) -> OpenLoop:
    """Generate actions as a policy does, each token from its own ones before it, for the frames of an episode."""
    model.eval()
    predicted, recorded = [], []
    for batch, actions in batches:
        with autocast(model):
            tokens = model.generate(batch, codec.action_dim)
        predicted.append(codec.decode_actions(tokens.cpu().numpy()))
        recorded.append(actions)
    statistics = codec.action_statistics
    recorded_actions = np.concatenate(recorded)
    return OpenLoop(
        episode,
        tuple(statistics.names),
        statistics.joints,
        stride * np.arange(len(recorded_actions)),
        recorded_actions,
        np.concatenate(predicted),
    )
