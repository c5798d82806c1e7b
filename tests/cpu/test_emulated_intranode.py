"""The kernels of one NVLink domain, run on the CPU by the emulation, against the reference.

Several ranks at once, the order of threads drawn from a seed. A test queues the operations of each
rank one after the other, as a stream would, so that ranks are in different operations at the same
time; what arrives is compared bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from epjit.calls import Order
from epjit.formats import CASTS, NVFP4, RowFormat
from epjit.handles import IntranodeHandle
from epjit.kernels.intranode import (
    COMBINE_OF_EXPERTS,
    DISPATCH_OF_EXPERTS,
    NOTIFY_OF_EXPERTS,
    CombineConfig,
    DispatchConfig,
    NotifyConfig,
)
from epjit.kernels.layout import OF_EXPERTS, LayoutConfig
from epjit.reference import expert_major
from epjit.reference import intranode as reference
from tests.emulation import build, normal
from tests.emulation import world as emulated
from tests.emulation.build import guarded
from tests.emulation.normal import ALIGNMENT, EXPERTS_A_RANK, HIDDEN_BYTES, OPS
from tests.emulation.world import FOREVER, LONG_RUNS, copy, stamp
from tests.rounds.low_latency import rows_to_cast

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")


@dataclass(frozen=True)
class Shape:
    """Choices of a test: those of compile time first, then those of the run."""

    num_ranks: int = 4
    variant: str = "tma"
    num_topk: int = 3
    num_scales: int = 2
    topk_is_int64: bool = True
    is_f16: bool = False
    tokens: tuple[int, ...] = (40, 33, 0, 57)
    slots: int = 16  # of a dispatch; a combine gets the same bytes
    grid: int = 4  # 2 pushing warps a block: combine needs at least num_ranks - 1 of them
    num_worst_tokens: int | tuple[int, ...] = 0  # of all ranks, or of each
    hole: float = 0.2  # part of the selections that are -1
    hot: bool = False  # every token selects expert 0
    guesses: float = 0.0  # part of the dispatches that are launched before the counts are known
    no_room: float = 0.0  # direct: part of the dispatches whose outputs peers cannot reach
    ordered: bool = False  # combine orders the ranks by choices
    cast: str | None = None  # name of a format that dispatch casts rows to
    cast_f16: bool = False  # rows are fp16 before
    is_long: bool = False  # rows that are cast have more items than a warp loads at once

    @property
    def row_format(self) -> RowFormat | None:
        return None if self.cast is None else CASTS[self.cast]

    @property
    def hidden(self) -> int:
        """Channels of rows that are cast."""
        return 4096 if self.is_long else 512 if self.cast == "fp8_ue8m0" else 256

    @property
    def domains(self) -> list[range]:
        return [range(self.num_ranks)]

    @property
    def num_experts(self) -> int:
        return self.num_ranks * EXPERTS_A_RANK

    @property
    def choice_bits(self) -> int:
        return 0 if not self.ordered else 64 if self.topk_is_int64 else 32

    @property
    def notify(self) -> NotifyConfig:
        return NotifyConfig(self.num_ranks)

    @property
    def layout(self) -> LayoutConfig:
        return LayoutConfig(self.num_ranks, self.topk_is_int64)

    @property
    def dispatch(self) -> DispatchConfig:
        config = DispatchConfig(
            num_ranks=self.num_ranks,
            hidden_bytes=HIDDEN_BYTES,
            num_scales=self.num_scales,
            num_topk=self.num_topk,
            topk_is_int64=self.topk_is_int64,
            push=self.variant in ("push", "direct"),
            direct=self.variant == "direct",
            tma=self.variant != "ldst",
            num_warps=4,
            rows_per_warp=3,
        )
        if self.row_format is None:
            return config
        return dataclasses.replace(
            config,
            hidden_bytes=self.row_format.row_bytes(self.hidden),
            num_scales=self.row_format.num_scale_bytes(self.hidden) // 4,
            format=self.row_format.code,
            is_f16=self.cast_f16,
        )

    @property
    def cached(self) -> DispatchConfig:
        config = dataclasses.replace(self.dispatch, num_topk=0, topk_is_int64=True)
        if self.row_format is not None:
            return config
        return dataclasses.replace(
            config, hidden_bytes=48, num_scales=0, num_warps=3, rows_per_warp=2
        )

    @property
    def combine(self) -> CombineConfig:
        return CombineConfig(
            num_ranks=self.num_ranks,
            hidden_bytes=HIDDEN_BYTES,
            num_topk=self.num_topk,
            is_f16=self.is_f16,
            tma=self.variant != "ldst",
            num_warps=4,
            num_push_warps=2,
            rows_per_warp=3,
            choice_bits=self.choice_bits,
        )


@dataclass(kw_only=True)
class Rank(emulated.Rank):
    """One rank's memory: what peers see, then what they do not."""

    slots: Tensor
    words: Tensor
    signals: Tensor
    places: Tensor
    notify: Tensor
    layout_counters: Tensor


