"""What LeRobot's datasets say about themselves under meta/, in all the ways in which the versions 2.0 to 3.0 say it.

Source: lerobot 0.3.3 (2.1) and 0.4.4 (3.0), and what public datasets have in place of what these write.
"""

import glob
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pyarrow as pa
from pydantic import BeforeValidator, Field

from robofactory import documents, files
from robofactory.data import lerobot
from robofactory.data.imports.frames import Unsuitable, size_of
from robofactory.data.imports.lerobot_rows import Part, columns_of, open_table, read_rows, to_list
from robofactory.data.imports.source import FETCH_AGAIN, numbered
from robofactory.documents import Count, Document, PositiveCount
from robofactory.errors import UserError, did_you_mean

EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VERSIONS = ("v2.0", "v2.1", "v3.0")
MAX_LENGTH = 65_536  # numbers of a vector
MAX_EPISODES = 1_000_000
MAX_DIGITS = 20  # that a number in a path is padded to
MAX_TEMPLATE = 1000  # characters
SHOWN_CHARACTERS = 80  # of text in a message
LATEST_S = 1e8  # in a video


class Feature(Document):
    """A column, or a video beside the table. `names`: see `names_of`."""

    dtype: str
    shape: list[Count] | None = None
    names: Any = None
    info: dict[str, Any] | None = None
    video_info: dict[str, Any] | None = None


class Info(Document):
    """meta/info.json. `data_path`, `video_path`: see `PathTemplate`."""

    codebase_version: str
    robot_type: str | None = None
    fps: Annotated[float, Field(gt=0)] | None = None
    features: dict[str, Feature]
    data_path: str
    video_path: str | None = None
    chunks_size: PositiveCount | None = None
    total_episodes: Count | None = None
    total_frames: Count | None = None


class Task(Document):
    task_index: Count
    task: str | None


def _integer(value: Any) -> Any:
    """pandas makes floats of a column of whole numbers as soon as one is missing."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None if isinstance(value, float) and math.isnan(value) else value


class VideoPlace(Document):
    """Where an episode's video lies in 3.0; nothing where this camera did not record it."""

    chunk_index: Annotated[Count | None, BeforeValidator(_integer)]
    file_index: Annotated[Count | None, BeforeValidator(_integer)]
    from_timestamp: Annotated[float, Field(ge=0, lt=LATEST_S)] | None
    to_timestamp: Annotated[float, Field(ge=0, lt=LATEST_S)] | None = None


class Episode(Document):
    """A line of meta/episodes.jsonl."""

    episode_index: Annotated[Count, BeforeValidator(_integer)]
    length: Annotated[Count | None, BeforeValidator(_integer)] = None


class PlacedEpisode(Episode):
    """A row of meta/episodes in 3.0, its columns `data/...` and `videos/{key}/...` grouped."""

    data_place: tuple[int, int] | None
    videos: dict[str, VideoPlace]


AnEpisode = TypeVar("AnEpisode", bound=Episode)


class Span(Document):
    """Dimensions that belong together. `original_key`: the vector that they are of, if not the usual one."""

    start: Count | None = None
    end: Count | None = None
    original_key: str | None = None


class Modality(Document):
    """meta/modality.json, which GR00T's datasets have beside the rest."""

    state: dict[str, Span] = Field(default_factory=dict)
    action: dict[str, Span] = Field(default_factory=dict)


def read_info(path: Path) -> Info:
    """Raises UserError where this is no LeRobot dataset, or one of another version."""
    file = path / "meta/info.json"
    if not file.is_file():
        if (path / "meta/robofactory.json").is_file():
            raise UserError(f"{path} is an unfinished dataset of RoboFactory; the command that began it finishes it")
        raise UserError(f"{path} has no meta/info.json; is it a LeRobot dataset?")
    content = documents.read_json(meta_file(path, "info.json"), dict[str, Any], FETCH_AGAIN)
    if "codebase_version" not in content:
        keys = brief(", ".join(list(content)[:6])) or "nothing"
        raise UserError(f"{path} is no LeRobot dataset: its meta/info.json has no codebase_version, but {keys}")
    version = content["codebase_version"]
    if isinstance(version, str) and version not in VERSIONS:
        raise UserError(f"{path} is of LeRobot's version {brief(version)}; v2.0, v2.1 and v3.0 can be imported")
    return documents.check(content, Info, str(file))


