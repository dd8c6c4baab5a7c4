"""The doors: each a command that reads what others wrote, a small valid input for it, and the files in that to damage."""

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest import mock

from benchmarks.mutations import fixtures
from benchmarks.mutations.damage import FILE, NAMED, Kinds
from benchmarks.mutations.fixtures import RUN, SETTLED, TASK, TRAIN
from benchmarks.mutations.hdf5 import HDF5
from benchmarks.mutations.parquet import PARQUET
from benchmarks.mutations.records import TFRECORD
from benchmarks.mutations.settings import OVERRIDES, SETTINGS
from benchmarks.mutations.tensors import SAFETENSORS
from benchmarks.mutations.trees import JSON, LINES, STATE, YAML

STRICT_JSON = JSON.judged(is_harmless=False)  # ours: no unknown keys
STRICT_YAML = YAML.judged(is_harmless=False, is_loss=False)  # and what is cut at the end of a line is YAML still
NAMED_PARQUET, SHARDS = Kinds(NAMED | PARQUET), Kinds(NAMED | SAFETENSORS)


@dataclass(frozen=True)
class Door:
    """A command and its input.

    make: writes a valid input below a directory, in `given` and `home`.
    command: what follows `robofactory`; {root} stands for that directory. Or a function of it.
    files: pattern below the directory -> the kinds of damage to the files that match.
    results: patterns below the directory of what the command makes; `stdout` for what it prints.
    settle: after the damage, so that it reaches the reader: sums and archives that have to fit it.
    said_by_code: see `trial.Trial`.
    every: of so many rounds it takes part in one: its command takes longer than others.
    """

    make: Callable[[Path], None]
    command: tuple[str, ...] | Callable[[Path], None]
    files: Mapping[str, Kinds]
    results: tuple[str, ...]
    settle: Callable[[Path], None] | None = None
    said_by_code: tuple[int, ...] = ()
    every: int = 1


def run_stage(root: Path, command: tuple[str, ...]) -> None:
    """As `robofactory STAGE ...`; a file of arguments adds its lines."""
    from robofactory.__main__ import STAGES, main

    sys.modules.pop(STAGES[command[0]][0], None)  # it runs as a script, which nothing has imported
    sys.argv = ["robofactory", *(word.replace("{root}", str(root)) for word in command)]
    if (more := root / OVERRIDES).is_file():
        sys.argv += json.loads(more.read_text())
    main()


def without_pictures(command: tuple[str, ...]) -> Callable[[Path], None]:
    """A training without its figures, which take longer than all else together."""

    def run(root: Path) -> None:
        from robofactory.training.log import Log

        with mock.patch.object(Log, "_draw"), mock.patch.object(Log, "input_images"):
            run_stage(root, command)

    return run


def act(root: Path) -> None:
    """Load a policy, and print what it does."""
    from robofactory.policy import Policy

    print(Policy.load(root / RUN / "latest").act([fixtures.observation()]).tolist())


def load_weights(root: Path) -> None:
    """Load published weights, and print the sum of each tensor."""
    import torch

    from robofactory.model.weights import load_openvla

    model = load_openvla(root / "given/openvla", True, dtype=torch.bfloat16)
    print({name: tensor.double().sum().item() for name, tensor in model.state_dict().items()})


def resum(root: Path) -> None:
    """Sizes and sums in a manifest, so that what is damaged gets as far as its reader."""
    manifest = root / RUN / "latest/manifest.json"
    content = json.loads(manifest.read_text())
    for name in content["files"]:
        path = manifest.parent / name
        if path.is_file() and path.stat().st_size < 10**8:
            data = path.read_bytes()
            content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps(content))


