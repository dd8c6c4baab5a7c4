"""Pairs of evaluations for people: a policy against its ablations, and one policy against another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from robofactory.errors import UserError, brief, shown
from robofactory.evaluation.ablations import ABLATIONS
from robofactory.evaluation.pairs import Pairs, is_ablation_of, pair_up
from robofactory.evaluation.results import SUMMARY, Evaluation, load
from robofactory.evaluation.wording import rate_in_words
from robofactory.html.page import render
from robofactory.html.svg import drawing, element

EACH_ALONE = "Every p is of its row alone: of 20 ablations that change nothing, one is expected below 0.05."


def ablations_of(directory: Path, baseline: Evaluation) -> list[Evaluation]:
    """The ablations of the evaluation in a directory, the lowest rate first; what does not pair with it is left out."""
    found = []
    for summary in sorted(directory.glob(f"{ABLATIONS}/*/{SUMMARY}")):
        try:
            found.append(load(summary.parent))
        except UserError:  # of an older version; the baseline has been played anew since
            continue
    return sorted(
        (each for each in found if is_ablation_of(baseline, each)), key=lambda each: _rate(each)["rate"] or 0.0
    )


def as_text(baseline: Evaluation, ablated: Sequence[Evaluation]) -> str:
    """One table for the terminal: the rate of each ablation, and how it pairs with the baseline."""
    width = max(len(shown(_name(each))) for each in (baseline, *ablated))
    lines = [f"  {'':{width}}  {'lost':>5}  {'won':>5}  {'p':>7}  success"]
    lines.append(f"  {_name(baseline):{width}}  {'':>5}  {'':>5}  {'':>7}  {rate_in_words(_rate(baseline))}")
    for each in ablated:
        pairs = pair_up(baseline, each)
        lines.append(
            f"  {shown(_name(each)):{width}}  {pairs.only_a:>5}  {pairs.only_b:>5}  {_p(pairs):>7}  {rate_in_words(_rate(each))}"
            + (f"; layouts left out: {pairs.left_out}" if pairs.left_out else "")
        )
    return "\n".join(
        [*map(shown, lines), f"  lost, won: layouts that only the baseline, only the ablation solves. {EACH_ALONE}"]
    )


def ablations_section(baseline: Evaluation, ablated: Sequence[Evaluation]) -> Markup | str:
    """One plot and one table of an evaluation's ablations; empty without any."""
    if not ablated:
        return ""
    rows: list[Sequence[object]] = [("baseline", rate_in_words(_rate(baseline)), "", "", "", "")]
    for each in ablated:
        pairs, name = pair_up(baseline, each), _name(each)
        said = pairs.sentence("baseline", name)
        rows.append((name, rate_in_words(_rate(each)), pairs.only_a, pairs.only_b, _p(pairs), said))
    return render("evaluation/ablations.html", forest=forest(baseline, ablated), rows=rows, each_alone=EACH_ALONE)


def forest(baseline: Evaluation, ablated: Sequence[Evaluation]) -> Markup:
    """A row for each: the rate as a dot on its 95 % interval; the baseline's rate runs through all."""
    width, left, right, row_height, top = 760, 240, 24, 26, 8
    rows = (baseline, *ablated)
    bottom = top + row_height * len(rows)

    def across(share: float) -> float:
        return left + share * (width - left - right)

    drawn = []
    for percent in range(0, 101, 25):
        x = across(percent / 100)
        drawn.append(element("path", class_="grid", d=f"M{x:.1f} {top}V{bottom}"))
        drawn.append(element("text", f"{percent} %", x=x, y=bottom + 16, text_anchor="middle"))
    through = _rate(baseline)["rate"]
    if through is not None:
        drawn.append(element("path", class_="baseline", d=f"M{across(through):.1f} {top}V{bottom}"))
    for index, each in enumerate(rows):
        rate, y = _rate(each), top + row_height * (index + 0.5)
        drawn.append(element("text", brief(_name(each), 34), x=left - 12, y=y + 4, text_anchor="end"))
        if rate["rate"] is not None:
            low, high = (across(bound) for bound in rate["interval_95"])
            drawn.append(element("path", class_="interval", d=f"M{low:.1f} {y:.1f}H{high:.1f}"))
            drawn.append(element("circle", class_="rate", r=4.5, cx=across(rate["rate"]), cy=y))
    return drawing(width, bottom + 22, "success of each ablation", *drawn, class_="forest")


def comparison_text(a: Evaluation, b: Evaluation) -> str:
    """How two policies did on the same layouts, and the sentence."""
    pairs = pair_up(a, b)
    lines = [
        f"  {name}  {rate_in_words(_rate(each))}   {each.protocol.title}" for name, each in {"A": a, "B": b}.items()
    ]
    lines.append(
        f"  both {pairs.both}, only A {pairs.only_a}, only B {pairs.only_b}, neither {pairs.neither}{_left_out(pairs)}"
    )
    return "\n".join(map(shown, [*lines, pairs.sentence()]))


def comparison_section(a: Evaluation, b: Evaluation) -> Markup:
    """The same as a part of a page: the sentence, and the pairs as a table of four."""
    pairs = pair_up(a, b)
    return render("evaluation/comparison.html", pairs=pairs, left_out=_left_out(pairs))


def _left_out(pairs: Pairs) -> str:
    return f"; left out, as one of the pair crashed or timed out: {pairs.left_out}" if pairs.left_out else ""


def _name(evaluation: Evaluation) -> str:
    return evaluation.protocol.ablation or "baseline"


def _rate(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.summary()["success"]


def _p(pairs: Pairs) -> str:
    return "< 0.001" if pairs.p_value < 0.001 else f"{pairs.p_value:.2g}"
