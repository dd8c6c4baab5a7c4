"""Statistics of actions and proprio in float64, and the normalisations that are made from them, with their inverses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64

from robofactory.errors import UserError

METHODS = ("mean_std", "q01_q99", "min_max")
SMALLEST_SPAN = 0.2  # of a dimension that passes through: 25 of the 256 bins, where a gripper in metres would have 5
_ARRAYS = ("min", "max", "mean", "std", "q01", "q99")


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the training data says about a vector (actions or proprio), and how it is brought into [-1, 1].

    method, for the dimensions where `normalized` is true:
        mean_std: z = (x - mean) / std, divided by the largest |z| of the training data, so that none of it is clipped;
            in other words the bounds are mean -+ std * (the largest |z|).
        q01_q99: 2 (x - q01) / (q99 - q01 + 1e-8) - 1. Source: OpenVLA, BOUNDS_Q99; 2 % of the data are clipped. Where
            q01 and q99 are one value and the extremes are not, that would erase what the dimension is there for, an
            event in one frame of a hundred: `of_numbers` then takes the extremes for q01 and q99. The official code
            decodes with these as we do.
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
            UserError: no data, NaN or infinity, or as `of_numbers`.
        """
        if len(values) == 0:
            raise UserError("there is no data to take statistics of; record demonstrations first")
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            index = int(np.argmin(finite))
            raise UserError(f"row {index} of {len(values)} is not finite: {values[index]}; record that episode again")
        values = values.astype(np.float64)
        numbers = {
            "min": values.min(axis=0),
            "max": values.max(axis=0),
            "mean": values.mean(axis=0),
            "std": values.std(axis=0),
            "q01": np.quantile(values, 0.01, axis=0),
            "q99": np.quantile(values, 0.99, axis=0),
        }
        return cls.of_numbers(numbers, len(values), names, method, pass_through)

    @classmethod
    def of_numbers(
        cls,
        numbers: Mapping[str, Float64[np.ndarray, " a"]],
        count: int,
        names: Sequence[str],
        method: str,
        pass_through: Sequence[str] = (),
    ) -> "Statistics":
        """Statistics that were taken before.

        Args:
            numbers: by the names of the fields; there may be more.
            count: of the values that they were taken of.
        Raises:
            UserError: an unknown name or method, a dimension that passes through although it leaves [-1, 1] or moves
                so little there that it would hardly be resolved, or one that float32 does not hold.
        """
        if method not in METHODS:
            raise UserError(f"normalization {method!r} is none of {', '.join(METHODS)}")
        low, high = numbers["min"], numbers["max"]
        if len(low) != len(names):
            raise UserError(f"{len(low)} dimensions but {len(names)} names ({', '.join(names)})")
        unknown = sorted(set(pass_through) - set(names))
        if unknown:
            raise UserError(f"no dimension {unknown[0]!r} to pass through; there are {', '.join(names)}")
        passes = np.array([name in pass_through for name in names], bool)
        wrong = passes & ~passes_well(low, high)
        if wrong.any():
            at = int(np.argmax(wrong))
            is_outside = low[at] < -1.0 or high[at] > 1.0
            problem = "must be in [-1, 1], but reaches" if is_outside else "moves too little to be resolved there:"
            raise UserError(f"{names[at]!r} passes through unnormalised and {problem} {low[at]:.4g}..{high[at]:.4g}; name what is in [-1, 1] in data.pass_through, or nothing: data.pass_through=[]")  # fmt: skip
        statistics = cls.unchecked(numbers, count, names, method, ~passes)
        too_far = ~(np.abs(statistics.bounds) <= np.finfo(np.float32).max).all(axis=0)
        if too_far.any():
            at = int(np.argmax(too_far))
            raise UserError(f"{names[at]!r} reaches {low[at]:.4g}..{high[at]:.4g}, which is too far for float32; look for a broken recording, or convert the data to another unit")  # fmt: skip
        return statistics

    @classmethod
    def unchecked(
        cls,
        numbers: Mapping[str, Float64[np.ndarray, " a"]],
        count: int,
        names: Sequence[str],
        method: str,
        normalized: Bool[np.ndarray, " a"],
    ) -> "Statistics":
        """The same of whatever there is, to look at it."""
        arrays = {name: numbers[name] for name in _ARRAYS}
        if method == "q01_q99":
            is_one_value = arrays["q01"] == arrays["q99"]
            arrays["q01"] = np.where(is_one_value, arrays["min"], arrays["q01"])
            arrays["q99"] = np.where(is_one_value, arrays["max"], arrays["q99"])
        return cls(method, tuple(names), normalized, count=count, **arrays)

    @cached_property
    def bounds(self) -> Float64[np.ndarray, "2 a"]:
        """The physical values of -1 and of +1; equal for a dimension that never moves."""
        match self.method:
            case "mean_std":
                with np.errstate(over="ignore"):  # infinity then, which `of_numbers` refuses
                    reach = np.maximum(self.max - self.mean, self.mean - self.min)  # = std * (the largest |z|)
                    bounds = np.stack([self.mean - reach, self.mean + reach])
            case "q01_q99":
                bounds = np.stack([self.q01, self.q99])
            case _:
                bounds = np.stack([self.min, self.max])
        bounds = np.where(self.min == self.max, self.min, bounds)  # exact: a mean of equal numbers may be rounded
        return np.where(self.normalized, bounds, [[-1.0], [1.0]])

    @property
    def joints(self) -> Bool[np.ndarray, " a"]:
        """What an error in rad is the mean over: the dimensions that do not pass through, or all where all do."""
        return self.normalized if self.normalized.any() else ~self.normalized

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


