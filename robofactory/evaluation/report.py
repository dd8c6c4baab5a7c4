"""Evaluations as text for the terminal and as one HTML file that opens from disk: no network, no file beside it."""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from robofactory.evaluation import paired_report
from robofactory.evaluation.results import SUCCESS, SUMMARY, EpisodeResult, Evaluation, load, write_atomically
from robofactory.evaluation.wording import interval_in_words, number, rate_in_words, seeds_in_words, table_html

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


def write_report_of_root(root: Path) -> Path:
    """`{root}/report.html` of all evaluations below a directory and of the runs their policies come from."""
    evaluations = sorted(
        (path.parent for path in root.glob(f"*/{SUMMARY}")), key=lambda p: (p.name != "all_agents", p.name)
    )
    checkpoints = {path for directory in evaluations for path in load(directory).protocol.checkpoints if path}
    runs = sorted({Path(path).parent for path in checkpoints})
    write_report(root / "report.html", evaluations, runs)
    return root / "report.html"


def write_report(output_html: Path, evaluations: list[Path], runs: list[Path], lead: str = "") -> None:
    """One page of several evaluations (directories) and the training runs (directories) behind them.

    Everything is inside: videos and curves too. A run without `metrics.jsonl` is left out. `lead` (HTML) comes first.
    """
    loaded = [(directory, load(directory)) for directory in evaluations]
    names = sorted({f"{e.protocol.task} · {e.protocol.checkpoint or 'expert'}" for _, e in loaded})
    metrics = [run / "metrics.jsonl" for run in runs if (run / "metrics.jsonl").is_file()]
    body = [
        f"<header><p class=eyebrow>robofactory evaluation</p><h1>{escape(', '.join(names))}</h1></header>",
        lead,
        "<section class=cards>",
        *(_card(index, evaluation) for index, (_, evaluation) in enumerate(loaded)),
        "</section>",
        "<p class=note>Bars: success rate, the bracket is its 95 % interval (Wilson). Success is the task's honest "
        "test; RoboFactory's own can be passed by one arm alone and is shown for comparison only.</p>",
    ]
    if metrics:
        body += ["<section><h2>Training</h2>", *(_curves(path) for path in metrics), "</section>"]
    body += [_details(index, directory, evaluation) for index, (directory, evaluation) in enumerate(loaded)]
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(', '.join(names))}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )
    write_atomically(output_html, page)


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
    videos = "".join(
        _video(directory, e) for e in sorted(evaluation.episodes, key=lambda e: e.outcome == SUCCESS) if e.video
    )
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
        + (f"<h3>Videos</h3><div class=videos>{videos}</div>" if videos else "")
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


