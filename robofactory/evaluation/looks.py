"""What was seen of an agent's policy in one episode, on disk: `{directory}/looks/seed_10003_agent0.npz`."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8

LOOKS = "looks"


@dataclass(frozen=True)
class Looks:
    """One agent in one episode: at `steps` how it shared its attention, at `moments`, some of them, all of `policy.Look`.

    digest: of the episode, so that what was seen in another one is not taken for it.
    attention: the mean over the action tokens.
    """

    digest: str
    steps: Int64[np.ndarray, " n"]
    parts: list[str]
    attention: Float32[np.ndarray, "n layers parts"]
    moments: Int64[np.ndarray, " m"]
    views: list[str]
    pictures: UInt8[np.ndarray, "m v h w 3"]
    heat: Float32[np.ndarray, "m v grid grid"]
    names: list[str]
    values: Float32[np.ndarray, "a bins"]
    probabilities: Float32[np.ndarray, "m a bins"]
    chosen: Int64[np.ndarray, "m a"]


def path_of(directory: Path, seed: int, agent: int) -> Path:
    return directory / LOOKS / f"seed_{seed}_agent{agent}.npz"


def save(looks: Looks, path: Path) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **vars(looks))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path, digest: str) -> Looks | None:
    """What was seen in the episode of this digest; None if nobody looked, or at another one, or an older version did."""
    if not path.is_file():
        return None
    with np.load(path) as file:
        if set(file.files) != {field.name for field in fields(Looks)} or str(file["digest"]) != digest:
            return None
        arrays = {name: file[name] for name in file.files}
    words = {name: arrays[name].tolist() for name in ("digest", "parts", "views", "names")}
    return Looks(**{**arrays, **words})
