"""Mistakes that a user can fix, in one line each, and how a command ends. The standard library alone: `--help` needs it."""

import contextlib
import difflib
import errno
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

EXIT_INTERRUPTED = 130  # Ctrl-C
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


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: what a user can fix prints one line and exits with 2, Ctrl-C exits with 130."""
    try:
        with contextlib.redirect_stdout(Terminal(sys.stdout)):  # type: ignore[type-var]
            main()
    except (UserError, FileNotFoundError) as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # writing then says no name
        if error.filename is None and not is_full:
            raise
        where = "" if error.filename is None else f": {shown(error.filename)}"
        print(f"error: {error.strerror}{where}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; everything that was complete is kept, the same command continues", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
