"""TFRecord files and the tf.train.Example messages in them, without TensorFlow.

A record: length (8 bytes, little endian), its checksum (4), the data, their checksum (4). Checksums are CRC-32C, masked.
Source: tensorflow/core/lib/io/record_writer.h, tensorflow/core/example/{example,feature}.proto.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from robofactory import files
from robofactory.data.imports.source import FETCH_AGAIN, needs
from robofactory.errors import UserError

try:
    import google_crc32c
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.message import DecodeError
except ImportError:
    raise needs("google-crc32c and protobuf") from None

MAX_BYTES = 1_000_000_000  # of a record, which is read as a whole
HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
MASK_DELTA = 0xA282EAD8  # record_writer.h: so that a checksum of data that hold checksums is no trivial one

Feature = list[bytes] | Float32[np.ndarray, " _n"] | Int64[np.ndarray, " _n"]  # of any length each


class Record(NamedTuple):
    """Where the data of a record lie."""

    file: Path
    offset: int
    length: int


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def list_records(path: Path) -> list[Record]:
    """All records of a file, from their headers alone.

    Raises:
        UserError: it is truncated, damaged or something else.
    """
    files.require_regular(path, FETCH_AGAIN)
    records, size, offset = [], path.stat().st_size, 0
    with open(path, "rb") as file:
        while offset < size:
            file.seek(offset)
            header = file.read(HEADER.size)
            is_whole = len(header) == HEADER.size
            length, crc = HEADER.unpack(header) if is_whole else (0, 0)
            if is_whole and masked_crc(header[:8]) != crc:
                raise UserError(f"{path}: the checksum at byte {offset} is wrong; it is damaged, compressed or no TFRecord")  # fmt: skip
            end = offset + HEADER.size + length + FOOTER.size
            if not is_whole or end > size:
                raise UserError(f"{path} is truncated: record {len(records)} ends behind its end")
            if length > MAX_BYTES:
                raise UserError(
                    f"{path}: record {len(records)} has {length:,} bytes, more than the {MAX_BYTES:,} allowed"
                )
            records.append(Record(path, offset + HEADER.size, length))
            offset = end
    return records


def read_example(record: Record) -> dict[str, Feature]:
    """The features of a record by their names, in the order of the alphabet: a message has none.

    Raises:
        UserError: it is damaged, or no tf.train.Example.
    """
    with open(record.file, "rb") as file:
        file.seek(record.offset)
        data = file.read(record.length)
        footer = file.read(FOOTER.size)
    if len(footer) < FOOTER.size or masked_crc(data) != FOOTER.unpack(footer)[0]:
        raise UserError(f"{record.file}: the record at byte {record.offset} is damaged, its checksum is wrong")
    try:
        features = EXAMPLE.FromString(data).features.feature
    except DecodeError:
        raise UserError(f"{record.file}: the record at byte {record.offset} is no tf.train.Example") from None
    return {name: _values(features[name]) for name in sorted(features)}


def _values(feature: Any) -> Feature:
    kind = feature.WhichOneof("kind")
    if kind == "float_list":
        return np.array(feature.float_list.value, np.float32)
    if kind == "int64_list":
        return np.array(feature.int64_list.value, np.int64)
    return list(feature.bytes_list.value)


def _example_class() -> Any:
    """tf.train.Example: {features: {feature: map<string, bytes_list | float_list | int64_list>}}."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def message(name: str, parent: Any = file.message_type) -> Any:
        return parent.add(name=name)

    def add(to: Any, name: str, number: int, kind: Any, is_repeated: bool = False, **more: Any) -> None:
        label = field.LABEL_REPEATED if is_repeated else field.LABEL_OPTIONAL
        to.field.add(name=name, number=number, type=kind, label=label, **more)

    kinds = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(kinds.items(), start=1):
        add(message(name), "value", 1, kind, is_repeated=True)
        list_name = name.replace("List", "_list").lower()
        add(feature, list_name, number, field.TYPE_MESSAGE, type_name=f".tensorflow.{name}", oneof_index=0)
    features = message("Features")
    entry = message("FeatureEntry", features.nested_type)
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, type_name=".tensorflow.Feature")
    inner = ".tensorflow.Features.FeatureEntry"
    add(features, "feature", 1, field.TYPE_MESSAGE, is_repeated=True, type_name=inner)
    add(message("Example"), "features", 1, field.TYPE_MESSAGE, type_name=".tensorflow.Features")
    pool = descriptor_pool.DescriptorPool()  # of our own: TensorFlow may have registered the same names
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


EXAMPLE = _example_class()
