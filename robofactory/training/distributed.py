"""Processes, devices and signals: the only place that reads what torchrun sets."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from robofactory import processes
from robofactory.errors import EXIT_STOPPED, UserError
from robofactory.model.openvla import OpenVLA


@dataclass(frozen=True)
class Topology:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launch(num_processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run a module in several processes on this machine, as torchrun does; the exit code.

    A process that fails ends the others, and its code is the answer. SIGINT and SIGTERM are passed on.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_processes, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True}, run_id="robofactory", max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*processes.attached(["-m", module, *arguments]))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode != EXIT_STOPPED:
            how = processes.how_it_ended(first.exitcode)
            helps = "its own message is above" if first.exitcode > 0 else "a smaller dataloader.batch_size or fewer dataloader.num_workers need less; --resume continues"  # fmt: skip
            print(f"error: process {rank} of {num_processes} ended: {how}; {helps}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException:  # the processes finished their step and saved, or were killed after 30 s
        return EXIT_STOPPED
    return 0


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
    """Leave together. Once one process has gone, the launcher tells the others to; nothing is left that it could cut."""
    if dist.is_initialized():
        dist.barrier()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        dist.destroy_process_group()


def seed_step(seed: int, update: int, topology: Topology) -> None:
    """Random numbers (dropout) that are a function of seed, step and rank: a resumed run has no state to restore."""
    words = np.random.SeedSequence([seed, update, topology.rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]) >> 1)


# ------------------------------------------------------------------------------------------------------- the model


def device_to_build_on(topology: Topology, parallel: str) -> torch.device:
    """Where a model is put together: on its device, or, if it may be too large for that, on the CPU."""
    return torch.device("cpu") if parallel == "fsdp" and topology.world_size > 1 else topology.device


def wrap(model: OpenVLA, topology: Topology, parallel: str) -> nn.Module:
    """The model whose backward averages gradients over all processes; itself when there is one process.

    Args:
        parallel: "ddp" keeps the whole model in every process, "fsdp" a part of every layer (FSDP2).
    """
    if topology.world_size == 1:
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(topology.device.type, (topology.world_size,))
    vision = model.vision_backbone
    for block in (*vision.featurizer.blocks, *vision.fused_featurizer.blocks, *model.language_model.model.layers):
        fully_shard(block, mesh=mesh)  # moves it to the device, so the whole model never is there
    fully_shard(model, mesh=mesh)
    for method in ("action_logits", "generate"):
        register_fsdp_forward_method(model, method)
    return model


@contextlib.contextmanager
def backward_of(wrapped: nn.Module, is_last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: gradients travel after the last one of a step alone."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(is_last)
    with (
        wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not is_last else contextlib.nullcontext()
    ):
        yield


# ------------------------------------------------------------------------------------------------- one word for all


def sum_over_ranks(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sums of sums and counts, so that a mean over ranks is not a mean of means. The same on every process."""
    if topology.world_size > 1:
        values = values.to(topology.device)
        dist.all_reduce(values)
    return values.cpu()


def max_over_ranks(value: float, topology: Topology) -> float:
    if topology.world_size == 1:
        return value
    largest = torch.tensor([value], dtype=torch.float64, device=topology.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def any_rank(flag: bool, topology: Topology) -> bool:
    """True on every process when it is true on one: a decision that changes control flow is made once."""
    return bool(sum_over_ranks(torch.tensor([float(flag)]), topology).item() > 0)


def wait_for_all(topology: Topology) -> None:
    if topology.world_size > 1:
        dist.barrier()


def fail(message: str, topology: Topology) -> NoReturn:
    """End all processes with the same mistake, told once."""
    if topology.is_main:
        raise UserError(message)
    sys.exit(2)


class StopSignal:
    """The first SIGINT or SIGTERM asks the loop to finish its step and save; the second stops at once."""

    def __init__(self, topology: Topology) -> None:
        self.requested, self.topology = False, topology
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def agreed(self) -> bool:
        """Whether any process was asked. All of them have to call it together."""
        return any_rank(self.requested, self.topology)

    def _ask(self, number: int, frame: Any) -> None:
        self.requested = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
