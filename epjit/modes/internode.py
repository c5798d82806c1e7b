"""Dispatch and combine between NVLink domains: the order of launches, and which array goes where.

Rows by expert are those of the sources with a second pass: kernels of this GPU alone, behind a
dispatch and before a combine.

A rank has two symmetric memories. The ranks of its domain load and store in the first (`_Arena`:
`num_nvl_bytes` of slots, then words and signals); all ranks reach the second through the transport
(`_Rings`: `num_rdma_bytes` of inboxes and stages, then what rail peers tell each other). Users may
look at and write to the bytes that they asked for between operations. The kernels' headers
(`cuda_src/internode/*`) say who writes what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from epjit.calls import (
    Combine,
    Dispatch,
    ExpertCombine,
    ExpertDispatch,
    Layout,
    Routing,
    Setup,
    Sums,
)
from epjit.config import MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS
from epjit.handles import (
    Dispatched,
    ExpertDispatched,
    ExpertHandle,
    InternodeHandle,
    Placement,
    row_bound,
)
from epjit.kernels.expert_major import CastConfig, passes_of
from epjit.kernels.internode import (
    MAX_WORDS,
    InternodeCombineConfig,
    InternodeDispatchConfig,
    InternodeNotifyConfig,
    check_warps,
    combine_slots,
    config_of,
    for_proxy,
    kernels_of,
    max_slots,
    ring_bytes,
    ring_slots,
)
from epjit.kernels.shapes import AnyShape, DispatchShape
from epjit.modes import expert_major
from epjit.modes.normal import (
    SIGNALS_BYTES,
    Normal,
    Room,
    combine_shape,
    dispatch_shape,
    expert_combine_shape,
    expert_dispatch_shape,
    pointer,
)
from epjit.runtime.empty import matrix
from epjit.runtime.group import BUFFER, Group
from epjit.runtime.kernel import KernelConfig
from epjit.runtime.launch import Launch
from epjit.runtime.symmetric import SymmetricMemory
from epjit.runtime.transport import Transport
from epjit.sizes import align

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from epjit.scope import AnyScope, Record


class _DomainGroup(Group):
    """The ranks of this rank's domain; all domains use theirs at the same time."""

    def __init__(self, whole: Group, ranks: Sequence[int]) -> None:
        self._whole, self._ranks = whole, ranks
        self.rank, self.size = ranks.index(whole.rank), len(ranks)

    def allgather(self, obj: Any, *, op: str = BUFFER) -> list[Any]:
        everyone = self._whole.allgather(obj, op=op)
        return [everyone[rank] for rank in self._ranks]

    def reset(self) -> None:
        self._whole.reset()


class _Arena:
    """Offsets of the parts of the memory of a domain, in bytes."""

    def __init__(self, num_domains: int, num_local: int, num_nvl_bytes: int) -> None:
        self.slots = 0
        self.slots_bytes = num_nvl_bytes
        self.signals = align(num_nvl_bytes)  # from here on nothing is the user's
        self.done = self.signals + SIGNALS_BYTES
        self.words = align(self.done + num_domains * num_local * 2 * 8)
        self.total = self.words + MAX_WORDS * 8


class _Rings:
    """Offsets of the parts of the memory of the transport, in bytes."""

    def __init__(self, num_domains: int, num_local: int, num_rdma_bytes: int) -> None:
        self.max_slots = max_slots(num_domains, num_local)
        self.inbox = 0
        self.num_rdma_bytes = num_rdma_bytes  # of inbox and stage
        self.ring_bytes = ring_bytes(num_domains, num_rdma_bytes)
        self.stage = num_domains * self.ring_bytes
        self.control = align(num_rdma_bytes)  # from here on nothing is the user's
        self.entered = self.control  # and behind it `ready`
        self.credits = self.entered + 2 * num_domains * 2 * 8
        self.notify_arrived = self.credits + num_domains * 2 * 8
        self.arrived = self.notify_arrived + num_domains * 8
        self.staged = self.arrived + num_domains * self.max_slots * 8
        self.notify_inbox = align(self.staged + num_domains * self.max_slots * 8)
        self.notify_stride = align(2 + num_local * (1 + MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS), 4)
        self.notify_stage = self.notify_inbox + num_domains * self.notify_stride * 4
        self.total = align(self.notify_stage + num_domains * self.notify_stride * 4)


