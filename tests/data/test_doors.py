"""Datasets that others wrote, or damaged: one line that names the file, and nothing is trained on."""

import io
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demonstrations import VIEWS, description, episode, files_of, write_dataset
from faults import column, put_picture
from PIL import Image

from robofactory.config import load_recipe
from robofactory.data import lerobot
from robofactory.data.dataset import Batches, FrameDataset, load_splits
from robofactory.data.description import OWN, read_finished
from robofactory.data.episodes import DatasetReader, DatasetWriter, encode_png
from robofactory.data.inspect import main
from robofactory.data.order import FrameOrder, InOrder
from robofactory.data.png import decode_png
from robofactory.data.streaming import StreamedReader
from robofactory.data.survey import survey
from robofactory.errors import UserError

FIRST = "data/chunk-000/file-000.parquet"
OWN_WORDS, INFO, EPISODES = "meta/robofactory.json", "meta/info.json", "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, bytes]:
    """The files of a dataset."""
    return files_of(write_dataset(tmp_path_factory.mktemp("doors") / "set", scene_yaml=""))


@pytest.fixture
def dataset(sound, tmp_path) -> Path:
    for name, content in sound.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "set"


def refusals(dataset: Path) -> list[str]:
    """What every way to open it says: as data on this disk, behind a URL, and to look at."""
    said = []
    for way in (
        lambda: DatasetReader(dataset),
        lambda: StreamedReader(f"file://{dataset}", VIEWS, dataset.parent / "cache", 2).frame(0, 0),
        lambda: survey(dataset),
    ):
        with pytest.raises(UserError) as refused:
            way()
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
        said.append(str(refused.value))
    return said


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scene_yaml": None}, "key 'scene_yaml' is null; needed: a valid string"),
        ({"agent_id": -1}, "key 'agent_id' is -1"),
        ({"agent_id": True}, "key 'agent_id' is true"),
        ({"image_sizes": {}}, "key 'image_sizes' is {}"),
        ({"image_sizes": [24, 32]}, "key 'image_sizes' is"),
        ({"image_sizes": {"side": [24]}}, "'image_sizes.side.1' is missing"),
        ({"image_sizes": {"side": [24, "32"]}}, "'image_sizes.side.1' is \"32\"; needed: a valid integer"),
        ({"image_sizes": {"side": [30000, 30000]}}, "at most 67,108,864 px together"),
        ({"joint_names": "abc"}, "'joint_names' is \"abc\"; needed: a valid array"),
        ({"joint_names": []}, "'joint_names' is []"),
        ({"fps": 0}, "'fps' is 0; needed: a number from 0.001 to 100,000"),
        ({"fps": "20"}, "'fps' is \"20\"; needed: a number"),
        ({"fps": True}, "'fps' is true; needed: a number"),
        ({"noise_share": 2}, "'noise_share' is 2; needed: less than or equal to 1"),
        ({"proprio_names": 3}, "'proprio_names"),
    ],
)
def test_a_description_of_another_type_is_refused_by_its_key(dataset, changes, message):
    change_json(dataset / OWN_WORDS, **changes)
    assert all(message in line and OWN_WORDS in line for line in refusals(dataset))


@pytest.mark.parametrize("name", [OWN_WORDS, INFO])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "\x00", '{"fps": NaN}', "[" * 100_000])
def test_a_document_that_is_no_document_is_one_line(dataset, name, text):
    (dataset / name).write_text(text)
    for way in (lambda: DatasetReader(dataset), lambda: survey(dataset)):
        with pytest.raises(UserError, match=name) as refused:
            way()
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_description_that_is_not_utf_8_is_named(dataset):
    (dataset / OWN_WORDS).write_bytes(b'{"scene_yaml": "\xff"}')
    with pytest.raises(UserError, match=r"robofactory\.json is not UTF-8 \(byte 16\)"):
        DatasetReader(dataset)