def _video(directory: Path, episode: EpisodeResult) -> str:
    assert episode.video is not None
    data = base64.b64encode((directory / episode.video).read_bytes()).decode()
    caption = f"seed {episode.seed}, {episode.steps} steps" if episode.is_judged else f"seed {episode.seed}"
    return (
        f"<figure><video controls muted loop playsinline preload=metadata src='data:video/mp4;base64,{data}'></video>"
        f"<figcaption><span class='chip {episode.outcome}'>{episode.outcome}</span> {caption}"
        f"<br><span class=muted>{escape(episode.reason or '')}</span></figcaption></figure>"
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
    text = metrics.read_text()
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


# ------------------------------------------------------------------------------------------------- style and script

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#16191f;--soft:#626a78;--line:#e1e5eb;--ok:#15915b;
--bad:#cf4436;--crash:#8a5cd6;--other:#5b7fb8;--accent:#2f6bdf;--val:#d9822b}
@media(prefers-color-scheme:dark){:root{--page:#101318;--card:#191d24;--ink:#e8ebf0;--soft:#98a1b0;--line:#2b313b;
--ok:#36b97f;--bad:#e8695c;--crash:#a983ea;--other:#7d9fd6;--accent:#6d9cf5;--val:#eba055}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif}main{max-width:1180px;margin:0 auto;padding:32px 20px 80px}
h1{font-size:clamp(24px,4vw,36px);line-height:1.15;margin:0 0 24px;letter-spacing:-.02em}
h2{font-size:22px;margin:56px 0 12px;letter-spacing:-.01em}h3{font-size:15px;margin:26px 0 10px}
a{color:inherit;text-decoration-color:var(--line);text-underline-offset:3px}
.eyebrow{margin:0 0 4px;color:var(--accent);font-weight:600}
.muted,.note{color:var(--soft);margin:4px 0;font-size:13.5px}
.note{max-width:75ch;margin-top:14px}.warn{color:var(--bad);font-size:13px}
.cards{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr))}
.card,.plot,.videos figure,.scroll,details{background:var(--card);border:1px solid var(--line);border-radius:12px}
.card{padding:18px 20px}.card h3{margin:0;min-height:3em}
.big{font-size:60px;font-weight:700;line-height:1.15;letter-spacing:-.04em}
.big small{font-size:26px;margin-left:3px;color:var(--soft)}
.bar{position:relative;height:12px;background:var(--line);border-radius:6px;margin:10px 0 14px}
.bar i{position:absolute;inset:0 auto 0 0;border-radius:6px;background:var(--ok)}
.bar b{position:absolute;top:-4px;bottom:-4px;border:2px solid var(--ink);border-width:0 2px;opacity:.75;min-width:4px}
.bar b:after{content:"";position:absolute;left:0;right:0;top:calc(50% - 1px);border-top:2px solid var(--ink)}
.bar.other{height:6px}.bar.other i{background:var(--other)}.bar.other b{opacity:.45}
dl{display:grid;grid-template-columns:1fr 1fr;gap:8px 16px;margin:16px 0 0}dt{color:var(--soft);font-size:13px}
dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
.strip{display:flex;flex-wrap:wrap;gap:4px}.strip i{width:16px;height:16px;border-radius:4px;background:var(--bad)}
.strip .success{background:var(--ok)}.strip .crash,.strip .timeout{background:var(--crash)}
.why{list-style:none;padding:0;max-width:720px}.why li{display:grid;grid-template-columns:minmax(150px,1.4fr) 2fr 32px;
gap:12px;align-items:center;margin:5px 0;font-size:14px}.why i{height:10px;border-radius:5px;background:var(--bad)}
.plots,.videos{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(270px,100%),1fr))}
.videos{grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr))}
figure{margin:0;overflow:hidden}.plot{padding:12px 10px 4px}
.plot figcaption{font-size:13.5px;font-weight:600;padding:0 6px 6px}
.legend{font-size:12.5px;margin-left:8px;color:var(--accent)}.legend .val{color:var(--val);margin-left:6px}
video{display:block;width:100%;background:#18191f}.videos figcaption{padding:10px 12px;font-size:13.5px}
svg{display:block;width:100%;height:auto;font-size:11px;fill:var(--soft)}.grid{stroke:var(--line);fill:none}
polyline{fill:none;stroke-width:1.8;stroke:var(--accent)}polyline.val{stroke:var(--val)}circle.val{fill:var(--val)}
.scroll{overflow:auto;max-height:520px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:6px 12px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{position:sticky;top:0;background:var(--card);z-index:1}tr:last-child td{border-bottom:0}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button:after{content:" ↑"}th[aria-sort=descending] button:after{content:" ↓"}
.plain th{font-weight:600;width:1%}.plain td{white-space:normal;overflow-wrap:anywhere}
.chip{font-size:12px;font-weight:600;padding:1px 8px;border-radius:9px;color:#fff;background:var(--bad)}
.chip.success{background:var(--ok)}.chip.crash,.chip.timeout{background:var(--crash)}
.forest text{font-size:12px}.forest .baseline{stroke:var(--ok);stroke-dasharray:4 3}
.forest .interval{stroke:var(--soft);stroke-width:2}.forest .rate{fill:var(--accent)}.stages{width:auto}
details{margin-top:18px;padding:12px 16px}summary{cursor:pointer;font-weight:600}
details .scroll{margin-top:12px;border:0}
pre{overflow:auto;font-size:12px;line-height:1.45;color:var(--soft)}
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener('click', () => {
    const way = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    heads.forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', way > 0 ? 'ascending' : 'descending');
    const value = row => row.cells[column].dataset.v;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      return x !== '' && y !== '' && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y);
    };
    body.append(...[...body.rows].sort((a, b) => way * compare(a, b)));
  }));
}
"""
