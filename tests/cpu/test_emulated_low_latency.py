"""The low-latency kernels, run on the CPU by the emulation, against the reference, bit for bit."""

from __future__ import annotations

import itertools
import math
import random
import shutil
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from epjit.calls import DispatchSizes
from epjit.formats import BF16, FORMATS, FP8, RowFormat
from epjit.handles import LowLatencyDispatched, routes
from epjit.kernels.low_latency import (
    CleanConfig,
    LowLatencyCombineConfig,
    LowLatencyDispatchConfig,
    LowLatencyReducedCombineConfig,
)
from epjit.reference import low_latency as reference
from epjit.runtime.empty import empty_on
from tests.emulation import build
from tests.emulation import world as emulated
from tests.emulation.build import EmulationError, emulate, guarded
from tests.emulation.world import FOREVER, check, copy, stamp
from tests.rounds.low_latency import add_specials

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")

MAX_RANKS = 8
# Variants of one NVLink domain; sent: reduced, with weights that have come with the rows.
NEAR = ("tma", "ldst", "reduced", "sent", "lines")
# Of three ranks.
VARIANTS = pytest.mark.parametrize(
    ("variant", "per_domain"),
    [*((variant, 0) for variant in NEAR), ("tma", 1), ("ldst", 1)],
    ids=[*NEAR, "tma-3x1", "ldst-3x1"],
)
DOMAINS = pytest.mark.parametrize("per_domain", [0, 1], ids=["1x3", "3x1"])


@dataclass(frozen=True)
class Shape:
    """Choices of a test: those of compile time first, then those of the run."""

    num_ranks: int = 3
    hidden: int = 512
    experts_a_rank: int = 3
    num_topk: int = 4
    row_format: RowFormat = BF16
    topk_is_int64: bool = True
    variant: str = "tma"
    logfmt: bool = False
    num_warps: int = 3
    tokens: tuple[int, ...] = (7, 0, 11)
    max_tokens: int = 12
    grid: int = 3
    num_staying: int = 1
    num_parts: int = 2
    push_parts: int = 1
    hole: float = 0.2
    kind: str = "random"  # hot: all select expert 0; twice: an expert twice in a row
    per_domain: int = 0  # ranks of an NVLink domain; 0: all of them
    neighbours: bool = True  # the ranks of a domain follow each other; else they take turns
    zero_copy: bool = False

    @property
    def remote(self) -> bool:
        return self.per_domain not in (0, self.num_ranks)

    def domain(self, rank: int) -> list[int]:
        """The ranks that share NVLink with a rank."""
        if not self.remote:
            return list(range(self.num_ranks))
        step = 1 if self.neighbours else self.num_ranks // self.per_domain
        first = rank // self.per_domain * self.per_domain if self.neighbours else rank % step
        return [first + i * step for i in range(self.per_domain)]

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.experts_a_rank

    @property
    def sizes(self) -> dict[str, Any]:
        """Fields that the configs of dispatch and combine have in common."""
        names = ("num_ranks", "num_experts", "hidden", "num_topk", "topk_is_int64")
        return {name: getattr(self, name) for name in names}

    @property
    def dispatch(self) -> LowLatencyDispatchConfig:
        return LowLatencyDispatchConfig(
            **self.sizes,
            format=self.row_format.code,
            num_warps=self.num_warps,
            remote=self.remote,
            lines=self.variant == "lines",
        )

    @property
    def reduced(self) -> bool:
        """Whether a rank's rows are summed before they travel."""
        return self.variant in ("reduced", "sent") and not self.logfmt

    @property
    def combine(self) -> LowLatencyCombineConfig | LowLatencyReducedCombineConfig:
        if self.reduced:
            sent = self.variant == "sent"
            return LowLatencyReducedCombineConfig(
                **self.sizes, weights_sent=sent, num_warps=self.num_warps
            )
        return LowLatencyCombineConfig(
            **self.sizes,
            logfmt=self.logfmt,
            tma=self.variant == "tma" and not self.logfmt,
            lines=self.variant == "lines",
            num_warps=self.num_warps + 1,
            num_push_warps=2,
            rows_per_warp=1 if self.variant == "lines" else 2,
            remote=self.remote,
        )


@dataclass(kw_only=True)
class Rank(emulated.Rank):
    """One rank's memory: what peers see, then what they do not."""

    slots: Tensor
    words: Tensor
    counts: Tensor
    signals: Tensor
    meetings: Tensor
    staged_counts: Tensor
    staging: Tensor
    send_buffer: Tensor


