"""The valid inputs: small, made here or written by the library whose format it is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.small_runs import JOINTS, NUM_EPISODES, SMALL, TASK, write_dataset

if TYPE_CHECKING:
    from robofactory.evaluation.results import EpisodeResult

LEROBOT = Path(__file__).parents[2] / "tests/data/fixtures"  # by lerobot itself
LENGTHS, HEIGHT, WIDTH = (5, 8), 48, 64
DATASET = f"{TASK}_Agent0_{NUM_EPISODES}"
RUN = f"home/checkpoints/openvla/{DATASET}"
# Of any other number of demonstrations they would be recorded first; a worker is a process of its own.
SETTLED = (f"data.num_episodes={NUM_EPISODES}", "dataloader.num_workers=0")
TRAIN = ("train", "--task", TASK, "--recipe", "robot_openvla_tiny", *SMALL, "training.max_steps=1")
PICTURES = ("data.visual_detail=full", "data.image_width=320", "data.image_height=240")  # of the task's own scene
FINE_TUNE = (
    "train", "--task", TASK, "--recipe", "robot_openvla", "model.model_name=given/openvla", "model.lora_rank=4",
    "model.torch_dtype=float32", *SETTLED, "data.val_ratio=0.2", "data.views=[side]",
    "dataloader.batch_size=4", "training.num_epochs=1", "training.max_steps=1",
)  # fmt: skip
CAMERAS = ("front", "wrist")
RLDS_CAMERAS = ("--camera", *(f"{camera}=observation/{camera}_image" for camera in CAMERAS))


def numbers(episode: int, length: int, columns: int) -> np.ndarray:
    """Smooth motions, so that nothing is found wrong with them."""
    way = np.linspace(0.0, 3.0, length)[:, None] + np.arange(columns) + episode
    return np.sin(way).astype(np.float32) * 0.9


def pictures(camera: int, episode: int, length: int) -> np.ndarray:
    """uint8 [n, h, w, 3]: slopes, and a level that only this frame has."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    each = [np.stack([2 * x + 40, 2 * y + 40, np.full_like(x, 20 + 90 * camera + 8 * frame + 40 * episode)], -1) for frame in range(length)]  # fmt: skip
    return np.array(each).astype(np.uint8)


def lerobot(version: str) -> Callable[[Path], None]:
    return lambda root: shutil.copytree(LEROBOT / f"lerobot_{version}", root / "given") and None


def maniskill(root: Path) -> None:
    import h5py

    (root / "given").mkdir()
    with h5py.File(root / "given/demo.h5", "w") as file:
        for episode, length in enumerate(LENGTHS):
            qpos = np.concatenate(
                [numbers(episode, length + 1, 7), np.full((length + 1, 2), 0.015, np.float32)], axis=1
            )
            file[f"traj_{episode}/actions/panda-0"] = numbers(episode, length, 8)
            file[f"traj_{episode}/obs/agent/panda-0/qpos"] = qpos
            for number, camera in enumerate(("head_camera_agent0", "head_camera_global")):
                name = f"traj_{episode}/obs/sensor_data/{camera}/rgb"
                file.create_dataset(name, data=pictures(number, episode, length + 1), compression="gzip")
    episodes = [
        {"episode_id": e, "episode_seed": e, "elapsed_steps": n, "control_mode": "pd_joint_pos", "success": True}
        for e, n in enumerate(LENGTHS)
    ]
    env_info = {"env_id": TASK, "env_kwargs": {"sim_config": {"control_freq": 20}}}
    (root / "given/demo.json").write_text(json.dumps({"env_info": env_info, "episodes": episodes}))


def zarr_of(version: int, place: str = "given/demo.zarr") -> Callable[[Path], None]:
    def write(root: Path) -> None:
        import zarr

        group = zarr.open_group(root / place, mode="w", zarr_format=version)
        states = np.concatenate([numbers(e, n, 3) for e, n in enumerate(LENGTHS)])
        arrays = {f"data/{camera}": np.concatenate([pictures(i, e, n) for e, n in enumerate(LENGTHS)]) for i, camera in enumerate(CAMERAS)}  # fmt: skip
        arrays |= {
            "data/action": states + np.float32(0.05),
            "data/state": states,
            "meta/episode_ends": np.cumsum(LENGTHS),
        }
        for name, values in arrays.items():
            chunks = (4, *values.shape[1:])
            group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks)[:] = values

    return write


