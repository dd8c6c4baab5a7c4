"""A survey and its findings as text for the terminal, and as one HTML file that opens from disk without a network."""

import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from robofactory.codec.action_tokens import ActionTokens
from robofactory.codec.statistics import METHODS, Statistics
from robofactory.data import lerobot
from robofactory.data.episodes import decode_png
from robofactory.data.findings import ERROR, NOTE, WARNING, Finding
from robofactory.data.survey import Spread, Survey
from robofactory.errors import brief, shown
from robofactory.html import plots
from robofactory.html.page import render

DRAWN = METHODS[0]  # the normalisation whose bins the histograms count: the default
BINS = ActionTokens(vocab_size=256)  # as the codec has them, without a vocabulary in front
MOST_DIMENSIONS = 100  # that are drawn: a picture has at most 65535 px
SHEET_PICTURE = (480, 480)  # px of each picture in a sheet, at most
FILM_FRAMES, FILM_PICTURE = 200, (240, 240)  # at most: of the film, and px of each view in it


def as_text(facts: Survey, found: Sequence[Finding]) -> str:
    """For the terminal: what it is, what the bins do to it, what is wrong with it."""
    lines = [f"{facts.directory.name}: {_contents(facts)}", f"  {_cameras_in_words(facts)}"]
    lines += [f'  {count} x "{instruction}"' for instruction, count in _instructions(facts)[:5]]
    rows = [[brief(cell, 40) for cell in row] for row in (_action_headings(), *_action_rows(facts))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["", *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows), ""]
    for each in found:
        lines += [f"{each.level}: {each.name}: {each.what}", f"    {each.todo}"]
    return "\n".join(map(shown, [*lines, _verdict(found)]))


