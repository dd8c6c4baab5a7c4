"""What was seen of the policies in the best and the worst episode, as a part of a page."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from robofactory.evaluation.looks import Looks, load, path_of
from robofactory.evaluation.results import EpisodeResult, Evaluation

TILE_PX = 168  # small pictures are enlarged to about this, by a whole factor
HOT, TINT = (0, 150, 255), 0.6  # RGB that no object has: of the patch that gets most, and how much of it there is
COLOURS = {"start": "#a7adb8", "proprio": "#8a5cd6", "text": "#d0558f", "actions before": "#8a7157"}
VIEW_COLOURS = ("#2f6bdf", "#15a06a", "#e08a2c", "#12a5bd", "#98a51c")  # of the views, again from the first after these
NOTE = """The share of attention that the action tokens pay to each part of the sequence, of all layers and heads alike
unless a layer is named; <i>start</i> is the first token, where attention rests that looks for nothing. Over the pictures,
as the policy saw them: the bluer a patch, the more of it, on one scale for all views of a step. Beside them: how likely
the policy found each of its 256 bins, each row as high as its likeliest; the line is the action it took. Angles are in
rad, the gripper is in [-1, 1]; an even spread over all bins has an entropy of 5.5 nats."""


def looks_section(directory: Path, evaluation: Evaluation) -> str:
    """Empty where no policy acts or no episode was judged."""
    learned = [agent for agent, path in enumerate(evaluation.protocol.checkpoints) if path is not None]
    if not learned or not evaluation.best_and_worst:
        return ""
    parts = [f"<h3>What the policies looked at, and how sure they were</h3><p class=note>{NOTE}</p>"]
    for called, episode in evaluation.best_and_worst.items():
        parts.append(f"<h4>{escape(called)} <span class=muted>seed {episode.seed}, {episode.steps} steps</span></h4>")
        parts += [_of_agent(directory, episode, agent) for agent in learned]
    return f"<div class=looks>{''.join(parts)}</div>"


def _of_agent(directory: Path, episode: EpisodeResult, agent: int) -> str:
    looks = load(path_of(directory, episode.seed, agent), episode.digest)
    if looks is None:
        return (
            f"<p class=muted>Nobody looked at agent {agent} in this episode. The command that evaluated it does when it is "
            "given again, and plays nothing else that is played.</p>"
        )
    legend = "".join(
        f"<span><b style='background:{colour}'></b>{escape(part)} {_percent(share)}</span>"
        for part, colour, share in zip(
            looks.parts, colours(looks.parts), looks.attention.mean(axis=(0, 1)).tolist(), strict=True
        )
    )
    moments = "".join(_moment(looks, index) for index in range(len(looks.moments)))
    return (
        f"<article class=card><h3>Agent {agent}</h3><p class=parts>{legend}</p><div class=shares>"
        f"{_over_steps(looks)}{_over_layers(looks)}</div>{moments}</article>"
    )


def colours(parts: Sequence[str]) -> list[str]:
    views = [part for part in parts if part not in COLOURS]
    return [COLOURS.get(part) or VIEW_COLOURS[views.index(part) % len(VIEW_COLOURS)] for part in parts]


# ---------------------------------------------------------------------------------------------------------- attention


def _over_steps(looks: Looks) -> str:
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
        title = f"<title>{escape(looks.parts[part])}</title>"
        drawn.append(f"<polygon fill='{colour}' points='{' '.join(above + below[::-1])}'>{title}</polygon>")
    for moment in looks.moments:
        x = np.interp(moment, steps, xs)
        drawn.append(f"<path class=moment d='M{x:.0f} 4V{height - bottom}'/>")
    drawn.append(f"<text x={left - 6} y=14 text-anchor=end>100 %</text>")
    drawn.append(f"<text x={left - 6} y={height - bottom} text-anchor=end>0</text>")
    drawn.append(f"<text x={left} y={height - 5}>step {steps[0]}</text>")
    drawn.append(f"<text x={width - 1} y={height - 5} text-anchor=end>step {looks.steps[-1]}</text>")
    return _figure("Over the episode (lines: the steps below)", width, height, drawn)


def _over_layers(looks: Looks) -> str:
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
            title = f"<title>layer {layer + 1}, {escape(part)}: {_percent(share)}</title>"
            drawn.append(
                f"<rect fill='{colour}' x={x:.1f} y={y:.1f} width={length:.2f} height={row - min(2, row / 4):.1f}>{title}</rect>"
            )
            x += length
        if row >= 12 or layer in (0, len(shares) - 1):
            drawn.append(f"<text x={left - 6} y={y + row / 2 + 3:.1f} text-anchor=end>layer {layer + 1}</text>")
    return _figure("In each layer, over all these steps", width, round(height), drawn)


def _figure(title: str, width: int, height: int, drawn: Sequence[str]) -> str:
    return (
        f"<figure><figcaption>{title}</figcaption><svg viewBox='0 0 {width} {height}' role=img "
        f"aria-label='attention: {title}'>{''.join(drawn)}</svg></figure>"
    )


# ------------------------------------------------------------------------------------------------------------ moments


def _moment(looks: Looks, index: int) -> str:
    """One step: the pictures with where the policy looked, and what it found likely."""
    (at,) = np.flatnonzero(looks.steps == looks.moments[index])
    shares = dict(zip(looks.parts, looks.attention[at].mean(axis=0).tolist(), strict=True))
    pictures = "".join(
        f"<figure><img alt='{escape(view, quote=True)} with heat' src='data:image/jpeg;base64,{_jpeg(heated)}'>"
        f"<figcaption>{escape(view)} {_percent(shares[view])}</figcaption></figure>"
        for view, heated in zip(looks.views, heat_over(looks.pictures[index], looks.heat[index]), strict=True)
    )
    return (
        f"<div class=moment><b>step {looks.moments[index]}</b><div class=seen>{pictures}</div>"
        f"{_distributions(looks, index)}</div>"
    )


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


def _jpeg(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()


def _distributions(looks: Looks, index: int) -> str:
    """One row for each action dimension: its bins from the lowest to the highest, and the one it chose."""
    width, left, right, row, top = 640, 170, 440, 24, 18
    height = top + row * len(looks.names)
    heads = {530: "action", 580: "p", 638: "nats"}
    drawn = [f"<text x={x} y=11 text-anchor=end>{head}</text>" for x, head in heads.items()]
    for dimension, name in enumerate(looks.names):
        values, shares = looks.values[dimension], looks.probabilities[index, dimension]
        chosen, base = looks.chosen[index, dimension], top + row * (dimension + 1) - 4
        xs = left + (np.arange(len(shares)) + 0.5) / len(shares) * (right - left)
        seen = np.flatnonzero(shares > shares.max() / 100)
        bars = "".join(f"M{xs[at]:.1f} {base}v{-(row - 8) * shares[at] / shares.max():.1f}" for at in seen)
        numbers = f"{values[chosen]:.3f}", f"{shares[chosen]:.2f}", f"{entropy_nats(shares):.2f}"
        drawn += [
            f"<path class=axis d='M{left} {base}H{right}'/><path class=bins d='{bars}'/>",
            f"<path class=chosen d='M{xs[chosen]:.1f} {base + 3}v{2 - row}'/>",
            f"<text x=0 y={base}>{escape(name)}</text>",
            f"<text x={left - 6} y={base} text-anchor=end>{values[0]:.2f}</text>",
            f"<text x={right + 6} y={base}>{values[-1]:.2f}</text>",
        ]
        for x, number in zip(heads, numbers, strict=True):
            drawn.append(f"<text class=number x={x} y={base} text-anchor=end>{number}</text>")
    return f"<svg class=bins viewBox='0 0 {width} {height}' role=img aria-label='probability of each bin'>{''.join(drawn)}</svg>"


def entropy_nats(probabilities: Float32[np.ndarray, " bins"]) -> float:
    some = probabilities[probabilities > 0]
    return float(-(some * np.log(some)).sum())


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"
