import json

import numpy as np

from robofactory.codec.action_tokens import ActionTokens
from robofactory.codec.statistics import Statistics
from tests.official import PARITY

LLAMA = ActionTokens(vocab_size=32000)


def test_ends_of_the_range_have_the_official_ids():
    assert LLAMA.encode(np.array([1.0, -1.0, 5.0, -5.0])).tolist() == [31744, 31999, 31744, 31999]
    assert LLAMA.first_id == 31744


def test_the_two_lowest_ids_decode_alike():
    low, next_one = LLAMA.decode(np.array([31744, 31745]))
    assert low == next_one == 1 - 1 / 255


def test_every_value_comes_back_within_half_a_bin():
    values = np.concatenate([np.linspace(-1, 1, 100_001), LLAMA.edges])
    error = np.abs(LLAMA.decode(LLAMA.encode(values)) - values)
    assert error.max() <= LLAMA.half_bin + 1e-12
    assert error.max() > 0.99 * LLAMA.half_bin, "half_bin is larger than need be"


def test_larger_values_have_lower_ids_one_by_one():
    ids = LLAMA.encode(LLAMA.centers)
    assert (np.diff(ids) == -1).all() and len(ids) == 255


def test_an_id_that_is_no_action_decodes_as_the_nearest_one():
    assert LLAMA.decode(np.array([0, 32063])).tolist() == [LLAMA.centers[-1], LLAMA.centers[0]]


def test_decoding_equals_the_official_code():
    expected = json.loads((PARITY / "expected.json").read_text())
    norm_stats = json.loads((PARITY / "config.json").read_text())["norm_stats"]["lift_barrier"]["action"]
    q01, q99 = np.array(norm_stats["q01"]), np.array(norm_stats["q99"])
    unused = np.zeros(8)
    statistics = Statistics(
        "q01_q99", tuple("abcdefgh"), np.array(norm_stats["mask"]), q01 - 1, q99 + 1, unused, unused, q01, q99, 1
    )
    normalized = LLAMA.decode(np.array(expected["greedy_action_tokens"]))
    np.testing.assert_array_equal(normalized, expected["normalized_actions"])
    np.testing.assert_allclose(statistics.denormalize(normalized), expected["actions"], rtol=0, atol=1e-15)
