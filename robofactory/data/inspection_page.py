"""A survey and its findings as text for the terminal, and as one HTML file that opens from disk without a network."""

import io
from collections import Counter
from collections.abc import Sequence
from html import escape

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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
from robofactory.pages import document, picture, table

DRAWN = METHODS[0]  # the normalisation whose bins the histograms count: the default
BINS = ActionTokens(vocab_size=256)  # as the codec has them, without a vocabulary in front
FILM_FRAMES, FILM_PICTURE = 200, (240, 240)  # at most: of the film, and px of each view in it
STYLE = """
.finding{margin:.7rem 0;padding:.6rem .9rem;border-left:5px solid #888;background:#8881}
.finding.error{border-color:#cf4436}.finding.warning{border-color:#d9822b}.finding.note{border-color:#5b7fb8}
.finding b{margin-right:.5rem}.finding p{margin:.2rem 0 0;opacity:.75}figure{margin:1rem 0}figcaption{font-weight:600}
.film img{width:100%}
"""


def as_text(facts: Survey, found: Sequence[Finding]) -> str:
    """For the terminal: what it is, what the bins do to it, what is wrong with it."""
    lines = [f"{facts.directory.name}: {_contents(facts)}", f"  {_cameras_in_words(facts)}"]
    lines += [f'  {count} x "{instruction}"' for instruction, count in _instructions(facts)[:5]]
    rows = [_action_headings(), *_action_rows(facts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["", *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows), ""]
    lines += [f"{each.level}: {each.name}: {each.what}\n    {each.todo}" for each in found]
    return "\n".join([*lines, _verdict(found)])


def as_page(facts: Survey, found: Sequence[Finding]) -> str:
    """The same with figures, pictures and a film."""
    title = f"{facts.directory.name}: dataset"
    body = [
        f"<h1>{escape(facts.directory.name)}</h1><p>{escape(_contents(facts))}</p><p>{escape(_cameras_in_words(facts))}</p>",
        f"<h2>Findings</h2><p>{_verdict(found)}</p>",
        *(_finding(each) for each in found),
        "<h2>Actions</h2>" + table(_action_headings(), _action_rows(facts)),
        f"<p>A bin is the smallest difference a policy can say, in rad or, of the last dimension, in [-1, 1]. Clipped: the "
        f"share of the values beyond the bins. Drawn: how many values are in each of the {BINS.num_bins} bins of {DRAWN}, "
        "between the lines; below, how far the bins of each normalisation reach.</p>",
        _figure("Actions", draw_actions(facts)),
        "<h2>Measured state</h2>" + table(("dimension", "min", "1 %", "99 %", "max"), _range_rows(facts.state)),
        "<h2>Episodes</h2>" + _figure("Lengths", draw_lengths(facts)),
        table(("instruction", "episodes"), [(text, str(count)) for text, count in _instructions(facts)]),
        "<h2>Cameras</h2>" + table(("view", "size (px)", "brightness", "contrast", "repeated"), _camera_rows(facts)),
        "<p>Each row is an episode, from its first frame to its last.</p>",
    ]
    for view, rows in facts.sheets.items():
        body.append(
            f"<figure><figcaption>{escape(view)}</figcaption>{picture(view, draw_sheet(rows), 'jpeg')}</figure>"
        )
    episode = int(np.argsort([each.length for each in facts.episodes])[len(facts.episodes) // 2])
    film = draw_film(facts, episode)
    if film:
        views = escape(", ".join(facts.views))
        body.append(
            f"<h2>Episode {episode}: {views}</h2><div class=film>{picture(f'film of {views}', film, 'webp')}</div>"
        )
    body.append(f"<h2>Scene</h2><pre>{escape(facts.description.scene_yaml)}</pre>")
    return document(title, body, STYLE)


# -------------------------------------------------------------------------------------------------------------- words


def _contents(facts: Survey) -> str:
    lengths, d = [episode.length for episode in facts.episodes], facts.description
    still = sum(episode.still for episode in facts.episodes) / facts.num_frames
    return (
        f"{len(lengths)} episodes, {facts.num_frames} frames ({min(lengths)} to {max(lengths)} an episode, median "
        f"{np.median(lengths):.0f}) at {d.fps} fps, {facts.num_frames / d.fps / 60:.1f} minutes; {d.robot_type}, agent "
        f"{d.agent_id}, driven by {d.driver}; idle {still:.1%}; {_gripper_in_words(facts)}"
    )


def _gripper_in_words(facts: Survey) -> str:
    words = []
    for at in np.flatnonzero(~facts.actions.is_joint):
        values = facts.actions.sample[:, at]
        kinds = len(np.unique(values))
        closed = f"{(values < 0).mean():.0%} of the frames close it"
        words.append(f"{facts.actions.names[at]} in [{values.min():g}, {values.max():g}], {'two-valued' if kinds == 2 else f'{kinds} values'}, {closed}")  # fmt: skip
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


def _finding(each: Finding) -> str:
    return f"<div class='finding {each.level}'><b>{each.level}: {each.name}</b>{escape(each.what)}<p>{escape(each.todo)}</p></div>"  # fmt: skip


def _figure(title: str, data: bytes) -> str:
    return f"<figure>{picture(title, data)}</figure>"


# ------------------------------------------------------------------------------------------------------------ figures


def draw_actions(facts: Survey) -> bytes:
    """PNG: for each dimension, how many values are in each bin, the bins' edges, and each normalisation's reach."""
    statistics = facts.statistics()
    names = facts.actions.names
    figure, axes = plt.subplots(len(names), 1, figsize=(15, 1.9 * len(names)), squeeze=False, layout="constrained")
    for at, ax in enumerate(axes[:, 0]):
        _draw_dimension(ax, at, facts.actions.sample[:, at], statistics)
    return _png(figure)


def _draw_dimension(ax: Axes, at: int, values: np.ndarray, statistics: dict[str, Statistics]) -> None:
    drawn = statistics[DRAWN]
    low, high = drawn.bounds[:, at]
    if low == high:
        ax.text(0.5, 0.5, f"always {low:.4g}", transform=ax.transAxes, ha="center")
        ax.set(title=drawn.names[at], yticks=[])
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
    ax.set(title=f"{drawn.names[at]} ({unit}), {np.count_nonzero(counts)} of {BINS.num_bins - 1} bins used")
    ax.set(yticks=[0, top], ylim=(-0.62 * top, 1.05 * top))
    ax.margins(x=0.01)
    if at == 0:
        ax.legend(frameon=False, ncols=len(statistics), loc="lower right", bbox_to_anchor=(1.0, 1.0))


def draw_lengths(facts: Survey) -> bytes:
    """PNG: how many episodes are how long."""
    lengths = [episode.length for episode in facts.episodes]
    figure, ax = plt.subplots(figsize=(15, 2.2), layout="constrained")
    ax.hist(lengths, bins=min(60, max(lengths) - min(lengths) + 1), color="tab:blue")
    ax.set(xlabel="frames of an episode", ylabel="episodes")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    return stream.getvalue()


def draw_sheet(rows: dict[int, list[UInt8[np.ndarray, "_h _w 3"]]]) -> bytes:
    """JPEG: pictures side by side, one row an episode."""
    shapes = [each.shape for row in rows.values() for each in row] or [(1, 1)]  # where none could be decoded: black
    height, width = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    columns = max(1, *(len(row) for row in rows.values()))
    sheet = np.zeros((len(rows) * height, columns * width, 3), np.uint8)
    for top, row in enumerate(rows.values()):
        for left, image in enumerate(row):
            h, w = image.shape[:2]
            sheet[top * height : top * height + h, left * width : left * width + w] = image
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def draw_film(facts: Survey, episode: int) -> bytes | None:
    """Animated WebP: an episode in every view, as fast as it was; None where its pictures cannot be read."""
    keys = [lerobot.image_key(view) for view in facts.views]
    if not keys or any(each.unreadable for each in facts.pictures[episode].views.values()):
        return None
    columns = lerobot.read_parquet(lerobot.data_file(facts.directory, episode), keys)
    frames = []
    for row in range(min(FILM_FRAMES, len(columns))):
        parts = []
        for key in keys:
            part = Image.fromarray(decode_png(columns[key][row]["bytes"].as_py()))
            part.thumbnail(FILM_PICTURE)
            parts.append(part)
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
