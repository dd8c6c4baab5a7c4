"""What every figure has: text is drawn as text.

Figures are made by `Figure`, not by pyplot: nothing of them stays in memory, also where drawing fails.
"""

import io
import warnings
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from robofactory import files

matplotlib.rcParams["text.parse_math"] = False  # `$` and `^` in an instruction or a joint's name are characters


class _Plain(LogFormatter):
    """At the ticks that matplotlib would write at; numbers, where it writes formulas."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def use_log_scale(ax: Axes) -> None:
    """For y."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(_Plain())
    ax.yaxis.set_minor_formatter(_Plain())


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a glyph that no font has, which is drawn as a box
        figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def save(figure: Figure, path: Path) -> None:
    """As PNG; the file appears whole."""
    files.write_atomically(path, png(figure))
