"""The examples that start their own ranks, plainly and by torchrun, on the CPU backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from epjit.bench.timing import free_port

ROOT = Path(__file__).parents[2]
# Of each script, what every rank prints once its result is compared.
SCRIPTS = {
    "decode.py": r"rank \d: error 0\.\d+ \(limit",
    "infer.py": r"rank \d of \d on cpu, FP8: error 0\.\d+ \(limit",
    "train.py": r"rank \d of \d on cpu, \d+ tokens: loss 0\.\d+ to 0\.\d+; errors",
}


def torchrun(ranks: int) -> list[str]:
    """The command that starts so many."""
    port = f"--master-port={free_port()}"
    return ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", port]


def start(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python to its end."""
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "ranks", "options"),
    [
        ("decode.py", 0, ()),
        ("decode.py", 2, ()),
        ("infer.py", 2, ()),
        ("train.py", 0, ("--ranks=3", "--steps=5")),  # CI runs all of it: make run
        ("train.py", 2, ()),
        ("train.py", 0, ("--ranks=3", "--steps=5", "--fp8")),
    ],
)
def test_example(script: str, ranks: int, options: tuple[str, ...]) -> None:
    """With ranks of its own, or those of torchrun."""
    done = start(*(torchrun(ranks) if ranks else ()), str(ROOT / "examples" / script), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = ranks or (3 if options else 4)
    assert len(re.findall(SCRIPTS[script], done.stdout)) == expected, done.stdout


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--ranks=64", "argument --ranks: invalid choice"),
        ("--steps=1", "--steps 1"),
        ("--hidden=8", "unrecognized arguments: --hidden=8"),
    ],
)
def test_train_refuses_in_a_line(option: str, said: str) -> None:
    """Before any process starts: `make run N=64` took 88 s to refuse."""
    done = start(str(ROOT / "examples" / "train.py"), option)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line
