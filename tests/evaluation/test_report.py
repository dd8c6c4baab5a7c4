import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evaluation_samples import film, sample_evaluation

from robofactory.evaluation import paired_report, report, results
from robofactory.evaluation.ablations import ABLATIONS
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS, TIME_OUT

VOID = {"meta", "br", "link", "img", "circle", "path"}


class Page(HTMLParser):
    """Collects elements; fails on an end tag that closes something else."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two evaluations side by side, one with a video, and the run of their policy."""
    run = tmp_path / "checkpoints" / "LiftBarrier-rf_Agent0_150"
    (run / "epoch_8").mkdir(parents=True)
    lines = [{"step": 10 * k, "epoch": 0, "lr": 1e-3 / k, "train_loss": 5.0 / k} for k in range(1, 50)]
    lines += [{"step": 490, "epoch": 1, "val_loss": 0.2}, {"step": 500, "epoch": 1, "train_loss": math.nan}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, outcomes in {"all_agents": [SUCCESS, FAILURE, CRASH], "agent0_beside_expert": [SUCCESS, SUCCESS]}.items():
        directory = tmp_path / "results" / name
        evaluation = sample_evaluation(outcomes, str(run / "epoch_8"))
        first = dataclasses.replace(evaluation.episodes[0], video=film(directory, 10_000, 3))
        results.save(dataclasses.replace(evaluation, episodes=[first, *evaluation.episodes[1:]]), directory)
    return tmp_path / "results"


def test_the_report_needs_no_network_and_no_file_beside_it(root):
    text = report.write_report_of_root(root).read_text()
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "poster", "data", "xlink:href", "srcset", "action"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), f"<{tag} {name}={target[:60]}> is fetched"
    assert not re.search(r"https?://|@import|url\(|fetch\(|import\(", text)


def test_the_report_plays_every_kept_video(root):
    page = Page(report.write_report_of_root(root).read_text())
    videos = [attributes["src"] for tag, attributes in page.elements if tag == "video"]
    assert len(videos) == 2
    assert all(source.startswith("data:video/mp4;base64,AAAA") for source in videos)


def test_the_best_and_the_worst_are_on_top_and_a_video_that_was_not_kept_is_said_so(root):
    text = report.write_report_of_root(root).read_text()
    top, _, below = text.partition("<h2>Training")
    assert top.count("<video") == 2 and "<video" not in below, "each video is in the page once"
    shown = [Page(figure + "</figure>").text for figure in re.findall("<figure>.*?(?=</figure>)", top)]
    assert [figure.partition(", seed")[0] for figure in shown] == [
        "success Best: the fastest success",
        "No video of it was kept; --videos says how many are.failure Worst: the earliest failure",
        "success Best: the fastest success",
        "No video of it was kept; --videos says how many are.success Worst: the slowest success",
    ]


def test_the_report_shows_all_evaluations_of_a_root_and_a_row_for_each_episode(root):
    page = Page(report.write_report_of_root(root).read_text())
    assert sum(tag == "article" for tag, _ in page.elements) == 2
    cells = [attributes["data-v"] for tag, attributes in page.elements if tag == "td" and "data-v" in attributes]
    seeds = [value for value in cells if value in ("10000", "10001", "10002")]
    assert seeds == ["10000", "10001", "10002", "10000", "10001"]
    assert "1 of 2 unseen seeds" in page.text, "the crash must not be in the rate"


def test_the_report_draws_training_curves_and_leaves_out_what_is_not_finite(root):
    text = report.write_report_of_root(root).read_text()
    curves = [attributes["points"] for tag, attributes in Page(text).elements if tag == "polyline"]
    assert len(curves) == 3  # training and validation loss, learning rate
    assert "nan" not in "".join(curves)
    heights = [float(point.split(",")[1]) for point in curves[0].split()]
    assert heights == sorted(heights), "a loss that falls must be drawn falling (down is larger)"


def test_a_run_that_still_writes_its_metrics_does_not_stop_the_report(root):
    with open(root.parent / "checkpoints" / "LiftBarrier-rf_Agent0_150" / "metrics.jsonl", "a") as file:
        file.write('{"step": 510, "train_l')
    assert "<polyline" in report.write_report_of_root(root).read_text()


def test_the_report_escapes_what_a_crash_says(root):
    text = report.write_report_of_root(root).read_text()
    assert "<the simulator>" not in text and "&lt;the simulator&gt; &amp; its driver" in text


