"""Pictures as others keep them become PNGs of RGB, 8 bits per channel; what cannot without guessing is refused.

Accepted: RGB, grey (its one channel is used three times) and RGBA (alpha is dropped, the colours stay what they are), as
arrays with the channels last or first, or encoded as PNG, JPEG, WebP or BMP. Of arrays, uint8 and float, whose white is 1
or 255: that is decided once for a camera (`white_of`), never for each picture. The pixels of a JPEG stay where they lie,
whatever its EXIF says of turning them, as in TensorFlow and LeRobot.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from robofactory import files
from robofactory.data.episodes import encode_png
from robofactory.errors import UserError

CHANNELS = (1, 3, 4)
MAX_PIXELS = 40_000_000  # 8K has 33 million; what a few bytes claim beyond that is a decompression bomb
MAX_BYTES = 256_000_000  # of an encoded picture
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow's, that become RGB without guessing
SLACK = 1e-3  # of white: as far beyond black and white a float may be; a quarter of a level
PNG_BIT_DEPTH = 24  # its byte, behind the signature, the first chunk's head, and the size
# What Pillow's readers raise of a broken file, besides OSError.
BROKEN = (SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error, OverflowError)

Frame = Shaped[np.ndarray, "..."] | bytes | Path


class Unsuitable(UserError):
    """A camera's pictures are of a kind that cannot be imported, as depth."""


def to_png(frame: Frame, size: tuple[int, int], white: float | None = None) -> bytes:
    """A picture as `encode_png` writes it; an RGB PNG stays what it is.

    Args:
        frame: an array, an encoded picture, or a file that is one.
        size: the height and width that it must have.
        white: of a float array, as `white_of` found it.
    Raises:
        UserError: it is broken, of another size or kind. The line does not say which picture it is.
    """
    if isinstance(frame, np.ndarray):
        _require_size(size_of(frame.shape), size)
        return encode_png(to_rgb(frame, white))
    content = frame if isinstance(frame, bytes) else _read(frame)
    with open_picture(content) as image:
        _require_size((image.height, image.width), size)
        pixels = _decode(image)
        is_still = not getattr(image, "is_animated", False) and "transparency" not in image.info
        if image.format == "PNG" and image.mode == "RGB" and is_still:
            return content
        return encode_png(pixels)


def open_picture(content: bytes) -> Image.Image:
    """An encoded picture whose header is read: its size and mode are known and allowed, nothing is unpacked.

    Raises:
        UserError: as `to_png`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if content.startswith(b"\x89PNG"):
                Image.open(io.BytesIO(content), formats=FORMATS).verify()  # the checksums, which `load` skips
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise UserError(f"its {len(content)} bytes are no picture of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"it claims more than the {MAX_PIXELS:,} pixels that are allowed") from None
    except (OSError, *BROKEN) as error:
        raise UserError(f"it cannot be decoded ({error})") from None
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"it claims {image.width}x{image.height} px, more than the {MAX_PIXELS:,} that are allowed")
    if image.mode not in MODES or (image.format == "PNG" and content[PNG_BIT_DEPTH] == 16):
        mode = "of 16 bits" if content[PNG_BIT_DEPTH] == 16 and image.format == "PNG" else image.mode
        raise Unsuitable(f"it is {mode}; needed: RGB, RGBA or grey of 8 bits")
    return image


def _decode(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return np.asarray(image.convert("RGB"))
    except (OSError, *BROKEN) as error:
        raise UserError(f"it cannot be decoded ({error})") from None


def _read(path: Path) -> bytes:
    files.require_regular(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"it has {size:,} bytes, more than the {MAX_BYTES:,} that are allowed")
    return path.read_bytes()


def _require_size(found: tuple[int, int], size: tuple[int, int]) -> None:
    if tuple(found) != tuple(size):
        raise UserError(
            f"it has {found[1]}x{found[0]} px, the first episode has {size[1]}x{size[0]}; all must be alike"
        )


# ------------------------------------------------------------------------------------------------------------- arrays


def size_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The height and width of a picture in an array of this shape.

    Raises:
        Unsuitable: it is no picture, or a larger one than allowed.
    """
    axis = _channel_axis(shape)
    sides = [side for index, side in enumerate(shape) if index != axis]
    if len(sides) != 2 or 0 in sides:
        raise Unsuitable(f"it is {list(shape)}; needed: [h, w], [h, w, c] or [c, h, w] with 1, 3 or 4 channels")
    if sides[0] * sides[1] > MAX_PIXELS:
        raise Unsuitable(f"it has {sides[1]}x{sides[0]} px, more than the {MAX_PIXELS:,} that are allowed")
    return sides[0], sides[1]


def num_channels(shape: tuple[int, ...]) -> int:
    axis = _channel_axis(shape)
    return 1 if axis is None else shape[axis]


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """The last or the first; where both could be, the one of 3. None: a grey picture without one, or no picture."""
    ends = [axis for axis in (2, 0) if len(shape) == 3 and shape[axis] in CHANNELS]
    return next((axis for axis in ends if shape[axis] == 3), ends[0] if ends else None)


def white_of(frames: Iterable[Shaped[np.ndarray, "..."]]) -> float | None:
    """What white is in a camera's arrays, by all pictures of one episode: 1 or 255 for floats, None for uint8.

    Raises:
        Unsuitable: they are neither uint8 nor float, or reach beyond what could be meant.
    """
    least, most = np.inf, -np.inf
    for frame in frames:
        if frame.dtype == np.uint8:
            return None
        if frame.dtype.kind != "f":
            raise Unsuitable(f"its pictures are {frame.dtype}; needed: uint8, or float in 0..1 or 0..255")
        least, most = min(least, float(frame.min())), max(most, float(frame.max()))
        if not np.isfinite([least, most]).all():
            raise Unsuitable("its pictures have values that are not finite")
    white = 1.0 if most <= 1.0 + SLACK else 255.0
    if least < -SLACK * white or most > white * (1.0 + SLACK):
        raise Unsuitable(f"its pictures are floats from {least:g} to {most:g}; needed: 0..1 or 0..255")
    return white


def to_rgb(frame: Shaped[np.ndarray, "..."], white: float | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """An array of any of the accepted kinds. Raises UserError as `to_png`."""
    axis = _channel_axis(frame.shape)
    pixels: Any = frame[..., None] if axis is None else np.moveaxis(frame, axis, -1)
    if frame.dtype.kind == "f" and white is not None:
        if not (np.isfinite(frame).all() and -SLACK * white <= frame.min() and frame.max() <= white * (1.0 + SLACK)):
            raise UserError(f"its values are from {frame.min():g} to {frame.max():g}; in this camera 0 is black and {white:g} is white")  # fmt: skip
        pixels = np.rint(np.clip(pixels, 0.0, white) * (255.0 / white)).astype(np.uint8)
    elif frame.dtype != np.uint8 or white is not None:
        raise UserError(
            f"it is {frame.dtype} {list(frame.shape)}; needed: {'uint8' if white is None else 'float'}, as in the first episode"
        )
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
