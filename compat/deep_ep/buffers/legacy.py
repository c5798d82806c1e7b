"""DeepEP 2.1's module `deep_ep.buffers.legacy`: V1's Buffer."""

from epjit import Buffer

__all__ = ["Buffer"]
