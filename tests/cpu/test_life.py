"""The life of a Buffer: made or not made, dropped, left by an exception, forked; on a fake GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from epjit import Buffer
from epjit.runtime import symmetric
from tests.cpu.fake_gpu import FakeGpu, fake_gpu

KINDS: dict[str, dict[str, Any]] = {
    "normal": {"num_nvl_bytes": 1 << 20},
    "direct": {"num_nvl_bytes": 1 << 20},
    "fabric": {"num_nvl_bytes": 1 << 20, "use_fabric": True},
    "low latency": {"num_rdma_bytes": 1 << 20, "low_latency_mode": True},
    "between": {"num_nvl_bytes": 1 << 20, "num_rdma_bytes": 1 << 20, "nvlink_domain": 1},
    "all": {
        "num_nvl_bytes": 1 << 20,
        "num_rdma_bytes": 1 << 20,
        "low_latency_mode": True,
        "nvlink_domain": 1,
    },
}


class Twin:
    """The communicator of a rank whose peer says the same, in a process of its own.

    Each gather is a step that may fail.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 2

    def allgather(self, obj: Any) -> list[Any]:
        self._gpu.step("allgather")
        is_memory = isinstance(obj, symmetric._Region) and not obj.error
        return [obj, obj._replace(process="another") if is_memory else obj]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as fake:
        yield fake


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_that_cannot_be_made_leaves_nothing(
    kind: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step fails, and while the caller still has the error."""
    if kind == "direct":
        monkeypatch.setenv("EPJIT_DISPATCH_VARIANT", "direct")
    monkeypatch.setenv("EPJIT_TRANSPORT", "loopback")
    gc.disable()  # nothing may be left to the collector
    left = []
    try:
        for step in range(1, 1000):
            gpu.num_steps, gpu.fails_at = 0, step
            error = None
            try:
                buffer = Buffer(None, comm=Twin(gpu), timeout_seconds=float("inf"), **KINDS[kind])
            except RuntimeError as caught:
                error = caught
            if error is None:
                break
            left.append((step, str(error), len(gpu.in_use), len(gpu.modules)))
    finally:
        gc.enable()
    assert len(left) > 20
    assert [each for each in left if each[2:] != (0, 0)] == []
    assert gpu.in_use
    assert gpu.modules
    gpu.fails_at = None
    del buffer
    assert not gpu.in_use
    assert not gpu.modules
