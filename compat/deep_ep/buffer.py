"""DeepEP's module `deep_ep.buffer`."""

from epjit import Buffer

__all__ = ["Buffer"]
