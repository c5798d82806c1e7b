"""With ``EPJIT_CHECK=1``: the values of a call's arguments, looked at before anything is launched.

The checks that are always made (`epjit.checks.match`) see dtypes, shapes and addresses. These read
the tensors, so the host waits for the stream: for debugging.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakMethod

import torch

from epjit import calls, env
from epjit.event import EventOverlap
from epjit.handles import (
    ExpertHandle,
    Handle,
    InternodeHandle,
    IntranodeHandle,
    dispatched_sizes,
    routes,
)
from epjit.reference import internode, intranode
from epjit.runtime.topology import Topology

_FROM_LAYOUT = "pass what get_dispatch_layout returned for this topk_idx"
_AS_RETURNED = "pass the handle as the dispatch returned it, and write to none of its tensors"


class ValueChecks:
    """Checks for one Buffer, made last; each raises ValueError: value, place and remedy.

    Where a CUDA graph is captured nothing can be looked at: they warn once, and check nothing.

    Args:
        topology: NVLink domains of the ranks.
        in_order: Makes the current stream follow the calls before; a method of the Buffer, which
            is not kept alive.
    """

    def __init__(
        self, topology: Topology, in_order: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._rank, self._topology = topology.rank, topology
        self._in_order = WeakMethod(in_order)
        self._num_ranks = topology.num_domains * topology.num_local
        self._has_warned = False

    def layout(self, call: calls.Layout, *, after: EventOverlap | None) -> None:
        """Choices."""
        for (idx,) in self._on_host(after, call.topk_idx):
            _check_choices(idx, call.num_experts)

    def dispatch(self, call: calls.Dispatch, *, after: EventOverlap | None) -> None:
        """Choices, weights, and a layout that fits them; or a handle. Cast rows are finite."""
        for (rows,) in self._on_host(after, call.x) if call.row_format is not None else ():
            _check_finite("x", rows)
        if not isinstance(call.routing, calls.Routing):
            self._check_handle(call.routing, self._on_host(after, *call.routing))
            return
        num_experts = call.routing.num_tokens_per_expert.shape[0]
        for idx, weights, *routing in self._on_host(
            after, call.topk_idx, call.topk_weights, *call.routing
        ):
            values = dict(zip(calls.Routing._fields, routing, strict=True))
            in_rank = values["is_token_in_rank"]
            source = "is_token_in_rank"
            expected = {"num_tokens_per_rank": in_rank.sum(dim=0)}
            if idx is not None:
                _check_choices(idx, num_experts)
                _check_finite("topk_weights", weights, idx >= 0)
                source = "topk_idx"
                per_rank, per_expert, by_choice = intranode.layout(
                    idx, num_experts, self._num_ranks
                )
                if bool((by_choice != in_rank).any()):
                    token, rank = torch.nonzero(by_choice != in_rank)[0].tolist()
                    raise ValueError(
                        f"is_token_in_rank[{token}, {rank}] is {bool(in_rank[token, rank])}, but "
                        f"topk_idx[{token}] is {idx[token].tolist()}, and a rank has "
                        f"{num_experts // self._num_ranks} experts; {_FROM_LAYOUT}"
                    )
                expected = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert}
            if self._topology.spans_domains:
                in_domain = internode.in_domain(in_rank, self._topology.domains)
                expected["num_tokens_per_rdma_rank"] = in_domain.sum(dim=0)
            for name, want in expected.items():
                if values[name].tolist() != want.tolist():
                    raise ValueError(
                        f"{name} is {values[name].tolist()}, but {source} says {want.tolist()}; "
                        f"{_FROM_LAYOUT}"
                    )

    def combine(self, call: calls.Combine, *, after: EventOverlap | None) -> None:
        """A handle of the normal mode."""
        self._check_handle(call.handle, self._on_host(after, *call.handle))

    def expert_dispatch(self, call: calls.ExpertDispatch, *, after: EventOverlap | None) -> None:
        """Choices and weights; or a handle. Rows that are cast are finite."""
        if call.handle is not None:
            self._check_expert_handle(call.handle, after)
        for rows, idx, weights in self._on_host(after, call.x, call.topk_idx, call.topk_weights):
            if idx is not None:
                _check_choices(idx, call.num_experts)
            if idx is not None and weights is not None:
                _check_finite("topk_weights", weights, idx >= 0)
            if call.row_format is not None:
                _check_finite("x", rows)

    def expert_combine(self, call: calls.ExpertCombine, *, after: EventOverlap | None) -> None:
        """A handle of rows by expert."""
        self._check_expert_handle(call.handle, after)

    def _check_expert_handle(self, handle: ExpertHandle, after: EventOverlap | None) -> None:
        routing, (row_of, source, _, _) = handle
        self._check_handle(routing, self._on_host(after, *routing))
        for rows, selections in self._on_host(after, row_of, source):
            _check_range("handle.placement.row_of", rows, -1, len(source) - 1)
            _check_range("handle.placement.source", selections, -1, row_of.numel() - 1)

    def low_latency_dispatch(self, call: calls.LowLatencyDispatch) -> None:
        """Rows, choices and weights."""
        for rows, idx, weights in self._on_host(None, *call.given[:3]):
            _check_choices(idx, call.sizes.num_experts)
            _check_finite("x", rows)
            if weights is not None:
                _check_finite("topk_weights", weights, idx >= 0)

    def low_latency_combine(self, call: calls.LowLatencyCombine) -> None:
        """Choices, weights, and the routes behind `src_info`."""
        _, topk_idx, topk_weights, *_ = call.given
        src_info = call.src_info
        num_rows = src_info.numel()
        num_tokens = dispatched_sizes(src_info, self._num_ranks).num_tokens
        places = routes(src_info, self._num_ranks)[:2]
        for idx, weights, counts, rows in self._on_host(None, topk_idx, topk_weights, *places):
            _check_choices(idx, call.sizes.num_experts)
            _check_finite("topk_weights", weights, idx >= 0)
            _check_range("tokens of each rank, in the handle", counts, 0, rows.shape[1])
            if int(counts[self._rank]) not in (0, num_tokens):  # 0: this rank is masked
                raise ValueError(
                    f"the handle says that this rank has dispatched {int(counts[self._rank])} "
                    f"tokens, but it was {num_tokens}; {_AS_RETURNED}"
                )
            for source, count in enumerate(counts.tolist()):
                what = f"rows for rank {source}, in the handle"
                _check_range(what, rows[source, :count], -2, num_rows - 1)

    def _on_host(
        self, after: EventOverlap | None, *tensors: torch.Tensor | None
    ) -> list[tuple[Any, ...]]:
        """Copies on the CPU, when what they wait for is done; none where a graph is captured."""
        is_on_gpu = any(tensor is not None and tensor.is_cuda for tensor in tensors)
        if is_on_gpu and torch.cuda.is_current_stream_capturing():
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"{env.check_values.name} is set, but what a CUDA graph captures has no values "
                    "to look at: such calls are not checked",
                    RuntimeWarning,
                    stacklevel=5,
                )
            return []
        in_order = self._in_order()
        assert in_order is not None
        with in_order(), torch.no_grad():
            if after is not None and after.event is not None:
                after.current_stream_wait()
            if is_on_gpu:
                # A copy to pageable memory that waits for kernels keeps out other threads' copies;
                # where these are ranks of the same process, all of them then time out.
                torch.cuda.current_stream().synchronize()
            return [tuple(None if each is None else each.detach().cpu() for each in tensors)]

    def _check_handle(self, handle: Handle, copies: list[tuple[Any, ...]]) -> None:
        """A handle of the normal mode, of which `copies` are on the CPU."""
        for tensors in copies:
            if isinstance(handle, IntranodeHandle):
                self._check_intranode(IntranodeHandle(*tensors))
            else:
                self._check_internode(InternodeHandle(*tensors))

    def _check_intranode(self, handle: IntranodeHandle) -> None:
        """Of one NVLink domain."""
        names, tokens = _names(handle), handle.source_tokens
        num_tokens = handle.is_token_in_rank.shape[0]
        _check_growing(names["rank_prefix_matrix"], handle.rank_prefix_matrix)
        _check_range(names["source_tokens"], tokens, 0, None)
        if int(tokens[self._rank]) != num_tokens:
            raise ValueError(
                f"{names['source_tokens']} is {tokens.tolist()}, but this rank ({self._rank}) has "
                f"{num_tokens} tokens by {names['is_token_in_rank']}; {_AS_RETURNED}"
            )
        _check_range(names["recv_expert_counts"], handle.recv_expert_counts, 0, None)
        ends = handle.rank_prefix_matrix[:, self._rank].tolist()
        _check_range(names["rank_prefix_matrix"], ends, 0, handle.num_rows)
        for source, begin, end in zip(range(len(ends)), [0, *ends], ends, strict=False):
            what = f"{names['recv_src_idx']}, rows of rank {source}"
            _check_range(what, handle.recv_src_idx[begin:end], 0, int(tokens[source]) - 1)
        _check_heads(names["send_head"], handle.send_head, handle.is_token_in_rank)

    def _check_internode(self, handle: InternodeHandle) -> None:
        """Of several."""
        names, in_rank = _names(handle), handle.is_token_in_rank
        num_tokens, lengths = in_rank.shape[0], handle.send_tokens[:, -1]
        _check_range(f"{names['send_tokens']}, lengths", lengths, 0, num_tokens)
        for domain, length in enumerate(lengths.tolist()):
            what = f"{names['send_tokens']}, to domain {domain}"
            _check_range(what, handle.send_tokens[domain, :length], 0, num_tokens - 1)
        _check_range(names["channel_tokens"], handle.channel_tokens, 0, None)
        _check_heads(names["send_head"], handle.send_head, in_rank)
        for name, sums, most in (
            ("recv_rdma_rank_prefix_sum", handle.recv_rdma_rank_prefix_sum, handle.num_passing),
            ("recv_gbl_rank_prefix_sum", handle.recv_gbl_rank_prefix_sum, handle.num_rows),
        ):
            _check_growing(names[name], sums)
            _check_range(names[name], sums, 0, most)
        _check_range(names["recv_expert_counts"], handle.recv_expert_counts, 0, None)
        num_received = int(handle.recv_gbl_rank_prefix_sum[-1])
        meta = handle.recv_src_meta[:num_received].contiguous().view(torch.int32)
        _check_range(names["recv_src_meta"], meta, 0, None)
        in_domain = internode.in_domain(in_rank, self._topology.domains)
        _check_heads(names["send_rdma_head"], handle.send_rdma_head, in_domain)


def _names(handle: Handle) -> dict[str, str]:
    """Names of the tensors of a handle, for errors."""
    return {name: f"handle[{index}] ({name})" for index, name in enumerate(handle._fields)}


def _check_choices(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Each an expert, or -1."""
    is_wrong = (topk_idx < -1) | (topk_idx >= num_experts)
    if bool(is_wrong.any()):
        token, choice = torch.nonzero(is_wrong)[0].tolist()
        raise ValueError(
            f"topk_idx[{token}, {choice}] is {int(topk_idx[token, choice])}, but with "
            f"num_experts={num_experts} a choice is an expert from 0 to {num_experts - 1}, or -1 "
            "for none; pass the number of experts of all ranks together"
        )


