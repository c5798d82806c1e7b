"""The kernel of the layout operation: its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from epjit.runtime.kernel import KernelConfig

OF_EXPERTS = dict.fromkeys(("local_position", "block_counts"), 0)
"""Parameters that only a layout for rows by expert uses."""


@dataclass(frozen=True)
class LayoutConfig(KernelConfig, source="layout/layout.cu"):
    """Config of the layout kernel."""

    starts_early: ClassVar[bool] = True
    threads: ClassVar[int] = 64  # one a token
    shared_bytes: ClassVar[int] = 8192 * 4  # the counts of a block

    num_ranks: int
    topk_is_int64: bool
    num_domains: int = 1
    by_expert: bool = False

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        if self.by_expert:
            return f"by_expert_r{self.num_ranks}"
        if self.num_domains > 1:
            return f"internode_d{self.num_domains}_r{self.num_ranks}"
        return f"intranode_r{self.num_ranks}"
