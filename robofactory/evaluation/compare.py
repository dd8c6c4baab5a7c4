"""Compare two evaluations on the same seeds: McNemar's exact test, and in plain words which policy is better.

A and B are directories that an evaluation wrote. Both have to have met the same layouts: task, scene, step limit and
seeds; how their policies came about, and how their pictures are rendered, may differ.
"""

import argparse
from collections.abc import Sequence

from robofactory import arguments as read
from robofactory.errors import UserError, run_command, shown


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = read.Parser(
        prog="robofactory compare",
        description=__doc__,
        epilog="example:\n  robofactory compare robofactory/results/openvla/LiftBarrier-rf_150/epoch_4/all_agents \\\n"
        "      robofactory/results/openvla/LiftBarrier-rf_150/epoch_6/all_agents",
    )
    parser.add_argument("a", type=read.path, metavar="DIR_A", help="results of one policy (it has a summary.json)")
    parser.add_argument("b", type=read.path, metavar="DIR_B", help="results of the other")
    parser.add_argument(
        "--html", type=read.path, metavar="PAGE", help="write both and their comparison as one page too"
    )
    args = parser.parse_args(arguments)
    for directory in (args.a, args.b):
        if not directory.is_dir():
            raise UserError(f"{directory} is no directory; give one that an evaluation wrote")
    if args.html and not args.html.absolute().parent.is_dir():
        raise UserError(f"--html {args.html}: no such directory")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from robofactory.evaluation import paired_report, pairs, report, results

    a, b = results.load(args.a), results.load(args.b)
    text = paired_report.comparison_text(a, b)
    print(f"A: {args.a}\nB: {args.b}")
    for line in pairs.not_the_same(a, b):
        print(f"note: {shown(line)}")
    print(text)
    if args.html:
        report.write_report(args.html, [args.a, args.b], [], lead=paired_report.comparison_section(a, b))
        print(f"page: {args.html}")


if __name__ == "__main__":
    run_command(main)
