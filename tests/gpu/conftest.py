"""One GPU, several ranks: what must be set before CUDA starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_HERE = Path(__file__).parent

# Two streams a rank; with the default of 8 queues a kernel can end up behind the wait of another
# rank.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# Loading a kernel of torch at its first launch waits for all that runs on the GPU: for kernels of
# another rank, too, which wait for the rank that loads.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each worker of pytest-xdist a GPU of its own; skips the tier where it has none.

    With eleven processes on one GPU a third of the tests with virtual ranks timed out: one rank's
    kernel did not start while another's spun. Alone the same tests pass.
    """
    import torch

    ours = [item for item in items if _HERE in item.path.parents]
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    reason = ""
    if num_workers > 1 and (len(gpus) < num_workers or len(ours) < len(items)):
        reason = (
            "virtual ranks need a GPU to themselves: run this tier alone, without -n or with as "
            "many GPUs in CUDA_VISIBLE_DEVICES"
        )
    elif num_workers > 1:
        # A worker in place of one that crashed has a higher number.
        number = int(os.environ["PYTEST_XDIST_WORKER"][2:])
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    if not reason and not torch.cuda.is_available():  # from here on the variable has been read
        reason = "needs a GPU"
    for item in ours:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
