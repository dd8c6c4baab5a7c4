"""Metrics of a run: progress bar, `metrics.jsonl`, `curves.png`, its page, and W&B (offline unless there is a login)."""

import dataclasses
import json
import os
import resource
import secrets
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from tqdm import tqdm

from robofactory.config import RecipeConfig
from robofactory.errors import brief, shown
from robofactory.files import write_atomically
from robofactory.html import plots
from robofactory.html.curves import points_of, read_metrics
from robofactory.html.page import spared
from robofactory.shapes import Batch
from robofactory.training import distributed
from robofactory.training.distributed import Topology
from robofactory.training.guard import Verdict
from robofactory.training.metrics import Meter, OpenLoop
from robofactory.training.page import CURVES, INPUT_IMAGES, METRICS, OPEN_LOOP, PAGE, write_page

# Of a figure of two rows; matplotlib finding them itself takes longer than the drawing.
MARGINS = {"left": 0.05, "right": 0.99, "top": 0.91, "bottom": 0.08, "wspace": 0.25, "hspace": 0.4}
SHOWN = {"train_loss": "loss", "action_accuracy": "acc", "action_mae_rad": "mae_rad", "samples_per_s": "samples/s"}
UPDATES_PER_LINE = 10  # optimizer steps that one line of metrics.jsonl averages over
SECONDS_BETWEEN_REPORTS = 60.0  # where there is no terminal to draw a bar on
SECONDS_BETWEEN_DRAWINGS = 120.0  # a drawing takes one or two; the end of a run is drawn in any case
MOST_JOINTS = 32  # that are drawn of an open loop
WANDB_ID = "wandb_id"  # a file in the run's directory


