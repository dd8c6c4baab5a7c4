"""Data that say anything, and drawing that fails: a training goes on, and what it shows is text."""

import re
from unittest import mock

import pytest

from benchmarks import small_runs
from robofactory.paths import dataset_dir, run_dir
from robofactory.training import log

INSTRUCTION = "10^$ <img src=x onerror=alert(1)> \x1b]0;owned\x07\nnext \u202e"
JOINTS = ("$j_0_a_b$", "<img src=x onerror=alert(2)>", "j\n2\x1b[31m", "$\\frac{", "_^", "שלום", "x" * 300, "gripper")


@pytest.fixture
def run(tmp_path):
    with small_runs.home(tmp_path, writes_dataset=False):
        yield run_dir("openvla", small_runs.TASK, 0, small_runs.NUM_EPISODES)


def test_a_dataset_with_formulas_markup_and_escapes_for_names_is_trained_on_and_shown_as_text(run, capsys):
    """An instruction with `10^$` and a joint called `$j_0_a_b$` ended a training."""
    episode = small_runs.Episode
    with mock.patch.object(small_runs, "Episode", lambda *parts: episode(*parts[:4], INSTRUCTION, *parts[5:])):
        small_runs.write_dataset(dataset_dir(small_runs.TASK, 0, small_runs.NUM_EPISODES), joints=JOINTS)
    small_runs.start("training.num_epochs=1", draws=True)
    said = capsys.readouterr()
    assert "could not be drawn" not in said.out and f"trained: {run / 'latest'}" in said.out
    assert not set(said.out + said.err) & {"\x1b", "\x07", "\u202e"} and r"j\n2\x1b[31m" in said.out
    page = (run / "run.html").read_text()
    assert page.count("<img ") == page.count("src='data:image/png;base64,") == 3
    assert "&lt;img src=x onerror=alert(2)&gt;" in page and "$j_0_a_b$" in page and "\x1b" not in page


def test_no_picture_and_no_page_ends_a_training(run, capsys):
    small_runs.write_dataset(dataset_dir(small_runs.TASK, 0, small_runs.NUM_EPISODES))
    failing = mock.Mock(side_effect=ArithmeticError("of a picture"))
    with mock.patch.multiple(log, draw_curves=failing, draw_input_images=failing, draw_open_loop=failing):
        small_runs.start("training.num_epochs=1", draws=True)
    said = capsys.readouterr().out
    pattern = r"warning: (\S+) could not be drawn; this is a defect of robofactory, please report it:\nTraceback"
    assert re.findall(pattern, said) == ["input_images.png", "curves.png", "open_loop.png"]
    assert (run / "run.html").is_file() and (run / "latest" / "modules.safetensors").is_file()
