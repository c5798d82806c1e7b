"""DeepEP 2's dispatch and combine: the calls of a normal mode, and what is said about their rows.

Whatever a handle says (where tokens came from, where they lie, how many) one kernel works out
behind the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from epjit.calls import (
    Combine,
    Counts,
    Describe,
    Dispatch,
    ElasticCombine,
    ElasticDispatch,
    ExpertCombine,
    ExpertDispatch,
    Layout,
    Order,
    Routing,
    Sums,
)
from epjit.handles import (
    Dispatched,
    ElasticDispatched,
    EPHandle,
    ExpertHandle,
    Handle,
    Placement,
    Routed,
    routing_of,
    row_bound,
)
from epjit.kernels.elastic import CARRIER_BYTES, DescribeConfig, SumConfig
from epjit.modes import expert_major
from epjit.modes.normal import pointer
from epjit.reference import elastic as reference
from epjit.reference.expert_major import source_of
from epjit.runtime.device import num_sms
from epjit.runtime.empty import Empty, by_columns, matrix, vector

if TYPE_CHECKING:
    from epjit.modes.make import AnyNormal
    from epjit.scope import AnyScope, Record

_Sent: TypeAlias = "tuple[Dispatched, Placement | None, Record]"
"""Results of the mode, the placement of rows by expert, and tensors that were used."""


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

    # ---- how tokens travel -----------------------------------------------------------------------

    def route(self, scope: AnyScope, handle: EPHandle | None, num_sms: int) -> Record:
        """Works out how the tokens of a handle travel, if nothing says so; to come before its call.

        Collective then: its choices are counted and exchanged, as in its dispatch.

        Returns:
            What was made for the handle, and what was used for it.
        """
        if handle is None or routing_of(handle) is not None:
            return ()
        room, choices = handle.num_recv_tokens, handle.topk_idx
        routing, used = self._route(scope, choices, handle.num_experts, room, num_sms)
        placed = None
        if handle.do_expand:
            columns, ends = handle.recv_src_metadata[:, 2:], handle.psum_num_recv_tokens_per_expert
            with scope.allocating():  # for these live as long as the handle
                source = source_of(columns, handle.num_expanded_tokens)
                ends = ends + -ends % handle.expert_alignment
            counts = handle.num_unaligned_recv_tokens_per_expert
            placed = Placement(columns, source, ends, counts)
        handle.routing = Routed(handle.dst_buffer_slot_idx, routing, placed)
        return handle.routing, used

    def _route(
        self, scope: AnyScope, choices: torch.Tensor, num_experts: int, room: int, num_sms: int
    ) -> tuple[Handle, Record]:
        """A dispatch for its handle alone: rows that carry nothing, and room for so many."""
        counts: Counts = self.mode.layout(scope, Layout(choices, num_experts))
        with scope.allocating():
            (carrier,) = self.empty((matrix(torch.uint8, choices.shape[0], CARRIER_BYTES),))
        sent = Dispatch(carrier, None, None, None, Routing(*counts), 1, max(room, 1), num_sms)
        received = self.mode.dispatch(scope, sent)
        assert received.handle is not None
        return received.handle.cut(room), (sent, received)

    # ---- dispatch --------------------------------------------------------------------------------

    def dispatch(self, scope: AnyScope, call: ElasticDispatch) -> tuple[ElasticDispatched, Record]:
        """Sends rows along new choices, or along those of a handle: to where its metadata says.

        Returns:
            The results, and what was used for them.
        """
        received, placed, used = (self._by_expert if call.do_expand else self._by_source)(
            scope, call
        )
        handle = call.handle
        if handle is not None:
            used = *used, *_read(handle)
        else:
            handle, described = self._handle(scope, call, received, placed)
            used = *used, described
        rows, scales, idx, weights, *_ = received
        if scales is not None and call.column_major_scales and not call.do_expand:
            with scope.allocating():
                (by_column,) = self.empty((by_columns(scales.dtype, *scales.shape),))
            scope.start()
            with scope.running():
                scales = by_column.copy_(scales)
        if call.topk_weights is None:
            weights = None
        return ElasticDispatched(rows, scales, idx, weights, handle), used

    def _worst(self, call: ElasticDispatch) -> tuple[int, int]:
        """Tokens, and rows by expert, that there must be room for; 0 = as many as there are."""
        if call.waits or call.handle is not None:
            return 0, 0
        tokens, local = self.num_ranks * call.max_tokens, call.num_experts // self.num_ranks
        choices = min(call.topk_idx.shape[1], local)
        return tokens, row_bound(tokens, choices, local, call.expert_alignment)

    def _by_expert(self, scope: AnyScope, call: ElasticDispatch) -> _Sent:
        """A row a choice."""
        handle = None if call.handle is None else _expert_handle(call.handle)
        sent = ExpertDispatch(
            call.x,
            call.scales,
            call.topk_idx if handle is None else None,
            call.topk_weights,
            handle,
            call.num_experts,
            call.expert_alignment,
            *self._worst(call),
            zero_padding=call.zero_padding,
            column_major_scales=call.column_major_scales,
            row_format=None,
            global_scale=None,
            num_sms=call.num_sms,
        )
        whole, used = self.mode.expert_dispatch(scope, sent)
        rows, scales, weights, (routing, placed), per_expert = whole
        received = Dispatched(rows, scales, None, weights, per_expert, routing)
        return received, placed, (sent, whole, used)

    def _by_source(self, scope: AnyScope, call: ElasticDispatch) -> _Sent:
        """A row a rank."""
        routing: Routing | Handle
        if call.handle is None:
            routing = Routing(*self.mode.layout(scope, Layout(call.topk_idx, call.num_experts)))
        else:
            routing = _routed(call.handle).handle
        weights = call.topk_weights
        if weights is None:  # choices and weights travel together: any do
            with scope.allocating():
                (weights,) = self.empty((matrix(torch.float32, *call.topk_idx.shape),))
        sent = Dispatch(
            *(call.x, call.scales, call.topk_idx, weights, routing),
            *(call.expert_alignment, self._worst(call)[0], call.num_sms),
        )
        received = self.mode.dispatch(scope, sent)
        return received, None, (sent, received)

    def _handle(
        self,
        scope: AnyScope,
        call: ElasticDispatch,
        received: Dispatched,
        placed: Placement | None,
    ) -> tuple[EPHandle, Describe]:
        """The handle of a dispatch, filled by a kernel."""
        routing, per_expert = received.handle, received.num_recv_tokens_per_expert_list
        assert routing is not None
        assert per_expert is not None
        num_topk, num_local = call.topk_idx.shape[1], call.num_experts // self.num_ranks
        with scope.allocating():
            rank_ends, expert_ends, metadata, slots, choices = self.empty(
                (
                    vector(torch.int32, self.num_ranks),
                    vector(torch.int32, num_local),
                    matrix(torch.int32, routing.num_rows, num_topk + 2),
                    matrix(torch.int32, *call.topk_idx.shape),
                    matrix(call.topk_idx.dtype, *call.topk_idx.shape)
                    if call.copies_choices
                    else None,
                )
            )
        scope.start()
        described = Describe(
            call.topk_idx,
            routing.send_head,
            routing.source_ends(self.rank),
            routing.recv_tokens,
            received.recv_topk_idx,
            None if placed is None else placed.row_of,
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
            num_recv_tokens=routing.num_rows,
            num_expanded_tokens=0 if placed is None else received.recv_x.shape[0],
            routing=Routed(slots, routing, placed),
        )
        return handle, described

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
        if handle.do_expand and not self.multiple_reduction:
            return self._combine_each_row(scope, call, handle)
        biases, order = (call.bias_0, call.bias_1), Order(handle.topk_idx, handle.num_experts)
        if handle.do_expand:
            own = _expert_handle(handle)
            returned = ExpertCombine(x, None, weights, *biases, own, call.num_sms, order)
            sums, used = self.mode.expert_combine(scope, returned)
            return sums, (returned, used, *_read(handle))
        columns = handle.recv_src_metadata[:, 2:]
        if weights is not None:
            scope.start()
            with scope.running():
                rows = min(weights.shape[0], columns.shape[0])
                weights = weights[:rows].masked_fill(columns[:rows] < 0, 0.0)
        routing = _routed(handle).handle
        routing = routing.cut(min(x.shape[0], routing.num_rows))
        sent = Combine(x[: routing.num_rows], weights, *biases, routing, call.num_sms, order)
        return self.mode.combine(scope, sent), (sent, *_read(handle))

    def _combine_each_row(
        self, scope: AnyScope, call: ElasticCombine, handle: EPHandle
    ) -> tuple[Sums, Record]:
        """As if each choice were a token of its own: its row comes back, and is added here."""
        (num_tokens, num_topk), num_experts = handle.topk_idx.shape, handle.num_experts
        choices = handle.topk_idx.view(-1, 1)
        room = max(handle.num_expanded_tokens, 1)
        routing, sent = self._route(scope, choices, num_experts, room, call.num_sms)
        placed = _routed(handle).placement
        assert placed is not None
        with scope.running():
            # Rows of the metadata are by source rank and token, and columns by k: so are these.
            columns = handle.recv_src_metadata[:, 2:].reshape(-1)
            is_here = columns >= 0
            place = torch.where(is_here, is_here.cumsum(dim=0) - 1, room)
            row_of = columns.new_full((room + 1,), -1).scatter_(0, place, columns)[:room, None]
        own = ExpertHandle(routing, placed._replace(row_of=row_of))
        returned = ExpertCombine(call.x, None, call.topk_weights, None, None, own, call.num_sms)
        (rows, weights), used = self.mode.expert_combine(scope, returned)
        with scope.allocating():
            (combined,) = self.empty((matrix(rows.dtype, num_tokens, rows.shape[1]),))
        scope.start()
        each = rows.view(num_tokens, num_topk, rows.shape[1])
        self._add_choices(scope, each, (call.bias_0, call.bias_1), combined)
        if weights is not None:
            weights = weights.view(num_tokens, num_topk)
        return (combined, weights), (sent, returned, used, rows, *_read(handle))

    def _add_choices(
        self,
        scope: AnyScope,
        rows: torch.Tensor,
        biases: tuple[torch.Tensor | None, torch.Tensor | None],
        out: torch.Tensor,
    ) -> None:
        """The sums of `reference.add_choices`."""
        device, (num_tokens, num_topk, hidden) = rows.device, rows.shape
        if device.type != "cuda":
            reference.add_choices(rows, biases, out)
            return
        if num_tokens == 0:
            return
        config = SumConfig(rows.element_size() * hidden, num_topk, rows.dtype == torch.float16)
        values = {
            "rows": rows.data_ptr(),
            "bias_0": pointer(biases[0]),
            "bias_1": pointer(biases[1]),
            "out": out.data_ptr(),
            "num_tokens": num_tokens,
        }
        launch = expert_major._launch(config, device.index)
        launch.start(scope.stream, 4 * num_sms(device.index), values)

    # ---- barrier ---------------------------------------------------------------------------------

    def barrier(self, scope: AnyScope, *, num_sms: int) -> Record:
        """Meets all ranks on the stream of the scope: a dispatch of nothing; what was used."""
        with scope.allocating():
            (choices,) = self.empty((matrix(torch.int64, 0, 1),))
        return self._route(scope, choices, self.num_ranks, 0, num_sms)


def _read(handle: EPHandle) -> Record:
    """Tensors of a handle that a call reads, beside those of the mode's call."""
    return handle.recv_src_metadata, handle.psum_num_recv_tokens_per_expert, handle.topk_idx


def _expert_handle(handle: EPHandle) -> ExpertHandle:
    """The same for the mode's calls on rows by expert."""
    _, routing, placed = _routed(handle)
    assert placed is not None
    columns = handle.recv_src_metadata[:, 2:]
    return ExpertHandle(routing.cut(columns.shape[0]), placed._replace(row_of=columns))


def _routed(handle: EPHandle) -> Routed:
    """How its tokens travel, behind `Elastic.route`."""
    routed = handle.routing
    assert routed is not None
    return routed
