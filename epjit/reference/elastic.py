"""Dispatch and combine of DeepEP 2's interface, token by token over all ranks at once.

As in `epjit.reference.intranode`, every function takes what all ranks have and returns what one
rank gets. These loops are the definition of the result, in both orders of rows:

- compact: a row for each token and rank, by source rank, then by token;
- expanded: a row for each choice, by local expert, then by source rank, token and `k`; the rows of
  each expert begin at a multiple of the alignment.

Words beside those of `intranode`: `M` = `num_max_tokens_per_rank`, by which a token's number is
``rank * M + token``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from epjit.calls import Bias, Describe
from epjit.handles import ElasticDispatched, EPHandle, row_bound
from epjit.reference.intranode import experts_per_rank, start_sum
from epjit.sizes import align


class RankInput(NamedTuple):
    """Inputs of one rank to `dispatch`.

    Attributes:
        x: `[T, H]`, any dtype.
        scales: `[T, S]`, any strides, or None.
        topk_idx: `[T, K]`; a value outside `[0, E)` selects nothing.
        topk_weights: float32 `[T, K]`, or None.
    """

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor | None


_Token: TypeAlias = "tuple[int, int, dict[int, int]]"
"""Source rank, token, and local expert of each choice."""


def dispatch(
    inputs: Sequence[RankInput],
    rank: int,
    *,
    num_experts: int,
    max_tokens: int,
    expert_alignment: int = 1,
    do_expand: bool = False,
    do_cpu_sync: bool = True,
) -> ElasticDispatched:
    """Results of `rank`; what is undefined there is zero here, and -1 where it is an index.

    Args:
        inputs: One entry a rank.
        rank: The receiver.
        num_experts: `E`.
        max_tokens: `M`.
        expert_alignment: Of each expert's rows and counts.
        do_expand: Rows by expert.
        do_cpu_sync: As many rows as arrive; else as many as ever could.
    """
    own, num_ranks = inputs[rank], len(inputs)
    num_local, num_topk = experts_per_rank(num_experts, num_ranks), own.topk_idx.shape[1]
    tokens = _received(inputs, rank, num_local)

    counts = [0] * num_local
    for _, _, chosen in tokens:
        for expert in chosen.values():
            counts[expert] += 1
    aligned = [align(count, expert_alignment) for count in counts]
    starts = list(itertools.accumulate(aligned, initial=0))

    num_tokens = len(tokens) if do_cpu_sync else num_ranks * max_tokens
    num_rows = num_tokens
    if do_expand and do_cpu_sync:
        num_rows = starts[-1]
    elif do_expand:
        num_rows = row_bound(num_tokens, min(num_topk, num_local), num_local, expert_alignment)

    rows, weights, metadata, idx = _placed(
        inputs, tokens, starts, (num_tokens, num_rows), max_tokens, do_expand=do_expand
    )

    def gather(tensors: Sequence[Tensor]) -> Tensor:
        out = _zeros(num_rows, tensors[0].shape[1], dtype=tensors[0].dtype)
        for row, place in enumerate(rows):
            if place >= 0:
                source, token, _ = tokens[place]
                out[row] = tensors[source][token]
        return out

    sources = [sum(source <= s for source, _, _ in tokens) for s in range(num_ranks)]
    ends = [begin + count for begin, count in zip(starts, counts, strict=False)]
    handle = EPHandle(
        do_expand=do_expand,
        num_experts=num_experts,
        expert_alignment=expert_alignment,
        num_max_tokens_per_rank=max_tokens,
        num_sms=0,
        topk_idx=own.topk_idx,
        psum_num_recv_tokens_per_scaleup_rank=_int32(sources),
        psum_num_recv_tokens_per_expert=_int32(ends if do_expand else starts[1:]),
        num_unaligned_recv_tokens_per_expert=_int32(counts),
        num_recv_tokens_per_expert_list=aligned if do_cpu_sync else [],
        recv_src_metadata=metadata,
        dst_buffer_slot_idx=_slots(own.topk_idx, rank, num_ranks, num_local, max_tokens),
        num_recv_tokens=num_tokens,
        num_expanded_tokens=num_rows if do_expand else 0,
    )
    return ElasticDispatched(
        recv_x=gather([each.x for each in inputs]),
        recv_scales=None
        if own.scales is None
        else gather([each.scales for each in inputs if each.scales is not None]),
        recv_topk_idx=None if do_expand else idx,
        recv_topk_weights=None if own.topk_weights is None else weights,
        handle=handle,
    )


def _placed(
    inputs: Sequence[RankInput],
    tokens: Sequence[_Token],
    starts: Sequence[int],
    sizes: tuple[int, int],
    max_tokens: int,
    *,
    do_expand: bool,
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """The token of each row, or -1; weights, metadata and choices as `dispatch` returns them.

    `sizes`: rows of the metadata, and rows.
    """
    num_tokens, num_rows = sizes
    choices = inputs[0].topk_idx
    num_topk = choices.shape[1]
    rows = [-1] * num_rows
    weights = _zeros(num_rows) if do_expand else _zeros(num_rows, num_topk)
    metadata = _none((num_tokens, num_topk + 2), torch.int32)
    idx = _none((num_tokens, num_topk), choices.dtype)
    free = list(starts[:-1])  # the next row of each expert
    for place, (source, token, chosen) in enumerate(tokens):
        given = inputs[source].topk_weights
        metadata[place, 0] = source * max_tokens + token
        metadata[place, 1] = source * num_topk + max(chosen)
        if not do_expand:
            rows[place] = place
        for k, expert in chosen.items():
            idx[place, k] = expert
            row = free[expert] if do_expand else place
            free[expert] += 1
            rows[row] = place
            metadata[place, 2 + k] = row if do_expand else expert
            if given is not None:
                weights[row if do_expand else (place, k)] = given[token, k]
    return rows, weights, metadata, idx


def combine(
    xs: Sequence[Tensor],
    handles: Sequence[EPHandle],
    rank: int,
    topk_weights: Sequence[Tensor] | None = None,
    bias: Bias = None,
    *,
    multiple_reduction: bool = True,
    ranks_a_domain: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums for the tokens of `rank`, in float32, rounded once.

    Added are `bias_0` (or +0.0), `bias_1`, then what each rank has of the token, in the order of
    the last `k` that the token has there: its row, or by expert its rows, summed in float32 in the
    order of `k` and rounded. By expert without `multiple_reduction`, instead, each row for itself,
    in the order of `k`, from whatever rank.

    Between NVLink domains what is added for a rank is first summed in each domain, in float32 from
    +0.0, ranks in ascending order, and rounded; then these sums are added, domains in ascending
    order. Rows that are each added for themselves are as in one domain.

    Args:
        xs: Each rank's rows; only those that the metadata of its handle names are read.
        handles: Each rank's handle, all of one dispatch.
        rank: The owner of the tokens.
        topk_weights: Each rank's float32 `[rows, K]`, by expert `[rows]`, or None.
        bias: None, `[T, H]`, or a pair of them (either may be None).
        multiple_reduction: Whether a rank may round what it sums.
        ranks_a_domain: Of each NVLink domain; None: there is one.

    Returns:
        `combined_x` `[T, H]`, and `combined_topk_weights` float32 `[T, K]` or None: of each choice
        what the rank of its expert passed for it, 0.0 where nothing is chosen.
    """
    own = handles[rank]
    (num_tokens, num_topk), max_tokens = own.topk_idx.shape, own.num_max_tokens_per_rank
    dtype = xs[rank].dtype
    acc = start_sum(bias, (num_tokens, xs[rank].shape[1]))
    weights = None if topk_weights is None else _zeros(num_tokens, num_topk)

    each_row = own.do_expand and not multiple_reduction
    parts: list[tuple[int, int, Tensor]] = []  # token, what it is ordered by, addend
    for peer, handle in enumerate(handles):
        num_received = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        for place, row in enumerate(handle.recv_src_metadata[:num_received].tolist()):
            number, last, *columns = row
            source, token = divmod(number, max_tokens)
            if source != rank:
                continue
            here = {k: column for k, column in enumerate(columns) if column >= 0}
            by = last % num_topk if ranks_a_domain is None else peer
            if not own.do_expand:
                parts.append((token, by, xs[peer][place]))
            elif each_row:
                parts.extend((token, k, xs[peer][column]) for k, column in here.items())
            elif here:
                total = sum(xs[peer][column].float() for column in here.values())
                parts.append((token, by, torch.as_tensor(total).to(dtype)))
            if topk_weights is not None and weights is not None:
                for k, column in here.items():
                    of_row = topk_weights[peer][column if own.do_expand else place]
                    weights[token, k] = of_row if own.do_expand else of_row[k]
    if ranks_a_domain is not None and not each_row:
        sums: dict[tuple[int, int], Any] = {}
        for token, peer, addend in sorted(parts, key=lambda part: part[:2]):
            domain = token, peer // ranks_a_domain
            sums[domain] = sums.get(domain, 0) + addend.float()
        parts = [(*domain, total.to(dtype)) for domain, total in sums.items()]
    for token, _, addend in sorted(parts, key=lambda part: part[:2]):
        acc[token] += addend.float()
    return acc.to(dtype), weights


