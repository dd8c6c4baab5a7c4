"""Rows of LeRobot datasets decide; what is wrong with them, or with what meta/ says of them, is one line."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_lerobot import (
    CAMERA,
    FPS,
    IMAGE_TYPE,
    NEW_DATA,
    SIDE,
    change_column,
    change_feature,
    change_info,
    check_content,
    episodes_file,
    level,
    levels,
    old_data,
    open_source,
    picture,
    png,
    rows,
    write_lines,
    write_new,
    write_old,
    write_table,
)

from robofactory.data.imports import lerobot_rows
from robofactory.data.imports.lerobot_rows import Part, read_rows
from robofactory.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 82515\n"


@pytest.fixture
def old(tmp_path):
    return write_old(tmp_path / "source")


def read_all(root, **options) -> None:
    source = open_source(root, **options)
    for episode in source.episode_ids:
        for frames in source.read(episode).frames.values():
            list(frames)


def refused(root, message: str, **options) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_all(root, **options)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- rows decide


@pytest.mark.parametrize("written", [None, [0, 0, 0, 1], [0, 0, 7, 7]])
def test_rows_decide_where_meta_names_another_file(tmp_path, written):
    """LeRobot's converter of September 2025 to March 2026 left the file before at the first episode of each file."""
    root = write_new(tmp_path / "source")
    if written is not None:
        change_column(episodes_file(root), "data/file_index", written)
    source = open_source(root)
    check_content(source, [4, 4, 4, 4])
    assert bool(source.notes) == (written is not None)
    if written is not None:
        assert "meta/episodes names another file than the one with the rows of" in source.notes[0]


@pytest.mark.parametrize("counted", [[0, 4, 0, 4], [0, 4, 4, 8], [5, 5, 5, 5], None])
def test_frames_counted_anew_or_twice_do_not_matter(tmp_path, counted):
    root = write_new(tmp_path / "source")
    change_column(episodes_file(root), "dataset_from_index", counted)
    check_content(open_source(root), [4, 4, 4, 4])


def test_rows_in_a_file_that_meta_does_not_name_are_found(tmp_path):
    root = write_new(tmp_path / "source", grouped=((0, 1), (2,)))
    change_column(episodes_file(root), "data/file_index", [0, 0, 0])
    check_content(open_source(root), [4, 4, 4])


def test_an_episode_in_two_files_is_joined(tmp_path):
    root = write_new(tmp_path / "source", grouped=((0,), (1,)))
    first, second = (root / NEW_DATA.format(chunk_index=0, file_index=number) for number in (0, 1))
    table = pa.concat_tables([pq.read_table(first), pq.read_table(second)])
    write_table(first, table.slice(0, 6))
    write_table(second, table.slice(6))
    check_content(open_source(root), [4, 4])


def test_row_groups_of_any_size_give_the_same(tmp_path):
    root = write_new(tmp_path / "source", grouped=((0, 1, 2),))
    path = root / NEW_DATA.format(chunk_index=0, file_index=0)
    for size in (1, 3, 5, 12):
        pq.write_table(pq.read_table(path), path, row_group_size=size)
        check_content(open_source(root), [4, 4, 4])
    found = [(row, len(batch)) for row, batch in read_rows(Part(path, 3, 7), ["action"], 4)]
    assert sum(count for _, count in found) == 7 and found[0][0] == 3


@pytest.mark.parametrize("length", [2, 9])
def test_an_episode_that_meta_calls_longer_or_shorter_has_its_rows(tmp_path, length):
    root = write_old(tmp_path / "source")
    write_lines(
        root / "meta/episodes.jsonl", [{"episode_index": 0, "length": 4}, {"episode_index": 1, "length": length}]
    )
    source = open_source(root)
    check_content(source, [4, 6])
    assert source.read(0).notes == []
    assert source.read(1).notes == [f"it has 6 rows, meta/ says {length}; the rows are taken"]

    root = write_new(tmp_path / "new")
    change_column(episodes_file(root), "length", [4, length, 4, 4])
    source = open_source(root)
    check_content(source, [4, 4, 4, 4])
    assert source.read(1).notes == [f"it has 4 rows, meta/ says {length}; the rows are taken"]


