"""What is the same for all formats: stopped, continued, spread over processes, refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import content
import numpy as np
import pytest
from test_zarr import MEASURED, write

from robofactory.data.episodes import DatasetReader
from robofactory.data.imports.source import Options, choose_cameras
from robofactory.errors import UserError

ROOT = Path(__file__).parents[3]
WORDS = ["--instruction", "push"]

KILLED = """
import multiprocessing, os, runpy, sys
replace = os.replace
def stop(temporary, path):
    if str(path).endswith("file-001.parquet"):  # the second episode is written, not renamed
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), 9)
    replace(temporary, path)
if __name__ == "__main__":
    os.replace = stop
    sys.argv = ["import", *{arguments!r}]
    runpy.run_module("robofactory.data.imports", run_name="__main__")
"""


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.glob("**/*")) if p.is_file()}


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_killed_import_goes_on_and_leaves_no_process(run_import, tmp_path):
    source = write(tmp_path / "demo.zarr", state=MEASURED)
    run_import("zarr", source, *WORDS)
    home = tmp_path / "killed"
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(arguments=["zarr", str(source), "--task", "Push", "--workers", "2", *WORDS]))
    environment = os.environ | {"ROBOFACTORY_HOME": str(home), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    directory = home / "data/Push_Agent0_2"
    assert len(list(directory.glob("data/*/*.parquet"))) == 1 and len(list(directory.glob("**/*.tmp"))) == 1
    with pytest.raises(UserError, match=r"unfinished \(1 complete episodes\); the command that began it"):
        DatasetReader(directory)

    first = next(directory.glob("data/*/*.parquet"))
    written = first.stat().st_mtime_ns
    shutil.move(tmp_path / "home", tmp_path / "at_once")
    shutil.move(home, tmp_path / "home")
    resumed = run_import("zarr", source, *WORDS).directory
    assert files_of(resumed) == files_of(tmp_path / "at_once/data/Push_Agent0_2")
    assert next(resumed.glob("data/*/file-000.parquet")).stat().st_mtime_ns == written, "the first one was read again"

    workers = [int(pid) for pid in killed.stdout.splitlines()[-1].split()]
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert workers and not any(is_running(pid) for pid in workers)


def test_a_finished_import_is_left_alone(run_import, tmp_path):
    source = write(tmp_path / "demo.zarr", state=MEASURED)
    directory = run_import("zarr", source, *WORDS).directory
    before = {path: path.stat().st_mtime_ns for path in directory.glob("**/*")}
    run_import("zarr", source, *WORDS)
    assert {path: path.stat().st_mtime_ns for path in directory.glob("**/*")} == before


def test_another_source_or_mapping_is_not_mixed_in(run_import, tmp_path):
    source = write(tmp_path / "demo.zarr", state=MEASURED)
    run_import("zarr", source, *WORDS)
    with pytest.raises(UserError, match=r"was recorded with another driver .*side=wrist_camera"):
        run_import("zarr", source, *WORDS, "--camera", "side=wrist_camera", "wrist=head_camera")
    with pytest.raises(UserError, match=r"was recorded with another driver .*other\.zarr"):
        run_import("zarr", source.rename(tmp_path / "other.zarr"), *WORDS)


def test_the_first_so_many_episodes_are_a_dataset_of_their_own(run_import, tmp_path):
    reader = run_import("zarr", write(tmp_path / "demo.zarr", state=MEASURED), *WORDS, "--num", "1", num=1)
    assert reader.episode_lengths.tolist() == [content.LENGTHS[0]]


def test_numbers_that_are_not_finite_are_not_imported(run_import, tmp_path):
    broken = MEASURED.copy()
    broken[content.LENGTHS[0] + 2, 1] = np.nan
    with pytest.raises(
        UserError,
        match=r"episode 1: its proprio in frame 2 is not finite: \[0\.2.*, nan, 0\.5\]; add --skip 1 to leave it out",
    ):
        run_import("zarr", write(tmp_path / "demo.zarr", state=broken), *WORDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--camera", "side"], r"--camera takes VIEW=NAME, for instance side=head_camera, not 'side'"),
        (["--camera", "a=head_camera", "a=wrist_camera"], "--camera names a view twice: a=head_camera a=wrist_camera"),
        (["--workers", "-1"], "--workers must be 0 to 256, got -1"),
        (["--num", "0"], "--num must be 1 to 2147483648, got 0"),
        (["--fps", "0"], "--fps must be 0.01 to 1000 frames per second, got 0"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(run_import, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run_import("zarr", write(tmp_path / "demo.zarr"), *WORDS, *arguments)


def test_an_unknown_format_is_answered_with_those_there_are(run_import, tmp_path):
    with pytest.raises(UserError, match="no format 'hdf5'; there are maniskill, zarr, lerobot, rlds"):
        run_import("hdf5", tmp_path)


def test_without_options_cameras_keep_their_names_and_other_agents_are_left_away():
    available = ["head_camera_agent0", "head_camera_agent1", "head_camera_global", "obs/images/left"]
    assert choose_cameras(available, {}, Options("Push", agent_id=1), Path("source"), []) == {
        "side": "head_camera_agent1",
        "overhead": "head_camera_global",
        "left": "obs/images/left",
    }
    with pytest.raises(UserError, match=r"cameras a/top and b/top would both be 'top'; say --camera VIEW=NAME"):
        choose_cameras(["a/top", "b/top"], {}, Options("Push"), Path("source"), [])
