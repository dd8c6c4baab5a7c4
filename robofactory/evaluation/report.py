"""Evaluations as text for the terminal and as one HTML file that opens from disk: no network, no file beside it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from robofactory.errors import UserError, shown
from robofactory.evaluation import checkpoints_report, looking_report, paired_report, wording
from robofactory.evaluation.results import EPISODES, SUMMARY, EpisodeResult, Evaluation, load
from robofactory.evaluation.wording import number, rate_in_words, seeds_in_words
from robofactory.files import write_atomically
from robofactory.html.curves import points_of, read_metrics
from robofactory.html.media import read_video
from robofactory.html.page import render
from robofactory.html.svg import drawing, element

MAX_POINTS = 300  # of a curve; more are averaged in groups
SMALLEST = 1e-12  # that a logarithmic axis shows
PANELS = {  # of a run's metrics.jsonl: title -> names of the curves
    "Cross-entropy per action token": ("train_loss", "val_loss"),
    "Action-token accuracy": ("action_accuracy", "val_action_accuracy"),
    "Mean absolute error (rad, log)": ("action_mae_rad", "val_action_mae_rad"),
    "Learning rate": ("lr",),
}


def as_text(evaluation: Evaluation) -> str:
    """The numbers of an evaluation in a few lines."""
    summary, protocol = evaluation.summary(), evaluation.protocol
    lines = [
        f"{protocol.task}, {protocol.checkpoint or 'expert'}: {protocol.title}; "
        f"seeds {seeds_in_words(evaluation.seeds)}, at most {protocol.max_steps} steps",
        f"  success              {rate_in_words(summary['success'])}",
        f"  success_robofactory  {rate_in_words(summary['success_robofactory'])}   (looser, for comparison only)",
        f"  steps                {number(summary['mean_steps_of_successes'], 0)} in a success, "
        f"{number(summary['mean_steps'], 0)} over all",
        f"  seconds per episode  {number(summary['mean_seconds'], 1)}",
    ]
    if summary["mean_policy_ms"] is not None:
        passes = number(summary["mean_passes_per_action"], 2)
        lines.append(
            f"  policy call          {summary['mean_policy_ms']:.0f} ms, {passes} passes through the language layers"
        )
    if evaluation.stopped is not None:
        lines.insert(2, f"  stopped early        {stopped_in_words(evaluation)}")
    if summary["failed_at"]:
        agents = "".join(f"{f'agent {agent}':>10}" for agent in range(len(protocol.drivers)))
        lines.append(f"  {'failed at':<19}{agents}")
        for stage, counts in summary["failed_at"].items():
            lines.append(f"    {stage:<17}" + "".join(f"{count:>10}" for count in counts))
    for title, key in {"failed because": "failed_because", "last phases": "failed_in_phases"}.items():
        lines += [f"  {title:<19}  {count} x {reason}" for reason, count in summary[key].items()]
    for title, count in {"CRASHED": summary["crashes"], "TIMED OUT": summary["timeouts"]}.items():
        if count:
            lines.append(f"  {title:<19}  {count} episodes, counted in no rate")
    lines += [f"    {count} x {reason}" for reason, count in summary["crashed_because"].items()]
    return "\n".join(map(shown, lines))


def stopped_in_words(evaluation: Evaluation) -> str:
    """Why it has no more episodes, and what that does to the interval (the tests compute it)."""
    return (
        f"the interval is within ±{evaluation.protocol.until:g} points; as it decides itself when to stop, it covers "
        "the true rate a little less often (±5, at the worst rate: 93 % of evaluations, 94 % of those of fixed length)"
    )


def write_report_of_root(root: Path, results: Path | None = None) -> Path:
    """`{root}/report.html` of all evaluations below a directory and of the runs their policies come from.

    Args:
        results: where the roots of all checkpoints of these runs lie, for success over checkpoints; None: omitted.
    """
    evaluations = sorted(
        (path.parent for path in root.glob(f"*/{SUMMARY}")), key=lambda p: (p.name != "all_agents", p.name)
    )
    loaded, unread = _load_all(evaluations)
    checkpoints = {path for _, evaluation in loaded for path in evaluation.protocol.checkpoints if path}
    runs = sorted({Path(path).parent for path in checkpoints})
    progress = "" if results is None else checkpoints_report.section(results, root, fewest=2)
    _write(root / "report.html", loaded, unread, runs, progress=progress)
    return root / "report.html"


def write_report(output_html: Path, evaluations: list[Path], runs: list[Path], lead: Markup | str = "") -> None:
    """One page of several evaluations (directories) and the training runs (directories) behind them.

    Everything is inside: videos and curves too. A run without `metrics.jsonl` is omitted; an evaluation that cannot be
    read is named. `lead` comes first.
    """
    _write(output_html, *_load_all(evaluations), runs, lead=lead)


def _load_all(directories: Sequence[Path]) -> tuple[list[tuple[Path, Evaluation]], list[str]]:
    """The evaluations in these directories, and why some cannot be read."""
    loaded, unread = [], []
    for directory in directories:
        try:
            loaded.append((directory, load(directory)))
        except UserError as error:
            unread.append(str(error))
    return loaded, unread


def _write(
    output_html: Path,
    loaded: Sequence[tuple[Path, Evaluation]],
    unread: Sequence[str],
    runs: Sequence[Path],
    lead: Markup | str = "",
    progress: Markup | str = "",
) -> None:
    metrics = [run / "metrics.jsonl" for run in runs if (run / "metrics.jsonl").is_file()]
    page = render(
        "evaluation/report.html",
        eyebrow="evaluation",
        title=", ".join(sorted({f"{e.protocol.task} · {e.protocol.checkpoint or 'expert'}" for _, e in loaded})),
        words=wording,
        evaluations=[_as_shown(directory, evaluation) for directory, evaluation in loaded],
        unread=unread,
        runs={path.parent.name: _curves(path) for path in metrics},
        lead=lead,
        progress=progress,
    )
    write_atomically(output_html, page)


# ------------------------------------------------------------------------------------------------------ evaluations


def _as_shown(directory: Path, evaluation: Evaluation) -> dict[str, Any]:
    """What the template needs of an evaluation beside itself."""
    protocol, summary = evaluation.protocol, evaluation.summary()
    on_top = evaluation.best_and_worst
    worst_first = [*(e for e in evaluation.episodes if not e.is_judged), *evaluation.best_to_worst[::-1]]
    reasons = summary["failed_because"] | {f"not judged: {k}": n for k, n in summary["crashed_because"].items()}
    return {
        "evaluation": evaluation,
        "summary": summary,
        "stopped": stopped_in_words(evaluation) if evaluation.stopped else "",
        "on_top": [_video(directory, episode, f"{title}, ") for title, episode in on_top.items()],
        "videos": [_video(directory, e) for e in worst_first if e.video and e not in on_top.values()],
        "reasons": reasons,
        "most": max(reasons.values(), default=1),
        "failed_at_heads": ["failed at", *(f"agent {agent}" for agent in range(len(protocol.drivers)))],
        "failed_at": [[stage, *counts] for stage, counts in summary["failed_at"].items()],
        "ablations": paired_report.ablations_section(evaluation, paired_report.ablations_of(directory, evaluation)),
        "looks": looking_report.looks_section(directory, evaluation),
        "measured": sorted({name for episode in evaluation.episodes for name in episode.measures}),
        "configuration": _configuration(evaluation),
    }


def _configuration(evaluation: Evaluation) -> dict[str, object]:
    protocol = evaluation.protocol
    return {
        "seeds": seeds_in_words(evaluation.seeds),
        "step limit": protocol.max_steps,
        "temperature": f"{protocol.temperature:g}" + (" (greedy)" if protocol.temperature == 0 else ""),
        "episodes in a batch": protocol.batch_size,
        "simulator": protocol.simulator,
        "renderer": protocol.renderer,
        "policies on": protocol.device,
        **{f"agent {agent}": _driver(protocol, agent) for agent in range(len(protocol.drivers))},
        **protocol.versions,
    }


def _driver(protocol: Any, agent: int) -> str:
    if protocol.checkpoints[agent] is None:
        return "scripted expert"
    weights, codec = protocol.weights[agent][:12], protocol.fingerprints[agent][:12]
    return f"{protocol.checkpoints[agent]}, weights {weights}, codec {codec}"


def _video(directory: Path, episode: EpisodeResult, called: str = "") -> dict[str, Any]:
    """The film of an episode, or why there is none."""
    data, instead = None, "No video of it was kept; --videos says how many are."
    if episode.video is not None:
        try:
            data = read_video(directory, episode.video, directory / EPISODES)
        except UserError as error:
            instead = f"Its video is not shown: {error}"
    return {"episode": episode, "called": called, "data": data, "instead": instead}


# ----------------------------------------------------------------------------------------------------------- curves


def _curves(metrics: Path) -> dict[str, Markup]:
    """A run's curves as small drawings, by title; what is not a number (a loss that blew up) is omitted."""
    lines, panels = read_metrics(metrics), {}
    for title, names in PANELS.items():
        curves = [(("val" if name.startswith("val_") else "train"), _points(lines, name)) for name in names]
        curves = [(kind, points) for kind, points in curves if points]
        if curves:
            panels[title] = _svg(title, curves, is_log="log" in title)
    return panels


