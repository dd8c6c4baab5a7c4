"""From datasets to batches: split by episode, mixed, frame -> example -> batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch.utils.data import Dataset

from robofactory.codec.codec import Codec, Example, Stacked
from robofactory.codec.statistics import DatasetStatistics, Statistics, grippers
from robofactory.config import RecipeConfig, SceneConfig, from_yaml, home, look_of
from robofactory.data.episodes import DatasetReader
from robofactory.data.order import FrameKey, FrameOrder, InOrder, Mixture, Passes, generator
from robofactory.data.streaming import StreamedReader
from robofactory.errors import UserError
from robofactory.paths import dataset_place
from robofactory.processes import Lost, Pool
from robofactory.shapes import Action, Batch, Observation

# Generation caches keys and values: of the 7B 0.4 GB a sample. At its training batch of 16 that took 2.5 GB more than a
# training step has at its peak.
OPEN_LOOP_BATCH = 4
BATCH_SECONDS = 600.0  # for one batch: a slow disk or a stream that has to fetch episodes first takes far less


def split_episodes(num_episodes: int, val_ratio: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Episodes to train on and to validate on, drawn by the seed; both sorted, none empty.

    Raises:
        UserError: there are not two episodes to tell apart.
    """
    if num_episodes < 2:
        raise UserError(f"{num_episodes} episode cannot be split into training and validation; record at least 2")
    num_val = min(max(1, round(val_ratio * num_episodes)), num_episodes - 1)
    order = torch.randperm(num_episodes, generator=generator(seed, "split")).tolist()
    return tuple(sorted(order[num_val:])), tuple(sorted(order[:num_val]))


def load_splits(directory: Path, recipe: RecipeConfig, relabelled: Sequence[Path] = ()) -> "Splits":
    """What a policy is trained on, each dataset in two parts, and the codec of all.

    Statistics are taken from the episodes to train on, dataset by dataset, and from nothing else: relabelled episodes
    are all for training, and the codec stays what it is in whatever round of training. Those of a streamed dataset are
    the ones in its `meta/stats.json`, over all its episodes.

    Args:
        directory: the agent's demonstrations: all there is, unless `recipe.data.datasets` names others.
        relabelled: more episodes of these demonstrations.
    Raises:
        UserError: no dataset, an unfinished or broken one, or a view that it has not; datasets that do not go together;
            relabelled episodes that show other pictures; a recipe with proprio and a dataset without.
    """
    sources = locate_datasets(directory, recipe)
    if relabelled and directory.name not in sources:
        raise UserError(
            f"--round adds to {directory.name}, which data.datasets leaves out: it has {', '.join(sources)}"
        )
    train, val, statistics = [], [], {}
    for name, location in sources.items():
        reader = open_dataset(location, recipe)
        if recipe.model.use_proprio and not reader.description.names_of_proprio():
            raise UserError(f"{location} has no proprio; train without it: model.use_proprio=false")
        episodes, held_out = split_episodes(reader.num_episodes, recipe.data.val_ratio, recipe.training.seed)
        train.append(Part(name, reader, episodes))
        val.append(Part(name, reader, held_out))
        statistics[name] = measure(train[-1], recipe)
        for path in relabelled if name == directory.name else ():
            more = DatasetReader(path, recipe.data.views)
            if look_of_pictures(more) != statistics[name].look:
                raise UserError(f"{path} does not show its pictures as {directory} does; delete it and record it again")
            train.append(Part(name, more, tuple(range(more.num_episodes))))
    return Splits(Codec.create(recipe, statistics), tuple(train), tuple(val), recipe)


def locate_datasets(directory: Path, recipe: RecipeConfig) -> dict[str, str]:
    """Name -> path or URL of each dataset to train on.

    Raises:
        UserError: two of them have the same name.
    """
    if not recipe.data.datasets:
        return {directory.name: str(directory)}
    located: dict[str, str] = {}
    for given in recipe.data.datasets:
        name = given.rstrip("/").rpartition("/")[2]
        if name in located:
            raise UserError(f"data.datasets has two datasets called {name!r}; a policy tells them apart by their names")
        located[name] = dataset_place(given)
    return located


