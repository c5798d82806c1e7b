"""Received rows in the order of the experts: kernels on the GPU, the reference on the CPU.

`place` numbers the selections, `permute` copies rows, `unpermute` sums them; the two are each
other's gradient. `blank` zeroes the rows that did not arrive or no expert has. The host waits for
nothing. `epjit.moe` has them with autograd. Each `queue_` is the kernel alone, on a stream, checked
by its caller: between NVLink domains they are the second pass of a dispatch, and the first of a
combine.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import torch
from torch import Tensor

from epjit.calls import Sums
from epjit.checks.match import INDEX_DTYPES, check, check_rows, check_topk
from epjit.config import MAX_LOCAL_EXPERTS
from epjit.formats import SUM_DTYPES
from epjit.handles import Placement
from epjit.kernels.expert_major import (
    BlankConfig,
    PlaceConfig,
    UnpermuteConfig,
    WeighConfig,
    permute_config,
)
from epjit.modes.normal import pointer, row_bytes, word_strides
from epjit.reference import expert_major as reference
from epjit.runtime.device import arch_of, num_sms
from epjit.runtime.empty import empty_on
from epjit.runtime.kernel import C, Kernel
from epjit.runtime.launch import Launch

_INT32_MAX = (1 << 31) - 1
RowParts: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""Rows, and the scales and weights beside them."""
Weights: TypeAlias = tuple[Tensor | None, Tensor | None]


def place(topk_idx: Tensor, num_experts: int, *, alignment: int, num_rows: int) -> Placement:
    """Numbers the selections by expert, then by token, then by `k`; the host does not wait.

    Args:
        topk_idx: int32 or int64 `[n, K]`, local experts; outside `[0, num_experts)` is nothing.
        num_experts: `E` of this rank.
        alignment: Each expert's rows are padded to a multiple of it.
        num_rows: `M`; selections that do not fit are dropped.

    Returns:
        See `Placement`.

    Raises:
        TypeError, ValueError: Arguments that do not fit; nothing was launched.
    """
    check("topk_idx", topk_idx, ("num_tokens", "num_topk"), INDEX_DTYPES)
    num_tokens, num_topk = topk_idx.shape
    if not 1 <= num_experts <= MAX_LOCAL_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}, but must be 1 to {MAX_LOCAL_EXPERTS}")
    check_topk(topk_idx)
    if alignment < 1 or num_rows < 0:
        raise ValueError(
            f"alignment is {alignment} (at least 1) and num_rows {num_rows} (not negative)"
        )
    most = max(num_rows, topk_idx.numel() + num_experts * alignment)
    if most > _INT32_MAX:
        raise ValueError(
            f"{num_tokens} tokens of top-{num_topk} for {num_experts} experts, each padded to "
            f"{alignment}, may need {most} rows; the kernels count to {_INT32_MAX}"
        )
    if topk_idx.device.type != "cuda":
        return reference.place(topk_idx, num_experts, alignment=alignment, num_rows=num_rows)
    device = topk_idx.device
    specs = Placement.specs(
        num_tokens=num_tokens, num_topk=num_topk, num_rows=num_rows, num_experts=num_experts
    )
    placed = Placement(*empty_on(device)(specs))
    queue_place(_stream(device), topk_idx, placed, alignment=alignment)
    return placed


def queue_place(
    stream: int, topk_idx: Tensor, placed: Placement, *, alignment: int, known: bool = False
) -> None:
    """Fills a placement. `known`: but for its counts, which may include tokens without room."""
    num_experts = placed.counts.shape[0]
    _launch(PlaceConfig(topk_idx.dtype == torch.int64), topk_idx.device.index)(
        stream,
        num_experts,
        topk_idx=topk_idx.data_ptr(),
        known=placed.counts.data_ptr() if known else 0,
        row_of=placed.row_of.data_ptr(),
        source=placed.source.data_ptr(),
        end=placed.ends.data_ptr(),
        count=placed.counts.data_ptr(),
        num_selections=topk_idx.numel(),
        num_experts=num_experts,
        num_rows=placed.source.shape[0],
        alignment=alignment,
    )


