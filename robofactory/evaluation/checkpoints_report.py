"""Success over the checkpoints of a training: a line for each who drives whom, which joins only what is alike."""

import math
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from robofactory.errors import UserError
from robofactory.evaluation.pairs import not_the_same, other_layouts, pair_up, scene_keys
from robofactory.evaluation.results import SUMMARY, Evaluation, load
from robofactory.evaluation.wording import number, rate_in_words, seeds_in_words
from robofactory.files import write_atomically
from robofactory.html.page import render
from robofactory.html.svg import drawing, element

COLOURS = ("#2f6bdf", "#15a06a", "#e08a2c", "#8a5cd6", "#12a5bd")  # of the lines, again from the first after these


@dataclass(frozen=True)
class Point:
    """A checkpoint on a line."""

    directory: Path  # {checkpoint}/all_agents
    evaluation: Evaluation

    @property
    def name(self) -> str:
        return self.directory.parent.name

    @property
    def epoch(self) -> float | None:
        """When in training; the mean where each agent has its own best. None: the name does not say."""
        paths = [Path(path).name for path in self.evaluation.protocol.checkpoints if path is not None]
        numbers = [int(match[1]) for name in paths if (match := re.fullmatch(r"epoch_(\d+)", name))]
        return sum(numbers) / len(numbers) if numbers and len(numbers) == len(paths) else None


def lines_of(results: Path) -> tuple[dict[str, list[Point]], list[str]]:
    """Who drives whom -> the evaluations in `{results}/{checkpoint}/*/`, in the order of training; and why some cannot be read."""
    lines: dict[str, list[Point]] = {}
    unread = []
    for summary in sorted(results.glob(f"*/*/{SUMMARY}")):
        try:
            point = Point(summary.parent, load(summary.parent))
            scene_keys(point.evaluation.protocol.scene)
        except UserError as error:
            unread.append(f"{summary.parent}: {error}")
            continue
        lines.setdefault(point.evaluation.protocol.title, []).append(point)
    for points in lines.values():
        points.sort(key=lambda point: (math.inf if point.epoch is None else point.epoch, point.name))
    most_learned_first = sorted(
        lines, key=lambda title: (lines[title][0].evaluation.protocol.drivers.count("expert"), title)
    )
    return {title: lines[title] for title in most_learned_first}, unread


def write_report(results: Path) -> Path:
    """`{results}/report.html` of all evaluations of the policies of these runs."""
    output, parts = results / "report.html", section(results, results, fewest=1)
    page = render("evaluation/checkpoints.html", eyebrow="evaluation", title=results.name, section=parts)
    write_atomically(output, page)
    return output


def section(results: Path, page_directory: Path, fewest: int) -> Markup | str:
    """A plot and a table of all checkpoints, as a part of a page in this directory; empty where there are fewer than that."""
    lines, unread = lines_of(results)
    if len({point.name for points in lines.values() for point in points}) < fewest:
        return ""
    notes = [note for points in lines.values() for pair in pairwise(points) for note in _notes(*pair)]
    colours = {title: COLOURS[index % len(COLOURS)] for index, title in enumerate(lines)}
    return render(
        "evaluation/checkpoints_section.html",
        plot=_plot(lines, colours),
        colours=colours,
        timeless=sorted({point.name for points in lines.values() for point in points if point.epoch is None}),
        rows=_rows(lines, page_directory),
        notes=list(dict.fromkeys([*notes, *unread])),
    )


# --------------------------------------------------------------------------------------------------------------- alike


def _compared(before: Point, now: Point) -> str:
    """Which of two checkpoints is better, on the layouts that both played; or why that cannot be said."""
    names = (now.name, before.name)
    if reason := other_layouts(now.evaluation, before.evaluation, names):
        return f"not comparable: {reason}"
    return pair_up(now.evaluation, before.evaluation).sentence(*names)


