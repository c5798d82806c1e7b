"""Rows in the order of the experts: what every operation on them means, in torch.

Words: `n` received tokens, `K` selections each, `E` experts of this rank, `M` rows, `H` elements a
row. The GPU kernels are compared with these lines bit for bit. `place`, `permute` and `unpermute`
are local, and work on tensors of any device. `dispatch`, `cached_dispatch` and `combine` see what
all ranks have, as those of `epjit.reference.Normal`, which they add the order to: so they mean the
same in one NVLink domain and between several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from epjit.calls import Bias, Order, Sums
from epjit.formats import RowFormat
from epjit.handles import ExpertDispatched, ExpertHandle, Placement
from epjit.reference import Normal
from epjit.reference.intranode import RankInput, pad_rows
from epjit.reference.low_latency import encode
from epjit.runtime.empty import by_columns, empty_on

_LANES = 32  # that share a dot product
_LANE_BYTES = 16  # that each takes at a time


def place(topk_idx: Tensor, num_experts: int, *, alignment: int, num_rows: int) -> Placement:
    """Numbers the selections by expert, then by token, then by `k`.

    Args:
        topk_idx: int32 or int64 `[n, K]`, local experts; outside `[0, num_experts)` is nothing.
        num_experts: `E`.
        alignment: Each expert's rows are padded to a multiple of it.
        num_rows: `M`; selections that do not fit are dropped.
    """
    experts = topk_idx.flatten().to(torch.int64)
    valid = (experts >= 0) & (experts < num_experts)
    experts = experts.masked_fill(~valid, num_experts)
    one_hot = torch.zeros(
        (experts.shape[0], num_experts + 1), dtype=torch.int64, device=topk_idx.device
    )
    one_hot.scatter_(1, experts[:, None], 1)
    count = one_hot.sum(dim=0)[:num_experts]
    end = ((count + alignment - 1) // alignment * alignment).cumsum(dim=0)
    start = torch.cat((end.new_zeros(1), end))
    rank_of = (one_hot.cumsum(dim=0) - 1).gather(1, experts[:, None])[:, 0]
    row_of = rank_of + start[experts]
    row_of = row_of.masked_fill(~valid | (row_of >= num_rows), -1)
    source = torch.full((num_rows,), -1, dtype=torch.int32, device=topk_idx.device)
    (placed,) = torch.nonzero(row_of >= 0, as_tuple=True)
    source[row_of[placed]] = placed.to(torch.int32)
    return Placement(
        row_of.to(torch.int32).view(topk_idx.shape),
        source,
        end.clamp(max=num_rows).to(torch.int32),
        count.to(torch.int32),
    )


def source_of(row_of: Tensor, num_rows: int) -> Tensor:
    """int32 `[M]`: the selection of each row, the inverse of `row_of`; -1 where there is none.

    Args:
        row_of: int32 `[n, K]`.
        num_rows: `M`.
    """
    flat = row_of.reshape(-1).to(torch.int64)
    selection = torch.arange(flat.shape[0], dtype=torch.int32, device=row_of.device)
    source = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=row_of.device)
    is_row = (flat >= 0) & (flat < num_rows)
    return source.scatter_(0, torch.where(is_row, flat, num_rows), selection)[:num_rows]


def permute(x: Tensor, source: Tensor, num_topk: int) -> Tensor:
    """`[M, H]`: the token of each row's selection, zeros for padding.

    Args:
        x: `[n, H]`, any dtype.
        source: int32 `[M]`, from `place`.
        num_topk: `K`.
    """
    rows = x.new_zeros((source.shape[0], x.shape[1]))
    (taken,) = torch.nonzero(source >= 0, as_tuple=True)
    rows[taken] = x[source[taken].to(torch.int64) // num_topk]
    return rows


def unpermute(rows: Tensor, row_of: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """`[n, H]`: the sum of each token's rows in fp32, in the order of `k`, rounded once.

    Args:
        rows: `[M, H]`, a floating-point dtype.
        row_of: int32 `[n, K]`, from `place`; no row where it is outside `[0, M)`.
        row_weights: float32 `[M]`, which the rows are multiplied with (each product is rounded to
            fp32, then added), or None.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.zeros((row_of.shape[0], rows.shape[1]), dtype=wide, device=rows.device)
    for column in row_of.to(torch.int64).unbind(dim=1):
        (token,) = torch.nonzero((column >= 0) & (column < rows.shape[0]), as_tuple=True)
        values = rows[column[token]].to(wide)
        if row_weights is not None:
            values *= row_weights[column[token], None]
        out[token] += values
    return out.to(rows.dtype)


