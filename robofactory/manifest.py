"""What makes a directory a checkpoint: `manifest.json`, written last, with size and SHA-256 of every file."""

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from robofactory import documents, files
from robofactory.documents import Count, Document
from robofactory.errors import UserError
from robofactory.paths import MANIFEST

STATE = "training_state.pt"  # what no policy needs
FORMAT = 1


class ManifestEntry(Document):
    bytes: Count
    sha256: str


class Manifest(Document):
    format: Literal[1]
    update: Count
    keep: bool
    files: dict[str, ManifestEntry]


def write_manifest(directory: Path, update: int, keep: bool) -> None:
    """Flush a checkpoint's files to the disk, then say what they are: from here on it is complete."""
    entries = {}
    for path in sorted(directory.iterdir()):
        flush_to_disk(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    content = {"format": FORMAT, "update": update, "keep": keep, "files": entries}
    temporary = directory / f".{MANIFEST}.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
    flush_to_disk(temporary)
    os.replace(temporary, directory / MANIFEST)
    flush_to_disk(directory)


def verify(directory: Path, *names: str) -> None:
    """Compare files of a checkpoint with its manifest; when none is named, all that a policy needs.

    Raises:
        UserError: a file is missing, truncated or changed, or there is no manifest; the line names the file.
    """
    manifest, another = read_manifest(directory), instead_of(directory)
    for name in names or sorted(manifest.files.keys() - {STATE}):
        if (expected := manifest.files.get(name)) is None:
            raise UserError(f"{directory / name} is missing; {another}")
        path = files.inside(directory, name, directory / MANIFEST, another)
        if (size := path.stat().st_size) != expected.bytes:
            raise UserError(f"{path} has {size} bytes instead of {expected.bytes}: it is truncated or was replaced; {another}")  # fmt: skip
        if _sha256(path) != expected.sha256:
            raise UserError(f"{path} is damaged: its SHA-256 is not that of {MANIFEST}; {another}")


def read_manifest(directory: Path) -> Manifest:
    """Raises UserError where there is none, or none of this format."""
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{directory} is no complete checkpoint: it has no {MANIFEST}; {instead_of(directory)}")
    return documents.read_json(path, Manifest, instead_of(directory))


def instead_of(directory: Path) -> str:
    """What to do instead: the complete checkpoints beside a broken one."""
    directory = directory.resolve()
    names = [path.parent.name for path in directory.parent.glob(f"[!.]*/{MANIFEST}") if path.parent.name not in (directory.name, "latest", "best")]  # fmt: skip
    if not names:
        return "copy it again from where it was made"
    return f"use another checkpoint ({', '.join(sorted(names, key=lambda n: (len(n), n)))}), or delete this one to resume from the one before"  # fmt: skip


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
