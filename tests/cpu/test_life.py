"""The life of a Buffer: made or not made, dropped, left by an exception, forked; on a fake GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from epjit import Buffer, EventHandle, life
from epjit.runtime import stream as streams
from epjit.runtime import transport as transports
from epjit.runtime.group import Group
from epjit.runtime.heap import Heap
from epjit.runtime.topology import Topology
from tests.cpu.fake_gpu import FakeGpu, Twin, fake_gpu

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


def make(gpu: FakeGpu, **options: Any) -> Buffer:
    return Buffer(None, 1 << 20, comm=Twin(gpu), **options)


# ---- the last reference goes


@pytest.mark.parametrize("where", ["this thread", "another thread"])
def test_what_goes_during_a_capture_is_freed_after_it(
    where: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To free memory breaks a capture, also one that another thread has begun."""
    other = make(gpu)
    own = len(gpu.in_use)
    dropped = make(gpu)
    captured = False
    if where == "this thread":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    else:  # on the stream of the last call of another Buffer
        other._streams._last = 99
        monkeypatch.setattr(streams, "is_capturing", lambda stream: captured and stream == 99)
    captured = True
    gpu.calls.clear()
    del dropped
    assert [name for name in gpu.calls if name != "cuStreamIsCapturing"] == []
    other._check_alive()  # what every call does
    assert len(gpu.in_use) == 2 * own
    captured = False
    other._check_alive()
    assert len(gpu.in_use) == own


