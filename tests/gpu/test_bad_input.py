"""The table of bad input on the GPU: every call is refused before anything is launched."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from epjit import Buffer
from epjit.runtime.jit import Launch
from tests.bad_input import (
    BUFFER,
    CASES,
    LL_HIDDEN,
    MAX_TOKENS,
    NUM_EXPERTS,
    NUM_RANKS,
    Bench,
    ReachedError,
    verify,
)
from tests.gpu.ranks import run_ranks


def test_bad_input_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lines of the table on both ranks; the right arguments do reach a launch."""

    def reached(self: Launch, *args: Any, **values: Any) -> NoReturn:
        raise ReachedError(str(self))

    def body(buffer: Buffer, destroyed: Buffer, normal: Buffer) -> None:
        destroyed.destroy()
        bench = Bench(buffer, destroyed, normal)
        for case in CASES:
            verify(case, bench)
        # Compiled first: a launch that is the first of its kind meets the peers.
        buffer.warmup(bench.x.shape[1] * bench.x.element_size(), num_topk=bench.idx.shape[1])
        buffer.low_latency_warmup(
            MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS, num_topk=bench.idx.shape[1], use_fp8=False
        )
        calls = (bench.layout, bench.dispatch, bench.cached, bench.combine)
        for call in (*calls, bench.ll_dispatch, bench.ll_combine, bench.ll_clean):
            with pytest.raises(ReachedError):
                call()

    def with_others(first: Buffer) -> None:
        second, third = (
            Buffer(None, 1 << 16, comm=first.group, explicitly_destroy=True) for _ in range(2)
        )
        body(first, second, third)
        third.destroy()

    monkeypatch.setattr(Launch, "start", reached)  # every launch goes through it
    run_ranks(NUM_RANKS, with_others, num_nvl_bytes=1 << 20, **BUFFER)
