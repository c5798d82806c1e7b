"""Dispatch and combine with gradients, for eager torch, `torch.compile` and `torch.export`.

`dispatch` sends tokens to the ranks of their experts, `combine` brings the results back and sums
them; each is the other's gradient. They are `torch.library` operators with fake kernels: sizes are
static with `num_worst_tokens`, and symbols that only the run knows without it. What a dispatch
leaves for its combine is tensors, so autograd, activation checkpointing and graphs carry it like
any other value. `expert_major=True` orders the rows by expert, padded, with the counts on the
device, as grouped matrix products take them.

A group travels by its name: `group` is a torch process group, its name, or the name that
`register_buffer` gave. The `Buffer` behind it is made at the first call, grows with the rows, and
is freed at exit or by `free_buffers`.

Rows are bfloat16 or float16. Under `torch.autocast` rows of either, or of float32, are cast to its
dtype first, as `torch.nn.Linear` does; `topk_weights` stay float32. A tensor that is not
contiguous, or does not start at a multiple of 16 bytes, is copied, gradients too.

Words in the shapes: `T` tokens of this rank, `H` elements a row, `K` choices a token, `E` experts
over all ranks, `L` experts of this rank, `R` ranks, `n` received tokens, `M` rows by expert.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from epjit.checks.match import check_dry_rows, check_no_transform, is_dry
from epjit.formats import CASTS, SUM_DTYPES
from epjit.handles import (
    ExpertHandle,
    GivenHandle,
    Handle,
    Placement,
    handle_type,
    row_bound,
)
from epjit.moe.buffers import (
    GroupLike,
    count_domains,
    free_buffers,
    get_buffer,
    name_of,
    register_buffer,
    unregister_buffer,
    worst_tokens,
)
from epjit.moe.operators import padded
from epjit.numbers import as_int

__all__ = [
    "Dispatched",
    "ExpertHandle",
    "ExpertRows",
    "combine",
    "dequantize",
    "dispatch",
    "free_buffers",
    "fused_combine",
    "fused_dispatch",
    "get_buffer",
    "grouped_mm",
    "permute",
    "register_buffer",
    "unpermute",
    "unregister_buffer",
    "worst_tokens",
]

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # torch leaves float64 alone


class Dispatched(NamedTuple):
    """Results of `dispatch`.

    Attributes:
        x: `[n, H]`, by source rank, then by token.
        topk_idx: `[n, K]`, local experts, -1 for those of other ranks.
        topk_weights: float32 `[n, K]`, 0 where the index is -1.
        tokens_per_expert: int32 `[L]` on the device, not padded.
        handle: For `combine`.
        scales: Of rows that were cast: `[n, S]`, as `Buffer.dispatch` returns them; else None.
        values: Of rows that were cast: what takes their gradient, `[n, H]` of the dtype that they
            were sent in. It holds nothing; see `dequantize`.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    tokens_per_expert: Tensor
    handle: Handle
    scales: Tensor | None = None
    values: Tensor | None = None


class ExpertRows(NamedTuple):
    """Rows in the order of the experts.

    Attributes:
        x: `[M, H]`: expert 0's rows, zeros up to a multiple of the alignment, expert 1's rows, ...
            Behind `ends[-1]` there are zeros where gradients are recorded
            (`torch.is_grad_enabled()`), so that none becomes NaN; else it is undefined there.
        weights: float32 `[M]`, 0 for padding.
        ends: int32 `[L]`: where each expert's rows end, padding included; `offs` of a grouped
            matrix product.
        tokens_per_expert: int32 `[L]`, without padding.
        handle: For `combine` (of `dispatch`) or `unpermute` (of `permute`).
        scales: Of rows that were cast: `[M, S]`, as `Buffer.expert_dispatch` returns them; else
            None.
        values: As of `Dispatched`, `[M, H]`.
    """

    x: Tensor
    weights: Tensor
    ends: Tensor
    tokens_per_expert: Tensor
    handle: Any
    scales: Tensor | None = None
    values: Tensor | None = None


