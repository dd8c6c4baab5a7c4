"""How much faster two processes train than one, on two cores: the same global batch, one thread a process.

    python -m benchmarks.scaling [--recipe robot_openvla_tiny]

Samples a second as the trainer's own log has them, without validation and saving; best line of each run, the runs taking
turns. Run it with nothing else on.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch

from benchmarks import small_runs
from robofactory.config import load_recipe
from robofactory.paths import dataset_dir, run_dir


def samples_per_s(run: Path, world_size: int, recipe: str, steps: int, batch_size: int) -> float:
    shutil.rmtree(run, ignore_errors=True)
    size = f"dataloader.batch_size={batch_size // world_size}"
    data = [f"data.num_episodes={small_runs.NUM_EPISODES}", "data.val_ratio=0.2", "dataloader.num_workers=0"]
    with mock.patch.object(small_runs, "SMALL", []), mock.patch.object(small_runs, "RECIPE", recipe):
        codes = small_runs.start_in_processes(world_size, *data, size, f"training.max_steps={steps}")
    assert codes == [0] * world_size, codes
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(line["samples_per_s"] for line in lines if "samples_per_s" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="robot_openvla_tiny", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="of each run (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=2, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch_size = load_recipe(arguments.recipe).dataloader.batch_size
    best = {1: 0.0, 2: 0.0}
    with tempfile.TemporaryDirectory() as directory, small_runs.home(Path(directory), writes_dataset=False):
        small_runs.write_dataset(dataset_dir(small_runs.TASK, 0, small_runs.NUM_EPISODES), length=80)
        run = run_dir("openvla", small_runs.TASK, 0, small_runs.NUM_EPISODES)
        for _ in range(arguments.repetitions):
            for world_size in best:
                speed = samples_per_s(run, world_size, arguments.recipe, arguments.steps, batch_size)
                best[world_size] = max(best[world_size], speed)
    print(f"global batch {batch_size}: 1 process {best[1]:.1f} samples/s, 2 processes {best[2]:.1f}: {best[2] / best[1]:.2f} times as fast")  # fmt: skip


if __name__ == "__main__":
    main()
