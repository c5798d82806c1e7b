"""DeepEP 2's package of buffers."""
