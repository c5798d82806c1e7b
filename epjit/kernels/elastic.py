"""Kernels of DeepEP 2's interface: what its handles hold, and sums with one rounding; configs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from epjit.config import MAX_ROW_BYTES, MAX_TOPK
from epjit.kernels.shapes import AnyShape, CombineShape, DispatchShape, ExpertCombineShape
from epjit.runtime.kernel import KernelConfig

CARRIER_BYTES = 16
"""The least that a row has, of a dispatch that is made for its handle alone."""


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


def warmup_shapes(
    row_bytes: int, *, num_topk: int, topk_is_int64: bool, is_f16: bool
) -> Iterator[AnyShape]:
    """The calls of a normal mode that only an ElasticBuffer makes, beside those of a Buffer.

    Args:
        row_bytes: Bytes of one row to combine.
        num_topk: Choices a token, at least 1.
        topk_is_int64: Their width.
        is_f16: float16 rows, else bfloat16.
    """
    bits = 64 if topk_is_int64 else 32
    yield DispatchShape(CARRIER_BYTES, 0, 0, True)
    for has_weights in (False, True):
        yield CombineShape(row_bytes, num_topk * has_weights, is_f16, bits)
        yield ExpertCombineShape(row_bytes, num_topk, is_f16, False, has_weights, bits)
        yield ExpertCombineShape(row_bytes, 1, is_f16, False, has_weights)  # each row for itself


def kernels_of(
    row_bytes: int, *, num_topk: int, topk_is_int64: bool, is_f16: bool
) -> list[KernelConfig]:
    """Every kernel of an ElasticBuffer's own that calls of one shape need; see `warmup_shapes`."""
    return [DescribeConfig(num_topk, topk_is_int64), SumConfig(row_bytes, num_topk, is_f16)]
