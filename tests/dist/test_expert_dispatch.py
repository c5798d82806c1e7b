"""Rows by expert on real GPUs, one process each, against the reference."""

from __future__ import annotations

import pytest

from tests.harness import launch
from tests.scenarios import expert_major

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(params=("tma", "push", "ldst"))
def variant(request: pytest.FixtureRequest) -> dict[str, str]:
    """Environment of the ranks: every variant of dispatch that places rows by expert."""
    return {"EPJIT_DISPATCH_VARIANT": request.param}


def test_random_rounds(num_ranks: int, variant: dict[str, str]) -> None:
    done = launch.run(expert_major.random_rounds, num_ranks, variant, 100, 160, timeout=600)
    assert done == [100] * num_ranks


def test_model_shapes(num_ranks: int, variant: dict[str, str]) -> None:
    done = launch.run(expert_major.model_shapes, num_ranks, variant, 300, timeout=600)
    assert done == [4] * num_ranks


@pytest.fixture(params=(1, 2), ids="domains of {}".format)
def environ(request: pytest.FixtureRequest, num_ranks: int) -> dict[str, str]:
    """Environment of the ranks: NVLink domains of so many."""
    if num_ranks % request.param or num_ranks == request.param:
        pytest.skip(f"{num_ranks} ranks are no domains of {request.param}")
    return {"EPJIT_NVLINK_DOMAIN": str(request.param)}


@pytest.mark.parametrize("transport", ["loopback", "nvshmem"])
def test_random_rounds_between_domains(
    num_ranks: int, environ: dict[str, str], transport: str
) -> None:
    environ = environ | {"EPJIT_TRANSPORT": transport}
    done = launch.run(expert_major.random_rounds, num_ranks, environ, 60, 160, timeout=600)
    assert done == [60] * num_ranks


@pytest.mark.parametrize("variant", ["tma", "ldst"])
def test_model_shapes_between_domains(
    num_ranks: int, environ: dict[str, str], variant: str
) -> None:
    names = {f"EPJIT_{op}_VARIANT": variant for op in ("DISPATCH", "COMBINE", "PERMUTE")}
    done = launch.run(expert_major.model_shapes, num_ranks, environ | names, 300, timeout=600)
    assert done == [4] * num_ranks
