"""Pictures of every kind become RGB of 8 bits, or are refused in words."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from robofactory.data.episodes import decode_png, encode_png
from robofactory.data.imports.frames import MAX_PIXELS, Unsuitable, size_of, to_png, white_of
from robofactory.errors import UserError

SIZE = (6, 8)
RGB = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
GREY = RGB[..., :1]
ALPHA = np.full((*SIZE, 1), 7, np.uint8)


def encoded(kind: str, mode: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RGB).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(header: bytes, pixels: bytes) -> bytes:
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(pixels)), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("frame", "white", "expected"),
    [
        (RGB, None, RGB),
        (RGB.transpose(2, 0, 1), None, RGB),
        (np.concatenate([RGB, ALPHA], axis=2), None, RGB),
        (np.concatenate([RGB, ALPHA], axis=2).transpose(2, 0, 1), None, RGB),
        (GREY, None, np.repeat(GREY, 3, axis=2)),
        (GREY[..., 0], None, np.repeat(GREY, 3, axis=2)),
        (GREY.transpose(2, 0, 1), None, np.repeat(GREY, 3, axis=2)),
        (RGB.astype(np.float32), 255.0, RGB),
        (RGB.astype(np.float64) / 255, 1.0, RGB),
        (RGB.astype(np.float16) / np.float16(255), 1.0, RGB),
    ],
)
def test_arrays_of_every_layout_and_range_are_the_same_picture(frame, white, expected):
    np.testing.assert_array_equal(decode_png(to_png(frame, SIZE, white)), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_encoded_pictures_of_every_mode_are_the_same_picture(kind, mode):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    expected = np.asarray(Image.fromarray(RGB).convert(mode).convert("RGB"))
    np.testing.assert_array_equal(decode_png(to_png(encoded(kind, mode, **lossless), SIZE)), expected)


def test_an_rgb_png_stays_what_it_is_to_the_byte():
    png = encode_png(RGB)
    assert to_png(png, SIZE) == png
    best = encoded("PNG", "RGB", compress_level=9)
    assert best != png and to_png(best, SIZE) == best


def test_a_jpeg_that_says_it_is_turned_keeps_its_pixels_where_they_lie():
    exif = Image.Exif()
    exif[0x0112] = 6  # by 90 degrees
    turned = encoded("JPEG", "RGB", quality=95, exif=exif)
    expected = np.asarray(Image.open(io.BytesIO(encoded("JPEG", "RGB", quality=95))))
    np.testing.assert_array_equal(decode_png(to_png(turned, SIZE)), expected)


def test_what_white_is_is_decided_by_all_pictures_of_an_episode():
    dark = np.zeros((2, *SIZE, 3), np.float32)
    assert white_of([*dark, RGB.astype(np.float32)]) == 255.0
    assert white_of([*dark, RGB.astype(np.float32) / 255]) == white_of(dark) == 1.0
    assert white_of([RGB]) is None


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (RGB.astype(np.uint16), "its pictures are uint16; needed: uint8, or float in 0..1 or 0..255"),
        (RGB / 127.5 - 1, r"floats from -1 to 0\.95.*; needed: 0\.\.1 or 0\.\.255"),
        (RGB * 257.0, r"floats from 0 to 63993; needed: 0\.\.1 or 0\.\.255"),
        (np.where(RGB.max() == RGB, np.nan, RGB), "values that are not finite"),
    ],
)
def test_ranges_that_would_have_to_be_guessed_are_refused(frame, message):
    with pytest.raises(Unsuitable, match=message):
        white_of([frame])


@pytest.mark.parametrize(
    ("frame", "white", "message"),
    [
        (RGB.astype(np.float32), 1.0, "its values are from 0 to 249; in this camera 0 is black and 1 is white"),
        (np.full((*SIZE, 3), np.nan), 1.0, "from nan to nan; in this camera"),
        (RGB, 1.0, r"it is uint8 \[6, 8, 3\]; needed: float, as in the first episode"),
        (RGB.astype(np.float32), None, r"it is float32 \[6, 8, 3\]; needed: uint8, as in the first episode"),
        (RGB[:, :7], None, "it has 7x6 px, the first episode has 8x6; all must be alike"),
        (RGB[..., :2], None, r"it is \[6, 8, 2\]; needed: \[h, w\], \[h, w, c\] or \[c, h, w\]"),
        (encoded("JPEG", "CMYK"), None, "it is CMYK; needed: RGB, RGBA or grey of 8 bits"),
        (encoded("TIFF", "RGB"), None, "bytes are no picture of PNG, JPEG, WEBP, BMP"),
        (b"", None, "its 0 bytes are no picture of PNG"),
        (encode_png(RGB)[:60], None, "it cannot be decoded"),
        (encoded("JPEG", "RGB")[:-40], None, "it cannot be decoded"),
        (png_of(struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0), bytes(6 * (1 + 8 * 6))), None, "it is of 16 bits"),
        (encode_png(RGB[:, :4]), None, "it has 4x6 px, the first episode has 8x6"),
    ],
)
def test_a_picture_unlike_the_first_or_broken_is_refused(frame, white, message):
    with pytest.raises(UserError, match=message):
        to_png(frame, SIZE, white)


def test_a_flipped_bit_in_a_png_is_found():
    """Pillow unpacks it without a word, and the picture is another one."""
    png = bytearray(encode_png(RGB))
    png[png.index(b"IDAT") + 20] ^= 1
    with pytest.raises(UserError, match="it cannot be decoded"):
        to_png(bytes(png), SIZE)


@pytest.mark.parametrize("side", [8000, 60000])
def test_a_bomb_is_refused_before_it_is_unpacked(side):
    """200 bytes that claim 64 million pixels, and more than Pillow itself allows."""
    bomb = png_of(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"\0")
    assert side * side > MAX_PIXELS and len(bomb) < 200
    with pytest.raises(
        UserError, match=r"it claims (8000x8000 px, )?more than the 40,000,000 (pixels )?that are allowed"
    ):
        to_png(bomb, (side, side))
    with pytest.raises(Unsuitable, match="more than the 40,000,000 that are allowed"):
        size_of((side, side, 3))
