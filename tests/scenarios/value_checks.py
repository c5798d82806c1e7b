"""A rank's calls on a Buffer that looks at values (EPJIT_CHECK=1), on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from epjit import Buffer
from tests.harness.data import ROUTING_KINDS
from tests.harness.ranks import settle
from tests.rounds.expert_major import ExpertRound, check_expert_round
from tests.rounds.low_latency import LowLatencyRound, check_low_latency_round
from tests.rounds.normal import Round, check_round, layout_of

TOKENS, HIDDEN, TOPK = 6, 256, 4


def accepts(buffer: Buffer) -> None:
    """Rounds of every routing without choices that are no expert, with every way to return."""
    sizes = {"num_tokens": (9, 0, 13, 4)[: buffer.group_size], "num_experts": 12}
    for seed, kind in enumerate(ROUTING_KINDS[:-1]):
        how, worst = ("sync", "async", "comm")[seed % 3], seed % 2 == 1
        check_round(buffer, Round(**sizes, kind=kind, seed=seed, how=how, worst=worst, num_sms=4))
        check_expert_round(buffer, ExpertRound(**sizes, kind=kind, seed=seed, worst=worst))
        if buffer.low_latency_mode:
            how = ("sync", "async", "hook")[seed % 3]
            case = LowLatencyRound(**sizes, kind=kind, seed=seed, how=how, is_finite=True)
            check_low_latency_round(buffer, case)


def refuses(buffer: Buffer) -> None:
    """Each wrong value, at the rank that passes it, before it sends anything."""
    num_ranks = buffer.group_size
    num_experts = 2 * num_ranks

    def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu").to(buffer.device)

    idx = tensor([[(t + k) % num_experts for k in range(TOPK)] for t in range(TOKENS)], torch.int64)
    weights = tensor([[0.25] * TOPK] * TOKENS, torch.float32)
    x = tensor([[1.0] * HIDDEN] * TOKENS, torch.bfloat16)
    layout = layout_of(buffer, idx, num_experts)
    per_rank, per_domain, in_rank, per_expert = layout.values()
    topk = {"topk_idx": idx, "topk_weights": weights}
    *_, handle, _ = buffer.dispatch(x, **layout, **topk, num_worst_tokens=TOKENS * num_ranks)
    assert handle is not None
    settle(buffer)

    def changed(tensor: torch.Tensor, place: Any, value: Any) -> torch.Tensor:
        copy = tensor.clone()
        copy[place] = value
        return copy

    def dispatch(**changes: Any) -> Callable[[], object]:
        return lambda: buffer.dispatch(x, **{**layout, **topk, **changes})

    def replaced(slot: int, place: Any, value: Any) -> tuple[torch.Tensor, ...]:
        return (*handle[:slot], changed(handle[slot], place, value), *handle[slot + 1 :])

    outside = rf"topk_idx\[2, 1\] is {num_experts}, but with num_experts={num_experts} a choice"
    beyond = changed(idx, (2, 1), num_experts)
    in_rank_slot, tokens_slot = (4, 3) if per_domain is None else (0, 1)
    far = replaced(tokens_slot, 0 if per_domain is None else (0, 0), 99)
    wrong: list[tuple[str, Callable[[], object]]] = [
        (outside, lambda: buffer.get_dispatch_layout(beyond, num_experts)),
        (outside, dispatch(topk_idx=beyond)),
        (r"topk_idx\[0, 0\] is -2", dispatch(topk_idx=changed(idx, (0, 0), -2))),
        (
            r"topk_weights\[5, 3\] is nan",
            dispatch(topk_weights=changed(weights, (5, 3), torch.nan)),
        ),
        (
            r"is_token_in_rank\[1, 0\] is \w+, but topk_idx\[1\] is \[",
            dispatch(is_token_in_rank=changed(in_rank, (1, 0), not bool(in_rank[1, 0]))),
        ),
        (
            r"num_tokens_per_rank is \[99, .*but topk_idx says",
            dispatch(num_tokens_per_rank=changed(per_rank, 0, 99)),
        ),
        (
            r"num_tokens_per_expert is \[99, .*but topk_idx says",
            dispatch(num_tokens_per_expert=changed(per_expert, 0, 99)),
        ),
        (
            r"num_tokens_per_rank is \[99, .*but is_token_in_rank says",
            dispatch(
                num_tokens_per_rank=changed(per_rank, 0, 99), topk_idx=None, topk_weights=None
            ),
        ),
        (
            rf"handle\[{tokens_slot}\] .*is 99, but must be 0 or up to",
            lambda: buffer.combine(x.repeat(num_ranks, 1), far),
        ),
        (
            r"handle.* (goes|does not go) there by is_token_in_rank",
            lambda: buffer.dispatch(
                x, handle=replaced(in_rank_slot, (0, 0), not bool(in_rank[0, 0]))
            ),
        ),
    ]
    if per_domain is None:
        broken = changed(x, (0, 2), torch.nan)
        wrong += [
            (r"x\[0, 2\] is nan", lambda: buffer.dispatch(broken, **layout, **topk, cast="fp8")),
            (r"x\[0, 2\] is nan", lambda: buffer.dispatch(broken, handle=handle, cast="mxfp8")),
        ]
    wrong += _by_expert(buffer, x, idx, weights, num_experts)
    if per_domain is not None:
        wrong.append(
            (
                r"num_tokens_per_rdma_rank is \[99, .*but topk_idx says",
                dispatch(num_tokens_per_rdma_rank=changed(per_domain, 0, 99)),
            )
        )
    if buffer.low_latency_mode:
        wrong += _low_latency(buffer, x, idx, weights, num_experts)
    for says, call in wrong:
        with pytest.raises(ValueError, match=says):
            call()
    check_round(buffer, Round(num_tokens=(5,) * num_ranks, num_experts=12, kind="holes", num_sms=4))


def _by_expert(
    buffer: Buffer, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> list[tuple[str, Callable[[], object]]]:
    """Wrong values of the calls on rows by expert."""
    rows, _, handle, _ = buffer.expert_dispatch(x, idx, weights, num_experts=num_experts)
    assert isinstance(rows, torch.Tensor)
    beyond, infinite, broken = idx.clone(), x.clone(), weights.clone()
    beyond[3, 0], infinite[1, 7], broken[0, 2] = num_experts, torch.inf, torch.nan
    row_of, source, *rest = handle.placement
    far_rows, far_source = row_of.clone(), source.clone()
    far_rows[0, 0], far_source[0] = len(source), row_of.numel()

    def dispatch(*given: Any, **options: Any) -> Callable[[], object]:
        return lambda: buffer.expert_dispatch(*given, num_experts=num_experts, **options)

    return [
        (rf"topk_idx\[3, 0\] is {num_experts}", dispatch(x, beyond, weights)),
        (r"topk_weights\[0, 2\] is nan", dispatch(x, idx, broken)),
        (r"x\[1, 7\] is inf", dispatch(infinite, idx, weights, cast="fp8")),
        (
            r"handle\.placement\.row_of: entry \[0, 0\] is",
            lambda: buffer.expert_combine(rows, (handle.routing, (far_rows, source, *rest))),
        ),
        (
            r"handle\.placement\.source: entry \[0\] is",
            lambda: buffer.expert_dispatch(x, handle=(handle.routing, (row_of, far_source, *rest))),
        ),
    ]


def _low_latency(
    buffer: Buffer, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> list[tuple[str, Callable[[], object]]]:
    """Wrong values of the low-latency calls."""

    def dispatch(rows: torch.Tensor, choices: torch.Tensor) -> Any:
        return buffer.low_latency_dispatch(rows, choices, 8, num_experts, use_fp8=False)

    recv_x, _, handle, *_ = dispatch(x, idx)
    assert isinstance(recv_x, torch.Tensor)
    settle(buffer)
    far, infinite, broken = idx.clone(), x.clone(), weights.clone()
    far[3, 0], infinite[1, 7], broken[0, 2] = num_experts, torch.inf, torch.nan
    # What lies behind src_info in its storage, as a handle that somebody has written to.
    src_info = handle[0]
    first = src_info.storage_offset() + src_info.numel()
    written = src_info.as_strided((1,), (1,), first + buffer.rank)

    def with_another_count() -> object:
        written.fill_(3)
        try:
            return buffer.low_latency_combine(recv_x, idx, weights, handle)
        finally:
            written.fill_(TOKENS)

    return [
        (rf"topk_idx\[3, 0\] is {num_experts}, but", lambda: dispatch(x, far)),
        (r"x\[1, 7\] is inf, but must be finite", lambda: dispatch(infinite, idx)),
        (
            r"topk_idx\[3, 0\] is",
            lambda: buffer.low_latency_combine(recv_x, far, weights, handle),
        ),
        (
            r"topk_weights\[0, 2\] is nan",
            lambda: buffer.low_latency_combine(recv_x, idx, broken, handle),
        ),
        (r"this rank has dispatched 3 tokens, but it was 6", with_another_count),
    ]
