"""How exactly a run that was stopped goes on: every way of stopping, and what then differs from the undisturbed run.

    python -m benchmarks.resuming

Compared bit by bit: weights, optimizer, guard, log, every line of metrics.jsonl but for the clock's. Trains small models
on this machine's CPU, in processes of their own.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from benchmarks.small_runs import differences, everything, home, start_in_processes
from robofactory.errors import EXIT_STOPPED
from robofactory.training import distributed

# name: (processes, overrides, stopped during this optimizer step and micro-batch)
WAYS = {
    "end of an epoch": (1, [], 6, 0),
    "in an epoch": (1, [], 8, 0),
    "in an accumulation": (1, ["dataloader.batch_size=4", "training.gradient_accumulate_every=2"], 9, 1),
    "2 loader workers": (1, ["dataloader.num_workers=2"], 8, 0),
    "2 processes, DDP": (2, ["dataloader.batch_size=4"], 8, 0),
    "2 processes, FSDP": (2, ["dataloader.batch_size=4", "training.parallel=fsdp"], 8, 0),
}


def compare(directory: Path, world_size: int, overrides: Sequence[str], update: int, micro: int) -> list[str]:
    """Where the run that was stopped by SIGTERM differs from one that was not."""
    with home(directory) as run:
        assert start_in_processes(world_size, *overrides) == [0] * world_size
        undisturbed = everything(run)
        shutil.rmtree(run)
        with stopped_during(update, micro):
            codes = start_in_processes(world_size, *overrides)
        assert codes == [EXIT_STOPPED] * world_size, codes
        assert start_in_processes(world_size, *overrides, resume=True) == [0] * world_size
        return differences(everything(run), undisturbed)


def stopped_during(update: int, micro: int) -> mock._patch:
    """SIGTERM comes to the last process during a micro-batch of an optimizer step."""
    at, backward_of, seed_step = [-1, 0], distributed.backward_of, distributed.seed_step

    def seed(seed: int, now: int, topology: distributed.Topology) -> None:
        at[:] = now if topology.rank == topology.world_size - 1 else -1, 0
        seed_step(seed, now, topology)

    def backward(*given, **named):
        if at == [update, micro]:
            os.kill(os.getpid(), signal.SIGTERM)
        at[1] += 1
        return backward_of(*given, **named)

    return mock.patch.multiple(distributed, seed_step=seed, backward_of=backward)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'stopped':<22}{'steps':>6}   different from the undisturbed run")
    failed = False
    for name, (world_size, overrides, update, micro) in WAYS.items():
        with tempfile.TemporaryDirectory() as directory:
            found = compare(Path(directory), world_size, overrides, update, micro)
        failed |= bool(found)
        print(f"{name:<22}{update + 1:>6}   {', '.join(found) or 'nothing, bit for bit'}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
