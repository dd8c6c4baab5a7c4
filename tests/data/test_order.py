"""Which frame comes when: nothing is lost or doubled, chance is even, and any position can be gone on from."""

from collections import Counter, OrderedDict
from itertools import islice

import numpy as np
import pytest
import torch

from robofactory.data.order import FrameKey, FrameOrder, InOrder, Mixture, Passes, generator
from robofactory.errors import UserError


def frame_order(num_frames, batch_size, seed=0, shuffle=True, rank=0, world_size=1, accumulate=1) -> FrameOrder:
    """The batches of one dataset."""
    frames = Mixture([Passes(0, [num_frames], seed)], [1.0], seed) if shuffle else InOrder(num_frames)
    return FrameOrder(frames, batch_size, rank, world_size, accumulate)


def keys_of(order: FrameOrder) -> list[FrameKey]:
    return [key for batch in order for key in batch]


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("num_frames", [1, 7, 64, 65, 101])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_frame_comes_once_an_epoch_over_all_ranks(num_frames, batch_size, world_size, shuffle):
    if num_frames < world_size:
        with pytest.raises(UserError, match="cannot be shared"):
            frame_order(num_frames, batch_size, 0, shuffle, 0, world_size)
        return
    ranks = [frame_order(num_frames, batch_size, 0, shuffle, rank, world_size) for rank in range(world_size)]
    batches = [list(order) for order in ranks]
    assert sorted(key.frame for rank in batches for batch in rank for key in batch) == list(range(num_frames))
    assert {len(rank) for rank in batches} == {ranks[0].num_steps}  # or one process would wait for ever
    sizes = {len(batch) for rank in batches for batch in rank}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size or batch_size == 1


def test_the_order_depends_on_seed_and_epoch_alone():
    def frames(seed, epoch):
        order = frame_order(50, 4, seed, shuffle=True)
        order.start(epoch)
        return [key.frame for key in keys_of(order)]

    assert frames(0, 3) == frames(0, 3)
    assert frames(0, 3) != frames(0, 4)
    assert frames(0, 3) != frames(1, 3)


