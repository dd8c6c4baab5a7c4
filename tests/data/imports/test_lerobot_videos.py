"""Pictures of LeRobot's videos come at their rows' times, from the right video, or the line says why not."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_lerobot import (
    CAMERA,
    FPS,
    NEW_VIDEO,
    SIDE,
    change_column,
    change_feature,
    check_content,
    episodes_file,
    level,
    levels,
    old_data,
    old_video,
    open_source,
    picture,
    rows,
    write_info,
    write_new,
    write_old,
    write_table,
    write_video,
)

from robofactory.data.imports.reading import episodes, read_episode
from robofactory.errors import UserError

TOLERANCE = 3


@pytest.fixture
def old(tmp_path):
    return write_old(tmp_path / "source", is_video=True)


def place_video(root, **columns) -> None:
    for part, values in columns.items():
        change_column(episodes_file(root), f"videos/{CAMERA}/{part}", values)


def refused(root, message: str, episode: int = 0) -> None:
    with pytest.raises(UserError, match=message) as caught:
        levels(open_source(root), episode)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "mpeg4"])
def test_videos_of_the_usual_codecs_are_read(tmp_path, codec):
    root = write_old(tmp_path / "source", lengths=(4,), is_video=True)
    pictures = [np.full((64, 64, 3), level(0, frame), np.uint8) for frame in range(4)]
    write_video(old_video(root, 0), pictures, codec=codec)
    check_content(open_source(root), [4], TOLERANCE)


@pytest.mark.parametrize("first_s", [0.0, 0.1, 3.7])
def test_as_many_pictures_as_rows_belong_together(tmp_path, first_s):
    """In public datasets rows begin at 1/fps, or where they were cut, and their video at 0."""
    check_content(open_source(write_old(tmp_path / "old", first_s=first_s, is_video=True)), [4, 6], TOLERANCE)
    check_content(open_source(write_new(tmp_path / "new", first_s=first_s, is_video=True)), [4, 4, 4, 4], TOLERANCE)


def test_a_video_with_more_pictures_than_rows_is_read_at_their_times_and_said(old):
    write_video(old_video(old, 0), [picture(0, frame) for frame in range(9)])
    write_table(old_data(old, 0), rows(0, 4, first_s=0.2, is_video=True))
    recording = open_source(old).read(0)
    found = [round(float(np.mean(frame))) for frame in recording.frames["cam"]]
    assert np.abs(np.subtract(found, [level(0, frame + 2) for frame in range(4)])).max() <= TOLERANCE
    (note,) = recording.notes
    assert "has 9 pictures for 4 rows; those at the rows' times are taken" in note


def test_a_video_at_another_rate_is_read_at_the_rows_times(old):
    faster = [picture(0, frame // 3) for frame in range(12)]
    write_video(old_video(old, 0), faster, fps=3 * FPS)
    check_content(open_source(old), [4, 6], TOLERANCE)
    write_video(old_video(old, 0), [picture(0, frame) for frame in range(4)], fps=3 * FPS)
    refused(old, r"episode_000000\.mp4 has no picture at 0\.200 s")


@pytest.mark.parametrize("workers", [0, 2])
def test_notes_of_an_episode_are_printed_from_whatever_process(old, capsys, workers):
    write_video(old_video(old, 0), [picture(0, frame) for frame in range(9)])
    assert [len(episode.actions) for episode in episodes(open_source(old), [0, 1], workers)] == [4, 6]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {old}: episode 0 ") and "has 9 pictures for 4 rows" in line


def test_a_video_of_another_size_is_said_and_one_that_changes_is_refused(old):
    source = open_source(change_feature(old, CAMERA, shape=[3, 48, 96]))
    assert source.image_sizes == {"cam": (SIDE, SIDE)}
    assert source.notes == [f"camera {CAMERA} is declared 96x48 px, its pictures have {SIDE}x{SIDE}"]
    write_video(old_video(old, 1), [np.zeros((64, 64, 3), np.uint8)] * 6)
    with pytest.raises(UserError, match=r"episode 1 .*it has 64x64 px, the first episode has 32x32; all must be alike"):
        read_episode(open_source(old), 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be decoded"),
        (b"no video", "cannot be decoded"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "is a Git LFS pointer"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nepisode_000001.mp4\n#EXT-X-ENDLIST\n", "cannot be decoded"),
        (b"ffconcat version 1.0\nfile episode_000001.mp4\n", "cannot be decoded"),
    ],
)
def test_what_is_no_video_is_refused_and_a_playlist_opens_nothing(old, content, message):
    old_video(old, 0).write_bytes(content)
    refused(old, rf"episode_000000\.mp4 {message}")


def test_a_cut_video_is_refused(old):
    content = old_video(old, 1).read_bytes()
    for size in range(100, len(content), len(content) // 7):
        old_video(old, 1).write_bytes(content[:size])
        refused(old, r"episode_000001\.mp4", episode=1)


def test_pictures_of_absurd_sizes_are_refused(old, monkeypatch):
    monkeypatch.setattr("robofactory.data.imports.videos.MAX_PIXELS", 1000)
    refused(old, r"pictures of 32x32 px are more than the 1,000 that are read")


# ----------------------------------------------------------------------------------------------------------- 3.0 only


def test_the_video_before_the_right_one_is_recognised(tmp_path):
    """LeRobot's converter named the file that was full, and its end, for the first episode of each next file."""
    root = write_new(tmp_path / "source", grouped=((0, 1), (2, 3), (4,)), is_video=True)
    check_content(open_source(root), [4] * 5, TOLERANCE)
    assert open_source(root).notes == []
    place_video(
        root,
        file_index=[0, 0, 0, 1, 1],
        from_timestamp=[0.0, 0.4, 0.8, 0.4, 0.8],
        to_timestamp=[0.4, 0.8, 1.2, 0.8, 1.2],
    )
    source = open_source(root)
    check_content(source, [4] * 5, TOLERANCE)
    assert source.notes == [
        "meta/episodes names the video before the right one for 2 episodes (2, 4); the right one is read"
    ]


