"""What is wrong with a dataset, and what to do about it: survey -> findings, the worst first.

Each kind has a name, and each threshold a reason. Errors ruin a policy without a word and stop training, unless the
recipe accepts them by name (`data.accept`); warnings cost something; notes are good to know. The expert's own
demonstrations have none: "honest" below is what 400 episodes of LiftBarrier were measured to be. Of 160 more, which
policies drove, two have a warning: the wrist turns by up to 0.24 rad in a step, 4.8 rad/s, as if something had hit it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robofactory.data.pictures import ViewFacts
from robofactory.data.survey import SKETCH_ROWS, Survey, survey
from robofactory.errors import UserError, did_you_mean

ERROR, WARNING, NOTE = "error", "warning", "note"

BLANK_LEVELS = 8  # of 255, between the brightest part and the darkest: only sensor noise is to be seen; honest: 84
SAME_LEVELS = 2  # of 255, in every part of every picture: what compressing a picture twice may change; honest: 124
OWN_OVER_OTHER = 2.0  # a view that looks so much more like another one of the other episodes is not its own
REPEATED_SHARE = 0.05  # of the frames before which the arm moved; a camera at half the rate of the arm repeats 0.5
COPY_SHARE, COPY_FRAMES = 0.99, 10  # of at least so many frames with a new action; honest: 0.03
AGREE_CORRELATION = -0.5  # of the gripper's command and its measured opening; honest: 0.9
FAST_PER_S, SLOW_PER_S = 10.0, 3.0  # rad: no arm is faster; a Panda may turn at 2.6; honest: 1.9
JUMP_OVER_USUAL = 8.0  # a step over the median of all episodes' largest; honest: 9, where the median is tiny
STILL_SHARE = 0.3  # a third of the labels would say "stay", and greedy decoding then does; honest: 0.03
STRETCH = 4.0  # the bins' reach over that of 98 % of the values; honest: at most 2.7
UNITS_RAD = 4 * np.pi  # twice what the widest joints turn: these are degrees
SHORT_SHARE = 0.1  # of the median length: a recording that was broken off; honest: 0.86
COPY_OF_EPISODE = 0.5  # of the sketch; honest: 1 of 32 rows at most
IRREGULAR_STEPS = 0.1  # a timestamp is off by this much of a step: a frame was dropped, or fps is another one


@dataclass(frozen=True)
class Finding:
    """name: of the kind, one of `KINDS`. what: one line, with the values. todo: one line."""

    name: str
    level: str
    what: str
    todo: str


def find(facts: Survey) -> list[Finding]:
    """All findings, errors first."""
    judged = ((name, kind, kind.check(facts)) for name, kind in KINDS.items())
    return [Finding(name, kind.level, what, kind.todo) for name, kind, what in judged if what]


def require_sound(
    directories: Iterable[Path], views: Sequence[str], accept: Sequence[str], pass_through: Sequence[str] | None = None
) -> None:
    """The door of training: a quick survey of each dataset, which reads all numbers and some pictures.

    Args:
        views: whose pictures are looked at; one that a dataset has not is the reader's to refuse.
        accept: names of the errors that do not stop training.
        pass_through: as in the recipe; None: the grippers, by their names.
    Raises:
        UserError: an error that is not accepted, or a name in `accept` that is none.
    """
    errors = [name for name, kind in KINDS.items() if kind.level == ERROR]
    for name in accept:
        if name not in errors:
            guess = did_you_mean(name, errors)
            raise UserError(f"data.accept: {name!r} is no error of a dataset{guess}; there are {', '.join(errors)}")
    for directory in directories:
        found = [
            each
            for each in find(survey(directory, views, pass_through=pass_through, is_quick=True))
            if each.level == ERROR
        ]
        names = [each.name for each in found]
        left = [each for each in found if each.name not in accept]
        if left:
            others = f" (also {', '.join(each.name for each in left[1:])})" if left[1:] else ""
            raise UserError(
                f"{directory}: {left[0].name}: {left[0].what}{others}; {left[0].todo}. See robofactory "
                f"inspect {directory}, or train anyway with data.accept='[{', '.join(names)}]'"
            )


# -------------------------------------------------------------------------------------------------------- the numbers


def _not_finite(facts: Survey) -> str:
    bad = {index: episode.not_finite for index, episode in enumerate(facts.episodes) if episode.not_finite}
    return f"{_episodes(bad)}: NaN or infinity; the first: {next(iter(bad.values()))}" if bad else ""


def _length_mismatch(facts: Survey) -> str:
    problems = [*facts.problems, *(problem for episode in facts.episodes for problem in episode.problems)]
    more = f", and {len(problems) - 2} more" if len(problems) > 2 else ""
    return "; ".join(problems[:2]) + more


def _action_equals_state(facts: Survey) -> str:
    bad, dims = _copied(facts, "equals_state")
    return f"{_episodes(bad)}: the action is the state of the same frame, to the last digit ({dims})" if bad else ""


def _action_is_next_state(facts: Survey) -> str:
    bad, dims = _copied(facts, "equals_next_state")
    return f"{_episodes(bad)}: the action is the state of the next frame, to the last digit ({dims})" if bad else ""


def _copied(facts: Survey, column: str) -> tuple[list[int], str]:
    """Episodes in which every joint that gets new actions is a copy, and the names of these joints."""
    bad, dims = [], np.zeros(len(facts.actions.names), bool)
    for index, episode in enumerate(facts.episodes):
        if len(episode.moving) == 0:
            continue  # actions and state are different things
        judged = (episode.moving >= COPY_FRAMES) & facts.actions.is_joint
        is_copy = judged & (getattr(episode, column) >= COPY_SHARE * episode.moving)
        if judged.any() and (is_copy == judged).all():
            bad.append(index)
            dims |= is_copy
    return bad, ", ".join(name for name, is_copy in zip(facts.actions.names, dims, strict=True) if is_copy)


def _gripper_range(facts: Survey) -> str:
    for at in [facts.actions.names.index(name) for name in facts.passing if name in facts.actions.names]:
        low, high = facts.actions.min[at], facts.actions.max[at]
        is_outside = low < -1.0 - 1e-6 or high > 1.0 + 1e-6
        if is_outside or (low < high and low * high >= 0.0):  # it moves, and never from open to closed
            return f"the action's {facts.actions.names[at]!r} is in [{low:.4g}, {high:.4g}]"
    return ""


def _gripper_inverted(facts: Survey) -> str:
    for at in np.flatnonzero(~facts.actions.is_joint):
        name = facts.actions.names[at]
        if name not in facts.state.names:
            continue
        commands, measured = facts.actions.sample[:, at], facts.state.sample[:, facts.state.names.index(name)]
        if commands.std() == 0.0 or measured.std() == 0.0:
            continue
        correlation = np.corrcoef(commands, measured)[0, 1]
        if correlation < AGREE_CORRELATION:
            return f"{name!r} opens in the state where the action closes it (correlation {correlation:.2f})"
    return ""


def _not_radians(facts: Survey) -> str:
    """Of actions and state alike."""
    for what, values in (("action", facts.actions), ("state", facts.state)):
        reach = np.maximum(np.abs(values.min), np.abs(values.max)) * values.is_joint
        if reach.max(initial=0.0) > UNITS_RAD:
            at = int(reach.argmax())
            return f"the {what}'s {values.names[at]!r} is in [{values.min[at]:.4g}, {values.max[at]:.4g}]"
    return ""


def _discontinuities(facts: Survey) -> str:
    """A measured arm cannot jump; a target that does so was not followed."""
    fps = facts.description.fps
    found: list[tuple[float, str]] = []
    bad = set()
    for what, values, column in (("action", facts.actions, "action_step"), ("state", facts.state, "state_step")):
        steps = np.stack([getattr(episode, column) for episode in facts.episodes]) * values.is_joint  # [episode, dim]
        usual = np.median(steps, axis=0)
        limits = np.clip(JUMP_OVER_USUAL * usual, SLOW_PER_S / fps, FAST_PER_S / fps)
        for episode, joint in np.argwhere(steps > limits).tolist():
            bad.add(episode)
            frame = getattr(facts.episodes[episode], f"{column}_at")[joint]
            step, name = steps[episode, joint], values.names[joint]
            around = ", a turn of 2 pi" if abs(step - 2 * np.pi) < 0.2 else ""
            found.append((step / limits[joint], f"{what} {name!r} by {step:.3g}{around}, behind frame {frame} of episode {episode}"))  # fmt: skip
    return f"{_episodes(sorted(bad))}: jumps; the largest is of {max(found)[1]}" if found else ""


def _idle_frames(facts: Survey) -> str:
    share = sum(episode.still for episode in facts.episodes) / facts.num_frames
    return f"in {share:.0%} of the frames the action is the one before" if share > STILL_SHARE else ""


def _outliers(facts: Survey) -> str:
    """Of the dimensions that are normalised; one that is the same in 98 % of the frames is rare, not stretched."""
    statistics = facts.statistics()["mean_std"]
    reach, usual = 2 * statistics.scale, statistics.q99 - statistics.q01
    ratio = np.where(statistics.normalized & (usual > 1e-6), reach / np.maximum(usual, 1e-6), 0.0)
    at = int(ratio.argmax())
    if ratio[at] <= STRETCH:
        return ""
    is_low = facts.actions.mean[at] - facts.actions.min[at] > facts.actions.max[at] - facts.actions.mean[at]
    value, episode = (
        (facts.actions.min[at], facts.actions.low_episode[at])
        if is_low
        else (facts.actions.max[at], facts.actions.high_episode[at])
    )
    return (
        f"{facts.actions.names[at]!r} goes to {value:.4g} in episode {episode}, so its bins are {ratio[at]:.1f} times as "
        f"wide as 98 % of the values need"
    )


def _irregular_timestamps(facts: Survey) -> str:
    bad = {i: e.irregular for i, e in enumerate(facts.episodes) if abs(e.irregular - 1.0) > IRREGULAR_STEPS}
    if not bad:
        return ""
    episode, worst = max(bad.items(), key=lambda each: abs(each[1] - 1.0))
    return f"{_episodes(bad)}: frames are not 1/{facts.description.fps} s apart; in episode {episode} {worst:.2f} times that"  # fmt: skip


def _constant_dimension(facts: Survey) -> str:
    still = facts.actions.min == facts.actions.max
    names = [repr(name) for name, is_still in zip(facts.actions.names, still, strict=True) if is_still]
    return f"the action's {', '.join(names)} never changes" if names else ""


# ------------------------------------------------------------------------------------------------------- the episodes


def _empty_instruction(facts: Survey) -> str:
    bad = [index for index, episode in enumerate(facts.episodes) if not episode.instruction.strip()]
    return f"{_episodes(bad)}: no instruction" if bad else ""


def _instruction_variants(facts: Survey) -> str:
    spellings: dict[str, set[str]] = {}
    for episode in facts.episodes:
        plain = " ".join(re.sub(r"[^\w\s]", " ", episode.instruction.lower()).split())
        spellings.setdefault(plain, set()).add(episode.instruction)
    several = [sorted(each) for each in spellings.values() if len(each) > 1]
    return "; ".join(" and ".join(map(repr, each)) for each in several[:3])


def _short_episodes(facts: Survey) -> str:
    lengths = [episode.length for episode in facts.episodes]
    limit = SHORT_SHARE * float(np.median(lengths))
    bad = [index for index, length in enumerate(lengths) if length < limit]
    return f"{_episodes(bad)}: shorter than a tenth of the median length, {np.median(lengths):.0f}" if bad else ""


def _near_duplicate_episodes(facts: Survey) -> str:
    first_with: dict[int, int] = {}  # hash of a frame -> the first episode that has it
    pairs = []
    for index, episode in enumerate(facts.episodes):
        votes: dict[int, int] = {}
        for row in episode.sketch.tolist():
            if row in first_with:
                votes[first_with[row]] = votes.get(first_with[row], 0) + 1
            first_with.setdefault(row, index)
        other = max(votes, key=lambda each: votes[each], default=None)
        enough = max(2, COPY_OF_EPISODE * min(SKETCH_ROWS, len(episode.sketch)))
        if other is not None and votes[other] >= enough:
            pairs.append(f"{index} is {other}")
    more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    return f"episodes with the frames of another: {', '.join(pairs[:5])}{more}" if pairs else ""


# ------------------------------------------------------------------------------------------------------- the pictures


def _unreadable_image(facts: Survey) -> str:
    bad = [
        f"view {view!r} of episode {episode}: {each.unreadable}"
        for episode, pictures in facts.pictures.items()
        for view, each in pictures.views.items()
        if each.unreadable
    ]
    return f"{bad[0]}{f', and {len(bad) - 1} more' if bad[1:] else ''}" if bad else ""


def _black_camera(facts: Survey) -> str:
    """In half of the pictures: an arm that hides everything does not do so for half an episode."""
    return _of_views(facts, lambda episode, each: _is_blank(each), "shows one colour")


def _frozen_camera(facts: Survey) -> str:
    def is_frozen(episode: int, each: ViewFacts) -> bool:
        return facts.episodes[episode].has_moved and not _is_blank(each) and each.change <= SAME_LEVELS

    return _of_views(facts, is_frozen, "shows the same picture while the arm moves")


def _of_views(facts: Survey, is_bad: Callable[[int, ViewFacts], bool], what: str) -> str:
    """The views that are bad in some episodes; where a picture does not decode, that is said already."""
    bad: dict[str, list[int]] = {}
    for episode, pictures in facts.pictures.items():
        for view, each in pictures.views.items():
            if each.unreadable is None and is_bad(episode, each):
                bad.setdefault(view, []).append(episode)
    return "; ".join(f"view {view!r} {what} in {_episodes(episodes)}" for view, episodes in bad.items())


def _is_blank(each: ViewFacts) -> bool:
    return each.contrast < BLANK_LEVELS


def _repeated_frames(facts: Survey) -> str:
    bad = []
    for view in facts.views:
        seen = [pictures.views[view] for pictures in facts.pictures.values()]
        share = sum(each.repeated for each in seen) / max(1, sum(each.moved for each in seen))
        if share > REPEATED_SHARE:
            bad.append(f"{view!r} {share:.0%}")
    return f"pictures that are the one before although the arm moved: {', '.join(bad)}" if bad else ""


def _duplicated_camera(facts: Survey) -> str:
    found: dict[tuple[str, str], list[int]] = {}
    for episode, pictures in facts.pictures.items():
        for pair, levels in pictures.apart.items():
            if levels <= SAME_LEVELS and not any(_is_blank(pictures.views[view]) for view in pair):
                found.setdefault(pair, []).append(episode)
    return "; ".join(f"views {a!r} and {b!r} show the same in {_episodes(bad)}" for (a, b), bad in found.items())


def _swapped_cameras(facts: Survey) -> str:
    """Compared with how each view looked so far, put right on the way; the fewer episodes are the swapped ones."""
    looks: dict[str, np.ndarray] = {}  # what is shown -> how it has looked lately
    orders: dict[tuple[str, ...], list[int]] = {}  # what the views show -> episodes
    for episode, pictures in facts.pictures.items():
        if any(each.unreadable for each in pictures.views.values()):
            continue
        now = {view: each.look.astype(float) for view, each in pictures.views.items()}
        shown = tuple(_nearest(look, view, looks) for view, look in now.items())
        if len(set(shown)) < len(shown):
            shown = tuple(now)  # two views that look like one: no exchange
        orders.setdefault(shown, []).append(episode)
        for name, look in zip(shown, now.values(), strict=True):
            looks[name] = look if name not in looks else 0.9 * looks[name] + 0.1 * look
    usual = max(orders, key=lambda each: len(orders[each]), default=())
    bad = sorted(episode for shown, episodes in orders.items() if shown != usual for episode in episodes)
    odd = {name for shown in orders for name, other in zip(shown, usual, strict=True) if name != other}
    return f"{_episodes(bad)}: the views {', '.join(map(repr, sorted(odd)))} are exchanged" if bad else ""


def _nearest(look: np.ndarray, view: str, looks: dict[str, np.ndarray]) -> str:
    """What is shown: what this view showed so far, unless another look is much nearer."""
    if view not in looks:
        return view
    distances = {name: float(np.abs(look - other).mean()) for name, other in looks.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] * OWN_OVER_OTHER < distances[view] else view


def _episodes(indices: Iterable[int]) -> str:
    listed = list(indices)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return f"episode{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed[:5]))}{more}"


# ---------------------------------------------------------------------------------------------------------- the kinds


@dataclass(frozen=True)
class Kind:
    """check: what is wrong, in words; empty when nothing is."""

    level: str
    check: Callable[[Survey], str]
    todo: str


KINDS = {
    "not_finite": Kind(ERROR, _not_finite, "record or convert these episodes again; training refuses them in any case"),
    "length_mismatch": Kind(ERROR, _length_mismatch, "convert or record the dataset again; a part of it was lost or replaced"),
    "unreadable_image": Kind(ERROR, _unreadable_image, "convert or record these episodes again"),
    "black_camera": Kind(ERROR, _black_camera, "drop these episodes, or leave the view out of data.views"),
    "frozen_camera": Kind(ERROR, _frozen_camera, "drop these episodes, or leave the view out of data.views"),
    "duplicated_camera": Kind(ERROR, _duplicated_camera, "map each view to a camera of its own, or leave one out of data.views"),
    "swapped_cameras": Kind(ERROR, _swapped_cameras, "convert these episodes again with the right camera for each view"),
    "action_equals_state": Kind(ERROR, _action_equals_state, "a policy would learn to repeat what it is given: if the state is the copy, train with model.use_proprio=false and accept this; if the action is, convert again with the commands"),
    "gripper_range": Kind(ERROR, _gripper_range, "convert it to -1 closed, +1 open, for instance 2 x - 1 of a gripper in [0, 1], or have it normalised with data.pass_through=[]"),
    "gripper_inverted": Kind(ERROR, _gripper_inverted, "turn the sign of one of them: -1 is closed and +1 open in both"),
    "empty_instruction": Kind(ERROR, _empty_instruction, "give every episode its instruction"),
    "discontinuities": Kind(WARNING, _discontinuities, "look for dropped frames, two recordings in one episode, or angles that wrap around"),
    "idle_frames": Kind(WARNING, _idle_frames, "cut the pauses: a greedy policy that learned to wait does not stop waiting"),
    "repeated_frames": Kind(WARNING, _repeated_frames, "record at the rate of the slowest camera, or thin the frames out to it"),
    "near_duplicate_episodes": Kind(WARNING, _near_duplicate_episodes, "keep one of each: held-out episodes that are in training too make val_loss worthless"),
    "outliers": Kind(WARNING, _outliers, "drop what is no demonstration there, or train with data.normalization=q01_q99, which clips 2 %"),
    "irregular_timestamps": Kind(WARNING, _irregular_timestamps, "resample to one rate: a policy knows no other time than its steps"),
    "not_radians": Kind(WARNING, _not_radians, "convert degrees to radians; what executes the actions expects them"),
    "short_episodes": Kind(WARNING, _short_episodes, "drop recordings that were broken off"),
    "action_is_next_state": Kind(NOTE, _action_is_next_state, "these are no commands: an arm that lags behind its target will fall short of them"),
    "constant_dimension": Kind(NOTE, _constant_dimension, "nothing to do if it is meant to rest; it costs a token an action"),
    "instruction_variants": Kind(NOTE, _instruction_variants, "write the same task in the same words, unless that is meant as variety"),
}  # fmt: skip