class World(emulated.World):
    """All ranks of a test; methods queue one operation on every rank and what it must give.

    A rank's `local`: counters, epoch 32, abort 33, state of clean 64, mask 192, decisions 256.
    """

    counters = 32
    zeroed = ("words", "counts", "signals", "meetings", "slots")

    def __init__(
        self, shape: Shape, *, seed: int, timeout_ns: int = FOREVER, shrink: bool = False
    ) -> None:
        super().__init__(seed=seed, timeout_ns=timeout_ns)
        self.shape, self.shrink = shape, shrink
        self.half_bytes = max(
            shape.num_ranks * shape.max_tokens * shape.dispatch.slot_bytes + 128,
            shape.max_tokens * max(shape.num_topk, shape.num_ranks) * 2 * shape.hidden,
            shape.max_tokens * shape.num_topk * (shape.combine.slot_bytes or 0) + 128,
        )
        self.words_stride = shape.max_tokens * max(
            shape.num_ranks, shape.num_topk * shape.push_parts
        )
        if isinstance(shape.combine, LowLatencyReducedCombineConfig):
            self.words_stride = (
                shape.max_tokens * shape.num_ranks * (shape.num_parts + shape.num_topk)
            )
        self.counts_stride = shape.experts_a_rank + 1
        if shape.remote:
            bits = -(-shape.max_tokens // 64)
            self.counts_stride = 2 + (shape.experts_a_rank + bits + 1) // 2 * 2
        num_counts = shape.num_ranks * self.counts_stride
        size = (shape.experts_a_rank, shape.num_ranks * shape.max_tokens, shape.hidden)
        self.staging_half_bytes = 2 * math.prod(size)
        self.ranks = [
            Rank(
                slots=guarded(2 * self.half_bytes, dtype=torch.uint8),
                words=guarded(2 * self.words_stride, dtype=torch.int64, fill=0),
                counts=guarded(2 * num_counts, dtype=torch.int64, fill=0),
                signals=guarded(32 + max(8, 2 * shape.num_ranks), dtype=torch.int64, fill=0),
                meetings=guarded(3 * shape.num_ranks, dtype=torch.int64, fill=0),
                staged_counts=guarded(2 * num_counts, dtype=torch.int64, fill=0),
                staging=guarded(2 * self.staging_half_bytes, dtype=torch.uint8),
                send_buffer=guarded(*size, dtype=torch.bfloat16),
                local=guarded(256 + shape.num_ranks, dtype=torch.int32, fill=0),
                fault=guarded(16, dtype=torch.int64, fill=0),
            )
            for _ in range(shape.num_ranks)
        ]
        pes = torch.randperm(shape.num_ranks, generator=self.generator).tolist()
        names = ("slots", "words", "counts", "signals", "meetings", "staged_counts", "staging")
        memories = [[getattr(rank, name) for rank in self.ranks] for name in names]
        self.transports = build.transport(memories, pes=pes)
        self.peers = [
            torch.tensor(
                [
                    shape.domain(rank).index(peer) if peer in shape.domain(rank) else -1 - pes[peer]
                    for peer in range(shape.num_ranks)
                ],
                dtype=torch.int32,
            )
            for rank in range(shape.num_ranks)
        ]

    def refresh(self, rank: Rank, epoch: int) -> None:
        rank.meetings.zero_()  # of which no clean has told anything
        if not self.shape.remote:
            rank.signals[32:] = stamp(epoch, 0)  # entered
            return
        num_ranks = self.shape.num_ranks
        for each in (epoch, epoch - 1):  # [epoch & 1, num_ranks]
            rank.signals[32 + (each & 1) * num_ranks :][:num_ranks] = stamp(each, 0)

    def common(self, rank: int, config: Any) -> dict[str, Any]:
        mine, domain = self.ranks[rank], self.shape.domain(rank)
        near = [self.ranks[each] for each in domain]
        remote = self.shape.remote
        return {
            **super().common(rank, config),
            "slots": [each.slots for each in near],
            "words": [each.words for each in near],
            "counts": [each.counts for each in near],
            "signals": [each.signals for each in near],
            "meetings": [each.meetings for each in near],
            "staged_counts": mine.staged_counts if remote else None,
            "staging": mine.staging if remote else None,
            "staging_half_bytes": self.staging_half_bytes,
            "peers": self.peers[rank] if remote else None,
            "transport": self.transports[rank] if remote else None,
            "local": domain.index(rank),
            "decisions": mine.local[256:],
            "state": mine.local[64:],
            "mask": mine.local[192:] if self.shrink else None,
            "half_bytes": self.half_bytes,
            "words_stride": self.words_stride,
            "counts_stride": self.counts_stride,
            "max_tokens": self.shape.max_tokens,
            "num_staying": self.shape.num_staying,
            "push_parts": self.shape.push_parts,
        }

    def route(self) -> Routing:
        return Routing(self)

    def clean(self) -> None:
        for rank in range(self.shape.num_ranks):
            self.queue(rank, CleanConfig(self.shape.num_ranks, self.shape.remote), 1)


class Routing:
    """The tokens of all ranks and what they select."""

    def __init__(self, world: World) -> None:
        shape = world.shape
        self.world, self.shape = world, shape
        self.inputs = [self._input(num_tokens) for num_tokens in shape.tokens]
        self.weights = [
            copy(torch.randn(each.topk_idx.shape, generator=world.generator))
            for each in self.inputs
        ]
        if shape.variant == "sent":
            self.inputs = [
                each._replace(topk_weights=weights)
                for each, weights in zip(self.inputs, self.weights, strict=True)
            ]

    def _input(self, num_tokens: int) -> reference.RankInput:
        shape, generator = self.shape, self.world.generator
        scores = torch.rand(num_tokens, max(shape.num_experts, shape.num_topk), generator=generator)
        idx = scores.topk(shape.num_topk).indices % shape.num_experts
        if shape.kind == "hot":
            idx[:, 0] = 0
        if shape.kind == "twice" and shape.num_topk > 1:
            idx[:, -1] = idx[:, 0]
        idx[torch.rand(idx.shape, generator=generator) < shape.hole] = -1
        idx[torch.rand(idx.shape, generator=generator) < shape.hole / 4] = shape.num_experts
        x = torch.randn(num_tokens, shape.hidden, generator=generator)
        x *= 2.0 ** torch.randint(-12, 9, (num_tokens, shape.hidden), generator=generator)
        x[torch.rand(x.shape, generator=generator) < 0.05] = 0
        if num_tokens:
            x[0, :128] = 0
        return reference.RankInput(
            copy(add_specials(x.to(torch.bfloat16))),
            copy(idx.to(torch.int64 if shape.topk_is_int64 else torch.int32)),
            copy(torch.tensor([37.5])),
        )

    def dispatch(
        self, *, split: bool = False, masked: Tensor | None = None
    ) -> list[LowLatencyDispatched]:
        """Queues a dispatch; what it will give, by the reference."""
        shape, world = self.shape, self.world
        world.epochs += 1
        results = []
        for rank, own in enumerate(self.inputs):
            outputs = _guarded_outputs(shape, len(own.x))
            expected = reference.dispatch(
                self.inputs,
                rank,
                max_tokens=shape.max_tokens,
                num_experts=shape.num_experts,
                row_format=shape.row_format,
                masked=masked,
                out=_guarded_outputs(shape, len(own.x)),
            )
            stats = guarded(shape.experts_a_rank, dtype=torch.int32, fill=0)
            values = {**outputs._asdict(), "x": own.x, "global_scale": own.global_scale}
            values["topk_weights"] = own.topk_weights
            values |= {"recv_stats": stats, **_routes(outputs.src_info, shape)}
            self._queue(rank, shape.dispatch, split, values)
            world.keep.append((outputs, expected))
            for name, got, wanted in zip(outputs._fields, outputs, expected, strict=True):
                if got is not None:
                    world.expect(rank, name, got, wanted)
            got_routes, routes = (_routes(each.src_info, shape) for each in (outputs, expected))
            for name in routes:
                world.expect(rank, name, got_routes[name], routes[name])
            world.expect(rank, "stats", stats, expected.recv_count)
            results.append(expected)
        return results

    def combine(
        self,
        dispatched: list[LowLatencyDispatched],
        *,
        split: bool = False,
        masked: Tensor | None = None,
    ) -> None:
        """Queues a combine of what `dispatched` says lies where."""
        shape, world = self.shape, self.world
        world.epochs += 1
        num_rows = shape.num_ranks * shape.max_tokens
        size = (shape.experts_a_rank, num_rows, shape.hidden)
        outputs = []
        for each in dispatched:
            y = torch.full(size, float("nan"), dtype=torch.bfloat16)
            for e, count in enumerate(each.recv_count.tolist()):
                values = torch.randn(count, shape.hidden, generator=world.generator)
                values[torch.rand(values.shape, generator=world.generator) < 0.05] *= 2**-13
                y[e, :count] = values.to(torch.bfloat16)
            outputs.append(y)
        given = [
            memory.send_buffer if shape.zero_copy else guarded(*y.shape, dtype=y.dtype)
            for memory, y in zip(world.ranks, outputs, strict=True)
        ]
        for rank, y in enumerate(outputs):
            world.write(rank, given[rank], y)  # as experts do, after the operation before
        returned = [
            reference.collect(y, each.src_info, shape.num_ranks)
            for y, each in zip(outputs, dispatched, strict=True)
        ]
        for rank, own in enumerate(self.inputs):
            expected = reference.combine(
                returned,
                rank,
                own.topk_idx,
                self.weights[rank],
                num_experts=shape.num_experts,
                use_logfmt=shape.logfmt,
                reduced=shape.reduced,
                masked=masked,
            )
            out = guarded(len(own.x), shape.hidden, dtype=torch.bfloat16)
            tokens, rows, sent = routes(dispatched[rank].src_info, shape.num_ranks)
            weights = sent if shape.reduced and shape.variant == "sent" else self.weights[rank]
            values = {"x": given[rank], "topk_weights": weights, "out": out}
            values |= {"source_tokens": tokens, "source_rows": rows}
            self._queue(rank, shape.combine, split, values, then_free=given[rank])
            world.expect(rank, "combined", out, expected)

    def _queue(
        self,
        rank: int,
        config: Any,
        split: bool,
        values: dict[str, Any],
        then_free: Tensor | None = None,
    ) -> None:
        """One operation, as one launch or as one that sends and one that receives.

        `then_free` is written to at once when it has sent: it is the caller's again.
        """
        shape, own = self.shape, self.inputs[rank]
        if self.world.shrink:  # which no rows in lines have
            config = replace(
                config, shrink=True, **{"lines": False} if hasattr(config, "lines") else {}
            )
        for sends, receives in ((True, False), (False, True)) if split else ((True, True),):
            self.world.queue(
                rank,
                config,
                shape.grid,
                **values,
                topk_idx=own.topk_idx,
                wait_cost=None,
                num_tokens=len(own.x),
                num_parts=shape.num_parts,
                sends=sends,
                receives=receives,
            )
            if sends and then_free is not None:
                self.world.write(rank, then_free, torch.full_like(then_free, float("nan")))


def _guarded_outputs(shape: Shape, num_tokens: int) -> LowLatencyDispatched:
    """Outputs as `LowLatencyDispatched.allocate` makes them, in memory whose bounds are watched."""
    sizes = DispatchSizes(
        num_tokens,
        shape.hidden,
        shape.num_topk,
        True,
        shape.max_tokens,
        shape.num_experts,
        shape.row_format,
    )
    specs = LowLatencyDispatched.specs(sizes, shape.num_ranks)
    plain = LowLatencyDispatched.allocate(specs, empty_on(torch.device("cpu")))
    src_info = _whole_storage(plain.src_info)
    scales = plain.recv_scales
    if scales is not None and shape.row_format.column_major:
        scales = guarded(*scales.transpose(1, 2).shape, dtype=scales.dtype).transpose(1, 2)
    elif scales is not None:
        scales = guarded(*scales.shape, dtype=scales.dtype)
    return LowLatencyDispatched(
        guarded(*plain.recv_x.shape, dtype=plain.recv_x.dtype),
        scales,
        guarded(*plain.recv_count.shape, dtype=torch.int32),
        src_info,
        guarded(*plain.layout_range.shape, dtype=torch.int64),
    )


def _whole_storage(src_info: Tensor) -> Tensor:
    """The same with the words behind it, in memory whose bounds are watched."""
    num_words = src_info.untyped_storage().nbytes() // 4 - src_info.storage_offset()
    words = guarded(num_words, dtype=torch.int32)
    return words[: src_info.numel()].view(src_info.shape)


def _routes(src_info: Tensor, shape: Shape) -> dict[str, Tensor]:
    return routes(src_info, shape.num_ranks)._asdict()


# ---- tests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "per_domain"),
    [("tma", 0), ("tma", 1), ("lines", 0)],
    ids=["1x3", "3x1", "lines"],
)
@pytest.mark.parametrize("row_format", FORMATS, ids=lambda each: each.name)
def test_dispatch_of_every_format(row_format: RowFormat, variant: str, per_domain: int) -> None:
    for seed, num_parts in enumerate((1, 2, 4)):
        shape = Shape(
            row_format=row_format, num_parts=num_parts, per_domain=per_domain, variant=variant
        )
        world = World(shape, seed=seed)
        world.route().dispatch()
        world.run(seed)


