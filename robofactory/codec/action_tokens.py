"""Normalised actions <-> vocabulary ids: 256 bins in the last 256 ids of the vocabulary.

Source: OpenVLA, prismatic/vla/action_tokenizer.py; the same bins and ids, vectorised.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float64, Int64


@dataclass(frozen=True)
class ActionTokens:
    """Bins between `num_bins` equally spaced edges in [-1, 1]; the first bin has the highest id.

    There are 255 intervals between 256 edges, so 255 centres; +1 itself gets an id of its own (the lowest), which
    decodes like the last interval. A value in [-1, 1] therefore comes back within 1 / 255.

    vocab_size: ids that text and actions share; the actions are the last `num_bins` of them (31,744..31,999 of
        32,000 for Llama-2).
    """

    vocab_size: int
    num_bins: int = 256

    def __post_init__(self) -> None:
        assert 2 <= self.num_bins <= self.vocab_size, (self.num_bins, self.vocab_size)

    @cached_property
    def edges(self) -> Float64[np.ndarray, " edges"]:
        return np.linspace(-1.0, 1.0, self.num_bins)

    @cached_property
    def centers(self) -> Float64[np.ndarray, " centers"]:
        return (self.edges[:-1] + self.edges[1:]) / 2.0

    @property
    def half_bin(self) -> float:
        """The largest decoding error of a value in [-1, 1]."""
        return 1.0 / (self.num_bins - 1)

    @property
    def first_id(self) -> int:
        """The lowest action id; the ids are `first_id .. vocab_size - 1`."""
        return self.vocab_size - self.num_bins

    def encode(self, normalized: Float[np.ndarray, "*b a"]) -> Int64[np.ndarray, "*b a"]:
        """Vocabulary ids; values outside [-1, 1] are clipped."""
        return self.vocab_size - np.digitize(np.clip(normalized, -1.0, 1.0), self.edges).astype(np.int64)

    def decode(self, ids: Int64[np.ndarray, "*b a"]) -> Float64[np.ndarray, "*b a"]:
        """Centres of the bins, in (-1, 1). As in the official code, an id that is no action counts as the nearest."""
        return self.centers[np.clip(self.vocab_size - ids - 1, 0, self.num_bins - 2)]