def brief(text: str) -> str:
    """For messages."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def meta_file(path: Path, name: str) -> Path:
    """A file under meta/, which is there and no link to elsewhere."""
    return files.inside(path, f"meta/{name}", path, FETCH_AGAIN)


# ------------------------------------------------------------------------------------------------------------ paths


class PathTemplate:
    """`data_path` and `video_path`: text with {name} and {name:03d}, of the fields that are known and nothing else."""

    def __init__(self, text: str, fields: Collection[str], source: str):
        self._text, self._parts = text, []
        source = f"{source} {brief(text)!r}"
        if not text or len(text) > MAX_TEMPLATE or Path(text).is_absolute() or ".." in Path(text).parts or "\0" in text:
            raise UserError(f"{source} is no path below the dataset; it is refused")
        for token in re.findall(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+", text):
            if token in ("{{", "}}"):
                token = token[0]
            elif token[0] in "{}":
                field = re.fullmatch(r"\{(\w+)(?::(?:0(\d{1,2}))?d?)?\}", token)
                if field is None or int(field[2] or 0) > MAX_DIGITS:
                    raise UserError(f"{source} has {brief(token)!r}; only {{name}} and {{name:03d}} are understood")
                if field[1] not in fields:
                    known = ", ".join(fields)
                    raise UserError(f"{source} has {brief(token)!r}{did_you_mean(field[1], fields)}; known are {known}")
                self._parts.append((field[1], int(field[2] or 0)))
                continue
            self._parts.append(token)

    @property
    def fields(self) -> set[str]:
        return {part[0] for part in self._parts if not isinstance(part, str)}

    def fill(self, values: Mapping[str, int | str]) -> str:
        return "".join(p if isinstance(p, str) else str(values[p[0]]).zfill(p[1]) for p in self._parts)

    def find(self, directory: Path) -> list[Path]:
        """The files that are there for any values, in the order of the numbers in their names."""
        pattern = "".join(glob.escape(p) if isinstance(p, str) else "*" for p in self._parts)
        found = glob.glob(re.sub(r"\*+", "*", pattern), root_dir=directory)
        names = sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d{1,20}", name)])
        return [files.inside(directory, name, f"the pattern {self._text!r}", FETCH_AGAIN) for name in names]


# ------------------------------------------------------------------------------------------------- cameras, vectors


def cameras(features: Mapping[str, Feature]) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Height and width of the cameras that can be imported, and why the others cannot."""
    usable, unusable = {}, {}
    for key, feature in features.items():
        if feature.dtype not in ("image", "video"):
            continue
        details = (feature.info or {}) | (feature.video_info or {})
        if any(details.get(flag) for flag in ("video.is_depth_map", "is_depth_map")):
            unusable[key] = "it is a depth map"
            continue
        try:
            usable[key] = size_of(tuple(feature.shape or ()))  # older datasets have the channels first
        except Unsuitable as error:
            unusable[key] = f"meta/info.json: {error}"
    return usable, unusable


def vector_length(key: str, feature: Feature) -> int | None:
    """How many numbers a row has; None: it is no vector."""
    if key in lerobot.SCALARS or not feature.dtype.startswith(("float", "int", "uint", "bool")):
        return None
    if len(shape := feature.shape or [1]) != 1 or not 0 < shape[0] <= MAX_LENGTH:
        return None
    return shape[0]


