"""What every page and figure promises: text is text, nothing is fetched, and nothing that is drawn ends what it is drawn of."""

import io
import re
import sys
import tomllib

import jinja2
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from robofactory.errors import UserError, brief, run_command, shown
from robofactory.html import page, plots
from robofactory.html.curves import points_of, read_metrics
from robofactory.html.media import data_url
from robofactory.html.page import render, spared
from robofactory.html.svg import drawing, element

HOSTILE = "a'b\"><script>alert(1)</script>\x1b[31m\x00\u202e\udc80\n"


def test_what_a_template_is_given_is_escaped_also_in_attributes_and_control_characters_are_visible():
    environment = page._environment()
    text = environment.from_string("<p title='{{ x }}'>{{ x }}</p>{{ x | upper }}").render(x=HOSTILE)
    assert text.count("<") == 2 and text.count("'") == 2, text
    assert r"\x1b[31m\x00\u202e\udc80" in text and text.encode()


def test_every_template_is_installed_with_the_package():
    project = tomllib.loads((page.PACKAGE.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["robofactory"]
    installed = {path for pattern in patterns for path in page.PACKAGE.glob(pattern)}
    used = {"html/page.html", "html/parts.html", "html/page.css", "html/page.js"}
    for source in page.PACKAGE.rglob("*.py"):
        used |= set(re.findall(r'"(\w+/\w+\.html)"', source.read_text()))
    assert len(used) > 10 and {page.PACKAGE / name for name in used} <= installed


def test_a_value_that_is_forgotten_is_an_error_not_a_gap():
    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        render("html/page.html", eyebrow="evaluation")


def test_a_page_fetches_nothing_and_runs_its_own_script_alone():
    text = render("evaluation/checkpoints.html", eyebrow="evaluation", title=HOSTILE, section="")
    (policy,) = re.findall("Content-Security-Policy' content='([^>]*)'>", text)
    assert policy.startswith("default-src &#39;none&#39;; img-src data:; media-src data:; ")
    assert re.search("script-src &#39;sha256-[A-Za-z0-9+/]{43}=&#39;", policy) and "unsafe-eval" not in policy
    assert "<script" not in text, "there is no table to sort"


def test_a_drawing_escapes_words_and_attributes_and_keeps_the_elements_in_it():
    drawn = drawing(10, 20, HOSTILE, element("text", HOSTILE, x=1.23456, text_anchor="end"), class_="bins")
    assert drawn.count("<") == 4 and "<script" not in drawn
    assert drawn.startswith("<svg viewBox='0 0 10 20' role='img' aria-label='a&#39;b&#34;&gt;&lt;script&gt;")
    assert " x='1.23' text-anchor='end'>a&#39;b" in drawn and drawn.endswith("</text></svg>")


@pytest.mark.parametrize("data", [b"", b"<svg onload=alert(1)>", b"<html>", b"\x89PNG", b"GIF89a"])
def test_only_what_is_a_picture_or_a_video_becomes_a_url(data):
    with pytest.raises(ValueError, match="neither a picture nor a video"):
        data_url(data)


@pytest.mark.parametrize("text", ["10^$ out of $10", "$j_0_a_b$", "$\\frac{", "_^", "שלום", "漢字", brief(HOSTILE), ""])
def test_a_figure_draws_text_as_text(text):
    """An instruction or a joint's name with `$` in it ended a training."""
    figure = Figure(figsize=(4, 2))
    ax = figure.subplots()
    ax.plot([0, 1], [0.001, 1000.0])
    ax.set(title=text, xlabel=text)
    ax.legend([text])
    plots.use_log_scale(ax)
    with Image.open(io.BytesIO(plots.png(figure))) as image:
        assert np.asarray(image.convert("L")).min() < 50
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert "0.1" in labels and "1000" in labels and "$" not in "".join(labels)


def test_a_name_that_is_too_long_is_cut_where_there_is_no_room():
    assert brief("x" * 60) == "x" * 60 and brief("x" * 61) == "x" * 57 + "..."
    assert shown("a\u00a0b\u3000c\tשלום") == "a\u00a0b\u3000c\\tשלום", "spaces are no control characters"


def test_a_failure_to_draw_is_a_line_and_what_follows_goes_on():
    said: list[str] = []
    with spared("curves.png", said.append):
        raise OSError(28, "No space left on device")
    with spared("curves.png", said.append):
        raise UserError("metrics.jsonl is no regular file\x1b[31m")
    with spared("run.html", said.append):
        raise ZeroDivisionError("division by zero")
    assert said[0] == "warning: curves.png could not be drawn: [Errno 28] No space left on device"
    assert said[1] == r"warning: curves.png could not be drawn: metrics.jsonl is no regular file\x1b[31m"
    assert said[2].startswith(
        "warning: run.html could not be drawn; this is a defect of robofactory, please report it:\n"
    )
    assert said[2].rstrip().endswith("ZeroDivisionError: division by zero")
    with pytest.raises(KeyboardInterrupt), spared("run.html", said.append):
        raise KeyboardInterrupt


def test_what_a_command_prints_is_shown_and_not_obeyed(capsys):
    before = sys.stdout
    run_command(lambda: print(f"title\x1b]0;owned\x07 95\u00a0%\n\tnext\r\u2028 {HOSTILE}"))
    assert sys.stdout is before
    said = capsys.readouterr().out
    assert said.startswith("title\\x1b]0;owned\\x07 95\u00a0%\n\tnext\\r\\u2028 a'b") and "\\udc80" in said


def test_lines_of_metrics_are_read_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "lr": 0.5}', "[]", '{"lr": 1}', '{"step": -1}', '{"step": 2, "lr": Infinity, "name": "x"}']
    path.write_text("\n".join([*lines, '{"step": 3, "event": "spike", "message": "up"}', '{"step": 4, "lr"']))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert points_of(read_metrics(path), "lr") == [(1.0, 0.5)] and points_of(read_metrics(path), "name") == []
