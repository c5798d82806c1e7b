"""The layout operation: which ranks each token goes to, counted on the GPU without any peer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from epjit.calls import Counts
from epjit.config import MAX_DOMAINS, MAX_EXPERTS
from epjit.kernels.layout import OF_EXPERTS, LayoutConfig
from epjit.runtime.kernel import Kernel
from epjit.runtime.launch import Launch

if TYPE_CHECKING:
    from epjit.runtime.topology import Topology

_MAX_BLOCKS = 1024


class Layout:
    """The layout launches of one Buffer.

    Args:
        topology: Ranks of the group, and their NVLink domains.
        device: The GPU.
    """

    def __init__(self, topology: Topology, device: torch.device) -> None:
        num_ranks = topology.num_domains * topology.num_local
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self._counters = torch.zeros(1 + num_ranks + MAX_DOMAINS + MAX_EXPERTS, **ints)
        self._domain_of: torch.Tensor | None = None
        if topology.spans_domains:
            of = {rank: n for n, domain in enumerate(topology.domains) for rank in domain}
            self._domain_of = torch.tensor([of[rank] for rank in range(num_ranks)], **ints)
        self._num_ranks, self._num_domains = num_ranks, topology.num_domains
        self._device = device
        self._launches = {dtype: self._launch(dtype) for dtype in (torch.int32, torch.int64)}
        self._by_expert: dict[torch.dtype, Launch[LayoutConfig]] = {}

    def _launch(self, dtype: torch.dtype, *, by_expert: bool = False) -> Launch[LayoutConfig]:
        wide = dtype == torch.int64
        config = LayoutConfig(self._num_ranks, wide, self._num_domains, by_expert)
        return Launch(
            Kernel(config, device=self._device.index),
            **({} if by_expert else OF_EXPERTS),
            counters=self._counters.data_ptr(),
            domain_of=0 if self._domain_of is None else self._domain_of.data_ptr(),
        )

    def load_by_expert(self) -> None:
        """Compiles and loads what `by_expert` launches."""
        for dtype in (torch.int32, torch.int64):
            if dtype not in self._by_expert:
                self._by_expert[dtype] = self._launch(dtype, by_expert=True)

    def by_expert(
        self,
        stream: int,
        topk_idx: torch.Tensor,
        counts: Counts,
        local_position: torch.Tensor,
        block_counts: torch.Tensor,
    ) -> None:
        """Queues the kernel that numbers selections, too.

        Args:
            stream: Handle of the CUDA stream.
            topk_idx: int32 or int64 `[T, K]`.
            counts: Outputs.
            local_position: Output, int16 `[T, K]`.
            block_counts: Output, int32 `[blocks of 64 tokens, E]`.
        """
        launch = self._by_expert[topk_idx.dtype]
        launch.set(
            **self._values(topk_idx, counts),
            local_position=local_position.data_ptr(),
            block_counts=block_counts.data_ptr(),
        )
        launch.start(stream, block_counts.shape[0])

    def __call__(self, stream: int, topk_idx: torch.Tensor, counts: Counts) -> None:
        """Queues the kernel.

        Args:
            stream: Handle of the CUDA stream.
            topk_idx: int32 or int64 `[T, K]`.
            counts: Outputs.
        """
        grid = max(1, min(-(-topk_idx.shape[0] // 64), _MAX_BLOCKS))
        launch = self._launches[topk_idx.dtype]
        launch.set(**self._values(topk_idx, counts))
        launch.start(stream, grid)

    @staticmethod
    def _values(topk_idx: torch.Tensor, counts: Counts) -> dict[str, int]:
        """Parameters of a call."""
        num_tokens, num_topk = topk_idx.shape
        per_rank, per_rdma_rank, per_expert, in_rank = counts
        return {
            "topk_idx": topk_idx.data_ptr(),
            "num_tokens_per_rank": per_rank.data_ptr(),
            "num_tokens_per_rdma_rank": 0 if per_rdma_rank is None else per_rdma_rank.data_ptr(),
            "num_tokens_per_expert": per_expert.data_ptr(),
            "is_token_in_rank": in_rank.data_ptr(),
            "num_tokens": num_tokens,
            "num_topk": num_topk,
            "num_experts": per_expert.shape[0],
        }
