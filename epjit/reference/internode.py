"""Layout, dispatch and combine between NVLink domains, as index arithmetic over all ranks at once.

As in `epjit.reference.intranode`, every function takes the inputs of the whole group and returns
what one rank gets, and these lines are the definition of the result. What is received does not
depend on how the ranks are cut into domains; the sums of `combine` and the handle do.

Words beside those of `intranode`: `D` domains of `L` ranks each. `domains[n][l]` is the number of
the rank with local index `l` in domain `n`; the ranks of a domain need not follow each other. A
token that goes to any rank of domain `n` travels once, from its source with local index `j` to
`domains[n][j]`, through the *channel* of these two; a channel has its tokens in ascending order. A
domain also has channels to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from epjit.calls import Bias
from epjit.config import MAX_DOMAINS, MAX_RANKS
from epjit.handles import Dispatched, InternodeHandle, IntranodeHandle
from epjit.reference import intranode
from epjit.reference.intranode import RankInput, pad_rows, positions

Domains: TypeAlias = Sequence[Sequence[int]]


def check_domains(domains: Domains, num_ranks: int) -> None:
    """Checks that the domains cover the ranks, each once, and are equally large.

    Raises:
        ValueError: They do not, or there are more of them or larger ones than the kernels take.
    """
    sizes = {len(domain) for domain in domains}
    if sorted(rank for domain in domains for rank in domain) != list(range(num_ranks)):
        raise ValueError(
            f"the NVLink domains {_words(domains)} do not hold each of {num_ranks} ranks once"
        )
    if len(sizes) != 1 or max(sizes) > MAX_RANKS or len(domains) > MAX_DOMAINS:
        raise ValueError(
            f"the NVLink domains are {_words(domains)}; there may be up to {MAX_DOMAINS} of up to "
            f"{MAX_RANKS} ranks each, and all must have the same number of ranks"
        )


def place_of(rank: int, domains: Domains) -> tuple[int, int]:
    """The domain of a rank, and its local index there."""
    for number, domain in enumerate(domains):
        if rank in domain:
            return number, list(domain).index(rank)
    raise ValueError(f"rank {rank} is in none of the NVLink domains {_words(domains)}")


def layout(
    topk_idx: Tensor, num_experts: int, domains: Domains
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count where the tokens of one rank go.

    Args:
        topk_idx: `[T, K]` int32 or int64; a value outside `[0, num_experts)` selects nothing.
        num_experts: `E`.
        domains: Ranks of each domain.

    Returns:
        `num_tokens_per_rank` int32 `[R]`, `num_tokens_per_rdma_rank` int32 `[D]` (a token counts
        once a domain), `num_tokens_per_expert` int32 `[E]`, `is_token_in_rank` bool `[T, R]`.
    """
    num_ranks = sum(len(domain) for domain in domains)
    per_rank, per_expert, in_rank = intranode.layout(topk_idx, num_experts, num_ranks)
    per_domain = in_domain(in_rank, domains).sum(dim=0, dtype=torch.int32)
    return per_rank, per_domain, per_expert, in_rank


def notify(
    inputs: Sequence[RankInput],
    rank: int,
    domains: Domains,
    *,
    expert_counts: Tensor,
    num_worst_tokens: int | Sequence[int] = 0,
) -> InternodeHandle:
    """The handle of `rank`: everything about the routing that it ever needs.

    Args:
        inputs: One entry a rank.
        rank: Whose handle.
        domains: Ranks of each domain.
        expert_counts: int32 `[E // R]`, its `recv_expert_counts`.
        num_worst_tokens: 0, or `N`; of each rank, when they differ.

    Returns:
        See `InternodeHandle`; what is undefined there is zero here.
    """
    domain, local = place_of(rank, domains)
    in_rank = inputs[rank].is_token_in_rank
    to_domain = in_domain(in_rank, domains)
    shape = (len(domains), in_rank.shape[0] + 1)
    send_tokens = torch.zeros(shape, dtype=torch.int32, device="cpu")
    for number in range(len(domains)):
        tokens = torch.nonzero(to_domain[:, number]).flatten()
        send_tokens[number, : len(tokens)] = tokens
        send_tokens[number, -1] = len(tokens)

    channels = [in_domain(each.is_token_in_rank, domains)[:, domain] for each in inputs]
    lengths = torch.stack([channel.sum(dtype=torch.int32) for channel in channels])
    channel_tokens = lengths[torch.tensor(domains, device="cpu")]

    fits = intranode.fitting_rows(inputs, num_worst_tokens)
    rows_from = fits[:, rank]
    meta = []  # [rows, 2] of each source
    received = intranode.received_tokens(inputs, rank, num_worst_tokens)
    for tokens, channel in zip(received, channels, strict=True):
        indices = positions(channel)[tokens]
        meta.append(torch.stack([indices, tokens.to(torch.int32)], dim=1))
    recv_src_meta = torch.empty((sum(map(len, meta)), 8), dtype=torch.uint8, device="cpu")
    torch.cat(meta, out=recv_src_meta.view(torch.int32))

    passing = []
    for source in (each[local] for each in domains):
        sent = inputs[source].is_token_in_rank[channels[source]]  # [length, R]
        head = torch.zeros(len(sent), dtype=torch.int64, device="cpu")
        place = positions(sent)
        kept = sent & (place < fits[source])
        for bit, receiver in enumerate(domains[domain]):
            head |= kept[:, receiver].to(torch.int64) << bit
        own = place[:, rank].masked_fill(~kept[:, rank], 0)
        passing.append(head | own.to(torch.int64) << 8)
    send_nvl_head = torch.cat(passing)

    worst = intranode.rooms(num_worst_tokens, len(inputs))[rank]
    num_rows = worst or len(recv_src_meta)
    num_passing = len(domains[domain]) * worst or len(send_nvl_head)
    return InternodeHandle(
        is_token_in_rank=in_rank,
        send_tokens=send_tokens,
        channel_tokens=channel_tokens,
        send_head=positions(in_rank),
        recv_rdma_rank_prefix_sum=channel_tokens[:, local].cumsum(dim=0).to(torch.int32),
        recv_expert_counts=expert_counts,
        recv_gbl_rank_prefix_sum=rows_from.cumsum(dim=0).to(torch.int32),
        recv_src_meta=pad_rows(recv_src_meta, num_rows),
        send_rdma_head=positions(to_domain),
        send_nvl_head=pad_rows(send_nvl_head[:num_passing].to(torch.int32), num_passing),
    )