def test_episodes_that_only_meta_or_only_rows_have_are_said(tmp_path):
    root = write_new(tmp_path / "source")
    (root / NEW_DATA.format(chunk_index=0, file_index=1)).unlink()
    refused(root, r"episode 2 of meta/ has no rows; the source is incomplete")
    source = open_source(root, skip=(2, 3))
    assert source.episode_ids == [0, 1]
    assert "meta/info.json says 16 frames, the rows of all episodes are 8" in source.notes[0]

    root = change_info(write_new(tmp_path / "more"), total_episodes=3)
    table = pq.read_table(episodes_file(root))
    pq.write_table(table.slice(0, 3), episodes_file(root))
    source = open_source(root)
    check_content(source, [4, 4, 4])
    assert "the rows of 1 episodes (3) are omitted, which meta/episodes does not list" in source.notes


def test_a_dataset_without_episodes_is_refused(tmp_path, old):
    (old / "meta/episodes.jsonl").write_text("")
    refused(change_info(old, total_episodes=0), "has no episode; the source is incomplete")
    root = change_info(write_new(tmp_path / "new", is_video=True), total_episodes=None)
    pq.write_table(pq.read_table(episodes_file(root)).slice(0, 0), episodes_file(root))
    refused(root, "has no episode; the source is incomplete")
    episodes_file(root).unlink()
    refused(root, r"has no meta/episodes/chunk-\*/file-\*\.parquet")


def test_an_episode_listed_twice_is_refused(tmp_path, old):
    write_lines(old / "meta/episodes.jsonl", [{"episode_index": 1, "length": 4}] * 2)
    refused(old, "meta/ lists episode 1 twice")
    root = write_new(tmp_path / "new")
    change_column(episodes_file(root), "episode_index", [0, 1, 1, 3])
    refused(root, "meta/ lists episode 1 twice")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("timestamp", [0.0, np.nan, 0.2, 0.3], r"row 1 has timestamp nan; needed: a time in s"),
        ("timestamp", [0.0, 0.1, 0.2, np.inf], r"row 3 has timestamp inf; needed: a time in s"),
        ("timestamp", [0.0, 0.1, 0.1, 0.2], r"not 10 frames per second: 0\.100 s comes after 0\.100 s in .*: row 2"),
        ("timestamp", [0.3, 0.2, 0.1, 0.0], r"not 10 frames per second: 0\.200 s comes after 0\.300 s in .*: row 1"),
        ("timestamp", [0, 100, 200, 300], r"not 10 frames per second: 100\.000 s comes after 0\.000 s"),
        ("timestamp", [0.0, None, 0.2, 0.3], r"column 'timestamp' is empty in row 1"),
        ("timestamp", ["0", "1", "2", "3"], r"column 'timestamp' holds string; needed: numbers"),
        ("timestamp", None, r"has no column 'timestamp'; it has action, "),
        ("frame_index", [0, 1, 3, 4], r"row 2 of episode 0 has frame_index 3 after 1; rows are missing, doubled or in"),
        ("frame_index", [0, 1, 1, 2], r"row 2 of episode 0 has frame_index 1 after 1"),
        ("frame_index", [3, 2, 1, 0], r"row 1 of episode 0 has frame_index 2 after 3"),
        ("episode_index", [0, 0, 1, 1], r"row 2 is of episode 1, not 0 as its file's name says"),
        ("episode_index", [7, 7, 7, 7], r"row 0 is of episode 7, not 0 as its file's name says"),
        ("episode_index", None, r"has no column 'episode_index'"),
        ("task_index", [0, 0, 0.5, 0], r"task_index is 0\.5 in row 2; needed: a whole number"),
        ("task_index", [5, 5, 5, 5], r"task_index 5 is not in .*tasks\.jsonl; say --instruction WORDS"),
        ("task_index", None, r"its rows have no task_index; say --instruction WORDS"),
        ("action", None, r"has no column 'action'"),
        ("action", [[1.0, 2.0, 3.0], [1.0, 2.0], [1.0] * 3, [1.0] * 3], r"column 'action' has 2 numbers in row 1; needed: 3"),
        ("action", [[1.0, 2.0]] * 4, r"column 'action' has 2 numbers in row 0; needed: 3"),
        ("action", [[1.0, 2.0, 3.0], None, [1.0] * 3, [1.0] * 3], r"column 'action' is empty in row 1"),
        ("action", [[1.0] * 3, [1.0] * 3, [1.0, None, 2.0], [1.0] * 3], r"column 'action' has an empty number in row 2"),
        ("action", [[[1.0], [2.0], [3.0]]] * 4, r"column 'action' holds list<.*>; needed: lists of 3 numbers"),
        ("action", [["a", "b", "c"]] * 4, r"column 'action' holds list<.*string>; needed: lists of 3 numbers"),
        ("action", [1.0, 2.0, 3.0, 4.0], r"column 'action' holds double; needed: lists of 3 numbers"),
        ("action", [{"x": 1.0}] * 4, r"column 'action' holds struct<.*>; needed: lists of 3 numbers"),
        (CAMERA, None, r"has no column 'observation\.images\.cam'"),
        (CAMERA, pa.array([None] * 4, IMAGE_TYPE), r"column 'observation\.images\.cam' is empty in row 0"),
        (CAMERA, [1, 2, 3, 4], r"row 0: there is a int; needed: an encoded picture"),
        (CAMERA, pa.array([{"bytes": None, "path": None}] * 4, IMAGE_TYPE), r"there is neither bytes nor a path"),
    ],
)  # fmt: skip
def test_rows_that_are_wrong_are_refused_by_file_and_row(old, column, values, message):
    change_column(old_data(old, 0), column, values)
    refused(old, message)


