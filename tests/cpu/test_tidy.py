"""A session of the tests leaves nothing at home; a docstring names the thing first."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_FOLDERS = ("epjit", "tests", "bench", "examples", "compat", "docs")
_NAMES_NOTHING = re.compile(r"\A\s*(?://\s*)?Wh(at|ere)\b|^ +\w+: Wh(at|ere)\b", re.MULTILINE)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_session_leaves_nothing_at_home(tmp_path: Path, workers: tuple[str, ...]) -> None:
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    chosen = {"EPJIT_CACHE_DIR", "XDG_CACHE_HOME", "PYTEST_ADDOPTS"}
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in chosen and not name.startswith("PYTEST_XDIST")
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    done = subprocess.run(
        [*command, "tests/cpu/test_stages.py", "-k", "combine and all"],
        cwd=_ROOT,
        env={**environ, "HOME": str(home), "TMPDIR": str(scratch)},
        check=False,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout, done.stdout
    assert not list(home.rglob("*epjit*"))
    assert not list(scratch.glob("epjit-*"))


def docstrings(source: str) -> list[tuple[int, str]]:
    """Strings that stand alone, of modules, classes, functions and attributes, by their line."""
    return [
        (node.lineno, node.value.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def test_a_docstring_names_the_thing_first() -> None:
    """So does an entry of its sections, and the first line of a file for the GPU.

    "What ..." lets the reader look for the noun.
    """
    found, number = [], 0
    for path in (file for folder in _FOLDERS for file in sorted((_ROOT / folder).rglob("*.*"))):
        text = path.read_text() if path.suffix in (".py", ".cu", ".cuh") else ""
        texts = docstrings(text) if path.suffix == ".py" else [(1, text)]
        number += len(texts)
        name = path.relative_to(_ROOT)
        found += [f"{name}:{line}" for line, each in texts if _NAMES_NOTHING.search(each)]
    assert not found
    assert number > 1000
    assert [line for line, _ in docstrings('"""a"""\nclass B:\n    c: int\n    """c"""')] == [1, 4]
    for text in (
        "Where it is.",
        "// What a kernel does",
        "A.\n\n    Args:\n        x: What it is.",
    ):
        assert _NAMES_NOTHING.search(text)
    assert not _NAMES_NOTHING.search("Whatever: what it is.")
