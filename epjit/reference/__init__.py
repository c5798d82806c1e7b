"""The meaning of the operations, in torch on the CPU.

`epjit.reference.intranode` and `epjit.reference.low_latency` are the oracle: they see the inputs of
all ranks at once and say what each rank must get, bit for bit. `Normal` makes the same calls for
one NVLink domain and several. `epjit.modes.cpu` is one rank's view of the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from epjit.calls import Bias, Counts, Order, Sums
from epjit.handles import Dispatched
from epjit.reference import internode, intranode
from epjit.reference.internode import Domains
from epjit.reference.intranode import RankInput


@dataclass(frozen=True)
class Normal:
    """The operations of the normal mode: the same calls in one NVLink domain and between several.

    One domain makes them those of `intranode`, several those of `internode`; arguments and results
    are described there. Handles are those of the same mode.

    Attributes:
        domains: Ranks of each domain.
    """

    domains: Domains

    @property
    def spans_domains(self) -> bool:
        """Whether there are several domains."""
        return len(self.domains) > 1

    def layout(self, topk_idx: Tensor, num_experts: int) -> Counts:
        """Counts where the tokens of one rank go; in one domain those of the domains are None."""
        if self.spans_domains:
            return internode.layout(topk_idx, num_experts, self.domains)
        num_ranks = len(self.domains[0])
        per_rank, per_expert, in_rank = intranode.layout(topk_idx, num_experts, num_ranks)
        return per_rank, None, per_expert, in_rank

    def dispatch(self, inputs: Sequence[RankInput], rank: int, **options: Any) -> Dispatched:
        """Results of `rank`; `options` are `num_experts` and what may follow it."""
        if self.spans_domains:
            return internode.dispatch(inputs, rank, self.domains, **options)
        return intranode.dispatch(inputs, rank, **options)

    def cached_dispatch(
        self,
        xs: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        handles: Sequence[Any],
        rank: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows and scales of `rank` when another payload follows the handles."""
        mode = internode if self.spans_domains else intranode
        return mode.cached_dispatch(xs, scales, handles, rank)

    def combine(
        self,
        xs: Sequence[Tensor],
        handles: Sequence[Any],
        rank: int,
        topk_weights: Sequence[Tensor] | None = None,
        bias: Bias = None,
        order: Order | None = None,
    ) -> Sums:
        """Sums, and summed weights, for the tokens of `rank`; `order` is that of one domain."""
        if self.spans_domains:
            return internode.combine(xs, handles, rank, self.domains, topk_weights, bias)
        return intranode.combine(xs, handles, rank, topk_weights, bias, order)
