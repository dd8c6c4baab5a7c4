"""Results that somebody else wrote: read as they are, or refused in one line; never obeyed."""

import dataclasses
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from evaluation_samples import film, sample_evaluation
from test_report import Page

from robofactory.errors import UserError, run_command
from robofactory.evaluation import compare, looks, pairs, report, results
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS

HOSTILE = "10^$ <img src=x onerror=alert(1)>'\"><script>alert(2)</script> \x1b]0;owned\x07\x1b[31m \u202e\x00 end"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    results.save(sample_evaluation([SUCCESS, FAILURE, SUCCESS, CRASH]), tmp_path / "a")
    return tmp_path / "a"


def change(directory: Path, file: str, *keys: object, to: object) -> None:
    """Write another value at a place in one of the files."""
    content = json.loads((directory / file).read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    (directory / file).write_text(json.dumps(content))


# ----------------------------------------------------------------------------------------------------------- typed doors


@pytest.mark.parametrize(
    ("file", "keys", "to", "message"),
    [
        ("episodes.json", (1, "outcome"), "failure><img src=x>", r"key '1.outcome' is .*; needed: one of success, failure"),
        ("episodes.json", (1, "seed"), "10001", "key '1.seed' is \"10001\"; needed: a valid integer"),
        ("episodes.json", (1, "seed"), 10000, "seed 10000 comes after 10000; each is there once, in order"),
        ("episodes.json", (1, "seed"), True, "key '1.seed' is true; needed: a valid integer"),
        ("episodes.json", (1, "failed_at"), [], "seed 10001 does not say of each agent where it failed"),
        ("episodes.json", (1, "failed_at"), ["never held", "elsewhere"], "seed 10001 failed at 'elsewhere', which is none of never reached, "),
        ("episodes.json", (1, "seconds"), float("nan"), "key '1.seconds' is NaN; needed: a finite number"),
        ("episodes.json", (1, "seconds"), 1e300, "needed: less than or equal to 1000000000000"),
        ("episodes.json", (1, "measures"), {"tilt_deg": "much"}, "key '1.measures.tilt_deg' is \"much\"; needed: a valid number"),
        ("episodes.json", (1, "steps"), -5, "key '1.steps' is -5; needed: greater than or equal to 0"),
        ("episodes.json", (1, "more"), 1, "has other fields than this version writes; evaluate again"),
        ("episodes.json", (1,), None, "key '1' is null; needed: an object"),
        ("summary.json", ("protocol", "drivers"), ["openvla"], "the protocol is not of one number of agents: 1 drivers, 2"),
        ("summary.json", ("protocol", "weights"), [None, None], "agent 0 has a checkpoint without fingerprint or weights"),
        ("summary.json", ("protocol", "num_episodes"), 10**400, "needed: "),
        ("summary.json", ("protocol", "versions"), {"torch": 2}, "key 'protocol.versions.torch' is 2; needed: a valid string"),
        ("summary.json", ("protocol", "more"), 1, "has other fields than this version writes; evaluate again"),
        ("summary.json", ("format_version",), "2", "key 'format_version' is \"2\"; needed: a valid integer"),
        ("summary.json", ("format_version",), 1, "has format 1, this version reads 2; evaluate again"),
        ("summary.json", ("protocol",), [], r"key 'protocol' is \[\]; needed: an object"),
    ],
)  # fmt: skip
def test_a_value_that_no_evaluation_writes_is_named_with_what_is_needed(directory, file, keys, to, message):
    change(directory, file, *keys, to=to)
    with pytest.raises(UserError, match=message):
        results.load(directory)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"[1]", b'"x"', b"{}"])
@pytest.mark.parametrize("file", ["summary.json", "episodes.json"])
def test_what_is_no_evaluation_is_one_line(directory, file, content):
    (directory / file).write_bytes(content)
    with pytest.raises(UserError) as refused:
        results.load(directory)
    assert str(directory) in str(refused.value) and "\n" not in str(refused.value)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(directory):
    (directory / "episodes.json").unlink()
    os.mkfifo(directory / "episodes.json")
    with pytest.raises(UserError, match=r"episodes\.json is no regular file"):
        results.load(directory)


def test_a_number_of_episodes_beyond_memory_is_counted_not_listed(directory):
    change(directory, "summary.json", "protocol", "num_episodes", to=2**52)
    assert not results.load(directory).is_complete


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))


@pytest.mark.parametrize("scene", [BOMB, "[" * 5000, "a: [", "\x00", "a: {b: " * 40 + "}" * 40])
def test_a_scene_that_no_evaluation_writes_is_refused(scene):
    with pytest.raises(UserError, match=r"^the scene of an evaluation: (not valid YAML|.* values)"):
        pairs.scene_keys(scene)


