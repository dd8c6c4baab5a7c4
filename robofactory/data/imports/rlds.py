"""RLDS episodes in TFRecord files, in the two shapes that they come in.

An episode a record, as TensorFlow Datasets writes them: steps/action, steps/observation/image, ...; of every feature the
values of all steps one behind the other. A step a record, as OpenMARL's converter writes them: action,
observation/side_image, is_first, ... Each record names its features, so the first tells all keys; `dataset_info.json`
says how many episodes there are to be.

Source: tensorflow_datasets/core/example_serializer.py; OpenMARL, dataset/converters/zarr_to_rlds.py.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from robofactory.data import lerobot
from robofactory.data.imports.frames import open_picture
from robofactory.data.imports.source import (
    FETCH_AGAIN,
    NONE,
    Options,
    Recording,
    Source,
    choose,
    choose_cameras,
    choose_episodes,
    choose_fps,
    choose_vectors,
    numbered,
    one_instruction,
)
from robofactory.data.imports.tfrecord import Feature, Record, list_records, read_example
from robofactory.errors import UserError

STEPS = "steps/"
PICTURE_STARTS = (b"\x89PNG", b"\xff\xd8\xff")  # PNG, JPEG
USUAL_ACTION = ("action",)
USUAL_PROPRIO = ("observation/state", "observation/proprio")  # the first that there is
USUAL_INSTRUCTION = ("language_instruction", "observation/natural_language_instruction")
FLAGS = ("is_first", "is_last", "is_terminal", "reward", "discount")  # no vectors that anyone means


class RLDS(Source):
    def __init__(self, path: Path, options: Options):
        self.path, self.notes = path, []
        records = [record for file in _find(path) for record in list_records(file)]
        if not records:
            raise UserError(f"{path} has no record")
        self._is_stepwise = not any(name.startswith(STEPS) for name in read_example(records[0]))
        self._episodes = _group(records) if self._is_stepwise else [[record] for record in records]
        _check_count(path, len(self._episodes))
        self.episode_ids = choose_episodes(range(len(self._episodes)), options, path)
        self.fps = choose_fps(None, options, None, path, self.notes)

        first, length = self._read(0)
        cameras = [key for key, values in first.items() if _is_camera(values, f"{path}: {key}")]
        self.cameras = choose_cameras(cameras, {}, options, path, self.notes)
        self.image_sizes = {}
        for view, key in self.cameras.items():
            with open_picture(_texts(first[key])[0]) as image:
                self.image_sizes[view] = (image.height, image.width)
        vectors = {
            key: numbered(key.rpartition("/")[2], len(values) // length)
            for key, values in first.items()
            if isinstance(values, np.ndarray) and key not in FLAGS and len(values) and len(values) % length == 0
        }
        self._action_keys = options.action_keys or USUAL_ACTION
        self.action_names = choose_vectors(self._action_keys, vectors, "action", path)
        usual = next((key for key in USUAL_PROPRIO if key in vectors), USUAL_PROPRIO[0])
        self._proprio_keys = options.proprio_keys or (usual,)
        if self._proprio_keys == NONE:
            self._proprio_keys = ()
        self.proprio_names = choose_vectors(self._proprio_keys, vectors, "proprio", path)
        self._options = options
        self._instruction_key = ""
        if options.instruction is None:
            words = [key for key, values in first.items() if isinstance(values, list) and key not in cameras]
            usual = next((key for key in USUAL_INSTRUCTION if key in words), USUAL_INSTRUCTION[0])
            key = options.instruction_key or usual
            self._instruction_key = choose(
                key, words, "instruction", "--instruction_key NAME, or --instruction WORDS", path
            )

    def read(self, episode: int) -> Recording:
        features, length = self._read(episode)
        used = [*self.cameras.values(), *self._action_keys, *self._proprio_keys, self._instruction_key]
        missing = [key for key in used if key and key not in features]
        if missing:
            raise UserError(f"{self.path}: episode {episode} has no {', '.join(missing)}, the first has")
        words = _texts(features[self._instruction_key]) if self._instruction_key else []
        vectors = {key: _matrix(features[key], length) for key in (*self._action_keys, *self._proprio_keys)}
        return Recording(
            frames={view: _texts(features[key]) for view, key in self.cameras.items()},
            actions=np.concatenate([vectors[key] for key in self._action_keys], axis=1),
            proprio=np.concatenate(
                [np.zeros((length, 0), np.float32), *(vectors[key] for key in self._proprio_keys)], axis=1
            ),
            instruction=one_instruction(
                self._options, (word.decode(errors="replace") for word in words), self.path, episode
            ),
        )

    def _read(self, episode: int) -> tuple[dict[str, Feature], int]:
        """The features of all its steps, without `steps/` in front of the names, and the number of steps."""
        examples = [read_example(record) for record in self._episodes[episode]]
        if self._is_stepwise:
            return _join(examples), len(examples)
        features = {name.removeprefix(STEPS): values for name, values in examples[0].items()}
        # Every step has the flag, and pictures; in datasets without the flag the pictures count.
        lengths = [len(values) for key, values in features.items() if key in FLAGS or _starts_as_picture(values)]
        if not lengths:
            raise UserError(f"{self.path}: episode {episode} has neither pictures nor is_first; how long is it?")
        return features, lengths[0]


# ----------------------------------------------------------------------------------------------------------- records


def _find(path: Path) -> list[Path]:
    """The files of the training part, in order."""
    if path.is_file():
        return [path]
    folders = sorted({file.parent for file in path.rglob("*.tfrecord*")})
    if len(folders) != 1:
        listed = ", ".join(str(folder) for folder in folders[:4]) or "none"
        raise UserError(f"{path} has .tfrecord files in {len(folders)} folders ({listed}); give the one to import")
    files = sorted(folders[0].glob("*.tfrecord*"))
    training = [file for file in files if re.search(r"(^|-)train\.tfrecord", file.name)]
    return training or files


def _check_count(path: Path, num_episodes: int) -> None:
    """Against TFDS' own dataset_info.json, where there is one: a shard that is missing leaves no other trace."""
    folder = path.parent if path.is_file() else path
    for file in folder.rglob("dataset_info.json"):
        splits = lerobot.read_json(file, FETCH_AGAIN).get("splits")
        if not isinstance(splits, list) or path.is_file():
            continue
        for split in splits:
            wanted = sum(int(length) for length in split.get("shardLengths", []))
            if split.get("name") == "train" and wanted not in (0, num_episodes):
                raise UserError(
                    f"{path} has {num_episodes} episodes, {file.name} speaks of {wanted}; shards are missing"
                )


