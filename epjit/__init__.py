"""Expert-parallel dispatch and combine for MoE layers, with DeepEP's V1 interface and no build.

`import epjit` loads nothing else: a name is imported when it is first used, so torch, CuPy and
CUDA stay untouched until then. A missing package then raises `ImportError` with the command that
installs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from epjit.buffer import Buffer
    from epjit.config import Config
    from epjit.elastic import ElasticBuffer
    from epjit.ep import EPBuffer
    from epjit.errors import CommunicationError
    from epjit.event import EventHandle, EventOverlap
    from epjit.handles import EPHandle

    topk_idx_t: torch.dtype

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "CommunicationError",
    "Config",
    "EPBuffer",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "topk_idx_t",
]

_MODULES = {
    "Buffer": "epjit.buffer",
    "CommunicationError": "epjit.errors",
    "Config": "epjit.config",
    "EPBuffer": "epjit.ep",
    "EPHandle": "epjit.handles",
    "ElasticBuffer": "epjit.elastic",
    "EventHandle": "epjit.event",
    "EventOverlap": "epjit.event",
}


def _topk_idx_t() -> torch.dtype:
    """The dtype that DeepEP fixes in its build; here `TOPK_IDX_BITS` (64 or 32) at first use."""
    import torch

    from epjit import env

    return {64: torch.int64, 32: torch.int32}[env.topk_idx_bits()]


def __getattr__(name: str) -> Any:
    try:
        if name == "topk_idx_t":
            value: Any = _topk_idx_t()
        elif name == "moe":
            value = importlib.import_module("epjit.moe")
        elif name in _MODULES:
            value = getattr(importlib.import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module 'epjit' has no attribute {name!r}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        from epjit.remedy import install_command

        raise ImportError(
            f"epjit.{name} needs the package torch, which is not installed: "
            f"{install_command('torch')}",
            name="torch",
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
