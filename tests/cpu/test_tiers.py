"""A bare pytest runs each tier that the machine can run, and says what it left out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE_GPUS = """
def pytest_plugin_registered(plugin):
    if getattr(plugin, "__file__", "").endswith("tests/conftest.py"):
        plugin._num_gpus = lambda: {num_gpus}
"""
TESTS = {
    "cpu": "import os\n"
    "def test_sees_no_gpu(): assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
    "def test_process(): assert 'tests.gpu' not in __import__('sys').modules\n",
    "gpu": "import os, pytest\n"
    "def test_queues(): assert os.environ.get('CUDA_VISIBLE_DEVICES') != ''\n"
    "def test_big(): pytest.skip('needs more memory')\n",
    "dist": "import pytest\ndef test_bad(): assert False\n"
    "def test_other(): pytest.skip('needs more memory')\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project with our conftest.py and few tests."""
    folder = tmp_path / "project"
    for tier, text in TESTS.items():
        (folder / "tests" / tier).mkdir(parents=True)
        (folder / "tests" / tier / f"test_{tier}.py").write_text(text)
    shutil.copy(ROOT / "tests/conftest.py", folder / "tests")
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\n')
    return folder


def pytest_in(tree: Path, num_gpus: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tree / "fake_gpus.py").write_text(FAKE_GPUS.format(num_gpus=num_gpus))
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CUDA_"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "fake_gpus", "-p", "no:cacheprovider", *arguments],
        cwd=tree,
        env={**environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_tier_where_there_are_gpus(tree: Path) -> None:
    done = pytest_in(tree, 2, "-n0")
    assert done.returncode == 1, done.stdout + done.stderr
    end = done.stdout.partition("==== all tiers ====")[2]
    assert re.search(r"^cpu +2 passed \(\d+ s\)$", end, re.M), done.stdout
    assert re.search(r"^gpu +1 passed, 1 skipped ", end, re.M)
    assert re.search(r"^dist +1 failed, 1 skipped ", end, re.M)
    assert re.search(r"^failed +tests/dist/test_dist.py::test_bad$", end, re.M)
    assert re.search(r"^skipped 2 +needs more memory$", end, re.M)
    assert re.search(r"^frameworks +not run: .*make test-frameworks", end, re.M)
    assert end.rstrip().endswith("3 passed, 1 failed, 2 skipped")


def test_one_tier_where_there_are_none(tree: Path) -> None:
    done = pytest_in(tree, 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/gpu did not run: torch finds no GPU" in done.stdout
    assert "tests/dist did not run: torch finds no GPU" in done.stdout
    assert "2 passed" in done.stdout


def test_what_is_asked_for(tree: Path) -> None:
    done = pytest_in(tree, 2, "tests/gpu/test_gpu.py::test_queues")
    assert done.returncode == 0
    assert "1 passed" in done.stdout
    assert "all tiers" not in done.stdout
    done = pytest_in(
        tree, 2, "-n0", "-k", "queues or sees_no_gpu", "tests/cpu", "tests/gpu/test_gpu.py"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("\n2 passed")
    assert "tests/dist" not in done.stdout
