"""Symmetric memory between threads, on a driver that only counts."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from epjit.runtime import group as groups
from epjit.runtime import symmetric
from epjit.runtime.symmetric import SymmetricMemory
from tests.cpu.runtime.test_group import run_threads


class Driver:
    """All devices reach each other, except device 9; device 13 has no memory."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.freed: list[int] = []
        self.handle = ctypes.create_string_buffer(64)
        self.local = threading.local()
        self.pointers = itertools.count(0x1000, 0x1000)

    def load(self) -> Any:
        def enable(context: int, flags: int) -> tuple[int]:
            self.calls["cuCtxEnablePeerAccess"] += 1
            return (0,)

        flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
        return SimpleNamespace(CUstream_flags=flags, cuCtxEnablePeerAccess=enable)

    @contextmanager
    def using(self, device: int) -> Iterator[None]:
        self.local.device = device
        yield

    def primary_context(self, device: int) -> int:
        return device

    def call(self, name: str, *args: Any) -> Any:
        self.calls[name] += 1
        if name == "cuMemAlloc":
            if self.local.device == 13:
                raise RuntimeError(f"cuMemAlloc({args[0]}) failed with CUDA_ERROR_OUT_OF_MEMORY")
            return next(self.pointers)
        if name == "cuIpcGetMemHandle":
            return SimpleNamespace(getPtr=lambda: ctypes.addressof(self.handle))
        if name == "cuMemFree":
            self.freed.append(args[0])
        return None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(symmetric, "driver", fake)
    gpu = SimpleNamespace(
        uuid=lambda device: bytes([device]) * 16,
        count=lambda: 16,
        can_access_peer=lambda device, peer: 9 not in (device, peer),
    )
    monkeypatch.setattr(symmetric, "gpu", gpu)
    return fake


def make(devices: list[int], nbytes: list[int] | None = None) -> list[Any]:
    sizes = nbytes or [256] * len(devices)
    return run_threads(
        len(devices),
        lambda group: SymmetricMemory(sizes[group.rank], group=group, device=devices[group.rank]),
    )


def test_ranks_of_one_process_share_plain_pointers(driver: Driver) -> None:
    memories = make([0, 0, 1])
    pointers = [memory.ptr for memory in memories]
    assert all(memory.peer_ptrs == pointers for memory in memories)
    assert len(set(pointers)) == 3
    assert driver.calls["cuCtxEnablePeerAccess"] == 4  # 0 and 0 to 1, 1 to both
    assert driver.calls["cuIpcOpenMemHandle"] == 0
    assert driver.calls["cuMemsetD8Async"] == 3


def test_threads_that_ask_at_once_get_one_process_id(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = itertools.count()

    def slow_token(num_bytes: int) -> str:
        time.sleep(0.05)  # long enough for every thread to find no name yet
        return str(next(tokens))

    monkeypatch.setattr(groups.secrets, "token_hex", slow_token)
    monkeypatch.setattr(groups, "_process_ids", {})
    names = run_threads(8, lambda group: groups.process_id())
    assert len(set(names)) == 1


def test_close_is_idempotent_and_not_collective(driver: Driver) -> None:
    first, second = make([0, 0])
    pointer = first.ptr
    first.close()
    first.close()
    assert driver.freed == [pointer]
    assert second.ptr
    with pytest.raises(RuntimeError, match="closed"):
        first.tensor(None)


def test_sizes_that_differ_are_named_everywhere(driver: Driver) -> None:
    errors = make([0, 0], [256, 512])
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert str(errors[0]) == str(errors[1])
    assert "rank 0 asks for nbytes=256 and fabric=False, rank 1 for nbytes=512" in str(errors[0])
    assert len(driver.freed) == 2


def test_a_pair_without_peer_access_is_named_everywhere(driver: Driver) -> None:
    errors = make([0, 9, 1])
    assert [type(error) for error in errors] == [RuntimeError] * 3
    for error in errors:
        assert "rank 0 (device 0) cannot reach the memory of rank 1 (device 9)" in str(error)
        assert "rank 1 (device 9) cannot reach the memory of rank 2 (device 1)" in str(error)
    assert len(driver.freed) == 3


def test_a_rank_without_memory_fails_all(driver: Driver) -> None:
    errors = make([0, 13])
    assert [type(error) for error in errors] == [RuntimeError] * 2
    assert all("rank 1 (device 13): cuMemAlloc(256) failed" in str(error) for error in errors)
    assert len(driver.freed) == 1


def test_mapped_memory_goes_when_what_is_queued_is_done(driver: Driver) -> None:
    """Unlike cuMemFree, cuMemUnmap waits for nothing, and kernels may still read."""
    memory: Any = SymmetricMemory.__new__(SymmetricMemory)
    memory._device, memory._fabric, memory._closed, memory._pid = 0, True, False, os.getpid()
    memory.ptr, memory._ipc_opened, memory._mapped = 0x1000, [], [(0x1000, 256, 7)]
    memory.close()
    assert list(driver.calls) == [
        "cuCtxSynchronize",
        "cuMemUnmap",
        "cuMemAddressFree",
        "cuMemRelease",
    ]
