"""The import rules of the house (CONTRIBUTING.md), read from the source: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "robofactory"
FILES = sorted(PACKAGE.rglob("*.py"))

CONTRACTS = {"config", "documents", "files", "paths", "shapes"}  # between the stages
# room -> what of ours it may import, besides itself and `errors`
ALLOWED = {
    "__main__": {"config"},  # it runs the stages by name
    "settings": set(),
    "interrupts": set(),
    "errors": {"interrupts"},
    "files": set(),
    "documents": {"files"},
    "processes": set(),
    "shapes": set(),
    "html": {"documents", "files"},
    "robots": set(),
    "config": {"files", "settings"},
    "paths": {"config"},
    "arguments": {"config", "paths"},
    "published": {"documents", "files"},
    "manifest": {"documents", "files", "paths"},
    "sim": {"config", "robots", "shapes"},
    "codec": CONTRACTS | {"published"},
    "model": CONTRACTS | {"published"},
    "data": CONTRACTS | {"codec", "html", "processes", "robots"},
    "demos": CONTRACTS
    | {
        "sim",
        "robots",
        "data.episodes",
        "data.description",
        "policy",
        "processes",
    },  # policy: whose states the expert relabels
    "checkpoint": CONTRACTS | {"manifest", "model", "codec"},
    "training": CONTRACTS | {"data", "model", "codec", "checkpoint", "html", "processes"},
    "export": CONTRACTS | {"data", "model", "codec", "checkpoint", "published"},
    "policy": CONTRACTS | {"checkpoint", "codec", "model"},
    "evaluation": CONTRACTS | {"sim", "policy", "settings", "html", "processes", "robots"},
}
BARE = (
    "robofactory.arguments",
    "robofactory.config",
    "robofactory.errors",
    "robofactory.interrupts",
    "robofactory.paths",
)  # what a command may load before it has parsed its arguments
SIMULATOR = {"mani_skill", "sapien", "gymnasium", "mplib"}
# A model that sees tensors only has no use for these.
NOT_IN_MODEL = SIMULATOR | {"PIL", "cv2", "pyarrow", "tokenizers", "av", "matplotlib", "wandb"}


def module_name(file: Path) -> str:
    """`robofactory/sim/env.py` -> `sim.env`; a package's `__init__.py` -> the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {module_name(file) for file in FILES}
RUN_FILES = {module_name(file): file for file in FILES if 'if __name__ == "__main__":' in file.read_text()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(nodes: list[ast.stmt], everywhere: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of the imports; `everywhere`: inside functions and under TYPE_CHECKING too."""
    found = []
    for node in nodes:
        if is_type_checking(node) and not everywhere:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole.removeprefix("robofactory.") in OURS and whole.startswith("robofactory.")
                found.append((node.lineno, whole if is_module else str(node.module)))
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += imported([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.AST)], everywhere)  # type: ignore
    return found


def imports_of(file: Path, everywhere: bool = True) -> list[tuple[int, str]]:
    return imported(ast.parse(file.read_text()).body, everywhere)


def ours(names: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The imports from this package, without its name in front."""
    return [(line, name.removeprefix("robofactory.")) for line, name in names if name.startswith("robofactory.")]


def outside(names: list[tuple[int, str]]) -> set[str]:
    return {name.split(".")[0] for _, name in names} - {"robofactory"}


def is_within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_the_reader_of_imports_finds_every_kind():
    """The other tests prove nothing if this one is blind."""
    source = """
import sapien.render
from robofactory import policy
from robofactory.errors import UserError
if TYPE_CHECKING:
    import gymnasium
def f():
    if True:
        with g():
            from mani_skill.envs import x
"""
    body = ast.parse(source).body
    names = {"sapien.render", "robofactory.policy", "robofactory.errors", "gymnasium", "mani_skill.envs"}
    assert {name for _, name in imported(body, everywhere=True)} == names
    assert {name for _, name in imported(body, everywhere=False)} == names - {"gymnasium", "mani_skill.envs"}


def table() -> str:
    """CONTRIBUTING's table of rooms."""
    rows = []
    for room, others in ALLOWED.items():
        names = [f"`{name}`" for name in sorted(others - CONTRACTS)]
        rows.append(
            f"| `{room}` | {', '.join([*(['the contracts'] if others >= CONTRACTS else [f'`{n}`' for n in sorted(others & CONTRACTS)]), *names]) or 'nothing'} |"
        )
    return "\n".join(["| room | may import of ours, besides `errors` |", "|---|---|", *rows])


def test_contributing_has_this_table():
    contributing = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert table() in contributing, f"put this table into CONTRIBUTING.md:\n{table()}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_room_imports_only_what_the_house_allows(file: Path):
    room = module_name(file).split(".")[0]
    if room == "":  # the package itself
        names = {name for _, name in imports_of(file)}
        assert names == {"os", "sys", "robofactory.interrupts"}, "--help must answer without packages"
        return
    assert room in ALLOWED, f"{name_of(file)}: a new room; say in ALLOWED what it may import"
    everywhere = {room, "errors", *(["arguments"] if file in RUN_FILES.values() else [])}
    for line, name in ours(imports_of(file)):
        assert is_within(name, ALLOWED[room] | everywhere), f"{name_of(file)}:{line}: {room} must not import {name}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_imports_a_run_file(file: Path):
    for line, name in ours(imports_of(file)):
        assert name not in RUN_FILES or name == "sim.env", f"{name_of(file)}:{line}: {name} is a command, not a library"


def test_a_folder_holds_at_most_one_run_file():
    """But for what people ask before they train, and of what they have evaluated."""
    folders = [f.parent for name, f in RUN_FILES.items() if name not in ("training.memory", "evaluation.compare")]
    assert len(folders) == len(set(folders)), sorted(RUN_FILES)


@pytest.mark.parametrize("file", RUN_FILES.values(), ids=name_of)
def test_a_run_file_answers_help_without_packages(file: Path):
    """On a bare machine: when it is loaded, it imports the standard library, our config, errors and paths only."""
    for line, name in imports_of(file, everywhere=False):
        is_bare = name.split(".")[0] in sys.stdlib_module_names or name in BARE
        assert is_bare, f"{name_of(file)}:{line}: {name} is imported before the arguments are parsed"


@pytest.mark.parametrize("module", BARE)
def test_what_a_run_file_loads_needs_no_packages(module: str):
    file = PACKAGE / f"{module.removeprefix('robofactory.')}.py"
    assert outside(imports_of(file, everywhere=False)) <= sys.stdlib_module_names


@pytest.mark.parametrize("room", sorted(set(ALLOWED) - {"sim"}))
def test_only_sim_imports_the_simulator(room: str):
    for file in FILES:
        if module_name(file).split(".")[0] == room:
            used = outside(imports_of(file, everywhere=False)) & SIMULATOR
            assert not used, f"{name_of(file)} imports {used}: a machine that trains has no simulator"


def test_the_model_sees_tensors_only():
    for file in (PACKAGE / "model").rglob("*.py"):
        used = outside(imports_of(file)) & NOT_IN_MODEL
        assert not used, f"{name_of(file)} imports {used}; images, words and files are the codec's"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_annotations_are_evaluated(file: Path):
    """`from __future__ import annotations` would turn shapes into strings that nothing checks."""
    assert "__future__" not in outside(imports_of(file)), name_of(file)
