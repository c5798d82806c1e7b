"""The script of docs/first_hour.md: a small case of it on the CPU backend, and how it counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bench import first_hour
from bench.cluster_stage import Stage, Wrong
from tests.harness.hour import run_hour

SMALL = (
    "--rounds=6",
    "--tokens=15",
    "--hidden=256",
    "--experts=8",
    "--topk=2",
    "--times",
    "16",
    "8",
)


def test_a_small_hour(tmp_path: Path) -> None:
    """Two ranks: every stage, and one file that has all of it."""
    baseline = f"--baseline=echo '{'| 1048576 | 41.5 |'}'"
    lines, rows = run_hour(
        tmp_path / "report.txt",
        2,
        baseline,
        *SMALL,
        timeout=280,
        EPJIT_BACKEND="cpu",
        EPJIT_TIMEOUT_SECONDS="5",
    )
    assert "baseline: 41.5 GB/s at most: echo '| 1048576 | 41.5 |'" in lines
    assert len(rows[1]["checks"]) > 10
    said = [row["text"] for row in rows if row["op"] == "said"]
    assert sum("cpu: 10 of 10 rounds right" in text for text in said) == 2


def stage(rank: int = 0) -> Any:
    """The parts of a stage that its methods need to make rows."""
    plan = SimpleNamespace(hidden=64, tokens=15, topk=2, experts=8)
    return cast(Any, SimpleNamespace(rank=rank, size=4, device=torch.device("cpu"), plan=plan))


def test_rows_are_of_their_round_and_token() -> None:
    """A row that stayed from another round, or came from another token, differs in most columns."""
    tokens = torch.arange(40)
    rows = [
        Stage.rows(stage(), number, torch.full_like(tokens, source), tokens, 512)
        for number in (1, 2, 3, 4000)
        for source in range(4)
    ]
    every = torch.cat(rows).float()
    assert every.abs().max() <= 8
    same = (every[:, None] == every[None, :]).float().mean(dim=2).fill_diagonal_(0)
    assert same.max() < 0.2


def test_wrong_rows_are_counted_and_located() -> None:
    wanted = torch.arange(80).view(10, 8)
    got = wanted.clone()
    got[3, 5:] += 1
    got[7] = 0
    wrong = Wrong()
    at = {"round": 4, "source": torch.arange(10) // 5, "token": torch.arange(10) % 5}
    wrong.compare(got, wanted, op="dispatch", **at)
    wrong.compare(wanted, wanted, op="combine", **at)
    assert (wrong.rows, wrong.of) == (2, 20)
    assert wrong.sites[0] == {
        "columns": [5, 7],
        "differ": 3,
        "op": "dispatch",
        "round": 4,
        "source": 0,
        "token": 3,
    }
    wrong.compare(wanted[:4], wanted, op="dispatch", round=5, source=torch.arange(10))
    assert wrong.rows == 12
    assert wrong.sites[-1] == {"rows": 4, "wanted": 10, "op": "dispatch", "round": 5}


def test_sizes_are_odd() -> None:
    lengths = [Stage.lengths(stage(), number, 15) for number in range(200)]
    assert {tokens for each in lengths for tokens in each} == {0, *range(1, 16, 2)}
    assert [Stage.hidden_of(stage(), number) for number in (0, 1)] == [64, 40]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"op": "soak", "stage": "soak", "rank": 3, "wrong_rows": 2}, "rank 3 has 2 wrong rows"),
        ({"op": "end", "stage": "times", "rank": 1, "exit_code": -1}, "rank 1 ended with -1"),
    ],
)
def test_what_is_wrong_is_said(row: dict[str, Any], said: str) -> None:
    assert first_hour.failed([row]) == [f"{row['stage']}: {said}"]
    assert not first_hour.failed([{"op": "end", "stage": "kill", "rank": 0, "exit_code": -1}])


def test_the_baseline_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    assert first_hour._put_bandwidth(["a"]) == []
    (tmp_path / "bin/perftest").mkdir(parents=True)
    program, starter = tmp_path / "bin/perftest/shmem_put_bw", tmp_path / "bin/nvshmrun.hydra"
    program.touch()
    starter.touch()
    command = [str(starter), "-n", "2", "-ppn", "1", "-hosts", "a,b", str(program)]
    assert first_hour._put_bandwidth(["a", "b", "c"]) == command
    table = "| size(B) | BW GB/sec |\n| 1024 | 0.52 |\n 4194304   45.25\nNVSHMEM 3.4\n"
    assert list(first_hour._bandwidths(table)) == [0.52, 45.25]
