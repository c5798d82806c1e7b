"""DeepEP's V1 names, served by epjit."""

from epjit import Buffer, Config, EventHandle, EventOverlap, topk_idx_t

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
