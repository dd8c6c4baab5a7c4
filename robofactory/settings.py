"""YAML and `section.key=value` -> a frozen dataclass whose every value has the declared type and limits; and back.

A document may refer to its own keys, as in `${training.batch_size}`, and to nothing else: neither the environment nor
another file is ever read for it. Anchors and aliases may be used, tags may not; keys are text, numbers are decimal.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from robofactory.errors import UserError, did_you_mean

MAX_BYTES = 200_000  # of a document; the largest that ships has 3,000
MAX_VALUES = 20_000  # with all that its aliases stand for
MAX_DEPTH = 20  # of sections in sections, and of references to references
MAX_TEXT = 10_000  # characters that a text with references may become
SHOWN_CHARACTERS = 60  # of a value in a message
LONGEST_MESSAGE = 500  # characters, for keys may be long, too

INTEGER = r"[-+]?(?:0|[1-9][0-9]{0,39})"
FLOAT = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
SPECIAL_FLOAT = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
REFERENCE = re.compile(r"\$\{([\w.\[\]-]+)\}")

Kind = TypeVar("Kind")
Problems = Callable[[Any], Iterator[tuple[str, str]]]  # (key, what is wrong) of values that do not go together


class Refused(Exception):
    """What is wrong, and at which key; whoever knows the document names it."""

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(sentence if len(sentence) <= LONGEST_MESSAGE else f"{sentence[:LONGEST_MESSAGE]}...")
        self.key = key


def read(kind: type[Kind], text: str, source: str, overrides: Sequence[str] = (), problems: Problems | None = None) -> Kind:  # fmt: skip
    """The document as a dataclass, with overrides on top. What it does not say has its default.

    Args:
        source: names the document in messages; an override that is to blame is named instead.
        problems: finds values that do not go together.
    Raises:
        UserError: not valid YAML, an unknown or missing key, a value that is not allowed; the line names the key.
    """
    content = tree(text, source)
    _complete(kind, content)
    for override in overrides:
        at = f"override {_shown(override, 2 * SHOWN_CHARACTERS)}"
        key, equals, value = override.partition("=")
        if not (key and equals):
            raise UserError(f"{at}: expected section.key=value")
        try:
            content = _put(content, _parts(key), tree(f"value: {value}", at)["value"], "")
        except Refused as refused:
            raise UserError(f"{at}: {refused}") from None
        _complete(kind, content)
    try:
        _resolve(content)
        return _checked(kind, content, problems)
    except Refused as refused:
        raise UserError(f"{_to_blame(refused.key, source, overrides)}: {refused}") from None


def typed(kind: Any, content: Any, source: str, problems: Problems | None = None) -> Any:
    """As `read`, of values that are in memory already. `kind` is any type that a field may have."""
    try:
        return _checked(kind, content, problems)
    except Refused as refused:
        raise UserError(f"{source}: {refused}") from None


def write(config: Any) -> str:
    """The YAML that `read` reads."""
    return yaml.dump(_plain(config), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def tree(text: str, source: str) -> dict[str, Any]:
    """The document's keys and values as they are written, each value there once however often an alias repeats it.

    Raises:
        UserError: it is not valid YAML, too large, or no keys with values.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{source} has {len(text):,} characters, more than the {MAX_BYTES:,} of a configuration")
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected keys with values, not {_what_it_is(content)}")
    return _plain(content)


# ----------------------------------------------------------------------------------------------------------- the text


