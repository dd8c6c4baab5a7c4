"""How long the codec takes for one sample, as a data worker sees it: one process, one thread."""

import argparse
import io
import statistics
import time
from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="example: python benchmarks/preprocessing.py --repeats 500",
    )
    parser.add_argument("--repeats", type=int, default=300, help="measurements of each row; the median is printed")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    print(f"{'per sample of 3 views, 8 actions':<42} {'median ms':>10}")
    for width, height, image_size in ((128, 96, 84), (320, 240, 84), (320, 240, 224)):
        measure_size(width, height, image_size, args.repeats)


def measure_size(width: int, height: int, image_size: int, repeats: int) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from robofactory.codec.codec import Codec
    from robofactory.codec.statistics import DatasetStatistics
    from robofactory.config import ArchitectureConfig, LanguageConfig, ModelConfig, RecipeConfig, TowerConfig
    from robofactory.shapes import Observation

    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (1000, 8)).astype(np.float32)
    tower = TowerConfig(48, 2, 3)
    architecture = ArchitectureConfig(image_size, tower, tower, LanguageConfig(64, 128, 2, 4))
    recipe = RecipeConfig(model=ModelConfig(use_proprio=True, use_lora=False, architecture=architecture))
    names = [f"joint_{i}" for i in range(7)] + ["gripper"]
    codec = Codec.create(recipe, {"some": DatasetStatistics.measure(actions, actions, names, "mean_std", {}, 1)})
    shading = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    pictures = {view: (shading * (0.5, 0.7, 0.9)).astype(np.uint8) for view in codec.views}
    observation = Observation(pictures, actions[0], "lift the barrier")
    files = {view: png(picture) for view, picture in pictures.items()}
    generator = torch.Generator().manual_seed(0)

    def decode() -> None:
        for data in files.values():
            np.asarray(Image.open(io.BytesIO(data)))

    encode_time = median_ms(lambda: codec.encode_example(observation, actions[0], generator), repeats)
    size = f"{width}x{height}"
    print(f"{size:<8} -> {image_size:<3}  encode (crop, resize, all ids)  {encode_time:10.2f}")
    print(f"{size:<8}         decode the PNGs (not codec)    {median_ms(decode, repeats):10.2f}")


def png(picture: "np.ndarray") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def median_ms(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[10:])  # without the first ones: caches fill


if __name__ == "__main__":
    main()