def _points(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    points = points_of(lines, name)
    group = -(-len(points) // MAX_POINTS) or 1
    groups = [points[start : start + group] for start in range(0, len(points), group)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in groups]


def _svg(title: str, curves: list[tuple[str, list[tuple[float, float]]]], is_log: bool) -> Markup:
    width, height, left, right, top, bottom = 360, 200, 50, 12, 10, 24
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points if y >= SMALLEST or not is_log]
    if not ys:
        return Markup("")
    marks = _marks(min(ys), max(ys), is_log)
    scale = math.log10 if is_log else float
    y_low, y_high, x_high = scale(marks[0]), scale(marks[-1]), max(*xs, 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + x / x_high * (width - left - right)
        return across, height - bottom - (scale(y) - y_low) / (y_high - y_low) * (height - top - bottom)

    drawn = []
    for mark in marks:
        _, level = at(0.0, mark)
        drawn.append(element("path", class_="grid", d=f"M{left} {level:.1f}H{width - right}"))
        drawn.append(element("text", f"{mark:.4g}", x=left - 6, y=level + 4, text_anchor="end"))
    drawn.append(element("text", "0", x=left, y=height - 6))
    drawn.append(element("text", f"step {x_high:.0f}", x=width - right, y=height - 6, text_anchor="end"))
    for kind, points in curves:
        places = [at(x, y) for x, y in points if y >= SMALLEST or not is_log]
        drawn.append(element("polyline", class_=kind, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places)))
        if kind == "val":
            drawn += [element("circle", class_="val", r=2.6, cx=x, cy=y) for x, y in places]
    return drawing(width, height, title, *drawn)


def _marks(low: float, high: float, is_log: bool) -> list[float]:
    """Round numbers from at most `low` to at least `high`; at least two."""
    if is_log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return [10.0**power for power in range(first, max(last, first + 1) + 1)]
    rough = max((high - low) / 3, 1e-9 * abs(high)) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]
