import json
from typing import Annotated

import pytest
from pydantic import Field

from robofactory import documents
from robofactory.documents import Document, PositiveCount
from robofactory.errors import UserError


class Feature(Document):
    dtype: str
    shape: list[PositiveCount]


class Info(Document):
    fps: Annotated[float, Field(gt=0)]
    features: dict[str, Feature]


@pytest.mark.parametrize(
    ("text", "problem"),
    {
        '{"features": {}}': "key 'fps' is missing",
        '{"fps": "1", "features": {}}': "key 'fps' is \"1\"; needed: a valid number",
        '{"fps": true, "features": {}}': "key 'fps' is true; needed: a valid number",
        '{"fps": NaN, "features": {}}': "key 'fps' is NaN; needed: a finite number",
        '{"fps": 1e999, "features": {}}': "key 'fps' is Infinity; needed: a finite number",
        '{"fps": 0, "features": {}}': "key 'fps' is 0; needed: greater than 0",
        '{"fps": 1, "features": {"a": 5}}': "key 'features.a' is 5; needed: an object",
        '{"fps": 1, "features": {"a": {"dtype": "x", "shape": [1.5]}}}': "key 'features.a.shape.0' is 1.5; needed: a valid integer",
        "[]": "there is []; needed: an object",
    }.items(),
    ids=str,
)
def test_a_value_of_another_kind_is_refused_by_file_key_what_is_there_and_what_is_needed(text, problem):
    with pytest.raises(UserError) as error:
        documents.parse_json(text, Info, "info.json", "download it again")
    assert str(error.value) == f"info.json: {problem}; download it again"


@pytest.mark.parametrize("text", ["", "{", "null null", "[" * 100_000, "9" * 5000, '"\\ud800"'], ids=lambda t: t[:9])
def test_what_is_not_json_is_refused_in_one_short_line(text):
    with pytest.raises(UserError, match=r"^info\.json is not valid JSON") as error:
        documents.parse_json(text, Info, "info.json")
    assert len(str(error.value)) < 150 and "\n" not in str(error.value)


def test_unknown_keys_are_ignored():
    assert documents.parse_json('{"fps": 29.97, "features": {}, "tools": 1}', Info, "x") == Info(fps=29.97, features={})


def test_json_lines_are_numbered_in_messages_and_empty_ones_skipped(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text('\ufeff{"dtype": "größer", "shape": [1]}\n\n{"dtype": 3, "shape": [1]}\n', encoding="utf-8")
    lines = documents.read_json_lines(path, Feature)
    assert next(lines).dtype == "größer"
    with pytest.raises(UserError, match=r"episodes\.jsonl: line 3: key 'dtype' is 3; needed: a valid string"):
        next(lines)


def test_a_text_of_another_encoding_is_named_as_one(tmp_path):
    path = tmp_path / "info.json"
    path.write_bytes(json.dumps({"task": "größer"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match=r"info\.json is not UTF-8 \(byte 12\)"):
        documents.read_json(path, Info)