def rlds(root: Path) -> None:
    from benchmarks.mutations.pictures import as_png
    from benchmarks.mutations.records import write_records
    from robofactory.data.imports.tfrecord import EXAMPLE

    (root / "given").mkdir()
    for episode, length in enumerate(LENGTHS):
        message = EXAMPLE()
        features = message.features.feature
        features["steps/action"].float_list.value.extend((numbers(episode, length, 3) + 0.05).reshape(-1).tolist())
        features["steps/observation/state"].float_list.value.extend(numbers(episode, length, 3).reshape(-1).tolist())
        features["steps/language_instruction"].bytes_list.value.extend([b"push the cube"] * length)
        features["steps/is_first"].int64_list.value.extend([1] + [0] * (length - 1))
        features["steps/reward"].float_list.value.extend([0.0] * length)
        from PIL import Image

        for number, camera in enumerate(CAMERAS):
            files = [as_png(Image.fromarray(picture)) for picture in pictures(number, episode, length)]
            features[f"steps/observation/{camera}_image"].bytes_list.value.extend(files)
        write_records(root / f"given/push-train.tfrecord-0000{episode}-of-00002", [message.SerializeToString()])
    info = {
        "name": "push",
        "version": "1.0.0",
        "splits": [{"name": "train", "shardLengths": ["1", "1"], "numBytes": "9"}],
    }
    (root / "given/dataset_info.json").write_text(json.dumps(info))
    (root / "given/features.json").write_text(json.dumps(rlds_features()))


