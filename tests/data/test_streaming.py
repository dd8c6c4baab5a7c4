"""A dataset behind a URL is the same dataset, in memory and disk that do not grow with it."""

import os
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from demonstrations import VIEWS, description, write_dataset
from fsspec.implementations.local import LocalFileSystem
from test_dataset import SCENE_YAML, resident_mb, same

from robofactory.codec.statistics import Statistics
from robofactory.config import load_recipe
from robofactory.data import streaming
from robofactory.data.dataset import FrameDataset, load_splits
from robofactory.data.episodes import DatasetReader, DatasetWriter, Episode, encode_png
from robofactory.data.order import FrameKey
from robofactory.data.streaming import StreamedReader
from robofactory.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six episodes of 5 to 10 frames."""
    return write_dataset(tmp_path / "far" / "set", num_episodes=6, scene_yaml=SCENE_YAML)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SECONDS_BETWEEN_TRIES", (0.0, 0.0))


def reader_of(source: Path, home: Path, window: int = 2) -> StreamedReader:
    return StreamedReader(f"file://{source}", VIEWS, home / "cache", window)


def files_kept(home: Path) -> list[Path]:
    return list((home / "cache").glob("*/data/chunk-*/*"))


def test_its_frames_are_those_of_the_dataset(source, home):
    streamed, local = reader_of(source, home), DatasetReader(source)
    assert streamed.description == local.description and streamed.instructions == local.instructions
    assert streamed.episode_lengths.tolist() == local.episode_lengths.tolist()
    for episode in (0, 5, 2):
        for index in (0, 4):
            (a, action), (b, other) = streamed.frame(episode, index), local.frame(episode, index)
            assert (action == other).all() and (a.proprio == b.proprio).all() and a.instruction == b.instruction
            assert all((a.images[view] == b.images[view]).all() for view in VIEWS)


def test_opening_fetches_no_episode(source, home):
    (source / "data").rename(source / "elsewhere")
    assert reader_of(source, home).num_frames == 45
    assert files_kept(home) == []


def test_its_statistics_are_those_of_all_episodes(source, home):
    recipe = load_recipe("robot_openvla_tiny", ["data.val_ratio=0.3", f"data.datasets={{file://{source}: 1}}"])
    of_stream = load_splits(Path("unused"), recipe).codec.datasets["set"]
    local = DatasetReader(source)
    expected = Statistics.measure(local.all_actions, local.description.joint_names, "mean_std", ["gripper"])
    assert of_stream.action.to_json() == expected.to_json()
    assert of_stream.proprio.to_json()["max"] == local.all_proprio.max(axis=0).astype(np.float64).tolist()


def test_batches_go_on_from_any_step_on_an_empty_disk(source, home):
    overrides = ["dataloader.batch_size=4", "dataloader.num_workers=0", "data.val_ratio=0.3", "data.stream_window=2"]
    recipe = load_recipe("robot_openvla_tiny", [*overrides, f"data.datasets={{file://{source}: 0.6}}"])

    def steps(first):
        return [
            batch for step in load_splits(Path("unused"), recipe).train_batches(0, 1).epoch(2, first) for batch in step
        ]

    whole = steps(0)
    for path in files_kept(home):
        path.unlink()
    assert all(same(a, b) for a, b in zip(steps(3), whole[3:], strict=True)) and len(whole) > 4


def test_a_file_that_another_process_deleted_or_half_wrote_is_fetched_again(source, home):
    reader = reader_of(source, home)
    expected = reader.frame(3, 1)[1]
    (kept,) = files_kept(home)
    kept.unlink()
    kept.with_name(f"{kept.name}.1234.tmp").write_bytes(b"PAR1")
    assert (reader.frame(3, 1)[1] == expected).all() and kept.exists()


def test_another_dataset_at_the_same_place_is_not_mistaken_for_the_one_before(source, home):
    before = reader_of(source, home).frame(0, 0)[1]
    (source.parent / "set").rename(source.parent / "old")
    write_dataset(source, num_episodes=5, scene_yaml=SCENE_YAML, first_seed=7, fps=10)
    now = reader_of(source, home)
    assert now.description.fps == 10 and len({path.parents[2] for path in files_kept(home)}) == 1
    assert (now.frame(0, 0)[1] == before).all() and len({path.parents[2] for path in files_kept(home)}) == 2


def test_a_network_that_fails_for_a_moment_is_asked_again(source, home, monkeypatch):
    reader, read, failures = (
        reader_of(source, home),
        LocalFileSystem.cat_file,
        iter([True, True, False, True, True, True]),
    )

    def unreliable(*args, **options):
        if next(failures):
            raise OSError(110, "Connection timed out")
        return read(*args, **options)

    monkeypatch.setattr(LocalFileSystem, "cat_file", unreliable)
    reader.frame(0, 0)
    with pytest.raises(
        UserError, match=r"cannot read file://.*file-001\.parquet \(.*timed out\); check the network"
    ) as error:
        reader.frame(1, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), httpx.ConnectError("no\nroute"), OSError()]
)
def test_whatever_a_network_says_is_one_line(source, home, monkeypatch, error):
    """httpx's errors, which the hub's file system raises, are no OSError."""
    reader, tries = reader_of(source, home), []

    def fail(*args, **options):
        tries.append(args)
        raise error

    monkeypatch.setattr(LocalFileSystem, "cat_file", fail)
    with pytest.raises(UserError, match=r"cannot read file://") as stopped:
        reader.frame(0, 0)
    assert "\n" not in str(stopped.value) and len(tries) == (1 if isinstance(error, PermissionError) else 3)


def test_a_file_that_is_far_too_large_is_not_fetched(source, home, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_BYTES", 2000)
    with pytest.raises(UserError, match=r"meta/info\.json is no file of at most 2,000 bytes"):
        reader_of(source, home)


def test_what_cannot_be_read_is_one_line(source, home):
    for url, views, message in (
        (f"file://{source}x", VIEWS, r"no finished dataset at file://.*setx: it has no meta/info\.json"),
        ("nowhere://set", VIEWS, "cannot read nowhere://set: Protocol not known"),
        (f"file://{source}", ("front",), r"has no view 'front'; it has side, overhead, wrist"),
    ):
        with pytest.raises(UserError, match=message) as error:
            StreamedReader(url, views, home / "cache", 2)
        assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------- size

NUM_EPISODES, LENGTH, SIZE = 16, 30, 160  # pictures of noise: 37 MB


@pytest.fixture
def large(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    directory = tmp_path / "far" / "large"
    writer = DatasetWriter(directory, description(image_sizes={"front": (SIZE, SIZE)}, scene_yaml=""))
    for seed in range(NUM_EPISODES):
        pictures = [encode_png(random.integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for _ in range(LENGTH)]
        numbers = random.uniform(-1, 1, (LENGTH, 8)).astype(np.float32)
        writer.append(Episode({"front": pictures}, numbers, numbers, np.zeros(LENGTH, bool), "lift", seed))
    writer.finalize()
    return directory


@pytest.mark.parametrize("is_streamed", [False, True])
def test_memory_and_disk_do_not_grow_with_the_dataset(large, home, monkeypatch, is_streamed):
    """A local dataset is read in place, and a streamed one leaves its last episodes on the disk."""
    monkeypatch.setattr(streaming, "SPARE_EPISODES", 2)
    overrides = ["data.views=[front]", "data.val_ratio=0.1", "dataloader.num_workers=0", "data.stream_window=2"]
    location = f"file://{large}" if is_streamed else str(large)
    recipe = load_recipe("robot_openvla_tiny", [*overrides, f"data.datasets={{{location}: 1}}"])
    data = load_splits(Path("unused"), recipe)
    before = most = None
    for number, step in enumerate(data.train_batches(0, 1).epoch(0)):
        list(step)
        if is_streamed:
            assert len(files_kept(home)) <= 4
        if number == 2:  # everything has been used once
            before = most = resident_mb(os.getpid())
        elif number > 2:
            most = max(most, resident_mb(os.getpid()))
    size_mb = sum(path.stat().st_size for path in large.glob("data/**/*.parquet")) / 1e6
    assert size_mb > 30 and most - before < size_mb / 4, f"{most - before:.1f} MB more for {size_mb:.1f} MB of data"


def test_workers_share_the_files(source, home):
    overrides = ["dataloader.batch_size=4", "data.val_ratio=0.3", "data.stream_window=2"]

    def batches(num_workers):
        recipe = load_recipe("robot_openvla_tiny", [*overrides, f"data.datasets={{file://{source}: 1}}", f"dataloader.num_workers={num_workers}"])  # fmt: skip
        return [batch for step in load_splits(Path("unused"), recipe).train_batches(0, 1).epoch(0) for batch in step]

    assert all(same(a, b) for a, b in zip(batches(0), batches(2), strict=True))
    assert len(files_kept(home)) == 4, "those to train on; each is there once"


def test_the_picture_of_a_frame_reaches_the_batch(source, home):
    recipe = load_recipe("robot_openvla_tiny", ["data.val_ratio=0.3", f"data.datasets={{file://{source}: 1}}"])
    streamed, local = load_splits(Path("unused"), recipe), DatasetReader(source, VIEWS)
    frames = FrameDataset(streamed.train, streamed.codec, augment_seed=None)
    episode = streamed.train[0].episodes[1]
    row = int(streamed.train[0].lengths[0]) + 2
    expected = streamed.codec.encode_example(*local.frame(episode, 2))
    assert torch.equal(frames[FrameKey(0, row)].pixel_values, expected.pixel_values)
