"""`Buffer` between NVLink domains on the CPU backend: processes and threads, bit for bit."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epjit import Buffer, Config
from epjit.runtime.topology import Topology
from tests.harness import launch
from tests.harness.data import ROUTING_KINDS
from tests.rounds.normal import Round, check_no_room, check_round, layout_of, random_round
from tests.scenarios import internode, normal

CPU = {"EPJIT_BACKEND": "cpu"}
SCATTERED = ((0, 3, 4), (1, 2, 5))
SIZES = {
    "num_tokens": 24,
    "hidden": 256,
    "num_topk": 4,
    "num_experts": 24,
    "num_topk_groups": 2,
    "seed": 3,
}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")


@pytest.fixture
def scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six threads in two domains whose ranks do not follow each other, as if on two hosts."""

    def find(group: Any, **options: Any) -> Topology:
        group.allgather(None)
        return Topology(group.rank, SCATTERED)

    monkeypatch.setattr("epjit.buffer.find_topology", find)


def cut(size: int) -> dict[str, str]:
    """The environment of ranks in NVLink domains of so many."""
    return {**CPU, "EPJIT_NVLINK_DOMAIN": str(size)}


# ---- threads ---------------------------------------------------------------------------


def rounds_of_threads(comm: Any, nvlink_domain: int | None, num_rounds: int) -> tuple[int, int]:
    buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=nvlink_domain)
    for seed in range(num_rounds):
        check_round(buffer, random_round(buffer.group_size, 400 + seed, num_sms=4, max_tokens=20))
    assert buffer.runtime is not None
    return buffer.runtime.get_num_rdma_ranks(), buffer.runtime.get_rdma_rank()


@pytest.mark.parametrize(
    ("num_ranks", "nvlink_domain", "num_rounds"),
    [(4, 2, 20), (6, 3, 15), (6, 2, 15), (4, 1, 15), (16, 8, 5), (15, 5, 5), (9, 1, 5)],
)
def test_random_rounds(num_ranks: int, nvlink_domain: int, num_rounds: int) -> None:
    places = launch.run_threads(rounds_of_threads, num_ranks, nvlink_domain, num_rounds)
    assert places == [
        (num_ranks // nvlink_domain, rank // nvlink_domain) for rank in range(num_ranks)
    ]


@pytest.mark.usefixtures("scattered")
def test_random_rounds_of_scattered_ranks() -> None:
    places = launch.run_threads(rounds_of_threads, 6, None, 15)
    assert places == [(2, domain) for domain in (0, 1, 1, 0, 0, 1)]


@pytest.mark.usefixtures("scattered")
def test_as_v1_with_scattered_ranks() -> None:
    def worker(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm)
        inputs = internode.Inputs(SCATTERED, **SIZES)
        internode.check_as_v1(buffer, inputs, num_sms=4)

    launch.run_threads(worker, 6)


def no_tokens(comm: Any) -> None:
    buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=2)
    for fp8 in (None, "column_major"):
        for worst in (False, True):
            for tokens in ((0,) * 4, (5, 0, 0, 0)):
                case = Round(tokens, num_experts=12, num_biases=2, fp8=fp8, worst=worst)
                check_round(buffer, case)


def test_no_tokens() -> None:
    launch.run_threads(no_tokens, 4)


def test_more_rows_than_there_is_room_for() -> None:
    """As on a GPU: the rank says so in its next call, and everything else goes on."""

    def worker(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=2)
        for seed, short in enumerate(((0,), (1, 2), (3,))):
            check_no_room(buffer, Round((9, 20, 24, 24), num_experts=8, seed=seed), short)

    launch.run_threads(worker, 4)


def test_every_routing() -> None:
    def worker(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=2)
        for seed, kind in enumerate(ROUTING_KINDS):
            check_round(buffer, Round((9, 0, 7, 12), num_experts=8, kind=kind, seed=seed))

    launch.run_threads(worker, 4)


