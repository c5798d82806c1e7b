"""The operations of one rank without a GPU: gather the inputs of all ranks, compute, keep my part.

Same arguments, results and order of summation as the GPU path. It is meant for tests, for CI and
for a machine without a GPU: every rank receives the inputs of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epjit import calls, env
from epjit.calls import (
    Combine,
    CombineSizes,
    Counts,
    Dispatch,
    ExpertCombine,
    ExpertDispatch,
    LowLatencyCombine,
    LowLatencyDispatch,
    Routing,
    Setup,
    Sums,
)
from epjit.handles import (
    Dispatched,
    ExpertDispatched,
    ExpertHandle,
    Handle,
    InternodeHandle,
    IntranodeHandle,
    LowLatencyDispatched,
    LowLatencyHandle,
    Placement,
    row_bound,
    rows_in,
)
from epjit.modes.normal import (
    combine_shape,
    dispatch_shape,
    expert_combine_shape,
    expert_dispatch_shape,
    no_room,
)
from epjit.reference import Normal, expert_major, internode, low_latency
from epjit.reference.intranode import RankInput, local_choices
from epjit.runtime.empty import empty_on
from epjit.runtime.fault import Overflow

if TYPE_CHECKING:
    from epjit.kernels.low_latency import LowLatencyCombineShape, LowLatencyDispatchShape
    from epjit.kernels.shapes import AnyShape
    from epjit.modes.chosen import ChosenKernels
    from epjit.runtime.group import Group
    from epjit.scope import AnyScope, Record


class CpuNormal:
    """Layout, dispatch and combine of one rank on CPU tensors, called as those of the GPU are.

    `dispatch`, `combine`, `warmup` and `reset` are collective: every rank of the group calls them
    in the same order.

    Args:
        setup: All that it is made from; with several NVLink domains, handles and sums are those
            between domains.
        chosen: The kernels that a GPU would run.

    Attributes:
        num_sms: Of the GPU that would run them.
        memory: For users alone.
        rdma_memory: Likewise.

    Raises:
        CommunicationError: From every collective method, when a peer does not arrive in time.
        ValueError: From every collective method, when ranks pass arguments that do not belong
            together; the text names the ranks and their values.
    """

    num_sms = 132  # an H200's

    def __init__(self, setup: Setup, chosen: ChosenKernels) -> None:
        self._group, self._chosen = setup.group, chosen
        self._domains = setup.topology.domains
        self._reference = Normal(self._domains)
        self._overflow: Overflow | None = None
        self.memory = CpuMemory(setup.settings.num_nvl_bytes)
        self.rdma_memory = CpuMemory(setup.settings.num_rdma_bytes)

    def raise_fault(self) -> None:
        """Raises once, as a GPU does in the call after, that more rows came than there is room for.

        Raises:
            CommunicationError: Names operation, rank, how many rows came, and how many fit.
        """
        if self._overflow is not None:
            overflow, self._overflow = self._overflow, None
            raise no_room(overflow)

    def reset(self) -> None:
        """Forgets what went wrong; collective."""
        self._overflow = None
        self._group.reset()

    def give_up(self) -> None:
        """Nothing: no wait is queued here."""

    def warmup(self, shapes: Iterable[AnyShape], **sizes: int) -> None:
        """Refuses what a GPU would refuse."""
        del sizes
        for shape in shapes:
            self._chosen.launch(shape)

    def layout(self, scope: AnyScope, call: calls.Layout) -> Counts:
        """Counts where the tokens of this rank go; not collective."""
        del scope
        return self._reference.layout(call.topk_idx, call.num_experts)

    @torch.no_grad()
    def dispatch(self, scope: AnyScope, call: Dispatch) -> Dispatched:
        """Sends rows along new counts or along a handle.

        Raises:
            ValueError: Also when the counts contradict `is_token_in_rank`.
        """
        del scope
        self._chosen.check(dispatch_shape(call), call.num_sms)
        x, scales, facts = _cast(call)
        _, _, topk_idx, topk_weights, routing, *_ = call
        if not isinstance(routing, Routing):
            payload = x, scales, topk_idx, topk_weights
            return self._cached_dispatch(facts, payload, routing)
        num_experts = routing.num_tokens_per_expert.shape[0]
        worlds = _exchange(
            self._group,
            "dispatch",
            {
                **facts,
                "num_experts": num_experts,
                "num_topk": None if topk_idx is None else topk_idx.shape[1],
                "topk_idx dtype": None if topk_idx is None else topk_idx.dtype,
            },
            (
                *(x, scales, topk_idx, topk_weights),
                *(routing.is_token_in_rank, routing.num_tokens_per_expert),
                torch.tensor(call.num_worst_tokens, device="cpu"),
            ),
        )
        # After the exchange: a rank that raises before it would leave its peers waiting.
        self._check_counts(routing)
        inputs = [RankInput(*tensors[:-1]) for tensors in worlds]
        rank = self._group.rank
        received = self._reference.dispatch(
            inputs,
            rank,
            num_experts=num_experts,
            expert_alignment=call.expert_alignment,
            num_worst_tokens=[int(tensors[-1]) for tensors in worlds],
        )
        self._check_rooms(inputs, received.handle)
        return received

    def _check_counts(self, routing: Routing) -> None:
        in_rank = routing.is_token_in_rank
        counts = {"num_tokens_per_rank": (routing.num_tokens_per_rank, in_rank)}
        if routing.num_tokens_per_rdma_rank is not None:
            in_domain = internode.in_domain(in_rank, self._domains)
            counts["num_tokens_per_rdma_rank"] = (routing.num_tokens_per_rdma_rank, in_domain)
        for name, (count, sent) in counts.items():
            if count.tolist() != sent.sum(dim=0).tolist():
                raise ValueError(
                    f"{name}={count.tolist()} contradicts is_token_in_rank, which says "
                    f"{sent.sum(dim=0).tolist()}; pass both from one get_dispatch_layout call"
                )

    def _check_rooms(self, inputs: list[RankInput], handle: Handle | None) -> None:
        """Remembers what more came than there was room for."""
        assert handle is not None
        if isinstance(handle, InternodeHandle):
            self._check_room(
                "tokens pass into the NVLink domain through",
                came=int(handle.recv_rdma_rank_prefix_sum[-1]),
                room=handle.num_passing,
            )
        came = sum(int(each.is_token_in_rank[:, self._group.rank].sum()) for each in inputs)
        self._check_room("rows come to", came=came, room=handle.num_rows)

    def _check_room(self, what: str, *, came: int, room: int) -> None:
        """Remembers what a kernel would report (`WaitTag` of sync.cuh)."""
        if came > room:
            self._overflow = Overflow("dispatch", what, self._group.rank, came=came, room=room)

    def _cached_dispatch(
        self, facts: dict[str, object], payload: tuple[Tensor | None, ...], handle: Handle
    ) -> Dispatched:
        """Sends another payload, cast already, along the routing of `handle`."""
        op, rank = "cached dispatch", self._group.rank
        _, scales, topk_idx, _ = payload
        facts |= {
            "num_topk": None if topk_idx is None else topk_idx.shape[1],
            **self._handle_facts(handle),
        }
        worlds = _exchange(self._group, op, facts, (*payload, *handle))
        handles = self._handles_of_one_dispatch(op, [tensors[4:] for tensors in worlds])
        xs, all_scales, choices, weights = ([each[i] for each in worlds] for i in range(4))
        rows, row_scales = self._reference.cached_dispatch(
            xs, None if scales is None else all_scales, handles, rank
        )
        if topk_idx is None:
            return Dispatched(rows, row_scales)
        idx, row_weights = self._reference.cached_dispatch(choices, weights, handles, rank)
        assert row_weights is not None
        num_local = handle.recv_expert_counts.shape[0]
        local_idx, local_weights = local_choices(idx, row_weights, rank, num_local)
        local_idx[int(handle.num_received(rank)) :] = -1
        return Dispatched(rows, row_scales, local_idx, local_weights)

    @torch.no_grad()
    def combine(self, scope: AnyScope, call: Combine) -> Sums:
        """Brings rows back to the ranks of their tokens and sums them."""
        del scope
        self._chosen.check(combine_shape(call), call.num_sms)
        x, topk_weights, bias_0, bias_1, handle, _, order = call
        facts = {
            **_payload_facts(x, None),
            "num_topk": None if topk_weights is None else topk_weights.shape[1],
            **self._handle_facts(handle),
        }
        worlds = _exchange(self._group, "combine", facts, (x, topk_weights, *handle))
        handles = self._handles_of_one_dispatch("combine", [tensors[2:] for tensors in worlds])
        xs = [tensors[0] for tensors in worlds]
        weights = None if topk_weights is None else [tensors[1] for tensors in worlds]
        rank, biases = self._group.rank, (bias_0, bias_1)
        return self._reference.combine(xs, handles, rank, weights, biases, order)

    @torch.no_grad()
    def expert_dispatch(
        self, scope: AnyScope, call: ExpertDispatch
    ) -> tuple[ExpertDispatched, Record]:
        """Sends a row for each choice, along new choices or along a handle."""
        del scope
        self._chosen.check(expert_dispatch_shape(call), call.num_sms)
        x, scales, facts = _cast(call)
        _, _, topk_idx, topk_weights, handle, num_experts, *_ = call
        facts["topk_weights"] = "some" if topk_weights is not None else "none"
        if handle is not None:
            cached = self._cached_expert_dispatch(
                facts,
                (x, scales, topk_weights),
                handle,
                column_major_scales=call.column_major_scales,
            )
            return cached, ()
        assert topk_idx is not None
        facts |= {
            "num_experts": num_experts,
            "num_topk": topk_idx.shape[1],
            "topk_idx dtype": topk_idx.dtype,
        }
        room = torch.tensor(call.num_worst_tokens, device="cpu")
        worlds = _exchange(
            self._group, "expert_dispatch", facts, (x, scales, topk_idx, topk_weights, room)
        )
        inputs = []
        for each_x, each_scales, idx, weights, _ in worlds:
            _, _, per_expert, in_rank = self._reference.layout(idx, num_experts)
            some = torch.zeros(idx.shape, device="cpu") if weights is None else weights
            inputs.append(RankInput(each_x, each_scales, idx, some, in_rank, per_expert))
        rank, num_rows = self._group.rank, call.num_expert_rows
        if call.num_worst_tokens and not num_rows:
            local = num_experts // self._group.size
            sizes = call.num_worst_tokens, topk_idx.shape[1], local, call.expert_alignment
            num_rows = row_bound(*sizes)
        dispatched = expert_major.dispatch(
            self._reference,
            inputs,
            rank,
            num_experts=num_experts,
            expert_alignment=call.expert_alignment,
            num_worst_tokens=[int(tensors[-1]) for tensors in worlds],
            num_rows=num_rows,
            column_major_scales=call.column_major_scales,
        )
        self._check_rooms(inputs, dispatched.handle.routing)
        if topk_weights is None:
            dispatched = dispatched._replace(weights=None)
        return dispatched, ()

    def _cached_expert_dispatch(
        self,
        facts: dict[str, object],
        payload: tuple[Tensor, Tensor | None, Tensor | None],
        handle: ExpertHandle,
        *,
        column_major_scales: bool,
    ) -> ExpertDispatched:
        """Sends another payload, cast already, along a handle."""
        worlds, handles = self._exchange_along("cached expert_dispatch", facts, payload, handle)
        dispatched = expert_major.cached_dispatch(
            self._reference,
            worlds,
            handles,
            self._group.rank,
            column_major_scales=column_major_scales,
        )
        return dispatched._replace(handle=handle)

    @torch.no_grad()
    def expert_combine(self, scope: AnyScope, call: ExpertCombine) -> tuple[Sums, Record]:
        """Brings rows by expert back and sums them."""
        del scope
        self._chosen.check(expert_combine_shape(call), call.num_sms)
        rows, row_weights, topk_weights, bias_0, bias_1, handle, _, order = call
        facts = {
            **_payload_facts(rows, None),
            "row_weights": "some" if row_weights is not None else "none",
            "topk_weights": "some" if topk_weights is not None else "none",
        }
        given = (rows, row_weights, topk_weights)
        worlds, handles = self._exchange_along("expert_combine", facts, given, handle)
        sums = expert_major.combine(
            self._reference,
            [tensors[0] for tensors in worlds],
            handles,
            self._group.rank,
            row_weights=None if row_weights is None else [tensors[1] for tensors in worlds],
            topk_weights=None if topk_weights is None else [tensors[2] for tensors in worlds],
            bias=(bias_0, bias_1),
            order=order,
        )
        return sums, ()

    def _exchange_along(
        self,
        op: str,
        facts: dict[str, object],
        given: tuple[Tensor | None, ...],
        handle: ExpertHandle,
    ) -> tuple[list[tuple[Any, ...]], list[ExpertHandle]]:
        """The tensors of every rank, and its handle."""
        first, last = len(given), len(given) + len(handle.routing)
        facts |= {
            **self._handle_facts(handle.routing),
            "the handle's top-k": handle.placement.row_of.shape[1],
        }
        tensors = (*given, *handle.routing, *handle.placement)
        worlds = _exchange(self._group, op, facts, tensors)
        routings = self._handles_of_one_dispatch(op, [each[first:last] for each in worlds])
        return [each[:first] for each in worlds], [
            ExpertHandle(routing, Placement(*each[last:]))
            for routing, each in zip(routings, worlds, strict=True)
        ]

    def _handle_facts(self, handle: Handle) -> dict[str, object]:
        """Facts that the handles of one dispatch have in common on all ranks."""
        if isinstance(handle, InternodeHandle):
            return {}  # each has only what concerns its rank
        return {
            "the handle's rank_prefix_matrix": handle.rank_prefix_matrix.tolist(),
            "the handle's source_tokens": handle.source_tokens.tolist(),
        }

    def _handles_of_one_dispatch(self, op: str, worlds: list[tuple[Any, ...]]) -> list[Any]:
        """The handles of all ranks, once they are known to belong together."""
        if not self._reference.spans_domains:
            return [IntranodeHandle(*tensors) for tensors in worlds]
        handles = [InternodeHandle(*tensors) for tensors in worlds]
        # [source, receiver]
        sent = torch.stack([handle.is_token_in_rank.sum(dim=0) for handle in handles])
        for receiver, handle in enumerate(handles):
            ends = handle.recv_gbl_rank_prefix_sum
            received = ends.diff(prepend=ends.new_zeros(1))
            # The last ones may have been left out for want of room.
            fit = sent[:, receiver].cumsum(dim=0).clamp(max=handle.num_rows)
            for source in torch.nonzero(ends != fit).flatten().tolist():
                raise ValueError(
                    f"{op}: by the handle of rank {source} it sends {int(sent[source, receiver])} "
                    f"rows to rank {receiver}, by the handle of rank {receiver} "
                    f"{int(received[source])}; all ranks must pass their handles of one dispatch"
                )
        return handles


class CpuMemory:
    """Bytes of one rank that users may look at; zeros that take no room until they are written to.

    Args:
        num_bytes: How many.
    """

    def __init__(self, num_bytes: int) -> None:
        # torch.zeros would touch every page, and a size hint is about a gigabyte. One byte more,
        # since torch views no empty NumPy array as another dtype.
        self._bytes = torch.from_numpy(np.zeros(num_bytes + 1, dtype=np.uint8))[:num_bytes]

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """All of it, in one dimension."""
        return self._bytes.view(dtype)


class CpuLowLatency:
    """Low-latency operations of one rank, on CPU tensors, called as those of the GPU are.

    All methods but `send_buffer` are collective. A split operation takes its inputs at the call
    and writes its outputs when the returned function is called.

    Args:
        setup: All that it is made from.
        chosen: The kernels that a GPU would run.

    Attributes:
        memory: For users alone; its second half is the send buffer.
        mask: int32 `[R]`; 1 = masked. Rows of a masked rank are not used; the rank still takes
            part, since nothing here runs out of time.

    Raises:
        CommunicationError: From every collective method, when a peer does not arrive in time.
        ValueError: From every collective method, when ranks pass arguments that do not belong
            together; the text names the ranks and their values.
    """

    def __init__(self, setup: Setup, chosen: ChosenKernels) -> None:
        self._settings, self._group, self._topology, *_ = setup
        self._chosen = chosen
        self.memory = CpuMemory(setup.settings.num_rdma_bytes)
        self._half = self.memory.tensor(torch.uint8)[setup.settings.num_rdma_bytes // 2 :]
        self.mask = torch.zeros(setup.group.size, dtype=torch.int32, device="cpu")

    @torch.no_grad()
    def dispatch(
        self, scope: AnyScope, call: LowLatencyDispatch
    ) -> tuple[LowLatencyDispatched, Callable[[], None] | None]:
        """Sends each choice of each token to its expert; what receives, or None, comes along.

        Nothing is added to the sums of cycles: nobody counts them here.
        """
        x, topk_idx, topk_weights, global_scale, recv_stats, _ = call.given
        sizes = call.sizes
        specs = LowLatencyDispatched.specs(sizes, self._group.size)
        out = LowLatencyDispatched.allocate(specs, empty_on(x.device))
        scope.start()
        if call.split:
            x, topk_idx = x.clone(), topk_idx.clone()
            topk_weights = None if topk_weights is None else topk_weights.clone()
        sent = None if self._topology.spans_domains else topk_weights
        worlds = _exchange(
            self._group,
            "low_latency_dispatch",
            {
                "hidden": sizes.hidden,
                "num_max_dispatch_tokens_per_rank": sizes.max_tokens,
                "num_experts": sizes.num_experts,
                "num_topk": sizes.num_topk,
                "topk_idx dtype": topk_idx.dtype,
                "format": sizes.row_format.name,
                "global_scale": None if global_scale is None else float(global_scale),
                "topk_weights": "none" if topk_weights is None else "some",
            },
            (x, topk_idx, global_scale, sent),
        )

        @torch.inference_mode()  # outputs of a call made there can be written to there alone
        def receive() -> None:
            low_latency.dispatch(
                [low_latency.RankInput(*tensors) for tensors in worlds],
                self._group.rank,
                max_tokens=sizes.max_tokens,
                num_experts=sizes.num_experts,
                row_format=sizes.row_format,
                masked=self._masked(),
                out=out,
            )
            if recv_stats is not None:
                recv_stats.add_(out.recv_count)

        if call.split:
            return out, receive
        receive()
        return out, None

    @torch.no_grad()
    def combine(
        self, scope: AnyScope, call: LowLatencyCombine
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """Brings rows back and sums them with weights; what receives, or None, comes along."""
        x, topk_idx, topk_weights, out, _ = call.given
        sizes = call.sizes
        reduced = self._chosen.reduces(sizes)
        combined = out
        if combined is None:
            shape = (sizes.num_tokens, sizes.hidden)
            combined = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
        scope.start()
        if sizes.zero_copy:
            x = self.send_buffer(sizes)
        worlds = _exchange(
            self._group,
            "low_latency_combine",
            {
                "hidden": sizes.hidden,
                "num_max_dispatch_tokens_per_rank": sizes.max_tokens,
                "num_experts": sizes.num_experts,
                "num_topk": sizes.num_topk,
                "use_logfmt": sizes.use_logfmt,
                "topk_weights of the dispatch": "some" if sizes.weights_sent else "none",
                env.low_latency_combine_variant.name: env.low_latency_combine_variant(),
            },
            tuple(low_latency.collect(x, call.src_info, self._group.size)),
        )

        @torch.inference_mode()  # outputs of a call made there can be written to there alone
        def receive() -> None:
            combined.copy_(
                low_latency.combine(
                    [low_latency.Returned(*tensors) for tensors in worlds],
                    self._group.rank,
                    topk_idx,
                    topk_weights,
                    num_experts=sizes.num_experts,
                    use_logfmt=sizes.use_logfmt,
                    reduced=reduced,
                    masked=self._masked(),
                )
            )

        if call.split:
            return combined, receive
        receive()
        return combined, None

    def send_buffer(self, sizes: CombineSizes | LowLatencyHandle) -> Tensor:
        """Memory that `combine(zero_copy=True)` reads rows from, see `rows_in`."""
        return rows_in(self._half, sizes, self._group.size)

    def warmup(
        self, shapes: Iterable[LowLatencyDispatchShape | LowLatencyCombineShape], **sizes: int
    ) -> None:
        """Nothing: no kernel runs here."""

    def clean(self, stream: int) -> None:
        """Meets the peers: the memory has no words here that a user could have overwritten."""
        del stream
        _exchange(self._group, "clean_low_latency_buffer", {}, ())

    def raise_fault(self) -> None:
        """Nothing: what goes wrong here is raised where it does."""

    def reset(self) -> None:
        """Takes all masks away; no operation is under way here."""
        self.mask.zero_()

    def give_up(self) -> None:
        """Nothing: no wait is queued here."""

    def _masked(self) -> Tensor | None:
        return self.mask if self._settings.enable_shrink else None


def _exchange(
    group: Group, op: str, facts: Mapping[str, object], tensors: tuple[Tensor | None, ...]
) -> list[tuple[Any, ...]]:
    """Every rank's `tensors`, once all ranks are known to agree on `op` and on `facts`."""
    messages = group.allgather((op, dict(facts), [_pack(each) for each in tensors]), op=op)
    _agree(op, "operation", [message[0] for message in messages])
    for name in facts:
        _agree(op, name, [message[1][name] for message in messages])
    worlds = [tuple(_unpack(each) for each in message[2]) for message in messages]
    worlds[group.rank] = tensors  # the handle keeps the caller's own tensor
    return worlds


