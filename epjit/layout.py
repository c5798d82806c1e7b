"""The layout operation: which ranks each token goes to, counted on the GPU without any peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from epjit.config import MAX_EXPERTS
from epjit.runtime.jit import Kernel, KernelConfig, Launch

_MAX_BLOCKS = 1024


@dataclass(frozen=True)
class LayoutConfig(KernelConfig):
    """What the layout kernel is compiled for."""

    source: ClassVar[str] = "intranode/layout.cu"
    op: ClassVar[str] = "layout"

    num_ranks: int
    topk_is_int64: bool

    @property
    def threads(self) -> int:
        """Threads a block: one a token."""
        return 64

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the counts of a block."""
        return 8192 * 4

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"intranode_r{self.num_ranks}"


class Layout:
    """The layout launches of one Buffer.

    Args:
        num_ranks: Ranks of the group.
        device: The GPU.
    """

    def __init__(self, num_ranks: int, device: torch.device) -> None:
        self._counters = torch.zeros(1 + num_ranks + MAX_EXPERTS, dtype=torch.int32, device=device)
        self._launches = {
            dtype: Launch(
                Kernel(LayoutConfig(num_ranks, dtype == torch.int64), device=device.index),
                counters=self._counters.data_ptr(),
            )
            for dtype in (torch.int32, torch.int64)
        }

    def __call__(
        self,
        stream: int,
        topk_idx: torch.Tensor,
        num_tokens_per_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        is_token_in_rank: torch.Tensor,
    ) -> None:
        """Queues the kernel.

        Args:
            stream: Handle of the CUDA stream.
            topk_idx: int32 or int64 `[T, K]`.
            num_tokens_per_rank: Output, int32 `[R]`.
            num_tokens_per_expert: Output, int32 `[E]`.
            is_token_in_rank: Output, bool `[T, R]`.
        """
        num_tokens, num_topk = topk_idx.shape
        self._launches[topk_idx.dtype](
            stream,
            max(1, min(-(-num_tokens // 64), _MAX_BLOCKS)),
            topk_idx=topk_idx.data_ptr(),
            num_tokens_per_rank=num_tokens_per_rank.data_ptr(),
            num_tokens_per_expert=num_tokens_per_expert.data_ptr(),
            is_token_in_rank=is_token_in_rank.data_ptr(),
            num_tokens=num_tokens,
            num_topk=num_topk,
            num_experts=num_tokens_per_expert.shape[0],
        )
