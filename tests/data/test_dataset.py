"""From frames on disk to batches: nothing leaks between the parts, and chance depends on seed and epoch alone."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from demonstrations import VIEWS, description, episode, write_dataset
from test_order import frame_order

from robofactory.config import load_recipe, load_scene, look_of, scene_file, to_yaml
from robofactory.data.dataset import Batches, FrameDataset, Splits, load_splits, split_episodes
from robofactory.data.episodes import DatasetReader, DatasetWriter
from robofactory.data.order import FrameKey
from robofactory.errors import UserError

RECIPE = load_recipe(
    "robot_openvla_tiny", ["dataloader.batch_size=4", "dataloader.num_workers=0", "data.val_ratio=0.3"]
)
SCENE_YAML = to_yaml(load_scene(scene_file("LiftBarrier-rf")))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "set", num_episodes=6, scene_yaml=SCENE_YAML)


@pytest.fixture
def splits(directory: Path) -> Splits:
    return load_splits(directory, RECIPE)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True) if x is not None)


# ------------------------------------------------------------------------------------------------------- your own data


def test_proprio_has_names_of_its_own(tmp_path):
    names = tuple("stuvwxyz")
    splits = load_splits(write_dataset(tmp_path / "set", scene_yaml="", proprio_names=names), RECIPE)
    assert splits.codec.look == {} and splits.codec.proprio_statistics.names == names


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_recipe_with_proprio_refuses_a_dataset_without(tmp_path, monkeypatch, is_streamed):
    monkeypatch.setenv("ROBOFACTORY_HOME", str(tmp_path / "home"))
    directory = tmp_path / "set"
    writer = DatasetWriter(directory, description(scene_yaml="", proprio_names=()))
    for seed in range(3):
        part = episode(seed)
        writer.append(replace(part, proprio=part.proprio[:, :0]))
    writer.finalize()
    recipe = RECIPE
    if is_streamed:
        recipe = replace(recipe, data=replace(recipe.data, datasets={f"file://{directory}": 1.0}))
    with pytest.raises(UserError, match=r"set has no proprio; train without it: model\.use_proprio=false"):
        load_splits(directory, recipe)
    without = replace(recipe, model=replace(recipe.model, use_proprio=False))
    splits = load_splits(directory, without)
    batch = next(splits.val_batches(0, 1).validation())
    assert batch.proprio is None and batch.pixel_values.shape[1] == len(VIEWS)
    assert splits.codec.proprio_dim == 0


# ---------------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("num_episodes", [2, 3, 10, 150])
def test_the_parts_are_disjoint_and_together_everything(num_episodes):
    train, val = split_episodes(num_episodes, 0.1, seed=0)
    assert train and val and not set(train) & set(val)
    assert sorted(train + val) == list(range(num_episodes))
    assert len(val) == max(1, round(0.1 * num_episodes))


def test_the_split_is_the_same_for_the_same_seed_only():
    assert split_episodes(100, 0.1, seed=3) == split_episodes(100, 0.1, seed=3)
    assert split_episodes(100, 0.1, seed=3) != split_episodes(100, 0.1, seed=4)


def test_one_episode_cannot_be_split():
    with pytest.raises(UserError, match="1 episode cannot be split"):
        split_episodes(1, 0.1, seed=0)


def test_no_validation_frame_is_trained_on(splits, directory):
    train, val = ({action_of(frames, row) for row in range(len(frames))} for frames in both(splits))
    assert not train & val
    assert train | val == {tuple(action) for action in DatasetReader(directory).all_actions.tolist()}


def both(splits: Splits) -> list[FrameDataset]:
    return [FrameDataset(parts, splits.codec, None) for parts in (splits.train, splits.val)]


def action_of(frames: FrameDataset, row: int) -> tuple[float, ...]:
    """No two frames of the demonstrations have the same."""
    return tuple(frames.raw(row)[1].tolist())


def test_statistics_are_of_the_training_episodes_alone(splits):
    actions = splits.train_actions("set")
    assert len(actions) == len(both(splits)[0])
    assert splits.codec.action_statistics.count == len(actions)
    np.testing.assert_allclose(splits.codec.action_statistics.mean, actions.mean(axis=0, dtype=np.float64))


def test_relabelled_episodes_are_all_for_training_and_leave_the_codec_alone(splits, directory, tmp_path):
    """With statistics of its own, each round would give the same token another meaning."""
    relabelled = write_dataset(tmp_path / "more", num_episodes=2, scene_yaml=SCENE_YAML, first_seed=50)
    more = load_splits(directory, RECIPE, [relabelled])
    assert more.codec.fingerprint == splits.codec.fingerprint
    (train, val), (train_more, val_more) = both(splits), both(more)
    assert len(train_more) == len(train) + DatasetReader(relabelled).num_frames
    assert [action_of(val_more, row) for row in range(len(val_more))] == [
        action_of(val, row) for row in range(len(val))
    ]
    assert len(more.train_actions("set")) == len(train_more)


def test_relabelled_episodes_that_look_different_are_refused(directory, tmp_path):
    scene_yaml = to_yaml(load_scene(scene_file("LiftBarrier-rf"), ["visual_detail=low"]))
    other = write_dataset(tmp_path / "more", num_episodes=2, scene_yaml=scene_yaml)
    with pytest.raises(UserError, match="does not show its pictures as"):
        load_splits(directory, RECIPE, [other])


def test_the_codec_knows_what_the_pictures_look_like(splits):
    assert splits.codec.look == look_of(load_scene(scene_file("LiftBarrier-rf")))
    assert splits.codec.views == VIEWS


# ------------------------------------------------------------------------------------------------ frames and batches


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    size = status.partition("VmRSS:")[2].split()
    return int(size[0]) / 1024 if size else 0.0  # one that has ended has none


def sizes_after_epochs(splits: Splits, num_workers: int) -> list[float]:
    """MB that this process and its workers hold after each of 20 epochs."""
    frames = FrameDataset(splits.train * 4, splits.codec, augment_seed=0)
    loaded = Batches(frames, frame_order(len(frames), 16), num_workers)
    sizes = []
    for epoch in range(20):
        for step in loaded.epoch(epoch):
            list(step)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        sizes.append(sum(resident_mb(int(pid)) for pid in [os.getpid(), *children]))
    return sizes


@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_stays_flat_over_twenty_epochs(splits, num_workers):
    """A sample kept by mistake would be 4 MB an epoch here. In a process of its own: other tests leave garbage behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        sizes = alone.submit(sizes_after_epochs, splits, num_workers).result()
    assert max(sizes[10:]) - max(sizes[4:10]) < 4.0, [round(size) for size in sizes]