# ---- between ranks -------------------------------------------------------------------------------


def dispatch(
    oracle: Normal,
    inputs: Sequence[RankInput],
    rank: int,
    *,
    num_experts: int,
    expert_alignment: int = 1,
    num_worst_tokens: int | Sequence[int] = 0,
    num_rows: int = 0,
    column_major_scales: bool = False,
) -> ExpertDispatched:
    """Results of `rank`: a row for each selection of its experts.

    Rows are numbered by what all ranks select, whether there is room for it or not: by expert,
    source rank, token, and choice. A selection whose token is left out (`num_worst_tokens`), or
    whose row is not below `num_rows`, has no row; `counts` have it.

    Args:
        oracle: The same operations in the order of the sources.
        inputs: One entry a rank, all with choices and weights.
        rank: The receiver.
        num_experts: Over all ranks.
        expert_alignment: Each expert's rows are padded to a multiple of it.
        num_worst_tokens: 0, or the tokens that there is room for; of each rank, when they differ.
        num_rows: `M`; 0 = as many as there are.
        column_major_scales: See `column_major`.

    Returns:
        See `ExpertDispatched`; what is undefined there is zero here.

    Raises:
        ValueError: `num_experts` does not fit the ranks.
    """
    num_local = num_experts // len(inputs)
    options = {"num_experts": num_experts, "expert_alignment": expert_alignment}
    whole = oracle.dispatch(inputs, rank, **options)
    received = oracle.dispatch(inputs, rank, **options, num_worst_tokens=num_worst_tokens)
    assert whole.recv_topk_idx is not None
    assert received.recv_topk_weights is not None
    assert received.handle is not None
    count, num_topk = whole.recv_topk_idx.shape
    most = num_rows or count * num_topk + num_local * expert_alignment
    placed = place(whole.recv_topk_idx, num_local, alignment=expert_alignment, num_rows=most)
    num_rows = num_rows or int(placed.ends[-1])
    room = received.recv_x.shape[0]
    source = placed.source[:num_rows]
    placed = placed._replace(
        row_of=pad_rows(placed.row_of[:room], room, value=-1),
        source=source.masked_fill(source >= room * num_topk, -1),
    )
    return ExpertDispatched(
        *_permuted(received.recv_x, received.recv_scales, placed, column_major_scales),
        _taken(received.recv_topk_weights, placed.source),
        ExpertHandle(received.handle, placed),
        received.num_recv_tokens_per_expert_list,
    )


def cached_dispatch(
    oracle: Normal,
    inputs: Sequence[tuple[Tensor, Tensor | None, Tensor | None]],
    handles: Sequence[ExpertHandle],
    rank: int,
    *,
    column_major_scales: bool = False,
) -> ExpertDispatched:
    """Results of `rank` when another payload follows the handles.

    Args:
        oracle: The same operations in the order of the sources.
        inputs: Rows `[T, H]`, scales `[T, S]` or None, and weights `[T, K]` or None, of each rank.
        handles: Each rank's handle, all of one dispatch.
        rank: The receiver.
        column_major_scales: See `column_major`.

    Returns:
        See `ExpertDispatched`, with the handle of this rank.

    Raises:
        ValueError: A payload has another number of tokens than the handle's.
    """
    xs, scales, weights = zip(*inputs, strict=True)
    routings, placed = [each.routing for each in handles], handles[rank].placement
    placed = placed._replace(source=source_of(placed.row_of, handles[rank].num_rows))
    given = None if scales[rank] is None else scales
    recv_x, recv_scales = oracle.cached_dispatch(xs, given, routings, rank)
    row_weights = None
    if weights[rank] is not None:
        recv_weights, _ = oracle.cached_dispatch(weights, None, routings, rank)
        row_weights = _taken(recv_weights, placed.source)
    rows = _permuted(recv_x, recv_scales, placed, column_major_scales)
    return ExpertDispatched(*rows, row_weights, handles[rank])


