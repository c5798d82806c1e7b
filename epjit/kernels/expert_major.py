"""Kernels that order received rows by expert: their configs, by shape and GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from epjit.config import MAX_LOCAL_EXPERTS, MAX_ROW_BYTES, MAX_TOPK
from epjit.kernels import variants
from epjit.kernels.shapes import copier_shape
from epjit.runtime.device import shared_limit
from epjit.runtime.jit import KernelConfig


@dataclass(frozen=True)
class PlaceConfig(KernelConfig):
    """What the place kernel is compiled for."""

    source: ClassVar[str] = "moe/place.cu"
    op: ClassVar[str] = "place"

    num_experts: int
    topk_is_int64: bool

    @property
    def threads(self) -> int:
        """Threads a block."""
        return 512

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: a counter an expert and one a warp."""
        return 4 * (self.num_experts + self.threads // 32)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"moe_e{self.num_experts}"


@dataclass(frozen=True)
class PermuteConfig(KernelConfig):
    """What the permute kernel is compiled for; the fields are explained in permute.cu."""

    source: ClassVar[str] = "moe/permute.cu"
    op: ClassVar[str] = "permute"

    row_bytes: int
    tma: bool
    num_warps: int
    rows_per_warp: int

    @classmethod
    def choose(cls, row_bytes: int, *, variant: str, limit: int) -> PermuteConfig:
        """The form of the block for `limit` bytes of shared memory."""
        tma = variant == "tma"
        return cls(row_bytes, tma, *copier_shape(tma, 16, row_bytes, limit))

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows on their way, one mbarrier a warp."""
        return self.num_warps * (self.rows_per_warp * self.row_bytes + 8) if self.tma else 0

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"moe_h{self.row_bytes}"


@dataclass(frozen=True)
class UnpermuteConfig(KernelConfig):
    """What the unpermute kernel is compiled for."""

    source: ClassVar[str] = "moe/unpermute.cu"
    op: ClassVar[str] = "unpermute"

    row_bytes: int
    num_topk: int
    is_f16: bool

    @property
    def threads(self) -> int:
        """Threads a block."""
        return 512

    @property
    def shared_bytes(self) -> int:
        """None."""
        return 0

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"moe_h{self.row_bytes}_k{self.num_topk}"


@dataclass(frozen=True)
class BlankConfig(KernelConfig):
    """What the blank kernel is compiled for."""

    source: ClassVar[str] = "moe/blank.cu"
    op: ClassVar[str] = "blank"

    num_warps: int = 16

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """None."""
        return 0

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return "moe"


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels of every variant that an architecture can run, over shapes that differ in kind.

    Args:
        arch: Such as ``"sm_90a"``.
    """
    limit = shared_limit(arch)
    for num_experts, wide in ((1, True), (32, True), (32, False), (MAX_LOCAL_EXPERTS, True)):
        yield PlaceConfig(num_experts, wide)
    yield BlankConfig()
    for row_bytes in (16, 7168, 14336, MAX_ROW_BYTES):
        for variant in variants.names("permute", arch):
            yield PermuteConfig.choose(row_bytes, variant=variant, limit=limit)
        for num_topk in (1, 8, MAX_TOPK):
            yield UnpermuteConfig(row_bytes, num_topk, is_f16=num_topk == 1)


def kernels_of(
    row_bytes: int, *, num_topk: int, num_experts: int, is_f16: bool, topk_is_int64: bool, arch: str
) -> list[KernelConfig]:
    """Every kernel that rows by expert of one shape need on an architecture.

    Args:
        row_bytes: Bytes of one row of bfloat16 or float16.
        num_topk: Choices a token.
        num_experts: `E` of one rank.
        is_f16: float16 rows, else bfloat16.
        topk_is_int64: Width of the choices.
        arch: Such as ``"sm_90a"``.
    """
    return [
        PlaceConfig(num_experts, topk_is_int64),
        permute_config(row_bytes, arch),
        UnpermuteConfig(row_bytes, num_topk, is_f16),
        BlankConfig(),
    ]


def permute_config(row_bytes: int, arch: str) -> PermuteConfig:
    """The kernel of a row size, of the variant that the environment asks for."""
    variant = variants.resolve("permute", arch)
    return PermuteConfig.choose(row_bytes, variant=variant, limit=shared_limit(arch))