@VARIANTS
def test_dispatch_then_combine(variant: str, per_domain: int) -> None:
    for seed in range(4):
        shape = Shape(variant=variant, num_parts=1 + seed, per_domain=per_domain)
        world = World(shape, seed=seed)
        routing = world.route()
        routing.combine(routing.dispatch())
        world.run(seed)


@DOMAINS
def test_log_format(per_domain: int) -> None:
    for seed in range(4):
        world = World(Shape(logfmt=True, num_parts=1 + seed, per_domain=per_domain), seed=seed)
        routing = world.route()
        routing.combine(routing.dispatch(), split=seed % 2 == 1)
        world.run(seed)


@pytest.mark.parametrize("how", ["", "logfmt", "lines"])
def test_several_warps_push_a_row(how: str) -> None:
    """Parts of a row and of its sum that begin at other places; also more than the row has."""
    for seed, (push_parts, num_parts) in enumerate(((4, 2), (3, 4), (2, 1), (4, 7), (5, 3))):
        shape = Shape(
            num_ranks=2,
            variant="lines" if how == "lines" else "ldst",
            logfmt=how == "logfmt",
            hidden=2048,
            tokens=(3, 4),
            max_tokens=4,
            push_parts=push_parts,
            num_parts=num_parts,
        )
        world = World(shape, seed=seed)
        routing = world.route()
        routing.combine(routing.dispatch(), split=seed % 2 == 1)
        world.run(seed, yield_percent=60)