def _autocast(x: Tensor) -> Tensor:
    """Rows as a matrix product under torch.autocast takes them.

    Not torch.library.register_autocast: it has one dtype for all time, and casts weights too.
    """
    kind = x.device.type
    if x.dtype not in _AUTOCAST_DTYPES or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _rows(x: Tensor) -> Tensor:
    """A matrix of rows, cast under torch.autocast."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x is a {type(x).__name__}, expected a torch.Tensor (rows with scales travel by "
            "Buffer.dispatch)"
        )
    if not torch.compiler.is_compiling():
        check_no_transform("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (number of rows, hidden)")
    return _autocast(x)


def _check_comes_back(x: Tensor, weights: Tensor, *, is_combined: bool) -> None:
    """Checks that rows are of a dtype that is summed: by combine, and by the gradient of a copy."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    if x.dtype not in SUM_DTYPES and (is_combined or needs_grad):
        raise TypeError(
            f"x has dtype {x.dtype}, but what comes back is summed in bfloat16 or float16; convert "
            "it with .to(torch.bfloat16), or run the layer under torch.autocast"
        )


def _size(name: str, value: int, least: int) -> int:
    """A number that a caller passes; sizes that are traced stay symbols."""
    return value if isinstance(value, torch.SymInt) else as_int(name, value, least=least)


# ---- what users call ----------------------------------------------------------------------------


