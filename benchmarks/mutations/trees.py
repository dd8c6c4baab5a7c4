"""Damage to values in trees: JSON, JSON lines, YAML, and the state that torch saves."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from benchmarks.mutations.damage import FILE, TOKEN, Damage, Inapplicable, Kinds, outside

ANY_DEPTH = 10_000
AS_IS = "as-is:"  # what follows is written without quotes
AGAIN = "again:"  # the key of this name, once more

# What a value becomes; `{}` in text stands for what it was.
VALUES: dict[str, list[Any]] = {
    "to_text": ["text", "{}", "true", "3"],
    "to_number": [7, 0.5],
    "to_list": [[1, 2], ["{}"]],
    "to_dictionary": [{"a": 1}, {"{}": "{}"}],
    "to_boolean": [True, False],
    "to_null": [None],
    "to_nothing": ["", [], {}, [[]], [None]],
    "not_finite": [AS_IS + "NaN", AS_IS + "Infinity", AS_IS + "-Infinity", AS_IS + "1e999"],
    "huge": [10**30, 2**63, 2**31 + 1, 1e300, AS_IS + "1" + "0" * 5000],
    "negative": [-1, -(10**20), -0.5],
    "zero": [0, 0.0],
    "nested": [AS_IS + "[" * ANY_DEPTH + "]" * ANY_DEPTH, AS_IS + '{"a":' * ANY_DEPTH + "1" + "}" * ANY_DEPTH],
    "long_text": ["x" * 1_000_000],
    "format_spec": ["{0.__class__}", "{episode_index.__class__.__mro__}", "{video_key!r:>1000000000}", "%s%n", "{"],
    "control_characters": ["\x1b[2J\x1b]0;title\x07 \x1b[31mred\r\n{}\x00", "\u202eabc\u2028"],
    "interpolation": ["${oc.env:" + TOKEN + "}", "${oc.env:HOME}", "${.}", "${nothing.there}", "${"],
    "markup": ["<img src=x onerror=alert(1)>", "'><script>alert(1)</script>", "$j_0_a_b$ 10^$ \\frac"],
    "path_out": ["../outside/secret.txt", "{outside}/secret.txt", "../../outside/secret.txt", "{outside}", "/dev/zero"],
    "strange_name": ["a/b", ".", "..", "x\x00y", "y" * 300, "-", "~", "caf\u00e9 \U0001f600", " "],
}  # fmt: skip

Write = Callable[[Path, Any], None]
Read = Callable[[Path], Any]


def choose_place(tree: Any, random: Random) -> tuple[Any, Any]:
    """(container, key or index) of a value somewhere in the tree, the nearer to its root the likelier."""
    if not (isinstance(tree, (dict, list)) and tree):
        raise Inapplicable
    while True:
        key = random.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        below = tree[key]
        if not (isinstance(below, (dict, list)) and below) or random.random() < 0.3:
            return tree, key
        tree = below


def filled(value: Any, was: Any, place: Path) -> Any:
    if isinstance(value, str) and not value.startswith(AS_IS):
        return value.replace("{outside}", str(outside(place))).replace("{}", str(was)[:200])
    if isinstance(value, list):
        return [filled(each, was, place) for each in value]
    if isinstance(value, dict):
        return {filled(key, was, place): filled(each, was, place) for key, each in value.items()}
    return value


def tree_damage(read: Read, write: Write) -> Kinds:
    kinds = Kinds()

    def changing(name: str, change: Callable[[Any, Path, Random], tuple[Any, str]], is_harmless: bool = False) -> None:
        def apply(path: Path, random: Random) -> str:
            tree, what = change(read(path), path, random)
            write(path, tree)
            return what[:200]

        kinds[name] = Damage(name, apply, is_harmless)

    def to(values: list[Any]) -> Callable[[Any, Path, Random], tuple[Any, str]]:
        def change(tree: Any, path: Path, random: Random) -> tuple[Any, str]:
            container, key = choose_place(tree, random)
            was, value = container[key], filled(random.choice(values), container[key], path)
            container[key] = value
            return tree, f"{key!r}: {str(was)[:40]!r} -> {str(value)[:80]!r}"

        return change

    for name, values in VALUES.items():
        changing(name, to(values))
    changing("dropped", dropped)
    changing("swapped", swapped)
    changing("doubled", doubled)
    changing("renamed_key", renamed_key)
    changing("unknown_key", unknown_key, is_harmless=True)
    return kinds


def dropped(tree: Any, path: Path, random: Random) -> tuple[Any, str]:
    container, key = choose_place(tree, random)
    del container[key]
    return tree, f"{key!r}"


def swapped(tree: Any, path: Path, random: Random) -> tuple[Any, str]:
    container, key = choose_place(tree, random)
    other = random.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]
    return tree, f"{key!r} and {other!r}"


def doubled(tree: Any, path: Path, random: Random) -> tuple[Any, str]:
    container, key = choose_place(tree, random)
    if isinstance(container, dict):
        container[AGAIN + str(key)] = container[key]
    else:
        container.insert(key, container[key])
    return tree, f"{key!r}"


def renamed_key(tree: Any, path: Path, random: Random) -> tuple[Any, str]:
    container, key = choose_place(tree, random)
    if not isinstance(container, dict):
        raise Inapplicable
    container[f"{key}_"] = container.pop(key)
    return tree, f"{key!r}"


def unknown_key(tree: Any, path: Path, random: Random) -> tuple[Any, str]:
    if not isinstance(tree, dict):
        raise Inapplicable
    tree["of_a_later_version"] = random.choice([None, [1, {"a": "b"}], "text", {"x": {}}])
    return tree, "at the top"


# ------------------------------------------------------------------------------------------------------------ text

TEXT = Kinds(FILE)


def of_bytes(name: str, change: Callable[[bytes], bytes]) -> None:
    def apply(path: Path, random: Random) -> str:
        path.write_bytes(change(path.read_bytes()))
        return ""

    TEXT[name] = Damage(name, apply)


def in_the_middle(content: bytes, inserted: bytes) -> bytes:
    return content[: len(content) // 2] + inserted + content[len(content) // 2 :]


of_bytes("utf_16", lambda content: content.decode().encode("utf-16"))
of_bytes("byte_order_mark", lambda content: b"\xef\xbb\xbf" + content)
of_bytes("not_utf_8", lambda content: in_the_middle(content, b"caf\xe9"))
of_bytes("nul", lambda content: in_the_middle(content, b"\0"))
of_bytes("crlf", lambda content: content.replace(b"\n", b"\r\n"))
of_bytes("whole_is_null", lambda content: b"null")
of_bytes("whole_is_a_list", lambda content: b"[1, 2]")
of_bytes("whole_is_a_number", lambda content: b"3")
of_bytes("whole_is_nested", lambda content: b"[" * ANY_DEPTH + b"]" * ANY_DEPTH)
of_bytes("whole_is_empty", lambda content: b"{}")


def written_json(tree: Any) -> str:
    return _as_is(json.dumps(tree, indent=1))


def _as_is(text: str) -> str:
    text = text.replace(AGAIN, "")
    while (start := text.find(f'"{AS_IS}')) >= 0:
        end = start + 1
        while text[end] != '"' or text[end - 1] == "\\":
            end += 1
        text = text[:start] + text[start + 1 + len(AS_IS) : end].replace('\\"', '"') + text[end + 1 :]
    return text


def written_yaml(tree: Any) -> str:
    """In flow style, so that whatever is valid JSON is written as such."""
    words = {"NaN": ".nan", "-Infinity": "-.inf", "Infinity": ".inf"}
    text = json.dumps(tree, indent=1)
    for word, in_yaml in words.items():
        text = text.replace(f'"{AS_IS}{word}"', in_yaml)
    return _as_is(text)


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[Any]) -> None:
    if not isinstance(lines, list):
        raise Inapplicable
    path.write_text("".join(_as_is(json.dumps(line)) + "\n" for line in lines))


def read_state(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, tree: Any) -> None:
    path.write_text(written_json(tree))


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def write_yaml(path: Path, tree: Any) -> None:
    path.write_text(written_yaml(tree))


JSON = Kinds(TEXT | tree_damage(read_json, write_json))
LINES = Kinds(TEXT | tree_damage(read_lines, write_lines))
YAML = Kinds(TEXT | tree_damage(read_yaml, write_yaml))
STATE = Kinds(FILE | tree_damage(read_state, lambda path, state: torch.save(state, path)))


@STATE.add(is_loss=True)
def pickled_code(path: Path, random: Random) -> str:
    class Harm:
        def __reduce__(self):
            return (Path.touch, (outside(path) / "code_was_run",))

    torch.save({"update": Harm()}, path)
    return "a pickle that runs code"
