"""How many samples a second one core feeds: three views stored at 224 px -> decoded, cropped, resized, normalised.

    python benchmarks/feeding.py [--seconds 5]

Against what a plain per-image pipeline of Pillow and torchvision's operations gives (open, crop, resize, to tensor, two
normalisations), on the same files, the two taking turns. CPU time of one thread. Wanted: 300 samples/s. The pictures are
two demonstrations for each visual detail, recorded first: decoding takes longer the more there is to see.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional

from robofactory.codec.codec import Codec
from robofactory.codec.images import MEANS, STDS
from robofactory.codec.statistics import DatasetStatistics
from robofactory.config import load_recipe
from robofactory.data.dataset import FrameDataset, FrameKey, Part
from robofactory.data.episodes import DatasetReader, encode_png

TASK, SIZE, VIEWS = "LiftBarrier-rf", 224, ("side", "overhead", "wrist")


def record(home: Path, visual_detail: str) -> Path:
    """Two demonstrations; where agent 0's are."""
    command = [sys.executable, "-m", "robofactory.demos.record", "--task", TASK, "--num", "2"]
    command += ["--visual_detail", visual_detail, "--width", str(SIZE), "--height", str(SIZE)]
    subprocess.run(command, env=os.environ | {"ROBOFACTORY_HOME": str(home)}, check=True, stdout=subprocess.DEVNULL)
    return home / "data" / f"{TASK}_Agent0_2"


def plain(files: list[bytes], generator: torch.Generator) -> torch.Tensor:
    """What one would write: image by image, with Pillow and torchvision."""
    views = []
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = round(0.9**0.5 * SIZE)
        top, left = torch.randint(0, SIZE - side + 1, (2,), generator=generator).tolist()
        image = functional.resized_crop(
            image, top, left, side, side, [SIZE, SIZE], functional.InterpolationMode.BICUBIC
        )
        tensor = functional.to_tensor(image)
        views.append(torch.cat([functional.normalize(tensor, m, s) for m, s in zip(MEANS, STDS, strict=True)]))
    return torch.stack(views)


def rate(works: dict[str, Callable[[int], object]], num_frames: int, seconds: float) -> dict[str, float]:
    """Calls a second of CPU time, by the median; the works take turns, each on all frames, as a data worker would."""
    times: dict[str, list[float]] = {name: [] for name in works}
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for name, work in works.items():
            for frame in range(num_frames):
                started = time.thread_time()
                work(frame)
                times[name].append(time.thread_time() - started)
    return {name: 1.0 / statistics.median(values) for name, values in times.items()}


def measure(directory: Path, seconds: float) -> tuple[float, dict[str, float]]:
    """KB of a stored view, and samples a second of each pipeline."""
    image_size = f"model.architecture.image_size={SIZE}"
    recipe = load_recipe("robot_openvla_tiny", [image_size, "training.augment_crop_ratio=0.9"])
    reader = DatasetReader(directory, VIEWS)
    numbers = reader.all_actions, reader.all_proprio, reader.description.joint_names, "mean_std", {}, 1
    codec = Codec.create(recipe, {"some": DatasetStatistics.measure(*numbers)})
    frames = FrameDataset([Part("some", reader, (0, 1))], codec, augment_seed=0)
    files = [[encode_png(image) for image in frames.raw(k)[0].images.values()] for k in range(len(frames))]
    generator = torch.Generator().manual_seed(0)
    works = {
        "plain": lambda k: plain(files[k], generator),
        "ours": lambda k: codec.collate([frames[FrameKey(0, k)]]),
        "uint8": lambda k: frames[FrameKey(0, k)],
    }
    kilobytes = float(np.mean([len(data) for step in files for data in step])) / 1000
    return kilobytes, rate(works, len(frames), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each kind of pictures (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'detail':<8}{'KB a view':>10}{'plain':>9}{'ours':>9}{'times':>8}   ours without normalising, which a GPU does"
    )
    for visual_detail in ("low", "full"):
        with tempfile.TemporaryDirectory() as directory:
            kilobytes, per_s = measure(record(Path(directory), visual_detail), arguments.seconds)
        times = per_s["ours"] / per_s["plain"]
        print(f"{visual_detail:<8}{kilobytes:>10.1f}{per_s['plain']:>9.0f}{per_s['ours']:>9.0f}{times:>8.2f}{per_s['uint8']:>9.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
