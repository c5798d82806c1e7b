"""Runs `bench/first_hour.py` by torchrun on this host, in NVLink domains of one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import first_hour
from epjit.bench.timing import free_port

ROOT = Path(__file__).resolve().parents[2]


def run_hour(
    file: Path, num_ranks: int, *arguments: str, timeout: float, **environ: str
) -> tuple[list[str], list[dict[str, Any]]]:
    """All stages; fails unless all is right, and a killed rank is an error of the others.

    Args:
        file: Gets the report.
        num_ranks: Processes.
        *arguments: Of the script.
        timeout: Seconds.
        **environ: Variables of the ranks.

    Returns:
        The summary's lines, and the rows.
    """
    port = f"--master-port={free_port()}"
    torchrun = ("-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", port)
    chosen = {"PYTHONPATH": str(ROOT), "EPJIT_NVLINK_DOMAIN": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, "bench/first_hour.py", f"--report={file}", *arguments],
        cwd=ROOT,
        env={**os.environ, **chosen, **environ},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    report = file.read_text() if file.exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + report
    lines = report.splitlines()
    assert "# all right" in lines
    rows = [json.loads(line) for line in lines if line[0] == "{"]
    ranks = range(num_ranks)
    soaks = [row for row in rows if row["op"] == "soak"]
    assert sorted((row["mode"], row["rank"], row["domain"]) for row in soaks) == [
        (mode, rank, rank) for mode in ("low-latency", "normal") for rank in ranks
    ]
    assert all(row["rows"] > 20 and row["wrong_rows"] == 0 for row in soaks)
    ends = {(row["stage"], row["rank"]): row["exit_code"] for row in rows if row["op"] == "end"}
    assert set(ends) == {(stage, rank) for stage in first_hour.STAGES for rank in ranks}
    errors = [row for row in rows if row["op"] == "error"]
    for stage in first_hour.DEATHS:
        assert [ends[stage, rank] for rank in ranks] == [3] * (num_ranks - 1) + [-9]
        told = [row for row in errors if row["stage"] == stage]
        assert {row["kind"] for row in told} == {"CommunicationError"}
        assert all(f"rank {num_ranks - 1}" in row["message"] for row in told)
    timed = {row["op"] for row in rows if "us" in row}
    assert {"dispatch cached", "combine", "low-latency dispatch"} <= timed
    return [line[2:] for line in lines if line.startswith("# ")], rows