def open_dataset(location: str, recipe: RecipeConfig) -> DatasetReader | StreamedReader:
    if "://" not in location:
        return DatasetReader(Path(location), recipe.data.views)
    return StreamedReader(location, recipe.data.views, home() / "cache", recipe.data.stream_window)


def look_of_pictures(reader: DatasetReader | StreamedReader) -> dict[str, Any]:
    """See `config.look_of`; empty for what comes from no scene of ours."""
    scene_yaml = reader.description.scene_yaml
    place = reader.directory if isinstance(reader, DatasetReader) else reader.url
    return look_of(from_yaml(SceneConfig, scene_yaml, f"the scene of {place}")) if scene_yaml else {}


def measure(part: "Part", recipe: RecipeConfig) -> DatasetStatistics:
    """Raises UserError as `Statistics.measure`; the line names the dataset."""
    reader, names, method = part.reader, part.reader.description.joint_names, recipe.data.normalization
    proprio_names = reader.description.names_of_proprio()
    look, pass_through = look_of_pictures(reader), recipe.data.pass_through
    try:
        if not isinstance(reader, StreamedReader):
            numbers = part.actions(), part.proprio(), names, method, look, len(part.episodes)
            return DatasetStatistics.measure(*numbers, pass_through=pass_through, proprio_names=proprio_names)
        passing = grippers(names) if pass_through is None else pass_through
        action = Statistics.of_numbers(reader.statistics["action"], reader.num_frames, names, method, passing)
        state = reader.statistics["observation.state"]
        proprio = Statistics.of_numbers(state, reader.num_frames, proprio_names, method)
        return DatasetStatistics(action, proprio, look, len(part.episodes))
    except UserError as error:
        raise UserError(f"dataset {part.dataset}: {error}") from None


@dataclass(frozen=True)
class Part:
    """Some episodes of a dataset."""

    dataset: str
    reader: DatasetReader | StreamedReader
    episodes: tuple[int, ...]

    @property
    def lengths(self) -> Int64[np.ndarray, " e"]:
        return self.reader.episode_lengths[list(self.episodes)]

    def actions(self) -> Float32[np.ndarray, "n a"]:
        return np.concatenate([self.reader.actions(episode) for episode in self.episodes])

    def proprio(self) -> Float32[np.ndarray, "n s"]:
        return np.concatenate([self.reader.proprio(episode) for episode in self.episodes])


