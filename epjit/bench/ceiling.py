"""Ceilings: plain copies to all peers at once, and rows that are loaded once and stored often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from epjit.arch import arch_number
from epjit.runtime import device as gpu
from epjit.runtime.kernel import Kernel, KernelConfig
from epjit.runtime.launch import Launch

_STAGES = 2
_MBARRIER_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class CopyConfig(KernelConfig, source="bench/copy.cu"):
    """Compile-time values of `bench/copy.cu`.

    Attributes:
        num_ranks: GPUs that copy to each other.
        num_warps: warps of a block; each has two rows of shared memory.
        row_bytes: bytes of one bulk copy, a multiple of 128.
        pull: read from the peers instead of writing to them.
    """

    num_ranks: int
    num_warps: int
    row_bytes: int
    pull: bool

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.num_warps * _STAGES * (self.row_bytes + _MBARRIER_BYTES)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"bench_r{self.num_ranks}_{'pull' if self.pull else 'push'}"


def copy_config(arch: str, *, num_ranks: int, pull: bool) -> CopyConfig:
    """The shape that came out best on H200 (15 warps of two 7168-byte rows), or what fits.

    Args:
        arch: `sm_90` or newer.
        num_ranks: GPUs that copy to each other, 2 to 8.
        pull: read instead of write.

    Returns:
        The config of the copy kernel.
    """
    row_bytes = 7168
    fitting = gpu.shared_limit(arch) // (_STAGES * (row_bytes + _MBARRIER_BYTES))
    return CopyConfig(
        num_ranks=num_ranks, num_warps=min(15, fitting), row_bytes=row_bytes, pull=pull
    )


@dataclass(frozen=True, kw_only=True)
class FanConfig(KernelConfig, source="bench/fan.cu", tag="bench_k{0.num_stores}"):
    """Compile-time values of `bench/fan.cu`.

    Attributes:
        num_warps: warps of a block; each has two rows of shared memory.
        row_bytes: bytes of a row, a multiple of 128.
        num_stores: of each row.
        bulk: stores are bulk copies, else 16 bytes a lane.
    """

    num_warps: int
    row_bytes: int
    num_stores: int
    bulk: bool

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.num_warps * _STAGES * (self.row_bytes + _MBARRIER_BYTES)


def fan_config(arch: str, *, num_stores: int, bulk: bool, row_bytes: int = 14336) -> FanConfig:
    """As many warps as shared memory has rows for.

    Args:
        arch: `sm_90` or newer.
        num_stores: of each row.
        bulk: stores are bulk copies.
        row_bytes: bytes of a row.
    """
    fitting = gpu.shared_limit(arch) // (_STAGES * (row_bytes + _MBARRIER_BYTES))
    return FanConfig(
        num_warps=min(16, fitting), row_bytes=row_bytes, num_stores=num_stores, bulk=bulk
    )


def example_configs(arch: str) -> list[CopyConfig | FanConfig]:
    """Kernels for the compile test; none where there are no bulk copies (before sm_90)."""
    if arch_number(arch) < 90:
        return []
    return [
        *[copy_config(arch, num_ranks=4, pull=pull) for pull in (False, True)],
        *[fan_config(arch, num_stores=4, bulk=bulk) for bulk in (False, True)],
    ]


class LinkCopy:
    """Rows of every rank travel to all its peers at once.

    Args:
        group: the ranks, one GPU each.
        device: this rank's GPU.
        bytes_per_peer: what each rank sends to each peer.
        pull: read instead of write.
        memory: symmetric memory of at least `bytes_needed()`.
    """

    def __init__(
        self, group: Any, *, device: int, bytes_per_peer: int, pull: bool, memory: Any
    ) -> None:
        config = copy_config(gpu.arch_of(device), num_ranks=group.size, pull=pull)
        self.group = group
        self.memory = memory
        self.row_bytes = config.row_bytes
        self.num_rows = bytes_per_peer // config.row_bytes
        self.sent_bytes = self.num_rows * config.row_bytes * (group.size - 1)
        self._launch = Launch(
            Kernel(config, device=device),
            memory=[*memory.peer_ptrs, *[0] * (8 - group.size)],
            num_rows=self.num_rows,
            rank=group.rank,
        )

    def __call__(self, stream: int, num_sms: int) -> None:
        """Copies once, on the stream, with one block an SM."""
        self._launch(stream, num_sms)

    def check(self, run: Callable[[], None], barrier: Callable[[], None]) -> None:
        """Runs once on rows that name their sender, and compares every byte that arrived.

        Args:
            run: copies once.
            barrier: returns when all ranks have finished what they launched before it.

        Raises:
            RuntimeError: A row is not what its sender sent.
        """
        import torch

        size, rank = self.group.size, self.group.rank
        words = self.memory.tensor(torch.int32)[: 2 * size * self.num_rows * self.row_bytes // 4]
        sent, taken = words.view(2, size, self.num_rows, self.row_bytes // 4)
        index = torch.arange(sent[0].numel(), dtype=torch.int32, device=words.device).view(
            sent[0].shape
        )
        for peer in range(size):
            sent[peer] = index * 64 + rank * 8 + peer
        taken.fill_(-1)
        barrier()
        run()
        barrier()
        for peer in range(size):
            if peer != rank and not torch.equal(taken[peer], index * 64 + peer * 8 + rank):
                raise RuntimeError(f"rank {rank} did not get what rank {peer} sent")


def bytes_needed(bytes_per_peer: int, num_ranks: int) -> int:
    """Symmetric memory that `LinkCopy` needs."""
    return 2 * num_ranks * bytes_per_peer