@overload
def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    group: GroupLike,
    num_worst_tokens: int = ...,
    expert_major: Literal[False] = ...,
    cast: str | None = ...,
    global_scale: Tensor | None = ...,
) -> Dispatched: ...
@overload
def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    group: GroupLike,
    num_worst_tokens: int = ...,
    expert_major: Literal[True],
    expert_alignment: int = ...,
    num_expert_rows: int = ...,
    zero_padding: bool = ...,
    cast: str | None = ...,
    global_scale: Tensor | None = ...,
    column_major_scales: bool = ...,
) -> ExpertRows: ...
def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    group: GroupLike,
    num_worst_tokens: int = 0,
    expert_major: bool = False,
    expert_alignment: int = 1,
    num_expert_rows: int = 0,
    zero_padding: bool = True,
    cast: str | None = None,
    global_scale: Tensor | None = None,
    column_major_scales: bool = False,
) -> Dispatched | ExpertRows:
    """Sends each token to the ranks of its experts; the gradient comes back by a combine.

    Collective, forward and backward. The results are ready on the current stream.

    Args:
        x: bfloat16 or float16 `[T, H]`, rows a multiple of 16 bytes. Without gradients also any
            dtype of one byte, such as float8_e4m3fn.
        topk_idx: int64 or int32 `[T, K]`; anything outside `[0, E)` is no choice.
        topk_weights: float32 `[T, K]`; gets a gradient too.
        num_experts: `E`, a multiple of `R`.
        group: Process group, a DeviceMesh of one dimension, its name, or a name of
            `register_buffer`.
        num_worst_tokens: 0, or the number of rows of every output, the same on all ranks and at
            least what can arrive: `R` times the largest `T` of all ranks, which is what
            `worst_tokens` returns. The host waits for nothing and sizes are static.
            Rows that nothing arrived for have `topk_idx` -1 and are undefined; `combine` gives them
            a gradient of zeros.
        expert_major: Order the rows by expert instead of by source.
        expert_alignment: With `expert_major`: each expert's rows are padded to a multiple of it.
        num_expert_rows: With `expert_major` and `num_worst_tokens`: `M`; choices that do not fit
            are dropped. 0 = always enough.
        zero_padding: With `expert_major`: False leaves the padding undefined, which saves the time
            of writing it, where no gradients are recorded.
        cast: The format that rows are cast to on the way, see `Buffer.dispatch`; without
            `expert_major` inside one NVLink domain. Gradients pass the cast as they are, by
            `values` of what comes back: see `dequantize`.
        global_scale: Of the cast, for ``"nvfp4"``.
        column_major_scales: With `expert_major`: scales lie column by column, each padded to 16
            bytes.

    Returns:
        `Dispatched`, or `ExpertRows` with `expert_major`.

    Raises:
        TypeError, ValueError: Arguments that do not fit; nothing was sent.
        CommunicationError: A peer did not come.
    """
    x = _rows(x)
    _check_comes_back(x, topk_weights, is_combined=x.element_size() > 1)
    num_experts = _size("num_experts", num_experts, least=1)
    num_worst_tokens = _size("num_worst_tokens", num_worst_tokens, least=0)
    expert_alignment = _size("expert_alignment", expert_alignment, least=1)
    num_expert_rows = _size("num_expert_rows", num_expert_rows, least=0)
    if expert_alignment > 1 and not expert_major:
        raise ValueError(
            f"expert_alignment is {expert_alignment}, which needs expert_major=True: other rows "
            "are in the order of their sources"
        )
    if num_expert_rows and not (expert_major and num_worst_tokens):
        raise ValueError(
            f"num_expert_rows is {num_expert_rows}, which needs expert_major=True and "
            "num_worst_tokens: without them the number of rows is what arrives"
        )
    if cast is not None and cast not in CASTS:
        raise ValueError(f"cast is {cast!r}, but must be None or one of {', '.join(CASTS)}")
    if column_major_scales and not expert_major:
        raise ValueError(
            "column_major_scales=True needs expert_major=True: scales of other rows arrive row by "
            "row, as these do"
        )
    name = name_of(group)
    dry = False
    if not torch.compiler.is_compiling():
        dry = is_dry(x)
        if dry:
            check_dry_rows(x, num_worst_tokens)
    num_domains = count_domains(name, dry=dry)
    kind = handle_type(num_domains)
    if not expert_major:
        if cast is not None and num_domains > 1:
            raise ValueError(
                f"cast is {cast!r}, but this group spans {num_domains} NVLink domains, between "
                "which rows in the order of their sources travel as they are; pass "
                "expert_major=True, or no cast"
            )
        rows, scales, values, recv_idx, recv_weights, *tensors = torch.ops.epjit.dispatch(
            *(x, topk_idx, topk_weights, num_experts, num_worst_tokens),
            *(cast, global_scale, num_domains, name),
        )
        routing = kind(*tensors[: len(kind._fields)])
        of_cast = () if cast is None else (scales, values)
        counts = routing.recv_expert_counts
        return Dispatched(rows, recv_idx, recv_weights, counts, routing, *of_cast)
    needs_zeros = torch.is_grad_enabled()
    rows, scales, values, row_weights, *tensors = torch.ops.epjit.expert_dispatch(
        x,
        topk_idx,
        topk_weights,
        num_experts,
        num_worst_tokens,
        expert_alignment,
        num_expert_rows,
        zero_padding or needs_zeros,
        needs_zeros,
        cast,
        global_scale,
        column_major_scales,
        num_domains,
        name,
    )
    row_of, source, ends, *tensors = tensors
    routing = kind(*tensors[: len(kind._fields)])
    counts = routing.recv_expert_counts
    handle = ExpertHandle(routing, Placement(row_of, source, ends, counts))
    of_cast = () if cast is None else (scales, values)
    return ExpertRows(rows, row_weights, ends, counts, handle, *of_cast)


def dequantize(got: Dispatched | ExpertRows, *, global_scale: Tensor | None = None) -> Tensor:
    """The values of rows that a dispatch has cast, with the gradient of those that were sent.

    The gradient passes the cast as it is (straight through): it travels back as that of rows that
    came as they were. So it does when a product of one's own takes the rows and their scales, and
    gives the gradient of the values to `got.values`.

    Args:
        got: From ``dispatch(..., cast=...)``.
        global_scale: As the dispatch was given.

    Returns:
        `[n, H]` or `[M, H]` of the dtype that the rows were sent in, rounded once to it; see
        `epjit.formats.dequantize`.

    Raises:
        TypeError, ValueError: The rows were not cast, or `global_scale` is missing or of no use.
    """
    if got.scales is None or got.values is None:
        raise TypeError("these rows were not cast: they are their values; use .x")
    values: Tensor = torch.ops.epjit.dequantize(got.x, got.scales, global_scale, got.values)
    return values


