"""Policy and expert drive in turns: long enough that the policy gets into trouble, and out of it again."""

import numpy as np

from robofactory.demos.turns import EXPERT_STEPS, POLICY_STEPS, Turns


def drives(seed: int, steps: int) -> np.ndarray:
    """Whether the policy of each of two arms drives, [steps, 2]."""
    turns = Turns(2, np.random.default_rng(seed))
    return np.array([turns.next() for _ in range(steps)])


def test_the_policies_begin():
    assert all(drives(seed, 1).all() for seed in range(20))


def test_the_same_seed_takes_the_same_turns():
    np.testing.assert_array_equal(drives(3, 200), drives(3, 200))
    assert (drives(3, 200) != drives(4, 200)).any()


def test_turns_last_as_long_as_they_say_and_each_arm_takes_its_own():
    seen = drives(0, 40_000)
    share = POLICY_STEPS / (POLICY_STEPS + EXPERT_STEPS)
    np.testing.assert_allclose(seen.mean(axis=0), share, atol=0.03)
    changes = (seen[1:] != seen[:-1]).sum(axis=0)
    np.testing.assert_allclose(2 * len(seen) / changes, POLICY_STEPS + EXPERT_STEPS, rtol=0.1)
    both = (seen[:, 0] & seen[:, 1]).mean()
    assert abs(both - share**2) < 0.03, "the arms are handed over together"
