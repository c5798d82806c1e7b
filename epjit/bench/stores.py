"""The ceiling of rows by expert: one load and several stores a row, by SMs, with all GPUs at once.

Rows come from the own GPU, half or all of them from the next rank; they are stored by bulk copies
or by 16-byte stores. The numbers depend on the GPU and its links alone, not on a routing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from epjit.bench import ceiling
from epjit.bench.normal import Settings, require, start
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


class Fan:
    """Rows of every rank that it and the rank before load once and store several times.

    Args:
        group: The ranks, a GPU each.
        row_bytes: Of a row, a multiple of 128.
    """

    def __init__(self, group: dist.ProcessGroup, row_bytes: int) -> None:
        self._group, self._row_bytes = group, row_bytes
        self._device = torch.cuda.current_device()
        self.num_sms = gpu.num_sms(self._device)
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._memory = SymmetricMemory(
            NUM_ROWS * row_bytes, group=Group.from_torch(group), device=self._device
        )
        words = NUM_ROWS * row_bytes // 4
        ints: Any = {"dtype": torch.int32, "device": self._device}
        self._sent = self._memory.tensor(torch.int32)[:words]
        self._sent.copy_(torch.arange(words, **ints) * 8 + self._rank)
        self._taken = torch.empty(max(STORES) * words, **ints)
        self._launches: dict[tuple[int, bool], Launch[ceiling.FanConfig]] = {}
        torch.cuda.synchronize()
        dist.barrier(group)

    def us(self, num_stores: int, peer_halves: int, sms: int, *, bulk: bool = True) -> float:
        """Microseconds of the slowest rank; what was stored is compared first.

        Args:
            num_stores: Of each row.
            peer_halves: 0, 1, 2: none, half or all of the rows are the next rank's.
            sms: Blocks.
            bulk: Stores are bulk copies, else 16 bytes a lane.

        Raises:
            RuntimeError: A row is wrong.
        """
        launch = self._launch(num_stores, bulk)

        def copy() -> None:
            launch(torch.cuda.current_stream().cuda_stream, sms, peer_halves=peer_halves)

        self._taken.fill_(-1)
        copy()
        torch.cuda.synchronize()
        stored = self._taken[: num_stores * self._sent.numel()].view(num_stores, -1)
        source = stored % 8
        is_known = (source == self._rank) | (source == (self._rank + 1) % self._size)
        is_row = stored - source == self._sent - self._rank
        require("a row that was stored several times", bool((is_row & is_known).all()))
        return timed(copy, self._group)[0]

    def stored_bytes(self, num_stores: int) -> int:
        """Bytes that a rank stores."""
        return num_stores * NUM_ROWS * self._row_bytes

    def _launch(self, num_stores: int, bulk: bool) -> Launch[ceiling.FanConfig]:
        launch = self._launches.get((num_stores, bulk))
        if launch is None:
            arch = gpu.arch_of(self._device)
            config = ceiling.fan_config(
                arch, num_stores=num_stores, bulk=bulk, row_bytes=self._row_bytes
            )
            launch = Launch(
                Kernel(config, device=self._device),
                own=self._memory.ptr,
                peer=self._memory.peer_ptrs[(self._rank + 1) % self._size],
                taken=self._taken.data_ptr(),
                num_rows=NUM_ROWS,
            )
            self._launches[num_stores, bulk] = launch
        return launch

    def close(self) -> None:
        """Gives the memory back; collective."""
        torch.cuda.synchronize()
        dist.barrier(self._group)
        self._memory.close()


def worker(rank: int, settings: Settings, port: int, queue: Any) -> None:
    """One rank: measures, and rank 0 reports."""
    group, say = start(rank, settings, port, queue)
    fan = Fan(group, 2 * settings.hidden)
    all_sms = sorted({min(each, fan.num_sms) for each in SMS})
    for num_stores in STORES:
        for bulk in (True, False):
            for peer_halves in range(3 if settings.ranks > 1 else 1):
                for sms in all_sms:
                    us = fan.us(num_stores, peer_halves, sms, bulk=bulk)
                    rate = fan.stored_bytes(num_stores) / us / 1e3
                    say(
                        op=f"ceiling 1 load, {num_stores} stores, {_FROM[peer_halves]}",
                        dtype="bulk" if bulk else "16 bytes a lane",
                        sms=sms,
                        us=us,
                        stored_GBps=round(rate, 1),
                        stored_GBps_an_sm=round(rate / sms, 1),
                    )
    fan.close()
    dist.destroy_process_group()