def test_members() -> None:
    """V1's runtime members, the memory to look at, the names that V1's dispatch leads to."""

    def worker(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=2)
        runtime, rank = buffer.runtime, buffer.rank
        assert runtime is not None
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1 << 20, 1 << 20)
        assert (runtime.get_num_rdma_ranks(), runtime.get_rdma_rank()) == (2, rank // 2)
        assert runtime.get_root_rdma_rank(True) == rank % 2
        assert runtime.get_root_rdma_rank(False) == 0
        nvl = buffer.get_local_buffer_tensor(torch.uint8)
        rdma = buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
        assert (nvl.numel(), rdma.numel()) == (1 << 20, 1 << 20)
        rdma.fill_(7)
        assert not nvl.any()
        assert buffer.get_local_buffer_tensor(torch.int16, use_rdma_buffer=True)[-1] == 0x0707
        idx = torch.tensor([[0, 3], [2, -1]])
        x = torch.ones((2, 16), dtype=torch.bfloat16)
        layout = layout_of(buffer, idx, 4)
        per_domain = layout["num_tokens_per_rdma_rank"]
        assert (per_domain.dtype, per_domain.tolist()) == (torch.int32, [1, 2])
        recv_x, _, _, counts, handle, _ = buffer.internode_dispatch(x, **layout)
        assert isinstance(handle, tuple)
        assert len(handle) == 10
        assert counts == [4 if rank != 1 else 0]
        assert handle[-4].tolist() == [(n + 1) * (rank != 1) for n in range(4)]
        combined, _, _ = buffer.internode_combine(recv_x, handle)
        assert combined.float().tolist() == [[2.0] * 16, [1.0] * 16]

    launch.run_threads(worker, 4)


def test_a_large_domain_is_refused_on_every_rank() -> None:
    def worker(comm: Any) -> None:
        with pytest.raises(ValueError, match="9 ranks are in one NVLink domain"):
            Buffer(None, 1 << 20, comm=comm)

    launch.run_threads(worker, 9)


def test_low_latency_beside_it() -> None:
    def worker(comm: Any) -> None:
        size = Buffer.get_low_latency_rdma_size_hint(8, 128, 4, 8)
        buffer = Buffer(None, 1 << 20, size, low_latency_mode=True, comm=comm, nvlink_domain=2)
        check_round(buffer, Round((5, 6, 0, 8), num_experts=8, seed=2))
        x = torch.full((3, 128), 1 + buffer.rank, dtype=torch.bfloat16)
        idx = torch.tensor([[0, 7], [3, -1], [5, 4]])
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False)
        weights = torch.ones((3, 2), dtype=torch.float32)
        combined, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
        want = x * torch.tensor([[2.0], [1.0], [2.0]], dtype=torch.bfloat16)
        assert torch.equal(combined, want)
        check_round(buffer, Round((5, 6, 0, 8), num_experts=8, seed=3))

    launch.run_threads(worker, 4)


def make_handle(buffer: Buffer, seed: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """One dispatch of a few tokens."""
    generator = torch.Generator().manual_seed(seed + buffer.rank)
    idx = torch.randint(8, (6, 2), generator=generator)
    x = torch.ones((6, 16), dtype=torch.bfloat16)
    recv_x, _, _, _, handle, _ = buffer.dispatch(x, **layout_of(buffer, idx, 8))
    assert isinstance(recv_x, torch.Tensor)
    return x, recv_x, handle


def test_handles_of_different_dispatches() -> None:
    def worker(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=1)
        each = [make_handle(buffer, seed) for seed in (0, 10)]
        x, recv_x, handle = each[buffer.rank % 2]
        text = r"by the handle of rank \d it sends \d rows to rank \d, .*handles of one dispatch"
        with pytest.raises(ValueError, match=f"combine: {text}"):
            buffer.combine(recv_x, handle)
        with pytest.raises(ValueError, match=f"cached dispatch: {text}"):
            buffer.dispatch(x, handle=handle)

    launch.run_threads(worker, 2)


def test_counts_that_contradict_the_routing() -> None:
    def worker(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=1)
        idx = torch.tensor([[0, 1]])
        layout = layout_of(buffer, idx, 2)
        layout["num_tokens_per_rdma_rank"] = layout["num_tokens_per_rdma_rank"] * 2
        text = r"num_tokens_per_rdma_rank=\[2, 2\] contradicts.*\[1, 1\]"
        with pytest.raises(ValueError, match=text):
            buffer.dispatch(torch.ones((1, 16), dtype=torch.bfloat16), **layout)

    launch.run_threads(worker, 2)


def withheld_thread(comm: Any) -> None:
    buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=2)
    normal.withheld_round(buffer, absent=3)


def test_withheld_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "1")
    launch.run_threads(withheld_thread, 4)


# ---- processes -------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "nvlink_domain"), [(4, 2), (6, 3), (4, 1)])
def test_random_rounds_of_processes(num_ranks: int, nvlink_domain: int) -> None:
    environ = cut(nvlink_domain)
    assert launch.run(normal.random_rounds, num_ranks, environ, 10, 24) == [10] * num_ranks


def test_as_v1_in_processes() -> None:
    """The checks of DeepEP's tests/test_internode.py on 2 x 2; the same hash each time."""
    places = launch.run(internode.as_v1, 4, cut(2), SIZES, 4, 1)
    assert places == [(2, 0), (2, 0), (2, 1), (2, 1)]


