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

from robofactory.codec.statistics import Statistics, passes_well
from robofactory.data.camera_findings import (
    black_camera,
    duplicated_camera,
    frozen_camera,
    name_episodes,
    repeated_frames,
    swapped_cameras,
    unreadable_image,
)
from robofactory.data.survey import SKETCH_ROWS, Survey, survey
from robofactory.errors import UserError, did_you_mean

ERROR, WARNING, NOTE = "error", "warning", "note"

COPY_SHARE, COPY_FRAMES = 0.99, 10  # of at least so many frames with a new action; honest: 0.03
AGREE_CORRELATION = -0.5  # of the gripper's command and its measured opening; honest: 0.9
FAST_PER_S, SLOW_PER_S = 10.0, 3.0  # rad: no arm is faster; a Panda may turn at 2.6; honest: 1.9
JUMP_OVER_USUAL = 8.0  # a step over the median of all episodes' largest; honest: 9, where the median is tiny
STILL_SHARE = 0.3  # a third of the labels would say "stay", and greedy decoding then does; honest: 0.03
NOISE_SHARE = 1e-4  # of a dimension's size, or of the median span: an encoder of 16 bits resolves 1.5e-5 of a turn
STRETCH = 4.0  # the bins' reach over that of 98 % of the values; honest: at most 2.7
UNITS_RAD = 4 * np.pi  # twice what the widest joints turn: these are degrees
SHORT_SHARE = 0.1  # of the median length: a recording that was broken off; honest: 0.86
COPY_OF_EPISODE = 0.5  # of the sketch; honest: 1 of 32 rows at most
IRREGULAR_STEPS = 0.1  # a timestamp is off by this much of a step: a frame was dropped, or fps is another one


@dataclass(frozen=True)
class Finding:
    """name: of the kind, one of `KINDS`. what: one line, with the values. todo: one line.

    is_final: training refuses it in any case, so there is nothing to accept.
    """

    name: str
    level: str
    what: str
    todo: str
    is_final: bool = False


def find(facts: Survey) -> list[Finding]:
    """All findings, errors first."""
    judged = ((name, kind, kind.check(facts)) for name, kind in KINDS.items())
    return [Finding(name, kind.level, what, kind.todo, kind.is_final(facts)) for name, kind, what in judged if what]


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
            final = any(each.is_final for each in found)
            offer = "" if final else f", or train anyway with data.accept='[{', '.join(names)}]'"
            raise UserError(
                f"{directory}: {left[0].name}: {left[0].what}{others}; {left[0].todo}. See robofactory "
                f"inspect {directory}{offer}"
            )


# -------------------------------------------------------------------------------------------------------- the numbers


def _not_finite(facts: Survey) -> str:
    bad = {index: episode.not_finite for index, episode in enumerate(facts.episodes) if episode.not_finite}
    return f"{name_episodes(bad)}: NaN or infinity; the first: {next(iter(bad.values()))}" if bad else ""


def _length_mismatch(facts: Survey) -> str:
    problems = [*facts.problems, *(problem for episode in facts.episodes for problem in episode.problems)]
    more = f", and {len(problems) - 2} more" if len(problems) > 2 else ""
    return "; ".join(problems[:2]) + more


def _missing_episodes(facts: Survey) -> str:
    return facts.missing


def _action_equals_state(facts: Survey) -> str:
    bad, dims = _copied(facts, "equals_state")
    return f"{name_episodes(bad)}: the action is the state of the same frame, to the last digit ({dims})" if bad else ""


def _action_is_next_state(facts: Survey) -> str:
    bad, dims = _copied(facts, "equals_next_state")
    return f"{name_episodes(bad)}: the action is the state of the next frame, to the last digit ({dims})" if bad else ""


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


def _cannot_pass(facts: Survey) -> bool:
    """Whether a dimension that is to pass through unnormalised is refused by the codec."""
    passing = [facts.actions.names.index(name) for name in facts.passing if name in facts.actions.names]
    return not bool(passes_well(facts.actions.min[passing], facts.actions.max[passing]).all())


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
    return f"{name_episodes(sorted(bad))}: jumps; the largest is of {max(found)[1]}" if found else ""


