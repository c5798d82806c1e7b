"""The kernels of rows by expert, run on the CPU by the emulation, against the reference.

As in `test_emulated_intranode`, which has the world: ranks at once, operations queued one behind
the other, what arrives compared bit for bit.
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

from epjit.formats import CASTS
from epjit.handles import ExpertDispatched, ExpertHandle, IntranodeHandle, Placement
from epjit.kernels.intranode import CombineConfig, DispatchConfig, NotifyConfig
from epjit.kernels.layout import LayoutConfig
from epjit.reference import expert_major as reference
from tests.cpu import test_emulated_intranode as intranode
from tests.cpu.test_emulated_intranode import TOKENS
from tests.emulation import build, normal
from tests.emulation.build import guarded
from tests.emulation.normal import EXPERTS_A_RANK, HIDDEN_BYTES
from tests.emulation.world import copy

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")


@dataclass(frozen=True)
class Shape(intranode.Shape):
    """Choices of a test: those of compile time first, then those of the run."""

    has_weights: bool = True
    alignment: int = 4
    num_rows: int = 0  # of the outputs; 0 = as many as there are
    zero_padding: bool = True
    column_major: bool = False
    repeats: float = 0.0  # part of the tokens that select an expert twice
    is_weighted: bool = True
    row_bytes: int = HIDDEN_BYTES  # of a combine
    spare: int = 2  # slices that a warp of a combine has room for, beyond one of all rows of a sum

    @property
    def notify(self) -> NotifyConfig:
        return NotifyConfig(self.num_ranks, by_expert=True)

    @property
    def layout(self) -> LayoutConfig:
        return LayoutConfig(self.num_ranks, self.topk_is_int64, by_expert=True)

    @property
    def dispatch(self) -> DispatchConfig:
        return dataclasses.replace(super().dispatch, by_expert=True, has_weights=self.has_weights)

    @property
    def cached(self) -> DispatchConfig:
        return dataclasses.replace(
            self.dispatch,
            hidden_bytes=48,
            num_scales=0,
            topk_is_int64=True,
            num_warps=3,
            rows_per_warp=2,
            is_cached=True,
            format=0,
            is_f16=False,
        )

    @property
    def combine(self) -> CombineConfig:
        config = super().combine
        return dataclasses.replace(
            config,
            hidden_bytes=self.row_bytes,
            rows_per_warp=self.num_topk + self.num_ranks - 1 + self.spare if config.tma else 0,
            by_expert=True,
            is_weighted=self.is_weighted,
            has_weights=self.has_weights,
            slice_bytes=512 if config.tma else 0,
        )


class World(intranode.World):
    """All ranks of a test."""

    def route(self) -> Any:
        return Routing(self)


class Routing(intranode.Routing):
    """One dispatch by expert and what follows from it."""

    placements: dict[int, Placement]

    def __init__(self, world: World) -> None:
        self.placements = {}
        super().__init__(world)

    @functools.cached_property
    def by_expert(self) -> list[ExpertDispatched]:
        """Results of every rank."""
        shape, sent = self.shape, self.cast(self.inputs)
        return [
            reference.dispatch(
                self.reference,
                sent,
                rank,
                num_experts=shape.num_experts,
                expert_alignment=shape.alignment,
                num_worst_tokens=shape.num_worst_tokens,
                num_rows=shape.num_rows,
                column_major_scales=shape.column_major,
            )
            for rank in range(shape.num_ranks)
        ]

    def _input(self, rank: int) -> Any:
        given, shape = super()._input(rank), self.shape
        idx = given.topk_idx
        again = torch.rand(len(idx), generator=self.world.generator) < shape.repeats
        idx[again, -1] = idx[again, 0]
        _, _, per_expert, in_rank = self.reference.layout(idx, shape.num_experts)
        return dataclasses.replace(
            given, is_token_in_rank=copy(in_rank), num_tokens_per_expert=per_expert
        )

    def notify(self, rank: int) -> IntranodeHandle:
        shape, world, own = self.shape, self.world, self.inputs[rank]
        assert own.topk_idx is not None
        expected: IntranodeHandle = self.expected[rank].handle
        num_tokens, num_ranks = shape.tokens[rank], shape.num_ranks
        num_blocks = max(1, -(-num_tokens // 64))
        ints: dict[str, Any] = {"dtype": torch.int32}
        per_rank, per_expert = guarded(num_ranks, **ints), guarded(shape.num_experts, **ints)
        in_rank = guarded(num_tokens, num_ranks, dtype=torch.bool)
        local_position = guarded(num_tokens, shape.num_topk, dtype=torch.int16)
        block_base = guarded(num_blocks, shape.num_experts, **ints)
        world.queue(
            rank,
            shape.layout,
            num_blocks,
            topk_idx=own.topk_idx,
            domain_of=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=None,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            counters=world.ranks[rank].layout_counters,
            local_position=local_position,
            block_counts=block_base,
            num_tokens=num_tokens,
            num_topk=shape.num_topk,
            num_experts=shape.num_experts,
        )
        handle = IntranodeHandle(
            guarded(num_ranks, num_ranks, **ints),
            guarded(num_ranks, **ints),
            guarded(EXPERTS_A_RANK, **ints),
            guarded(expected.num_rows, **ints),
            in_rank,
            guarded(num_tokens, num_ranks, **ints),
        )
        wanted = self.by_expert[rank].handle.placement
        num_rows = wanted.source.shape[0]
        placed = Placement(
            guarded(expected.num_rows, 2 + shape.num_topk, **ints)[:, 2:],
            guarded(num_rows, **ints),
            guarded(EXPERTS_A_RANK, **ints),
            handle.recv_expert_counts,
        )
        row_base = guarded(num_ranks, EXPERTS_A_RANK, **ints)
        world.queue(
            rank,
            shape.notify,
            1 + num_ranks + 1,
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            rank_prefix=handle.rank_prefix_matrix,
            source_tokens=handle.source_tokens,
            expert_counts=handle.recv_expert_counts,
            send_head=handle.send_head,
            host_counts=guarded(1 + EXPERTS_A_RANK, dtype=torch.int64),
            ends=placed.ends,
            row_base=row_base,
            block_base=block_base,
            num_blocks=num_blocks,
            num_expert_rows=shape.num_rows,
            notify_stride=world.notify_stride,
            num_tokens=num_tokens,
            num_recv_rows=self.worst[rank],
            experts_per_rank=EXPERTS_A_RANK,
            expert_alignment=shape.alignment,
        )
        for name, got, want in zip(handle._fields, handle, expected, strict=True):
            if name != "recv_src_idx":
                world.expect(rank, name, got, want)
        world.expect(rank, "ends", placed.ends, wanted.ends)
        self.placements[rank] = placed
        self._of_placing = getattr(self, "_of_placing", {})
        self._of_placing[rank] = {
            "local_position": local_position,
            "block_base": block_base,
            "row_base": row_base,
            "source": placed.source,
        }
        return handle

    def _by_expert_parameters(self, rank: int) -> dict[str, Any]:
        placed, shape = self.placements[rank], self.shape
        return {
            "ends": placed.ends,
            "expert_counts": placed.counts,
            "row_of": placed.row_of,
            "row_of_stride": placed.row_of.stride(0),
            "num_recv_rows": self.by_expert[rank].handle.routing.num_rows,
            "num_expert_rows": placed.source.shape[0],
            "zero_padding": shape.zero_padding,
            "least_rows": -1,
            "experts_per_rank": EXPERTS_A_RANK,
            "recv_topk_idx": None,
        }

    def dispatch(self, *, count: bool = False) -> list[Tensor]:
        assert not count
        for rank in range(self.shape.num_ranks):
            self._queue_dispatch(rank, cached=False, **self._receive(rank))
            self.expect_handle(rank)
        self.world.epochs += 1
        return []

    def _receive(self, rank: int) -> dict[str, Any]:
        shape, own, expected = self.shape, self.inputs[rank], self.by_expert[rank]
        scales = own.scales
        assert scales is not None
        placed, wanted = self.placements[rank], expected.handle.placement
        num_rows = wanted.source.shape[0]
        recv_x = guarded(num_rows, expected.rows.shape[1], dtype=expected.rows.dtype)
        # As words: four scales of a byte each are one.
        num_words = shape.dispatch.num_scales
        if shape.column_major:
            memory = guarded(num_words, -(-num_rows // 4) * 4, dtype=torch.int32)
            recv_scales = memory[:, :num_rows].t()
        else:
            recv_scales = guarded(num_rows, num_words, dtype=torch.int32)
        recv_weights = guarded(num_rows, dtype=torch.float32)
        defined = self._defined(rank)
        self.expect_at(rank, "recv_x", recv_x, expected.rows, defined)
        if num_words:
            assert expected.scales is not None
            words = expected.scales.contiguous().view(torch.int32).view(num_rows, num_words)
            self.expect_at(rank, "recv_scales", recv_scales, words, defined)
        if shape.has_weights:
            assert expected.weights is not None
            self.world.expect(rank, "weights", recv_weights, expected.weights)
        self.world.expect(rank, "row_of", placed.row_of, wanted.row_of)
        self.world.expect(rank, "source", placed.source, wanted.source)
        return {
            "x": own.x,
            "scales": scales,
            "scale_token_stride": scales.stride(0),
            "scale_stride": scales.stride(1),
            "global_scale": self.global_scale,
            "topk_idx": own.topk_idx,
            "topk_weights": own.topk_weights,
            "recv_x": recv_x,
            "recv_scales": recv_scales,
            "recv_scale_row_stride": recv_scales.stride(0),
            "recv_scale_stride": recv_scales.stride(1),
            "recv_topk_weights": recv_weights,
            **self._of_placing[rank],
            **self._by_expert_parameters(rank),
        }

    def _defined(self, rank: int) -> Tensor:
        """Rows that have a meaning: selections, and padding that becomes zeros."""
        placed = self.by_expert[rank].handle.placement
        defined = placed.source >= 0
        if self.shape.zero_padding:
            before = torch.cat([placed.ends.new_zeros(1), placed.ends[:-1]])
            for start, end, count in zip(before, placed.ends, placed.counts, strict=True):
                defined[int(start) + int(count) : int(end)] = True
        return defined

    def _left_out(self, rank: int) -> Tensor:
        """Rows of choices whose token there was no room for."""
        placed = self.by_expert[rank].handle.placement
        is_choice = torch.zeros(len(placed.source), dtype=torch.bool)
        before = torch.cat([placed.ends.new_zeros(1), placed.ends[:-1]])
        for start, count in zip(before, placed.counts, strict=True):
            is_choice[int(start) : int(start) + int(count)] = True
        return is_choice & (placed.source < 0)

    def expect_at(self, rank: int, what: str, got: Tensor, wanted: Tensor, defined: Tensor) -> None:
        """Notes what rows must be; the others must be as they were."""
        whole = got.clone()
        if whole.element_size() == 1:  # not every dtype has an indexing kernel
            whole.view(torch.uint8)[defined] = wanted.view(torch.uint8)[defined]
        else:
            whole[defined] = wanted[defined]
        self.world.expect(rank, what, got, whole)

    def cached_dispatch(self) -> None:
        """Other rows along the same handle, with weights if the first had some."""
        shape, world = self.shape, self.world
        row_bytes = shape.cached.hidden_bytes
        payloads: list[Any] = [
            (
                copy(torch.randint(256, (n, row_bytes), generator=world.generator).byte()),
                None,
                copy(torch.rand(n, shape.num_topk, generator=world.generator)),
            )
            for n in shape.tokens
        ]
        handles: list[ExpertHandle] = [each.handle for each in self.by_expert]
        for rank, (x, _, weights) in enumerate(payloads):
            expected = reference.cached_dispatch(self.reference, payloads, handles, rank)
            assert expected.weights is not None
            recv_x = guarded(*expected.rows.shape, dtype=torch.uint8)
            recv_weights = guarded(expected.rows.shape[0], dtype=torch.float32)
            values = {
                **normal.NO_SELECTIONS,
                "x": x,
                "recv_x": recv_x,
                "topk_weights": weights,
                "recv_topk_weights": recv_weights,
                **self._by_expert_parameters(rank),
            }
            self._queue_dispatch(rank, cached=True, **values)
            self.expect_at(rank, "cached recv_x", recv_x, expected.rows, self._defined(rank))
            if shape.has_weights:
                whole = torch.where(self._left_out(rank), recv_weights, expected.weights)
                world.expect(rank, "cached weights", recv_weights, whole)
        world.epochs += 1

    def combine(self, *, num_biases: int = 0, num_parts: int = 1) -> None:
        """Rows by expert back to their owners, summed; NaN where no selection is."""
        shape, world = self.shape, self.world
        handles = [each.handle for each in self.by_expert]
        rows, factors, back = [], [], []
        for handle in handles:
            unused = handle.placement.source < 0
            n = len(unused)
            rows.append(copy(self._random_rows(n).masked_fill(unused[:, None], torch.nan)))
            for drawn in (factors, back):
                values = torch.rand(n, generator=world.generator)
                drawn.append(copy(values.masked_fill(unused, torch.nan)))
        for rank in range(shape.num_ranks):
            biases = [self._random_rows(shape.tokens[rank]) for _ in range(num_biases)]
            first, second = [*biases, None, None][:2]
            wanted_x, wanted_weights = reference.combine(
                self.reference,
                rows,
                handles,
                rank,
                row_weights=factors if shape.is_weighted else None,
                topk_weights=back if shape.has_weights else None,
                bias=(first, second),
                order=self.order(rank),
            )
            combined_x = guarded(*wanted_x.shape, dtype=wanted_x.dtype)
            combined_weights = guarded(shape.tokens[rank], shape.num_topk, dtype=torch.float32)
            world.queue(
                rank,
                shape.combine,
                shape.grid,
                **self.of_combine(rank),
                x=rows[rank],
                topk_weights=back[rank],
                row_of=self.placements[rank].row_of,
                row_of_stride=self.placements[rank].row_of.stride(0),
                row_weights=factors[rank],
                num_expert_rows=len(rows[rank]),
                bias_0=first,
                bias_1=second,
                combined_x=combined_x,
                combined_topk_weights=combined_weights,
                num_rows=handles[rank].routing.num_rows,
                num_tokens=shape.tokens[rank],
                num_parts=num_parts,
            )
            world.expect(rank, "combined_x", combined_x, wanted_x)
            if wanted_weights is not None:
                world.expect(rank, "combined_topk_weights", combined_weights, wanted_weights)
        world.epochs += 1


VARIANTS = pytest.mark.parametrize("variant", ["tma", "push", "ldst"])


@pytest.mark.parametrize(
    ("num_ranks", "variant"),
    [
        *((num_ranks, variant) for num_ranks in (3, 8) for variant in ("tma", "push", "ldst")),
        *((1, "push"), (2, "tma"), (4, "ldst")),
    ],
)
def test_one_dispatch(num_ranks: int, variant: str) -> None:
    shape = Shape(num_ranks=num_ranks, variant=variant, tokens=TOKENS[num_ranks])
    for seed in range(2):
        world = World(shape, seed=seed)
        world.route().dispatch()
        world.run(seed)


@VARIANTS
def test_dispatches_follow_each_other(variant: str) -> None:
    """Along handles of their own, first ones and cached ones, with more tokens than slots."""
    shape = Shape(variant=variant, column_major=True, alignment=1)
    for seed in range(2):
        world = World(shape, seed=seed)
        first, second = world.route(), world.route()
        first.dispatch()
        second.dispatch()
        first.cached_dispatch()
        second.cached_dispatch()
        first.dispatch()
        world.run(seed)


@VARIANTS
@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast: str, variant: str) -> None:
    """On the way to peers and to this rank's own rows, from bfloat16 and float16."""
    cases = {"tma": [(3, False)], "push": [(1, False), (3, True)], "ldst": [(3, True)]}
    for seed, (num_ranks, is_f16) in enumerate(cases[variant]):
        shape = Shape(
            num_ranks=num_ranks,
            variant=variant,
            tokens=TOKENS[num_ranks],
            cast=cast,
            cast_f16=is_f16,
            column_major=cast in ("fp8", "fp8_ue8m0"),
        )
        world = World(shape, seed=seed)
        route = world.route()
        route.dispatch()
        route.cached_dispatch()
        world.run(seed)


