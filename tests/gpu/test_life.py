"""The life of Buffers on a GPU: memory that comes back, and children that say nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from epjit import Buffer
from epjit.runtime.group import ThreadGroup
from tests.rounds.normal import layout_of

ROOT = Path(__file__).parents[2]


def alone(*sizes: int, **options: Any) -> Buffer:
    return Buffer(None, *sizes, comm=ThreadGroup.create(1)[0], **options)


def free_bytes() -> int:
    """Free memory of the GPU, once torch has given back what it keeps."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _last_barrier(_: int) -> Any:
    from epjit.modes.low_latency import LowLatency

    return mock.patch.object(LowLatency, "_leave", property(lambda _: 1 / 0))


def _does_not_fit(free: int) -> Any:
    del free
    from epjit.runtime import symmetric

    whole = symmetric.fill_zero
    calls = []

    def second_fails(ptr: int, nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) > 1:
            raise RuntimeError("no memory")
        whole(ptr, nbytes)

    return mock.patch.object(symmetric, "fill_zero", second_fails)


@pytest.mark.parametrize("failure", [_last_barrier, _does_not_fit])
def test_a_buffer_that_cannot_be_made_leaves_no_memory(failure: Callable[[int], Any]) -> None:
    """1 GiB for each mode, five times; the errors are kept."""
    alone(1 << 20, 1 << 20, low_latency_mode=True)  # kernels, contexts, caches
    before = free_bytes()
    errors = []
    for _ in range(5):
        with failure(before):
            try:
                alone(1 << 30, 1 << 30, low_latency_mode=True)
            except (RuntimeError, ZeroDivisionError) as error:
                errors.append(error)
    assert len(errors) == 5
    assert before - free_bytes() < 64 << 20
    del errors


def test_a_buffer_too_large_for_the_gpu_leaves_no_memory() -> None:
    alone(1 << 20, 1 << 20, low_latency_mode=True)  # kernels, contexts, caches
    before = free_bytes()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
            alone(1 << 30, before // 128 * 128, low_latency_mode=True)
    assert before - free_bytes() < 64 << 20


def test_a_timeout_without_end() -> None:
    buffer = alone(1 << 20, timeout_seconds=float("inf"), explicitly_destroy=True)
    idx = torch.zeros((4, 1), dtype=torch.int64, device="cuda")
    layout = layout_of(buffer, idx, 2)
    x = torch.ones((4, 64), dtype=torch.bfloat16, device="cuda")
    recv_x, *_ = buffer.dispatch(x, **layout)
    assert torch.equal(recv_x, x)
    buffer.destroy()


def test_a_buffer_dropped_during_a_capture_is_freed_after_it() -> None:
    other, dropped = alone(1 << 20), alone(1 << 30)
    before = free_bytes()
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(4, device="cuda")
    with torch.cuda.graph(graph):
        x.add_(1)
        del dropped
    graph.replay()
    assert x.tolist() == [1] * 4
    other.check_fault()  # as every call does
    assert free_bytes() - before > 900 << 20


def test_with_ends_a_buffer() -> None:
    before = free_bytes()
    with pytest.raises(ZeroDivisionError), alone(1 << 30, explicitly_destroy=True):
        raise ZeroDivisionError
    with alone(1 << 30) as buffer:
        assert "rank 0 of 1 on cuda" in repr(buffer)
    assert before - free_bytes() < 64 << 20


_FORKS = """
import os, sys, torch
from epjit import Buffer
from epjit.runtime.group import ThreadGroup
buffer = Buffer(None, 1 << 20, comm=ThreadGroup.create(1)[0])
kept = Buffer(None, 1 << 20, comm=ThreadGroup.create(1)[0], explicitly_destroy=True)
idx = torch.zeros((4, 1), dtype=torch.int64, device="cuda")
per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 2)
x = torch.ones((4, 64), dtype=torch.bfloat16, device="cuda")
out = buffer.dispatch(x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
                      num_tokens_per_expert=per_expert)
torch.cuda.synchronize()
child = os.fork()
if not child:
    if sys.argv[1] == "drops":
        del buffer, kept, out
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
kept.destroy()
"""


@pytest.mark.parametrize("how", ["drops", "ends"])
def test_a_forked_child_is_silent(how: str, tmp_path: Path) -> None:
    """As the workers of a data loader: they have copies of modules, events and memory."""
    script = tmp_path / "forks.py"
    script.write_text(_FORKS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", script, how],  # threads, and a fork
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
