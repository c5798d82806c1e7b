"""Low-latency dispatch and combine: the order of launches, and which array goes where.

Memory of one rank, in one symmetric allocation (`_Arena`): first `num_rdma_bytes` that users may
look at and write to between operations; then signals and words, which they may not. The kernels'
headers (`cuda_src/low_latency/*.cu`) say who writes what.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from epjit import env
from epjit.config import (
    MAX_LOW_LATENCY_CHOICES,
    MAX_LOW_LATENCY_EXPERTS,
    MAX_LOW_LATENCY_TOKENS,
    MAX_RANKS,
)
from epjit.formats import BF16, FORMATS, FP8, NVFP4, RowFormat
from epjit.reference.low_latency import LowLatencyDispatched, allocate_dispatched
from epjit.runtime import variants
from epjit.runtime.device import arch_of, num_sms, shared_limit
from epjit.runtime.fault import FaultRecord
from epjit.runtime.jit import Kernel, KernelConfig, Launch, compile_kernel
from epjit.runtime.symmetric import SymmetricMemory

if TYPE_CHECKING:
    from epjit.runtime.group import Group
    from epjit.scope import AnyScope

_ALIGNMENT = 128
_SIGNALS_BYTES = 512
_MEETINGS_BYTES = 3 * MAX_RANKS * 8
_LOG_BLOCK = 128  # channels
_CAST_ELEMENTS = 16
_MOST_PLANS = 4096

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

    num_ranks: int
    num_experts: int
    hidden: int
    format: int
    num_topk: int
    topk_is_int64: bool
    num_warps: int

    @classmethod
    def choose(cls, shape: LowLatencyDispatchShape, *, num_ranks: int) -> LowLatencyDispatchConfig:
        """The form of the block: a thread for each 16 channels of a usual row."""
        return cls(num_ranks, *shape, 16)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: a counter for each expert, a few words of the block."""
        return 4 * (self.num_experts + 2 + 2 * MAX_RANKS)

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
            f"low_latency_r{self.num_ranks}_e{self.num_experts}_h{self.hidden}_k{self.num_topk}"
            f"_{name}"
        )


