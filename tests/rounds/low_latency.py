"""One low-latency round through the public `Buffer`, compared bit for bit with the reference.

As in `tests.rounds.normal` every rank builds the inputs of all ranks from a seed, and on the GPU
only copies are queued beside the operations.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from epjit import Buffer, env
from epjit.formats import BF16, FORMATS, NVFP4, RowFormat
from epjit.handles import LowLatencyDispatched, routes
from epjit.reference import low_latency as reference
from tests.harness.data import (
    ROUTING_KINDS,
    RoutingKind,
    assert_rows_equal,
    made_once,
    routing,
    to_device,
    topk_weights,
)
from tests.harness.ranks import line_up, settle

BY_NAME: dict[str, RowFormat] = {each.name: each for each in FORMATS}
FLAGS: dict[str, dict[str, Any]] = {
    "bf16": {"use_fp8": False},
    "fp8": {},
    "fp8_round": {"round_scale": True},
    "fp8_ue8m0": {"round_scale": True, "use_ue8m0": True},
    "mxfp8": {"quantization": "mxfp8"},
    "nvfp4": {"quantization": "nvfp4"},
}
ROOM = 256 << 20  # enough for every round of `random_round` with up to 64 tokens

How = Literal["sync", "async", "hook"]


@dataclass(frozen=True)
class LowLatencyRound:
    """Sizes and choices of one round; the same on all ranks.

    Attributes:
        num_tokens: Of each rank.
        hidden: Channels a row.
        num_experts: Over all ranks.
        num_topk: Choices a token.
        kind: Routing.
        seed: Of everything random.
        row_format: Name of the format.
        index_dtype: Of topk_idx.
        num_dispatches: Dispatches in a row; their combines follow, the last one first.
        use_logfmt: Of combine.
        zero_copy: Of combine.
        with_extras: Whether `out` and the statistics are given.
        spare_tokens: Of M, beyond what is needed.
        how: When the calls return.
        weights_sent: Whether the weights go along with the dispatch.
        is_finite: Whether no channel is infinite or NaN.
    """

    num_tokens: tuple[int, ...]
    hidden: int = 512
    num_experts: int = 16
    num_topk: int = 4
    kind: RoutingKind = "random"
    seed: int = 0
    row_format: str = "bf16"
    index_dtype: torch.dtype = torch.int64
    num_dispatches: int = 1
    use_logfmt: bool = False
    zero_copy: bool = False
    with_extras: bool = False
    spare_tokens: int = 0
    how: How = "sync"
    weights_sent: bool = False
    is_finite: bool = False


# (hidden, num_topk, index_dtype, experts a rank, formats): a few, since every kind is compiled; 96,
# 136 and 640 are no multiples of a warp's width, 32 is the largest top-k.
_SHAPES: tuple[tuple[int, int, torch.dtype, int, tuple[str, ...]], ...] = (
    (512, 8, torch.int64, 8, tuple(BY_NAME)),
    (1536, 4, torch.int32, 2, ("fp8", "fp8_ue8m0", "mxfp8")),
    (640, 32, torch.int64, 8, ("bf16", "fp8_round", "nvfp4")),
    (136, 1, torch.int64, 1, ("bf16",)),
    (96, 3, torch.int32, 2, ("bf16", "nvfp4")),
    (96, 2, torch.int64, 1, ("mxfp8",)),
)


def random_low_latency_round(num_ranks: int, seed: int, *, max_tokens: int) -> LowLatencyRound:
    """A round that differs from others in its routing and much else; deterministic in `seed`."""
    rng = random.Random(seed)
    hidden, num_topk, index_dtype, experts_a_rank, formats = rng.choice(_SHAPES)
    max_tokens = min(max_tokens, 64 // num_topk * 4)
    use_logfmt = hidden % 128 == 0 and rng.random() < 0.3
    return LowLatencyRound(
        num_tokens=tuple(
            rng.choice((0, max_tokens)) if rng.random() < 0.2 else rng.randint(0, max_tokens)
            for _ in range(num_ranks)
        ),
        hidden=hidden,
        num_experts=num_ranks * experts_a_rank,
        num_topk=num_topk,
        kind=rng.choice(ROUTING_KINDS),
        seed=seed,
        row_format=rng.choice(formats),
        index_dtype=index_dtype,
        num_dispatches=rng.choice((1, 1, 2)),
        use_logfmt=use_logfmt,
        zero_copy=not use_logfmt and rng.random() < 0.4,
        with_extras=rng.random() < 0.5,
        spare_tokens=rng.choice((0, 0, 1, 5)),
        how=rng.choice(("sync", "async", "hook")),
        weights_sent=rng.random() < 0.4,
    )


def sums_before_links(case: LowLatencyRound, num_domains: int) -> bool:
    """Whether combine sums, and rounds, the rows of each rank before they travel."""
    variant = env.low_latency_combine_variant()
    if num_domains > 1 or case.use_logfmt:
        return False
    return variant == "reduced" or (variant == "auto" and case.weights_sent)


def rough_rows(num_rows: int, hidden: int, *, seed: int) -> Tensor:
    """Finite bfloat16 rows `[num_rows, H]` whose blocks differ widely in size; some are zeros."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    blocks = -(-hidden // 16)
    exponents = torch.randint(-18, 18, (num_rows, blocks), generator=generator, device="cpu")
    is_calm = torch.rand((num_rows, 1), **options) < 0.5  # blocks alike, as in a real row
    exponents = exponents.masked_fill(is_calm, 0)
    scales = torch.exp2(exponents.to(torch.float32))
    scales = scales.masked_fill(torch.rand((num_rows, blocks), **options) < 0.05, 0.0)
    rows = torch.randn((num_rows, blocks, 16), **options) * scales[:, :, None]
    return rows.flatten(1)[:, :hidden].to(torch.bfloat16).contiguous()


