"""Damage to TFRecord files and the messages in them, with their right sums."""

import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.mutations.damage import FILE, Damage, Inapplicable, Kinds
from benchmarks.mutations.pictures import other_mode, other_picture
from robofactory.data.imports.tfrecord import EXAMPLE, list_records, masked_crc

TFRECORD = Kinds(FILE)
WORDS = [b"", b"\x1b[2J\r\n", b"caf\xe9", b"$a_b$ 10^$", b"x" * 1_000_000, b"<script>alert(1)</script>", b"\x00"]


def write_records(path: Path, records: list[bytes]) -> None:
    """With their right sums, so that the damage reaches the reader."""
    parts = []
    for record in records:
        header = struct.pack("<Q", len(record))
        parts += [header, struct.pack("<I", masked_crc(header)), record, struct.pack("<I", masked_crc(record))]
    path.write_bytes(b"".join(parts))


def read_records(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return [content[record.offset : record.offset + record.length] for record in list_records(path)]


def of_records(is_loss: bool = False) -> Callable:
    def register(change: Callable[[list[bytes], Random], str]) -> Callable:
        def apply(path: Path, random: Random) -> str:
            records = read_records(path)
            what = change(records, random)
            write_records(path, records)
            return what

        TFRECORD[change.__name__] = Damage(change.__name__, apply, is_loss=is_loss)
        return change

    return register


def of_example(is_harmless: bool = False, is_loss: bool = False) -> Callable:
    def register(change: Callable[[Any, str, Random], str]) -> Callable:
        def apply(path: Path, random: Random) -> str:
            records = read_records(path)
            index = random.randrange(len(records))
            message = EXAMPLE.FromString(records[index])
            features = message.features.feature
            name = random.choice(sorted(features))
            what = change(features, name, random)
            records[index] = message.SerializeToString()
            write_records(path, records)
            return f"record {index}, {name} {what}"

        TFRECORD[change.__name__] = Damage(change.__name__, apply, is_harmless, is_loss)
        return change

    return register


@of_records(is_loss=True)
def record_dropped(records, random):
    records.pop(random.randrange(len(records)))
    return ""


@of_records()
def record_doubled(records, random):
    records.append(records[0])
    return ""


@of_records(is_loss=True)
def record_is_no_message(records, random):
    records[0] = random.randbytes(100)
    return "random bytes"


@of_records(is_loss=True)
def record_is_empty(records, random):
    records[random.randrange(len(records))] = b""
    return ""


@of_example()
def feature_dropped(features, name, random):
    del features[name]
    return ""


@of_example(is_harmless=True)
def feature_added(features, name, random):
    features["of_a_later_version"].int64_list.value.append(3)
    return ""


@of_example()
def feature_emptied(features, name, random):
    features[name].Clear()
    return ""


@of_example()
def feature_retyped(features, name, random):
    feature = features[name]
    kind = feature.WhichOneof("kind")
    feature.Clear()
    if kind == "bytes_list":
        feature.float_list.value.extend([1.0, 2.0])
    else:
        feature.bytes_list.value.append(b"words")
    return str(kind)


@of_example()
def feature_longer(features, name, random):
    values = getattr(features[name], features[name].WhichOneof("kind")).value
    values.append(values[0])
    return ""


@of_example(is_loss=True)
def feature_shorter(features, name, random):
    values = getattr(features[name], features[name].WhichOneof("kind")).value
    del values[-1]
    return ""


@of_example(is_loss=True)
def feature_not_finite(features, name, random):
    values = features[name].float_list.value
    if not values:
        raise Inapplicable
    values[0] = random.choice([np.nan, np.inf])
    return str(values[0])


@of_example()
def feature_with_another_picture(features, name, random):
    values = features[name].bytes_list.value
    if not values or not values[0].startswith(b"\x89PNG"):
        raise Inapplicable
    index = random.randrange(len(values))
    values[index], what = random.choice([other_picture, other_mode])(values[index], random)
    return what


@of_example()
def feature_with_other_words(features, name, random):
    values = features[name].bytes_list.value
    if not values:
        raise Inapplicable
    values[random.randrange(len(values))] = words = random.choice(WORDS)
    return repr(words[:20])


def declared_terabytes(path: Path, random: Random) -> str:
    header = struct.pack("<Q", 2**42)
    path.write_bytes(header + struct.pack("<I", masked_crc(header)) + path.read_bytes()[12:])
    return "a record of 4 TB"


TFRECORD["declared_terabytes"] = Damage("declared_terabytes", declared_terabytes, is_loss=True)
