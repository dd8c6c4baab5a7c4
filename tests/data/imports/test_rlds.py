"""RLDS episodes: TFRecord files are made here byte by byte, so that writer and reader share no code."""

import json
import struct
from pathlib import Path

import content
import google_crc32c
import numpy as np
import pytest

from robofactory.data.episodes import encode_png
from robofactory.data.imports.tfrecord import EXAMPLE, list_records, masked_crc, read_example
from robofactory.errors import UserError

# tf.train.Example of the four values (False, 4, b"goat", 0.9876), as TensorFlow's tutorial on TFRecord prints it.
TENSORFLOWS_OWN = (
    b"\nR\n\x14\n\x08feature3\x12\x08\x12\x06\n\x04[\xd3|?\n\x11\n\x08feature0\x12\x05\x1a\x03\n\x01\x00"
    b"\n\x14\n\x08feature2\x12\x08\n\x06\n\x04goat\n\x11\n\x08feature1\x12\x05\x1a\x03\n\x01\x04"
)


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values) -> bytes:
    """bytes_list = 1, float_list = 2, int64_list = 3 of tf.train.Feature; `value` = 1 of each."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, value) for value in values))
    if values.dtype.kind == "f":
        return field(2, field(1, values.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(value)) for value in values.reshape(-1))))


def example(features: dict) -> bytes:
    entries = (field(1, field(1, name.encode()) + field(2, feature(values))) for name, values in features.items())
    return field(1, b"".join(entries))


def write_records(path: Path, records: list[bytes]) -> Path:
    def crc(data: bytes) -> bytes:
        value = google_crc32c.value(data)
        return struct.pack("<I", (((value >> 15) | (value << 17)) + 0xA282EAD8) % 2**32)

    path.parent.mkdir(parents=True, exist_ok=True)
    headers = [struct.pack("<Q", len(record)) for record in records]
    path.write_bytes(b"".join(h + crc(h) + r + crc(r) for h, r in zip(headers, records, strict=True)))
    return path


def steps_of(episode: int) -> dict:
    """One episode's features, without `steps/`."""
    frames = range(content.LENGTHS[episode])
    flags = np.zeros(len(frames), np.int64)
    features = {
        "action": np.concatenate([content.action(episode, frame) for frame in frames]),
        "observation/state": np.concatenate([content.state(episode, frame) for frame in frames]),
        "language_instruction": [content.TASKS[episode].encode()] * len(frames),
        "is_first": np.where(np.arange(len(frames)) == 0, 1, flags),
        "reward": flags.astype(np.float32),
    }
    for camera in content.CAMERAS:
        pictures = [encode_png(content.picture(camera, episode, frame)) for frame in frames]
        features[f"observation/{camera}_image"] = pictures
    return features


def write_tfds(folder: Path) -> Path:
    """As TensorFlow Datasets: an episode a record, two shards of the training part and one of another."""
    for episode in range(2):
        features = {f"steps/{name}": values for name, values in steps_of(episode).items()}
        features["episode_metadata/file_path"] = [b"/somewhere.pkl"]
        write_records(folder / f"push-train.tfrecord-0000{episode}-of-00002", [example(features)])
    write_records(folder / "push-val.tfrecord-00000-of-00001", [example({"steps/odd": [b"x"]})])
    splits = [{"name": "train", "shardLengths": ["1", "1"]}, {"name": "val", "shardLengths": ["1"]}]
    (folder / "dataset_info.json").write_text(json.dumps({"name": "push", "splits": splits}))
    return folder


CAMERAS = ["--camera", *(f"{camera}=observation/{camera}_image" for camera in content.CAMERAS)]


def test_episodes_of_tensorflow_datasets_come_back(run_import, tmp_path):
    write_tfds(tmp_path / "push/1.0.0")
    reader = run_import("rlds", tmp_path / "push", "--fps", "5", *CAMERAS)
    content.check(reader)
    assert reader.description.fps == 5 and reader.description.names_of_proprio()[0] == "state_0"


