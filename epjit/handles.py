"""Handles, and the results that hold them: names, shapes and dtypes of their tensors.

A handle is what a dispatch leaves for its combine, and for a cached dispatch: the plain tuple that
DeepEP V1 returns, with names. Lists and tuples of a caller become one in the checks.

Words: `R` ranks in `D` NVLink domains of `L` ranks each, `T` tokens of this rank, `K` choices a
token, `H` elements a row, `E` experts, `n` rows received, `N` = `num_worst_tokens`; in low-latency
calls `M`, the most tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from epjit.calls import CombineSizes, DispatchSizes
from epjit.runtime.empty import Empty, TensorSpec, matrix, part, vector
from epjit.sizes import align


class IntranodeHandle(NamedTuple):
    """Six tensors of one rank, for a group in one NVLink domain.

    Attributes:
        rank_prefix_matrix: int32 `[R, R]`: entry `[i, j]` = rows that ranks `0..i` send to rank
            `j`, at most as many as it has room for.
        source_tokens: int32 `[R]`: `T` of each rank.
        recv_expert_counts: int32 `[E // R]`: selections of each local expert, not aligned.
        recv_src_idx: int32 `[n or N]`: source token of each received row.
        is_token_in_rank: bool `[T, R]`: the caller's tensor.
        send_head: int32 `[T, R]`: place of the row in this source's segment at that rank, or -1. A
            place behind the end of the segment is a row that the rank has no room for.
    """

    rank_prefix_matrix: Tensor
    source_tokens: Tensor
    recv_expert_counts: Tensor
    recv_src_idx: Tensor
    is_token_in_rank: Tensor
    send_head: Tensor

    @property
    def num_ranks(self) -> int:
        """`R`."""
        return self.rank_prefix_matrix.shape[0]

    @property
    def num_domains(self) -> int:
        """`D`."""
        return 1

    @property
    def num_tokens(self) -> int:
        """`T`."""
        return self.send_head.shape[0]

    @property
    def num_rows(self) -> int:
        """`n or N`."""
        return self.recv_src_idx.shape[0]

    @property
    def recv_tokens(self) -> Tensor:
        """int32 `[n or N]`: source token of each received row."""
        return self.recv_src_idx

    def num_received(self, rank: int) -> Tensor:
        """`n`, int32 `[1]`, on the device; `rank` is the one that this handle is of."""
        return self.rank_prefix_matrix[-1, rank : rank + 1]

    def source_ends(self, rank: int) -> Tensor:
        """int32 `[R]`: where the rows of each source end; `rank` as in `num_received`."""
        return self.rank_prefix_matrix[:, rank]

    def cut(self, num_rows: int) -> IntranodeHandle:
        """The same for the first rows alone, among which must be all that arrived."""
        return self._replace(recv_src_idx=self.recv_src_idx[:num_rows])

    @staticmethod
    def specs(
        *, num_tokens: int, num_ranks: int, num_domains: int, experts_per_rank: int
    ) -> tuple[TensorSpec | None, ...]:
        """Of the tensors that notify fills; None for the others. Sizes may be symbolic."""
        del num_domains
        return (
            matrix(torch.int32, num_ranks, num_ranks),
            vector(torch.int32, num_ranks),
            vector(torch.int32, experts_per_rank),
            None,
            None,
            matrix(torch.int32, num_tokens, num_ranks),
        )

    @staticmethod
    def row_specs(num_rows: int) -> tuple[TensorSpec]:
        """Of `recv_src_idx`, which dispatch fills."""
        return (vector(torch.int32, num_rows),)


class InternodeHandle(NamedTuple):
    """Ten tensors of one rank, for a group of several NVLink domains.

    Attributes:
        is_token_in_rank: bool `[T, R]`: the caller's tensor.
        send_tokens: int32 `[D, T + 1]`: the token of index `i` in the channel to domain `n`;
            undefined beyond the length of the channel, which is the last column.
        channel_tokens: int32 `[D, L]`: length of the channel from `domains[n][j]` to this domain.
        send_head: int32 `[T, R]`: place of the row in this source's segment at that rank, or -1.
        recv_rdma_rank_prefix_sum: int32 `[D]`: tokens that pass through this rank, from the domains
            `0..n`: the inclusive prefix sum of `channel_tokens[:, own local]`.
        recv_expert_counts: int32 `[E // R]`: selections of each local expert, not aligned.
        recv_gbl_rank_prefix_sum: int32 `[R]`: rows here from the ranks `0..s`, at most as many as
            there is room for.
        recv_src_meta: uint8 `[n or N, 8]`: of each received row two int32 (little endian), its
            index in the channel of its source to this domain, and its source token.
        send_rdma_head: int32 `[T, D]`: index of the token in the channel to domain `n`, or -1.
        send_nvl_head: int32 `[m]`: of each token that passes through this rank (by domain it comes
            from, then by index in the channel), bit `l` = the rank with local index `l` of this
            domain gets it and has room for it, and from bit 8 on its place in its source's segment
            here (0 if it is not for this rank). `m` is the last of `recv_rdma_rank_prefix_sum`, or
            `L * N` with `num_worst_tokens`; tokens beyond are not combined.
    """

    is_token_in_rank: Tensor
    send_tokens: Tensor
    channel_tokens: Tensor
    send_head: Tensor
    recv_rdma_rank_prefix_sum: Tensor
    recv_expert_counts: Tensor
    recv_gbl_rank_prefix_sum: Tensor
    recv_src_meta: Tensor
    send_rdma_head: Tensor
    send_nvl_head: Tensor

    @property
    def num_ranks(self) -> int:
        """`R`."""
        return self.recv_gbl_rank_prefix_sum.shape[0]

    @property
    def num_domains(self) -> int:
        """`D`."""
        return self.send_rdma_head.shape[1]

    @property
    def num_tokens(self) -> int:
        """`T`."""
        return self.send_rdma_head.shape[0]

    @property
    def num_rows(self) -> int:
        """`n or N`."""
        return self.recv_src_meta.shape[0]

    @property
    def recv_tokens(self) -> Tensor:
        """int32 `[n or N]`: source token of each received row."""
        return self.recv_src_meta.view(torch.int32)[:, 1]

    @property
    def num_passing(self) -> int:
        """`m`."""
        return self.send_nvl_head.shape[0]

    def num_received(self, rank: int) -> Tensor:
        """`n`, int32 `[1]`, on the device; `rank` is the one that this handle is of."""
        del rank
        return self.recv_gbl_rank_prefix_sum[-1:]

    def source_ends(self, rank: int) -> Tensor:
        """int32 `[R]`: where the rows of each source end; `rank` as in `num_received`."""
        del rank
        return self.recv_gbl_rank_prefix_sum

    def cut(self, num_rows: int) -> InternodeHandle:
        """The same for the first rows alone, among which must be all that arrived."""
        return self._replace(recv_src_meta=self.recv_src_meta[:num_rows])

    @staticmethod
    def specs(
        *, num_tokens: int, num_ranks: int, num_domains: int, experts_per_rank: int
    ) -> tuple[TensorSpec | None, ...]:
        """Of the tensors that notify fills; None for the others. Sizes may be symbolic."""
        return (
            None,
            matrix(torch.int32, num_domains, num_tokens + 1),
            matrix(torch.int32, num_domains, num_ranks // num_domains),
            matrix(torch.int32, num_tokens, num_ranks),
            vector(torch.int32, num_domains),
            vector(torch.int32, experts_per_rank),
            vector(torch.int32, num_ranks),
            None,
            matrix(torch.int32, num_tokens, num_domains),
            None,
        )

    @staticmethod
    def row_specs(num_rows: int, num_passing: int) -> tuple[TensorSpec, TensorSpec]:
        """Of `recv_src_meta` and `send_nvl_head` (`m` entries), which dispatch fills."""
        return matrix(torch.uint8, num_rows, 8), vector(torch.int32, num_passing)


Handle: TypeAlias = IntranodeHandle | InternodeHandle
"""Of the normal mode, as a Buffer returns it."""
GivenHandle: TypeAlias = Sequence[Tensor]
"""Of the normal mode, as callers may pass it: also a list, or a tuple without names."""


def handle_type(num_domains: int) -> type[IntranodeHandle] | type[InternodeHandle]:
    """The type of a group's handles."""
    return IntranodeHandle if num_domains == 1 else InternodeHandle


