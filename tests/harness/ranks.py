"""Virtual ranks: one `Buffer` a thread, all on one GPU, each with its own part of the SMs."""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from epjit import Buffer
from epjit.modes.base import Mode
from epjit.runtime import driver, stream
from tests.harness.launch import run_threads

_STREAMS_A_RANK = 8
_rank = threading.local()

SMALL = os.environ.get("EPJIT_TEST_SMALL") == "1"  # under compute-sanitizer
SMS = 4 if SMALL else 12


def num_random_rounds(num_ranks: int) -> int:
    """Fresh rounds of a test: fewer with many ranks, whose Python takes turns in one process.

    Eight ranks took 0.3 s a round on an H200.
    """
    return 10 if SMALL else 300 if num_ranks <= 4 else 100


def line_up(buffer: Buffer) -> None:
    """From here to `settle` virtual ranks launch, and none waits for the GPU.

    A copy from the CPU that waits for its stream can hold up the launches of the whole process, and
    so what the stream waits for, if another rank is behind: three ranks timed out that way.
    Processes have a driver each.

    Under compute-sanitizer all ranks meet here: in memcheck whoever has waited for a stream waits
    for all kernels that run, too, and meanwhile none can be launched.
    """
    if SMALL:
        buffer._links.barrier()


def settle(buffer: Buffer) -> None:
    """Waits until all that this rank has queued is done.

    Raises:
        CommunicationError: A kernel gave up.
    """
    line_up(buffer)
    if buffer.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    buffer.check_fault()


def run_ranks(
    num_ranks: int,
    body: Callable[..., Any],
    *args: Any,
    num_nvl_bytes: int = 16 << 20,
    num_buffers: int = 1,
    timeout_seconds: float = 20,
    timeout: float = 240,
    low_latency_sms: int | None = None,
    **options: Any,
) -> list[Any]:
    """Runs ``body(buffer, ..., *args)`` on every rank; `options` are those of `Buffer`.

    `low_latency_sms` are those of a low-latency kernel, by default so few that those of all ranks
    run at once.

    Each thread has its own streams: with a shared one, a rank would wait for what another rank has
    queued.
    """
    _streams()
    # Loaded now: what is first loaded while a rank's kernel spins waits for that kernel.
    torch.cuda._sleep(1)
    torch.cuda.synchronize()

    # Low-latency kernels take all SMs that there are, and those of all ranks must run at once, with
    # the next one of each rank, which starts early, beside them.
    if low_latency_sms is None:
        low_latency_sms = SMS if SMALL else 60 // num_ranks
    os.environ["EPJIT_LOW_LATENCY_NUM_SMS"] = str(low_latency_sms)

    def worker(comm: Any) -> Any:
        _rank.number, _rank.num_streams = comm.Get_rank(), 0
        with torch.cuda.stream(_next_stream(torch.cuda.current_device())):
            buffers = [
                Buffer(
                    None,
                    num_nvl_bytes,
                    comm=comm,
                    explicitly_destroy=True,
                    timeout_seconds=timeout_seconds,
                    **options,
                )
                for _ in range(num_buffers)
            ]
            result = body(*buffers, *args)
            meet(buffers[0])  # nobody frees what a peer may still read
            for buffer in buffers:
                buffer.destroy()
            return result

    # Nor may the collector run: to unload a kernel or free memory that a traceback has kept alive,
    # it would wait for the kernels of all ranks, in the thread of one that they wait for.
    gc.collect()
    gc.disable()
    try:
        with (
            mock.patch.object(stream, "high_priority_stream", _next_stream),
            mock.patch.object(Mode, "_build", _among_all(Mode._build)),
        ):
            return run_threads(worker, num_ranks, timeout=timeout)
    finally:
        gc.enable()


