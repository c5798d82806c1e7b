"""The transport over real NVSHMEM, one GPU a rank, NVLink domains cut smaller than the host.

Every call of the library and of its device code is made; no network is: NVSHMEM takes NVLink.
"""

from __future__ import annotations

import pytest

from tests.harness import launch
from tests.scenarios import nvshmem

MIB = 1 << 20

pytestmark = [pytest.mark.timeout(600), pytest.mark.needs_gpu]


@pytest.fixture(params=["inline", "ibgda"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Environment of the ranks: both ways to link. Without a NIC, IBGDA says so and NVLink serves."""
    return {"NVSHMEM_IB_ENABLE_IBGDA": str(int(request.param == "ibgda"))}


@pytest.mark.parametrize("domain_size", [1, 2])
def test_ring(num_ranks: int, domain_size: int, environment: dict[str, str]) -> None:
    if num_ranks % domain_size or num_ranks == domain_size:
        pytest.skip(f"{num_ranks} ranks are not two or more domains of {domain_size}")
    found = launch.run(
        nvshmem.ring, num_ranks, environment, "epjit", 20, domain_size, timeout=300
    )
    assert {tuple(pes) for pes, *_ in found} == {tuple(range(num_ranks))}
    assert all(registers > 16 and not joined for _, registers, joined in found)


def test_ring_after_somebody_has_begun_nvshmem(num_ranks: int) -> None:
    """With other numbers than ours, so that the kernels must use `pes`."""
    found = launch.run(nvshmem.ring, num_ranks, {}, "ctypes", 5, 1, timeout=300)
    assert {tuple(pes) for pes, *_ in found} == {tuple(reversed(range(num_ranks)))}
    assert all(joined for *_, joined in found)


@pytest.mark.needs_own_gpu
def test_ring_after_torch_has_begun_nvshmem(num_ranks: int) -> None:
    found = launch.run(
        nvshmem.ring, num_ranks, {}, "torch", 5, 1, timeout=300, backend="nccl"
    )
    if nvshmem.SKIPPED in found:
        pytest.skip("this torch has no NVSHMEM")
    assert all(joined for *_, joined in found)


def test_a_kernel_is_collected_during_a_capture(
    num_ranks: int, environment: dict[str, str]
) -> None:
    found = launch.run(nvshmem.collect_in_a_capture, num_ranks, environment, timeout=300)
    assert found == [(2, 2, 0)] * num_ranks


@pytest.mark.needs_own_gpu
def test_created_again_without_a_leak(num_ranks: int, environment: dict[str, str]) -> None:
    found = launch.run(nvshmem.create_again, num_ranks, environment, 20, timeout=500)
    for free, attached in found:
        assert attached == 0
        # The first two let everybody fill their caches.
        assert free[-1] >= free[2] - 2 * MIB, [bytes_ // MIB for bytes_ in free]
