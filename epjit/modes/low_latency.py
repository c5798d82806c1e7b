"""Low-latency dispatch and combine: the order of launches, and which array goes where.

Memory of one rank, in one symmetric allocation (`_Arena`): first `num_rdma_bytes` that users may
look at and write to between operations; then signals and words, which they may not. The kernels'
headers (`cuda_src/low_latency/*.cu`) say who writes what. Ranks of other NVLink domains are reached
by RDMA (`peers.cuh`); what a combine sends them is staged behind the signals, in as much memory
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from epjit import env
from epjit.calls import (
    CombineSizes,
    DispatchSizes,
    LowLatencyCombine,
    LowLatencyDispatch,
    Setup,
)
from epjit.checks.match import remember
from epjit.config import MAX_LOW_LATENCY_EXPERTS, MAX_LOW_LATENCY_TOKENS, MAX_RANKS
from epjit.handles import LowLatencyDispatched, LowLatencyHandle, LowLatencySpecs, rows_in
from epjit.kernels.low_latency import (
    NUM_WORDS,
    CleanConfig,
    LowLatencyCombineConfig,
    LowLatencyCombineShape,
    LowLatencyDispatchConfig,
    LowLatencyDispatchShape,
    LowLatencyReducedCombineConfig,
    config_of,
    kernels_of,
)
from epjit.modes.base import Mode
from epjit.runtime.device import num_sms
from epjit.runtime.empty import TensorSpec, matrix
from epjit.runtime.kernel import KernelConfig
from epjit.runtime.launch import Launch
from epjit.runtime.symmetric import SymmetricMemory
from epjit.sizes import align

if TYPE_CHECKING:
    from epjit.scope import AnyScope

# So many low-latency kernels may wait for late peers at once, and less one leave SMs to what runs
# beside them. The blocks that stay (16 of 132) move what comes after a wait of 1 ms or more.
_WAITING_KERNELS = 8

Specs = TypeVar("Specs", LowLatencySpecs, tuple[TensorSpec])


class _Arena:
    """Offsets of the parts of a rank's symmetric memory, in bytes."""

    def __init__(self, num_ranks: int, num_rdma_bytes: int, *, remote: bool = False) -> None:
        self.half_bytes = num_rdma_bytes // 4  # 32-byte aligned, as num_rdma_bytes is 128-byte
        self.send_buffer = num_rdma_bytes // 2  # what zero_copy reads
        self.signals = align(num_rdma_bytes)  # from here on nothing is the user's
        # Up to `entered`, of which there are two for each rank when some are remote.
        num_signals = 4 * MAX_RANKS + max(2 * num_ranks, MAX_RANKS)
        self.meetings = self.signals + align(8 * num_signals)
        self.counts = align(self.meetings + 3 * max(num_ranks, MAX_RANKS) * 8)
        self.counts_stride = MAX_LOW_LATENCY_EXPERTS // num_ranks + 1
        if remote:  # two words before, a bit a token behind
            bits = -(-(MAX_LOW_LATENCY_TOKENS // num_ranks) // 64)
            self.counts_stride = align(2 + self.counts_stride + bits, 16)
        counts_bytes = 2 * num_ranks * self.counts_stride * 8
        self.staged_counts = align(self.counts + counts_bytes)
        self.words = align(self.staged_counts + (counts_bytes if remote else 0))
        self.words_stride = NUM_WORDS
        self.staging = align(self.words + 2 * self.words_stride * 8)
        self.staging_half_bytes = align(num_rdma_bytes // 2) if remote else 0  # as the send buffer
        self.total = self.staging + 2 * self.staging_half_bytes


class _Plan(Generic[Specs]):
    """How calls of one size are launched; made once for each, as they come by the thousand.

    Args:
        launch: Of their kernel.
        grid: Blocks.
        parts: `num_parts`, `push_parts`: see the kernels' parameters.
        sizes: Of the calls.
        num_ranks: `R`.
        outputs: Specs of the tensors that they allocate.

    Attributes:
        launch: As passed.
        grid: As passed.
        outputs: As passed.
        source_tokens: Offset of the first part of the `Routes`, in bytes from `src_info`.
        source_rows: Offset of the second.
        source_weights: Offset of the third.
        takes_sent: Whether a combine takes the weights from there, and not from the caller.
        num_tokens: `T`.
        max_tokens: `M`.
        parts: As passed.
    """

    def __init__(
        self,
        launch: Launch[Any],
        grid: int,
        parts: dict[str, int],
        sizes: DispatchSizes | CombineSizes,
        num_ranks: int,
        outputs: Specs,
    ) -> None:
        self.launch, self.grid = launch, grid
        self.outputs: Specs = outputs
        self.source_tokens = 4 * sizes.num_experts * sizes.max_tokens
        self.source_rows = self.source_tokens + 4 * num_ranks
        choices = num_ranks * sizes.max_tokens * sizes.num_topk
        self.source_weights = self.source_rows + 4 * choices
        config = launch.kernel.config
        self.takes_sent = isinstance(config, LowLatencyReducedCombineConfig) and config.weights_sent
        self.num_tokens, self.max_tokens, self.parts = sizes.num_tokens, sizes.max_tokens, parts


class LowLatency(Mode[LowLatencyDispatchShape | LowLatencyCombineShape]):
    """Everything one rank needs for the low-latency operations of a group.

    Collective: all ranks construct it together.

    Args:
        setup: All that it is made from.

    Attributes:
        memory: The symmetric memory; its first `num_rdma_bytes` are the user's.
        mask: int32 `[R]`, 1 = masked.
    """

    _warmup: ClassVar[str] = "low_latency_warmup"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        settings, group, topology, device, resources = setup
        self._remote, transport = topology.spans_domains, self._transport
        self._is_lost = False  # a peer, when this rank closes
        self._shrink = settings.enable_shrink
        sms = num_sms(device.index)
        self._num_sms = min(env.low_latency_num_sms() or sms, sms)
        self._num_staying = max(1, sms // _WAITING_KERNELS)
        self._arena = _Arena(group.size, settings.num_rdma_bytes, remote=self._remote)
        clean_kernel = self._kernel(CleanConfig(group.size, self._remote))
        if transport is not None:
            self.memory = transport.allocate(self._arena.total)
        else:
            self.memory = SymmetricMemory(
                self._arena.total, group=group, device=device.index, fabric=settings.use_fabric
            )
        resources.callback(self.memory.close)
        self._signals_at = self._arena.signals
        self._counters = self._own_words(3)
        self._decisions = self._own_words(group.size)
        self.mask = self._own_words(group.size)
        domain, pes = topology.domains[topology.domain], [] if transport is None else transport.pes
        self._peers = torch.tensor(
            [domain.index(rank) if rank in domain else -1 - pe for rank, pe in enumerate(pes)],
            dtype=torch.int32,
            device=device,
        )
        self._dispatch_plans: dict[DispatchSizes, _Plan[LowLatencySpecs]] = {}
        self._combine_plans: dict[CombineSizes, _Plan[tuple[TensorSpec]]] = {}
        self._clean = Launch(
            clean_kernel,
            **self._common(),
            **self._reach(),
            meetings=self._everywhere(self._arena.meetings),
            state=self._own_words(1 + 2 * group.size).data_ptr(),
        )
        self._meet(resources)

    def _control(self) -> list[torch.Tensor]:
        """Also the slots: lines in them hold the epoch that they belong to."""
        slots = self.memory.tensor(torch.uint8)[: self._arena.send_buffer]
        return [*super()._control(), slots]

    def _reach(self) -> dict[str, object]:
        """Parameters of the kernels that reach other domains."""
        transport = self._transport
        return {
            "peers": 0 if transport is None else self._peers.data_ptr(),
            "transport": 0 if transport is None else transport.context,
            "local": self._topology.local,
        }

    def _common(self) -> dict[str, object]:
        return {**super()._common(), "mask": self.mask.data_ptr() if self._shrink else 0}

    # ---- launches --------------------------------------------------------------------------------

    def _config(self, shape: LowLatencyDispatchShape | LowLatencyCombineShape) -> KernelConfig:
        return config_of(
            shape, self._group.size, self._arch, remote=self._remote, shrink=self._shrink
        )

    def _bind(self, config: Any) -> Launch[Any]:
        arena = self._arena
        bound = self._common()
        bound.update(
            slots=self._everywhere(0),
            words=self._everywhere(arena.words),
            counters=self._counters.data_ptr(),
            half_bytes=arena.half_bytes,
            words_stride=arena.words_stride,
            num_staying=self._num_staying,
        )
        own = self.memory.ptr if self._remote else 0
        if isinstance(config, LowLatencyDispatchConfig):
            bound.update(
                **self._reach(),
                counts=self._everywhere(arena.counts),
                counts_stride=arena.counts_stride,
                staged_counts=own and own + arena.staged_counts,
                decisions=self._decisions.data_ptr(),
            )
        elif isinstance(config, LowLatencyCombineConfig):
            bound.update(
                **self._reach(),
                staging=own and own + arena.staging,
                staging_half_bytes=arena.staging_half_bytes,
            )
        return Launch(self._kernel(config), **bound)

    def _agree(self, config: KernelConfig, **sizes: int) -> None:
        """With `enable_shrink` a rank may be gone for good, so ranks do not meet."""
        if self._shrink:
            return
        chosen = [str(config), *(f"{name}={size}" for name, size in sizes.items())]
        self._group.agree(
            {f"kernels for {config.op}": ", ".join(chosen)},
            remedy="make the same call on all ranks, with the same environment (above all "
            f"{env.low_latency_combine_variant.name})",
            op=config.op,
        )

    def _configs_on(
        self, arch: str, shapes: Iterable[LowLatencyDispatchShape | LowLatencyCombineShape]
    ) -> Iterable[KernelConfig]:
        return kernels_of(
            shapes,
            num_ranks=self._group.size,
            arch=arch,
            remote=self._remote,
            shrink=self._shrink,
        )

    # ---- operations ------------------------------------------------------------------------------

    def dispatch(
        self, scope: AnyScope, call: LowLatencyDispatch
    ) -> tuple[LowLatencyDispatched, Callable[[], None] | None]:
        """Casts and sends, and receives; `split` puts the second half into the callable."""
        plan = self._dispatch_plans.get(call.sizes)
        if plan is None:
            plan = self._plan_dispatch(call.sizes)
        outputs = LowLatencyDispatched.allocate(plan.outputs, self._empty)
        scope.start()
        x, topk_idx, topk_weights, global_scale, recv_stats, cycles = call.given
        recv_x, recv_scales, recv_count, src_info, layout_range = outputs
        handle = src_info.data_ptr()
        plan.launch.set(
            x=x.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            topk_weights=0 if topk_weights is None else topk_weights.data_ptr(),
            global_scale=0 if global_scale is None else global_scale.data_ptr(),
            recv_x=recv_x.data_ptr(),
            recv_scales=0 if recv_scales is None else recv_scales.data_ptr(),
            recv_count=recv_count.data_ptr(),
            source_tokens=handle + plan.source_tokens,
            source_rows=handle + plan.source_rows,
            source_weights=handle + plan.source_weights,
            src_info=handle,
            layout_range=layout_range.data_ptr(),
            recv_stats=0 if recv_stats is None else recv_stats.data_ptr(),
            wait_cost=0 if cycles is None else cycles.data_ptr(),
            num_tokens=plan.num_tokens,
            max_tokens=plan.max_tokens,
            sends=True,
            receives=not call.split,
            **plan.parts,
        )
        plan.launch.start(scope.stream, plan.grid)
        return outputs, self._rest(plan, scope.stream, (call, outputs)) if call.split else None

    def _plan_dispatch(self, sizes: DispatchSizes) -> _Plan[LowLatencySpecs]:
        """Sending takes a block a token, one the counts; receiving a warp an eighth of a row."""
        if self._transport is not None:
            self._transport.expect(sizes.max_tokens + 1)  # each row, and the counts
        num_ranks = self._group.size
        shape = LowLatencyDispatchShape.of(sizes)
        launch = self.launch(shape, num_max_dispatch_tokens_per_rank=sizes.max_tokens)
        config: LowLatencyDispatchConfig = launch.kernel.config
        num_slots = num_ranks * sizes.max_tokens
        self._check_room(config, num_slots)
        grid = min(self._num_sms, max(sizes.num_tokens + 1, num_slots * 8 // config.num_warps))
        parts = {"num_parts": max(1, min(8, grid * config.num_warps // num_slots))}
        outputs = LowLatencyDispatched.specs(sizes, num_ranks)
        plan = _Plan(launch, grid, parts, sizes, num_ranks, outputs)
        return remember(self._dispatch_plans, sizes, plan)

    def _plan_combine(self, sizes: CombineSizes) -> _Plan[tuple[TensorSpec]]:
        """A warp adds some channels at a time; with few tokens that is all it does."""
        shape = LowLatencyCombineShape.of(sizes)
        launch = self.launch(shape, num_max_dispatch_tokens_per_rank=sizes.max_tokens)
        config: LowLatencyCombineConfig | LowLatencyReducedCombineConfig = launch.kernel.config
        choices = sizes.max_tokens * sizes.num_topk
        if isinstance(config, LowLatencyReducedCombineConfig):
            grid = min(self._num_sms, max(choices // 4, 16))
            parts = {"num_parts": config.num_parts(sizes.max_tokens)}
        else:
            push_parts = config.push_parts(sizes.max_tokens)
            blocks = choices * push_parts // config.num_push_warps  # each of their warps has a row
            grid = min(self._num_sms, max(blocks, 16))
            steps_a_warp = -(-sizes.num_tokens * config.steps // (2 * grid * config.num_warps)) or 1
            parts = {"num_parts": -(-config.steps // steps_a_warp), "push_parts": push_parts}
            self._check_room(config, choices)
        outputs = (matrix(torch.bfloat16, sizes.num_tokens, sizes.hidden),)
        plan = _Plan(launch, grid, parts, sizes, self._group.size, outputs)
        return remember(self._combine_plans, sizes, plan)

    def _check_room(
        self, config: LowLatencyDispatchConfig | LowLatencyCombineConfig, num_slots: int
    ) -> None:
        """Whether a half has room for slots in lines, which are larger than others.

        Raises:
            ValueError: It has not.
        """
        if not config.lines:
            return
        room, needed = self._arena.half_bytes, num_slots * config.slot_bytes + 128
        if needed > room:
            raise ValueError(
                f"{config.op}: {num_slots} slots in lines need num_rdma_bytes >= {4 * needed}, and "
                f"there are {4 * room}; take more, or leave {env.low_latency_dispatch_variant.name}"
                f" and {env.low_latency_combine_variant.name} alone"
            )

    def combine(
        self, scope: AnyScope, call: LowLatencyCombine
    ) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """Pushes rows back and sums them; `split` puts the second half into the callable."""
        sizes = call.sizes
        plan = self._combine_plans.get(sizes)
        if plan is None:
            plan = self._plan_combine(sizes)
        x, topk_idx, topk_weights, out, cycles = call.given
        if sizes.zero_copy:
            x = self.send_buffer(sizes)
        if out is None:
            (out,) = self._empty(plan.outputs)
        scope.start()
        routes = call.src_info.data_ptr()
        weights = routes + plan.source_weights if plan.takes_sent else topk_weights.data_ptr()
        plan.launch.set(
            x=x.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            topk_weights=weights,
            source_tokens=routes + plan.source_tokens,
            source_rows=routes + plan.source_rows,
            out=out.data_ptr(),
            wait_cost=0 if cycles is None else cycles.data_ptr(),
            num_tokens=plan.num_tokens,
            max_tokens=plan.max_tokens,
            sends=True,
            receives=not call.split,
            **plan.parts,
        )
        plan.launch.start(scope.stream, plan.grid)
        return out, self._rest(plan, scope.stream, (call, out)) if call.split else None

    @staticmethod
    def _rest(plan: _Plan[Any], stream: int, tensors: object) -> Callable[[], None]:
        """The launch of the second phase; its other parameters are still set from the first.

        For no other operation of this Buffer can start before. Until then it holds on to `tensors`.
        If it is dropped instead, they are free in the order of `stream`, where the first phase
        runs, and what only the second writes is written by nobody.
        """

        def receive(kept: object = tensors) -> None:
            del kept
            plan.launch.start(stream, plan.grid, {"sends": False, "receives": True})

        return receive

    def send_buffer(self, sizes: CombineSizes | LowLatencyHandle) -> torch.Tensor:
        """Memory that a combine with `zero_copy` reads rows from, see `rows_in`."""
        half = self.memory.tensor(torch.uint8)[self._arena.send_buffer :]
        return rows_in(half, sizes, self._group.size)

    def clean(self, stream: int) -> None:
        """Meets the ranks on the device, and goes on from the latest epoch of all."""
        self._clean(stream, 1)

    # ---- the end --------------------------------------------------------------------------------

    def give_up(self) -> None:
        """Ends the waits of what is queued, as a fault does; what was sent is not waited for."""
        self._is_lost = True
        super().give_up()

    def _wait_for_peers(self) -> bool:
        """Waits for none.

        What peers write here in an operation, this rank waits for in the same one, so nothing is
        on its way to it when its own streams are done.
        """
        self._dispatch_plans.clear()
        self._combine_plans.clear()
        return not (self._is_lost or self._fault.is_set or (self._shrink and bool(self.mask.any())))
