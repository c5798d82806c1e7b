"""Scenarios of an `ElasticBuffer`: the calls of each rank of a test."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist

from epjit import Buffer, ElasticBuffer
from epjit.handles import EPHandle
from epjit.reference import elastic as reference
from epjit.reference.expert_major import unpermute
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
    for seed in range(num_rounds):
        case = random_round(group.size(), 3000 + seed, num_sms=num_sms, max_tokens=max_tokens)
        check_round(buffers[seed % 2], case)
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

    Padding becomes zeros in each replay: rows of earlier ones lie there.

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
            do_zero_padding=expand,
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
        compare(prefix, received, made.want[rank], zero_padding=expand)
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
    """`in_turns`, one process a rank."""
    on_gpu = set_up(group, environ)
    size = Buffer.get_low_latency_rdma_size_hint(16, 512, group.size(), 4 * group.size())
    low_latency = Buffer(group, 0, size, low_latency_mode=True, explicitly_destroy=True)
    buffer = make_buffer(group, num_max_tokens_per_rank=16)
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
        in_turns(low_latency, buffer, 40, num_sms=12)
    synchronize(low_latency)
    buffer.destroy()
    low_latency.destroy()


def in_turns(
    low_latency: Buffer,
    buffer: ElasticBuffer,
    num_rounds: int,
    *,
    num_sms: int,
    meet: Callable[[], object] = lambda: None,
) -> None:
    """Calls of a low-latency `Buffer` and of an `ElasticBuffer` in turns; sums that are exact.

    Every second round is a replay of two graphs, of a pair of each, in either order; without a GPU
    the same pairs run eagerly.

    Args:
        low_latency: Of this rank.
        buffer: Of this rank, with room for 16 tokens of 512 elements.
        num_rounds: Rounds to compare.
        num_sms: Of the second one's kernels.
        meet: Called before a capture and after it.
    """
    rank, num_ranks, device = buffer.rank_idx, buffer.num_ranks, low_latency.device
    tokens, num_topk, num_experts = 10, 3, 4 * num_ranks
    x = torch.zeros((tokens, 512), dtype=torch.bfloat16).to(device)
    idx = torch.zeros((tokens, num_topk), dtype=torch.int64).to(device)
    ones = torch.ones((tokens, num_topk), dtype=torch.float32).to(device)
    own: dict[str, Any] = {"num_experts": num_experts, "num_max_tokens_per_rank": 16}
    own |= {"num_sms": num_sms, "do_cpu_sync": False}

    def fill(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens; returns what the two sums must be."""
        generator = torch.Generator().manual_seed(seed + num_ranks * rank)
        values = torch.randint(-8, 8, x.shape, generator=generator)
        choices = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :num_topk]
        x.copy_(values.to(x.dtype))
        idx.copy_(choices)
        num_dest = torch.tensor([len({e // 4 for e in row}) for row in choices.tolist()])
        return (num_dest[:, None] * values).to(x.dtype), (num_topk * values).to(x.dtype)

    def dispatch_low() -> Any:
        received = low_latency.low_latency_dispatch(x, idx, 16, num_experts, use_fp8=False)
        return received[0], received[2]

    def combine_low(packed: torch.Tensor, handle: Any) -> torch.Tensor:
        return low_latency.low_latency_combine(packed, idx, ones, handle)[0]

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        rows, _, _, handle, _ = buffer.dispatch(x, idx, **own)
        low = dispatch_low()
        return buffer.combine(rows, handle)[0], combine_low(*low)

    def pair() -> torch.Tensor:
        rows, _, _, handle, _ = buffer.dispatch(x, idx, **own)
        return buffer.combine(rows, handle)[0]

    def pair_low() -> torch.Tensor:
        return combine_low(*dispatch_low())

    fill(-1)
    eager()
    settle(low_latency)
    settle(buffer._buffer)
    pairs = [pair, pair_low]
    if device.type == "cuda":
        pairs = [replay_of(each, meet) for each in pairs]
    for seed in range(num_rounds):
        wanted = fill(seed)
        if seed % 2 == 0:
            sums = eager()
        elif seed % 4 == 1:
            sums = pairs[0](), pairs[1]()
        else:
            back = pairs[1]()
            sums = pairs[0](), back
        settle(low_latency)
        settle(buffer._buffer)
        for name, got, want in zip(("combine", "low-latency combine"), sums, wanted, strict=True):
            assert_rows_equal(got, want, f"rank {rank}, round {seed}: {name}")


PUBLIC = [each.name for each in fields(EPHandle) if each.name != "routing"]


def public_copy(handle: EPHandle) -> EPHandle:
    """A handle that is made of copies of the public fields alone."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)

    return EPHandle(**{name: copied(getattr(handle, name)) for name in PUBLIC})


def from_public_fields(
    buffer: ElasticBuffer, *, expand: bool, waits: bool, num_sms: int
) -> EPHandle:
    """Every call with a handle that only has copies of the public fields, beside the handle itself.

    Ranks have different numbers of tokens, the second none. By expert the metadata is then
    rewritten, as LightLLM does: a sum for each token in place of rows.

    Args:
        buffer: Of this rank.
        expand: Rows by expert.
        waits: Whether the host waits in the dispatch.
        num_sms: Of the kernels.

    Returns:
        The last handle of copies.
    """
    rank, num_ranks, device = buffer.rank_idx, buffer.num_ranks, buffer._buffer.device
    num_tokens = 0 if rank == 1 else 12 - rank
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(num_tokens, 4 * num_ranks, generator=generator)
    idx = scores.argsort(dim=1)[:, :3].masked_fill(scores[:, :3] < 0.2, -1)
    x = to_device(torch.randn(num_tokens, 64, generator=generator).to(torch.bfloat16), device)
    weights = to_device(torch.rand(num_tokens, 3, generator=generator), device)
    layout: dict[str, Any] = {"do_expand": expand, "do_zero_padding": expand}
    rows, _, row_weights, handle, _ = buffer.dispatch(
        x,
        to_device(idx, device),
        weights,
        num_experts=4 * num_ranks,
        num_max_tokens_per_rank=12,
        expert_alignment=4,
        num_sms=num_sms,
        do_cpu_sync=waits,
        **layout,
    )
    settle(buffer._buffer)
    arrived = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    defined = arrived if not expand else int(handle.psum_num_recv_tokens_per_expert[-1])

    def calls(own: EPHandle) -> list[Any]:
        return [
            lambda: buffer.dispatch(x, handle=own)[0][:arrived],
            lambda: buffer.dispatch(x, topk_weights=weights, handle=own, **layout)[0][:defined],
            lambda: buffer.dispatch(x, topk_weights=weights, handle=own, **layout)[2][:defined],
            lambda: buffer.combine(rows, own, row_weights)[0],
            lambda: buffer.combine(rows, own, row_weights)[1],
        ]

    def result(call: Any) -> torch.Tensor:
        got: torch.Tensor = call()
        settle(buffer._buffer)
        return got.cpu()

    def compare_calls(own: EPHandle) -> None:
        for i, (call, wanted) in enumerate(zip(calls(own), want, strict=True)):
            assert_rows_equal(result(call), wanted, f"rank {rank}, call {i}")

    want = [result(call) for call in calls(handle)]
    for i, wanted in enumerate(want):  # each call is the first one of a handle
        got = result(calls(public_copy(handle))[i])
        assert_rows_equal(got, wanted, f"rank {rank}, call {i} first")
    kept = public_copy(handle)
    compare_calls(kept)
    if not expand:
        kept.recv_src_metadata = kept.recv_src_metadata[:arrived].clone()
        compare_calls(kept)
    elif buffer.allow_multiple_reduction:
        own = public_copy(handle)
        row_of = own.recv_src_metadata[:, 2:].cpu()
        sums = torch.zeros(row_of.shape[0], 64, dtype=torch.bfloat16)
        sums[:arrived] = unpermute(rows.cpu(), row_of[:arrived])
        row_of.fill_(-1)
        row_of[:arrived, 0] = torch.arange(arrived, dtype=torch.int32)
        own.recv_src_metadata[:, 2:] = to_device(row_of, device)
        combined, *_ = buffer.combine(to_device(sums, device), own)
        settle(buffer._buffer)
        assert_rows_equal(combined, want[3], f"rank {rank}, rewritten")
    return kept


def handles_of_public_fields(group: dist.ProcessGroup, environ: Mapping[str, str]) -> None:
    """`from_public_fields` in all forms, one process a rank."""
    set_up(group, environ)
    for each in (True, False):
        buffer = make_buffer(group, allow_multiple_reduction=each)
        for expand, waits in itertools.product((False, True), repeat=2):
            from_public_fields(buffer, expand=expand, waits=waits, num_sms=12)
        buffer.destroy()


def of_one_rounding(buffer: ElasticBuffer, *, num_sms: int) -> torch.Tensor:
    """Sums by expert that have one rounding, with two biases: this rank's part of 24 tokens.

    Args:
        buffer: Made without `allow_multiple_reduction`; 24 are a multiple of its ranks.
        num_sms: Of its kernels.

    Returns:
        Rows on the CPU, the same for a token however many ranks there are.
    """
    num_tokens, num_experts, num_topk, hidden = 24, 16, 6, 128
    generator = torch.Generator().manual_seed(3)
    x, *biases = torch.randn(3, num_tokens, hidden, generator=generator).to(torch.bfloat16)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    idx = scores.argsort(dim=1)[:, :num_topk].masked_fill(scores[:, :num_topk] < 0.1, -1)
    weights = torch.rand(num_tokens, num_topk, generator=generator)
    scale = torch.rand(num_experts, generator=generator)
    rank, num_ranks, device = buffer.rank_idx, buffer.num_ranks, buffer._buffer.device

    def own(whole: torch.Tensor) -> torch.Tensor:
        return to_device(whole.view(num_ranks, num_tokens // num_ranks, -1)[rank], device)

    rows, _, row_weights, handle, _ = buffer.dispatch(
        own(x),
        own(idx),
        own(weights),
        num_experts=num_experts,
        num_max_tokens_per_rank=num_tokens,
        num_sms=num_sms,
        do_expand=True,
    )
    assert row_weights is not None
    counts = handle.num_unaligned_recv_tokens_per_expert.cpu()
    expert = torch.arange(num_experts).view(num_ranks, -1)[rank].repeat_interleave(counts)
    made = rows.cpu().float() * (row_weights.cpu() * scale[expert])[:, None]
    made_rows = to_device(made.to(torch.bfloat16), device)
    bias = own(biases[0]), own(biases[1])
    combined, _, _ = buffer.combine(made_rows, handle, bias=bias, num_sms=num_sms)
    settle(buffer._buffer)
    return combined.cpu()
