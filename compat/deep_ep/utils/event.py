"""DeepEP 2's module `deep_ep.utils.event`."""

from epjit import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