def names_of(path: Path, key: str, feature: Feature, notes: list[str]) -> list[str]:
    """A name for each dimension of a vector, no two alike, with the word gripper wherever the source has it.

    Known are a list; lists in a list; a dictionary with one or several lists under any keys; one of names and indices;
    of indices and names; of names and anything; what GR00T's modality.json says. Others are numbered, and `notes` gets
    a line.
    """
    short, size = re.sub(r"^observation\.(states?\.)?|^actions?\.", "", key), (feature.shape or [1])[0]
    names = _names(feature.names, size) or _names_of_spans(path, key, size)
    if names is None:
        if feature.names not in (None, [], {}) and size > 1:
            notes.append(
                f"the names of {key} in meta/info.json do not fit its {size} dimensions: {brief(str(feature.names))}; "
                "they are numbered, and none is known to be a gripper"
            )
        return [short] if size == 1 and short != key else numbered(short, size)
    if _is_gripper(short):
        names = [name if _is_gripper(name) else f"{short}_{name}" for name in names]
    return distinct(names)


def _names(found: Any, size: int) -> list[str] | None:
    """None: they do not fit."""
    if isinstance(found, dict) and len(found) == size:
        if all(map(_is_index, found.values())) and sorted(found.values()) == list(range(size)):
            return sorted(found, key=lambda name: found[name])
        if set(found) == set(map(str, range(size))) and all(isinstance(name, str) for name in found.values()):
            return [found[str(index)] for index in range(size)]
    grouped = list(_leaves(found, ""))
    if len(grouped) != size or not all(name for _, name in grouped):
        return [*found] if isinstance(found, dict) and len(found) == size else None
    counts = Counter(name for _, name in grouped)
    return [
        f"{group}_{name}" if group and (counts[name] > 1 or _is_gripper(group) > _is_gripper(name)) else name
        for group, name in grouped
    ]


def _leaves(found: Any, group: str) -> Iterator[tuple[str, str]]:
    """Each name, and the key that its list is under where there are several. An empty name: something else is there."""
    if isinstance(found, list):
        for value in found:
            yield from _leaves(value, group)
    elif isinstance(found, dict):
        for key, value in found.items():
            is_nested = isinstance(value, dict | list | str)
            yield from _leaves(value if is_nested else None, key if len(found) > 1 or _is_gripper(key) else group)
    else:
        yield group, str(found).strip() if isinstance(found, str) or _is_index(found) else ""


def _names_of_spans(path: Path, key: str, size: int) -> list[str] | None:
    """None: there is no modality.json, or its spans are not this vector from the first dimension to the last."""
    if not (path / "meta/modality.json").exists():
        return None
    modality = documents.read_json(meta_file(path, "modality.json"), Modality, FETCH_AGAIN)
    spans = [*((span.original_key or "observation.state", name, span) for name, span in modality.state.items())]
    spans += [(span.original_key or "action", name, span) for name, span in modality.action.items()]
    names: list[str] = []
    for _, name, span in sorted((s for s in spans if s[0] == key), key=lambda s: s[2].start or 0):
        count = (span.end or 0) - len(names)
        if span.start != len(names) or not 0 < count <= size:
            return None
        names += [name] if count == 1 else numbered(name, count)
    return names if len(names) == size else None


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_gripper(name: str) -> bool:
    return "gripper" in name.lower()


def distinct(names: Sequence[str]) -> list[str]:
    """Names that occur twice get a number, as `numbered` gives: gripper, gripper -> gripper_0, gripper_1."""
    counts, taken, result = Counter(names), set(names), []
    following: Counter[str] = Counter()
    for name in names:
        if counts[name] == 1:
            result.append(name)
            continue
        while (new := f"{name}_{following[name]}") in taken:
            following[name] += 1
        taken.add(new)
        result.append(new)
    return result


# --------------------------------------------------------------------------------------------------- tasks, episodes


