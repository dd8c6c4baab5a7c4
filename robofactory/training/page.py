"""A training run as one HTML file in its directory: opens from disk, no network, no file beside it."""

import html
import os
from pathlib import Path
from typing import Any

from robofactory.config import RecipeConfig, to_yaml
from robofactory.pages import document, picture, table

PAGE, METRICS, CURVES = "run.html", "metrics.jsonl", "curves.png"
INPUT_IMAGES, OPEN_LOOP = "input_images.png", "open_loop.png"
PICTURES = {
    CURVES: "Curves (red lines are events)",
    OPEN_LOOP: "Open loop on a held-out episode",
    INPUT_IMAGES: "What the model sees",
}
COLUMNS = {  # of the table of joints: name in metrics.jsonl -> heading
    "val_mae": "mean absolute error (rad; gripper in [-1, 1])",
    "val_accuracy": "exact bin",
    "val_within_one_bin": "within one bin",
    "val_entropy": "entropy (nats)",
}
FACTS = ("train_loss", "val_loss", "val_action_accuracy", "val_action_mae_rad", "open_loop_mae_rad", "grad_norm", "lr")
FACTS += ("samples_per_s", "data_wait_share", "peak_memory_gb", "skipped_steps")


def write_page(run: Path, lines: list[dict[str, Any]], recipe: RecipeConfig, num_updates: int) -> None:
    """`{run}/run.html` from the lines of its `metrics.jsonl` and the pictures beside it."""
    newest: dict[str, Any] = {}
    for line in lines:
        newest |= line
    step = newest.get("step", 0)
    body = [
        f"<h1>{html.escape(run.name)}</h1>",
        f"<p>Step {step} of {num_updates}, epoch {newest.get('epoch', 0)}.</p>",
        table(("newest", ""), [(name, _number(newest[name])) for name in FACTS if name in newest]),
    ]
    joints = [name.partition("/")[2] for name in newest if name.startswith("val_mae/")]
    if joints:
        rows = [(joint, *(_number(newest[f"{column}/{joint}"]) for column in COLUMNS)) for joint in joints]
        body += ["<h2>Each joint, on held-out episodes</h2>", table(("joint", *COLUMNS.values()), rows)]
    for file, title in PICTURES.items():
        if (run / file).is_file():
            body.append(f"<h2>{title}</h2>{picture(title, (run / file).read_bytes())}")
    events = [(str(line["step"]), line["event"], line["message"]) for line in lines if "event" in line]
    if events:
        body += ["<h2>Events</h2>", table(("step", "event", ""), events)]
    body.append(f"<h2>Recipe</h2><pre>{html.escape(to_yaml(recipe))}</pre>")
    temporary = run / f"{PAGE}.tmp"
    temporary.write_text(document(run.name, body), encoding="utf-8", newline="\n")
    os.replace(temporary, run / PAGE)


def _number(value: float | int) -> str:
    return f"{value:.4g}"
