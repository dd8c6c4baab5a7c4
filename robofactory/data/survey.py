"""One pass over a dataset as it lies on disk, faults and all: what `findings` judges and the report shows.

Nothing here says what is good. Episode after episode is read and forgotten: what stays of one are some kilobytes, and of
all together a sample of numbers and pictures of a fixed size, so a dataset may be larger than memory.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

from robofactory import files
from robofactory.codec.statistics import METHODS, Statistics, grippers
from robofactory.data import lerobot
from robofactory.data.description import INFO, DatasetDescription, Info, read_finished
from robofactory.data.pictures import Pictures, look, small
from robofactory.errors import UserError

SAMPLE_FRAMES = 200_000  # whose numbers are kept for quantiles and histograms: all of them up to this many
FRAMES_AN_EPISODE = 8  # whose pictures are decoded, spread evenly
QUICK_EPISODES, QUICK_FRAMES = 32, 4  # the same of a quick survey, before a training
SHEET_EPISODES = 8  # of a contact sheet
SKETCH_ROWS = 32  # of an episode, to find it again
STILL_PER_S = 0.02  # rad: slower is not moving. At 20 Hz 1 mrad a step, half a bin of LiftBarrier's demonstrations
MOVED_PER_S = 0.4  # rad: every camera that sees the arm sees this, 2 cm in a twentieth of a second at 1 m
TRAVELLED_RAD = 0.1  # in an episode: enough for every such camera, however slow


@dataclass
class Spread:
    """Of the frames that are finite, of one vector.

    low_episode, high_episode: which holds the extreme of each dimension.
    sample: every so many-th frame; all of them in datasets of up to `SAMPLE_FRAMES`.
    """

    names: tuple[str, ...]
    count: int = 0
    min: Float64[np.ndarray, " a"] = field(init=False)
    max: Float64[np.ndarray, " a"] = field(init=False)
    mean: Float64[np.ndarray, " a"] = field(init=False)
    squares: Float64[np.ndarray, " a"] = field(init=False)  # sum of squared distances from the mean
    low_episode: Int64[np.ndarray, " a"] = field(init=False)
    high_episode: Int64[np.ndarray, " a"] = field(init=False)
    sample: Float32[np.ndarray, "m a"] = field(init=False)

    def __post_init__(self) -> None:
        dim = len(self.names)
        self.min, self.max, self.mean, self.squares = np.full(dim, np.inf), np.full(dim, -np.inf), np.zeros(dim), np.zeros(dim)  # fmt: skip
        self.low_episode, self.high_episode = np.zeros(dim, np.int64), np.zeros(dim, np.int64)
        self.sample = np.zeros((0, dim), np.float32)

    @property
    def is_joint(self) -> Bool[np.ndarray, " a"]:
        """All dimensions but the grippers, by their names."""
        return np.array([name not in grippers(self.names) for name in self.names], bool)

    def add(self, episode: int, values: Float32[np.ndarray, "n a"]) -> None:
        if len(values) == 0:
            return
        exact = values.astype(np.float64)
        low, high, mean, count = exact.min(0), exact.max(0), exact.mean(0), self.count + len(exact)
        self.low_episode[low < self.min], self.high_episode[high > self.max] = episode, episode
        self.min, self.max = np.minimum(self.min, low), np.maximum(self.max, high)
        # Chan, Golub, LeVeque 1979: two means and sums of squares as one.
        self.squares += ((exact - mean) ** 2).sum(0) + (mean - self.mean) ** 2 * self.count * len(exact) / count
        self.mean += (mean - self.mean) * len(exact) / count
        self.count = count

    def statistics(self, method: str, normalized: Sequence[bool]) -> Statistics:
        """As the codec takes them; the quantiles are the sample's."""
        q01, q99 = np.quantile(self.sample.astype(np.float64), [0.01, 0.99], axis=0)
        std = np.sqrt(self.squares / self.count)
        numbers = {"min": self.min, "max": self.max, "mean": self.mean, "std": std, "q01": q01, "q99": q99}
        return Statistics.unchecked(numbers, self.count, self.names, method, np.array(normalized, dtype=bool))