def _notes(before: Point, now: Point) -> list[str]:
    """What else, beside the weights, was not the same."""
    names = (now.name, before.name)
    notes = not_the_same(now.evaluation, before.evaluation, names)
    ours, theirs = now.evaluation.protocol, before.evaluation.protocol
    runs = [sorted({str(Path(path).parent) for path in each.checkpoints if path}) for each in (ours, theirs)]
    if runs[0] != runs[1]:
        notes.append(f"{names[0]} is of the run {', '.join(runs[0])}, {names[1]} of {', '.join(runs[1])}")
    if ours.fingerprints != theirs.fingerprints:
        notes.append(
            f"preprocessing or statistics of {names[0]} are not those of {names[1]}: another training, or data"
        )
    return notes


# ---------------------------------------------------------------------------------------------------------------- draw


def _rows(lines: dict[str, list[Point]], page_directory: Path) -> list[dict[str, object]]:
    """One for each evaluation, with a link to the report of its checkpoint."""
    rows = []
    for title, points in lines.items():
        for before, now in zip([None, *points], points, strict=False):
            summary = now.evaluation.summary()
            played = seeds_in_words(now.evaluation.seeds)
            words = (
                title,
                rate_in_words(summary["success"]),
                number(summary["mean_steps_of_successes"], 0),
                played if now.evaluation.is_complete else f"{played}, interrupted",
                "" if before is None else _compared(before, now),
            )
            link = quote(os.path.relpath(now.directory.parent / "report.html", page_directory))
            rows.append({"name": now.name, "link": link, "words": words})
    return rows


def _plot(lines: dict[str, list[Point]], colours: dict[str, str]) -> Markup | str:
    """Rates and intervals over epochs; empty where no epoch is known."""
    drawable = {
        title: [(point.epoch, point) for point in points if point.epoch is not None] for title, points in lines.items()
    }
    epochs = sorted({epoch for points in drawable.values() for epoch, _ in points})
    if not epochs:
        return ""
    width, height, left, right, top, bottom = 900, 300, 52, 30, 12, 40
    span = epochs[-1] - epochs[0]

    def x_of(epoch: float) -> float:
        share = (epoch - epochs[0]) / span if span else 0.5
        return left + 20 + share * (width - left - right - 40)

    def y_of(rate: float) -> float:
        return top + (1 - rate) * (height - top - bottom)

    drawn = []
    for percent in range(0, 101, 25):
        y = y_of(percent / 100)
        drawn.append(element("path", class_="grid", d=f"M{left} {y:.1f}H{width - right}"))
        drawn.append(element("text", f"{percent} %", x=left - 8, y=y + 4, text_anchor="end"))
    for epoch in epochs:
        drawn.append(element("text", f"{epoch:g}", x=x_of(epoch), y=height - 20, text_anchor="middle"))
    drawn.append(element("text", "epoch of the checkpoint", x=width - right, y=height - 4, text_anchor="end"))
    for index, (title, points) in enumerate(drawable.items()):
        aside = 7 * (index - (len(drawable) - 1) / 2)  # so that no interval hides another
        at = [(x_of(epoch) + aside, point, point.evaluation.summary()["success"]) for epoch, point in points]
        at = [each for each in at if each[2]["rate"] is not None]  # where every episode crashed, there is no rate
        for (x, point, rate), (next_x, next_point, next_rate) in pairwise(at):
            if other_layouts(point.evaluation, next_point.evaluation) is None:
                ends = f"M{x:.1f} {y_of(rate['rate']):.1f}L{next_x:.1f} {y_of(next_rate['rate']):.1f}"
                drawn.append(element("path", class_="joined", stroke=colours[title], d=ends))
        for x, point, rate in at:
            low, high = (y_of(bound) for bound in rate["interval_95"])
            said = element("title", f"{point.name}: {rate_in_words(rate)}")
            drawn.append(element("path", class_="interval", stroke=colours[title], d=f"M{x:.1f} {low:.1f}V{high:.1f}"))
            drawn.append(element("circle", said, r=5, fill=colours[title], cx=x, cy=y_of(rate["rate"])))
    return drawing(width, height, "success over checkpoints", *drawn)
