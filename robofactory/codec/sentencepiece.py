"""Llama's `tokenizer.model`, a SentencePiece BPE model, as a tokenizer of the `tokenizers` library."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from robofactory.errors import UserError
from robofactory.files import require_regular
from robofactory.published import ADVICE

SPACE = "\u2581"  # stands for a space in the pieces
NORMAL = 1  # kind of a piece that text is made of; others are special, unused or stand for single bytes
UNIGRAM, BPE = 1, 2  # kinds of a model; its trainer_spec omits the first
MAX_BYTES = 16_000_000  # Llama's has half a million
MAX_PIECE_BYTES = 1_000
FIXED_SIZES = {1: 8, 5: 4}  # bytes, by protobuf's wire type


def read_sentencepiece(path: Path) -> Tokenizer:
    """The same ids as SentencePiece gives, for text without special tokens.

    Raises:
        UserError: the file is no SentencePiece BPE model.
    """
    require_regular(path, ADVICE)
    is_small, is_bpe = path.stat().st_size <= MAX_BYTES, True
    try:
        fields = list(_fields(path.read_bytes())) if is_small else []
        pieces = [_read_piece(value) for number, value in fields if number == 1]
        is_bpe = all(_trains_bpe(value) for number, value in fields if number == 2)
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, struct.error):  # it is something else
        pieces = []
    ids = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    if "<unk>" not in ids or not is_bpe:
        raise UserError(f"{path} is no tokenizer of Llama; {ADVICE}")
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
    if len(message) > MAX_PIECE_BYTES:
        raise IndexError("longer than any piece")
    values = dict(_fields(message))
    (score,) = struct.unpack("<f", values.get(2, bytes(4)))
    return values[1].decode("utf-8"), score, values.get(3, NORMAL)


def _trains_bpe(trainer_spec: bytes) -> bool:
    """Other kinds of models have pieces and scores too, and make other ids of them."""
    with contextlib.suppress(IndexError, KeyError):  # nothing else of it matters
        return dict(_fields(trainer_spec)).get(3, UNIGRAM) == BPE
    return True


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message; bytes, or an int where it is a varint."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            if shift > 63:
                raise IndexError("longer than any number")
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
            if at + size > len(message):
                raise IndexError("cut off")
            yield number, message[at : at + size]
            at += size
