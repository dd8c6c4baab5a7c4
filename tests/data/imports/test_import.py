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
import zarr
from test_zarr import MEASURED, write

from robofactory import files
from robofactory.data.episodes import DatasetReader
from robofactory.data.imports.__main__ import find_source
from robofactory.data.imports.reading import episodes
from robofactory.data.imports.source import Options, Recording, Source, choose_cameras, choose_fps, choose_vectors
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


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_finished_import_is_left_alone(run_import, tmp_path, workers):
    """With processes, the same command ended in a traceback: there was nothing left for a pool of none to wait for."""
    source = write(tmp_path / "demo.zarr", state=MEASURED)
    directory = run_import("zarr", source, *WORDS).directory
    before = {path: path.stat().st_mtime_ns for path in directory.glob("**/*")}
    run_import("zarr", source, *WORDS, "--workers", workers)
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
        (["--workers", "-1"], "--workers: must be at least 0, got -1"),
        (["--num", "0"], "--num: must be at least 1, got 0"),
        (["--fps", "0"], r"--fps: must be in \[0.01, 1000\], got 0.0"),
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


# ---------------------------------------------------------------------------------------------------------- foreign data


def test_a_bad_episode_can_be_left_out_by_its_own_number(run_import, tmp_path):
    broken = MEASURED.copy()
    broken[2, 1] = np.inf
    source = write(tmp_path / "demo.zarr", state=broken)
    with pytest.raises(
        UserError, match=r"episode 0: its proprio in frame 2 is not finite: .*; add --skip 0 to leave it out"
    ):
        run_import("zarr", source, *WORDS)
    assert not list((tmp_path / "home/data").rglob("*")), "what an import without an episode began is left"
    reader = run_import("zarr", source, *WORDS, "--skip", "0", num=1)
    assert reader.seeds == [1] and reader.episode_lengths.tolist() == [content.LENGTHS[1]]
    with pytest.raises(UserError, match=r"holds other episodes than the ones to import .*; delete it"):
        run_import("zarr", source, *WORDS, "--skip", "1", num=1)


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (["7"], r"--skip 7: .* has no such episode to import; it has 0 to 1"),
        (["0", "1"], "has no episode that is not skipped"),
        (["0", "--num", "2"], r"--num 2: .* has 1 episodes"),
    ],
)
def test_only_episodes_that_there_are_can_be_skipped(run_import, tmp_path, skip, message):
    with pytest.raises(UserError, match=message):
        run_import("zarr", write(tmp_path / "demo.zarr", state=MEASURED), *WORDS, "--skip", *skip)


def test_an_import_that_met_a_bad_episode_goes_on_without_it(run_import, tmp_path):
    """The one before was written; with --num the dataset's place stays, and nothing is read twice."""
    broken = MEASURED.copy()
    broken[-1, 0] = np.nan
    source = write(tmp_path / "demo.zarr", state=np.concatenate([broken, MEASURED[: content.LENGTHS[0]]]))
    root = zarr.open_group(source, mode="a")
    for name, array in list(root["data"].arrays()):
        if name != "state":
            values = np.concatenate([array[:], array[: content.LENGTHS[0]]])
            root.create_array(f"data/{name}", data=values, chunks=array.chunks, overwrite=True)
    ends = np.array([*np.cumsum(content.LENGTHS), sum(content.LENGTHS) + content.LENGTHS[0]])
    root.create_array("meta/episode_ends", data=ends, overwrite=True)
    with pytest.raises(UserError, match="episode 1: its proprio in frame 7 is not finite"):
        run_import("zarr", source, *WORDS, "--num", "2")
    first = tmp_path / "home/data/Push_Agent0_2/data/chunk-000/file-000.parquet"
    written = first.stat().st_mtime_ns
    assert run_import("zarr", source, *WORDS, "--num", "2", "--skip", "1").seeds == [0, 2]
    assert first.stat().st_mtime_ns == written


def test_a_dataset_has_one_writer(run_import, tmp_path):
    source = write(tmp_path / "demo.zarr", state=MEASURED)
    is_held = pytest.raises(UserError, match=rf"Push_Agent0_2 is being written by process {os.getpid()} on ")
    with files.owned(tmp_path / "home/data/Push_Agent0_2"), is_held:
        run_import("zarr", source, *WORDS)
    run_import("zarr", source, *WORDS)
    assert [path.name for path in (tmp_path / "home/data").iterdir()] == ["Push_Agent0_2"], "a lock is left"


