"""Which frames an epoch has, and in which order: a function of seed and epoch, so that training can go on anywhere.

One dataset, weight 1: each frame comes once an epoch. Several, or another weight: an epoch has `weight` times as many
frames of a dataset as that has, taken from endless passes over it, so that no frame ever is one ahead of another.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Sampler

from robofactory.errors import UserError

Count = TypeVar("Count", int, np.ndarray)


class FrameKey(NamedTuple):
    """A frame, and how often its dataset was gone through before: with weight 1 that is the epoch.

    Both travel together, so that workers that live on never fall behind, and a frame that comes twice in an epoch is
    not cropped alike.
    """

    epoch: int
    frame: int


def generator(*key: int | str) -> torch.Generator:
    """Random numbers that are a pure function of the key."""
    words = [value if isinstance(value, int) else int.from_bytes(value.encode(), "little") for value in key]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


# ----------------------------------------------------------------------------------------------------------- one dataset


class Passes:
    """The frames of one dataset, endlessly: pass after pass over all of them, each in an order of its own.

    Without a window all orders of a pass are equally likely. With one, episodes are read one after the other, in a random
    order: an episode comes in, gives each of the next `window` bins an equal random part of its frames, and goes. A
    bin's frames are shuffled. So at any time the frames come from `window` episodes, drawn at random, in equal shares,
    and a batch falls into one bin or two. Where all frames of an episode are alike, which is the worst case, the mean
    over a batch of b frames of anything has at most 1 + (b - 1) / window times the variance that drawing from all
    frames alike would give it: a pair of frames in it is of one episode with probability 1 / window, for episodes of
    one length.

    The bins are a circle: the last episodes of a pass give their last parts to its first bins. There is no thin start
    and no thin end, each frame comes once a pass, and all that is read twice is `window - 1` episodes.

    Args:
        first_frame: the number of the dataset's first frame among all.
        index: of the dataset among those that are mixed.
        window: in episodes.
    """

    def __init__(
        self, first_frame: int, episode_lengths: Sequence[int], seed: int, index: int = 0, window: int | None = None
    ):
        self.lengths = np.asarray(episode_lengths, np.int64)
        self.starts = first_frame + np.cumsum(self.lengths) - self.lengths
        self.first_frame, self.num_frames = first_frame, int(self.lengths.sum())
        self.key = (seed, index) if index else (seed,)
        self.is_windowed, self.window = window is not None, min(window or 1, len(self.lengths))

    def keys(self, position: int) -> Iterator[FrameKey]:
        """From a position in all passes together on; never ends."""
        epoch, skipped = divmod(position, self.num_frames)
        while True:
            for part in self._pass(epoch, skipped):
                yield from (FrameKey(epoch, frame) for frame in part.tolist())
            epoch, skipped = epoch + 1, 0

    def _pass(self, epoch: int, skipped: int) -> Iterator[Int64[Tensor, " n"]]:
        """The frames of a pass but for the first so many, part by part."""
        if not self.is_windowed:
            order = torch.randperm(self.num_frames, generator=self._generator("order", epoch))
            yield from (self.first_frame + order[skipped:]).split(4096)
            return
        episodes = torch.randperm(len(self.lengths), generator=self._generator("order", epoch)).tolist()
        bin_ends = np.cumsum(self._bin_sizes(self.lengths[episodes]))
        first = int(np.searchsorted(bin_ends, skipped, side="right"))
        skipped -= int(bin_ends[first - 1]) if first else 0
        frames_of: dict[int, Int64[Tensor, " n"]] = {}  # of the episodes that give frames now
        for bin_index in range(first, len(episodes)):
            frames_of.pop(episodes[bin_index - self.window], None)
            parts = []
            for age in range(self.window):
                episode = episodes[bin_index - age]
                if episode not in frames_of:
                    frames_of[episode] = self._shuffled(epoch, episode)
                start, end = _part(len(frames_of[episode]), age, self.window)
                parts.append(frames_of[episode][start:end])
            frames = torch.cat(parts)
            yield frames[torch.randperm(len(frames), generator=self._generator("bin", epoch, bin_index))][skipped:]
            skipped = 0

    def _shuffled(self, epoch: int, episode: int) -> Int64[Tensor, " n"]:
        order = torch.randperm(int(self.lengths[episode]), generator=self._generator("episode", epoch, episode))
        return int(self.starts[episode]) + order

    def _bin_sizes(self, lengths: Int64[np.ndarray, " e"]) -> Int64[np.ndarray, " e"]:
        """Of episodes in the order of a pass. Bin k has a part of episodes k, k - 1, ..., k - window + 1 on the circle."""
        sizes = np.zeros_like(lengths)
        for age in range(self.window):
            start, end = _part(lengths, age, self.window)
            sizes += np.roll(end - start, age)
        return sizes

    def _generator(self, what: str, *key: int) -> torch.Generator:
        seed, *index = self.key
        return generator(seed, what, *key, *index)


def _part(length: Count, age: int, window: int) -> tuple[Count, Count]:
    """From where to where the shuffled frames of an episode go that came in so many bins ago."""
    return length * age // window, length * (age + 1) // window


# ----------------------------------------------------------------------------------------------------------- epochs


class InOrder:
    """Each frame once, from the first to the last; every epoch is the same."""

    def __init__(self, num_frames: int):
        self.num_frames = num_frames

    def keys(self, epoch: int, start: int) -> Iterator[FrameKey]:
        """The frames of an epoch, from one of its positions on."""
        return (FrameKey(0, frame) for frame in range(start, self.num_frames))


class Mixture:
    """Frames of several datasets, the dataset of each drawn at random so that their numbers in an epoch are exact.

    Args:
        weights: how often an epoch has each frame of a dataset; 0.5 takes the other half in the next one.
    """

    def __init__(self, datasets: Sequence[Passes], weights: Sequence[float], seed: int):
        self.datasets, self.seed = datasets, seed
        pairs = zip(datasets, weights, strict=True)
        self.counts = [max(1, round(weight * dataset.num_frames)) for dataset, weight in pairs]
        self.num_frames = sum(self.counts)

    def keys(self, epoch: int, start: int) -> Iterator[FrameKey]:
        """The frames of an epoch, from one of its positions on."""
        if len(self.datasets) == 1:
            return islice(self.datasets[0].keys(epoch * self.num_frames + start), self.num_frames - start)
        whose = np.repeat(np.arange(len(self.counts), dtype=np.uint8), self.counts)
        order = torch.randperm(self.num_frames, generator=generator(self.seed, "mixture", epoch))
        whose = whose[order.numpy()]
        gone = np.bincount(whose[:start], minlength=len(self.counts)).tolist()
        of_each = zip(self.datasets, self.counts, gone, strict=True)
        streams = [dataset.keys(epoch * count + before) for dataset, count, before in of_each]
        return (next(streams[index]) for index in whose[start:])


# ------------------------------------------------------------------------------------------------------------ batches


class FrameOrder(Sampler[list[FrameKey]]):
    """The micro-batches of an epoch, as one process draws them.

    Each frame of the epoch comes exactly once over all ranks. The frames of an optimizer step depend on the global batch
    `batch_size * accumulate * world_size` alone, and its micro-batches on `batch_size` and `accumulate * world_size`:
    two processes, or one that accumulates twice, go over the same ones. Every rank gets `accumulate` of them a step;
    their sizes differ by one at most within a step, and nothing is dropped: no short last batch.

    Raises:
        UserError: more micro-batches in a step than frames.
    """

    def __init__(
        self, frames: InOrder | Mixture, batch_size: int, rank: int = 0, world_size: int = 1, accumulate: int = 1
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        self.num_parts = accumulate * world_size
        if frames.num_frames < self.num_parts:
            raise UserError(f"{frames.num_frames} frames cannot be shared by {world_size} processes with gradient_accumulate_every={accumulate}; record more episodes")  # fmt: skip
        self.frames, self.num_frames = frames, frames.num_frames
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        # With batch_size 1 a short last step would leave a process without a frame: one step less, some batches of two.
        self.num_steps = min(-(-self.num_frames // (batch_size * self.num_parts)), self.num_frames // self.num_parts)
        self.epoch = self.first_step = 0

    def start(self, epoch: int, first_step: int = 0) -> None:
        """What the next iteration goes over: an epoch, from one of its optimizer steps on."""
        assert 0 <= first_step <= self.num_steps, (first_step, self.num_steps)
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[FrameKey]]:
        keys = self.frames.keys(self.epoch, self._start_of(self.first_step))
        for step in range(self.first_step, self.num_steps):
            frames = list(islice(keys, self.step_size(step)))
            for micro in range(self.accumulate):
                part = micro * self.world_size + self.rank
                start, end = (k * len(frames) // self.num_parts for k in (part, part + 1))
                yield frames[start:end]

    def step_size(self, step: int) -> int:
        """How many frames a step has over all ranks."""
        return self._start_of(step + 1) - self._start_of(step)

    def _start_of(self, step: int) -> int:
        return step * self.num_frames // self.num_steps
