"""Evaluations as text for the terminal and as one HTML file that opens from disk: no network, no file beside it."""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from robofactory.evaluation import checkpoints_report, looking_report, paired_report
from robofactory.evaluation.page import page
from robofactory.evaluation.results import SUMMARY, EpisodeResult, Evaluation, load
from robofactory.evaluation.wording import interval_in_words, number, rate_in_words, seeds_in_words, table_html
from robofactory.files import write_atomically

MAX_POINTS = 300  # of a curve; more are averaged in groups
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
    return "\n".join(lines)


def stopped_in_words(evaluation: Evaluation) -> str:
    """Why it has no more episodes, and what that does to the interval (the tests compute it)."""
    return (
        f"the interval is within ±{evaluation.protocol.until:g} points; as it decides itself when to stop, it covers "
        "the true rate a little less often (±5, at the worst rate: 93 % of evaluations, 94 % of those of fixed length)"
    )


def write_report_of_root(root: Path, results: Path | None = None) -> Path:
    """`{root}/report.html` of all evaluations below a directory and of the runs their policies come from.

    Args:
        results: where the roots of all checkpoints of these runs lie, for success over checkpoints; None: left away.
    """
    evaluations = sorted(
        (path.parent for path in root.glob(f"*/{SUMMARY}")), key=lambda p: (p.name != "all_agents", p.name)
    )
    checkpoints = {path for directory in evaluations for path in load(directory).protocol.checkpoints if path}
    runs = sorted({Path(path).parent for path in checkpoints})
    progress = "" if results is None else checkpoints_report.section(results, root, fewest=2)
    write_report(root / "report.html", evaluations, runs, progress=progress)
    return root / "report.html"


def write_report(
    output_html: Path, evaluations: list[Path], runs: list[Path], lead: str = "", progress: str = ""
) -> None:
    """One page of several evaluations (directories) and the training runs (directories) behind them.

    Everything is inside: videos and curves too. A run without `metrics.jsonl` is left out. `lead` (HTML) comes first,
    `progress` before the curves.
    """
    loaded = [(directory, load(directory)) for directory in evaluations]
    names = sorted({f"{e.protocol.task} · {e.protocol.checkpoint or 'expert'}" for _, e in loaded})
    metrics = [run / "metrics.jsonl" for run in runs if (run / "metrics.jsonl").is_file()]
    body = [
        lead,
        "<section class=cards>",
        *(_card(index, evaluation) for index, (_, evaluation) in enumerate(loaded)),
        "</section>",
        "<p class=note>Bars: success rate, the bracket is its 95 % interval (Wilson). Success is the task's honest "
        "test; RoboFactory's own can be passed by one arm alone and is shown for comparison only.</p>",
        _best_and_worst(loaded),
        progress,
    ]
    if metrics:
        body += ["<section><h2>Training</h2>", *(_curves(path) for path in metrics), "</section>"]
    body += [_details(index, directory, evaluation) for index, (directory, evaluation) in enumerate(loaded)]
    write_atomically(output_html, page(", ".join(names), body))


# ------------------------------------------------------------------------------------------------------ evaluations


def _card(index: int, evaluation: Evaluation) -> str:
    summary = evaluation.summary()
    success = summary["success"]
    rate = "–" if success["rate"] is None else f"{100 * success['rate']:.0f}<small>%</small>"
    facts = {
        "steps in a success": number(summary["mean_steps_of_successes"], 0),
        "seconds per episode": number(summary["mean_seconds"], 1),
        "ms per policy call": number(summary["mean_policy_ms"], 0),
        "passes per action": number(summary["mean_passes_per_action"], 2),
        "crashes, time-outs": f"{summary['crashes']}, {summary['timeouts']}",
    }
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    unfinished = (
        "" if evaluation.is_complete else f" <b class=warn>(interrupted: {len(evaluation.episodes)} played)</b>"
    )
    early = "" if evaluation.stopped is None else f"<p class=muted>Stopped early: {stopped_in_words(evaluation)}.</p>"
    return (
        f"<article class=card><h3><a href='#evaluation{index}'>{escape(evaluation.protocol.title)}</a>{unfinished}</h3>"
        f"<div class=big>{rate}</div><p class=muted>{success['count']} of {success['of']} unseen seeds"
        f"{interval_in_words(success)}</p>{_bar(success, 'ok')}"
        f"<p class=muted>RoboFactory's test: {summary['success_robofactory']['count']} of {success['of']}</p>"
        f"{_bar(summary['success_robofactory'], 'other')}{early}<dl>{listed}</dl></article>"
    )


