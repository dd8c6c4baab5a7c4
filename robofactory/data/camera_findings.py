"""What is wrong with the pictures of a dataset: each function says it in words, which are empty where nothing is."""

from collections.abc import Callable, Iterable

import numpy as np

from robofactory.data.pictures import ViewFacts
from robofactory.data.survey import Survey

BLANK_LEVELS = 8  # of 255, between the brightest part and the darkest: only sensor noise is to be seen; honest: 84
SAME_LEVELS = 2  # of 255, in every part of every picture: what compressing a picture twice may change; honest: 124
OWN_OVER_OTHER = 2.0  # a view that looks so much more like another one of the other episodes is not its own
REPEATED_SHARE = 0.05  # of the frames before which the arm moved; a camera at half the rate of the arm repeats 0.5


def name_episodes(indices: Iterable[int]) -> str:
    """As messages name them: the first five, and how many more."""
    listed = list(indices)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return f"episode{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed[:5]))}{more}"


def unreadable_image(facts: Survey) -> str:
    bad = [
        f"view {view!r} of episode {episode}: {each.unreadable}"
        for episode, pictures in facts.pictures.items()
        for view, each in pictures.views.items()
        if each.unreadable
    ]
    return f"{bad[0]}{f', and {len(bad) - 1} more' if bad[1:] else ''}" if bad else ""


def black_camera(facts: Survey) -> str:
    """In half of the pictures: an arm that hides everything does not do so for half an episode."""
    return _of_views(facts, lambda episode, each: _is_blank(each), "shows one colour")


def frozen_camera(facts: Survey) -> str:
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
    return "; ".join(f"view {view!r} {what} in {name_episodes(episodes)}" for view, episodes in bad.items())


def _is_blank(each: ViewFacts) -> bool:
    return each.contrast < BLANK_LEVELS


def repeated_frames(facts: Survey) -> str:
    bad = []
    for view in facts.views:
        seen = [pictures.views[view] for pictures in facts.pictures.values()]
        share = sum(each.repeated for each in seen) / max(1, sum(each.moved for each in seen))
        if share > REPEATED_SHARE:
            bad.append(f"{view!r} {share:.0%}")
    return f"pictures that are the one before although the arm moved: {', '.join(bad)}" if bad else ""


def duplicated_camera(facts: Survey) -> str:
    found: dict[tuple[str, str], list[int]] = {}
    for episode, pictures in facts.pictures.items():
        for pair, levels in pictures.apart.items():
            if levels <= SAME_LEVELS and not any(_is_blank(pictures.views[view]) for view in pair):
                found.setdefault(pair, []).append(episode)
    return "; ".join(f"views {a!r} and {b!r} show the same in {name_episodes(bad)}" for (a, b), bad in found.items())


def swapped_cameras(facts: Survey) -> str:
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
    return f"{name_episodes(bad)}: the views {', '.join(map(repr, sorted(odd)))} are exchanged" if bad else ""


def _nearest(look: np.ndarray, view: str, looks: dict[str, np.ndarray]) -> str:
    """What is shown: what this view showed so far, unless another look is much nearer."""
    if view not in looks:
        return view
    distances = {name: float(np.abs(look - other).mean()) for name, other in looks.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] * OWN_OVER_OTHER < distances[view] else view