def _idle_frames(facts: Survey) -> str:
    share = sum(episode.still for episode in facts.episodes) / facts.num_frames
    return f"in {share:.0%} of the frames the action is the one before" if share > STILL_SHARE else ""


def _outliers(facts: Survey) -> str:
    """Of the dimensions that are normalised; what moves in a few frames only is rare, not stretched."""
    statistics = facts.statistics()["mean_std"]
    reach, usual = 2 * statistics.scale, statistics.q99 - statistics.q01
    is_judged = statistics.normalized & (usual > 1e-6) & ~_is_rare(statistics)
    ratio = np.where(is_judged, reach / np.maximum(usual, 1e-6), 0.0)
    at = int(ratio.argmax())
    if ratio[at] <= STRETCH:
        return ""
    value, episode = _far_end(facts, at)
    return (
        f"{facts.actions.names[at]!r} goes to {value:.4g} in episode {episode}, so its bins are {ratio[at]:.1f} times as "
        f"wide as 98 % of the values need"
    )


def _rare_event(facts: Survey) -> str:
    """Where 98 % of the values are one and the same, q01_q99 takes the extremes; see `Statistics`."""
    statistics = facts.statistics()["mean_std"]
    bad = np.flatnonzero(statistics.normalized & _is_rare(statistics) & (statistics.q01 < statistics.q99))
    if not len(bad):
        return ""
    at, more = int(bad[0]), f", and {len(bad) - 1} more dimensions" if bad[1:].any() else ""
    value, episode = _far_end(facts, at)
    return (
        f"{facts.actions.names[at]!r} stays in {statistics.q01[at]:.4g}..{statistics.q99[at]:.4g} in 98 % of the frames and "
        f"goes to {value:.4g} in episode {episode}{more}: data.normalization=q01_q99 would clip that away"
    )


def _is_rare(statistics: Statistics) -> np.ndarray:
    """Dimensions that stay within one of 255 bins of their range but for 2 % of the frames."""
    span = statistics.max - statistics.min
    return (span > 0.0) & (statistics.q99 - statistics.q01 < span / 255.0)


def _far_end(facts: Survey, at: int) -> tuple[float, int]:
    """The extreme of a dimension that is farther from its mean, and the episode that holds it."""
    actions = facts.actions
    is_low = actions.mean[at] - actions.min[at] > actions.max[at] - actions.mean[at]
    value, episode = (actions.min, actions.low_episode) if is_low else (actions.max, actions.high_episode)
    return float(value[at]), int(episode[at])


def _noise_only(facts: Survey) -> str:
    """A dimension that moves hardly at all beside its own size, or beside what the others move by."""
    statistics = facts.statistics()["mean_std"]
    span = statistics.max - statistics.min
    moves = statistics.normalized & (span > 0.0)
    size = np.maximum(np.abs(statistics.max), np.abs(statistics.min))
    usual = np.median(span[moves]) if moves.sum() > 1 else 0.0
    bad = moves & (span < NOISE_SHARE * np.maximum(size, usual))
    names = [f"{name!r} ({span[at]:.2g})" for at, name in enumerate(statistics.names) if bad[at]]
    return (
        f"the action's {', '.join(names)} moves by no more than noise, and the bins of it are of that" if names else ""
    )


def _irregular_timestamps(facts: Survey) -> str:
    bad = {i: e.irregular for i, e in enumerate(facts.episodes) if abs(e.irregular - 1.0) > IRREGULAR_STEPS}
    if not bad:
        return ""
    episode, worst = max(bad.items(), key=lambda each: abs(each[1] - 1.0))
    return f"{name_episodes(bad)}: frames are not 1/{facts.description.fps} s apart; in episode {episode} {worst:.2f} times that"  # fmt: skip


def _constant_dimension(facts: Survey) -> str:
    still = facts.actions.min == facts.actions.max
    names = [repr(name) for name, is_still in zip(facts.actions.names, still, strict=True) if is_still]
    return f"the action's {', '.join(names)} never changes" if names else ""


# ------------------------------------------------------------------------------------------------------- the episodes