def combine(
    x: Tensor,
    handle: GivenHandle | ExpertHandle,
    *,
    weights: Tensor | None = None,
    group: GroupLike,
) -> Tensor:
    """Brings rows back to the ranks of their tokens and sums them.

    Collective, forward and backward: the gradient travels by a cached dispatch.

    Args:
        x: bfloat16 or float16, one row for each row of the dispatch: `[n, H]`, or `[M, H]` by
            expert.
        handle: From the dispatch.
        weights: For rows by expert: float32 `[M]`, such as the weights of the dispatch, which the
            rows are multiplied with on their way; gets a gradient. None multiplies with nothing.
        group: As in the dispatch.

    Returns:
        `[T, H]`, the sum in fp32 over the ranks of each token, rounded once. By expert the rows of
        a rank are summed first, and rounded.

    Raises:
        TypeError, ValueError: Arguments that do not fit; nothing was sent.
        CommunicationError: A peer did not come.
    """
    if not isinstance(handle, tuple | list) or isinstance(handle, Dispatched | ExpertRows):
        raise TypeError(
            f"handle is a {type(handle).__name__}, expected the .handle of what dispatch returned"
        )
    x = _rows(x)
    if isinstance(handle, ExpertHandle):
        routing, placement = handle
        summed: Tensor = torch.ops.epjit.expert_combine(
            x, weights, *placement[:-1], *padded(routing), name_of(group)
        )
        return summed
    if weights is not None:
        raise ValueError(
            "weights are for rows by expert; multiply other rows before combine, each with the sum "
            "of its weights"
        )
    result: Tensor = torch.ops.epjit.combine(x, *padded(handle), name_of(group))
    return result


def permute(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    alignment: int = 1,
    num_rows: int = 0,
) -> ExpertRows:
    """Orders tokens by expert, a row for each choice; local, and the host does not wait.

    Args:
        x: `[n, H]` of any dtype; with gradients bfloat16 or float16 (on the CPU any floating-point
            dtype).
        topk_idx: int32 or int64 `[n, K]`, local experts; outside `[0, num_experts)` is no choice.
        topk_weights: float32 `[n, K]`.
        num_experts: `L`.
        alignment: Each expert's rows are padded to a multiple of it.
        num_rows: `M`; choices that do not fit are dropped. 0 = always enough.

    Returns:
        `ExpertRows`; its handle is for `unpermute`.
    """
    x = _rows(x)
    if x.is_cuda:
        _check_comes_back(x, topk_weights, is_combined=False)
    num_experts = _size("num_experts", num_experts, least=1)
    alignment = _size("alignment", alignment, least=1)
    num_rows = _size("num_rows", num_rows, least=0)
    n, num_topk = topk_idx.shape
    num_rows = num_rows or row_bound(n, num_topk, num_experts, alignment)
    placement = Placement(*torch.ops.epjit.place(topk_idx, num_experts, alignment, num_rows))
    row_of, source, ends, counts = placement
    rows = torch.ops.epjit.permute(x, row_of, source, ends, torch.is_grad_enabled())
    row_weights = torch.ops.epjit.permute_weights(topk_weights, row_of, source)
    return ExpertRows(rows, row_weights, ends, counts, placement)


def unpermute(x: Tensor, handle: Placement) -> Tensor:
    """Sums the rows of each token: the transpose of `permute`, so weigh the rows before.

    Args:
        x: `[M, H]`, bfloat16 or float16 (on the CPU any floating-point dtype).
        handle: From `permute`.

    Returns:
        `[n, H]`, the sum in fp32, rounded once; zeros for a token with no choice here.
    """
    row_of, source, ends, _ = handle
    x = _rows(x)
    result: Tensor = torch.ops.epjit.unpermute(x, row_of, source, ends)
    return result