@dataclass(frozen=True)
class LowLatencyCombineConfig(KernelConfig):
    """What the combine kernel is compiled for; the fields are explained in combine.cu."""

    source: ClassVar[str] = "low_latency/combine.cu"
    op: ClassVar[str] = "combine"

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

    @classmethod
    def choose(
        cls, shape: LowLatencyCombineShape, *, num_ranks: int, variant: str, limit: int
    ) -> LowLatencyCombineConfig:
        """The form of the block for `limit` bytes of shared memory."""
        warps = 20 if shape.num_topk <= 8 else 16  # more rows in hand need more registers
        push, rows = 8, 1
        tma = variant == "tma" and not shape.logfmt
        if tma:
            held = (limit - 8 * push) // (2 * shape.hidden)
            push = min(push, held)
            rows = min(max(held // push, 1), 2)
        return cls(num_ranks, *shape, tma, warps, push, rows)

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
        return f"low_latency_r{self.num_ranks}_e{self.num_experts}_h{self.hidden}_k{self.num_topk}"


@dataclass(frozen=True)
class LowLatencyReducedCombineConfig(KernelConfig):
    """What the combine that sums before the links is compiled for; see combine_reduced.cu."""

    source: ClassVar[str] = "low_latency/combine_reduced.cu"
    op: ClassVar[str] = "combine"

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
        """The form of the block; the rows stay in registers."""
        return cls(num_ranks, *shape[:4], 16)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory."""
        return 0

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

    @property
    def threads(self) -> int:
        """Threads a block: one warp."""
        return 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory."""
        return 0

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"low_latency_r{self.num_ranks}"


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels of every variant that an architecture can run, over shapes that differ in kind.

    Args:
        arch: Such as ``"sm_90a"``.
    """
    limit = shared_limit(arch)
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
    shapes: Iterable[LowLatencyDispatchShape | LowLatencyCombineShape], *, num_ranks: int, arch: str
) -> Iterator[KernelConfig]:
    """What a Buffer in low-latency mode compiles for these shapes on an architecture."""
    yield CleanConfig(num_ranks)
    for shape in shapes:
        yield _config(shape, num_ranks, arch)


class _Arena:
    """Where the parts of a rank's symmetric memory lie, in bytes from its start."""

    def __init__(self, num_ranks: int, num_rdma_bytes: int) -> None:
        self.half_bytes = num_rdma_bytes // 4  # 32-byte aligned, as num_rdma_bytes is 128-byte
        self.send_buffer = num_rdma_bytes // 2
        self.signals = _align(num_rdma_bytes)  # from here on nothing is the user's
        self.meetings = self.signals + _SIGNALS_BYTES
        self.counts = _align(self.meetings + _MEETINGS_BYTES)
        self.counts_stride = MAX_LOW_LATENCY_EXPERTS // num_ranks + 1
        self.words = _align(self.counts + 2 * num_ranks * self.counts_stride * 8)
        self.words_stride = max(MAX_LOW_LATENCY_TOKENS, MAX_LOW_LATENCY_CHOICES)
        self.total = self.words + 2 * self.words_stride * 8


class _Plan(NamedTuple):
    """How calls of one size are launched; made once for each, as they come by the thousand."""

    launch: Launch
    grid: int
    num_parts: int


class LowLatency:
    """Everything one rank needs for the low-latency operations of one NVLink domain.

    Collective: all ranks construct it together.

    Args:
        group: The ranks.
        num_rdma_bytes: Bytes of slots and send buffer.
        device: The GPU of this rank.
        timeout_seconds: Of one wait for a peer.
        use_fabric: Whether peers map the memory by fabric handles.
        enable_shrink: Whether a peer that is late is masked.

    Attributes:
        memory: The symmetric memory; its first `num_rdma_bytes` are the user's.
        mask: int32 `[R]`, 1 = masked.
    """

    def __init__(
        self,
        group: Group,
        *,
        num_rdma_bytes: int,
        device: torch.device,
        timeout_seconds: float,
        use_fabric: bool,
        enable_shrink: bool,
    ) -> None:
        self._group = group
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._shrink = enable_shrink
        self._arch = arch_of(device.index)
        self._num_sms = min(env.low_latency_num_sms() or MAX_RANKS << 10, num_sms(device.index))
        self._arena = _Arena(group.size, num_rdma_bytes)
        clean_kernel = Kernel(CleanConfig(group.size), device=device.index)
        self.memory = SymmetricMemory(
            self._arena.total, group=group, device=device.index, fabric=use_fabric
        )
        # Counters 0..2, epoch 32, abort 33, state of clean 40..48, mask 56..63, decisions 64..71.
        self._local = torch.zeros(72, dtype=torch.int32, device=device)
        self.mask = self._local[56 : 56 + group.size]
        self._fault = FaultRecord()
        self._launches: dict[LowLatencyDispatchShape | LowLatencyCombineShape, Launch] = {}
        self._plans: dict[Hashable, _Plan] = {}
        self._clean = Launch(
            clean_kernel,
            **self._common(),
            meetings=self._everywhere(self._arena.meetings),
            state=self._local[40:].data_ptr(),
        )
        torch.cuda.synchronize(device)
        group.barrier()

    def _everywhere(self, offset: int) -> list[int]:
        """The address of the same part on every rank."""
        pointers = [pointer + offset for pointer in self.memory.peer_ptrs]
        return pointers + [0] * (MAX_RANKS - len(pointers))

    def _common(self) -> dict[str, object]:
        """Parameters that all kernels have."""
        return {
            "signals": self._everywhere(self._arena.signals),
            "epoch": self._local[32:].data_ptr(),
            "abort": self._local[33:].data_ptr(),
            "mask": self.mask.data_ptr() if self._shrink else 0,
            "fault": self._fault.device_ptr,
            "timeout_ns": int(self._timeout_seconds * 1e9),
            "rank": self._group.rank,
        }

    # ---- launches --------------------------------------------------------------------------------

    def launch(self, shape: LowLatencyDispatchShape | LowLatencyCombineShape) -> Launch:
        """The launch of a shape; collective when it is the first of its kind.

        Raises:
            RuntimeError: It would have to be compiled while a CUDA graph is captured.
            CommunicationError: A rank does not come; names it.
        """
        found = self._launches.get(shape)
        return found if found is not None else self._build(shape)

    def _build(self, shape: LowLatencyDispatchShape | LowLatencyCombineShape) -> Launch:
        """Compiles and loads, then meets the group: nobody may wait for a peer that compiles.

        With `enable_shrink` a rank may be gone for good, so ranks do not meet.
        """
        config = _config(shape, self._group.size, self._arch)
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
            counters=self._local.data_ptr(),
            half_bytes=arena.half_bytes,
            words_stride=arena.words_stride,
        )
        if isinstance(config, LowLatencyDispatchConfig):
            bound.update(
                counts=self._everywhere(arena.counts),
                counts_stride=arena.counts_stride,
                decisions=self._local[64:].data_ptr(),
            )
        launch = Launch(Kernel(config, device=self._device.index), **bound)
        if not self._shrink:
            self._group.barrier()
        self._launches[shape] = launch
        return launch

    def warmup(
        self,
        *,
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
            self.launch(shape)
        for arch in archs:
            for config in warmup_configs(shapes, num_ranks=self._group.size, arch=arch):
                compile_kernel(config, arch=arch)

    # ---- operations ------------------------------------------------------------------------------

    def dispatch(
        self,
        scope: AnyScope,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        *,
        max_tokens: int,
        num_experts: int,
        row_format: RowFormat,
        global_scale: torch.Tensor | None,
        recv_stats: torch.Tensor | None,
        wait_cost: torch.Tensor | None,
        split: bool,
    ) -> tuple[LowLatencyDispatched, Callable[[], None] | None]:
        """Casts and sends, and receives; `split` puts the second half into the callable."""
        num_tokens, hidden = x.shape
        num_ranks, num_topk = self._group.size, topk_idx.shape[1]
        key = (x.shape, num_topk, topk_idx.dtype, max_tokens, num_experts, row_format.code)
        plan = self._plans.get(key)
        if plan is None:
            shape = LowLatencyDispatchShape(
                num_experts, hidden, row_format.code, num_topk, topk_idx.dtype == torch.int64
            )
            plan = self._keep(key, self._plan_dispatch(shape, num_tokens, max_tokens))
        with scope.allocating():
            outputs = allocate_dispatched(
                row_format,
                num_ranks=num_ranks,
                max_tokens=max_tokens,
                num_experts=num_experts,
                num_topk=num_topk,
                hidden=hidden,
                device=self._device,
            )
        scope.start()
        routes = _address_of_routes(outputs.src_info)
        values = {
            "x": x.data_ptr(),
            "topk_idx": topk_idx.data_ptr(),
            "global_scale": _pointer(global_scale),
            "recv_x": outputs.recv_x.data_ptr(),
            "recv_scales": _pointer(outputs.recv_scales),
            "recv_count": outputs.recv_count.data_ptr(),
            "source_tokens": routes,
            "source_rows": routes + 4 * num_ranks,
            "src_info": outputs.src_info.data_ptr(),
            "layout_range": outputs.layout_range.data_ptr(),
            "recv_stats": _pointer(recv_stats),
            "wait_cost": _pointer(wait_cost),
            "num_tokens": num_tokens,
            "max_tokens": max_tokens,
            "num_parts": plan.num_parts,
        }
        tensors = (x, topk_idx, global_scale, recv_stats, wait_cost, outputs)
        return outputs, self._run(plan, scope.stream, values, tensors, split=split)

    def _plan_dispatch(
        self, shape: LowLatencyDispatchShape, num_tokens: int, max_tokens: int
    ) -> _Plan:
        """Sending takes a block a token, one the counts; receiving a warp an eighth of a row."""
        launch = self.launch(shape)
        config = launch.kernel.config
        assert isinstance(config, LowLatencyDispatchConfig)
        num_slots = self._group.size * max_tokens
        grid = min(self._num_sms, max(num_tokens + 1, num_slots * 8 // config.num_warps))
        num_parts = max(1, min(8, grid * config.num_warps // num_slots))
        return _Plan(launch, grid, num_parts)

    def _plan_combine(
        self, shape: LowLatencyCombineShape, num_tokens: int, max_tokens: int
    ) -> _Plan:
        """A warp adds 256 channels at a time; with few tokens that is all it does."""
        launch = self.launch(shape)
        config = launch.kernel.config
        assert isinstance(config, LowLatencyCombineConfig | LowLatencyReducedCombineConfig)
        grid = min(self._num_sms, max(max_tokens * shape.num_topk // 4, 16))
        steps = -(-shape.hidden // 256)
        if isinstance(config, LowLatencyReducedCombineConfig):
            # The same on all ranks. Each piece is published by itself, which takes 2 us and more.
            num_parts = max(1, min(steps, 1024 // max_tokens))
        else:
            steps_a_warp = -(-num_tokens * steps // (2 * grid * config.num_warps)) or 1
            num_parts = -(-steps // steps_a_warp)
        return _Plan(launch, grid, num_parts)

    def _keep(self, key: Hashable, plan: _Plan) -> _Plan:
        """Remembers a plan; sizes that come and go do not pile up."""
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[key] = plan
        return plan

    def combine(
        self,
        scope: AnyScope,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        src_info: torch.Tensor,
        *,
        max_tokens: int,
        num_experts: int,
        use_logfmt: bool,
        zero_copy: bool,
        out: torch.Tensor | None,
        wait_cost: torch.Tensor | None,
        split: bool,
    ) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """Pushes rows back and sums them; `split` puts the second half into the callable."""
        num_tokens, num_topk = topk_idx.shape
        hidden = x.shape[2]
        key = (x.shape, topk_idx.shape, topk_idx.dtype, max_tokens, num_experts, use_logfmt)
        plan = self._plans.get(key)
        if plan is None:
            shape = LowLatencyCombineShape(
                num_experts, hidden, num_topk, topk_idx.dtype == torch.int64, use_logfmt
            )
            plan = self._keep(key, self._plan_combine(shape, num_tokens, max_tokens))
        if zero_copy:
            x = self.send_buffer(num_experts=num_experts, max_tokens=max_tokens, hidden=hidden)
        with scope.allocating():
            if out is None:
                out = torch.empty((num_tokens, hidden), dtype=torch.bfloat16, device=self._device)
        scope.start()
        routes = _address_of_routes(src_info)
        values = {
            "x": x.data_ptr(),
            "topk_idx": topk_idx.data_ptr(),
            "topk_weights": topk_weights.data_ptr(),
            "source_tokens": routes,
            "source_rows": routes + 4 * self._group.size,
            "out": out.data_ptr(),
            "wait_cost": _pointer(wait_cost),
            "num_tokens": num_tokens,
            "max_tokens": max_tokens,
            "num_parts": plan.num_parts,
        }
        tensors = (x, topk_idx, topk_weights, src_info, out, wait_cost)
        return out, self._run(plan, scope.stream, values, tensors, split=split)

    @staticmethod
    def _run(
        plan: _Plan,
        stream: int,
        values: dict[str, int],
        tensors: object,
        *,
        split: bool,
    ) -> Callable[[], None] | None:
        """One launch of both phases, or one of the first and a callable that launches the second.

        The callable holds on to `tensors`.
        """
        plan.launch.start(stream, plan.grid, values | {"sends": True, "receives": not split})
        if not split:
            return None

        def receive(kept: object = tensors) -> None:
            del kept
            plan.launch.start(stream, plan.grid, values | {"sends": False, "receives": True})

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
        torch.cuda.synchronize(self._device)
        self._group.reset()
        self.memory.tensor(torch.uint8)[self._arena.signals :].zero_()
        self._local.zero_()
        torch.cuda.synchronize(self._device)
        self._fault.clear()
        self._group.barrier()

    def close(self) -> None:
        """Frees the memory; not collective.

        What peers write here in an operation, this rank waits for in the same one, so nothing is
        on its way when its own streams are done.
        """
        torch.cuda.synchronize(self._device)
        self._plans.clear()
        self._launches.clear()
        del self._clean
        self.memory.close()
        self._fault.close()


def _config(
    shape: LowLatencyDispatchShape | LowLatencyCombineShape, num_ranks: int, arch: str
) -> LowLatencyDispatchConfig | LowLatencyCombineConfig | LowLatencyReducedCombineConfig:
    """The kernel of a shape for an architecture, of the variant that the environment asks for."""
    if isinstance(shape, LowLatencyDispatchShape):
        return LowLatencyDispatchConfig.choose(shape, num_ranks=num_ranks)
    return _combine_config(
        shape,
        num_ranks=num_ranks,
        variant=variants.resolve("low_latency_combine", arch),
        limit=shared_limit(arch),
    )


def _combine_config(
    shape: LowLatencyCombineShape, *, num_ranks: int, variant: str, limit: int
) -> LowLatencyCombineConfig | LowLatencyReducedCombineConfig:
    """The log format is not added up before it travels: it would have to be encoded anew."""
    if variant == "reduced" and not shape.logfmt:
        return LowLatencyReducedCombineConfig.choose(shape, num_ranks=num_ranks)
    return LowLatencyCombineConfig.choose(shape, num_ranks=num_ranks, variant=variant, limit=limit)


def _address_of_routes(src_info: torch.Tensor) -> int:
    """Where the `Routes` lie behind `src_info`: tokens of each rank, then rows."""
    return src_info.data_ptr() + 4 * src_info.numel()


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
