"""Dispatch and combine inside one NVLink domain: the order of launches, and which array goes where.

Memory of one rank, in one symmetric allocation (`_Arena`): first `num_nvl_bytes` of slots, which
users may look at and write to between operations; then words, signals and counts, which they may
not. The kernels' headers (`cuda_src/intranode/*.cu`) say who writes what.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from epjit import env
from epjit.calls import Combine, Dispatch, ExpertCombine, ExpertDispatch, Routing, Setup, Sums
from epjit.config import MAX_LOCAL_EXPERTS, MAX_RANKS
from epjit.handles import (
    Dispatched,
    ExpertDispatched,
    ExpertHandle,
    IntranodeHandle,
    Placement,
    row_bound,
)
from epjit.kernels.intranode import (
    COMBINE_OF_EXPERTS,
    DISPATCH_OF_EXPERTS,
    MAX_SLOTS,
    NOTIFY_OF_EXPERTS,
    CombineConfig,
    DispatchConfig,
    NotifyConfig,
    check_warps,
    config_of,
    kernels_of,
    num_parts,
    num_slots,
)
from epjit.kernels.shapes import AnyShape
from epjit.modes.normal import (
    SIGNALS_BYTES,
    Normal,
    Room,
    combine_shape,
    dispatch_shape,
    expert_combine_shape,
    expert_dispatch_shape,
    pointer,
    word_strides,
)
from epjit.runtime.empty import TensorSpec, matrix, vector
from epjit.runtime.kernel import Kernel, KernelConfig
from epjit.runtime.launch import Launch
from epjit.runtime.pool import BlockPool, NoRoomError
from epjit.runtime.stream import record_event
from epjit.runtime.symmetric import SymmetricMemory, tensor_over
from epjit.sizes import align

if TYPE_CHECKING:
    from epjit.scope import AnyScope, Record

_PLACES_BYTES = MAX_RANKS * 64
# Parameters that a dispatch by expert along a handle has no use for.
_OF_NEW_ROWS = dict.fromkeys(
    ("local_position", "block_base", "row_base", "recv_src_idx", "source"), 0
)


class _Arena:
    """Offsets of the parts of a rank's symmetric memory, in bytes."""

    def __init__(self, num_ranks: int, num_nvl_bytes: int, num_output_bytes: int) -> None:
        self.slots = 0
        self.slots_bytes = num_nvl_bytes
        self.signals = align(num_nvl_bytes)  # from here on nothing is the user's
        self.places = self.signals + SIGNALS_BYTES
        self.words = self.places + _PLACES_BYTES
        self.notify = self.words + num_ranks * MAX_SLOTS * 8
        self.notify_stride = num_ranks + 2 + MAX_LOCAL_EXPERTS
        # What lies here is the caller's, who got it from a dispatch; reset() leaves it alone.
        self.outputs = align(self.notify + num_ranks * self.notify_stride * 4)
        self.total = self.outputs + num_output_bytes


