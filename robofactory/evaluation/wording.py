"""Rates, intervals, numbers and tables, as the terminal and the pages write them."""

from collections.abc import Sequence
from html import escape
from typing import Any


def rate_in_words(rate: dict[str, Any]) -> str:
    if rate["rate"] is None:
        return "none judged"
    return f"{rate['count']}/{rate['of']} = {100 * rate['rate']:.0f} %{interval_in_words(rate)}"


def interval_in_words(rate: dict[str, Any]) -> str:
    low, high = rate["interval_95"]
    return f", 95\u00a0% interval {100 * low:.0f} to {100 * high:.0f}\u00a0%" if rate["of"] else ""


def number(value: float | int | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def seeds_in_words(seeds: list[int]) -> str:
    """`10000..10049`; with their number where some between are missing."""
    if not seeds:
        return "none"
    whole = f"{seeds[0]}..{seeds[-1]}"
    return whole if len(seeds) == seeds[-1] - seeds[0] + 1 else f"{whole} ({len(seeds)} of them)"


def table_html(heads: Sequence[object], rows: Sequence[Sequence[object]], kind: str = "plain") -> str:
    """A table of plain words; the first row of it names the columns."""
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
