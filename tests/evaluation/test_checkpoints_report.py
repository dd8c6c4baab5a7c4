"""Success over checkpoints: what is drawn, what is joined, and what is said where it is not alike."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from evaluation_samples import sample_evaluation, sample_scene
from test_report import Page

from robofactory.config import to_yaml
from robofactory.evaluation import checkpoints_report, report, results
from robofactory.evaluation.results import FAILURE, SUCCESS

RUN = "/runs/LiftBarrier-rf_Agent0_150"
BESIDE, BOTH = "agent0_beside_expert", "all_agents"


def save(root: Path, name: str, successes: int, failures: int, who: str = BESIDE, **changes) -> None:
    """The evaluation of a checkpoint, and its report."""
    evaluation = sample_evaluation([SUCCESS] * successes + [FAILURE] * failures, f"{RUN}/{name}")
    if who == BOTH:
        both = {"drivers": ["openvla"] * 2, "checkpoints": [f"{RUN}/{name}"] * 2}
        changes = both | {"fingerprints": ["ab" * 32] * 2, "weights": ["cd" * 32] * 2} | changes
    protocol = dataclasses.replace(evaluation.protocol, **changes)
    results.save(results.Evaluation(protocol, evaluation.episodes), root / name / who)
    report.write_report_of_root(root / name)


def page_of(root: Path) -> Page:
    return Page(checkpoints_report.write_report(root).read_text())


def drawn(page: Page, kind: str) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in page.elements if tag == "path" and attributes.get("class") == kind]


def dots(page: Page) -> list[tuple[float, float]]:
    return [(float(str(a["cx"])), float(str(a["cy"]))) for tag, a in page.elements if tag == "circle"]


def test_checkpoints_stand_in_the_order_of_training_on_their_rates(tmp_path):
    for name, successes in {"epoch_10": 20, "epoch_2": 5, "epoch_4": 10}.items():
        save(tmp_path, name, successes, 20 - successes)
    lines, unread = checkpoints_report.lines_of(tmp_path)
    (points,) = lines.values()
    assert [point.name for point in points] == ["epoch_2", "epoch_4", "epoch_10"] and not unread
    page = page_of(tmp_path)
    (x2, y2), (x4, y4), (x10, y10) = dots(page)
    assert (x10 - x4) / (x4 - x2) == pytest.approx(3.0, abs=0.01), "epochs 2, 4 and 10"
    assert (y2 - y4) / (y4 - y10) == pytest.approx(0.5, abs=0.01), "25, 50 and 100 %: down is larger"
    assert len(drawn(page, "joined")) == 2 and len(drawn(page, "interval")) == 3
    low, high = results.wilson_interval(5, 20)
    _, y_low, y_high = (float(number) for number in re.findall(r"[\d.]+", str(drawn(page, "interval")[0]["d"])))
    assert (y_low - y_high) / (y2 - y10) == pytest.approx((high - low) / 0.75, abs=0.01)


def test_each_who_drives_whom_is_a_line_of_its_own(tmp_path):
    for name in ("epoch_2", "epoch_4"):
        save(tmp_path, name, 10, 0)
        save(tmp_path, name, 3, 7, BOTH)
    lines, _ = checkpoints_report.lines_of(tmp_path)
    assert list(lines) == [
        "All agents by their learned policies",
        "Agent 0 by its learned policy, the expert beside it",
    ]
    page = page_of(tmp_path)
    assert len(dots(page)) == 4 and len(drawn(page, "joined")) == 2
    assert len({x for x, _ in dots(page)}) == 4, "intervals at one epoch must not hide each other"


def test_two_checkpoints_on_the_same_layouts_are_compared_in_plain_words(tmp_path):
    save(tmp_path, "epoch_2", 2, 18)
    save(tmp_path, "epoch_4", 20, 0)
    assert "epoch_4 better than epoch_2, p < 0.001, 20 pairs" in page_of(tmp_path).text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 200}, "not comparable: max_steps is 200 in epoch_4 and 300 in epoch_2"),
        (
            {"first_seed": 10_000, "failures": 5},
            "not comparable: epoch_4 played seeds 10000..10014, epoch_2 10000..10009",
        ),
        (
            {"scene": to_yaml(sample_scene("success.max_tilt_deg=5"))},
            "not comparable: success.max_tilt_deg of the scene is 5.0 in epoch_4 and 10.0 in epoch_2",
        ),
    ],
)
def test_what_did_not_meet_the_same_layouts_is_not_joined_and_says_why(tmp_path, changes, message):
    save(tmp_path, "epoch_2", 10, 0)
    save(tmp_path, "epoch_4", 10, **{"failures": 0} | changes)
    page = page_of(tmp_path)
    assert message in page.text and "better than" not in page.text
    assert len(dots(page)) == 2 and not drawn(page, "joined")


def test_other_protocols_on_the_same_layouts_are_noted(tmp_path):
    changed = {"versions": {"torch": "2.15.0"}, "temperature": 0.5, "fingerprints": ["12" * 32, None]}
    save(tmp_path, "epoch_2", 5, 5)
    save(tmp_path, "epoch_4", 5, 5, checkpoints=["/elsewhere/run/epoch_4", None], **changed)
    page = page_of(tmp_path)
    for note in (
        "torch is 2.15.0 in epoch_4 and 2.14.1 in epoch_2",
        "temperature is 0.5 in epoch_4 and 0.0 in epoch_2",
        "preprocessing or statistics of epoch_4 are not those of epoch_2",
        f"epoch_4 is of the run /elsewhere/run, epoch_2 of {RUN}",
    ):
        assert note in page.text
    assert len(drawn(page, "joined")) == 1
    assert "Not the same" not in page_of_alike(tmp_path / "alike").text


def page_of_alike(root: Path) -> Page:
    for name in ("epoch_2", "epoch_4"):
        save(root, name, 5, 5)
    return page_of(root)


def test_an_evaluation_of_another_version_is_named_and_the_others_are_drawn(tmp_path):
    save(tmp_path, "epoch_2", 5, 5)
    save(tmp_path, "epoch_4", 5, 5)
    summary = tmp_path / "epoch_2" / BESIDE / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"format_version": 1}))
    page = page_of(tmp_path)
    assert f"{summary} has format 1" in page.text and len(dots(page)) == 1


def test_a_checkpoint_without_an_epoch_is_in_the_table_and_said_not_to_be_drawn(tmp_path):
    save(tmp_path, "epoch_2", 5, 5)
    save(tmp_path, "merged", 6, 4)
    save(tmp_path, "best", 7, 3, BOTH, checkpoints=[f"{RUN}/epoch_4", f"{RUN}/epoch_8"])
    page = page_of(tmp_path)
    assert "Not drawn, as no epoch is known of them: merged." in page.text
    assert "6/10 = 60 %" in page.text.replace("\u00a0", " ")
    assert len(dots(page)) == 2
    lines, _ = checkpoints_report.lines_of(tmp_path)
    assert [point.epoch for points in lines.values() for point in points] == [6.0, 2.0, None]


def test_the_page_fetches_nothing_and_links_the_report_of_every_checkpoint(tmp_path):
    for name in ("epoch_2", "epoch_4"):
        save(tmp_path, name, 5, 5)
    page = page_of(tmp_path)
    links = [str(attributes["href"]) for tag, attributes in page.elements if tag == "a"]
    assert links == ["epoch_2/report.html", "epoch_4/report.html"]
    assert all((tmp_path / link).is_file() for link in links)
    assert not [a for _, a in page.elements if a.get("src")] and "http" not in page.text


def test_the_report_of_a_checkpoint_has_the_curve_too(tmp_path):
    for name, successes in {"epoch_2": 2, "epoch_4": 20}.items():
        save(tmp_path, name, successes, 20 - successes)
    page = Page(report.write_report_of_root(tmp_path / "epoch_4", tmp_path).read_text())
    assert "Success over checkpoints" in page.text and "epoch_4 better than epoch_2" in page.text
    assert "../epoch_2/report.html" in [attributes.get("href") for _, attributes in page.elements]
    assert "Success over checkpoints" not in report.write_report_of_root(tmp_path / "epoch_4").read_text()
