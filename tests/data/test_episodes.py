"""The dataset on disk: what is written comes back, nothing is ever half there, and other tools can read it."""

import errno
import io
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demonstrations import HEIGHT, VIEWS, WIDTH, description, episode, files_of, pictures, write_dataset
from PIL import Image

from robofactory import files
from robofactory.data import lerobot
from robofactory.data.episodes import DatasetReader, DatasetWriter, decode_png, encode_png
from robofactory.errors import UserError

FIRST = "data/chunk-000/file-000.parquet"


def test_every_frame_comes_back_as_it_was_written(tmp_path):
    reader = DatasetReader(write_dataset(tmp_path / "set"))
    assert reader.num_episodes == 3 and reader.seeds == [0, 1, 2] and reader.num_frames == 5 + 6 + 7
    assert reader.description == description() and reader.views == VIEWS
    for index in range(3):
        written, images = episode(index, 5 + index), pictures(index, 5 + index)
        np.testing.assert_array_equal(reader.actions(index), written.actions)
        np.testing.assert_array_equal(reader.proprio(index), written.proprio)
        np.testing.assert_array_equal(reader.all_perturbed[reader.episode_frames(index)], written.perturbed)
        for step in range(5 + index):
            observation, action = reader.frame(index, step)
            np.testing.assert_array_equal(action, written.actions[step])
            np.testing.assert_array_equal(observation.proprio, written.proprio[step])
            assert observation.instruction == "lift the barrier"
            for view in VIEWS:
                np.testing.assert_array_equal(observation.images[view], images[view][step])


@pytest.mark.parametrize(("proprio_dim", "action_dim"), [(3, 2), (1, 8), (8, 1), (0, 4)])
def test_proprio_and_actions_have_dimensions_of_their_own(tmp_path, proprio_dim, action_dim):
    """One number a frame is a plain column in LeRobot, and none is no column."""
    names = {"joint_names": tuple("abcdefgh"[:action_dim]), "proprio_names": tuple("stuvwxyz"[:proprio_dim])}
    writer = DatasetWriter(tmp_path / "set", description(**names))
    whole = episode(0)
    written = replace(whole, actions=whole.actions[:, :action_dim], proprio=whole.proprio[:, :proprio_dim])
    writer.append(written)
    writer.finalize()
    reader = DatasetReader(tmp_path / "set")
    np.testing.assert_array_equal(reader.actions(0), written.actions)
    np.testing.assert_array_equal(reader.proprio(0), written.proprio)
    assert reader.frame(0, 3)[0].proprio.shape == (proprio_dim,)
    features = json.loads((tmp_path / "set/meta/info.json").read_text())["features"]
    assert features["action"]["names"] == list(names["joint_names"])
    assert ("observation.state" in features) == (proprio_dim > 0)
    columns = pq.read_table(tmp_path / "set" / FIRST)
    assert set(columns.column_names) == set(features)
    assert (columns["action"].type == pa.float32()) == (action_dim == 1)


def test_png_is_lossless_and_the_decoded_array_can_be_written_to():
    image = pictures(0, 1)["side"][0]
    decoded = decode_png(encode_png(image))
    np.testing.assert_array_equal(decoded, image)
    decoded[0, 0] = 7  # torch warns about arrays that are not writable


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_png_of_any_kind_is_read_as_pillow_reads_it(mode):
    picture, stream = Image.fromarray(pictures(0, 1)["side"][0]).convert(mode), io.BytesIO()
    picture.save(stream, "PNG")
    np.testing.assert_array_equal(decode_png(stream.getvalue()), np.asarray(picture.convert("RGB")))


def test_large_images_over_several_pages_are_found(tmp_path):
    """An episode of more than 1 MB and 1024 frames lies in two Parquet pages; a header stands between the images."""
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (20, 20, 3), dtype=np.uint8) for _ in range(1100)]
    base = episode(0, len(frames))
    writer = DatasetWriter(tmp_path / "set", description(image_sizes={"side": (20, 20)}))
    writer.append(replace(base, images={"side": [encode_png(frame) for frame in frames]}))
    writer.finalize()
    reader = DatasetReader(tmp_path / "set")
    for step in (0, 511, 512, 1023, 1024, 1025, 1099):
        np.testing.assert_array_equal(reader.frame(0, step)[0].images["side"], frames[step])


