"""From a dataset on disk to batches: split by episode, the order of an epoch, frame -> example -> batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from robofactory.codec.codec import Codec, Example
from robofactory.config import RecipeConfig, SceneConfig, UserError, from_yaml, look_of
from robofactory.data.episodes import DatasetReader
from robofactory.shapes import Batch


def split_episodes(num_episodes: int, val_ratio: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Episodes to train on and to validate on, drawn by the seed; both sorted, none empty.

    Raises:
        UserError: there are not two episodes to tell apart.
    """
    if num_episodes < 2:
        raise UserError(f"{num_episodes} episode cannot be split into training and validation; record at least 2")
    num_val = min(max(1, round(val_ratio * num_episodes)), num_episodes - 1)
    order = torch.randperm(num_episodes, generator=_generator(seed, "split")).tolist()
    return tuple(sorted(order[num_val:])), tuple(sorted(order[:num_val]))


def load_splits(directory: Path, recipe: RecipeConfig) -> "Splits":
    """The dataset, its codec and its two parts. Statistics are taken from the training episodes alone.

    Raises:
        UserError: no dataset, an unfinished or broken one, or a view that it has not.
    """
    reader = DatasetReader(directory, recipe.data.views)
    train, val = split_episodes(reader.num_episodes, recipe.data.val_ratio, recipe.training.seed)
    look = look_of(from_yaml(SceneConfig, reader.description.scene_yaml))
    actions = np.concatenate([reader.actions(episode) for episode in train])
    proprio = np.concatenate([reader.proprio(episode) for episode in train])
    codec = Codec.create(recipe, actions, proprio, reader.description.joint_names, look)
    return Splits(reader, codec, train, val, recipe)


@dataclass(frozen=True)
class Splits:
    """What training asks of a dataset. `train_episodes` and `val_episodes` are disjoint."""

    reader: DatasetReader
    codec: Codec
    train_episodes: tuple[int, ...]
    val_episodes: tuple[int, ...]
    recipe: RecipeConfig

    def train_batches(self, rank: int, world_size: int) -> "Batches":
        """Random order and random crops, both drawn from the recipe's seed."""
        return self._batches(self.train_episodes, is_training=True, rank=rank, world_size=world_size)

    def val_batches(self, rank: int, world_size: int) -> "Batches":
        """In order, centred crops."""
        return self._batches(self.val_episodes, is_training=False, rank=rank, world_size=world_size)

    def train_actions(self) -> Float32[np.ndarray, "n a"]:
        """All actions to train on, in physical units."""
        return np.concatenate([self.reader.actions(episode) for episode in self.train_episodes])

    def examples(self, count: int, device: torch.device) -> tuple[Batch, Float32[np.ndarray, "n a"]]:
        """A batch of training frames, spread evenly over them, and the actions that the dataset holds for them."""
        frames = FrameDataset(self.reader, self.codec, self.train_episodes, augment_seed=None)
        rows = np.linspace(0, len(frames) - 1, count).astype(int).tolist()
        batch = self.codec.collate([frames[FrameKey(0, row)] for row in rows])
        return batch.to(device), np.stack([self.reader.frame(*frames.place(row))[1] for row in rows])

    def input_images(self) -> tuple[dict[str, UInt8[np.ndarray, "h w 3"]], str]:
        """The views of one training example as the model sees them, and its instruction."""
        seed = self.recipe.training.seed
        frames = FrameDataset(self.reader, self.codec, self.train_episodes, augment_seed=seed)
        row = int(self.reader.episode_lengths[self.train_episodes[0]]) // 2
        pictures = self.codec.pictures_seen(frames[FrameKey(0, row)].pixel_values)
        views = {view: pictures[index] for index, view in enumerate(self.codec.views)}
        return views, self.reader.instructions[self.train_episodes[0]]

    def _batches(self, episodes: Sequence[int], is_training: bool, rank: int, world_size: int) -> "Batches":
        seed = self.recipe.training.seed
        frames = FrameDataset(self.reader, self.codec, episodes, augment_seed=seed if is_training else None)
        order = FrameOrder(len(frames), self.recipe.dataloader.batch_size, seed, is_training, rank, world_size)
        return Batches(frames, order, self.recipe.dataloader.num_workers)


