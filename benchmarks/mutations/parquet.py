"""Damage to tables in Parquet: columns, values, rows, and the pictures in them."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.mutations.damage import FILE, Damage, Inapplicable, Kinds, outside
from benchmarks.mutations.pictures import other_mode, other_picture

PARQUET = Kinds(FILE)
AS_OURS = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # as our datasets are written
Change = Callable[[pa.Table, Random, Path], tuple[pa.Table, str]]


def of_table(is_harmless: bool = False, is_loss: bool = False) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        def apply(path: Path, random: Random) -> str:
            is_ours = pq.read_metadata(path).row_group(0).column(0).compression == "UNCOMPRESSED"
            table, what = change(pq.read_table(path), random, path)
            pq.write_table(table, path, **AS_OURS if is_ours else {}, row_group_size=max(1, len(table)))
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
    name = a_column(table, random, lambda kind: pa.types.is_floating(kind) or (is_vector(kind) and pa.types.is_floating(kind.value_type)))  # fmt: skip
    values, row = table[name].to_pylist(), random.randrange(len(table))
    bad = random.choice([float("nan"), float("inf"), -float("inf")])
    values[row] = bad if not isinstance(values[row], list) else [bad, *values[row][1:]]
    kind = table.schema.field(name).type
    if pa.types.is_floating(kind):
        values = [None if value is None else float(value) for value in values]
    return replaced(table, name, pa.array(values, kind)), f"{name}, row {row}: {bad}"


@of_table()
def other_numbers(table, random, path):
    name = a_column(table, random, is_number)
    values, row = table[name].to_pylist(), random.randrange(len(table))
    bad = random.choice([-1, 10**6, 2**62, 0, 999])
    values[row] = bad
    kind = table.schema.field(name).type
    if pa.types.is_floating(kind):
        values = [None if value is None else float(value) for value in values]
    return replaced(table, name, pa.array(values, kind)), f"{name}, row {row}: {bad}"


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