def test_the_same_rows_in_any_numeric_type_are_the_same(old):
    """Lists of a fixed length or not, long offsets, halves, doubles and whole numbers; all are read to the number."""
    values = [[0.0, frame, 0.5] for frame in range(4)]
    for kind in (pa.float16(), pa.float32(), pa.float64()):
        for lists in (pa.list_(kind), pa.large_list(kind), pa.list_(kind, 3)):
            change_column(old_data(old, 0), "action", pa.array(np.array(values, np.float16).tolist(), pa.list_(pa.float64())).cast(lists))  # fmt: skip
            check_content(open_source(old), [4, 6])
    zeros = pa.array([0] * 4, pa.int64())
    for numbers in (
        zeros.cast(pa.int8()),
        zeros.cast(pa.uint64()),
        zeros.cast(pa.float64()),
        zeros.dictionary_encode(),
    ):
        for column in ("episode_index", "task_index"):
            change_column(old_data(old, 0), column, numbers)
        check_content(open_source(old), [4, 6])


def test_a_table_that_is_no_table_is_refused(tmp_path, old):
    good = old_data(old, 0).read_bytes()
    for content, message in (
        (b"", "is truncated, damaged or no Parquet file"),
        (good[: len(good) // 2], "is truncated, damaged or no Parquet file"),
        (b"PAR1" + bytes(100) + b"PAR1", "is truncated, damaged or no Parquet file"),
        (LFS, r"episode_000000\.parquet is a Git LFS pointer, its content is not here: run git lfs pull"),
    ):
        old_data(old, 0).write_bytes(content)
        refused(old, message)
    write_table(old_data(old, 0), rows(0, 1).slice(0, 0))
    refused(old, r"episode_000000\.parquet has no rows")


@pytest.mark.parametrize("name", ["info.json", "tasks.jsonl", "episodes.jsonl"])
def test_pointers_and_damage_in_meta_are_said_by_file(old, name):
    path = old / "meta" / name
    for content, message in (
        (LFS, f"{name} is a Git LFS pointer, its content is not here: run git lfs pull"),
        (b"{", rf"{name}.* is not valid JSON"),
        (b"\xff\xfe{}", rf"{name}.* is not UTF-8"),
        (b"[]", rf"{name}.*: there is \[\]"),
    ):
        path.write_bytes(content)
        refused(old, message)
    path.unlink()
    refused(old, f"meta/{name}")


# -------------------------------------------------------------------------------------------------------------- meta


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fps": "10"}, r"key 'fps' is \"10\"; needed: a valid number"),
        ({"fps": True}, r"key 'fps' is true; needed: a valid number"),
        ({"fps": 0}, r"key 'fps' is 0"),
        ({"fps": float("nan")}, r"key 'fps' is NaN; needed: a finite number"),
        ({"fps": None}, r"does not say how many frames per second it has; say --fps N"),
        ({"features": []}, r"key 'features' is \[\]; needed: a valid dictionary"),
        ({"features": {"action": 3}}, r"key 'features\.action' is 3"),
        ({"features": {"action": {"shape": [3]}}}, r"key 'features\.action\.dtype' is missing"),
        ({"features": {"action": {"dtype": "float32", "shape": 3}}}, r"key 'features\.action\.shape' is 3"),
        ({"features": {"action": {"dtype": "float32", "shape": [-3]}}}, r"key 'features\.action\.shape\.0' is -3"),
        ({"data_path": None}, r"key 'data_path' is null; needed: a valid string"),
        ({"chunks_size": 0}, r"key 'chunks_size' is 0"),
        ({"chunks_size": None}, r"key 'chunks_size' is missing; its paths need it"),
        ({"total_episodes": "2"}, r"key 'total_episodes' is \"2\""),
        ({"total_episodes": 10**12}, r"lists 2 episodes of 1000000000000"),
        ({"robot_type": ["arm"]}, r"key 'robot_type' is \[\"arm\"\]"),
        ({"codebase_version": 2.1}, r"key 'codebase_version' is 2\.1; needed: a valid string"),
        ({"codebase_version": "v1.6"}, r"is of LeRobot's version v1\.6; v2\.0, v2\.1 and v3\.0 can be imported"),
    ],
)
def test_info_json_that_is_wrong_is_refused_by_key(old, values, message):
    refused(change_info(old, **values), message)


