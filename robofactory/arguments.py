"""Command lines: what one argument may be is decided while it is read. The standard library alone, as `--help` needs it."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from robofactory import config, paths
from robofactory.config import Within
from robofactory.errors import UserError

MOST_WORKERS = 256
LAST_SEED = 2**32 - 1  # that the simulator's random numbers can begin with


class Parser(argparse.ArgumentParser):
    """Texts as they are written; a mistake is a UserError, one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse's own says nothing of a full disk


def whole(least: int, most: int = 2**31 - 1, below: str = "", above: str = "") -> Callable[[str], int]:
    """Reads a whole number. `below` and `above` say what is there beyond the limits."""

    def read(text: str) -> int:
        if not re.fullmatch("[-+]?[0-9]{1,40}", text):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
        if not least <= int(text) <= most:
            limit, why = (f"at least {least}", below) if int(text) < least else (f"at most {most}", above)
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}{why and f'; {why}'}")
        return int(text)

    return read


def number(limit: Within) -> Callable[[str], float]:
    """Reads a finite number within limits."""

    def read(text: str) -> float:
        if not re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
            raise argparse.ArgumentTypeError(f"{text!r} is no number")
        if abs(float(text)) == float("inf"):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        if problem := limit(float(text)):
            raise argparse.ArgumentTypeError(problem)
        return float(text)

    return read


def path(text: str) -> Path:
    """A path as in `config.path_of`."""
    return _of_user(config.path_of, text)


def name(text: str) -> str:
    """A name that may be a directory's; see `paths.require_name`."""
    return _of_user(paths.require_name, text)


def checkpoint(text: str) -> str:
    """A checkpoint's name, or a path, which has a `/`."""
    return str(path(text)) if "/" in text else name(text)


def device(text: str) -> str:
    if not re.fullmatch("cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda, cuda:0, cuda:1, ...")
    return text


def _of_user(read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
