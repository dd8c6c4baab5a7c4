"""Diffusion Policy's zarr in RoboFactory's layout, and others'."""

import json
import zipfile
from pathlib import Path

import content
import numcodecs
import numpy as np
import pytest
import zarr

from robofactory.data.imports.zarr_arrays import DECOMPRESSORS
from robofactory.errors import UserError

CHUNK = 4  # frames, so that an episode begins within one


def write(path: Path, state: np.ndarray | None = None, channels_last: bool = False) -> Path:
    """Both episodes, one behind the other; RoboFactory's state is the action."""
    each = [(episode, frame) for episode, length in enumerate(content.LENGTHS) for frame in range(length)]
    actions = np.stack([content.action(*one) for one in each])
    add = adder(path)
    for name, camera in {"head_camera": "front", "wrist_camera": "wrist"}.items():
        pictures = np.stack([content.picture(camera, *one) for one in each])
        add(f"data/{name}", pictures if channels_last else pictures.transpose(0, 3, 1, 2))
    add("data/action", actions)
    add("data/tcp_action", actions)
    add("data/state", actions if state is None else state)
    add("meta/episode_ends", np.cumsum(content.LENGTHS))
    return path


def adder(path: Path):
    """Format 2 and Blosc, as RoboFactory's zarr 2.18 writes them."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    blosc = numcodecs.Blosc(cname="zstd", clevel=3, shuffle=1)

    def add(name: str, values: np.ndarray) -> None:
        chunks = (CHUNK, *values.shape[1:])
        root.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=blosc)[:] = values

    return add


MEASURED = np.stack(
    [content.state(episode, frame) for episode, length in enumerate(content.LENGTHS) for frame in range(length)]
)


def test_robofactorys_state_is_found_out_and_left_away(run_import, tmp_path, capsys):
    """It is the action once more: what learns from it copies its input, and stands still on the robot."""
    path = write(tmp_path / "Push_Agent0_2.zarr")
    reader = run_import("zarr", path, "--instruction", "push")
    content.check(reader, has_proprio=False, instructions=("push", "push"), side="front")
    assert set(reader.views) == {"side", "wrist"}
    assert "state is a copy of action, no measurement: imported without proprio" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"state is a copy of action, no measurement; omit --proprio_key"):
        run_import("zarr", path, "--instruction", "push", "--proprio_key", "state")


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_state_that_was_measured_is_kept(run_import, tmp_path, capsys, channels_last):
    path = write(tmp_path / "demo.zarr", state=MEASURED, channels_last=channels_last)
    arguments = ["--camera", "front=head_camera", "wrist=wrist_camera", "--instruction", "push", "--fps", "10"]
    reader = run_import("zarr", path, *arguments)
    content.check(reader, instructions=("push", "push"))
    assert reader.description.fps == 10 and "copy" not in capsys.readouterr().err


def test_the_global_camera_lies_in_a_zarr_of_its_own(run_import, tmp_path):
    path = write(tmp_path / "Push_Agent0_2.zarr")
    beside = write(tmp_path / "Push_global_2.zarr")
    reader = run_import("zarr", path, "--instruction", "push")
    assert set(reader.views) == {"side", "wrist", "overhead"}
    np.testing.assert_array_equal(reader.frame(1, 2)[0].images["overhead"], content.picture("front", 1, 2))
    adder(beside)("meta/episode_ends", np.array([4, 13]))
    with pytest.raises(UserError, match=r"Push_global_2\.zarr has other episodes than"):
        run_import("zarr", path, "--instruction", "push")


def test_a_wrong_name_or_a_broken_zarr_is_one_line(run_import, tmp_path):
    path = write(tmp_path / "demo.zarr")
    words = ["--instruction", "push"]
    with pytest.raises(UserError, match="no camera 'top'; it has head_camera, wrist_camera"):
        run_import("zarr", path, *words, "--camera", "side=top")
    with pytest.raises(UserError, match="no action 'act'; it has action, state, tcp_action"):
        run_import("zarr", path, *words, "--action_key", "act")
    zarr.open_group(path, mode="a")["data/action"].resize((12, 3))
    with pytest.raises(UserError, match="action has 12 frames, its episodes 13; it is incomplete"):
        run_import("zarr", path, *words)
    with pytest.raises(UserError, match=r"nowhere\.zarr does not exist"):
        run_import("zarr", tmp_path / "nowhere.zarr", *words)


# ------------------------------------------------------------------------------------------------------- what others wrote


WORDS = ["--instruction", "push"]


def write_pusht(path: Path, pictures: np.ndarray) -> Path:
    """As Diffusion Policy's own PushT data: float32 pictures in [0, 255], points, flags."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    n, random = len(pictures), np.random.default_rng(0)
    for name, shape in {"action": (n, 2), "state": (n, 5), "keypoint": (n, 9, 2), "n_contacts": (n, 1)}.items():
        root.create_array(f"data/{name}", data=random.normal(size=shape).astype(np.float32), chunks=(8, *shape[1:]))
    root.create_array("data/img", data=pictures, chunks=(8, *pictures.shape[1:]))
    root.create_array("meta/episode_ends", data=np.array([8, n]))
    return path


