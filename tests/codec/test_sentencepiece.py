"""`tokenizer.model` gives the ids that SentencePiece's own algorithm does."""

import struct
from itertools import pairwise
from pathlib import Path

import pytest

from robofactory.codec.prompt import Prompt
from robofactory.codec.sentencepiece import read_sentencepiece
from robofactory.errors import UserError
from tests.published import write_published

UNKNOWN, CONTROL, BYTE = 2, 3, 6
CHARACTERS = "\u2581?:.'" + "".join(map(chr, range(ord("a"), ord("z") + 1))) + "IWO"
WORDS = [
    "th",
    "er",
    "\u2581th",
    "\u2581the",
    "ri",
    "ar",
    "rri",
    "\u2581l",
    "if",
    "ift",
    "\u2581lift",
    "ba",
    "barri",
    "ot",
    "bot",
]


def pieces() -> list[tuple[str, float, int]]:
    """As in Llama's file: special ids, bytes, merged pieces with scores 0, -1, -2, ..., then characters."""
    special = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    normal = [(piece, -float(number), 1) for number, piece in enumerate([*WORDS, *CHARACTERS])]
    return special + [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)] + normal


def serialise(entries: list[tuple[str, float, int]]) -> bytes:
    """A ModelProto: its pieces, then a trainer_spec that a reader may skip."""
    model = b""
    for piece, score, kind in entries:
        text = piece.encode()
        message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
        if kind != 1:  # protobuf leaves out a default
            message += b"\x18" + bytes([kind])
        model += b"\x0a" + bytes([len(message)]) + message
    return model + b"\x12\x83\x01" + bytes(131)


def reference_ids(text: str) -> list[int]:
    """SentencePiece's BPE: again and again join the neighbours whose piece has the highest score; then bytes."""
    entries = pieces()
    ids = {piece: number for number, (piece, _, _) in enumerate(entries)}
    scores = {piece: score for piece, score, kind in entries if kind == 1}
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        joined = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not joined:
            break
        at = -max(joined)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    known = [[ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
    return [number for group in known for number in group]


@pytest.mark.parametrize(
    "text", ["lift the barrier", "in: what, either?\nOut:", "  the  other", "木 \U0001f916 x", "ththeer"]
)
def test_ids_equal_sentencepieces_own(tmp_path: Path, text: str):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(serialise(pieces()))
    tokenizer = read_sentencepiece(path)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == reference_ids(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_model_directory_without_tokenizer_json_uses_it(tmp_path: Path):
    weights = write_published(tmp_path)
    (weights / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Prompt.from_weights(weights)
    (weights / "tokenizer.model").write_bytes(serialise(pieces()))
    prompt = Prompt.from_weights(weights)
    text = "In: What action should the robot take to lift the barrier?\nOut:"
    empty = next(number for number, (piece, _, _) in enumerate(pieces()) if piece == "\u2581")
    assert prompt.encode("lift the barrier").tolist() == [1, *reference_ids(text), empty]
    (tmp_path / prompt.tokenizer_name).write_text(prompt.tokenizer_text)  # as it is kept beside codec.json
    assert Prompt.from_json(prompt.to_json(), tmp_path).encode("lift").equal(prompt.encode("lift"))


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"{}", serialise([("x", 0.0, 1)])])
def test_something_else_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no tokenizer of Llama"):
        read_sentencepiece(path)
