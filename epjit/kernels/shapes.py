"""Shapes that tell kernels apart, and arithmetic that the configs share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from epjit.formats import RowFormat


class DispatchShape(NamedTuple):
    """Identifies a dispatch kernel within a Buffer; equal on all ranks.

    Attributes:
        hidden_bytes: Of a row as it travels.
        num_scales: Words of scales a token.
        num_topk: Choices a token.
        topk_is_int64: Their width.
        format: Code of the format that rows are cast to; 0 = they stay as they are.
        is_f16: With a format: rows are float16 before, else bfloat16.
    """

    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool
    format: int = 0
    is_f16: bool = False

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
        format: As of `DispatchShape`, as is `is_f16`.
        is_f16: See there.
    """

    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool
    is_cached: bool
    has_weights: bool
    format: int = 0
    is_f16: bool = False

    @property
    def by_source(self) -> DispatchShape:
        """The dispatch before a second pass. Weights of a cached one travel as scales do."""
        if self.is_cached:
            num_words = self.num_scales + self.has_weights * self.num_topk
            return DispatchShape(self.hidden_bytes, num_words, 0, True)
        return DispatchShape(*self[:4])


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

    @property
    def by_source(self) -> CombineShape:
        """The combine behind a first pass, in the order of addends between NVLink domains."""
        num_topk = self.num_topk if self.has_weights else 0
        return CombineShape(self.hidden_bytes, num_topk, self.is_f16)


AnyShape: TypeAlias = DispatchShape | CombineShape | ExpertDispatchShape | ExpertCombineShape
"""Of the normal mode."""


def warmup_shapes(
    hidden_bytes: int,
    *,
    num_topk: int,
    num_scales: int,
    topk_is_int64: bool,
    is_f16: bool,
    row_format: RowFormat | None = None,
    expert_major: bool = False,
) -> Iterator[AnyShape]:
    """The kernels that calls of one kind need: with top-k and scales, and without (cached).

    Args:
        hidden_bytes: Bytes of one row of `x`.
        num_topk: Choices a token that travel with it; 0 = none.
        num_scales: Scales a token; 0 = none. Rows with scales are not combined.
        topk_is_int64: Width of the choices.
        is_f16: float16 rows to combine, and to cast, else bfloat16.
        row_format: That rows are cast to, besides those that stay as they are; None: none are.
        expert_major: Also calls on rows by expert.
    """
    payloads = [(hidden_bytes, scales, 0, False) for scales in sorted({0, num_scales})]
    if row_format is not None:
        hidden = hidden_bytes // 2
        of_rows = row_format.row_bytes(hidden), row_format.num_scale_bytes(hidden) // 4
        payloads.append((*of_rows, row_format.code, is_f16))
    for topk in sorted({0, num_topk}):
        for row_bytes, scales, code, casts_f16 in payloads:
            yield DispatchShape(
                *(row_bytes, scales, topk, topk == 0 or topk_is_int64), code, casts_f16
            )
        if not num_scales:
            yield CombineShape(hidden_bytes, topk, is_f16)
    for first, second in itertools.product((False, True), repeat=2) if expert_major else ():
        # Cached or not, with weights or without.
        wide = first or topk_is_int64
        for row_bytes, scales, code, casts_f16 in payloads:
            yield ExpertDispatchShape(
                *(row_bytes, scales, num_topk, wide, first, second), code, casts_f16
            )
        if not num_scales:  # multiplied with weights or not, and with weights that go back
            yield ExpertCombineShape(hidden_bytes, num_topk, is_f16, first, second)


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
