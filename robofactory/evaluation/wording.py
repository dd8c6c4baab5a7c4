"""Rates, intervals and numbers, as the terminal and the pages write them."""

from typing import Any


def rate_in_words(rate: dict[str, Any]) -> str:
    if rate["rate"] is None:
        return "none judged"
    return f"{rate['count']}/{rate['of']} = {100 * rate['rate']:.0f} %{interval_in_words(rate)}"


def interval_in_words(rate: dict[str, Any]) -> str:
    low, high = rate["interval_95"]
    return f", 95\u00a0% interval {100 * low:.0f} to {100 * high:.0f}\u00a0%" if rate["of"] else ""


def number(value: float | int | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.3g}"


def seeds_in_words(seeds: list[int]) -> str:
    """`10000..10049`; with their number where some between are missing."""
    if not seeds:
        return "none"
    whole = f"{seeds[0]}..{seeds[-1]}"
    return whole if len(seeds) == seeds[-1] - seeds[0] + 1 else f"{whole} ({len(seeds)} of them)"
