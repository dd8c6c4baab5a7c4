"""Datasets with exactly one fault each: the name of the finding -> a function that writes such a dataset."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from demonstrations import sound_episode, write_sound_dataset

from robofactory.data import lerobot
from robofactory.data.episodes import Episode, decode_png, encode_png

FAULTS: dict[str, Callable[[Path], Path]] = {}
BAD = (0, 3)  # the episodes that have the fault, where not all have; the first one is the hardest to tell


def of_every_episode(change: Callable[[Episode], Episode]) -> None:
    FAULTS[change.__name__] = lambda directory: write_sound_dataset(directory, change=change)


def of_some_episodes(change: Callable[[Episode], Episode]) -> None:
    FAULTS[change.__name__] = lambda directory: write_sound_dataset(
        directory, change=lambda episode: change(episode) if episode.seed in BAD else episode
    )


def of_a_file(change: Callable[[pa.Table], pa.Table]) -> None:
    """What the writer would not write: a file is changed later."""

    def write(directory: Path) -> Path:
        file = lerobot.data_file(write_sound_dataset(directory), BAD[1])
        table = lerobot.open_parquet(file).read()
        file.write_bytes(lerobot.to_parquet(change(table)))
        return directory

    FAULTS[change.__name__] = write


def column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def put_picture(file: Path, view: str, frame: int, data: bytes | None) -> None:
    """Replace the picture of one frame in an episode's file."""
    table, name = lerobot.open_parquet(file).read(), lerobot.image_key(view)
    values = table[name].to_pylist()
    values[frame] = {"bytes": data, "path": "x.png"}
    file.write_bytes(lerobot.to_parquet(column(table, name, pa.array(values, lerobot.IMAGE_TYPE))))


def filmed_again(files, seed: int) -> list[bytes]:
    """The same pictures with the little that sensors or compression change."""
    random = np.random.default_rng(seed)
    images = (decode_png(file).astype(int) for file in files)
    return [encode_png((image + random.integers(-1, 2, image.shape)).clip(0, 255).astype(np.uint8)) for image in images]


# ------------------------------------------------------------------------------------------------------------- errors


@of_a_file
def not_finite(table):
    state = lerobot.to_numpy(table["observation.state"]).copy()
    state[7, 2] = np.nan
    return column(table, "observation.state", lerobot._vectors(state))


@of_a_file
def length_mismatch(table):
    return table.slice(0, len(table) - 5)


@of_a_file
def unreadable_image(table):
    images = table["observation.images.side"].to_pylist()
    cut = [{**each, "bytes": each["bytes"][:200]} for each in images]
    return column(table, "observation.images.side", pa.array(cut, lerobot.IMAGE_TYPE))


def missing_episodes(directory: Path) -> Path:
    """The last one was not copied."""
    lerobot.data_file(write_sound_dataset(directory), 5).unlink()
    return directory


FAULTS["missing_episodes"] = missing_episodes


@of_some_episodes
def black_camera(episode):
    black = [encode_png(np.zeros((24, 32, 3), np.uint8))] * len(episode.actions)
    return replace(episode, images={**episode.images, "wrist": filmed_again(black, episode.seed)})


@of_some_episodes
def frozen_camera(episode):
    still = [episode.images["overhead"][0]] * len(episode.actions)
    return replace(episode, images={**episode.images, "overhead": filmed_again(still, episode.seed)})


@of_some_episodes
def duplicated_camera(episode):
    return replace(episode, images={**episode.images, "wrist": filmed_again(episode.images["side"], episode.seed)})


@of_some_episodes
def swapped_cameras(episode):
    images = episode.images
    return replace(episode, images={**images, "wrist": images["side"], "side": images["wrist"]})


@of_every_episode
def action_equals_state(episode):
    return replace(episode, proprio=episode.actions.copy())


@of_every_episode
def gripper_range(episode):
    return replace(episode, actions=episode.actions * 0.5 + 0.5 * (np.arange(8) == 7).astype(np.float32))


@of_every_episode
def gripper_inverted(episode):
    return replace(episode, proprio=episode.proprio * np.where(np.arange(8) == 7, -1, 1).astype(np.float32))


@of_some_episodes
def empty_instruction(episode):
    return replace(episode, instruction=" ")


# ----------------------------------------------------------------------------------------------------------- warnings


