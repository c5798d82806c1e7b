"""The CPU backend, ranks being threads or processes, against the oracle."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from epjit.calls import Combine, Counts, Dispatch, Layout, Routing, Settings, Setup, Sums
from epjit.errors import CommunicationError
from epjit.handles import Dispatched, Handle
from epjit.modes.cpu import CpuLowLatency, CpuNormal
from epjit.modes.internode import Internode
from epjit.modes.intranode import Intranode
from epjit.modes.low_latency import LowLatency
from epjit.reference import intranode
from epjit.reference.intranode import RankInput
from epjit.runtime.group import BUFFER, Group
from epjit.runtime.topology import Topology
from epjit.scope import CpuScope, CpuStreams, CurrentStream, Scope, Streams
from tests.harness import data, launch

NUM_TOPK = 3
HIDDEN = 16


class SlowGroup(Group):
    """A group whose rank `r` gets its answers `r * delay_seconds` late."""

    def __init__(self, group: Group, delay_seconds: float) -> None:
        self.group = group
        self.rank, self.size = group.rank, group.size
        self.delay_seconds = delay_seconds

    def allgather(self, obj: Any, *, op: str = BUFFER) -> list[Any]:
        values = self.group.allgather(obj, op=op)
        time.sleep(self.rank * self.delay_seconds)
        return values


def make_input(
    kind: data.RoutingKind,
    rank: int,
    num_ranks: int,
    *,
    payload: str = "bfloat16",
    with_topk: bool = True,
) -> RankInput:
    """Inputs of a rank; every rank can make every rank's."""
    num_tokens, num_experts = (11, 0, 6)[rank % 3], 2 * num_ranks
    idx = data.routing(
        kind,
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_topk=NUM_TOPK,
        num_ranks=num_ranks,
        seed=rank,
    )
    _, per_expert, in_rank = intranode.layout(idx, num_experts, num_ranks)
    if payload == "bfloat16":
        x, scales = data.payload(rank, num_tokens, HIDDEN, torch.bfloat16), None
    else:
        x, scales = data.fp8_payload(
            rank, num_tokens, HIDDEN, layout="padded", scale_dtype=torch.int32, group_size=4
        )
    return RankInput(
        x=x,
        scales=scales,
        topk_idx=idx if with_topk else None,
        topk_weights=data.topk_weights(num_tokens, NUM_TOPK, seed=rank) if with_topk else None,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )


class Backend:
    """A `CpuNormal` that is asked for nothing but results: no kernels are chosen."""

    def __init__(self, group: Group, domains: Any = None) -> None:
        chosen, topology = mock.Mock(), Topology(0, domains or (tuple(range(group.size)),))
        settings = Settings(0, 0, False, False, False, 1, 1.0)
        setup = Setup(settings, group, topology, torch.device("cpu"), ExitStack())
        self._mode = CpuNormal(setup, chosen)
        self._scope = CpuScope(async_finish=False)

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> Counts:
        return self._mode.layout(self._scope, Layout(topk_idx, num_experts))

    def dispatch(self, given: RankInput, counts: Any = None, **options: int) -> Dispatched:
        """Dispatch one rank's input, and with it the counts of its ranks and its domains."""
        if counts is None:
            counts = given.is_token_in_rank.sum(dim=0, dtype=torch.int32), None
        routing = Routing(*counts, given.num_tokens_per_expert, given.is_token_in_rank)
        more = {"expert_alignment": 1, "num_worst_tokens": 0, "num_sms": 20, **options}
        tensors = given.x, given.scales, given.topk_idx, given.topk_weights
        return self._mode.dispatch(self._scope, Dispatch(*tensors, routing, **more))

    def cached_dispatch(self, x: torch.Tensor, scales: Any, handle: Handle | None) -> Any:
        assert handle is not None
        call = Dispatch(x, scales, None, None, handle, 1, 0, 20)
        return tuple(self._mode.dispatch(self._scope, call)[:2])

    def combine(
        self, x: torch.Tensor, handle: Handle | None, weights: Any = None, bias: Any = None
    ) -> Sums:
        assert handle is not None
        biases = bias if isinstance(bias, tuple) else (bias, None)
        return self._mode.combine(self._scope, Combine(x, weights, *biases, handle, 20))


