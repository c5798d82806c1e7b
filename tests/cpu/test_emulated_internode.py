"""The kernels between NVLink domains, run on the CPU by the emulation, against the reference.

As in `test_emulated_intranode`; what rail peers send lands late, out of order, and reads its source
when it lands.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from epjit.handles import InternodeHandle
from epjit.kernels.internode import (
    InternodeCombineConfig,
    InternodeDispatchConfig,
    InternodeNotifyConfig,
)
from epjit.reference import internode as reference
from epjit.runtime import fault
from tests.emulation import build, normal
from tests.emulation import world as emulated
from tests.emulation.build import guarded
from tests.emulation.normal import ALIGNMENT, EXPERTS_A_RANK, HIDDEN_BYTES, OPS
from tests.emulation.world import FOREVER, LONG_RUNS, copy, stamp

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")

CHUNK = 2


@dataclass(frozen=True)
class Shape:
    """Choices of a test: those of compile time first, then those of the run."""

    num_domains: int = 2
    num_local: int = 2
    tma: bool = True
    num_topk: int = 3
    num_scales: int = 2
    topk_is_int64: bool = True
    is_f16: bool = False
    tokens: tuple[int, ...] = (40, 33, 0, 57)
    shuffled: bool = False  # ranks of a domain do not follow each other
    ring_slots: int = 16  # of both operations
    slots: int = 6
    grid: int = 4
    num_worst_tokens: int | tuple[int, ...] = 0  # of all ranks, or of each
    hole: float = 0.2  # part of the selections that are -1
    hot: bool = False  # every token selects expert 0
    guesses: float = 0.0  # part of the dispatches that are launched before the counts are known

    @property
    def num_ranks(self) -> int:
        return self.num_domains * self.num_local

    @property
    def num_experts(self) -> int:
        return self.num_ranks * EXPERTS_A_RANK

    @property
    def domains(self) -> list[list[int]]:
        step = self.num_domains if self.shuffled else 1
        first = 1 if self.shuffled else self.num_local
        return [
            [n * first + j * step for j in range(self.num_local)] for n in range(self.num_domains)
        ]

    @property
    def notify(self) -> InternodeNotifyConfig:
        return InternodeNotifyConfig(self.num_domains, self.num_local)

    @property
    def dispatch(self) -> InternodeDispatchConfig:
        return InternodeDispatchConfig(
            num_domains=self.num_domains,
            num_local=self.num_local,
            hidden_bytes=HIDDEN_BYTES,
            num_scales=self.num_scales,
            num_topk=self.num_topk,
            topk_is_int64=self.topk_is_int64,
            tma=self.tma,
            num_copy_warps=3,
            num_put_warps=self.warps_for(self.num_domains - 1),
            rows_per_warp=3,
            tokens_per_chunk=CHUNK,
        )

    @property
    def cached(self) -> InternodeDispatchConfig:
        return dataclasses.replace(
            self.dispatch,
            hidden_bytes=48,
            num_scales=0,
            num_topk=0,
            topk_is_int64=True,
            num_copy_warps=2,
            num_put_warps=2,
            rows_per_warp=1,
        )

    @property
    def combine(self) -> InternodeCombineConfig:
        push = self.warps_for(self.num_domains * (self.num_local - 1))
        each = self.warps_for(self.num_domains - 1)
        return InternodeCombineConfig(
            num_domains=self.num_domains,
            num_local=self.num_local,
            hidden_bytes=HIDDEN_BYTES,
            num_topk=self.num_topk,
            is_f16=self.is_f16,
            tma=self.tma,
            num_warps=push + 2 * each + 2,
            num_push_warps=push,
            num_sum_warps=each,
            num_put_warps=each,
            rows_per_warp=3,
            tokens_per_chunk=CHUNK,
        )

    def warps_for(self, num_channels: int) -> int:
        """Warps of a block, so that each channel has one of its own."""
        return max(1, -(-num_channels // self.grid))


@dataclass(kw_only=True)
class Rank(emulated.Rank):
    """One rank's memory: what peers see, then what they do not."""

    slots: Tensor
    words: Tensor
    signals: Tensor
    done: Tensor
    rings: Tensor  # inbox, then stage
    control: Tensor  # entered, ready, credits, arrived of notify, arrived
    notify: Tensor  # inbox, then stage
    staged: Tensor


