"""One round of an `ElasticBuffer`'s calls, compared bit for bit with the brute-force reference.

As in `tests.rounds.normal`, every rank builds the inputs of all ranks from a seed.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from epjit import ElasticBuffer
from epjit.handles import ElasticDispatched, EPHandle
from epjit.reference import elastic as reference
from epjit.sizes import align
from tests.harness.data import (
    ROUTING_KINDS,
    SCALE_LAYOUTS,
    RoutingKind,
    ScaleLayout,
    assert_rows_equal,
    fp8_payload,
    payload,
    random_payload,
    routing,
    to_device,
    topk_weights,
)
from tests.harness.ranks import line_up, settle

KINDS: list[RoutingKind] = [kind for kind in ROUTING_KINDS if kind != "duplicate_experts"]


@dataclass(frozen=True)
class Round:
    """Sizes and choices of one round; the same on all ranks.

    Attributes:
        num_tokens: Of each rank.
        max_tokens: M.
        hidden: Elements a row.
        num_experts: Over all ranks, at least twice as many as choices.
        num_topk: Choices a token.
        kind: Routing; no expert twice.
        seed: Of everything random.
        fp8: Rows of one byte with scales of this layout, or None for bfloat16.
        scale_dtype: Of the scales.
        index_dtype: Of topk_idx.
        with_weights: Whether weights travel.
        waits: Whether the host waits.
        expand: Rows by expert.
        alignment: expert_alignment.
        column_major: Layout of the received scales.
        copies: do_handle_copy.
        num_biases: 0, 1 or 2.
        num_sms: Of dispatch and combine.
        how: sync, event (an event before), async, or both.
        zero_padding: do_zero_padding, by expert.
    """

    num_tokens: tuple[int, ...]
    max_tokens: int = 32
    hidden: int = 256
    num_experts: int = 16
    num_topk: int = 4
    kind: RoutingKind = "random"
    seed: int = 0
    fp8: ScaleLayout | None = None
    scale_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    with_weights: bool = True
    waits: bool = True
    expand: bool = False
    alignment: int = 1
    column_major: bool = False
    copies: bool = True
    num_biases: int = 0
    num_sms: int = 4
    how: str = "sync"
    zero_padding: bool = False


# Of three ranks: no tokens on all or on some, only -1, one expert, a rank without rows, M of 1.
EDGES = [
    replace(case, num_experts=3 * case.num_experts)
    for case in (
        Round((0, 0, 0)),
        Round((5, 0, 1), kind="all_holes", num_biases=1),
        Round((5, 0, 1), kind="all_holes", expand=True, waits=False, num_biases=2),
        Round((0, 32, 3), kind="hot_expert", expand=True, alignment=8),
        Round((4, 4, 4), kind="empty_rank", expand=True, waits=False, num_experts=24),
        Round((0, 0, 0), expand=True, waits=False, fp8="padded", column_major=True),
        Round((0, 0, 0), expand=True, fp8="column_major", column_major=True),
        Round((1, 0, 0), waits=False, max_tokens=1),
    )
]

# What kernels are compiled for, few: (hidden, num_topk, fp8, index_dtype).
_SHAPES = (
    (128, 1, True, torch.int64),
    (256, 2, False, torch.int32),
    (512, 5, True, torch.int32),
    (1024, 8, False, torch.int64),
)


def random_round(num_ranks: int, seed: int, *, num_sms: int, max_tokens: int) -> Round:
    """A round that differs from others in much; deterministic in `seed`."""
    rng = random.Random(seed)
    hidden, num_topk, is_fp8, index_dtype = rng.choice(_SHAPES)
    experts_per_rank = rng.choice((1, 2, 8)) * -(-2 * num_topk // num_ranks)
    return Round(
        num_tokens=tuple(
            0 if rng.random() < 0.15 else rng.randint(1, max_tokens) for _ in range(num_ranks)
        ),
        max_tokens=max_tokens + rng.randrange(3),
        hidden=hidden,
        num_experts=num_ranks * experts_per_rank,
        num_topk=num_topk,
        kind=rng.choice(KINDS),
        seed=seed,
        fp8=rng.choice(SCALE_LAYOUTS) if is_fp8 else None,
        scale_dtype=rng.choice((torch.float32, torch.int32)),
        index_dtype=index_dtype,
        with_weights=rng.random() < 0.8,
        waits=rng.random() < 0.6,
        expand=rng.random() < 0.5,
        alignment=rng.choice((1, 4, 128)),
        column_major=is_fp8 and rng.random() < 0.5,
        copies=rng.random() < 0.5,
        num_biases=rng.randrange(3),
        num_sms=num_sms,
        how=rng.choice(("sync", "event", "async", "both")),
        zero_padding=rng.random() < 0.5,
    )


@dataclass(frozen=True)
class Made:
    """Inputs of all ranks, and what must come of them; read only, for threads share it.

    Attributes:
        world: Of the dispatch.
        want: Its results, of every rank.
        others: Of the cached dispatch of plain rows.
        want_others: Its results.
        outputs: Rows of every rank for combine, with NaN where nothing is read.
        weights: The same, of weights, or None.
    """

    world: list[reference.RankInput]
    want: list[ElasticDispatched]
    others: list[reference.RankInput]
    want_others: list[ElasticDispatched]
    outputs: list[Tensor]
    weights: list[Tensor] | None


_making = threading.Lock()


def make(case: Round) -> Made:
    """Made once for the threads of a process."""
    with _making:
        return _make(case)


@functools.lru_cache(maxsize=4)
def _make(case: Round) -> Made:
    world = [_inputs(case, rank) for rank in range(len(case.num_tokens))]
    others = [
        given._replace(
            x=random_payload(
                len(given.x), case.hidden // 2, torch.float16, seed=case.seed * 64 + rank
            ),
            scales=None,
        )
        for rank, given in enumerate(world)
    ]

    def dispatched(inputs: list[reference.RankInput], *, expand: bool) -> list[ElasticDispatched]:
        return [
            reference.dispatch(
                inputs,
                rank,
                num_experts=case.num_experts,
                max_tokens=case.max_tokens,
                expert_alignment=case.alignment,
                do_expand=expand,
                do_cpu_sync=case.waits,
            )
            for rank in range(len(inputs))
        ]

    want = dispatched(world, expand=case.expand)
    outputs, weights = [], []
    for rank, each in enumerate(want):
        is_read = defined_rows(each.handle)
        seed = case.seed * 64 + 32 + rank
        rows = random_payload(len(each.recv_x), case.hidden, torch.bfloat16, seed=seed)
        # Sums that tell in which order they were added.
        rows[:, ::2] = (4 * rows[:, ::2]).round().remainder(3) - 1
        rows[:, ::4] *= 2.0**24
        outputs.append(rows.masked_fill_(~is_read[:, None], float("nan")))
        num_columns = 1 if case.expand else case.num_topk
        of_rows = topk_weights(len(each.recv_x), num_columns, seed=seed)
        of_rows.masked_fill_(~is_read[:, None], float("nan"))
        weights.append(of_rows[:, 0] if case.expand else of_rows)
    return Made(
        world,
        want,
        others,
        dispatched(others, expand=False),
        outputs,
        weights if case.with_weights else None,
    )


def _inputs(case: Round, rank: int) -> reference.RankInput:
    tokens = case.num_tokens[rank]
    if case.fp8 is None:
        x, scales = payload(rank, tokens, case.hidden, torch.bfloat16), None
    else:
        x, scales = fp8_payload(
            rank, tokens, case.hidden, layout=case.fp8, scale_dtype=case.scale_dtype
        )
    idx = routing(
        case.kind,
        num_tokens=tokens,
        num_experts=case.num_experts,
        num_topk=case.num_topk,
        num_ranks=len(case.num_tokens),
        seed=case.seed * 64 + rank,
        dtype=case.index_dtype,
    )
    weights = topk_weights(tokens, case.num_topk, seed=case.seed * 64 + rank)
    return reference.RankInput(x, scales, idx, weights if case.with_weights else None)


def defined_rows(handle: EPHandle, *, zero_padding: bool = False) -> Tensor:
    """Rows that a combine may read, and padding between experts that is zeros: bool `[rows]`."""
    if not handle.do_expand:
        num_received = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        return torch.arange(handle.num_recv_tokens) < num_received
    named = handle.recv_src_metadata[:, 2:]
    rows = torch.zeros(handle.num_expanded_tokens, dtype=torch.bool)
    rows[named[named >= 0].long()] = True
    if zero_padding:
        ends = handle.psum_num_recv_tokens_per_expert
        rows[: align(int(ends[-1]), handle.expert_alignment)] = True
    return rows


def check_round(buffer: ElasticBuffer, case: Round) -> None:
    """A dispatch, cached ones in both orders, and a combine; then every result.

    Raises:
        AssertionError: Names rank, tensor, row and column of the first difference.
    """
    rank, made = buffer.rank_idx, make(case)
    beneath = buffer._buffer
    device, own = beneath.device, made.world[rank]

    def on_device(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else to_device(tensor, device)

    def call(method: Any, *args: Any, **options: Any) -> Any:
        if case.how in ("event", "both"):
            options |= {"previous_event": buffer.capture(), "allocate_on_comm_stream": True}
        is_async = case.how in ("async", "both")
        *results, event = method(
            *args, async_with_compute_stream=is_async, num_sms=case.num_sms, **options
        )
        assert (event.event is not None) == is_async
        if is_async:
            event.current_stream_wait()
        return results

    idx: Any = on_device(own.topk_idx)
    x, scales, weights = (on_device(each) for each in (own.x, own.scales, own.topk_weights))
    output, other = on_device(made.outputs[rank]), on_device(made.others[rank].x)
    output_weights = None if made.weights is None else on_device(made.weights[rank])
    biases = tuple(
        random_payload(
            case.num_tokens[rank], case.hidden, torch.bfloat16, seed=case.seed * 64 + 48 + i
        )
        for i in range(case.num_biases)
    )
    biases_on_device = tuple(to_device(bias, device) for bias in biases)
    num_local = case.num_experts // buffer.num_ranks
    stats = torch.full((num_local,), 7, dtype=torch.int32).to(device)
    rows: Any = x if scales is None else (x, scales)
    zero_padding = case.expand and case.zero_padding

    line_up(beneath)
    first = call(
        buffer.dispatch,
        rows,
        idx,
        weights,
        stats,
        num_experts=case.num_experts,
        num_max_tokens_per_rank=case.max_tokens,
        expert_alignment=case.alignment,
        do_cpu_sync=case.waits,
        do_handle_copy=case.copies,
        do_expand=case.expand,
        do_zero_padding=zero_padding,
        use_tma_aligned_col_major_sf=case.column_major,
    )
    handle = first[-1]
    cached = call(buffer.dispatch, other, handle=handle)
    again = call(
        buffer.dispatch,
        rows,
        topk_weights=weights,
        handle=handle,
        do_expand=case.expand,
        do_zero_padding=zero_padding,
        use_tma_aligned_col_major_sf=case.column_major,
    )
    combined = call(
        buffer.combine,
        output,
        handle,
        topk_weights=output_weights,
        bias=_as_bias(biases_on_device),
    )
    settle(beneath)

    prefix, want = f"rank {rank}, seed {case.seed}", made.want[rank]
    assert (handle.topk_idx is idx) == (not case.copies)
    assert cached[-1] is again[-1] is handle
    options = {"column_major": case.column_major, "zero_padding": zero_padding}
    compare(f"{prefix}: first", first, want, **options)
    compare(f"{prefix}: again", again, want, **options)
    other_want = made.want_others[rank]._replace(recv_topk_weights=None)
    compare(f"{prefix}: cached", cached, other_want)
    _compare_handles(prefix, handle, want.handle, own.topk_idx)
    counts = want.handle.num_unaligned_recv_tokens_per_expert
    assert_rows_equal(stats, counts + 7, f"{prefix}: stats")
    want_x, want_weights = reference.combine(
        made.outputs,
        [each.handle for each in made.want],
        rank,
        made.weights,
        _as_bias(biases),
        multiple_reduction=buffer.allow_multiple_reduction,
        ranks_a_domain=buffer.num_nvlink_ranks if buffer.num_rdma_ranks > 1 else None,
    )
    # + 0.0: where only -0.0 is added, what comes out is either zero.
    assert_rows_equal(combined[0].cpu() + 0.0, want_x + 0.0, f"{prefix}: combined_x")
    assert (combined[1] is None) == (want_weights is None)
    if want_weights is not None:
        assert_rows_equal(combined[1], want_weights, f"{prefix}: combined_topk_weights")


def _as_bias(biases: tuple[Tensor, ...]) -> Any:
    return (None, *biases, biases)[len(biases)] if len(biases) < 2 else biases


def compare(
    prefix: str,
    got: Sequence[Any],
    want: ElasticDispatched,
    *,
    column_major: bool = False,
    zero_padding: bool = False,
) -> None:
    """All that is defined of the results of a dispatch.

    Args:
        prefix: Of messages.
        got: Results of a dispatch.
        want: Of the reference.
        column_major: Whether scales lie column by column.
        zero_padding: Whether the padding between experts is defined.

    Raises:
        AssertionError: Names tensor, row and column of the first difference.
    """
    rows, idx, weights, _ = got
    handle = want.handle
    defined = defined_rows(handle, zero_padding=zero_padding)
    x, scales = rows if isinstance(rows, tuple) else (rows, None)
    named = {
        "recv_x": (x, want.recv_x),
        "recv_scales": (scales, want.recv_scales),
        "recv_topk_idx": (idx, want.recv_topk_idx),
        "recv_topk_weights": (weights, want.recv_topk_weights),
    }
    for name, (have, wanted) in named.items():
        assert (have is None) == (wanted is None), f"{prefix}: {name}"
        if wanted is None:
            continue
        assert have.shape == wanted.shape, f"{prefix}: {name} {have.shape} {wanted.shape}"
        assert_rows_equal(have.cpu()[defined], wanted[defined], f"{prefix}: {name}")
    if idx is not None:
        assert bool((idx.cpu()[~defined] == -1).all())
    if scales is not None:
        num_rows, num_scales = scales.shape
        want_strides = (1, align(num_rows, 4)) if column_major else (num_scales, 1)
        assert scales.stride() == want_strides, f"{prefix}: strides of the scales"


def _compare_handles(prefix: str, got: EPHandle, want: EPHandle, topk_idx: Tensor) -> None:
    arrived = int(want.psum_num_recv_tokens_per_scaleup_rank[-1])
    for name in (
        "do_expand",
        "num_experts",
        "expert_alignment",
        "num_max_tokens_per_rank",
        "num_recv_tokens_per_expert_list",
        "num_recv_tokens",
        "num_expanded_tokens",
    ):
        assert getattr(got, name) == getattr(want, name), f"{prefix}: {name}"
    for name in (
        "psum_num_recv_tokens_per_scaleup_rank",
        "psum_num_recv_tokens_per_expert",
        "num_unaligned_recv_tokens_per_expert",
        "dst_buffer_slot_idx",
        "recv_src_metadata",
    ):
        assert_rows_equal(getattr(got, name), getattr(want, name), f"{prefix}: {name}")
    assert_rows_equal(got.topk_idx, topk_idx, f"{prefix}: topk_idx")
    assert arrived <= got.num_recv_tokens