def test_a_report_without_training_metrics_is_whole(root, tmp_path):
    report.write_report(tmp_path / "report.html", [root / "all_agents"], [tmp_path / "no_such_run"])
    assert "Training" not in Page((tmp_path / "report.html").read_text()).text


def test_the_terminal_gets_both_tests_the_interval_and_the_crashes():
    evaluation = sample_evaluation([SUCCESS, SUCCESS, FAILURE, CRASH, TIME_OUT])
    text = report.as_text(evaluation).replace("\u00a0", " ")
    assert "2/3 = 67 %, 95 % interval 21 to 94 %" in text
    assert "success_robofactory  3/3 = 100 %" in text
    assert "1 x agent 0 never held it" in text
    assert "CRASHED              1 episodes, counted in no rate" in text
    assert "TIMED OUT            1 episodes, counted in no rate" in text and "1 x no answer within 600 s" in text
    assert re.search(r"failed at +agent 0 +agent 1\n    never held +1 +0\n    did its part +0 +1\n", text)
    assert "31 ms, 2.75 passes" in text


def test_an_evaluation_that_stopped_early_says_so_and_what_it_means():
    evaluation = sample_evaluation([SUCCESS] * 35)
    protocol = dataclasses.replace(evaluation.protocol, until=5.0, num_episodes=381)
    text = report.as_text(results.Evaluation(protocol, evaluation.episodes))
    assert "seeds 10000..10034, at most 300 steps" in text
    assert "within ±5 points; as it decides itself when to stop, it covers the true rate a little less often" in text
    assert "stopped early" not in report.as_text(evaluation)


# -------------------------------------------------------------------------------------------------------- ablations


@pytest.fixture
def ablated(root: Path) -> Path:
    """The evaluation of `all_agents` with 12 episodes and two ablations; a third is of other weights."""
    directory = root / "all_agents"
    outcomes = {None: [SUCCESS] * 10 + [FAILURE, CRASH], "blackout=wrist": [FAILURE] * 11 + [SUCCESS]}
    outcomes |= {"light=0.5": [SUCCESS] * 11 + [CRASH], "freeze=side": [FAILURE] * 12}
    for name, each in outcomes.items():
        evaluation = sample_evaluation(each)
        weights = ["00" * 32, None] if name == "freeze=side" else evaluation.protocol.weights
        protocol = dataclasses.replace(evaluation.protocol, ablation=name, weights=weights)
        below = directory / ABLATIONS / name if name else directory
        results.save(results.Evaluation(protocol, evaluation.episodes), below)
    return root


def test_ablations_are_one_table_of_rates_lost_and_won_layouts_and_mcnemars_p(ablated):
    directory = ablated / "all_agents"
    baseline = results.load(directory)
    others = paired_report.ablations_of(directory, baseline)
    assert [each.protocol.ablation for each in others] == ["blackout=wrist", "light=0.5"], "the worst first"
    lines = paired_report.as_text(baseline, others).replace("\u00a0", " ").splitlines()
    plain, wrist = (" ".join(line.split()) for line in lines[1:3])
    assert plain == "baseline 10/11 = 91 %, 95 % interval 62 to 98 %"
    assert wrist == "blackout=wrist 10 0 0.002 1/12 = 8 %, 95 % interval 1 to 35 %; layouts left out: 1"
    assert lines[3].split()[:4] == ["light=0.5", "0", "1", "1"]


def test_the_report_draws_each_ablation_on_its_interval_beside_the_baseline(ablated):
    text = report.write_report_of_root(ablated).read_text()
    page = Page(text)
    assert "blackout=wrist" in page.text and "freeze=side" not in page.text, "other weights are no ablation of these"
    assert "baseline better than blackout=wrist, p = 0.002, 11 pairs" in page.text
    dots = [attributes for tag, attributes in page.elements if tag == "circle" and attributes.get("class") == "rate"]
    across = [float(str(dot["cx"])) for dot in dots]
    assert len(across) == 3 and across[1] < across[0] < across[2], "8 %, 91 % and 100 %"
    assert sum(tag == "article" for tag, _ in page.elements) == 2, "an ablation is no evaluation of its own"


@pytest.mark.parametrize(
    ("low", "high", "is_log"), [(0.0, 0.0, False), (0.7, 5.9, False), (-1.0, 1.0, False), (0.004, 0.3, True)]
)
def test_axis_marks_are_few_and_cover_the_data(low, high, is_log):
    marks = report._marks(low, high, is_log)
    assert marks[0] <= low and high <= marks[-1] and 2 <= len(marks) <= 6 and marks == sorted(set(marks))
