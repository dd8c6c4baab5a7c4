"""What was seen of the policies in the best and the worst episode, as a part of a page."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from markupsafe import Markup
from PIL import Image

from robofactory.errors import brief
from robofactory.evaluation.looks import Looks, load, path_of
from robofactory.evaluation.results import EpisodeResult, Evaluation
from robofactory.html.page import render
from robofactory.html.svg import drawing, element

TILE_PX = 168  # small pictures are enlarged to about this, by a whole factor
HOT, TINT = (0, 150, 255), 0.6  # RGB that no object has: of the patch that gets most, and how much of it there is
COLOURS = {"start": "#a7adb8", "proprio": "#8a5cd6", "text": "#d0558f", "actions before": "#8a7157"}
VIEW_COLOURS = ("#2f6bdf", "#15a06a", "#e08a2c", "#12a5bd", "#98a51c")  # of the views, again from the first after these


def looks_section(directory: Path, evaluation: Evaluation) -> Markup | str:
    """Empty where no policy acts or no episode was judged."""
    learned = [agent for agent, path in enumerate(evaluation.protocol.checkpoints) if path is not None]
    if not learned or not evaluation.best_and_worst:
        return ""
    episodes = [
        (called, episode, {agent: _of_agent(directory, episode, agent) for agent in learned})
        for called, episode in evaluation.best_and_worst.items()
    ]
    return render("evaluation/looks.html", episodes=episodes)


def _of_agent(directory: Path, episode: EpisodeResult, agent: int) -> dict[str, Any] | None:
    looks = load(path_of(directory, episode.seed, agent), episode.digest)
    if looks is None:
        return None
    means = looks.attention.mean(axis=(0, 1)).tolist()
    return {
        "legend": {
            f"{part} {_percent(share)}": colour
            for part, colour, share in zip(looks.parts, colours(looks.parts), means, strict=True)
        },
        "over_steps": _over_steps(looks),
        "over_layers": _over_layers(looks),
        "moments": [_moment(looks, index) for index in range(len(looks.moments))],
    }


def colours(parts: Sequence[str]) -> list[str]:
    views = [part for part in parts if part not in COLOURS]
    return [COLOURS.get(part) or VIEW_COLOURS[views.index(part) % len(VIEW_COLOURS)] for part in parts]


# ---------------------------------------------------------------------------------------------------------- attention


def _over_steps(looks: Looks) -> Markup:
    """The shares over the episode, stacked."""
    width, height, left, bottom = 560, 150, 38, 20
    edges = np.cumsum(looks.attention.mean(axis=1), axis=1)  # [n, parts]
    edges = np.concatenate([np.zeros((len(edges), 1)), edges / edges[:, -1:]], axis=1)  # exactly 1, also in bfloat16
    steps = looks.steps if len(looks.steps) > 1 else np.array([0, 1])
    edges = edges if len(edges) > 1 else edges.repeat(2, axis=0)
    xs = left + (steps - steps[0]) / (steps[-1] - steps[0]) * (width - left - 1)
    ys = 4 + edges * (height - bottom - 4)  # the first part on top, as in the legend
    drawn = []
    for part, colour in enumerate(colours(looks.parts)):
        above = [f"{x:.0f},{y:.1f}" for x, y in zip(xs, ys[:, part], strict=True)]
        below = [f"{x:.0f},{y:.1f}" for x, y in zip(xs, ys[:, part + 1], strict=True)]
        title = element("title", looks.parts[part])
        drawn.append(element("polygon", title, fill=colour, points=" ".join(above + below[::-1])))
    for moment in looks.moments:
        x = np.interp(moment, steps, xs)
        drawn.append(element("path", class_="moment", d=f"M{x:.0f} 4V{height - bottom}"))
    drawn.append(element("text", "100 %", x=left - 6, y=14, text_anchor="end"))
    drawn.append(element("text", "0", x=left - 6, y=height - bottom, text_anchor="end"))
    drawn.append(element("text", f"step {steps[0]}", x=left, y=height - 5))
    drawn.append(element("text", f"step {looks.steps[-1]}", x=width - 1, y=height - 5, text_anchor="end"))
    return drawing(width, height, "attention over the episode", *drawn)


def _over_layers(looks: Looks) -> Markup:
    """The shares in each layer, mean over the episode."""
    shares = looks.attention.mean(axis=0)  # [layers, parts]
    shares = shares / shares.sum(axis=1, keepdims=True)
    width, left, bottom, row = 400, 52, 20, max(4.0, min(30.0, 126 / len(shares)))
    height = 4 + row * len(shares) + bottom
    drawn = []
    for layer, parts in enumerate(shares):
        y, x = 4 + row * layer, float(left)
        for part, colour, share in zip(looks.parts, colours(looks.parts), parts.tolist(), strict=True):
            length = share * (width - left)
            title = element("title", f"layer {layer + 1}, {part}: {_percent(share)}")
            drawn.append(element("rect", title, fill=colour, x=x, y=y, width=length, height=row - min(2.0, row / 4)))
            x += length
        if row >= 12 or layer in (0, len(shares) - 1):
            drawn.append(element("text", f"layer {layer + 1}", x=left - 6, y=y + row / 2 + 3, text_anchor="end"))
    return drawing(width, round(height), "attention in each layer", *drawn)


# ------------------------------------------------------------------------------------------------------------ moments


def _moment(looks: Looks, index: int) -> dict[str, Any]:
    """One step: the pictures with where the policy looked, and what it found likely."""
    (at,) = np.flatnonzero(looks.steps == looks.moments[index])
    shares = dict(zip(looks.parts, looks.attention[at].mean(axis=0).tolist(), strict=True))
    heated = heat_over(looks.pictures[index], looks.heat[index])
    return {
        "step": looks.moments[index],
        "views": [(view, _percent(shares[view]), _jpeg(each)) for view, each in zip(looks.views, heated, strict=True)],
        "distributions": _distributions(looks, index),
    }


def heat_over(
    pictures: UInt8[np.ndarray, "v h w 3"], heat: Float32[np.ndarray, "v grid grid"]
) -> list[UInt8[np.ndarray, "_h _w 3"]]:
    """Each picture, enlarged, with its patches the bluer the more attention they get; the scale is that of all views."""
    size = pictures.shape[1] * max(1, round(TILE_PX / pictures.shape[1]))
    heated = []
    for picture, of_patches in zip(pictures, heat / max(heat.max(), 1e-12), strict=True):
        large = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC), np.float32)
        places = np.arange(size) * len(of_patches) // size  # the patch of each row and column
        strength = of_patches[places][:, places, None] * TINT
        heated.append(((1 - strength) * large + strength * np.array(HOT, np.float32)).astype(np.uint8))
    return heated


def _jpeg(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=85)
    return data.getvalue()


def _distributions(looks: Looks, index: int) -> Markup:
    """One row for each action dimension: its bins from the lowest to the highest, and the one it chose."""
    width, left, right, row, top = 640, 170, 440, 24, 18
    height = top + row * len(looks.names)
    heads = {530: "action", 580: "p", 638: "nats"}
    drawn = [element("text", head, x=x, y=11, text_anchor="end") for x, head in heads.items()]
    for dimension, name in enumerate(looks.names):
        values, shares = looks.values[dimension], looks.probabilities[index, dimension]
        chosen, base = looks.chosen[index, dimension], top + row * (dimension + 1) - 4
        xs = left + (np.arange(len(shares)) + 0.5) / len(shares) * (right - left)
        seen = np.flatnonzero(shares > shares.max() / 100)
        bars = "".join(f"M{xs[at]:.1f} {base}v{-(row - 8) * shares[at] / shares.max():.1f}" for at in seen)
        numbers = f"{values[chosen]:.3f}", f"{shares[chosen]:.2f}", f"{entropy_nats(shares):.2f}"
        drawn += [
            element("path", class_="axis", d=f"M{left} {base}H{right}"),
            element("path", class_="bins", d=bars),
            element("path", class_="chosen", d=f"M{xs[chosen]:.1f} {base + 3}v{2 - row}"),
            element("text", brief(name, 20), x=0, y=base),
            element("text", f"{values[0]:.2f}", x=left - 6, y=base, text_anchor="end"),
            element("text", f"{values[-1]:.2f}", x=right + 6, y=base),
        ]
        for x, said in zip(heads, numbers, strict=True):
            drawn.append(element("text", said, class_="number", x=x, y=base, text_anchor="end"))
    return drawing(width, height, "probability of each bin", *drawn, class_="bins")


def entropy_nats(probabilities: Float32[np.ndarray, " bins"]) -> float:
    some = probabilities[probabilities > 0]
    return float(-(some * np.log(some)).sum())


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"