def test_a_dataset_of_another_kind_is_no_lerobot_dataset(tmp_path, old):
    (old / "meta/info.json").write_text(json.dumps({"dataset_type": "X", "num_episodes": 2}))
    refused(old, r"is no LeRobot dataset: its meta/info\.json has no codebase_version, but dataset_type, num_episodes$")
    (old / "meta/info.json").unlink()
    refused(old, r"has no meta/info\.json; is it a LeRobot dataset\?")
    (old / "meta/robofactory.json").write_text("{}")
    refused(old, r"is an unfinished dataset of RoboFactory; the command that began it finishes it")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"task_index": [0], "task": ["push"]}, "push"),
        ({"task_index": [0], "__index_level_0__": ["push"]}, "push"),
        ({"task": ["push"], "task_index": [0]}, "push"),
        ({"index": [0], "task_index": [0], "task": ["push"]}, "push"),
        ({"task_index": [0], "task": ["push"], "note": ["red"]}, "push"),
        ({"task_index": [0], "words": ["push"]}, "push"),
        ({"task_index": [0], "task": pa.array(["push"]).dictionary_encode()}, "push"),
        ({"task_index": [0], "task": pa.array(["push"], pa.large_string())}, "push"),
    ],
)
def test_tasks_are_found_in_whatever_column_they_are(tmp_path, table, words):
    root = write_new(tmp_path / "source")
    write_table(root / "meta/tasks.parquet", pa.table(table))
    assert open_source(root).read(3).instruction == words


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"task_index": [0], "a": ["push"], "b": ["pull"]}, r"has no column of words called task; it has task_index, a, b"),
        ({"task_index": [0], "task": [3]}, r"has no column of words called task"),
        ({"task": ["push"]}, r"has no column 'task_index'; it has task"),
        ({"task_index": ["0"], "task": ["push"]}, r"key '0\.task_index' is \"0\"; needed: a valid integer"),
        ({"task_index": [0, 0], "task": ["push", "pull"]}, r"task_index 0 is 'push' and 'pull'"),
        ({"task_index": [0], "task": pa.array([None], pa.string())}, r"task 0 of .* has no words; say --instruction WORDS"),
        ({"task_index": [0], "task": [" "]}, r"task 0 of .* has no words; say --instruction WORDS"),
        ({"task_index": [1], "task": ["push"]}, r"task_index 0 is not in .*tasks\.parquet"),
    ],
)  # fmt: skip
def test_tasks_that_are_wrong_are_refused_unless_the_user_has_words(tmp_path, table, message):
    root = write_new(tmp_path / "source")
    write_table(root / "meta/tasks.parquet", pa.table(table))
    refused(root, message)
    source = open_source(root, instruction="lift")
    check_content(source, [4, 4, 4, 4])
    assert source.read(0).instruction == "lift"


