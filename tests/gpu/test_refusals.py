"""The table of bad input on the GPU: every call is refused before anything is launched."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from epjit import Buffer
from epjit.runtime.launch import Launch
from tests.harness.ranks import run_ranks
from tests.refusals import CASES
from tests.refusals.table import (
    BETWEEN,
    BUFFER,
    LL_HIDDEN,
    MAX_TOKENS,
    NUM_EXPERTS,
    NUM_RANKS,
    Bench,
    ReachedError,
    verify,
)


def test_bad_input_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lines of the table on both ranks; the right arguments do reach a launch."""

    def reached(self: Launch, *args: Any, **values: Any) -> NoReturn:
        raise ReachedError(str(self))

    def body(buffer: Buffer, destroyed: Buffer, normal: Buffer, between: Buffer) -> None:
        destroyed.destroy()
        bench = Bench(buffer, destroyed, normal, between)
        for name, case in CASES.items():
            verify(name, case, bench)
        # Compiled first: a launch that is the first of its kind meets the peers.
        row_bytes = bench.x.shape[1] * bench.x.element_size()
        buffer.warmup(row_bytes, num_topk=bench.idx.shape[1])
        between.warmup(row_bytes)
        buffer.low_latency_warmup(
            MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS, num_topk=bench.idx.shape[1], use_fp8=False
        )
        calls = (bench.layout, bench.cached, bench.combine)
        calls += (bench.cached_between, bench.combine_between)
        calls += (bench.ll_dispatch, bench.ll_combine, bench.ll_clean)
        # Last: a dispatch that ends half way leaves its Buffer out of step, and all calls say so.
        for call in (*calls, bench.dispatch, bench.dispatch_between):
            with pytest.raises(ReachedError):
                call()

    def with_others(first: Buffer) -> None:
        second, third, fourth = (
            Buffer(None, 1 << 16, comm=first.group, explicitly_destroy=True, **options)
            for options in ({}, {}, BETWEEN)
        )
        body(first, second, third, fourth)
        third.destroy()
        fourth.destroy()

    monkeypatch.setattr(Launch, "start", reached)  # every launch goes through it
    run_ranks(NUM_RANKS, with_others, num_nvl_bytes=1 << 20, **BUFFER)