@dataclass(frozen=True)
class EpisodeFacts:
    """What stays of an episode.

    problems: where its frames, its file and the dataset's description do not agree on lengths.
    not_finite: the first such number, or timestamp, in words; None: all are finite.
    irregular: the largest distance between two timestamps, or the smallest, in steps of 1 / fps; 1 is regular.
    still: frames whose action is the one before.
    moving, equals_state, equals_next_state: per action dimension, frames whose action is not the one before; those of
        them whose action is the state to the last digit, and those whose action is the state of the next frame. Empty
        where actions and state have other names.
    action_step, state_step: the largest change from one frame to the next, per dimension, and behind which frame.
    has_moved: some joint travelled over `TRAVELLED_RAD`.
    sketch: the smallest of the hashes of its frames' numbers: two episodes share about as many of them as frames.
    """

    length: int
    instruction: str
    problems: tuple[str, ...]
    not_finite: str | None
    irregular: float
    still: int
    moving: Int64[np.ndarray, " c"]
    equals_state: Int64[np.ndarray, " c"]
    equals_next_state: Int64[np.ndarray, " c"]
    action_step: Float32[np.ndarray, " a"]
    action_step_at: Int64[np.ndarray, " a"]
    state_step: Float32[np.ndarray, " s"]
    state_step_at: Int64[np.ndarray, " s"]
    has_moved: bool
    sketch: Int64[np.ndarray, " k"]


@dataclass(frozen=True)
class Survey:
    """A dataset as it is.

    missing: which episodes the description has and the files have not, in words; empty where all are there.
    problems: where else the description and the files do not agree, beside what the episodes say.
    passing: the action dimensions that the codec takes to be in [-1, 1].
    views: whose pictures were looked at.
    pictures: of all episodes, or of some.
    sheets: view -> rows of pictures, one row an episode, to be looked at; empty in a quick survey.
    """

    directory: Path
    description: DatasetDescription
    missing: str
    problems: tuple[str, ...]
    actions: Spread
    state: Spread
    episodes: list[EpisodeFacts]
    passing: tuple[str, ...]
    views: tuple[str, ...]
    pictures: dict[int, Pictures]
    sheets: dict[str, dict[int, list[UInt8[np.ndarray, "_h _w 3"]]]]

    @property
    def num_frames(self) -> int:
        return sum(episode.length for episode in self.episodes)

    def statistics(self) -> dict[str, Statistics]:
        """The actions' under each normalisation that the codec knows."""
        normalized = [name not in self.passing for name in self.actions.names]
        return {method: self.actions.statistics(method, normalized) for method in METHODS}


