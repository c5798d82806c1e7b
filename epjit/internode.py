"""Dispatch and combine between NVLink domains: the order of launches, and which array goes where.

A rank has two symmetric memories. The ranks of its domain load and store in the first (`_Arena`:
`num_nvl_bytes` of slots, then words and signals); all ranks reach the second through the transport
(`_Rings`: `num_rdma_bytes` of inboxes and stages, then what rail peers tell each other). Users may
look at and write to the bytes that they asked for between operations. The kernels' headers
(`cuda_src/internode/*`) say who writes what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from epjit.config import MAX_DOMAINS, MAX_RANKS
from epjit.intranode import CombineShape, DispatchShape, copier_shape
from epjit.runtime.jit import KernelConfig

_SLOT_ALIGNMENT = 128
_FORWARD_WARPS = 2  # kForwardWarps of dispatch.cu
_TOKENS_PER_CHUNK = 4
MAX_LOCAL_EXPERTS = 1024
"""Of one rank, between domains: bounds the messages of notify to 2 MB."""


def _align(value: int, alignment: int = _SLOT_ALIGNMENT) -> int:
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class InternodeNotifyConfig(KernelConfig):
    """What the notify kernel is compiled for."""

    source: ClassVar[str] = "internode/notify.cu"
    op: ClassVar[str] = "notify"
    transport: ClassVar[bool] = True

    num_domains: int
    num_local: int

    @property
    def threads(self) -> int:
        """Threads a block."""
        return 512

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: a sum a warp, the rows of each source."""
        return 4 * (self.threads // 32 + self.num_domains * self.num_local)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"internode_{self.num_domains}x{self.num_local}"


@dataclass(frozen=True)
class InternodeDispatchConfig(KernelConfig):
    """What the dispatch kernel is compiled for; the fields are explained in dispatch.cu."""

    source: ClassVar[str] = "internode/dispatch.cu"
    op: ClassVar[str] = "dispatch"
    transport: ClassVar[bool] = True

    num_domains: int
    num_local: int
    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool
    tma: bool
    num_copy_warps: int
    rows_per_warp: int
    tokens_per_chunk: int

    @classmethod
    def choose(
        cls, shape: DispatchShape, *, num_domains: int, num_local: int, variant: str, limit: int
    ) -> InternodeDispatchConfig:
        """The form of the block for `limit` bytes of shared memory."""
        tma = variant != "ldst"
        warps, rows = copier_shape(tma, 13 if tma else 9, shape.hidden_bytes, limit)
        return cls(num_domains, num_local, *shape, tma, warps, rows, _TOKENS_PER_CHUNK)

    @property
    def send_warps(self) -> int:
        """Warps of a block that send tokens first; the others pull from the start."""
        return max(1, self.num_copy_warps * 3 // 4)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return (self.num_copy_warps + _FORWARD_WARPS + 1) * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows on their way, one mbarrier a warp that copies."""
        return self.num_copy_warps * (self.rows_per_warp * self.hidden_bytes + 8) if self.tma else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in a ring."""
        beside = self.num_scales + 2 * self.num_topk + self.num_local + 1
        return _align(self.hidden_bytes + 4 * beside)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return (
            f"internode_{self.num_domains}x{self.num_local}_h{self.hidden_bytes}"
            f"_s{self.num_scales}_k{self.num_topk}"
        )


@dataclass(frozen=True)
class InternodeCombineConfig(KernelConfig):
    """What the combine kernel is compiled for; the fields are explained in combine.cu."""

    source: ClassVar[str] = "internode/combine.cu"
    op: ClassVar[str] = "combine"
    transport: ClassVar[bool] = True

    num_domains: int
    num_local: int
    hidden_bytes: int
    num_topk: int
    is_f16: bool
    tma: bool
    num_warps: int
    num_push_warps: int
    num_sum_warps: int
    rows_per_warp: int
    tokens_per_chunk: int

    @classmethod
    def choose(
        cls, shape: CombineShape, *, num_domains: int, num_local: int, variant: str, limit: int
    ) -> InternodeCombineConfig:
        """The form of the block for `limit` bytes of shared memory."""
        tma = variant != "ldst"
        push, rows = copier_shape(tma, 6, shape.hidden_bytes, limit) if num_local > 1 else (1, 1)
        warps = 16 if tma else 12  # copies through registers need more of them
        sums = (warps - push) // 2
        return cls(num_domains, num_local, *shape, tma, warps, push, sums, rows, _TOKENS_PER_CHUNK)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows on their way, one mbarrier a pushing warp."""
        return self.num_push_warps * (self.rows_per_warp * self.hidden_bytes + 8) if self.tma else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one row in a slot or a ring."""
        return _align(self.hidden_bytes + 4 * self.num_topk)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return (
            f"internode_{self.num_domains}x{self.num_local}_h{self.hidden_bytes}_k{self.num_topk}"
        )