def _bar(rate: dict[str, Any], kind: str) -> str:
    if rate["rate"] is None:
        return ""
    low, high = (100 * bound for bound in rate["interval_95"])
    return (
        f"<div class='bar {kind}' role=img aria-label='{100 * rate['rate']:.0f} percent, {low:.0f} to {high:.0f}'>"
        f"<i style='width:{100 * rate['rate']:.2f}%'></i>"
        f"<b style='left:{low:.2f}%;width:{high - low:.2f}%'></b></div>"
    )


def _best_and_worst(loaded: Sequence[tuple[Path, Evaluation]]) -> str:
    """The videos of these two episodes of each evaluation."""
    parts = []
    for directory, evaluation in loaded:
        if called := evaluation.best_and_worst:
            videos = "".join(_video(directory, episode, f"{title}, ") for title, episode in called.items())
            parts.append(f"<h3>{escape(evaluation.protocol.title)}</h3><div class=videos>{videos}</div>")
    return f"<section><h2>Best and worst</h2>{''.join(parts)}</section>" if parts else ""


def _details(index: int, directory: Path, evaluation: Evaluation) -> str:
    protocol, summary = evaluation.protocol, evaluation.summary()
    strip = "".join(
        f"<i class={e.outcome} title='seed {e.seed}: {escape(e.reason or e.outcome, quote=True)}'></i>"
        for e in evaluation.episodes
    )
    reasons = {**summary["failed_because"], **{f"not judged: {k}": n for k, n in summary["crashed_because"].items()}}
    largest = max(reasons.values(), default=1)
    why = "".join(
        f"<li><span>{escape(reason)}</span><i style='width:{100 * count / largest:.0f}%'></i><b>{count}</b></li>"
        for reason, count in reasons.items()
    )
    on_top = list(evaluation.best_and_worst.values())
    worst_first = [*(e for e in evaluation.episodes if not e.is_judged), *evaluation.best_to_worst[::-1]]
    videos = "".join(_video(directory, e) for e in worst_first if e.video and e not in on_top)
    configuration = {
        "seeds": seeds_in_words(evaluation.seeds),
        "step limit": protocol.max_steps,
        "temperature": f"{protocol.temperature:g}" + (" (greedy)" if protocol.temperature == 0 else ""),
        "episodes in a batch": protocol.batch_size,
        "simulator": protocol.simulator,
        "renderer": protocol.renderer,
        "policies on": protocol.device,
        **{f"agent {k}": _driver(protocol, k) for k in range(len(protocol.drivers))},
        **protocol.versions,
    }
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in configuration.items())
    return (
        f"<section id=evaluation{index}><h2>{escape(protocol.title)}</h2><div class=strip>{strip}</div>"
        + (f"<h3>Why the others failed</h3>{_failed_at(summary['failed_at'])}<ul class=why>{why}</ul>" if why else "")
        + paired_report.ablations_section(evaluation, paired_report.ablations_of(directory, evaluation))
        + looking_report.looks_section(directory, evaluation)
        + (f"<h3>More videos</h3><div class=videos>{videos}</div>" if videos else "")
        + f"<h3>Episodes</h3><div class=scroll>{_table(evaluation.episodes)}</div>"
        + f"<details><summary>Configuration</summary><div class=scroll><table class=plain>{rows}</table></div>"
        f"<pre>{escape(protocol.scene)}</pre></details></section>"
    )


def _failed_at(stages: dict[str, list[int]]) -> str:
    """How many failures ended at each stage of the task, for each agent."""
    if not stages:
        return ""
    agents = [f"agent {agent}" for agent in range(len(next(iter(stages.values()))))]
    return table_html(["failed at", *agents], [[stage, *counts] for stage, counts in stages.items()], "stages")


def _driver(protocol: Any, agent: int) -> str:
    if protocol.checkpoints[agent] is None:
        return "scripted expert"
    weights, codec = protocol.weights[agent][:12], protocol.fingerprints[agent][:12]
    return f"{protocol.checkpoints[agent]}, weights {weights}, codec {codec}"


def _video(directory: Path, episode: EpisodeResult, called: str = "") -> str:
    caption = f"seed {episode.seed}, {episode.steps} steps" if episode.is_judged else f"seed {episode.seed}"
    film = "<p class=muted>No video of it was kept; --videos says how many are.</p>"
    if episode.video is not None:
        data = base64.b64encode((directory / episode.video).read_bytes()).decode()
        film = f"<video controls muted loop playsinline preload=metadata src='data:video/mp4;base64,{data}'></video>"
    return (
        f"<figure>{film}<figcaption><span class='chip {episode.outcome}'>{episode.outcome}</span> "
        f"{escape(called)}{caption}<br><span class=muted>{escape(episode.reason or '')}</span></figcaption></figure>"
    )