def test_an_example_is_the_frame_as_the_codec_encodes_it(splits):
    frames = FrameDataset(splits.train, splits.codec, augment_seed=None)
    for row in (0, 4, len(frames) - 1):
        assert same(frames[FrameKey(0, row)], splits.codec.encode_example(*frames.raw(row)))


def test_crops_differ_between_epochs_and_frames_and_nothing_else(splits):
    frames = FrameDataset(splits.train, splits.codec, augment_seed=0)
    again = FrameDataset(splits.train, splits.codec, augment_seed=0)
    assert same(frames[FrameKey(1, 3)], again[FrameKey(1, 3)])
    assert not same(frames[FrameKey(1, 3)], frames[FrameKey(2, 3)])
    other_seed = FrameDataset(splits.train, splits.codec, augment_seed=1)
    assert not same(frames[FrameKey(1, 3)], other_seed[FrameKey(1, 3)])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_nothing(splits, num_workers):
    def batches(workers):
        frames = FrameDataset(splits.train, splits.codec, augment_seed=0)
        loaded = Batches(frames, frame_order(len(frames), 4), workers)
        return [batch for epoch in (0, 1) for step in loaded.epoch(epoch) for batch in step]  # the workers live through

    alone, together = batches(0), batches(num_workers)
    assert len(alone) == len(together)
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_user_can_mend_is_one_line_wherever_it_comes_up(splits, num_workers, monkeypatch):
    def fail(*_):
        raise UserError("cannot read s3://away: gone; check the network")

    frames = both(splits)[0]
    monkeypatch.setattr(FrameDataset, "__getitem__", fail)
    with pytest.raises(UserError) as error:
        next(next(Batches(frames, frame_order(len(frames), 8), num_workers).epoch(0)))
    assert str(error.value) == "cannot read s3://away: gone; check the network"


def test_loading_leaves_the_global_random_numbers_alone(splits):
    """Otherwise dropout after a resume would differ from dropout without."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for step in splits.train_batches(0, 1).epoch(0, first_step=1):
        list(step)
    assert torch.equal(torch.rand(3), expected)


def test_what_the_workers_hand_over_is_what_the_policy_is_given(splits):
    """Uint8 pictures that are normalised after they have travelled, or at once: the same numbers."""
    frames = FrameDataset(splits.val, splits.codec, augment_seed=None)
    at_once = splits.codec.collate([frames[FrameKey(0, row)] for row in range(4)])
    stacked = next(splits.val_batches(0, 1).validation())
    assert stacked.pixel_values.dtype == torch.uint8
    assert torch.equal(
        splits.codec.normalized(stacked).pixel_values[:4], at_once.pixel_values[: len(stacked.input_ids)]
    )


def test_training_batches_are_augmented_and_validation_batches_are_not(splits):
    def pixels(batches, epoch):
        return torch.cat([batch.pixel_values for step in batches.epoch(epoch) for batch in step])

    train, val = splits.train_batches(0, 1), splits.val_batches(0, 1)
    assert torch.equal(pixels(val, 0), pixels(val, 1))
    assert not torch.equal(pixels(train, 0), pixels(train, 1))
    assert len(pixels(val, 0)) == len(both(splits)[1])


def test_example_batches_carry_the_actions_of_their_frames(splits):
    batch, actions = splits.examples(5, torch.device("cpu"))
    tokens = batch.action_tokens.numpy()
    error = np.abs(splits.codec.decode_actions(tokens[:, : splits.codec.action_dim]) - actions)
    assert (error <= splits.codec.half_bin * 1.001 + 1e-6).all()
    assert len({tuple(row) for row in actions.tolist()}) == 5


def test_the_first_training_pictures_can_be_shown(splits):
    size = (splits.codec.image_size,) * 2
    views, instruction = splits.input_images()
    assert list(views) == list(VIEWS) and instruction == "lift the barrier"
    assert all(image.shape == (*size, 3) and image.dtype == np.uint8 for image in views.values())


def test_the_open_loop_check_generates_in_small_batches_whatever_the_training_batch(directory):
    """With the cache of its generation at the training batch, the 7B took more memory for it than for training."""
    large, small = (replace(RECIPE, dataloader=replace(RECIPE.dataloader, batch_size=size)) for size in (16, 3))
    num_frames, cpu = 11, torch.device("cpu")
    for recipe, largest in ((large, 4), (small, 3)):
        *_, batches = load_splits(directory, recipe).open_loop(num_frames, cpu)
        sizes = [len(batch.input_ids) for batch, _ in batches]
        assert max(sizes) == largest and sum(sizes) <= num_frames
