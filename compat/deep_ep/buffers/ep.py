"""DeepEP 2.5's module `deep_ep.buffers.ep`."""

from deep_ep import EPBuffer, EPHandle

__all__ = ["EPBuffer", "EPHandle"]
