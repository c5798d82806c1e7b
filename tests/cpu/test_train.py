"""examples/train.py: plainly, under torchrun, and with numbers that cannot work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def train(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        ("examples/train.py", "--ranks", "2", "--tokens=64", "--steps=5"),
        (*TORCHRUN, "2", "examples/train.py", "--tokens=64", "--steps=5"),
    ],
    ids=["plain", "torchrun"],
)
def test_the_layer_learns_and_is_the_dense_one(command: tuple[str, ...]) -> None:
    done = train(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"^rank (\d) of 2 on cpu", done.stdout, re.MULTILINE)) == {"0", "1"}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--ranks=0", "argument --ranks: invalid choice"),
        ("--ranks=64", "argument --ranks: invalid choice"),
        ("--tokens=0", "--tokens is 0"),
        ("--steps=1", "--steps 1"),
        ("--hidden=8", "unrecognized arguments: --hidden=8"),
    ],
)
def test_bad_numbers_are_refused_in_a_line(option: str, said: str) -> None:
    done = train("examples/train.py", option)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line