class Dying(Source):
    def __init__(self, path: Path):
        self.path = path

    def read(self, episode: int) -> Recording:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError


def test_a_reader_that_dies_is_named_with_how_it_died(tmp_path):
    with pytest.raises(
        UserError, match=r"the process that read episode 5 was lost \(killed by SIGSEGV\); use fewer --w"
    ):
        list(episodes(Dying(tmp_path), [5], 1))


def test_a_rate_that_is_no_whole_number_is_kept_and_one_near_it_is_taken(tmp_path):
    def choose(recorded, given, notes):
        return choose_fps(recorded, Options("Push", fps=given), 20, Path("source"), notes)

    notes: list[str] = []
    assert choose(29.97, None, notes) == 29.97 and choose(30.0, None, notes) == 30 and not notes
    assert isinstance(choose(30.0, None, notes), int)
    assert choose(None, None, notes) == 20 and choose(None, 12.5, notes) == 12.5 and not notes
    assert choose(29.97, 30, notes) == 30
    assert notes == ["it was recorded at 29.97 frames per second, and is imported as 30"]
    for recorded, given, message in (
        (29.97, 25, "was recorded at 29.97 frames per second, not 25; omit --fps"),
        (float("nan"), None, "nan frames per second; needed: 0.01 to 1000"),
        (0, 30, "0 frames per second; needed: 0.01 to 1000"),
        (1e9, None, "1e.09 frames per second; needed: 0.01 to 1000"),
    ):
        with pytest.raises(UserError, match=message):
            choose(recorded, given, notes)


def test_no_two_dimensions_have_one_name():
    available = {"left.arm": ["elbow", "gripper"], "right.arm": ["elbow", "gripper"], "base": ["x", "x", "yaw"]}
    names = choose_vectors(("left.arm", "right.arm", "base"), available, "action", Path("source"))
    assert names == (
        *("left.arm.elbow", "left.arm.gripper", "right.arm.elbow", "right.arm.gripper"),
        *("base.x_4", "base.x_5", "yaw"),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fps", "nan"], "--fps: 'nan' is no number"),
        (["--action_key", "a", "b", "a"], "--action_key names one twice: a b a"),
        (["--proprio_key", "none", "state"], "--proprio_key none stands for itself"),
        (["--instruction", " "], "--instruction has no words"),
        (["--instruction_key", "words"], "--instruction_key is for rlds; zarr has no such texts"),
        (["--workers", "100000"], "--workers: must be at most 256, got 100000"),
        (["--agent_id", "-1"], "--agent_id: must be at least 0, got -1"),
    ],
)
def test_what_the_command_line_decides_is_refused_before_anything_is_imported(tmp_path, arguments, message):
    given = ["zarr", str(tmp_path), "--task", "Push", *arguments]
    script = f"""
import sys
sys.argv = ["import", *{given!r}]
from robofactory.data.imports.__main__ import main
from robofactory.errors import UserError
try:
    main()
except UserError as error:
    print(error, [name for name in ("torch", "numpy", "pyarrow", "tqdm") if name in sys.modules])
"""
    environment = os.environ | {"ROBOFACTORY_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert ran.stdout.startswith(message) and ran.stdout.rstrip().endswith("[]"), ran.stdout
    assert not (tmp_path / "home").exists()


def test_a_source_is_found_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "demo.zarr").mkdir()
    assert find_source("~/demo.zarr", "zarr") == tmp_path / "demo.zarr"
    assert find_source("lerobot/pusht", "lerobot") == Path("lerobot/pusht")
    for given, message in (
        ("", "SOURCE is empty"),
        ("lerobot/pusht", "lerobot/pusht does not exist"),
        ("~nobody_of_this_name/x", "does not exist"),
        ("a\0b", "does not exist"),
        ("x" * 300, "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            find_source(given, "zarr")


def test_an_import_that_was_killed_before_its_end_is_finished_though_no_episode_is_missing(run_import, tmp_path):
    """With processes to read episodes and none left to read it ended in a traceback."""
    source = write(tmp_path / "demo.zarr")
    run_import("zarr", source, *WORDS)
    (info,) = tmp_path.rglob("meta/info.json")
    content = info.read_bytes()
    info.unlink()
    run_import("zarr", source, *WORDS, "--workers", "2")
    assert info.read_bytes() == content
