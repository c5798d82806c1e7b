"""References of DeepEP 2's own test scripts: what must arrive, and what must come back."""

from typing import Any

import torch
import torch.distributed as dist

from deep_ep.utils.envs import get_global_seed

__all__ = ["combine", "dispatch", "generate_pre_combine_data", "ordered_accumulate"]


def dispatch(
    x: Any,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    num_max_tokens_per_rank: int,
    num_experts: int,
) -> tuple[Any, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gathers the inputs of all ranks and keeps what goes to this one.

    Args:
        x: `[T, H]`, or a tuple of that with scales.
        topk_idx: `[T, K]`.
        topk_weights: float32 `[T, K]`, or None.
        num_max_tokens_per_rank: a bound of `T`, the same on all ranks.
        num_experts: over all ranks.

    Returns:
        Rows (as `x`), local experts or -1, weights, numbers of the tokens (ascending), rows from
        each rank.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_local = num_experts // num_ranks
    choices = _gathered(topk_idx, num_max_tokens_per_rank, -1)
    is_here = (choices >= 0) & (choices // num_local == rank)
    (number,) = torch.nonzero(is_here.any(dim=1), as_tuple=True)

    def received(own: torch.Tensor) -> torch.Tensor:
        return _gathered(own, num_max_tokens_per_rank, 0)[number]

    rows = tuple(received(each) for each in x) if isinstance(x, tuple) else received(x)
    idx = torch.where(is_here, choices - rank * num_local, -1)[number]
    weights = None if topk_weights is None else received(topk_weights)
    per_rank = torch.bincount(number // num_max_tokens_per_rank, minlength=num_ranks)
    return rows, idx, weights, number.to(torch.int32), per_rank


def _gathered(own: torch.Tensor, num_rows: int, value: int) -> torch.Tensor:
    """Rows of all ranks, each filled up to so many."""
    padded = torch.full((num_rows, own.shape[1]), value, dtype=torch.float32).to(own.dtype)
    padded[: own.shape[0]] = own
    flat = padded.view(torch.uint8)  # FP8 is no dtype of NCCL's
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return torch.cat(everyone).view(own.dtype)


def generate_pre_combine_data(
    src_token_global_idx: torch.Tensor, num_max_tokens_per_rank: int, num_topk: int, hidden: int
) -> torch.Tensor:
    """Rows that every rank can make: of a token's number, a choice and a column.

    Args:
        src_token_global_idx: `[n]`.
        num_max_tokens_per_rank: accepted.
        num_topk: choices.
        hidden: columns.

    Returns:
        bfloat16 `[n, num_topk, hidden]` in [-1, 1).
    """
    del num_max_tokens_per_rank
    token = src_token_global_idx.to(torch.int64)[:, None, None]
    k = torch.arange(num_topk, dtype=torch.int64)[None, :, None]
    column = torch.arange(hidden, dtype=torch.int64)[None, None, :]
    mixed = token * 1_000_003 + k * 65_537 + column * 257 + get_global_seed() * 7_919
    mixed = (mixed ^ (mixed >> 7)) * 2_654_435_761 % (1 << 32)
    return (mixed.to(torch.float32) / (1 << 31) - 1).to(torch.bfloat16)


def ordered_accumulate(
    data: torch.Tensor, initial_value: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums over the choices, ascending, in float32, rounded once.

    Args:
        data: `[n, num_topk, hidden]`.
        initial_value: `[n, hidden]`, which comes first, or None.
    """
    total = torch.zeros_like(data[:, 0], dtype=torch.float32)
    if initial_value is not None:
        total += initial_value.float()
    for addend in data.unbind(dim=1):
        total += addend.float()
    return total.to(data.dtype)


def combine(
    y: torch.Tensor,
    topk_idx: torch.Tensor,
    num_scaleout_ranks: int,
    num_scaleup_ranks: int,
    num_experts: int,
    bias: Any,
    reduce_in_local: bool,
    reduce_in_scaleup: bool,
) -> torch.Tensor:
    """Sums for each token what its choices have made of it, rounded where a rank may round.

    Args:
        y: `[T, K, H]`, zero where nothing is chosen.
        topk_idx: `[T, K]`.
        num_scaleout_ranks: NVLink domains.
        num_scaleup_ranks: ranks of one.
        num_experts: over all ranks.
        bias: None, `[T, H]`, or a tuple of two.
        reduce_in_local: a rank sums its rows of a token first.
        reduce_in_scaleup: a domain then does.

    Returns:
        `[T, H]` in the dtype of y.
    """
    num_local = num_experts // (num_scaleout_ranks * num_scaleup_ranks)
    groups = [(reduce_in_local, num_local), (reduce_in_scaleup, num_local * num_scaleup_ranks)]
    for reduces, size in groups:
        if reduces:
            y = _reduced(y, torch.where(topk_idx < 0, -1, topk_idx // size))
    biases = bias if isinstance(bias, tuple) else (bias,)
    initial = torch.zeros_like(y[:, 0], dtype=torch.float32)
    for each in biases:
        if each is not None:
            initial += each.float()
    return ordered_accumulate(y, initial)


def _reduced(y: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """The choices of each group summed in the last one of them; the others become zero."""
    out = torch.zeros_like(y)
    for last in range(y.shape[1]):
        is_last = group[:, last] >= 0
        is_last &= ~(group[:, last + 1 :] == group[:, last : last + 1]).any(dim=1)
        is_member = (group == group[:, last : last + 1]) & is_last[:, None]
        total = ordered_accumulate(torch.where(is_member[:, :, None], y, 0))
        out[:, last] = torch.where(is_last[:, None], total, 0)
    return out