def rows_to_cast(num_rows: int, hidden: int, *, seed: int) -> Tensor:
    """`rough_rows`, not all of them finite."""
    return add_specials(rough_rows(num_rows, hidden, seed=seed))


def add_specials(rows: Tensor) -> Tensor:
    """Puts infinities and NaNs of both signs into some blocks of every fourth row, bfloat16."""
    bits = rows.view(torch.int16)
    for i, pattern in enumerate((0x7F80, 0xFF80, 0x7FC0, 0xFFC0)):
        bits[1::4, 17 * i :: 331] = pattern - (pattern >> 15 << 16)
    return rows


@dataclass(frozen=True)
class Exchange:
    """One dispatch and its combine on all ranks; read only, for threads share it.

    Attributes:
        inputs: Of every rank to dispatch.
        dispatched: Results of every rank.
        outputs: Rows of every rank for combine; NaN in rows that nothing arrived for.
        weights: Of every rank.
        combined: Sums of every rank.
    """

    inputs: list[reference.RankInput]
    dispatched: list[LowLatencyDispatched]
    outputs: list[Tensor]
    weights: list[Tensor]
    combined: list[Tensor]


@dataclass(frozen=True)
class MadeLowLatency:
    """All exchanges of a round, and `M`."""

    exchanges: list[Exchange]
    max_tokens: int


def make_low_latency(case: LowLatencyRound, *, num_domains: int = 1) -> MadeLowLatency:
    """Inputs and expected results of all ranks; made once for the threads of a process."""
    sent = case.weights_sent and num_domains == 1
    return _make(case, reduced=sums_before_links(case, num_domains), sent=sent)


def valid_rows(dispatched: LowLatencyDispatched) -> Tensor:
    """Bool `[E // R, R * M]`: which rows arrived."""
    positions = torch.arange(dispatched.src_info.shape[1], dtype=torch.int32, device="cpu")
    return positions[None, :] < dispatched.recv_count.cpu()[:, None]


