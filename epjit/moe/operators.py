"""The `torch.library` operators: what runs, what is traced, and their gradients.

`T`, `H`, `K`, ... as in `epjit.moe`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epjit.calls import Payload
from epjit.checks.match import check
from epjit.formats import CASTS, dequantize
from epjit.handles import (
    ExpertHandle,
    GivenHandle,
    Handle,
    InternodeHandle,
    IntranodeHandle,
    Placement,
    handle_type,
    row_bound,
)
from epjit.modes import expert_major as by_expert
from epjit.moe import scaled
from epjit.moe.buffers import buffer_of, count_ranks
from epjit.runtime.empty import TensorSpec


def _moved(x: Tensor) -> Tensor:
    """Rows as the kernels take them: x, or a copy where it is not contiguous or at an odd address.

    In the operators, so that it sees the addresses of the run, those of gradients too.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _operator(schema: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Makes the function `_name` the operator ``epjit::name``, which writes to no argument."""

    def make(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        name = f"epjit::{function.__name__.removeprefix('_')}"
        return torch.library.custom_op(name, function, mutates_args=(), schema=schema)

    return make


# ---- operators: communication -------------------------------------------------------------------

# Between domains a handle has more tensors: in one domain these are None, and empty in the results
# of the operator. (Lists of tensors cost the host 30 to 50 us an operator.)
_MOST, _LEAST = len(InternodeHandle._fields), len(IntranodeHandle._fields)
_HANDLE = ", ".join(f"Tensor{'?' * (i >= _LEAST)} h{i}" for i in range(_MOST))


def _tensors(number: int) -> str:
    """So many in the results of an operator, and behind them a handle."""
    return ", ".join(["Tensor"] * (number + _MOST))


def padded(handle: GivenHandle) -> tuple[Tensor | None, ...]:
    """A handle as the operators take it."""
    return (*handle, *[None] * (_MOST - len(handle)))


def _filled(handle: Handle) -> list[Tensor]:
    """A handle as the operators return it."""
    absent = [handle[0].new_empty(0, dtype=torch.int32) for _ in range(_MOST - len(handle))]
    return [*handle, *absent]


def _given(tensors: Any) -> list[Tensor]:
    """The handle among the arguments of an operator, for a Buffer, which checks it."""
    return [tensor for tensor in tensors if tensor is not None]


def _as_handle(tensors: Any) -> Handle:
    """The same with names."""
    given = _given(tensors)
    return (IntranodeHandle if len(given) == _LEAST else InternodeHandle)(*given)


def _check_domains(buffer: Any, num_domains: int, group: str) -> None:
    """Checks that the group is what it was when the call was traced.

    Raises:
        RuntimeError: It spans another number of NVLink domains.
    """
    if buffer.runtime is not None and buffer.runtime.get_num_rdma_ranks() != num_domains:
        raise RuntimeError(
            f"this was traced for {num_domains} NVLink domains, but the group {group!r} has "
            f"{buffer.runtime.get_num_rdma_ranks()}; call epjit.moe.get_buffer(group, "
            "hidden_bytes) on all ranks, then trace"
        )


def _new(x: Tensor, spec: TensorSpec | None) -> Any:
    """A tensor of this shape and dtype where `x` is; also a fake one."""
    return None if spec is None else x.new_empty(spec[0], dtype=spec[2])


# Autograd gives a tensor a gradient of its own dtype, which would round that of a row as the row
# itself was rounded. So a dispatch that casts has one result more: a tensor without memory, of the
# dtype and shape that the rows had, which takes their gradient. A cast hands it on as it is.


def _standing_for(x: Tensor, num_rows: Any) -> Tensor:
    """Stands for so many rows like those of x: takes their gradient."""
    return x.new_empty((1, 1)).expand(num_rows, x.shape[1])


def _delivered(x: Tensor, received: Payload) -> tuple[Tensor, Tensor, Tensor]:
    """Rows; of those that were cast scales and what takes their gradient, else empty tensors."""
    if isinstance(received, tuple):
        return *received, _standing_for(x, received[0].shape[0])
    return received, x.new_empty(0), x.new_empty(0)


def _fake_delivered(
    x: Tensor, num_rows: Any, cast: str | None, *, column_major: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = x.shape[1]
    if cast is None:
        return x.new_empty((num_rows, hidden)), x.new_empty(0), x.new_empty(0)
    row_format = CASTS[cast]
    rows = x.new_empty((num_rows, row_format.num_columns(hidden)), dtype=row_format.x_dtype)
    num_scales, dtype = row_format.num_scale_columns(hidden), row_format.scale_dtype
    if column_major:
        scales = x.new_empty((num_scales, (num_rows + 3) // 4 * 4), dtype=dtype)
        scales = scales[:, :num_rows].t()
    else:
        scales = x.new_empty((num_rows, num_scales), dtype=dtype)
    return rows, scales, _standing_for(x, num_rows)


def _grad_delivered(ctx: Any, of_rows: Any, of_scales: Any, of_values: Any) -> Any:
    """The gradient of rows that a dispatch delivered, of a dtype that a combine adds.

    Raises:
        RuntimeError: It came to rows that were cast, or to their scales.
    """
    if ctx.cast is None:
        return of_rows
    if of_rows is not None or of_scales is not None:
        raise RuntimeError(
            f"rows that were cast to {ctx.cast}, or their scales, were given a gradient, which "
            "would be rounded as they were; compute with epjit.moe.dequantize(...), or let .values "
            "of what dispatch returned take the gradient"
        )
    if of_values is not None:
        return of_values
    (values, *_) = ctx.saved_tensors
    return values.new_zeros(values.shape)


def _grad_of_weights(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape, dtype=torch.float32) if grad is None else grad.float()


@_operator(
    "(Tensor x, Tensor topk_idx, Tensor topk_weights, int num_experts, int num_worst_tokens, "
    f"str? cast, Tensor? global_scale, int num_domains, str group) -> ({_tensors(5)})"
)
def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_worst_tokens: int,
    cast: str | None,
    global_scale: Tensor | None,
    num_domains: int,
    group: str,
) -> tuple[Tensor, ...]:
    """Received rows (see `_delivered`), their choices and weights; a handle."""
    x, buffer = _moved(x), buffer_of(group, x)
    topk_idx, topk_weights = topk_idx.contiguous(), topk_weights.contiguous()
    _check_domains(buffer, num_domains, group)
    per_rank, per_domain, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_domain,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        num_worst_tokens=num_worst_tokens,
        cast=cast,
        global_scale=global_scale,
    )
    assert recv_idx is not None
    assert recv_weights is not None
    assert handle is not None
    return (*_delivered(x, recv_x), recv_idx, recv_weights, *_filled(handle))


@_dispatch.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_worst_tokens: int,
    cast: str | None,
    global_scale: Tensor | None,
    num_domains: int,
    group: str,
) -> tuple[Tensor, ...]:
    num_topk = topk_idx.shape[1]
    n: Any = num_worst_tokens or torch.library.get_ctx().new_dynamic_size()
    return (
        *_fake_delivered(x, n, cast),
        topk_idx.new_empty((n, num_topk)),
        topk_weights.new_empty((n, num_topk)),
        *_fake_handle(x, n, num_worst_tokens, num_experts, num_domains, group),
    )


def _fake_handle(
    x: Tensor, n: Any, num_worst_tokens: int, num_experts: int, num_domains: int, group: str
) -> list[Tensor]:
    tokens, ranks, kind = x.shape[0], count_ranks(group), handle_type(num_domains)
    specs = kind.specs(
        num_tokens=tokens,
        num_ranks=ranks,
        num_domains=num_domains,
        experts_per_rank=num_experts // ranks,
    )
    handle = kind(*[_new(x, spec) for spec in specs])
    handle = handle._replace(is_token_in_rank=x.new_empty((tokens, ranks), dtype=torch.bool))
    if isinstance(handle, IntranodeHandle):
        (src_idx,) = (_new(x, spec) for spec in IntranodeHandle.row_specs(n))
        return _filled(handle._replace(recv_src_idx=src_idx))
    passing: Any = ranks // num_domains * num_worst_tokens
    passing = passing or torch.library.get_ctx().new_dynamic_size()
    meta, heads = (_new(x, spec) for spec in InternodeHandle.row_specs(n, passing))
    return _filled(handle._replace(recv_src_meta=meta, send_nvl_head=heads))


@_operator(f"(Tensor x, {_HANDLE}, str group) -> Tensor")
def _combine(x: Tensor, *handle_and_group: Any) -> Tensor:
    """Rows back to their ranks, summed: `[T, H]`."""
    *tensors, group = handle_and_group
    combined, _, _ = buffer_of(group, x).combine(_moved(x), _given(tensors))
    return combined


@_combine.register_fake
def _(x: Tensor, *handle_and_group: Any) -> Tensor:
    return x.new_empty((_as_handle(handle_and_group[:-1]).num_tokens, x.shape[1]))


@_operator(f"(Tensor grad_x, Tensor grad_weights, {_HANDLE}, str group) -> (Tensor, Tensor)")
def _dispatch_backward(
    grad_x: Tensor, grad_weights: Tensor, *handle_and_group: Any
) -> tuple[Tensor, Tensor]:
    """A token that went to several ranks gets the sum of the gradients of its copies."""
    *tensors, group = handle_and_group
    x, weights, _ = buffer_of(group, grad_x).combine(
        _moved(grad_x), _given(tensors), topk_weights=grad_weights.contiguous()
    )
    assert weights is not None
    return x, weights


@_dispatch_backward.register_fake
def _(grad_x: Tensor, grad_weights: Tensor, *handle_and_group: Any) -> tuple[Tensor, Tensor]:
    num_tokens = _as_handle(handle_and_group[:-1]).num_tokens
    return (
        grad_x.new_empty((num_tokens, grad_x.shape[1])),
        grad_weights.new_empty((num_tokens, grad_weights.shape[1])),
    )


@_operator(f"(Tensor grad, {_HANDLE}, str group) -> Tensor")
def _combine_backward(grad: Tensor, *handle_and_group: Any) -> Tensor:
    """Every row that was added gets the gradient of the sum, the others zeros."""
    *tensors, group = handle_and_group
    buffer = buffer_of(group, grad)
    rows, *_ = buffer.dispatch(_moved(grad), handle=_given(tensors))
    assert isinstance(rows, Tensor)
    by_expert.blank(rows, _as_handle(tensors).num_received(buffer.rank))
    return rows


@_combine_backward.register_fake
def _(grad: Tensor, *handle_and_group: Any) -> Tensor:
    return grad.new_empty((_as_handle(handle_and_group[:-1]).num_rows, grad.shape[1]))


def _setup_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.cast, _, num_domains, ctx.group = inputs
    ctx.set_materialize_grads(ctx.cast is None)
    handle = output[-_MOST:][: len(handle_type(num_domains)._fields)]
    _, _, values, recv_topk_idx, *_ = output
    ctx.save_for_backward(values, recv_topk_idx, *padded(handle))


def _grad_dispatch(ctx: Any, *grads: Any) -> Any:
    _, recv_topk_idx, *handle = ctx.saved_tensors
    # The zeros that stand for choices of other ranks depend on no weight.
    of_weights = _grad_of_weights(grads[4], recv_topk_idx).masked_fill(recv_topk_idx < 0, 0.0)
    of_rows = _grad_delivered(ctx, *grads[:3])
    x, weights = torch.ops.epjit.dispatch_backward(of_rows, of_weights, *handle, ctx.group)
    return x, None, weights, *[None] * 6


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[-1]
    ctx.save_for_backward(*inputs[1:-1])


def _grad_combine(ctx: Any, grad: Tensor) -> Any:
    rows = torch.ops.epjit.combine_backward(grad, *ctx.saved_tensors, ctx.group)
    return rows, *[None] * (_MOST + 1)


_dispatch.register_autograd(_grad_dispatch, setup_context=_setup_dispatch)
_combine.register_autograd(_grad_combine, setup_context=_setup_combine)


# ---- operators: communication of rows by expert -------------------------------------------------

# Of a placement, without its counts, which the handle has.
_PLACED = ", ".join(f"Tensor {name}" for name in Placement._fields[:-1])
_EXPERT_HANDLE = f"{_PLACED}, {_HANDLE}"
_NUM_PLACED = len(Placement._fields) - 1


def _as_expert_handle(tensors: Any) -> ExpertHandle:
    """The handle among the arguments of an operator."""
    row_of, source, ends, *handle = tensors
    routing = _as_handle(handle)
    return ExpertHandle(routing, Placement(row_of, source, ends, routing.recv_expert_counts))


@_operator(
    "(Tensor x, Tensor topk_idx, Tensor topk_weights, int num_experts, int num_worst_tokens, "
    "int expert_alignment, int num_expert_rows, bool zero_padding, bool blank, str? cast, "
    "Tensor? global_scale, bool column_major_scales, int num_domains, str group) "
    f"-> ({_tensors(4 + _NUM_PLACED)})"
)
def _expert_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_worst_tokens: int,
    expert_alignment: int,
    num_expert_rows: int,
    zero_padding: bool,
    blank: bool,
    cast: str | None,
    global_scale: Tensor | None,
    column_major_scales: bool,
    num_domains: int,
    group: str,
) -> tuple[Tensor, ...]:
    """Rows by expert (see `_delivered`) and their weights; a placement; a handle.

    With `blank` there are zeros behind the last expert's rows.
    """
    buffer = buffer_of(group, x)
    _check_domains(buffer, num_domains, group)
    payload, weights, handle, _ = buffer.expert_dispatch(
        _moved(x),
        topk_idx.contiguous(),
        topk_weights.contiguous(),
        num_experts=num_experts,
        num_worst_tokens=num_worst_tokens,
        expert_alignment=expert_alignment,
        num_expert_rows=num_expert_rows,
        zero_padding=zero_padding,
        column_major_scales=column_major_scales,
        cast=cast,
        global_scale=global_scale,
    )
    rows, scales, values = _delivered(x, payload)
    assert weights is not None
    *placed, _ = handle.placement
    if blank and num_worst_tokens:
        end = handle.placement.ends[-1:]
        by_expert.blank(rows, end)
        if cast is not None:  # else what lies there may be no number, which times zero is none
            words = scales.view(torch.uint8) if scales.element_size() == 1 else scales
            words.masked_fill_((torch.arange(rows.shape[0], device=x.device) >= end)[:, None], 0)
    return (rows, scales, values, weights, *placed, *_filled(handle.routing))


@_expert_dispatch.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_worst_tokens: int,
    expert_alignment: int,
    num_expert_rows: int,
    zero_padding: bool,
    blank: bool,
    cast: str | None,
    global_scale: Tensor | None,
    column_major_scales: bool,
    num_domains: int,
    group: str,
) -> tuple[Tensor, ...]:
    num_topk, local = topk_idx.shape[1], num_experts // count_ranks(group)
    n: Any = num_worst_tokens or torch.library.get_ctx().new_dynamic_size()
    num_rows: Any = num_expert_rows or row_bound(n, num_topk, local, expert_alignment)
    if not num_worst_tokens:
        num_rows = torch.library.get_ctx().new_dynamic_size()
    specs = Placement.specs(num_tokens=n, num_topk=num_topk, num_rows=num_rows, num_experts=local)
    return (
        *_fake_delivered(x, num_rows, cast, column_major=column_major_scales),
        topk_weights.new_empty(num_rows),
        *[_new(x, spec) for spec in specs[:_NUM_PLACED]],
        *_fake_handle(x, n, num_worst_tokens, num_experts, num_domains, group),
    )


@_operator(f"(Tensor x, Tensor? row_weights, {_EXPERT_HANDLE}, str group) -> Tensor")
def _expert_combine(x: Tensor, row_weights: Tensor | None, *handle_and_group: Any) -> Tensor:
    """Rows by expert back to their ranks, weighted and summed: `[T, H]`."""
    *tensors, group = handle_and_group
    if row_weights is not None:
        row_weights = row_weights.contiguous()
    combined, _, _ = buffer_of(group, x).expert_combine(
        _moved(x), _as_expert_handle(tensors), row_weights=row_weights
    )
    return combined


@_expert_combine.register_fake
def _(x: Tensor, row_weights: Tensor | None, *handle_and_group: Any) -> Tensor:
    handle = _as_expert_handle(handle_and_group[:-1])
    return x.new_empty((handle.routing.num_tokens, x.shape[1]))


@_operator(f"(Tensor grad_x, Tensor grad_weights, {_EXPERT_HANDLE}, str group) -> (Tensor, Tensor)")
def _expert_dispatch_backward(
    grad_x: Tensor, grad_weights: Tensor, *handle_and_group: Any
) -> tuple[Tensor, Tensor]:
    """A token gets the sum of the gradients of its rows, a choice that of its row's weight."""
    *tensors, group = handle_and_group
    x, weights, _ = buffer_of(group, grad_x).expert_combine(
        _moved(grad_x), _as_expert_handle(tensors), topk_weights=grad_weights.contiguous()
    )
    assert weights is not None
    return x, weights


@_expert_dispatch_backward.register_fake
def _(grad_x: Tensor, grad_weights: Tensor, *handle_and_group: Any) -> tuple[Tensor, Tensor]:
    handle = _as_expert_handle(handle_and_group[:-1])
    num_tokens, num_topk = handle.routing.num_tokens, handle.placement.row_of.shape[1]
    return (
        grad_x.new_empty((num_tokens, grad_x.shape[1])),
        grad_weights.new_empty((num_tokens, num_topk)),
    )


@_operator(
    f"(Tensor grad, Tensor x, Tensor? row_weights, {_EXPERT_HANDLE}, str group) -> (Tensor, Tensor)"
)
def _expert_combine_backward(
    grad: Tensor, x: Tensor, row_weights: Tensor | None, *handle_and_group: Any
) -> tuple[Tensor, Tensor]:
    """Every row that was added gets the gradient of the sum, times its weight.

    A weight gets the product of the gradient and its row; without weights there are none.
    """
    *tensors, group = handle_and_group
    handle = _as_expert_handle(tensors)
    rows, *_ = buffer_of(group, grad).expert_dispatch(
        _moved(grad), handle=handle, zero_padding=True
    )
    assert isinstance(rows, Tensor)
    by_expert.blank(rows, handle.placement.ends[-1:])
    if row_weights is None:
        return rows, grad.new_empty(0, dtype=torch.float32)
    return by_expert.weigh(rows, _moved(x), row_weights.contiguous(), handle.placement.source)


@_expert_combine_backward.register_fake
def _(
    grad: Tensor, x: Tensor, row_weights: Tensor | None, *handle_and_group: Any
) -> tuple[Tensor, Tensor]:
    num_rows = _as_expert_handle(handle_and_group[:-1]).num_rows
    num_weights = 0 if row_weights is None else num_rows
    return (
        grad.new_empty((num_rows, grad.shape[1])),
        grad.new_empty(num_weights, dtype=torch.float32),
    )


def _setup_expert_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.cast, _, _, num_domains, ctx.group = inputs
    ctx.set_materialize_grads(ctx.cast is None)
    placed, handle = output[4:-_MOST], output[-_MOST:][: len(handle_type(num_domains)._fields)]
    ctx.save_for_backward(output[2], *placed, *padded(handle))


def _grad_expert_dispatch(ctx: Any, *grads: Any) -> Any:
    _, *handle = ctx.saved_tensors
    source = handle[1]
    of_rows, of_weights = _grad_delivered(ctx, *grads[:3]), _grad_of_weights(grads[3], source)
    x, weights = torch.ops.epjit.expert_dispatch_backward(of_rows, of_weights, *handle, ctx.group)
    return x, None, weights, *[None] * 11


def _setup_expert_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, row_weights, *handle, ctx.group = inputs
    # Without weights the gradient does not depend on the rows.
    ctx.save_for_backward(handle[0] if row_weights is None else x, row_weights, *handle)


def _grad_expert_combine(ctx: Any, grad: Tensor) -> Any:
    x, row_weights, *handle = ctx.saved_tensors
    of_x, of_weights = torch.ops.epjit.expert_combine_backward(
        grad, x, row_weights, *handle, ctx.group
    )
    others = [None] * (_NUM_PLACED + _MOST + 1)
    return of_x, None if row_weights is None else of_weights, *others


_expert_dispatch.register_autograd(_grad_expert_dispatch, setup_context=_setup_expert_dispatch)
_expert_combine.register_autograd(_grad_expert_combine, setup_context=_setup_expert_combine)


# ---- operators: rows that were cast --------------------------------------------------------------


@_operator("(Tensor rows, Tensor scales, Tensor? global_scale, Tensor values) -> Tensor")
def _dequantize(
    rows: Tensor, scales: Tensor, global_scale: Tensor | None, values: Tensor
) -> Tensor:
    """The values of rows that were cast, in the dtype of `values`, which takes their gradient."""
    return dequantize(rows, scales, global_scale=global_scale, dtype=values.dtype)


@_dequantize.register_fake
def _(rows: Tensor, scales: Tensor, global_scale: Tensor | None, values: Tensor) -> Tensor:
    return values.new_empty(values.shape)


def _grad_dequantize(ctx: Any, grad: Tensor) -> Any:
    return None, None, None, grad


_dequantize.register_autograd(_grad_dequantize)


# ---- operators: the order of the experts --------------------------------------------------------


@_operator(
    "(Tensor topk_idx, int num_experts, int alignment, int num_rows) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def _place(topk_idx: Tensor, num_experts: int, alignment: int, num_rows: int) -> tuple[Tensor, ...]:
    """See `expert_major.place`."""
    return tuple(by_expert.place(topk_idx, num_experts, alignment=alignment, num_rows=num_rows))


@_place.register_fake
def _(topk_idx: Tensor, num_experts: int, alignment: int, num_rows: int) -> tuple[Tensor, ...]:
    num_tokens, num_topk = topk_idx.shape
    specs = Placement.specs(
        num_tokens=num_tokens, num_topk=num_topk, num_rows=num_rows, num_experts=num_experts
    )
    return tuple(_new(topk_idx, spec) for spec in specs)


@_operator("(Tensor x, Tensor row_of, Tensor source, Tensor ends, bool blank) -> Tensor")
def _permute(x: Tensor, row_of: Tensor, source: Tensor, ends: Tensor, blank: bool) -> Tensor:
    """See `expert_major.permute`; with `blank` there are zeros behind the last expert's rows."""
    why = "one row for each row of topk_idx"
    check("x", x, (row_of.shape[0], "hidden"), contiguous=False, why=why)
    rows = by_expert.permute(_moved(x), row_of, source, ends)
    if blank:
        by_expert.blank(rows, ends[-1:])
    return rows


@_permute.register_fake
def _(x: Tensor, row_of: Tensor, source: Tensor, ends: Tensor, blank: bool) -> Tensor:
    return x.new_empty((source.shape[0], x.shape[1]))


@_operator("(Tensor rows, Tensor row_of, Tensor source, Tensor ends) -> Tensor")
def _unpermute(rows: Tensor, row_of: Tensor, source: Tensor, ends: Tensor) -> Tensor:
    """See `expert_major.unpermute`."""
    why = "the rows by expert that the handle is of"
    check("x", rows, (source.shape[0], "hidden"), contiguous=False, why=why)
    return by_expert.unpermute(_moved(rows), row_of)


@_unpermute.register_fake
def _(rows: Tensor, row_of: Tensor, source: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty((row_of.shape[0], rows.shape[1]))


@_operator("(Tensor weights, Tensor row_of, Tensor source) -> Tensor")
def _permute_weights(weights: Tensor, row_of: Tensor, source: Tensor) -> Tensor:
    """The weight of each row, 0 for padding: `[M]`."""
    return _take(weights.flatten(), source)


@_permute_weights.register_fake
def _(weights: Tensor, row_of: Tensor, source: Tensor) -> Tensor:
    return weights.new_empty(source.shape)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Values by index; -1 is the zero that stands behind them."""
    return torch.cat([values, values.new_zeros(1)])[index]


def _setup_placed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*[each for each in inputs[1:] if isinstance(each, Tensor)])


def _grad_permute(ctx: Any, grad: Tensor) -> Any:
    return torch.ops.epjit.unpermute(grad, *ctx.saved_tensors), None, None, None, None


def _grad_unpermute(ctx: Any, grad: Tensor) -> Any:
    return torch.ops.epjit.permute(grad, *ctx.saved_tensors, True), None, None, None


def _grad_permute_weights(ctx: Any, grad: Tensor) -> Any:
    row_of, _ = ctx.saved_tensors
    return _take(grad, row_of), None, None


_permute.register_autograd(_grad_permute, setup_context=_setup_placed)
_unpermute.register_autograd(_grad_unpermute, setup_context=_setup_placed)
_permute_weights.register_autograd(_grad_permute_weights, setup_context=_setup_placed)


# torch's grouped product leaves what lies behind the last expert's rows as it was, and its gradient
# refuses some strides; so these two are operators as well.


def _has_grouped_mm(x: Tensor, y: Tensor) -> bool:
    return hasattr(F, "grouped_mm") and x.dtype == y.dtype == torch.bfloat16


def _matrices(weights: Tensor) -> Tensor:
    """Matrices as torch's product takes them: of rows or columns that are whole, at even addresses.

    Transposed ones stay as they are.
    """
    for each in (weights, weights.transpose(1, 2)):
        if each.stride(2) == 1 and each.stride(1) >= each.shape[2] and each.data_ptr() % 16 == 0:
            return weights
    return weights.clone(memory_format=torch.contiguous_format)


def _parts(x: Tensor, ends: Tensor) -> list[Tensor]:
    """Each expert's rows, and those behind; the host reads `ends`."""
    starts = [0, *ends.tolist(), x.shape[0]]
    return [x[start:end] for start, end in itertools.pairwise(starts)]


@_operator("(Tensor x, Tensor weights, Tensor ends, bool blank) -> Tensor")
def _grouped_mm(x: Tensor, weights: Tensor, ends: Tensor, blank: bool) -> Tensor:
    """Each expert's rows times its matrix; with `blank` there are zeros behind the last ones."""
    if not _has_grouped_mm(x, weights):
        *parts, behind = _parts(x, ends)
        products = [rows @ weight for rows, weight in zip(parts, weights, strict=True)]
        return torch.cat([*products, x.new_zeros((behind.shape[0], weights.shape[2]))])
    rows = F.grouped_mm(_moved(x), _matrices(weights), offs=ends)
    if blank:
        by_expert.blank(rows, ends[-1:])
    return rows


@_grouped_mm.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor, blank: bool) -> Tensor:
    return x.new_empty((x.shape[0], weights.shape[2]))


@_operator("(Tensor x, Tensor y, Tensor ends) -> Tensor")
def _grouped_mm_of_rows(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """The sum over each expert's rows of the outer products of x and y: `[L, H, F]`."""
    if not _has_grouped_mm(x, y):
        pairs = zip(_parts(x, ends)[:-1], _parts(y, ends)[:-1], strict=True)
        return torch.stack([rows.t() @ others for rows, others in pairs])
    return F.grouped_mm(_moved(x).t(), _moved(y), offs=ends)


@_grouped_mm_of_rows.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((ends.shape[0], x.shape[1], y.shape[1]))


@_operator(
    "(Tensor x, Tensor weights, Tensor ends, Tensor scales, Tensor of_weights, Tensor? values, "
    "Tensor? weight_values, bool blank) -> Tensor"
)
def _scaled_grouped_mm(
    x: Tensor,
    weights: Tensor,
    ends: Tensor,
    scales: Tensor,
    of_weights: Tensor,
    values: Tensor | None,
    weight_values: Tensor | None,
    blank: bool,
) -> Tensor:
    """See `scaled.product`; `values` and `weight_values` take its gradients. Else as above."""
    scaled.check_values(values, x, "values")
    scaled.check_values(weight_values, weights, "weight_values")
    rows = scaled.product(_moved(x), weights, ends, scales, of_weights)
    if blank:
        by_expert.blank(rows, ends[-1:])
    return rows


@_scaled_grouped_mm.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    ends: Tensor,
    scales: Tensor,
    of_weights: Tensor,
    values: Tensor | None,
    weight_values: Tensor | None,
    blank: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], weights.shape[2]), dtype=torch.bfloat16)


