"""JSON and tables' values that may come from elsewhere: of the declared type, or refused in one line.

A format is declared once, as a `Document`, in the room that reads it. Numbers are numbers (no text, no boolean, neither
NaN nor infinity); unknown keys are ignored unless the format says otherwise.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from robofactory import files
from robofactory.errors import UserError

MAX_BYTES = 64_000_000  # of a JSON file, or of a line where each is a value: parsed they take some 20 times as much
SHOWN_CHARACTERS = 60  # of a value in a message

Kind = TypeVar("Kind")

Count = Annotated[int, Field(ge=0, lt=2**53)]
PositiveCount = Annotated[int, Field(gt=0, lt=2**53)]


class Document(BaseModel):
    """Base of declared formats."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore", hide_input_in_errors=True)


def read_json(path: Path, kind: type[Kind] | GenericAlias, advice: str = "") -> Kind:
    """A JSON file's content.

    Args:
        kind: a `Document`, or any other type that pydantic knows, such as `list[SomeDocument]`.
        advice: ends the message, for instance "download it again".
    Raises:
        UserError: missing, no regular file, not UTF-8, not JSON, or not of this kind; the line names file and key, says
            what is there and what is needed.
    """
    return parse_json(files.read_text(path, MAX_BYTES, advice), kind, str(path), advice)


def read_json_lines(path: Path, kind: type[Kind] | GenericAlias, advice: str = "") -> Iterator[Kind]:
    """A JSON value in each line; empty lines are skipped. Raises UserError as `read_json`; the line has a number."""
    files.require_regular(path, advice)
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_BYTES + 1):
            number += 1
            if len(line) > MAX_BYTES:
                raise UserError(f"{path}: line {number} has more than {MAX_BYTES:,} bytes{_end(advice)}")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise UserError(f"{path}: line {number} is not UTF-8{_end(advice)}") from None
            if text:
                yield parse_json(text, kind, f"{path}: line {number}", advice)


def parse_json(text: str | bytes, kind: type[Kind] | GenericAlias, source: str, advice: str = "") -> Kind:
    """As `read_json`, of text. `source` stands for the file in messages."""
    try:
        return TypeAdapter[Kind](kind).validate_json(text)  # type: ignore[arg-type]
    except ValidationError as error:
        raise UserError(_refusal(error, source, advice)) from None


def check(value: Any, kind: type[Kind] | GenericAlias, source: str, advice: str = "") -> Kind:
    """As `read_json`, of values that are in memory already: a table's row, attributes, a part of a document."""
    try:
        return TypeAdapter[Kind](kind).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as error:
        raise UserError(_refusal(error, source, advice)) from None


def is_json(text: str) -> bool:
    """Whether it is one JSON value."""
    try:
        from_json(text)
    except ValueError:
        return False
    return True


def _refusal(error: ValidationError, source: str, advice: str) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"{source} is not valid JSON ({first['ctx']['error']}){_end(advice)}"  # type: ignore[typeddict-item]
    return f"{source}: {_what_is_wrong(first)}{_end(advice)}"


def _what_is_wrong(error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    needed = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    there = json.dumps(error["input"], ensure_ascii=False, default=repr)
    if len(there) > SHOWN_CHARACTERS:
        there = f"{there[:SHOWN_CHARACTERS]}..."
    return f"{f'key {key!r} is' if key else 'there is'} {there}; needed: {needed}"


def _end(advice: str) -> str:
    return f"; {advice}" if advice else ""