def test_a_reader_gives_only_the_views_asked_for_in_their_order(tmp_path):
    reader = DatasetReader(write_dataset(tmp_path / "set"), ["wrist", "side"])
    assert list(reader.frame(1, 2)[0].images) == ["wrist", "side"]
    with pytest.raises(UserError, match="no view 'front'; it has side, overhead, wrist"):
        DatasetReader(tmp_path / "set", ["front"])


def test_a_reader_can_be_sent_to_another_process(tmp_path):
    reader = DatasetReader(write_dataset(tmp_path / "set"))
    copy = pickle.loads(pickle.dumps(reader))  # as DataLoader does for spawned workers
    np.testing.assert_array_equal(copy.frame(2, 3)[0].images["wrist"], reader.frame(2, 3)[0].images["wrist"])


def test_several_instructions_keep_their_episodes(tmp_path):
    writer = DatasetWriter(tmp_path / "set", description())
    for seed, instruction in enumerate(["lift", "put down", "lift"]):
        writer.append(episode(seed, instruction=instruction))
    writer.finalize()
    assert DatasetReader(tmp_path / "set").instructions == ["lift", "put down", "lift"]
    assert pq.read_table(tmp_path / "set/meta/tasks.parquet")["task"].to_pylist() == ["lift", "put down"]


# ------------------------------------------------------------------------------------------------------- the format


