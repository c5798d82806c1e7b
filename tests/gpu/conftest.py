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
    """Skips the tier without a GPU."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if _HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
