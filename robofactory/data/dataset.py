"""From a dataset on disk to batches: split by episode, the order of an epoch, frame -> example -> batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from robofactory.codec.codec import Codec, Example, Stacked
from robofactory.config import RecipeConfig, SceneConfig, UserError, from_yaml, look_of
from robofactory.data.episodes import DatasetReader
from robofactory.shapes import Action, Batch, Observation


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


def load_splits(directory: Path, recipe: RecipeConfig, relabelled: Sequence[Path] = ()) -> "Splits":
    """An agent's demonstrations in two parts, and their codec; relabelled episodes are all for training.

    Statistics are taken from the demonstrations to train on, and from nothing else: the codec stays what it is in
    whatever round of training.

    Raises:
        UserError: no dataset, an unfinished or broken one, or a view that it has not; one that shows other pictures.
    """
    reader, *more = (DatasetReader(each, recipe.data.views) for each in (directory, *relabelled))
    look, *looks = (look_of(from_yaml(SceneConfig, each.description.scene_yaml)) for each in (reader, *more))
    for other, path in zip(looks, relabelled, strict=True):
        if other != look:
            raise UserError(f"{path} does not show its pictures as {directory} does; delete it and record it again")
    train, val = split_episodes(reader.num_episodes, recipe.data.val_ratio, recipe.training.seed)
    actions = np.concatenate([reader.actions(episode) for episode in train])
    proprio = np.concatenate([reader.proprio(episode) for episode in train])
    codec = Codec.create(recipe, actions, proprio, reader.description.joint_names, look)
    parts = (Part(reader, train), *(Part(each, tuple(range(each.num_episodes))) for each in more))
    return Splits(codec, parts, (Part(reader, val),), recipe)


@dataclass(frozen=True)
class Part:
    """Some episodes of a dataset."""

    reader: DatasetReader
    episodes: tuple[int, ...]


@dataclass(frozen=True)
class Splits:
    """What training asks of its data. No episode is in both `train` and `val`."""

    codec: Codec
    train: tuple[Part, ...]
    val: tuple[Part, ...]
    recipe: RecipeConfig

    def train_batches(self, rank: int, world_size: int) -> "Batches":
        """Random order and random crops, both drawn from the recipe's seed."""
        return self._batches(self.train, is_training=True, rank=rank, world_size=world_size)

    def val_batches(self, rank: int, world_size: int) -> "Batches":
        """In order, centred crops."""
        return self._batches(self.val, is_training=False, rank=rank, world_size=world_size)

    def train_actions(self) -> Float32[np.ndarray, "n a"]:
        """All actions to train on, in physical units."""
        return np.concatenate([part.reader.actions(episode) for part in self.train for episode in part.episodes])

    def examples(self, count: int, device: torch.device) -> tuple[Batch, Float32[np.ndarray, "n a"]]:
        """A batch of training frames, spread evenly over them, and the actions that the data holds for them."""
        frames = FrameDataset(self.train, self.codec, augment_seed=None)
        rows = np.linspace(0, len(frames) - 1, count).astype(int).tolist()
        batch = self.codec.collate([frames[FrameKey(0, row)] for row in rows])
        return batch.to(device), np.stack([frames.raw(row)[1] for row in rows])

    def open_loop(
        self, max_frames: int, device: torch.device
    ) -> tuple[int, int, Iterator[tuple[Batch, Float32[np.ndarray, "n a"]]]]:
        """The first held-out episode, the stride at which its frames are taken, and these with their actions."""
        reader, episode = self.val[0].reader, self.val[0].episodes[0]
        frames = FrameDataset([Part(reader, (episode,))], self.codec, augment_seed=None)
        stride = -(-len(frames) // max_frames)
        rows, size = list(range(0, len(frames), stride)), self.recipe.dataloader.batch_size
        batches = (
            (self.codec.collate([frames[FrameKey(0, row)] for row in part]).to(device), reader.actions(episode)[part])
            for part in (rows[start : start + size] for start in range(0, len(rows), size))
        )
        return episode, stride, batches

    def input_images(self) -> tuple[dict[str, UInt8[np.ndarray, "h w 3"]], str]:
        """The views of one training example as the model sees them, and its instruction."""
        frames = FrameDataset(self.train, self.codec, augment_seed=self.recipe.training.seed)
        reader, first = self.train[0].reader, self.train[0].episodes[0]
        row = int(reader.episode_lengths[first]) // 2
        pictures = frames[FrameKey(0, row)].pixel_values.movedim(1, -1).numpy()
        views = {view: pictures[index] for index, view in enumerate(self.codec.views)}
        return views, reader.instructions[first]

    def _batches(self, parts: Sequence[Part], is_training: bool, rank: int, world_size: int) -> "Batches":
        seed = self.recipe.training.seed
        frames = FrameDataset(parts, self.codec, augment_seed=seed if is_training else None)
        accumulate = self.recipe.training.gradient_accumulate_every if is_training else 1
        batch_size = self.recipe.dataloader.batch_size
        order = FrameOrder(len(frames), batch_size, seed, is_training, rank, world_size, accumulate)
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

    def __init__(self, parts: Sequence[Part], codec: Codec, augment_seed: int | None):
        self.codec = codec
        self.augment_seed = augment_seed
        self._episodes = [(part.reader, episode) for part in parts for episode in part.episodes]
        self._ends = np.cumsum([reader.episode_lengths[episode] for reader, episode in self._episodes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def raw(self, frame: int) -> tuple[Observation, Action]:
        """The frame as it was recorded."""
        at = int(np.searchsorted(self._ends, frame, side="right"))
        reader, episode = self._episodes[at]
        return reader.frame(episode, frame - int(self._ends[at] - reader.episode_lengths[episode]))

    def __getitem__(self, key: FrameKey) -> Example:
        observation, action = self.raw(key.frame)
        generator = None if self.augment_seed is None else _generator(self.augment_seed, "crop", *key)
        return self.codec.encode_example(observation, action, generator)


def _generator(*key: int | str) -> torch.Generator:
    """Random numbers that are a pure function of the key."""
    words = [value if isinstance(value, int) else int.from_bytes(value.encode(), "little") for value in key]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


# ------------------------------------------------------------------------------------------------ the order of frames


class FrameOrder(Sampler[list[FrameKey]]):
    """The micro-batches of an epoch, as one process draws them: a pure function of (seed, epoch, rank).

    Each frame comes exactly once an epoch over all ranks. The frames of an optimizer step depend on the global batch
    `batch_size * accumulate * world_size` alone, and its micro-batches on `batch_size` and `accumulate * world_size`:
    two processes, or one that accumulates twice, go over the same ones. Every rank gets `accumulate` of them a step;
    their sizes differ by one at most within a step, and nothing is dropped: no short last batch.

    Raises:
        UserError: more micro-batches in a step than frames.
    """

    def __init__(
        self,
        num_frames: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        self.num_parts = accumulate * world_size
        if num_frames < self.num_parts:
            raise UserError(f"{num_frames} frames cannot be shared by {world_size} processes with gradient_accumulate_every={accumulate}; record more episodes")  # fmt: skip
        self.num_frames, self.seed, self.shuffle = num_frames, seed, shuffle
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        # With batch_size 1 a short last step would leave a process without a frame: one step less, some batches of two.
        self.num_steps = min(-(-num_frames // (batch_size * self.num_parts)), num_frames // self.num_parts)
        self.epoch = self.first_step = 0

    def start(self, epoch: int, first_step: int = 0) -> None:
        """What the next iteration goes over: an epoch, from one of its optimizer steps on."""
        assert 0 <= first_step <= self.num_steps, (first_step, self.num_steps)
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[FrameKey]]:
        order = self.order(self.epoch).tolist()
        for step in range(self.first_step, self.num_steps):
            frames = order[slice(*self._span(step))]
            for micro in range(self.accumulate):
                part = micro * self.world_size + self.rank
                start, end = (k * len(frames) // self.num_parts for k in (part, part + 1))
                yield [FrameKey(self.epoch, frame) for frame in frames[start:end]]

    def step_size(self, step: int) -> int:
        """How many frames a step has over all ranks."""
        start, end = self._span(step)
        return end - start

    def _span(self, step: int) -> tuple[int, int]:
        start, end = (k * self.num_frames // self.num_steps for k in (step, step + 1))
        return start, end

    def order(self, epoch: int) -> Int64[Tensor, " n"]:
        """All frames in the order of an epoch."""
        if not self.shuffle:
            return torch.arange(self.num_frames)
        return torch.randperm(self.num_frames, generator=_generator(self.seed, "order", epoch))


class Batches:
    """A data loader that starts at any optimizer step of any epoch. Its batches are not normalised yet: the device does
    that faster, and an eighth of the bytes travels to it."""

    def __init__(self, frames: FrameDataset, order: FrameOrder, num_workers: int):
        self.order = order
        self._loader = DataLoader(
            frames,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=frames.codec.stack,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(0),  # otherwise each epoch would draw from the global one
        )

    @property
    def num_steps(self) -> int:
        """Optimizer steps in an epoch; the same on all ranks."""
        return self.order.num_steps

    def epoch(self, epoch: int, first_step: int = 0, end: int | None = None) -> Iterator[Iterator[Stacked]]:
        """The optimizer steps of an epoch, from `first_step` to before `end`; each is this rank's micro-batches."""
        self.order.start(epoch, first_step)
        batches = iter(self._loader)
        for _ in range(first_step, self.num_steps if end is None else end):
            yield islice(batches, self.order.accumulate)

    def validation(self) -> Iterator[Stacked]:
        """All batches, in order."""
        return chain.from_iterable(self.epoch(0))
