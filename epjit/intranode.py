"""Dispatch and combine inside one NVLink domain: the order of launches, and which array goes where.

Memory of one rank, in one symmetric allocation (`_Arena`): first `num_nvl_bytes` of slots, which
users may look at and write to between operations; then words, signals and counts, which they may
not. The kernels' headers (`cuda_src/intranode/*.cu`) say who writes what.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from epjit import env, tuned
from epjit.config import MAX_LOCAL_EXPERTS, MAX_RANKS
from epjit.errors import CommunicationError
from epjit.layout import LayoutConfig
from epjit.reference.intranode import Dispatched, Handle
from epjit.runtime import variants
from epjit.runtime.device import arch_of, shared_limit
from epjit.runtime.fault import FaultRecord
from epjit.runtime.host import PinnedArray
from epjit.runtime.jit import Kernel, KernelConfig, Launch, compile_kernel
from epjit.runtime.symmetric import SymmetricMemory

if TYPE_CHECKING:
    from epjit.runtime.group import Group
    from epjit.scope import Scope

_MAX_SLOTS = 65536  # of one source rank: bounds the words to 4 MiB
_SIGNALS_BYTES = 512
# The counts usually come within 50 us. A longer poll without sleep starves other threads: giving
# the GIL away and taking it back at once leaves them it only every 5 ms.
_SPIN_SECONDS = 200e-6
_SLOT_ALIGNMENT = 128
# SMs x bytes of a row from which pushing is held by the links: measured with two H200s.
_LINK_BOUND_BYTES = 300_000

for _variant in (
    variants.Variant("dispatch", "push", 90, "tokens are pushed to peers by TMA bulk copies"),
    variants.Variant("dispatch", "tma", 90, "peers pull by TMA bulk copies"),
    variants.Variant("dispatch", "ldst", 80, "peers pull by 16-byte loads and stores"),
    variants.Variant("combine", "tma", 90, "rows are pushed by TMA bulk copies"),
    variants.Variant("combine", "ldst", 80, "rows are pushed by 16-byte loads and stores"),
):
    variants.register(_variant)


def _align(value: int, alignment: int = _SLOT_ALIGNMENT) -> int:
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class NotifyConfig(KernelConfig):
    """What the notify kernel is compiled for."""

    source: ClassVar[str] = "intranode/notify.cu"
    op: ClassVar[str] = "notify"

    num_ranks: int

    @property
    def threads(self) -> int:
        """Threads a block."""
        return 512

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: one sum a warp."""
        return self.threads // 32 * 4

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"intranode_r{self.num_ranks}"


