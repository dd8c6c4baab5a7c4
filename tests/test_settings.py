"""YAML that others wrote: it has the declared types, reads nothing but itself, and takes little time, or is refused."""

import time
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from robofactory import config, settings
from robofactory.config import RecipeConfig, SceneConfig, load_recipe, load_scene
from robofactory.errors import UserError

SCENE = config.CONFIGS / "table" / "lift_barrier.yaml"


@dataclass(frozen=True)
class Part:
    size: int = 3
    name: str = "part"


@dataclass(frozen=True)
class Whole:
    title: str = "whole"
    is_new: bool = False
    ratio: float = 0.5
    part: Part = field(default_factory=Part)
    parts: list[Part] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    vector: Annotated[list[float], lambda values: "is too long" if len(values) > 3 else None] = field(
        default_factory=list
    )
    other: Part | None = None


def read(text: str, *overrides: str) -> Whole:
    return settings.read(Whole, text, "file.yaml", overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        read(text, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------- references, to itself alone


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SECRET}",
        "x ${oc.env:SECRET} y",
        "${oc.env:SECRET,fallback}",
        "${oc.decode:SECRET}",
        "${oc.select:title}",
        "${oc.dict.keys:part}",
        "${env:SECRET}",
        "${${oc.env:SECRET}}",
        "${title${title}}",
        "${.title}",
        "${}",
        "${",
        "\\${oc.env:SECRET}",
        "${title",
    ],
)
@pytest.mark.parametrize(
    "place", ["title: '{}'", "names: {{a: '{}'}}", "names: {{'{}': a}}", "parts: [{{name: '{}'}}]"]
)
def test_nothing_but_the_documents_own_keys_is_ever_read(monkeypatch, text, place):
    """`${oc.env:TOKEN}` of a foreign recipe or scene was the token of whoever trained on it, in what is published."""
    monkeypatch.setenv("SECRET", "s3cr3t")
    message = refusal(place.format(text))
    assert "file.yaml: key '" in message and "s3cr3t" not in message
    assert "s3cr3t" not in refusal("title: x", place.format(text).replace(": ", "=", 1))


def test_no_door_reads_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "s3cr3t")
    secret = "${oc.env:SECRET}"
    with pytest.raises(UserError, match=r"override 'shader=\$\{oc\.env:SECRET\}': key 'shader': "):
        load_scene(SCENE, [f"shader={secret}"])
    with pytest.raises(UserError, match=r"override .model\.model_name="):
        load_recipe("robot_openvla", [f"model.model_name=a/{secret}"])
    scene = load_scene(SCENE)
    look = config.look_of(scene)
    with pytest.raises(UserError, match="the pictures that the policy was trained on: key 'shader'"):
        config.with_look(scene, look | {"shader": secret})
    text = config.to_yaml(scene).replace("shader: minimal", f"shader: {secret}")
    with pytest.raises(UserError, match="its scene: key 'shader'"):
        config.from_yaml(SceneConfig, text, "its scene")
    recipe = config.to_yaml(load_recipe("robot_openvla")).replace("openvla/openvla-7b", secret)
    with pytest.raises(UserError, match=r"key .model\.model_name."):
        config.from_yaml(RecipeConfig, recipe, "config.yaml")


def test_a_reference_has_the_value_of_the_key_with_its_type():
    whole = read("{title: a, ratio: '${part.size}', part: {size: 7, name: '${title}/${part.size}-${is_new}'}}")
    assert (whole.ratio, whole.part) == (7.0, Part(7, "a/7-false"))
    whole = read(
        "{parts: [{size: 4}, {size: '${parts.0.size}'}], other: {size: '${parts[1].size}', name: '${part.name}'}}"
    )
    assert (whole.parts[1].size, whole.other) == (4, Part(4, "part")), "defaults have keys too"
    assert read("part: {size: 1}", "part.size=${parts.0.size}", "parts=[{size: 9}]").part.size == 9
    assert load_recipe("robot_openvla", ["training.num_epochs=${training.batch_size}"]).training.num_epochs == 16


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("title: '${title}'", "key 'title': '${title}' refers back to itself"),
        ("{title: 'x${part.name}', part: {name: '${title}'}}", "refers back to itself"),
        ("title: '${nothing}'", "key 'title': '${nothing}' refers to a key that is not there"),
        ("title: '${part.nothing}'", "refers to a key that is not there"),
        ("title: '${title.x}'", "refers to a key that is not there"),
        ("title: '${parts.0.name}'", "refers to a key that is not there"),
        ("title: '${parts.99999999999999999999.name}'", "refers to a key that is not there"),
        ("title: '${part}'", "refers to a section or a list"),
        ("title: '${parts}'", "refers to a section or a list"),
        ("{title: '${part.name}{x}', part: {name: $}}", "stands a key of the same document"),
    ],
)
def test_a_reference_to_no_value_is_refused(text, problem):
    assert problem in refusal(text)