def pack(root: Path) -> None:
    """The directory as an archive beside it, as `.zarr.zip` is."""
    folder = root / "unpacked"
    (root / "given").mkdir(exist_ok=True)
    with zipfile.ZipFile(root / "given/demo.zarr.zip", "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.glob("**/*")):
            if path.is_file() and path.stat().st_size < 10**8:
                archive.write(path, path.relative_to(folder))


IMPORTED = ("home/data/*/**/*",)
TRAINED = ("home/checkpoints/openvla/*/latest/codec.json", "home/checkpoints/openvla/*/latest/*.safetensors")
META_2_1 = {"given/meta/info.json": JSON, "given/meta/episodes.jsonl": LINES, "given/meta/tasks.jsonl": LINES, "given/meta/episodes_stats.jsonl": LINES}  # fmt: skip
META_3_0 = {"given/meta/info.json": JSON, "given/meta/stats.json": JSON, "given/meta/tasks.parquet": PARQUET, "given/meta/episodes/*/*.parquet": PARQUET}  # fmt: skip
DATA, VIDEOS = {"given/data/*/*.parquet": NAMED_PARQUET}, {"given/videos/**/*.mp4": NAMED}
ZARR_2 = {"**/.z*": STRICT_JSON, "data/*/[0-9]*": FILE, "meta/*/[0-9]*": FILE}
ZARR_3 = {"**/zarr.json": STRICT_JSON, "data/*/c/**/[0-9]*": FILE, "meta/*/c/[0-9]*": FILE}
OURS = {"meta/robofactory.json": STRICT_JSON, "meta/info.json": JSON, "meta/stats.json": JSON, "meta/tasks.parquet": PARQUET, "meta/episodes/*/*.parquet": PARQUET, "data/*/*.parquet": PARQUET}  # fmt: skip
CHECKPOINT = {"codec.json": STRICT_JSON, "config.yaml": STRICT_YAML, "modules.safetensors": SAFETENSORS}
LEROBOT = ("import", "lerobot", "{root}/given", "--task", "Push", "--workers", "0")


def below(directory: str, files: Mapping[str, Kinds]) -> dict[str, Kinds]:
    return {f"{directory}/{pattern}": kinds for pattern, kinds in files.items()}


DOORS: dict[str, Door] = {
    "lerobot-2.1-image": Door(fixtures.lerobot("v2.1_image"), LEROBOT, META_2_1 | DATA, IMPORTED),
    "lerobot-2.1-video": Door(fixtures.lerobot("v2.1_video"), LEROBOT, META_2_1 | DATA | VIDEOS, IMPORTED),
    "lerobot-3.0-image": Door(fixtures.lerobot("v3.0_image"), LEROBOT, META_3_0 | DATA, IMPORTED),
    "lerobot-3.0-video": Door(fixtures.lerobot("v3.0_video"), LEROBOT, META_3_0 | DATA | VIDEOS, IMPORTED),
    "maniskill": Door(
        fixtures.maniskill,
        ("import", "maniskill", "{root}/given", "--task", "LiftBarrier-rf", "--workers", "0"),
        {"given/demo.json": JSON, "given/demo.h5": HDF5},
        IMPORTED,
    ),
    "zarr-2": Door(
        fixtures.zarr_of(2),
        ("import", "zarr", "{root}/given/demo.zarr", "--task", "Push", "--instruction", "push", "--workers", "0"),
        below("given/demo.zarr", ZARR_2),
        IMPORTED,
    ),
    "zarr-3": Door(
        fixtures.zarr_of(3),
        ("import", "zarr", "{root}/given/demo.zarr", "--task", "Push", "--instruction", "push", "--workers", "0"),
        below("given/demo.zarr", ZARR_3),
        IMPORTED,
    ),
    "zarr-zip": Door(
        fixtures.zarr_of(2, "unpacked"),
        ("import", "zarr", "{root}/given/demo.zarr.zip", "--task", "Push", "--instruction", "push", "--workers", "0"),
        below("unpacked", ZARR_2),
        IMPORTED,
        settle=pack,
    ),
    "rlds": Door(
        fixtures.rlds,
        ("import", "rlds", "{root}/given", "--task", "Push", "--fps", "5", "--workers", "0", *fixtures.RLDS_CAMERAS),
        {"given/*.tfrecord*": TFRECORD, "given/dataset_info.json": JSON, "given/features.json": JSON},
        IMPORTED,
    ),
    "inspect": Door(
        fixtures.dataset("given/set"),
        ("inspect", "{root}/given/set", "--output", "{root}/home/page.html"),
        below("given/set", OURS),
        ("stdout",),
        said_by_code=(1,),
    ),
    "train-data": Door(
        fixtures.dataset(f"home/data/{fixtures.DATASET}"),
        TRAIN,
        below(f"home/data/{fixtures.DATASET}", OURS),
        TRAINED,
        every=3,
    ),
    "train-stream": Door(
        fixtures.dataset("given/set"),
        without_pictures((*TRAIN, "data.datasets={file://{root}/given/set: 1}")),
        below("given/set", OURS),
        TRAINED,
    ),
    "recipe": Door(
        fixtures.recipe,
        without_pictures(("train", "--task", TASK, "--recipe", "{root}/given/recipe.yaml", "training.max_steps=1", *SETTLED)),
        {"given/recipe.yaml": STRICT_YAML},
        TRAINED,
    ),
    "scene": Door(
        fixtures.scene,
        without_pictures((*TRAIN, "--config", "{root}/given/scene.yaml", *fixtures.PICTURES)),
        {"given/scene.yaml": STRICT_YAML},
        TRAINED,
    ),
    "overrides": Door(
        fixtures.overrides,
        without_pictures(("train", "--task", TASK, "--recipe", "{root}/recipe.yaml", *SETTLED)),
        {OVERRIDES: SETTINGS},
        TRAINED,
    ),
    "weights": Door(
        fixtures.published,
        load_weights,
        {
            "given/openvla/config.json": JSON,
            "given/openvla/model.safetensors.index.json": JSON,
            "given/openvla/*.safetensors": SHARDS,
        },
        ("stdout",),
    ),
    "weights-memory": Door(
        fixtures.published,
        ("memory", "--recipe", "robot_openvla", "model.model_name={root}/given/openvla"),
        {"given/openvla/config.json": JSON},
        ("stdout",),
    ),
    "weights-summary": Door(
        fixtures.published,
        ("summary", "model.model_name={root}/given/openvla"),
        {"given/openvla/config.json": JSON},
        ("stdout",),
    ),
    "weights-train": Door(
        fixtures.published_and_data,
        without_pictures(fixtures.FINE_TUNE),
        {
            "given/openvla/config.json": JSON,
            "given/openvla/tokenizer.json": STRICT_JSON,
            "given/openvla/preprocessor_config.json": JSON,
            "given/openvla/*.safetensors": SHARDS,
        },
        TRAINED,
        every=3,
    ),
    "checkpoint": Door(fixtures.trained, act, below(f"{RUN}/epoch_1", CHECKPOINT), ("stdout",), settle=resum),
    "checkpoint-manifest": Door(
        fixtures.trained, act, below(f"{RUN}/epoch_1", {"manifest.json": STRICT_JSON}), ("stdout",)
    ),
    "resume": Door(
        fixtures.trained,
        without_pictures((*TRAIN, "training.max_steps=2", "--resume")),
        below(f"{RUN}/epoch_1", CHECKPOINT | {"training_state.pt": STATE}) | {f"{RUN}/metrics.jsonl": LINES},
        TRAINED,
        settle=resum,
        every=2,
    ),
    "merge": Door(
        fixtures.fine_tuned,
        ("merge", f"{{root}}/{RUN}/latest", "{root}/home/merged", "--frames", "1", "--device", "cpu"),
        below(
            f"{RUN}/epoch_1",
            {"codec.json": STRICT_JSON, "config.yaml": STRICT_YAML, "adapter_model.safetensors": SAFETENSORS, "adapter_config.json": STRICT_JSON},
        ),
        ("home/merged/*.json", "home/merged/*.safetensors"),
        settle=resum,
        every=3,
    ),
    "compare": Door(
        fixtures.results,
        ("compare", "{root}/given/a", "{root}/given/b"),
        {"given/a/summary.json": STRICT_JSON, "given/a/episodes.json": STRICT_JSON},
        ("stdout",),
    ),
    "compare-html": Door(
        fixtures.results,
        ("compare", "{root}/given/a", "{root}/given/b", "--html", "{root}/home/page.html"),
        {"given/a/summary.json": STRICT_JSON, "given/a/episodes.json": STRICT_JSON, "given/a/videos/*": NAMED.judged(is_loss=False)},
        ("stdout", "home/page.html"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A kind of damage to a kind of file at a door."""

    pattern: str
    kind: str


def cells(name: str) -> list[Cell]:
    """All that can be done at a door, in an order of its own."""
    found = [Cell(pattern, kind) for pattern, kinds in DOORS[name].files.items() for kind in kinds]
    Random(name).shuffle(found)
    return found


def chosen_file(root: Path, pattern: str, random: Random) -> Path:
    return random.choice(sorted(path for path in root.glob(pattern) if path.is_file() and not os.path.islink(path)))
