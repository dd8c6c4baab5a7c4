"""A training run as one HTML file in its directory: opens from disk, no network, no file beside it."""

from pathlib import Path
from typing import Any

from robofactory.config import RecipeConfig, to_yaml
from robofactory.files import write_atomically
from robofactory.html.page import render

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
    joints = [name.partition("/")[2] for name in newest if name.startswith("val_mae/")]
    page = render(
        "training/run.html",
        eyebrow="training",
        title=run.name,
        step=newest.get("step", 0),
        epoch=newest.get("epoch", 0),
        num_updates=num_updates,
        facts=[(name, _number(newest[name])) for name in FACTS if name in newest],
        joint_heads=("joint", *COLUMNS.values()),
        joints=[(joint, *(_number(newest.get(f"{column}/{joint}")) for column in COLUMNS)) for joint in joints],
        pictures={title: (run / file).read_bytes() for file, title in PICTURES.items() if (run / file).is_file()},
        events=[(line["step"], line["event"], line.get("message", "")) for line in lines if "event" in line],
        recipe=to_yaml(recipe),
    )
    write_atomically(run / PAGE, page)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
