"""One GPU, several ranks: what must be set before CUDA starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_HERE = Path(__file__).parent

# Two streams a rank; with the default of 8 queues a kernel can end up behind the wait of another
# rank.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tier without a GPU, or with one that several workers of pytest-xdist share.

    With eleven processes on one GPU a third of the tests with virtual ranks timed out: one rank's
    kernel did not start while another's spun. Alone the same tests pass.
    """
    import torch

    reason = ""
    if not torch.cuda.is_available():
        reason = "needs a GPU"
    elif int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        reason = "virtual ranks need the GPU to themselves: run this tier without -n"
    for item in items:
        if reason and _HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