def test_destroy_is_refused_during_a_capture(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = make(gpu, explicitly_destroy=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="destroy it after the capture"):
        buffer.destroy()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    buffer.destroy()
    assert not gpu.in_use


@pytest.mark.parametrize("how", ["destroy", "del", "del in a capture"])
def test_tensors_of_calls_under_way_go_when_the_gpu_is_done(
    how: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = make(gpu, explicitly_destroy=how == "destroy")
    streams: Any = buffer._streams
    event = EventHandle.on(7, streams._comm.events.take(), 0)
    streams._kept.keep(event, tensor := torch.zeros(1))
    weak = weakref.ref(tensor)
    del tensor, streams
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: seen.append(weak() is not None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "capture" in how)
    if how == "destroy":
        buffer.destroy()
    del buffer
    if "capture" in how:
        assert weak() is not None
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        life.give_back_left()
    assert seen
    assert all(seen)
    assert weak() is None
    assert gpu.in_use, "the event outlives the Buffer"
    event.current_stream_wait()
    del event
    assert not gpu.in_use


def test_all_is_freed_though_the_end_fails(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the device was lost: destroy() says it, and frees what it can."""
    buffer = make(gpu, explicitly_destroy=True)

    def lost(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="device lost"):
        buffer.destroy()
    gc.collect()  # the error and the frames of its traceback
    assert not gpu.in_use


# ---- with


@pytest.mark.parametrize("explicitly_destroy", [False, True])
def test_with_destroys(explicitly_destroy: bool, gpu: FakeGpu) -> None:
    with make(gpu, explicitly_destroy=explicitly_destroy) as buffer:
        assert isinstance(buffer, Buffer)
        assert gpu.in_use
    assert buffer.runtime is None
    assert not gpu.in_use
    with pytest.raises(RuntimeError, match="destroyed"):
        buffer.__enter__()
    with make(gpu, explicitly_destroy=True) as buffer:
        buffer.destroy()  # by whoever is faster
    assert not gpu.in_use


def test_an_exception_ends_a_buffer_at_once_and_is_seen(gpu: FakeGpu) -> None:
    """A peer that has not finished is waited for a second; queued waits end."""
    start = time.monotonic()
    with suppress(ZeroDivisionError), make(gpu, timeout_seconds=100) as buffer:
        buffer._mode._epoch[0] = 5  # operations, of which the peer has finished none
        gpu.calls.clear()
        raise ZeroDivisionError
    assert gpu.calls.index("cuMemcpyHtoDAsync") < gpu.calls.index("cuMemFree")  # raise_abort
    assert time.monotonic() - start < 30
    assert not gpu.in_use
    with suppress(ZeroDivisionError), make(gpu):
        gpu.fails_at = gpu.num_steps + 1
        raise ZeroDivisionError
    assert not gpu.in_use


def test_repr(gpu: FakeGpu) -> None:
    buffer = make(gpu)
    text = "<Buffer: rank 0 of 2 on cuda:0, num_nvl_bytes=1048576, num_rdma_bytes=0"
    assert repr(buffer) == text + ">"
    buffer.runtime.destroy()
    assert repr(buffer) == text + ", destroyed>"
    both = make(gpu, num_rdma_bytes=1 << 20, low_latency_mode=True, nvlink_domain=1)
    assert repr(both).endswith("num_rdma_bytes=1048576, 2 NVLink domains, low_latency_mode>")
    assert repr(Buffer.__new__(Buffer)) == "<Buffer, not made>"


# ---- the end of a process

_ENDS = """
import sys, multiprocessing
from epjit import Buffer
from epjit.runtime.group import ThreadGroup

def main(how):
    buffer = Buffer(None, 1024, comm=ThreadGroup.create(1)[0], explicitly_destroy=True)
    if how == "raise": raise KeyError("the real error")
    if how == "interrupt": raise KeyboardInterrupt
    if how == "exit": sys.exit(3)

if __name__ == "__main__":
    how = sys.argv[1]
    if how == "spawn":
        process = multiprocessing.get_context("spawn").Process(target=main, args=("raise",))
        process.start()
        process.join()
    elif how == "global":
        buffer = Buffer(None, 1024, comm=ThreadGroup.create(1)[0], explicitly_destroy=True)
    else:
        main(how)
"""


@pytest.mark.parametrize("how", ["raise", "interrupt", "exit", "spawn", "global", "return"])
def test_only_a_normal_run_is_told_of_a_buffer_that_was_not_destroyed(
    how: str, tmp_path: Path
) -> None:
    """The memory goes with the process; an error must not drown."""
    script = tmp_path / "ends.py"
    script.write_text(_ENDS)
    done = subprocess.run(
        [sys.executable, script, how],
        env={**os.environ, "EPJIT_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ("never destroyed" in done.stderr) is (how == "return"), done.stderr
    assert ("the real error" in done.stderr) is (how in ("raise", "spawn")), done.stderr


def test_a_forked_child_frees_nothing(gpu: FakeGpu) -> None:
    """Nor does it warn: what it has are copies of its parent's objects."""
    buffers = [make(gpu, explicitly_destroy=True), make(gpu)]
    kept, num_modules = buffers[1]._mode, len(gpu.modules)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            gpu.calls.clear()
            gpu.num_steps = 0
            buffers[0].destroy()
            buffers.clear()
            del kept
            gc.collect()
            unloaded = num_modules - len(gpu.modules)
            said = [str(each.message) for each in told]
            os.write(writer, repr((gpu.calls, gpu.num_steps, unloaded, said)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 4096) == b"([], 0, 0, [])"
    os.close(reader)
    del kept
    buffers[0].destroy()


def test_what_lives_at_exit_is_freed_before_the_interpreter_ends(gpu: FakeGpu) -> None:
    """torch aborts where a GPU's tensor goes in Python code that runs at the very end."""
    buffer, kept = make(gpu), make(gpu, explicitly_destroy=True)
    with mock.patch.object(sys, "is_finalizing", return_value=True):
        in_use = list(gpu.in_use)
        buffer.__del__()
        assert list(gpu.in_use) == in_use
    life._free_all()
    assert buffer.runtime is None
    assert kept.runtime is not None
    kept.destroy()
    assert not gpu.in_use


def test_a_program_that_an_exception_ends_waits_for_no_peer(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = make(gpu, timeout_seconds=100)
    buffer._mode._epoch[0] = 5  # operations, of which the peer has finished none
    monkeypatch.setattr(sys, "last_type", KeyError, raising=False)
    gpu.calls.clear()
    start = time.monotonic()
    life._free_all()
    assert gpu.calls.index("cuMemcpyHtoDAsync") < gpu.calls.index("cuMemFree")  # raise_abort
    assert time.monotonic() - start < 30
    assert not gpu.in_use


# ---- NVSHMEM's heap


class Piece:
    """A piece of the heap that knows whether it was handed back."""

    ptr, nbytes = 0x1000, 256

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_memory_of_the_heap_goes_back_when_a_peer_does_not_come(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    heap = Piece()
    monkeypatch.setattr(transports.nvshmem, "allocate", lambda *_, **__: heap)
    monkeypatch.setattr(transports.nvshmem, "address_at", lambda ptr, pe: ptr)
    made: Any = transports.NvshmemTransport.__new__(transports.NvshmemTransport)
    made._group = Group.from_comm(Twin(gpu))
    made._device, made._topology, made.pes = 0, Topology(0, ((0,), (1,))), [0, 1]
    assert made.allocate(256).ptr == heap.ptr
    assert not heap.is_closed
    for step in range(1, gpu.num_steps + 1):
        gpu.num_steps, gpu.fails_at, heap.is_closed = 0, step, False
        with pytest.raises(RuntimeError):
            made.allocate(256)
        assert heap.is_closed, gpu.failed


def test_a_block_whose_peer_does_not_come_has_a_number(gpu: FakeGpu) -> None:
    """The other ranks draw one, too: it means the same memory on each."""
    heap = Heap(lambda *_: 0x1000)
    gpu.num_steps, gpu.fails_at = 0, 2  # the second gather
    with pytest.raises(RuntimeError, match="allgather"):
        heap.allocate(Group.from_comm(Twin(gpu)), 256, device=0)
    assert (heap._num_blocks, heap.num_in_use) == (1, 0)