def two_hosts(group: dist.ProcessGroup) -> tuple[int, int]:
    """Ranks 0, 2 on one host and 1, 3 on another, as far as they can tell."""
    normal.set_up(group, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("epjit.runtime.topology.host_id", lambda: f"host {group.rank() % 2}")
        buffer = Buffer(group, 1 << 20, 1 << 20)
    for seed in range(5):
        check_round(buffer, random_round(4, seed, num_sms=4, max_tokens=20))
    assert buffer.topology.domains == ((0, 2), (1, 3))
    assert buffer.runtime is not None
    return buffer.runtime.get_num_rdma_ranks(), buffer.runtime.get_rdma_rank()


def test_hosts_are_domains() -> None:
    assert launch.run(two_hosts, 4) == [(2, 0), (2, 1), (2, 0), (2, 1)]


def test_other_bodies_between_domains() -> None:
    """Every Buffer must come, go, outlive its group, and be replaced."""
    environ = cut(1)
    launch.run(normal.outlives_group, 2, environ)
    launch.run(normal.replaced, 2, environ)
    launch.run(normal.recreated, 2, environ, 3)
    assert launch.run(normal.graph, 2, environ, 5, 16, 4) == [5, 5]


def test_killed_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks of a domain die: the others name one of them."""
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 20.0)  # the survivors still have something to say
    with pytest.raises(launch.RankFailedError) as caught:
        launch.run(normal.killed, 4, cut(2), "combine", 2, 2.0, (3,))
    assert sorted(caught.value.errors) == [2, 3], str(caught.value)
    assert all(f"exit code {-signal.SIGKILL}" in text for text in caught.value.errors.values())


# ---- Config ----------------------------------------------------------------------------


def test_configs_are_v1s() -> None:
    """V1's table, and the nearest smaller entry for what it lacks."""
    dispatch = {16: (36, 288, 20), 64: (32, 288, 8), 96: (20, 480, 12), 128: (20, 560, 12)}
    dispatch |= {144: (32, 720, 12), 160: (28, 720, 12), 9: (6, 256, 6), 40: (32, 288, 8)}
    combine = {16: (4, 288, 12), 24: (1, 288, 8), 96: (1, 480, 8), 128: (1, 560, 8)}
    combine |= {144: (2, 720, 8), 160: (2, 720, 8), 12: (4, 256, 6), 256: (2, 720, 8)}
    for get, table in (
        (Buffer.get_dispatch_config, dispatch),
        (Buffer.get_combine_config, combine),
    ):
        for num_ranks, chunks in table.items():
            assert get(num_ranks) == Config(Buffer.num_sms, *chunks, 128), num_ranks


def test_hints() -> None:
    """V1's sizes: channels, domains, chunk, row and metadata; twice for RDMA."""
    config = Config(24, 8, 512, 16, 128)
    row = 7168 * 2 + 8 + 128 * (8 + 4 + 4)
    assert config.get_nvl_buffer_size_hint(7168 * 2, 16) == 12 * 8 * 512 * row
    assert config.get_nvl_buffer_size_hint(7168 * 2, 16, ranks_per_domain=4) == 12 * 4 * 512 * row
    assert config.get_rdma_buffer_size_hint(7168 * 2, 16) == 2 * 12 * 2 * 128 * (row + 16)
    assert config.get_rdma_buffer_size_hint(7168 * 2, 8) == 0
    assert config.get_rdma_buffer_size_hint(7168 * 2, 8, ranks_per_domain=4) == (
        config.get_rdma_buffer_size_hint(7168 * 2, 16)
    )
    assert config.get_rdma_buffer_size_hint(7168 * 2, 4, ranks_per_domain=2) > 0
    sizes = [config.get_rdma_buffer_size_hint(1000, ranks) for ranks in range(8, 257, 8)]
    assert sizes == sorted(set(sizes))
    assert all(size % 128 == 0 for size in sizes)


def test_hints_follow_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that knows nothing of the cut asks for enough."""
    monkeypatch.setenv("EPJIT_NVLINK_DOMAIN", "2")
    assert Config().get_rdma_buffer_size_hint(1024, 4) > 0
    assert Config().get_rdma_buffer_size_hint(1024, 2) == 0
    monkeypatch.setenv("EPJIT_NVLINK_DOMAIN", "16")
    assert Config().get_rdma_buffer_size_hint(1024, 8) == 0
    assert Config().get_rdma_buffer_size_hint(1024, 16) > 0


def test_sums_are_rounded_in_each_domain() -> None:
    """Not only in the oracle, with which the rounds above compare."""

    def worker(comm: Any, nvlink_domain: int, want: float) -> None:
        buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=nvlink_domain)
        idx = torch.arange(4).repeat(2, 1)
        x = torch.ones((2, 8), dtype=torch.bfloat16)
        _, _, _, _, handle, _ = buffer.dispatch(x, **layout_of(buffer, idx, 4))
        assert handle is not None
        value = (256.0, 1.0, -256.0, 0.0)[buffer.rank]  # 257 is no bfloat16
        combined, _, _ = buffer.combine(torch.full((8, 8), value, dtype=torch.bfloat16), handle)
        assert (combined == want).all()

    launch.run_threads(worker, 4, 2, 0.0)
    launch.run_threads(worker, 4, 1, 1.0)
