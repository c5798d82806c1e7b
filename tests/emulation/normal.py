"""Emulated kernels of the normal mode: parts for one NVLink domain and for several."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from epjit.calls import Order
from epjit.handles import Handle
from epjit.modes.normal import Room
from epjit.reference import Normal
from epjit.reference.intranode import RankInput, rooms
from epjit.runtime import fault
from tests.emulation import world as emulated
from tests.emulation.build import guarded
from tests.emulation.world import FOREVER, check, copy

ALIGNMENT = 4  # of the counts that the host gets
HIDDEN_BYTES = 160  # not a multiple of what a warp moves at once
EXPERTS_A_RANK = 3
NO_SELECTIONS = dict.fromkeys(
    (
        "scales",
        "scale_token_stride",
        "scale_stride",
        "topk_idx",
        "topk_weights",
        "recv_scales",
        "recv_topk_idx",
        "recv_topk_weights",
    ),
    0,
)
"""Parameters of a cached dispatch."""
OPS = ("notify", "dispatch", "combine")
RIGHT = "right"
WRONG = FEW, MANY, FEW_PASSING = "too few rows", "too many rows", "too few that pass"
"""Guesses of the room for what a dispatch receives."""


class World(emulated.World):
    """All ranks of a test in the normal mode."""

    def route(self) -> Any:
        """New tokens and selections, and their handles: a `Routing`."""
        raise NotImplementedError

    def one_round(self, **options: int) -> Any:
        """Queues a dispatch of new tokens and a combine; options are those of combine."""
        routing = self.route()
        routing.dispatch()
        routing.combine(**options)
        return routing

    def follow_each_other(self) -> None:
        """Queues operations of two handles in turn."""
        first = self.one_round(num_biases=2, num_parts=3)
        second = self.route()
        first.cached_dispatch()
        second.dispatch()
        second.cached_dispatch()
        first.combine(num_biases=1)
        second.combine(num_parts=2)
        second.dispatch()

    def random_history(self, rng: random.Random, seed: int, *, cached: bool) -> None:
        """Runs operations in any order, with late ranks and preempted threads.

        Args:
            rng: Says what comes.
            seed: Of the emulation.
            cached: Whether cached dispatches are among them.
        """
        num_ranks = len(self.ranks)
        late = {rng.randrange(num_ranks): rng.randrange(30000)} if rng.random() < 0.3 else {}
        routes = [self.route()]
        routes[0].dispatch()
        for _ in range(rng.randrange(1, 5)):
            op = rng.choice(["route", "dispatch", "combine", "cached"])
            route = rng.choice(routes)
            if op == "route":
                routes.append(self.route())
                routes[-1].dispatch()
            elif op == "dispatch":
                route.dispatch()
            elif op == "cached" and cached:
                route.cached_dispatch()
            else:
                route.combine(num_biases=rng.randrange(3), num_parts=rng.randrange(1, 4))
        self.run(
            seed,
            delay=late,
            yield_percent=rng.choice([0, 20, 60]),
            basic_blocks=rng.choice([0, 30, 200, 1000]),
        )

    def run_without(self, missing: tuple[int, ...], stops_before: str) -> list[list[int]]:
        """Runs a round that some ranks leave before an operation, then one after a reset.

        Returns:
            The fault records of the others, which name whom they missed.
        """
        self.one_round()
        for rank in missing:
            launches = self.ranks[rank].launches
            del launches[[launch.config.op for launch in launches].index(stops_before) :]
        self.run(1, compare=False)
        records = []
        for rank, memory in enumerate(self.ranks):
            record = memory.fault[:8].tolist()
            state, _, own, peer, _, expected, seen, epoch = record
            if rank in missing:
                assert state == 0
                continue
            assert (state, own) == (1, rank)
            assert peer in missing  # also where a rank waits for one that itself waits
            assert expected != seen
            assert epoch == OPS.index(stops_before) + 1
            assert memory.local[self.counters + 1] == 1
            records.append(record)
        self.reset()
        self.timeout_ns = FOREVER
        self.one_round()
        self.run(1)
        return records

    def check_the_faultless(self) -> bool:
        """After a run some of whose ranks gave up: those that did not are right.

        Returns:
            Whether any gave up.
        """
        for memory in self.ranks:
            assert memory.fault[0] in (0, 1)
            assert (memory.fault[0] == 1) == (memory.local[self.counters + 1] == 1)
            if memory.fault[0] == 0:
                check(memory.checks)
        return any(memory.fault[0] == 1 for memory in self.ranks)


class Routing(ABC):
    """One dispatch and what follows from it: the handle of every rank, as the kernels write it."""

    handles: list[Any]  # of a mode

    def __init__(self, world: World) -> None:
        shape = world.shape
        self.world, self.shape, self.reference = world, shape, Normal(shape.domains)
        ranks = range(shape.num_ranks)
        self.inputs = [self._input(rank) for rank in ranks]
        sent = self.cast(self.inputs)
        self.expected = [
            self.reference.dispatch(
                sent,
                rank,
                num_experts=shape.num_experts,
                expert_alignment=ALIGNMENT,
                num_worst_tokens=shape.num_worst_tokens,
            )
            for rank in ranks
        ]
        self.num_recv = [int(self.expected[rank].handle.num_received(rank)) for rank in ranks]
        self.worst = rooms(shape.num_worst_tokens, shape.num_ranks)
        self._note_overflows()
        self.handles = [self.notify(rank) for rank in ranks]
        world.epochs += 1

    @abstractmethod
    def notify(self, rank: int) -> Handle:
        """Queues what finds out where tokens go; the handle that it writes."""

    @abstractmethod
    def common(self, rank: int) -> dict[str, Any]:
        """Parameters of both kinds of dispatch."""

    @abstractmethod
    def of_dispatch(self, rank: int, *, cached: bool) -> dict[str, Any]:
        """Parameters of one kind of dispatch."""

    @abstractmethod
    def expect_handle(self, rank: int) -> None:
        """The parts of a handle that a dispatch writes."""

    @abstractmethod
    def of_combine(self, rank: int) -> dict[str, Any]:
        """Parameters of a combine."""

    def cast(self, inputs: list[RankInput]) -> list[RankInput]:
        """Inputs of the ranks, as they travel."""
        return inputs

    def order(self, rank: int) -> Order | None:
        """How a combine orders the ranks of its addends."""
        del rank
        return None

    def dispatch(self) -> list[Tensor]:
        """Rows, scales and selections to where they were routed.

        Of the ranks whose host waits for counts `shape.guesses` launch before these are known: some
        with room enough, others for nothing, and then once more, late.

        Returns:
            The selections that each rank receives.
        """
        selections = []
        for rank in range(self.shape.num_ranks):
            rng = random.Random(torch.randint(1 << 30, (), generator=self.world.generator).item())
            guesses = not self.worst[rank] and rng.random() < self.shape.guesses
            guess = rng.choice((RIGHT, *WRONG)) if guesses else None
            if guess in WRONG:
                self._queue_wrong_guess(rank, guess)
                self.world.pause(rank, rng.choice((0, 3000, 30_000)))
            received = self._receive(rank, num_spare_rows=5 if guess == RIGHT else 0)
            least = self.num_recv[rank] if guess == RIGHT else -1
            self._queue_dispatch(rank, cached=False, least_rows=least, **received)
            self.expect_handle(rank)
            selections.append(received["recv_topk_idx"])
        self.world.epochs += 1
        return selections

    def cached_dispatch(self) -> None:
        """Another payload along the same routing, without scales and selections."""
        world, row_bytes = self.world, self.shape.cached.hidden_bytes
        xs = [
            copy(torch.randint(256, (n, row_bytes), generator=world.generator).byte())
            for n in self.shape.tokens
        ]
        handles = [each.handle for each in self.expected]
        for rank, x in enumerate(xs):
            expected, _ = self.reference.cached_dispatch(xs, None, handles, rank)
            recv_x = guarded(*expected.shape, dtype=torch.uint8)
            values = {**NO_SELECTIONS, "x": x, "recv_x": recv_x, "experts_per_rank": 1}
            self._queue_dispatch(rank, cached=True, least_rows=-1, **values)
            n = self.num_recv[rank]
            world.expect(rank, "cached recv_x", recv_x[:n], expected[:n])
        world.epochs += 1

    def combine(self, *, num_biases: int = 0, num_parts: int = 1) -> None:
        """Rows back to their owners, summed."""
        shape, world = self.shape, self.world
        handles = [each.handle for each in self.expected]
        sizes = [handle.num_rows for handle in handles]
        xs = [self._random_rows(n) for n in sizes]
        weights = [copy(torch.rand(n, shape.num_topk, generator=world.generator)) for n in sizes]
        for rank in range(shape.num_ranks):
            drawn = [self._random_rows(shape.tokens[rank]) for _ in range(num_biases)]
            first, second = [*drawn, None, None][:2]
            wanted_x, wanted_weights = self.reference.combine(
                xs, handles, rank, weights, (first, second), self.order(rank)
            )
            assert wanted_weights is not None
            combined_x = guarded(*wanted_x.shape, dtype=wanted_x.dtype)
            combined_weights = guarded(*wanted_weights.shape, dtype=torch.float32)
            world.queue(
                rank,
                shape.combine,
                shape.grid,
                **self.of_combine(rank),
                x=xs[rank],
                topk_weights=weights[rank],
                bias_0=first,
                bias_1=second,
                combined_x=combined_x,
                combined_topk_weights=combined_weights,
                num_rows=sizes[rank],
                num_tokens=shape.tokens[rank],
                num_parts=num_parts,
            )
            world.expect(rank, "combined_x", combined_x, wanted_x)
            world.expect(rank, "combined_topk_weights", combined_weights, wanted_weights)
        world.epochs += 1

    def _queue_dispatch(self, rank: int, *, cached: bool, **values: Any) -> None:
        shape = self.shape
        self.world.queue(
            rank,
            shape.cached if cached else shape.dispatch,
            shape.grid,
            **self.common(rank),
            **{
                "num_recv_rows": len(values["recv_x"]),
                **self.of_dispatch(rank, cached=cached),
                **values,
            },
        )

    def _queue_wrong_guess(self, rank: int, guess: str) -> None:
        """A launch that leaves at once, as other outputs are needed: it touches none of these."""
        n, num_passing = self.num_recv[rank], self.num_passing(rank)
        if (guess == FEW and n == 0) or (guess == FEW_PASSING and num_passing < 1):
            guess = MANY
        num_rows = n - 1 if guess == FEW else n + 2
        outputs = self._outputs(rank, num_rows)
        for name, output in outputs.items():
            self.world.expect(rank, f"{name} of a wrong guess", output, output.clone())
        least = n + 1 if guess == MANY else 0
        passing = {} if num_passing < 0 else {"num_passing": num_passing - (guess == FEW_PASSING)}
        room = Room((num_rows, *passing.values()), least)  # by whose rule the host goes
        assert not room.fits((n, num_passing)[: len(room.sizes)])
        values = {**self._sent(rank), **outputs, **passing, "least_rows": least}
        self._queue_dispatch(rank, cached=False, **values)

    def num_passing(self, rank: int) -> int:
        """Tokens that pass through a rank; -1 in one NVLink domain, where none do."""
        del rank
        return -1

    def _input(self, rank: int) -> RankInput:
        """New tokens and selections of a rank."""
        shape, generator, num_tokens = self.shape, self.world.generator, self.shape.tokens[rank]
        chosen = torch.rand(num_tokens, shape.num_experts, generator=generator)
        idx = chosen.topk(min(shape.num_topk, shape.num_experts)).indices
        if shape.hot and num_tokens:
            idx[:, 0] = 0
        idx[torch.rand(idx.shape, generator=generator) < shape.hole] = -1
        idx = copy(idx.to(torch.int64 if shape.topk_is_int64 else torch.int32))
        _, _, per_expert, in_rank = self.reference.layout(idx, shape.num_experts)
        columns = torch.arange(HIDDEN_BYTES // 4)
        x = guarded(num_tokens, len(columns), dtype=torch.int32)
        x.copy_((rank << 24) + (torch.arange(num_tokens).view(-1, 1) << 8) + columns)
        # Column-major, as quantising kernels leave them.
        scales = guarded(shape.num_scales, num_tokens, dtype=torch.float32)
        scales.copy_(torch.rand(scales.shape, generator=generator))
        return RankInput(
            x=x,
            scales=scales.t(),
            topk_idx=idx,
            topk_weights=copy(torch.rand(idx.shape, generator=generator)),
            is_token_in_rank=copy(in_rank),
            num_tokens_per_expert=per_expert,
        )

    def _receive(self, rank: int, *, num_spare_rows: int) -> dict[str, Any]:
        """Outputs of a dispatch and what they must be; the parameters for what it moves."""
        expected, n = self.expected[rank], self.num_recv[rank]
        num_rows = expected.recv_x.shape[0]
        outputs = self._outputs(rank, num_rows + num_spare_rows)
        for name, got in outputs.items():
            length = num_rows if name == "recv_topk_idx" else n
            self.world.expect(rank, name, got[:length], getattr(expected, name)[:length])
        return {**self._sent(rank), **outputs}

    def _outputs(self, rank: int, num_rows: int) -> dict[str, Tensor]:
        """New ones, by the names of parameters and of the fields of `Dispatched`."""
        shape, own = self.shape, self.inputs[rank]
        assert own.topk_idx is not None
        return {
            "recv_x": guarded(num_rows, HIDDEN_BYTES // 4, dtype=torch.int32),
            "recv_scales": guarded(num_rows, shape.num_scales, dtype=torch.float32),
            "recv_topk_idx": guarded(num_rows, shape.num_topk, dtype=own.topk_idx.dtype),
            "recv_topk_weights": guarded(num_rows, shape.num_topk, dtype=torch.float32),
        }

    def _sent(self, rank: int) -> dict[str, Any]:
        """Parameters for what a dispatch sends."""
        own = self.inputs[rank]
        assert own.scales is not None
        return {
            "x": own.x,
            "scales": own.scales,
            "scale_token_stride": own.scales.stride(0),
            "scale_stride": own.scales.stride(1),
            "topk_idx": own.topk_idx,
            "topk_weights": own.topk_weights,
            "experts_per_rank": EXPERTS_A_RANK,
        }

    def _note_overflows(self) -> None:
        """Reports of the ranks that have less room than rows come; rooms of 0 are enough."""
        tags = fault.tags().items()
        tag = next(tag for tag, what in tags if what == ("dispatch", "rows come to"))
        came = sum(each.is_token_in_rank.sum(dim=0) for each in self.inputs).tolist()
        for rank, (rows, room) in enumerate(zip(came, self.worst, strict=True)):
            if 0 < room < rows:
                self.world.overflows.setdefault(rank, [tag, room, rows])

    def _random_rows(self, num_rows: int) -> Tensor:
        dtype = torch.float16 if self.shape.is_f16 else torch.bfloat16
        shape = (num_rows, self.shape.combine.hidden_bytes // 2)
        return copy(torch.randn(shape, generator=self.world.generator).to(dtype))
