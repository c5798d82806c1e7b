"""The script of docs/first_hour.md on the GPUs of this host, each a domain of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.hour import run_hour

SIZES = ("--rounds=200", "--tokens=127", "--hidden=2048", "--experts=16", "--topk=4")


@pytest.mark.timeout(900)
@pytest.mark.needs_own_gpu
@pytest.mark.needs_gpu
@pytest.mark.parametrize("ibgda", ["0", "1"])
def test_the_first_hour(num_ranks: int, tmp_path: Path, ibgda: str) -> None:
    _, rows = run_hour(
        tmp_path / "report.txt",
        num_ranks,
        *SIZES,
        "--times",
        "512",
        "64",
        "--replays=500",
        timeout=850,
        EPJIT_TIMEOUT_SECONDS="20",
        NVSHMEM_IB_ENABLE_IBGDA=ibgda,
    )
    graphs = [row for row in rows if row["op"] == "graph"]
    assert [(row["replays"], row["wrong_rows"]) for row in graphs] == [(500, 0)] * num_ranks
