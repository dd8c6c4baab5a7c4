"""Does a trainer that is killed at any moment lose or break anything?

    python -m benchmarks.kills [--kills 50]

Kills a small training with SIGKILL at random moments, every second time while a checkpoint is being written. Each time
everything on the disk must be readable, and the run that goes on must end as the one that was never disturbed: the same
bits in weights, optimizer, guard and metrics.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.small_runs import differences, everything, home, spawn, start, wait_for
from robofactory import checkpoint


def kill_and_resume(directory: Path, num_kills: int, seed: int = 0) -> list[str]:
    """What was wrong after each kill; nothing, if all is well."""
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
            print(f"kill {kill + 1} of {num_kills}: {'while saving' if is_saving else 'at any moment'}{'' if was_killed else ', after its end'}", flush=True)  # fmt: skip
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        problems = kill_and_resume(Path(directory), arguments.kills, arguments.seed)
    print("\n".join(problems))
    bad = {problem.partition(":")[0] for problem in problems}
    print(f"{arguments.kills - len(bad)} of {arguments.kills} resumed runs equal the undisturbed one")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