def grouped_mm(
    x: Tensor,
    weights: Tensor,
    ends: Tensor,
    *,
    scales: Tensor | None = None,
    weight_scales: Tensor | None = None,
    values: Tensor | None = None,
    weight_values: Tensor | None = None,
) -> Tensor:
    """Multiplies each expert's rows with its matrix.

    bfloat16 is torch's own grouped product, without a host wait; other dtypes are a loop that reads
    `ends` on the host. With scales, both are float8_e4m3fn, and the product is torch's: of
    ``fp8_row`` on sm_90 and sm_100, of ``mxfp8`` on sm_100. Its gradients are those of the product
    of the values, in bfloat16, and go to `values` and `weight_values`: straight through the casts.

    Args:
        x: `[M, H]`, as `dispatch(expert_major=True)` orders it.
        weights: `[L, H, F]` of x's dtype; any of its strides, with scales transposed in memory
            (`[L, F, H]` that was transposed). Both are cast under torch.autocast.
        ends: int32 `[L]`; with mxfp8 multiples of 128 (`expert_alignment`).
        scales: None, or those of x: `[M, S]`, as `dispatch(cast=...)` returns them.
        weight_scales: With `scales`: `[L, F, S]`, of the columns of each matrix in the same format.
        values: With `scales`: None, or what takes the gradient of the rows, `[M, H]`: `values` of
            what the dispatch returned, or what the rows were cast from. It is not read.
        weight_values: With `scales`: None, or what takes that of the matrices, `[L, H, F]`: the
            parameter that they were cast from. It is not read.

    Returns:
        `[M, F]`, with scales bfloat16. Behind `ends[-1]` there are zeros where gradients are
        recorded, as in the gradient of the rows; else it is undefined there.

    Raises:
        TypeError, ValueError: Scales are missing, or what takes a gradient, or torch has no product
            of such rows.
        RuntimeError: This GPU, or this torch, has no product of rows with these scales.
    """
    x, weights = _rows(x), _autocast(weights)
    if scales is not None and weight_scales is not None:
        needs_grad = torch.is_grad_enabled()
        for name, cast, given in (
            ("values", (x, scales), values),
            ("weight_values", (weights, weight_scales), weight_values),
        ):
            if needs_grad and given is None and any(each.requires_grad for each in cast):
                raise ValueError(
                    f"{name} are missing: a gradient of what was cast would be rounded as it was, "
                    f"so {name} take it; see grouped_mm, or call it under torch.no_grad()"
                )
        scaled: Tensor = torch.ops.epjit.scaled_grouped_mm(
            *(x, weights, ends, scales, weight_scales, values, weight_values, needs_grad)
        )
        return scaled
    if scales is not None or weight_scales is not None or x.element_size() == 1:
        missing = "weight_scales" if weight_scales is None else "scales"
        raise ValueError(
            f"{missing} are missing: x is {x.dtype}, and its product takes scales of the rows and "
            "weight_scales of the matrices"
        )
    if values is not None or weight_values is not None:
        raise ValueError(
            "values and weight_values take the gradients of rows with scales; x and weights, which "
            "have none, take their own"
        )
    result: Tensor = torch.ops.epjit.grouped_mm(x, weights, ends, torch.is_grad_enabled())
    return result


def fused_dispatch(
    x: Tensor,
    token_indices: Tensor,
    token_probs: Tensor,
    num_experts: int,
    group: GroupLike,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
    """`dispatch` with the signature of Megatron's `fused_dispatch`.

    Args:
        x: `[T, H]`.
        token_indices: int64 `[T, K]`.
        token_probs: float32 `[T, K]`.
        num_experts: `E`.
        group: Process group or name.
        async_finish: No difference: the result is always ready on the current stream.
        allocate_on_comm_stream: No difference.

    Returns:
        Received rows, choices, weights, `tokens_per_expert` (int32 `[L]`, on the device, where
        Megatron's is on the host), the handle.
    """
    del async_finish, allocate_on_comm_stream
    out = dispatch(x, token_indices, token_probs, num_experts=num_experts, group=group)
    return out.x, out.topk_idx, out.topk_weights, out.tokens_per_expert, out.handle


def fused_combine(
    x: Tensor,
    group: GroupLike,
    handle: GivenHandle,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[Tensor, None]:
    """`combine` with the signature of Megatron's `fused_combine`.

    Returns:
        `[T, H]` and None (Megatron's event).
    """
    del async_finish, allocate_on_comm_stream
    return combine(x, handle, group=group), None
