"""Kinds of damage to a file as such, whatever it holds; other files here add those that know what is in it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

SECRET = b"secret-4c1d9e7a52b8f063"  # 24 bytes less one, and a line's end: base64 of it has no padding
NOT_TO_COPY = b"not-to-copy-8f0652b89e7"  # of a file that may be read and told of, and ends in no result
TOKEN = "MUTATIONS_TOKEN"  # a variable of the environment with the same content
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4c1d9e7a" * 8 + "\nsize 123456\n"


class Inapplicable(Exception):
    """There is nothing in this file that could be damaged so."""


@dataclass(frozen=True)
class Damage:
    """A way to damage a file.

    apply: does it to a file below a directory that has `outside` beside it; says what it did.
    is_harmless: the result must stay what it is, where the format tolerates what it does not know.
    is_loss: what is gone cannot be guessed: to go on with another result is silently wrong.
    """

    name: str
    apply: Callable[[Path, Random], str]
    is_harmless: bool = False
    is_loss: bool = False


class Kinds(dict[str, Damage]):
    """The kinds of damage to one kind of file, by name."""

    def add(self, is_harmless: bool = False, is_loss: bool = False) -> Callable[[Callable], Callable]:
        """Decorates the function that does it; its name is the damage's."""

        def register(apply: Callable[[Path, Random], str]) -> Callable[[Path, Random], str]:
            self[apply.__name__] = Damage(apply.__name__, apply, is_harmless, is_loss)
            return apply

        return register

    def judged(self, **changes: bool) -> "Kinds":
        """The same, where a format means that `is_harmless` or `is_loss` is something else."""
        return Kinds({name: replace(damage, **changes) for name, damage in self.items()})


def outside(path: Path) -> Path:
    """The directory beside the given ones that nothing may reach."""
    return next(parent / "outside" for parent in path.parents if (parent / "outside").is_dir())


FILE = Kinds()


@FILE.add(is_loss=True)
def truncated(path: Path, random: Random) -> str:
    content = path.read_bytes()
    size = random.randrange(1, max(2, len(content) - 1))
    path.write_bytes(content[:size])
    return f"{size} of {len(content)} bytes"


@FILE.add()
def flipped(path: Path, random: Random) -> str:
    content = bytearray(path.read_bytes())
    places = [random.randrange(len(content)) for _ in range(random.choice([1, 1, 8]))] if content else []
    for place in places:
        content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return f"bits of the bytes {places}"


@FILE.add(is_loss=True)
def emptied(path: Path, random: Random) -> str:
    path.write_bytes(b"")
    return "0 bytes"


@FILE.add(is_loss=True)
def other_type(path: Path, random: Random) -> str:
    content = random.choice([b"\x89PNG\r\n\x1a\n" + bytes(100), b"just words\n", b"PK\x03\x04" + bytes(60), b"PAR1" + bytes(40) + b"PAR1"])  # fmt: skip
    path.write_bytes(content)
    return f"begins with {content[:8]!r}"


@FILE.add(is_loss=True)
def missing(path: Path, random: Random) -> str:
    path.unlink()
    return ""


@FILE.add(is_loss=True)
def directory_instead(path: Path, random: Random) -> str:
    path.unlink()
    path.mkdir()
    return ""


@FILE.add(is_loss=True)
def fifo(path: Path, random: Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return ""


@FILE.add(is_loss=True)
def device(path: Path, random: Random) -> str:
    path.unlink()
    path.symlink_to("/dev/zero")
    return "a link to /dev/zero"


@FILE.add(is_loss=True)
def dangling_link(path: Path, random: Random) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return ""


@FILE.add(is_loss=True)
def link_loop(path: Path, random: Random) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return ""


@FILE.add(is_loss=True)
def link_to_secret(path: Path, random: Random) -> str:
    """It may be read, as a link at a known place is its owner's; nothing of it may end in a result."""
    secret = outside(path).with_name("elsewhere.txt")
    secret.write_bytes(NOT_TO_COPY + b"\n")
    path.unlink()
    path.symlink_to(secret)
    return ""


@FILE.add(is_loss=True)
def lfs_pointer(path: Path, random: Random) -> str:
    path.write_text(LFS_POINTER)
    return ""


@FILE.add()
def appended(path: Path, random: Random) -> str:
    with open(path, "ab") as file:
        file.write(random.randbytes(100))
    return "100 random bytes"


@FILE.add(is_loss=True)
def unreadable_name(path: Path, random: Random) -> str:
    """Renamed: what it was called is no longer there."""
    path.rename(path.with_name(path.name + " (1)"))
    return "renamed"


NAMED = Kinds(FILE)  # files that other files name


@NAMED.add(is_loss=True)
def link_out(path: Path, random: Random) -> str:
    """The very file, elsewhere: reading it is reaching out."""
    shutil.move(path, outside(path) / path.name)
    path.symlink_to(outside(path) / path.name)
    return ""
