"""DeepEP's names, those of V1 and beside them those of 2.1 and 2.5, served by epjit."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epjit import Buffer, Config, EventHandle, EventOverlap, env, topk_idx_t

if TYPE_CHECKING:
    from deep_ep.utils.envs import get_logical_domain_size as get_logical_domain_size
    from deep_ep.utils.envs import get_physical_domain_size as get_physical_domain_size
    from epjit import ElasticBuffer as ElasticBuffer
    from epjit import EPBuffer as EPBuffer
    from epjit import EPHandle as EPHandle

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]

_OF_2 = {
    "EPBuffer": "epjit",
    "EPHandle": "epjit",
    "ElasticBuffer": "epjit",
    "get_logical_domain_size": "deep_ep.utils.envs",
    "get_physical_domain_size": "deep_ep.utils.envs",
}


def _check_alone() -> None:
    """Refuses to be one half of two packages: another distribution has put its files beside ours.

    Raises:
        ImportError: Names a file, and what to do.
    """
    folder = Path(__file__).parent
    others = sorted(each.name for each in folder.iterdir() if each.suffix in (".so", ".pyd"))
    if others:
        raise ImportError(
            f"{folder} has {others[0]}, which is not of epjit-deep-ep: another distribution owns "
            "the name deep_ep too (DeepEP, sgl-deep-ep, deepinfer-ep). Uninstall both and install "
            "the one that is wanted; or keep the other one installed, and put the folder compat/ "
            "of epjit first in PYTHONPATH where epjit is wanted",
            name="deep_ep",
        )


def __getattr__(name: str) -> Any:
    if not env.deep_ep_v1():
        if name == "__version__":
            return "2.1.0"
        if name in _OF_2:
            return getattr(importlib.import_module(_OF_2[name]), name)
    raise AttributeError(f"module 'deep_ep' has no attribute {name!r}")


def __dir__() -> list[str]:
    of_2 = [] if env.deep_ep_v1() else [*_OF_2, "__version__"]
    return sorted({*globals(), *of_2})


_check_alone()