def _among_all(build: Callable[..., Any]) -> Callable[..., Any]:
    """`Mode._build`, begun and ended with all ranks there, and nothing that they queued running.

    To load a kernel the driver waits for all kernels that run, and lets nobody launch meanwhile:
    also not the rank that a running one waits for. Processes have a driver each.
    """

    @functools.wraps(build)
    def building(mode: Mode[Any], *args: Any, **sizes: int) -> Any:
        if torch.cuda.is_current_stream_capturing():
            return build(mode, *args, **sizes)  # which refuses
        mode._group.barrier()  # all have launched what is waited for next (`line_up` says why)
        for row in _streams():
            row[_rank.number].synchronize()
        mode._group.barrier()
        launch = build(mode, *args, **sizes)
        mode._group.barrier()  # nobody launches it while another still loads
        return launch

    return building


def meet(buffer: Buffer) -> None:
    """All ranks are through with what they have queued."""
    line_up(buffer)
    torch.cuda.current_stream().synchronize()
    buffer.group.allgather(None)


def capture(queue: Callable[[], Any], meet: Callable[[], object]) -> tuple[Callable[[], None], Any]:
    """Captures what `queue` queues; returns the replay, and what it returned.

    Args:
        queue: Called once.
        meet: Called before and after, for ranks that share a GPU.
    """
    # Not `torch.cuda.graph`, which waits for the GPU first: that ends the captures of other ranks.
    torch.cuda.synchronize()
    meet()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        outputs = queue()
    finally:
        graph.capture_end()
    meet()
    return graph.replay, outputs


def start_at(buffer: Buffer, epoch: int, *, stale: int) -> None:
    """As after `epoch` operations, when what is not told in each was last told in `stale`.

    A stale signal has the largest window. To be called by all ranks, with nothing under way.
    """
    meet(buffer)
    mode: Any = buffer._mode
    now, then = (value % (1 << 32) << 32 for value in (epoch, stale))
    controls = [control.view(torch.int64) for control in mode._control()]
    for control in controls:
        control.copy_(torch.full(control.shape, _int64(then | 0x7FFFFFFF)))
    signals = controls[0]
    for first in (0, 32):  # finish, entered
        signals[first : first + 8].copy_(torch.full((8,), _int64(now)))
    if len(controls) > 1:
        rings, num_domains = mode._rings, buffer.topology.num_domains
        before = (epoch - 1) % (1 << 32) << 32
        words = [before, now] if epoch % 2 else [now, before]  # epoch & 1
        told = torch.tensor([_int64(word) for word in words] * 2 * num_domains)  # entered, ready
        first = (rings.entered - rings.control) // 8
        controls[1][first : first + len(told)].copy_(told)
    mode._epoch.copy_(torch.tensor([_int64(now) >> 32], dtype=torch.int32))
    torch.cuda.current_stream().synchronize()
    meet(buffer)


def _int64(value: int) -> int:
    """The same 64 bits, as torch has them in an int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


@functools.cache
def _streams() -> list[list[torch.cuda.Stream]]:
    """A row with one of normal priority for each rank, then rows of high priority.

    The driver deals streams out to its queues in the order in which they are made, and of two ranks
    that share a queue one can end up behind what the other has queued after a kernel that spins
    until the first one comes. torch makes its streams at once, more than there are queues. Of these
    here, those of a rank share one queue, and ranks share none.
    """
    device = torch.cuda.current_device()
    num_queues = int(os.environ["CUDA_DEVICE_MAX_CONNECTIONS"])  # set by tests/gpu/conftest.py
    flag = driver.load().CUstream_flags.CU_STREAM_NON_BLOCKING
    with driver.using(device):
        return [
            [
                torch.cuda.ExternalStream(
                    int(driver.call("cuStreamCreateWithPriority", flag, priority)), device=device
                )
                for _ in range(num_queues)
            ]
            for priority in (0, *[-1] * (_STREAMS_A_RANK - 1))
        ]


def next_stream() -> torch.cuda.Stream:
    """Another stream of the rank whose thread this is."""
    return _next_stream(torch.cuda.current_device())


def _next_stream(device: int) -> torch.cuda.Stream:
    """The next stream of the rank whose thread this is; the first is of normal priority."""
    del device
    taken = _rank.num_streams
    _rank.num_streams += 1
    row = 1 + (taken - 1) % (_STREAMS_A_RANK - 1) if taken else 0
    return _streams()[row][_rank.number]
