"""`epjit.moe` on real GPUs, one process each: layers against the dense one."""

from __future__ import annotations

import pytest

from tests import launch, moe_bodies

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("body", ["eager", "checkpointed", "exported", "managed", "registered"])
def test_layer(num_ranks: int, body: str) -> None:
    launch.run(getattr(moe_bodies, body), num_ranks, timeout=300)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer(num_ranks: int, backend: str) -> None:
    launch.run(moe_bodies.compiled, num_ranks, backend, timeout=600)