def describe(call: Describe, rank: int, *, max_tokens: int, alignment: int) -> None:
    """Fills the tensors of a handle of `rank`, from what its dispatch in the normal mode has left.

    Args:
        call: See `Describe`.
        rank: This rank.
        max_tokens: `M`.
        alignment: Of each expert's rows and counts.
    """
    columns = call.recv_topk_idx if call.columns is None else call.columns
    assert columns is not None
    (num_rows, num_topk), num_ranks = columns.shape, call.source_ends.shape[0]
    counts = call.counts
    padding = -counts % alignment
    call.expert_ends.copy_((counts + padding).cumsum(dim=0))
    if call.columns is not None:
        call.expert_ends.sub_(padding)
    if call.recv_stats is not None:
        call.recv_stats.add_(counts)
    call.rank_ends.copy_(call.source_ends)
    if call.choices is not None:
        call.choices.copy_(call.topk_idx)

    row = torch.arange(num_rows, dtype=torch.int32, device="cpu")
    source = torch.bucketize(row, call.rank_ends, out_int32=True, right=True)
    k = torch.arange(num_topk, dtype=torch.int32, device="cpu")
    last = torch.where(columns >= 0, k, -1).amax(dim=1)
    call.metadata[:, 0] = source * max_tokens + call.recv_tokens
    call.metadata[:, 1] = source * num_topk + last
    call.metadata[:, 2:] = columns
    call.metadata[int(call.rank_ends[-1]) :] = -1

    num_experts = num_ranks * counts.shape[0]
    is_choice = (call.topk_idx >= 0) & (call.topk_idx < num_experts)
    ranks = call.topk_idx.to(torch.int64).div(counts.shape[0], rounding_mode="floor")
    ranks.masked_fill_(~is_choice, -1)
    comes_again = (ranks[:, :, None] == ranks[:, None, :]).triu(diagonal=1).any(dim=2)
    place = call.send_head.gather(1, ranks.clamp(min=0)) + rank * max_tokens
    call.slots.copy_(torch.where((ranks >= 0) & ~comes_again, place, -1))


