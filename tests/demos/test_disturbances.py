import numpy as np
import pytest

from robofactory.demos.disturbances import Disturber
from robofactory.sim.task import Disturbances

HOW = Disturbances()
LABEL = np.append(np.linspace(-1, 1, 7), 1.0).astype(np.float32)
MEASURED = np.append(np.linspace(-1, 1, 7) - 0.05, 1.0).astype(np.float32)


def play(seed: int, steps: int = 120) -> np.ndarray:
    """Executed minus expert's action, [steps, arms, 8], of an expert that always says the same."""
    random = Disturber(HOW, 2, 7, np.random.default_rng(seed))
    executed = [random.disturb([LABEL, LABEL], [MEASURED, MEASURED]) for _ in range(steps)]
    return np.array(executed) - LABEL


def test_the_same_seed_disturbs_in_the_same_way():
    np.testing.assert_array_equal(play(3), play(3))
    assert not np.array_equal(play(3), play(4))


def test_the_arms_are_disturbed_independently():
    gap = play(0)
    assert np.abs(gap[:, 0] - gap[:, 1]).max() > 0.01


def test_disturbances_stay_within_their_bounds():
    gap = np.stack([play(seed) for seed in range(50)])
    largest = HOW.push_rad[1] + 0.05 + HOW.start_rad[1] + 6 * HOW.shake_rad
    assert np.abs(gap[..., :7]).max() < largest
    assert set(np.unique(gap[..., 7])) == {-2.0, 0.0}  # the gripper only ever flips


def test_every_kind_of_disturbance_happens():
    gap = np.stack([play(seed) for seed in range(50)])
    stays = np.isclose(gap[..., :7].mean(axis=-1), -0.05, atol=0.01)  # at the measured joints
    assert stays.sum() > 50
    pushed = np.abs(gap[..., :7]).max(axis=-1) > 0.05 + 5 * HOW.shake_rad
    assert pushed[:, :4].any() and pushed[:, 20:].any()
    assert 0.002 < (gap[..., 7] != 0).mean() < 0.05


@pytest.mark.parametrize("seed", range(20))
def test_late_in_an_episode_only_the_shaking_is_left(seed):
    late = play(seed, steps=160)[HOW.last_step + HOW.push_steps[1] :]
    assert np.abs(late[..., :7]).max() < 6 * HOW.shake_rad and not late[..., 7].any()


def test_labels_and_measurements_are_left_as_they_are():
    label, measured = LABEL.copy(), MEASURED.copy()
    play(0)
    np.testing.assert_array_equal(LABEL, label)
    np.testing.assert_array_equal(MEASURED, measured)
