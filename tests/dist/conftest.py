"""N ranks, one process each. `EPJIT_TEST_RANKS` says how many; else one a GPU, two at least.

Ranks share GPUs where there are fewer: their kernels take turns, some milliseconds each, and tests
that need a GPU for each rank are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _on_cpu() -> bool:
    """Whether the scenarios run on the CPU backend, to try them where there is no GPU."""
    return os.environ.get("EPJIT_BACKEND") == "cpu"


def _num_ranks() -> int:
    return int(os.environ.get("EPJIT_TEST_RANKS") or max(2, 0 if _on_cpu() else _num_gpus()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine has too few GPUs for."""
    here = [item for item in items if _HERE in item.path.parents]
    if not here:
        return
    on_cpu, num_gpus, num_ranks = _on_cpu(), _num_gpus(), _num_ranks()
    for item in here:
        if on_cpu:
            if item.get_closest_marker("needs_gpu"):
                item.add_marker(pytest.mark.skip(reason="EPJIT_BACKEND=cpu, and this needs GPUs"))
            continue
        needed = num_ranks if item.get_closest_marker("needs_own_gpu") else 1
        if num_gpus < needed:
            reason = f"needs {needed} GPUs, {num_gpus} found (EPJIT_TEST_RANKS: another number)"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config: pytest.Config) -> None:
    """The marks of this tier."""
    config.addinivalue_line("markers", "needs_own_gpu: not on GPUs that ranks share")
    config.addinivalue_line("markers", "needs_gpu: means nothing on the CPU backend")


@pytest.fixture(scope="session")
def num_ranks() -> int:
    """Number of processes."""
    return _num_ranks()