class Dispatched(NamedTuple):
    """Results of a dispatch on one rank; rows `[n, N)` are undefined (indices -1).

    A cached one has the first two alone.

    Attributes:
        recv_x: `[n or N, H]`, dtype of `x`.
        recv_scales: `[n or N, S]` row-major, or None.
        recv_topk_idx: `[n or N, K]`, dtype of `topk_idx`: local expert or -1; or None.
        recv_topk_weights: `[n or N, K]` float32, 0.0 where the index is -1; or None.
        num_recv_tokens_per_expert_list: `E // R` counts, each rounded up to `expert_alignment`;
            empty with `num_worst_tokens`.
        handle: Of the routing.
    """

    recv_x: Tensor
    recv_scales: Tensor | None
    recv_topk_idx: Tensor | None = None
    recv_topk_weights: Tensor | None = None
    num_recv_tokens_per_expert_list: list[int] | None = None
    handle: Handle | None = None


class Placement(NamedTuple):
    """Rows of the selections in the order of the experts: `M` rows, `E` experts of this rank.

    Attributes:
        row_of: int32 `[n, K]`; row of each selection, -1 when it selects nothing or does not fit.
        source: int32 `[M]`; flat selection (`token * K + k`) of each row, -1 for padding.
        ends: int32 `[E]`; where each expert's rows end, padding included; at most `M`.
        counts: int32 `[E]`; selections of each expert, also those that do not fit.
    """

    row_of: Tensor
    source: Tensor
    ends: Tensor
    counts: Tensor

    @staticmethod
    def specs(
        *, num_tokens: int, num_topk: int, num_rows: int, num_experts: int
    ) -> tuple[TensorSpec, ...]:
        """Of its tensors, for `n`, `K`, `M` and `E`, which may be symbolic."""
        return (
            matrix(torch.int32, num_tokens, num_topk),
            vector(torch.int32, num_rows),
            vector(torch.int32, num_experts),
            vector(torch.int32, num_experts),
        )


