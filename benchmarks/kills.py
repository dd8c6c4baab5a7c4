"""Does a command that is killed at any moment lose or break anything?

    python -m benchmarks.kills [--stage train record import evaluate merge] [--kills 50]

Each stage is a small run that is killed with SIGKILL at random moments; by turns the command itself and one of its
processes, of `train` every second time while a checkpoint is written. Then none of its processes may be left, and the
same command must end as the one that was never disturbed: the same bits in weights, optimizer, guard and metrics, in
every file of a dataset or of published weights, in every episode. No lock and no temporary file may stay behind.
`record` and `evaluate` need the simulator.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.small_runs import (
    NUM_EPISODES,
    SMALL,
    TASK,
    differences,
    everything,
    home,
    spawn,
    start,
    wait_for,
    write_dataset,
)
from robofactory import checkpoint
from robofactory.paths import dataset_dir

SECONDS_TO_DIE = 5.0  # for the processes of a command that was killed


# ----------------------------------------------------------------------------------------------------- training, by far


def kill_and_resume(directory: Path, num_kills: int, seed: int = 0) -> list[str]:
    """What was wrong after each kill of a training; nothing, if all is well."""
    problems, chance = [], random.Random(seed)
    with home(directory) as run:
        started = time.monotonic()
        assert wait_for(spawn(start)) == 0, "the undisturbed run failed"
        duration_s = time.monotonic() - started
        undisturbed = everything(run)
        for kill in range(num_kills):
            shutil.rmtree(run)
            pid = spawn(start)
            is_saving = kill % 2 == 1
            if is_saving:
                wait_for_saving(run, pid, nth=chance.randrange(3))
                time.sleep(chance.uniform(0.0, 0.01))
            else:
                time.sleep(chance.uniform(0.0, duration_s))
            os.kill(pid, signal.SIGKILL)
            was_killed = wait_for(pid) == -signal.SIGKILL
            problems += [f"kill {kill}: {each}" for each in unreadable(run)]
            if wait_for(spawn(lambda: start(resume=True))) != 0:
                problems.append(f"kill {kill}: it could not be resumed")
                continue
            problems += [f"kill {kill}: {each}" for each in differences(everything(run), undisturbed)]
            leftovers = [path.name for path in run.iterdir() if path.name.startswith(".")]
            problems += [f"kill {kill}: {name} was left behind" for name in leftovers]
            print(f"train: kill {kill + 1} of {num_kills}, {'while saving' if is_saving else 'at any moment'}{'' if was_killed else ', after its end'}", flush=True)  # fmt: skip
    return problems


def wait_for_saving(run: Path, pid: int, nth: int) -> None:
    """Until the n-th checkpoint is being written, or the process has ended."""
    seen: set[str] = set()
    while len(seen) <= nth and Path(f"/proc/{pid}/exe").exists():
        seen |= {path.name for path in run.glob(".*.tmp")}


def unreadable(run: Path) -> list[str]:
    """Checkpoints in their place that are not whole; `latest`, if it points nowhere."""
    found = []
    for directory in run.glob("[!.]*"):
        if directory.is_dir():
            try:
                checkpoint.verify(directory)
                checkpoint.load_training_state(directory)
            except ValueError as error:
                found.append(str(error))
        elif directory.is_symlink():
            found.append(f"{directory.name} points nowhere")
    return found


# ------------------------------------------------------------------------------------- any command, and its processes


@dataclass(frozen=True)
class Stage:
    """A command, what it needs, and what it makes.

    prepare: writes what the command needs into `$ROBOFACTORY_HOME`.
    outcome: what has to be the same, read from there.
    """

    arguments: Callable[[Path], list[str]]
    prepare: Callable[[Path], None]
    outcome: Callable[[Path], Any]


def kill_and_repeat(stage: Stage, name: str, directory: Path, num_kills: int, seed: int = 0) -> list[str]:
    """What was wrong after each kill of a command, or of one of its processes; nothing, if all is well."""
    problems, chance = [], random.Random(seed)
    before, place = directory / "before", directory / "home"
    with home(before, writes_dataset=False):
        stage.prepare(before)
    shutil.copytree(before, place, symlinks=True)
    started = time.monotonic()
    code, said = end_of(launch(stage, place))
    assert code == 0, f"the undisturbed command failed: {said}"
    duration_s = time.monotonic() - started
    undisturbed = stage.outcome(place)
    for kill in range(num_kills):
        shutil.rmtree(place)
        shutil.copytree(before, place, symlinks=True)
        process = launch(stage, place)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.0, duration_s))
        children = descendants(process.pid)
        is_child = kill % 2 == 1 and bool(children)
        victim = chance.choice(children) if is_child else process.pid
        if process.poll() is None:
            os.kill(victim, signal.SIGKILL)
        code, said = end_of(process)
        problems += [f"kill {kill}: process {pid} was left" for pid in survivors(children)]
        if code != 0 or differences(stage.outcome(place), undisturbed):  # else it had ended before
            code, said = end_of(launch(stage, place))
        if code != 0 and differences(stage.outcome(place), undisturbed):  # else all was done, and it may say so
            problems.append(f"kill {kill}: the same command then failed: {said}")
            continue
        problems += [f"kill {kill}: {each}" for each in differences(stage.outcome(place), undisturbed)]
        problems += [f"kill {kill}: {path} was left behind" for path in leftovers(place)]
        print(f"{name}: kill {kill + 1} of {num_kills}, {'one of its processes' if is_child else 'itself'}", flush=True)
    return problems


def launch(stage: Stage, place: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"ROBOFACTORY_HOME": str(place), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "robofactory", *stage.arguments(place)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and the last line that was printed."""
    said, _ = process.communicate()
    return process.returncode, (said.strip().splitlines() or [""])[-1]


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def survivors(pids: list[int]) -> list[int]:
    """Those that have not ended although they were given time to."""
    ends = time.monotonic() + SECONDS_TO_DIE
    while (left := [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]) and time.monotonic() < ends:
        time.sleep(0.05)
    return left


