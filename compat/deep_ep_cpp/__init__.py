"""The names of DeepEP's V1 extension module that others import, served by epjit."""

from epjit import Buffer as _Buffer
from epjit import Config, EventHandle, topk_idx_t
from epjit.buffer import BufferRuntime as Buffer

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "get_low_latency_rdma_size_hint",
    "is_sm90_compiled",
    "topk_idx_t",
]

is_sm90_compiled = _Buffer.is_sm90_compiled


def get_low_latency_rdma_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """There so that it can be imported; epjit has no low-latency mode yet.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        "epjit has no low-latency mode yet, so there is no size for "
        f"{num_max_dispatch_tokens_per_rank} tokens a rank, hidden {hidden}, {num_ranks} ranks, "
        f"{num_experts} experts"
    )
