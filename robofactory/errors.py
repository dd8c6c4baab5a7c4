"""Mistakes that a user can fix, in one line each, and how a command ends. The standard library alone: `--help` needs it."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable

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


def shown(text: object) -> str:
    """Text from a file as a terminal may print it: control characters are visible, none is obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def explained(error: OSError) -> str | None:
    """What a user can mend of it: a named file, a full disk (whose writing names no file); None for all else."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if error.filename is None and not is_full:
        return None
    where = "" if error.filename is None else f": {shown(error.filename)}"
    return f"{error.strerror}{where}"


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: what a user can fix prints one line and exits with 2, Ctrl-C exits with 130."""
    try:
        main()
    except (UserError, FileNotFoundError) as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if (line := explained(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; everything that was complete is kept, the same command continues", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