def test_task_index_is_not_needed_where_the_user_has_words(old):
    change_column(old_data(old, 0), "task_index", None)
    (old / "meta/tasks.jsonl").unlink()
    assert open_source(old, instruction="lift").read(0).instruction == "lift"


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("episode_index", [0, 1, None, 3], r"key '2\.episode_index' is null; needed: a valid integer"),
        ("episode_index", ["a", "b", "c", "d"], r"key '0\.episode_index' is \"a\""),
        ("episode_index", [-1, 1, 2, 3], r"key '0\.episode_index' is -1"),
        ("episode_index", None, r"has no column 'episode_index'"),
        ("length", ["4"] * 4, r"key '0\.length' is \"4\""),
    ],
)
def test_episodes_in_meta_that_are_wrong_are_refused_by_row(tmp_path, column, values, message):
    root = write_new(tmp_path / "source")
    change_column(episodes_file(root), column, values)
    refused(root, message)


def test_whole_numbers_that_pandas_made_floats_are_numbers(tmp_path):
    root = write_new(tmp_path / "source")
    for column, values in {"episode_index": [0.0, 1.0, 2.0, 3.0], "length": [4.0, None, float("nan"), 4.0]}.items():
        change_column(episodes_file(root), column, values)
    check_content(open_source(root), [4, 4, 4, 4])


def test_rates_that_are_no_whole_numbers_are_kept_or_said(tmp_path):
    root = write_old(tmp_path / "source", fps=29.97)
    source = open_source(root)
    assert source.fps == 29.97
    check_content(source, [4, 6])
    assert open_source(root, fps=30).fps == 30
    assert type(open_source(change_info(write_old(tmp_path / "whole"), fps=10.0)).fps) is int
    source = open_source(change_info(write_old(tmp_path / "unsaid"), fps=None), fps=FPS)
    check_content(source, [4, 6])


