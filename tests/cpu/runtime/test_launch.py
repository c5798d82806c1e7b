"""Launches, on a driver that only records them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.runtime.toy_kernel import write_tree

HERE = Path(__file__).parent


def test_launch_on_a_recording_driver(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the fake driver")
    library = tmp_path / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-w", "-o", library, HERE / "fake_cuda.c"]
    subprocess.run(command, check=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run(
        [sys.executable, HERE / "fake_launch.py", write_tree(tmp_path / "sources")],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
