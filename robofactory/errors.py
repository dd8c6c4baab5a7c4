"""Mistakes that a user can fix, in one line each, and how a command ends. The standard library alone: `--help` needs it."""

import contextlib
import difflib
import errno
import io
import os
import select
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from robofactory import interrupts
from robofactory.interrupts import EXIT_INTERRUPTED

EXIT_UNREAD = 141  # 128 + SIGPIPE, as other tools end whose output nobody reads
EXIT_STOPPED = 75  # EX_TEMPFAIL: a signal came, everything is saved, and the same command with --resume continues


class UserError(ValueError):
    """Something the user can fix. The message is one line that says what is wrong and what to do."""


def did_you_mean(word: str, known: Iterable[str], before: str = "") -> str:
    """For the end of a line that refuses a word: the known one that is most like it, if any is.

    Args:
        before: goes in front of that.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {before + close[0]!r}?)" if close else ""


def shown(text: object, keep: str = "") -> str:
    """Text from a file as a terminal may print it: control characters are visible, none is obeyed.

    Args:
        keep: those that are left as they are, such as the end of a line.
    """
    if (whole := str(text)).isprintable():
        return whole
    is_plain = (c.isprintable() or c in keep or unicodedata.category(c) == "Zs" for c in whole)  # Zs: spaces
    return "".join(
        c if plain else c.encode("unicode_escape").decode("ascii") for c, plain in zip(whole, is_plain, strict=True)
    )


def brief(text: object, most: int = 60) -> str:
    """As `shown`, cut where a table or a title has no more room."""
    whole = shown(text)
    return whole if len(whole) <= most else f"{whole[: most - 3]}..."


class Terminal:
    """A stream that prints what it is given as `shown`, but for the ends of lines: whatever it is, none of it is obeyed."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(shown(text, keep="\n\t"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def explained(error: OSError) -> str | None:
    """What a user can mend of it: a named file, a full disk (whose writing names no file); None for all else."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if error.filename is None and not is_full:
        return None
    where = "" if error.filename is None else f": {shown(error.filename)}"
    return f"{error.strerror}{where}"


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: what a user can fix prints one line and exits with 2, Ctrl-C exits with 130.

    What the terminal's encoding does not have is printed as an escape. Where nobody reads any more what is printed, as
    behind `| head`, it ends quietly.
    """
    interrupts.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(Terminal(sys.stdout)):  # type: ignore[type-var]
            try:
                main()
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # what cannot be written is known here, not when the interpreter ends
    except (UserError, FileNotFoundError) as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        if not (_has_no_reader(1) or _has_no_reader(2)):
            raise
        _drop_unwritten()
        sys.exit(EXIT_UNREAD)
    except OSError as error:
        if (line := explained(error)) is None:
            raise
        print(f"error: {line}{_drop_unwritten()}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        interrupts.say()
        sys.exit(EXIT_INTERRUPTED)


def _drop_unwritten() -> str:
    """Give up what could not be printed, on which the end of the interpreter would fail once more; says what it was."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ": standard output"
    return ""


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