def test_a_video_whose_first_episode_was_deleted_is_read_where_meta_says(tmp_path):
    """All episodes are of one length, so the gap looks like an episode of the file before; but that one is there."""
    root = write_new(tmp_path / "source", grouped=((0, 1), (2, 3)), is_video=True)
    table = pq.read_table(episodes_file(root))
    pq.write_table(table.filter([True, True, False, True]), episodes_file(root))
    write_info(root, "v3.0", [4] * 3, FPS, True)
    source = open_source(root)
    assert source.episode_ids == [0, 1, 3]
    for episode in source.episode_ids:
        expected = [level(episode, frame) for frame in range(4)]
        assert np.abs(np.subtract(levels(source, episode), expected)).max() <= TOLERANCE


def test_a_camera_without_video_for_an_episode_is_named(tmp_path):
    root = write_new(tmp_path / "source", is_video=True)
    place_video(root, file_index=[0.0, float("nan"), 1.0, 1.0])
    refused(root, r"episode 1 has no video of camera observation\.images\.cam", episode=1)
    assert len(levels(open_source(root), 0)) == 4


def test_fewer_pictures_than_rows_are_never_those_of_the_next_episode(tmp_path):
    root = write_new(tmp_path / "source", is_video=True)
    place_video(root, to_timestamp=[0.3, 0.7, 0.4, 0.8])
    refused(root, r"episode 0 has 4 rows, but 3 pictures of camera observation\.images\.cam")
    place_video(root, to_timestamp=[0.7, 0.8, 0.4, 0.8])
    recording = open_source(root).read(0)
    assert recording.notes[0].startswith("it has 7 pictures of camera observation.images.cam for 4 rows")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"from_timestamp": [1e300, 0.4, 0.0, 0.4]}, r"key '0\.videos\.observation\.images\.cam\.from_timestamp' is 1e\+300"),
        ({"from_timestamp": [float("nan"), 0.4, 0.0, 0.4]}, r"from_timestamp' is NaN; needed: a finite number"),
        ({"from_timestamp": [-1.0, 0.4, 0.0, 0.4]}, r"from_timestamp' is -1\.0"),
        ({"from_timestamp": ["0"] * 4}, r"from_timestamp' is \"0\""),
        ({"from_timestamp": None}, r"has no column 'videos/observation\.images\.cam/from_timestamp'"),
        ({"file_index": [7, 0, 1, 1]}, r"file-007\.mp4 is missing"),
        ({"chunk_index": [-1, 0, 0, 0]}, r"chunk_index' is -1"),
    ],
)  # fmt: skip
def test_places_of_videos_that_are_wrong_are_refused_by_key(tmp_path, columns, message):
    root = write_new(tmp_path / "source", is_video=True)
    place_video(root, **columns)
    refused(root, message)


def test_a_missing_video_is_refused_by_name(tmp_path, old):
    old_video(old, 0).unlink()
    refused(old, r"episode_000000\.mp4 is missing; the source is incomplete")
    root = write_new(tmp_path / "new", is_video=True)
    shutil.rmtree(root / "videos")
    refused(root, NEW_VIDEO.format(video_key=CAMERA, chunk_index=0, file_index=0) + " is missing")