@pytest.mark.parametrize("variant", NEAR)
@pytest.mark.parametrize("num_ranks", [1, 8])  # others: test_random_histories
def test_numbers_of_ranks(num_ranks: int, variant: str) -> None:
    tokens = (5, 9, 0, 3, 12, 1, 7, 2)[:num_ranks]
    shape = Shape(num_ranks=num_ranks, tokens=tokens, variant=variant, hidden=24)
    for seed in range(2):
        world = World(shape, seed=seed)
        routing = world.route()
        routing.combine(routing.dispatch())
        world.run(seed)


@pytest.mark.parametrize(
    ("num_domains", "per_domain", "row_format"),
    [(2, 1, FP8), (2, 2, BF16), (2, 2, FP8), (4, 2, FP8), (2, 8, BF16), (4, 4, FP8), (3, 5, BF16)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_between_domains(num_domains: int, per_domain: int, row_format: RowFormat) -> None:
    """Whole and in two phases, on one buffer; the ranks of a domain follow each other or do not."""
    num_ranks = num_domains * per_domain
    tokens = (5, 9, 0, 3, 12, 1, 7, 2, 4, 0, 6, 8, 1, 10, 3, 5)[:num_ranks]
    shape = Shape(
        num_ranks=num_ranks,
        per_domain=per_domain,
        row_format=row_format,
        neighbours=row_format is BF16,
        variant="ldst" if row_format is FP8 else "tma",
        tokens=tokens,
        hidden=128,
        experts_a_rank=2,
        num_warps=2,
        grid=2,
        max_tokens=40 if num_ranks <= 4 else 12,
    )
    for seed in range(2 if num_ranks > 8 else 4):
        world = World(shape, seed=seed)
        routing = world.route()
        sent = routing.dispatch(split=seed % 2 == 1)
        routing.combine(sent, split=seed % 2 == 0)
        routing.combine(routing.dispatch())
        world.run(seed, delay={seed: 20_000} if seed > 1 else {})


def test_more_ranks_than_lanes() -> None:
    shape = Shape(
        num_ranks=36,
        per_domain=4,
        tokens=tuple(rank * 7 % 5 for rank in range(36)),
        max_tokens=4,
        hidden=32,
        experts_a_rank=1,
        num_warps=2,
        grid=1,
    )
    world = World(shape, seed=1)
    world.clean()
    routing = world.route()
    routing.combine(routing.dispatch())
    world.run(1)


@pytest.mark.parametrize("per_domain", [0, 1, 2])
def test_rows_in_the_send_buffer(per_domain: int) -> None:
    shape = Shape(num_ranks=4, tokens=(7, 0, 11, 2), per_domain=per_domain, zero_copy=True)
    for seed in range(3):
        world = World(shape, seed=seed)
        routing = world.route()
        routing.combine(routing.dispatch())
        world.run(seed)


@pytest.mark.parametrize("how", ["", "zero_copy", "logfmt"])
def test_rows_under_way_are_not_overwritten(how: str) -> None:
    """Combines follow each other, and none waits until what it has sent was read.

    With one half of the staging memory for all operations that goes wrong, and is seen.
    """
    shape = Shape(tokens=(7, 5, 11), per_domain=1, hidden=128)
    if how:
        shape = replace(shape, **{how: True})

    def run(seed: int, *, halves: bool, link: tuple[int, int] | None = None) -> None:
        world = World(shape, seed=seed)
        if not halves:
            world.staging_half_bytes = 0
        routing = world.route()
        sent = routing.dispatch()
        for index in range(4):
            routing.combine(sent, split=(seed + index) % 3 == 0)
        world.run(seed, slow_link=link)

    for seed, link in enumerate((None, None, None, *itertools.permutations(range(3), 2))):
        run(seed, halves=True, link=link)
    with pytest.raises(EmulationError, match=r"its source, .* was written before it was read"):
        run(0, halves=False, link=(0, 1))


def test_no_operation_waits_for_what_it_has_sent() -> None:
    """A fence or a quiet takes one thread past every queue of every rank (IBGDA)."""
    shape = Shape(num_ranks=4, tokens=(7, 0, 11, 2), per_domain=2, logfmt=True)
    world = World(shape, seed=1)
    routing = world.route()
    sent = routing.dispatch()
    dispatch = world.run(1)
    routing.combine(sent)
    combine = world.run(2)
    for report in (dispatch, combine):
        assert report.puts > 0
        assert (report.fences, report.quiets) == (0, 0)


def test_bits_of_many_tokens() -> None:
    """More tokens than a word of the counts has bits."""
    shape = Shape(
        num_ranks=4,
        per_domain=2,
        tokens=(130, 64, 63, 65),
        max_tokens=130,
        hidden=16,
        hole=0.6,
    )
    for seed in range(2):
        world = World(shape, seed=seed)
        routing = world.route()
        routing.combine(routing.dispatch())
        world.run(seed)


@pytest.mark.parametrize("kind", ["hot", "twice"])
@pytest.mark.parametrize("hole", [0.0, 0.9, 1.0])
def test_kinds_of_routing(kind: str, hole: float) -> None:
    world = World(Shape(kind=kind, hole=hole, row_format=FP8, num_topk=2, max_tokens=30), seed=1)
    routing = world.route()
    routing.combine(routing.dispatch())
    world.run(1)


def test_many_selections_and_int32() -> None:
    shape = Shape(num_topk=32, topk_is_int64=False, experts_a_rank=20, hidden=64)
    for seed, variant in enumerate(("ldst", "tma", "lines")):
        world = World(replace(shape, variant=variant), seed=seed)
        routing = world.route()
        routing.combine(routing.dispatch())
        world.run(seed)


def test_many_tokens_in_lines() -> None:
    """So many that a warp waits for one line of a slot before it looks at the others."""
    shape = Shape(
        num_ranks=2, tokens=(70, 9), max_tokens=70, hidden=128, variant="lines", row_format=FP8
    )
    for seed in range(2):
        world = World(shape, seed=seed)
        routing = world.route()
        routing.combine(routing.dispatch(split=seed == 1))
        world.run(seed)


@pytest.mark.parametrize("grid", [1, 2, 7])
def test_any_grid(grid: int) -> None:
    """More tokens than blocks, more blocks than tokens."""
    world = World(Shape(grid=grid, tokens=(12, 12, 1)), seed=grid)
    routing = world.route()
    routing.combine(routing.dispatch())
    world.run(grid)


def test_error_of_sums_before_the_links() -> None:
    """Each part is rounded once more: by at most 2^-8 of it, beside the result's own rounding."""
    shape = Shape(num_ranks=4, num_topk=8, experts_a_rank=8, tokens=(12, 12, 12, 12), hole=0.0)
    world = World(shape, seed=3)
    routing = world.route()
    sent = routing.dispatch()
    size = (shape.experts_a_rank, shape.num_ranks * shape.max_tokens, shape.hidden)
    returned = [
        reference.collect(
            torch.randn(size, generator=world.generator).to(torch.bfloat16), each.src_info, 4
        )
        for each in sent
    ]
    for rank, own in enumerate(routing.inputs):
        given = (returned, rank, own.topk_idx, routing.weights[rank])
        exact, reduced, size_of_parts = (
            reference.combine(*each, num_experts=shape.num_experts, reduced=way).double()
            for each, way in (
                (given, False),
                (given, True),
                (
                    (
                        [r._replace(rows=r.rows.abs()) for r in returned],
                        *given[1:3],
                        given[3].abs(),
                    ),
                    False,
                ),
            )
        )
        assert bool(((reduced - exact).abs() <= 3.1 * 2.0**-8 * size_of_parts).all())
        assert not torch.equal(reduced, exact)


@VARIANTS
def test_operations_in_a_row(variant: str, per_domain: int) -> None:
    """Several on one buffer, so that ranks are in different ones; whole and in two phases."""
    for seed in range(6):
        world = World(Shape(variant=variant, per_domain=per_domain), seed=seed)
        first, second = world.route(), world.route()
        split = seed % 2 == 1
        sent = first.dispatch(split=split)
        again = second.dispatch(split=not split)
        second.combine(again, split=split)
        first.combine(sent, split=split)
        second.combine(again)
        first.dispatch()
        world.run(seed, delay={seed % 3: 20_000} if seed > 2 else {})


@VARIANTS
@pytest.mark.parametrize("stops_before", [0, 1])
def test_withheld_rank_leaves_fault_records(
    stops_before: int, variant: str, per_domain: int
) -> None:
    missing = 2
    shape = Shape(tokens=(9, 9, 9), variant=variant, per_domain=per_domain)
    world = World(shape, seed=1, timeout_ns=300_000)
    routing = world.route()
    routing.combine(routing.dispatch())
    del world.ranks[missing].launches[stops_before:]
    world.run(1, compare=False, latest_message=1000)
    for rank, memory in enumerate(world.ranks):
        state, tag, own, peer, _, _, _, epoch = memory.fault[:8].tolist()
        if rank == missing:
            assert state == 0
            continue
        assert (state, own, peer, epoch) == (1, rank, missing, 1 + stops_before)
        assert tag in ((12, 13, 14), (15, 16))[stops_before]
    world.reset()
    world.timeout_ns = FOREVER
    routing = world.route()
    routing.combine(routing.dispatch())
    world.run(1)


@VARIANTS
def test_buffers_in_another_order_on_each_rank(variant: str, per_domain: int) -> None:
    """Three Buffers, each rank begins with another one, and a grid takes all of a GPU.

    Of each grid two blocks stay: the one that must, and of a dispatch the one that tells.
    """
    shape = Shape(variant=variant, per_domain=per_domain, grid=6)
    for seed in range(2):
        worlds = [World(shape, seed=3 * seed + i) for i in range(3)]
        routings = [world.route() for world in worlds]
        for op in ("dispatch", "combine"):
            if op == "dispatch":
                dispatched = [routing.dispatch() for routing in routings]
            else:
                for routing, each in zip(routings, dispatched, strict=True):
                    routing.combine(each)
            emulated.run_beside(
                worlds,
                seed,
                delay={3 * i + r: 5000 * ((i - r) % 3) for i in range(3) for r in range(3)},
                nanoseconds_per_pass=1000,
                places=shape.grid,
                max_passes=2_000_000,
            )


@VARIANTS
def test_masked_rank(variant: str, per_domain: int) -> None:
    """A rank that does not come is masked, the others go on; after a clean it is back."""
    missing = 2
    shape = Shape(tokens=(9, 9, 9), hidden=64, variant=variant, per_domain=per_domain)
    world = World(shape, seed=1, timeout_ns=300_000, shrink=True)
    masked = torch.tensor([0, 0, 0])
    for stops_before in ("combine", "dispatch", "dispatch"):
        if stops_before == "dispatch":
            masked[missing] = 1
        routing = world.route()
        sent = routing.dispatch(masked=masked)
        masked[missing] = 1
        routing.combine(sent, masked=masked)
        lost = world.ranks[missing]
        del lost.launches[["dispatch", "combine"].index(stops_before) :]
        if stops_before == "dispatch":
            lost.checks.clear()
        else:
            del lost.checks[-1]
        launches = [each for rank in world.ranks for each in rank.launches]
        emulate(launches, seed=1, latest_message=1000)
        for rank, memory in enumerate(world.ranks):
            assert not memory.fault.any()
            assert memory.local[192:195].tolist() == ([0, 0, 1] if rank != missing else [0, 0, 0])
            check(memory.checks)
            memory.launches.clear()
            memory.checks.clear()

    for memory in world.ranks:
        memory.local[192:256] = 0
    world.timeout_ns = FOREVER
    world.clean()
    routing = world.route()
    routing.combine(routing.dispatch())
    world.run(1)


@pytest.mark.parametrize("variant", [each for each in NEAR if each != "lines"])
@pytest.mark.parametrize("masked_before", ["dispatch", "combine"])
def test_rank_that_masks_itself(masked_before: str, variant: str) -> None:
    """Nothing is received from it, so no row of its own has a place that combine may read."""
    shape = Shape(num_ranks=1, tokens=(9,), experts_a_rank=6, variant=variant)
    world = World(shape, seed=1, shrink=True)
    routing = world.route()
    world.ranks[0].local[192] = int(masked_before == "dispatch")
    sent = routing.dispatch(masked=world.ranks[0].local[192:193].clone())
    world.run(1)
    if masked_before == "dispatch":
        _routes(sent[0].src_info, shape)["source_rows"].zero_()  # as if they were undefined
    world.ranks[0].local[192] = 1
    routing.combine(sent, masked=torch.tensor([1]))
    world.run(1)


@VARIANTS
@pytest.mark.parametrize("leaps", [1, 4, 7, 9])
def test_ranks_that_were_masked_for_billions_of_operations(
    leaps: int, variant: str, per_domain: int
) -> None:
    """Each side goes on alone; what it last heard of the other never looks like the future."""
    apart, leap = 2, 1 << 29
    shape = Shape(tokens=(9, 9, 9), hidden=64, variant=variant, per_domain=per_domain)
    world = World(shape, seed=1, shrink=True)

    def heard_of_others(rank: int) -> list[Tensor]:
        others = [peer for peer in range(3) if (peer == apart) != (rank == apart)]
        halves = 2 if shape.remote else 1
        return [world.ranks[rank].signals[32 + peer :: 3][:halves] for peer in others]

    world.start_at(3, stale=1)
    for rank, memory in enumerate(world.ranks):
        memory.local[192:195] = torch.tensor([(r == apart) != (rank == apart) for r in range(3)])
    for _ in range(leaps):
        world.epochs += leap
        for rank, memory in enumerate(world.ranks):
            heard = [each.clone() for each in heard_of_others(rank)]
            world.refresh(memory, world.epochs)
            for now, before in zip(heard_of_others(rank), heard, strict=True):
                now.copy_(before)
            memory.local[32] = stamp(world.epochs, 0) >> 32
        for _ in range(2):  # both parities
            routing = world.route()
            routing.dispatch()
            world.run(1, compare=False, max_passes=2_000_000)
            for memory in world.ranks:
                assert not memory.fault.any()
                memory.launches.clear()
                memory.checks.clear()
    for memory in world.ranks:
        memory.local[192:256] = 0
    world.clean()
    routing = world.route()
    routing.combine(routing.dispatch())
    world.run(1, max_passes=2_000_000)


def test_signals_overtake_each_other() -> None:
    """Short operations in a row: that a rank has begun one may be heard after its next one."""
    shape = Shape(
        per_domain=1,
        hidden=8,
        num_topk=1,
        tokens=(1, 1, 1),
        max_tokens=2,
        variant="ldst",
        num_warps=2,
        grid=1,
    )
    for seed in range(36):
        world = World(shape, seed=seed)
        routing = world.route()
        sent = routing.dispatch()
        for index in range(8):
            if index % 3 == 2:
                routing.dispatch()
            else:
                routing.combine(sent)
        world.run(seed, delay={seed % 3: 5000}, max_passes=3_000_000, latest_message=3000)


@DOMAINS
def test_cleans_in_a_row(per_domain: int) -> None:
    """A rank may be in its next one, and a question come before the answer of the one before."""
    for seed in range(20):
        world = World(Shape(per_domain=per_domain, tokens=(0, 0, 0)), seed=seed)
        for rank, epoch in enumerate((7, 5, 3)):
            world.ranks[rank].local[32] = epoch
        for _ in range(1 + seed % 2 * 4):
            world.clean()
        world.epochs = 7
        world.run(seed, max_passes=1_000_000)


@DOMAINS
def test_clean_takes_the_latest_epoch(per_domain: int) -> None:
    for seed in range(4):
        world = World(Shape(per_domain=per_domain), seed=seed)
        for rank, epoch in enumerate((7, 7, 3)):
            world.ranks[rank].local[32] = epoch
        world.clean()
        world.clean()
        world.epochs = 7
        routing = world.route()
        routing.combine(routing.dispatch())
        world.run(seed, delay={seed % 3: 20_000})


@pytest.mark.parametrize("several", [False, True], ids=["one-domain", "domains"])
@pytest.mark.parametrize("first_seed", range(0, 24, 8))
def test_random_histories(first_seed: int, several: bool) -> None:
    """Operations in any order on one buffer, with late ranks and preempted threads."""
    for seed in range(first_seed, first_seed + 8):
        rng = random.Random(seed)
        num_ranks = rng.choice([2, 3, 4])
        per_domain = rng.choice([1, 2]) if several and num_ranks == 4 else int(several)
        shape = Shape(
            num_ranks=num_ranks,
            per_domain=per_domain,
            neighbours=rng.random() < 0.5,
            hidden=512 if num_ranks == 3 else 128,  # as in other tests: fewer kernels to compile
            variant=rng.choice(["tma", "ldst"] if several else NEAR),
            logfmt=several and rng.random() < 0.2,
            row_format=rng.choice([BF16, FP8]),
            tokens=tuple(rng.choice([0, 1, 7, rng.randrange(30)]) for _ in range(num_ranks)),
            max_tokens=30,
            grid=rng.choice([1, 2, 3, 5]),
            num_parts=rng.choice([1, 2, 3]),
            push_parts=1 if several else rng.choice([1, 2, 3]),
            hole=rng.choice([0, 0.2, 0.5, 0.8]),
            kind=rng.choice(["random", "hot", "twice"]),
        )
        world = World(shape, seed=seed)
        late = {rng.randrange(num_ranks): rng.randrange(30000)} if rng.random() < 0.3 else {}
        sent = []
        for _ in range(rng.randrange(2, 6)):
            if not sent or rng.random() < 0.5:
                routing = world.route()
                sent.append((routing, routing.dispatch(split=rng.random() < 0.3)))
            else:
                routing, dispatched = rng.choice(sent)
                routing.combine(dispatched, split=rng.random() < 0.3)
        world.run(
            seed,
            delay=late,
            yield_percent=rng.choice([0, 20, 60]),
            basic_blocks=rng.choice([0, 30, 200, 1000]),
        )


# ---- what reviews found ----------------------------------------------------------------


@VARIANTS
def test_x_is_the_callers_after_the_send(variant: str, per_domain: int) -> None:
    """Between a combine's send and its hook the next micro-batch writes its outputs there.

    As in every test here: `Routing.combine` writes to x as soon as it may.
    """
    shape = Shape(tokens=(7, 5, 11), variant=variant, per_domain=per_domain, zero_copy=True)
    world = World(shape, seed=1)
    routing = world.route()
    sent = routing.dispatch()
    world.run(1)
    routing.combine(sent, split=True)
    world.run(2)


@pytest.mark.parametrize("variant", [each for each in NEAR if each != "reduced"])
def test_sending_waits_for_nobody(variant: str) -> None:
    """Of two phases the first one ends though no peer comes; sums have their weights."""
    world = World(Shape(tokens=(7, 5, 11), variant=variant), seed=1)
    routing = world.route()
    sent = routing.dispatch()
    world.run(1)
    routing.combine(sent, split=True)
    for rank, memory in enumerate(world.ranks):
        del memory.launches[-1 if rank == 0 else 0 :]
        memory.checks.clear()
    world.run(1, compare=False)


@pytest.mark.parametrize("chooser", [0, 1])
@pytest.mark.parametrize("variant", NEAR)
def test_rows_beyond_a_slab_are_missed(variant: str, chooser: int) -> None:
    """Of another rank or of the own: a sum without them is never taken for whole."""
    shape = Shape(
        num_ranks=2, tokens=(2, 2), max_tokens=2, experts_a_rank=2, hidden=64, variant=variant
    )
    world = World(shape, seed=1, timeout_ns=300_000)
    idx = {chooser: [[0, 0, 0, 1]] * 2, 1 - chooser: [[3, -1, -1, -1]] * 2}
    common: dict[str, Any] = {"num_tokens": 2, "num_parts": 1, "sends": True, "receives": True}
    for rank in range(2):
        received = _guarded_outputs(shape, 2)
        topk_idx, weights = copy(torch.tensor(idx[rank])), copy(torch.ones(2, 4))
        routes = _routes(received.src_info, shape)
        world.queue(
            rank,
            shape.dispatch,
            2,
            x=copy(torch.ones(2, 64, dtype=torch.bfloat16)),
            topk_idx=topk_idx,
            topk_weights=weights,
            global_scale=copy(torch.tensor([1.0])),
            recv_x=received.recv_x,
            recv_scales=None,
            recv_count=received.recv_count,
            src_info=received.src_info,
            layout_range=received.layout_range,
            **routes,
            recv_stats=None,
            wait_cost=None,
            **common,
        )
        sent = routes.pop("source_weights")
        world.queue(
            rank,
            shape.combine,
            2,
            x=copy(torch.ones(2, 4, 64, dtype=torch.bfloat16)),
            topk_idx=topk_idx,
            topk_weights=sent if variant == "sent" else weights,
            **routes,
            out=guarded(2, 64, dtype=torch.bfloat16),
            wait_cost=None,
            **common,
        )
    world.run(1, compare=False)
    state, tag, own, peer, *_ = world.ranks[chooser].fault.tolist()
    assert (state, own, peer) == (1, chooser, 0)  # rank 0 has the slab
    assert tag == (28 if chooser == 0 else 16)


@pytest.mark.parametrize("variant", ["ldst", "reduced", "sent"])
def test_a_lost_rank_gets_no_other_masked(variant: str) -> None:
    """A rank that waits for the weights of a lost one sends its own sums late."""
    for seed, delay in ((seed, delay) for delay in (0, 3000) for seed in range(12)):
        shape = Shape(tokens=(9, 9, 3), hidden=64, variant=variant, hole=0.0)
        world = World(shape, seed=seed, timeout_ns=300_000, shrink=True)
        routing = world.route()
        sent = routing.dispatch()
        for memory in world.ranks:
            memory.launches.clear()
            memory.checks.clear()
        lost = torch.tensor([0, 0, 1])
        routing.combine(sent, masked=lost)
        world.ranks[2].launches.clear()
        world.ranks[2].checks.clear()
        world.run(seed, compare=False, delay={1: delay})
        for memory in world.ranks[:2]:
            check(memory.checks)
            assert memory.local[192:195].tolist() == lost.tolist()


@pytest.mark.parametrize(("late", "seed"), [(6200, 2), (6600, 2), (6700, 0), (6700, 1), (7000, 0)])
def test_blocks_agree_on_a_rank_that_comes_just_in_time(late: int, seed: int) -> None:
    """Some blocks see its counts, others have given up on it: the rows of others lie where said."""
    shape = Shape(tokens=(9, 9, 9), hidden=64, grid=4, hole=0.0)
    world = World(shape, seed=seed * 1000 + late, timeout_ns=FOREVER, shrink=True)
    routing = world.route()
    routing.dispatch()  # leave counts of other epochs behind
    routing.dispatch()
    world.run(seed * 1000 + late)
    world.keep.clear()
    world.timeout_ns = 60_000
    expected = world.route().dispatch()
    received = [each[0] for each in world.keep if isinstance(each, tuple) and len(each) == 2]
    world.run(seed * 1000 + late, compare=False, delay={0: late})
    for rank in (1, 2):
        layout_range, src_info = received[rank].layout_range, received[rank].src_info
        for e in range(shape.experts_a_rank):
            for source in (1, 2):
                begin, count = divmod(int(layout_range[e, source]), 1 << 32)
                at, want = divmod(int(expected[rank].layout_range[e, source]), 1 << 32)
                rows = expected[rank].src_info[e, at : at + want]
                assert src_info[e, begin : begin + count].tolist() == rows.tolist()


def test_a_peer_with_more_tokens_than_fit_writes_nowhere_else() -> None:
    """Called with another maximum: what is beyond this rank's own has no place."""
    for seed in range(3):
        shape = Shape(num_ranks=2, tokens=(3, 24), hidden=64, max_tokens=24, hole=0.0)
        world = World(shape, seed=seed)
        world.route().dispatch()
        (more,) = world.ranks[1].launches
        for memory in world.ranks:
            memory.launches.clear()
            memory.checks.clear()
        world.timeout_ns = 50_000
        world.shape = Shape(num_ranks=2, tokens=(3, 3), hidden=64, hole=0.0, grid=6)
        world.route().dispatch()
        (fewer,) = world.ranks[0].launches
        emulate([more, fewer], seed=seed)