class _Loader(yaml.SafeLoader):
    """What `tree` says. Bounded in depth, and in values with all that aliases stand for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth, self.num_values = 0, 0
        self.sizes: dict[int, int] = {}  # values below each node, by its id

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        if not is_alias and event.tag:
            self.refuse(event, f"the tag {event.tag!r} is not allowed")
        before = self.num_values
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.refuse(event, f"sections are more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and id(node) not in self.sizes:
            self.refuse(event, f"*{event.anchor} contains itself")
        self.num_values += self.sizes[id(node)] if is_alias else 1
        if self.num_values > MAX_VALUES:
            self.refuse(event, f"there are more than {MAX_VALUES:,} values")
        self.sizes.setdefault(id(node), self.num_values - before)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.refuse(key, "a key is text, not a list or a section")
            if key.value in seen:
                self.refuse(key, f"the key {key.value!r} is there twice")
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"  # as it is written, be it `on`, `1` or `null`
        return node

    def refuse(self, at: Any, problem: str) -> NoReturn:
        raise yaml.MarkedYAMLError(None, None, problem, at.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "bool", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{INTEGER})$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT}|{SPECIAL_FLOAT})$"), list("-+0123456789.")
)


class _Dumper(yaml.CDumper if yaml.__with_libyaml__ else yaml.Dumper):  # type: ignore[misc]
    """Text that another reader might take for a number or a truth value is in quotes."""


def _represent_text(dumper: Any, text: str) -> Any:
    is_ambiguous = text.lower() in ("y", "n", "yes", "no", "true", "false", "on", "off")
    for number in (int, float):
        try:
            number(text)
        except ValueError:
            continue
        is_ambiguous = True
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if is_ambiguous else None)


_Dumper.add_representer(str, _represent_text)


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries; no list or dictionary is there twice, nor that of the original."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------------- defaults, overrides and references


def _complete(kind: Any, content: Any) -> None:
    """Add the defaults, so that overrides and references find them."""
    kind = _bare(kind)
    if dataclasses.is_dataclass(kind) and isinstance(content, dict):
        for field in dataclasses.fields(kind):
            inner = _types(kind)[field.name]
            if field.name not in content:
                if field.default is not dataclasses.MISSING:
                    content[field.name] = field.default
                elif field.default_factory is not dataclasses.MISSING:
                    is_section = field.default_factory is _bare(inner)
                    content[field.name] = {} if is_section else _plain(field.default_factory())
            _complete(inner, content.get(field.name))
    elif isinstance(content, list | dict) and get_args(kind):
        for each in content.values() if isinstance(content, dict) else content:
            _complete(get_args(kind)[-1], each)


def _put(there: Any, parts: Sequence[str], value: Any, key: str) -> Any:
    """What is `there` with the value put where the parts lead; sections are merged, anything else is replaced."""
    if len(parts) > MAX_DEPTH:
        raise Refused(key, f"the key has {len(parts)} parts")
    if not parts:
        if not (isinstance(there, dict) and isinstance(value, dict)):
            return value
        return there | {name: _put(there.get(name), (), each, f"{key}.{name}") for name, each in value.items()}
    part, *rest = parts
    if isinstance(there, list):
        if not (part.isdecimal() and int(part[:9]) < len(there)):
            raise _wrong(f"{key}[{part}]", f"there are {len(there)}, counted from 0")
        there[int(part)] = _put(there[int(part)], rest, value, f"{key}[{part}]")
        return there
    there = {} if there is None else there
    if not isinstance(there, dict):
        raise _wrong(key, f"is {_shown(there)} and has no keys of its own")
    there[part] = _put(there.get(part), rest, value, _join(key, part))
    return there


def _resolve(content: dict[str, Any]) -> None:
    """Put in the place of `${section.key}` what that key of the same document has.

    Raises:
        Refused: there is no such key, it is no single value, or refers back; anything else in `${}`.
    """
    resolving: list[tuple[int, Any]] = []

    def resolve(container: Any, name: Any, key: str) -> None:
        value, place = container[name], (id(container), name)
        if isinstance(value, dict | list):
            for each in list(value) if isinstance(value, dict) else range(len(value)):
                resolve(value, each, _join(key, each))
        elif isinstance(value, str) and "${" in value:
            if place in resolving or len(resolving) == MAX_DEPTH:
                raise _wrong(key, f"{_shown(value)} refers {'back to itself' if place in resolving else 'too far'}")
            resolving.append(place)
            whole = REFERENCE.fullmatch(value)
            new = look_up(whole[1], key) if whole else REFERENCE.sub(lambda m: _as_text(look_up(m[1], key)), value)
            if isinstance(new, str) and ("${" in new or len(new) > MAX_TEXT):
                raise _wrong(key, _not_resolved(value))
            container[name] = new
            resolving.pop()

    def look_up(reference: str, key: str) -> Any:
        there: Any = content
        container: Any = None
        name: Any = None
        for part in _parts(reference):
            container, name = there, int(part[:9]) if isinstance(there, list) and part.isdecimal() else part
            known = range(len(there)) if isinstance(there, list) else there if isinstance(there, dict) else ()
            if name not in known:
                raise _wrong(key, f"'${{{reference}}}' refers to a key that is not there")
            there = container[name]
        if isinstance(there, dict | list):
            raise _wrong(key, f"'${{{reference}}}' refers to a section or a list, not to a single value")
        resolve(container, name, reference)
        return container[name]

    for name in list(content):
        resolve(content, name, name)


def _not_resolved(value: str) -> str:
    return (
        f"{_shown(value)}: in ${{}} stands a key of the same document, such as ${{training.batch_size}}, nothing else"
    )


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parts(key: str) -> list[str]:
    """`cameras[0].width`, `cameras.0.width` -> cameras, 0, width."""
    return re.sub(r"\[(\w*)\]", r".\1", key).split(".")


def _join(key: str, part: str | int) -> str:
    if isinstance(part, int):
        return f"{key}[{part}]"
    return f"{key}.{part}" if key else part


def _to_blame(key: str, source: str, overrides: Sequence[str]) -> str:
    """The last override that touches the key, or else the document."""
    parts = _parts(key)
    for override in reversed(overrides):
        own = _parts(override.partition("=")[0])
        if key and own[: len(parts)] == parts[: len(own)]:
            return f"override {_shown(override, 2 * SHOWN_CHARACTERS)}"
    return source


# ----------------------------------------------------------------------------------------------------------- the types


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _bare(kind: Any) -> Any:
    """Without `| None` and limits."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
        return _bare(kind)
    return kind