@dataclass(frozen=True, eq=False)
class DatasetStatistics:
    """What a policy keeps of one dataset that it was trained on.

    look: how the pictures were rendered (`config.look_of`), which the codec does not decide; evaluation puts its scene
        right by it. Empty for pictures of no scene of ours.
    num_episodes: that were trained on.
    """

    action: Statistics
    proprio: Statistics
    look: dict[str, Any]
    num_episodes: int

    @classmethod
    def measure(
        cls,
        actions: Float[np.ndarray, "n a"],
        proprio: Float[np.ndarray, "m s"],
        names: Sequence[str],
        method: str,
        look: dict[str, Any],
        num_episodes: int,
        *,
        pass_through: Sequence[str] | None = None,
        proprio_names: Sequence[str] | None = None,
    ) -> "DatasetStatistics":
        """Of all training episodes, in physical units; arguments and errors as of `Statistics.measure`.

        Args:
            names: of the action dimensions.
            pass_through: None: the grippers, by their names.
            proprio_names: None: the same as the actions'.
        """
        passing = grippers(names) if pass_through is None else pass_through
        action = Statistics.measure(actions, names, method, passing)
        return cls(
            action,
            Statistics.measure(proprio, names if proprio_names is None else proprio_names, method),
            look,
            num_episodes,
        )

    def official(self) -> dict[str, Any]:
        """The dataset's value in the official `norm_stats`."""
        return {
            "action": self.action.official(),
            "proprio": self.proprio.official(),
            "num_transitions": self.action.count,
            "num_trajectories": self.num_episodes,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "look": self.look,
            "num_episodes": self.num_episodes,
            "action": self.action.to_json(),
            "proprio": self.proprio.to_json(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "DatasetStatistics":
        action, proprio = (Statistics.from_json(content[name]) for name in ("action", "proprio"))
        return cls(action, proprio, content["look"], content["num_episodes"])


def require_alike(datasets: Mapping[str, DatasetStatistics], use_proprio: bool) -> None:
    """Raises UserError unless one model can learn all these datasets; the line names the first that does not fit."""
    (first, one), *others = datasets.items()
    for name, other in others:
        for what in ("action", "proprio") if use_proprio else ("action",):
            a, b = getattr(one, what), getattr(other, what)
            names = f"{first} has {', '.join(a.names)}; {name} has {', '.join(b.names)}"
            if len(a.names) != len(b.names):
                raise UserError(f"cannot mix {what}s of {len(a.names)} and {len(b.names)} numbers: {names}")
            if a.names != b.names and sorted(a.names) == sorted(b.names):
                raise UserError(f"cannot mix {what}s whose numbers are in another order: {names}")
            if (a.normalized != b.normalized).any():
                raise UserError(f"cannot mix {what}s of which other numbers pass through unnormalised: {names}; see data.pass_through")  # fmt: skip


def passes_well(low: Float64[np.ndarray, " a"], high: Float64[np.ndarray, " a"]) -> Bool[np.ndarray, " a"]:
    """Whether dimensions with these extremes can pass through: in [-1, 1], and moving enough to be resolved there."""
    return (low >= -1.0) & (high <= 1.0) & ((low == high) | (high - low >= SMALLEST_SPAN))


def grippers(names: Sequence[str]) -> list[str]:
    """The dimensions that are in [-1, 1] already, by what they are called."""
    return [name for name in names if "gripper" in name.lower()]
