"""EPJIT_CHECK=1 with virtual ranks: handles of the kernels are as the checks expect them."""

from __future__ import annotations

import pytest

from epjit import Buffer
from tests.harness.ranks import run_ranks
from tests.rounds.low_latency import ROOM
from tests.scenarios import value_checks


@pytest.mark.parametrize(("num_ranks", "domain"), [(3, None), (4, 2)], ids=["3", "2x2"])
@pytest.mark.parametrize("body", [value_checks.accepts, value_checks.refuses])
def test_values(
    num_ranks: int, domain: int | None, body: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPJIT_CHECK", "1")
    options = {"num_rdma_bytes": ROOM, "low_latency_mode": True, "nvlink_domain": domain}
    run_ranks(num_ranks, body, **options)


def test_a_capture_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns, and captures what it would without."""
    import torch

    monkeypatch.setenv("EPJIT_CHECK", "1")

    def body(buffer: Buffer) -> None:
        idx = torch.zeros((4, 1), dtype=torch.int64, device=buffer.device)
        buffer.get_dispatch_layout(idx, 1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.warns(RuntimeWarning, match="EPJIT_CHECK is set"),
            torch.cuda.graph(graph, stream=torch.cuda.current_stream()),
        ):
            per_rank, *_ = buffer.get_dispatch_layout(idx, 1)
        graph.replay()
        assert per_rank.tolist() == [4]

    run_ranks(1, body)
