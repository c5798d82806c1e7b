"""Kernels of DeepEP 2's interface: what its handles hold, and sums with one rounding; configs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from epjit.config import MAX_ROW_BYTES, MAX_TOPK
from epjit.runtime.kernel import KernelConfig


@dataclass(frozen=True)
class DescribeConfig(KernelConfig, source="elastic/describe.cu", tag="elastic_k{0.num_topk}"):
    """Config of the describe kernel."""

    threads: ClassVar[int] = 256
    shared_bytes: ClassVar[int] = 0

    num_topk: int
    topk_is_int64: bool


@dataclass(frozen=True)
class SumConfig(KernelConfig, source="elastic/sum.cu", tag="elastic_h{0.row_bytes}_k{0.num_topk}"):
    """Config of the sum kernel."""

    threads: ClassVar[int] = 512
    shared_bytes: ClassVar[int] = 0

    row_bytes: int
    num_topk: int
    is_f16: bool


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels over shapes that differ in kind, on any architecture."""
    del arch
    for num_topk, wide in ((1, True), (8, True), (8, False), (MAX_TOPK, True)):
        yield DescribeConfig(num_topk, wide)
    for row_bytes, num_topk in ((16, 1), (7168, 8), (14336, 8), (MAX_ROW_BYTES, MAX_TOPK)):
        yield SumConfig(row_bytes, num_topk, is_f16=row_bytes == 7168)