def assert_same(got: Any, want: Any, what: str) -> None:
    """Compare tensors, lists and None, also in tuples."""
    if isinstance(want, torch.Tensor):
        data.assert_rows_equal(got, want, what)
    elif isinstance(want, tuple):
        assert isinstance(got, tuple), what
        assert len(got) == len(want), what
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_same(one, other, f"{what}[{index}]")
    else:
        assert got == want, what


def check_one_rank(group: Group, kind: data.RoutingKind, payload: str, with_topk: bool) -> None:
    """All operations of a rank, compared with what the oracle says."""
    num_ranks, num_experts = group.size, 2 * group.size
    backend = Backend(group)
    world = [
        make_input(kind, rank, num_ranks, payload=payload, with_topk=with_topk)
        for rank in range(num_ranks)
    ]
    own = world[group.rank]

    if own.topk_idx is not None:
        per_rank, none, per_expert, in_rank = backend.layout(own.topk_idx, num_experts)
        assert none is None
        assert_same(per_rank, own.is_token_in_rank.sum(dim=0, dtype=torch.int32), "per rank")
        assert_same(per_expert, own.num_tokens_per_expert, "per expert")
        assert_same(in_rank, own.is_token_in_rank, "is_token_in_rank")

    for options in ({}, {"expert_alignment": 8}, {"num_worst_tokens": 11 * num_ranks}):
        got = backend.dispatch(own, **options)
        want = [
            intranode.dispatch(world, rank, num_experts=num_experts, **options)
            for rank in range(num_ranks)
        ]
        for name, value in want[group.rank]._asdict().items():
            assert_same(getattr(got, name), value, f"rank {group.rank}: {name}")
        assert got.handle is not None
        assert got.handle.is_token_in_rank is own.is_token_in_rank

        xs = [
            data.random_payload(each.recv_x.shape[0], HIDDEN, torch.bfloat16, seed=rank)
            for rank, each in enumerate(want)
        ]
        weights = [each.recv_topk_weights for each in want] if with_topk else None
        biases = tuple(
            data.random_payload(own.x.shape[0], HIDDEN, torch.bfloat16, seed=50 + index)
            for index in range(2)
        )
        handles = [each.handle for each in want]
        for bias in (None, biases[0], biases):
            combined = backend.combine(
                xs[group.rank],
                got.handle,
                weights[group.rank] if weights is not None else None,
                bias,
            )
            assert_same(
                combined,
                intranode.combine(xs, handles, group.rank, weights, bias),
                f"rank {group.rank}: combine",
            )

        again = [
            data.random_payload(each.x.shape[0], 4, torch.float16, seed=rank)
            for rank, each in enumerate(world)
        ]
        assert_same(
            backend.cached_dispatch(again[group.rank], None, got.handle),
            intranode.cached_dispatch(again, None, handles, group.rank),
            f"rank {group.rank}: cached dispatch",
        )


@pytest.mark.parametrize(
    ("ours", "gpus"),
    [
        (CpuNormal, Intranode),
        (CpuNormal, Internode),
        (CpuLowLatency, LowLatency),
        (CpuStreams, Streams),
        (CpuScope, Scope),
        (CpuScope, CurrentStream),
    ],
)
def test_all_is_called_as_on_a_gpu(ours: type, gpus: type) -> None:
    """A Buffer does not know which it has."""
    for name, method in inspect.getmembers(ours, inspect.isfunction):
        if not name.startswith("_"):
            taken = [parameter.name for parameter in inspect.signature(method).parameters.values()]
            wanted = inspect.signature(getattr(gpus, name)).parameters
            assert taken == list(wanted), name


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["random", "hot_expert", "empty_rank", "holes", "all_holes"])
def test_threads(num_ranks: int, kind: data.RoutingKind) -> None:
    launch.run_threads(
        lambda comm: check_one_rank(Group.from_comm(comm), kind, "bfloat16", True), num_ranks
    )