@pytest.mark.parametrize("count", [-1, 1.5, "3", None, 10**30])
def test_a_count_that_is_none_is_refused(dataset, count):
    change_json(dataset / INFO, total_episodes=count)
    for way in (DatasetReader, survey):
        with pytest.raises(UserError, match=r"info\.json: key 'total_episodes' is"):
            way(dataset)


def test_counts_of_terabytes_cost_nothing(dataset):
    change_json(dataset / INFO, total_episodes=10**12, total_frames=10**15)
    with pytest.raises(UserError, match=r"file-003\.parquet is missing"):
        DatasetReader(dataset)
    assert survey(dataset).missing == "meta/info.json says 1000000000000 episodes, there are files of 3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"action": 3}, "key 'action' is 3; needed: an object"),
        (lambda s: {k: v for k, v in s.items() if k != "action"}, "key 'action' is missing"),
        (lambda s: s | {"action": s["action"] | {"q01": [0.0]}}, "action.q01 has 1 numbers; 8 are needed"),
        (lambda s: s | {"action": s["action"] | {"min": ["a"] * 8}}, "key 'action.min.0' is \"a\""),
        (lambda s: s | {"action": s["action"] | {"max": [-9.0] * 8}}, "action has a minimum above its maximum"),
        (lambda s: s | {"action": s["action"] | {"mean": [7.0] * 8}}, "or a mean or a quantile beyond them"),
        (lambda s: {k: v for k, v in s.items() if k != "observation.state"}, "observation.state.min has 0 numbers; 8"),
    ],
)
def test_statistics_of_a_stream_are_of_its_dimensions(dataset, change, message):
    path = dataset / "meta/stats.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError) as refused:
        StreamedReader(f"file://{dataset}", VIEWS, dataset.parent / "cache", 2)
    assert message in str(refused.value) and "meta/stats.json" in str(refused.value)


# ------------------------------------------------------------------------------------------------------------- tables

VECTORS = np.zeros((5, 8), np.float32)
TEXT = "text in place of numbers"


def _list(values: list) -> pa.Array:
    return pa.array(values, pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("action", pa.array([TEXT] * 5), "column action is string; 8 numbers in each row are needed"),
        ("action", pa.array([{"a": 1}] * 5), "column action is struct<a: int64>; 8 numbers"),
        ("action", _list([[0.0] * 8] * 4 + [[0.0] * 7]), "column action has 7 numbers in row 4; 8 are needed"),
        ("action", _list([[0.0] * 9] * 5), "column action has 9 numbers in row 0; 8 are needed"),
        ("action", _list([[0.0] * 8] * 4 + [None]), "column action has nothing in row 4"),
        ("action", _list([[0.0] * 7 + [None]] * 5), "column action has numbers that are missing"),
        ("action", pa.array([[1e300] * 8] * 5), "action is not finite"),
        ("action", pa.array([0.0] * 5), "column action has 1 numbers in row 0; 8 are needed"),
        ("observation.state", _list([[np.nan] * 8] * 5), "observation.state is not finite"),
        ("timestamp", pa.array([TEXT] * 5), "column timestamp is string; float is needed"),
        ("timestamp", pa.array([0.0, None, 0.1, 0.2, 0.3]), "column timestamp has nothing in row 1"),
        ("perturbed", pa.array([0.0] * 5), "column perturbed is double; bool is needed"),
        ("task_index", pa.array([1] * 5), "its task_index 1 is none of meta/tasks.parquet"),
        ("task_index", pa.array([-1] * 5), "its task_index -1 is none of"),
        ("task_index", pa.array([0, 0, 0, 0, 1]), "its task_index changes"),
        ("observation.images.side", pa.array([b"png"] * 5), "column observation.images.side is binary; struct<"),
        ("observation.images.side", pa.array([None] * 5, lerobot.IMAGE_TYPE), "frame 0, view 'side': the picture is missing"),
    ],
)  # fmt: skip
def test_a_column_that_is_something_else_is_refused_by_name(dataset, name, values, message):
    path = dataset / FIRST
    path.write_bytes(lerobot.to_parquet(column(pq.read_table(path), name, values)))
    with pytest.raises(UserError) as refused:
        DatasetReader(dataset)
    assert message in str(refused.value) and "file-000.parquet" in str(refused.value)
    with pytest.raises(UserError) as refused:
        StreamedReader(f"file://{dataset}", VIEWS, dataset.parent / "cache", 2).actions(0)
    assert message in str(refused.value)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 8)])
