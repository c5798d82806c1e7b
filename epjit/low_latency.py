"""Low-latency dispatch and combine: the order of launches, and which array goes where.

Memory of one rank, in one symmetric allocation (`_Arena`): first `num_rdma_bytes` that users may
look at and write to between operations; then signals and words, which they may not. The kernels'
headers (`cuda_src/low_latency/*.cu`) say who writes what. Ranks of other NVLink domains are reached
by RDMA (`peers.cuh`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import torch

from epjit import env
from epjit.check import remember
from epjit.config import (
    MAX_LOW_LATENCY_CHOICES,
    MAX_LOW_LATENCY_EXPERTS,
    MAX_LOW_LATENCY_TOKENS,
    MAX_RANKS,
)
from epjit.formats import BF16, FORMATS, FP8, NVFP4, RowFormat
from epjit.low_latency_checks import CombineCall, DispatchCall, check_source
from epjit.reference.low_latency import (
    DispatchedForms,
    LowLatencyDispatched,
    allocate_dispatched,
    dispatched_forms,
)
from epjit.runtime import variants
from epjit.runtime.device import arch_of, num_sms, shared_limit
from epjit.runtime.empty import Form, empty_on, matrix
from epjit.runtime.fault import FaultRecord, raise_abort
from epjit.runtime.interrupt import interruptible, synchronize
from epjit.runtime.jit import Kernel, KernelConfig, Launch, compile_kernel
from epjit.runtime.symmetric import SymmetricMemory
from epjit.runtime.transport import RemoteMemory, Transport, make_transport

if TYPE_CHECKING:
    from epjit.runtime.group import Group
    from epjit.runtime.topology import Topology
    from epjit.scope import AnyScope

_ALIGNMENT = 128
_LOG_BLOCK = 128  # channels
_CAST_ELEMENTS = 16
_STEP = 256  # channels that a warp adds at a time
# So many low-latency kernels may wait for late peers at once, and less one leave SMs to what runs
# beside them. The blocks that stay (16 of 132) move what comes after a wait of 1 ms or more.
_WAITING_KERNELS = 8
# Of a half: one a token or a choice; for `reduced` one a piece of a row and one a weight.
_NUM_WORDS = max(MAX_LOW_LATENCY_TOKENS, MAX_LOW_LATENCY_CHOICES)

Forms = TypeVar("Forms", DispatchedForms, tuple[Form])

for _variant in (
    # First, so that auto takes it: with two H200s a pair of calls in a graph takes 52.9 us against
    # 53.2 with 128 tokens (BF16: 54.3 against 56.5) and 23.9 against 25.0 with 8.
    variants.Variant("low_latency_combine", "ldst", 80, "rows are pushed by 16-byte stores"),
    variants.Variant("low_latency_combine", "tma", 90, "rows are pushed by TMA bulk copies"),
    variants.Variant(
        "low_latency_combine",
        "reduced",
        80,
        "a rank's rows are summed, and rounded, before they cross",
    ),
):
    variants.register(_variant)


def _align(value: int, alignment: int = _ALIGNMENT) -> int:
    return -(-value // alignment) * alignment


class LowLatencyDispatchShape(NamedTuple):
    """What tells one dispatch kernel of a Buffer from another; the same on all ranks."""

    num_experts: int
    hidden: int
    format: int
    num_topk: int
    topk_is_int64: bool


class LowLatencyCombineShape(NamedTuple):
    """What tells one combine kernel of a Buffer from another; the same on all ranks."""

    num_experts: int
    hidden: int
    num_topk: int
    topk_is_int64: bool
    logfmt: bool


@dataclass(frozen=True)
class LowLatencyDispatchConfig(KernelConfig):
    """What the dispatch kernel is compiled for; the fields are explained in dispatch.cu."""

    source: ClassVar[str] = "low_latency/dispatch.cu"
    op: ClassVar[str] = "dispatch"
    starts_early: ClassVar[bool] = True

    num_ranks: int
    num_experts: int
    hidden: int
    format: int
    num_topk: int
    topk_is_int64: bool
    num_warps: int
    remote: bool = False

    @classmethod
    def choose(
        cls, shape: LowLatencyDispatchShape, *, num_ranks: int, remote: bool = False
    ) -> LowLatencyDispatchConfig:
        """The form of the block: a thread for each 16 channels of a usual row."""
        return cls(num_ranks, *shape, 16, remote)

    @property
    def transport(self) -> bool:  # type: ignore[override]
        """Whether the kernel is linked with a transport."""
        return self.remote

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: a counter for each expert, a few words of the block."""
        a_rank = self.num_ranks if self.remote else MAX_RANKS
        return 4 * (self.num_experts + 2 + 2 * a_rank)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's slot."""
        row_format = FORMATS[self.format]
        scales = _align(row_format.num_scale_bytes(self.hidden), 8)
        return _align(row_format.row_bytes(self.hidden) + scales + 8 * self.num_topk)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        name = FORMATS[self.format].name
        return (
            f"low_latency_{_ranks(self)}_e{self.num_experts}_h{self.hidden}_k{self.num_topk}_{name}"
        )