class Log:
    """Knows about ranks, so that the loop need not: only the main process writes and draws.

    `state` is what a checkpoint needs so that a resumed run writes the lines it would have written.
    """

    def __init__(self, run: Path, recipe: RecipeConfig, topology: Topology, meter: Meter, bar_position: int):
        self.run, self.recipe, self.topology, self.meter = run, recipe, topology, meter
        self.update = 0
        self.samples = self.seconds = self.waited = self.waited_in_line = 0.0
        self.drawn_at = time.monotonic()
        self.newest_open_loop: OpenLoop | None = None
        if topology.is_main:
            run.mkdir(parents=True, exist_ok=True)
            self.bar = tqdm(
                desc=shown(run.name), unit="step", position=bar_position, dynamic_ncols=True, mininterval=1.0,
                disable=None,  # where there is no terminal
            )  # fmt: skip
            self.tracker = _start_wandb(run, dataclasses.asdict(recipe))

    def start_at(self, update: int, num_updates: int, state: dict[str, Any] | None) -> None:
        """Go on after an optimizer step, with the `state` that its checkpoint holds."""
        self.update = update
        state = state or {"sums": [0.0] * self.meter.length, "grad_norm": 0.0, "count": 0}
        self.sums, self.grad_norm, self.count = np.array(state["sums"]), state["grad_norm"], state["count"]
        self.first_update, self.started_at = update, time.monotonic()
        self.reported_at = self.started_at
        if self.topology.is_main:
            _drop_lines_after(self.run / METRICS, update)
            self.bar.total, self.bar.n = num_updates, update
            self.bar.refresh()

    def state(self) -> dict[str, Any]:
        """What it would need to go on from here. The lines up to here are on the disk when this returns."""
        if self.topology.is_main and (self.run / METRICS).exists():
            with open(self.run / METRICS, "rb") as file:
                os.fsync(file.fileno())
        return {"sums": self.sums.tolist(), "grad_norm": self.grad_norm, "count": self.count}

    # ----- steps

    def watch(self, steps: Iterable[Iterable[Batch]]) -> Iterator[Iterator[Batch]]:
        """The same steps; from here to `step` the clock runs, and `waited` counts the seconds without data."""
        for step in steps:
            self.started, self.waited = time.perf_counter(), 0.0
            yield self._watch_batches(iter(step))

    def _watch_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def step(
        self,
        verdict: Verdict,
        sums: Sequence[float],
        grad_norm: float,
        waited: float,
        *,
        ends_epoch: bool,
        **values: float | int,
    ) -> None:
        """The end of an optimizer step.

        Args:
            sums: of the meter, over all processes.
            waited: seconds without data, of all processes together.
            ends_epoch: what there is becomes a line now, so that no step is without one.
            values: go into the next line as they are.
        """
        self.update += 1
        self.samples += sums[0]
        self.seconds += time.perf_counter() - self.started
        self.waited_in_line += waited / self.topology.world_size
        if verdict not in (Verdict.SKIP, Verdict.GIVE_UP):
            self.sums, self.grad_norm, self.count = self.sums + sums, self.grad_norm + grad_norm, self.count + 1
        if verdict is not Verdict.APPLY:
            self.event(verdict.name.lower(), f"loss {sums[1] / sums[0]:.4g}, gradient norm {grad_norm:.4g}")
        if self.topology.is_main:
            self.bar.update()
            if self.bar.disable and time.monotonic() > self.reported_at + SECONDS_BETWEEN_REPORTS:
                self._report()
        if self.update % UPDATES_PER_LINE == 0 or ends_epoch:
            self._flush(values)

    def _flush(self, values: dict[str, float | int]) -> None:
        memory_gb = distributed.max_over_ranks(peak_memory_gb(self.topology.device), self.topology)
        if self.topology.is_main:
            line = {"step": self.update} | values | self._means() | self._speed()
            self.write(line | {"peak_memory_gb": memory_gb})
            self.bar.set_postfix({short: f"{line[name]:.4g}" for name, short in SHOWN.items() if name in line})
        self.sums, self.grad_norm, self.count = np.zeros_like(self.sums), 0.0, 0
        self.samples = self.seconds = self.waited_in_line = 0.0

    def _means(self) -> dict[str, float]:
        """Of the steps since the last line that were finite; empty if none was."""
        if not self.count:
            return {}
        means = self.meter.means(self.sums)
        return {"train_loss": means.pop("loss")} | means | {"grad_norm": self.grad_norm / self.count}

    def _report(self) -> None:
        """What the bar would show, as a line."""
        self.reported_at = time.monotonic()
        pace_s = (self.reported_at - self.started_at) / (self.update - self.first_update)  # validation and saving too
        left = tqdm.format_interval(pace_s * (self.bar.total - self.update))
        values = self._means() | self._speed()
        shown = ", ".join(f"{short} {values[name]:.4g}" for name, short in SHOWN.items() if name in values)
        self.message(f"{self.run.name}: step {self.update} of {self.bar.total}, {shown}, about {left} left")

    def _speed(self) -> dict[str, float]:
        """Of the steps since the last line, or since a resume. Validation and saving are not in it."""
        return {
            "samples_per_s": self.samples / max(self.seconds, 1e-9),
            "data_wait_share": self.waited_in_line / max(self.seconds, 1e-9),
        }

    # ----- epochs and events

    def epoch(self, **values: float | int) -> None:
        """The end of an epoch: validation, already reduced over the processes."""
        if self.topology.is_main:
            self.write({"step": self.update} | values)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)
            self.message(f"{self.run.name}: {shown}")
            if time.monotonic() > self.drawn_at + SECONDS_BETWEEN_DRAWINGS:
                self._draw()

    def event(self, kind: str, text: str) -> None:
        """Something a person should know, e.g. a skipped step: a line of its own."""
        if self.topology.is_main:
            self.write({"step": self.update, "event": kind, "message": text})
            self.message(f"{self.run.name}: {kind}: {text}")

    def write(self, line: dict[str, Any]) -> None:
        with open(self.run / METRICS, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in line.items()}) + "\n")
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in line.items() if k != "step"}, step=self.update)

    def input_images(self, views: dict[str, UInt8[np.ndarray, "h w 3"]], instruction: str) -> None:
        """`train/input_images`: the views as the model sees them, the instruction below; also a PNG in the run."""
        if self.topology.is_main:
            with spared(INPUT_IMAGES, self.message):
                draw_input_images(self.run / INPUT_IMAGES, views, instruction)
                self._track_picture("train/input_images", INPUT_IMAGES)

    def open_loop(self, curves: OpenLoop) -> None:
        """Predicted against recorded joints of a held-out episode."""
        self.newest_open_loop = curves

    def _track_picture(self, name: str, file: str) -> None:
        if self.tracker is not None:
            import wandb

            self.tracker.log({name: wandb.Image(str(self.run / file))}, step=self.update)

    def message(self, text: str) -> None:
        if self.topology.is_main:
            tqdm.write(shown(text, keep="\n\t"))
            sys.stdout.flush()  # a pipe would keep it for hours

    def _draw(self) -> None:
        """Curves and page. They show what is safe already, so a training goes on without them."""
        lines: list[dict[str, Any]] = []
        with spared(METRICS, self.message):
            lines = read_metrics(self.run / METRICS)
        with spared(CURVES, self.message):
            draw_curves(lines, self.run / CURVES)
        if self.newest_open_loop is not None:
            with spared(OPEN_LOOP, self.message):
                draw_open_loop(self.run / OPEN_LOOP, self.newest_open_loop)
                self._track_picture("val/open_loop", OPEN_LOOP)
        with spared(PAGE, self.message):
            write_page(self.run, lines, self.recipe, self.bar.total)
        self.drawn_at = time.monotonic()

    def close(self) -> None:
        if self.topology.is_main:
            if (self.run / METRICS).exists():
                self._draw()
            self.bar.close()
            if self.tracker is not None:
                self.tracker.finish()


