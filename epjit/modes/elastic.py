"""DeepEP 2's dispatch and combine: the calls of a normal mode, and what is said about their rows.

A dispatch is a layout and a dispatch of the mode; by expert a copy follows, and before a combine by
expert the rows of a token are summed on their rank. Whatever else a handle says (where tokens came
from, where they lie, how many) one kernel works out behind the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from epjit.calls import (
    Combine,
    Counts,
    Describe,
    Dispatch,
    ElasticCombine,
    ElasticDispatch,
    Layout,
    Order,
    Routing,
    Sums,
)
from epjit.handles import Dispatched, ElasticDispatched, EPHandle, Handle
from epjit.kernels.elastic import DescribeConfig
from epjit.modes import expert_major
from epjit.modes.normal import pointer
from epjit.reference import elastic as reference
from epjit.runtime.device import num_sms
from epjit.runtime.empty import Empty, TensorSpec, matrix, vector
from epjit.sizes import align

if TYPE_CHECKING:
    from epjit.modes.make import AnyNormal
    from epjit.scope import AnyScope, Record

_CARRIER_BYTES = 16  # the least that a row has, of a dispatch that is made for its handle alone


@dataclass(frozen=True)
class Elastic:
    """The calls of one rank.

    Attributes:
        mode: The normal mode that they are made of.
        rank: This rank.
        num_ranks: `R`.
        empty: Makes tensors on the device.
        multiple_reduction: Whether a rank sums its rows of a token before they travel.
    """

    mode: AnyNormal
    rank: int
    num_ranks: int
    empty: Empty
    multiple_reduction: bool

    # ---- dispatch --------------------------------------------------------------------------------

    def dispatch(self, scope: AnyScope, call: ElasticDispatch) -> tuple[ElasticDispatched, Record]:
        """Sends rows along new choices, or along those of a handle.

        Returns:
            The results, and what was used for them.
        """
        if call.handle is not None:
            return self._cached_dispatch(scope, call, call.handle)
        num_topk = call.topk_idx.shape[1]
        num_local = call.num_experts // self.num_ranks
        counts = self.mode.layout(scope, Layout(call.topk_idx, call.num_experts))
        num_worst_tokens = 0 if call.waits else self.num_ranks * call.max_tokens
        sent = self._dispatch(
            scope, call, Routing(*counts), call.topk_idx, call.topk_weights, num_worst_tokens
        )
        received = whole = self.mode.dispatch(scope, sent)
        routing, idx = received.handle, received.recv_topk_idx
        per_expert = received.num_recv_tokens_per_expert_list
        assert routing is not None
        assert idx is not None
        assert per_expert is not None
        num_rows, num_expanded = idx.shape[0], 0
        if call.do_expand:
            num_expanded = sum(per_expert)
            if not call.waits:
                sizes = (self.num_ranks, call.max_tokens, num_topk, num_local)
                num_expanded = reference.row_bound(*sizes, call.expert_alignment)
        with scope.allocating():
            rank_ends, expert_ends, metadata, slots, choices = self.empty(
                (
                    vector(torch.int32, self.num_ranks),
                    vector(torch.int32, num_local),
                    matrix(torch.int32, num_rows, num_topk + 2),
                    matrix(torch.int32, *call.topk_idx.shape),
                    matrix(call.topk_idx.dtype, *call.topk_idx.shape)
                    if call.copies_choices
                    else None,
                )
            )
        scope.start()
        columns = None
        if call.do_expand:
            with scope.running():
                columns, source, ends, _ = expert_major.place(
                    idx, num_local, alignment=call.expert_alignment, num_rows=num_expanded
                )
                received = _by_expert(received, source, ends, num_topk)
        described = Describe(
            call.topk_idx,
            routing.send_head,
            routing.source_ends(self.rank),
            routing.recv_tokens,
            None if call.do_expand else idx,
            columns,
            routing.recv_expert_counts,
            rank_ends,
            expert_ends,
            call.recv_stats,
            metadata,
            slots,
            choices,
        )
        self._describe(scope, described, call)
        handle = EPHandle(
            do_expand=call.do_expand,
            num_experts=call.num_experts,
            expert_alignment=call.expert_alignment,
            num_max_tokens_per_rank=call.max_tokens,
            num_sms=call.num_sms,
            topk_idx=call.topk_idx if choices is None else choices,
            psum_num_recv_tokens_per_scaleup_rank=rank_ends,
            psum_num_recv_tokens_per_expert=expert_ends,
            num_unaligned_recv_tokens_per_expert=routing.recv_expert_counts,
            num_recv_tokens_per_expert_list=per_expert,
            recv_src_metadata=metadata,
            dst_buffer_slot_idx=slots,
            num_recv_tokens=num_rows,
            num_expanded_tokens=num_expanded,
            routing=routing,
        )
        return self._results(scope, call, received, handle), (sent, described, whole)

    def _dispatch(
        self,
        scope: AnyScope,
        call: ElasticDispatch,
        routing: Routing | Handle,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_worst_tokens: int,
    ) -> Dispatch:
        """The mode's call. Choices and weights travel together: where there are none, any do."""
        if topk_idx is not None and topk_weights is None:
            with scope.allocating():
                (topk_weights,) = self.empty((matrix(torch.float32, *topk_idx.shape),))
        return Dispatch(
            call.x,
            call.scales,
            topk_idx,
            topk_weights,
            routing,
            call.expert_alignment,
            num_worst_tokens,
            call.num_sms,
        )

    def _cached_dispatch(
        self, scope: AnyScope, call: ElasticDispatch, handle: EPHandle
    ) -> tuple[ElasticDispatched, Record]:
        """Rows come to lie where the metadata of the handle says."""
        assert handle.routing is not None
        needs_choices = not call.do_expand or call.topk_weights is not None
        choices = handle.topk_idx if needs_choices else None
        sent = self._dispatch(scope, call, handle.routing, choices, call.topk_weights, 0)
        received = whole = self.mode.dispatch(scope, sent)
        if call.do_expand:
            num_topk = handle.topk_idx.shape[1]
            with scope.running():
                columns = handle.recv_src_metadata[:, 2:]
                source = _source_of(columns, handle.num_expanded_tokens)
                num_rows = handle.psum_num_recv_tokens_per_expert[-1:] + (call.expert_alignment - 1)
                ends = num_rows - num_rows % call.expert_alignment
                received = _by_expert(received, source, ends, num_topk)
        return self._results(scope, call, received, handle), (sent, whole, *_read(handle))

    def _results(
        self, scope: AnyScope, call: ElasticDispatch, received: Dispatched, handle: EPHandle
    ) -> ElasticDispatched:
        """Results for the caller, with scales in the layout that is asked for."""
        rows, scales, idx, weights, *_ = received
        if scales is not None and call.column_major_scales:
            with scope.allocating():
                (by_column,) = self.empty((_column_major(scales),))
            scope.start()
            with scope.running():
                scales = by_column.copy_(scales)
        if call.do_expand:
            idx = None
            scope.hand_over((rows, scales, weights))  # `_by_expert` made them
        if call.topk_weights is None:
            weights = None
        return ElasticDispatched(rows, scales, idx, weights, handle)

    def _describe(self, scope: AnyScope, what: Describe, call: ElasticDispatch) -> None:
        """Fills the tensors of a handle."""
        device, sizes = call.x.device, (call.max_tokens, call.expert_alignment)
        if device.type != "cuda":
            reference.describe(what, self.rank, max_tokens=sizes[0], alignment=sizes[1])
            return
        (num_tokens, num_topk), num_rows = what.topk_idx.shape, what.metadata.shape[0]
        config = DescribeConfig(num_topk, what.topk_idx.dtype == torch.int64)
        num_warps = config.threads // 32
        grid = min(-(-max(num_rows, num_tokens, 1) // num_warps), 4 * num_sms(device.index))
        values = {name: pointer(tensor) for name, tensor in what._asdict().items()}
        values |= {
            "source_stride": what.source_ends.stride(0),
            "token_stride": what.recv_tokens.stride(0),
            "num_tokens": num_tokens,
            "num_rows": num_rows,
            "num_ranks": self.num_ranks,
            "num_local": what.counts.shape[0],
            "rank": self.rank,
            "max_tokens": call.max_tokens,
            "alignment": call.expert_alignment,
        }
        expert_major._launch(config, device.index).start(scope.stream, grid, values)

    # ---- combine ---------------------------------------------------------------------------------

    def combine(self, scope: AnyScope, call: ElasticCombine) -> tuple[Sums, Record]:
        """Brings rows back and sums them; the sums, and what was used for them."""
        handle, x, weights = call.handle, call.x, call.topk_weights
        assert handle.routing is not None
        if handle.do_expand and not self.multiple_reduction:
            return self._combine_each_row(scope, call, handle)
        columns = handle.recv_src_metadata[:, 2:]
        scope.start()
        with scope.running():
            if handle.do_expand:
                columns = columns.contiguous()
                x = expert_major.unpermute(x, columns)
                if weights is not None:
                    weights = _take(weights, columns)
            elif weights is not None:
                rows = min(weights.shape[0], columns.shape[0])
                weights = weights[:rows].masked_fill(columns[:rows] < 0, 0.0)
        routing = handle.routing.cut(min(x.shape[0], handle.routing.num_rows))
        returned = Combine(
            x[: routing.num_rows],
            weights,
            call.bias_0,
            call.bias_1,
            routing,
            call.num_sms,
            Order(handle.topk_idx, handle.num_experts),
        )
        return self.mode.combine(scope, returned), (returned, *_read(handle))

    def _combine_each_row(
        self, scope: AnyScope, call: ElasticCombine, handle: EPHandle
    ) -> tuple[Sums, Record]:
        """As if each choice were a token of its own: its row comes back, and is added here."""
        (num_tokens, num_topk), num_experts = handle.topk_idx.shape, handle.num_experts
        choices = handle.topk_idx.view(-1, 1)
        room = max(handle.num_expanded_tokens, 1)
        counts: Counts = self.mode.layout(scope, Layout(choices, num_experts))
        with scope.allocating():
            (carrier,) = self.empty((matrix(torch.uint8, choices.shape[0], _CARRIER_BYTES),))
        sent = Dispatch(carrier, None, None, None, Routing(*counts), 1, room, call.num_sms)
        received = self.mode.dispatch(scope, sent)
        routing = received.handle
        assert routing is not None
        with scope.running():
            # Rows of the metadata are by source rank and token, and columns by k: so are these.
            columns = handle.recv_src_metadata[:, 2:].reshape(-1)
            is_here = columns >= 0
            place = torch.where(is_here, is_here.cumsum(dim=0) - 1, room)
            row_of = columns.new_zeros(room + 1).scatter_(0, place, columns)[:room]
            x = call.x if call.x.shape[0] else call.x.new_zeros((1, call.x.shape[1]))
            x = x.index_select(0, row_of)
            weights = call.topk_weights
            if weights is not None:
                weights = weights if weights.shape[0] else weights.new_zeros(1)
                weights = weights.index_select(0, row_of)[:, None]
        returned = Combine(x, weights, None, None, routing, call.num_sms)
        rows, row_weights = self.mode.combine(scope, returned)
        with scope.allocating():
            (combined,) = self.empty((matrix(x.dtype, num_tokens, x.shape[1]),))
        scope.start()
        with scope.running():
            total = torch.zeros(combined.shape, dtype=torch.float32, device=x.device)
            for addend in (
                *(each for each in (call.bias_0, call.bias_1) if each is not None),
                *rows.view(num_tokens, num_topk, x.shape[1]).unbind(dim=1),
            ):
                total += addend
            combined.copy_(total)
        if row_weights is not None:
            row_weights = row_weights.view(num_tokens, num_topk)
        return (combined, row_weights), (sent, received, returned, rows, *_read(handle))

    # ---- barrier ---------------------------------------------------------------------------------

    def barrier(self, scope: AnyScope, *, num_sms: int) -> Record:
        """Meets all ranks on the stream of the scope: a dispatch of nothing; what was used."""
        with scope.allocating():
            carrier, choices = self.empty(
                (matrix(torch.uint8, 0, _CARRIER_BYTES), matrix(torch.int64, 0, 1))
            )
        counts = self.mode.layout(scope, Layout(choices, self.num_ranks))
        sent = Dispatch(carrier, None, None, None, Routing(*counts), 1, 1, num_sms)
        return sent, self.mode.dispatch(scope, sent)


def _read(handle: EPHandle) -> Record:
    """Tensors of a handle that a call reads, beside those of the mode's call."""
    return handle.recv_src_metadata, handle.psum_num_recv_tokens_per_expert, handle.topk_idx


def _source_of(columns: Tensor, num_rows: int) -> Tensor:
    """The choice (``row * K + k``) of each row by expert, -1 for padding: `Placement.source`."""
    flat = columns.reshape(-1).to(torch.int64)
    choice = torch.arange(flat.shape[0], dtype=torch.int32, device=columns.device)
    source = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=columns.device)
    return source.scatter_(0, torch.where(flat >= 0, flat, num_rows), choice)[:num_rows]


def _by_expert(received: Dispatched, source: Tensor, ends: Tensor, num_topk: int) -> Dispatched:
    """Rows, scales and weights (one a row) by expert, with zeros for padding."""
    rows, scales, idx, weights, *_ = received
    by_expert = expert_major.permute(rows, source, ends, num_topk=num_topk)
    if scales is not None:
        scales = _take(scales, source.div(num_topk, rounding_mode="floor"))
    if weights is not None:
        weights = _take(weights.view(-1), source)
    return Dispatched(by_expert, scales, idx, weights)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]`, and zero where the index is -1."""
    if not values.shape[0]:
        return values.new_zeros((*index.shape, *values.shape[1:]))
    taken = values.index_select(0, index.reshape(-1).clamp(min=0))
    is_none = (index < 0).view(-1, *(1 for _ in values.shape[1:]))
    return taken.masked_fill_(is_none, 0).view(*index.shape, *values.shape[1:])


def _column_major(scales: Tensor) -> TensorSpec:
    """Of scales whose columns lie one after the other, each padded to 16 bytes, as TMA reads."""
    num_rows, num_columns = scales.shape
    return (num_rows, num_columns), (1, align(num_rows, 4)), scales.dtype