@dataclass(frozen=True)
class LowLatencyCombineConfig(KernelConfig):
    """What the combine kernel is compiled for; the fields are explained in combine.cu."""

    source: ClassVar[str] = "low_latency/combine.cu"
    op: ClassVar[str] = "combine"
    starts_early: ClassVar[bool] = True

    num_ranks: int
    num_experts: int
    hidden: int
    num_topk: int
    topk_is_int64: bool
    logfmt: bool
    tma: bool
    num_warps: int
    num_push_warps: int
    rows_per_warp: int
    remote: bool = False

    @classmethod
    def choose(
        cls,
        shape: LowLatencyCombineShape,
        *,
        num_ranks: int,
        variant: str,
        limit: int,
        remote: bool = False,
    ) -> LowLatencyCombineConfig:
        """The form of the block for `limit` bytes of shared memory."""
        warps = 20 if shape.num_topk <= 8 else 16  # more rows in hand need more registers
        push, rows = 8, 1
        tma = variant == "tma" and not shape.logfmt
        if tma:
            held = (limit - 8 * push) // (2 * shape.hidden)
            push = min(push, held)
            rows = min(max(held // push, 1), 2)
        return cls(num_ranks, *shape, tma, warps, push, rows, remote)

    @property
    def transport(self) -> bool:  # type: ignore[override]
        """Whether the kernel is linked with a transport."""
        return self.remote

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows on their way, one mbarrier a pushing warp."""
        return self.num_push_warps * (self.rows_per_warp * 2 * self.hidden + 8) if self.tma else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one selection's slot."""
        if not self.logfmt:
            return 2 * self.hidden
        return _align(self.hidden // _CAST_ELEMENTS * 20 + self.hidden // _LOG_BLOCK * 4, 16)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"low_latency_{_ranks(self)}_e{self.num_experts}_h{self.hidden}_k{self.num_topk}"


@dataclass(frozen=True)
class LowLatencyReducedCombineConfig(KernelConfig):
    """What the combine that sums before the links is compiled for; see combine_reduced.cu."""

    source: ClassVar[str] = "low_latency/combine_reduced.cu"
    op: ClassVar[str] = "combine"
    starts_early: ClassVar[bool] = True

    num_ranks: int
    num_experts: int
    hidden: int
    num_topk: int
    topk_is_int64: bool
    num_warps: int

    @classmethod
    def choose(
        cls, shape: LowLatencyCombineShape, *, num_ranks: int
    ) -> LowLatencyReducedCombineConfig:
        """The form of the block: as many warps as registers hold the rows of, one a rank."""
        return cls(num_ranks, *shape[:4], 24 if num_ranks <= 4 else 16)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory."""
        return 0

    def num_parts(self, max_tokens: int) -> int:
        """Pieces of a row, the same on all ranks; each is published by itself, which takes 2 us.

        A pair of calls (four H200s, 128 tokens) takes 61.4 us with 7, 59.2 with 14, 64 with 28.

        Raises:
            ValueError: There is no room for so many weights.
        """
        steps = -(-self.hidden // _STEP)
        steps_a_part = -(-steps // max(1, min(steps, 2048 // max_tokens)))
        num_parts = -(-steps // steps_a_part)
        num_words = self.num_ranks * max_tokens * (num_parts + self.num_topk)
        if num_words > _NUM_WORDS:
            raise ValueError(
                f"low_latency_combine: {env.low_latency_combine_variant.name}=reduced has room for "
                f"{_NUM_WORDS} weights and pieces of rows, but {self.num_ranks} ranks of "
                f"{max_tokens} tokens with top-{self.num_topk} have {num_words}; take fewer tokens "
                "a rank, or ldst or tma"
            )
        return num_parts

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return (
            f"low_latency_reduced_r{self.num_ranks}_e{self.num_experts}_h{self.hidden}"
            f"_k{self.num_topk}"
        )


@dataclass(frozen=True)
class CleanConfig(KernelConfig):
    """What the clean kernel is compiled for."""

    source: ClassVar[str] = "low_latency/clean.cu"
    op: ClassVar[str] = "clean"

    num_ranks: int
    remote: bool = False

    @property
    def transport(self) -> bool:  # type: ignore[override]
        """Whether the kernel is linked with a transport."""
        return self.remote

    @property
    def threads(self) -> int:
        """Threads a block: one a rank, in whole warps."""
        return _align(self.num_ranks, 32)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: a word for each warp, when there are several."""
        return self.threads // 8 if self.threads > 32 else 0

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"low_latency_{_ranks(self)}"


def _ranks(config: LowLatencyDispatchConfig | LowLatencyCombineConfig | CleanConfig) -> str:
    """Names the ranks of a config."""
    return f"r{config.num_ranks}{'_rdma' if config.remote else ''}"


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels of every variant that an architecture can run, over shapes that differ in kind.

    Args:
        arch: Such as ``"sm_90a"``.
    """
    limit = shared_limit(arch)
    formats: tuple[RowFormat, ...]
    for num_ranks in range(1, MAX_RANKS + 1):
        yield CleanConfig(num_ranks)
    for num_ranks, num_experts, hidden, num_topk, formats in (
        (4, 256, 7168, 8, FORMATS),
        (3, 6, 512, 32, (BF16, FP8)),
        (8, 8192, 16384, 8, (BF16, NVFP4)),
        (1, 5, 24, 3, (BF16,)),
    ):
        wide = num_ranks != 3
        for row_format in formats:
            shape = LowLatencyDispatchShape(num_experts, hidden, row_format.code, num_topk, wide)
            yield LowLatencyDispatchConfig.choose(shape, num_ranks=num_ranks)
        for variant in variants.names("low_latency_combine"):
            # The log format has one kernel, whatever the variant.
            for logfmt in (False, True) if variant == "ldst" and hidden != 24 else (False,):
                if variants.runs_on("low_latency_combine", variant, arch):
                    yield _combine_config(
                        LowLatencyCombineShape(num_experts, hidden, num_topk, wide, logfmt),
                        num_ranks=num_ranks,
                        variant=variant,
                        limit=limit,
                    )
    for num_ranks in (2, 16, 40, 256):
        yield CleanConfig(num_ranks, remote=True)
    for num_ranks, num_experts, hidden, num_topk, formats in (
        (4, 256, 7168, 8, (BF16, FP8, NVFP4)),
        (15, 60, 512, 32, (FP8,)),
        (256, 8192, 16384, 8, (BF16,)),
    ):
        wide = num_ranks != 15
        for row_format in formats:
            shape = LowLatencyDispatchShape(num_experts, hidden, row_format.code, num_topk, wide)
            yield LowLatencyDispatchConfig.choose(shape, num_ranks=num_ranks, remote=True)
        for variant in ("ldst", "tma"):
            for logfmt in (False, True) if (variant, num_ranks) == ("ldst", 4) else (False,):
                if variants.runs_on("low_latency_combine", variant, arch):
                    yield LowLatencyCombineConfig.choose(
                        LowLatencyCombineShape(num_experts, hidden, num_topk, wide, logfmt),
                        num_ranks=num_ranks,
                        variant=variant,
                        limit=limit,
                        remote=True,
                    )


def warmup_shapes(
    *,
    hidden: int,
    num_experts: int,
    num_topk: int,
    topk_is_int64: bool,
    row_format: RowFormat,
    use_logfmt: bool = False,
) -> tuple[LowLatencyDispatchShape, LowLatencyCombineShape]:
    """What a Buffer launches for calls of these sizes."""
    return (
        LowLatencyDispatchShape(num_experts, hidden, row_format.code, num_topk, topk_is_int64),
        LowLatencyCombineShape(num_experts, hidden, num_topk, topk_is_int64, use_logfmt),
    )


def warmup_configs(
    shapes: Iterable[LowLatencyDispatchShape | LowLatencyCombineShape],
    *,
    num_ranks: int,
    arch: str,
    remote: bool = False,
) -> Iterator[KernelConfig]:
    """What a Buffer in low-latency mode compiles for these shapes on an architecture.

    Args:
        shapes: Of `warmup_shapes`.
        num_ranks: Of the group.
        arch: Such as ``"sm_90a"``.
        remote: Whether the group spans several NVLink domains.
    """
    yield CleanConfig(num_ranks, remote)
    for shape in shapes:
        yield _config(shape, num_ranks, arch, remote=remote)


class _Arena:
    """Where the parts of a rank's symmetric memory lie, in bytes from its start."""

    def __init__(self, num_ranks: int, num_rdma_bytes: int, *, remote: bool = False) -> None:
        self.half_bytes = num_rdma_bytes // 4  # 32-byte aligned, as num_rdma_bytes is 128-byte
        self.send_buffer = num_rdma_bytes // 2
        self.signals = _align(num_rdma_bytes)  # from here on nothing is the user's
        # Up to `entered`, of which there are two for each rank when some are remote.
        num_signals = 4 * MAX_RANKS + max(2 * num_ranks, MAX_RANKS)
        self.meetings = self.signals + _align(8 * num_signals)
        self.counts = _align(self.meetings + 3 * max(num_ranks, MAX_RANKS) * 8)
        self.counts_stride = MAX_LOW_LATENCY_EXPERTS // num_ranks + 1
        if remote:  # two words before, a bit a token behind
            bits = -(-(MAX_LOW_LATENCY_TOKENS // num_ranks) // 64)
            self.counts_stride = _align(2 + self.counts_stride + bits, 16)
        counts_bytes = 2 * num_ranks * self.counts_stride * 8
        self.staged_counts = _align(self.counts + counts_bytes)
        self.words = _align(self.staged_counts + (counts_bytes if remote else 0))
        self.words_stride = _NUM_WORDS
        self.total = self.words + 2 * self.words_stride * 8


class _Plan(Generic[Forms]):
    """How calls of one size are launched; made once for each, as they come by the thousand.

    Args:
        launch: Of their kernel.
        grid: Blocks.
        num_parts: See the kernels' parameters.
        call: The sizes.
        num_ranks: `R`.
        outputs: What they allocate.

    Attributes:
        launch: As passed.
        grid: As passed.
        outputs: As passed.
        source_tokens: Where the first part of the `Routes` lies, in bytes from `src_info`.
        source_rows: Where the second lies.
        whole: Parameters of a launch of both phases that are the same in every call.
        sends: Those of a launch that only sends.
        receives: Those of a launch that only receives.
    """

    def __init__(
        self,
        launch: Launch,
        grid: int,
        num_parts: int,
        call: DispatchCall | CombineCall,
        num_ranks: int,
        outputs: Forms,
    ) -> None:
        self.launch, self.grid = launch, grid
        self.outputs: Forms = outputs
        self.source_tokens = 4 * call.num_experts * call.max_tokens
        self.source_rows = self.source_tokens + 4 * num_ranks
        sizes: dict[str, Any] = {
            "num_tokens": call.num_tokens,
            "max_tokens": call.max_tokens,
            "num_parts": num_parts,
        }
        self.whole = {**sizes, "sends": True, "receives": True}
        self.sends = {**sizes, "sends": True, "receives": False}
        self.receives = {**sizes, "sends": False, "receives": True}


class LowLatency:
    """Everything one rank needs for the low-latency operations of a group.

    Collective: all ranks construct it together.

    Args:
        group: The ranks.
        topology: Their NVLink domains.
        resources: Gets what this makes; its owner closes it, also when this cannot be made.
        num_rdma_bytes: Bytes of slots and send buffer.
        device: The GPU of this rank.
        timeout_seconds: Of one wait for a peer.
        use_fabric: Whether peers map the memory by fabric handles.
        enable_shrink: Whether a peer that is late is masked.
        num_qps_per_rank: Queue pairs to each rank of another domain.

    Attributes:
        memory: The symmetric memory; its first `num_rdma_bytes` are the user's.
        mask: int32 `[R]`, 1 = masked.
    """

    def __init__(
        self,
        group: Group,
        topology: Topology,
        resources: ExitStack,
        *,
        num_rdma_bytes: int,
        device: torch.device,
        timeout_seconds: float,
        use_fabric: bool,
        enable_shrink: bool,
        num_qps_per_rank: int,
    ) -> None:
        self._group, self._topology = group, topology
        self._remote = topology.num_domains > 1
        self._transport: Transport | None = None
        if self._remote:
            self._transport = make_transport(
                group,
                topology,
                device=device.index,
                num_qps_per_rank=num_qps_per_rank,
                use_fabric=use_fabric,
            )
            resources.callback(self._transport.close)
        self._body = "nvshmem" if self._transport is None else self._transport.name
        self._is_lost = False  # a peer, when this rank closes
        self._most_tokens = 0  # of a rank, that the transport is known to serve
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._shrink = enable_shrink
        self._arch = arch_of(device.index)
        sms = num_sms(device.index)
        self._num_sms = min(env.low_latency_num_sms() or sms, sms)
        self._num_staying = max(1, sms // _WAITING_KERNELS)
        self._arena = _Arena(group.size, num_rdma_bytes, remote=self._remote)
        clean_kernel = self._kernel(CleanConfig(group.size, self._remote))
        self.memory: SymmetricMemory | RemoteMemory
        if self._transport is not None:
            self.memory = self._transport.allocate(self._arena.total)
        else:
            self.memory = SymmetricMemory(
                self._arena.total, group=group, device=device.index, fabric=use_fabric
            )
        resources.callback(self.memory.close)
        # Counters 0..2, epoch 32, abort 33, state of clean from 40; then parts of a word each rank.
        ranks = max(group.size, MAX_RANKS)
        self._words = torch.zeros(48 + 5 * ranks, dtype=torch.int32, device=device)
        self._mask_at, self._decisions_at, self._peers_at = (48 + i * ranks for i in (2, 3, 4))
        self.mask = self._words[self._mask_at :][: group.size]
        self._peers = self._words[self._peers_at :][: group.size]
        if self._transport is not None:
            domain = topology.domains[topology.domain]
            peers = [
                domain.index(rank) if rank in domain else -1 - pe
                for rank, pe in enumerate(self._transport.pes)
            ]
            self._peers.copy_(torch.tensor(peers, dtype=torch.int32, device="cpu"))
        self._fault = FaultRecord()
        resources.callback(self._fault.close)
        self._launches: dict[LowLatencyDispatchShape | LowLatencyCombineShape, Launch] = {}
        self._dispatch_plans: dict[DispatchCall, _Plan[DispatchedForms]] = {}
        self._combine_plans: dict[CombineCall, _Plan[tuple[Form]]] = {}
        self._empty = empty_on(device)
        self._clean = Launch(
            clean_kernel,
            **self._common(),
            **self._reach(),
            meetings=self._everywhere(self._arena.meetings),
            state=self._words[40:].data_ptr(),
        )
        torch.cuda.synchronize(device)
        group.barrier()
        resources.callback(self._leave)

    def _kernel(self, config: KernelConfig) -> Kernel:
        """Compiled and loaded, and linked with the transport when it needs one."""
        return Kernel(config, device=self._device.index, transport=self._body)

    def _everywhere(self, offset: int) -> list[int]:
        """The address of the same part on every rank of this domain."""
        domain = self._topology.domains[self._topology.domain]
        pointers = [self.memory.peer_ptrs[rank] + offset for rank in domain]
        return pointers + [0] * (MAX_RANKS - len(pointers))

    def _reach(self) -> dict[str, object]:
        """Parameters of the kernels that reach other domains."""
        transport = self._transport
        return {
            "peers": 0 if transport is None else self._peers.data_ptr(),
            "transport": 0 if transport is None else transport.context,
            "local": self._topology.local,
        }

    def _common(self) -> dict[str, object]:
        """Parameters that all kernels have."""
        return {
            "signals": self._everywhere(self._arena.signals),
            "epoch": self._words[32:].data_ptr(),
            "abort": self._words[33:].data_ptr(),
            "mask": self.mask.data_ptr() if self._shrink else 0,
            "fault": self._fault.device_ptr,
            "timeout_ns": int(self._timeout_seconds * 1e9),
            "rank": self._group.rank,
        }

    # ---- launches --------------------------------------------------------------------------------

    def launch(
        self, shape: LowLatencyDispatchShape | LowLatencyCombineShape, max_tokens: int
    ) -> Launch:
        """The launch of a shape; collective when it is the first of its kind.

        Raises:
            RuntimeError: It would have to be compiled while a CUDA graph is captured; the ranks
                chose different kernels, or have another `max_tokens` in this call.
            CommunicationError: A rank does not come; names it.
        """
        found = self._launches.get(shape)
        return found if found is not None else self._build(shape, max_tokens)

    def _build(
        self, shape: LowLatencyDispatchShape | LowLatencyCombineShape, max_tokens: int
    ) -> Launch:
        """Compiles and loads, then meets the group: nobody may wait for a peer that compiles.

        With `enable_shrink` a rank may be gone for good, so ranks do not meet.
        """
        config = _config(shape, self._group.size, self._arch, remote=self._remote)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"low_latency_{config.op} needs a kernel for {config} that is not compiled yet, "
                "and nothing can be compiled while a CUDA graph is captured; run the call once "
                "before the capture, or call Buffer.low_latency_warmup()"
            )
        arena = self._arena
        bound = self._common()
        bound.update(
            slots=self._everywhere(0),
            words=self._everywhere(arena.words),
            counters=self._words.data_ptr(),
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
                decisions=self._words[self._decisions_at :].data_ptr(),
            )
        elif isinstance(config, LowLatencyCombineConfig):
            bound.update(**self._reach(), send_buffer=own and own + arena.send_buffer)
        launch = Launch(self._kernel(config), **bound)
        if not self._shrink:
            self._group.agree(
                f"kernels for low_latency_{config.op}",
                f"{config}, num_max_dispatch_tokens_per_rank={max_tokens}",
                remedy="make the same call on all ranks, with the same environment (above all "
                f"{env.low_latency_combine_variant.name})",
                op=f"low_latency_{config.op}",
            )
        self._launches[shape] = launch
        return launch

    def warmup(
        self,
        *,
        max_tokens: int,
        hidden: int,
        num_experts: int,
        num_topk: int,
        topk_is_int64: bool,
        row_format: RowFormat,
        use_logfmt: bool,
        archs: Iterable[str],
    ) -> None:
        """Compiles and loads the kernels of these sizes; compiles them for `archs` as well."""
        shapes = warmup_shapes(
            hidden=hidden,
            num_experts=num_experts,
            num_topk=num_topk,
            topk_is_int64=topk_is_int64,
            row_format=row_format,
            use_logfmt=use_logfmt,
        )
        for shape in shapes:
            self.launch(shape, max_tokens)
        for arch in archs:
            for config in warmup_configs(
                shapes, num_ranks=self._group.size, arch=arch, remote=self._remote
            ):
                compile_kernel(config, arch=arch, transport=self._body)

    # ---- operations ------------------------------------------------------------------------------

    def dispatch(
        self,
        scope: AnyScope,
        call: DispatchCall,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        *,
        global_scale: torch.Tensor | None,
        recv_stats: torch.Tensor | None,
        wait_cost: torch.Tensor | None,
        split: bool,
    ) -> tuple[LowLatencyDispatched, Callable[[], None] | None]:
        """Casts and sends, and receives; `split` puts the second half into the callable."""
        plan = self._dispatch_plans.get(call)
        if plan is None:
            plan = self._plan_dispatch(call)
        outputs = allocate_dispatched(plan.outputs, self._empty)
        scope.start()
        recv_x, recv_scales, recv_count, src_info, layout_range = outputs
        handle = src_info.data_ptr()
        values = {
            "x": x.data_ptr(),
            "topk_idx": topk_idx.data_ptr(),
            "global_scale": 0 if global_scale is None else global_scale.data_ptr(),
            "recv_x": recv_x.data_ptr(),
            "recv_scales": 0 if recv_scales is None else recv_scales.data_ptr(),
            "recv_count": recv_count.data_ptr(),
            "source_tokens": handle + plan.source_tokens,
            "source_rows": handle + plan.source_rows,
            "src_info": handle,
            "layout_range": layout_range.data_ptr(),
            "recv_stats": 0 if recv_stats is None else recv_stats.data_ptr(),
            "wait_cost": 0 if wait_cost is None else wait_cost.data_ptr(),
        }
        if split:
            tensors = (x, topk_idx, global_scale, recv_stats, wait_cost, outputs)
            return outputs, self._split(plan, scope.stream, values, tensors)
        plan.launch.start(scope.stream, plan.grid, values, plan.whole)
        return outputs, None

    def _plan_dispatch(self, call: DispatchCall) -> _Plan[DispatchedForms]:
        """Sending takes a block a token, one the counts; receiving a warp an eighth of a row."""
        if self._transport is not None and call.max_tokens > self._most_tokens:
            self._transport.check_queues(call.max_tokens)
            self._most_tokens = call.max_tokens
        row_format, num_ranks = call.row_format, self._group.size
        launch = self.launch(
            LowLatencyDispatchShape(
                call.num_experts, call.hidden, row_format.code, call.num_topk, call.topk_is_int64
            ),
            call.max_tokens,
        )
        config = launch.kernel.config
        assert isinstance(config, LowLatencyDispatchConfig)
        num_slots = num_ranks * call.max_tokens
        grid = min(self._num_sms, max(call.num_tokens + 1, num_slots * 8 // config.num_warps))
        num_parts = max(1, min(8, grid * config.num_warps // num_slots))
        outputs = dispatched_forms(
            row_format,
            num_ranks=num_ranks,
            num_tokens=call.num_tokens,
            max_tokens=call.max_tokens,
            num_experts=call.num_experts,
            num_topk=call.num_topk,
            hidden=call.hidden,
        )
        plan = _Plan(launch, grid, num_parts, call, self._group.size, outputs)
        return remember(self._dispatch_plans, call, plan)

    def _plan_combine(self, call: CombineCall) -> _Plan[tuple[Form]]:
        """A warp adds some channels at a time; with few tokens that is all it does."""
        launch = self.launch(
            LowLatencyCombineShape(
                call.num_experts, call.hidden, call.num_topk, call.topk_is_int64, call.use_logfmt
            ),
            call.max_tokens,
        )
        config = launch.kernel.config
        assert isinstance(config, LowLatencyCombineConfig | LowLatencyReducedCombineConfig)
        grid = min(self._num_sms, max(call.max_tokens * call.num_topk // 4, 16))
        if isinstance(config, LowLatencyReducedCombineConfig):
            num_parts = config.num_parts(call.max_tokens)
        else:
            steps = -(-call.hidden // _STEP)
            steps_a_warp = -(-call.num_tokens * steps // (2 * grid * config.num_warps)) or 1
            num_parts = -(-steps // steps_a_warp)
        outputs = (matrix(torch.bfloat16, call.num_tokens, call.hidden),)
        plan = _Plan(launch, grid, num_parts, call, self._group.size, outputs)
        return remember(self._combine_plans, call, plan)

    def combine(
        self,
        scope: AnyScope,
        call: CombineCall,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        src_info: torch.Tensor,
        *,
        out: torch.Tensor | None,
        wait_cost: torch.Tensor | None,
        split: bool,
    ) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """Pushes rows back and sums them; `split` puts the second half into the callable."""
        plan = self._combine_plans.get(call)
        if plan is None:
            plan = self._plan_combine(call)
        if call.zero_copy:
            x = self.send_buffer(
                num_experts=call.num_experts, max_tokens=call.max_tokens, hidden=call.hidden
            )
        elif self._remote:
            self._check_source(x, use_logfmt=call.use_logfmt)
        if out is None:
            (out,) = self._empty(plan.outputs)
        scope.start()
        routes = src_info.data_ptr()
        values = {
            "x": x.data_ptr(),
            "topk_idx": topk_idx.data_ptr(),
            "topk_weights": topk_weights.data_ptr(),
            "source_tokens": routes + plan.source_tokens,
            "source_rows": routes + plan.source_rows,
            "out": out.data_ptr(),
            "wait_cost": 0 if wait_cost is None else wait_cost.data_ptr(),
        }
        if split:
            tensors = (x, topk_idx, topk_weights, src_info, out, wait_cost)
            return out, self._split(plan, scope.stream, values, tensors)
        plan.launch.start(scope.stream, plan.grid, values, plan.whole)
        return out, None

    def _check_source(self, x: torch.Tensor, *, use_logfmt: bool) -> None:
        """Between domains rows are staged in the send buffer, and must not lie there already.

        Unless each lies where it would be staged.
        """
        begin = self.memory.ptr + self._arena.send_buffer
        check_source(x, begin, self.memory.ptr + self._arena.signals, use_logfmt=use_logfmt)

    @staticmethod
    def _split(
        plan: _Plan[Any], stream: int, values: dict[str, int], tensors: object
    ) -> Callable[[], None]:
        """A launch of the first phase; what is returned launches the second.

        Until then it holds on to `tensors`. If it is dropped instead, they are free in the order of
        `stream`, where the first phase runs, and what only the second writes is written by nobody.
        """
        plan.launch.start(stream, plan.grid, values, plan.sends)

        def receive(kept: object = tensors) -> None:
            del kept
            plan.launch.start(stream, plan.grid, values, plan.receives)

        return receive

    def send_buffer(self, *, num_experts: int, max_tokens: int, hidden: int) -> torch.Tensor:
        """The buffer that a combine with `zero_copy` reads, bf16 `[E // R, R * M, H]`."""
        num_ranks = self._group.size
        shape = (num_experts // num_ranks, num_ranks * max_tokens, hidden)
        nbytes = 2 * num_experts * max_tokens * hidden
        begin = self._arena.send_buffer
        whole = self.memory.tensor(torch.uint8)
        return whole[begin : begin + nbytes].view(torch.bfloat16).view(shape)

    def clean(self, stream: int) -> None:
        """Meets the ranks on the device, and goes on from the latest epoch of all."""
        self._clean(stream, 1)

    # ---- faults, the end -------------------------------------------------------------------------

    def raise_fault(self) -> None:
        """Raises what a wait on the device left behind.

        Raises:
            CommunicationError: Names operation, rank and peer.
        """
        self._fault.raise_if_set()

    def reset(self) -> None:
        """Forgets everything that was under way; collective."""
        synchronize(self._device)
        self._group.reset()
        if self._transport is not None:
            interruptible(self._transport.quiet)  # what is on its way must not come after the zeros
            self._group.barrier(op="reset")
        self.memory.tensor(torch.uint8)[self._arena.signals :].zero_()
        self._words[: self._peers_at].zero_()
        torch.cuda.synchronize(self._device)
        self._fault.clear()
        self._group.barrier(op="reset")

    def give_up(self) -> None:
        """Ends the waits of what is queued, as a fault does; what was sent is not waited for."""
        self._is_lost = True
        raise_abort(self._words[33:].data_ptr(), self._device.index)

    def _leave(self) -> None:
        """Waits for what this rank has queued and sent; not collective.

        What peers write here in an operation, this rank waits for in the same one, so nothing is
        on its way to it when its own streams are done. What it has sent to other domains may be:
        the memory is not given away before that has left, unless a peer was lost.
        """
        torch.cuda.synchronize(self._device)
        self._dispatch_plans.clear()
        self._combine_plans.clear()
        self._launches.clear()
        if self._transport is None or self._is_lost or self._fault.is_set:
            return
        if not (self._shrink and bool(self.mask.any())):
            self._transport.quiet()


def _config(
    shape: LowLatencyDispatchShape | LowLatencyCombineShape,
    num_ranks: int,
    arch: str,
    *,
    remote: bool,
) -> LowLatencyDispatchConfig | LowLatencyCombineConfig | LowLatencyReducedCombineConfig:
    """The kernel of a shape for an architecture, of the variant that the environment asks for."""
    if isinstance(shape, LowLatencyDispatchShape):
        return LowLatencyDispatchConfig.choose(shape, num_ranks=num_ranks, remote=remote)
    variant, limit = variants.resolve("low_latency_combine", arch), shared_limit(arch)
    if remote:
        return LowLatencyCombineConfig.choose(
            shape, num_ranks=num_ranks, variant=variant, limit=limit, remote=True
        )
    return _combine_config(shape, num_ranks=num_ranks, variant=variant, limit=limit)


def _combine_config(
    shape: LowLatencyCombineShape, *, num_ranks: int, variant: str, limit: int
) -> LowLatencyCombineConfig | LowLatencyReducedCombineConfig:
    """The log format is not added up before it travels: it would have to be encoded anew."""
    if variant == "reduced" and not shape.logfmt:
        return LowLatencyReducedCombineConfig.choose(shape, num_ranks=num_ranks)
    return LowLatencyCombineConfig.choose(shape, num_ranks=num_ranks, variant=variant, limit=limit)
