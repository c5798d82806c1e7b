"""Real GPUs, one process each, cut into NVLink domains smaller than the host.

Between the domains bytes travel by NVSHMEM (by its own loads and stores on one host, since no
machine of ours has an RDMA NIC), or by the loopback transport with delays. With
``EPJIT_BACKEND=cpu EPJIT_TEST_RANKS=4`` the same scenarios run without a GPU.
"""

from __future__ import annotations

import signal

import pytest

from tests.harness import launch
from tests.scenarios import internode, normal

TIMEOUT_SECONDS = 2.0
SIZES = {"num_tokens": 128, "hidden": 2048, "num_topk": 8, "num_topk_groups": 2, "seed": 1}
TRANSPORTS = {
    "loopback": {"EPJIT_TRANSPORT": "loopback", "EPJIT_LOOPBACK_SEED": "1"},
    "nvshmem": {"EPJIT_TRANSPORT": "nvshmem"},
    "nvshmem-ibgda": {"EPJIT_TRANSPORT": "nvshmem", "NVSHMEM_IB_ENABLE_IBGDA": "1"},
}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(params=(1, 2), ids="domains of {}".format)
def environ(request: pytest.FixtureRequest, num_ranks: int) -> dict[str, str]:
    """Environment of the ranks: the cut."""
    if num_ranks % request.param or num_ranks == request.param:
        pytest.skip(f"{num_ranks} ranks are no domains of {request.param}")
    return {"EPJIT_NVLINK_DOMAIN": str(request.param)}


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, environ: dict[str, str]) -> dict[str, str]:
    """Environment of the ranks: the cut, and what carries bytes across it."""
    return environ | TRANSPORTS[request.param]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one rank has died the others still have something to say."""
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 60.0)


def test_random_rounds(num_ranks: int, transport: dict[str, str]) -> None:
    """300 fresh rounds on two buffers in turn, with a rank that is late now and then."""
    done = launch.run(normal.random_rounds, num_ranks, transport, 300, 160, timeout=800)
    assert done == [300] * num_ranks


@pytest.mark.parametrize("variant", ["tma", "ldst"])
def test_model_shapes(num_ranks: int, environ: dict[str, str], variant: str) -> None:
    """Rows of real models, and the longest and the shortest row there is."""
    shapes = ((7168, 256), (2880, 128), (16384, 32), (16, 32))
    names = {f"EPJIT_{op}_VARIANT": variant for op in ("DISPATCH", "COMBINE")}
    launch.run(normal.shapes, num_ranks, environ | names, shapes, 333, timeout=600)


def test_small_buffers(num_ranks: int, transport: dict[str, str]) -> None:
    """The smallest legal buffers."""
    sizes = launch.run(internode.small_buffers, num_ranks, transport, 333, 6, timeout=400)
    assert all(each == sizes[0] for each in sizes)


def test_graph(num_ranks: int, transport: dict[str, str]) -> None:
    """Captured once, replayed 100 times with changed inputs and eager calls between."""
    done = launch.run(normal.graph, num_ranks, transport, 101, 100, 12, timeout=400)
    assert done == [101] * num_ranks


def test_as_v1(num_ranks: int, transport: dict[str, str]) -> None:
    """The checks of DeepEP's tests/test_internode.py, twice with the same hash."""
    sizes = SIZES | {"num_experts": 64 * num_ranks}
    size = int(transport["EPJIT_NVLINK_DOMAIN"])
    places = launch.run(internode.as_v1, num_ranks, transport, sizes, 24, 1, timeout=800)
    assert places == [(num_ranks // size, rank // size) for rank in range(num_ranks)]


def test_withheld_peer(num_ranks: int, environ: dict[str, str]) -> None:
    """A rank does not come: the others name it in time, live on, and work again after reset()."""
    cases = normal.cases_of(("notify", "dispatch", "combine"), num_ranks)
    texts = launch.run(normal.withheld, num_ranks, environ, cases, TIMEOUT_SECONDS, timeout=200)
    normal.assert_all_but_the_absent(texts, cases)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("op", ["notify", "dispatch", "combine"])
def test_killed_node(num_ranks: int, op: str, environ: dict[str, str]) -> None:
    """All ranks of the last domain die: the others name one, compute on and end in good order."""
    victims = tuple(range(num_ranks - int(environ["EPJIT_NVLINK_DOMAIN"]), num_ranks))
    with pytest.raises(launch.RankFailedError) as caught:
        launch.run(
            normal.killed,
            num_ranks,
            environ,
            op,
            victims[0],
            TIMEOUT_SECONDS,
            victims[1:],
            timeout=200,
        )
    assert sorted(caught.value.errors) == list(victims), str(caught.value)
    assert all(f"exit code {-signal.SIGKILL}" in text for text in caught.value.errors.values())


def test_buffer_is_replaced_by_a_bigger_one(num_ranks: int, transport: dict[str, str]) -> None:
    """As frameworks do: the old one goes after the new one has come."""
    launch.run(normal.replaced, num_ranks, transport, timeout=200)


@pytest.mark.needs_own_gpu
def test_buffers_come_and_go(num_ranks: int, transport: dict[str, str]) -> None:
    """Twenty times; the device has as much free memory as before, give or take the driver's own."""
    grown = launch.run(normal.recreated, num_ranks, transport, 20, timeout=400)
    assert max(grown) < 32 * normal.MB, grown


def test_buffer_outlives_the_process_group(num_ranks: int, environ: dict[str, str]) -> None:
    """Nothing but the constructor uses torch.distributed."""
    launch.run(normal.outlives_group, num_ranks, environ, timeout=200)