def test_a_step_a_record_as_openmarl_writes(run_import, tmp_path):
    records = []
    for episode, length in enumerate(content.LENGTHS):
        steps = steps_of(episode)
        for step in range(length):
            parts = {name: values[step * (len(values) // length) :] for name, values in steps.items()}
            one = {name: values[: len(steps[name]) // length] for name, values in parts.items()}
            one["observation/proprio"] = one.pop("observation/state")
            one["observation/side_image"] = one.pop("observation/front_image")
            records.append(example(one))
    write_records(tmp_path / "Push_Agent0/train.tfrecord", records)
    (tmp_path / "Push_Agent0/dataset_info.json").write_text('{"name": "Push", "splits": {"train": 13}}')
    reader = run_import("rlds", tmp_path / "Push_Agent0", "--fps", "20")
    assert set(reader.views) == {"side", "wrist"}
    content.check(reader, side="front")


def test_instructions_are_chosen_by_name_or_said(run_import, tmp_path):
    source = write_tfds(tmp_path / "1.0.0")
    reader = run_import("rlds", source, "--fps", "5", *CAMERAS, "--instruction", "push")
    content.check(reader, instructions=("push", "push"))
    by_name = ["--instruction_key", "episode_metadata/file_path"]
    assert (
        run_import("rlds", source, "--fps", "5", *CAMERAS, *by_name, task="Named").instructions[0] == "/somewhere.pkl"
    )
    changing = steps_of(0)
    changing["language_instruction"][3] = b"stop"
    features = {f"steps/{name}": values for name, values in changing.items()}
    write_records(source / "push-train.tfrecord-00000-of-00002", [example(features)])
    with pytest.raises(UserError, match=r"episode 0 has 2 instructions \('push the cube', 'stop'\); one is needed"):
        run_import("rlds", source, "--fps", "5", *CAMERAS, task="Changing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "does not say how many frames per second it has; say --fps N"),
        (["--fps", "5", "--camera", "side=image"], "no camera 'image'; it has observation/front_image, observation/wr"),
        (["--fps", "5", "--action_key", "act"], "no action 'act'; it has action, observation/state"),
        (
            ["--fps", "5", "--instruction_key", "words"],
            "no instruction 'words'; it has episode_metadata/file_path, language_instruction",
        ),
    ],
)
def test_a_wrong_name_is_answered_with_those_there_are(run_import, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run_import("rlds", write_tfds(tmp_path / "1.0.0"), *arguments)


def test_missing_shards_and_damaged_records_are_found(run_import, tmp_path):
    source = write_tfds(tmp_path / "1.0.0")
    second = source / "push-train.tfrecord-00001-of-00002"
    content_of_second = second.read_bytes()
    second.write_bytes(content_of_second[:-9])
    with pytest.raises(UserError, match="00001-of-00002 is truncated: record 0 ends behind its end"):
        run_import("rlds", source, "--fps", "5")
    second.write_bytes(b"\x1f\x8b" + content_of_second[2:])
    with pytest.raises(UserError, match="the checksum at byte 0 is wrong; it is damaged, compressed or no TFRecord"):
        run_import("rlds", source, "--fps", "5")
    flipped = bytearray(content_of_second)
    flipped[200] ^= 1
    second.write_bytes(flipped)
    with pytest.raises(UserError, match="the record at byte 12 is damaged, its checksum is wrong"):
        run_import("rlds", source, "--fps", "5")
    second.unlink()
    with pytest.raises(UserError, match=r"1\.0\.0 has 1 shards of 2; the source is incomplete; get it again"):
        run_import("rlds", source, "--fps", "5")
    (source / "push-train.tfrecord-00000-of-00002").rename(source / "push-train.tfrecord")
    with pytest.raises(UserError, match=r"has 1 episodes, dataset_info\.json speaks of 2; shards are missing"):
        run_import("rlds", source, "--fps", "5")


def test_checksums_and_messages_are_tensorflows(tmp_path):
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of CRC-32C in its catalogues
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32
    (record,) = list_records(write_records(tmp_path / "one.tfrecord", [TENSORFLOWS_OWN]))
    features = read_example(record)
    assert features["feature0"].tolist() == [0] and features["feature1"].tolist() == [4]
    assert features["feature2"] == [b"goat"]
    np.testing.assert_allclose(features["feature3"], [0.9876], rtol=1e-6)
    negative = EXAMPLE()
    negative.features.feature["n"].int64_list.value.append(-1)
    (record,) = list_records(write_records(tmp_path / "two.tfrecord", [negative.SerializeToString()]))
    assert read_example(record)["n"].tolist() == [-1]


# ------------------------------------------------------------------------------------------------------- what others wrote


def write_first(source: Path, change) -> Path:
    """TFDS' dataset, whose first episode's features are changed."""
    features = steps_of(0)
    change(features)
    steps = {f"steps/{name}": values for name, values in features.items()}
    write_records(write_tfds(source) / "push-train.tfrecord-00000-of-00002", [example(steps)])
    return source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.update(is_first=f["is_first"][:-1]),
            "episode 0 has 4 of is_first, but 5 of observation/front_image",
        ),
        (
            lambda f: f.update(is_first=np.ones(5, np.int64)),
            "episode 0 is more than one: is_first is set in its middle",
        ),
        (lambda f: f.update(is_last=np.ones(5, np.int64)), "episode 0 is more than one: is_last is set in its middle"),
        (lambda f: f.update(action=f["action"][:-1]), r"no action 'action'; it has observation/state"),
        (lambda f: f.update(action=[b"left"] * 5), r"no action 'action'; it has observation/state"),
        (
            lambda f: f.pop("language_instruction"),
            "no instruction 'language_instruction'; it has episode_metadata|it has none",
        ),
        (
            lambda f: f.update(language_instruction=[b"caf\xe9"] * 5),
            r"language_instruction is not UTF-8 \(byte 3\); say --i",
        ),
        (
            lambda f: f["observation/front_image"].__setitem__(0, b"\x89PNG\r\n"),
            "frame 0: its 6 bytes are no picture of PNG",
        ),
        (
            lambda f: f["observation/front_image"].__setitem__(3, b"\x89PNG\r\n"),
            "view front, frame 3: its 6 bytes are no",
        ),
        (
            lambda f: f["observation/front_image"].__setitem__(3, encode_png(np.zeros((9, 8, 3), np.uint8))),
            "it has 8x9 px, the first episode has 64x48",
        ),
        (lambda f: [f.pop(k) for k in list(f) if "image" in k or k == "is_first" or k == "reward"], "how long is it"),
    ],
)
def test_an_episode_that_is_damaged_is_one_line(run_import, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        run_import("rlds", write_first(tmp_path / "1.0.0", change), "--fps", "5", *CAMERAS)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("home/data/*/*"))


def test_a_feature_of_another_kind_than_the_first_episodes_is_one_line(run_import, tmp_path):
    source = write_tfds(tmp_path / "1.0.0")
    for name, values, message in (
        (
            "observation/wrist_image",
            np.zeros(8),
            "episode 1: observation/wrist_image is numbers, in the first episode it",
        ),
        ("action", [b"left"] * 8, "episode 1: action is text, in the first episode it is numbers; add --skip 1"),
        ("action", np.zeros(23), "episode 1: action has 23 numbers in 8 steps; the lengths do not fit"),
    ):
        steps = {f"steps/{key}": part for key, part in (steps_of(1) | {name: values}).items()}
        write_records(source / "push-train.tfrecord-00001-of-00002", [example(steps)])
        with pytest.raises(UserError, match=message):
            run_import("rlds", source, "--fps", "5", *CAMERAS)


def test_a_broken_first_episode_can_be_skipped(run_import, tmp_path):
    source = write_first(tmp_path / "1.0.0", lambda f: f["observation/front_image"].__setitem__(0, b"\x89PNG\r\n"))
    with pytest.raises(UserError, match="add --skip 0 to leave it out"):
        run_import("rlds", source, "--fps", "5", *CAMERAS)
    reader = run_import("rlds", source, "--fps", "5", *CAMERAS, "--skip", "0", num=1)
    assert reader.seeds == [1] and reader.episode_lengths.tolist() == [content.LENGTHS[1]]
    np.testing.assert_array_equal(reader.frame(0, 2)[0].images["front"], content.picture("front", 1, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "dataset_info.json is not valid JSON"),
        ('{"splits": [{"name": 5}]}', "needed: a valid"),
        ('{"splits": [{"name": "train", "shardLengths": ["many"]}]}', "needed: "),
        ("caf\xe9".encode("latin-1"), "is not valid JSON|is not UTF-8"),
        (
            '{"splits": [{"name": "train", "shardLengths": ["1", "7"]}]}',
            "has 2 episodes, dataset_info.json speaks of 8",
        ),
    ],
)
def test_a_dataset_info_that_is_damaged_is_one_line(run_import, tmp_path, text, message):
    source = write_tfds(tmp_path / "1.0.0")
    (source / "dataset_info.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        run_import("rlds", source, "--fps", "5", *CAMERAS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_record_that_claims_terabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.tfrecord"
    header = struct.pack("<Q", 2**41)
    path.write_bytes(header + struct.pack("<I", masked_crc(header)))
    with pytest.raises(UserError, match="is truncated: record 0 ends behind its end"):
        list_records(path)
    with open(path, "r+b") as file:
        file.truncate(2**41 + 16)  # sparse: it takes no room
    with pytest.raises(UserError, match="record 0 has 2,199,023,255,552 bytes, more than the 1,000,000,000 allowed"):
        list_records(path)
