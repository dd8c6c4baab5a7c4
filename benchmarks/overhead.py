"""What everything around the optimizer step costs: the trainer's loop against a bare one, on the same batches.

    python -m benchmarks.overhead [--recipe robot_openvla_tiny]

Bare is: next batch, forward, backward, clip, AdamW. The trainer adds metrics of every joint, its guard, the log, random
numbers a step, signals, and the message that processes exchange (here there is one). CPU time of this process, a step of
one and a step of the other in turn, medians. Wanted: below 3 %. Saving is shown too: it comes once an epoch.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import small_runs
from robofactory import checkpoint
from robofactory.config import load_recipe
from robofactory.data.dataset import load_splits
from robofactory.model.precision import autocast
from robofactory.paths import dataset_dir
from robofactory.training import optim
from robofactory.training.log import Log
from robofactory.training.train import train


def bare_steps(recipe_name: str, overrides: list[str]) -> Iterator[None]:
    """A training without anything around it; each `next` is an optimizer step."""
    recipe = load_recipe(recipe_name, overrides)
    t = recipe.training
    data = load_splits(dataset_dir(small_runs.TASK, 0, small_runs.NUM_EPISODES), recipe)
    model = checkpoint.build_model(recipe, data.codec).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optim.make_optimizer(model, t.weight_decay)
    batches = data.train_batches(0, 1)
    epoch = 0
    while True:
        for step in batches.epoch(epoch):
            for batch in step:
                with autocast(model):
                    loss, *_ = model(data.codec.normalized(batch), t.soft_target_sigma_bins)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable, t.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            yield
        epoch += 1


def measure(recipe_name: str, overrides: list[str], steps: int) -> tuple[list[float], list[float], list[float]]:
    """CPU seconds of the bare steps, of the trainer's, and of its savings."""
    bare, ours, savings = [], [], []
    other, watch, save = bare_steps(recipe_name, overrides), Log.watch, checkpoint.save

    def alternate(self: Log, windows: Iterator) -> Iterator:
        """The trainer's own steps, each followed by a bare one."""
        steps = watch(self, windows)
        while True:
            started = time.process_time()
            window = next(steps, None)
            if window is None:
                return
            yield window  # until the loop asks for the next one, its body runs
            ours.append(time.process_time() - started)
            bare.append(timed(lambda: next(other)))

    def timed_save(*given, **named) -> None:
        savings.append(timed(lambda: save(*given, **named)))

    recipe = load_recipe(recipe_name, [*overrides, f"training.max_steps={steps}"])
    with (
        mock.patch.object(Log, "watch", alternate),
        mock.patch.object(Log, "_draw"),
        mock.patch.object(checkpoint, "save", timed_save),
    ):
        train("openvla", small_runs.TASK, 0, recipe, resume=False, bar_position=0)
    return bare, ours, savings


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="robot_openvla_tiny", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    overrides = [f"data.num_episodes={small_runs.NUM_EPISODES}", "data.val_ratio=0.2", "dataloader.num_workers=0"]
    with tempfile.TemporaryDirectory() as directory, small_runs.home(Path(directory), writes_dataset=False):
        small_runs.write_dataset(dataset_dir(small_runs.TASK, 0, small_runs.NUM_EPISODES), length=80)
        bare, ours, savings = measure(arguments.recipe, overrides, arguments.steps)
    ratio = statistics.median(a / b for a, b in zip(ours[5:], bare[5:], strict=True))
    print(f"bare step {1e3 * statistics.median(bare[5:]):.1f} ms, the trainer's {1e3 * statistics.median(ours[5:]):.1f} ms: {ratio - 1:+.1%} (median of {len(ours) - 5} pairs)")  # fmt: skip
    print(f"a checkpoint, once an epoch: {1e3 * statistics.median(savings):.0f} ms")


if __name__ == "__main__":
    main()
