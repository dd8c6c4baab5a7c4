"""The step at which training gave up, on disk, and run again: `train.sh --replay DIRECTORY`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robofactory import checkpoint
from robofactory.codec.codec import Stacked
from robofactory.data.dataset import Batches
from robofactory.errors import UserError
from robofactory.model.openvla import OpenVLA
from robofactory.model.precision import autocast
from robofactory.training import distributed, resuming
from robofactory.training.distributed import Topology


def save_batches(directory: Path, batches: Batches, epoch: int, step: int, topology: Topology) -> None:
    """Beside a checkpoint, the micro-batches that each process had in a step, not normalised yet."""
    tensors = {}
    for micro, batch in enumerate(next(batches.epoch(epoch, step))):
        tensors |= {f"{micro}/{name}": value.contiguous() for name, value in vars(batch).items() if value is not None}
    temporary = directory / f".rank_{topology.rank}.tmp"
    save_file(tensors, temporary)
    os.replace(temporary, directory / f"batches_rank_{topology.rank}.safetensors")


def run_again(directory: Path) -> str:
    """The step's loss and gradient norm, in one process; which samples and which module are the first not finite.

    Raises:
        UserError: the directory holds no such step.
    """
    files = sorted(directory.glob("batches_rank_*.safetensors"), key=lambda path: int(path.stem.rpartition("_")[2]))
    if not files:
        raise UserError(f"{directory} holds no step to replay; training names the directory when it gives up")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, codec, recipe = checkpoint.load_model(directory, device)
    update = resuming.read(directory).update
    ranks = [_micro_batches(path) for path in files]
    num_samples = sum(len(batch.input_ids) for rank in ranks for batch in rank)
    model.train()
    lines, total, sigma = [f"step {update}, {num_samples} samples"], 0.0, recipe.training.soft_target_sigma_bins
    for rank, micro_batches in enumerate(ranks):
        distributed.seed_step(recipe.training.seed, update, Topology(rank, len(ranks), device))
        for micro, batch in enumerate(micro_batches):
            batch = codec.normalized(batch.to(device))
            with _first_nonfinite(model) as found, autocast(model):
                loss, *_ = model(batch, sigma)
            (loss * (len(batch.input_ids) / num_samples)).backward()
            total += loss.item() * len(batch.input_ids)
            lines.append(f"process {rank}, micro-batch {micro}: loss {loss.item():.6g}{_blame(found)}")
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], recipe.training.max_grad_norm)
    return "\n".join([*lines, f"loss {total / num_samples:.6g}, gradient norm {norm.item():.6g}"])


def _micro_batches(path: Path) -> list[Stacked]:
    tensors = load_file(path)
    count = 1 + max(int(name.partition("/")[0]) for name in tensors)
    return [
        Stacked(**{name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{micro}/")})
        for micro in range(count)
    ]


@contextlib.contextmanager
def _first_nonfinite(model: OpenVLA) -> Iterator[list[str]]:
    """Holds, after a forward pass, the names of the modules whose output was not finite, first of all the cause."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _blame(modules: list[str]) -> str:
    return f"; the first output that is not finite is that of {modules[0]}" if modules else ""
