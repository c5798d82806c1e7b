"""A module imports from its own floor and from those below: the table of docs/design.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "epjit"

# Imports that run up all the same, as (from, to), each with a comment that says why.
STILL_UP: set[tuple[str, str]] = set()


def floors() -> list[list[str]]:
    """Names in each row of the table, the highest first: `moe/` is a folder, `env.py` a file."""
    text = (ROOT / "docs/design.md").read_text().partition("\n## Floors\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", text.partition("\n## ")[0], re.MULTILINE)
    return [re.findall(r"`([^`]+)`", row) for row in rows]


def is_in(file: str, name: str) -> bool:
    """Whether a file, from the package's root, is what a name of the table stands for."""
    return file.startswith(name) if name.endswith("/") else file == name


def floor_of(file: str, rows: list[list[str]]) -> int:
    """Place of a file's row."""
    found = [place for place, row in enumerate(rows) for name in row if is_in(file, name)]
    assert len(found) == 1, f"epjit/{file} is in {len(found)} rows of the table"
    return found[0]


def file_of(module: str) -> str | None:
    """The file of a module such as `epjit.env`, from the package's root; None if it is none."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.relative_to(PACKAGE).as_posix()
    return None


def imported(tree: ast.AST) -> Iterator[str]:
    """Files of the package that a module imports, wherever in it, for type checkers too."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not read here"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            modules = [name if file_of(name) else module for name in names]
        for module in modules:
            if module.partition(".")[0] == "epjit":
                file = file_of(module)
                assert file, f"there is no {module}"
                yield file


def arrows() -> set[tuple[str, str]]:
    """All imports inside the package, as (from, to)."""
    return {
        (path.relative_to(PACKAGE).as_posix(), file)
        for path in PACKAGE.rglob("*.py")
        for file in imported(ast.parse(path.read_text()))
    }


def test_nothing_imports_from_a_floor_above() -> None:
    rows = floors()
    up = {(a, b) for a, b in arrows() if floor_of(a, rows) > floor_of(b, rows)}
    assert sorted(up - STILL_UP) == []
    assert sorted(STILL_UP - up) == [], "no longer needed in STILL_UP"


def test_every_name_of_the_table_is_there() -> None:
    assert len(floors()) > 5
    missing = [name for row in floors() for name in row if not (PACKAGE / name).exists()]
    assert not missing


def test_all_kinds_of_imports_are_read() -> None:
    text = (
        "import epjit.env, torch\n"
        "from epjit import Buffer, env as e\n"
        "if TYPE_CHECKING:\n    from epjit.buffer import Buffer\n"
        "def f():\n    from epjit.kernels import variants\n"
        "    from epjit.kernels.shapes import align\n"
    )
    assert sorted(imported(ast.parse(text))) == [
        "__init__.py",
        "buffer.py",
        "env.py",
        "env.py",
        "kernels/shapes.py",
        "kernels/variants.py",
    ]
