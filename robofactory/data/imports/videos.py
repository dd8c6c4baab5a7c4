"""Pictures of others' videos at given times."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, UInt8

from robofactory.data.imports.frames import MAX_PIXELS
from robofactory.data.imports.source import FETCH_AGAIN, needs
from robofactory.errors import UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

LARGEST_DRIFT = 0.1  # of a frame: how far a picture may be from the time that it is needed at
# Containers that hold their own pictures; a playlist would have FFmpeg open whatever it names.
OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}


@contextlib.contextmanager
def open_video(path: Path) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """An open video and its first stream of pictures; what turns out broken while it is read is a UserError, too."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise needs("av") from None
    try:
        with av.open(str(path.absolute()), options=OPTIONS) as container:
            if not container.streams.video or container.streams.video[0].time_base is None:
                raise UserError(f"{path} has no pictures; {FETCH_AGAIN}")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UserError(f"{path} is in a format that FFmpeg cannot decode here")
            _require_bounded(path, stream.width, stream.height)
            yield container, stream
    except (FFmpegError, UnicodeDecodeError, OverflowError, MemoryError) as error:  # Unicode: its metadata
        raise UserError(f"{path} cannot be decoded: {getattr(error, 'strerror', None) or error}") from None


def _require_bounded(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: pictures of {width}x{height} px are more than the {MAX_PIXELS:,} that are read")


def video_size(path: Path) -> tuple[int, int]:
    """(height, width) of a video's pictures, as its header says."""
    with open_video(path) as (_, stream):
        return stream.height, stream.width


def end_s(path: Path) -> float | None:
    """When a video ends; None: it does not say."""
    with open_video(path) as (_, stream):
        if stream.duration is None or stream.time_base is None:
            return None
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)


def pictures_at(
    path: Path, times_s: Float64[np.ndarray, " n"], fps: float | int, is_alone: bool, notes: list[str]
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The pictures of a video at these ascending times, decoded one after the other.

    Args:
        is_alone: nothing else is in the video; then as many pictures as times belong to them in their order, even
            if the two are counted from different beginnings (rows often begin at 1/fps, videos at 0).
        notes: gets a line where the video has more pictures than times.
    Raises:
        UserError: it is broken, or has no picture at one of the times.
    """
    with open_video(path) as (container, stream):
        assert stream.time_base is not None
        if is_alone:
            begin_s = float((stream.start_time or 0) * stream.time_base)
            if abs(times_s[0] - begin_s) * fps > LARGEST_DRIFT and _count(path) == len(times_s):
                times_s = times_s - times_s[0] + begin_s
            elif stream.frames > len(times_s):
                notes.append(
                    f"{path} has {stream.frames} pictures for {len(times_s)} rows; those at the rows' times are taken"
                )
        container.seek(int(times_s[0] / stream.time_base), stream=stream)  # to the key frame before
        done = 0
        for frame in container.decode(stream):
            if frame.time is None:
                raise UserError(f"{path} has a picture without a time")
            late = (frame.time - times_s[done]) * fps
            if late > LARGEST_DRIFT:
                break
            if late > -LARGEST_DRIFT:
                _require_bounded(path, frame.width, frame.height)
                yield frame.to_ndarray(format="rgb24")
                done += 1
                if done == len(times_s):
                    return
    raise UserError(f"{path} has no picture at {times_s[done]:.3f} s")


def _count(path: Path) -> int:
    """How many pictures there are, whatever the video's header says; none is decoded."""
    with open_video(path) as (container, stream):
        return sum(packet.pts is not None for packet in container.demux(stream))