@of_some_episodes
def discontinuities(episode):
    """Two recordings, one behind the other."""
    jump = np.outer(np.arange(len(episode.actions)) >= 20, np.arange(8) == 2).astype(np.float32)
    return replace(episode, actions=episode.actions + jump, proprio=episode.proprio + jump)


@of_every_episode
def idle_frames(episode):
    """The one at the controls thinks for a second and a half."""
    rows = np.append(np.arange(20), np.full(30, 20)).tolist() + list(range(21, 40))
    return replace(
        episode,
        actions=episode.actions[rows],
        proprio=episode.proprio[rows],
        perturbed=episode.perturbed[rows],
        images={view: [files[row] for row in rows] for view, files in episode.images.items()},
    )


@of_every_episode
def repeated_frames(episode):
    """A camera at half the rate of the arm."""
    halved = [episode.images["side"][row - row % 2] for row in range(len(episode.actions))]
    return replace(episode, images={**episode.images, "side": halved})


@of_some_episodes
def near_duplicate_episodes(episode):
    """The same demonstration twice, once without its first and last frames."""
    part = slice(0, 40) if episode.seed == BAD[0] else slice(3, 36)
    copied = sound_episode(BAD[0])
    return replace(
        episode,
        actions=copied.actions[part],
        proprio=copied.proprio[part],
        perturbed=copied.perturbed[part],
        images={view: filmed_again(files[part], episode.seed) for view, files in copied.images.items()},
    )


def outliers(directory: Path) -> Path:
    """A joint that hardly moves goes far away once, not too fast."""

    def change(episode: Episode) -> Episode:
        scale = np.where(np.arange(8) == 3, 0.05, 1.0).astype(np.float32)
        actions, proprio = episode.actions * scale, episode.proprio * scale
        if episode.seed == BAD[1]:
            actions[10:20, 3] += 0.12 * np.minimum(np.arange(10), np.arange(10)[::-1]).astype(np.float32)
        return replace(episode, actions=actions, proprio=proprio)

    return write_sound_dataset(directory, num_episodes=30, change=change)


FAULTS["outliers"] = outliers


def rare_event(directory: Path) -> Path:
    """A command that is given once: 98 % of the values are one and the same but for noise."""

    def change(episode: Episode) -> Episode:
        actions = episode.actions.copy()
        actions[:, 3] = np.random.default_rng(episode.seed).normal(0.0, 5e-5, len(actions))
        if episode.seed == BAD[1]:
            actions[10:12, 3] = 0.14
        return replace(episode, actions=actions, proprio=episode.proprio * (np.arange(8) != 3).astype(np.float32))

    return write_sound_dataset(directory, num_episodes=10, change=change)


FAULTS["rare_event"] = rare_event


@of_every_episode
def noise_only(episode):
    """A joint that rests, and a sensor that does not know it."""
    noise = np.random.default_rng(episode.seed).normal(0.5, 1e-6, episode.actions.shape)
    return replace(episode, actions=np.where(np.arange(8) == 5, noise, episode.actions).astype(np.float32))


@of_a_file
def irregular_timestamps(table):
    """A frame was dropped."""
    times = lerobot.to_numpy(table["timestamp"]) + np.float32(0.05) * (np.arange(len(table)) > 10)
    return column(table, "timestamp", pa.array(times.astype(np.float32)))


@of_every_episode
def not_radians(episode):
    """A joint in degrees, about 57 of them."""
    offset = np.where(np.arange(8) == 1, 57.3, 0.0).astype(np.float32)
    return replace(episode, actions=episode.actions + offset, proprio=episode.proprio + offset)


@of_some_episodes
def short_episodes(episode):
    """The last one was broken off."""
    if episode.seed != BAD[1]:
        return episode
    images = {view: files[:3] for view, files in episode.images.items()}
    return replace(episode, actions=episode.actions[:3], proprio=episode.proprio[:3], perturbed=episode.perturbed[:3], images=images)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- notes


@of_every_episode
def action_is_next_state(episode):
    proprio = np.concatenate([episode.proprio[:1], episode.actions[:-1]])
    return replace(episode, proprio=proprio)


@of_every_episode
def constant_dimension(episode):
    return replace(episode, actions=np.where(np.arange(8) == 5, 0.25, episode.actions).astype(np.float32))


@of_some_episodes
def instruction_variants(episode):
    return replace(episode, instruction="Lift the  barrier.")