def permute(x: Tensor, row_of: Tensor, source: Tensor, ends: Tensor) -> Tensor:
    """Copies each row's token; padding between experts becomes zeros.

    Args:
        x: `[n, H]` of any dtype, rows a multiple of 16 bytes.
        row_of: int32 `[n, K]`, from `place`, as are the two that follow.
        source: int32 `[M]`.
        ends: int32 `[E]`.

    Returns:
        `[M, H]` of x's dtype; undefined behind the last expert's rows.

    Raises:
        TypeError, ValueError: Arguments that do not fit; nothing was launched.
    """
    check("x", x, ("num_tokens", "hidden"))
    check("row_of", row_of, (x.shape[0], "num_topk"), torch.int32, x.device)
    check("source", source, ("num_rows",), torch.int32, x.device)
    check("ends", ends, ("num_experts",), torch.int32, x.device)
    if x.device.type != "cuda":
        return reference.permute(x, source, row_of.shape[1])
    check_rows("x", x)
    rows = torch.empty((source.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    placed = Placement(row_of, source, ends, ends)
    queue_permute(_stream(x.device), (x, None, None), placed, (rows, None, None))
    return rows


def queue_permute(
    stream: int,
    given: RowParts,
    placed: Placement,
    outputs: RowParts,
    *,
    zero_padding: bool = True,
) -> None:
    """Copies each token to the rows of its choices, with what is beside it.

    Args:
        stream: Handle of the stream.
        given: Rows `[n, H]`; scales `[n, S]` of 4 bytes; weights float32 `[n, K]`. Beside rows, of
            any row stride.
        placed: Its `row_of` may have any row stride; `counts` are not read.
        outputs: `[M, H]`; `[M, S]` of any strides, or as many bytes row by row; float32 `[M]`, 0
            where no choice is. What is None here is not copied.
        zero_padding: Whether rows and scales of the padding become zeros.
    """
    (x, scales, weights), (rows, row_scales, row_weights) = given, outputs
    device, (num_tokens, num_topk) = x.device.index, placed.row_of.shape
    if scales is None or row_scales is None:
        scales = row_scales = None
    scale_row_stride, scale_stride = word_strides(row_scales)
    _launch(permute_config(row_bytes(x), num_topk, arch_of(device)), device)(
        stream,
        num_sms(device),
        x=x.data_ptr(),
        scales=pointer(scales),
        weights=pointer(weights),
        row_of=placed.row_of.data_ptr(),
        source=placed.source.data_ptr(),
        end=placed.ends[-1:].data_ptr(),
        rows=rows.data_ptr(),
        row_scales=pointer(row_scales),
        row_weights=pointer(row_weights),
        scale_token_stride=0 if scales is None else scales.stride(0),
        weight_stride=0 if weights is None else weights.stride(0),
        row_of_stride=placed.row_of.stride(0),
        scale_row_stride=scale_row_stride,
        scale_stride=scale_stride,
        num_tokens=num_tokens,
        num_rows=rows.shape[0],
        num_scales=0 if scales is None else scales.shape[1],
        zero_padding=zero_padding,
    )


def unpermute(rows: Tensor, row_of: Tensor) -> Tensor:
    """Sums the rows of each token in fp32, in the order of `k`, and rounds once.

    Args:
        rows: bfloat16 or float16 `[M, H]` (on the CPU any floating-point dtype).
        row_of: int32 `[n, K]`, from `place`.

    Returns:
        `[n, H]` of the rows' dtype.

    Raises:
        TypeError, ValueError: Arguments that do not fit; nothing was launched.
    """
    on_gpu = rows.device.type == "cuda"
    dtypes = SUM_DTYPES if on_gpu else (*SUM_DTYPES, torch.float32, torch.float64)
    check("rows", rows, ("num_rows", "hidden"), dtypes)
    check("row_of", row_of, ("num_tokens", "num_topk"), torch.int32, rows.device)
    if not on_gpu:
        return reference.unpermute(rows, row_of)
    check_rows("rows", rows)
    out = torch.empty((row_of.shape[0], rows.shape[1]), dtype=rows.dtype, device=rows.device)
    queue_unpermute(_stream(rows.device), rows, row_of, (out, None))
    return out


def queue_unpermute(
    stream: int, rows: Tensor, row_of: Tensor, sums: Sums, *, given: Weights = (None, None)
) -> None:
    """Sums the rows of each token, and brings weights back.

    Args:
        stream: Handle of the stream.
        rows: `[M, H]`.
        row_of: int32 `[n, K]`, of any row stride; no row where it is outside `[0, M)`.
        sums: `[n, H]`, and float32 `[n, K]` or None for what comes back; written to.
        given: float32 `[M]` or None: what the rows are multiplied with, and what comes back, 0
            where there is no row.
    """
    row_weights, topk_weights = given
    device, (num_tokens, num_topk) = rows.device.index, row_of.shape
    is_f16, is_weighted = rows.dtype == torch.float16, row_weights is not None
    _launch(UnpermuteConfig(row_bytes(rows), num_topk, is_f16, is_weighted), device)(
        stream,
        4 * num_sms(device),
        rows=rows.data_ptr(),
        row_weights=pointer(row_weights),
        topk_weights=pointer(topk_weights),
        row_of=row_of.data_ptr(),
        row_of_stride=row_of.stride(0),
        out=sums[0].data_ptr(),
        weights=pointer(sums[1]),
        num_tokens=num_tokens,
        num_rows=rows.shape[0],
    )


def weigh(grad: Tensor, rows: Tensor, row_weights: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows that a combine multiplied with weights, by that of their sums.

    Args:
        grad: bfloat16 or float16 `[M, H]`, by a cached dispatch by expert, zeros where no choice
            is; on the GPU it is written to.
        rows: Likewise, as they were combined.
        row_weights: float32 `[M]`.
        source: int32 `[M]`, of the handle.

    Returns:
        Of the rows `[M, H]`; of the weights float32 `[M]`, 0 where `source` is -1.

    Raises:
        TypeError, ValueError: Arguments that do not fit; nothing was launched.
    """
    check("grad", grad, ("num_rows", "hidden"), SUM_DTYPES)
    num_rows = grad.shape[0]
    check("rows", rows, tuple(grad.shape), grad.dtype, grad.device)
    check("row_weights", row_weights, (num_rows,), torch.float32, grad.device)
    check("source", source, (num_rows,), torch.int32, grad.device)
    if grad.device.type != "cuda":
        return reference.weigh_backward(grad, rows, row_weights, source)
    check_rows("rows", rows)
    config = WeighConfig(check_rows("grad", grad), grad.dtype == torch.float16)
    grad_weights = torch.empty(num_rows, dtype=torch.float32, device=grad.device)
    if num_rows:
        _launch(config, grad.device.index)(
            _stream(grad.device),
            2 * num_sms(grad.device.index),
            grad=grad.data_ptr(),
            rows=rows.data_ptr(),
            row_weights=row_weights.data_ptr(),
            source=source.data_ptr(),
            grad_weights=grad_weights.data_ptr(),
            num_rows=num_rows,
        )
    return grad, grad_weights


def blank(rows: Tensor, count: Tensor) -> None:
    """Writes zeros to the rows that nothing arrived for or no expert has, in place.

    Args:
        rows: `[n, H]` of any dtype, rows a multiple of 16 bytes of any length.
        count: int32 `[1]`: how many arrived, the first ones.

    Raises:
        TypeError, ValueError: Arguments that do not fit; nothing was launched.
    """
    check("rows", rows, ("num_rows", "hidden"))
    check("count", count, (1,), torch.int32, rows.device)
    if rows.device.type != "cuda":
        rows[max(int(count), 0) :] = 0
    elif rows.shape[0]:
        num_bytes = check_rows("rows", rows, most=None)
        _launch(BlankConfig(), rows.device.index)(
            _stream(rows.device),
            num_sms(rows.device.index),
            rows=rows.data_ptr(),
            count=count.data_ptr(),
            num_rows=rows.shape[0],
            row_bytes=num_bytes,
        )


@functools.cache
def _launch(config: C, device: int) -> Launch[C]:
    """Compiled and loaded at the first call of a shape; no peer waits for these kernels."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{config.op} needs a kernel for {config} that is not compiled yet, and nothing can be "
            "compiled while a CUDA graph is captured; run the call once before the capture"
        )
    return Launch(Kernel(config, device=device))


def _stream(device: torch.device) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device.index))
