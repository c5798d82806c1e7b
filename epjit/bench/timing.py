"""Ranks that are timed together: how they meet, and what one call takes on the slowest of them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Row: TypeAlias = dict[str, Any]
"""One result, as it stands in the JSON: `op`, what it was run with, and its numbers."""

TIMED_CALLS, EAGER_CALLS, WARMUP_CALLS = 20, 50, 5
SPIN_CYCLES = 1_500_000  # about 0.8 ms: hides the host's launch time
CALLS_OF_GRAPH = 10
FLUSH_WORDS = 64 << 20  # int32 words: 256 MiB, several times the L2


def slowest(values: list[float], group: dist.ProcessGroup, device: str = "cuda") -> list[float]:
    """Each value's maximum over the ranks."""
    out = torch.tensor(values, device=device, dtype=torch.float64)
    dist.all_reduce(out, op=dist.ReduceOp.MAX, group=group)
    return [float(value) for value in out.tolist()]


def timed(
    fn: Callable[[], Any], group: dist.ProcessGroup, *, device: str = "cuda"
) -> tuple[float, float]:
    """Device and host microseconds a call: medians, the slowest rank's, the L2 cold.

    The GPU spins until the host has queued all, and then the ranks meet: so no rank waits for the
    host of another, which would count as the call's time (20 to 40 us on slow hosts).
    """
    if device == "cpu":
        us = eager(fn, group, device=device)
        return us, us
    for _ in range(WARMUP_CALLS):
        fn()
    torch.cuda.synchronize()
    dist.barrier(group)
    device_us, host_us = [], []
    flush = torch.empty(FLUSH_WORDS, dtype=torch.int32, device=device)
    for _ in range(TIMED_CALLS):
        flush.zero_()
        word = torch.zeros(1, device=device)
        torch.cuda._sleep(SPIN_CYCLES)
        dist.all_reduce(word, group=group)  # lines the ranks up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        begin = time.perf_counter()
        fn()
        host_us.append((time.perf_counter() - begin) * 1e6)
        end.record()
        torch.cuda.synchronize()
        device_us.append(start.elapsed_time(end) * 1e3)
    device_median, host = slowest(
        [statistics.median(device_us), statistics.median(host_us)], group, device
    )
    return device_median, host


def eager(fn: Callable[[], Any], group: dist.ProcessGroup, *, device: str = "cuda") -> float:
    """Microseconds a call, back to back: what an eager user sees."""
    synchronize: Callable[[], None] = nothing if device == "cpu" else torch.cuda.synchronize
    calls, warmup = (2, 1) if device == "cpu" else (EAGER_CALLS, WARMUP_CALLS)
    for _ in range(warmup):
        fn()
    synchronize()
    dist.barrier(group)
    synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        fn()
    synchronize()
    return slowest([(time.perf_counter() - begin) / calls * 1e6], group, device)[0]


def in_graph(fn: Callable[[], Any], group: dist.ProcessGroup) -> float:
    """Microseconds a call in a CUDA graph, of several in a row."""
    torch.cuda.synchronize()
    dist.barrier(group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_OF_GRAPH):
            fn()
    us, _ = timed(graph.replay, group)
    torch.cuda.synchronize()
    dist.barrier(group)
    return us / CALLS_OF_GRAPH


def join(rank: int, num_ranks: int, port: int, *, device: str = "cuda") -> dist.ProcessGroup:
    """Takes GPU `rank` and a share of the CPU, and meets the other ranks."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_ranks,
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )
    group = dist.new_group(list(range(num_ranks)))
    assert isinstance(group, dist.ProcessGroup)
    return group


def free_port() -> int:
    """A port of this host that nobody listens on.

    Not one of those that the system hands out (Linux: from 32768 on): another process may get it
    before the rank that shall listen on it has started.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def ranks_and_device(ranks: int | None) -> tuple[int, str]:
    """How many ranks, and "cuda" or "cpu": what was asked for, or what there is.

    Args:
        ranks: None = all GPUs, or two ranks without any.

    Raises:
        RuntimeError: ``EPJIT_BACKEND=cuda``, and torch finds no GPU.
        ValueError: More ranks than GPUs, which would take turns.
    """
    from epjit.modes.make import use_gpu

    gpus = torch.cuda.device_count() if use_gpu() else 0
    wanted = (gpus or 2) if ranks is None else ranks
    if 0 < gpus < wanted:
        raise ValueError(
            f"--ranks is {wanted}, but times need a GPU for each rank, and there are {gpus}; "
            "EPJIT_BACKEND=cpu takes the CPU backend"
        )
    return wanted, "cuda" if gpus else "cpu"


def run_ranks(
    worker: Callable[..., None],
    num_ranks: int,
    *args: Any,
    on_row: Callable[[Row], None],
) -> list[Row]:
    """Runs `worker(rank, *args, queue)` in a process a rank, and returns what they report.

    Args:
        worker: A function at the top level of a module; it puts rows into `queue`.
        num_ranks: Number of processes.
        *args: Passed to every rank; pickled.
        on_row: Called in this process with each row when it comes.

    Raises:
        RuntimeError: A rank failed; the text has its traceback.
    """
    queue = mp.get_context("spawn").SimpleQueue()
    rows: list[Row] = []

    def drain() -> None:
        while not queue.empty():
            rows.append(queue.get())
            on_row(rows[-1])

    context = mp.spawn(_rank, (worker, *args, queue), num_ranks, join=False)
    try:
        while not context.join(timeout=0.1):
            drain()
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        raise RuntimeError(f"rank {error.error_index} failed: {error}") from None
    drain()
    return rows


def _rank(rank: int, worker: Callable[..., None], *args: Any) -> None:
    """A rank's process: libraries (Gloo of torch 2.10) write to stdout, which is for results."""
    os.dup2(2, 1)
    worker(rank, *args)


def nothing() -> None:
    """Does nothing, as where the CPU has nothing under way."""
