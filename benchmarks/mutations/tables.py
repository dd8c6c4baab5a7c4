"""Damage to what binary containers hold: Parquet, HDF5, TFRecord, safetensors, and the pictures in them."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.mutations.damage import FILE, NAMED, Damage, Inapplicable, Kinds, outside
from benchmarks.mutations.trees import JSON, written_json
from robofactory.data.imports.tfrecord import EXAMPLE, list_records, masked_crc

# --------------------------------------------------------------------------------------------------------- pictures


def bomb() -> bytes:
    """A PNG of a few bytes that says it has ten billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def as_png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def other_picture(content: bytes, random: Random) -> tuple[bytes, str]:
    """Another size, mode or content; and what it is."""
    image = Image.open(io.BytesIO(content))
    width, height = image.size
    choices: dict[str, Callable[[], bytes]] = {
        "half the size": lambda: as_png(image.resize((width // 2, height // 2))),
        "turned": lambda: as_png(image.transpose(Image.Transpose.ROTATE_90)),
        "a bomb": bomb,
        "no picture": lambda: b"no picture",
        "nothing": lambda: b"",
        "half of the file": lambda: content[: len(content) // 2],
        "a text": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    name = random.choice(list(choices))
    return choices[name](), name


def other_mode(content: bytes, random: Random) -> tuple[bytes, str]:
    """The same picture in a mode that holds it as well."""
    image = Image.open(io.BytesIO(content))
    mode = random.choice(["RGBA", "P"])
    return as_png(image.convert("RGBA") if mode == "RGBA" else image.quantize(256)), mode


# ---------------------------------------------------------------------------------------------------------- parquet

PARQUET = Kinds(FILE)
Change = Callable[[pa.Table, Random, Path], tuple[pa.Table, str]]


def of_table(is_harmless: bool = False, is_loss: bool = False) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        def apply(path: Path, random: Random) -> str:
            table, what = change(pq.read_table(path), random, path)
            pq.write_table(table, path)
            return what

        PARQUET[change.__name__] = Damage(change.__name__, apply, is_harmless, is_loss)
        return change

    return register


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def a_column(table: pa.Table, random: Random, suits: Callable[[pa.DataType], bool] = lambda kind: True) -> str:
    names = [name for name in table.column_names if suits(table.schema.field(name).type)]
    if not names or not len(table):
        raise Inapplicable
    return random.choice(names)


def is_vector(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)) and not pa.types.is_string(kind.value_type)


def is_picture(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind)


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


@of_table()
def column_dropped(table, random, path):
    name = a_column(table, random)
    return table.drop_columns([name]), name


@of_table()
def column_renamed(table, random, path):
    name = a_column(table, random)
    return table.rename_columns([f"{n}_" if n == name else n for n in table.column_names]), name


@of_table(is_harmless=True)
def column_added(table, random, path):
    return table.append_column("of_a_later_version", pa.array([["x"]] * len(table))), ""


@of_table()
def column_doubled(table, random, path):
    name = a_column(table, random)
    return table.append_column(name, table[name]), name


@of_table()
def column_retyped(table, random, path):
    name = a_column(table, random)
    kind = random.choice(["text", "nested", "boolean", "null", "date", "dictionary"])
    values = {
        "text": lambda: pa.array([str(value)[:20] for value in table[name].to_pylist()]),
        "nested": lambda: pa.array([[[1.0]]] * len(table)),
        "boolean": lambda: pa.array([True] * len(table)),
        "null": lambda: pa.nulls(len(table)),
        "date": lambda: pa.array([0] * len(table), pa.timestamp("us")),
        "dictionary": lambda: pa.array(["a"] * len(table)).dictionary_encode(),
    }[kind]()
    return replaced(table, name, values), f"{name}: {kind}"


@of_table(is_loss=True)
def nulls(table, random, path):
    name = a_column(table, random)
    values, row = table[name].to_pylist(), random.randrange(len(table))
    values[row] = None
    return replaced(table, name, pa.array(values, table.schema.field(name).type)), f"{name}, row {row}"


@of_table(is_loss=True)
def not_finite_numbers(table, random, path):
    name = a_column(table, random, lambda kind: pa.types.is_floating(kind) or is_vector(kind) and pa.types.is_floating(kind.value_type))  # fmt: skip
    values, row = table[name].to_pylist(), random.randrange(len(table))
    bad = random.choice([float("nan"), float("inf"), -float("inf")])
    values[row] = bad if not isinstance(values[row], list) else [bad, *values[row][1:]]
    return replaced(table, name, pa.array(values, table.schema.field(name).type)), f"{name}, row {row}: {bad}"


@of_table()
def other_numbers(table, random, path):
    name = a_column(table, random, is_number)
    values, row = table[name].to_pylist(), random.randrange(len(table))
    bad = random.choice([-1, 10**6, 2**62, 0, 999])
    values[row] = bad
    return replaced(table, name, pa.array(values, table.schema.field(name).type)), f"{name}, row {row}: {bad}"


@of_table()
def all_numbers(table, random, path):
    name = a_column(table, random, is_number)
    bad = random.choice([-1, 10**6, 2**62, 0])
    return replaced(table, name, pa.array([bad] * len(table), table.schema.field(name).type)), f"{name}: {bad}"


@of_table()
def vectors_of_another_length(table, random, path):
    name = a_column(table, random, is_vector)
    values, row = table[name].to_pylist(), random.randrange(len(table))
    kind, which = pa.list_(table.schema.field(name).type.value_type), random.choice(["one", "all", "empty"])
    if which == "one":
        values[row] = values[row] + values[row]
    else:
        values = [value[:1] if which == "all" else [] for value in values]
    return replaced(table, name, pa.array(values, kind)), f"{name}: {which}"


@of_table(is_loss=True)
def fewer_rows(table, random, path):
    keep = random.randrange(len(table)) if len(table) else 0
    return table.slice(0, keep), f"{keep} of {len(table)}"


@of_table()
def more_rows(table, random, path):
    return pa.concat_tables([table, table.slice(0, random.randint(1, 3))]), ""


@of_table()
def rows_in_another_order(table, random, path):
    order = list(range(len(table)))
    random.shuffle(order)
    return table.take(order), ""


@of_table()
def pictures_that_differ(table, random, path):
    return _pictures(table, random, other_picture)


@of_table()
def pictures_in_another_mode(table, random, path):
    return _pictures(table, random, other_mode)


def _pictures(table, random, change):
    name = a_column(table, random, is_picture)
    values, row = table[name].to_pylist(), random.randrange(len(table))
    values[row]["bytes"], what = change(values[row]["bytes"], random)
    return replaced(table, name, pa.array(values, table.schema.field(name).type)), f"{name}, row {row}: {what}"


@of_table(is_loss=True)
def pictures_elsewhere(table, random, path):
    name = a_column(table, random, is_picture)
    values, row = table[name].to_pylist(), random.randrange(len(table))
    place = random.choice([str(outside(path) / "secret.png"), "../../outside/secret.png", "../outside/secret.png", "/dev/zero", "nowhere.png", "", None])  # fmt: skip
    values[row] = {"bytes": None, "path": place}
    return replaced(table, name, pa.array(values, table.schema.field(name).type)), f"{name}, row {row}: {place}"


@of_table()
def other_words(table, random, path):
    name = a_column(table, random, pa.types.is_string)
    values, row = table[name].to_pylist(), random.randrange(len(table))
    values[row] = random.choice(["", "\x1b[2J\r\n", "$a_b$ 10^$", "<script>alert(1)</script>", "x" * 1_000_000, "\u202e"])  # fmt: skip
    return replaced(table, name, pa.array(values, pa.string())), f"{name}, row {row}: {values[row][:20]!r}"


# ------------------------------------------------------------------------------------------------------------- hdf5

HDF5 = Kinds(FILE)


def of_hdf5(is_harmless: bool = False, is_loss: bool = False) -> Callable:
    def register(change: Callable[[h5py.File, str, Random, Path], str]) -> Callable:
        def apply(path: Path, random: Random) -> str:
            with h5py.File(path, "r+") as file:
                names: list[str] = []
                file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
                name = random.choice(names)
                return f"{name} {change(file, name, random, path)}"

        HDF5[change.__name__] = Damage(change.__name__, apply, is_harmless, is_loss)
        return change

    return register


def put(file: h5py.File, name: str, values: Any) -> None:
    del file[name]
    file[name] = values


@of_hdf5()
def dataset_dropped(file, name, random, path):
    del file[name]
    return ""


@of_hdf5()
def group_dropped(file, name, random, path):
    group = file[name].parent.name
    del file[group]
    return group


@of_hdf5()
def group_instead(file, name, random, path):
    del file[name]
    file.create_group(name)
    return ""


@of_hdf5()
def dataset_instead_of_its_group(file, name, random, path):
    group = file[name].parent.name
    put(file, group, np.zeros(3))
    return group


@of_hdf5(is_harmless=True)
def dataset_added(file, name, random, path):
    file["of_a_later_version"] = np.arange(3)
    return ""


@of_hdf5()
def dataset_retyped(file, name, random, path):
    values, kind = file[name][:], random.choice(["S8", "bool", "complex64", "f8", "i8", "compound", "text"])
    if kind == "compound":
        put(file, name, np.zeros(len(values), [("a", "f4"), ("b", "i4")]))
    elif kind == "text":
        put(file, name, ["words"] * len(values))
    else:
        put(file, name, values.astype(kind))
    return kind


@of_hdf5()
def dataset_reshaped(file, name, random, path):
    values = file[name][:]
    shape = random.choice(["longer", "shorter", "flat", "deeper", "scalar", "nothing", "wider", "narrower"])
    changed = {
        "longer": lambda: np.concatenate([values, values]),
        "shorter": lambda: values[: len(values) // 2],
        "flat": lambda: values.reshape(-1),
        "deeper": lambda: values[..., None],
        "scalar": lambda: values.reshape(-1)[0],
        "nothing": lambda: values[:0],
        "wider": lambda: np.concatenate([values, values], axis=-1),
        "narrower": lambda: values[..., :1],
    }[shape]()
    put(file, name, changed)
    return shape


@of_hdf5(is_loss=True)
def dataset_not_finite(file, name, random, path):
    values = file[name][:]
    if values.dtype.kind != "f":
        raise Inapplicable
    values.reshape(-1)[random.randrange(values.size)] = bad = random.choice([np.nan, np.inf])
    put(file, name, values)
    return str(bad)


@of_hdf5(is_loss=True)
def dataset_without_storage(file, name, random, path):
    """Declared sizes of terabytes that take no byte."""
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    chunks = (1, *shape[1:])
    file.create_dataset(name, shape=(10**9, *shape[1:]), dtype=kind, chunks=chunks)
    return "10^9 rows"


@of_hdf5(is_loss=True)
def dataset_is_huge(file, name, random, path):
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape=(*shape[:-1], 10**10), dtype=kind, chunks=(*(1 for _ in shape[:-1]), 1000))
    return "10^10 columns"


@of_hdf5(is_loss=True)
def external_link(file, name, random, path):
    del file[name]
    file[name] = h5py.ExternalLink(str(outside(path) / "secret.h5"), "/data")
    return ""


@of_hdf5(is_loss=True)
def external_storage(file, name, random, path):
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    size = int(np.prod(shape)) * kind.itemsize
    file.create_dataset(name, shape=shape, dtype=kind, external=[(str(outside(path) / "secret.txt"), 0, size)])
    return ""


@of_hdf5(is_loss=True)
def virtual_dataset(file, name, random, path):
    shape, kind = file[name].shape, file[name].dtype
    del file[name]
    layout = h5py.VirtualLayout(shape=shape, dtype=kind)
    layout[:] = h5py.VirtualSource(str(outside(path) / "secret.h5"), "data", shape=shape)
    file.create_virtual_dataset(name, layout)
    return ""


@of_hdf5(is_loss=True)
def soft_link(file, name, random, path):
    del file[name]
    target = random.choice(["/nowhere", f"/{name}", "/"])
    file[name] = h5py.SoftLink(target)
    return target


# --------------------------------------------------------------------------------------------------------- tfrecord

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

# ------------------------------------------------------------------------------------------------------ safetensors

SAFETENSORS = Kinds(NAMED)


def of_header(damage: Damage) -> Damage:
    """A damage to JSON, done to the file's header."""

    def apply(path: Path, random: Random) -> str:
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        text = path.with_name("header.json")
        text.write_bytes(content[8 : 8 + size])
        what = damage.apply(text, random)
        header = text.read_bytes()
        text.unlink()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
        return f"header: {what}"

    return Damage(f"header_{damage.name}", apply)


for each in JSON.values():
    if each.name not in FILE and each.name != "unknown_key":
        SAFETENSORS[f"header_{each.name}"] = of_header(each)


def of_tensors(is_harmless: bool = False, is_loss: bool = False) -> Callable:
    def register(change: Callable[[dict[str, torch.Tensor], str, Random], str]) -> Callable:
        def apply(path: Path, random: Random) -> str:
            content = path.read_bytes()
            metadata = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).get("__metadata__")
            tensors = load_file(path)
            name = random.choice(sorted(tensors))
            what = change(tensors, name, random)
            save_file(tensors, path, metadata)
            return f"{name} {what}"

        SAFETENSORS[change.__name__] = Damage(change.__name__, apply, is_harmless, is_loss)
        return change

    return register


@of_tensors(is_loss=True)
def tensor_dropped(tensors, name, random):
    del tensors[name]
    return ""


@of_tensors(is_loss=True)
def tensor_renamed(tensors, name, random):
    tensors[name + "_"] = tensors.pop(name)
    return ""


@of_tensors()
def tensor_added(tensors, name, random):
    tensors["of_a_later_version"] = torch.zeros(3)
    return ""


@of_tensors()
def tensor_retyped(tensors, name, random):
    kind = random.choice([torch.int64, torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.uint8])
    tensors[name] = tensors[name].to(kind)
    return str(kind)


@of_tensors(is_loss=True)
def tensor_not_finite(tensors, name, random):
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[random.randrange(tensors[name].numel())] = bad = random.choice([torch.nan, torch.inf])
    return str(bad)


@of_tensors(is_loss=True)
def tensor_reshaped(tensors, name, random):
    tensor, how = tensors[name], random.choice(["flat", "longer", "shorter", "nothing", "scalar"])
    changed = {
        "flat": lambda: tensor.reshape(-1)[:-1],
        "longer": lambda: torch.cat([tensor, tensor]),
        "shorter": lambda: tensor[:-1],
        "nothing": lambda: tensor[:0],
        "scalar": lambda: tensor.reshape(-1)[0],
    }[how]()
    tensors[name] = changed.contiguous().clone()
    return how


def declared_header(path: Path, random: Random) -> str:
    size = random.choice([2**63, 2**40, 2**24, 0, 3])
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    return f"a header of {size} bytes"


SAFETENSORS["declared_header"] = Damage("declared_header", declared_header, is_loss=True)


def declared_tensor(path: Path, random: Random) -> str:
    """A tensor of terabytes."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    name = random.choice([name for name in header if name != "__metadata__"])
    header[name]["shape"] = [10**6, 10**6]
    header[name]["data_offsets"] = [0, 2 * 10**12]
    text = written_json(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"{name}: 10^12 numbers"


SAFETENSORS["declared_tensor"] = Damage("declared_tensor", declared_tensor, is_loss=True)
