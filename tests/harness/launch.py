"""Run a function on N ranks: as processes with a torch group, or as threads of this process."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from epjit.bench.timing import free_port

_ROOT = Path(__file__).parents[2]

# After the first failure, what the other ranks still say is often the consequence; a short while
# is given to them because it is sometimes the cause.
_GRACE_SECONDS = 2.0


class RankFailedError(RuntimeError):
    """One or more ranks failed; the text holds rank and traceback of each, first failure first.

    Attributes:
        errors: Traceback text by rank, in the order of arrival.
    """

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        super().__init__(
            "\n".join(f"--- rank {rank} failed ---\n{text}" for rank, text in errors.items())
        )


def run(
    worker: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout: float = 120.0,
    backend: str = "gloo",
    executable: Path | None = None,
) -> list[Any]:
    """Run `worker(group, *args)` in `num_ranks` new processes and return what each returned.

    Args:
        worker: A function at the top level of a module. `group` is a torch ProcessGroup of all
            ranks; it is destroyed after the worker ends, whichever way it does.
        num_ranks: Number of processes.
        *args: Passed to every rank; pickled.
        timeout: Seconds for all ranks to finish, start of the interpreters included.
        backend: Of the process group; with "nccl" rank i uses GPU i.
        executable: Started for each rank in the place of Python.

    Returns:
        Results in rank order; pickled on the way.

    Raises:
        RankFailedError: A rank raised, died, or did not finish in time.
    """
    # forkserver: the children start from one process that has torch imported and no CUDA context.
    context: Any = mp.get_context("spawn" if executable else "forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    resource_tracker.ensure_running()  # a process of its own, but no rank
    context.set_executable(str(executable or sys.executable))
    with tempfile.TemporaryDirectory(prefix="epjit-test-") as folder:
        init_method = f"file://{Path(folder) / 'rendezvous'}"
        processes: list[BaseProcess] = []
        pipes: dict[Connection, int] = {}
        try:
            for rank in range(num_ranks):
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_rank_main,
                    args=(sender, rank, num_ranks, init_method, backend, worker, args),
                    daemon=True,
                )
                process.start()
                sender.close()
                processes.append(process)
                pipes[receiver] = rank
            return _collect(pipes, processes, timeout)
        finally:
            for process in processes:
                process.join(timeout=_GRACE_SECONDS)
                if process.is_alive():
                    process.kill()
                    process.join()


def run_threads(
    worker: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Run `worker(comm, *args)` in `num_ranks` threads and return what each returned.

    Args:
        worker: Any callable. `comm` has Get_rank, Get_size and allgather (`Buffer(comm=...)`).
        num_ranks: Number of threads.
        *args: Passed to every rank, the same objects.
        timeout: Seconds for all ranks to finish.

    Returns:
        Results in rank order.

    Raises:
        RankFailedError: A rank raised or did not finish in time; its cause is the first error.
    """
    from epjit.runtime.group import ThreadGroup

    results: list[Any] = [None] * num_ranks
    errors: dict[int, str] = {}
    causes: list[BaseException] = []
    failed = threading.Event()

    def rank_main(rank: int, comm: Any) -> None:
        try:
            results[rank] = worker(comm, *args)
        except BaseException as error:
            errors[rank] = traceback.format_exc()
            causes.append(error)
            failed.set()

    threads = [
        threading.Thread(target=rank_main, args=(rank, comm), name=f"rank {rank}", daemon=True)
        for rank, comm in enumerate(ThreadGroup.create(num_ranks))
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        if failed.is_set():
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            failed.clear()
        for thread in threads:
            thread.join(timeout=0.02)
    for rank, thread in enumerate(threads):
        if thread.is_alive() and rank not in errors:
            frame = sys._current_frames().get(thread.ident or 0)
            stack = "".join(traceback.format_stack(frame)) if frame else ""
            errors[rank] = f"did not finish (limit {timeout} s, less after a failure)\n{stack}"
    if errors:
        raise RankFailedError(dict(errors)) from (causes[0] if causes else None)
    return results


class Alone:
    """The communicator of a single rank."""

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 1

    def allgather(self, obj: Any) -> list[Any]:
        return [obj]


def _rank_main(
    sender: Connection,
    rank: int,
    num_ranks: int,
    init_method: str,
    backend: str,
    worker: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Body of a rank's process: sends (True, result) or (False, traceback)."""
    torch.set_num_threads(1)
    os.environ.setdefault("EPJIT_TIMEOUT_SECONDS", "30")
    try:
        if backend == "nccl":
            take_gpu(rank, num_ranks)
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=num_ranks)
        try:
            result = worker(dist.group.WORLD, *args)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        message = _dumps((True, result))
    except BaseException:
        message = _dumps((False, traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()


def take_gpu(rank: int, num_ranks: int) -> torch.device:
    """Makes the GPU of a rank the current one; where there are fewer, as many ranks share each."""
    num_gpus = next(n for n in range(torch.cuda.device_count(), 0, -1) if num_ranks % n == 0)
    device = torch.device("cuda", rank % num_gpus)
    torch.cuda.set_device(device)
    return device


def script_environ() -> dict[str, str]:
    """Of a script that imports epjit and `deep_ep`, and whose ranks meet at a port of their own."""
    paths = [str(_ROOT), str(_ROOT / "compat"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MASTER_PORT": str(free_port()),
    }


def _dumps(message: object) -> bytes:
    """Like pickle, which fails on FP8 tensors in torch 2.13."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def _collect(
    pipes: dict[Connection, int], processes: list[BaseProcess], timeout: float
) -> list[Any]:
    """Wait for one message of each rank."""
    results: list[Any] = [None] * len(processes)
    errors: dict[int, str] = {}
    pending = dict(pipes)
    deadline = time.monotonic() + timeout
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending.pop(pipe)
            try:
                succeeded, value = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:
                processes[rank].join(timeout=_GRACE_SECONDS)
                succeeded, value = False, f"died with exit code {processes[rank].exitcode}\n"
            if succeeded:
                results[rank] = value
            else:
                errors[rank] = value
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    for rank in pending.values():
        errors[rank] = f"did not finish (limit {timeout} s, less after a failure)\n"
    if errors:
        for rank in pending.values():
            processes[rank].kill()
        raise RankFailedError(errors)
    return results