def test_two_processes_with_half_the_batch_see_the_same_steps_as_one():
    one = list(frame_order(101, 8, 0, shuffle=True))
    halves = [list(frame_order(101, 4, 0, True, rank, 2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in one]


def test_a_process_that_accumulates_goes_over_the_micro_batches_of_two_that_do_not():
    alone = list(frame_order(101, 4, 0, shuffle=True, accumulate=2))
    ranks = [list(frame_order(101, 4, 0, True, rank, 2)) for rank in (0, 1)]
    assert alone == [batch for step in zip(*ranks, strict=True) for batch in step]


@pytest.mark.parametrize("parts", [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (2, 4, 1)])
def test_the_frames_of_a_step_depend_on_the_global_batch_alone(parts):
    batch_size, world_size, accumulate = parts
    orders = [frame_order(101, batch_size, 0, True, rank, world_size, accumulate) for rank in range(world_size)]
    steps = [
        [list(order)[k * accumulate : (k + 1) * accumulate] for order in orders] for k in range(orders[0].num_steps)
    ]
    frames = [sorted(key for rank in step for batch in rank for key in batch) for step in steps]
    assert frames == [sorted(batch) for batch in frame_order(101, 8, 0, shuffle=True)]
    assert [len(step) for step in frames] == [orders[0].step_size(k) for k in range(len(frames))]


def test_an_epoch_resumed_in_the_middle_goes_on_as_it_would_have():
    order = frame_order(50, 4, 0, shuffle=True, accumulate=2)
    order.start(2)
    whole = list(order)
    order.start(2, first_step=3)
    assert len(order) == 2 * (order.num_steps - 3)
    assert list(order) == whole[6:]


# ---------------------------------------------------------------------------------------------------- several datasets

LENGTHS = ([7, 3, 12, 5], [4, 9], [6, 6, 6])  # episodes of three datasets: 27, 13 and 18 frames


def passes(window=None, seed=0) -> list[Passes]:
    firsts = np.cumsum([0, *(sum(lengths) for lengths in LENGTHS)]).tolist()
    pairs = zip(firsts, LENGTHS, strict=False)
    return [Passes(first, lengths, seed, index, window) for index, (first, lengths) in enumerate(pairs)]


def epoch_of(mixture: Mixture, epoch: int, start: int = 0) -> list[FrameKey]:
    return list(mixture.keys(epoch, start))


def test_one_dataset_has_the_order_that_it_had_before_there_could_be_several():
    for epoch in range(3):
        order = torch.randperm(50, generator=generator(5, "order", epoch)).tolist()
        mixture = Mixture([Passes(0, [20, 30], 5)], [1.0], 5)
        assert epoch_of(mixture, epoch) == [FrameKey(epoch, frame) for frame in order]


@pytest.mark.parametrize("window", [None, 2])
def test_an_epoch_has_each_dataset_by_its_weight_and_no_frame_is_ever_ahead_of_another(window):
    weights = [1.0, 2.5, 0.3]
    mixture = Mixture(passes(window), weights, seed=0)
    assert mixture.counts == [27, 32, 5] and mixture.num_frames == 64
    seen: Counter[int] = Counter()
    for epoch in range(12):
        keys = epoch_of(mixture, epoch)
        assert len(set(keys)) == len(keys), "a frame that comes twice is not cropped alike"
        seen += Counter(key.frame for key in keys)
        for dataset, count in zip(mixture.datasets, mixture.counts, strict=True):
            times = [seen[dataset.first_frame + frame] for frame in range(dataset.num_frames)]
            assert sum(times) == count * (epoch + 1)
            assert max(times) - min(times) <= 1


def test_datasets_are_mixed_evenly_over_an_epoch():
    mixture = Mixture([Passes(0, [3000], 0), Passes(3000, [1000], 0, 1)], [1.0, 1.0], seed=0)
    second = np.array([key.frame >= 3000 for key in epoch_of(mixture, 0)])
    of_quarters = second.reshape(4, -1).sum(axis=1)
    deviation = np.sqrt(1000 * 0.25 * 0.75)  # of the hypergeometric distribution at most
    assert (abs(of_quarters - 250) < 4 * deviation).all(), of_quarters


@pytest.mark.parametrize("window", [None, 1, 2, 99])
def test_a_mixture_goes_on_from_any_position_as_it_would_have(window):
    mixture = Mixture(passes(window), [1.0, 2.5, 0.3], seed=0)
    whole = epoch_of(mixture, 3)
    for start in range(mixture.num_frames + 1):
        assert epoch_of(mixture, 3, start) == whole[start:], start


def test_the_mixture_depends_on_seed_and_epoch():
    orders = [
        epoch_of(Mixture(passes(window, seed), [1.0, 1.0, 1.0], seed), 0) for window in (None, 2) for seed in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


# ----------------------------------------------------------------------------------------------------------- a window


@pytest.mark.parametrize("window", [1, 2, 5, 50])
def test_a_pass_has_each_frame_once_whatever_the_window(window):
    lengths = [3, 40, 1, 17, 8, 25, 2]
    order = Passes(100, lengths, 0, window=window)
    keys = list(islice(order.keys(0), 3 * sum(lengths)))
    for epoch in range(3):
        of_pass = keys[epoch * sum(lengths) : (epoch + 1) * sum(lengths)]
        assert {key.epoch for key in of_pass} == {epoch}
        assert sorted(key.frame for key in of_pass) == list(range(100, 100 + sum(lengths)))


def test_an_episode_is_read_once_a_pass_but_for_the_seam():
    """With room for the window and no more, the least recently used one is deleted."""
    num_episodes, length, window = 60, 30, 8
    order = Passes(0, [length] * num_episodes, 0, window=window)
    kept, num_read = OrderedDict(), 0
    for key in islice(order.keys(0), num_episodes * length):
        episode = key.frame // length
        num_read += episode not in kept
        kept[episode] = True
        kept.move_to_end(episode)
        if len(kept) > window + 1:  # a bin's last frames come while its first episode is not asked for again
            kept.popitem(last=False)
    assert num_read <= num_episodes + window - 1 + num_episodes // 10, num_read


@pytest.mark.parametrize("window", [4, 16])
def test_a_batch_varies_within_the_stated_bound_of_uniform_sampling(window):
    """The worst case: all frames of an episode are alike. The bound is also near the truth: without a window's mixing
    the variance would be `batch` times that of uniform sampling."""
    batch, num_episodes, length = 8, 400, 40
    value = torch.randn(num_episodes, generator=torch.Generator().manual_seed(0)).numpy()
    value = (value - value.mean()) / value.std()
    order = Passes(0, [length] * num_episodes, 0, window=window)
    frames = np.array([key.frame for key in islice(order.keys(0), 20 * num_episodes * length)])
    means = value[frames // length].reshape(-1, batch).mean(axis=1)  # 40,000 batches
    ratio = means.var() / (1.0 / batch)
    bound = 1 + (batch - 1) / window
    assert 0.85 * bound < ratio < 1.05 * bound, (ratio, bound)


def test_without_a_window_a_batch_varies_as_little_as_uniform_sampling():
    value = np.repeat(np.random.default_rng(0).normal(size=400), 40)
    value = (value - value.mean()) / value.std()
    frames = np.array([key.frame for key in islice(Passes(0, [40] * 400, 0).keys(0), 10 * len(value))])
    assert value[frames].reshape(-1, 8).mean(axis=1).var() == pytest.approx(1 / 8, rel=0.05)