def test_a_scene_is_text_and_reads_nothing_of_this_machine(monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    assert pairs.scene_keys("a: ${oc.env:TOKEN}\nb: [1, x]") == {"a": "${oc.env:TOKEN}", "b.0": 1, "b.1": "x"}
    with pytest.raises(UserError, match=r"the tag 'tag:yaml\.org,2002:python/name:os\.system' is not allowed"):
        pairs.scene_keys("b: !!python/name:os.system x")


# ---------------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(
    ("video", "why"),
    [
        ("{outside}/secret.txt", "which is not below"),
        ("../secret.mp4", "which is not below"),
        ("link.mp4", "which is not below"),
        ("videos/page.mp4", "is no MP4"),
        ("videos", "is no regular file"),
        ("nothing.mp4", "is missing"),
        ("videos/\x00.mp4", "which is not below"),
    ],
)
def test_a_page_has_no_file_that_is_not_a_video_below_its_results(directory, tmp_path, video, why):
    """`compare --html` embedded any local file that somebody's results called a video."""
    for name in ("secret.txt", "secret.mp4"):
        (tmp_path / name).write_bytes(b"\x00\x00\x00\x18ftyp a secret")
    (directory / "videos").mkdir()
    (directory / "videos" / "page.mp4").write_text("<script>alert(1)</script>")
    (directory / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    change(directory, "episodes.json", 1, "video", to=video.format(outside=tmp_path))
    report.write_report(tmp_path / "page.html", [directory], [])
    page = Page((tmp_path / "page.html").read_text())
    assert not [attributes for tag, attributes in page.elements if tag == "video"]
    assert "Its video is not shown: " in page.text and why in page.text


# ----------------------------------------------------------------------------------------------------------------- pages


@pytest.fixture
def hostile(tmp_path: Path) -> list[Path]:
    """Two evaluations whose every text is hostile."""
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        evaluation = sample_evaluation([SUCCESS, FAILURE, CRASH, SUCCESS])
        own = {name: HOSTILE for name in ("task", "policy", "checkpoint", "renderer", "simulator", "device")}
        own |= {"scene": f"a: {json.dumps(HOSTILE)}\n", "ablation": f"instruction={HOSTILE}"}
        lists = {"checkpoints": [HOSTILE, None], "weights": [HOSTILE, None], "fingerprints": [HOSTILE, None]}
        protocol = dataclasses.replace(evaluation.protocol, **own, **lists, versions={HOSTILE: HOSTILE})
        changed = {"reason": HOSTILE, "phases": [HOSTILE] * 2, "measures": {HOSTILE: 1.0}}
        episodes = [dataclasses.replace(episode, **changed) for episode in evaluation.episodes]
        episodes[0] = dataclasses.replace(episodes[0], video=film(directory, 10_000, 3))
        results.save(results.Evaluation(protocol, episodes), directory)
    return directories


def test_nothing_that_results_say_becomes_markup_script_or_a_url(hostile, tmp_path):
    compare.main([*map(str, hostile), "--html", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 1, "the page's own"
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert all("javascript" not in str(attributes.get("href")) for _, attributes in page.elements)
    assert "alert(2)" in page.text and r"\x1b]0;owned\x07" in page.text, "it is there, as text"
    assert not set(text) & {"\x1b", "\x07", "\x00", "\u202e"}
    assert "default-src 'none'; img-src data:; media-src data:" in page.elements[3][1]["content"]  # type: ignore[operator]


def test_nothing_that_results_say_is_obeyed_by_the_terminal(hostile, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare", *map(str, hostile)])
    run_command(compare.main)
    said = capsys.readouterr().out
    assert r"<script>alert(2)</script> \x1b]0;owned\x07\x1b[31m \u202e\x00 end" in said
    assert not set(said) & {"\x1b", "\x07", "\x00", "\u202e"}
    assert "95\u00a0% interval" in said, "spaces are no control characters"


def test_a_directorys_name_is_no_scheme_of_a_link(tmp_path):
    from robofactory.evaluation import checkpoints_report

    results.save(sample_evaluation([SUCCESS]), tmp_path / "javascript:alert(1)" / "all_agents")
    page = Page(checkpoints_report.write_report(tmp_path).read_text())
    assert [attributes["href"] for tag, attributes in page.elements if tag == "a"] == [
        "javascript%3Aalert%281%29/report.html"
    ]


def test_an_evaluation_that_cannot_be_read_is_named_on_the_page_of_the_others(directory, tmp_path):
    results.save(sample_evaluation([SUCCESS]), tmp_path / "b")
    change(directory, "episodes.json", 1, "outcome", to="glory")
    text = Page(report.write_report_of_root(tmp_path).read_text()).text
    assert "Not to be read" in text and "key '1.outcome' is \"glory\"" in text and "1 of 1 unseen seeds" in text


METRICS = [
    b'{"step": 10, "train_loss": 3.0}', b'{"step": 20, "train_loss": "none"}', b"5", b"\xff", b'{"train_loss": 1.0}',
    b'{"step": "30", "train_loss": 1.0}', b'{"step": 40, "train_loss": NaN}', b'{"step": 50, "train_loss": 1' + b"0" * 400 + b"}",
    b"[" * 100_000, b'{"step": 60, "train_loss": 2.0}', b'{"step": 70, "trai',
]  # fmt: skip


def test_lines_of_metrics_that_no_training_wrote_are_not_drawn(directory, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(b"\n".join(METRICS))
    report.write_report(tmp_path / "page.html", [directory], [run])
    (curve,) = [a["points"] for tag, a in Page((tmp_path / "page.html").read_text()).elements if tag == "polyline"]
    assert [float(point.split(",")[0]) for point in str(curve).split()] == pytest.approx([99.7, 348.0], abs=0.1)


# ----------------------------------------------------------------------------------------------------------------- looks


def some_looks(**changes) -> looks.Looks:
    random = np.random.default_rng(0)
    sure = np.full((2, 3, 4), 0.25, np.float32)
    own = looks.Looks(
        "ab", np.array([0, 2, 4]), ["start", "side"], random.random((3, 2, 2)).astype(np.float32), np.array([0, 4]),
        ["side"], np.zeros((2, 1, 6, 6, 3), np.uint8), np.ones((2, 1, 2, 2), np.float32), ["a", "b", "c"],
        np.zeros((3, 4), np.float32), sure, np.zeros((2, 3), np.int64),
    )  # fmt: skip
    return dataclasses.replace(own, **changes)


def test_looks_come_back_as_they_were(tmp_path):
    kept = some_looks(values=np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)))
    looks.save(kept, tmp_path / "looks.npz")
    again = looks.load(tmp_path / "looks.npz", "ab")
    assert again is not None and again.names == ["a", "b", "c"] and again.digest == "ab"
    for name in ("steps", "attention", "pictures", "values", "chosen"):
        np.testing.assert_array_equal(getattr(again, name), getattr(kept, name))


@pytest.mark.parametrize(
    "changes",
    [
        {"moments": np.array([0, 3])},
        {"views": ["front"]},
        {"names": ["a", "b"]},
        {"steps": np.array([0, 4, 2])},
        {"chosen": np.full((2, 3), 4)},
        {"attention": np.zeros((3, 2, 2), np.float32)},
        {"heat": np.full((2, 1, 2, 2), np.nan, np.float32)},
        {"pictures": np.zeros((2, 1, 6, 7, 3), np.uint8)},
        {"pictures": np.zeros((2, 1, 6, 6, 3), np.float32)},
        {"steps": np.array([], np.int64), "attention": np.zeros((0, 2, 2), np.float32)},
        {"parts": np.array([{"pickled": 1}, None], object)},
    ],
)
def test_looks_that_do_not_go_together_are_nobodys(tmp_path, changes):
    np.savez(tmp_path / "looks.npz", **(vars(some_looks()) | changes))
    assert looks.load(tmp_path / "looks.npz", "ab") is None


def archive(path: Path, header: str, content: bytes = b"") -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, **vars(some_looks()))
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as file:
        encoded = header.encode()
        file.writestr("more.npy", b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + content)
    path.write_bytes(stream.getvalue())


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "(" * 9000,
        "{'descr': '<U999999', 'fortran_order': False, 'shape': (99999999999999999999, 0), }",
    ],
)
def test_looks_that_claim_terabytes_or_pickles_are_not_read(tmp_path, header):
    archive(tmp_path / "looks.npz", header)
    assert looks.load(tmp_path / "looks.npz", "ab") is None


def test_a_bomb_of_zeros_and_a_file_of_something_else_are_no_looks(tmp_path):
    archive(
        tmp_path / "bomb.npz", "{'descr': '|u1', 'fortran_order': False, 'shape': (70000000,), }", bytes(70_000_000)
    )
    (tmp_path / "text.npz").write_text("looks")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "bomb.npz").read_bytes()[:3000])
    for name in ("bomb.npz", "text.npz", "cut.npz"):
        assert looks.load(tmp_path / name, "ab") is None, name