def expert_outputs(dispatched: LowLatencyDispatched, hidden: int, *, seed: int) -> Tensor:
    """Answers of a rank's experts: bfloat16 `[E // R, R * M, H]`, NaN where nothing arrived."""
    valid = valid_rows(dispatched)
    outputs = torch.full((*valid.shape, hidden), torch.nan, dtype=torch.bfloat16, device="cpu")
    outputs[valid] = rough_rows(int(valid.sum()), hidden, seed=seed)
    return outputs


@made_once
def _make(case: LowLatencyRound, *, reduced: bool, sent: bool) -> MadeLowLatency:
    num_ranks, row_format = len(case.num_tokens), BY_NAME[case.row_format]
    routings = [
        [
            routing(
                case.kind,
                num_tokens=tokens,
                num_experts=case.num_experts,
                num_topk=case.num_topk,
                num_ranks=num_ranks,
                seed=_seed(case, index, rank),
                dtype=case.index_dtype,
            )
            for rank, tokens in enumerate(case.num_tokens)
        ]
        for index in range(case.num_dispatches)
    ]
    # A slab must hold all rows of its expert; repeated choices make that more than R * M tokens.
    most = max(_most_rows(idxs, case.num_experts) for idxs in routings)
    max_tokens = max(1, *case.num_tokens, -(-most // num_ranks)) + case.spare_tokens
    rows = rough_rows if case.is_finite else rows_to_cast
    exchanges = []
    for index, idxs in enumerate(routings):
        seeds = [_seed(case, index, rank) for rank in range(num_ranks)]
        scale = (
            torch.tensor([0.05 * 2**index], dtype=torch.float32, device="cpu")
            if row_format is NVFP4
            else None
        )
        weights = [
            topk_weights(len(idx), case.num_topk, seed=seed)
            for idx, seed in zip(idxs, seeds, strict=True)
        ]
        inputs = [
            reference.RankInput(
                rows(len(idx), case.hidden, seed=seed),
                idx,
                scale,
                own if sent else None,
            )
            for idx, own, seed in zip(idxs, weights, seeds, strict=True)
        ]
        dispatched = [
            reference.dispatch(
                inputs,
                rank,
                max_tokens=max_tokens,
                num_experts=case.num_experts,
                row_format=row_format,
            )
            for rank in range(num_ranks)
        ]
        outputs = [
            expert_outputs(each, case.hidden, seed=seed + 8)
            for each, seed in zip(dispatched, seeds, strict=True)
        ]
        returned = [
            reference.collect(output, each.src_info, each.layout_range.shape[1])
            for output, each in zip(outputs, dispatched, strict=True)
        ]
        combined = [
            reference.combine(
                returned,
                rank,
                idxs[rank],
                weights[rank],
                num_experts=case.num_experts,
                use_logfmt=case.use_logfmt,
                reduced=reduced,
            )
            for rank in range(num_ranks)
        ]
        exchanges.append(Exchange(inputs, dispatched, outputs, weights, combined))
    return MadeLowLatency(exchanges, max_tokens)


def _seed(case: LowLatencyRound, index: int, rank: int) -> int:
    return case.seed * 64 + index * 16 + rank


def _most_rows(idxs: list[Tensor], num_experts: int) -> int:
    flat = torch.cat([idx.flatten().to(torch.int64) for idx in idxs])
    flat = flat[(flat >= 0) & (flat < num_experts)]
    return int(torch.bincount(flat, minlength=1).max())


@dataclass
class Queued:
    """One exchange whose operations are queued."""

    dispatched: tuple[Any, ...]
    combined: Tensor | None = None
    out: Tensor | None = None


class RankRound:
    """The operations of a round on one rank, step by step: `dispatch`, `combine`, then `compare`.

    Args:
        buffer: Of this rank.
        case: The round.
    """

    def __init__(self, buffer: Buffer, case: LowLatencyRound) -> None:
        self.buffer, self.case = buffer, case
        self.made = make_low_latency(case, num_domains=buffer.topology.num_domains)
        # Virtual ranks share a process: one that loads a kernel would wait for what another runs.
        buffer.low_latency_warmup(
            self.made.max_tokens,
            case.hidden,
            case.num_experts,
            num_topk=case.num_topk,
            topk_idx_dtype=case.index_dtype,
            use_logfmt=case.use_logfmt,
            weights_sent=case.weights_sent,
            **FLAGS[case.row_format],
        )
        self.queued: list[Queued] = []
        device, rank = buffer.device, buffer.rank
        self._given = [
            (
                to_device(each.inputs[rank].x, device),
                to_device(each.inputs[rank].topk_idx, device),
                to_device(each.weights[rank], device),
                to_device(each.outputs[rank], device),
            )
            for each in self.made.exchanges
        ]
        scales = [each.inputs[rank].global_scale for each in self.made.exchanges]
        self._scales = [None if scale is None else to_device(scale, device) for scale in scales]
        num_local = case.num_experts // buffer.group_size
        zeros: dict[str, Any] = {"device": "cpu"}
        self.stats = to_device(torch.zeros(num_local, dtype=torch.int32, **zeros), device)
        costs = torch.zeros(buffer.group_size, dtype=torch.int64, **zeros)
        self.costs = [to_device(costs, device) for _ in range(2)]
        nan = torch.full((1,), torch.nan, dtype=torch.bfloat16, device="cpu")
        self._ignored = to_device(nan.expand(self._given[0][3].shape).contiguous(), device)
        line_up(buffer)

    def dispatch(self, index: int) -> None:
        """Queues dispatch `index`, its receiving included."""
        x, idx, weights, _ = self._given[index]
        extras: dict[str, Any] = {"topk_weights": weights} if self.case.weights_sent else {}
        if self.case.with_extras:
            extras["cumulative_local_expert_recv_stats"] = self.stats
            extras["dispatch_wait_recv_cost_stats"] = self.costs[0]
        results = self._call(
            self.buffer.low_latency_dispatch,
            x,
            idx,
            self.made.max_tokens,
            self.case.num_experts,
            **FLAGS[self.case.row_format],
            **extras,
            global_scale=self._scales[index],
        )
        self.queued.append(Queued(results))

    def combine(self, index: int) -> None:
        """Queues the combine of dispatch `index`, its receiving included."""
        _, idx, weights, outputs = self._given[index]
        queued = self.queued[index]
        handle = queued.dispatched[2]
        extras: dict[str, Any] = {}
        if self.case.with_extras:
            shape = (idx.shape[0], self.case.hidden)
            queued.out = torch.empty(shape, dtype=torch.bfloat16, device=self.buffer.device)
            extras["out"] = queued.out
            extras["combine_wait_recv_cost_stats"] = self.costs[1]
        if self.case.zero_copy:
            self.buffer.get_next_low_latency_combine_buffer(handle).copy_(outputs)
            outputs = self._ignored
        (queued.combined,) = self._call(
            self.buffer.low_latency_combine,
            outputs,
            idx,
            weights,
            handle,
            use_logfmt=self.case.use_logfmt,
            zero_copy=self.case.zero_copy,
            **extras,
        )

    def compare(self) -> None:
        """Every result, when the device is done.

        Raises:
            AssertionError: Names rank, tensor, row and column of the first difference.
        """
        rank = self.buffer.rank
        for index, (made, queued) in enumerate(zip(self.made.exchanges, self.queued, strict=True)):
            prefix = f"rank {rank}, seed {self.case.seed}, dispatch {index}"
            compare_dispatched(
                prefix,
                queued.dispatched,
                made.dispatched[rank],
                BY_NAME[self.case.row_format],
                (self.made.max_tokens, self.case.hidden, self.case.num_experts),
            )
            if queued.combined is not None:
                assert_rows_equal(queued.combined, made.combined[rank], f"{prefix}: combined_x")
            assert queued.out is None or queued.out is queued.combined
        if self.case.with_extras:
            counts = [each.dispatched[rank].recv_count for each in self.made.exchanges]
            want = torch.stack(counts[: len(self.queued)]).sum(dim=0, dtype=torch.int32)
            assert_rows_equal(self.stats, want, f"rank {rank}: cumulative stats")
            for costs in self.costs:
                assert (costs.cpu() >= 0).all()

    def _call(self, method: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        how = self.case.how
        *results, event, hook = method(
            *args, async_finish=how == "async", return_recv_hook=how == "hook", **kwargs
        )
        assert (event.event is not None) is (how == "async")
        assert (hook is not None) is (how == "hook")
        if how == "async":
            event.current_stream_wait()
        if hook is not None:
            hook()
        return tuple(results)


def check_low_latency_round(buffer: Buffer, case: LowLatencyRound) -> None:
    """All operations of a round, queued in one go; then every result.

    Raises:
        AssertionError: Names rank, tensor, row and column of the first difference.
    """
    ranked = RankRound(buffer, case)
    for index in range(case.num_dispatches):
        ranked.dispatch(index)
    for index in reversed(range(case.num_dispatches)):
        ranked.combine(index)
    settle(buffer)
    ranked.compare()


def compare_dispatched(
    prefix: str,
    got: tuple[Any, ...],
    want: LowLatencyDispatched,
    row_format: RowFormat,
    sizes: tuple[int, int, int],
) -> None:
    """Compares the results of `low_latency_dispatch`, without event and hook.

    Args:
        prefix: Of the message.
        got: `recv_x`, `recv_count`, handle.
        want: From the reference.
        row_format: Of the rows.
        sizes: `M`, `H` and `E`, the end of the handle.

    Raises:
        AssertionError: Names tensor, row and column of the first difference.
    """
    recv_x, recv_count, handle = got
    src_info, layout_range, *numbers = handle
    assert tuple(numbers) == sizes
    assert_rows_equal(recv_count, want.recv_count, f"{prefix}: recv_count")
    assert_rows_equal(layout_range, want.layout_range, f"{prefix}: layout_range")
    rows, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
    valid = valid_rows(want)

    def compare(name: str, got_rows: Tensor, want_rows: Tensor) -> None:
        """Rows that arrived, as bytes where the dtype has no indexing kernel."""
        for attribute in ("shape", "dtype"):
            have, expected = getattr(got_rows, attribute), getattr(want_rows, attribute)
            assert have == expected, f"{prefix}: {name}.{attribute} is {have}, not {expected}"
        assert got_rows.stride() == want_rows.stride(), f"{prefix}: {name}: {got_rows.stride()}"
        got_rows = got_rows.cpu()
        if got_rows.element_size() == 1:
            got_rows, want_rows = got_rows.view(torch.uint8), want_rows.view(torch.uint8)
        assert_rows_equal(got_rows[valid], want_rows[valid], f"{prefix}: {name}")

    compare("recv_x", rows, want.recv_x)
    assert isinstance(recv_x, tuple) is (row_format is not BF16)
    if scales is not None and want.recv_scales is not None:
        compare("scales", scales, want.recv_scales)
    compare("src_info", src_info, want.src_info)
    num_ranks = want.layout_range.shape[1]
    tokens, targets, weights = (each.cpu() for each in routes(src_info, num_ranks))
    want_tokens, want_targets, want_weights = routes(want.src_info, num_ranks)
    assert_rows_equal(tokens, want_tokens, f"{prefix}: tokens of each source")
    is_token = torch.arange(targets.shape[1], device="cpu") < want_tokens[:, None]
    assert_rows_equal(targets[is_token], want_targets[is_token], f"{prefix}: routes")
    is_here = is_token[:, :, None] & (want_targets >= 0)
    assert_rows_equal(weights[is_here], want_weights[is_here], f"{prefix}: weights")