def dispatch(
    inputs: Sequence[RankInput],
    rank: int,
    domains: Domains,
    *,
    num_experts: int,
    expert_alignment: int = 1,
    num_worst_tokens: int | Sequence[int] = 0,
) -> Dispatched:
    """Results of `rank`: the rows of `intranode.dispatch`, with another handle.

    Args:
        inputs: One entry a rank.
        rank: The receiver.
        domains: Ranks of each domain.
        num_experts: `E`.
        expert_alignment: Each count of the returned list is rounded up to a multiple of it.
        num_worst_tokens: As in `intranode.dispatch`.

    Returns:
        See `Dispatched`; its handle is an `InternodeHandle`.

    Raises:
        ValueError: `num_experts` or the domains do not fit the ranks.
    """
    check_domains(domains, len(inputs))
    received = intranode.dispatch(
        inputs,
        rank,
        num_experts=num_experts,
        expert_alignment=expert_alignment,
        num_worst_tokens=num_worst_tokens,
    )
    assert received.handle is not None  # it is no cached one
    handle = notify(
        inputs,
        rank,
        domains,
        expert_counts=received.handle.recv_expert_counts,
        num_worst_tokens=num_worst_tokens,
    )
    return received._replace(handle=handle)


def cached_dispatch(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    handles: Sequence[InternodeHandle],
    rank: int,
) -> tuple[Tensor, Tensor | None]:
    """Rows and scales of `rank` when another payload follows the routing of the handles.

    See `intranode.cached_dispatch`.
    """
    return intranode.cached_dispatch(xs, scales, _flat(handles), rank)


def combine(
    xs: Sequence[Tensor],
    handles: Sequence[InternodeHandle],
    rank: int,
    domains: Domains,
    topk_weights: Sequence[Tensor] | None = None,
    bias: Bias = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums for the tokens of `rank`: of each, over the domains that received it.

    Each domain's rows are summed in float32 from +0.0, local ranks in ascending order, and the sum
    is rounded to the dtype of `x`. These sums are added in float32 to `bias_0` (or +0.0) and
    `bias_1`, domains in ascending order, and the result is rounded once more. A domain that did not
    receive the token adds nothing, not even a zero. Roundings are to nearest even.

    Args:
        xs: Each rank's `[n or N, H]`, bfloat16, float16 or float32.
        handles: Each rank's handle, all of one dispatch.
        rank: The owner of the tokens.
        domains: Ranks of each domain.
        topk_weights: Each rank's float32 `[n or N, K]`, or None.
        bias: None, `[T, H]`, or a pair of them (either may be None), dtype of `x`.

    Returns:
        `combined_x` `[T, H]`, and `combined_topk_weights` float32 `[T, K]` (the same nested sums
        from +0.0, without rounding) or None.

    Raises:
        ValueError: A rank passes another number of rows than its handle has.
    """
    where, tokens = intranode.returned_rows(xs, _flat(handles), rank)

    def total(rows_of_ranks: Sequence[Tensor], bias: Bias) -> Tensor:
        like = rows_of_ranks[rank]
        acc = intranode.start_sum(bias, (handles[rank].num_tokens, like.shape[1]))
        for domain in domains:
            partial = torch.zeros(acc.shape, dtype=torch.float32, device="cpu")
            for peer in domain:
                partial[tokens[peer]] += rows_of_ranks[peer][where[peer]].to(torch.float32)
            received = torch.cat([tokens[peer] for peer in domain]).unique()
            acc[received] += partial[received].to(like.dtype).to(torch.float32)
        return acc

    combined_x = total(xs, bias).to(xs[rank].dtype)
    return combined_x, None if topk_weights is None else total(topk_weights, None)


def _flat(handles: Sequence[InternodeHandle]) -> list[IntranodeHandle]:
    """The handles that one NVLink domain of all ranks would have."""
    source_tokens = torch.tensor([handle.num_tokens for handle in handles], device="cpu")
    return [
        IntranodeHandle(
            # Only the own column is looked at.
            rank_prefix_matrix=handle.recv_gbl_rank_prefix_sum[:, None].expand(-1, len(handles)),
            source_tokens=source_tokens,
            recv_expert_counts=handle.recv_expert_counts,
            recv_src_idx=handle.recv_src_meta.contiguous().view(torch.int32)[:, 1],
            is_token_in_rank=handle.is_token_in_rank,
            send_head=handle.send_head,
        )
        for handle in handles
    ]


def in_domain(is_token_in_rank: Tensor, domains: Domains) -> Tensor:
    """Whether a token goes to any rank of a domain: bool `[T, D]`."""
    return is_token_in_rank[:, torch.tensor(domains, device="cpu")].any(dim=2)


def _words(domains: Domains) -> str:
    """The ranks of each domain, to print."""
    return ", ".join(str(list(domain)) for domain in domains)
