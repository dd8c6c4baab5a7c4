"""What a survey keeps of an episode's pictures: not the pictures, but what tells a good camera from a bad one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt8
from PIL import Image

from robofactory.data.description import MAX_PIXELS
from robofactory.data.png import decode_png, first_unlike, png_size
from robofactory.errors import UserError

CELLS = (16, 12)  # across and down: what is compared of a picture are the means of so many parts of it
SMALL = (160, 160)  # px: at most so wide and high is a picture of a contact sheet


@dataclass(frozen=True)
class ViewFacts:
    """What stays of a view in an episode, of those pictures that were decoded; levels are of 255.

    look: the mean over them, as the means of `CELLS` parts.
    contrast: levels between the brightest and the darkest part of a picture, in the median picture.
    change: levels by which some part of some picture differs from the first.
    unreadable: what is wrong with the first picture that is not what the description says, of all, or else does not
        decode; None: nothing.
    moved, repeated: frames before which the arm moved, and those of them whose picture is the one before.
    """

    look: UInt8[np.ndarray, "12 16 3"]
    contrast: float
    change: int
    unreadable: str | None
    moved: int
    repeated: int


@dataclass(frozen=True)
class Pictures:
    """What stays of an episode's pictures.

    views: where no picture could be decoded, what its facts say is of a black one.
    apart: of two views, the levels by which some part of some picture differs between them.
    """

    views: dict[str, ViewFacts]
    apart: dict[tuple[str, str], int]


def look(
    files: Mapping[str, pa.Array],
    rows: Int64[np.ndarray, " k"],
    moved: Int64[np.ndarray, " m"],
    sizes: Mapping[str, tuple[int, int]],
) -> tuple[Pictures, dict[str, list[Image.Image]]]:
    """Facts of an episode's encoded pictures, and those of these rows; `moved`: behind which the arm moved."""
    images: dict[str, list[Image.Image]] = {}
    cells: dict[str, Int64[np.ndarray, "k 12 16 3"]] = {}
    views = {}
    for view, encoded in files.items():
        images[view], unreadable = _decode_rows(encoded, rows.tolist(), sizes[view])
        parts = [np.asarray(image.resize(CELLS, Image.Resampling.BOX), np.int64) for image in images[view]]
        cells[view] = each = np.stack(parts) if parts else np.zeros((1, CELLS[1], CELLS[0], 3), np.int64)
        views[view] = ViewFacts(
            look=each.mean(0).astype(np.uint8),
            contrast=float(np.median(np.ptp(each, axis=(1, 2)).max(1))),
            change=int(np.abs(each - each[0]).max()),
            unreadable=unreadable,
            moved=len(moved),
            repeated=sum(encoded[row].as_py() == encoded[row + 1].as_py() for row in moved.tolist()),
        )
    pairs = [pair for pair in combinations(cells, 2) if len(cells[pair[0]]) == len(cells[pair[1]])]
    return Pictures(views, {(a, b): int(np.abs(cells[a] - cells[b]).max()) for a, b in pairs}), images


def _decode_rows(encoded: pa.Array, rows: Sequence[int], size: tuple[int, int]) -> tuple[list[Image.Image], str | None]:
    """The pictures of these rows that decode, and what is wrong with the first of all that is not what it should be."""
    odd = first_unlike(encoded, size)
    unreadable = None if odd is None else f"frame {odd[0]} {odd[1]}, not {size[1]}x{size[0]} px, 8-bit RGB"
    images = []
    for row in rows:
        data = encoded[row].as_py()
        shape = png_size(data) if data else None
        if not data or shape is None or shape[0] * shape[1] > MAX_PIXELS:
            continue
        try:
            images.append(Image.fromarray(decode_png(data)))
        except UserError:
            unreadable = unreadable or f"frame {row} does not decode"
    return images, unreadable


def small(image: Image.Image) -> UInt8[np.ndarray, "_h _w 3"]:
    copy = image.copy()
    copy.thumbnail(SMALL)
    return np.asarray(copy)
