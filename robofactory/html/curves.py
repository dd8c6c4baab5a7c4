"""A run's `metrics.jsonl`: its lines, and the curves in them."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from robofactory import documents, files
from robofactory.documents import Count, Document
from robofactory.errors import UserError

MAX_BYTES = 500_000_000  # of the file; a million optimizer steps have some 100 MB
LARGEST = 1e12  # of what is drawn; a loss beyond it has blown up


class Line(Document):
    """Beside these, numbers by name."""

    model_config = ConfigDict(extra="allow")

    step: Count
    event: str = ""
    message: str = ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole; one that a kill cut off, or that is none of ours, is left out.

    Raises:
        UserError: it is no regular file, or too large.
    """
    if (size := files.require_regular(path).stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes, more than the {MAX_BYTES:,} that are read")
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(documents.parse_json(line, Line, str(path)).model_dump(exclude_unset=True))
        except UserError:
            continue
    return lines


def points_of(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) where a line has a finite number of this name."""
    found = ((line["step"], line.get(name)) for line in lines)
    return [
        (float(step), float(value)) for step, value in found if isinstance(value, int | float) and abs(value) <= LARGEST
    ]