class World(normal.World):
    """All ranks of a test; methods queue one operation on every rank and what it must give."""

    counters = 510
    zeroed = ("signals", "done", "words", "control", "staged")

    def __init__(self, shape: Shape, *, seed: int, timeout_ns: int = FOREVER) -> None:
        super().__init__(seed=seed, timeout_ns=timeout_ns)
        self.shape = shape
        num_domains, num_ranks = shape.num_domains, shape.num_ranks
        self.notify_stride = -(-(2 + shape.num_local * (1 + EXPERTS_A_RANK)) // 4) * 4
        slot_bytes = max(shape.dispatch.slot_bytes, shape.combine.slot_bytes)
        self.ring_bytes = shape.ring_slots * slot_bytes
        self.ranks = [
            Rank(
                slots=guarded(
                    num_ranks * shape.slots * shape.combine.slot_bytes, dtype=torch.uint8
                ),
                words=guarded(
                    num_ranks * max(shape.slots, shape.ring_slots), dtype=torch.int64, fill=0
                ),
                signals=guarded(40, dtype=torch.int64, fill=0),
                done=guarded(num_ranks * 2, dtype=torch.int64, fill=0),
                rings=guarded(2 * num_domains * self.ring_bytes, dtype=torch.uint8),
                control=guarded(num_domains * (7 + shape.ring_slots), dtype=torch.int64, fill=0),
                notify=guarded(2 * num_domains * self.notify_stride, dtype=torch.int32, fill=0),
                staged=guarded(num_domains * shape.ring_slots, dtype=torch.int64, fill=0),
                local=guarded(512, dtype=torch.int32, fill=0),
                fault=guarded(16, dtype=torch.int64, fill=0),
            )
            for _ in range(num_ranks)
        ]
        self.ranks_table = torch.tensor(shape.domains, dtype=torch.int32).flatten()
        pes = list(range(num_ranks))
        random.Random(seed).shuffle(pes)
        self.pes = torch.tensor(pes, dtype=torch.int32)
        self.transport = build.transport(
            [
                [each.rings for each in self.ranks],
                [each.control for each in self.ranks],
                [each.notify for each in self.ranks],
            ],
            pes=pes,
        )

    def refresh(self, rank: Rank, epoch: int) -> None:
        rank.signals[:8] = stamp(epoch, 0)  # finish
        rank.signals[32:] = stamp(epoch, 0)  # entered
        num_domains = self.shape.num_domains
        words = rank.control[: 4 * num_domains]  # entered, ready: [num_domains, epoch & 1]
        words[epoch & 1 :: 2] = stamp(epoch, 0)
        words[(epoch - 1) & 1 :: 2] = stamp(epoch - 1, 0)

    def route(self) -> Routing:
        return Routing(self)

    def common(self, rank: int, config: Any) -> dict[str, Any]:
        shape, mine = self.shape, self.ranks[rank]
        domain, local = reference.place_of(rank, shape.domains)
        peers = [self.ranks[peer] for peer in shape.domains[domain]]
        is_notify = isinstance(config, InternodeNotifyConfig)
        num_domains = shape.num_domains
        inbox = [each.notify if is_notify else each.rings for each in peers]
        return {
            **super().common(rank, config),
            "signals": [each.signals for each in peers],
            "slots": [each.slots for each in peers],
            "words": [each.words for each in peers],
            "done": [each.done for each in peers],
            "inbox": mine.rings if isinstance(config, InternodeCombineConfig) else inbox,
            "stage": mine.notify[num_domains * self.notify_stride :]
            if is_notify
            else mine.rings[num_domains * self.ring_bytes :],
            "ring_bytes": self.ring_bytes,
            "entered": [each.control for each in peers],
            "credits": mine.control[4 * num_domains :],
            "arrived": mine.control[(6 if is_notify else 7) * num_domains :],
            "staged": mine.staged,
            "ranks": self.ranks_table,
            "pes": self.pes,
            "transport": self.transport[rank],
            "ring_slots": shape.ring_slots,
            "num_slots": shape.slots,
            "domain": domain,
            "local": local,
        }


class Routing(normal.Routing):
    def __init__(self, world: World) -> None:
        num_ranks = world.shape.num_ranks
        self.fits = [guarded(num_ranks, dtype=torch.int32) for _ in range(num_ranks)]
        super().__init__(world)

    def notify(self, rank: int) -> InternodeHandle:
        shape, world = self.shape, self.world
        own, expected = self.inputs[rank], self.expected[rank].handle
        num_tokens, num_ranks, num_domains = shape.tokens[rank], shape.num_ranks, shape.num_domains
        assert own.topk_idx is not None
        per_rank, per_domain, per_expert, _ = reference.layout(
            own.topk_idx, shape.num_experts, shape.domains
        )
        send_tokens = guarded(num_domains, num_tokens + 1, dtype=torch.int32)
        channel_tokens = guarded(num_domains, shape.num_local, dtype=torch.int32)
        send_head = guarded(num_tokens, num_ranks, dtype=torch.int32)
        passing_prefix = guarded(num_domains, dtype=torch.int32)
        expert_counts = guarded(EXPERTS_A_RANK, dtype=torch.int32)
        rank_prefix = guarded(num_ranks, dtype=torch.int32)
        src_meta = guarded(expected.num_rows, 8, dtype=torch.uint8)
        send_domain_head = guarded(num_tokens, num_domains, dtype=torch.int32)
        passing = guarded(expected.num_passing, dtype=torch.int32)
        host_counts = guarded(2 + EXPERTS_A_RANK, dtype=torch.int64)
        world.queue(
            rank,
            shape.notify,
            1 + num_ranks + num_domains,
            num_tokens_per_rank=copy(per_rank),
            num_tokens_per_domain=copy(per_domain),
            num_tokens_per_expert=copy(per_expert),
            is_token_in_rank=own.is_token_in_rank,
            rank_prefix=rank_prefix,
            channel_tokens=channel_tokens,
            passing_prefix=passing_prefix,
            expert_counts=expert_counts,
            send_head=send_head,
            send_domain_head=send_domain_head,
            send_tokens=send_tokens,
            fits=self.fits[rank],
            host_counts=host_counts,
            notify_stride=world.notify_stride,
            num_tokens=num_tokens,
            num_recv_rows=self.worst[rank],
            experts_per_rank=EXPERTS_A_RANK,
            expert_alignment=ALIGNMENT,
        )
        selected = expected.recv_expert_counts.tolist()
        aligned = [-(-count // ALIGNMENT) * ALIGNMENT for count in selected]
        counts = [int(expected.recv_rdma_rank_prefix_sum[-1]), *aligned]
        world.expect(rank, "counts", host_counts[1:], torch.tensor(counts))
        if not self.worst[rank]:
            world.expect(rank, "rows", host_counts[:1], torch.tensor(self.num_recv[rank:][:1]))
        handle = InternodeHandle(
            own.is_token_in_rank,
            send_tokens,
            channel_tokens,
            send_head,
            passing_prefix,
            expert_counts,
            rank_prefix,
            src_meta,
            send_domain_head,
            passing,
        )
        made_later = ("send_tokens", "recv_src_meta", "send_nvl_head")
        for name, got, wanted in zip(handle._fields, handle, expected, strict=True):
            if name not in made_later:
                world.expect(rank, name, got, wanted)
        world.expect(rank, "tokens to domains", send_tokens[:, num_tokens], per_domain)
        for n, length in enumerate(per_domain.tolist()):
            wanted = expected.send_tokens[n, :length]
            world.expect(rank, f"channel to {n}", send_tokens[n, :length], wanted)
        return handle

    def common(self, rank: int) -> dict[str, Any]:
        handle = self.handles[rank]
        return {
            "send_head": handle.send_head,
            "send_tokens": handle.send_tokens,
            "channel_tokens": handle.channel_tokens,
            "passing_prefix": handle.recv_rdma_rank_prefix_sum,
            "rank_prefix": handle.recv_gbl_rank_prefix_sum,
            "num_tokens": self.shape.tokens[rank],
        }

    def of_dispatch(self, rank: int, *, cached: bool) -> dict[str, Any]:
        if cached:
            names = ("recv_src_meta", "passing", "num_passing", "fits")
            return {**dict.fromkeys(names, 0), "num_send_warps": 1}
        handle = self.handles[rank]
        return {
            "recv_src_meta": handle.recv_src_meta,
            "passing": handle.send_nvl_head,
            "num_passing": handle.num_passing,
            "fits": self.fits[rank],
            "num_send_warps": 2,
        }

    def num_passing(self, rank: int) -> int:
        return self.handles[rank].num_passing

    def expect_handle(self, rank: int) -> None:
        handle, expected = self.handles[rank], self.expected[rank].handle
        passing = min(int(expected.recv_rdma_rank_prefix_sum[-1]), handle.num_passing)
        for name, length in (("recv_src_meta", self.num_recv[rank]), ("send_nvl_head", passing)):
            got, wanted = getattr(handle, name), getattr(expected, name)
            self.world.expect(rank, name, got[:length], wanted[:length])

    def of_combine(self, rank: int) -> dict[str, Any]:
        handle = self.handles[rank]
        return {
            "send_tokens": handle.send_tokens,
            "channel_tokens": handle.channel_tokens,
            "passing_prefix": handle.recv_rdma_rank_prefix_sum,
            "rank_prefix": handle.recv_gbl_rank_prefix_sum,
            "recv_src_meta": handle.recv_src_meta,
            "send_domain_head": handle.send_rdma_head,
            "passing": handle.send_nvl_head,
            "num_passing": handle.num_passing,
        }


VARIANTS = pytest.mark.parametrize("tma", [True, False], ids=["tma", "ldst"])


def tokens_of(num_ranks: int) -> tuple[int, ...]:
    return (38, 51, 0, 45, 1, 20, 9, 33)[:num_ranks]


@pytest.mark.parametrize("cut", [(4, 1), (2, 3)], ids=lambda c: f"{c[0]}x{c[1]}")
def test_one_round(cut: tuple[int, int]) -> None:
    """Others: test_operations_follow_each_other."""
    shape = Shape(*cut, tokens=tokens_of(cut[0] * cut[1]))
    for seed in range(3):
        world = World(shape, seed=seed)
        world.one_round()
        world.run(seed)


def test_no_operation_waits_for_what_it_has_sent() -> None:
    """A fence or a quiet takes one thread past every queue of every rank (IBGDA)."""
    world = World(Shape(), seed=1)
    routing = world.route()
    notify = world.run(1)
    routing.dispatch()
    dispatch = world.run(2)
    routing.combine()
    combine = world.run(3)
    for report in (notify, dispatch, combine):
        assert report.puts > 0
        assert report.received > 0
        assert (report.fences, report.quiets) == (0, 0)


@pytest.mark.parametrize(
    ("cut", "tma"),
    [((2, 1), True), ((2, 2), True), ((2, 2), False)],
    ids=["2x1", "2x2", "2x2-ldst"],
)
def test_operations_follow_each_other(cut: tuple[int, int], tma: bool) -> None:
    """A handle is used again after others; no rank waits for the others between operations."""
    shape = Shape(*cut, tma=tma, tokens=tokens_of(cut[0] * cut[1]))
    for seed in range(3):
        world = World(shape, seed=seed)
        world.follow_each_other()
        world.run(seed)


@pytest.mark.parametrize(
    ("slots", "ring_slots", "cut"),
    [(2, 4, (2, 2)), (2, 4, (3, 2)), (2, 64, (2, 2)), (64, 4, (3, 2)), (6, 8, (2, 2))],
)
def test_any_size_of_the_buffers(slots: int, ring_slots: int, cut: tuple[int, int]) -> None:
    """The smallest legal ones too: nothing waits for what cannot come."""
    num_ranks = cut[0] * cut[1]
    for seed in range(4):
        shape = Shape(
            *cut,
            tokens=tuple(random.Random(seed + r).randrange(60) for r in range(num_ranks)),
            slots=slots,
            ring_slots=ring_slots,
        )
        world = World(shape, seed=seed)
        routing = world.one_round(num_parts=1 + seed % 2)
        routing.dispatch()
        world.run(seed)


@VARIANTS
def test_slots_of_other_lengths(tma: bool) -> None:
    """A put over a slow link still reads its stage when the next operation writes there."""
    shape = Shape(3, 1, tma=tma, tokens=(12, 12, 12), grid=2)
    assert shape.cached.slot_bytes < min(shape.dispatch.slot_bytes, shape.combine.slot_bytes)
    for link in itertools.permutations(range(3), 2):
        world = World(shape, seed=0)
        routing = world.route()
        routing.dispatch()
        routing.cached_dispatch()
        routing.combine()
        routing.cached_dispatch()
        world.run(0, slow_link=link)


def test_domains_that_wait_for_each_other() -> None:
    """Tokens go to several domains, and their rings are full at different tokens."""
    for seed in range(4):
        shape = Shape(
            4, 1, tokens=(60, 47, 0, 55), ring_slots=4, grid=2 + seed % 3, hole=0.5, num_topk=2
        )
        world = World(shape, seed=seed)
        routing = world.one_round()
        routing.combine(num_parts=2)
        world.run(seed)


def test_hundreds_of_windows() -> None:
    """More windows than a word's eight bits tell apart."""
    shape = Shape(2, 1, tokens=(1100, 1040), ring_slots=4, slots=2)
    world = World(shape, seed=0)
    world.one_round()
    world.run(0)


@pytest.mark.parametrize("cut", [(3, 5), (2, 8), (8, 1)], ids=lambda c: f"{c[0]}x{c[1]}")
def test_larger_groups(cut: tuple[int, int]) -> None:
    num_ranks = cut[0] * cut[1]
    rng = random.Random(num_ranks)
    tokens = tuple(rng.choice([0, 1, 7, 18]) for _ in range(num_ranks))
    world = World(Shape(*cut, tokens=tokens, ring_slots=8), seed=num_ranks)
    world.one_round(num_biases=1)
    world.run(num_ranks)


@VARIANTS
@pytest.mark.parametrize("tokens", [(0, 0, 0, 0), (0, 0, 30, 0), (1, 0, 0, 0), (1, 1, 1, 1)])
def test_few_tokens(tokens: tuple[int, ...], tma: bool) -> None:
    for grid in (2, 4):
        world = World(Shape(tma=tma, tokens=tokens, grid=grid), seed=grid)
        world.one_round(num_biases=1, num_parts=8)
        world.run(grid)


@pytest.mark.parametrize("hole", [0.0, 0.8, 1.0])
def test_holes_and_a_hot_expert(hole: float) -> None:
    for seed in range(2):
        world = World(Shape(hole=hole, hot=True, ring_slots=4, slots=4), seed=seed)
        world.one_round()
        world.run(seed)


def test_ranks_of_a_domain_need_not_follow_each_other() -> None:
    for cut in ((2, 2), (2, 3)):
        shape = Shape(*cut, shuffled=True, tokens=tokens_of(cut[0] * cut[1]))
        world = World(shape, seed=1)
        world.one_round(num_biases=1)
        world.run(1)


@VARIANTS
def test_worst_case_rows(tma: bool) -> None:
    shape = Shape(tma=tma, num_worst_tokens=135)
    for seed in range(2):
        world = World(shape, seed=seed)
        routing = world.route()
        routing.dispatch()
        routing.cached_dispatch()
        routing.combine()
        world.run(seed)


@pytest.mark.parametrize("cut", [(2, 1), (2, 2), (3, 2)], ids=lambda c: f"{c[0]}x{c[1]}")
def test_more_rows_than_there_is_room_for(cut: tuple[int, int]) -> None:
    """Nothing is written behind the outputs; all else arrives, is combined, and goes on."""
    num_ranks = cut[0] * cut[1]
    for seed in range(4):
        rng = random.Random(seed)
        worst = [rng.choice([0, 12, 25, 40, 1000]) for _ in range(num_ranks)]
        worst[seed % num_ranks] = 30
        shape = Shape(
            *cut,
            tokens=(38, 51, 33, 45, 40, 20)[:num_ranks],
            num_worst_tokens=tuple(worst),
            shuffled=seed % 2 == 1,
        )
        world = World(shape, seed=seed)
        first, *_, last = (int(world.pes[domain[0]]) for domain in shape.domains)
        for slow_link in (None, (first, last)):
            routing = world.route()
            routing.dispatch()
            routing.cached_dispatch()
            routing.combine(num_biases=1, num_parts=2)
            if any(
                int(e.handle.recv_rdma_rank_prefix_sum[-1]) > e.handle.num_passing
                for e in routing.expected
            ):
                # Of tokens that `passing` has no room for, sums lack more than in the reference.
                for rank in world.ranks:
                    rank.checks = [each for each in rank.checks if "combined" not in each[0]]
            assert world.overflows
            world.run(seed, slow_link=slow_link)


@pytest.mark.parametrize("cut", [(2, 1), (2, 2)], ids=lambda c: f"{c[0]}x{c[1]}")
def test_launches_before_the_counts_are_known(cut: tuple[int, int]) -> None:
    """Ranks that guess, rightly or not, beside others that wait; every window has to be freed."""
    for seed in range(8):
        shape = Shape(
            *cut,
            tokens=tokens_of(cut[0] * cut[1]),
            slots=4,
            ring_slots=(4, 16)[seed % 2],
            guesses=0.8,
        )
        world = World(shape, seed=seed)
        routing = world.one_round()
        routing.dispatch()
        routing.cached_dispatch()
        routing.dispatch()
        world.run(seed, delay={seed % 2: 2000 * (seed // 2 % 2)})


@pytest.mark.parametrize(("epoch", "stale"), LONG_RUNS)
def test_signals_of_long_ago(epoch: int, stale: int) -> None:
    """Signals that only some operations raise are not new after any number of others."""
    for seed in range(3):
        shape = Shape(tokens=(38, 51, 33, 45), slots=4, ring_slots=4)
        world = World(shape, seed=seed)
        world.start_at(epoch, stale=stale)
        routing = world.one_round()
        routing.cached_dispatch()
        world.run(seed, delay={seed: 2000})


def test_int32_indices_and_half_precision() -> None:
    for seed in range(2):
        world = World(Shape(topk_is_int64=False, is_f16=True), seed=seed)
        world.one_round(num_biases=2)
        world.run(seed)


@pytest.mark.parametrize("late", range(4))
def test_delayed_rank(late: int) -> None:
    world = World(Shape(), seed=late)
    world.one_round()
    world.run(late, delay={late: 20_000})


@pytest.mark.parametrize("missing", [(2,), (2, 3)], ids=["one rank", "a domain"])
@pytest.mark.parametrize("stops_before", OPS)
def test_withheld_rank_leaves_fault_records(stops_before: str, missing: tuple[int, ...]) -> None:
    """The others end, say whom they missed, and work again after a reset."""
    world = World(Shape(tokens=(30, 30, 30, 30)), seed=1, timeout_ns=2_000_000)
    for record in world.run_without(missing, stops_before):
        assert stops_before in fault.decode(record).op


@pytest.mark.parametrize("late", [200_000, 700_000, 2_000_000])
def test_rank_that_comes_after_the_timeout(late: int) -> None:
    """All ranks end, none writes where it should not, and those without a fault are right."""
    for seed in range(4):
        world = World(Shape(tokens=(30, 30, 30, 30)), seed=seed, timeout_ns=1_500_000)
        world.one_round().cached_dispatch()
        world.run(seed, delay={seed % 4: late}, compare=False)
        assert world.check_the_faultless() or late < 2_000_000


@pytest.mark.parametrize("first_seed", range(0, 24, 8))
def test_random_histories(first_seed: int) -> None:
    """Operations in any order on one buffer, with late ranks and preempted threads."""
    for seed in range(first_seed, first_seed + 8):
        rng = random.Random(seed)
        cut = rng.choice([(2, 1), (2, 2), (3, 2), (2, 3)])
        num_ranks = cut[0] * cut[1]
        shape = Shape(
            *cut,
            tma=cut != (2, 2) or rng.random() < 0.6,  # fewer kernels to compile
            tokens=tuple(rng.choice([0, 1, 7, 30, rng.randrange(90)]) for _ in range(num_ranks)),
            shuffled=rng.random() < 0.3,
            slots=rng.choice([2, 4, 6, 30]),
            ring_slots=rng.choice([4, 8, 12, 40]),
            grid=rng.choice([4, 5]),
            hole=rng.choice([0, 0.2, 0.5, 0.8]),
            hot=rng.random() < 0.3,
            num_worst_tokens=rng.choice([0, 0, 600]),
            guesses=rng.choice([0.5, 1.0]),
        )
        cached = num_ranks <= 4  # fewer kernels to compile
        World(shape, seed=seed).random_history(rng, seed, cached=cached)