@pytest.mark.parametrize("payload", ["bfloat16", "fp8"])
@pytest.mark.parametrize("with_topk", [True, False])
def test_payloads(payload: str, with_topk: bool) -> None:
    launch.run_threads(
        lambda comm: check_one_rank(Group.from_comm(comm), "out_of_range", payload, with_topk), 3
    )


def process_worker(group: dist.ProcessGroup) -> int:
    """All checks, in a process of its own."""
    check_one_rank(Group.from_torch(group), "holes", "fp8", True)
    return group.rank()


@pytest.mark.parametrize("num_domains", [1, 2])
@pytest.mark.parametrize("worst", [0, 40, 2])
def test_outputs_are_tensors_of_their_own(num_domains: int, worst: int) -> None:
    """No views, as on a GPU: autograd refuses to write to a view that an operator returns."""
    domains = None if num_domains == 1 else ((0,), (1,))

    def body(comm: Any) -> None:
        group = Group.from_comm(comm)
        backend = Backend(group, domains)
        given = make_input("random", group.rank, group.size, payload="fp8")
        assert given.topk_idx is not None
        layout = backend.layout(given.topk_idx, 2 * group.size)
        given = dataclasses.replace(given, num_tokens_per_expert=layout[2])
        got = backend.dispatch(given, layout[:2], num_worst_tokens=worst)
        again = backend.cached_dispatch(given.x, given.scales, got.handle)
        back = backend.combine(got.recv_x.bfloat16(), got.handle, got.recv_topk_weights)
        rows = (got.recv_x, got.recv_scales, got.recv_topk_idx, got.recv_topk_weights)
        for name, tensors in {
            "layout": layout,
            "rows": rows,
            "handle": got.handle or (),
            "cached": again,
            "combined": back,
        }.items():
            views = [each is not None and each._is_view() for each in tensors]
            assert not any(views), (name, views)

    launch.run_threads(body, 2)


def test_processes() -> None:
    assert launch.run(process_worker, 3) == [0, 1, 2]


def test_inputs_may_be_overwritten_after_the_call() -> None:
    """Rank 0 is done and writes to its tensors while the others still read what they gathered."""

    def worker(comm: Any) -> None:
        group = SlowGroup(Group.from_comm(comm), delay_seconds=0.1)
        backend = Backend(group)
        given = [make_input("random", rank, group.size) for rank in range(group.size)]
        want = [intranode.dispatch(given, rank, num_experts=4) for rank in range(group.size)]
        own = make_input("random", group.rank, group.size)
        handle = (got := backend.dispatch(own)).handle
        own.x.fill_(-1)
        data.assert_rows_equal(got.recv_x, want[group.rank].recv_x, "recv_x")
        x = got.recv_x.clone()
        combined, _ = backend.combine(x, handle)
        x.fill_(-1)
        data.assert_rows_equal(
            combined,
            intranode.combine(
                [each.recv_x for each in want], [each.handle for each in want], group.rank
            )[0],
            "combined_x",
        )

    launch.run_threads(worker, 2)


def test_tensors_with_gradients() -> None:
    def worker(comm: Any) -> None:
        own = make_input("random", comm.Get_rank(), 2)
        own.x.requires_grad_()
        backend = Backend(Group.from_comm(comm))
        got = backend.dispatch(own)
        combined, _ = backend.combine(got.recv_x, got.handle)
        assert not got.recv_x.requires_grad
        assert not combined.requires_grad

    launch.run_threads(worker, 2)


