"""Code that uses `Buffer`, as type checkers see it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_results_have_the_types_that_the_arguments_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-version", "3.11", "tests/cpu/typed.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