@pytest.mark.parametrize("cast", ["fp8", "nvfp4"])
def test_casts_of_long_rows(cast: str) -> None:
    shape = Shape(num_ranks=2, variant="push", tokens=(9, 4), cast=cast, is_long=True)
    world = World(shape, seed=0)
    world.route().dispatch()
    world.run(0)


COMBINES = pytest.mark.parametrize("variant", ["tma", "ldst"])


@COMBINES
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_one_combine(num_ranks: int, is_weighted: bool, variant: str) -> None:
    shape = Shape(
        num_ranks=num_ranks,
        variant=variant,
        tokens=TOKENS[num_ranks],
        is_weighted=is_weighted,
        is_f16=is_weighted,
        ordered=not is_weighted,
        has_weights=not is_weighted or num_ranks % 2 == 0,
    )
    for seed in range(2):
        world = World(shape, seed=seed)
        route = world.route()
        route.dispatch()
        route.combine(num_biases=seed, num_parts=1 + seed)
        world.run(seed)


@COMBINES
@pytest.mark.parametrize("row_bytes", [1536, 1104])
def test_combine_of_long_rows(row_bytes: int, variant: str) -> None:
    """Several slices a row, in parts, more than a ring holds, the last one whole or not."""
    for seed, spare in enumerate((0, 7)):
        shape = Shape(
            num_ranks=2,
            variant=variant,
            tokens=TOKENS[2],
            slots=8,
            row_bytes=row_bytes,
            spare=spare,
            is_weighted=seed == 1,
        )
        world = World(shape, seed=seed)
        route = world.route()
        route.dispatch()
        route.combine(num_biases=seed, num_parts=1)
        route.combine(num_parts=3)
        world.run(seed)


