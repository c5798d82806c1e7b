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
