"""Pictures that are not what they should be."""

import io
import struct
import zlib
from collections.abc import Callable
from random import Random

from PIL import Image


def bomb() -> bytes:
    """A PNG of a few bytes that says it has ten billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def as_png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def other_picture(content: bytes, random: Random) -> tuple[bytes, str]:
    """Another size, mode or content; and what it is."""
    image = Image.open(io.BytesIO(content))
    width, height = image.size
    choices: dict[str, Callable[[], bytes]] = {
        "half the size": lambda: as_png(image.resize((width // 2, height // 2))),
        "turned": lambda: as_png(image.transpose(Image.Transpose.ROTATE_90)),
        "a bomb": bomb,
        "no picture": lambda: b"no picture",
        "nothing": lambda: b"",
        "half of the file": lambda: content[: len(content) // 2],
        "a text": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    name = random.choice(list(choices))
    return choices[name](), name


def other_mode(content: bytes, random: Random) -> tuple[bytes, str]:
    """The same picture in a mode that holds it as well."""
    image = Image.open(io.BytesIO(content))
    mode = random.choice(["RGBA", "P"])
    return as_png(image.convert("RGBA") if mode == "RGBA" else image.quantize(256)), mode
