"""Look at a dataset before anything is trained on it: what it holds, what the action bins make of it, what is wrong.

Findings are errors, warnings and notes, each with what to do. Errors stop training, unless the recipe accepts them by
name: data.accept='[action_equals_state]'. Exit code 1 when there is one.
"""

import argparse
import sys
from pathlib import Path

from robofactory import arguments
from robofactory.config import home
from robofactory.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = arguments.Parser(
        prog="robofactory inspect",
        description=__doc__,
        epilog="""\
examples:
  robofactory inspect robofactory/data/LiftBarrier-rf_Agent0_150
  robofactory inspect my/dataset --output my/report.html""",
    )
    parser.add_argument("dataset", type=on_this_disk, help="its directory")
    parser.add_argument("--output", type=arguments.path, metavar="FILE.html", help="the report with figures and pictures (default: inspection.html in the dataset)")  # fmt: skip
    parser.add_argument("--pass_through", nargs="*", metavar="NAME", help="action dimensions that are in [-1, 1] already, as data.pass_through of the recipe; no name: none (default: those called gripper)")  # fmt: skip
    return parser.parse_args()


def on_this_disk(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not on a disk; copy it to a directory, and inspect that")
    return arguments.path(text)


def main() -> None:
    args = parse_arguments()
    dataset = args.dataset
    if not dataset.exists():
        raise UserError(f"no dataset at {dataset}; see {home() / 'data'}, or import or record one")
    from robofactory.data.description import read_finished

    read_finished(dataset)  # refused before anything is loaded that draws
    from tqdm import tqdm

    from robofactory.data import inspection_page
    from robofactory.data.findings import ERROR, find
    from robofactory.data.survey import survey
    from robofactory.files import write_atomically

    facts = survey(
        dataset,
        pass_through=args.pass_through,
        progress=lambda episodes, total: tqdm(episodes, total=total, unit="episode", disable=None),
    )
    if unknown := set(facts.passing) - set(facts.actions.names):
        names = ", ".join(facts.actions.names)
        raise UserError(f"--pass_through: no action dimension {sorted(unknown)[0]!r}; there are {names}")
    found = find(facts)
    output = args.output or dataset / "inspection.html"
    try:
        write_atomically(output, inspection_page.as_page(facts, found))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; choose another place with --output") from None
    print(f"{inspection_page.as_text(facts, found)}\n{output}")
    if any(each.level == ERROR for each in found):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
