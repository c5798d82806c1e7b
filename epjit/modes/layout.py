"""The layout operation: which ranks each token goes to, counted on the GPU without any peer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from epjit.config import MAX_DOMAINS, MAX_EXPERTS
from epjit.kernels.layout import LayoutConfig
from epjit.runtime.kernel import Kernel
from epjit.runtime.launch import Launch

_MAX_BLOCKS = 1024


class Layout:
    """The layout launches of one Buffer.

    Args:
        num_ranks: Ranks of the group.
        device: The GPU.
        domains: Ranks of each NVLink domain, when there are several.
    """

    def __init__(
        self, num_ranks: int, device: torch.device, domains: Sequence[Sequence[int]] | None = None
    ) -> None:
        num_domains, self._domain_of = 1, None
        num_counters = 1 + num_ranks + MAX_DOMAINS + MAX_EXPERTS
        self._counters = torch.zeros(num_counters, dtype=torch.int32, device=device)
        if domains is not None:
            num_domains = len(domains)
            of = {rank: number for number, domain in enumerate(domains) for rank in domain}
            self._domain_of = torch.tensor(
                [of[rank] for rank in range(num_ranks)], dtype=torch.int32, device=device
            )
        self._launches = {
            dtype: Launch(
                Kernel(
                    LayoutConfig(num_ranks, dtype == torch.int64, num_domains), device=device.index
                ),
                counters=self._counters.data_ptr(),
                domain_of=0 if self._domain_of is None else self._domain_of.data_ptr(),
            )
            for dtype in (torch.int32, torch.int64)
        }

    def __call__(
        self,
        stream: int,
        topk_idx: torch.Tensor,
        num_tokens_per_rank: torch.Tensor,
        num_tokens_per_rdma_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor,
        is_token_in_rank: torch.Tensor,
    ) -> None:
        """Queues the kernel.

        Args:
            stream: Handle of the CUDA stream.
            topk_idx: int32 or int64 `[T, K]`.
            num_tokens_per_rank: Output, int32 `[R]`.
            num_tokens_per_rdma_rank: Output, int32 `[D]`, or None with one domain.
            num_tokens_per_expert: Output, int32 `[E]`.
            is_token_in_rank: Output, bool `[T, R]`.
        """
        num_tokens, num_topk = topk_idx.shape
        values = {
            "topk_idx": topk_idx.data_ptr(),
            "num_tokens_per_rank": num_tokens_per_rank.data_ptr(),
            "num_tokens_per_rdma_rank": 0
            if num_tokens_per_rdma_rank is None
            else num_tokens_per_rdma_rank.data_ptr(),
            "num_tokens_per_expert": num_tokens_per_expert.data_ptr(),
            "is_token_in_rank": is_token_in_rank.data_ptr(),
            "num_tokens": num_tokens,
            "num_topk": num_topk,
            "num_experts": num_tokens_per_expert.shape[0],
        }
        grid = max(1, min(-(-num_tokens // 64), _MAX_BLOCKS))
        self._launches[topk_idx.dtype].start(stream, grid, values)