@dataclass(frozen=True)
class Splits:
    """What training asks of its data. No episode is in both `train` and `val`; the parts of a dataset come together."""

    codec: Codec
    train: tuple[Part, ...]
    val: tuple[Part, ...]
    recipe: RecipeConfig

    def train_batches(self, rank: int, world_size: int) -> "Batches":
        """Random order and random crops, both drawn from the recipe's seed."""
        seed = self.recipe.training.seed
        frames = Mixture(self._passes(), self._weights(), seed)
        accumulate = self.recipe.training.gradient_accumulate_every
        return self._batches(FrameDataset(self.train, self.codec, seed), frames, rank, world_size, accumulate)

    def val_batches(self, rank: int, world_size: int) -> "Batches":
        """In order, centred crops."""
        dataset = FrameDataset(self.val, self.codec, augment_seed=None)
        return self._batches(dataset, InOrder(len(dataset)), rank, world_size)

    def describe(self) -> str:
        """For people: what an epoch consists of, and what the bins do to the actions of each dataset."""
        passes, weights = self._passes(), self._weights()
        mixture = Mixture(passes, weights, self.recipe.training.seed)
        lines = [self.codec.images.note] if self.codec.images.note else []
        if len(passes) > 1 or weights != [1.0]:
            width = max(len(name) for name in self.codec.datasets)
            lines.append(f"{'dataset':<{width}} {'frames':>10} {'weight':>8} {'an epoch':>10} {'share':>7}")
            for name, each, weight, count in zip(self.codec.datasets, passes, weights, mixture.counts, strict=True):
                share = count / mixture.num_frames
                lines.append(f"{name:<{width}} {each.num_frames:>10,} {weight:>8g} {count:>10,} {share:>7.1%}")
        for name in self.codec.datasets:
            lines += [f"{name}:"] if len(passes) > 1 else []
            lines.append(self.codec.for_dataset(name).action_table(self.train_actions(name)))
        return "\n".join(lines)

    def train_actions(self, dataset: str) -> Float32[np.ndarray, "n a"]:
        """The actions to train on, in physical units; of a streamed dataset those of a few episodes."""
        parts = [part for part in self.train if part.dataset == dataset]
        return np.concatenate([replace(part, episodes=_a_few(part)).actions() for part in parts])

    def examples(self, count: int, device: torch.device) -> tuple[Batch, Float32[np.ndarray, "n a"]]:
        """A batch of training frames, spread evenly over each dataset, and the actions that the data holds for them."""
        frames, passes, rows = FrameDataset(self.train, self.codec, augment_seed=None), self._passes(), []
        for index, dataset in enumerate(passes):
            share = len(range(index, count, len(passes)))
            rows += (dataset.first_frame + np.linspace(0, dataset.num_frames - 1, share).astype(int)).tolist()
        batch = self.codec.collate([frames[FrameKey(0, row)] for row in rows])
        return batch.to(device), np.stack([frames.raw(row)[1] for row in rows])

    def open_loop(
        self, max_frames: int, device: torch.device
    ) -> tuple[Codec, int, int, Iterator[tuple[Batch, Float32[np.ndarray, "n a"]]]]:
        """The first held-out episode (of the first dataset), its codec, the stride at which its frames are taken, and
        these with their actions."""
        part = self.val[0]
        reader, episode = part.reader, part.episodes[0]
        frames = FrameDataset([replace(part, episodes=(episode,))], self.codec, augment_seed=None)
        stride = -(-len(frames) // max_frames)
        rows, size = list(range(0, len(frames), stride)), min(self.recipe.dataloader.batch_size, OPEN_LOOP_BATCH)
        batches = (
            (self.codec.collate([frames[FrameKey(0, row)] for row in some]).to(device), reader.actions(episode)[some])
            for some in (rows[start : start + size] for start in range(0, len(rows), size))
        )
        return self.codec.for_dataset(part.dataset), episode, stride, batches

    def input_images(self) -> tuple[dict[str, UInt8[np.ndarray, "h w 3"]], str]:
        """The views of one training example as the model sees them, and its instruction."""
        frames = FrameDataset(self.train, self.codec, augment_seed=self.recipe.training.seed)
        reader, first = self.train[0].reader, self.train[0].episodes[0]
        row = int(reader.episode_lengths[first]) // 2
        pictures = frames[FrameKey(0, row)].pixel_values.movedim(1, -1).numpy()
        views = {view: pictures[index] for index, view in enumerate(self.codec.views)}
        return views, reader.instructions[first]

    def _passes(self) -> list[Passes]:
        """Over the frames of each dataset as `FrameDataset` counts them."""
        passes, first_frame, seed = [], 0, self.recipe.training.seed
        for index, name in enumerate(self.codec.datasets):
            parts = [part for part in self.train if part.dataset == name]
            lengths = np.concatenate([part.lengths for part in parts]).tolist()
            is_streamed = isinstance(parts[0].reader, StreamedReader)
            window = self.recipe.data.stream_window if is_streamed else None
            passes.append(Passes(first_frame, lengths, seed, index, window))
            first_frame += passes[-1].num_frames
        return passes

    def _weights(self) -> list[float]:
        return list(self.recipe.data.datasets.values()) or [1.0]

    def _batches(
        self, dataset: "FrameDataset", frames: InOrder | Mixture, rank: int, world_size: int, accumulate: int = 1
    ) -> "Batches":
        loader = self.recipe.dataloader
        order = FrameOrder(frames, loader.batch_size, rank, world_size, accumulate)
        return Batches(dataset, order, loader.num_workers)


def _a_few(part: Part) -> tuple[int, ...]:
    """Of a streamed dataset so many episodes as are fetched in a moment, of others all."""
    if not isinstance(part.reader, StreamedReader):
        return part.episodes
    return part.episodes[:: -(-len(part.episodes) // 8)]


# ------------------------------------------------------------------------------------------------- frame -> example


class FrameDataset(Dataset[Example]):
    """The frames of some episodes, one after the other, encoded by the codec.

    augment_seed: the crops of a frame are drawn from (augment_seed, epoch, frame) and nothing else, so neither the
        number of workers nor a resumed run changes them. None: centred crops.
    """

    def __init__(self, parts: Sequence[Part], codec: Codec, augment_seed: int | None):
        self.codec = codec
        self.augment_seed = augment_seed
        self._codecs = {part.dataset: codec.for_dataset(part.dataset) for part in parts}
        self._episodes = [(part, episode) for part in parts for episode in part.episodes]
        self._ends = np.cumsum(np.concatenate([part.lengths for part in parts]))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def raw(self, frame: int) -> tuple[Observation, Action]:
        """The frame as it was recorded."""
        return self._find(frame)[1:]

    def __getitem__(self, key: FrameKey) -> Example:
        dataset, observation, action = self._find(key.frame)
        random = None if self.augment_seed is None else generator(self.augment_seed, "crop", *key)
        return self._codecs[dataset].encode_example(observation, action, random)

    def _find(self, frame: int) -> tuple[str, Observation, Action]:
        at = int(np.searchsorted(self._ends, frame, side="right"))
        part, episode = self._episodes[at]
        start = int(self._ends[at] - part.reader.episode_lengths[episode])
        return part.dataset, *part.reader.frame(episode, frame - start)


class Batches:
    """Batches from any optimizer step of any epoch on, made ahead in processes. They are not normalised yet: the device
    does that faster, and an eighth of the bytes travels to it."""

    def __init__(self, frames: FrameDataset, order: FrameOrder, num_workers: int):
        self.order, self._frames = order, frames
        setup = partial(_start_worker, frames)  # forked: all processes have the same dataset in memory
        self._pool = Pool(setup, num_workers, BATCH_SECONDS, "fork", in_hand=2) if num_workers else None

    @property
    def num_steps(self) -> int:
        """Optimizer steps in an epoch; the same on all ranks."""
        return self.order.num_steps

    def epoch(self, epoch: int, first_step: int = 0, end: int | None = None) -> Iterator[Iterator[Stacked]]:
        """The optimizer steps of an epoch, from `first_step` to before `end`; each is this rank's micro-batches."""
        self.order.start(epoch, first_step)
        batches = self._loaded()
        for _ in range(first_step, self.num_steps if end is None else end):
            yield islice(batches, self.order.accumulate)

    def _loaded(self) -> Iterator[Stacked]:
        try:
            made = map(_stacker(self._frames), self.order) if self._pool is None else self._pool.results(self.order)
            for arrays in made:
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                if torch.cuda.is_available():
                    tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
                yield Stacked(**tensors)
        except Lost as lost:
            raise UserError(f"a data worker of process {self.order.rank} was lost ({lost.how}); if memory was short, use a smaller dataloader.num_workers (0: none), and --resume continues") from None  # fmt: skip

    def validation(self) -> Iterator[Stacked]:
        """All batches, in order."""
        return chain.from_iterable(self.epoch(0))


def _start_worker(frames: FrameDataset) -> Callable[[Sequence[FrameKey]], dict[str, np.ndarray]]:
    torch.set_num_threads(1)  # a process a core: more threads make each other wait
    return _stacker(frames)


def _stacker(frames: FrameDataset) -> Callable[[Sequence[FrameKey]], dict[str, np.ndarray]]:
    """Makes batches, as arrays: they go from process to process without a copy."""

    def stack(keys: Sequence[FrameKey]) -> dict[str, np.ndarray]:
        batch = frames.codec.stack([frames[key] for key in keys])
        return {name: tensor.numpy() for name, tensor in vars(batch).items() if tensor is not None}

    return stack
