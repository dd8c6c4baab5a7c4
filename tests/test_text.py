"""Text is UTF-8 and its lines end in a line feed, whatever the locale; every place that reads or writes some says so."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from robofactory import config
from robofactory.errors import UserError

PACKAGE = config.PACKAGE
FILES = sorted(PACKAGE.rglob("*.py"))


def unsaid(source: str) -> Iterator[tuple[int, str]]:
    """(line, call) wherever text is read or written without `encoding`, or written without `newline`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function, said = node.func, {keyword.arg for keyword in node.keywords}
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = function.value if isinstance(function, ast.Attribute) else None
        if name == "open" and owner is None:
            mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "r")
            needed = set() if "b" in str(mode) else {"encoding"} if mode == "r" else {"encoding", "newline"}
        elif name in ("read_text", "write_text") and not (isinstance(owner, ast.Name) and owner.id == "files"):
            needed = {"encoding"} if name == "read_text" else {"encoding", "newline"}
        else:
            needed = {"encoding"} if "text" in said and name in ("run", "Popen", "check_output") else set()
        if needed - said:
            yield node.lineno, ast.unparse(node)


def test_the_reader_finds_every_kind():
    """The other tests prove nothing if this one is blind."""
    bad = ["open(p)", "open(p, 'w', encoding='utf-8')", "p.read_text()", "p.write_text(t, encoding='utf-8')", "subprocess.run(c, text=True)"]  # fmt: skip
    good = ["open(p, 'rb')", "p.read_text(encoding='utf-8')", "files.read_text(p, 9)", "av.open(p)", "plot.text(1, text=t)"]  # fmt: skip
    assert [line for line, _ in unsaid("\n".join(bad + good))] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_text_is_read_and_written_as_utf_8(file):
    for line, call in unsaid(file.read_text(encoding="utf-8")):
        pytest.fail(f"{file}:{line}: {call}: say the encoding, and where it is written newline='\\n'")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    run = f"from robofactory.errors import UserError, run_command\nfrom robofactory import config\n{code}"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LC_", "LANG"))}
    environment = inherited | {"PYTHONPATH": str(PACKAGE.parent)} | environment
    return subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-8"])
def test_printing_never_dies_of_the_terminals_encoding(encoding):
    code = "def main():\n    print('±5 größer 把方块 \\ud800')\n    raise UserError('größer 把')\nrun_command(main)"
    done = python(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    plain = "größer 把"
    assert done.stderr == f"error: {plain}\n".encode(encoding, errors="backslashreplace")
    assert done.stdout == "±5 größer 把方块 \ud800\n".encode(encoding, errors="backslashreplace")


def test_a_recipe_is_utf_8_whatever_the_locale(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {model_name: größer 把}\n", encoding="utf-8")
    code = f"print(ascii(config.load_recipe({str(recipe)!r}).model.model_name))"
    for locale in ("C", "POSIX", "en_US.ISO-8859-1"):
        assert python(code, LC_ALL=locale, PYTHONUTF8="0").stdout == b"'gr\\xf6\\xdfer \\u628a'\n"
    recipe.write_bytes("model: {model_name: größer}\n".encode("latin-1"))
    done = python(f"run_command(lambda: config.load_recipe({str(recipe)!r}))")
    assert (done.returncode, done.stderr) == (2, f"error: {recipe} is not UTF-8 (byte 22)\n".encode())


# ------------------------------------------------------------------------------------------------------------- a shell


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("model: {lora_rank: 8}\n")
    assert config.load_recipe("~/own.yaml").model.lora_rank == 8
    monkeypatch.setenv("ROBOFACTORY_HOME", "~/work")
    assert config.home() == tmp_path / "work"
    assert config.path_of("~") == tmp_path and config.path_of("a/~") == Path("a/~")


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("ROBOFACTORY_HOME", "")
    assert config.home() == PACKAGE


@pytest.mark.parametrize("text", ["", "a\0b", "~nobody-of-this-name/x"])
def test_what_is_no_path_is_one_line(text):
    with pytest.raises(UserError, match=r"no path|no such home directory"):
        config.path_of(text)
