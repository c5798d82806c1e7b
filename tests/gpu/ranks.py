"""Virtual ranks: one `Buffer` a thread, all on one GPU, each with its own part of the SMs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch

from epjit import Buffer
from tests.launch import run_threads

SMALL = os.environ.get("EPJIT_TEST_SMALL") == "1"  # under compute-sanitizer
SMS = 4 if SMALL else 12


def run_ranks(
    num_ranks: int,
    body: Callable[..., Any],
    *args: Any,
    num_nvl_bytes: int = 16 << 20,
    num_buffers: int = 1,
    timeout_seconds: float = 20,
    timeout: float = 240,
    **options: Any,
) -> list[Any]:
    """Runs ``body(buffer, ..., *args)`` on every rank; `options` are those of `Buffer`.

    Each thread has its own stream: with a shared one, a rank would wait for what another rank has
    queued.
    """
    # Loaded now: what is first loaded while a rank's kernel spins waits for that kernel.
    torch.cuda._sleep(1)
    torch.cuda.synchronize()

    # Low-latency kernels take all SMs that there are, and those of all ranks must run at once.
    os.environ["EPJIT_LOW_LATENCY_NUM_SMS"] = str(SMS if SMALL else 120 // num_ranks)

    def worker(comm: Any) -> Any:
        with torch.cuda.stream(torch.cuda.Stream()):
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
            torch.cuda.current_stream().synchronize()
            comm.allgather(None)  # nobody frees what a peer may still read
            for buffer in buffers:
                buffer.destroy()
            return result

    # Nor may the collector run: to unload a kernel or free memory that a traceback has kept alive,
    # it would wait for the kernels of all ranks, in the thread of one that they wait for.
    gc.collect()
    gc.disable()
    try:
        return run_threads(worker, num_ranks, timeout=timeout)
    finally:
        gc.enable()
