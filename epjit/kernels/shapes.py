"""Shapes that tell kernels apart, and arithmetic that the configs share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias


class DispatchShape(NamedTuple):
    """Identifies a dispatch kernel within a Buffer; equal on all ranks."""

    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool

    @property
    def bytes_a_row(self) -> int:
        """Bytes that a received row takes in all outputs, with 8 of the handle."""
        return (
            self.hidden_bytes
            + 4 * self.num_scales
            + (8 + 4 * self.topk_is_int64) * self.num_topk
            + 8
        )


class CombineShape(NamedTuple):
    """Identifies a combine kernel within a Buffer; equal on all ranks.

    `choice_bits` is the width of the choices that order the ranks in DeepEP 2's way; 0 = none do.
    """

    hidden_bytes: int
    num_topk: int
    is_f16: bool
    choice_bits: int = 0


class ExpertDispatchShape(NamedTuple):
    """Identifies a kernel of dispatch by expert; equal on all ranks.

    Attributes:
        hidden_bytes: Of a row as it travels.
        num_scales: Words of scales a token.
        num_topk: Choices a token.
        topk_is_int64: Their width; True when cached.
        is_cached: Whether rows go along a handle.
        has_weights: Whether weights travel.
        format: Code of the format that rows are cast to; 0 = they stay as they are.
        is_f16: With a format: rows are float16 before, else bfloat16.
    """

    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool
    is_cached: bool
    has_weights: bool
    format: int = 0
    is_f16: bool = False


class ExpertCombineShape(NamedTuple):
    """Identifies a kernel of combine of rows by expert; equal on all ranks.

    Attributes:
        hidden_bytes: Of a row.
        num_topk: Choices a token.
        is_f16: float16 rows, else bfloat16.
        is_weighted: Whether rows are multiplied with weights.
        has_weights: Whether weights go back.
        choice_bits: As of `CombineShape`.
    """

    hidden_bytes: int
    num_topk: int
    is_f16: bool
    is_weighted: bool
    has_weights: bool
    choice_bits: int = 0


AnyShape: TypeAlias = DispatchShape | CombineShape | ExpertDispatchShape | ExpertCombineShape
"""Of the normal mode in one NVLink domain."""


def warmup_shapes(
    hidden_bytes: int, *, num_topk: int, num_scales: int, topk_is_int64: bool, is_f16: bool
) -> Iterator[DispatchShape | CombineShape]:
    """The kernels that calls of one kind need: with top-k and scales, and without (cached).

    Args:
        hidden_bytes: Bytes of one row of `x`.
        num_topk: Choices a token that travel with it; 0 = none.
        num_scales: Scales a token; 0 = none. Rows with scales are not combined.
        topk_is_int64: Width of the choices.
        is_f16: float16 rows to combine, else bfloat16.
    """
    for topk in sorted({0, num_topk}):
        for scales in sorted({0, num_scales}):
            yield DispatchShape(hidden_bytes, scales, topk, topk == 0 or topk_is_int64)
        if not num_scales:
            yield CombineShape(hidden_bytes, topk, is_f16)


def copier_shape(tma: bool, max_warps: int, row_bytes: int, limit: int) -> tuple[int, int]:
    """Warps that move rows, and rows that each has in shared memory.

    TMA: as many rows as shared memory holds, spread over the warps, at most eight a warp.
    """
    if not tma:
        return max_warps, 1
    rows = (limit - 8 * max_warps) // row_bytes
    warps = min(max_warps, rows)
    return warps, min(max(rows // warps, 1), 8)


def copier_bytes(tma: bool, num_warps: int, rows_per_warp: int, row_bytes: int) -> int:
    """Shared memory of warps that move rows: by TMA the rows on their way, one mbarrier a warp."""
    return num_warps * (rows_per_warp * row_bytes + 8) if tma else 0


def slices_shape(max_warps: int, rows: int, limit: int) -> tuple[int, int, int]:
    """Warps that add up rows, slices of rows that each has in shared memory, bytes of a slice.

    Each has room for one slice of all rows of a sum, at least. Short slices cost more instructions.

    Args:
        max_warps: Of a block.
        rows: Of a sum, at most.
        limit: Bytes of shared memory.
    """
    slice_bytes = 1024 if limit // (rows * 1024 + 64) >= max_warps // 2 else 512
    warps = min(max_warps, limit // (rows * slice_bytes + 64))
    return warps, (limit // warps - 64) // slice_bytes, slice_bytes


def slices_bytes(tma: bool, num_warps: int, slices: int, slice_bytes: int) -> int:
    """Shared memory of warps that add up rows: by TMA their slices, an mbarrier a stage."""
    return num_warps * (slices * slice_bytes + 8 * min(slices, 8)) if tma else 0