def test_info_json_has_every_key_of_lerobot_v3(tmp_path):
    info = json.loads((write_dataset(tmp_path / "set") / "meta/info.json").read_text())
    features = info.pop("features")
    assert info == {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "total_episodes": 3,
        "total_frames": 18,
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 20,
        "splits": {"train": "0:3"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }
    assert features["action"] == {"dtype": "float32", "shape": [8], "names": list(description().joint_names)}
    assert features["observation.state"] == features["action"]
    names = ["height", "width", "channels"]
    assert features["observation.images.side"] == {"dtype": "image", "shape": [HEIGHT, WIDTH, 3], "names": names}
    assert features["perturbed"] == {"dtype": "bool", "shape": [1], "names": None}
    assert features["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        assert features[name] == {"dtype": "int64", "shape": [1], "names": None}


def test_data_columns_are_exactly_the_features_with_their_types(tmp_path):
    """LeRobot refuses a column that is no feature, and fills one that is missing with null."""
    directory = write_dataset(tmp_path / "set")
    features = json.loads((directory / "meta/info.json").read_text())["features"]
    types = {
        "float32": {"[8]": pa.list_(pa.float32(), 8), "[1]": pa.float32()},
        "int64": {"[1]": pa.int64()},
        "bool": {"[1]": pa.bool_()},
        "image": {f"[{HEIGHT}, {WIDTH}, 3]": pa.struct([("bytes", pa.binary()), ("path", pa.string())])},
    }
    start = 0
    for index in range(3):
        file = pq.ParquetFile(lerobot.data_file(directory, index))
        assert file.num_row_groups == 1
        table = file.read()
        assert set(table.column_names) == set(features)
        for name, feature in features.items():
            assert table[name].type == types[feature["dtype"]][str(feature["shape"])], name
            assert table[name].null_count == 0
        length = 5 + index
        assert table["index"].to_pylist() == list(range(start, start + length))
        assert table["frame_index"].to_pylist() == list(range(length))
        assert set(table["episode_index"].to_pylist()) == {index}
        np.testing.assert_allclose(table["timestamp"].to_numpy(), np.arange(length) / 20, atol=1e-6)
        image = table["observation.images.wrist"][2].as_py()
        assert image["path"] == "frame-000002.png" and Image.open(io.BytesIO(image["bytes"])).size == (WIDTH, HEIGHT)
        start += length


def test_episode_and_task_tables_are_those_of_lerobot_v3(tmp_path):
    directory = write_dataset(tmp_path / "set")
    episodes = pq.read_table(directory / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert episodes[1] == {
        "episode_index": 1,
        "tasks": ["lift the barrier"],
        "length": 6,
        "data/chunk_index": 0,
        "data/file_index": 1,
        "dataset_from_index": 5,
        "dataset_to_index": 11,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }
    assert [row["dataset_to_index"] for row in episodes] == [5, 11, 18]
    tasks = pq.read_table(directory / "meta/tasks.parquet")
    assert tasks.to_pylist() == [{"task_index": 0, "task": "lift the barrier"}]
    assert tasks.schema.field("task_index").type == pa.int64()
    pandas = json.loads(tasks.schema.metadata[b"pandas"])
    assert pandas["index_columns"] == ["task"]  # LeRobot looks tasks up by the index
    assert [column["name"] for column in pandas["columns"]] == ["task_index", "task"]


def test_statistics_are_of_all_frames_with_true_quantiles(tmp_path):
    directory = write_dataset(tmp_path / "set", num_episodes=6)
    stats = json.loads((directory / "meta/stats.json").read_text())
    actions = DatasetReader(directory).all_actions.astype(np.float64)
    assert stats["action"]["count"] == [len(actions)]
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(axis=0))
    np.testing.assert_allclose(stats["action"]["std"], actions.std(axis=0))
    for name, share in {"min": 0.0, "q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99, "max": 1.0}.items():
        np.testing.assert_allclose(stats["action"][name], np.quantile(actions, share, axis=0))
    image = stats["observation.images.side"]
    assert np.shape(image["mean"]) == (3, 1, 1) and 0.0 <= np.min(image["min"]) < np.max(image["max"]) <= 1.0
    assert set(stats) == set(json.loads((directory / "meta/info.json").read_text())["features"])


def test_the_1001st_episode_opens_a_second_folder():
    assert lerobot.data_file(Path("set"), 999) == Path("set/data/chunk-000/file-999.parquet")
    assert lerobot.data_file(Path("set"), 1000) == Path("set/data/chunk-001/file-000.parquet")


# ------------------------------------------------------------------------------------------ stopped, broken, refused


def test_a_writer_continues_and_the_result_is_the_same_bit_for_bit(tmp_path):
    at_once = write_dataset(tmp_path / "at_once", num_episodes=4)
    for seed in range(4):  # a new writer for each episode
        writer = DatasetWriter(tmp_path / "stopped", description())
        assert writer.seeds == list(range(seed)) and not writer.is_finished
        writer.append(episode(seed, 5 + seed))
    writer.finalize()
    assert writer.is_finished
    assert files_of(tmp_path / "stopped") == files_of(at_once)


KILLED_WHILE_WRITING = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from demonstrations import description, episode
from robofactory.data.episodes import DatasetWriter
writer = DatasetWriter(Path({directory!r}), description())
writer.append(episode(0, 5))
def stop(*paths):
    print("written, not renamed", flush=True)
    os.kill(os.getpid(), 9)
os.replace = stop
writer.append(episode(1, 6))
"""


def test_an_episode_killed_between_write_and_rename_is_not_there(tmp_path):
    directory = tmp_path / "set"
    script = KILLED_WHILE_WRITING.format(tests=str(Path(__file__).parent), directory=str(directory))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -9 and "written, not renamed" in killed.stdout, killed.stderr
    assert len(list(directory.glob("**/*.tmp"))) == 1  # the kill left it

    writer = DatasetWriter(directory, description())
    assert writer.seeds == [0]
    assert not list(directory.glob("**/*.tmp"))
    writer.append(episode(1, 6))
    writer.append(episode(2, 7))
    writer.finalize()
    assert files_of(directory) == files_of(write_dataset(tmp_path / "whole"))


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path, monkeypatch):
    directory = tmp_path / "set"
    writer = DatasetWriter(directory, description())
    writer.append(episode(0))
    before = files_of(directory)

    class FullDisk(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(
        UserError, match=r"file-001.parquet: the disk is full; every complete episode is kept"
    ) as caught:
        writer.append(episode(1))
    assert "\n" not in str(caught.value)
    assert files_of(directory) == before
    monkeypatch.undo()
    writer.append(episode(1))
    assert writer.num_episodes == 2


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_a_truncated_episode_is_named_when_the_dataset_is_opened(tmp_path, keep):
    directory = write_dataset(tmp_path / "set")
    path = directory / "data/chunk-000/file-001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep >= 1 else int(keep * len(content))])
    for open_dataset in (lambda: DatasetReader(directory), lambda: DatasetWriter(directory, description())):
        with pytest.raises(UserError, match=r"file-001\.parquet is truncated or no Parquet file; delete it"):
            open_dataset()


def test_a_missing_episode_is_named_and_recording_fills_the_gap(tmp_path):
    directory = write_dataset(tmp_path / "set")
    before = files_of(directory)
    (directory / "data/chunk-000/file-001.parquet").unlink()
    with pytest.raises(UserError, match=r"file-001\.parquet is missing"):
        DatasetReader(directory)
    writer = DatasetWriter(directory, description())
    assert writer.seeds == [0] and not writer.is_finished
    writer.append(episode(1, 6))
    writer.append(episode(2, 7))
    writer.finalize()
    assert files_of(directory) == before


def test_a_missing_or_unfinished_dataset_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"no dataset at .*; robofactory record makes one"):
        DatasetReader(tmp_path / "none")
    DatasetWriter(tmp_path / "set", description()).append(episode(0))
    with pytest.raises(UserError, match=r"unfinished \(1 complete episodes\)"):
        DatasetReader(tmp_path / "set")
    with pytest.raises(UserError, match="has no episode"):
        DatasetWriter(tmp_path / "empty", description()).finalize()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["actions", "proprio"])
def test_numbers_that_are_not_finite_are_not_written(tmp_path, field, value):
    bad = episode(5)
    getattr(bad, field)[3, 2] = value
    writer = DatasetWriter(tmp_path / "set", description())
    with pytest.raises(UserError, match=rf"episode 0 \(seed 5\): the {field.rstrip('s')} of frame 3 is"):
        writer.append(bad)
    assert writer.num_episodes == 0 and not (tmp_path / "set" / FIRST).exists()


def test_numbers_that_are_not_finite_are_found_when_read(tmp_path):
    directory = write_dataset(tmp_path / "set")
    path = directory / "data/chunk-000/file-002.parquet"
    table = pq.read_table(path)
    actions = np.stack(table["action"].to_numpy())
    actions[4, 1] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), 8)
    table = table.set_column(table.column_names.index("action"), "action", column)
    path.write_bytes(lerobot.to_parquet(table))
    with pytest.raises(UserError, match=r"file-002\.parquet: action is not finite"):
        DatasetReader(directory)


def test_another_scene_or_share_of_noise_is_not_mixed_in(tmp_path):
    directory = write_dataset(tmp_path / "set")
    other = description(scene_yaml="task: LiftBarrier-rf\nvisual_detail: full\n")
    with pytest.raises(
        UserError, match=r"another scene_yaml \(visual_detail: low there, visual_detail: full asked for\)"
    ):
        DatasetWriter(directory, other)
    with pytest.raises(UserError, match=r"another noise_share \(0\.0 there, 0\.5 asked for\); delete it or choose"):
        DatasetWriter(directory, description(noise_share=0.5))


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and no dataset of RoboFactory"):
        DatasetWriter(tmp_path, description())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_compressed_dataset_is_refused_by_name(tmp_path):
    directory = write_dataset(tmp_path / "set")
    path = directory / FIRST
    pq.write_table(pq.read_table(path), path, compression="zstd")
    with pytest.raises(UserError, match=r"file-000\.parquet: observation\.images\.side is compressed"):
        DatasetReader(directory)