class Internode(Normal[AnyShape]):
    """Everything one rank needs for the operations between NVLink domains.

    Collective: all ranks construct it together.

    Args:
        setup: All that it is made from.

    Attributes:
        rdma_memory: Memory that the transport reaches; its first `num_rdma_bytes` are the user's.
    """

    _transport: Transport

    def __init__(self, setup: Setup) -> None:
        settings, group, topology, device, resources = setup
        num_domains, num_local = topology.num_domains, topology.num_local
        super().__init__(
            setup,
            num_counters=2 + 2 * group.size + 5 * num_domains,
            num_counts=2 + MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS,
        )
        self._arena = _Arena(num_domains, num_local, settings.num_nvl_bytes)
        self._rings = _Rings(num_domains, num_local, settings.num_rdma_bytes)
        notify_kernel = self._kernel(InternodeNotifyConfig(num_domains, num_local))
        self.rdma_memory = self._transport.allocate(self._rings.total)
        resources.callback(self.rdma_memory.close)
        self.memory = SymmetricMemory(
            self._arena.total,
            group=_DomainGroup(group, topology.domains[topology.domain]),
            device=device.index,
            fabric=settings.use_fabric,
        )
        resources.callback(self.memory.close)
        self._signals_at = self._arena.signals
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        # What a notify leaves for its dispatch: how many tokens of each channel fit.
        self._fits = torch.zeros((num_domains, num_local), **ints)
        self._ranks = torch.tensor(topology.domains, **ints)
        self._pes = torch.tensor(self._transport.pes, **ints)
        self._notify = Launch(
            notify_kernel,
            **self._common(),
            inbox=self._everywhere(self._rings.notify_inbox, self.rdma_memory),
            stage=self.rdma_memory.ptr + self._rings.notify_stage,
            arrived=self.rdma_memory.ptr + self._rings.notify_arrived,
            notify_stride=self._rings.notify_stride,
            fits=self._fits.data_ptr(),
        )
        self._meet(resources)

    def _common(self) -> dict[str, object]:
        return {
            **super()._common(),
            "entered": self._everywhere(self._rings.entered, self.rdma_memory),
            "ranks": self._ranks.data_ptr(),
            "pes": self._pes.data_ptr(),
            "transport": self._transport.context,
            "domain": self._topology.domain,
            "local": self._topology.local,
        }

    # ---- launches --------------------------------------------------------------------------------

    def _config(self, shape: AnyShape) -> KernelConfig:
        num_domains, num_local = self._topology.num_domains, self._topology.num_local
        return self._for_transport(config_of(shape, num_domains, num_local, self._arch))

    def _for_transport(self, config: KernelConfig) -> KernelConfig:
        if not self._transport.through_proxy:
            return config
        return for_proxy(config, self._rings.num_rdma_bytes)

    def _bind(self, config: Any) -> Launch[Any]:
        bound = self._common()
        bound.update(
            words=self._everywhere(self._arena.words),
            done=self._everywhere(self._arena.done),
            credits=self.rdma_memory.ptr + self._rings.credits,
            arrived=self.rdma_memory.ptr + self._rings.arrived,
            staged=self.rdma_memory.ptr + self._rings.staged,
            stage=self.rdma_memory.ptr + self._rings.stage,
            ring_bytes=self._rings.ring_bytes,
            ring_slots=ring_slots(config, self._rings.num_rdma_bytes),
        )
        if isinstance(config, InternodeCombineConfig):
            bound["slots"] = self._everywhere(self._arena.slots)
            bound["inbox"] = self.rdma_memory.ptr + self._rings.inbox
            bound["num_slots"] = combine_slots(config, self._arena.slots_bytes)
        else:
            bound["inbox"] = self._everywhere(self._rings.inbox, self.rdma_memory)
            bound["fits"] = self._fits.data_ptr()
        return Launch(self._kernel(config), **bound)

    def _load(self, shape: AnyShape, config: KernelConfig) -> Launch[Any]:
        """With the second pass, which is there before the ranks meet, as all that is launched."""
        for each in passes_of(shape, self._arch):
            expert_major._launch(each, self._device.index)
        return super()._load(shape, config)

    def _configs_on(self, arch: str, shapes: Iterable[AnyShape]) -> list[KernelConfig]:
        num_domains, num_local = self._topology.num_domains, self._topology.num_local
        found = kernels_of(shapes, num_domains=num_domains, num_local=num_local, arch=arch)
        return [self._for_transport(config) for config in found]

    # ---- operations ------------------------------------------------------------------------------

    def dispatch(self, scope: AnyScope, call: Dispatch) -> Dispatched:
        """Notify and dispatch; then the host waits for the counts unless there is a worst case."""
        routing = call.routing
        if not isinstance(routing, Routing):
            return self._cached_dispatch(scope, call, routing)
        assert routing.num_tokens_per_rdma_rank is not None
        num_ranks, num_tokens, waits = self._group.size, call.x.shape[0], self._waits(call)
        num_domains, num_local = self._topology.num_domains, self._topology.num_local
        shape = dispatch_shape(call)
        launch = self._dispatch_launch(shape, call.num_sms)
        experts_per_rank = routing.num_tokens_per_expert.shape[0] // num_ranks
        specs = InternodeHandle.specs(
            num_tokens=num_tokens,
            num_ranks=num_ranks,
            num_domains=num_domains,
            experts_per_rank=experts_per_rank,
        )
        with scope.allocating():
            handle = InternodeHandle(*self._empty(specs))
        scope.start()
        with self._between_kernels():
            self._notify.set(
                num_tokens_per_rank=routing.num_tokens_per_rank.data_ptr(),
                num_tokens_per_domain=routing.num_tokens_per_rdma_rank.data_ptr(),
                num_tokens_per_expert=routing.num_tokens_per_expert.data_ptr(),
                is_token_in_rank=routing.is_token_in_rank.data_ptr(),
                **self._routing(handle),
                expert_counts=handle.recv_expert_counts.data_ptr(),
                send_head=handle.send_head.data_ptr(),
                send_domain_head=handle.send_rdma_head.data_ptr(),
                host_counts=self._ask_for_counts(waits),
                num_tokens=num_tokens,
                num_recv_rows=call.num_worst_tokens,
                experts_per_rank=experts_per_rank,
                expert_alignment=call.expert_alignment,
            )
            self._notify.start(scope.stream, 1 + num_ranks + num_domains)

            def start(room: Room) -> list[Any]:
                with scope.allocating():
                    meta, passing = self._empty(InternodeHandle.row_specs(*room.sizes))
                received = self._dispatch_rows(
                    scope,
                    launch,
                    call,
                    handle._replace(recv_src_meta=meta, send_nvl_head=passing),
                    fills_handle=True,
                    least_rows=room.least,
                )
                return [*received[:4], meta, passing]

            if waits:
                outputs, per_expert = self._receive(
                    shape,
                    num_tokens,
                    start,
                    likely=(num_ranks * num_tokens, num_domains * num_tokens),
                    experts_per_rank=experts_per_rank,
                )
            else:
                worst = call.num_worst_tokens
                outputs, per_expert = start(Room((worst, num_local * worst))), []
            rows, scales, idx, weights, meta, passing = outputs
            handle = handle._replace(
                is_token_in_rank=routing.is_token_in_rank,
                recv_src_meta=meta,
                send_nvl_head=passing,
            )
        return Dispatched(rows, scales, idx, weights, per_expert, handle)

    def _cached_dispatch(
        self, scope: AnyScope, call: Dispatch, handle: InternodeHandle
    ) -> Dispatched:
        """Dispatches another payload along the routing of a handle."""
        launch = self._dispatch_launch(dispatch_shape(call), call.num_sms)
        return self._dispatch_rows(scope, launch, call, handle, fills_handle=False)

    def _dispatch_launch(
        self, shape: DispatchShape, num_sms: int
    ) -> Launch[InternodeDispatchConfig]:
        """The launch of a shape, before anything is queued.

        Raises:
            ValueError: The SMs are too few.
        """
        launch = self.launch(shape)
        check_warps(launch.kernel.config, num_sms)
        return launch

    def _dispatch_rows(
        self,
        scope: AnyScope,
        launch: Launch[InternodeDispatchConfig],
        call: Dispatch,
        handle: InternodeHandle,
        *,
        fills_handle: bool,
        least_rows: int = -1,
    ) -> Dispatched:
        """Allocates the received rows and queues the dispatch kernel."""
        specs = self._specs(handle.num_rows, call)
        with scope.allocating():
            received = Dispatched(*self._empty(specs))
        scope.start()
        launch.set(
            **self._rows(call, received[:4]),
            **self._routing(handle),
            send_head=handle.send_head.data_ptr(),
            recv_src_meta=handle.recv_src_meta.data_ptr() if fills_handle else 0,
            passing=handle.send_nvl_head.data_ptr() if fills_handle else 0,
            num_recv_rows=handle.num_rows,
            least_rows=least_rows,
            num_passing=handle.num_passing,
            num_send_warps=launch.kernel.config.send_warps,
            experts_per_rank=handle.recv_expert_counts.shape[0],
        )
        launch.start(scope.stream, call.num_sms)
        return received

    @staticmethod
    def _routing(handle: InternodeHandle) -> dict[str, int]:
        """Parameters for what notify writes to a handle, and dispatch and combine take from it."""
        return {
            "send_tokens": handle.send_tokens.data_ptr(),
            "channel_tokens": handle.channel_tokens.data_ptr(),
            "passing_prefix": handle.recv_rdma_rank_prefix_sum.data_ptr(),
            "rank_prefix": handle.recv_gbl_rank_prefix_sum.data_ptr(),
        }

    def combine(self, scope: AnyScope, call: Combine) -> Sums:
        """Sums rows inside each domain, sends the sums to the ranks of their tokens."""
        x, topk_weights, bias_0, bias_1, *_ = call
        handle: InternodeHandle = call.handle
        num_tokens, num_sms = handle.num_tokens, call.num_sms
        shape = combine_shape(call)._replace(choice_bits=0)
        launch = self.launch(shape)
        config: InternodeCombineConfig = launch.kernel.config
        check_warps(config, num_sms)
        combined_x, combined_weights = self._sums(scope, call.x, num_tokens, shape.num_topk)
        scope.start()
        reduce_warps = config.reduce_warps * num_sms
        launch.set(
            **self._routing(handle),
            x=x.data_ptr(),
            topk_weights=pointer(topk_weights),
            bias_0=pointer(bias_0),
            bias_1=pointer(bias_1),
            combined_x=combined_x.data_ptr(),
            combined_topk_weights=pointer(combined_weights),
            recv_src_meta=handle.recv_src_meta.data_ptr(),
            send_domain_head=handle.send_rdma_head.data_ptr(),
            passing=handle.send_nvl_head.data_ptr(),
            num_rows=x.shape[0],
            num_tokens=num_tokens,
            num_passing=handle.num_passing,
            # As inside a domain: with few tokens several warps share the reduction of one.
            num_parts=max(1, min(4, 6 * reduce_warps // max(num_tokens, 1))),
        )
        launch.start(scope.stream, num_sms)
        return combined_x, combined_weights

    # ---- rows by expert --------------------------------------------------------------------------

    def expert_dispatch(
        self, scope: AnyScope, call: ExpertDispatch
    ) -> tuple[ExpertDispatched, Record]:
        """Casts rows, dispatches them in the order of the sources, then stores them by expert."""
        self.launch(expert_dispatch_shape(call))
        x, scales = self._cast(scope, call)
        if call.handle is None:
            sent, received, handle = self._place(scope, call, x, scales)
            recv_scales, weights = received.recv_scales, received.recv_topk_weights
        else:
            handle, num_scales = call.handle, 0 if scales is None else scales.shape[1]
            words = self._beside(scope, scales, call.topk_weights)
            sent = Dispatch(x, words, None, None, handle.routing, 1, 0, call.num_sms)
            received = self.dispatch(scope, sent)
            recv_scales = weights = received.recv_scales
            if weights is not None:
                recv_scales, weights = weights[:, :num_scales], weights[:, num_scales:]
        with scope.allocating():
            outputs = self._rows_by_expert(handle.num_rows, call)
        scope.start()
        expert_major.queue_permute(
            scope.stream,
            (received.recv_x, recv_scales, weights),
            handle.placement,
            outputs,
            zero_padding=call.zero_padding,
        )
        per_expert = received.num_recv_tokens_per_expert_list
        return ExpertDispatched(*outputs, handle, per_expert), (sent, received)

    def _place(
        self,
        scope: AnyScope,
        call: ExpertDispatch,
        x: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> tuple[Dispatch, Dispatched, ExpertHandle]:
        """Dispatches along new choices, and numbers what comes."""
        topk_idx, weights, waits = call.topk_idx, call.topk_weights, self._waits(call)
        assert topk_idx is not None
        if weights is None:  # choices and weights travel together: any do
            with scope.allocating():
                (weights,) = self._empty((matrix(torch.float32, *topk_idx.shape),))
        counts = self.layout(scope, Layout(topk_idx, call.num_experts))
        sizes = call.expert_alignment, call.num_worst_tokens, call.num_sms
        sent = Dispatch(x, scales, topk_idx, weights, Routing(*counts), *sizes)
        received = self.dispatch(scope, sent)
        routing, recv_topk_idx = received.handle, received.recv_topk_idx
        assert routing is not None
        assert recv_topk_idx is not None
        (num_tokens, num_topk), counts_of = recv_topk_idx.shape, routing.recv_expert_counts
        local = counts_of.shape[0]
        num_rows = sum(received.num_recv_tokens_per_expert_list or ())
        if not waits:
            bound = row_bound(num_tokens, num_topk, local, call.expert_alignment)
            num_rows = call.num_expert_rows or bound
        specs = Placement.specs(
            num_tokens=num_tokens, num_topk=num_topk, num_rows=num_rows, num_experts=local
        )
        with scope.allocating():
            row_of, source, ends = self._empty(specs[:-1])
        placed, alignment = Placement(row_of, source, ends, counts_of), call.expert_alignment
        scope.start()
        expert_major.queue_place(
            scope.stream, recv_topk_idx, placed, alignment=alignment, known=True
        )
        return sent, received, ExpertHandle(routing, placed)

    @staticmethod
    def _beside(
        scope: AnyScope, scales: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Words that travel beside rows along a handle; without choices, weights go as scales."""
        if scales is None or weights is None:
            return weights if scales is None else scales
        scope.start()
        with scope.running():
            return torch.cat((scales.view(torch.int32), weights.view(torch.int32)), dim=1)

    def _cast(
        self, scope: AnyScope, call: ExpertDispatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and scales as they travel, scales as words."""
        x, row_format = call.x, call.row_format
        if row_format is None:
            return x, call.scales
        num_tokens, hidden = x.shape
        num_words = row_format.num_scale_bytes(hidden) // 4
        specs = (
            matrix(row_format.x_dtype, num_tokens, row_format.num_columns(hidden)),
            matrix(torch.int32, num_tokens, num_words),
        )
        with scope.allocating():
            rows, scales = self._empty(specs)
        scope.start()
        config = CastConfig(hidden, row_format.code, x.dtype == torch.float16)
        expert_major._launch(config, self._device.index)(
            scope.stream,
            2 * self.num_sms,
            x=x.data_ptr(),
            global_scale=pointer(call.global_scale),
            rows=rows.data_ptr(),
            scales=scales.data_ptr(),
            num_tokens=num_tokens,
        )
        return rows, scales

    def expert_combine(self, scope: AnyScope, call: ExpertCombine) -> tuple[Sums, Record]:
        """Sums a token's rows on each rank, then combines the sums."""
        rows, row_weights, topk_weights, bias_0, bias_1, (routing, placed), num_sms, _ = call
        self.launch(expert_combine_shape(call))
        num_topk = 0 if topk_weights is None else placed.row_of.shape[1]
        sums = self._sums(scope, rows, routing.num_rows, num_topk)
        scope.start()
        expert_major.queue_unpermute(
            scope.stream, rows, placed.row_of, sums, given=(row_weights, topk_weights)
        )
        sent = Combine(*sums, bias_0, bias_1, routing, num_sms)
        return self.combine(scope, sent), sent

    # ---- the end ---------------------------------------------------------------------------------

    def _control(self) -> list[torch.Tensor]:
        return [
            *super()._control(),
            self.rdma_memory.tensor(torch.uint8)[self._rings.control :],
        ]