class World(normal.World):
    """All ranks of a test; methods queue one operation on every rank and what it must give."""

    counters = 32
    zeroed = ("signals", "places", "words", "notify")

    def __init__(self, shape: Shape, *, seed: int, timeout_ns: int = FOREVER) -> None:
        super().__init__(seed=seed, timeout_ns=timeout_ns)
        self.shape = shape
        self.notify_stride = shape.num_ranks + 2 + EXPERTS_A_RANK + 2
        num_bytes = shape.slots * shape.dispatch.bytes_a_token
        # A combine has a slot for every rank; at least two windows of one row.
        num_bytes = max(num_bytes, 2 * shape.combine.bytes_a_token)
        self.ranks = [
            Rank(
                slots=guarded(num_bytes, dtype=torch.uint8),
                words=guarded(shape.num_ranks * 4096, dtype=torch.int64, fill=0),
                signals=guarded(40, dtype=torch.int64, fill=0),
                places=guarded(shape.num_ranks, 8, dtype=torch.int64, fill=0),
                notify=guarded(shape.num_ranks, self.notify_stride, dtype=torch.int32, fill=0),
                local=guarded(64, dtype=torch.int32, fill=0),
                fault=guarded(16, dtype=torch.int64, fill=0),
                layout_counters=guarded(
                    1 + shape.num_ranks + shape.num_experts, dtype=torch.int32, fill=0
                ),
            )
            for _ in range(shape.num_ranks)
        ]

    def refresh(self, rank: Rank, epoch: int) -> None:
        rank.signals[:8] = stamp(epoch, 0)  # finish
        rank.signals[32:] = stamp(epoch, 0)  # entered

    def route(self) -> Routing:
        return Routing(self)

    def common(self, rank: int, config: Any) -> dict[str, Any]:
        return {
            **super().common(rank, config),
            "signals": [each.signals for each in self.ranks],
            "places": [each.places for each in self.ranks],
            "outputs": [],  # so that places are addresses: each output keeps a guarded end
            "slots": [each.slots for each in self.ranks],
            "words": [each.words for each in self.ranks],
            "notify": [each.notify for each in self.ranks],
            "global_scale": 0,
            **(OF_EXPERTS | NOTIFY_OF_EXPERTS | DISPATCH_OF_EXPERTS | COMBINE_OF_EXPERTS),
        }


