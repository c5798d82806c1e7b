"""The table of bad input on the GPU: every call is refused before anything is launched."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from epjit import Buffer
from epjit.runtime.jit import Launch
from tests.bad_input import CASES, NUM_RANKS, Bench, ReachedError, verify
from tests.gpu.ranks import run_ranks


def test_bad_input_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lines of the table on both ranks; the right arguments do reach a launch."""

    def reached(self: Launch, *args: Any, **values: Any) -> NoReturn:
        raise ReachedError(str(self))

    def body(buffer: Buffer, destroyed: Buffer) -> None:
        destroyed.destroy()
        bench = Bench(buffer, destroyed)
        for case in CASES:
            verify(case, bench)
        # Compiled first: a launch that is the first of its kind meets the peers.
        buffer.warmup(bench.x.shape[1] * bench.x.element_size(), num_topk=bench.idx.shape[1])
        for call in (bench.layout, bench.dispatch, bench.cached, bench.combine):
            with pytest.raises(ReachedError):
                call()

    def both(first: Buffer) -> None:
        second = Buffer(None, 1 << 16, comm=first.group, explicitly_destroy=True)
        body(first, second)

    monkeypatch.setattr(Launch, "__call__", reached)
    run_ranks(NUM_RANKS, both, num_nvl_bytes=1 << 20)
