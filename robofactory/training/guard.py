"""A loss that dies is noticed: steps that are not finite, and losses that leave their own recent range.

What it decides depends on numbers that are the same on every process, and so is the decision.
"""

import math
from collections import deque
from enum import Enum, auto
from pathlib import Path
from statistics import median
from typing import Any

WINDOW = 64  # losses that a new one is compared with
FIRST_VERDICT = 16  # losses that have to be there before one can be a spike
# Robust standard deviations above the median. The loss of a tiny batch is skewed, of a normal one 8 never happens.
THRESHOLD = 8.0
MAD_TO_STD = 1.4826  # of a normal distribution
SMALLEST_STD = 0.02  # of the median: a loss that hardly moves is no reason to call every wrinkle a spike
PATIENCE = 3  # spikes in a row: the loss stays up
MAX_ROLLBACKS = 3
LEARNING_RATE_CUT = 0.5

_COUNTS = ("skipped", "skipped_in_a_row", "spikes_in_a_row", "rollbacks")


class Verdict(Enum):
    APPLY = auto()
    SKIP = auto()  # not finite: the weights stay as they are
    GIVE_UP = auto()  # not finite too often in a row, or rolled back too often
    SPIKE = auto()  # applied all the same: the gradient is clipped, and one strange batch is no disaster
    ROLL_BACK = auto()


class Guard:
    """One verdict a step, before the weights move. `state` is all it remembers, for the checkpoint."""

    def __init__(self, max_nonfinite_steps: int, rollback_on_spike: bool, state: dict[str, Any] | None = None):
        self.max_nonfinite_steps, self.rollback_on_spike = max_nonfinite_steps, rollback_on_spike
        self._restore(state)

    @property
    def learning_rate_factor(self) -> float:
        return LEARNING_RATE_CUT**self.rollbacks

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        if not math.isfinite(loss + grad_norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return Verdict.GIVE_UP if self.skipped_in_a_row >= self.max_nonfinite_steps else Verdict.SKIP
        self.skipped_in_a_row = 0
        is_spike = loss > self.limit
        self.losses.append(loss)  # spikes too: where the loss has moved for good, it is no news for long
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if is_spike else 0
        if self.spikes_in_a_row < PATIENCE or not self.rollback_on_spike:
            return Verdict.SPIKE if is_spike else Verdict.APPLY
        return Verdict.GIVE_UP if self.rollbacks == MAX_ROLLBACKS else Verdict.ROLL_BACK

    @property
    def limit(self) -> float:
        """A loss above it is a spike."""
        if len(self.losses) < FIRST_VERDICT:
            return math.inf
        middle = median(self.losses)
        std = MAD_TO_STD * median(abs(loss - middle) for loss in self.losses)
        return middle + THRESHOLD * max(std, SMALLEST_STD * abs(middle))

    def last_words(self, directory: Path) -> str:
        """Why it gave up, for the user; the step is saved in the directory."""
        if self.skipped_in_a_row:
            reason = f"loss or gradient were not finite in {self.skipped_in_a_row} steps in a row; the weights were not touched"  # fmt: skip
        else:
            reason = f"the loss left its range again after {MAX_ROLLBACKS} returns to a checkpoint at half the learning rate each"  # fmt: skip
        return f"{reason}. See the step again: bash train.sh --replay {directory}; or --resume with a lower training.learning_rate"  # fmt: skip

    def why_no_policy(self, val_loss: float, is_last: bool) -> str | None:
        """What is wrong with the weights after an epoch, for the user; None: nothing is known to be.

        Args:
            is_last: training ends here.
        """
        if not math.isfinite(val_loss):
            return f"the loss on held-out episodes is {val_loss}"
        if is_last and self.skipped_in_a_row:
            return f"training ends with steps whose loss or gradient were not finite, the last {self.skipped_in_a_row}"
        return None

    def roll_back(self, state: dict[str, Any] | None) -> None:
        """Back to what it knew at a checkpoint; only that it had to go back is not forgotten."""
        rollbacks = self.rollbacks + 1
        self._restore(state)
        self.rollbacks = rollbacks

    def state(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return counts | {"losses": list(self.losses)}

    def _restore(self, state: dict[str, Any] | None) -> None:
        state = state or dict.fromkeys(_COUNTS, 0) | {"losses": []}
        self.losses = deque(state["losses"], maxlen=WINDOW)
        for name in _COUNTS:
            setattr(self, name, state[name])
