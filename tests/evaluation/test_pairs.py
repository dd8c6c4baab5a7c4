import dataclasses
import math

import pytest
from evaluation_samples import sample_evaluation, sample_scene
from scipy.stats import binom, binomtest

from robofactory.config import to_yaml
from robofactory.errors import UserError
from robofactory.evaluation import pairs
from robofactory.evaluation.pairs import Pairs, mcnemar, pair_up
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS, TIME_OUT, Evaluation


def with_protocol(evaluation: Evaluation, **changes) -> Evaluation:
    return dataclasses.replace(evaluation, protocol=dataclasses.replace(evaluation.protocol, **changes))


def test_mcnemars_p_is_that_of_a_fair_coin():
    for only_a in range(0, 30, 3):
        for only_b in range(1, 40, 4):
            expected = binomtest(only_a, only_a + only_b, 0.5).pvalue
            assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-12)
    assert mcnemar(5, 1) == 2 * 7 / 64  # by hand: 1 + 6 of 64 outcomes are as uneven to one side
    assert mcnemar(0, 0) == 1.0 and mcnemar(2000, 2000) == 1.0


def test_pairs_are_layouts_and_the_order_of_a_and_b_matters():
    a = sample_evaluation([SUCCESS, SUCCESS, SUCCESS, FAILURE, FAILURE, CRASH, SUCCESS])
    b = sample_evaluation([SUCCESS, FAILURE, FAILURE, SUCCESS, FAILURE, SUCCESS, TIME_OUT])
    assert pair_up(a, b) == Pairs(both=1, only_a=2, only_b=1, neither=1, left_out=2)
    assert pair_up(b, a) == Pairs(both=1, only_a=1, only_b=2, neither=1, left_out=2)


@pytest.mark.parametrize(
    ("counted", "sentence"),
    [
        (Pairs(29, 10, 1, 10, 0), "A better than B, p = 0.012, 50 pairs"),
        (Pairs(20, 0, 30, 0, 0), "B better than A, p < 0.001, 50 pairs"),
        (Pairs(40, 3, 3, 4, 0), "A and B cannot be told apart, p = 1, 50 pairs; the same rate, so more of the same would not help"),
        (Pairs(0, 0, 0, 0, 9), "A and B have no pair to compare"),
    ],
)  # fmt: skip
def test_the_sentence_is_plain(counted, sentence):
    assert counted.sentence() == sentence


def test_what_cannot_be_told_apart_says_how_many_pairs_would_do():
    """So many pairs find the difference with McNemar's exact test in about 8 of 10 tries: computed, pair by pair."""
    counted = Pairs(both=30, only_a=9, only_b=4, neither=7, left_out=0)
    assert counted.p_value > 0.05 and counted.enough is not None
    assert f"(10 points), about {counted.enough} pairs would show it in 8 of 10 tries" in counted.sentence()
    power = 0.0
    for num_differ in range(counted.enough + 1):
        unclear = [k for k in range(num_differ + 1) if mcnemar(k, num_differ - k) >= 0.05]
        found = 1 - binom.pmf(unclear, num_differ, 9 / 13).sum()
        power += binom.pmf(num_differ, counted.enough, 13 / 50) * found
    assert 0.75 < power < 0.82, power


def test_a_difference_without_exceptions_needs_fewer_pairs():
    assert math.isclose(Pairs(40, 5, 0, 5, 0).enough or 0, 77, abs_tol=1)  # (1.96 sqrt(.1) + .8416 sqrt(.09))^2 / .01
    assert (Pairs(40, 10, 5, 5, 0).enough or 0) > 2 * (Pairs(40, 5, 0, 5, 0).enough or 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "PickMeat-rf"}, "task is LiftBarrier-rf in A and PickMeat-rf in B"),
        ({"max_steps": 200}, "max_steps is 300 in A and 200 in B"),
        ({"scene": to_yaml(sample_scene("success.max_tilt_deg=5"))}, "success.max_tilt_deg of the scene is 10.0 in A and 5.0"),
        ({"scene": to_yaml(sample_scene("robots.1.yaw_deg=-80"))}, "robots.1.yaw_deg of the scene is -90.0 in A and -80.0"),
    ],
)  # fmt: skip
def test_other_layouts_are_no_pairs_and_the_difference_is_named(changes, message):
    a = sample_evaluation([SUCCESS, FAILURE])
    with pytest.raises(UserError, match=message) as caught:
        pair_up(a, with_protocol(a, **changes))
    assert "\n" not in str(caught.value)


def test_other_seeds_are_no_pairs():
    with pytest.raises(UserError, match=r"A played seeds 10000\.\.10001, B 10000\.\.10002; .*for instance 10000 and 3"):
        pair_up(sample_evaluation([SUCCESS] * 2), sample_evaluation([SUCCESS] * 3))


def test_another_look_or_machine_is_noted_and_compared_all_the_same():
    """A policy is shown pictures as it was trained on: to compare resolutions has to be possible."""
    a = sample_evaluation([SUCCESS, FAILURE])
    scene = sample_scene("visual_detail=low", "cameras.0.width=64", "lighting.ambient_rgb=[0.4, 0.4, 0.5]")
    b = with_protocol(a, scene=to_yaml(scene), versions={"torch": "2.15.0"}, device="cuda, another", simulator="gpu")
    assert pair_up(a, b).count == 2
    assert pairs.not_the_same(a, b) == [
        "cameras.0.width is 320 in A and 64 in B",
        "visual_detail is full in A and low in B",
        "lighting.ambient_rgb.2 is 0.4 in A and 0.5 in B",
        "simulator is cpu in A and gpu in B",
        "device is cpu, some chip, 1 threads in A and cuda, another in B",
        "torch is 2.14.1 in A and 2.15.0 in B",
    ]
    assert pairs.not_the_same(a, a) == []
