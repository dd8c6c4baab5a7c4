import dataclasses
from pathlib import Path

import pytest
from evaluation_samples import sample_evaluation
from test_report import Page

from robofactory.errors import UserError
from robofactory.evaluation import compare, results
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """B solves 9 layouts that A does not, A one that B does not; on one more A crashed."""
    outcomes = {"a": [FAILURE] * 9 + [SUCCESS] * 11 + [CRASH], "b": [SUCCESS] * 9 + [FAILURE] + [SUCCESS] * 11}
    for name, each in outcomes.items():
        results.save(sample_evaluation(each), tmp_path / name)
    return [str(tmp_path / name) for name in outcomes]


def test_the_command_says_which_is_better_in_plain_words(two, capsys):
    compare.main(two)
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "B better than A, p = 0.021, 20 pairs"  # 2 (1 + 10) / 2^10
    assert "both 10, only A 1, only B 9, neither 0; left out, as one of the pair crashed or timed out: 1" in said
    assert "note:" not in said


def test_it_is_said_which_of_the_two_was_ablated(two, capsys):
    b = results.load(Path(two[1]))
    protocol = dataclasses.replace(b.protocol, ablation="light=0.5")
    results.save(dataclasses.replace(b, protocol=protocol), Path(two[1]))
    compare.main(two)
    a_line, b_line = capsys.readouterr().out.splitlines()[2:4]
    assert a_line.endswith("the expert beside it") and b_line.endswith("the expert beside it, with light=0.5")


def test_the_page_has_the_sentence_the_table_and_both_evaluations(two, tmp_path):
    compare.main([*two, "--html", str(tmp_path / "compared.html")])
    page = Page((tmp_path / "compared.html").read_text())
    assert "B better than A, p = 0.021, 20 pairs" in page.text
    assert sum(tag == "article" for tag, _ in page.elements) == 2


def test_other_seeds_are_refused_and_other_versions_are_noted(two, tmp_path, capsys):
    b = results.load(Path(two[1]))
    other = dataclasses.replace(b.protocol, versions={"torch": "2.15.0"})
    results.save(dataclasses.replace(b, protocol=other), tmp_path / "newer")
    compare.main([two[0], str(tmp_path / "newer")])
    assert "note: torch is 2.14.1 in A and 2.15.0 in B\n" in capsys.readouterr().out
    results.save(sample_evaluation([SUCCESS]), tmp_path / "short")
    with pytest.raises(UserError, match="no pairs: A played seeds"):
        compare.main([two[0], str(tmp_path / "short")])


def test_a_directory_without_results_is_named(two, tmp_path):
    with pytest.raises(UserError, match="empty is no directory; give one that an evaluation wrote"):
        compare.main([two[0], str(tmp_path / "empty")])