class Intranode(Normal[AnyShape]):
    """Everything one rank needs for the operations of one NVLink domain.

    Collective: all ranks construct it together.

    Args:
        setup: All that it is made from.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, num_counters=32, num_counts=1 + MAX_LOCAL_EXPERTS)
        settings, group, _, device, resources = setup
        direct = env.dispatch_variant() == "direct" and group.size > 1
        num_output_bytes = align(env.direct_bytes()) if direct else 0
        self._arena = _Arena(group.size, settings.num_nvl_bytes, num_output_bytes)
        notify_kernel = self._kernel(NotifyConfig(group.size))
        self.memory = SymmetricMemory(
            self._arena.total, group=group, device=device.index, fabric=settings.use_fabric
        )
        resources.callback(self._close_memory)
        self._signals_at = self._arena.signals
        self._pool: BlockPool | None = None
        if num_output_bytes:
            self._pool = BlockPool(
                num_output_bytes,
                current_stream=partial(torch._C._cuda_getCurrentRawStream, device.index),
                record=partial(record_event, device=device.index),
            )
            # The memory lives as long as a tensor over one of the blocks, after the end too.
            end = weakref.finalize(self._pool, self.memory.close)
            end.atexit = False
        self._notify = self._notify_launch(notify_kernel)
        self._expert_notify: Launch[NotifyConfig] | None = None
        self._meet(resources)

    def _notify_launch(self, kernel: Kernel[NotifyConfig]) -> Launch[NotifyConfig]:
        return Launch(
            kernel,
            **self._common(),
            **({} if kernel.config.by_expert else NOTIFY_OF_EXPERTS),
            notify=self._everywhere(self._arena.notify),
            notify_stride=self._arena.notify_stride,
        )

    # ---- launches --------------------------------------------------------------------------------

    def _config(self, shape: AnyShape) -> KernelConfig:
        gpu = torch.cuda.get_device_name(self._device)
        return config_of(shape, self._group.size, self._arch, gpu=gpu)

    def _bind(self, config: Any) -> Launch[Any]:
        own: dict[str, Any] = {} if config.by_expert else COMBINE_OF_EXPERTS
        if isinstance(config, DispatchConfig):
            # Places count from the start of the memory, so that 0 is none.
            own = {
                "places": self._everywhere(self._arena.places),
                "outputs": self._everywhere(0),
            }
            if not config.by_expert:
                own |= DISPATCH_OF_EXPERTS
            elif config.is_cached:
                own |= _OF_NEW_ROWS
            if config.by_expert and not config.is_cached and self._expert_notify is None:
                self._layout.load_by_expert()
                kernel = self._kernel(NotifyConfig(self._group.size, by_expert=True))
                self._expert_notify = self._notify_launch(kernel)
        return Launch(
            self._kernel(config),
            **self._common(),
            **own,
            slots=self._everywhere(self._arena.slots),
            words=self._everywhere(self._arena.words),
            num_slots=num_slots(config, self._arena.slots_bytes),
        )

    def _configs_on(self, arch: str, shapes: Iterable[AnyShape]) -> list[KernelConfig]:
        return kernels_of(shapes, num_ranks=self._group.size, arch=arch)

    # ---- operations ------------------------------------------------------------------------------

    def dispatch(self, scope: AnyScope, call: Dispatch) -> Dispatched:
        """Notify and dispatch; then the host waits for the counts unless there is a worst case."""
        routing = call.routing
        if not isinstance(routing, Routing):
            return self._cached_dispatch(scope, call, routing)
        num_ranks, num_tokens, waits = self._group.size, call.x.shape[0], self._waits(call)
        shape = dispatch_shape(call)
        launch = self.launch(shape)
        experts_per_rank = routing.num_tokens_per_expert.shape[0] // num_ranks
        specs = IntranodeHandle.specs(
            num_tokens=num_tokens,
            num_ranks=num_ranks,
            num_domains=1,
            experts_per_rank=experts_per_rank,
        )
        with scope.allocating():
            handle = IntranodeHandle(*self._empty(specs))
        shared = self._routing(handle)
        scope.start()
        with self._between_kernels():
            self._notify.set(
                num_tokens_per_rank=routing.num_tokens_per_rank.data_ptr(),
                num_tokens_per_expert=routing.num_tokens_per_expert.data_ptr(),
                is_token_in_rank=routing.is_token_in_rank.data_ptr(),
                **shared,
                expert_counts=handle.recv_expert_counts.data_ptr(),
                host_counts=self._ask_for_counts(waits),
                num_tokens=num_tokens,
                num_recv_rows=call.num_worst_tokens,
                expert_alignment=call.expert_alignment,
            )
            self._notify.start(scope.stream, 1 + num_ranks)

            def start(room: Room) -> list[Any]:
                outputs, has_room = self._allocate_outputs(
                    scope, launch, room.sizes[0], call, with_src_idx=True
                )
                self._dispatch_rows(
                    scope, launch, call, shared, outputs, has_room, least_rows=room.least
                )
                return outputs

            if waits:
                outputs, per_expert = self._receive(
                    shape,
                    num_tokens,
                    start,
                    likely=(num_ranks * num_tokens,),
                    experts_per_rank=experts_per_rank,
                )
            else:
                outputs, per_expert = start(Room((call.num_worst_tokens,))), []
            rows, scales, idx, weights, src_idx = outputs
            handle = IntranodeHandle(
                *handle[:3], src_idx, routing.is_token_in_rank, handle.send_head
            )
        return Dispatched(rows, scales, idx, weights, per_expert, handle)

    def _cached_dispatch(
        self, scope: AnyScope, call: Dispatch, handle: IntranodeHandle
    ) -> Dispatched:
        """Dispatches another payload along the routing of a handle."""
        launch = self.launch(dispatch_shape(call))
        outputs, has_room = self._allocate_outputs(
            scope, launch, handle.num_rows, call, with_src_idx=False
        )
        self._dispatch_rows(scope, launch, call, self._routing(handle), outputs, has_room)
        return Dispatched(*outputs[:4])

    def _allocate_outputs(
        self,
        scope: AnyScope,
        launch: Launch[DispatchConfig],
        num_rows: int,
        call: Dispatch,
        *,
        with_src_idx: bool,
    ) -> tuple[list[Any], bool]:
        """Outputs of a dispatch: with `direct` where peers reach them, if there is room for all.

        Each is a block of its own, so that a handle, which lives long, does not keep the rows. What
        a CUDA graph writes is written at every replay, also when the tensors are long gone: that is
        what torch keeps private pools for, so under capture all outputs are torch's.

        Returns:
            Rows, scales, choices, weights, `recv_src_idx`; and whether peers can write to them.
        """
        src_idx = IntranodeHandle.row_specs(num_rows) if with_src_idx else (None,)
        specs = (*self._specs(num_rows, call), *src_idx)
        with scope.allocating():
            direct = launch.kernel.config.direct
            blocks = self._empty_blocks(scope, specs) if direct else None
            return (self._empty(specs), False) if blocks is None else (blocks, True)

    def _empty_blocks(
        self, scope: AnyScope, specs: Iterable[TensorSpec | None]
    ) -> list[Any] | None:
        """Outputs where peers reach them, if there is room for all."""
        pool = self._pool
        if pool is None or torch.cuda.is_current_stream_capturing():
            return None
        try:
            return [None if spec is None else self._block(scope, pool, spec) for spec in specs]
        except NoRoomError:
            return None  # what has been taken so far goes back

    def _block(self, scope: AnyScope, pool: BlockPool, spec: TensorSpec) -> torch.Tensor:
        """An output where peers reach it.

        Raises:
            NoRoomError: The pool has no block for it.
        """
        shape, _, dtype = spec
        # One row at least: an empty tensor comes from CuPy without strides.
        some = (max(shape[0], 1), *shape[1:])
        in_bytes = (*some[:-1], some[-1] * dtype.itemsize)
        block = pool.take(math.prod(in_bytes), scope.owners)
        for event in block.events:
            scope.wait_for(event)
        address = self.memory.ptr + self._arena.outputs + block.offset
        rows = tensor_over(address, in_bytes, owner=block, device=self._device.index).view(dtype)
        return rows if shape[0] else rows[:0]

    @staticmethod
    def _routing(handle: IntranodeHandle) -> dict[str, int]:
        """Parameters for what notify writes to a handle, and dispatch takes from it."""
        return {
            "rank_prefix": handle.rank_prefix_matrix.data_ptr(),
            "source_tokens": handle.source_tokens.data_ptr(),
            "send_head": handle.send_head.data_ptr(),
            "experts_per_rank": handle.recv_expert_counts.shape[0],
        }

    def _dispatch_rows(
        self,
        scope: AnyScope,
        launch: Launch[DispatchConfig],
        call: Dispatch,
        routing: dict[str, int],
        outputs: list[Any],
        has_room: bool,
        *,
        least_rows: int = -1,
    ) -> None:
        """Queues the dispatch kernel."""
        config, num_sms = launch.kernel.config, call.num_sms
        *received, src_idx = outputs
        scope.start()
        launch.set(
            **self._rows(call, received),
            **routing,
            num_recv_rows=received[0].shape[0],
            recv_src_idx=0 if src_idx is None else src_idx.data_ptr(),
            global_scale=pointer(call.global_scale),
            least_rows=least_rows,
            has_room=has_room,
            num_stage_warps=config.stage_warps(num_sms, has_room=has_room),
        )
        launch.start(scope.stream, num_sms)

    def combine(self, scope: AnyScope, call: Combine) -> Sums:
        """Pushes rows back to the ranks of their tokens and sums them there."""
        shape = combine_shape(call)
        launch = self.launch(shape)
        sums = self._sums(scope, call.x, call.handle.num_tokens, shape.num_topk)
        self._sum(scope, launch, call, call.x, call.handle, sums)
        return sums

    def _sum(
        self,
        scope: AnyScope,
        launch: Launch[CombineConfig],
        call: Combine | ExpertCombine,
        x: torch.Tensor,
        handle: IntranodeHandle,
        sums: Sums,
        **own: int,
    ) -> None:
        """Queues the kernel of a combine; `own` are parameters of rows by expert alone."""
        config, num_sms, num_tokens = launch.kernel.config, call.num_sms, sums[0].shape[0]
        check_warps(config, num_sms)
        weights, bias_0, bias_1 = call.topk_weights, call.bias_0, call.bias_1
        choices, num_experts = call.order or (None, 0)
        scope.start()
        launch.set(
            x=x.data_ptr(),
            topk_weights=0 if weights is None else weights.data_ptr(),
            bias_0=0 if bias_0 is None else bias_0.data_ptr(),
            bias_1=0 if bias_1 is None else bias_1.data_ptr(),
            combined_x=sums[0].data_ptr(),
            combined_topk_weights=0 if weights is None else pointer(sums[1]),
            recv_src_idx=handle.recv_src_idx.data_ptr(),
            send_head=handle.send_head.data_ptr(),
            rank_prefix=handle.rank_prefix_matrix.data_ptr(),
            num_rows=handle.num_rows,
            num_tokens=num_tokens,
            num_parts=num_parts(config, num_sms, num_tokens),
            topk_idx=0 if choices is None else choices.data_ptr(),
            num_choices=0 if choices is None else choices.shape[1],
            experts_per_rank=num_experts // self._group.size,
            **own,
        )
        launch.start(scope.stream, num_sms)

    # ---- rows by expert --------------------------------------------------------------------------

    def expert_dispatch(
        self, scope: AnyScope, call: ExpertDispatch
    ) -> tuple[ExpertDispatched, Record]:
        """Layout and notify number the selections, dispatch stores each row where it belongs."""
        if call.handle is not None:
            return self._cached_expert_dispatch(scope, call, call.handle), ()
        topk_idx, num_experts, waits = call.topk_idx, call.num_experts, self._waits(call)
        assert topk_idx is not None
        launch = self.launch(expert_dispatch_shape(call))
        assert self._expert_notify is not None
        num_ranks, (num_tokens, num_topk) = self._group.size, topk_idx.shape
        local, num_blocks = num_experts // num_ranks, max(1, -(-num_tokens // 64))
        specs = IntranodeHandle.specs(
            num_tokens=num_tokens, num_ranks=num_ranks, num_domains=1, experts_per_rank=local
        )
        int32 = torch.int32
        with scope.allocating():
            routing = IntranodeHandle(*self._empty(specs))
            ends, in_rank, *used = self._empty(
                (
                    vector(int32, local),
                    matrix(torch.bool, num_tokens, num_ranks),
                    vector(int32, num_ranks),
                    vector(int32, num_experts),
                    matrix(torch.int16, num_tokens, num_topk),
                    matrix(int32, num_blocks, num_experts),
                    matrix(int32, num_ranks, local),
                )
            )
        per_rank, per_expert, local_position, block_base, row_base = used
        counts = routing.recv_expert_counts
        shared = {
            **self._routing(routing),
            "ends": ends.data_ptr(),
            "expert_counts": counts.data_ptr(),
            "row_base": row_base.data_ptr(),
            "block_base": block_base.data_ptr(),
        }
        scope.start()
        with self._between_kernels():
            layout = (per_rank, None, per_expert, in_rank)
            self._layout.by_expert(scope.stream, topk_idx, layout, local_position, block_base)
            num_rows = call.num_expert_rows
            if not waits and not num_rows:
                num_rows = row_bound(call.num_worst_tokens, num_topk, local, call.expert_alignment)
            self._expert_notify.set(
                num_tokens_per_rank=per_rank.data_ptr(),
                num_tokens_per_expert=per_expert.data_ptr(),
                is_token_in_rank=in_rank.data_ptr(),
                **shared,
                host_counts=self._ask_for_counts(waits),
                num_blocks=num_blocks,
                num_expert_rows=num_rows,
                num_tokens=num_tokens,
                num_recv_rows=call.num_worst_tokens,
                expert_alignment=call.expert_alignment,
            )
            self._expert_notify.start(
                scope.stream, 1 + num_ranks + -(-num_experts // NotifyConfig.threads)
            )
            num_tokens, aligned = call.num_worst_tokens, []
            if waits:
                num_tokens, *aligned = self._wait_for_counts(1 + local)
                num_rows = sum(aligned)
            with scope.allocating():
                (src_idx,) = self._empty(IntranodeHandle.row_specs(num_tokens))
                row_of, source = self._empty(
                    (matrix(int32, num_tokens, num_topk), vector(int32, num_rows))
                )
                rows, scales, weights = self._rows_by_expert(num_rows, call)
            routing = routing._replace(recv_src_idx=src_idx, is_token_in_rank=in_rank)
            handle = ExpertHandle(routing, Placement(row_of, source, ends, counts))
            received = ExpertDispatched(rows, scales, weights, handle, aligned)
            self._store_by_expert(
                scope,
                launch,
                received,
                call,
                **shared,
                local_position=local_position.data_ptr(),
                recv_src_idx=src_idx.data_ptr(),
                source=source.data_ptr(),
            )
        return received, tuple(used)

    def _cached_expert_dispatch(
        self, scope: AnyScope, call: ExpertDispatch, handle: ExpertHandle
    ) -> ExpertDispatched:
        """Sends another payload to the rows that a handle names."""
        launch = self.launch(expert_dispatch_shape(call))
        routing, placed = handle
        assert isinstance(routing, IntranodeHandle)
        with scope.allocating():
            outputs = self._rows_by_expert(handle.num_rows, call)
        received = ExpertDispatched(*outputs, handle)
        self._store_by_expert(
            scope,
            launch,
            received,
            call,
            **self._routing(routing),
            ends=placed.ends.data_ptr(),
            expert_counts=placed.counts.data_ptr(),
        )
        return received

    def _store_by_expert(
        self,
        scope: AnyScope,
        launch: Launch[DispatchConfig],
        received: ExpertDispatched,
        call: ExpertDispatch,
        **routing: int,
    ) -> None:
        """Queues the kernel; `routing` are its parameters for where rows go."""
        scope.start()
        rows, scales, weights, (own, placed), _ = received
        row_stride, stride = word_strides(scales)
        launch.set(
            **self._rows(call, (rows, scales, None, weights)),
            **routing,
            num_recv_rows=own.num_rows,
            recv_scale_row_stride=row_stride,
            recv_scale_stride=stride,
            zero_padding=call.zero_padding,
            least_rows=-1,
            global_scale=pointer(call.global_scale),
            has_room=False,
            row_of=placed.row_of.data_ptr(),
            row_of_stride=placed.row_of.stride(0),
            num_expert_rows=rows.shape[0],
            num_stage_warps=launch.kernel.config.stage_warps(call.num_sms),
        )
        launch.start(scope.stream, call.num_sms)

    def expert_combine(self, scope: AnyScope, call: ExpertCombine) -> tuple[Sums, Record]:
        """Sums a token's rows while they are read, and pushes the sums."""
        rows, (routing, placed) = call.rows, call.handle
        shape = expert_combine_shape(call)
        launch = self.launch(shape)
        num_topk = shape.num_topk if shape.has_weights else 0
        sums = self._sums(scope, rows, routing.num_tokens, num_topk)
        self._sum(
            *(scope, launch, call, rows, routing, sums),
            row_of=placed.row_of.data_ptr(),
            row_of_stride=placed.row_of.stride(0),
            row_weights=pointer(call.row_weights),
            num_expert_rows=rows.shape[0],
        )
        return sums, ()

    # ---- the end ---------------------------------------------------------------------------------

    def _control(self) -> list[torch.Tensor]:
        return [self.memory.tensor(torch.uint8)[self._signals_at : self._arena.outputs]]

    def _close_memory(self) -> None:
        if self._pool is None:
            self.memory.close()
        self._pool = None  # closes the memory, unless a tensor still lies there: then that does
