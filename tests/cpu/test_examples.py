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
SCRIPTS = {"decode.py": r"rank \d: error 0\.\d+ \(limit"}


def torchrun(ranks: int) -> list[str]:
    """The command that starts so many."""
    port = f"--master-port={free_port()}"
    return ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", port]


@pytest.mark.parametrize("ranks", [None, 2], ids=["plain", "torchrun"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script: str, ranks: int | None) -> None:
    done = subprocess.run(
        [sys.executable, *(torchrun(ranks) if ranks else ()), ROOT / "examples" / script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(SCRIPTS[script], done.stdout)) == (ranks or 4), done.stdout
