import json

import numpy as np
import pytest
from codec_samples import NAMES, make_actions

from robofactory.codec.statistics import METHODS, DatasetStatistics, Statistics
from robofactory.errors import UserError


def measure(method: str = "mean_std", values: np.ndarray | None = None) -> Statistics:
    return Statistics.measure(make_actions() if values is None else values, NAMES, method, ["gripper"])


@pytest.mark.parametrize("method", METHODS)
def test_denormalize_inverts_normalize_where_nothing_is_clipped(method: str):
    statistics, actions = measure(method), make_actions()
    back = statistics.denormalize(statistics.normalize(actions))
    inside = ~statistics.outside(actions)
    assert inside.mean() > 0.97
    np.testing.assert_allclose(back[inside], actions[inside], rtol=0, atol=3e-8)


def test_mean_std_is_z_scaled_by_the_largest_z():
    actions = make_actions().astype(np.float64)[:, [0, 1, 2]]
    z = (actions - actions.mean(0)) / actions.std(0)
    statistics = Statistics.measure(actions, NAMES[:3], "mean_std")
    np.testing.assert_allclose(statistics.normalize(actions), z / np.abs(z).max(0), rtol=0, atol=1e-12)
    assert not statistics.outside(actions).any()


def test_q01_q99_equals_the_official_formula():
    actions = make_actions().astype(np.float64)
    q01, q99 = np.quantile(actions, 0.01, axis=0), np.quantile(actions, 0.99, axis=0)
    mask = np.array([True] * 7 + [False])
    official = np.where(mask, np.clip(2 * (actions - q01) / (q99 - q01 + 1e-8) - 1, -1, 1), actions)
    official[:, actions.min(0) == actions.max(0)] = 0.0
    np.testing.assert_allclose(measure("q01_q99").normalize(actions), official, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_a_joint_that_never_moves_comes_back_exactly(method: str):
    statistics = measure(method)
    for token in (-0.9, 0.0, 1.0):
        assert statistics.denormalize(np.full(8, token))[4] == np.float32(0.1)
    assert (statistics.normalize(make_actions())[:, 4] == 0.0).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_official_code_decodes_with_our_statistics_as_we_do(method: str):
    statistics = measure(method)
    stated = statistics.official()
    low, high, mask = (np.array(stated[name]) for name in ("q01", "q99", "mask"))
    normalized = np.random.default_rng(0).uniform(-1.0, 1.0, (50, 8))
    official = np.where(mask, 0.5 * (normalized + 1) * (high - low) + low, normalized)
    np.testing.assert_array_equal(official, statistics.denormalize(normalized))
    assert stated["mask"] == [True] * 7 + [False] and stated["mean"] == statistics.mean.tolist()


def test_a_dataset_is_an_entry_of_the_official_norm_stats():
    """Source: the keys of openvla-7b's config.json."""
    actions = make_actions()
    entry = DatasetStatistics.measure(actions, actions, NAMES, "q01_q99", {}, 12).official()
    assert entry.keys() == {"action", "proprio", "num_transitions", "num_trajectories"}
    assert (entry["num_transitions"], entry["num_trajectories"]) == (2000, 12)
    assert entry["action"].keys() == {"mean", "std", "min", "max", "q01", "q99", "mask"} == entry["proprio"].keys()
    assert entry["action"]["mask"] == [True] * 7 + [False] and entry["proprio"]["mask"] == [True] * 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("usual", [0.0, 0.25])
def test_an_event_that_one_frame_in_a_hundred_has_survives(method: str, usual: float):
    """q01_q99 erased it: q01 and q99 were one value, and both came back as that."""
    values = make_actions()
    values[:, 3] = usual
    values[5::200, 3], values[6::200, 3] = -1.0, 1.0
    statistics = measure(method, values)
    back = statistics.denormalize(statistics.normalize(values))
    np.testing.assert_allclose(back[:, 3], values[:, 3], rtol=0, atol=3e-8)
    low, high = (np.array(statistics.official()[name])[3] for name in ("q01", "q99"))
    normalized = statistics.normalize(values)[:, 3]
    np.testing.assert_allclose(0.5 * (normalized + 1) * (high - low) + low, values[:, 3], rtol=0, atol=3e-8)


def test_a_codec_of_before_decodes_as_it_did():
    """Its q01 and q99 are one value; what it learned was made with that."""
    content = measure("q01_q99").to_json()
    content["q01"][3] = content["q99"][3] = 0.5
    assert (Statistics.from_json(content).denormalize(np.array([[-1.0] * 8, [1.0] * 8]))[:, 3] == 0.5).all()


@pytest.mark.parametrize("method", METHODS)
def test_numbers_too_far_for_float32_are_refused(method: str):
    numbers = {name: np.array([0.0, 0.5]) for name in ("min", "max", "mean", "std", "q01", "q99")}
    numbers |= {"min": np.array([0.0, -1e300]), "max": np.array([1.0, 1e308]), "q99": np.array([1.0, 1e308])}
    with pytest.raises(UserError, match=r"'b' reaches -1e\+300\.\.1e\+308, which is too far for float32"):
        Statistics.of_numbers(numbers, 10, ["a", "b"], method)


@pytest.mark.parametrize("method", METHODS)
def test_the_gripper_passes_through(method: str):
    actions = make_actions()
    np.testing.assert_array_equal(measure(method).normalize(actions)[:, 7], actions[:, 7])


def test_values_beyond_the_training_data_are_clipped_to_its_bounds():
    statistics = measure()
    far = np.full((1, 8), 100.0)
    assert (statistics.normalize(far)[0, [0, 7]] == 1.0).all()
    assert statistics.outside(far).all()


@pytest.mark.parametrize("method", METHODS)
def test_json_gives_back_the_same_floats(method: str):
    statistics = measure(method)
    back = Statistics.from_json(json.loads(json.dumps(statistics.to_json())))
    assert back.to_json() == statistics.to_json()
    actions = make_actions()
    assert back.normalize(actions).tobytes() == statistics.normalize(actions).tobytes()
    assert back.mean.dtype == np.float64


def test_statistics_are_taken_in_float64():
    values = np.full((100_000, 8), 0.1, np.float32)  # a float32 sum is off in the fourth digit
    values[:, 7] = 1.0
    assert abs(measure(values=values).mean[0] - np.float64(np.float32(0.1))) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: np.where(np.arange(8) == 2, np.nan, a).astype(np.float32), "row 0 of 2000 is not finite"),
        (lambda a: a[:0], "no data"),
        (lambda a: a[:, :7], "7 dimensions but 8 names"),
        (lambda a: a * 3, "'gripper' passes through unnormalised"),
    ],
)
def test_bad_training_data_is_refused(change, message: str):
    with pytest.raises(UserError, match=message):
        measure(values=change(make_actions()))


def test_unknown_method_and_name_are_refused():
    with pytest.raises(UserError, match="mean_std, q01_q99, min_max"):
        measure("zscore")
    with pytest.raises(UserError, match="no dimension 'hand'"):
        Statistics.measure(make_actions(), NAMES, "mean_std", ["hand"])