def _setup_scaled_grouped_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.dtypes = [None if each is None else each.dtype for each in inputs[5:7]]


def _grad_scaled_grouped_mm(ctx: Any, grad: Tensor) -> Any:
    """The gradients of a product of the values, which pass the casts as they are."""
    x, weights, ends, scales, of_weights = ctx.saved_tensors
    found: list[Tensor | None] = [None, None]
    if ctx.needs_input_grad[5]:
        matrices = dequantize(weights.transpose(1, 2), of_weights, dtype=grad.dtype)
        found[0] = torch.ops.epjit.grouped_mm(grad, matrices, ends, True).to(ctx.dtypes[0])
    if ctx.needs_input_grad[6]:
        rows = dequantize(x, scales, dtype=grad.dtype)
        found[1] = torch.ops.epjit.grouped_mm_of_rows(rows, grad, ends).to(ctx.dtypes[1])
    return *[None] * 5, *found, None


def _setup_grouped_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _grad_grouped_mm(ctx: Any, grad: Tensor) -> Any:
    x, weights, ends = ctx.saved_tensors
    of_x = of_weights = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.epjit.grouped_mm(grad, weights.transpose(1, 2), ends, True)
    if ctx.needs_input_grad[1]:
        of_weights = torch.ops.epjit.grouped_mm_of_rows(x, grad, ends)
    return of_x, of_weights, None, None


def _grad_grouped_mm_of_rows(ctx: Any, grad: Tensor) -> Any:
    x, y, ends = ctx.saved_tensors
    of_x = torch.ops.epjit.grouped_mm(y, grad.transpose(1, 2), ends, True)
    return of_x, torch.ops.epjit.grouped_mm(x, grad, ends, True), None


_grouped_mm.register_autograd(_grad_grouped_mm, setup_context=_setup_grouped_mm)
_grouped_mm_of_rows.register_autograd(_grad_grouped_mm_of_rows, setup_context=_setup_grouped_mm)
_scaled_grouped_mm.register_autograd(
    _grad_scaled_grouped_mm, setup_context=_setup_scaled_grouped_mm
)
