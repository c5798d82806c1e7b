"""The names of DeepEP's V1 extension module that others import, served by epjit."""

from epjit import Buffer as _Buffer
from epjit import Config, EventHandle, topk_idx_t
from epjit.buffer_runtime import BufferRuntime as Buffer

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "get_low_latency_rdma_size_hint",
    "is_sm90_compiled",
    "topk_idx_t",
]

is_sm90_compiled = _Buffer.is_sm90_compiled
get_low_latency_rdma_size_hint = _Buffer.get_low_latency_rdma_size_hint
