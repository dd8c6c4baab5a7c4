"""What all episodes of a dataset share, and whether a directory is one: `meta/robofactory.json` and `meta/info.json`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator

from robofactory import documents, files
from robofactory.config import SceneConfig, from_yaml, to_yaml
from robofactory.documents import Count, Document
from robofactory.errors import UserError

OWN, INFO = "meta/robofactory.json", "meta/info.json"
MAX_PIXELS = 2**26  # of a picture: 200 MB as RGB

Side = Annotated[int, Field(gt=0, le=2**15)]  # px


def _is_rate(fps: Any) -> int | float:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 1e-3 <= fps <= 1e5:
        raise ValueError("a number from 0.001 to 100,000")
    return fps


def _is_of_memory(size: tuple[int, int]) -> tuple[int, int]:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"a height and a width of at most {MAX_PIXELS:,} px together")
    return size


@dataclass(frozen=True)
class DatasetDescription:
    """What all episodes of a dataset share; recording only continues a dataset with the same description.

    It is `meta/robofactory.json` too: values from there are of these types, or refused.

    scene_yaml: the resolved scene (`config.to_yaml`), with its `visual_detail`, shader and cameras; empty where nobody
        knows it, as of data that was recorded elsewhere.
    image_sizes: view -> (height, width) in px.
    joint_names: of the dimensions of an action.
    fps: a whole number, or a fraction such as 29.97.
    noise_share: of the episodes that are recorded with perturbed actions.
    driver: who acts in them; the labels are the expert's. Of imported data: what they were imported from, and how.
        Datasets of the first version do not say it: there was no other.
    proprio_names: of the dimensions of proprio, none where it was not measured; None: the same as the action's.
    """

    scene_yaml: str
    agent_id: Count
    image_sizes: Annotated[
        dict[str, Annotated[tuple[Side, Side], AfterValidator(_is_of_memory)]], Field(min_length=1, max_length=100)
    ]
    joint_names: Annotated[tuple[str, ...], Field(min_length=1, max_length=10_000)]
    fps: Annotated[int | float, PlainValidator(_is_rate)]
    robot_type: str = "panda"
    noise_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    first_seed: Count = 0
    driver: str = "expert"
    proprio_names: Annotated[tuple[str, ...], Field(max_length=10_000)] | None = None

    __pydantic_config__ = Document.model_config

    def names_of_proprio(self) -> tuple[str, ...]:
        return self.joint_names if self.proprio_names is None else self.proprio_names

    def vector_columns(self) -> list[str]:
        """The columns with a vector a frame; without proprio there is one less, as LeRobot has no empty feature."""
        return ["observation.state", "action"] if self.names_of_proprio() else ["action"]


class Finished(Document):
    """What `meta/robofactory.json` of a finished dataset says beside its description.

    seeds: of the episodes, ascending.
    """

    seeds: Annotated[list[Count], Field(min_length=1)]


class Info(Document):
    """What is used of `meta/info.json`."""

    total_episodes: Count
    total_frames: Count


def read_description(directory: Path) -> DatasetDescription:
    return documents.read_json(files.inside(directory, OWN, directory), DatasetDescription)


def read_info(directory: Path) -> Info:
    return documents.read_json(files.inside(directory, INFO, directory), Info)


def read_finished(directory: Path) -> tuple[DatasetDescription, Info]:
    """The description of a finished dataset, and its `meta/info.json`.

    Raises:
        UserError: there is none, or it is another format's, or recording has not finished; or as `documents.read_json`.
    """
    if not (directory / OWN).exists():
        kind = foreign_kind(str(directory), lambda name: (directory / name).exists())
        if kind is not None:
            raise import_first(str(directory), kind)
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory} is a file; a dataset is a directory, robofactory record or import makes one")
        raise UserError(f"no dataset at {directory}; robofactory record makes one")
    if not (directory / INFO).exists():
        complete = len(list(directory.glob("data/chunk-*/file-*.parquet")))
        command = "the command that began it, of robofactory record or import, continues it"
        raise UserError(f"{directory} is unfinished ({complete} complete episodes); {command}")
    return read_description(directory), read_info(directory)


def foreign_kind(location: str, has: Callable[[str], bool]) -> str | None:
    """The format of `robofactory import` that a directory, a file or a URL seems to be.

    Args:
        has: whether there is something of this name below it.
    """
    name = location.rstrip("/").lower()
    if has(INFO):
        return "lerobot"
    if name.endswith((".zarr", ".zarr.zip")) or any(map(has, (".zgroup", ".zarray", "zarr.json"))):
        return "zarr"
    if has("dataset_info.json") or has("features.json"):
        return "rlds"
    return "maniskill" if name.endswith((".h5", ".hdf5")) else None


def import_first(location: str, kind: str) -> UserError:
    """For a dataset of another format, where one of RoboFactory's is needed."""
    place = location.removeprefix("file://")
    command = f"robofactory import {kind} {'DIRECTORY' if '://' in place else place} --task NAME"
    copy = "copy it to a disk and " if "://" in place else ""
    return UserError(f"{location} is not a dataset of RoboFactory's but looks like {kind}; {copy}import it first: {command}")  # fmt: skip


def is_complete(directory: Path, num_episodes: int) -> bool:
    """Whether a directory holds a finished dataset of this many episodes."""
    return (directory / INFO).exists() and read_info(directory).total_episodes == num_episodes


def require_views(views: Sequence[str], description: DatasetDescription, dataset: str) -> None:
    """Raises UserError where the dataset does not have all these views, or they are none."""
    has = ", ".join(description.image_sizes)
    if not views:
        raise UserError(f"{dataset}: no view is chosen; it has {has}")
    for view in views:
        if view not in description.image_sizes:
            raise UserError(f"{dataset} has no view {view!r}; it has {has}")


def require_scene(directory: Path, scene: SceneConfig) -> None:
    """Raises UserError unless a finished dataset was recorded in this scene; the line says what differs."""
    scene_yaml = read_finished(directory)[0].scene_yaml
    if not scene_yaml:
        raise UserError(f"{directory} was recorded in no scene of RoboFactory's; omit --config")
    recorded = from_yaml(SceneConfig, scene_yaml, f"the scene of {directory}")
    if recorded != scene:
        there, given = _only_in_each(to_yaml(recorded), to_yaml(scene))
        raise UserError(f"{directory} was recorded in another scene ({there[:100]} there, {given[:100]} by --config and the recipe); omit --config, or delete it to record again")  # fmt: skip


def require_same(wanted: DatasetDescription, found: DatasetDescription, directory: Path) -> None:
    """Raises UserError where a dataset has another description than the one asked for; the line says what differs."""
    for field in dataclasses.fields(DatasetDescription):
        old, new = getattr(found, field.name), getattr(wanted, field.name)
        if old != new:
            was, now = _only_in_each(old, new)
            raise UserError(
                f"{directory} was recorded with another {field.name} ({was[:100]} there, {now[:100]} asked for); "
                "delete it or choose another --num"
            )


def _only_in_each(old: Any, new: Any) -> tuple[str, str]:
    """What is in only one of two values: of a long text such as the scene, the lines that differ."""
    lines = [[line.strip() for line in str(value).splitlines()] for value in (old, new)]
    return tuple("; ".join(sorted(set(a) - set(b))) for a, b in (lines, lines[::-1]))  # type: ignore[return-value]
