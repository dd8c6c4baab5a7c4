import os
import signal
import subprocess
import sys

import pytest

from robofactory import files
from robofactory.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    directory = tmp_path / "dataset"
    (directory / "videos").mkdir(parents=True)
    (directory / "videos" / "a.mp4").write_bytes(b"a video")
    (tmp_path / "secret.txt").write_text("a local secret")
    return directory


def test_a_name_from_a_file_is_a_regular_file_below_its_directory(dataset):
    (dataset / "link.mp4").symlink_to("videos/a.mp4")
    assert files.inside(dataset, "videos/a.mp4", "info.json").read_bytes() == b"a video"
    assert files.inside(dataset, "link.mp4", "info.json").read_bytes() == b"a video"


@pytest.mark.parametrize(
    "name", ["../secret.txt", "videos/../../secret.txt", "/etc/passwd", "out/secret.txt", "loop", "", ".", "a\0b", "x" * 9999]
)  # fmt: skip
def test_a_name_that_leads_out_of_its_directory_is_refused(dataset, name):
    (dataset / "out").symlink_to("..")
    (dataset / "loop").symlink_to("loop")
    with pytest.raises(UserError):
        files.inside(dataset, name, "info.json")


def test_a_fifo_a_device_and_a_directory_are_refused_without_being_opened(dataset):
    os.mkfifo(dataset / "fifo")
    for name in ("fifo", "videos"):
        with pytest.raises(UserError, match="no regular file"):
            files.inside(dataset, name, "info.json")
    with pytest.raises(UserError, match="no regular file"):
        files.require_regular(files.Path("/dev/zero"))


def test_links_of_the_hubs_cache_lead_to_its_blobs(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0f"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (tmp_path / "datasets--a--b" / "blobs" / "1234").write_text("content")
    (snapshot / "info.json").symlink_to("../../blobs/1234")
    assert files.inside(snapshot, "info.json", "x").read_text() == "content"


def test_links_of_a_directory_in_a_snapshot_of_the_hubs_cache_lead_to_its_blobs_and_no_further(tmp_path):
    cache = tmp_path / "datasets--a--b"
    (part := cache / "snapshots" / "0f" / "many" / "one").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "1234").write_text("content")
    (cache / "secret").write_text("a local secret")
    (part / "info.json").symlink_to("../../../../blobs/1234")
    (part / "out.json").symlink_to("../../../../secret")
    assert files.inside(part, "info.json", "x").read_text() == "content"
    with pytest.raises(UserError, match="is refused; a link leads elsewhere, put the file itself there"):
        files.inside(part, "out.json", "x")


def test_a_pointer_of_git_lfs_says_how_to_get_the_content(dataset):
    (dataset / "p.parquet").write_bytes(files.LFS_POINTER + b"\noid sha256:00\nsize 82515\n")
    with pytest.raises(UserError, match=r"p\.parquet is a Git LFS pointer.*run git lfs pull"):
        files.inside(dataset, "p.parquet", "info.json")


HOLD = """
import sys, time
from pathlib import Path
from robofactory import files
with files.owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_has_one_writer_and_a_killed_one_is_gone(tmp_path):
    place = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    held = rf"{place} is being written by process {other.pid} on \S+; wait for it"
    with pytest.raises(UserError, match=held), files.owned(place):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with files.owned(place):
        assert not place.exists(), "a lock makes no directory"
    assert list(tmp_path.iterdir()) == []


def test_a_directory_has_one_writer_whatever_it_is_called(tmp_path):
    real, link = tmp_path / "disk" / "run", tmp_path / "home" / "link"
    for directory in (real, link.parent):
        directory.mkdir(parents=True)
    link.symlink_to(real)
    held = pytest.raises(UserError, match=rf"{link} is being written by process {os.getpid()} on")
    with files.owned(real), held, files.owned(link):
        pass
    assert [*real.parent.iterdir(), *link.parent.iterdir()] == [real, link]


def test_only_what_a_killed_write_of_this_file_left_is_removed(tmp_path):
    for name in ("summary.json.123.tmp", "summary.json.old.tmp", "summary.json", "other.json.123.tmp"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path / "summary.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.json.123.tmp", "summary.json", "summary.json.old.tmp"
    ]  # fmt: skip
