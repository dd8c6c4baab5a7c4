"""Metrics of a run: a progress bar, `metrics.jsonl`, `curves.png`, and W&B (offline unless there is a login)."""

import json
import os
import textwrap
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from tqdm import tqdm

from robofactory.training.distributed import Topology, sum_over_ranks

UPDATES_PER_LINE = 10  # optimizer steps that one line of metrics.jsonl averages over


class Log:
    """Knows about ranks, so that the loop need not: only the main process writes and draws."""

    def __init__(
        self,
        run: Path,
        config: dict[str, Any],
        topology: Topology,
        num_updates: int,
        first_update: int,
        bar_position: int,
    ):
        self.run, self.topology, self.update = run, topology, first_update
        self.sums: dict[str, float] = {}
        self.count, self.samples, self.started = 0, 0, time.monotonic()
        if topology.is_main:
            run.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(run / "metrics.jsonl", first_update)
            self.bar = tqdm(
                total=num_updates, initial=first_update, desc=run.name, unit="step", position=bar_position,
                dynamic_ncols=True, mininterval=1.0,
                disable=None,  # where there is no terminal, the lines of each epoch have to do
            )  # fmt: skip
            self.tracker = _start_wandb(run, config)

    def step(self, samples: int, values: dict[str, float], lr: float, epoch: int) -> None:
        """One optimizer step of this process: `values` are means over its `samples`."""
        self.update += 1
        self.count += 1
        self.samples += samples
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        if self.topology.is_main:
            self.bar.update()
        if self.update % UPDATES_PER_LINE == 0:
            self._flush(lr, epoch)

    def _flush(self, lr: float, epoch: int) -> None:
        names = sorted(self.sums)
        totals = sum_over_ranks(
            torch.tensor([self.sums[n] for n in names] + [self.count, self.samples]).double(), self.topology
        )
        *sums, count, samples = totals.tolist()
        seconds = time.monotonic() - self.started
        self.sums, self.count, self.samples, self.started = {}, 0, 0, time.monotonic()
        line = {"step": self.update, "epoch": epoch, "lr": lr} | {
            n: s / count for n, s in zip(names, sums, strict=True)
        }
        line["samples_per_s"] = samples / seconds
        if self.topology.is_main:
            self.write(line)
            shown = {
                "train_loss": "loss",
                "action_accuracy": "acc",
                "action_mae_rad": "mae_rad",
                "samples_per_s": "samples/s",
            }
            self.bar.set_postfix({short: f"{line[name]:.4g}" for name, short in shown.items() if name in line})

    def epoch(self, **values: float | int) -> None:
        """The end of an epoch: validation, already reduced over the processes."""
        if self.topology.is_main:
            self.write({"step": self.update} | values)
            draw_curves(self.run / "metrics.jsonl", self.run / "curves.png")
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.message(f"{self.run.name}: {shown}")

    def write(self, line: dict[str, float | int]) -> None:
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in line.items()}) + "\n")
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in line.items() if k != "step"}, step=self.update)

    def input_images(self, views: dict[str, UInt8[np.ndarray, "h w 3"]], instruction: str) -> None:
        """`train/input_images`: the views as the model sees them, the instruction below; also a PNG in the run."""
        if not self.topology.is_main:
            return
        path = self.run / "input_images.png"
        draw_input_images(path, views, instruction)
        if self.tracker is not None:
            import wandb

            self.tracker.log({"train/input_images": wandb.Image(str(path), caption=instruction)}, step=self.update)

    def message(self, text: str) -> None:
        if self.topology.is_main:
            tqdm.write(text)

    def close(self) -> None:
        if self.topology.is_main:
            self.bar.close()
            if self.tracker is not None:
                self.tracker.finish()


def draw_curves(metrics: Path, picture: Path) -> None:
    """Loss, accuracy, error in rad and learning rate over the optimizer steps, from a run's `metrics.jsonl`."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    panels = {
        "cross-entropy on action tokens": ("train_loss", "val_loss"),
        "action-token accuracy": ("action_accuracy", "val_action_accuracy"),
        "mean absolute error (rad)": ("action_mae_rad", "val_action_mae_rad"),
        "learning rate": ("lr",),
    }
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.4), layout="constrained")
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                ax.plot(
                    *zip(*points, strict=True), label=name, marker="o" if name.startswith("val") else None, ms=3, lw=1.2
                )
        ax.set(title=title, xlabel="optimizer step")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(frameon=False)
        if "rad" in title and ax.lines:
            ax.set_yscale("log")
    _save_figure(figure, picture)


def draw_input_images(picture: Path, views: dict[str, UInt8[np.ndarray, "h w 3"]], instruction: str) -> None:
    figure, axes = plt.subplots(1, len(views), figsize=(3 * len(views), 3.5), layout="constrained", squeeze=False)
    for ax, (name, image) in zip(axes[0], views.items(), strict=True):
        ax.imshow(image)
        ax.set_title(f"{name} {image.shape[1]}x{image.shape[0]}")
        ax.axis("off")
    figure.supxlabel("\n".join(textwrap.wrap(instruction, 40 * len(views))), fontsize=10)
    _save_figure(figure, picture)


def _save_figure(figure: Figure, picture: Path) -> None:
    temporary = picture.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, picture)


def _drop_lines_after(metrics: Path, update: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their first record goes."""
    if metrics.exists():
        kept = [line for line in metrics.read_text().splitlines() if line and json.loads(line)["step"] <= update]
        temporary = metrics.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, metrics)


def _start_wandb(run: Path, config: dict[str, Any]) -> Any | None:
    """A W&B run, or None with a warning: tracking is never a reason to fail."""
    mode = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        return wandb.init(project="robofactory", name=run.name, dir=run, config=config, mode=mode)  # type: ignore[arg-type]
    except wandb.Error as error:
        tqdm.write(f"warning: W&B is off for this run ({error}); metrics.jsonl and curves.png are written all the same")
        return None