def copier_shape(tma: bool, max_warps: int, row_bytes: int, limit: int) -> tuple[int, int]:
    """Warps that move rows, and rows that each has in shared memory.

    TMA: as many rows as shared memory holds, spread over the warps, at most eight a warp.
    """
    if not tma:
        return max_warps, 1
    rows = (limit - 8 * max_warps) // row_bytes
    warps = min(max_warps, rows)
    return warps, min(max(rows // warps, 1), 8)


class DispatchShape(NamedTuple):
    """What tells one dispatch kernel of a Buffer from another; the same on all ranks."""

    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool


class CombineShape(NamedTuple):
    """What tells one combine kernel of a Buffer from another; the same on all ranks."""

    hidden_bytes: int
    num_topk: int
    is_f16: bool


@dataclass(frozen=True)
class DispatchConfig(KernelConfig):
    """What the dispatch kernel is compiled for; the fields are explained in dispatch.cu."""

    source: ClassVar[str] = "intranode/dispatch.cu"
    op: ClassVar[str] = "dispatch"

    num_ranks: int
    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool
    push: bool
    tma: bool
    num_warps: int
    rows_per_warp: int

    @classmethod
    def choose(
        cls, shape: DispatchShape, *, num_ranks: int, variant: str, limit: int
    ) -> DispatchConfig:
        """The form of the block for `limit` bytes of shared memory."""
        tma = variant != "ldst"
        warps, rows = copier_shape(tma, 16, shape.hidden_bytes, limit)
        return cls(num_ranks, *shape, variant == "push", tma, warps, rows)

    def stage_warps(self, num_sms: int) -> int:
        """Warps of a block that stage tokens first; the others pull from the start.

        Pushing wants most of the warps while the SMs hold it. Where the links do, more rows on
        their way only slow the words behind them: with 24 SMs and rows of 14336 bytes, 12 of 16
        warps take 234 us, 8 take 225, 4 take 206; with 12 SMs 306, 314 and 328.
        """
        if self.num_ranks == 1:
            return self.num_warps
        quarters = 2
        if self.push:
            quarters = 1 if num_sms * self.hidden_bytes > _LINK_BOUND_BYTES else 3
        return max(1, self.num_warps * quarters // 4)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows on their way, one mbarrier a warp."""
        return self.num_warps * (self.rows_per_warp * self.hidden_bytes + 8) if self.tma else 0

    @property
    def bytes_a_token(self) -> int:
        """Bytes of slots for one token of every rank that shares them."""
        slot = _align(self.hidden_bytes + 4 * self.num_scales + 8 * self.num_topk)
        return self.num_ranks * slot if self.push else slot

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return (
            f"intranode_r{self.num_ranks}_h{self.hidden_bytes}_s{self.num_scales}_k{self.num_topk}"
        )


@dataclass(frozen=True)
class CombineConfig(KernelConfig):
    """What the combine kernel is compiled for; the fields are explained in combine.cu."""

    source: ClassVar[str] = "intranode/combine.cu"
    op: ClassVar[str] = "combine"

    num_ranks: int
    hidden_bytes: int
    num_topk: int
    is_f16: bool
    tma: bool
    num_warps: int
    num_push_warps: int
    rows_per_warp: int

    @classmethod
    def choose(
        cls, shape: CombineShape, *, num_ranks: int, variant: str, limit: int
    ) -> CombineConfig:
        """The form of the block for `limit` bytes of shared memory."""
        tma = variant != "ldst"
        push, rows = copier_shape(tma, 6, shape.hidden_bytes, limit)
        # Many warps hide the latency of a token's sum; more ranks and copies through registers need
        # more of these (28 warps leave 72 a thread, 24 leave 80, 20 leave 96, 16 leave 128; sm_120
        # spills with 72).
        warps = 16 if not tma else 20 if num_ranks > 4 else 24 if limit < 160 << 10 else 28
        return cls(num_ranks, *shape, tma, warps, push, rows)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rows on their way, one mbarrier a pushing warp."""
        return self.num_push_warps * (self.rows_per_warp * self.hidden_bytes + 8) if self.tma else 0

    @property
    def bytes_a_token(self) -> int:
        """Bytes of slots that a token takes: one row from each rank."""
        return self.num_ranks * _align(self.hidden_bytes + 4 * self.num_topk)

    @property
    def tag(self) -> str:
        """Namespace of the kernel."""
        return f"intranode_r{self.num_ranks}_h{self.hidden_bytes}_k{self.num_topk}"


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels of every variant that an architecture can run, over shapes that differ in kind.

    Args:
        arch: Such as ``"sm_90a"``.
    """
    limit = shared_limit(arch)
    for num_ranks in range(1, MAX_RANKS + 1):
        yield NotifyConfig(num_ranks)
        for wide in (True, False):
            yield LayoutConfig(num_ranks, wide)
    for num_ranks, num_domains in ((4, 2), (15, 3), (16, 2), (256, 32)):
        for wide in (True, False):
            yield LayoutConfig(num_ranks, wide, num_domains)
    rows = (
        (1, 4096, 0, 0),
        (2, 14336, 0, 8),
        (4, 14336, 0, 0),
        (4, 7168, 56, 8),
        (8, 14336, 0, 8),
        (8, 32768, 0, 32),
        (3, 32, 1, 2),
    )
    for num_ranks, hidden_bytes, num_scales, num_topk in rows:
        for variant in variants.names("dispatch"):
            for wide in (True, False) if variants.runs_on("dispatch", variant, arch) else ():
                yield DispatchConfig.choose(
                    DispatchShape(hidden_bytes, num_scales, num_topk, wide),
                    num_ranks=num_ranks,
                    variant=variant,
                    limit=limit,
                )
        for variant in variants.names("combine") if num_scales == 0 else ():
            if variants.runs_on("combine", variant, arch):
                yield CombineConfig.choose(
                    CombineShape(hidden_bytes, num_topk, is_f16=num_ranks == 2),
                    num_ranks=num_ranks,
                    variant=variant,
                    limit=limit,
                )


def _config(
    shape: DispatchShape | CombineShape, num_ranks: int, arch: str, *, gpu: str = ""
) -> DispatchConfig | CombineConfig:
    """The kernel of a shape, of the variant that the environment asks for or that was tuned."""
    limit = shared_limit(arch)
    op = "dispatch" if isinstance(shape, DispatchShape) else "combine"
    best = tuned.best(op, gpu=gpu, num_ranks=num_ranks, hidden_bytes=shape.hidden_bytes)
    variant = variants.resolve(op, arch, tuned=None if best is None else best.variant)
    if isinstance(shape, DispatchShape):
        return DispatchConfig.choose(shape, num_ranks=num_ranks, variant=variant, limit=limit)
    return CombineConfig.choose(shape, num_ranks=num_ranks, variant=variant, limit=limit)


def warmup_shapes(
    hidden_bytes: int, *, num_topk: int, num_scales: int, topk_is_int64: bool, is_f16: bool
) -> Iterator[DispatchShape | CombineShape]:
    """The kernels that calls of one kind need: with top-k and scales, and without (cached).

    Args:
        hidden_bytes: Bytes of one row of `x`.
        num_topk: Choices a token that travel with it; 0 = none.
        num_scales: Scales a token; 0 = none. Rows with scales are not combined.
        topk_is_int64: Width of the choices.
        is_f16: float16 rows to combine, else bfloat16.
    """
    for topk in sorted({0, num_topk}):
        for scales in sorted({0, num_scales}):
            yield DispatchShape(hidden_bytes, scales, topk, topk == 0 or topk_is_int64)
        if not num_scales:
            yield CombineShape(hidden_bytes, topk, is_f16)


def warmup_configs(
    shapes: Iterable[DispatchShape | CombineShape], *, num_ranks: int, arch: str, gpu: str = ""
) -> list[KernelConfig]:
    """Every kernel that a Buffer compiles for these shapes on an architecture.

    Args:
        shapes: From `warmup_shapes`.
        num_ranks: Size of the group.
        arch: Such as ``"sm_90a"``.
        gpu: Product name, for the variants that were tuned there.
    """
    configs: list[KernelConfig] = [NotifyConfig(num_ranks)]
    configs += [LayoutConfig(num_ranks, wide) for wide in (True, False)]
    return configs + [_config(shape, num_ranks, arch, gpu=gpu) for shape in shapes]


class _Arena:
    """Where the parts of a rank's symmetric memory lie, in bytes from its start."""

    def __init__(self, num_ranks: int, num_nvl_bytes: int) -> None:
        self.slots = 0
        self.slots_bytes = num_nvl_bytes
        self.signals = _align(num_nvl_bytes)  # from here on nothing is the user's
        self.words = self.signals + _SIGNALS_BYTES
        self.notify = self.words + num_ranks * _MAX_SLOTS * 8
        self.notify_stride = num_ranks + 1 + MAX_LOCAL_EXPERTS
        self.total = _align(self.notify + num_ranks * self.notify_stride * 4)


class Intranode:
    """Everything one rank needs for the operations of one NVLink domain.

    Collective: all ranks construct it together.

    Args:
        group: The ranks.
        num_nvl_bytes: Bytes of slots.
        device: The GPU of this rank.
        timeout_seconds: Of one wait for a peer.
        use_fabric: Whether peers map the memory by fabric handles.
    """

    def __init__(
        self,
        group: Group,
        *,
        num_nvl_bytes: int,
        device: torch.device,
        timeout_seconds: float,
        use_fabric: bool,
    ) -> None:
        self._group = group
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._arch = arch_of(device.index)
        self._arena = _Arena(group.size, num_nvl_bytes)
        notify_kernel = Kernel(NotifyConfig(group.size), device=device.index)
        self.memory = SymmetricMemory(
            self._arena.total, group=group, device=device.index, fabric=use_fabric
        )
        # Counters 0..31, epoch 32, abort 33.
        self._local = torch.zeros(64, dtype=torch.int32, device=device)
        self._fault = FaultRecord()
        # Row 0 is read by a host that waits for counts; row 1 takes those that nobody waits for.
        self._host_counts = PinnedArray(2 * (1 + MAX_LOCAL_EXPERTS), device=device.index)
        self._launches: dict[DispatchShape | CombineShape, Launch] = {}
        self._notify = Launch(
            notify_kernel,
            **self._common(),
            notify=self._everywhere(self._arena.notify),
            notify_stride=self._arena.notify_stride,
        )
        torch.cuda.synchronize(device)
        group.barrier()

    def _everywhere(self, offset: int) -> list[int]:
        """The address of the same part on every rank."""
        pointers = [pointer + offset for pointer in self.memory.peer_ptrs]
        return pointers + [0] * (MAX_RANKS - len(pointers))

    def _common(self) -> dict[str, object]:
        """Parameters that all kernels which meet a peer have."""
        return {
            "signals": self._everywhere(self._arena.signals),
            "counters": self._local.data_ptr(),
            "epoch": self._local[32:].data_ptr(),
            "abort": self._local[33:].data_ptr(),
            "fault": self._fault.device_ptr,
            "timeout_ns": int(self._timeout_seconds * 1e9),
            "rank": self._group.rank,
        }

    # ---- launches --------------------------------------------------------------------------------

    def launch(self, shape: DispatchShape | CombineShape) -> Launch:
        """The launch of a shape; collective when it is the first of its kind.

        Raises:
            RuntimeError: It would have to be compiled while a CUDA graph is captured.
            ValueError: The buffer cannot hold two tokens.
            CommunicationError: A rank does not come; names it.
        """
        found = self._launches.get(shape)
        return found if found is not None else self._build(shape)

    def _build(self, shape: DispatchShape | CombineShape) -> Launch:
        """Compiles and loads, then meets the group: nobody may wait for a peer that compiles."""
        gpu = torch.cuda.get_device_name(self._device)
        config = _config(shape, self._group.size, self._arch, gpu=gpu)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{config.op} needs a kernel for {config} that is not compiled yet, and nothing "
                "can be compiled while a CUDA graph is captured; run the call once before the "
                "capture, or call Buffer.warmup()"
            )
        num_slots = min(self._arena.slots_bytes // config.bytes_a_token, _MAX_SLOTS) // 2 * 2
        if self._group.size == 1:
            num_slots = _MAX_SLOTS  # nothing is staged
        elif num_slots < 2:
            raise ValueError(
                f"{config.op} of {shape.hidden_bytes}-byte rows needs num_nvl_bytes >= "
                f"{2 * config.bytes_a_token}, but this Buffer has {self._arena.slots_bytes}; "
                "pass Config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks)"
            )
        launch = Launch(
            Kernel(config, device=self._device.index),
            **self._common(),
            slots=self._everywhere(self._arena.slots),
            words=self._everywhere(self._arena.words),
            num_slots=num_slots,
        )
        chosen = self._group.allgather(config)
        if any(each != config for each in chosen):
            each = "\n  ".join(f"rank {rank}: {one}" for rank, one in enumerate(chosen))
            raise RuntimeError(
                f"the ranks chose different kernels for {config.op}:\n  {each}\nset "
                f"{env.variant_name(config.op)} to the same value everywhere, or give all ranks "
                "the same EPJIT_CACHE_DIR (tuned.json is in it)"
            )
        self._launches[shape] = launch
        return launch

    def compile_ahead(self, archs: Iterable[str]) -> None:
        """Compiles the kernels of this buffer into the cache, for other architectures."""
        for arch in archs:
            for config in warmup_configs(self._launches, num_ranks=self._group.size, arch=arch):
                compile_kernel(config, arch=arch)

    # ---- operations ------------------------------------------------------------------------------

    def dispatch(
        self,
        scope: Scope,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        num_tokens_per_rank: torch.Tensor,
        is_token_in_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        *,
        expert_alignment: int,
        num_worst_tokens: int,
        num_sms: int,
    ) -> Dispatched:
        """Notify, then dispatch; the host waits for the counts unless there is a worst case."""
        num_ranks = self._group.size
        num_topk = 0 if topk_idx is None else topk_idx.shape[1]
        wide = topk_idx is None or topk_idx.dtype == torch.int64
        launch = self.launch(DispatchShape(_row_bytes(x), _num_scales(scales), num_topk, wide))
        experts_per_rank = num_tokens_per_expert.shape[0] // num_ranks
        with scope.allocating():
            ints: dict[str, Any] = {"dtype": torch.int32, "device": self._device}
            rank_prefix = torch.empty((num_ranks, num_ranks), **ints)
            source_tokens = torch.empty(num_ranks, **ints)
            expert_counts = torch.empty(experts_per_rank, **ints)
            send_head = torch.empty((x.shape[0], num_ranks), **ints)
        scope.start()
        counts = self._host_counts.array
        waits = num_worst_tokens == 0
        if waits:
            counts[0] = -1
        self._notify(
            scope.stream,
            1 + num_ranks,
            num_tokens_per_rank=num_tokens_per_rank.data_ptr(),
            num_tokens_per_expert=num_tokens_per_expert.data_ptr(),
            is_token_in_rank=is_token_in_rank.data_ptr(),
            rank_prefix=rank_prefix.data_ptr(),
            source_tokens=source_tokens.data_ptr(),
            expert_counts=expert_counts.data_ptr(),
            send_head=send_head.data_ptr(),
            host_counts=self._host_counts.device_ptr
            + (0 if waits else 8 * (1 + MAX_LOCAL_EXPERTS)),
            num_tokens=x.shape[0],
            experts_per_rank=experts_per_rank,
            expert_alignment=expert_alignment,
        )
        num_rows = num_worst_tokens
        per_expert: list[int] = []
        if waits:
            num_rows = self._wait_for_counts()
            per_expert = counts[1 : 1 + experts_per_rank].tolist()
        with scope.allocating():
            recv_src_idx = torch.empty(num_rows, **ints)
        handle = (
            rank_prefix,
            source_tokens,
            expert_counts,
            recv_src_idx,
            is_token_in_rank,
            send_head,
        )
        outputs = self._dispatch_rows(
            scope,
            launch,
            x,
            scales,
            topk_idx,
            topk_weights,
            handle,
            experts_per_rank=experts_per_rank,
            num_sms=num_sms,
            fill_src_idx=True,
        )
        return Dispatched(*outputs, per_expert, handle)

    def cached_dispatch(
        self,
        scope: Scope,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        handle: Handle,
        *,
        num_sms: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Dispatches another payload along the routing of a handle."""
        launch = self.launch(
            DispatchShape(_row_bytes(x), _num_scales(scales), num_topk=0, topk_is_int64=True)
        )
        recv_x, recv_scales, _, _ = self._dispatch_rows(
            scope,
            launch,
            x,
            scales,
            None,
            None,
            handle,
            experts_per_rank=1,
            num_sms=num_sms,
            fill_src_idx=False,
        )
        return recv_x, recv_scales

    def _dispatch_rows(
        self,
        scope: Scope,
        launch: Launch,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        handle: Handle,
        *,
        experts_per_rank: int,
        num_sms: int,
        fill_src_idx: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Allocates the received rows and queues the dispatch kernel."""
        rank_prefix, source_tokens, _, recv_src_idx, _, send_head = handle
        num_rows = recv_src_idx.shape[0]
        dispatch_config = launch.kernel.config
        assert isinstance(dispatch_config, DispatchConfig)
        recv_scales = recv_topk_idx = recv_topk_weights = None
        with scope.allocating():
            recv_x = torch.empty((num_rows, x.shape[1]), dtype=x.dtype, device=self._device)
            if scales is not None:
                recv_scales = torch.empty(
                    (num_rows, scales.shape[1]), dtype=scales.dtype, device=self._device
                )
            if topk_idx is not None:
                shape = (num_rows, topk_idx.shape[1])
                recv_topk_idx = torch.empty(shape, dtype=topk_idx.dtype, device=self._device)
                recv_topk_weights = torch.empty(shape, dtype=torch.float32, device=self._device)
        scope.start()
        launch(
            scope.stream,
            num_sms,
            x=x.data_ptr(),
            scales=_pointer(scales),
            scale_token_stride=0 if scales is None else scales.stride(0),
            scale_stride=0 if scales is None else scales.stride(1),
            topk_idx=_pointer(topk_idx),
            topk_weights=_pointer(topk_weights),
            send_head=send_head.data_ptr(),
            rank_prefix=rank_prefix.data_ptr(),
            source_tokens=source_tokens.data_ptr(),
            recv_x=recv_x.data_ptr(),
            recv_scales=_pointer(recv_scales),
            recv_topk_idx=_pointer(recv_topk_idx),
            recv_topk_weights=_pointer(recv_topk_weights),
            recv_src_idx=recv_src_idx.data_ptr() if fill_src_idx else 0,
            num_stage_warps=dispatch_config.stage_warps(num_sms),
            num_tokens=x.shape[0],
            num_recv_rows=num_rows,
            experts_per_rank=experts_per_rank,
        )
        return recv_x, recv_scales, recv_topk_idx, recv_topk_weights

    def combine(
        self,
        scope: Scope,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None,
        bias: tuple[torch.Tensor | None, torch.Tensor | None],
        *,
        num_sms: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pushes rows back to the ranks of their tokens and sums them there."""
        rank_prefix, _, _, recv_src_idx, _, send_head = handle
        num_tokens, hidden = send_head.shape[0], x.shape[1]
        num_topk = 0 if topk_weights is None else topk_weights.shape[1]
        launch = self.launch(CombineShape(_row_bytes(x), num_topk, is_f16=x.dtype == torch.float16))
        combine_config = launch.kernel.config
        assert isinstance(combine_config, CombineConfig)
        push_warps = combine_config.num_push_warps * num_sms
        if push_warps < self._group.size - 1:
            raise ValueError(
                f"config.num_sms is {num_sms}, which gives combine {push_warps} warps that push "
                f"rows of {hidden * x.element_size()} bytes, but it needs one for each of the "
                f"{self._group.size - 1} peers; use more SMs"
            )
        combined_weights = None
        with scope.allocating():
            combined_x = torch.empty((num_tokens, hidden), dtype=x.dtype, device=self._device)
            if topk_weights is not None:
                combined_weights = torch.empty(
                    (num_tokens, num_topk), dtype=torch.float32, device=self._device
                )
        scope.start()
        launch(
            scope.stream,
            num_sms,
            x=x.data_ptr(),
            topk_weights=_pointer(topk_weights),
            bias_0=_pointer(bias[0]),
            bias_1=_pointer(bias[1]),
            recv_src_idx=recv_src_idx.data_ptr(),
            send_head=send_head.data_ptr(),
            rank_prefix=rank_prefix.data_ptr(),
            combined_x=combined_x.data_ptr(),
            combined_topk_weights=_pointer(combined_weights),
            num_tokens=num_tokens,
            # Several warps share a token's sum unless there are many tokens a warp: shorter units
            # end closer together (4 parts instead of 1: 128 tokens on 12 SMs 26.7 us, not 31.4,
            # 512 on 24 SMs 42.6, not 47.4; 4096 on 12 SMs 310, not 276).
            num_parts=max(1, min(4, 6 * combine_config.num_warps * num_sms // max(num_tokens, 1))),
        )
        return combined_x, combined_weights

    # ---- the host's waits, faults, the end -------------------------------------------------------

    def _wait_for_counts(self) -> int:
        """Polls host memory for this rank's number of rows; other threads run meanwhile."""
        counts = self._host_counts.array
        start = time.monotonic()
        deadline = start + 2 * self._timeout_seconds + 10
        while counts[0] < 0:
            self.raise_fault()
            now = time.monotonic()
            if now > deadline:
                raise CommunicationError(
                    f"dispatch: the counts did not reach the host of rank {self._group.rank} "
                    f"within {2 * self._timeout_seconds + 10:g} s: its communication stream does "
                    "not get to run",
                    op="dispatch",
                    rank=self._group.rank,
                )
            if now > start + _SPIN_SECONDS:
                time.sleep(50e-6)
        return int(counts[0])

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
        """Frees the memory once the peers have finished the last operation; not collective.

        A peer may still read this rank's slots when this rank is done. Its `finish` signal says
        when it is not; a peer that never sends it is not waited for longer than the timeout.
        """
        torch.cuda.synchronize(self._device)
        signals = self.memory.tensor(torch.int64)[self._arena.signals // 8 :][: self._group.size]
        epoch = int(self._local[32]) & 0xFFFFFFFF
        deadline = time.monotonic() + self._timeout_seconds
        while not self._fault.is_set and time.monotonic() < deadline:
            finished = [value >> 32 & 0xFFFFFFFF for value in signals.tolist()]
            if all(
                value == epoch for rank, value in enumerate(finished) if rank != self._group.rank
            ):
                break
            time.sleep(0.001)
        self._launches.clear()
        del self._notify, signals
        self.memory.close()
        self._host_counts.close()
        self._fault.close()


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_bytes(rows: torch.Tensor) -> int:
    return rows.shape[1] * rows.element_size()


def _num_scales(scales: torch.Tensor | None) -> int:
    return 0 if scales is None else scales.shape[1]