def row_bound(num_tokens: int, num_topk: int, num_experts: int, alignment: int) -> int:
    """Rows that are always enough: every selection of every token here, and all paddings.

    Args:
        num_tokens: `n`; may be symbolic.
        num_topk: Selections of a token here: `K`, also more than there are experts when one may
            repeat.
        num_experts: `E` of this rank.
        alignment: Of each expert's rows.
    """
    rows = num_tokens * num_topk + num_experts * (alignment - 1)
    return (rows + alignment - 1) // alignment * alignment


class ExpertHandle(NamedTuple):
    """The handle of an expert dispatch, for its combine and for a cached one; all state is tensors.

    Attributes:
        routing: Of the tokens: the handle that a dispatch in the order of the sources has.
        placement: Of their choices. A cached dispatch and a combine go by `row_of` alone.
    """

    routing: Handle
    placement: Placement

    @property
    def num_rows(self) -> int:
        """`M`."""
        return self.placement.source.shape[0]


GivenExpertHandle: TypeAlias = Sequence[Any]
"""As callers may pass it: also lists, or tuples without names."""


class ExpertDispatched(NamedTuple):
    """Results of an expert dispatch on one rank: `M` rows, by expert, source rank, token, choice.

    A cached one lacks the last field.

    Attributes:
        rows: `[M, H]` as they were sent, or `[M, num_columns]` of the format that they were cast
            to. Padding is zeros if that was asked for, else undefined; so is what lies behind the
            last expert.
        scales: `[M, S]` or None, likewise; row by row, or column by column, each padded to 16
            bytes.
        weights: float32 `[M]`, 0 where no choice is; or None. Of choices whose token was left out
            for want of room, those of a cached one are undefined.
        handle: Of the routing.
        num_recv_tokens_per_expert_list: As of `Dispatched`.
    """

    rows: Tensor
    scales: Tensor | None
    weights: Tensor | None
    handle: ExpertHandle
    num_recv_tokens_per_expert_list: list[int] | None = None