# ---------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_read_however_they_are_stored(tmp_path):
    """Embedded in a struct or plainly, files beside the table, or numbers of pixels in nested lists, channels first too."""
    root = write_old(tmp_path / "source")
    encoded = [png(picture(0, frame)) for frame in range(4)]
    (root / "images").mkdir()
    names = [f"images/frame_{frame}.png" for frame in range(4)]
    for name, content in zip(names, encoded, strict=True):
        (root / name).write_bytes(content)
    arrays = np.stack([picture(0, frame) for frame in range(4)])
    floats = (arrays / np.float32(255)).transpose(0, 3, 1, 2)
    forms = {
        "plain": pa.array(encoded, pa.binary()),
        "large": pa.array(encoded, pa.large_binary()),
        "struct": pa.array([{"bytes": content} for content in encoded]),
        "path": pa.array([{"bytes": None, "path": name} for name in names], IMAGE_TYPE),
        "text": pa.array(names),
        "lists": pa.array(arrays.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
    }
    for name, column in forms.items():
        change_column(old_data(root, 0), CAMERA, column)
        assert levels(open_source(root), 0) == [level(0, frame) for frame in range(4)], name
    change_column(old_data(root, 0), CAMERA, pa.array(floats.tolist(), pa.list_(pa.list_(pa.list_(pa.float32())))))
    source = open_source(change_feature(root, CAMERA, shape=[3, SIDE, SIDE]))
    assert source.whites == {"cam": 1.0} and source.image_sizes == {"cam": (SIDE, SIDE)}
    assert [np.asarray(frame).shape for frame in source.read(0).frames["cam"]] == [(3, SIDE, SIDE)] * 4


def test_pixels_of_another_shape_than_declared_are_refused(old):
    arrays = np.zeros((4, SIDE, SIDE - 1, 3), np.uint8)
    change_column(old_data(old, 0), CAMERA, pa.array(arrays.tolist()))
    refused(old, r"its pictures are no lists of 32 x 32 x 3 numbers")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"info": {"video.is_depth_map": True}}, "it is a depth map"),
        ({"video_info": {"is_depth_map": True}}, "it is a depth map"),
        ({"shape": [SIDE, SIDE, 2]}, r"needed: \[h, w\], \[h, w, c\] or \[c, h, w\] with 1, 3 or 4 channels"),
        ({"shape": [10**9, 10**9, 3]}, r"more than the 40,000,000 that are allowed"),
        ({"shape": []}, r"needed: \[h, w\]"),
    ],
)
def test_a_camera_that_does_not_suit_is_named_with_the_reason(old, changes, reason):
    other = "observation.images.depth"
    camera = {"dtype": "image", "shape": [SIDE, SIDE, 3]} | changes
    change_info(old, lambda info: info["features"].update({other: camera}))
    source = open_source(old)
    assert list(source.cameras) == ["cam"]
    (note,) = source.notes
    assert note.startswith(f"'{other}' is no camera that can be imported, and left out: ")
    with pytest.raises(UserError, match=rf"camera '{other}' cannot be imported: .*{reason}"):
        open_source(old, cameras={"depth": other})


def test_the_pictures_decide_their_size_and_it_is_said(old):
    source = open_source(change_feature(old, CAMERA, shape=[480, 640, 3]))
    assert source.image_sizes == {"cam": (SIDE, SIDE)}
    assert source.notes == [f"camera {CAMERA} is declared 640x480 px, its pictures have {SIDE}x{SIDE}"]


# -------------------------------------------------------------------------------------------------------- untrusted


def test_what_a_table_claims_is_bounded_before_it_is_read(tmp_path, old, monkeypatch):
    monkeypatch.setattr(lerobot_rows, "MAX_FRAMES", 5)
    refused(old, r"episode_000001\.parquet has 6 rows of .* numbers for one episode, more than the 5 rows")
    monkeypatch.setattr(lerobot_rows, "MAX_ROWS", 5)
    refused(old, r"episode_000001\.parquet claims 6 rows, more than the 5 that are read")
    refused(write_new(tmp_path / "new"), r"claims 8 rows, more than the 5 that are read")


def test_a_column_that_unpacks_beyond_measure_is_refused(old, monkeypatch):
    monkeypatch.setattr(lerobot_rows, "BOMB_BYTES", 1_000_000)
    zeros = pa.array([bytes(500_000)] * 4, pa.binary())
    table = pq.read_table(old_data(old, 0)).drop_columns(CAMERA).append_column(CAMERA, zeros)
    pq.write_table(table, old_data(old, 0), compression="zstd", use_dictionary=False, write_statistics=False)
    refused(old, r"observation\.images\.cam unpacks from [\d,]+ to 2,\d+,\d+ bytes; it is refused")


def test_vectors_of_absurd_lengths_are_no_vectors(old):
    refused(
        change_feature(old, "action", shape=[10**12]),
        r"action is 'float32' of shape \[1000000000000\]; needed: numbers",
    )