def combine(
    oracle: Normal,
    rows: Sequence[Tensor],
    handles: Sequence[ExpertHandle],
    rank: int,
    *,
    row_weights: Sequence[Tensor] | None = None,
    topk_weights: Sequence[Tensor] | None = None,
    bias: Bias = None,
    order: Order | None = None,
) -> Sums:
    """Sums, and weights that come back, for the tokens of `rank`.

    Each rank adds the rows that a token has there (`unpermute`) and rounds the sum to their dtype;
    then these sums are combined like the rows of a dispatch in the order of the sources.

    Args:
        oracle: The same operations in the order of the sources.
        rows: Each rank's `[M, H]`; also of another length: only rows that `row_of` names are read.
        handles: Each rank's handle, all of one dispatch.
        rank: The owner of the tokens.
        row_weights: Each rank's float32 `[M]`, which the rows are multiplied with, or None.
        topk_weights: Each rank's float32 `[M]`, or None: what comes back as it is.
        bias: None, `[T, H]`, or a pair of them (either may be None), dtype of `rows`.
        order: In which the sums of the ranks are added, as in a combine.

    Returns:
        `[T, H]`, and float32 `[T, K]` (the value of the row of each choice, 0 where it has none) or
        None.
    """
    row_of = [each.placement.row_of for each in handles]
    factors: Sequence[Tensor | None] = row_weights or [None] * len(handles)
    sums = [unpermute(*each) for each in zip(rows, row_of, factors, strict=True)]
    back = None
    if topk_weights is not None:
        back = [_taken(each, of) for each, of in zip(topk_weights, row_of, strict=True)]
    return oracle.combine(sums, [each.routing for each in handles], rank, back, bias, order)


def cast(given: RankInput, row_format: RowFormat, global_scale: Tensor | None = None) -> RankInput:
    """The input of a rank when its rows are cast on the way; formulas in `epjit.formats`."""
    x, scales = encode(given.x, row_format, global_scale)
    return replace(given, x=x, scales=scales)


def weigh_backward(
    grad: Tensor, rows: Tensor, row_weights: Tensor, source: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows that a combine multiplied with weights.

    Args:
        grad: `[M, H]`: the gradient of the sums, by a cached dispatch.
        rows: `[M, H]`, as they were combined.
        row_weights: float32 `[M]`.
        source: int32 `[M]`, from `place`.

    Returns:
        Of the rows `[M, H]`, weight times gradient, rounded once; of the weights float32 `[M]`, see
        `dot`. Both are 0 where `source` is -1, whatever lies there.
    """
    unused = source < 0
    of_rows = (row_weights[:, None] * grad.to(torch.float32)).to(grad.dtype)
    return of_rows.masked_fill(unused[:, None], 0), dot(grad, rows).masked_fill(unused, 0)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """float32 `[M]`: the dot product of each two rows, as a warp adds it.

    Lane `i` takes the 16-byte pieces `i`, `i + 32`, ... in order and adds the products of their
    elements one by one, from +0.0; then lanes at a distance of 16, 8, 4, 2 and 1 add what they
    have. Each product and each sum is rounded to fp32.

    Args:
        a: bfloat16 or float16 `[M, H]`.
        b: Likewise.
    """
    width = _LANE_BYTES // a.element_size()
    products = a.to(torch.float32) * b.to(torch.float32)
    missing = -products.shape[1] % (width * _LANES)
    pieces = torch.nn.functional.pad(products, (0, missing)).unflatten(1, (-1, _LANES, width))
    # The zeros behind a row add nothing: a sum that starts from +0.0 is never -0.0.
    sums = torch.zeros(pieces.shape[0], _LANES, dtype=torch.float32, device=a.device)
    for piece in pieces.unbind(dim=1):
        for element in piece.unbind(dim=2):
            sums = sums + element
    while sums.shape[1] > 1:
        low, high = sums.chunk(2, dim=1)
        sums = low + high
    return sums[:, 0]


def column_major(scales: Tensor) -> Tensor:
    """The same `[M, S]`, column by column, each padded to 16 bytes, as DeepGEMM reads it."""
    (columns,) = empty_on(scales.device)((by_columns(scales.dtype, *scales.shape),))
    by_column: Tensor = columns.copy_(scales)
    return by_column


def _permuted(
    x: Tensor, scales: Tensor | None, placed: Placement, column_major_scales: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows and scales by expert, as bytes: not every dtype has an indexing kernel."""
    num_topk = placed.row_of.shape[1]
    rows = permute(x.view(torch.uint8), placed.source, num_topk).view(x.dtype)
    if scales is None:
        return rows, None
    row_scales = permute(scales.view(torch.uint8), placed.source, num_topk).view(scales.dtype)
    return rows, column_major(row_scales) if column_major_scales else row_scales


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Values by their places in memory; 0 where there is none."""
    flat = torch.cat([values.flatten(), values.new_zeros(1)])
    outside = (index < 0) | (index >= values.numel())
    return flat[index.to(torch.int64).masked_fill(outside, values.numel())]
