"""`ElasticBuffer` on real GPUs, one process each, against the reference; ``make test-dist N=4``."""

from __future__ import annotations

import pytest

from tests.harness import launch
from tests.rounds.normal import variant_environ
from tests.scenarios import elastic

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("variant", ["push", "ldst", "direct"])
def test_random_rounds(num_ranks: int, variant: str) -> None:
    """100 fresh rounds on two buffers in turn: one sums on the ranks, one sends each row."""
    environ = variant_environ(variant)
    done = launch.run(elastic.random_rounds, num_ranks, environ, 100, 160, timeout=600)
    assert done == [100] * num_ranks


def test_random_rounds_between_domains(num_ranks: int) -> None:
    """Expanded rows by a second pass."""
    if num_ranks == 1:
        pytest.skip("one rank is one domain")
    environ = {"EPJIT_NVLINK_DOMAIN": "1"}
    done = launch.run(elastic.random_rounds, num_ranks, environ, 40, 160, timeout=600)
    assert done == [40] * num_ranks


@pytest.mark.parametrize("domain", ["", "1"])
def test_handles_of_public_fields(num_ranks: int, domain: str) -> None:
    """Copies of a handle's tensors route anew; also between domains."""
    environ = {"EPJIT_NVLINK_DOMAIN": domain} if domain else {}
    launch.run(elastic.handles_of_public_fields, num_ranks, environ, timeout=300)


def test_graph(num_ranks: int) -> None:
    """Captured once in each order of rows, replayed with changed inputs and eager calls between."""
    done = launch.run(elastic.graph, num_ranks, {}, 51, 100, timeout=400)
    assert done == [102] * num_ranks


def test_beside_the_low_latency_mode(num_ranks: int) -> None:
    """A Buffer and an ElasticBuffer in one process, calls in turns and in two graphs."""
    launch.run(elastic.beside_low_latency, num_ranks, {}, timeout=300)
