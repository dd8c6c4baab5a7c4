"""Files on disk: they appear whole, stay in their directory, are regular, and have one writer at a time."""

import contextlib
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

from robofactory.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
LOCK_SECONDS = 3.0  # an owner may be dying, and a lock without a readable owner is known to be stale after 2 s


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8; if that fails, what was there before is untouched.

    Raises:
        OSError: as the file system says, e.g. ENOSPC; no half file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # writing to a full disk says no name
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def remove_leftovers(path: Path) -> None:
    """Delete what a killed `write_atomically` of this file left beside it. Only for who alone writes there."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        if leftover.name.removeprefix(f"{path.name}.").removesuffix(".tmp").isdigit():
            leftover.unlink()


# --------------------------------------------------------------------------------------------------- what others wrote


def require_regular(path: Path, advice: str = "") -> Path:
    """The path itself, once it is known to be a file with content of its own.

    Args:
        advice: ends the message, for instance "download it again".
    Raises:
        UserError: it is missing, a directory, a FIFO, a device, or a Git LFS pointer.
    """
    end = f"; {advice}" if advice else ""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise UserError(f"{path} is missing{end}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is no regular file{end}")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, its content is not here: run git lfs pull")
    return path


def inside(directory: Path, name: str, source: Path | str, advice: str = "") -> Path:
    """The regular file that a text found in a file names, below the directory that the text belongs to.

    Links may lead anywhere below that directory. In a snapshot of the hub's cache, and in a directory of one, they lead
    into `blobs` beside it.

    Args:
        source: the file that names it, for the message.
    Raises:
        UserError: it is absolute, leads out of the directory, or is no regular file (see `require_regular`).
    """
    root = directory.resolve()
    snapshots = [parent for parent in root.parents if parent.name == "snapshots"]
    allowed = [root, *(blobs for parent in snapshots if (blobs := parent.parent / "blobs").is_dir())]
    parts = Path(name).parts
    path = directory / name
    try:
        leads_out = ".." in parts or not any(path.resolve().is_relative_to(each) for each in allowed)
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, a loop of links
        leads_out = True
    if leads_out or not parts:
        is_link = parts and ".." not in parts and not Path(name).is_absolute()
        advice = "; a link leads elsewhere, put the file itself there" if is_link else ""
        raise UserError(f"{source} names {name[:200]!r}, which is not below {directory}; it is refused{advice}")
    return require_regular(path, advice)


def read_text(path: Path, max_bytes: int, advice: str = "") -> str:
    """A regular file's UTF-8 text, without a byte order mark.

    Raises:
        UserError: as `require_regular`; it is larger than `max_bytes`, or not UTF-8.
    """
    require_regular(path, advice)
    end = f"; {advice}" if advice else ""
    if (size := path.stat().st_size) > max_bytes:
        raise UserError(f"{path} has {size:,} bytes, more than the {max_bytes:,} that such a file may have{end}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}){end}") from None


# ------------------------------------------------------------------------------------------------ one writer at a time


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Hold a directory for writing; what a killed process of this machine held is free again.

    The lock is a file beside the directory, `.{name}.lock`, with the owner's process and machine in it. Where a link
    leads to the directory it is beside what the link leads to, so that all of its names have one lock.

    Raises:
        UserError: another process holds it; the line says which.
    """
    real = directory.resolve()
    path = real.parent / f".{real.name}.lock"
    real.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLock(path, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(_held(directory, path, lock.pid)) from None
    try:
        yield
    finally:
        lock.release()


def _held(directory: Path, path: Path, pid: int | None) -> str:
    try:
        host = path.read_text(encoding="utf-8").splitlines()[1]
    except (OSError, IndexError):
        host = "another machine"
    return (
        f"{directory} is being written by process {pid or '?'} on {host}; wait for it or stop it "
        f"(if it no longer exists, delete {path})"
    )
