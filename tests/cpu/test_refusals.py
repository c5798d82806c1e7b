"""Every precondition: the error names the value and the remedy, and nothing communicates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from epjit import Buffer
from tests.refusals import CASES, GROUPS
from tests.refusals.table import (
    BETWEEN,
    BUFFER,
    NUM_RANKS,
    Bench,
    ReachedError,
    StubComm,
    Unreachable,
    verify,
)


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A buffer of two ranks of which nothing but the checks works."""

    def make(**options: Any) -> Buffer:
        comm = StubComm(NUM_RANKS, rank=1, answers=2)  # who shares NVLink, and what is made
        return Buffer(None, 1 << 16, comm=comm, **options)

    destroyed = make(explicitly_destroy=True)
    destroyed.destroy()
    normal, between, buffer = make(), make(**BETWEEN), make(**BUFFER)
    made = Bench(buffer, destroyed, normal, between)
    # What has memory to look at is no communication; all else of the modes is.
    mode = buffer._low_latency
    for made_of in (between, buffer):
        made_of._mode = Unreachable(raise_fault=lambda: None, memory=made_of._mode.memory)
    buffer._low_latency = Unreachable(raise_fault=lambda: None, memory=mode.memory)
    yield made
    buffer._low_latency = mode


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.gpu_only])
def test_refused(name: str, bench: Bench) -> None:
    verify(name, CASES[name], bench)


def test_names_are_unique() -> None:
    """In a group ruff sees to it (F601)."""
    assert len(CASES) == sum(map(len, GROUPS.values()))


def test_right_arguments_reach_the_backend(bench: Bench) -> None:
    """Else the table would prove nothing: each call is refused for what was changed in it."""
    calls = (bench.layout, bench.dispatch, bench.cached, bench.combine)
    calls += (bench.expert_dispatch, bench.expert_cached, bench.expert_combine)
    calls += (bench.dispatch_between, bench.cached_between, bench.combine_between)
    for call in (*calls, bench.ll_dispatch, bench.ll_combine, bench.ll_clean):
        with pytest.raises(ReachedError):
            call()
    with pytest.raises(ReachedError):
        bench.combine(topk_weights=bench.recv_weights, bias=(bench.x, bench.x))
    for cast in ("fp8", "fp8_round", "mxfp8"):
        with pytest.raises(ReachedError):
            bench.expert_dispatch(x=bench.ll_x, cast=cast)
    with pytest.raises(ReachedError):
        bench.expert_combine(row_weights=bench.row_weights, topk_weights=bench.row_weights)
    scale = bench.full(1, dtype=torch.float32)
    with pytest.raises(ReachedError):
        bench.expert_dispatch(x=bench.ll_x, cast="nvfp4", global_scale=scale)
    with pytest.raises(ReachedError):
        bench.ll_dispatch(quantization="nvfp4", global_scale=scale)
    with pytest.raises(ReachedError):
        bench.ll_combine(use_logfmt=True, out=bench.full(*bench.ll_x.shape))
    with pytest.raises(ReachedError):
        bench.buffer.get_next_low_latency_combine_buffer(bench.ll_handle)
