"""Statistics of actions and proprio in float64, and the normalisations that are made from them, with their inverses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64

from robofactory.config import UserError

METHODS = ("mean_std", "q01_q99", "min_max")
_ARRAYS = ("min", "max", "mean", "std", "q01", "q99")


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the training data says about a vector (actions or proprio), and how it is brought into [-1, 1].

    method, for the dimensions where `normalized` is true:
        mean_std: z = (x - mean) / std, divided by the largest |z| of the training data, so that none of it is clipped;
            in other words the bounds are mean -+ std * (the largest |z|).
        q01_q99: 2 (x - q01) / (q99 - q01 + 1e-8) - 1. Source: OpenVLA, BOUNDS_Q99; 2 % of the data are clipped.
        min_max: the same with the extremes. Source: OpenVLA, BOUNDS.
    The others (a gripper that is in [-1, 1] already) pass through. A dimension that never moves becomes 0, and comes
    back as its one value.
    """

    method: str
    names: tuple[str, ...]
    normalized: Bool[np.ndarray, " a"]
    min: Float64[np.ndarray, " a"]
    max: Float64[np.ndarray, " a"]
    mean: Float64[np.ndarray, " a"]
    std: Float64[np.ndarray, " a"]
    q01: Float64[np.ndarray, " a"]
    q99: Float64[np.ndarray, " a"]
    count: int

    @classmethod
    def measure(
        cls, values: Float[np.ndarray, "n a"], names: Sequence[str], method: str, pass_through: Sequence[str] = ()
    ) -> "Statistics":
        """Statistics of the training data.

        Args:
            values: physical units (rad; the gripper in [-1, 1]).
            names: one for each dimension.
            pass_through: names of the dimensions that are not normalised.
        Raises:
            UserError: no data, NaN or infinity, an unknown name or method, or a dimension that passes through although
                it leaves [-1, 1].
        """
        if method not in METHODS:
            raise UserError(f"normalization {method!r} is none of {', '.join(METHODS)}")
        if len(values) == 0:
            raise UserError("there is no data to take statistics of; record demonstrations first")
        if values.shape[1] != len(names):
            raise UserError(f"{values.shape[1]} dimensions but {len(names)} names ({', '.join(names)})")
        unknown = sorted(set(pass_through) - set(names))
        if unknown:
            raise UserError(f"no dimension {unknown[0]!r} to pass through; there are {', '.join(names)}")
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            index = int(np.argmin(finite))
            raise UserError(f"row {index} of {len(values)} is not finite: {values[index]}; record that episode again")
        values = values.astype(np.float64)
        passes = np.array([name in pass_through for name in names])
        outside = passes & (np.abs(values).max(axis=0) > 1.0)
        if outside.any():
            at = int(np.argmax(outside))
            raise UserError(
                f"{names[at]!r} passes through unnormalised and must be in [-1, 1], but reaches "
                f"{values[:, at].min():.4g}..{values[:, at].max():.4g}"
            )
        return cls(
            method=method,
            names=tuple(names),
            normalized=~passes,
            min=values.min(axis=0),
            max=values.max(axis=0),
            mean=values.mean(axis=0),
            std=values.std(axis=0),
            q01=np.quantile(values, 0.01, axis=0),
            q99=np.quantile(values, 0.99, axis=0),
            count=len(values),
        )

    @cached_property
    def bounds(self) -> Float64[np.ndarray, "2 a"]:
        """The physical values of -1 and of +1; equal for a dimension that never moves."""
        match self.method:
            case "mean_std":
                reach = np.maximum(self.max - self.mean, self.mean - self.min)  # = std * (the largest |z|)
                bounds = np.stack([self.mean - reach, self.mean + reach])
            case "q01_q99":
                bounds = np.stack([self.q01, self.q99])
            case _:
                bounds = np.stack([self.min, self.max])
        bounds = np.where(self.min == self.max, self.min, bounds)  # exact: a mean of equal numbers may be rounded
        return np.where(self.normalized, bounds, [[-1.0], [1.0]])

    @property
    def scale(self) -> Float64[np.ndarray, " a"]:
        """Physical units per normalised unit; 0 for a dimension that never moves."""
        return (self.bounds[1] - self.bounds[0]) / 2.0

    def normalize(self, values: Float[np.ndarray, "*b a"]) -> Float64[np.ndarray, "*b a"]:
        """Physical units -> [-1, 1], clipped."""
        values = values.astype(np.float64)
        low, high = self.bounds
        moves = (self.min < self.max) | ~self.normalized
        width = np.where(moves, high - low + (0.0 if self.method == "mean_std" else 1e-8), 1.0)
        normalized = np.where(self.normalized, 2.0 * (values - low) / width - 1.0, values)
        return np.clip(np.where(moves, normalized, 0.0), -1.0, 1.0)

    def denormalize(self, normalized: Float[np.ndarray, "*b a"]) -> Float64[np.ndarray, "*b a"]:
        """The inverse of `normalize`, in physical units. Source: OpenVLA, predict_action (without an epsilon there)."""
        low, high = self.bounds
        return np.where(self.normalized, 0.5 * (normalized + 1.0) * (high - low) + low, normalized)

    def outside(self, values: Float[np.ndarray, "*b a"]) -> Bool[np.ndarray, "*b a"]:
        """Which values `normalize` clips."""
        low, high = self.bounds
        slack = 1e-6 * (high - low)  # rounding is not clipping
        return (values < low - slack) | (values > high + slack)

    def official(self) -> dict[str, list[Any]]:
        """An entry of the official `norm_stats`, with which the official code decodes as `denormalize` does.

        It reads q01 and q99 as the values of -1 and +1, so that is what they are, whatever the method.
        """
        low, high = self.bounds
        numbers = {name: getattr(self, name).tolist() for name in ("mean", "std", "min", "max")}
        return numbers | {"q01": low.tolist(), "q99": high.tolist(), "mask": self.normalized.tolist()}

    def to_json(self) -> dict[str, Any]:
        """Lists of Python numbers; `from_json` gives back the same floats bit by bit."""
        arrays = {name: getattr(self, name).tolist() for name in ("normalized", *_ARRAYS)}
        return {"method": self.method, "names": list(self.names), "count": self.count, **arrays}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Statistics":
        return cls(
            method=content["method"],
            names=tuple(content["names"]),
            count=content["count"],
            normalized=np.array(content["normalized"], dtype=bool),
            **{name: np.array(content[name], dtype=np.float64) for name in _ARRAYS},
        )
