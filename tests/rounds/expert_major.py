"""One round of the calls on rows by expert through the public `Buffer`, bit for bit.

As in `tests.rounds.normal` every rank builds the inputs of all ranks from a seed, and on the GPU
only copies are queued beside the operations.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epjit import Buffer, Config
from epjit.formats import CASTS, NVFP4
from epjit.handles import ExpertDispatched, row_bound
from epjit.reference import Normal
from epjit.reference import expert_major as reference
from epjit.reference.intranode import RankInput
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
from tests.rounds.low_latency import rows_to_cast


@dataclass(frozen=True)
class ExpertRound:
    """Sizes and choices of one round; the same on all ranks.

    Attributes:
        num_tokens: Of each rank.
        hidden: Elements a row.
        num_experts: Over all ranks.
        num_topk: Choices a token.
        kind: Routing.
        seed: Of everything random.
        fp8: Rows of one byte with scales of this layout, or None for bfloat16 or a cast.
        cast: Name of a format, or None.
        column_major: Whether scales arrive column by column.
        index_dtype: Of topk_idx.
        with_weights: Whether topk_weights travel with the tokens.
        worst: Whether sizes are static.
        num_rows: Of the outputs, with `worst`; 0 = always enough.
        alignment: expert_alignment.
        zero_padding: Whether padding is zeros.
        combine_dtype: Of the rows that come back.
        weighted: Whether combine multiplies the rows.
        num_biases: 0, 1 or 2.
        num_sms: Of dispatch and combine.
        how: sync or async.
    """

    num_tokens: tuple[int, ...]
    hidden: int = 256
    num_experts: int = 16
    num_topk: int = 4
    kind: RoutingKind = "random"
    seed: int = 0
    fp8: ScaleLayout | None = None
    cast: str | None = None
    column_major: bool = False
    index_dtype: torch.dtype = torch.int64
    with_weights: bool = True
    worst: bool = False
    num_rows: int = 0
    alignment: int = 1
    zero_padding: bool = False
    combine_dtype: torch.dtype = torch.bfloat16
    weighted: bool = True
    num_biases: int = 0
    num_sms: int = 4
    how: str = "sync"


# (hidden, num_topk, what rows are, index_dtype, combine_dtype): what kernels are compiled for.
_SHAPES: tuple[tuple[int, int, str | None, torch.dtype, torch.dtype], ...] = (
    (128, 1, "scales", torch.int64, torch.bfloat16),
    (256, 2, None, torch.int32, torch.float16),
    (512, 5, "scales", torch.int32, torch.bfloat16),
    (1024, 8, None, torch.int64, torch.bfloat16),
    (512, 8, "fp8", torch.int64, torch.bfloat16),
    (128, 2, "fp8_row", torch.int64, torch.bfloat16),
    (1024, 4, "fp8_round", torch.int32, torch.float16),
    (1536, 8, "fp8_ue8m0", torch.int64, torch.bfloat16),
    (384, 3, "mxfp8", torch.int64, torch.bfloat16),
    (192, 8, "nvfp4", torch.int64, torch.bfloat16),
)


def random_expert_round(num_ranks: int, seed: int, *, num_sms: int, max_tokens: int) -> ExpertRound:
    """A round that differs from others in its routing and in much else; deterministic in `seed`."""
    rng = random.Random(seed)
    hidden, num_topk, what, index_dtype, combine_dtype = rng.choice(_SHAPES)
    num_tokens = tuple(
        0 if rng.random() < 0.1 else rng.randint(1, max_tokens) for _ in range(num_ranks)
    )
    worst = rng.random() < 0.4
    too_few = max(1, sum(num_tokens) * num_topk // (2 * num_ranks))
    return ExpertRound(
        num_tokens=num_tokens,
        hidden=hidden,
        num_experts=num_ranks * rng.choice((1, 2, 8)),
        num_topk=num_topk,
        kind=rng.choice(ROUTING_KINDS),
        seed=seed,
        fp8=rng.choice(SCALE_LAYOUTS) if what == "scales" else None,
        cast=what if what in CASTS else None,
        column_major=what in ("scales", "fp8", "fp8_ue8m0") and rng.random() < 0.5,
        index_dtype=index_dtype,
        with_weights=rng.random() < 0.8,
        worst=worst,
        num_rows=too_few if worst and rng.random() < 0.4 else 0,
        alignment=rng.choice((1, 8, 128)),
        zero_padding=rng.random() < 0.5,
        combine_dtype=combine_dtype,
        weighted=rng.random() < 0.7,
        num_biases=rng.randrange(3),
        num_sms=num_sms,
        how=rng.choice(("sync", "async")),
    )


@dataclass(frozen=True)
class MadeExperts:
    """Inputs of all ranks, and what must come of them; read only, for threads share it.

    Attributes:
        world: Inputs of every rank, not cast.
        global_scale: Of the cast.
        num_worst: num_worst_tokens.
        num_rows: num_expert_rows.
        dispatched: Results of every rank.
        others: Rows of the cached dispatch, which are not cast.
        cached: Its results.
        outputs: Rows of every rank for combine; NaN where no choice is.
        row_weights: Of every rank; NaN likewise.
        back: Weights that go back.
        biases: Of every rank.
        combined: Sums and weights of every rank.
    """

    world: list[RankInput]
    global_scale: Tensor | None
    num_worst: int
    num_rows: int
    dispatched: list[ExpertDispatched]
    others: list[Tensor]
    cached: list[ExpertDispatched]
    outputs: list[Tensor]
    row_weights: list[Tensor]
    back: list[Tensor]
    biases: list[tuple[Tensor, ...]]
    combined: list[tuple[Tensor, Tensor | None]]


_making = threading.Lock()


def make_experts(case: ExpertRound, oracle: Normal) -> MadeExperts:
    """Inputs and expected results of all ranks; made once for the threads of a process."""
    with _making:
        return _make(case, oracle)


def _input(case: ExpertRound, oracle: Normal, rank: int) -> RankInput:
    tokens, seed = case.num_tokens[rank], case.seed * 64 + rank
    idx = routing(
        case.kind,
        num_tokens=tokens,
        num_experts=case.num_experts,
        num_topk=case.num_topk,
        num_ranks=len(case.num_tokens),
        seed=seed,
        dtype=case.index_dtype,
    )
    _, _, per_expert, in_rank = oracle.layout(idx, case.num_experts)
    x, scales = payload(rank, tokens, case.hidden, torch.bfloat16), None
    if case.cast is not None:
        x = rows_to_cast(tokens, case.hidden, seed=seed).to(case.combine_dtype)
    elif case.fp8 is not None:
        x, scales = fp8_payload(rank, tokens, case.hidden, layout=case.fp8)
    weights = topk_weights(tokens, case.num_topk, seed=seed)
    return RankInput(x, scales, idx, weights, in_rank, per_expert)


@functools.lru_cache(maxsize=4)
def _make(case: ExpertRound, oracle: Normal) -> MadeExperts:
    ranks = range(len(case.num_tokens))
    world = [_input(case, oracle, rank) for rank in ranks]
    scale = None
    if case.cast == NVFP4.name:
        scale = torch.tensor([0.05], dtype=torch.float32, device="cpu")
    sent = world
    if case.cast is not None:
        sent = [reference.cast(each, CASTS[case.cast], scale) for each in world]
    num_worst = sum(case.num_tokens) + 3 if case.worst else 0
    local, num_rows = case.num_experts // len(ranks), case.num_rows
    if case.worst and not num_rows:
        num_rows = row_bound(num_worst, case.num_topk, local, case.alignment)
    dispatched = [
        reference.dispatch(
            oracle,
            sent,
            rank,
            num_experts=case.num_experts,
            expert_alignment=case.alignment,
            num_worst_tokens=num_worst,
            num_rows=num_rows,
            column_major_scales=case.column_major,
        )
        for rank in ranks
    ]
    handles = [each.handle for each in dispatched]
    seeds = [case.seed * 64 + rank for rank in ranks]
    others = [
        random_payload(tokens, case.hidden // 2, torch.float16, seed=seed)
        for tokens, seed in zip(case.num_tokens, seeds, strict=True)
    ]
    weights = [each.topk_weights for each in world]
    payloads = [(rows, None, each) for rows, each in zip(others, weights, strict=True)]
    cached = [reference.cached_dispatch(oracle, payloads, handles, rank) for rank in ranks]
    outputs, row_weights, back = [], [], []
    for handle, seed in zip(handles, seeds, strict=True):
        unused = handle.placement.source < 0
        rows = random_payload(handle.num_rows, case.hidden, case.combine_dtype, seed=seed + 32)
        outputs.append(rows.masked_fill(unused[:, None], torch.nan))
        drawn = topk_weights(handle.num_rows, 2, seed=seed + 32).masked_fill(
            unused[:, None], torch.nan
        )
        row_weights.append(drawn[:, 0].contiguous())
        back.append(drawn[:, 1].contiguous())
    biases = [
        tuple(
            random_payload(tokens, case.hidden, case.combine_dtype, seed=seed + 48 + i)
            for i in range(case.num_biases)
        )
        for tokens, seed in zip(case.num_tokens, seeds, strict=True)
    ]
    combined = [
        reference.combine(
            oracle,
            outputs,
            handles,
            rank,
            row_weights=row_weights if case.weighted else None,
            topk_weights=back if case.with_weights else None,
            bias=as_bias(biases[rank]),
        )
        for rank in ranks
    ]
    return MadeExperts(
        *(world, scale, num_worst, case.num_rows, dispatched, others, cached),
        *(outputs, row_weights, back, biases, combined),
    )


def as_bias(biases: Sequence[Tensor]) -> Any:
    """As `bias` of a combine takes them."""
    return None if not biases else biases[0] if len(biases) == 1 else tuple(biases)


def check_expert_round(buffer: Buffer, case: ExpertRound) -> None:
    """Dispatch by expert, a cached one and combine, queued in one go; then every result.

    Raises:
        AssertionError: Names rank, tensor, row and column of the first difference.
    """
    rank, device, oracle = buffer.rank, buffer.device, Normal(buffer.topology.domains)
    made = make_experts(case, oracle)
    own, want = made.world[rank], made.dispatched[rank]
    config = Config(case.num_sms)

    def call(method: Any, *args: Any, **kwargs: Any) -> Any:
        is_async = case.how == "async"
        *results, event = method(*args, config=config, async_finish=is_async, **kwargs)
        assert (event.event is not None) is is_async
        if is_async:
            event.current_stream_wait()
        return results

    def moved(tensor: Tensor | None) -> Any:
        return None if tensor is None else to_device(tensor, device)

    x, idx, weights = moved(own.x), moved(own.topk_idx), moved(own.topk_weights)
    scales, other, output = moved(own.scales), moved(made.others[rank]), moved(made.outputs[rank])
    row_weights, back = moved(made.row_weights[rank]), moved(made.back[rank])
    global_scale, biases = moved(made.global_scale), [moved(each) for each in made.biases[rank]]

    line_up(buffer)
    rows, got_weights, handle = call(
        buffer.expert_dispatch,
        x if scales is None else (x, scales),
        idx,
        weights if case.with_weights else None,
        num_experts=case.num_experts,
        expert_alignment=case.alignment,
        num_worst_tokens=made.num_worst,
        num_expert_rows=made.num_rows,
        zero_padding=case.zero_padding,
        column_major_scales=case.column_major,
        cast=case.cast,
        global_scale=global_scale,
    )
    cached, cached_weights, same = call(buffer.expert_dispatch, other, None, weights, handle=handle)
    combined, combined_weights = call(
        buffer.expert_combine,
        output,
        handle,
        row_weights=row_weights if case.weighted else None,
        topk_weights=back if case.with_weights else None,
        bias=as_bias(biases),
    )
    settle(buffer)

    prefix = f"rank {rank}, seed {case.seed}"
    assert same is handle
    compare_experts(
        prefix,
        rank,
        (rows, got_weights if case.with_weights else None, handle),
        want if case.with_weights else want._replace(weights=None),
        zero_padding=case.zero_padding,
    )
    compare_experts(f"{prefix}: cached", rank, (cached, cached_weights, handle), made.cached[rank])
    want_combined, want_weights = made.combined[rank]
    assert_rows_equal(combined, want_combined, f"{prefix}: combined")
    assert (combined_weights is None) == (want_weights is None)
    if want_weights is not None:
        assert_rows_equal(combined_weights, want_weights, f"{prefix}: combined topk_weights")


def compare_experts(
    prefix: str,
    rank: int,
    got: tuple[Any, Tensor | None, Any],
    want: ExpertDispatched,
    *,
    zero_padding: bool = False,
) -> None:
    """All that is defined of the results of an expert dispatch.

    Raises:
        AssertionError: Names tensor, row and column of the first difference.
    """
    payload, weights, handle = got
    placed = want.handle.placement
    for name, mine, wanted in zip(placed._fields, handle.placement, placed, strict=True):
        arrived = slice(None)
        if name == "row_of":
            arrived = slice(0, int(want.handle.routing.num_received(rank)))
        assert_rows_equal(mine[arrived], wanted[arrived], f"{prefix}: {name}")
    rows, scales = payload if isinstance(payload, tuple) else (payload, None)
    defined = placed.source >= 0
    if zero_padding:
        before = torch.cat([placed.ends.new_zeros(1), placed.ends[:-1]])
        for start, end, count in zip(before, placed.ends, placed.counts, strict=True):
            defined[int(start) + int(count) : int(end)] = True
    for name, mine, wanted in (("rows", rows, want.rows), ("scales", scales, want.scales)):
        assert (mine is None) == (wanted is None), f"{prefix}: {name}"
        if mine is not None and wanted is not None:
            assert mine.dtype == wanted.dtype
            assert mine.shape == wanted.shape
            assert mine.stride() == wanted.stride() or min(mine.shape) <= 1
            bits = _as_bytes(mine)[defined], _as_bytes(wanted)[defined]
            assert_rows_equal(*bits, f"{prefix}: {name}, as bytes")
    assert (weights is None) == (want.weights is None)
    if weights is not None and want.weights is not None:
        assert_rows_equal(weights, want.weights, f"{prefix}: weights")


def _as_bytes(rows: Tensor) -> Tensor:
    # Flat first: torch calls one column contiguous whatever its stride, and cannot view that.
    flat = rows.cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).view(rows.shape[0], rows.shape[1] * rows.element_size())