def disagree_on_hidden(backend: Backend, rank: int) -> None:
    given = make_input("random", rank, 2)
    if rank == 1:
        given = RankInput(**{**vars(given), "x": given.x[:, :8]})
    backend.dispatch(given)


def disagree_on_experts(backend: Backend, rank: int) -> None:
    given = make_input("random", rank, 2)
    if rank == 1:
        more = torch.zeros(6, dtype=torch.int32)
        given = RankInput(**{**vars(given), "num_tokens_per_expert": more})
    backend.dispatch(given)


def disagree_on_topk(backend: Backend, rank: int) -> None:
    backend.dispatch(make_input("random", rank, 2, with_topk=rank == 0))


def disagree_on_operation(backend: Backend, rank: int) -> None:
    got = backend.dispatch(make_input("random", rank, 2))
    if rank == 0:
        backend.combine(got.recv_x, got.handle)
    else:
        backend.cached_dispatch(make_input("random", rank, 2).x, None, got.handle)


def disagree_on_handle(backend: Backend, rank: int) -> None:
    first = backend.dispatch(make_input("random", rank, 2))
    second = backend.dispatch(make_input("empty_rank", rank, 2))
    mine = (first, second)[rank]
    backend.combine(mine.recv_x, mine.handle)


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (disagree_on_hidden, "dispatch: .* on hidden: rank 0 has 16, rank 1 has 8"),
        (disagree_on_experts, "dispatch: .* on num_experts: rank 0 has 4, rank 1 has 6"),
        (disagree_on_topk, "dispatch: .* on num_topk: rank 0 has 3, rank 1 has None"),
        (disagree_on_operation, "operation: rank 0 has combine, rank 1 has cached dispatch"),
        (disagree_on_handle, "combine: .* on the handle's rank_prefix_matrix: rank 0 has"),
    ],
)
def test_every_rank_is_told_of_a_mismatch(mistake: Any, text: str) -> None:
    def worker(comm: Any) -> None:
        with pytest.raises(ValueError, match=text):
            mistake(Backend(Group.from_comm(comm)), comm.Get_rank())

    launch.run_threads(worker, 2)


def test_counts_that_contradict_the_routing() -> None:
    def worker(comm: Any) -> None:
        given = make_input("random", comm.Get_rank(), 2)
        counts = torch.tensor([1, 2], dtype=torch.int32), None
        with pytest.raises(ValueError, match=r"num_tokens_per_rank=\[1, 2\] contradicts"):
            Backend(Group.from_comm(comm)).dispatch(given, counts)

    launch.run_threads(worker, 2)


def test_a_peer_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "0.3")

    def worker(comm: Any) -> None:
        if comm.Get_rank() != 1:
            own = make_input("random", comm.Get_rank(), 3)
            with pytest.raises(CommunicationError, match="rank 1"):
                Backend(Group.from_comm(comm)).dispatch(own)

    launch.run_threads(worker, 3)


def failing_worker(group: dist.ProcessGroup, how: str) -> None:
    """Fails on rank 1 only."""
    if group.rank() == 1:
        if how == "raise":
            raise ValueError("on purpose")
        os._exit(7)


@pytest.mark.parametrize(
    ("how", "text"), [("raise", "ValueError: on purpose"), ("exit", "died with exit code 7")]
)
def test_launch_reports_the_rank_that_failed(how: str, text: str) -> None:
    with pytest.raises(launch.RankFailedError, match=text) as caught:
        launch.run(failing_worker, 2, how)
    assert next(iter(caught.value.errors)) == 1


def test_launch_reports_the_thread_that_failed() -> None:
    def worker(comm: Any) -> None:
        if comm.Get_rank() == 1:
            raise ValueError("on purpose")

    with pytest.raises(launch.RankFailedError, match=r"rank 1 failed(.|\n)*on purpose") as caught:
        launch.run_threads(worker, 2)
    assert isinstance(caught.value.__cause__, ValueError)
