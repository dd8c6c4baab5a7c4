"""Who drives while a learned policy's own states are recorded: the policy, and now and then the expert for a while.

The labels are the expert's everywhere (DAgger, Ross et al. 2011). Handing over in turns, instead of by a coin at each
step, lets the policy get into trouble in earnest; the expert's turns then show the way out, and what comes after it.
"""

import numpy as np

POLICY_STEPS, EXPERT_STEPS = 40, 12  # mean length of a turn; lengths are geometric


class Turns:
    """Of one episode: each arm is handed over independently; the policies begin."""

    def __init__(self, num_arms: int, random: np.random.Generator):
        self._random = random
        self.is_policy = [True] * num_arms

    def next(self) -> list[bool]:
        """Whether each arm's policy drives it at this step; called once a step."""
        drives = list(self.is_policy)
        for arm, is_policy in enumerate(self.is_policy):
            if self._random.random() < 1.0 / (POLICY_STEPS if is_policy else EXPERT_STEPS):
                self.is_policy[arm] = not is_policy
        return drives