def _check_finite(name: str, values: torch.Tensor, used: torch.Tensor | None = None) -> None:
    """No NaN and no infinity, of those that are used."""
    is_wrong = ~values.isfinite()
    if used is not None:
        is_wrong &= used
    if bool(is_wrong.any()):
        token, column = torch.nonzero(is_wrong)[0].tolist()
        raise ValueError(
            f"{name}[{token}, {column}] is {float(values[token, column])}, but must be finite; "
            "look at what computed it"
        )


def _check_range(what: str, values: Any, least: int, most: int | None) -> None:
    """Entries of a handle, from `least` to `most` (None: no limit)."""
    values = torch.as_tensor(values, device="cpu")
    is_wrong = values < least
    if most is not None:
        is_wrong |= values > most
    if bool(is_wrong.any()):
        place = torch.nonzero(is_wrong)[0].tolist()
        limit = "more" if most is None else f"up to {most}"
        raise ValueError(
            f"{what}: entry {place} is {int(values[tuple(place)])}, but must be {least} or "
            f"{limit}; {_AS_RETURNED}"
        )


def _check_growing(what: str, sums: torch.Tensor) -> None:
    """Prefix sums, of which each is at least the one before."""
    _check_range(f"{what}, from one rank to the next", sums.diff(dim=0), 0, None)


def _check_heads(what: str, heads: torch.Tensor, is_sent: torch.Tensor) -> None:
    """The place of what is sent, -1 for what is not."""
    is_wrong = (heads >= 0) != is_sent
    if bool(is_wrong.any()):
        token, to = torch.nonzero(is_wrong)[0].tolist()
        raise ValueError(
            f"{what}: entry [{token}, {to}] is {int(heads[token, to])}, but token {token} "
            f"{'goes' if bool(is_sent[token, to]) else 'does not go'} there by is_token_in_rank; "
            f"{_AS_RETURNED}"
        )