PICTURES = np.random.default_rng(1).integers(1, 256, (20, 24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (PICTURES.astype(np.float32), PICTURES),
        (PICTURES / 255, PICTURES),
        (np.concatenate([PICTURES, PICTURES[..., :1]], axis=3), PICTURES),
        (PICTURES[..., :1], np.repeat(PICTURES[..., :1], 3, axis=3)),
        (PICTURES[..., 0], np.repeat(PICTURES[..., :1], 3, axis=3)),
    ],
    ids=["0..255", "0..1", "rgba", "grey", "grey without an axis"],
)
def test_float_grey_and_rgba_pictures_come_back_to_the_level(run_import, tmp_path, given, expected):
    reader = run_import("zarr", write_pusht(tmp_path / "pusht.zarr", given), *WORDS, "--fps", "10")
    assert reader.views == ("img",) and reader.description.names_of_proprio()[0] == "state_0"
    np.testing.assert_array_equal(reader.frame(1, 4)[0].images["img"], expected[12])


def test_a_camera_that_does_not_suit_is_named(run_import, tmp_path, capsys):
    path = write_pusht(tmp_path / "pusht.zarr", PICTURES)
    root = zarr.open_group(path, mode="a")
    root.create_array("data/depth", data=np.ones((20, 24, 32, 3), np.uint16))
    run_import("zarr", path, *WORDS)
    said = capsys.readouterr().err
    assert "'depth' is no camera that can be imported, and left out: its pictures are uint16; needed: uint8" in said
    with pytest.raises(UserError, match="camera 'depth' cannot be imported: its pictures are uint16"):
        run_import("zarr", path, *WORDS, "--camera", "side=depth")


def test_pictures_that_are_brighter_than_the_first_episodes_white_are_refused(run_import, tmp_path):
    """All that the first episode shows is at most 1; whether that is white or nearly black nobody can know."""
    pictures = PICTURES.astype(np.float32)
    pictures[:8] = 0.5
    with pytest.raises(UserError, match=r"episode 1: view img, frame 0: its values .* and 1 is white; add --skip 1"):
        run_import("zarr", write_pusht(tmp_path / "pusht.zarr", pictures), *WORDS)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["action", "head_camera"])
def test_a_missing_or_cut_chunk_is_refused_by_name(run_import, tmp_path, version, name):
    """It was imported, as zeros, or as what lay in memory."""
    path = write(tmp_path / "demo.zarr", state=MEASURED)
    zeros = "0" if name == "action" else "0.0.0"
    chunk = path / f"data/{name}/1.{zeros}"
    if version == 3:
        old = zarr.open_group(path, mode="r")
        path = tmp_path / "third.zarr"
        new = zarr.open_group(path, mode="w", zarr_format=3)
        for place in [*(f"data/{key}" for key in old["data"]), "meta/episode_ends"]:
            new.create_array(place, data=old[place][:], chunks=old[place].chunks)
        chunk = path / f"data/{name}/c/1/{zeros.replace('.', '/')}"
    content.check(run_import("zarr", path, *WORDS, task="Whole"), instructions=("push", "push"), side="front")
    whole = chunk.read_bytes()
    for size in (0, 10, len(whole) - 1):
        chunk.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"data/{name}: chunk data/{name}/\S+ is damaged .*; get it again"):
            run_import("zarr", path, *WORDS)
    chunk.unlink()
    with pytest.raises(UserError, match=rf"data/{name} has no chunk data/{name}/\S+; zarr would read it as zeros"):
        run_import("zarr", path, *WORDS)
    outside = tmp_path / "outside"
    outside.write_bytes(whole)
    chunk.symlink_to(outside)
    with pytest.raises(UserError, match=r"which is not below .*\.zarr; it is refused"):
        run_import("zarr", path, *WORDS)


