"""Llama's `tokenizer.model`, a SentencePiece BPE model, as a tokenizer of the `tokenizers` library."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from robofactory.errors import UserError

SPACE = "\u2581"  # stands for a space in the pieces
NORMAL = 1  # kind of a piece that text is made of; others are special, unused or stand for single bytes
FIXED_SIZES = {1: 8, 5: 4}  # bytes, by protobuf's wire type


def read_sentencepiece(path: Path) -> Tokenizer:
    """The same ids as SentencePiece gives, for text without special tokens.

    Raises:
        UserError: the file is no SentencePiece BPE model.
    """
    try:
        pieces = [_read_piece(value) for number, value in _fields(path.read_bytes()) if number == 1]
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, struct.error):  # it is something else
        pieces = []
    ids = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    if "<unk>" not in ids:
        raise UserError(f"{path} is no tokenizer of Llama; copy it again from the published model")
    normal = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    merges = []  # the best piece first; of its halves, those with the lowest ids
    for piece in sorted(normal, key=lambda piece: (-normal[piece], ids[piece])):
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += sorted((pair for pair in halves if normal.keys() >= set(pair)), key=lambda p: (ids[p[0]], ids[p[1]]))
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _read_piece(message: bytes) -> tuple[str, float, int]:
    """Text, score and kind. Source: SentencePiece's sentencepiece_model.proto (fields 1, 2 and 3)."""
    values = dict(_fields(message))
    (score,) = struct.unpack("<f", values.get(2, bytes(4)))
    return values[1].decode("utf-8"), score, values.get(3, NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message; bytes, or an int where it is a varint."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
        else:
            size = varint() if wire_type == 2 else FIXED_SIZES[wire_type]
            yield number, message[at : at + size]
            at += size
