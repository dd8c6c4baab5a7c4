"""Damages valid inputs in every way it knows, gives them to every door, and counts what becomes of them.

    python -m benchmarks.mutations [--count 2400] [--doors lerobot-3.0-video compare]
    python -m benchmarks.mutations --only lerobot-3.0-video:17 [--keep DIRECTORY]

Each mutation is a function of its door and number. Its command runs in a process of its own: no traceback, no hang
beyond 20 s, no memory beyond 2 GB, nothing touched outside the directories it was given, and either one line with exit
code 2 or a result. `right` is the result of the undamaged input; `warned` is another one that comes with a warning;
`other result` is one that may be right, as of a dataset with other words, and has to be looked at; where what is lost
cannot be guessed, or what was added means nothing, it is `silently wrong`.
"""

import argparse
import gc
import importlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.mutations.damage import Damage, Inapplicable
from benchmarks.mutations.doors import DOORS, Cell, Door, cells, chosen_file, run_stage
from benchmarks.mutations.trial import FAILURES, OTHER, OUTCOMES, REFUSED, RIGHT, WARNED, WRONG, Ending, Trial

# Imported once, before the processes part.
LIBRARIES = [
    "av",
    "h5py",
    "zarr",
    "peft",
    "timm",
    "matplotlib.pyplot",
    "fsspec.implementations.local",
    "transformers.models.llama.modeling_llama",
    "robofactory.policy",
    "robofactory.data.imports.lerobot",
    "robofactory.data.imports.maniskill",
    "robofactory.data.imports.diffusion_policy",
    "robofactory.data.imports.rlds",
    "robofactory.data.inspection_page",
    "robofactory.training.log",
    "robofactory.training.preflight",
    "robofactory.training.resuming",
    "robofactory.training.replay",
    "robofactory.training.footprint",
    "robofactory.evaluation.report",
    "robofactory.evaluation.paired_report",
]


@dataclass(frozen=True)
class Mutation:
    """What is done to the input of a door: the number-th of its kinds of damage, and all chances by both."""

    door: str
    number: int

    def __str__(self) -> str:
        return f"{self.door}:{self.number}"


@dataclass(frozen=True)
class Row:
    """What became of a mutation."""

    mutation: str
    file: str
    damage: str
    outcome: str
    what: str
    seconds: float


def plan(names: Sequence[str], count: int) -> list[Mutation]:
    """So many mutations, round by round of the doors: at each what was done least there, and of that least anywhere."""
    order = {name: cells(name) for name in names}
    of_kind: Counter[str] = Counter()
    of_door: Counter[tuple[str, str]] = Counter()
    of_cell: Counter[tuple[str, int]] = Counter()
    planned: list[Mutation] = []
    for turn in itertools.count():
        if len(planned) == count:
            break
        name, all_cells = names[turn % len(names)], order[names[turn % len(names)]]
        if turn // len(names) % DOORS[name].every:
            continue

        def so_far(index: int, name: str = name, all_cells: list[Cell] = all_cells) -> tuple[int, int, int]:
            kind = all_cells[index].kind
            return of_door[name, kind], of_kind[kind], of_cell[name, index]

        index = min(range(len(all_cells)), key=so_far)
        planned.append(Mutation(name, index + of_cell[name, index] * len(all_cells)))
        kind = all_cells[index].kind
        of_door[name, kind] += 1
        of_kind[kind] += 1
        of_cell[name, index] += 1
    return planned


def damage_input(root: Path, mutation: Mutation) -> tuple[str, Damage, str]:
    """Damage a valid input below a directory: the file, the damage, what was done.

    What cannot be damaged in a way (there is no number in it that could be NaN) gets the next one.
    """
    door, order = DOORS[mutation.door], cells(mutation.door)
    random = Random(str(mutation))
    for offset in range(len(order)):
        cell = order[(mutation.number + offset) % len(order)]
        damage = door.files[cell.pattern][cell.kind]
        path = chosen_file(root, cell.pattern, random)
        try:
            return str(path.relative_to(root)), damage, damage.apply(path, random)
        except Inapplicable:
            continue
    raise AssertionError(mutation)


