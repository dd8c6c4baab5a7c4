"""Processes and devices: the only place that reads what torchrun sets."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Topology:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> Topology:
    """Join the process group that torchrun describes, if any. nccl on GPUs, gloo on CPUs."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Topology(rank=0, world_size=1, device=device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Topology(dist.get_rank(), dist.get_world_size(), device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, topology: Topology) -> nn.Module:
    """The model whose backward averages gradients over all processes; itself when there is one process."""
    return DistributedDataParallel(model) if topology.world_size > 1 else model


def sum_over_ranks(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sums of sums and counts, so that a mean over ranks is not a mean of means."""
    if topology.world_size > 1:
        values = values.to(topology.device)
        dist.all_reduce(values)
    return values.cpu()


def any_rank(flag: bool, topology: Topology) -> bool:
    """True on every process when it is true on one: a decision that changes control flow is made once."""
    return bool(sum_over_ranks(torch.tensor([float(flag)]), topology).item() > 0)