def as_page(facts: Survey, found: Sequence[Finding]) -> str:
    """The same with figures, pictures and a film."""
    episode = int(np.argsort([each.length for each in facts.episodes])[len(facts.episodes) // 2])
    return render(
        "data/inspection.html",
        eyebrow="dataset",
        title=facts.directory.name,
        contents=_contents(facts),
        cameras=_cameras_in_words(facts),
        verdict=_verdict(found),
        found=found,
        action_heads=_action_headings(),
        actions=_action_rows(facts),
        drawn=DRAWN,
        actions_drawn=draw_actions(facts),
        state=_range_rows(facts.state),
        lengths_drawn=draw_lengths(facts),
        instructions=_instructions(facts),
        views=_camera_rows(facts),
        sheets={view: draw_sheet(rows) for view, rows in facts.sheets.items()},
        episode=episode,
        film=draw_film(facts, episode),
        film_of=", ".join(facts.views),
        scene=facts.description.scene_yaml,
    )


# -------------------------------------------------------------------------------------------------------------- words


def _contents(facts: Survey) -> str:
    lengths, d = [episode.length for episode in facts.episodes], facts.description
    still = sum(episode.still for episode in facts.episodes) / facts.num_frames
    return (
        f"{len(lengths)} episodes, {facts.num_frames} frames ({min(lengths)} to {max(lengths)} per episode, median "
        f"{np.median(lengths):.0f}) at {d.fps} fps, {facts.num_frames / d.fps / 60:.1f} minutes; {d.robot_type}, agent "
        f"{d.agent_id}, source: {d.driver}; idle {still:.1%}; {_gripper_in_words(facts)}"
    )


def _gripper_in_words(facts: Survey) -> str:
    words = []
    for at in np.flatnonzero(~facts.actions.is_joint):
        values = facts.actions.sample[:, at]
        kinds = len(np.unique(values))
        closed = f"{(values < 0).mean():.0%} of the frames close it"
        words.append(f"{facts.actions.names[at]} in [{values.min():g}, {values.max():g}], {'1 value' if kinds == 1 else 'two-valued' if kinds == 2 else f'{kinds} values'}, {closed}")  # fmt: skip
    return "; ".join(words) or "no gripper"


def _cameras_in_words(facts: Survey) -> str:
    sizes = {view: facts.description.image_sizes[view] for view in facts.views}
    return "views: " + ", ".join(f"{view} {width}x{height}" for view, (height, width) in sizes.items())


def _instructions(facts: Survey) -> list[tuple[str, int]]:
    return Counter(episode.instruction for episode in facts.episodes).most_common()


def _verdict(found: Sequence[Finding]) -> str:
    counts = Counter(each.level for each in found)
    return ", ".join(f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}" for level in (ERROR, WARNING, NOTE))


def _action_headings() -> list[str]:
    methods = [f"{what}, {method}" for what in ("bin", "clipped") for method in METHODS]
    return ["dimension", "min", "1 %", "99 %", "max", *methods]


def _action_rows(facts: Survey) -> list[list[str]]:
    statistics = facts.statistics().values()
    widths = [each.scale * 2.0 * BINS.half_bin for each in statistics]
    clipped = [each.outside(facts.actions.sample.astype(np.float64)).mean(0) for each in statistics]
    return [
        [*row, *(f"{width[at]:.5f}" for width in widths), *(f"{share[at]:.1%}" for share in clipped)]
        for at, row in enumerate(_range_rows(facts.actions))
    ]


def _range_rows(values: Spread) -> list[list[str]]:
    q01, q99 = np.quantile(values.sample.astype(np.float64), [0.01, 0.99], axis=0)
    columns = (values.min, q01, q99, values.max)
    return [[name, *(f"{column[at]:.4f}" for column in columns)] for at, name in enumerate(values.names)]


def _camera_rows(facts: Survey) -> list[list[str]]:
    rows = []
    for view in facts.views:
        seen = [pictures.views[view] for pictures in facts.pictures.values()]
        height, width = facts.description.image_sizes[view]
        brightness, contrast = (
            float(np.mean(each)) for each in ([s.look.mean() for s in seen], [s.contrast for s in seen])
        )
        repeated = sum(each.repeated for each in seen) / max(1, sum(each.moved for each in seen))
        rows.append([view, f"{width}x{height}", f"{brightness:.0f}", f"{contrast:.0f}", f"{repeated:.1%}"])
    return rows


# ------------------------------------------------------------------------------------------------------------ figures


def draw_actions(facts: Survey) -> bytes:
    """PNG: for each dimension, how many values are in each bin, the bins' edges, and each normalisation's reach."""
    statistics = facts.statistics()
    names = facts.actions.names[:MOST_DIMENSIONS]
    figure = Figure(figsize=(15, 1.9 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 1, squeeze=False)
    for at, ax in enumerate(axes[:, 0]):
        _draw_dimension(ax, at, facts.actions.sample[:, at], statistics)
    return plots.png(figure)


def _draw_dimension(ax: Axes, at: int, values: np.ndarray, statistics: dict[str, Statistics]) -> None:
    drawn = statistics[DRAWN]
    low, high = drawn.bounds[:, at]
    if not low < high:
        ax.text(0.5, 0.5, f"always {low:.4g}", transform=ax.transAxes, ha="center")
        ax.set(title=brief(drawn.names[at]), yticks=[])
        return
    edges = low + (BINS.edges + 1.0) / 2.0 * (high - low)
    counts, _ = np.histogram(np.clip(values, low, high), edges)
    top = max(1, int(counts.max()))
    ax.stairs(counts, edges, fill=True, color="tab:blue")
    ax.vlines(edges, 0, top, color="black", lw=0.3, alpha=0.35)
    for row, (method, each) in enumerate(statistics.items()):
        ends, level = each.bounds[:, at], -top * (0.14 + 0.16 * row)
        ax.plot(ends, [level, level], color=f"C{row + 1}", lw=2.5, marker="|", ms=9, label=method, clip_on=False)
    unit = "rad" if drawn.normalized[at] else "passed through"
    ax.set(title=f"{brief(drawn.names[at])} ({unit}), {np.count_nonzero(counts)} of {BINS.num_bins - 1} bins used")
    ax.set(yticks=[0, top], ylim=(-0.62 * top, 1.05 * top))
    ax.margins(x=0.01)
    if at == 0:
        ax.legend(frameon=False, ncols=len(statistics), loc="lower right", bbox_to_anchor=(1.0, 1.0))


def draw_lengths(facts: Survey) -> bytes:
    """PNG: how many episodes are how long."""
    lengths = [episode.length for episode in facts.episodes]
    figure = Figure(figsize=(15, 2.2), layout="constrained")
    ax = figure.subplots()
    ax.hist(lengths, bins=min(60, max(lengths) - min(lengths) + 1), color="tab:blue")
    ax.set(xlabel="frames of an episode", ylabel="episodes")
    return plots.png(figure)


def draw_sheet(rows: dict[int, list[UInt8[np.ndarray, "_h _w 3"]]]) -> bytes:
    """JPEG: pictures side by side, one row an episode."""
    small = [[_thumbnail(each, SHEET_PICTURE) for each in row] for row in rows.values()]
    sizes = [each.size for row in small for each in row] or [(1, 1)]  # where none could be decoded: black
    width, height = (max(size[axis] for size in sizes) for axis in (0, 1))
    sheet = Image.new("RGB", (max(1, *map(len, small)) * width, len(small) * height))
    for top, row in enumerate(small):
        for left, image in enumerate(row):
            sheet.paste(image, (left * width, top * height))
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=88)
    return stream.getvalue()


def _thumbnail(picture: UInt8[np.ndarray, "h w 3"], largest: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail(largest)
    return image


def draw_film(facts: Survey, episode: int) -> bytes | None:
    """Animated WebP: an episode in every view, as fast as it was; None where its pictures cannot be read."""
    keys = [lerobot.image_key(view) for view in facts.views]
    if not keys or any(each.unreadable for each in facts.pictures[episode].views.values()):
        return None
    columns = lerobot.read_parquet(lerobot.data_file(facts.directory, episode), keys)
    frames = []
    for row in range(min(FILM_FRAMES, len(columns))):
        parts = [_thumbnail(decode_png(columns[key][row]["bytes"].as_py()), FILM_PICTURE) for key in keys]
        frame = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)))
        left = 0
        for part in parts:
            frame.paste(part, (left, 0))
            left += part.width
        frames.append(frame)
    stream = io.BytesIO()
    first, *rest = frames
    first.save(stream, "WEBP", save_all=True, append_images=rest, duration=round(1000 / facts.description.fps), loop=0, quality=80)  # fmt: skip
    return stream.getvalue()