def survey(
    directory: Path,
    views: Sequence[str] | None = None,
    *,
    pass_through: Sequence[str] | None = None,
    is_quick: bool = False,
    progress: Callable[[Iterable[int], int], Iterable[int]] = lambda episodes, total: episodes,
) -> Survey:
    """Read a dataset once.

    Args:
        views: whose pictures are looked at; None: all.
        pass_through: as in the recipe; None: the grippers, by their names.
        is_quick: decode few pictures of few episodes, keep none.
        progress: goes around the episodes that are read, whose number it gets too.
    Raises:
        UserError: no dataset, an unfinished one, or a file that cannot be read at all.
    """
    description, info = read_finished(directory)
    names = [description.joint_names, description.names_of_proprio()]
    actions, state = (Spread(each) for each in names)
    chosen = tuple(view for view in description.image_sizes if views is None or view in views)
    num_files = _count_files(directory)
    stated_lengths = lerobot.read_episodes(_meta(directory, lerobot.EPISODES))[0].tolist()
    tasks = lerobot.read_tasks(_meta(directory, lerobot.TASKS))
    with_pictures = set(_spread(num_files, QUICK_EPISODES if is_quick else num_files))
    in_sheets = set() if is_quick else set(_spread(num_files, SHEET_EPISODES))
    paths = [lerobot.find_data_file(directory, episode) for episode in range(num_files)]
    stride = -(-sum(lerobot.open_parquet(path).metadata.num_rows for path in paths) // SAMPLE_FRAMES) or 1

    episodes: list[EpisodeFacts] = []
    pictures: dict[int, Pictures] = {}
    sheets: dict[str, dict[int, list[UInt8[np.ndarray, "_h _w 3"]]]] = {view: {} for view in chosen if in_sheets}
    samples: list[tuple[np.ndarray, np.ndarray]] = []
    first_row = 0
    for episode in progress(range(num_files), num_files):
        keys = [lerobot.image_key(view) for view in chosen] if episode in with_pictures else []
        path, columns = paths[episode], [*description.vector_columns(), *lerobot.SCALARS, *keys]
        table = lerobot.read_parquet(path, columns)
        if len(table) == 0:
            raise UserError(f"{path} has no frame; delete it and record again")
        acts = lerobot.to_vectors(table, "action", len(names[0]), path)
        states = lerobot.to_vectors(table, "observation.state", len(names[1]), path)
        is_finite = np.isfinite(acts).all(1) & np.isfinite(states).all(1)
        actions.add(episode, acts[is_finite])
        state.add(episode, states[is_finite])
        kept = is_finite & ((first_row + np.arange(len(acts))) % stride == 0)
        samples.append((acts[kept], states[kept]))
        stated = stated_lengths[episode] if episode < len(stated_lengths) else None
        same_names = names[0] == names[1]
        is_joint = state.is_joint
        frames = {name: lerobot.to_scalars(table, name, path) for name in lerobot.SCALARS}
        instruction = lerobot.instruction_of(table, tasks, path)
        facts = _episode_facts(
            episode, frames, acts, states, stated, instruction, description.fps, same_names, is_joint
        )
        episodes.append(facts)
        first_row += facts.length
        if keys:
            rows = np.linspace(0, facts.length - 1, QUICK_FRAMES if is_quick else FRAMES_AN_EPISODE).astype(int)
            moved = _moved(states[:, is_joint], description.fps)
            images = {view: lerobot.to_encoded(table, key, path) for view, key in zip(chosen, keys, strict=True)}
            pictures[episode], decoded = look(images, rows, moved, description.image_sizes)
            for view in chosen if episode in in_sheets else []:
                sheets[view][episode] = [small(image) for image in decoded[view]]
    if not episodes or actions.count == 0:
        raise UserError(f"{directory} has no frame with finite numbers; delete it and record again")
    actions.sample, state.sample = (np.concatenate(parts) for parts in zip(*samples, strict=True))
    missing, problems = _disagreements(info, len(stated_lengths), num_files, first_row)
    passing = tuple(grippers(names[0]) if pass_through is None else pass_through)
    return Survey(
        directory, description, missing, problems, actions, state, episodes, passing, chosen, pictures, sheets
    )


# ------------------------------------------------------------------------------------------------------ what is stated


def _count_files(directory: Path) -> int:
    count = 0
    while os.path.lexists(lerobot.data_file(directory, count)):
        count += 1
    return count


def _meta(directory: Path, name: str) -> Path:
    return files.inside(directory, name, directory, lerobot.RECORD_AGAIN)


def _disagreements(info: Info, num_listed: int, num_files: int, num_frames: int) -> tuple[str, tuple[str, ...]]:
    """What is missing, and what else is not as `meta/info.json` says."""
    if info.total_episodes > num_files:
        return f"meta/info.json says {info.total_episodes} episodes, there are files of {num_files}", ()
    found = [
        (INFO, info.total_episodes, "episodes", num_files),
        ("meta/episodes", num_listed, "episodes", num_files),
        (INFO, info.total_frames, "frames", num_frames),
    ]
    return "", tuple(
        f"{name} says {says} {what}, the files hold {has}" for name, says, what, has in found if says != has
    )


def _spread(total: int, count: int) -> list[int]:
    """Some of `range(total)`, evenly."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist() if total else []


# --------------------------------------------------------------------------------------------------------- one episode


def _episode_facts(
    episode: int,
    frames: Mapping[str, np.ndarray],
    actions: Float32[np.ndarray, "n a"],
    state: Float32[np.ndarray, "n s"],
    stated_length: int | None,
    instruction: str,
    fps: int | float,
    same_names: bool,
    is_joint: Bool[np.ndarray, " s"],
) -> EpisodeFacts:
    length = len(actions)
    times = frames["timestamp"].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.nan_to_num(np.diff(times) * fps, nan=1.0, posinf=1.0, neginf=1.0)  # those are another finding
        step, state_step = np.abs(np.diff(actions, axis=0)), np.abs(np.diff(state, axis=0))
        changes = step > 1e-6  # rad: less is rounding
        equal = np.abs(actions - state)[1:] < 1e-6 if same_names else changes[:, :0]
        equal_next = np.abs(actions[:-1] - state[1:]) < 1e-6 if same_names else changes[:, :0]
        travelled = np.nan_to_num(np.ptp(state[:, is_joint], axis=0)).max(initial=0.0)
    # The action of frame t + 1 against its state, and that of t against the state of t + 1: both where actions change.
    moving = changes if same_names else changes[:, :0]
    return EpisodeFacts(
        length=length,
        instruction=instruction,
        problems=tuple(_length_problems(episode, frames, length, stated_length)),
        not_finite=_first_not_finite(actions, state, times),
        irregular=float(gaps[np.argmax(np.abs(gaps - 1.0))]) if len(gaps) else 1.0,
        still=int((step < STILL_PER_S / fps).all(1).sum()),
        moving=moving.sum(0),
        equals_state=(equal & moving).sum(0),
        equals_next_state=(equal_next & moving).sum(0),
        action_step=np.nan_to_num(step).max(0, initial=0.0),
        action_step_at=np.nan_to_num(step).argmax(0) if length > 1 else np.zeros(actions.shape[1], np.int64),
        state_step=np.nan_to_num(state_step).max(0, initial=0.0),
        state_step_at=np.nan_to_num(state_step).argmax(0) if length > 1 else np.zeros(state.shape[1], np.int64),
        has_moved=bool(travelled > TRAVELLED_RAD),
        sketch=_sketch(np.concatenate([actions, state], axis=1)),
    )


def _length_problems(episode: int, frames: Mapping[str, np.ndarray], length: int, stated: int | None) -> Iterator[str]:
    if stated is not None and stated != length:
        yield f"episode {episode} has {length} frames in its file, {stated} in meta/episodes"
    if not np.array_equal(frames["frame_index"], np.arange(length)):
        yield f"the frame_index of episode {episode} does not count 0, 1, 2, ..."
    if not (frames["episode_index"] == episode).all():
        yield f"frames of episode {episode} say that they are of another one"


def _first_not_finite(
    actions: Float32[np.ndarray, "n a"], state: Float32[np.ndarray, "n s"], times: Float64[np.ndarray, " n"]
) -> str | None:
    for what, values in (("action", actions), ("state", state)):
        if not np.isfinite(values).all():
            frame, dim = np.argwhere(~np.isfinite(values))[0]
            return f"{what} dimension {dim} of frame {frame} is {values[frame, dim]}"
    if not np.isfinite(times).all():
        frame = int(np.argmin(np.isfinite(times)))
        return f"the timestamp of frame {frame} is {times[frame]}"
    return None


def _moved(state: Float32[np.ndarray, "n s"], fps: int | float) -> Int64[np.ndarray, " m"]:
    """Behind which frames some joint moved, whose measurements these are."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.flatnonzero((np.abs(np.diff(state, axis=0)) > MOVED_PER_S / fps).any(1))


def _sketch(rows: Float32[np.ndarray, "n c"]) -> Int64[np.ndarray, " k"]:
    """The smallest hashes of the different rows, rounded to 1e-4. Source: Broder's min-wise hashing, 1997."""
    rounded = np.round(np.nan_to_num(rows.astype(np.float64)), 4) + 0.0  # + 0.0: no negative zero
    hashes = {zlib.crc32(row.tobytes()) for row in rounded}
    return np.array(sorted(hashes)[:SKETCH_ROWS], np.int64)