def test_vectors_as_other_tools_write_them_are_the_same_numbers(dataset, kind):
    path, expected = dataset / FIRST, DatasetReader(dataset)
    table = pq.read_table(path)
    path.write_bytes(lerobot.to_parquet(column(table, "action", table["action"].cast(kind))))
    np.testing.assert_array_equal(DatasetReader(dataset).all_actions, expected.all_actions)


def test_a_column_that_is_there_twice_is_refused(dataset):
    path = dataset / FIRST
    table = pq.read_table(path)
    pq.write_table(table.append_column("perturbed", table["perturbed"]), path, compression="none")
    with pytest.raises(UserError, match="has several columns perturbed"):
        DatasetReader(dataset)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"task_index": [0], "task": [3]}, "column task is not text in each row"),
        ({"task_index": [0], "task": [None]}, "column task is not text in each row"),
        ({"task_index": ["0"], "task": ["lift"]}, "column task_index is string; int64 is needed"),
        ({"task_index": [0, 0], "task": ["lift", "push"]}, "has a task_index twice"),
        ({"task_index": [0]}, "has no column task"),
    ],
)
def test_tasks_that_are_none_are_refused(dataset, table, message):
    pq.write_table(pa.table(table), dataset / "meta/tasks.parquet")
    assert all(message in line and "tasks.parquet" in line for line in refusals(dataset))


def test_an_instruction_that_is_not_utf_8_is_refused(dataset):
    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32).tobytes()), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"task_index": [0], "task": text}), dataset / "meta/tasks.parquet")
    assert all("column task is not UTF-8" in line for line in refusals(dataset))


def test_an_instruction_is_found_by_its_number_not_by_its_row(dataset):
    pq.write_table(pa.table({"task_index": [1, 0], "task": ["push", "lift"]}), dataset / "meta/tasks.parquet")
    assert DatasetReader(dataset).instructions == ["lift"] * 3


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("length", pa.array([5, 6, 10**15]), "an episode of 1,000,000,000,000,000 frames"),
        ("length", pa.array([5, 0, 7]), "an episode of 0 frames"),
        ("length", pa.array([5.0, 6.0, 7.0]), "column length is double; int64 is needed"),
        ("episode_index", pa.array([0, 1, 1]), "its episode_index does not count 0, 1, 2"),
        ("tasks", pa.array(["lift"] * 3), "column tasks has no list of instructions"),
        ("tasks", pa.array([["lift"], [], ["lift"]]), "column tasks has no list of instructions"),
        ("tasks", pa.array([[1], [2], [3]]), "column tasks is not text in each row"),
    ],
)
def test_a_table_of_episodes_that_is_none_is_refused(dataset, name, values, message):
    pq.write_table(column(pq.read_table(dataset / EPISODES), name, values), dataset / EPISODES)
    for way in (lambda: StreamedReader(f"file://{dataset}", VIEWS, dataset / "c", 2), lambda: survey(dataset)):
        with pytest.raises(UserError) as refused:
            way()
        assert message in str(refused.value) and EPISODES in str(refused.value)


def test_a_list_of_fewer_episodes_is_found(dataset):
    pq.write_table(pq.read_table(dataset / EPISODES).slice(0, 2), dataset / EPISODES)
    assert survey(dataset).problems == ("meta/episodes says 2 episodes, the files hold 3",)
    with pytest.raises(UserError, match=r"has 2 episodes in meta/episodes/.*, 3 in meta/info\.json"):
        StreamedReader(f"file://{dataset}", VIEWS, dataset.parent / "cache", 2)