def test_a_chunk_that_is_missing_in_a_skipped_episode_is_no_matter(run_import, tmp_path):
    path = write(tmp_path / "demo.zarr", state=MEASURED)
    (path / "data/action/3.0").unlink()
    with pytest.raises(UserError, match=r"no chunk data/action/3\.0; .*; add --skip 1 to leave its episode out"):
        run_import("zarr", path, *WORDS)
    reader = run_import("zarr", path, *WORDS, "--skip", "1", num=1)
    assert reader.episode_lengths.tolist() == [content.LENGTHS[0]] and reader.seeds == [0]


def zipped(path: Path) -> Path:
    archive = path.with_name(f"{path.name}.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for each in sorted(path.rglob("*")):
            if each.is_file():
                file.write(each, each.relative_to(path))
    return archive


def test_a_zip_is_read_as_the_directory_is_and_damage_in_it_is_found(run_import, tmp_path):
    archive = zipped(write(tmp_path / "demo.zarr", state=MEASURED))
    content.check(run_import("zarr", archive, *WORDS), instructions=("push", "push"), side="front")
    damaged = bytearray(archive.read_bytes())
    damaged[damaged.index(b"data/head_camera/1.0.0.0") + 100] ^= 1
    archive.write_bytes(damaged)
    with pytest.raises(UserError, match=r"data/head_camera/1\.0\.0\.0 cannot be unpacked \(Bad CRC-32"):
        run_import("zarr", archive, *WORDS, task="Damaged")
    archive.write_bytes(damaged[:-50])
    with pytest.raises(UserError, match=r"is neither a directory nor a whole \.zip"):
        run_import("zarr", archive, *WORDS, task="Cut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "|O", "filters": [{"id": "pickle"}]}, r"action has values of type '\|O'; needed: bool, int, uint"),
        ({"filters": [{"id": "pickle"}]}, r"action is packed by 'pickle'; blosc, zstd, .* can be read"),
        ({"compressor": {"id": "imagecodecs_jpeg2k"}}, "action is packed by 'imagecodecs_jpeg2k'"),
        ({"shape": None}, r"key 'shape' is null; needed: a valid array"),
        ({"shape": [10**15, 3]}, "action has 1000000000000000 frames, its episodes 13"),
        ({"shape": [13, 10**15]}, r"no action 'action'; it has state, tcp_action"),
        ({"chunks": [10**12, 3]}, r"has chunks of 12,000,000,000,000 bytes, more than the 512,000,000 allowed"),
        ({"chunks": [0, 3]}, r"key 'chunks\.0' is 0; needed: greater than 0"),
        ({"order": "Z"}, r"key 'order' is \"Z\"; needed: 'C' or 'F'"),
        ({"zarr_format": 4}, r"key 'zarr_format' is 4; needed: 2"),
    ],
)
def test_metadata_that_are_damaged_or_mean_harm_are_one_line(run_import, tmp_path, change, message):
    path = write(tmp_path / "demo.zarr", state=MEASURED)
    file = path / "data/action/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        run_import("zarr", path, *WORDS)
    assert "\n" not in str(caught.value) and not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (np.array([5.0, 13.0]), None),
        (np.array([5.0, np.nan]), r"must be whole numbers that grow, got \[5\.0, nan\]"),
        (np.array([5.5, 13.0]), r"must be whole numbers that grow, got \[5\.5, 13\.0\]"),
        (np.array([8, 5, 13]), r"must be whole numbers that grow, got \[8, 5, 13\]"),
        (np.array([5, 14]), "action has 13 frames, its episodes 14"),
        (np.array([[5, 13]]), r"episode_ends has the shape \[1, 2\]; needed: a number for each episode"),
    ],
)
def test_episode_ends_are_numbers_that_grow_to_the_end(run_import, tmp_path, ends, message):
    path = write(tmp_path / "demo.zarr", state=MEASURED)
    zarr.open_group(path, mode="a").create_array("meta/episode_ends", data=ends, overwrite=True)
    if message is None:
        content.check(run_import("zarr", path, *WORDS), instructions=("push", "push"), side="front")
    else:
        with pytest.raises(UserError, match=message):
            run_import("zarr", path, *WORDS)


@pytest.mark.parametrize("name", ["blosc", "zstd", "zlib", "gzip", "bz2", "lzma", "lz4"])
def test_every_decompressor_returns_what_was_packed_and_no_more(name):
    values = np.arange(1000, dtype=np.int32).tobytes()
    packed = bytes(numcodecs.get_codec({"id": name}).encode(values))
    assert DECOMPRESSORS[name](packed, len(values)) == values
    for wrong in (len(values) - 4, len(values) + 4):
        with pytest.raises((ValueError, OSError, RuntimeError)):
            DECOMPRESSORS[name](packed, wrong)
