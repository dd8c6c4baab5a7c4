"""Trainings of seconds, in processes of their own, for tests and benchmarks of the trainer; and what two runs differ in."""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file

from robofactory import checkpoint
from robofactory.config import load_recipe, load_scene, scene_file, to_yaml
from robofactory.data.episodes import DatasetDescription, DatasetWriter, Episode, encode_png
from robofactory.errors import run_command
from robofactory.paths import dataset_dir, run_dir
from robofactory.training.log import Log
from robofactory.training.train import train

RECIPE, TASK, NUM_EPISODES, LENGTH = "robot_openvla_tiny", "LiftBarrier-rf", 6, 10
JOINTS = (*tuple(f"joint{i}" for i in range(1, 8)), "gripper")
SMALL = [  # 50 frames to train on, 7 steps an epoch
    "model.architecture.image_size=28",
    "model.architecture.dino={embed_dim: 32, depth: 2, num_heads: 2}",
    "model.architecture.siglip={embed_dim: 32, depth: 2, num_heads: 2}",
    "model.architecture.language={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}",
    f"data.num_episodes={NUM_EPISODES}",
    "data.val_ratio=0.2",
    "dataloader.batch_size=8",
    "dataloader.num_workers=0",
    "training.num_epochs=3",
    "training.checkpoint_every=1",
]
OF_THE_CLOCK = ("samples_per_s", "data_wait_share", "peak_memory_gb")


def write_dataset(
    directory: Path,
    num_episodes: int = NUM_EPISODES,
    length: int = LENGTH,
    views: Sequence[str] = ("side", "overhead", "wrist"),
    joints: Sequence[str] = JOINTS,
    scale: float = 1.0,
    is_simulated: bool = True,
) -> None:
    """Frames of four kinds, told apart by the pictures' brightness and by the joints; each kind has its action.

    Args:
        scale: of all numbers but those called gripper, which stay in [-1, 1].
        is_simulated: in a scene of ours.
    """
    random = np.random.default_rng(0)
    table = random.uniform(-1.0, 1.0, (4, len(joints))).astype(np.float32)
    table *= np.array([1.0 if "gripper" in joint else scale for joint in joints], np.float32)
    sizes = {view: (24, 32) for view in views}
    patterns = {view: np.kron(random.integers(0, 70, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8) for view in sizes}
    scene_yaml = to_yaml(load_scene(scene_file(TASK))) if is_simulated else ""
    writer = DatasetWriter(directory, DatasetDescription(scene_yaml, 0, sizes, tuple(joints), fps=20))
    for seed in range(num_episodes):
        kinds = random.integers(0, 4, length)
        images = {view: [encode_png(patterns[view] + np.uint8(60 * kind)) for kind in kinds] for view in sizes}
        proprio = table[kinds] + random.normal(0.0, 0.01, (length, len(joints))).astype(np.float32)
        writer.append(Episode(images, proprio, table[kinds], np.zeros(length, bool), "lift the barrier", seed))
    writer.finalize()


@contextlib.contextmanager
def home(directory: Path, writes_dataset: bool = True) -> Iterator[Path]:
    """`$ROBOFACTORY_HOME` with demonstrations; gives the directory of the run."""
    with mock.patch.dict(os.environ, {"ROBOFACTORY_HOME": str(directory), "WANDB_MODE": "disabled"}):
        if writes_dataset and not dataset_dir(TASK, 0, NUM_EPISODES).exists():
            write_dataset(dataset_dir(TASK, 0, NUM_EPISODES))
        yield run_dir("openvla", TASK, 0, NUM_EPISODES)


def start(*overrides: str, resume: bool = False, draws: bool = False) -> None:
    """Train in this process; without pictures, which take longer than all else together."""
    recipe = load_recipe(RECIPE, [*SMALL, *overrides])
    with contextlib.ExitStack() as stack:
        for method in () if draws else ("_draw", "input_images"):
            stack.enter_context(mock.patch.object(Log, method))
        train("openvla", TASK, 0, recipe, resume, bar_position=0)


def spawn(work: Callable[[], None], rank: int = 0, world_size: int = 1, port: int = 0) -> int:
    """Do something in a process of its own, as the commands do it; its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if world_size > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            run_command(work)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)
    return pid


def wait_for(pid: int) -> int:
    """The exit code; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start_in_processes(world_size: int, *overrides: str, resume: bool = False) -> list[int]:
    """Train in several processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [spawn(lambda: start(*overrides, resume=resume), rank, world_size, port) for rank in range(world_size)]
    return [wait_for(pid) for pid in pids]


def everything(run: Path, name: str = "latest") -> dict[str, Any]:
    """What must be the same bits: weights, the state of everything, and the metrics but for the clock's."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": {k: v for file in (run / name).glob("*.safetensors") for k, v in load_file(file).items()},
        "state": checkpoint.load_training_state(run / name),
        "metrics": [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in lines],
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two of them are not the same to the last bit."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        names = sorted(a.keys() ^ b.keys(), key=str)
        found = [f"{path}/{name} is in one only" for name in names]
        return found + [
            each for name in a.keys() & b.keys() for each in differences(a[name], b[name], f"{path}/{name}")
        ]
    if isinstance(a, Sequence) and not isinstance(a, str):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [each for index in range(len(a)) for each in differences(a[index], b[index], f"{path}/{index}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [f"{path}: {a} and {b}" if not isinstance(a, torch.Tensor) else path]