def read_tasks(path: Path) -> tuple[Path, dict[int, str | None]]:
    """The file and its instructions by their number."""
    is_table = (path / "meta/tasks.parquet").exists()
    table = meta_file(path, "tasks.parquet" if is_table else "tasks.jsonl")
    rows = _task_rows(table) if is_table else documents.read_json_lines(table, Task, FETCH_AGAIN)
    tasks: dict[int, str | None] = {}
    for row in rows:
        if tasks.setdefault(row.task_index, row.task) != row.task:
            raise UserError(
                f"{table}: task_index {row.task_index} is {brief(str(tasks[row.task_index]))!r} and {brief(str(row.task))!r}"
            )
        if len(tasks) > MAX_EPISODES:
            raise UserError(f"{table} has more than {MAX_EPISODES:,} tasks")
    return table, tasks


def _task_rows(table: Path) -> Iterator[Task]:
    """The words are pandas' index, which has a name in some versions only; others write columns beside it."""
    with open_table(table) as file:
        kinds, count = {field.name: field.type for field in file.schema_arrow}, file.metadata.num_rows
    words = [name for name, kind in kinds.items() if _is_text(kind)]
    usual = [name for name in ("task", "__index_level_0__") if name in words]
    if not usual and len(words) != 1:
        raise UserError(f"{table} has no column of words called task; it has {', '.join(kinds) or 'none'}")
    column = [*usual, *words][0]
    for row, batch in read_rows(Part(table, 0, count), ["task_index", column]) if count else ():
        values = [to_list(batch.column(name), f"{table}: column {name!r}") for name in ("task_index", column)]
        rows = [{"task_index": index, "task": task} for index, task in zip(*values, strict=True)]
        yield from documents.check(rows, list[Task], f"{table}: from row {row}", FETCH_AGAIN)


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(plain) or pa.types.is_large_string(plain)


def read_old_episodes(path: Path) -> dict[int, Episode]:
    """Of 2.x, by their numbers, ascending."""
    return _by_number(documents.read_json_lines(meta_file(path, "episodes.jsonl"), Episode, FETCH_AGAIN), path)


def read_new_episodes(path: Path, videos: Sequence[str]) -> dict[int, PlacedEpisode]:
    """Of 3.0, by their numbers, ascending."""
    return _by_number(_episode_rows(path, videos), path)


def _by_number(rows: Iterator[AnEpisode], path: Path) -> dict[int, AnEpisode]:
    found: dict[int, AnEpisode] = {}
    for row in rows:
        if row.episode_index in found:
            raise UserError(f"{path}: meta/ lists episode {row.episode_index} twice")
        if len(found) >= MAX_EPISODES:
            raise UserError(f"{path}: meta/ lists more than {MAX_EPISODES:,} episodes")
        found[row.episode_index] = row
    return dict(sorted(found.items()))


def _episode_rows(path: Path, videos: Sequence[str]) -> Iterator[PlacedEpisode]:
    tables = PathTemplate(EPISODES_PATH, ("chunk_index", "file_index"), str(path)).find(path)
    if not tables:
        raise UserError(f"{path} has no meta/episodes/chunk-*/file-*.parquet; {FETCH_AGAIN}")
    columns = ["episode_index"]
    columns += [f"videos/{key}/{part}" for key in videos for part in ("chunk_index", "file_index", "from_timestamp")]
    optional = ["length", "data/chunk_index", "data/file_index", *(f"videos/{key}/to_timestamp" for key in videos)]
    for table in tables:
        there, count = columns_of(table)
        names = columns + [name for name in optional if name in there]
        for row, batch in read_rows(Part(table, 0, count), names) if count else ():
            values = [to_list(batch.column(name), f"{table}: column {name!r}") for name in names]
            rows = [_grouped(dict(zip(names, row, strict=True)), videos) for row in zip(*values, strict=True)]
            yield from documents.check(rows, list[PlacedEpisode], f"{table}: from row {row}", FETCH_AGAIN)


def _grouped(row: dict[str, Any], videos: Sequence[str]) -> dict[str, Any]:
    """A row as `PlacedEpisode` has it."""
    data = (row.get("data/chunk_index"), row.get("data/file_index"))
    parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    places = {key: {part: row.get(f"videos/{key}/{part}") for part in parts} for key in videos}
    return row | {"data_place": data if all(map(_is_index, data)) else None, "videos": places}
