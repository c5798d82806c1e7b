"""Dispatch and combine between NVLink domains: the order of launches, and which array goes where.

A rank has two symmetric memories. The ranks of its domain load and store in the first (`_Arena`:
`num_nvl_bytes` of slots, then words and signals); all ranks reach the second through the transport
(`_Rings`: `num_rdma_bytes` of inboxes and stages, then what rail peers tell each other). Users may
look at and write to the bytes that they asked for between operations. The kernels' headers
(`cuda_src/internode/*`) say who writes what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from epjit.config import MAX_DOMAINS, MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS, MAX_RANKS
from epjit.intranode import copier_shape
from epjit.layout import LayoutConfig
from epjit.normal_mode import (
    SIGNALS_BYTES,
    CombineShape,
    DispatchShape,
    NormalMode,
    Received,
    combine_shape,
    dispatch_shape,
)
from epjit.reference.intranode import Dispatched
from epjit.runtime import variants
from epjit.runtime.device import shared_limit
from epjit.runtime.group import BUFFER, Group
from epjit.runtime.interrupt import interruptible
from epjit.runtime.jit import KernelConfig, Launch
from epjit.runtime.symmetric import SymmetricMemory
from epjit.runtime.transport import make_transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epjit.reference.internode import Handle
    from epjit.runtime.topology import Topology
    from epjit.scope import GpuScope

_SLOT_ALIGNMENT = 128
_FORWARD_WARPS = 2  # kForwardWarps of dispatch.cu
_TOKENS_PER_CHUNK = 4
_MAX_WORDS = 1 << 18  # of all channels into a domain: 2 MB


def _align(value: int, alignment: int = _SLOT_ALIGNMENT) -> int:
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class InternodeNotifyConfig(KernelConfig):
    """What the notify kernel is compiled for."""

    source: ClassVar[str] = "internode/notify.cu"
    op: ClassVar[str] = "notify"
    transport: ClassVar[bool] = True

    num_domains: int
    num_local: int

    @property
    def threads(self) -> int:
        """Threads a block."""
        return 512

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: a sum a warp; the rows of each source for each local rank."""
        return 4 * (self.threads // 32 + (self.num_domains * self.num_local + 1) * self.num_local)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"internode_{self.num_domains}x{self.num_local}"


@dataclass(frozen=True)
class InternodeDispatchConfig(KernelConfig):
    """What the dispatch kernel is compiled for; the fields are explained in dispatch.cu."""

    source: ClassVar[str] = "internode/dispatch.cu"
    op: ClassVar[str] = "dispatch"
    transport: ClassVar[bool] = True

    num_domains: int
    num_local: int
    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool
    tma: bool
    num_copy_warps: int
    num_put_warps: int
    rows_per_warp: int
    tokens_per_chunk: int

    @classmethod
    def choose(
        cls, shape: DispatchShape, *, num_domains: int, num_local: int, variant: str, limit: int
    ) -> InternodeDispatchConfig:
        """The form of the block for `limit` bytes of shared memory."""
        tma = variant != "ldst"
        warps, rows = copier_shape(tma, 14 if tma else 5, shape.hidden_bytes, limit)
        put = 5 if tma else 4
        return cls(num_domains, num_local, *shape, tma, warps, put, rows, _TOKENS_PER_CHUNK)

    @property
    def send_warps(self) -> int:
        """Warps of a block that send tokens first; the others pull from the start."""
        return max(1, self.num_copy_warps * 3 // 4)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return (self.num_copy_warps + self.num_put_warps + _FORWARD_WARPS + 1) * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows on their way, one mbarrier a warp that copies."""
        return self.num_copy_warps * (self.rows_per_warp * self.hidden_bytes + 8) if self.tma else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in a ring."""
        beside = self.num_scales + 2 * self.num_topk + self.num_local + 1
        return _align(self.hidden_bytes + 4 * beside)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return (
            f"internode_{self.num_domains}x{self.num_local}_h{self.hidden_bytes}"
            f"_s{self.num_scales}_k{self.num_topk}"
        )


@dataclass(frozen=True)
class InternodeCombineConfig(KernelConfig):
    """What the combine kernel is compiled for; the fields are explained in combine.cu."""

    source: ClassVar[str] = "internode/combine.cu"
    op: ClassVar[str] = "combine"
    transport: ClassVar[bool] = True

    num_domains: int
    num_local: int
    hidden_bytes: int
    num_topk: int
    is_f16: bool
    tma: bool
    num_warps: int
    num_push_warps: int
    num_sum_warps: int
    num_put_warps: int
    rows_per_warp: int
    tokens_per_chunk: int

    @classmethod
    def choose(
        cls, shape: CombineShape, *, num_domains: int, num_local: int, variant: str, limit: int
    ) -> InternodeCombineConfig:
        """The form of the block for `limit` bytes of shared memory."""
        tma = variant != "ldst"
        push, rows = copier_shape(tma, 4 if tma else 2, shape.hidden_bytes, limit)
        if num_local == 1:
            push, rows = 1, 1  # nothing is pushed
        # Copies through registers, and many rows in hand, need more registers.
        warps, sums, put = (8, 2, 2) if not tma else (20, 4, 4) if num_local <= 2 else (16, 3, 3)
        return cls(
            num_domains, num_local, *shape, tma, warps, push, sums, put, rows, _TOKENS_PER_CHUNK
        )

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows on their way, one mbarrier a pushing warp."""
        return self.num_push_warps * (self.rows_per_warp * self.hidden_bytes + 8) if self.tma else 0

    @property
    def reduce_warps(self) -> int:
        """Warps of a block that reduce from the start."""
        return self.num_warps - self.num_push_warps - self.num_sum_warps - self.num_put_warps

    @property
    def slot_bytes(self) -> int:
        """Bytes of one row in a slot or a ring."""
        return _align(self.hidden_bytes + 4 * self.num_topk)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return (
            f"internode_{self.num_domains}x{self.num_local}_h{self.hidden_bytes}_k{self.num_topk}"
        )


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels of every variant that an architecture can run, over shapes that differ in kind.

    Args:
        arch: Such as ``"sm_90a"``.
    """
    variant = "tma" if variants.runs_on("combine", "tma", arch) else "ldst"
    for num_domains, num_local, row_bytes, num_scales, num_topk in (
        (2, 1, 14336, 0, 8),
        (4, 8, 7168, 56, 8),
        (3, 5, 32768, 0, 32),
        (MAX_DOMAINS, MAX_RANKS, 14336, 0, 0),
    ):
        yield InternodeNotifyConfig(num_domains, num_local)
        yield LayoutConfig(num_domains * num_local, True, num_domains)
        shapes: list[DispatchShape | CombineShape] = [
            DispatchShape(row_bytes, num_scales, num_topk, num_local != 5)
        ]
        if num_scales == 0:
            shapes.append(CombineShape(row_bytes, num_topk, is_f16=num_local == 1))
        for shape in shapes:
            for each in {variant, "ldst" if num_local == 5 else variant}:
                yield _choose(
                    shape,
                    num_domains=num_domains,
                    num_local=num_local,
                    variant=each,
                    limit=shared_limit(arch),
                )


def _choose(
    shape: DispatchShape | CombineShape,
    *,
    num_domains: int,
    num_local: int,
    variant: str,
    limit: int,
) -> InternodeDispatchConfig | InternodeCombineConfig:
    """The kernel of a shape. ``push`` is not told from ``tma``: tokens are pulled here."""
    cut: Any = {
        "num_domains": num_domains,
        "num_local": num_local,
        "variant": variant,
        "limit": limit,
    }
    if isinstance(shape, DispatchShape):
        return InternodeDispatchConfig.choose(shape, **cut)
    return InternodeCombineConfig.choose(shape, **cut)


def _config(
    shape: DispatchShape | CombineShape, num_domains: int, num_local: int, arch: str
) -> InternodeDispatchConfig | InternodeCombineConfig:
    """The kernel of a shape, of the variant that the environment asks for."""
    op = "dispatch" if isinstance(shape, DispatchShape) else "combine"
    return _choose(
        shape,
        num_domains=num_domains,
        num_local=num_local,
        variant=variants.resolve(op, arch),
        limit=shared_limit(arch),
    )


def warmup_configs(
    shapes: Iterable[DispatchShape | CombineShape], *, num_domains: int, num_local: int, arch: str
) -> list[KernelConfig]:
    """Every kernel that a Buffer compiles for these shapes on an architecture.

    Args:
        shapes: From `warmup_shapes`.
        num_domains: NVLink domains, more than one.
        num_local: Ranks of each.
        arch: Such as ``"sm_90a"``.
    """
    configs: list[KernelConfig] = [InternodeNotifyConfig(num_domains, num_local)]
    configs += [LayoutConfig(num_domains * num_local, wide, num_domains) for wide in (True, False)]
    return configs + [_config(shape, num_domains, num_local, arch) for shape in shapes]


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
    """Where the parts of the memory of a domain lie, in bytes from its start."""

    def __init__(self, num_domains: int, num_local: int, num_nvl_bytes: int) -> None:
        self.slots = 0
        self.slots_bytes = num_nvl_bytes
        self.signals = _align(num_nvl_bytes)  # from here on nothing is the user's
        self.done = self.signals + SIGNALS_BYTES
        self.words = _align(self.done + num_domains * num_local * 2 * 8)
        self.total = self.words + _MAX_WORDS * 8


class _Rings:
    """Where the parts of the memory of the transport lie, in bytes from its start."""

    def __init__(self, num_domains: int, num_local: int, num_rdma_bytes: int) -> None:
        self.max_slots = _max_slots(num_domains, num_local)
        self.inbox = 0
        self.bytes = num_rdma_bytes // 2 // _SLOT_ALIGNMENT * _SLOT_ALIGNMENT
        self.stage = self.bytes
        self.control = _align(num_rdma_bytes)  # from here on nothing is the user's
        self.ready = self.control
        self.credits = self.ready + num_domains * 2 * 8
        self.entered = self.credits + num_domains * 2 * 8
        self.notify_arrived = self.entered + num_domains * 2 * 8
        self.arrived = self.notify_arrived + num_domains * 8
        self.staged = self.arrived + num_domains * self.max_slots * 8
        self.notify_inbox = _align(self.staged + num_domains * self.max_slots * 8)
        self.notify_stride = _align(2 + num_local * (1 + MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS), 4)
        self.notify_stage = self.notify_inbox + num_domains * self.notify_stride * 4
        self.total = _align(self.notify_stage + num_domains * self.notify_stride * 4)


class Internode(NormalMode):
    """Everything one rank needs for the operations between NVLink domains.

    Collective: all ranks construct it together.

    Args:
        group: The ranks.
        topology: Their domains, more than one.
        resources: Gets what this makes; its owner closes it, also when this cannot be made.
        num_nvl_bytes: Bytes of slots.
        num_rdma_bytes: Bytes of inboxes and stages.
        device: The GPU of this rank.
        timeout_seconds: Of one wait for a peer.
        use_fabric: Whether peers map memory by fabric handles.
        num_qps_per_rank: Queue pairs to each rank.

    Attributes:
        rdma_memory: Memory that the transport reaches; its first `num_rdma_bytes` are the user's.
    """

    def __init__(
        self,
        group: Group,
        topology: Topology,
        resources: ExitStack,
        *,
        num_nvl_bytes: int,
        num_rdma_bytes: int,
        device: torch.device,
        timeout_seconds: float,
        use_fabric: bool,
        num_qps_per_rank: int,
    ) -> None:
        num_domains, num_local = topology.num_domains, topology.num_local
        super().__init__(
            group,
            resources,
            device=device,
            timeout_seconds=timeout_seconds,
            num_counters=2 + 2 * group.size + 5 * num_domains,
            num_counts=2 + MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS,
        )
        self._topology = topology
        self._arena = _Arena(num_domains, num_local, num_nvl_bytes)
        self._rings = _Rings(num_domains, num_local, num_rdma_bytes)
        self._transport = make_transport(
            group,
            topology,
            device=device.index,
            num_qps_per_rank=num_qps_per_rank,
            use_fabric=use_fabric,
        )
        resources.callback(self._transport.close)
        notify_kernel = self._kernel(
            InternodeNotifyConfig(num_domains, num_local), self._transport.name
        )
        self.rdma_memory = self._transport.allocate(self._rings.total)
        resources.callback(self.rdma_memory.close)
        self.memory = SymmetricMemory(
            self._arena.total,
            group=_DomainGroup(group, topology.domains[topology.domain]),
            device=device.index,
            fabric=use_fabric,
        )
        resources.callback(self.memory.close)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        # What a notify leaves for its dispatch: how many tokens of each channel fit.
        self._fits = torch.zeros((num_domains, num_local), **ints)
        self._ranks = torch.tensor(topology.domains, **ints)
        self._pes = torch.tensor(self._transport.pes, **ints)
        self._notify = Launch(
            notify_kernel,
            **self._common(),
            inbox=self._inboxes(self._rings.notify_inbox),
            stage=self.rdma_memory.ptr + self._rings.notify_stage,
            arrived=self.rdma_memory.ptr + self._rings.notify_arrived,
            notify_stride=self._rings.notify_stride,
            fits=self._fits.data_ptr(),
        )
        torch.cuda.synchronize(device)
        group.barrier()
        resources.callback(self._leave)

    def _inboxes(self, offset: int) -> list[int]:
        """The address of the same part of the transport's memory on every rank of the domain."""
        ranks = self._topology.domains[self._topology.domain]
        pointers = [self.rdma_memory.peer_ptrs[rank] + offset for rank in ranks]
        return pointers + [0] * (MAX_RANKS - len(pointers))

    def _common(self) -> dict[str, object]:
        own = self.rdma_memory.ptr
        return {
            **super()._common(),
            "signals": self._everywhere(self._arena.signals),
            "entered": self._inboxes(self._rings.entered),
            "ready": own + self._rings.ready,
            "ranks": self._ranks.data_ptr(),
            "pes": self._pes.data_ptr(),
            "transport": self._transport.context,
            "domain": self._topology.domain,
            "local": self._topology.local,
        }

    # ---- launches --------------------------------------------------------------------------------

    def _config(self, shape: DispatchShape | CombineShape) -> KernelConfig:
        return _config(shape, self._topology.num_domains, self._topology.num_local, self._arch)

    def _bind(self, shape: DispatchShape | CombineShape, config: Any) -> Launch:
        bound = self._common()
        bound.update(
            words=self._everywhere(self._arena.words),
            done=self._everywhere(self._arena.done),
            credits=self.rdma_memory.ptr + self._rings.credits,
            arrived=self.rdma_memory.ptr + self._rings.arrived,
            staged=self.rdma_memory.ptr + self._rings.staged,
            stage=self.rdma_memory.ptr + self._rings.stage,
            ring_slots=ring_slots(config, 2 * self._rings.bytes),
        )
        if isinstance(config, InternodeCombineConfig):
            bound["slots"] = self._everywhere(self._arena.slots)
            bound["inbox"] = self.rdma_memory.ptr + self._rings.inbox
            bound["num_slots"] = combine_slots(config, self._arena.slots_bytes)
        else:
            bound["inbox"] = self._inboxes(self._rings.inbox)
            bound["fits"] = self._fits.data_ptr()
        return Launch(self._kernel(config, self._transport.name), **bound)

    def _ahead(self, arch: str) -> Iterator[tuple[KernelConfig, str]]:
        num_domains, num_local = self._topology.num_domains, self._topology.num_local
        for config in warmup_configs(
            self._launches, num_domains=num_domains, num_local=num_local, arch=arch
        ):
            yield config, self._transport.name

    # ---- operations ------------------------------------------------------------------------------

    def dispatch(
        self,
        scope: GpuScope,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        num_tokens_per_rank: torch.Tensor,
        num_tokens_per_rdma_rank: torch.Tensor,
        is_token_in_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        *,
        expert_alignment: int,
        num_worst_tokens: int,
        num_sms: int,
    ) -> Dispatched:
        """Notify, then dispatch; the host waits for the counts unless there is a worst case."""
        num_ranks, num_tokens = self._group.size, x.shape[0]
        num_domains, num_local = self._topology.num_domains, self._topology.num_local
        launch = self._dispatch_launch(dispatch_shape(x, scales, topk_idx), num_sms)
        experts_per_rank = num_tokens_per_expert.shape[0] // num_ranks
        with scope.allocating():
            ints: dict[str, Any] = {"dtype": torch.int32, "device": self._device}
            send_tokens = torch.empty((num_domains, num_tokens + 1), **ints)
            channel_tokens = torch.empty((num_domains, num_local), **ints)
            send_head = torch.empty((num_tokens, num_ranks), **ints)
            passing_prefix = torch.empty(num_domains, **ints)
            expert_counts = torch.empty(experts_per_rank, **ints)
            rank_prefix = torch.empty(num_ranks, **ints)
            send_domain_head = torch.empty((num_tokens, num_domains), **ints)
        scope.start()
        waits = num_worst_tokens == 0
        with self._between_kernels():
            self._notify(
                scope.stream,
                1 + num_ranks + num_domains,
                num_tokens_per_rank=num_tokens_per_rank.data_ptr(),
                num_tokens_per_domain=num_tokens_per_rdma_rank.data_ptr(),
                num_tokens_per_expert=num_tokens_per_expert.data_ptr(),
                is_token_in_rank=is_token_in_rank.data_ptr(),
                rank_prefix=rank_prefix.data_ptr(),
                channel_tokens=channel_tokens.data_ptr(),
                passing_prefix=passing_prefix.data_ptr(),
                expert_counts=expert_counts.data_ptr(),
                send_head=send_head.data_ptr(),
                send_domain_head=send_domain_head.data_ptr(),
                send_tokens=send_tokens.data_ptr(),
                host_counts=self._ask_for_counts(waits),
                num_tokens=num_tokens,
                num_recv_rows=num_worst_tokens,
                experts_per_rank=experts_per_rank,
                expert_alignment=expert_alignment,
            )
            num_rows, num_passing = num_worst_tokens, num_local * num_worst_tokens
            per_expert: list[int] = []
            if waits:
                num_rows, num_passing, *per_expert = self._wait_for_counts(2 + experts_per_rank)
            with scope.allocating():
                recv_src_meta = torch.empty((num_rows, 8), dtype=torch.uint8, device=self._device)
                passing = torch.empty(num_passing, **ints)
            handle = (
                is_token_in_rank,
                send_tokens,
                channel_tokens,
                send_head,
                passing_prefix,
                expert_counts,
                rank_prefix,
                recv_src_meta,
                send_domain_head,
                passing,
            )
            received = self._dispatch_rows(
                scope,
                launch,
                x,
                scales,
                topk_idx,
                topk_weights,
                handle,
                experts_per_rank=experts_per_rank,
                num_sms=num_sms,
                fills_handle=True,
            )
        return Dispatched(*received, per_expert, handle)

    def cached_dispatch(
        self,
        scope: GpuScope,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        handle: Handle,
        *,
        num_sms: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Dispatches another payload along the routing of a handle."""
        received = self._dispatch_rows(
            scope,
            self._dispatch_launch(dispatch_shape(x, scales, None), num_sms),
            x,
            scales,
            None,
            None,
            handle,
            experts_per_rank=1,
            num_sms=num_sms,
            fills_handle=False,
        )
        return received.recv_x, received.recv_scales

    def _dispatch_launch(self, shape: DispatchShape, num_sms: int) -> Launch:
        """The launch of a shape, before anything is queued.

        Raises:
            ValueError: The SMs are too few.
        """
        launch = self.launch(shape)
        config = launch.kernel.config
        assert isinstance(config, InternodeDispatchConfig)
        check_warps(config, num_sms)
        return launch

    def _dispatch_rows(
        self,
        scope: GpuScope,
        launch: Launch,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        handle: Handle,
        *,
        experts_per_rank: int,
        num_sms: int,
        fills_handle: bool,
    ) -> Received:
        """Allocates the received rows and queues the dispatch kernel."""
        recv_src_meta, passing = handle[7], handle[9]
        config = launch.kernel.config
        assert isinstance(config, InternodeDispatchConfig)
        forms = self._forms(recv_src_meta.shape[0], x, scales, topk_idx)
        with scope.allocating():
            received = Received(*self._empty(forms))
        scope.start()
        values = {
            **self._inputs(x, scales, topk_idx, topk_weights),
            **self._outputs(received),
            **self._routing(handle),
            "send_head": handle[3].data_ptr(),
            "recv_src_meta": recv_src_meta.data_ptr() if fills_handle else 0,
            "passing": passing.data_ptr() if fills_handle else 0,
            "num_passing": passing.shape[0],
            "num_send_warps": config.send_warps,
            "experts_per_rank": experts_per_rank,
        }
        launch.start(scope.stream, num_sms, values)
        return received

    @staticmethod
    def _routing(handle: Handle) -> dict[str, int]:
        """What dispatch and combine take from a handle."""
        return {
            "send_tokens": handle[1].data_ptr(),
            "channel_tokens": handle[2].data_ptr(),
            "passing_prefix": handle[4].data_ptr(),
            "rank_prefix": handle[6].data_ptr(),
        }

    def combine(
        self,
        scope: GpuScope,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None,
        bias: tuple[torch.Tensor | None, torch.Tensor | None],
        *,
        num_sms: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sums rows inside each domain, sends the sums to the ranks of their tokens."""
        num_tokens = handle[8].shape[0]
        launch = self.launch(combine_shape(x, topk_weights))
        config = launch.kernel.config
        assert isinstance(config, InternodeCombineConfig)
        check_warps(config, num_sms)
        combined, values = self._combined(scope, x, num_tokens, topk_weights, bias)
        scope.start()
        reduce_warps = config.reduce_warps * num_sms
        values |= {
            **self._routing(handle),
            "recv_src_meta": handle[7].data_ptr(),
            "send_domain_head": handle[8].data_ptr(),
            "passing": handle[9].data_ptr(),
            "num_passing": handle[9].shape[0],
            # As inside a domain: with few tokens several warps share the reduction of one.
            "num_parts": max(1, min(4, 6 * reduce_warps // max(num_tokens, 1))),
        }
        launch.start(scope.stream, num_sms, values)
        return combined

    # ---- the end ---------------------------------------------------------------------------------

    def _control(self) -> list[torch.Tensor]:
        return [
            self.memory.tensor(torch.uint8)[self._arena.signals :],
            self.rdma_memory.tensor(torch.uint8)[self._rings.control :],
        ]

    def _drain(self) -> None:
        interruptible(self._transport.quiet)  # all ranks are here
        self._group.barrier(op="reset")

    def _leave(self) -> None:
        super()._leave()
        if not self._is_lost:
            self._transport.quiet()  # the memory may be another Buffer's next


def _max_slots(num_domains: int, num_local: int) -> int:
    return _MAX_WORDS // (num_domains * num_local)


def ring_slots(
    config: InternodeDispatchConfig | InternodeCombineConfig, num_rdma_bytes: int
) -> int:
    """Slots of a ring.

    Raises:
        ValueError: There is no room for two chunks.
    """
    step = 2 * config.tokens_per_chunk
    bytes_a_slot = config.num_domains * config.slot_bytes
    ring_bytes = num_rdma_bytes // 2 // _SLOT_ALIGNMENT * _SLOT_ALIGNMENT
    most = _max_slots(config.num_domains, config.num_local)
    number = min(ring_bytes // bytes_a_slot, most) // step * step
    if number == 0:
        raise ValueError(
            f"{config.op} of {config.hidden_bytes}-byte rows between {config.num_domains} NVLink "
            f"domains needs num_rdma_bytes >= {2 * step * bytes_a_slot}, but this Buffer has "
            f"{num_rdma_bytes}; pass Config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks, "
            f"ranks_per_domain={config.num_local})"
        )
    return number


def combine_slots(config: InternodeCombineConfig, num_nvl_bytes: int) -> int:
    """Slots of a channel for rows on their way inside a domain.

    Raises:
        ValueError: There is no room for two.
    """
    most = _max_slots(config.num_domains, config.num_local)
    if config.num_local == 1:
        return most  # nothing is pushed
    bytes_a_token = config.num_domains * config.num_local * config.slot_bytes
    number = min(num_nvl_bytes // bytes_a_token, most) // 2 * 2
    if number < 2:
        raise ValueError(
            f"combine of {config.hidden_bytes}-byte rows between {config.num_domains} NVLink "
            f"domains of {config.num_local} needs num_nvl_bytes >= {2 * bytes_a_token}, but "
            f"this Buffer has {num_nvl_bytes}; pass "
            "Config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks)"
        )
    return number


def check_warps(config: InternodeDispatchConfig | InternodeCombineConfig, num_sms: int) -> None:
    """Each channel needs warps of its own, or a wait in one could hold up another for ever."""
    others = config.num_domains - 1
    channels = [(others, config.num_put_warps)]
    if isinstance(config, InternodeCombineConfig):
        channels.append((others, config.num_sum_warps))
        channels.append((config.num_domains * (config.num_local - 1), config.num_push_warps))
    needed = max(-(-count // warps) for count, warps in channels)
    if num_sms < needed:
        raise ValueError(
            f"config.num_sms is {num_sms}, but {config.op} of rows of {config.hidden_bytes} bytes "
            f"between {config.num_domains} NVLink domains of {config.num_local} needs {needed}: "
            "each channel has warps of its own"
        )