def rlds_features() -> dict:
    """As TensorFlow Datasets writes them."""

    def tensor(dtype: str, *shape: int) -> dict:
        dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
        return {"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor", "tensor": {"shape": dimensions, "dtype": dtype, "encoding": "none"}}  # fmt: skip

    def group(**features: dict) -> dict:
        return {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "featuresDict": {"features": features}}  # fmt: skip

    image = {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image", "image": {"shape": {"dimensions": [str(HEIGHT), str(WIDTH), "3"]}, "dtype": "uint8", "encodingFormat": "png"}}  # fmt: skip
    observation = group(state=tensor("float32", 3), **{f"{camera}_image": image for camera in CAMERAS})
    step = group(
        action=tensor("float32", 3),
        observation=observation,
        language_instruction={"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}},
        is_first=tensor("bool"),
        reward=tensor("float32"),
    )
    steps = {"pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset", "sequence": {"feature": step, "length": "-1"}}  # fmt: skip
    return group(steps=steps)


# ------------------------------------------------------------------------------------------------------------- ours


def dataset(place: str) -> Callable[[Path], None]:
    return lambda root: write_dataset(root / place)


def recipe(root: Path) -> None:
    from robofactory.config import load_recipe, to_yaml

    (root / "given").mkdir()
    (root / "given/recipe.yaml").write_text(to_yaml(load_recipe("robot_openvla_tiny", SMALL)))
    write_dataset(root / "home/data" / DATASET)


def scene(root: Path) -> None:
    from robofactory.config import load_scene, scene_file, to_yaml

    (root / "given").mkdir()
    (root / "given/scene.yaml").write_text(to_yaml(load_scene(scene_file(TASK))))
    write_dataset(root / "home/data" / DATASET)


def overrides(root: Path) -> None:
    from benchmarks.mutations.settings import OVERRIDES
    from robofactory.config import load_recipe, to_yaml

    (root / "recipe.yaml").write_text(to_yaml(load_recipe("robot_openvla_tiny", SMALL)))
    (root / OVERRIDES).write_text('["training.max_steps=1"]')
    write_dataset(root / "home/data" / DATASET)


def published(root: Path) -> None:
    from tests.published import config, write_published

    write_published(root / "given/openvla")
    preprocessor = {
        "processor_class": "PrismaticProcessor", "image_processor_type": "PrismaticImageProcessor",
        "use_fused_vision_backbone": True, "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, *config()["image_sizes"]], [3, *config()["image_sizes"]]],
        "interpolations": ["bicubic", "bicubic"],
        "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]], "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
        "tvf_normalize_params": [
            {"inplace": False, "mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
            {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        ],
        "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": [28, 28]}] * 2,
        "tvf_crop_params": [{"output_size": [28, 28]}] * 2,
        "tvf_do_letterbox": False, "tvf_letterbox_fill": None,
    }  # fmt: skip
    (root / "given/openvla/preprocessor_config.json").write_text(json.dumps(preprocessor))


def published_and_data(root: Path) -> None:
    published(root)
    write_dataset(root / "home/data" / DATASET)


def observation():
    from robofactory.shapes import Observation

    random = np.random.default_rng(0)
    images = {view: random.integers(0, 256, (24, 32, 3), np.uint8) for view in ("side", "overhead", "wrist")}
    return Observation(images, random.uniform(-1, 1, len(JOINTS)).astype(np.float32), "lift the barrier")


def _command(root: Path, command: tuple[str, ...]) -> None:
    from benchmarks.mutations.doors import run_stage

    os.environ["ROBOFACTORY_HOME"] = str(root / "home")
    run_stage(root, command)


def trained(root: Path) -> None:
    """A run of one step, from scratch."""
    write_dataset(root / "home/data" / DATASET)
    _command(root, TRAIN)
    _as_epoch_1(root)


def fine_tuned(root: Path) -> None:
    """A run of one step on published weights."""
    published_and_data(root)
    _command(root, FINE_TUNE)
    _as_epoch_1(root)


def _as_epoch_1(root: Path) -> None:
    assert (root / RUN / "latest").resolve().name == "epoch_1", list((root / RUN).iterdir())


def results(root: Path) -> None:
    """Two evaluations of six layouts, with their videos."""
    from robofactory.config import load_scene, scene_file, to_yaml
    from robofactory.evaluation import results
    from robofactory.evaluation.results import Evaluation, Protocol
    from robofactory.evaluation.rollout import EpisodeVideo

    for name, outcomes in {
        "a": "failure success failure success crash failure",
        "b": " ".join(["success"] * 6),
    }.items():
        protocol = Protocol(
            task=TASK, policy="openvla", checkpoint="epoch_8", drivers=["openvla", "expert"],
            checkpoints=["/runs/epoch_8", None], fingerprints=["ab" * 32, None], weights=["cd" * 32, None],
            first_seed=10_000, num_episodes=6, until=None, max_steps=300, temperature=0.0, batch_size=4,
            ablation=None, scene=to_yaml(load_scene(scene_file(TASK))), simulator="cpu", renderer="llvmpipe",
            device="cpu, some chip, 1 threads", versions={"torch": "2.14.1"},
        )  # fmt: skip
        episodes = [_episode(10_000 + index, outcome) for index, outcome in enumerate(outcomes.split())]
        directory = root / "given" / name
        results.save(Evaluation(protocol, episodes), directory)
        for episode in episodes:
            if episode.video is not None:
                with EpisodeVideo(directory / episode.video, 20, ["agent 0", "agent 1"]) as video:
                    for step in range(3):
                        video.add([observation(), observation()], f"step {step}")


def _episode(seed: int, outcome: str) -> "EpisodeResult":
    from robofactory.evaluation.results import EpisodeResult
    from robofactory.evaluation.rollout import video_name
    from robofactory.sim.tasks.lift_barrier.stages import DID_ITS_PART, NEVER_HELD

    if outcome == "crash":
        return EpisodeResult(seed, outcome, 0, 1.0, False, [], [], "RuntimeError: the driver", {}, None, None, "", None)
    failed_at, reason = ([NEVER_HELD, DID_ITS_PART], "agent 0 never held it") if outcome == "failure" else ([], None)
    measures = {"end_height_m_0": 0.21, "end_height_m_1": 0.2, "tilt_deg": 1.5}
    numbers = (measures, 31.0, 2.75, "ef" * 32, video_name(seed))
    return EpisodeResult(seed, outcome, 70, 2.5, True, ["hold", "hold"], failed_at, reason, *numbers)
