"""Pictures and videos inside a page, as the `data:` URLs that they are named by."""

import base64
from pathlib import Path

from markupsafe import Markup

from robofactory import files
from robofactory.errors import UserError

MAX_VIDEO_BYTES = 64_000_000  # of one episode; those of this project have less than 1 MB


def data_url(data: bytes) -> Markup:
    """The URL of an encoded picture or video; what it is called there is what it is.

    Raises:
        ValueError: neither PNG, JPEG, WebP nor MP4.
    """
    kind = _kind(data)
    if kind is None:
        raise ValueError(f"neither a picture nor a video: {data[:16]!r}...")
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def read_video(directory: Path, name: str, source: Path) -> bytes:
    """The MP4 that a file names, which lies below a directory.

    Args:
        source: the file that names it, for the message.
    Raises:
        UserError: it leads out of the directory, is no MP4, or too large for a page.
    """
    path = files.inside(directory, name, source)
    if (size := path.stat().st_size) > MAX_VIDEO_BYTES:
        raise UserError(f"{path} has {size:,} bytes, too many for a page")
    data = path.read_bytes()
    if _kind(data) != "video/mp4":
        raise UserError(f"{path} is no MP4")
    return data


def _kind(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    return "video/mp4" if data[4:8] == b"ftyp" else None
