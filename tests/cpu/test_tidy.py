"""A session of the tests leaves nothing in the user's home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


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