def test_random_operations() -> None:
    for seed in range(12):
        rng = random.Random(seed)
        num_ranks = rng.choice((1, 2, 3))
        static, ordered = rng.random() < 0.5, rng.random() < 0.5
        tokens = tuple(rng.choice((0, rng.randrange(1, 140))) for _ in range(num_ranks))
        shape = Shape(
            num_ranks=num_ranks,
            variant=rng.choice(("tma", "push", "ldst")),
            tokens=tokens,
            slots=rng.choice((2, 16, 64)),
            has_weights=rng.random() < 0.7,
            alignment=rng.choice((1, 3, 8)),
            num_worst_tokens=max(1, sum(tokens) - rng.choice((0, 0, 11))) if static else 0,
            num_rows=rng.choice((5, 40, 1500)) if static else 0,
            zero_padding=rng.random() < 0.5,
            column_major=rng.random() < 0.5,
            repeats=rng.choice((0.0, 0.3)),
            hole=rng.choice((0.2, 1.0)),
            hot=rng.random() < 0.3,
            is_weighted=rng.random() < 0.5,
            is_f16=not ordered and rng.random() < 0.5,  # those rows are large
            topk_is_int64=rng.random() < 0.5,
            ordered=ordered,
            row_bytes=rng.choice((HIDDEN_BYTES, 1104)),
            spare=rng.randrange(4),
        )
        world = World(shape, seed=seed)
        route = world.route()
        route.dispatch()
        for _ in range(rng.randrange(1, 4)):
            if rng.random() < 0.5:
                route.cached_dispatch()
            else:
                route.combine(num_biases=rng.randrange(3), num_parts=rng.randrange(1, 4))
        world.run(seed, yield_percent=rng.choice((0, 20)), basic_blocks=rng.choice((0, 200)))