class Bench:
    """Inputs of all doors and the results that they have undamaged."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.results: dict[str, Ending] = {}

    def valid(self, name: str) -> Path:
        """A valid input of a door, made once for all that take it."""
        place = self.directory / f"valid-{next(other for other in DOORS if DOORS[other].make is DOORS[name].make)}"
        if not place.exists():
            ending = finished(Trial(place, lambda: DOORS[name].make(place), lambda: None, ()))
            assert ending.outcome == RIGHT, f"{name}: no valid input: {(place / 'stderr').read_text()}"
        return place

    def trial(self, slot: int, name: str, mutation: Mutation | None) -> Trial:
        """A door's command on its input, damaged or not. All run at the same place, where results could name it."""
        valid, door = self.valid(name), DOORS[name]
        root = self.directory / f"trial-{slot}"
        shutil.rmtree(root, ignore_errors=True)

        def prepare() -> None:
            for path in valid.iterdir():
                if path.name in ("given", "home", "unpacked") and path.is_dir():
                    shutil.copytree(path, root / path.name, symlinks=True)
                elif path.suffix in (".yaml", ".json"):
                    shutil.copy(path, root)
            (root / "home").mkdir(exist_ok=True)
            if mutation is not None:
                file, damage, what = damage_input(root, mutation)
                facts = {"file": file, "damage": damage.name, "what": what, "is_harmless": damage.is_harmless, "is_loss": damage.is_loss}  # fmt: skip
                (root / "damage").write_text(json.dumps(facts))
            if door.settle is not None:
                door.settle(root)

        return Trial(root, prepare, lambda: command_of(door, root), door.results, door.said_by_code)

    def undamaged(self, name: str) -> Ending:
        if name not in self.results:
            self.results[name] = finished(self.trial(0, name, None))
        return self.results[name]

    def row(self, root: Path, mutation: Mutation, ending: Ending) -> Row:
        """What it means, beside the result of the undamaged input."""
        facts = root / "damage"
        assert facts.exists(), f"{mutation} could not be made: {(root / 'stderr').read_text()}"
        damage = json.loads(facts.read_text())
        outcome, what, undamaged = ending.outcome, ending.what, self.undamaged(mutation.door)
        if outcome == RIGHT and ending.result != undamaged.result:
            outcome = (
                WARNED if what != undamaged.what else WRONG if damage["is_loss"] or damage["is_harmless"] else OTHER
            )
        elif outcome == REFUSED and damage["is_harmless"]:
            outcome = WRONG
        done = f"{damage['damage']} {damage['what']}".strip()
        return Row(str(mutation), damage["file"], done, outcome, what, round(ending.seconds, 1))


def command_of(door: Door, root: Path) -> None:
    door.command(root) if callable(door.command) else run_stage(root, door.command)


def finished(trial: Trial) -> Ending:
    while (ending := trial.poll()) is None:
        time.sleep(0.005)
    return ending


def run(bench: Bench, mutations: Sequence[Mutation], jobs: int) -> Iterator[Row]:
    """All of them, so many at a time, as they end."""
    waiting, running = list(reversed(mutations)), {}
    while waiting or running:
        for slot in set(range(jobs)) - running.keys():
            if waiting:
                mutation = waiting.pop()
                running[slot] = mutation, bench.trial(slot, mutation.door, mutation)
        for slot, (mutation, trial) in list(running.items()):
            if (ending := trial.poll()) is not None:
                del running[slot]
                yield bench.row(trial.root, mutation, ending)
        time.sleep(0.01)


def table(rows: Sequence[Row], closed: dict[str, Ending]) -> str:
    """Doors x outcomes, and the total."""
    names = list(dict.fromkeys(row.mutation.partition(":")[0] for row in rows))
    shown = [each for each in OUTCOMES if each not in FAILURES or any(row.outcome == each for row in rows)]
    lines = [f"{'':<22}" + "".join(f"{outcome:>15}" for outcome in shown) + f"{'all':>7}"]
    for name in [*names, "all"]:
        of_door = [row for row in rows if name in ("all", row.mutation.partition(":")[0])]
        counts = Counter(row.outcome for row in of_door)
        lines.append(f"{name:<22}" + "".join(f"{counts[outcome]:>15}" for outcome in shown) + f"{len(of_door):>7}")
    lines += [f"{name} does not take its valid input: {ending.what}" for name, ending in closed.items()]
    return "\n".join(lines)


def as_line(row: Row) -> str:
    return f"{row.outcome:<15} {row.mutation}  {row.file}: {row.damage}\n{'':<15} -> {row.what} ({row.seconds} s)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--count", type=int, default=2400, help="mutations (default: %(default)s)")
    parser.add_argument("--doors", nargs="+", choices=DOORS, metavar="DOOR", default=list(DOORS), help=f"default: all of {', '.join(DOORS)}")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="DOOR:NUMBER", help="these mutations alone")
    parser.add_argument("--jobs", type=int, default=1, help="at a time (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="directory to work in and to leave as it is")
    parser.add_argument("--json", type=Path, help="file for all rows")
    arguments = parser.parse_args()
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # no child needs pages of its own to look through what is imported
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench((arguments.keep or Path(temporary)).resolve())
        if arguments.only:
            planned = [
                Mutation(name, int(number)) for name, _, number in (only.partition(":") for only in arguments.only)
            ]
        else:
            planned = plan(arguments.doors, arguments.count)
        names = list(dict.fromkeys(mutation.door for mutation in planned))
        closed = {name: ending for name in names if (ending := bench.undamaged(name)).outcome != RIGHT}
        rows = []
        for row in run(bench, [mutation for mutation in planned if mutation.door not in closed], arguments.jobs):
            rows.append(row)
            if row.outcome in FAILURES or arguments.only:
                print(as_line(row), flush=True)
    rows.sort(key=lambda row: row.mutation)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    others = [row for row in rows if row.outcome == OTHER]
    print("\naccepted with another result, to be looked at:", *map(as_line, others), sep="\n")
    print(f"\n{table(rows, closed)}")
    return int(bool(closed) or any(row.outcome in FAILURES for row in rows))


if __name__ == "__main__":
    sys.exit(main())