def _checked(kind: Any, content: Any, problems: Problems | None) -> Any:
    config = _typed(kind, content, "")
    for key, problem in problems(config) if problems else ():
        raise _wrong(key, problem)
    return config


def _typed(kind: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        result = _typed(arguments[0], value, key)
        for limit in arguments[1:]:
            if problem := limit(result):
                raise _wrong(key, problem)
        return result
    if origin in (Union, UnionType):
        (inner,) = (each for each in arguments if each is not NoneType)
        return None if value is None else _typed(inner, value, key)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(key, f"{_shown(value)} is none of {', '.join(arguments)}")
        return value
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, key)
    if origin is list:
        if not isinstance(value, list):
            raise _wrong(key, f"{_shown(value)} is no list")
        return [_typed(arguments[0], each, f"{key}[{index}]") for index, each in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(key, f"{_shown(value)} is no section")
        return {_text(name, key): _typed(arguments[1], each, _join(key, name)) for name, each in value.items()}
    return _scalar(kind, value, key)


def _section(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(key, f"{_shown(value)} is no section")
    types = _types(kind)
    for name in value:
        if name not in types:
            meant = did_you_mean(name, types, f"{key}." if key else "")
            raise Refused(_join(key, name), f"unknown key {_join(key, name)!r}{meant}")
    for field in dataclasses.fields(kind):
        has_default = {field.default, field.default_factory} != {dataclasses.MISSING}
        if field.name not in value and not has_default:
            raise Refused(_join(key, field.name), f"key {_join(key, field.name)!r} is missing")
    return kind(**{name: _typed(types[name], each, _join(key, name)) for name, each in value.items()})


def _scalar(kind: Any, value: Any, key: str) -> Any:
    """A truth value, number or text; a number may be in quotes, or written as 10_000, and digits may be text."""
    if kind is bool:
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise _wrong(key, f"{_shown(value)} is neither true nor false")
    if kind is str:
        return _text(str(value) if type(value) is int else value, key)
    number = re.sub(r"(?<=[0-9])_(?=[0-9])", "", value) if isinstance(value, str) else ""
    if re.fullmatch(INTEGER if kind is int else f"{INTEGER}|{FLOAT}", number):
        value = int(number) if re.fullmatch(INTEGER, number) else float(number)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise _wrong(key, f"{_shown(value)} is no {'whole ' if kind is int else ''}number")
    if kind is float and not abs(value) <= sys.float_info.max:  # NaN is not either
        raise _wrong(key, f"must be finite, got {value}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise _wrong(key, f"{_shown(value)} does not fit in 64 bits")
    return kind(value)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _wrong(key, f"{_shown(value)} is no text; put it in quotes if it is meant so")
    if "${" in value:
        raise _wrong(key, _not_resolved(value))
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise _wrong(key, f"{_shown(value)} has characters that no text has")
    return value


def _wrong(key: str, problem: str) -> Refused:
    return Refused(key, f"key {key!r}: {problem}" if key else problem)


def _shown(value: Any, most: int = SHOWN_CHARACTERS) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= most else f"{text[:most]}..."


def _what_it_is(content: Any) -> str:
    if content is None:
        return "nothing"
    return "a list" if isinstance(content, list) else f"only {_shown(content)}"