def test_references_make_no_text_or_chain_without_bound():
    doubling = "\n".join(f"  k{n}: '${{names.k{n + 1}}}${{names.k{n + 1}}}'" for n in range(18))
    assert "stands a key of the same document" in refusal(f"names:\n{doubling}\n  k18: xxxxxxxxxx")
    assert read(f"names:\n{doubling}\n  k18: ''").names["k0"] == ""
    chain = "\n".join(f"  k{n}: '${{names.k{n + 1}}}'" for n in range(3000))
    assert "refers too far" in refusal(f"names:\n{chain}\n  k3000: x")


# ----------------------------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected keys with values, not nothing"),
        ("# only this\n", "expected keys with values, not nothing"),
        ("null", "expected keys with values, not nothing"),
        ("3", "expected keys with values, not only 3"),
        ("words", "expected keys with values, not only 'words'"),
        ("[title, x]", "expected keys with values, not a list"),
        ("title: x\n---\ntitle: y\n", "not valid YAML: expected a single document"),
        ("title: x\n\tis_new: true\n", "not valid YAML"),
        ("title: a\nratio: 1\ntitle: b\n", "the key 'title' is there twice"),
        ("part: {size: 1, size: 2}", "the key 'size' is there twice"),
        ("title: !!python/object/apply:os.system ['true']", "the tag"),
        ("title: !!binary aGk=", "the tag"),
        ("ratio: !!float x", "the tag"),
        ("? [a, b]\n: c", "a key is text, not a list or a section"),
        ("title: a\0b", "not valid YAML"),
        ("title: \x1b[31m", "not valid YAML"),
        ('title: "a\\0b"', "has characters that no text has"),
        ('title: "\\ud800"', "has characters that no text has"),
        ("parts: &a [*a]", "*a contains itself"),
        ("title: *nothing", "undefined alias"),
        ("part: " + "[" * 5000, "more than 20 deep"),
        ("part: " + "{a: " * 5000, "more than 20 deep"),
        ("- " * 5000, "more than 20 deep"),
        (f"title: {'x' * 200_000}", "has 200,007 characters, more than the 200,000"),
    ],
)
def test_what_is_no_document_is_one_line(text, problem):
    message = refusal(text)
    assert message.startswith("file.yaml") and problem in message


def test_aliases_and_merges_work_and_cannot_grow_without_bound():
    whole = read("parts: [&a {size: 1, name: &n x}, *a, {<<: *a, name: y}]\ntitle: *n\n", "parts.0.size=5")
    assert whole.parts == [Part(5, "x"), Part(1, "x"), Part(1, "y")], "an alias is a copy"
    laughs = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    merges = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))]
    for lines in (laughs, merges):
        started = time.monotonic()
        assert "more than 20,000 values" in refusal("\n".join(lines))
        assert time.monotonic() - started < 5