# ------------------------------------------------------------------------------------------------- frame -> example


class FrameKey(NamedTuple):
    """A frame in an epoch. The epoch travels with the frame, so that workers that live on never fall behind."""

    epoch: int
    frame: int


class FrameDataset(Dataset[Example]):
    """The frames of some episodes, one after the other, encoded by the codec.

    augment_seed: the crops of a frame are drawn from (augment_seed, epoch, frame) and nothing else, so neither the
        number of workers nor a resumed run changes them. None: centred crops.
    """

    def __init__(self, reader: DatasetReader, codec: Codec, episodes: Sequence[int], augment_seed: int | None):
        self.reader = reader
        self.codec = codec
        self.episodes = np.asarray(episodes)
        self.augment_seed = augment_seed
        self._ends = np.cumsum(reader.episode_lengths[self.episodes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, frame: int) -> tuple[int, int]:
        """The episode of a frame, and the step in it."""
        at = int(np.searchsorted(self._ends, frame, side="right"))
        episode = int(self.episodes[at])
        return episode, frame - int(self._ends[at] - self.reader.episode_lengths[episode])

    def __getitem__(self, key: FrameKey) -> Example:
        observation, action = self.reader.frame(*self.place(key.frame))
        generator = None if self.augment_seed is None else _generator(self.augment_seed, "crop", *key)
        return self.codec.encode_example(observation, action, generator)


def _generator(*key: int | str) -> torch.Generator:
    """Random numbers that are a pure function of the key."""
    words = [value if isinstance(value, int) else int.from_bytes(value.encode(), "little") for value in key]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


# ------------------------------------------------------------------------------------------------ the order of frames


class FrameOrder(Sampler[list[FrameKey]]):
    """The batches of an epoch, as one process draws them: a pure function of (seed, epoch, rank).

    Each frame comes exactly once an epoch over all ranks. Every rank gets the same number of batches, and their sizes
    differ by one at most: nothing is dropped, no short last batch. The frames of a step, over all ranks together,
    depend on `batch_size * world_size` alone.

    Raises:
        UserError: more processes than frames.
    """

    def __init__(self, num_frames: int, batch_size: int, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1):
        assert 0 <= rank < world_size, (rank, world_size)
        if num_frames < world_size:
            raise UserError(f"{num_frames} frames cannot be shared by {world_size} processes; record more episodes")
        self.num_frames, self.seed, self.shuffle = num_frames, seed, shuffle
        self.rank, self.world_size = rank, world_size
        # With fewer frames than places in the last step (batch_size 1), batches of two are better than an empty one.
        self.num_batches = min(-(-num_frames // (batch_size * world_size)), num_frames // world_size)
        self.epoch = self.first_batch = 0

    def start(self, epoch: int, first_batch: int = 0) -> None:
        """What the next iteration goes over: an epoch, from one of its batches on."""
        assert 0 <= first_batch <= self.num_batches, (first_batch, self.num_batches)
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    def __iter__(self) -> Iterator[list[FrameKey]]:
        order = self.order(self.epoch).tolist()
        num_parts = self.num_batches * self.world_size
        for batch in range(self.first_batch, self.num_batches):
            part = batch * self.world_size + self.rank
            start, end = (k * self.num_frames // num_parts for k in (part, part + 1))
            yield [FrameKey(self.epoch, frame) for frame in order[start:end]]

    def order(self, epoch: int) -> Int64[Tensor, " n"]:
        """All frames in the order of an epoch."""
        if not self.shuffle:
            return torch.arange(self.num_frames)
        return torch.randperm(self.num_frames, generator=_generator(self.seed, "order", epoch))


class Batches:
    """A data loader that starts at any batch of any epoch."""

    def __init__(self, frames: FrameDataset, order: FrameOrder, num_workers: int):
        self.order = order
        self._loader = DataLoader(
            frames,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=frames.codec.collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(0),  # otherwise each epoch would draw from the global one
        )

    @property
    def num_batches(self) -> int:
        """In an epoch, of this rank; the same on all ranks."""
        return self.order.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from `first_batch` on."""
        self.order.start(epoch, first_batch)
        return iter(self._loader)
