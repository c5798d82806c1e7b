"""Scenarios of an `ElasticBuffer`: the calls of each rank of a test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from epjit import Buffer, ElasticBuffer
from epjit.reference import elastic as reference
from tests.harness.data import assert_rows_equal, to_device
from tests.harness.ranks import settle
from tests.rounds.elastic import Round, check_round, compare, make, random_round
from tests.scenarios.normal import replay_of, set_up, synchronize

SIZE = 16 << 20


def make_buffer(group: dist.ProcessGroup, **options: Any) -> ElasticBuffer:
    """A buffer that will be destroyed."""
    return ElasticBuffer(group, SIZE, explicitly_destroy=True, **options)


def random_rounds(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    num_rounds: int,
    max_tokens: int,
    num_sms: int = 12,
) -> int:
    """Rounds on two buffers in turn, of which one lets each row travel; one process a rank.

    Returns:
        Rounds that were compared.
    """
    set_up(group, environ)
    buffers = [make_buffer(group, allow_multiple_reduction=each) for each in (True, False)]
    has_own_order = buffers[0].num_rdma_ranks > 1  # of additions
    for seed in range(num_rounds):
        case = random_round(group.size(), 3000 + seed, num_sms=num_sms, max_tokens=max_tokens)
        check_round(buffers[seed % 2], replace(case, is_exact=case.is_exact or has_own_order))
    for buffer in buffers:
        buffer.destroy()
    return num_rounds


def graph(
    group: dist.ProcessGroup, environ: Mapping[str, str], num_replays: int, tokens: int
) -> int:
    """`replays` in both orders of rows, one process a rank.

    Returns:
        Replays that were compared.
    """
    on_gpu = set_up(group, environ)
    buffer = make_buffer(group)
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
        for expand in (False, True):
            replays(buffer, num_replays, tokens, 12, expand=expand)
    synchronize(buffer._buffer)
    buffer.destroy()
    return 2 * num_replays


def replays(
    buffer: ElasticBuffer,
    num_replays: int,
    tokens: int,
    num_sms: int,
    *,
    expand: bool,
    meet: Callable[[], object] = lambda: None,
) -> None:
    """One capture of a dispatch and its combine; replays with changed inputs, eager calls between.

    Without a GPU the same step runs eagerly each time.

    Args:
        buffer: Of this rank.
        num_replays: Replays to compare.
        tokens: Of each rank, the same, as a graph has it.
        num_sms: Of the kernels.
        expand: Rows by expert.
        meet: Called before a capture and after it.
    """
    rank, device = buffer.rank_idx, buffer._buffer.device
    case = Round(
        (tokens,) * buffer.num_ranks,
        max_tokens=tokens,
        num_experts=8 * buffer.num_ranks,
        waits=False,
        expand=expand,
        alignment=8,
        num_sms=num_sms,
    )
    own = make(case).world[rank]
    x, idx = to_device(own.x, device), to_device(own.topk_idx, device)
    assert own.topk_weights is not None
    weights = to_device(own.topk_weights, device)

    def step() -> Any:
        rows, got_idx, row_weights, handle, _ = buffer.dispatch(
            x,
            idx,
            weights,
            num_experts=case.num_experts,
            num_max_tokens_per_rank=tokens,
            expert_alignment=case.alignment,
            num_sms=num_sms,
            do_cpu_sync=False,
            do_expand=expand,
        )
        combined, back, _ = buffer.combine(rows, handle, row_weights)
        return (rows, got_idx, row_weights, handle), combined, back

    step()
    settle(buffer._buffer)
    again = replay_of(step, meet) if device.type == "cuda" else step
    for seed in range(num_replays):
        changed = replace(case, seed=seed, kind="holes" if seed % 2 else "random")
        made = make(changed)
        own = made.world[rank]
        for place, value in ((x, own.x), (idx, own.topk_idx), (weights, own.topk_weights)):
            assert value is not None
            place.copy_(value)
        received, combined, back = again()
        settle(buffer._buffer)
        prefix = f"rank {rank}, replay {seed}"
        compare(prefix, received, made.want[rank], column_major=False)
        want, want_weights = reference.combine(
            [each.recv_x for each in made.want],
            [each.handle for each in made.want],
            rank,
            [each.recv_topk_weights for each in made.want if each.recv_topk_weights is not None],
        )
        assert_rows_equal(combined.cpu() + 0.0, want + 0.0, f"{prefix}: combined_x")
        assert want_weights is not None
        assert_rows_equal(back, want_weights, f"{prefix}: combined_topk_weights")
        if seed % 10 == 0:
            meet()
            check_round(buffer, replace(changed, waits=True))
            meet()


def beside_low_latency(group: dist.ProcessGroup, environ: Mapping[str, str]) -> None:
    """Calls of both in turns, on one process a rank; sums that are exact."""
    set_up(group, environ)
    num_ranks, hidden = group.size(), 512
    size = Buffer.get_low_latency_rdma_size_hint(16, hidden, num_ranks, 4 * num_ranks)
    low_latency = Buffer(group, 0, size, low_latency_mode=True, explicitly_destroy=True)
    buffer = make_buffer(group, num_max_tokens_per_rank=16)
    device = low_latency.device
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed + num_ranks * group.rank())
        x = torch.randint(-8, 8, (10, hidden), generator=generator).to(torch.bfloat16)
        scores = torch.rand(10, 4 * num_ranks, generator=generator)
        choices = scores.argsort(dim=1)[:, :3].contiguous()
        on_gpu, idx = x.to(device), choices.to(device)
        rows, _, _, handle, _ = buffer.dispatch(on_gpu, idx, num_experts=4 * num_ranks)
        packed, _, low, _, _ = low_latency.low_latency_dispatch(
            on_gpu, idx, 16, 4 * num_ranks, use_fp8=False
        )
        out, _, _ = buffer.combine(rows, handle)
        ones = torch.ones(idx.shape, dtype=torch.float32, device=device)
        back, _, _ = low_latency.low_latency_combine(packed, idx, ones, low)
        per_token = torch.tensor([len({e // 4 for e in row}) for row in choices.tolist()])
        assert_rows_equal(out, (per_token[:, None] * x.float()).to(torch.bfloat16), f"{seed}: out")
        assert_rows_equal(back, (3 * x.float()).to(torch.bfloat16), f"{seed}: low latency")
    buffer.destroy()
    low_latency.destroy()
