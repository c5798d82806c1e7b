"""bench/expert_major.py on the CPU backend: what it compares, and the lines that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHAPE = "--tokens 16 --hidden 256 --intermediate 128 --experts 8 --topk 2 --alignment 8"


def rows_of(path: Path, *options: str) -> dict[str, dict[str, Any]]:
    """The lines of a run, by what they are of."""
    subprocess.run(
        [sys.executable, "bench/expert_major.py", *SHAPE.split(), "--json", str(path), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "EPJIT_BACKEND": "cpu"},
        check=True,
        timeout=240,
    )
    lines = map(json.loads, path.read_text().splitlines())
    return {row["op"]: row for row in lines}


def test_a_layer_in_fp8_stands_beside_that_in_bf16(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows.jsonl")
    wide = rows["layer: dispatch, two products, combine"]
    small = rows["layer in FP8: dispatch with cast, two products, combine"]
    assert small["beside"] == wide["op"]
    assert small["products_us"] == rows["two products in FP8, a cast between"]["us"]


def test_virtual_ranks_are_compared(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", "--virtual", "4")
    found = rows["rows here, with padding"]
    assert found["rows"] == 4 * 16 * 2
    assert found["plain"] <= found["rows"] <= found["padded"]
