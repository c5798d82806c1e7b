"""`epjit.moe` on real GPUs, one process each: layers against the dense one."""

from __future__ import annotations

import pytest

from tests.harness import launch
from tests.scenarios import moe as scenarios

pytestmark = pytest.mark.timeout(900)


BODIES = (
    "eager",
    "watched",
    "odd_addresses",
    pytest.param("replayed", marks=pytest.mark.needs_gpu),
    "agreed",
    "checkpointed",
    "exported",
    "inferred",
    "cast_on_the_way",
    "trained_in_fp8",
    pytest.param("trained_in_a_graph", marks=pytest.mark.needs_gpu),
    "managed",
    "registered",
)


@pytest.mark.parametrize("body", BODIES)
def test_layer(num_ranks: int, body: str) -> None:
    launch.run(getattr(scenarios, body), num_ranks, timeout=300)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(num_ranks: int, compiled: bool) -> None:
    launch.run(scenarios.autocasted, num_ranks, compiled, timeout=300)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_pass_casts(num_ranks: int, compiled: bool) -> None:
    launch.run(scenarios.straight_through, num_ranks, compiled, timeout=400)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer(num_ranks: int, backend: str) -> None:
    launch.run(scenarios.compiled, num_ranks, backend, timeout=600)


@pytest.mark.parametrize("nvlink_domain", [1, 2])
def test_layer_between_domains(num_ranks: int, nvlink_domain: int) -> None:
    if num_ranks % nvlink_domain or num_ranks == nvlink_domain:
        pytest.skip(f"{num_ranks} ranks are no domains of {nvlink_domain}")
    launch.run(scenarios.between_domains, num_ranks, nvlink_domain, timeout=600)