def add_choices(rows: Tensor, biases: Sequence[Tensor | None], out: Tensor) -> None:
    """Adds biases, then the rows of the choices, in fp32 from +0.0, and rounds once.

    Args:
        rows: `[T, K, H]`.
        biases: `[T, H]` each, or None.
        out: `[T, H]`, written.
    """
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for addend in (*biases, *rows.unbind(dim=1)):
        if addend is not None:
            total += addend
    out.copy_(total)


def _received(inputs: Sequence[RankInput], rank: int, num_local: int) -> list[_Token]:
    """All that `rank` receives."""
    return [
        (source, token, chosen)
        for source, given in enumerate(inputs)
        for token, choices in enumerate(given.topk_idx.tolist())
        if (chosen := {k: e % num_local for k, e in enumerate(choices) if e // num_local == rank})
    ]


def _slots(topk_idx: Tensor, rank: int, num_ranks: int, num_local: int, max_tokens: int) -> Tensor:
    """`EPHandle.dst_buffer_slot_idx`."""
    slots, sent = _none(topk_idx.shape, torch.int32), [0] * num_ranks
    for token, choices in enumerate(topk_idx.tolist()):
        last = {e // num_local: k for k, e in enumerate(choices) if 0 <= e < num_ranks * num_local}
        for destination, k in last.items():
            slots[token, k] = rank * max_tokens + sent[destination]
            sent[destination] += 1
    return slots


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def _none(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Indices of nothing."""
    return torch.full(shape, -1, dtype=dtype, device="cpu")
