"""DeepEP 2.1's module `deep_ep.buffers.elastic`."""

from deep_ep import ElasticBuffer, EPHandle

__all__ = ["EPHandle", "ElasticBuffer"]
