"""What a LeRobot dataset names is read below its directory, through templates that understand numbers and names alone."""

import os

import pyarrow as pa
import pytest
from small_lerobot import (
    CAMERA,
    IMAGE_TYPE,
    NEW_DATA,
    change_column,
    change_info,
    check_content,
    old_data,
    old_video,
    open_source,
    picture,
    png,
    write_new,
    write_old,
)

from robofactory.data.imports.lerobot_meta import PathTemplate
from robofactory.errors import UserError

FIELDS = ("episode_chunk", "episode_index", "video_key")


def refused(root, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        for frames in open_source(root).read(0).frames.values():
            list(frames)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{video_key}/{episode_chunk:03d}/{episode_index:06d}", "cam/001/000012"),
        ("{episode_index}-{episode_index:d}-{episode_index:02}", "12-12-12"),
        ("{{x}}/{episode_index:04d}", "{x}/0012"),
        ("plain", "plain"),
    ],
)
def test_a_template_is_filled_as_python_would(text, expected):
    values = {"video_key": "cam", "episode_chunk": 1, "episode_index": 12}
    assert PathTemplate(text, FIELDS, "data_path").fill(values) == expected == text.format(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{episode_index!r}", r"has '\{episode_index!r\}'; only \{name\} and \{name:03d\} are understood"),
        ("{episode_index.__class__}", r"only \{name\} and \{name:03d\} are understood"),
        ("{episode_index[0]}", r"only \{name\}"),
        ("{episode_index:0999999999d}", r"only \{name\}"),
        ("{episode_index:099d}", r"only \{name\}"),
        ("{episode_index:x}", r"only \{name\}"),
        ("{episode_index:{episode_chunk}}", r"only \{name\}"),
        ("{}", r"only \{name\}"),
        ("{0}", r"has '\{0\}'; known are episode_chunk, episode_index, video_key"),
        ("{episode_idx}", r"did you mean 'episode_index'\?"),
        ("{episode_index", r"only \{name\}"),
        ("episode_index}", r"only \{name\}"),
        ("", "is no path below the dataset; it is refused"),
        ("/etc/{episode_index}", "is no path below the dataset; it is refused"),
        ("data/../../{episode_index}", "is no path below the dataset; it is refused"),
        ("x" * 1001, "'x{80}\\.\\.\\.' is no path below the dataset; it is refused"),
        ("data\0{episode_index}", "is no path below the dataset; it is refused"),
    ],
)
def test_a_template_understands_nothing_else(text, message):
    with pytest.raises(UserError, match=message):
        PathTemplate(text, FIELDS, "data_path")


@pytest.mark.parametrize(
    "template",
    [
        "data/chunk-{chunk_index:03d}/episode_{episode_index:06d}.parquet",
        "data/chunk-{chunk_index:03d}/episode_{file_index:06d}.parquet",
        "data/chunk-{episode_chunk:03d}/episode_{file_index:06d}.parquet",
        "data/chunk-000/episode_{episode_index:06d}.parquet",
    ],
)
def test_the_names_of_one_version_are_understood_in_the_other(tmp_path, template):
    root = change_info(write_old(tmp_path / "source"), data_path=template)
    check_content(open_source(root), [4, 6])


@pytest.mark.parametrize("key", ["data_path", "video_path"])
def test_paths_out_of_the_dataset_are_refused(tmp_path, key):
    root = write_old(tmp_path / "source", is_video=True)
    for path in ("../{episode_index}.x", f"{tmp_path}/{{episode_index}}.x", "{episode_index!r}"):
        refused(change_info(root, **{key: path}), rf"info\.json: {key} .*(is refused|are understood)")


def test_a_video_key_that_leads_out_is_refused(tmp_path):
    root = write_old(tmp_path / "source", is_video=True)
    change_info(root, lambda info: info["features"].update({"../../../../x": info["features"].pop(CAMERA)}))
    refused(root, r"which is not below .*source; it is refused")


@pytest.mark.parametrize("kind", ["outside", "fifo", "directory", "loop"])
def test_links_and_fifos_in_place_of_files_are_refused(tmp_path, kind):
    """Rows, videos and meta/ alike; a FIFO would be waited for, for ever."""
    for number, name in enumerate(("data", "video", "info.json", "tasks.jsonl", "episodes.jsonl")):
        root = write_old(tmp_path / f"source{number}", is_video=True)
        path = {"data": old_data(root, 0), "video": old_video(root, 0)}.get(name, root / "meta" / name)
        if kind == "outside":
            path.rename(tmp_path / name)
            path.symlink_to(tmp_path / name)
        else:
            path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        refused(root, r"is refused|is no regular file|has no meta/info\.json")


def test_files_of_3_0_that_lead_out_are_refused(tmp_path):
    root = write_new(tmp_path / "source")
    path = root / NEW_DATA.format(chunk_index=0, file_index=1)
    path.rename(tmp_path / "rows.parquet")
    path.symlink_to(tmp_path / "rows.parquet")
    refused(root, r"file-001\.parquet', which is not below .*source; it is refused")


def test_pictures_out_of_the_dataset_are_refused(tmp_path):
    root = write_old(tmp_path / "source")
    (tmp_path / "secret.png").write_bytes(png(picture(0, 0)))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "images/../../secret.png"):
        change_column(old_data(root, 0), CAMERA, pa.array([{"bytes": None, "path": name}] * 4, IMAGE_TYPE))
        refused(root, r"row 0 names .*secret\.png|row 0 names 'link\.png', which is not below")
    change_column(old_data(root, 0), CAMERA, pa.array([{"bytes": None, "path": "images/none.png"}] * 4, IMAGE_TYPE))
    refused(root, r"images/none\.png is missing")