def _pack(tensor: Tensor | None) -> tuple[torch.dtype, torch.Size, NDArray[np.uint8]] | None:
    """A copy of the elements as bytes.

    A copy, since ranks that are threads get the very object and the caller may write to its tensor
    as soon as its own call is back. Bytes, since torch 2.13 cannot unpickle an FP8 tensor, and a
    pickled view would drag its whole storage along.
    """
    if tensor is None:
        return None
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy()


def _unpack(packed: tuple[torch.dtype, torch.Size, NDArray[np.uint8]] | None) -> Tensor | None:
    """The tensor of `_pack`."""
    if packed is None:
        return None
    dtype, shape, elements = packed
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    # A copy into it: an empty NumPy array has stride 0, which torch does not view as another dtype.
    tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(elements))
    return tensor


def _cast(
    call: Dispatch | ExpertDispatch,
) -> tuple[Tensor, Tensor | None, dict[str, object]]:
    """Rows as they travel, their scales, and the facts that those of all ranks have in common."""
    x, scales, row_format, global_scale = call.x, call.scales, call.row_format, call.global_scale
    if row_format is not None:
        x, scales = low_latency.encode(x, row_format, global_scale)
    return (
        x,
        scales,
        {
            "cast": None if row_format is None else row_format.name,
            "global_scale": None if global_scale is None else float(global_scale),
            **_payload_facts(x, scales),
        },
    )


def _payload_facts(x: Tensor, scales: Tensor | None) -> dict[str, object]:
    """Facts that the payloads of all ranks have in common."""
    return {
        "hidden": x.shape[1],
        "dtype": x.dtype,
        "number of scales": None if scales is None else scales.shape[1],
        "dtype of scales": None if scales is None else scales.dtype,
    }


def _agree(op: str, name: str, values: list[object]) -> None:
    """Raise unless all ranks have the same value."""
    if any(value != values[0] for value in values):
        each = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
        raise ValueError(
            f"{op}: the ranks disagree on {name}: {each}; "
            "all ranks of a group must make the same call with matching arguments"
        )