def _group(records: Sequence[Record]) -> list[list[Record]]:
    """The steps of each episode."""
    episodes: list[list[Record]] = []
    for record in records:
        flag = read_example(record).get("is_first")
        if not isinstance(flag, np.ndarray) or (not episodes and not flag[0]):
            raise UserError(f"{record.file}: the record at byte {record.offset} is one step, and no is_first says where episodes begin")  # fmt: skip
        if flag[0]:
            episodes.append([])
        episodes[-1].append(record)
    return episodes


def _join(steps: list[dict[str, Feature]]) -> dict[str, Feature]:
    """Features of single steps, one behind the other; those that every step has."""
    joined: dict[str, Feature] = {}
    for name, values in steps[0].items():
        if all(name in step for step in steps):
            parts = [step[name] for step in steps]
            is_array = isinstance(values, np.ndarray)
            joined[name] = np.concatenate(parts) if is_array else [value for part in parts for value in part]
    return joined


# ---------------------------------------------------------------------------------------------------------- features


def _starts_as_picture(values: Feature) -> bool:
    return isinstance(values, list) and len(values) > 0 and values[0].startswith(PICTURE_STARTS)


def _is_camera(values: Feature, name: str) -> bool:
    """Pictures with colours: depth is another number for each pixel."""
    if not _starts_as_picture(values):
        return False
    with open_picture(_texts(values)[0]) as image:
        return not image.mode.startswith(("I", "F"))


def _texts(values: Feature) -> list[bytes]:
    assert isinstance(values, list)
    return values


def _matrix(values: Feature, length: int) -> Shaped[np.ndarray, "rows d"]:
    """A row a step; where they do not divide, a row a number, which fits nothing."""
    assert isinstance(values, np.ndarray)
    return values.reshape(length, -1) if len(values) % length == 0 else values.reshape(len(values), 1)