def leftovers(place: Path) -> list[str]:
    names = [path.relative_to(place) for path in place.rglob("*")]
    return sorted(str(name) for name in names if name.name.startswith(".") or name.suffix in (".tmp", ".lock", ".old"))


def files_below(folder: str) -> Callable[[Path], dict[str, bytes]]:
    return lambda place: {
        str(path.relative_to(place)): path.read_bytes() for path in (place / folder).rglob("*") if path.is_file()
    }


def prepare_source(place: Path) -> None:
    write_dataset(place / "source", length=40, is_simulated=False)


def prepare_fine_tuned(place: Path) -> None:
    """A policy of small published weights, trained for an epoch."""
    from tests.published import write_published

    weights = write_published(place / "weights")
    of_the_data = [override for override in SMALL if override.startswith("data")]
    write_dataset(dataset_dir(TASK, 0, NUM_EPISODES))
    overrides = [*of_the_data, f"model.model_name={weights}", "model.lora_rank=4", "training.num_epochs=1"]
    arguments = ["train", "--task", TASK, "--recipe", "robot_openvla", *overrides]
    code, said = end_of(launch(Stage(lambda _: arguments, prepare_source, everything), place))
    assert code == 0, said


def episodes_of(place: Path) -> list[dict[str, Any]]:
    """All that an evaluation knows of its episodes but the time they took, and the videos there are."""
    folder = place / "results/expert" / TASK / "expert"
    episodes = json.loads((folder / "episodes.json").read_text())
    of_the_clock = ("seconds", "policy_ms")
    kept = [{key: value for key, value in episode.items() if key not in of_the_clock} for episode in episodes]
    return [*kept, {"videos": sorted(path.name for path in (folder / "videos").iterdir())}]


def merge(place: Path) -> list[str]:
    checkpoint_directory = place / "checkpoints/openvla" / f"{TASK}_Agent0_{NUM_EPISODES}" / "epoch_1"
    return ["merge", str(checkpoint_directory), str(place / "merged")]


def record(place: Path) -> list[str]:
    pictures = ["--visual_detail", "low", "--width", "64", "--height", "48"]
    return ["record", "--task", TASK, "--num", "3", "--workers", "2", *pictures]


def evaluate(place: Path) -> list[str]:
    short = ["--episodes", "4", "--max_steps", "12", "--videos", "2", "visual_detail=low"]
    return ["evaluate", "--task", TASK, "--policy", "expert", "--workers", "2", *short]


def import_(place: Path) -> list[str]:
    return ["import", "lerobot", str(place / "source"), "--task", "Imported", "--workers", "2"]


STAGES = {
    "record": Stage(record, Path.mkdir, files_below("data")),
    "import": Stage(import_, prepare_source, files_below("data")),
    "evaluate": Stage(evaluate, Path.mkdir, episodes_of),
    "merge": Stage(merge, prepare_fine_tuned, files_below("merged")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["train", *STAGES]
    parser.add_argument("--stage", nargs="+", choices=names, default=["train"], help="default: train")
    parser.add_argument("--kills", type=int, default=50, help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    all_problems = []
    for name in arguments.stage:
        with tempfile.TemporaryDirectory() as directory:
            if name == "train":
                problems = kill_and_resume(Path(directory), arguments.kills, arguments.seed)
            else:
                problems = kill_and_repeat(STAGES[name], name, Path(directory), arguments.kills, arguments.seed)
        all_problems += problems
        print("\n".join(problems))
        bad = {problem.partition(":")[0] for problem in problems}
        print(f"{name}: {arguments.kills - len(bad)} of {arguments.kills} runs equal the undisturbed one", flush=True)
    return bool(all_problems)


if __name__ == "__main__":
    sys.exit(main())
