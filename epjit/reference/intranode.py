"""Layout, dispatch and combine of one NVLink domain, as index arithmetic over all ranks at once.

Every function takes the inputs of the whole group (a list with one entry a rank) and returns what
one rank gets. There is no communication here, so these lines are the definition of the result: the
GPU kernels and the CPU backend are compared with them bit for bit.

Words: `R` ranks, `E` experts (expert `e` lives on rank `e // (E // R)`), `T` tokens of this source
rank, `K` choices a token, `H` elements a row, `n` rows received, `N` = `num_worst_tokens`.
Received rows are ordered by source rank, then by source token; a token that chose several experts
of a rank is received once there. All tensors are CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epjit.calls import Bias, Order
from epjit.handles import Dispatched, IntranodeHandle
from epjit.sizes import align


@dataclass(frozen=True)
class RankInput:
    """Inputs of one rank to `dispatch`.

    Attributes:
        x: `[T, H]`, any dtype; rows are moved as bytes.
        scales: `[T, S]`, any dtype and strides, or None.
        topk_idx: `[T, K]` int32 or int64; a value outside `[0, E)` selects nothing. Or None.
        topk_weights: `[T, K]` float32; None exactly when `topk_idx` is None.
        is_token_in_rank: bool `[T, R]`; the rows this rank sends.
        num_tokens_per_expert: int32 `[E]`; the selections this rank announces.
    """

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    is_token_in_rank: Tensor
    num_tokens_per_expert: Tensor


def experts_per_rank(num_experts: int, num_ranks: int) -> int:
    """Number of experts a rank owns.

    Raises:
        ValueError: `num_experts` is not a positive multiple of `num_ranks`.
    """
    if num_experts <= 0 or num_experts % num_ranks:
        raise ValueError(
            f"num_experts={num_experts} is not a positive multiple of the {num_ranks} ranks; "
            "every rank owns the same number of experts"
        )
    return num_experts // num_ranks


def layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count where the tokens of one rank go.

    Args:
        topk_idx: `[T, K]` int32 or int64; a value outside `[0, num_experts)` selects nothing.
        num_experts: `E`.
        num_ranks: `R`.

    Returns:
        `num_tokens_per_rank` int32 `[R]` (a token counts once a rank), `num_tokens_per_expert`
        int32 `[E]` (each selection counts), `is_token_in_rank` bool `[T, R]`.

    Raises:
        ValueError: `num_experts` is not a positive multiple of `num_ranks`.
    """
    num_local = experts_per_rank(num_experts, num_ranks)
    token, column = torch.nonzero((topk_idx >= 0) & (topk_idx < num_experts), as_tuple=True)
    expert = topk_idx[token, column].to(torch.int64)

    num_tokens_per_expert = torch.bincount(expert, minlength=num_experts).to(torch.int32)
    is_token_in_rank = torch.zeros(
        (topk_idx.shape[0], num_ranks), dtype=torch.bool, device=topk_idx.device
    )
    is_token_in_rank[token, expert // num_local] = True
    num_tokens_per_rank = is_token_in_rank.sum(dim=0, dtype=torch.int32)
    return num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank


def dispatch(
    inputs: Sequence[RankInput],
    rank: int,
    *,
    num_experts: int,
    expert_alignment: int = 1,
    num_worst_tokens: int | Sequence[int] = 0,
) -> Dispatched:
    """Results of `rank`.

    Args:
        inputs: One entry a rank.
        rank: The receiver.
        num_experts: `E`.
        expert_alignment: Each count of the returned list is rounded up to a multiple of it.
        num_worst_tokens: 0, or the number of rows of every output; of each rank, when they differ.
            Rows that come after so many, in their order, are left out.

    Returns:
        See `Dispatched`; what is undefined there is zero here.

    Raises:
        ValueError: `num_experts` does not fit the ranks.
    """
    num_local = experts_per_rank(num_experts, len(inputs))
    first_expert = rank * num_local
    own = inputs[rank]

    rank_prefix_matrix = fitting_rows(inputs, num_worst_tokens).cumsum(dim=0).to(torch.int32)
    worst = rooms(num_worst_tokens, len(inputs))[rank]
    num_rows = worst or int(rank_prefix_matrix[-1, rank])

    tokens = received_tokens(inputs, rank, num_worst_tokens)
    recv_topk_idx = recv_topk_weights = None
    if own.topk_idx is not None and own.topk_weights is not None:
        idx = _gather([_given("topk_idx", each.topk_idx) for each in inputs], tokens)
        weights = _gather([_given("topk_weights", each.topk_weights) for each in inputs], tokens)
        local_idx, local_weights = local_choices(idx, weights, rank, num_local)
        recv_topk_idx = pad_rows(local_idx, num_rows, value=-1)
        recv_topk_weights = pad_rows(local_weights, num_rows)

    recv_expert_counts = torch.stack([each.num_tokens_per_expert for each in inputs])[
        :, first_expert : first_expert + num_local
    ].sum(dim=0, dtype=torch.int32)
    aligned_counts = [align(count, expert_alignment) for count in recv_expert_counts.tolist()]

    num_tokens = [each.x.shape[0] for each in inputs]
    handle = IntranodeHandle(
        rank_prefix_matrix=rank_prefix_matrix,
        source_tokens=torch.tensor(num_tokens, dtype=torch.int32, device="cpu"),
        recv_expert_counts=recv_expert_counts,
        recv_src_idx=pad_rows(torch.cat(tokens).to(torch.int32), num_rows),
        is_token_in_rank=own.is_token_in_rank,
        send_head=positions(own.is_token_in_rank),
    )
    return Dispatched(
        recv_x=pad_rows(_gather([each.x for each in inputs], tokens), num_rows),
        recv_scales=None
        if own.scales is None
        else pad_rows(
            _gather([_given("scales", each.scales) for each in inputs], tokens), num_rows
        ),
        recv_topk_idx=recv_topk_idx,
        recv_topk_weights=recv_topk_weights,
        num_recv_tokens_per_expert_list=[] if worst else aligned_counts,
        handle=handle,
    )


def local_choices(
    topk_idx: Tensor, topk_weights: Tensor, rank: int, num_local: int
) -> tuple[Tensor, Tensor]:
    """Choices as the local experts of `rank`, and their weights: -1 and 0 for those of others."""
    local_idx = topk_idx - rank * num_local
    is_other = (local_idx < 0) | (local_idx >= num_local)
    return local_idx.masked_fill(is_other, -1), topk_weights.masked_fill(is_other, 0.0)


def rooms(num_worst_tokens: int | Sequence[int], num_ranks: int) -> list[int]:
    """`num_worst_tokens` of each rank; 0 = room for whatever comes."""
    if isinstance(num_worst_tokens, int):
        return [num_worst_tokens] * num_ranks
    return list(num_worst_tokens)


def fitting_rows(inputs: Sequence[RankInput], num_worst_tokens: int | Sequence[int]) -> Tensor:
    """Rows of each source (dim 0) that each rank (dim 1) has room for: the first ones."""
    sent = torch.stack([each.is_token_in_rank.sum(dim=0) for each in inputs])
    ends = sent.cumsum(dim=0)
    for rank, room in enumerate(rooms(num_worst_tokens, len(inputs))):
        if room:
            ends[:, rank].clamp_(max=room)
    return ends.diff(dim=0, prepend=torch.zeros_like(ends[:1]))


def received_tokens(
    inputs: Sequence[RankInput], rank: int, num_worst_tokens: int | Sequence[int]
) -> list[Tensor]:
    """Tokens of each source that `rank` receives and has room for."""
    counts = fitting_rows(inputs, num_worst_tokens)[:, rank].tolist()
    return [
        torch.nonzero(each.is_token_in_rank[:, rank]).flatten()[:count]
        for each, count in zip(inputs, counts, strict=True)
    ]


def cached_dispatch(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    handles: Sequence[IntranodeHandle],
    rank: int,
) -> tuple[Tensor, Tensor | None]:
    """Rows and scales of `rank` when another payload follows the routing of the handles.

    Args:
        xs: Each rank's `[T, H]`; dtype and `H` need not be those of the first dispatch.
        scales: Each rank's `[T, S]`, or None.
        handles: Each rank's handle.
        rank: The receiver.

    Returns:
        `recv_x` `[n or N, H]` and `recv_scales` `[n or N, S]` or None; as many rows as the
        handle has, those of `[n, N)` are zeros.

    Raises:
        ValueError: A payload has another number of tokens than the handle's.
    """
    own = handles[rank]
    source_tokens = own.source_tokens.tolist()
    for source, (x, num_tokens) in enumerate(zip(xs, source_tokens, strict=True)):
        if x.shape[0] != num_tokens:
            raise ValueError(
                f"rank {source} passes x with {x.shape[0]} tokens, but its handle was made with "
                f"{num_tokens}; a cached dispatch needs the same tokens"
            )
    tokens = [own.recv_src_idx[rows].to(torch.int64) for rows in _segments(own, rank)]
    recv_x = pad_rows(_gather(xs, tokens), own.num_rows)
    return recv_x, None if scales is None else pad_rows(_gather(scales, tokens), own.num_rows)


def combine(
    xs: Sequence[Tensor],
    handles: Sequence[IntranodeHandle],
    rank: int,
    topk_weights: Sequence[Tensor] | None = None,
    bias: Bias = None,
    order: Order | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums for the tokens of `rank`: of each, over the ranks that received it.

    The sum is float32 in a fixed order: `bias_0` (or +0.0), then `bias_1`, then the ranks in
    ascending order, each once; it is rounded once, to nearest even, to the dtype of `x`. A rank
    that did not receive the token adds nothing, not even a zero.

    With `order` the ranks of each row come in the order of the last choice of the token there.

    Args:
        xs: Each rank's `[n or N, H]`, bfloat16, float16 or float32.
        handles: Each rank's handle, all of one dispatch.
        rank: The owner of the tokens.
        topk_weights: Each rank's float32 `[n or N, K]`, or None.
        bias: None, `[T, H]`, or a pair of them (either may be None), dtype of `x`.
        order: The choices of `rank`, or None.

    Returns:
        `combined_x` `[T, H]`, and `combined_topk_weights` float32 `[T, K]` (elementwise sum from
        +0.0, same order of ranks) or None.

    Raises:
        ValueError: A rank passes another number of rows than its handle has.
    """
    where, tokens = returned_rows(xs, handles, rank)

    def total(rows_of_ranks: Sequence[Tensor], bias: Bias, order: Order | None) -> Tensor:
        acc = start_sum(bias, (handles[rank].num_tokens, rows_of_ranks[rank].shape[1]))
        for peer, chosen in _passes(order, tokens):
            rows = rows_of_ranks[peer][where[peer]][chosen].to(torch.float32)
            acc[tokens[peer][chosen]] += rows  # a token is once among a rank's rows
        return acc

    combined_x = total(xs, bias, order).to(xs[rank].dtype)
    return combined_x, None if topk_weights is None else total(topk_weights, None, None)


def _passes(order: Order | None, tokens: Sequence[Tensor]) -> Iterator[tuple[int, Tensor | slice]]:
    """Ranks in the order in which they are added, each with those of its rows that are added."""
    num_ranks = len(tokens)
    if order is None:
        yield from ((peer, slice(None)) for peer in range(num_ranks))
        return
    num_local = order.num_experts // num_ranks
    last = torch.full((order.topk_idx.shape[0], num_ranks), -1, device="cpu")
    for k, expert in enumerate(order.topk_idx.to(torch.int64).unbind(dim=1)):
        (token,) = torch.nonzero((expert >= 0) & (expert < order.num_experts), as_tuple=True)
        last[token, expert[token] // num_local] = k
    for turn in last.argsort(dim=1).unbind(dim=1):
        yield from ((peer, turn[token] == peer) for peer, token in enumerate(tokens))


def returned_rows(
    xs: Sequence[Tensor], handles: Sequence[IntranodeHandle], rank: int
) -> tuple[list[slice], list[Tensor]]:
    """Which rows of each rank's `x` go back to `rank`, and the tokens that they belong to.

    Raises:
        ValueError: A rank passes another number of rows than its handle has.
    """
    for peer, (x, handle) in enumerate(zip(xs, handles, strict=True)):
        if x.shape[0] != handle.num_rows:
            raise ValueError(
                f"rank {peer} passes x with {x.shape[0]} rows, but its handle has "
                f"{handle.num_rows}; combine takes one row for each received row"
            )
    where = [_segments(handle, peer)[rank] for peer, handle in enumerate(handles)]
    return where, [
        handle.recv_src_idx[rows].to(torch.int64)
        for handle, rows in zip(handles, where, strict=True)
    ]


def start_sum(bias: Bias, shape: tuple[int, int]) -> Tensor:
    """`bias_0 + bias_1` in float32, or +0.0 where there is none."""
    bias_0, bias_1 = bias if isinstance(bias, tuple) else (bias, None)
    acc = (
        torch.zeros(shape, dtype=torch.float32, device="cpu")
        if bias_0 is None
        else bias_0.to(torch.float32, copy=True)
    )
    return acc if bias_1 is None else acc + bias_1.to(torch.float32)


def positions(chosen: Tensor) -> Tensor:
    """int32 `[T, ...]`: how many tokens before `t` are chosen, or -1 if `t` is not."""
    return (chosen.cumsum(dim=0) - 1).masked_fill(~chosen, -1).to(torch.int32)


def _segments(handle: IntranodeHandle, rank: int) -> list[slice]:
    """Segments of the received rows of `rank`, one for each source rank."""
    ends = handle.rank_prefix_matrix[:, rank].tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _gather(sources: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """Rows `tokens[i]` of `sources[i]`, one source after the other, bit for bit; no view."""
    dtype, width = sources[0].dtype, sources[0].shape[1]
    # As bytes, so that no dtype needs an indexing kernel of its own. Flat first: torch calls a
    # tensor with one column contiguous whatever its stride, and then cannot view it as bytes. Then
    # a copy: a single row with a stride stays a view when it is made flat.
    flat = [source.reshape(-1).clone(memory_format=torch.contiguous_format) for source in sources]
    rows = [
        each.view(torch.uint8).view(source.shape[0], width * dtype.itemsize)[token]
        for each, source, token in zip(flat, sources, tokens, strict=True)
    ]
    # The base is what is returned: autograd refuses to write to a view that an operator returns.
    received = torch.empty((sum(map(len, rows)), width), dtype=dtype, device="cpu")
    elements = received.view(-1).view(torch.uint8)
    torch.cat(rows, out=elements.view(len(received), width * dtype.itemsize))
    return received


def pad_rows(rows: Tensor, num_rows: int, *, value: int = 0) -> Tensor:
    """`rows` followed by rows of `value`, `num_rows` in all."""
    if num_rows == rows.shape[0]:
        return rows
    padded = torch.zeros((num_rows, *rows.shape[1:]), dtype=rows.dtype, device="cpu")
    if value:
        padded.fill_(value)
    padded[: rows.shape[0]] = rows  # not torch.cat, which takes no FP8 under torch.autocast
    return padded


def _given(name: str, tensor: Tensor | None) -> Tensor:
    """`tensor`, which all ranks pass or none."""
    if tensor is None:
        raise ValueError(f"{name} is given on some ranks and not on others")
    return tensor
