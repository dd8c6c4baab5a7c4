"""The report of a dataset: in the terminal, as a page that needs nothing else, and as an exit code."""

import io
import re
from base64 import b64decode
from dataclasses import replace

import pytest
from demonstrations import HEIGHT, WIDTH, description, sound_episode, write_sound_dataset
from faults import FAULTS
from PIL import Image

from robofactory.codec.codec import Codec
from robofactory.codec.statistics import DatasetStatistics
from robofactory.config import load_recipe
from robofactory.data import inspection_page
from robofactory.data.episodes import DatasetReader, DatasetWriter
from robofactory.data.findings import find
from robofactory.data.inspect import main
from robofactory.data.survey import survey
from robofactory.errors import UserError


def inspect(monkeypatch, *arguments) -> int:
    """The command; its exit code."""
    monkeypatch.setattr("sys.argv", ["inspect", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def sound(tmp_path):
    return write_sound_dataset(tmp_path / "set")


def test_the_report_of_a_sound_dataset_is_beside_it_and_the_exit_code_is_0(sound, monkeypatch, capsys):
    assert inspect(monkeypatch, sound) == 0
    text = capsys.readouterr().out
    assert "6 episodes, 240 frames (40 to 40 per episode, median 40) at 20 fps, 0.2 minutes" in text
    assert '6 x "lift the barrier"' in text and "0 errors, 0 warnings, 0 notes" in text
    assert "side 32x24, overhead 32x24, wrist 32x24" in text and str(sound / "inspection.html") in text

    page = (sound / "inspection.html").read_text()
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert all(source.startswith("data:") for source in re.findall(r"(?:src|href)='([^']*)'", page))
    kinds = re.findall(r"data:image/(\w+);", page)
    assert kinds == ["png", "png", "jpeg", "jpeg", "jpeg", "webp"], "actions, lengths, a sheet a view, the film"


def test_an_error_is_in_both_reports_and_in_the_exit_code(tmp_path, monkeypatch, capsys):
    directory, page = FAULTS["unreadable_image"](tmp_path / "set"), tmp_path / "reports" / "page.html"
    assert inspect(monkeypatch, directory, "--output", page) == 1
    text = capsys.readouterr().out
    assert "error: unreadable_image: view 'side' of episode 3: frame 0 does not decode" in text
    assert "1 error, 0 warnings, 0 notes" in text
    assert "error: unreadable_image" in page.read_text() and not (directory / "inspection.html").exists()


def test_what_passes_through_is_inspected_as_the_recipe_has_it(tmp_path, monkeypatch, capsys):
    """A dataset that training took with data.pass_through=[] had an error here, and no way to say so."""
    directory = FAULTS["gripper_range"](tmp_path / "set")
    assert inspect(monkeypatch, directory) == 1
    assert "error: gripper_range" in capsys.readouterr().out
    assert inspect(monkeypatch, directory, "--pass_through") == 0
    with pytest.raises(UserError, match=r"--pass_through: no action dimension 'hand'; there are panda_joint1, "):
        inspect(monkeypatch, directory, "--pass_through", "hand")


def test_what_a_dataset_says_cannot_break_the_page(tmp_path):
    directory = write_sound_dataset(tmp_path / "set", change=lambda each: replace(each, instruction="<b>lift & go</b>"))
    facts = survey(directory)
    page = inspection_page.as_page(facts, find(facts))
    assert "<b>lift" not in page and "&lt;b&gt;lift &amp; go" in page


def test_the_film_shows_an_episode_in_every_view(sound):
    film = inspection_page.draw_film(survey(sound), 0)
    assert film is not None
    with Image.open(io.BytesIO(film)) as image:
        assert image.size == (3 * WIDTH, HEIGHT)
        image.seek(image.n_frames - 1)
        image.load()
        ends_ms = image.info["timestamp"] + image.info["duration"]  # frames that are alike are shown as one
        assert ends_ms == 40 * 1000 / 20


def test_a_sheet_has_a_row_an_episode_and_a_column_a_time(sound):
    page = inspection_page.as_page(survey(sound), [])
    sheet = b64decode(re.findall(r"data:image/jpeg;base64,([^']*)", page)[0])
    with Image.open(io.BytesIO(sheet)) as image:
        assert image.size == (8 * WIDTH, 6 * HEIGHT)


@pytest.mark.parametrize("method", ["mean_std", "q01_q99", "min_max"])
def test_bins_and_clipping_are_those_of_the_codec_that_training_makes(sound, method):
    reader, recipe = DatasetReader(sound), load_recipe("robot_openvla_tiny", [f"data.normalization={method}"])
    numbers = reader.all_actions, reader.all_proprio, reader.description.joint_names, method, {}, reader.num_episodes
    codec = Codec.create(recipe, {"some": DatasetStatistics.measure(*numbers)})
    headings = inspection_page._action_headings()
    rows = inspection_page._action_rows(survey(sound))
    bins = [row[headings.index(f"bin, {method}")] for row in rows]
    clipped = [row[headings.index(f"clipped, {method}")] for row in rows]
    assert bins == [f"{2 * half:.5f}" for half in codec.half_bin]
    assert clipped == [f"{share:.1%}" for share in codec.clipped(reader.all_actions).mean(0)]


@pytest.mark.parametrize("of_proprio", [[0, 1, 7], [1], []])
def test_other_dimensions_and_views_are_inspected_too(tmp_path, of_proprio):
    directory = tmp_path / "set"
    names = {0: "shoulder", 1: "elbow", 7: "gripper"}
    own = {"joint_names": tuple(names.values()), "proprio_names": tuple(names[dim] for dim in of_proprio)}
    writer = DatasetWriter(directory, description(image_sizes={"front": (HEIGHT, WIDTH)}, fps=10, **own))
    for seed in range(4):
        whole = sound_episode(seed)
        few = replace(
            whole,
            images={"front": whole.images["overhead"]},
            actions=whole.actions[:, [0, 1, 7]],
            proprio=whole.proprio[:, of_proprio],
        )
        writer.append(few)
    writer.finalize()
    facts = survey(directory)
    found = find(facts)
    assert found == []
    assert "shoulder" in inspection_page.as_text(facts, found) and "front" in inspection_page.as_page(facts, found)


def test_no_dataset_and_no_place_to_write_are_one_line(sound, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no dataset at .*nowhere; see "):
        inspect(monkeypatch, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*; choose another place with --output"):
        inspect(monkeypatch, sound, "--output", tmp_path / "file" / "page.html")
