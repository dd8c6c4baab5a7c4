"""Two evaluations on the same seeds, layout by layout: which is better, and how sure one can be."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from robofactory import settings
from robofactory.config import LOOK
from robofactory.errors import UserError
from robofactory.evaluation.results import Z_95, Evaluation
from robofactory.evaluation.wording import seeds_in_words

SIGNIFICANT = 0.05
POWER, Z_POWER = 0.8, 0.8416212335729143  # the usual chance to find what is there; the 80 % point of the normal
CONDITIONS = ("temperature", "simulator", "renderer", "device", "batch_size")  # of the protocol


@dataclass(frozen=True)
class Pairs:
    """How two evaluations, A and B, ended on the layouts that both played to the end."""

    both: int
    only_a: int
    only_b: int
    neither: int
    left_out: int  # layouts on which one of them crashed or timed out

    @property
    def count(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def p_value(self) -> float:
        return mcnemar(self.only_a, self.only_b)

    @property
    def is_significant(self) -> bool:
        return self.p_value < SIGNIFICANT

    @property
    def enough(self) -> int | None:
        """So many pairs would show the observed difference, in 8 of 10 tries; None where none was observed.

        Source: R. J. Connor, Sample size for testing differences in proportions for the paired-sample design,
        Biometrics 43 (1987), with the observed shares of pairs that differ in place of the true ones.
        """
        if self.only_a == self.only_b:
            return None
        differ, gain = (self.only_a + self.only_b) / self.count, abs(self.only_a - self.only_b) / self.count
        return math.ceil((Z_95 * math.sqrt(differ) + Z_POWER * math.sqrt(differ - gain**2)) ** 2 / gain**2)

    def sentence(self, a: str = "A", b: str = "B") -> str:
        """Plain words: "A better than B, p = 0.011, 50 pairs"."""
        if not self.count:
            return f"{a} and {b} have no pair to compare"
        p = f"p {'< 0.001' if self.p_value < 0.001 else f'= {self.p_value:.2g}'}, {self.count} pairs"
        if self.is_significant:
            better, worse = (a, b) if self.only_a > self.only_b else (b, a)
            return f"{better} better than {worse}, {p}"
        if self.enough is None:
            return f"{a} and {b} cannot be told apart, {p}; the same rate, so more of the same would not help"
        points = 100 * abs(self.only_a - self.only_b) / self.count
        return (
            f"{a} and {b} cannot be told apart, {p}; if they differ as observed ({points:.0f} points), about "
            f"{self.enough} pairs would show it in {10 * POWER:.0f} of 10 tries"
        )


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test, two-sided: how likely such a split, or a more uneven one, is between equals.

    Where only one succeeds, it is either with the same chance: twice the tail of a binomial of 1/2.
    Source: Q. McNemar, Psychometrika 12 (1947); the exact form as in scipy.stats.binomtest.
    """
    differ = only_a + only_b
    tail = sum(math.comb(differ, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**differ)


def pair_up(a: Evaluation, b: Evaluation) -> Pairs:
    """Layout by layout.

    Raises:
        UserError: they are no pairs: another task, scene, step limit or other seeds. The line names the difference.
    """
    if reason := other_layouts(a, b):
        raise UserError(f"no pairs: {reason}")
    other = {episode.seed: episode for episode in b.episodes}
    ended = [
        (one.is_success, other[one.seed].is_success)
        for one in a.episodes
        if one.is_judged and other[one.seed].is_judged
    ]
    return Pairs(
        both=ended.count((True, True)),
        only_a=ended.count((True, False)),
        only_b=ended.count((False, True)),
        neither=ended.count((False, False)),
        left_out=len(a.episodes) - len(ended),
    )


def other_layouts(a: Evaluation, b: Evaluation, names: tuple[str, str] = ("A", "B")) -> str | None:
    """Why they did not meet the same episodes: task, scene, step limit or seeds; None: they did."""
    for name in ("task", "max_steps"):
        ours, theirs = getattr(a.protocol, name), getattr(b.protocol, name)
        if ours != theirs:
            return f"{name} is {ours} in {names[0]} and {theirs} in {names[1]}"
    ours, theirs = scene_keys(a.protocol.scene), scene_keys(b.protocol.scene)
    for key in [*ours, *theirs]:
        if not _is_look(key) and (ours.get(key) != theirs.get(key) or (key in ours) != (key in theirs)):
            return f"{key} of the scene is {ours.get(key)} in {names[0]} and {theirs.get(key)} in {names[1]}"
    if a.seeds != b.seeds:
        most = max(a, b, key=lambda each: len(each.seeds)).protocol
        return (
            f"{names[0]} played seeds {seeds_in_words(a.seeds)}, {names[1]} {seeds_in_words(b.seeds)}; evaluate both with "
            f"the same --seed and --episodes (and without --until), for instance {most.first_seed} and {most.num_episodes}"
        )
    return None


def not_the_same(a: Evaluation, b: Evaluation, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """What else was not the same and might matter beside the policies: the look, the software, the machine."""
    ours, theirs = scene_keys(a.protocol.scene), scene_keys(b.protocol.scene)
    mine = {key: value for key, value in ours.items() if _is_look(key)}
    mine |= {name: getattr(a.protocol, name) for name in CONDITIONS} | a.protocol.versions
    other = {name: getattr(b.protocol, name) for name in CONDITIONS} | b.protocol.versions
    other |= theirs
    return [
        f"{key} is {value} in {names[0]} and {other.get(key)} in {names[1]}"
        for key, value in mine.items()
        if value != other.get(key)
    ]


def is_ablation_of(baseline: Evaluation, ablated: Evaluation) -> bool:
    """The same policies, scene and seeds, but for the ablation."""
    like_it = dataclasses.replace(
        baseline.protocol,
        ablation=ablated.protocol.ablation,
        num_episodes=ablated.protocol.num_episodes,
        until=ablated.protocol.until,
    )
    return not like_it.differences(ablated.protocol) and baseline.seeds == ablated.seeds


def scene_keys(scene: str) -> dict[str, Any]:
    """Every value of a scene's YAML under its dotted key.

    Raises:
        UserError: no YAML, or more than one that an evaluation writes.
    """

    def flat(value: Any, key: str) -> dict[str, Any]:
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        below = {k: v for name, each in entries for k, v in flat(each, f"{key}.{name}").items()}
        return below if isinstance(value, dict | list) else {key[1:]: value}

    return flat(settings.tree(scene, "the scene of an evaluation"), "")


def _is_look(key: str) -> bool:
    """A policy is shown what it was trained on, so this may differ."""
    return key.partition(".")[0] in (*LOOK, "assets_dir")