class Routing(normal.Routing):
    @functools.cached_property
    def global_scale(self) -> Tensor | None:
        """Of the cast."""
        return copy(torch.tensor([0.05])) if self.shape.row_format is NVFP4 else None

    def cast(self, inputs: list[reference.RankInput]) -> list[reference.RankInput]:
        row_format = self.shape.row_format
        if row_format is None:
            return inputs
        return [expert_major.cast(each, row_format, self.global_scale) for each in inputs]

    def _input(self, rank: int) -> reference.RankInput:
        given, shape = super()._input(rank), self.shape
        if shape.row_format is None:
            return given
        dtype = torch.float16 if shape.cast_f16 else torch.bfloat16
        seed = int(torch.randint(1 << 30, (1,), generator=self.world.generator))
        x = rows_to_cast(len(given.x), shape.hidden, seed=seed).to(dtype)
        return dataclasses.replace(given, x=copy(x))

    def _sent(self, rank: int) -> dict[str, Any]:
        return {**super()._sent(rank), "global_scale": self.global_scale}

    def cached_dispatch(self) -> None:
        if self.shape.row_format is None:
            super().cached_dispatch()
            return
        world, ranks = self.world, range(self.shape.num_ranks)
        given = [self._input(rank) for rank in ranks]
        xs, scales = zip(*[(each.x, each.scales) for each in self.cast(given)], strict=True)
        handles = [each.handle for each in self.expected]
        for rank in ranks:
            expected = self.reference.cached_dispatch(xs, scales, handles, rank)
            outputs = self._outputs(rank, len(expected[0]))
            values = {
                **normal.NO_SELECTIONS,
                "x": given[rank].x,
                "global_scale": self.global_scale,
                "recv_x": outputs["recv_x"],
                "recv_scales": outputs["recv_scales"],
                "experts_per_rank": 1,
            }
            self._queue_dispatch(rank, cached=True, least_rows=-1, **values)
            n = self.num_recv[rank]
            for name, want in zip(("recv_x", "recv_scales"), expected, strict=True):
                world.expect(rank, f"cached {name}", outputs[name][:n], want[:n])
        world.epochs += 1

    def _outputs(self, rank: int, num_rows: int) -> dict[str, Tensor]:
        row_format = self.shape.row_format
        outputs = super()._outputs(rank, num_rows)
        if row_format is None:
            return outputs
        assert row_format.scale_dtype is not None
        columns = row_format.num_columns(self.shape.hidden)
        num_scales = row_format.num_scale_columns(self.shape.hidden)
        return {
            **outputs,
            "recv_x": guarded(num_rows, columns, dtype=row_format.x_dtype),
            "recv_scales": guarded(num_rows, num_scales, dtype=row_format.scale_dtype),
        }

    def notify(self, rank: int) -> IntranodeHandle:
        shape, world = self.shape, self.world
        own, expected = self.inputs[rank], self.expected[rank].handle
        num_tokens, num_ranks = shape.tokens[rank], shape.num_ranks
        assert own.topk_idx is not None
        per_rank, per_expert, in_rank = self._layout(rank, own.topk_idx, own.topk_idx, "layout")
        rank_prefix = guarded(num_ranks, num_ranks, dtype=torch.int32)
        source_tokens = guarded(num_ranks, dtype=torch.int32)
        expert_counts = guarded(EXPERTS_A_RANK, dtype=torch.int32)
        src_idx = guarded(expected.num_rows, dtype=torch.int32)
        send_head = guarded(num_tokens, num_ranks, dtype=torch.int32)
        host_counts = guarded(1 + EXPERTS_A_RANK, dtype=torch.int64)
        world.queue(
            rank,
            shape.notify,
            1 + num_ranks,
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            rank_prefix=rank_prefix,
            source_tokens=source_tokens,
            expert_counts=expert_counts,
            send_head=send_head,
            host_counts=host_counts,
            notify_stride=world.notify_stride,
            num_tokens=num_tokens,
            num_recv_rows=self.worst[rank],
            experts_per_rank=EXPERTS_A_RANK,
            expert_alignment=ALIGNMENT,
        )
        selected = expected.recv_expert_counts.tolist()
        aligned = [-(-count // ALIGNMENT) * ALIGNMENT for count in selected]
        world.expect(rank, "counts", host_counts[1:], torch.tensor(aligned))
        if not self.worst[rank]:
            world.expect(rank, "rows", host_counts[:1], torch.tensor(self.num_recv[rank:][:1]))
        handle = IntranodeHandle(
            rank_prefix, source_tokens, expert_counts, src_idx, in_rank, send_head
        )
        for name, got, wanted in zip(handle._fields, handle, expected, strict=True):
            if name not in ("recv_src_idx", "is_token_in_rank"):
                world.expect(rank, name, got, wanted)
        return handle

    def _layout(
        self, rank: int, idx: Tensor, expected: Tensor, what: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A layout of selections, which are `expected` by the time when it runs."""
        shape, world = self.shape, self.world
        num_tokens, num_ranks = idx.shape[0], shape.num_ranks
        per_rank = guarded(num_ranks, dtype=torch.int32)
        per_expert = guarded(shape.num_experts, dtype=torch.int32)
        in_rank = guarded(num_tokens, num_ranks, dtype=torch.bool)
        world.queue(
            rank,
            shape.layout,
            max(1, -(-num_tokens // 64)),
            topk_idx=idx,
            domain_of=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=None,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            counters=world.ranks[rank].layout_counters,
            num_tokens=num_tokens,
            num_topk=shape.num_topk,
            num_experts=shape.num_experts,
        )
        layout = (per_rank, per_expert, in_rank)
        wanted = reference.layout(expected, shape.num_experts, num_ranks)
        for name, got, want in zip("REt", layout, wanted, strict=True):
            world.expect(rank, f"{what} {name}", got, want)
        return layout

    def dispatch(self, *, count: bool = False) -> list[Tensor]:
        """Rows, scales and selections to where they were routed.

        Args:
            count: Read what has come in a kernel that waits for no peer: it is wrong if the
                dispatch ends before all of it is there.
        """
        selections = super().dispatch()
        for rank, idx in enumerate(selections if count else ()):
            expected = self.expected[rank].recv_topk_idx
            assert expected is not None
            self._layout(rank, idx, expected, "counted")
        return selections

    def common(self, rank: int) -> dict[str, Any]:
        handle = self.handles[rank]
        return {
            "rank_prefix": handle.rank_prefix_matrix,
            "source_tokens": handle.source_tokens,
            "send_head": handle.send_head,
            "num_tokens": self.shape.tokens[rank],
        }

    def of_dispatch(self, rank: int, *, cached: bool) -> dict[str, Any]:
        shape = self.shape
        config = shape.cached if cached else shape.dispatch
        # Whether peers write this rank's outputs; then it has no use for warps that pull.
        drawn = torch.rand((), generator=self.world.generator).item() if shape.no_room else 1
        has_room = config.direct and shape.num_ranks > 1 and drawn >= shape.no_room
        return {
            "recv_src_idx": 0 if cached else self.handles[rank].recv_src_idx,
            "num_slots": shape.slots,
            "has_room": has_room,
            "num_stage_warps": config.num_warps if has_room else 1 if cached else 2,
        }

    def order(self, rank: int) -> Order | None:
        idx = self.inputs[rank].topk_idx
        return Order(idx, self.shape.num_experts) if self.shape.ordered else None

    def _random_rows(self, num_rows: int) -> Tensor:
        rows = super()._random_rows(num_rows)
        if self.shape.ordered:  # sums that tell in which order they were added
            rows.copy_((4 * rows).round().remainder(3) - 1)
            rows[:, ::2] *= 2.0**24
        return rows

    def expect_handle(self, rank: int) -> None:
        n, got = self.num_recv[rank], self.handles[rank].recv_src_idx
        wanted = self.expected[rank].handle.recv_src_idx
        self.world.expect(rank, "recv_src_idx", got[:n], wanted[:n])

    def of_combine(self, rank: int) -> dict[str, Any]:
        handle = self.handles[rank]
        row_bytes = self.shape.combine.bytes_a_token
        return {
            "recv_src_idx": handle.recv_src_idx,
            "send_head": handle.send_head,
            "rank_prefix": handle.rank_prefix_matrix,
            "topk_idx": self.inputs[rank].topk_idx if self.shape.choice_bits else None,
            "num_choices": self.shape.num_topk,
            "experts_per_rank": EXPERTS_A_RANK,
            "num_slots": self.world.ranks[0].slots.numel() // row_bytes // 2 * 2,
        }


TOKENS = {
    1: (45,),
    2: (61, 38),
    3: (40, 0, 51),
    4: (40, 33, 0, 57),
    8: (20, 9, 0, 31, 12, 1, 25, 17),
}
VARIANTS = pytest.mark.parametrize("variant", ["tma", "push", "ldst", "direct"])


@VARIANTS
@pytest.mark.parametrize("num_ranks", [3, 8])  # others: test_operations_follow_each_other
def test_one_round(num_ranks: int, variant: str) -> None:
    shape = Shape(num_ranks=num_ranks, variant=variant, tokens=TOKENS[num_ranks])
    for seed in range(3):
        world = World(shape, seed=seed)
        world.one_round()
        world.run(seed)


@VARIANTS
@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast: str, variant: str) -> None:
    """On the way to peers, to their final rows too, and to this rank's own, from both dtypes.

    A cached one has no selections, so that nothing follows a row but its scales.
    """
    for seed, num_ranks in enumerate((1, 3)):
        shape = Shape(
            num_ranks=num_ranks,
            variant=variant,
            tokens=TOKENS[num_ranks],
            cast=cast,
            cast_f16=seed == 1,
            no_room=0.3,
            guesses=0.5,
        )
        world = World(shape, seed=seed)
        routing = world.one_round()
        routing.cached_dispatch()
        routing.dispatch()
        world.run(seed)


@VARIANTS
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_operations_follow_each_other(num_ranks: int, variant: str) -> None:
    """A handle is used again after others; no rank waits for the others between operations."""
    shape = Shape(num_ranks=num_ranks, variant=variant, tokens=TOKENS[num_ranks])
    for seed in range(3):
        world = World(shape, seed=seed)
        world.follow_each_other()
        world.run(seed)


@VARIANTS
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_next_kernel_sees_all_that_has_come(num_ranks: int, variant: str) -> None:
    """Also on a rank that is ready long before a peer has sent its last row."""
    shape = Shape(num_ranks=num_ranks, variant=variant, tokens=TOKENS[num_ranks], no_room=0.2)
    for seed in range(4):
        world = World(shape, seed=seed)
        routing = world.route()
        routing.dispatch(count=True)
        routing.dispatch(count=True)
        world.run(seed, delay={seed % num_ranks: 3000 * seed})


@VARIANTS
@pytest.mark.parametrize(("slots", "num_ranks"), [(6, 2), (6, 4), (10, 2), (64, 4), (1024, 2)])
def test_any_size_of_the_buffer(slots: int, num_ranks: int, variant: str) -> None:
    shape = Shape(num_ranks=num_ranks, variant=variant, tokens=TOKENS[num_ranks], slots=slots)
    for seed in range(3):
        world = World(shape, seed=seed)
        routing = world.one_round()
        routing.dispatch()
        world.run(seed)


@VARIANTS
def test_hundreds_of_windows(variant: str) -> None:
    """More windows than a word's eight bits tell apart."""
    shape = Shape(num_ranks=2, variant=variant, tokens=(2200, 1700), slots=6)
    world = World(shape, seed=0)
    world.one_round()
    world.run(0)


@VARIANTS
@pytest.mark.parametrize("tokens", [(0, 0, 0, 0), (0, 0, 30, 0), (1, 0, 0, 0), (1, 1, 1, 1)])
def test_few_tokens(tokens: tuple[int, ...], variant: str) -> None:
    for grid in (2, 4):
        world = World(Shape(variant=variant, tokens=tokens, grid=grid), seed=grid)
        world.one_round(num_biases=1, num_parts=8)
        world.run(grid)


@pytest.mark.parametrize(
    ("num_ranks", "variant"), [(1, "ldst"), (3, "tma"), (8, "tma"), (8, "ldst")]
)
def test_ranks_in_the_order_of_the_choices(num_ranks: int, variant: str) -> None:
    """As DeepEP 2 adds them."""
    for seed in range(2):
        shape = Shape(
            num_ranks=num_ranks,
            variant=variant,
            tokens=TOKENS[num_ranks],
            num_topk=min(8, 3 * num_ranks),
            topk_is_int64=bool(seed),
            ordered=True,
        )
        world = World(shape, seed=seed)
        world.one_round(num_biases=seed, num_parts=1 + seed)
        world.run(seed)


@VARIANTS
@pytest.mark.parametrize("hole", [0.0, 0.8, 1.0])
def test_holes_and_a_hot_expert(hole: float, variant: str) -> None:
    for seed in range(2):
        world = World(Shape(variant=variant, hole=hole, hot=True, slots=8), seed=seed)
        world.one_round()
        world.run(seed)


@VARIANTS
def test_all_tokens_to_one_rank(variant: str) -> None:
    for seed in range(2):
        world = World(Shape(variant=variant, num_topk=1, hole=0.0, hot=True), seed=seed)
        world.one_round()
        world.run(seed)


@VARIANTS
def test_worst_case_rows(variant: str) -> None:
    shape = Shape(variant=variant, num_worst_tokens=sum(TOKENS[4]) + 5)
    for seed in range(2):
        world = World(shape, seed=seed)
        routing = world.route()
        routing.dispatch()
        routing.cached_dispatch()
        routing.combine()
        world.run(seed)


@VARIANTS
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_more_rows_than_there_is_room_for(num_ranks: int, variant: str) -> None:
    """Nothing is written behind the outputs; all else arrives, is combined, and goes on."""
    rooms = {1: [(20,)], 2: [(30, 12), (0, 12)], 4: [(70, 4, 9, 1000), (1, 0, 33, 34)]}
    for seed, worst in enumerate(rooms[num_ranks] * 2):
        shape = Shape(
            num_ranks=num_ranks,
            variant=variant,
            tokens=TOKENS[num_ranks],
            num_worst_tokens=worst,
            slots=(16, 6)[seed // 2 % 2],
            no_room=seed % 2 * 0.5,
        )
        world = World(shape, seed=seed)
        for _ in range(2):
            routing = world.route()
            routing.dispatch(count=True)
            routing.combine(num_biases=1, num_parts=2)
            routing.cached_dispatch()
            assert world.overflows
            world.run(seed)


@VARIANTS
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_launches_before_the_counts_are_known(num_ranks: int, variant: str) -> None:
    """Ranks that guess, rightly or not, beside others that wait; every window has to be freed."""
    for seed in range(8):
        shape = Shape(
            num_ranks=num_ranks,
            variant=variant,
            tokens=TOKENS[num_ranks],
            slots=(6, 16, 64)[seed % 3],
            guesses=0.8,
            no_room=0.3,
        )
        world = World(shape, seed=seed)
        routing = world.one_round()
        routing.dispatch()
        routing.cached_dispatch()
        routing.dispatch()
        world.run(seed, delay={seed % num_ranks: 2000 * (seed % 2)})


@VARIANTS
@pytest.mark.parametrize("op", ["cached_dispatch", "combine"])
def test_handle_whose_tensors_do_not_fit_together(op: str, variant: str) -> None:
    """Rows of another dispatch than the counts: nothing is touched that lies outside."""
    for seed, cut in enumerate((0, 3, 19)):
        world = World(Shape(variant=variant, slots=64), seed=seed, timeout_ns=400_000)
        routing = world.route()
        routing.dispatch()
        world.run(seed)
        num_recv = routing.num_recv[1]
        handle, expected = routing.handles[1], routing.expected[1]
        few = handle.recv_src_idx[:cut]
        routing.handles[1] = handle._replace(recv_src_idx=copy(few))
        named = expected.handle._replace(recv_src_idx=few)
        routing.expected[1] = expected._replace(handle=named)
        getattr(routing, op)()
        world.run(seed, compare=False)
        record = world.ranks[1].fault[8:].tolist()
        assert (record[0], record[5], record[6]) == (1, cut, num_recv)


@VARIANTS
@pytest.mark.parametrize(("epoch", "stale"), LONG_RUNS)
def test_signals_of_long_ago(epoch: int, stale: int, variant: str) -> None:
    """Signals that only some operations raise are not new after any number of others."""
    shape = Shape(variant=variant, tokens=(50, 33, 40, 57), slots=6, no_room=0.3)
    for seed in range(3):
        world = World(shape, seed=seed)
        world.start_at(epoch, stale=stale)
        routing = world.one_round()
        routing.cached_dispatch()
        world.run(seed, delay={seed: 2000})


@VARIANTS
def test_int32_indices_and_half_precision(variant: str) -> None:
    shape = Shape(num_ranks=2, tokens=TOKENS[2], variant=variant, topk_is_int64=False, is_f16=True)
    for seed in range(2):
        world = World(shape, seed=seed)
        world.one_round(num_biases=2)
        world.run(seed)


@pytest.mark.parametrize("slots", [6, 64])
@pytest.mark.parametrize("no_room", [0.5, 1.0])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_some_ranks_without_room(num_ranks: int, no_room: float, slots: int) -> None:
    """Direct: whoever has no room is pushed to, in the same operation as those that have."""
    shape = Shape(
        num_ranks=num_ranks,
        variant="direct",
        tokens=TOKENS[num_ranks],
        slots=slots,
        no_room=no_room,
    )
    for seed in range(4):
        world = World(shape, seed=seed)
        routing = world.one_round()
        routing.dispatch()
        routing.cached_dispatch()
        routing.dispatch()
        world.run(seed, delay={seed % num_ranks: 5000 * seed})


def test_layout_and_numbering_of_many_tokens() -> None:
    """More tokens than one round of a block of notify."""
    for seed in range(3):
        world = World(Shape(num_ranks=2, tokens=(5000, 3)), seed=seed)
        world.route()
        world.run(seed, basic_blocks=10)


@VARIANTS
@pytest.mark.parametrize("late", range(4))
def test_delayed_rank(late: int, variant: str) -> None:
    world = World(Shape(variant=variant), seed=late)
    world.one_round()
    world.run(late, delay={late: 20_000})


TAGS = {"notify": (1, 2), "dispatch": (3, 4, 5), "combine": (6, 7, 8)}


@VARIANTS
@pytest.mark.parametrize("stops_before", OPS)
def test_withheld_rank_leaves_fault_records(stops_before: str, variant: str) -> None:
    """The others end, say whom they missed, and work again after a reset."""
    world = World(Shape(variant=variant, tokens=(30, 30, 30, 30)), seed=1, timeout_ns=300_000)
    for _, tag, *_ in world.run_without((2,), stops_before):
        assert tag in TAGS[stops_before]


@VARIANTS
@pytest.mark.parametrize("late", [30_000, 100_000, 300_000])
def test_rank_that_comes_after_the_timeout(late: int, variant: str) -> None:
    """All ranks end, none writes where it should not, and those without a fault are right."""
    for seed in range(6):
        world = World(
            Shape(variant=variant, tokens=(30, 30, 30, 30)), seed=seed, timeout_ns=200_000
        )
        world.one_round().cached_dispatch()
        world.run(seed, delay={seed % 4: late}, compare=False)
        assert world.check_the_faultless() or late < 300_000


def test_wrong_kernel_is_found() -> None:
    """The comparison of this file is not blind: a handle that names other rows is seen."""
    world = World(Shape(), seed=0)
    routing = world.route()
    routing.dispatch()
    what, got, expected = next(each for each in world.ranks[1].checks if "recv_x" in each[0])
    world.ranks[1].checks.append((what, got, expected.flip(0)))
    with pytest.raises(AssertionError, match="rank 1: recv_x"):
        world.run(0)


@pytest.mark.parametrize("first_seed", range(0, 40, 8))
def test_random_histories(first_seed: int) -> None:
    """Operations in any order on one buffer, with late ranks and preempted threads."""
    for seed in range(first_seed, first_seed + 8):
        rng = random.Random(seed)
        num_ranks = rng.choice([2, 3, 4, 8])
        shape = Shape(
            num_ranks=num_ranks,
            variant=rng.choice(["tma", "push", "ldst", "direct"]),
            tokens=tuple(rng.choice([0, 1, 7, 30, rng.randrange(120)]) for _ in range(num_ranks)),
            slots=rng.choice([6, 8, 12, 30, 200]),
            grid=rng.choice([4, 5]) if num_ranks == 8 else rng.choice([2, 3, 4]),
            hole=rng.choice([0, 0.2, 0.5, 0.8]),
            hot=rng.random() < 0.3,
            num_worst_tokens=rng.choice([0, 0, 1200]),
            no_room=rng.choice([0, 0.3]),
            guesses=rng.choice([0.5, 1.0]),
        )
        cached = num_ranks in (2, 4)  # fewer kernels to compile
        World(shape, seed=seed).random_history(rng, seed, cached=cached)
