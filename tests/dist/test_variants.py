"""Ranks that chose different kernels say so, instead of waiting for each other."""

from __future__ import annotations

import os
from typing import Any

import pytest

from epjit import Buffer
from tests.harness import launch


def chooses_differently(group: Any) -> None:
    launch.take_gpu(group.rank(), group.size())
    os.environ["EPJIT_DISPATCH_VARIANT"] = "ldst" if group.rank() else "auto"
    buffer = Buffer(group, 16 << 20, explicitly_destroy=True)
    with pytest.raises(RuntimeError, match="the ranks chose different kernels for dispatch"):
        buffer.warmup(1024)
    buffer.destroy()


@pytest.mark.needs_gpu
def test_different_variants(num_ranks: int) -> None:
    if num_ranks < 2:
        pytest.skip("needs two ranks")
    launch.run(chooses_differently, num_ranks, timeout=120)
