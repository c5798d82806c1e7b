"""The ceiling of rows by expert: one load and several stores a row, by SMs, with all GPUs at once.

Rows come from the own GPU, half or all of them from the next rank; they are stored by bulk copies
or by 16-byte stores. The numbers depend on the GPU and its links alone, not on a routing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from epjit.bench import ceiling
from epjit.bench.normal import Say, Settings, require, start
from epjit.bench.timing import Row, free_port, run_ranks, timed
from epjit.runtime import device as gpu
from epjit.runtime.group import Group
from epjit.runtime.kernel import Kernel
from epjit.runtime.launch import Launch
from epjit.runtime.symmetric import SymmetricMemory

SMS = (8, 12, 16, 20, 24, 32, 48, 64, 132)
STORES = (1, 2, 4)
NUM_ROWS = 8192  # that come to a rank of two, with 4096 tokens
_FROM = ("own", "half", "peer")


def run(settings: Settings, *, on_row: Callable[[Row], None]) -> list[Row]:
    """Times every number of stores and of SMs.

    Args:
        settings: Of the run; rows are of bfloat16, `hidden` wide.
        on_row: Called with each row when it is measured.

    Returns:
        Rows; the first (`op` "run") says where they were measured.

    Raises:
        ValueError: There is no GPU with bulk copies.
        RuntimeError: A copy is wrong, or a rank failed.
    """
    if settings.device == "cpu":
        raise ValueError("--stores measures GPUs, and this is the CPU backend")
    return run_ranks(worker, settings.ranks, settings, free_port(), on_row=on_row)


def worker(rank: int, settings: Settings, port: int, queue: Any) -> None:
    """One rank: measures, and rank 0 reports."""
    group, say = start(rank, settings, port, queue)
    row_bytes, device = 2 * settings.hidden, torch.cuda.current_device()
    links = Group.from_torch(group)
    memory = SymmetricMemory(NUM_ROWS * row_bytes, group=links, device=device)
    sent = memory.tensor(torch.int32)[: NUM_ROWS * row_bytes // 4]
    sent.copy_(torch.arange(sent.numel(), dtype=torch.int32, device=device) * 8 + rank)
    taken = torch.empty(max(STORES) * sent.numel(), dtype=torch.int32, device=device)
    torch.cuda.synchronize()
    dist.barrier(group)
    next_rank = (rank + 1) % settings.ranks
    halves = range(3 if settings.ranks > 1 else 1)
    for num_stores in STORES:
        for bulk in (True, False):
            config = ceiling.fan_config(
                gpu.arch_of(device), num_stores=num_stores, bulk=bulk, row_bytes=row_bytes
            )
            launch = Launch(
                Kernel(config, device=device),
                own=memory.ptr,
                peer=memory.peer_ptrs[next_rank],
                taken=taken.data_ptr(),
                num_rows=NUM_ROWS,
            )
            for peer_halves in halves:
                _measure(launch, peer_halves, group, say, sent=sent, taken=taken)
    torch.cuda.synchronize()
    dist.barrier(group)
    memory.close()
    dist.destroy_process_group()


def _measure(
    launch: Launch[ceiling.FanConfig],
    peer_halves: int,
    group: dist.ProcessGroup,
    say: Say,
    *,
    sent: torch.Tensor,
    taken: torch.Tensor,
) -> None:
    """One kernel and one place that rows come from, for all numbers of SMs."""
    config = launch.kernel.config
    most = gpu.num_sms(sent.device.index)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for sms in sorted({min(each, most) for each in SMS}):

        def copy(sms: int = sms) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            launch(stream, sms, peer_halves=peer_halves)

        taken.fill_(-1)
        copy()
        torch.cuda.synchronize()
        first = taken[: config.num_stores * sent.numel()].view(config.num_stores, -1)
        source = first[0] % 8
        is_known = (source == rank) | (source == (rank + 1) % size)
        rest = (first - source) == (sent - rank)
        require("a row that was stored several times", bool((rest & is_known).all()))
        us, _ = timed(functools.partial(copy), group)
        stored = config.num_stores * NUM_ROWS * config.row_bytes
        way = "bulk" if config.bulk else "16 bytes a lane"
        say(
            op=f"ceiling 1 load, {config.num_stores} stores, {_FROM[peer_halves]}",
            dtype=way,
            sms=sms,
            us=us,
            stored_GBps=round(stored / us / 1e3, 1),
            stored_GBps_an_sm=round(stored / us / 1e3 / sms, 1),
        )
