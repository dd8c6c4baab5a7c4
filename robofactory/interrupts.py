"""Ctrl-C ends a command with one line and exit code 130, whatever it does at that moment. The standard library alone."""

import atexit
import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

EXIT_INTERRUPTED = 130  # 128 + SIGINT
LINE = "interrupted; everything that was complete is kept, the same command continues"

_told: list[str] = []  # once it was interrupted, and once it has said so


def install() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt where it is safe to raise one, and leaves at once where it is not.

    Does nothing where Ctrl-C is ignored, as under nohup, or somebody else handles it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, _interrupt)
    print_exception, print_unraisable = sys.excepthook, sys.unraisablehook

    def excepthook(kind: Any, error: Any, trace: Any) -> None:
        leave() if issubclass(kind, KeyboardInterrupt) else print_exception(kind, error, trace)

    def unraisablehook(unraisable: Any) -> None:  # it came in a callback or a destructor, which swallow it
        leave() if issubclass(unraisable.exc_type, KeyboardInterrupt) else print_unraisable(unraisable)

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook


def leave() -> NoReturn:
    """End this process here and now; nothing is cleaned up, as after a SIGKILL, which all files here survive."""
    with contextlib.suppress(Exception):  # whatever was printed before, if it can be told now
        sys.stdout.flush()
    say()
    os._exit(EXIT_INTERRUPTED)


def say() -> None:
    """Print the line, once."""
    if "said" not in _told:
        _told.append("said")
        with contextlib.suppress(OSError):
            os.write(2, f"{LINE}\n".encode())


def _interrupt(number: int, frame: Any) -> None:
    """While a library is imported or the command line is read, there is nothing to lose, and many libraries swallow a
    KeyboardInterrupt or abort at it. Who presses Ctrl-C again while the first one is handled does not want to wait."""
    if "interrupted" in _told or _is_beginning(frame):
        leave()
    _told.append("interrupted")
    raise KeyboardInterrupt


def _is_beginning(frame: Any) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        if frame.f_code.co_filename.endswith(f"{os.sep}argparse.py"):
            return True
        frame = frame.f_back
    return frame is not None


@atexit.register
def _rest() -> None:
    """What comes after this, the last that is run at the end, only frees memory: Ctrl-C changes nothing any more."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