def test_a_stream_whose_table_and_files_disagree_is_refused(dataset):
    path = dataset / FIRST
    path.write_bytes(lerobot.to_parquet(pq.read_table(path).slice(0, 4)))
    reader = StreamedReader(f"file://{dataset}", VIEWS, dataset.parent / "cache", 2)
    with pytest.raises(UserError, match=r"episode 0 has 4 frames and the instruction 'lift the barrier', in .* has 5"):
        reader.frame(0, 4)


def test_an_episode_that_says_nothing_about_itself_is_not_continued(dataset):
    path = dataset / FIRST
    for metadata, message in (
        (None, "metadata 'robofactory': key 'seed' is missing"),
        ({b"robofactory": b"{"}, "metadata 'robofactory' is not valid JSON"),
        ({b"robofactory": b'{"seed": 100000000000, "instruction": "lift"}'}, "key 'seed' is 100000000000"),
    ):
        path.write_bytes(lerobot.to_parquet(pq.read_table(path).replace_schema_metadata(metadata)))
        with pytest.raises(UserError) as refused:
            DatasetWriter(dataset, read_finished(dataset)[0])
        assert message in str(refused.value) and "file-000.parquet" in str(refused.value)


# ---------------------------------------------------------------------------------------------------- bombs and links


def png_of_size(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def test_a_picture_that_unpacks_to_gigabytes_is_never_unpacked(dataset, monkeypatch):
    bomb = png_of_size(9000, 8000)  # 216 MB
    monkeypatch.setattr("robofactory.data.pictures.decode_png", lambda data: pytest.fail() if data == bomb else decode_png(data))  # fmt: skip
    put_picture(dataset / FIRST, "side", 0, bomb)
    with pytest.raises(UserError, match=r"frame 0, view 'side': the picture is 9000x8000 px, 8-bit RGB, not 32x24 px"):
        DatasetReader(dataset)
    assert survey(dataset).pictures[0].views["side"].unreadable == "frame 0 is 9000x8000 px, 8-bit RGB, not 32x24 px, 8-bit RGB"  # fmt: skip


def test_a_table_that_unpacks_to_gigabytes_is_never_unpacked(dataset):
    """Twelve million equal numbers are a few kilobytes of Parquet."""
    writer = pq.ParquetWriter(dataset / FIRST, pa.schema([("action", pa.int64())]), compression="zstd")
    row = pa.table({"action": pa.DictionaryArray.from_arrays(np.zeros(2_000_000, np.int32), [0]).cast(pa.int64())})
    for _ in range(6):
        writer.write_table(row)
    writer.close()
    assert (dataset / FIRST).stat().st_size < 1_000_000
    for way in (DatasetReader, survey):
        with pytest.raises(UserError, match=r"says that it has 12,000,000 rows; 10,000,000 are possible"):
            way(dataset)


def test_long_vectors_that_unpack_to_gigabytes_are_never_unpacked(dataset, monkeypatch):
    monkeypatch.setattr(lerobot, "MAX_UNPACKED", 10_000_000)
    zeros = pa.array(np.zeros(2_000_000, np.float32))
    pq.write_table(pa.table({"action": pa.FixedSizeListArray.from_arrays(zeros, 200_000)}), dataset / FIRST, compression="zstd")  # fmt: skip
    assert (dataset / FIRST).stat().st_size < 10_000
    with pytest.raises(UserError, match="would unpack to more than 16,000,000 bytes, which is no recording"):
        lerobot.read_parquet(dataset / FIRST, ["action"])


@pytest.mark.parametrize("name", [OWN_WORDS, INFO, FIRST, "meta/tasks.parquet"])
@pytest.mark.parametrize("what", ["link", "loop", "fifo", "lfs"])
def test_what_leads_out_of_the_dataset_is_refused(dataset, tmp_path, name, what):
    path, outside = dataset / name, tmp_path / "outside"
    path.rename(outside)
    if what == "link":
        path.symlink_to(outside)
        message = f"names '{name}', which is not below"
    elif what == "loop":
        path.symlink_to(path.name)
        message = "not below|no dataset|looks like lerobot|is unfinished"
    elif what == "fifo":
        os.mkfifo(path)
        message = "is no regular file"
    else:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        message = "run git lfs pull"
    for way in (DatasetReader, survey):
        with pytest.raises(UserError, match=message):
            way(dataset)
    with pytest.raises(UserError, match=r"run git lfs pull|not below|is no regular file"):
        StreamedReader(f"file://{dataset}", VIEWS, tmp_path / "cache", 2).actions(0)


def test_links_within_the_dataset_are_followed(dataset):
    (dataset / FIRST).rename(dataset / "elsewhere")
    (dataset / FIRST).symlink_to(dataset / "elsewhere")
    assert DatasetReader(dataset).num_episodes == 3 == len(survey(dataset).episodes)


def test_a_stream_is_kept_below_the_cache_whatever_it_is_called(dataset, tmp_path):
    odd = tmp_path / "odd name *?$"
    dataset.rename(odd)
    reader = StreamedReader(f"file://{odd}", VIEWS, tmp_path / "home" / "cache", 2)
    reader.frame(0, 0)
    assert reader.cache.parent == tmp_path / "home" / "cache" and reader.cache.name.startswith("odd_name____-")


# --------------------------------------------------------------------------------------------------- broken pictures


@pytest.mark.parametrize("damage", [lambda png: png[: len(png) // 2], lambda png: png[:-20] + b"\x00" + png[-19:]])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_picture_that_breaks_late_is_one_line_also_from_a_worker(dataset, damage, num_workers):
    """Its first bytes are sound, so opening does not find it; FFmpeg's error named no file."""
    put_picture(dataset / "data/chunk-000/file-001.parquet", "overhead", 4, damage(encode_png(np.eye(24, 32, dtype=np.uint8)[..., None].repeat(3, 2) * 200)))  # fmt: skip
    recipe = load_recipe("robot_openvla_tiny", [f"data.datasets={{{dataset}: 1}}", "data.val_ratio=0.3"])
    data = load_splits(Path("unused"), recipe)
    frames = FrameDataset([replace(data.train[0], episodes=(0, 1, 2))], data.codec, augment_seed=None)
    batches = Batches(frames, FrameOrder(InOrder(len(frames)), 4, 0, 1, 1), num_workers)
    with pytest.raises(UserError) as stopped:
        list(batches.validation())
    where = dataset / "data/chunk-000/file-001.parquet"
    assert str(stopped.value) == f"{where}: episode 1, frame 4, view 'overhead': the picture does not decode; {lerobot.RECORD_AGAIN}"  # fmt: skip


def test_every_flipped_bit_of_a_picture_is_found_or_changes_nothing():
    picture = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    png, found = encode_png(picture), 0
    for position in range(len(png)):
        flipped = png[:position] + bytes([png[position] ^ 4]) + png[position + 1 :]
        try:
            same = np.array_equal(decode_png(flipped), picture)
        except UserError:
            found += 1
        else:
            assert same, position
    assert found > 0.9 * len(png) - 20


# -------------------------------------------------------------------------------------------------- what is no dataset


def _lerobot(path: Path) -> None:
    (path / "meta").mkdir(parents=True)
    (path / "meta/info.json").write_text("{}")


def _with(name: str):
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text("{}")

    return make


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("kitchen", _lerobot, "lerobot"),
        ("demo.zarr", Path.mkdir, "zarr"),
        ("demo.zarr.zip", Path.touch, "zarr"),
        ("plain", _with(".zgroup"), "zarr"),
        ("plain", _with("zarr.json"), "zarr"),
        ("1.0.0", _with("features.json"), "rlds"),
        ("demo.h5", Path.touch, "maniskill"),
    ],
)
@pytest.mark.parametrize("way", ["directory", "url", "inspect"])
def test_data_of_another_format_says_how_to_import_it(tmp_path, monkeypatch, name, make, kind, way):
    place = tmp_path / name
    make(place)
    with pytest.raises(
        UserError, match=f"looks like {kind}; import it first: robofactory import {kind} {place} --task"
    ):
        if way == "inspect":
            monkeypatch.setattr("sys.argv", ["inspect", str(place)])
            main()
        elif way == "url":
            StreamedReader(f"file://{place}", VIEWS, tmp_path / "cache", 2)
        else:
            DatasetReader(place)


def test_anything_else_is_no_dataset(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    DatasetWriter(tmp_path / "begun", description())
    for name, message in {
        "nowhere": "no dataset at",
        "empty": "no dataset at",
        "file": "is a file; a dataset is a directory",
        "begun": r"is unfinished \(0 complete episodes\)",
    }.items():
        monkeypatch.setattr("sys.argv", ["inspect", str(tmp_path / name)])
        with pytest.raises(UserError, match=message):
            main()
    monkeypatch.setattr("sys.argv", ["inspect", "s3://bucket/set"])
    with pytest.raises(UserError, match="s3://bucket/set is not on a disk; copy it"):
        main()


# ------------------------------------------------------------------------------------------------------------ writing


def test_only_the_writers_own_leftovers_are_deleted_and_only_in_its_own_dataset(tmp_path):
    """*.tmp was deleted everywhere, even in directories that were then refused."""
    foreign = tmp_path / "foreign"
    theirs = ["notes/thesis.tmp", "thesis.tmp", "data/chunk-000/file-000.parquet.12.tmp"]
    for name in theirs:
        (foreign / name).parent.mkdir(parents=True, exist_ok=True)
        (foreign / name).write_text("my only copy")
    (foreign / "readme.txt").touch()
    with pytest.raises(UserError, match="is not empty and no dataset of RoboFactory's"):
        DatasetWriter(foreign, description())
    assert all((foreign / name).is_file() for name in theirs)

    ours = write_dataset(tmp_path / "ours")
    leftovers = ["data/chunk-000/file-003.parquet.12.tmp", "meta/info.json.345.tmp", f"{EPISODES}.6.tmp"]
    kept = ["thesis.tmp", "data/chunk-000/notes.tmp", "meta/info.json.tmp", "data/file-000.parquet.12.tmp"]
    for name in [*leftovers, *kept]:
        (ours / name).write_text("half")
    with pytest.raises(UserError, match="another fps"):
        DatasetWriter(ours, description(fps=21))
    assert all((ours / name).is_file() for name in leftovers)
    DatasetWriter(ours, description())
    assert not any((ours / name).exists() for name in leftovers) and all((ours / name).is_file() for name in kept)


def test_a_first_attempt_without_an_episode_does_not_block_the_corrected_command(tmp_path):
    directory = tmp_path / "set"
    DatasetWriter(directory, description(fps=10))
    (directory / "meta/info.json.12.tmp").write_text("half")
    writer = DatasetWriter(directory, description())
    assert list(files_of(directory)) == [OWN] and read_again(directory) == 20
    writer.append(episode(0))
    with pytest.raises(UserError, match=r"recorded with another fps \(20 there, 10 asked for\)"):
        DatasetWriter(directory, description(fps=10))
    assert read_again(directory) == 20


def read_again(directory: Path) -> int:
    return json.loads((directory / OWN).read_text())["fps"]


def test_a_description_beside_linked_episodes_is_not_replaced(tmp_path):
    """A large disk may hold `data`."""
    directory = write_dataset(tmp_path / "set")
    for name in ("data", "meta/episodes"):
        (directory / name).rename(tmp_path / name.replace("/", "_"))
        (directory / name).symlink_to(tmp_path / name.replace("/", "_"))
    for name in ("info.json", "stats.json", "tasks.parquet"):
        (directory / "meta" / name).unlink()
    with pytest.raises(UserError, match="another fps"):
        DatasetWriter(directory, description(fps=21))


def test_a_file_in_the_place_of_a_dataset_is_left_alone(tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(UserError, match="is a file, and a dataset is a directory"):
        DatasetWriter(tmp_path / "set", description())
    assert (tmp_path / "set").read_text() == "mine"


WORDS = "\u00e4 \u6301\u3061\u4e0a\u3052\u308b \U0001f9be $j_0^2$ ${oc.env:HOME} {0!r} \x1b[31m\x07\t\n\x00 <b>&amp;"


def test_any_text_comes_back_as_it_was_written(tmp_path):
    views = {f"{WORDS[:4]} front.left": (24, 32)}
    names = tuple(f"{WORDS} {index}" for index in range(8))
    directory = tmp_path / "set"
    given = description(scene_yaml="", image_sizes=views, joint_names=names, driver=WORDS, robot_type=WORDS)
    writer = DatasetWriter(directory, given)
    for seed in range(2):
        whole = episode(seed, instruction=WORDS)
        writer.append(replace(whole, images={view: whole.images["side"] for view in views}))
    writer.finalize()
    local = DatasetReader(directory)
    streamed = StreamedReader(f"file://{directory}", tuple(views), tmp_path / "cache", 2)
    assert local.description == streamed.description == given
    assert local.instructions == streamed.instructions == [WORDS, WORDS]
    assert survey(directory).episodes[0].instruction == WORDS
    assert (local.frame(1, 3)[1] == streamed.frame(1, 3)[1]).all()
    assert DatasetWriter(directory, given).is_finished


def test_text_that_no_file_can_hold_is_not_written(tmp_path):
    writer = DatasetWriter(tmp_path / "set", description())
    with pytest.raises(
        UserError, match=r"episode 0 \(seed 3\): the instruction 'half a .* pair' is not Unicode; it is not written"
    ):
        writer.append(episode(3, instruction="half a \ud83d pair"))
    assert list(files_of(tmp_path / "set")) == [OWN]
    with pytest.raises(UserError, match=r"the description of .* is not valid JSON"):
        DatasetWriter(tmp_path / "other", description(driver="from \udcff.h5"))
    assert not (tmp_path / "other").exists()


def test_a_rate_may_be_a_fraction_and_a_whole_one_stays_whole(tmp_path):
    directory = write_dataset(tmp_path / "set", fps=29.97)
    times = pq.read_table(directory / FIRST)["timestamp"].to_numpy()
    np.testing.assert_array_equal(times, (np.arange(5) / 29.97).astype(np.float32))
    assert json.loads((directory / INFO).read_text())["fps"] == 29.97 == DatasetReader(directory).description.fps
    assert {each.irregular for each in survey(directory).episodes} != {1.0} and abs(survey(directory).episodes[0].irregular - 1) < 1e-3  # fmt: skip
    whole = write_dataset(tmp_path / "whole")
    assert '"fps": 20,' in (whole / INFO).read_text() and '"fps": 20,' in (whole / OWN).read_text()
    assert type(DatasetReader(whole).description.fps) is int


def test_a_png_of_pillow_in_the_same_kind_is_taken(dataset):
    picture, stream = Image.new("RGB", (32, 24), (1, 2, 3)), io.BytesIO()
    picture.save(stream, "PNG", compress_level=9, optimize=True)
    put_picture(dataset / FIRST, "wrist", 2, stream.getvalue())
    np.testing.assert_array_equal(DatasetReader(dataset).frame(0, 2)[0].images["wrist"], np.asarray(picture))
