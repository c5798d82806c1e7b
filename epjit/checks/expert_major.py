"""The preconditions of the calls on rows by expert, checked before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epjit import calls
from epjit.calls import Bias, Payload
from epjit.checks.match import as_handle, check_topk, remember, signature
from epjit.checks.normal import NormalChecks, pair_of, rows_and_scales
from epjit.config import Config
from epjit.formats import CASTS, SUM_DTYPES
from epjit.handles import ExpertHandle, GivenExpertHandle, Placement, row_bound

if TYPE_CHECKING:
    from epjit.event import EventOverlap


@dataclass(frozen=True, kw_only=True)
class ExpertChecks(NormalChecks):
    """Checks of the normal mode's calls, with those on rows by expert."""

    def expert_dispatch(
        self,
        x: Payload,
        handle: GivenExpertHandle | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        num_experts: int | None,
        sizes: tuple[int, int, int],
        *,
        zero_padding: bool,
        column_major_scales: bool,
        cast: str | None,
        global_scale: torch.Tensor | None,
        config: Config | None,
        after: EventOverlap | None,
    ) -> calls.ExpertDispatch:
        """Everything that `expert_dispatch` takes.

        `sizes` are `expert_alignment`, `num_worst_tokens` and `num_expert_rows`.
        """
        rows, scales = rows_and_scales(x)
        arguments = (
            *signature(rows, scales, topk_idx, topk_weights, global_scale),
            *(cast, column_major_scales, num_experts, sizes, handle is None),
        )
        if arguments not in self._passed:
            self._rows_to_send(
                rows, scales, cast, global_scale, column_major_scales=column_major_scales
            )
            if handle is None:
                self._chosen(rows, topk_idx, num_experts, *sizes)
            elif topk_idx is not None or num_experts is not None or sizes != (1, 0, 0):
                raise ValueError(
                    "a cached expert_dispatch (handle=...) takes no topk_idx, num_experts, "
                    "expert_alignment, num_worst_tokens and num_expert_rows: the handle has them"
                )
            if topk_weights is not None and topk_idx is not None:
                shape = tuple(topk_idx.shape)
                self._check("topk_weights", topk_weights, shape, torch.float32, "as topk_idx")
            remember(self._passed, arguments, True)
        else:
            self._addresses(x=rows)
        num_sms = self._sms(config, self.dispatch_config, rows, rows.shape[0])
        own = None
        if handle is not None:
            own = self._expert_handle(handle, num_tokens=rows.shape[0])
            if topk_weights is not None:
                shape, why = (rows.shape[0], own.placement.row_of.shape[1]), "one a choice"
                self._check("topk_weights", topk_weights, shape, torch.float32, why)
        call = calls.ExpertDispatch(
            *(rows, scales, topk_idx, topk_weights, own, num_experts or 0, *sizes),
            *(bool(zero_padding), bool(column_major_scales)),
            None if cast is None else CASTS[cast],
            global_scale,
            num_sms,
        )
        if self.values is not None:
            self.values.expert_dispatch(call, after=after)
        return call

    def expert_combine(
        self,
        rows: torch.Tensor,
        handle: GivenExpertHandle,
        row_weights: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        bias: Bias,
        config: Config | None,
        *,
        after: EventOverlap | None,
    ) -> calls.ExpertCombine:
        """Everything that `expert_combine` takes."""
        own = self._expert_handle(handle, num_tokens=None)
        num_tokens = own.routing.num_tokens
        biases = pair_of(bias) if isinstance(bias, tuple) else (bias, None)
        arguments = (signature(rows, row_weights, topk_weights, *biases), num_tokens, "by expert")
        if arguments not in self._passed:
            self._rows("rows", rows, "num_rows", SUM_DTYPES, "")
            shape, why = (rows.shape[0],), "one for each row"
            for name, weights in (("row_weights", row_weights), ("topk_weights", topk_weights)):
                if weights is not None:
                    self._check(name, weights, shape, torch.float32, why)
            self._biases(biases, rows, num_tokens)
            remember(self._passed, arguments, True)
        else:
            self._addresses(rows=rows, bias_0=biases[0], bias_1=biases[1])
        num_sms = self._sms(config, self.combine_config, rows, num_tokens)
        call = calls.ExpertCombine(rows, row_weights, topk_weights, *biases, own, num_sms)
        if self.values is not None:
            self.values.expert_combine(call, after=after)
        return call

    # ---- their parts -----------------------------------------------------------------------------

    def _chosen(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor | None,
        num_experts: int | None,
        alignment: int,
        num_worst_tokens: int,
        num_expert_rows: int,
    ) -> None:
        """Choices of a dispatch that is not cached, and the sizes of what arrives."""
        if topk_idx is None or num_experts is None:
            raise ValueError(
                "expert_dispatch needs topk_idx and num_experts, or the handle of another one"
            )
        self._check_topk_idx(topk_idx, x=rows)
        self._experts(num_experts)
        if num_expert_rows and not num_worst_tokens:
            raise ValueError(
                f"num_expert_rows is {num_expert_rows}, which needs num_worst_tokens: without it "
                "the number of rows is what arrives"
            )
        local, num_topk = num_experts // self.num_ranks, topk_idx.shape[1]
        num_tokens = num_worst_tokens or self.num_ranks * rows.shape[0]
        bound = row_bound(num_tokens, num_topk, local, alignment)
        self._by_expert(num_experts, max(num_expert_rows, bound))

    def _expert_handle(self, handle: GivenExpertHandle, *, num_tokens: int | None) -> ExpertHandle:
        """The handle with names; only shapes, dtypes and devices are looked at."""
        named = as_handle(handle, ExpertHandle, "expert_dispatch")
        placed = as_handle(named.placement, Placement, "expert_dispatch")
        routing = self._handle(named.routing, num_tokens=num_tokens)
        if routing is not named.routing or placed is not named.placement:
            named = ExpertHandle(routing, placed)
        arguments = (signature(*placed), routing.num_rows)
        if arguments not in self._passed:
            experts = (routing.recv_expert_counts.shape[0],)
            shapes: tuple[tuple[int | str, ...], ...] = (
                (routing.num_rows, "num_topk"),
                ("num_rows",),
                experts,
                experts,
            )
            for name, each, shape in zip(placed._fields, placed, shapes, strict=True):
                why = "as expert_dispatch returned it"
                self._check(f"handle.placement.{name}", each, shape, torch.int32, why)
            check_topk(placed.row_of)
            remember(self._passed, arguments, True)
        return named