def _empty_instruction(facts: Survey) -> str:
    bad = [index for index, episode in enumerate(facts.episodes) if not episode.instruction.strip()]
    return f"{name_episodes(bad)}: no instruction" if bad else ""


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
    return f"{name_episodes(bad)}: shorter than a tenth of the median length, {np.median(lengths):.0f}" if bad else ""


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


# ---------------------------------------------------------------------------------------------------------- the kinds


@dataclass(frozen=True)
class Kind:
    """check: what is wrong, in words; empty when nothing is. is_final: as in `Finding`."""

    level: str
    check: Callable[[Survey], str]
    todo: str
    is_final: Callable[[Survey], bool] = lambda facts: False


def _always(facts: Survey) -> bool:
    return True


KINDS = {
    "not_finite": Kind(ERROR, _not_finite, "record or convert these episodes again", _always),
    "missing_episodes": Kind(ERROR, _missing_episodes, "convert, record or download the dataset again; a part of it was lost", _always),
    "length_mismatch": Kind(ERROR, _length_mismatch, "convert or record the dataset again; a part of it was lost or replaced"),
    "unreadable_image": Kind(ERROR, unreadable_image, "convert or record these episodes again", _always),
    "black_camera": Kind(ERROR, black_camera, "drop these episodes, or leave the view out of data.views"),
    "frozen_camera": Kind(ERROR, frozen_camera, "drop these episodes, or leave the view out of data.views"),
    "duplicated_camera": Kind(ERROR, duplicated_camera, "map each view to a camera of its own, or leave one out of data.views"),
    "swapped_cameras": Kind(ERROR, swapped_cameras, "convert these episodes again with the right camera for each view"),
    "action_equals_state": Kind(ERROR, _action_equals_state, "a policy would learn to repeat what it is given: if the state is the copy, train with model.use_proprio=false and accept this; if the action is, convert again with the commands"),
    "gripper_range": Kind(ERROR, _gripper_range, "convert it to -1 closed, +1 open, for instance 2 x - 1 of a gripper in [0, 1], or have it normalised with data.pass_through=[]", _cannot_pass),
    "gripper_inverted": Kind(ERROR, _gripper_inverted, "turn the sign of one of them: -1 is closed and +1 open in both"),
    "empty_instruction": Kind(ERROR, _empty_instruction, "give every episode its instruction", _always),
    "discontinuities": Kind(WARNING, _discontinuities, "look for dropped frames, two recordings in one episode, or angles that wrap around"),
    "idle_frames": Kind(WARNING, _idle_frames, "cut the pauses: a greedy policy that learned to wait does not stop waiting"),
    "repeated_frames": Kind(WARNING, repeated_frames, "record at the rate of the slowest camera, or thin the frames out to it"),
    "near_duplicate_episodes": Kind(WARNING, _near_duplicate_episodes, "keep one of each: held-out episodes that are in training too make val_loss worthless"),
    "outliers": Kind(WARNING, _outliers, "drop what is no demonstration there, or train with data.normalization=q01_q99, which clips 2 %"),
    "rare_event": Kind(WARNING, _rare_event, "if it is meant, train with data.normalization=mean_std or min_max; if it is a fault, drop these episodes"),
    "noise_only": Kind(WARNING, _noise_only, "omit it from the actions, as --action_key or what converts the data can, or make it one value: a policy would learn noise"),
    "irregular_timestamps": Kind(WARNING, _irregular_timestamps, "resample to one rate: a policy knows no other time than its steps"),
    "not_radians": Kind(WARNING, _not_radians, "convert degrees to radians; what executes the actions expects them"),
    "short_episodes": Kind(WARNING, _short_episodes, "drop recordings that were broken off"),
    "action_is_next_state": Kind(NOTE, _action_is_next_state, "these are no commands: an arm that lags behind its target will fall short of them"),
    "constant_dimension": Kind(NOTE, _constant_dimension, "nothing to do if it is meant to rest; it costs one token per action"),
    "instruction_variants": Kind(NOTE, _instruction_variants, "write the same task in the same words, unless that is meant as variety"),
}  # fmt: skip