def _table(episodes: Sequence[EpisodeResult]) -> str:
    """Sorted by a click on a head; cells carry their value in `data-v`."""
    measured = sorted({name for episode in episodes for name in episode.measures})
    heads = [
        "seed",
        "outcome",
        "steps",
        "seconds",
        "RoboFactory's test",
        "policy ms",
        *measured,
        "last phases",
        "reason",
    ]
    rows = []
    for e in episodes:
        chip = f"<span class='chip {e.outcome}'>{e.outcome}</span>"
        cells: list[tuple[Any, str]] = [
            (e.seed, str(e.seed)), (e.outcome, chip), (e.steps, str(e.steps)), (e.seconds, f"{e.seconds:.1f}"),
            (int(e.success_robofactory), "yes" if e.success_robofactory else "no"),
            (e.policy_ms, number(e.policy_ms, 1)),
            *((e.measures.get(name), number(e.measures.get(name), 3)) for name in measured),
            (", ".join(e.phases), escape(", ".join(e.phases))), (e.reason or "", escape(e.reason or "")),
        ]  # fmt: skip
        rows.append(
            "".join(f"<td data-v='{escape('' if v is None else str(v), quote=True)}'>{t}</td>" for v, t in cells)
        )
    head = "".join(f"<th><button>{escape(_words(name))}</button></th>" for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table class=sortable><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _words(name: str) -> str:
    return name.replace("_", " ")


# ----------------------------------------------------------------------------------------------------------- curves


def _curves(metrics: Path) -> str:
    """A run's curves as small SVGs; what is not a number (a loss that blew up) is left out."""
    text = metrics.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # the run may still be writing its last line
    lines = [json.loads(line) for line in whole.splitlines()]
    panels = []
    for title, names in PANELS.items():
        curves = [(("val" if name.startswith("val_") else "train"), _points(lines, name)) for name in names]
        curves = [(kind, points) for kind, points in curves if points]
        if curves:
            drawing = _svg(curves, is_log="log" in title)
            panels.append(f"<figure class=plot><figcaption>{title}</figcaption>{drawing}</figure>")
    legend = "<span class=legend><b class=train>training</b> <b class=val>validation</b></span>"
    return f"<h3>{escape(metrics.parent.name)} {legend}</h3><div class=plots>{''.join(panels)}</div>"


def _points(lines: Iterable[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    points = [(float(line["step"]), float(line[name])) for line in lines if name in line and math.isfinite(line[name])]
    group = -(-len(points) // MAX_POINTS) or 1
    groups = [points[start : start + group] for start in range(0, len(points), group)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in groups]


def _svg(curves: list[tuple[str, list[tuple[float, float]]]], is_log: bool) -> str:
    width, height, left, right, top, bottom = 360, 200, 50, 12, 10, 24
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points if y > 0 or not is_log]
    if not ys:
        return ""
    marks = _marks(min(ys), max(ys), is_log)
    scale = math.log10 if is_log else float
    y_low, y_high, x_high = scale(marks[0]), scale(marks[-1]), max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + x / x_high * (width - left - right)
        return across, height - bottom - (scale(y) - y_low) / (y_high - y_low) * (height - top - bottom)

    drawn = [f"<svg viewBox='0 0 {width} {height}' role=img>"]
    for mark in marks:
        _, level = at(0.0, mark)
        drawn.append(f"<path class=grid d='M{left} {level:.1f}H{width - right}'/>")
        drawn.append(f"<text x={left - 6} y={level + 4:.1f} text-anchor=end>{mark:.4g}</text>")
    drawn.append(f"<text x={left} y={height - 6}>0</text>")
    drawn.append(f"<text x={width - right} y={height - 6} text-anchor=end>step {x_high:.0f}</text>")
    for kind, points in curves:
        places = [at(x, y) for x, y in points if y > 0 or not is_log]
        drawn.append(f"<polyline class={kind} points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in places)}'/>")
        if kind == "val":
            drawn += [f"<circle class=val r=2.6 cx={x:.1f} cy={y:.1f} />" for x, y in places]
    return "".join(drawn) + "</svg>"


def _marks(low: float, high: float, is_log: bool) -> list[float]:
    """Round numbers from at most `low` to at least `high`; at least two."""
    if is_log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return [10.0**power for power in range(first, max(last, first + 1) + 1)]
    rough = (high - low) / 3 or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]