def peak_memory_gb(device: torch.device) -> float:
    """Of this process: what PyTorch had allocated on the GPU at most, or on a CPU all that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def draw_curves(lines: list[dict[str, Any]], picture: Path) -> None:
    """Loss, accuracy, error in rad and what else tells how a run goes, over the optimizer steps."""
    panels = {
        "cross-entropy on action tokens": ("train_loss", "val_loss"),
        "action-token accuracy": ("action_accuracy", "val_action_accuracy", "val_action_within_one_bin"),
        "mean absolute error (rad)": ("action_mae_rad", "val_action_mae_rad", "open_loop_mae_rad"),
        "entropy of an action token (nats)": ("action_entropy", "val_action_entropy"),
        "gradient norm": ("grad_norm",),
        "learning rate": ("lr",),
    }
    figure = Figure(figsize=(15, 7))
    axes = figure.subplots(2, 3, gridspec_kw=MARGINS)
    for ax, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name in names:
            if points := points_of(lines, name):
                marker = "o" if name.startswith(("val", "open")) else None
                ax.plot(*zip(*points, strict=True), label=name, marker=marker, ms=3, lw=1.2)
        for line in lines:
            if "event" in line:
                ax.axvline(line["step"], color="tab:red", lw=0.8, alpha=0.5)
        ax.set(title=title, xlabel="optimizer step")
        ax.grid(alpha=0.3)
        if ax.lines and ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
        if title.startswith(("mean", "gradient")) and ax.get_legend_handles_labels()[0]:
            plots.use_log_scale(ax)
    plots.save(figure, picture)


def draw_open_loop(picture: Path, curves: OpenLoop) -> None:
    names = curves.joint_names[:MOST_JOINTS]
    figure = Figure(figsize=(15, 7))
    axes = figure.subplots(2, -(-len(names) // 2), squeeze=False, gridspec_kw=MARGINS)
    for k, (ax, name) in enumerate(zip(axes.flat, names, strict=False)):
        ax.plot(curves.steps, curves.recorded[:, k], color="0.55", lw=2.5, label="recorded")
        ax.plot(curves.steps, curves.predicted[:, k], color="tab:blue", lw=1.2, marker=".", ms=3, label="predicted")
        ax.set(title=brief(name, 36), xlabel="step of the episode", ylabel="rad" if curves.is_joint[k] else "gripper")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(names) :]:  # of an odd number of joints the last one
        ax.axis("off")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"held-out episode {curves.episode}: each action predicted from the recorded observation")
    plots.save(figure, picture)


def draw_input_images(picture: Path, views: dict[str, UInt8[np.ndarray, "h w 3"]], instruction: str) -> None:
    figure = Figure(figsize=(3 * len(views), 3.5), layout="constrained")
    axes = figure.subplots(1, len(views), squeeze=False)
    for ax, (name, image) in zip(axes[0], views.items(), strict=True):
        ax.imshow(image)
        ax.set_title(f"{brief(name)} {image.shape[1]}x{image.shape[0]}")
        ax.axis("off")
    said = textwrap.wrap(shown(instruction), 40 * len(views), max_lines=3, placeholder=" ...")
    figure.supxlabel("\n".join(said), fontsize=10)
    plots.save(figure, picture)


def _drop_lines_after(metrics: Path, update: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their first record goes."""
    if metrics.exists():
        kept = [line for line in read_metrics(metrics) if line["step"] <= update]
        write_atomically(metrics, "".join(json.dumps(line) + "\n" for line in kept))


def _start_wandb(run: Path, config: dict[str, Any]) -> Any | None:
    """A W&B run, or None with a warning: tracking is never a reason to fail. A training that goes on, goes on in it."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    name = run / WANDB_ID
    if not (name.exists() and (run / "latest").exists()):  # without a checkpoint it starts over
        write_atomically(name, secrets.token_hex(4))
    try:
        # A login is in the environment, in netrc or in W&B's own settings.
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        return wandb.init(
            project="robofactory",
            name=run.name,
            dir=run,
            config=config,
            mode=mode,
            id=name.read_text(encoding="utf-8"),
            resume="allow",
        )
    except wandb.Error as error:
        tqdm.write(f"warning: W&B is off for this run ({error}); metrics.jsonl and curves.png are written all the same")
        return None
