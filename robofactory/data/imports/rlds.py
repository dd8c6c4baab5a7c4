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
from typing import Annotated

import numpy as np
from jaxtyping import Shaped
from pydantic import Field

from robofactory import documents
from robofactory.data.imports.frames import Unsuitable, open_picture
from robofactory.data.imports.source import (
    FETCH_AGAIN,
    MOST_DIMENSIONS,
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
from robofactory.documents import Count, Document
from robofactory.errors import UserError

STEPS = "steps/"
PICTURE_STARTS = (b"\x89PNG", b"\xff\xd8\xff")  # PNG, JPEG
USUAL_ACTION = ("action",)
USUAL_PROPRIO = ("observation/state", "observation/proprio")  # the first that there is
USUAL_INSTRUCTION = ("language_instruction", "observation/natural_language_instruction")
FLAGS = ("is_first", "is_last", "is_terminal", "reward", "discount")  # no vectors that anyone means


class Split(Document):
    """TensorFlow writes its numbers as text."""

    name: str = ""
    shardLengths: tuple[Annotated[str, Field(pattern=r"^\d{1,15}$")] | Count, ...] = ()


class DatasetInfo(Document):
    """`dataset_info.json`; splits that are no list are not TensorFlow's."""

    splits: list[Split] | dict[str, object] | None = None


class RLDS(Source):
    def __init__(self, path: Path, options: Options):
        self.path = path
        self.notes = notes = []
        files = _find(path)
        records = [record for file in files for record in list_records(file)]
        if not records:
            raise UserError(f"{path} has no record")
        sample = next((record for index, record in enumerate(records) if index not in options.skip), records[0])
        self._is_stepwise = not any(name.startswith(STEPS) for name in read_example(sample))
        self._episodes = _group(records) if self._is_stepwise else [[record] for record in records]
        if path.is_dir():
            _check_count(files[0].parent / "dataset_info.json", len(self._episodes))
        self.episode_ids = choose_episodes(range(len(self._episodes)), options, path)
        self.fps = choose_fps(None, options, None, path, notes)

        number = self.episode_ids[0]
        first, length = self._read(number)
        unsuitable: dict[str, str] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for key, values in first.items():
            if _starts_as_picture(values):
                try:
                    with open_picture(values[0]) as image:  # type: ignore[arg-type]
                        sizes[key] = (image.height, image.width)
                except Unsuitable as error:
                    unsuitable[key] = str(error)
                except UserError as error:
                    raise UserError(
                        f"{path}: episode {number}: {key}, frame 0: {error}; add --skip {number} to leave it out"
                    ) from None
        self.cameras = choose_cameras(list(sizes), unsuitable, options, path, notes)
        self.image_sizes = {view: sizes[key] for view, key in self.cameras.items()}
        vectors = {
            key: numbered(key.rpartition("/")[2], len(values) // length)
            for key, values in first.items()
            if isinstance(values, np.ndarray) and key not in FLAGS and len(values) and len(values) % length == 0
            if len(values) // length <= MOST_DIMENSIONS
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
            words = [key for key, values in first.items() if isinstance(values, list) and key not in sizes]
            words = [key for key in words if key not in unsuitable]
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
        name = f"{self.path}: episode {episode}"
        vectors = {
            key: _matrix(features[key], length, f"{name}: {key}") for key in (*self._action_keys, *self._proprio_keys)
        }
        words = (
            _texts(features[self._instruction_key], f"{name}: {self._instruction_key}") if self._instruction_key else []
        )
        try:
            instructions = [word.decode() for word in words]
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: {self._instruction_key} is not UTF-8 (byte {error.start}); say --instruction WORDS") from None  # fmt: skip
        return Recording(
            frames={view: _texts(features[key], f"{name}: {key}") for view, key in self.cameras.items()},
            actions=np.concatenate([vectors[key] for key in self._action_keys], axis=1),
            proprio=np.concatenate(
                [np.zeros((length, 0), np.float32), *(vectors[key] for key in self._proprio_keys)], axis=1
            ),
            instruction=one_instruction(self._options, instructions, self.path, episode),
            file=self._episodes[episode][0].file,
        )

    def _read(self, episode: int) -> tuple[dict[str, Feature], int]:
        """The features of all its steps, without `steps/` in front of the names, and the number of steps."""
        examples = [read_example(record) for record in self._episodes[episode]]
        name = f"{self.path}: episode {episode}"
        if self._is_stepwise:
            features, length = _join(examples), len(examples)
        else:
            features = {name.removeprefix(STEPS): values for name, values in examples[0].items()}
            # Every step has the flag, and pictures; in datasets without the flag the pictures count.
            lengths = {key: len(v) for key, v in features.items() if key in FLAGS or _starts_as_picture(v)}
            length = next(iter(lengths.values()), 0)
            if length == 0:
                raise UserError(f"{name} has neither pictures nor is_first; how long is it?")
            other = next((key for key, count in lengths.items() if count != length), None)
            if other is not None:
                raise UserError(
                    f"{name} has {length} of {next(iter(lengths))}, but {lengths[other]} of {other}; {FETCH_AGAIN}"
                )
        for flag, others in (("is_first", slice(1, None)), ("is_last", slice(None, -1))):
            values = features.get(flag)
            if isinstance(values, np.ndarray) and len(values) == length and values[others].any():
                raise UserError(f"{name} is more than one: {flag} is set in its middle; {FETCH_AGAIN}")
        return features, length


# ----------------------------------------------------------------------------------------------------------- records


def _find(path: Path) -> list[Path]:
    """The files of the training part, in order. Raises UserError where one is missing by their names."""
    if not path.is_dir():
        return [path]
    folders = sorted({file.parent for file in path.rglob("*.tfrecord*")})
    if len(folders) != 1:
        listed = ", ".join(str(folder) for folder in folders[:4]) or "none"
        raise UserError(f"{path} has .tfrecord files in {len(folders)} folders ({listed}); give the one to import")
    files = sorted(folders[0].glob("*.tfrecord*"))
    training = [file for file in files if re.search(r"(^|-)train\.tfrecord", file.name)]
    files = training or files
    numbers = [re.search(r"-(\d{5,9})-of-(\d{5,9})$", file.name) for file in files]
    if all(numbers) and len(files) < (wanted := max(int(number[2]) for number in numbers if number)):
        raise UserError(f"{folders[0]} has {len(files)} shards of {wanted}; {FETCH_AGAIN}")
    return files


def _check_count(file: Path, num_episodes: int) -> None:
    """Against TFDS' own dataset_info.json, where there is one: a shard that is missing leaves no other trace."""
    if not file.exists():
        return
    splits = documents.read_json(file, DatasetInfo, FETCH_AGAIN).splits
    for split in splits if isinstance(splits, list) else []:
        wanted = sum(int(length) for length in split.shardLengths)
        if split.name == "train" and wanted not in (0, num_episodes):
            raise UserError(
                f"{file.parent} has {num_episodes} episodes, {file.name} speaks of {wanted}; shards are missing"
            )


def _group(records: Sequence[Record]) -> list[list[Record]]:
    """The steps of each episode."""
    episodes: list[list[Record]] = []
    for record in records:
        flag = read_example(record).get("is_first")
        if not isinstance(flag, np.ndarray) or len(flag) != 1 or (not episodes and not flag[0]):
            raise UserError(f"{record.file}: the record at byte {record.offset} is one step, and no is_first says where episodes begin")  # fmt: skip
        if flag[0]:
            episodes.append([])
        episodes[-1].append(record)
    return episodes


def _join(steps: list[dict[str, Feature]]) -> dict[str, Feature]:
    """Features of single steps, one behind the other; those that every step has, as the same kind."""
    joined: dict[str, Feature] = {}
    for name, values in steps[0].items():
        parts = [
            step[name] for step in steps if name in step and isinstance(step[name], list) == isinstance(values, list)
        ]
        if len(parts) == len(steps):
            is_array = isinstance(values, np.ndarray)
            joined[name] = np.concatenate(parts) if is_array else [value for part in parts for value in part]
    return joined


# ---------------------------------------------------------------------------------------------------------- features


def _starts_as_picture(values: Feature) -> bool:
    return isinstance(values, list) and len(values) > 0 and values[0].startswith(PICTURE_STARTS)


def _texts(values: Feature, name: str) -> list[bytes]:
    if not isinstance(values, list):
        raise UserError(f"{name} is numbers, in the first episode it is pictures or text")
    return values


def _matrix(values: Feature, length: int, name: str) -> Shaped[np.ndarray, "rows d"]:
    """A row for each step."""
    if not isinstance(values, np.ndarray):
        raise UserError(f"{name} is text, in the first episode it is numbers")
    if len(values) % length:
        raise UserError(f"{name} has {len(values)} numbers in {length} steps; the lengths do not fit")
    return values.reshape(length, -1)
