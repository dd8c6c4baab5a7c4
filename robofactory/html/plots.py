"""What every figure has: text is drawn as text.

Figures are made by `Figure`, not by pyplot: nothing of them stays in memory, also where drawing fails.
"""

import io
import textwrap
import warnings
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from robofactory import files
from robofactory.errors import shown

matplotlib.rcParams["text.parse_math"] = False  # `$` and `^` in an instruction or a joint's name are characters
TITLE_CHARACTERS = 60


def title(text: str) -> str:
    """A name from a file, as a figure has room for it."""
    return textwrap.shorten(shown(text), TITLE_CHARACTERS, placeholder="...") or shown(text)[:TITLE_CHARACTERS]


def use_log_scale(ax: Axes) -> None:
    """For y; without the formulas that matplotlib writes at the ticks."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter())


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a glyph that no font has, which is drawn as a box
        figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def save(figure: Figure, path: Path) -> None:
    """As PNG; the file appears whole."""
    files.write_atomically(path, png(figure))
