"""Writes the pages that are made from the code: commands from their --help, settings from the dataclasses.

python docs/generate.py            writes docs/commands.md and docs/settings.md
python docs/generate.py --check    exits with 1 where they are out of date
"""

import ast
import os
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from robofactory import config
from robofactory.__main__ import STAGES

DOCS = Path(__file__).resolve().parent
MADE = "<!-- made by docs/generate.py; do not edit -->\n"


def commands() -> str:
    """A section for each stage with its --help."""
    parts = ["# Commands\n", MADE, "`robofactory STAGE ...`, in the order data flows.\n"]
    environment = os.environ | {"COLUMNS": "110", "NO_COLOR": "1"}
    for name, (_, what) in STAGES.items():
        command = [sys.executable, "-m", "robofactory", name, "--help"]
        text = subprocess.run(command, env=environment, cwd=DOCS.parent, capture_output=True, text=True, check=True)
        help_text = re.sub(r"[ \t]+$", "", text.stdout, flags=re.MULTILINE).strip()
        parts.append(f"## {name}\n\n{what[0].upper()}{what[1:]}.\n\n```text\n{help_text}\n```\n")
    return "\n".join(parts)


def settings() -> str:
    """A table for each section of a recipe and of a scene: key, default, and the comment beside it."""
    source = Path(config.__file__).read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    parts = ["# Settings\n", MADE]
    for title, root, flag in (("Recipe", "RecipeConfig", "--recipe"), ("Scene", "SceneConfig", "--config")):
        parts.append(f"## {title} (`{flag}`)\n")
        for path, name in _sections(classes, root):
            rows = [
                f"| `{key}` | `{default}` | {comment} |" for key, default, comment in _fields(classes[name], source)
            ]
            if not rows:
                continue
            said = (ast.get_docstring(classes[name]) or "").split("\n\n")[0].replace("\n", " ")
            heading = path.rstrip(".") or "top level"
            parts.append(f"### {heading}\n")
            parts += [f"{said}\n"] if said else []
            parts.append("\n".join(["| key | default | |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _sections(classes: dict[str, ast.ClassDef], name: str, path: str = "") -> list[tuple[str, str]]:
    """(path with a dot behind it, class) of a dataclass and of those inside it."""
    found = [(path, name)]
    for node in classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = ast.unparse(node.annotation)
            inner = next((word for word in re.findall(r"\w+Config", kind) if word in classes), None)
            if inner:
                entry = {"list": "[N]", "dict": ".NAME"}.get(kind.split("[")[0], "")
                found += _sections(classes, inner, f"{path}{node.target.id}{entry}.")
    return found


def _fields(node: ast.ClassDef, source: str) -> list[tuple[str, str, str]]:
    """(key, default, comment) of the plain values."""
    lines, found = source.splitlines(), []
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        kind = ast.unparse(each.annotation)
        if "Config" in kind:
            continue
        default = "required" if each.value is None else _default(each.value)
        end = each.end_lineno or each.lineno
        above = [line.strip() for line in reversed(lines[: each.lineno - 1])]
        comment = [line for line in takewhile(_is_comment, above)][::-1]
        comment = comment if comment and comment[0][2:3].isupper() else []  # else it goes on from the line before
        comment += [f"#{line.partition('#')[2]}" for line in lines[each.lineno - 1 : end] if "#" in line]
        below = list(takewhile(_is_comment, (line.strip() for line in lines[end:])))
        comment = [line.lstrip("# ") for line in (comment + below if below and below[0][2:3].islower() else comment)]
        found.append((each.target.id, default.replace("|", "\\|"), " ".join(comment).replace("|", "\\|")))
    return found


def _is_comment(line: str) -> bool:
    return line.startswith("# ") and "----" not in line


def _default(value: ast.expr) -> str:
    if isinstance(value, ast.Call):
        made = {word.arg: word.value for word in value.keywords}
        if "default_factory" in made:
            factory = made["default_factory"]
            return ast.unparse(factory.body) if isinstance(factory, ast.Lambda) else f"{ast.unparse(factory)}()"
        return str(ast.literal_eval(value.args[-1]))
    if isinstance(value, ast.Name):  # a constant of the module
        return str(getattr(config, value.id))
    text = ast.literal_eval(value) if isinstance(value, ast.Constant) else ast.unparse(value)
    return "null" if text is None else str(text)


def main() -> int:
    pages = {"commands.md": commands(), "settings.md": settings()}
    stale = [name for name, text in pages.items() if not _is(DOCS / name, text)]
    if "--check" in sys.argv[1:]:
        print("\n".join(f"docs/{name} is out of date; run python docs/generate.py" for name in stale) or "up to date")
        return bool(stale)
    for name in stale:
        (DOCS / name).write_text(pages[name], encoding="utf-8", newline="\n")
        print(f"wrote docs/{name}")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
