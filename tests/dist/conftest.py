"""N GPUs, one process each. `EPJIT_TEST_RANKS` says how many; without it, all that are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _on_cpu() -> bool:
    """Whether the bodies run on the CPU backend, to try them where there is no GPU."""
    return os.environ.get("EPJIT_BACKEND") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips this tier where there are fewer GPUs than ranks."""
    here = [item for item in items if _HERE in item.path.parents]
    if not here:
        return
    on_cpu, num_gpus = _on_cpu(), _num_gpus()
    wanted = int(os.environ.get("EPJIT_TEST_RANKS") or (2 if on_cpu else max(num_gpus, 2)))
    for item in here:
        if on_cpu and item.get_closest_marker("needs_gpu"):
            item.add_marker(pytest.mark.skip(reason="EPJIT_BACKEND=cpu, and this needs GPUs"))
        elif not on_cpu and num_gpus < wanted:
            reason = (
                f"needs {wanted} GPUs, {num_gpus} found (EPJIT_TEST_RANKS chooses another number)"
            )
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config: pytest.Config) -> None:
    """The marks of this tier."""
    config.addinivalue_line("markers", "needs_gpu: means nothing on the CPU backend")


@pytest.fixture(scope="session")
def num_ranks() -> int:
    """Number of processes, each with its GPU."""
    return int(os.environ.get("EPJIT_TEST_RANKS") or (2 if _on_cpu() else _num_gpus()))