def test_keys_are_text_as_they_are_written():
    assert read("names: {on: a, 1: b, 010: c, null: d, 2020-01-01: e, 1.50: f}").names == {
        "on": "a", "1": "b", "010": "c", "null": "d", "2020-01-01": "e", "1.50": "f",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("title: 2020-01-01", "2020-01-01"),
        ("title: 010", "010"),
        ("title: 0x10", "0x10"),
        ("title: 1:30", "1:30"),
        ("title: 1_000", "1_000"),
        ("title: 12", "12"),
        ("title: größer 把", "größer 把"),
    ],
)
def test_text_is_what_is_written(text, value):
    assert read(text).title == value


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("title: yes", "title", "true is no text; put it in quotes"),
        ("title: 1.50", "title", "1.5 is no text; put it in quotes"),
        ("title: null", "title", "null is no text"),
        ("title: [a]", "title", '["a"] is no text'),
        ("title: {a: b}", "title", "is no text"),
        ("is_new: 2", "is_new", "2 is neither true nor false"),
        ("is_new: maybe", "is_new", "'maybe' is neither true nor false"),
        ("ratio: true", "ratio", "true is no number"),
        ("ratio: null", "ratio", "null is no number"),
        ("ratio: .nan", "ratio", "must be finite, got nan"),
        ("ratio: -.inf", "ratio", "must be finite, got -inf"),
        ("ratio: 1e999", "ratio", "must be finite, got inf"),
        ("ratio: 'nan'", "ratio", "'nan' is no number"),
        (f"ratio: {'9' * 400}", "ratio", "is no number"),
        ("part: {size: 1.0}", "part.size", "1.0 is no whole number"),
        ("part: {size: false}", "part.size", "false is no whole number"),
        ("part: {size: 9223372036854775808}", "part.size", "does not fit in 64 bits"),
        ("part: 3", "part", "3 is no section"),
        ("part: null", "part", "null is no section"),
        ("part: [1]", "part", "[1] is no section"),
        ("parts: {a: 1}", "parts", "is no list"),
        ("parts: [1]", "parts[0]", "1 is no section"),
        ("names: [a]", "names", "is no section"),
        ("vector: [1, 2, 3, 4]", "vector", "is too long"),
        ("vector: [1, [2]]", "vector[1]", "[2] is no number"),
    ],
)
def test_a_value_of_another_type_names_key_and_value(text, key, problem):
    message = refusal(text)
    assert message.startswith(f"file.yaml: key {key!r}: ") and problem in message


def test_numbers_may_be_in_quotes():
    assert read("{ratio: '1e-3', part: {size: '7'}}") == read("{ratio: 0.001, part: {size: 7}}")
    assert read("ratio: 2").ratio == 2.0 and isinstance(read("ratio: 2").ratio, float)


def test_digits_may_be_grouped_in_numbers_and_text_stays_as_it_is():
    assert read("{ratio: 1_000.5, part: {size: 10_000}}") == read("{ratio: 1000.5, part: {size: 10000}}")
    for text in ("_1", "1_", "1__0", "0_7"):
        assert "is no whole number" in refusal(f"part: {{size: {text}}}")


# ----------------------------------------------------------------------------------------------------------- overrides


def test_the_override_that_is_to_blame_is_named():
    assert (
        refusal("ratio: 1", "part.size=x", "title=a")
        == "override 'part.size=x': key 'part.size': 'x' is no whole number"
    )
    assert refusal("ratio: x", "title=a").startswith("file.yaml: key 'ratio': ")
    assert (
        refusal("title: a", "parts.0.size=1")
        == "override 'parts.0.size=1': key 'parts[0]': there are 0, counted from 0"
    )
    assert refusal("title: a", "title.x=1") == "override 'title.x=1': key 'title': is 'a' and has no keys of its own"
    assert "not valid YAML" in refusal("title: a", "title=[1")
    assert "unknown key" in refusal("title: a", "a" + ".a" * 15 + "=1")
    assert "has 5000 parts" in refusal("title: a", "a" + ".a" * 4999 + "=1")
    assert "unknown key 'sub'" not in refusal("title: a", "title: b=1")


def test_sections_are_merged_lists_replaced_and_missing_ones_begun():
    assert read("part: {size: 1}", "part={name: y}").part == Part(1, "y")
    assert read("parts: [{size: 1}, {size: 2}]", "parts=[{size: 3}]").parts == [Part(3)]
    assert read("other: null", "other.size=4").other == Part(4)
    assert read("parts: [{size: 1}]", "parts[0].name=z").parts == [Part(1, "z")]


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("text", ["yes", "N", "010", "1_0", "nan", "1e3", "a: b # c", " x ", "", "~", "größer 把", "=", "<<", "x" * 300, "a\nb"])  # fmt: skip
def test_text_survives_being_written(text):
    whole = Whole(title=text, names={text: text})
    assert settings.read(Whole, settings.write(whole), "it") == whole


def test_the_scene_of_a_dataset_is_the_text_it_always_was():
    """It is in fingerprints and protocols: written as OmegaConf 2.4 did."""
    lines = config.to_yaml(load_scene(SCENE, ["instruction='yes'", "cameras.0.fov_rad=1e-5"])).splitlines()
    assert lines[:10] == ["task: LiftBarrier-rf", "instruction: 'yes'", "max_episode_steps: 300", "robots:", "- position:", "  - 0.0", "  - -0.75", "  - 0.0", "  yaw_deg: 90.0", "  rest_qpos:"]  # fmt: skip
    assert "  fov_rad: 1.0e-05" in lines and lines[-1] == "assets_dir: null"