# ---- DeepEP 2's interface ------------------------------------------------------------------------


class Routed(NamedTuple):
    """How the tokens of an `EPHandle` travel: what its tensors lack for a `Buffer`'s calls.

    Attributes:
        slots: The `dst_buffer_slot_idx` that it is of; with another one it is worked out anew.
        handle: Of the tokens, in the order of the sources.
        placement: Of rows by expert, or None. Calls take `row_of` from the metadata instead.
    """

    slots: Tensor
    handle: Handle
    placement: Placement | None


@dataclass(eq=False)
class EPHandle:
    """The handle of an `ElasticBuffer.dispatch`, for its combines, and for cached dispatches.

    A plain object whose fields may be read and set: the tensors are the state. Combine and cached
    dispatches read `recv_src_metadata` and `topk_idx` at each call, so that rows which were moved
    are found where the caller's metadata says. A handle may be made of its fields without
    `routing`, or get another `dst_buffer_slot_idx`, such as a copy of it; on all ranks alike, for
    its next call then routes its tokens anew, by an exchange of their choices. `M` is
    `num_max_tokens_per_rank`.

    Attributes:
        do_expand: Whether rows are by expert: what `combine` takes.
        num_experts: `E`.
        expert_alignment: Of each expert's rows and counts.
        num_max_tokens_per_rank: `M` of the dispatch.
        num_sms: Of the dispatch.
        topk_idx: `[T, K]`: what this rank chose.
        psum_num_recv_tokens_per_scaleup_rank: int32 `[R]`: rows from the ranks `0..s`, one a token.
        psum_num_recv_tokens_per_expert: int32 `[E // R]`: aligned counts of the experts `0..e`;
            by expert the end of the rows of `e`, without its padding.
        num_unaligned_recv_tokens_per_expert: int32 `[E // R]`: choices of each expert.
        num_recv_tokens_per_expert_list: Aligned counts; empty when the host did not wait.
        recv_src_metadata: int32 `[n or R * M, K + 2]`, a row for each received token: its number
            ``source rank * M + token``, ``source rank * K + k`` of its last choice here, and for
            each `k` the row by expert; not by expert, its local expert. -1 = not here.
        dst_buffer_slot_idx: int32 `[T, K]`: ``this rank * M`` + the token's place among those that
            this rank sends to the rank of the choice, at the last choice of that rank; else -1.
        num_recv_tokens: Rows, one a token, as allocated.
        num_expanded_tokens: Rows by expert, as allocated; 0 when they are not.
        routing: Opaque; may be left out.
        token_metadata_at_forward: DeepEP's, between its domains; None.
        channel_linked_list: Likewise.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_unaligned_recv_tokens_per_expert: Tensor
    num_recv_tokens_per_expert_list: list[int]
    recv_src_metadata: Tensor
    dst_buffer_slot_idx: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    routing: Routed | None = None
    token_metadata_at_forward: None = None
    channel_linked_list: None = None


def routing_of(handle: EPHandle) -> Routed | None:
    """How its tokens travel; None when nothing says so of the tensors that it has now."""
    routed = getattr(handle, "routing", None)
    if routed is None or routed.slots is not handle.dst_buffer_slot_idx:
        return None
    return routed


class ElasticDispatched(NamedTuple):
    """Results of `ElasticBuffer.dispatch`; rows behind those that arrived are undefined.

    Attributes:
        recv_x: `[rows, H]`, by source rank and token, or by expert.
        recv_scales: `[rows, S]`, or None.
        recv_topk_idx: `[rows, K]`: local expert or -1; None by expert.
        recv_topk_weights: float32 `[rows, K]`, 0.0 where the index is -1; by expert `[rows]`; None
            when no weights were given.
        handle: Of the routing.
    """

    recv_x: Tensor
    recv_scales: Tensor | None
    recv_topk_idx: Tensor | None
    recv_topk_weights: Tensor | None
    handle: EPHandle


# ---- low latency ---------------------------------------------------------------------------------


class LowLatencyHandle(NamedTuple):
    """The handle of a low-latency dispatch, for its combine.

    The tensors must be those that the dispatch made: behind `src_info`, in its storage, lie the
    `Routes` that the combine follows; their length says what was dispatched.

    Attributes:
        src_info: int32 `[E // R, R * M]`, as in `LowLatencyDispatched`.
        layout_range: int64 `[E // R, R]`, likewise.
        max_tokens: `M`.
        hidden: `H`.
        num_experts: `E`.
    """

    src_info: Tensor
    layout_range: Tensor
    max_tokens: int
    hidden: int
    num_experts: int


GivenLowLatencyHandle: TypeAlias = tuple[Tensor, Tensor, int, int, int]
"""As callers may pass it: also a tuple without names."""


def rows_in(memory: Tensor, sizes: CombineSizes | LowLatencyHandle, num_ranks: int) -> Tensor:
    """The first bytes of memory as a row for each row of a dispatch: bf16 `[E // R, R * M, H]`."""
    max_tokens, hidden, num_experts = sizes.max_tokens, sizes.hidden, sizes.num_experts
    rows = memory[: 2 * num_experts * max_tokens * hidden].view(torch.bfloat16)
    return rows.view(num_experts // num_ranks, num_ranks * max_tokens, hidden)


class LowLatencyDispatched(NamedTuple):
    """Results of a low-latency dispatch on one rank; rows behind `recv_count` are undefined.

    Attributes:
        recv_x: `[E // R, R * M, columns]`, see `RowFormat.specs`.
        recv_scales: `[E // R, R * M, S]`, or None.
        recv_count: int32 `[E // R]`, rows of each local expert.
        src_info: int32 `[E // R, R * M]`: token of each row on its source rank. Behind it, in the
            same storage, lie the `Routes` that combine follows.
        layout_range: int64 `[E // R, R]`: `begin << 32 | count` of the rows of each source rank.
    """

    recv_x: Tensor
    recv_scales: Tensor | None
    recv_count: Tensor
    src_info: Tensor
    layout_range: Tensor

    @staticmethod
    def specs(sizes: DispatchSizes, num_ranks: int) -> LowLatencySpecs:
        """Of its tensors.

        Before `src_info`, in the same memory, lies `recv_count`. Behind it and the `Routes` lie
        `2 (K + T)` words more, and one if weights go along, so that the length of them all says so
        to `dispatched_sizes`.
        """
        num_local_experts, num_rows = sizes.num_experts // num_ranks, num_ranks * sizes.max_tokens
        num_routes = num_ranks + 2 * num_rows * sizes.num_topk
        num_extra = 2 * (sizes.num_topk + sizes.num_tokens) + sizes.weights_sent
        num_counts = align(num_local_experts, 32)  # `src_info` begins a cache line
        new = (
            *sizes.row_format.specs(num_local_experts, num_rows, sizes.hidden),
            vector(torch.int32, num_counts + num_local_experts * num_rows + num_routes + num_extra),
            matrix(torch.int64, num_local_experts, num_ranks),
        )
        src_info = (num_local_experts, num_rows), (num_rows, 1), num_counts
        return LowLatencySpecs(new, ((num_local_experts,), (1,)), src_info)

    @classmethod
    def allocate(cls, specs: LowLatencySpecs, empty: Empty) -> LowLatencyDispatched:
        """New tensors, uninitialised, on any device."""
        recv_x, recv_scales, words, layout_range = empty(specs.new)
        recv_count, src_info = part(words, *specs.recv_count), part(words, *specs.src_info)
        return cls(recv_x, recv_scales, recv_count, src_info, layout_range)


class LowLatencySpecs(NamedTuple):
    """Specs of the tensors of a `LowLatencyDispatched`.

    Attributes:
        new: Of `recv_x`, its scales, the words that `recv_count`, `src_info` and the `Routes` lie
            in, and `layout_range`.
        recv_count: Shape and strides, in these words.
        src_info: Shape, strides and offset, in these words.
    """

    new: tuple[TensorSpec | None, ...]
    recv_count: tuple[tuple[int], tuple[int]]
    src_info: tuple[tuple[int, int], tuple[int, int], int]


class Routes(NamedTuple):
    """Rows that the selections of every rank have become on this one.

    Attributes:
        source_tokens: int32 `[R]`: tokens of each rank, 0 for a masked one.
        source_rows: int32 `[R, M, K]`: row of each selection, counted over all local experts; -1
            for what is not here. Undefined for tokens that a rank does not have.
        source_weights: float32 `[R, M, K]`: their weights, 0 if none were given, and between NVLink
            domains. Undefined for what is not here.
    """

    source_tokens: Tensor
    source_rows: Tensor
    source_weights: Tensor


class DispatchedSizes(NamedTuple):
    """Sizes of a low-latency dispatch, as its handle says them.

    Attributes:
        num_tokens: `T`.
        num_topk: `K`.
        weights_sent: Whether weights went along with the rows.
    """

    num_tokens: int
    num_topk: int
    weights_sent: bool


def dispatched_sizes(src_info: Tensor, num_ranks: int) -> DispatchedSizes:
    """The dispatch that `src_info` came from, by the size of what lies behind it.

    Raises:
        ValueError: It is a copy: nothing lies behind it.
    """
    num_rows = src_info.shape[1]
    num_words = int(src_info.untyped_storage().nbytes()) // 4 - int(src_info.storage_offset())
    # As LowLatencyDispatched.specs says: 2 K (R * M + 1) + 2 T, and one; T is at most M.
    num_topk, rest = divmod(num_words - src_info.numel() - num_ranks, 2 * (num_rows + 1))
    num_tokens, weights_sent = divmod(rest, 2)
    if num_topk < 1 or num_tokens * num_ranks > num_rows:
        raise ValueError(
            "handle[0] (src_info) is a copy, and lacks what low_latency_dispatch stored behind it; "
            "pass the handle as it was returned"
        )
    return DispatchedSizes(num_tokens, num_topk, bool(weights_sent))


def routes(src_info: Tensor, num_ranks: int) -> Routes:
    """The `Routes` behind `src_info`.

    Args:
        src_info: As `LowLatencyDispatched.allocate` made it.
        num_ranks: `R`.

    Raises:
        ValueError: It is a copy: nothing lies behind it.
    """
    num_rows, num_topk = src_info.shape[1], dispatched_sizes(src_info, num_ranks).num_topk
    first = src_info.storage_offset() + src_info.numel()
    shape = (num_ranks, num_rows // num_ranks, num_topk)
    strides = (num_rows // num_ranks * num_topk, num_topk, 1)
    rows, weights = first + num_ranks, first + num_ranks + num_rows * num_topk
    return Routes(
        src_info.as_strided((num_ranks,), (1,), first),
        src_info.as_strided(shape, strides, rows),
        src_info.as_strided(shape, strides, weights).view(torch.float32),
    )
