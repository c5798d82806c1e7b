"""DeepEP's module `deep_ep.utils`: the event classes and one check."""

from typing import Any

from epjit import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections"]


def check_nvlink_connections(group: Any) -> None:
    """Accepts every group: there for callers that import it.

    V1 refuses more than two PCIe cards here. epjit needs peer access, not NVLink, and
    `Buffer(group, ...)` raises a `RuntimeError` that names the pair of GPUs without it.

    Args:
        group: the process group that a buffer will be built for.
    """
