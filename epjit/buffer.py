"""`Buffer`: DeepEP V1's interface. Checks everything once; owns stream, events and outputs."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

from epjit import env, tuned
from epjit.check import check, check_aligned
from epjit.config import (
    MAX_EXPERTS,
    MAX_LOCAL_EXPERTS,
    MAX_RANKS,
    MAX_ROW_BYTES,
    MAX_TOKENS,
    MAX_TOPK,
    Config,
    default_combine_config,
    default_dispatch_config,
)
from epjit.event import EventHandle, EventOverlap
from epjit.reference.cpu_backend import CpuBackend
from epjit.reference.intranode import Handle
from epjit.runtime.group import Group

if TYPE_CHECKING:
    from epjit.intranode import Intranode
    from epjit.runtime.stream import CommStream

Payload: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
Bias: TypeAlias = "torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None"

_SIZE_ALIGNMENT = 128
_DEFAULT_SMS = 20
_CPU_SMS = 132  # the CPU backend checks a config as an H200 would
_INDEX_DTYPES = (torch.int64, torch.int32)


class Scope:
    """The streams of one call: what kernels wait for, where outputs lie, what is returned.

    Order of a call: allocate; `start`; queue kernels on `stream`; `finish`. Outputs are allocated
    before the communication stream waits, so that a fill which torch launches for them
    (deterministic mode) comes first.

    Args:
        comm: Communication stream.
        previous_event: What the kernels wait for; everything queued on the current stream when it
            holds no event.
        async_finish: Whether the current stream is left alone and an event is returned.
        allocate_on_comm_stream: Whether outputs belong to the communication stream.

    Raises:
        RuntimeError: Flags that do not go together, or the communication stream is current.
    """

    def __init__(
        self,
        comm: CommStream,
        previous_event: EventOverlap | None,
        *,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> None:
        self._comm = comm
        self._previous = previous_event.event if previous_event is not None else None
        self._async = async_finish
        self._allocate_on_comm = allocate_on_comm_stream
        # The raw handle: torch.cuda.current_stream() makes a stream object, 2.5 us of a call of 25.
        self._current = torch._C._cuda_getCurrentRawStream(comm.device)
        self.stream = comm.handle
        if allocate_on_comm_stream and not (self._previous is not None and async_finish):
            raise RuntimeError(
                "allocate_on_comm_stream=True needs a previous_event that holds an event, and "
                "async_finish=True; got previous_event "
                f"{'with' if self._previous is not None else 'without'} an event, {async_finish=}"
            )
        if self._previous is None and self._current == self.stream:
            raise RuntimeError(
                "the communication stream is current, and a stream cannot wait for itself; call "
                "from another stream, or pass previous_event"
            )

    def allocating(self) -> AbstractContextManager[object]:
        """Where outputs are allocated."""
        return (
            torch.cuda.stream(self._comm.torch_stream) if self._allocate_on_comm else nullcontext()
        )

    def start(self) -> None:
        """Makes the communication stream wait for the inputs and the outputs."""
        if self._previous is not None:
            self._previous.stream_wait(self._comm.torch_stream)
        if self._previous is None or (_torch_fills() and not self._allocate_on_comm):
            self._comm.wait_for(self._current)

    def finish(self, tensors: Iterable[torch.Tensor | None]) -> EventOverlap:
        """Ends the call: an event, or the current stream waits.

        Args:
            tensors: Inputs and outputs, which the allocator must not hand out before the kernels
                are done.
        """
        if not self._async:
            self._comm.make_wait(self._current)
            return EventOverlap()
        event = EventHandle(self._comm.torch_stream)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(self._comm.torch_stream)
                if self._allocate_on_comm:
                    tensor.record_stream(torch.cuda.current_stream(self._comm.device))
        return EventOverlap(event)


class BufferRuntime:
    """The members of V1's `Buffer.runtime` that other code reads."""

    def __init__(self, buffer: Buffer) -> None:
        # Weak: in a cycle, device memory would stay until Python's collector happens to run.
        self._weak_buffer = weakref.ref(buffer)

    @property
    def _buffer(self) -> Buffer:
        buffer = self._weak_buffer()
        if buffer is None:
            raise RuntimeError("the Buffer of this runtime is gone; keep a reference to it")
        return buffer

    def is_available(self) -> bool:
        """Whether the buffer can be used."""
        buffer = self._weak_buffer()
        return buffer is not None and buffer.runtime is not None

    def get_num_rdma_ranks(self) -> int:
        """Number of NVLink domains."""
        return 1

    def get_rdma_rank(self) -> int:
        """This rank's NVLink domain."""
        return 0

    def get_root_rdma_rank(self, is_global: bool) -> int:
        """Rank that starts the RDMA bootstrap in V1."""
        del is_global
        return 0

    def get_local_device_id(self) -> int:
        """Index of the GPU; -1 without one."""
        return self._buffer.device.index if self._buffer.device.type == "cuda" else -1

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The communication stream."""
        return self._buffer.get_comm_stream()

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, offset: int, use_rdma_buffer: bool
    ) -> torch.Tensor:
        """See `Buffer.get_local_buffer_tensor`."""
        return self._buffer.get_local_buffer_tensor(
            dtype, offset=offset, use_rdma_buffer=use_rdma_buffer
        )


class Buffer:
    """Expert-parallel communication between the ranks of a group, with DeepEP V1's interface.

    Words in the shapes below: `R` ranks, `T` tokens of this rank, `H` elements a row, `K` top-k
    choices, `E` experts (expert `e` lives on rank `e // (E // R)`), `S` scales a token, `n`
    received rows.

    Construction is collective. On a machine with a GPU the buffer lives on the current device;
    without one (or with ``EPJIT_BACKEND=cpu``) the same interface works on CPU tensors with the
    same results.

    Args:
        group: `torch.distributed` process group of any backend. Only its rank, its size and one
            ``all_gather_object`` are used.
        num_nvl_bytes: Bytes of the NVLink buffer, a multiple of 128.
            `Config.get_nvl_buffer_size_hint` gives a good value; with less (or more) everything
            works too, in more (or fewer) rounds. About 5 MB are added.
        num_rdma_bytes: Must be 0 inside one NVLink domain.
        low_latency_mode: Not in this version.
        num_qps_per_rank: Accepted for V1's sake; there is no RDMA inside an NVLink domain.
        allow_nvlink_for_low_latency_mode: Accepted for V1's sake.
        allow_mnnvl: Accepted for V1's sake.
        use_fabric: Share memory by fabric handles instead of CUDA IPC.
        explicitly_destroy: Whether `destroy` will be called; else resources go with the object.
        enable_shrink: Not in this version.
        comm: Communicator with mpi4py's `Get_rank`, `Get_size` and `allgather`, when `group` is
            None.
        timeout_seconds: How long a wait for a peer lasts; None reads ``EPJIT_TIMEOUT_SECONDS``.

    Attributes:
        group: As passed (`comm` when there is no group).
        rank: This rank.
        group_size: `R`.
        num_nvl_bytes: As passed.
        num_rdma_bytes: As passed.
        low_latency_mode: As passed.
        explicitly_destroy: As passed.
        enable_shrink: As passed.
        runtime: V1's inner object; None after `destroy`.
        device: Where the tensors live.

    Raises:
        ValueError: Sizes or ranks that cannot work; all reasons at once.
        NotImplementedError: A mode that this version does not have.
        RuntimeError: Two ranks' GPUs cannot reach each other; names the pair.
    """

    num_sms: ClassVar[int] = _DEFAULT_SMS
    _sms_are_set: ClassVar[bool] = False

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        timeout_seconds: float | None = None,
    ) -> None:
        del num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl
        self.runtime: BufferRuntime | None = None
        self.explicitly_destroy = explicitly_destroy
        if group is None and comm is None:
            raise ValueError(
                "Buffer needs a process group (group=...) or an mpi4py-like communicator (comm=...)"
            )
        links = Group.from_torch(group) if group is not None else Group.from_comm(comm)
        self.group = group if group is not None else comm
        self.rank, self.group_size = links.rank, links.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink
        _check_buffer(links.size, num_nvl_bytes, num_rdma_bytes, low_latency_mode, enable_shrink)

        self._links = links
        self._lock = threading.RLock()
        self._cpu: CpuBackend | None = None
        self._comm: CommStream | None = None
        if _use_gpu():
            from epjit.intranode import Intranode
            from epjit.layout import Layout
            from epjit.runtime.stream import CommStream

            self.device = torch.device("cuda", torch.cuda.current_device())
            properties = torch.cuda.get_device_properties(self.device)
            self._available_sms = properties.multi_processor_count
            self._comm = CommStream(self.device.index)
            self._layout = Layout(links.size, self.device)
            if timeout_seconds is None:
                timeout_seconds = env.timeout_seconds()
            self._mode: Intranode = Intranode(
                links,
                num_nvl_bytes=num_nvl_bytes,
                device=self.device,
                timeout_seconds=timeout_seconds,
                use_fabric=use_fabric,
            )
        else:
            self.device = torch.device("cpu")
            self._available_sms = _CPU_SMS
            self._cpu = CpuBackend(links)
            self._cpu_memory = torch.zeros(num_nvl_bytes, dtype=torch.uint8, device="cpu")
        self.runtime = BufferRuntime(self)

    # ---- V1's static and small members -----------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether FP8 rows and TMA are there: on Hopper and newer (and on the CPU backend)."""
        return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        """Sets the SMs of the default configs, also of those that were tuned.

        Args:
            new_num_sms: Even number of SMs.

        Raises:
            AssertionError: Odd.
        """
        if new_num_sms % 2:
            raise AssertionError(f"num_sms must be even, got {new_num_sms}")
        Buffer.num_sms, Buffer._sms_are_set = new_num_sms, True

    @staticmethod
    def capture() -> EventOverlap:
        """An event recorded on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(
        num_ranks: int, *, hidden_bytes: int = 0, num_tokens: int = 0
    ) -> Config:
        """The config of dispatch for 1 to 8 ranks; `AssertionError` for others.

        `num_sms` is what `set_num_sms` said, else what ``python -m epjit tune`` found for this GPU
        and the shape nearest to the given one (0 = any), else V1's 20.
        """
        num_sms = _num_sms("dispatch", num_ranks, hidden_bytes, num_tokens)
        return default_dispatch_config(num_ranks, num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int, *, hidden_bytes: int = 0, num_tokens: int = 0) -> Config:
        """The config of combine for 1 to 8 ranks; `AssertionError` for others.

        `num_sms` is what `set_num_sms` said, else what ``python -m epjit tune`` found for this GPU
        and the shape nearest to the given one (0 = any), else V1's 20.
        """
        num_sms = _num_sms("combine", num_ranks, hidden_bytes, num_tokens)
        return default_combine_config(num_ranks, num_sms)

    @staticmethod
    def _unpack_bias(bias: Bias) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if isinstance(bias, tuple):
            if len(bias) != 2:
                raise ValueError(
                    f"bias is a tuple of {len(bias)}, expected one tensor or a tuple of two"
                )
            return bias
        return bias, None

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream that the kernels run on.

        Raises:
            RuntimeError: The buffer lives on the CPU, where there are no streams.
        """
        if self._comm is None:
            raise RuntimeError(
                "this Buffer lives on the CPU, where there is no communication stream"
            )
        return self._comm.torch_stream

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """This rank's own NVLink buffer as a tensor.

        It may be read and written between operations; an operation uses all of it.

        Args:
            dtype: Element type of the view.
            size: Shape; None is one dimension of everything from `offset` on.
            offset: Bytes from the start of the buffer.
            use_rdma_buffer: The RDMA buffer, which is empty inside one NVLink domain.

        Raises:
            ValueError: `size` does not fit.
        """
        self._check_alive()
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        whole = self._cpu_memory if self._cpu is not None else self._mode.memory.tensor(torch.uint8)
        available = (num_bytes - offset) // dtype.itemsize
        if offset < 0 or offset % dtype.itemsize or available < 0:
            raise ValueError(
                f"offset is {offset} bytes, but must be a multiple of {dtype.itemsize} "
                f"up to {num_bytes}"
            )
        view = whole[offset : offset + available * dtype.itemsize].view(dtype)
        if size is None:
            return view
        if size.numel() > available:
            raise ValueError(
                f"size {tuple(size)} has {size.numel()} elements of {dtype}, "
                f"but only {available} are there"
            )
        return view[: size.numel()].view(size)

    # ---- life ------------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Frees everything; collective, but none waits long for a rank that does not call it.

        Raises:
            AssertionError: The buffer was not made with ``explicitly_destroy=True``, or is
                destroyed already.
        """
        if not self.explicitly_destroy:
            raise AssertionError(
                "destroy() needs a Buffer that was made with explicitly_destroy=True"
            )
        if self.runtime is None:
            raise AssertionError("this Buffer is destroyed already")
        self._release()

    def _release(self) -> None:
        self.runtime = None
        if self._comm is not None:
            self._mode.close()
            self._comm.close()

    def __del__(self) -> None:
        """Frees what is left; waits for no peer that is gone, does nothing in a graph capture."""
        if getattr(self, "runtime", None) is None:
            return
        if self.explicitly_destroy:
            warnings.warn(
                "a Buffer with explicitly_destroy=True was never destroyed; its memory leaks",
                ResourceWarning,
                stacklevel=1,
            )
            return
        try:
            if self._cpu is None and torch.cuda.is_current_stream_capturing():
                return
            self._release()
        except Exception as error:  # nothing may leave a destructor
            warnings.warn(f"a Buffer could not be freed: {error}", ResourceWarning, stacklevel=1)

    def reset(self) -> None:
        """Makes the buffer usable again after a `CommunicationError`; collective.

        Raises:
            CommunicationError: A rank does not come; names it.
        """
        self._check_alive(fault=False)
        if self._cpu is not None:
            self._links.reset()
        else:
            self._mode.reset()

    def check_fault(self) -> None:
        """Raises what a wait on the device left behind, as the next operation would.

        A host that only replays CUDA graphs calls this where it synchronises.

        Raises:
            CommunicationError: Names operation, rank and peer.
        """
        self._check_alive()

    def warmup(
        self,
        hidden_bytes: int,
        *,
        num_topk: int = 0,
        num_scales: int = 0,
        topk_idx_dtype: torch.dtype = torch.int64,
        combine_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Compiles and loads a shape's kernels ahead of the first call or a capture; collective.

        With ``TORCH_CUDA_ARCH_LIST`` the same kernels are also compiled into the cache for the
        architectures it names.

        Args:
            hidden_bytes: Bytes of one row of `x`.
            num_topk: Choices a token that travel with it; 0 = none. Combine is prepared with and
                without weights.
            num_scales: Scales a token; 0 = none.
            topk_idx_dtype: int64 or int32.
            combine_dtype: bfloat16 or float16.
        """
        self._check_alive()
        if hidden_bytes <= 0 or hidden_bytes % 16 or hidden_bytes > MAX_ROW_BYTES:
            raise ValueError(
                f"hidden_bytes is {hidden_bytes}, but must be a multiple of 16, "
                f"at most {MAX_ROW_BYTES}"
            )
        if not 0 <= num_topk <= MAX_TOPK or num_scales < 0:
            raise ValueError(
                f"num_topk is {num_topk} (0 to {MAX_TOPK}) and num_scales {num_scales} (0 or more)"
            )
        if self._cpu is not None:
            return
        from epjit.intranode import warmup_shapes

        for shape in warmup_shapes(
            hidden_bytes,
            num_topk=num_topk,
            num_scales=num_scales,
            topk_is_int64=topk_idx_dtype == torch.int64,
            is_f16=combine_dtype == torch.float16,
        ):
            self._mode.launch(shape)
        self._mode.compile_ahead(env.torch_cuda_arch_list())

    def _check_alive(self, *, fault: bool = True) -> None:
        if self.runtime is None:
            raise RuntimeError("this Buffer is destroyed")
        if fault and self._cpu is None:
            self._mode.raise_fault()

    # ---- operations ------------------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Counts where tokens go. Local: no peer is waited for, and the host does not wait.

        Args:
            topk_idx: int64 or int32 `[T, K]`; anything outside `[0, E)` is no selection.
            num_experts: `E`, a multiple of `R`.
            previous_event: What to wait for instead of the current stream.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: Outputs belong to the communication stream.

        Returns:
            `num_tokens_per_rank` int32 `[R]`, `num_tokens_per_rdma_rank` (None),
            `num_tokens_per_expert` int32 `[E]`, `is_token_in_rank` bool `[T, R]`, the event.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            CommunicationError: An earlier operation of this buffer failed.
        """
        self._check_alive()
        check(
            "topk_idx",
            topk_idx,
            shape=("num_tokens", "num_topk"),
            dtype=_INDEX_DTYPES,
            device=self.device,
        )
        _check_topk(topk_idx)
        _check_experts(num_experts, self.group_size)
        if self._cpu is not None:
            per_rank, per_expert, in_rank = self._cpu.layout(topk_idx, num_experts)
            event = _cpu_event(async_finish)
            return per_rank, None, per_expert, in_rank, event
        scope = self._scope(previous_event, async_finish, allocate_on_comm_stream)
        with scope.allocating():
            per_rank = torch.empty(self.group_size, dtype=torch.int32, device=self.device)
            per_expert = torch.empty(num_experts, dtype=torch.int32, device=self.device)
            in_rank = torch.empty(
                (topk_idx.shape[0], self.group_size), dtype=torch.bool, device=self.device
            )
        scope.start()
        self._layout(scope.stream, topk_idx, per_rank, per_expert, in_rank)
        event = scope.finish((topk_idx, per_rank, per_expert, in_rank))
        return per_rank, None, per_expert, in_rank, event

    def dispatch(
        self,
        x: Payload,
        handle: Handle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        Payload,
        torch.Tensor | None,
        torch.Tensor | None,
        list[int] | None,
        Handle | None,
        EventOverlap,
    ]:
        """Sends each token once to each rank that owns any of the experts it chose.

        Received rows are ordered by source rank, then by source token. With `handle` (a cached
        dispatch) the routing of an earlier dispatch is used for another payload, of any dtype and
        `H`; layout and top-k are not given then.

        Args:
            x: `[T, H]` of any dtype, rows a multiple of 16 bytes up to 32 KB; or a tuple of that
                with one byte an element and scales `[T, S]`, float32 or int32, of any strides.
            handle: From an earlier dispatch.
            num_tokens_per_rank: int32 `[R]` from `get_dispatch_layout`.
            num_tokens_per_rdma_rank: Not used inside one NVLink domain.
            is_token_in_rank: bool `[T, R]`.
            num_tokens_per_expert: int32 `[E]`.
            topk_idx: int64 or int32 `[T, K]`, `K <= 32`, with `topk_weights` or not at all.
            topk_weights: float32 `[T, K]`.
            expert_alignment: Counts in the returned list are rounded up to a multiple of it.
            num_worst_tokens: Rows of every output, at least what arrives. The host then does not
                wait (capturable), and the list is empty; rows that nothing arrived for are -1 in
                `recv_topk_idx`, undefined elsewhere.
            config: Only `num_sms` matters; None is `get_dispatch_config`.
            previous_event: What to wait for instead of the current stream.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: Outputs belong to the communication stream.

        Returns:
            `recv_x` `[n, H]` (with scales: a tuple with float32 or int32 `[n, S]`, row-major),
            `recv_topk_idx` `[n, K]` (local experts, -1 for those of other ranks),
            `recv_topk_weights` `[n, K]` (0 where the index is -1), list of received selections for
            each local expert, handle, event. Cached: None for everything but `recv_x` and event.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            RuntimeError: Needs the host to wait, while a CUDA graph is captured.
            CommunicationError: A peer did not come, now or in an earlier operation.
        """
        self._check_alive()
        del num_tokens_per_rdma_rank
        rows, scales = self._check_payload(x)
        if config is None:
            row_bytes = rows.shape[1] * rows.element_size()
            config = self.get_dispatch_config(
                self.group_size, hidden_bytes=row_bytes, num_tokens=rows.shape[0]
            )
        self._check_config(config)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError(
                    "a cached dispatch (handle=...) takes no topk_idx and no topk_weights"
                )
            self._check_handle(handle, num_tokens=rows.shape[0])
            if self._cpu is not None:
                recv_x, recv_scales = self._cpu.cached_dispatch(rows, scales, handle)
                event = _cpu_event(async_finish)
            else:
                scope = self._scope(previous_event, async_finish, allocate_on_comm_stream)
                with self._lock:
                    recv_x, recv_scales = self._mode.cached_dispatch(
                        scope, rows, scales, handle, num_sms=config.num_sms
                    )
                event = scope.finish((rows, scales, recv_x, recv_scales, *handle))
            return _payload(recv_x, recv_scales), None, None, None, None, event

        self._check_routing(
            rows.shape[0],
            num_tokens_per_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
        )
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        _check_counts(expert_alignment, num_worst_tokens, topk_idx)
        layout = (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
        if self._cpu is not None:
            result = self._cpu.dispatch(
                rows,
                scales,
                topk_idx,
                topk_weights,
                *layout,
                expert_alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
            )
            event = _cpu_event(async_finish)
        else:
            if num_worst_tokens == 0 and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "dispatch must read the number of received rows on the host, which a CUDA "
                    "graph cannot; pass num_worst_tokens (rows enough for the worst case), or a "
                    "handle"
                )
            scope = self._scope(previous_event, async_finish, allocate_on_comm_stream)
            with self._lock:
                result = self._mode.dispatch(
                    scope,
                    rows,
                    scales,
                    topk_idx,
                    topk_weights,
                    *layout,
                    expert_alignment=expert_alignment,
                    num_worst_tokens=num_worst_tokens,
                    num_sms=config.num_sms,
                )
            outputs = (
                result.recv_x,
                result.recv_scales,
                result.recv_topk_idx,
                result.recv_topk_weights,
            )
            event = scope.finish(
                (rows, scales, topk_idx, topk_weights, *layout, *outputs, *result.handle)
            )
        return (
            _payload(result.recv_x, result.recv_scales),
            result.recv_topk_idx,
            result.recv_topk_weights,
            result.num_recv_tokens_per_expert_list,
            result.handle,
            event,
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        bias: Bias = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Brings the rows of a dispatch back to the ranks of their tokens and sums them.

        The sum is in fp32, biases first, then source ranks in ascending order, rounded once;
        nothing is weighted. The host does not wait.

        Args:
            x: bfloat16 or float16 `[n, H]`, one row for each received row.
            handle: From the dispatch; it stays valid.
            topk_weights: float32 `[n, K]`, summed over ranks as well, or None.
            bias: `[T, H]` of x's dtype, or a pair of them, or None.
            config: Only `num_sms` matters; None is `get_combine_config`.
            previous_event: What to wait for instead of the current stream.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: Outputs belong to the communication stream.

        Returns:
            `combined_x` `[T, H]`, `combined_topk_weights` float32 `[T, K]` or None, the event.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            CommunicationError: An earlier operation of this buffer failed.
        """
        self._check_alive()
        self._check_handle(handle, num_tokens=None)
        num_rows, num_tokens = handle[3].shape[0], handle[5].shape[0]
        floats = (torch.bfloat16, torch.float16)
        self._check_rows("x", x, num_rows, floats, "one row for each row of the dispatch")
        if topk_weights is not None:
            check(
                "topk_weights",
                topk_weights,
                shape=(num_rows, "num_topk"),
                dtype=torch.float32,
                device=self.device,
                why="one row for each row of x",
            )
            _check_topk(topk_weights)
        bias_0, bias_1 = self._unpack_bias(bias)
        for name, value in (("bias_0", bias_0), ("bias_1", bias_1)):
            if value is not None:
                why = "one row for each token of this rank"
                self._check_rows(name, value, num_tokens, (x.dtype,), why, x.shape[1])
        if config is None:
            config = self.get_combine_config(
                self.group_size,
                hidden_bytes=x.shape[1] * x.element_size(),
                num_tokens=num_tokens,
            )
        self._check_config(config)
        if self._cpu is not None:
            combined_x, combined_weights = self._cpu.combine(
                x, handle, topk_weights, (bias_0, bias_1)
            )
            event = _cpu_event(async_finish)
            return combined_x, combined_weights, event
        scope = self._scope(previous_event, async_finish, allocate_on_comm_stream)
        with self._lock:
            combined_x, combined_weights = self._mode.combine(
                scope, x, handle, topk_weights, (bias_0, bias_1), num_sms=config.num_sms
            )
        tensors = (x, topk_weights, bias_0, bias_1, combined_x, combined_weights, *handle)
        return combined_x, combined_weights, scope.finish(tensors)

    # ---- checks ----------------------------------------------------------------------------------

    def _scope(
        self, previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
    ) -> Scope:
        assert self._comm is not None
        return Scope(
            self._comm,
            previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )

    def _check_config(self, config: Config) -> None:
        value, available = config.num_sms, self._available_sms
        if value < 2 or value % 2 or value > available:
            raise ValueError(
                f"config.num_sms is {value}, but must be even and between 2 and {available} "
                f"(what {self.device} has: all blocks must run at once)"
            )

    def _check_rows(
        self,
        name: str,
        x: torch.Tensor,
        num_rows: int | str,
        dtypes: tuple[torch.dtype, ...] | None,
        why: str,
        hidden: int | str = "hidden",
    ) -> None:
        check(name, x, shape=(num_rows, hidden), dtype=dtypes, device=self.device, why=why)
        row_bytes = x.shape[1] * x.element_size()
        if row_bytes == 0 or row_bytes % 16 or row_bytes > MAX_ROW_BYTES:
            raise ValueError(
                f"{name} has rows of {row_bytes} bytes ({x.shape[1]} x {x.dtype}); "
                f"they must be a multiple of 16 bytes, at most {MAX_ROW_BYTES}"
            )
        check_aligned(name, x)

    def _check_payload(self, x: Payload) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(x, tuple) and len(x) != 2:
            raise TypeError(
                f"x is a tuple of {len(x)}, expected a tensor or a tuple of two: rows and scales"
            )
        rows, scales = x if isinstance(x, tuple) else (x, None)
        self._check_rows("x", rows, "num_tokens", None, "")
        if rows.shape[0] > MAX_TOKENS:
            raise ValueError(f"x has {rows.shape[0]} tokens; one call takes at most {MAX_TOKENS}")
        if scales is not None:
            check(
                "x[1] (scales)",
                scales,
                shape=(rows.shape[0], "num_scales"),
                dtype=(torch.float32, torch.int32),
                device=self.device,
                contiguous=False,
                why="one row of scales for each token",
            )
            if rows.element_size() != 1:
                raise TypeError(
                    f"x[0] has dtype {rows.dtype}; a payload with scales has one byte an element"
                )
        return rows, scales

    def _check_handle(self, handle: Handle, *, num_tokens: int | None) -> None:
        if not isinstance(handle, tuple | list) or len(handle) != 6:
            got = (
                f"{type(handle).__name__} of {len(handle)}"
                if isinstance(handle, tuple | list)
                else type(handle).__name__
            )
            raise TypeError(f"handle is a {got}, expected the tuple of 6 that dispatch returned")
        for index, tensor in enumerate(handle):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"handle[{index}] is a {type(tensor).__name__}, expected what dispatch returned"
                )
            if tensor.device != self.device:
                raise ValueError(
                    f"handle[{index}] is on {tensor.device}, but this Buffer is on {self.device}; "
                    f"move it with .to({str(self.device)!r})"
                )
        ranks = handle[0].shape[0]
        if ranks != self.group_size:
            raise ValueError(f"handle is of {ranks} ranks, but this Buffer has {self.group_size}")
        if num_tokens is not None and handle[5].shape[0] != num_tokens:
            raise ValueError(
                f"x has {num_tokens} tokens, but the handle routes {handle[5].shape[0]}: "
                "a cached dispatch sends a row for each token of the first one"
            )

    def _check_routing(
        self,
        num_tokens: int,
        num_tokens_per_rank: torch.Tensor | None,
        is_token_in_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
    ) -> None:
        given = {
            "num_tokens_per_rank": num_tokens_per_rank,
            "is_token_in_rank": is_token_in_rank,
            "num_tokens_per_expert": num_tokens_per_expert,
        }
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise AssertionError(
                f"dispatch without a handle needs {', '.join(missing)} from get_dispatch_layout"
            )
        ranks, device = self.group_size, self.device
        check(
            "num_tokens_per_rank",
            num_tokens_per_rank,
            shape=(ranks,),
            dtype=torch.int32,
            device=device,
        )
        check(
            "is_token_in_rank",
            is_token_in_rank,
            shape=(num_tokens, ranks),
            dtype=torch.bool,
            device=device,
            why="one row for each token of x",
        )
        experts = check(
            "num_tokens_per_expert",
            num_tokens_per_expert,
            shape=("num_experts",),
            dtype=torch.int32,
            device=device,
        )
        _check_experts(experts.shape[0], ranks)
        if (topk_idx is None) != (topk_weights is None):
            raise ValueError("topk_idx and topk_weights go together; got only one of them")
        if topk_idx is not None:
            why = "one row for each token of x"
            check(
                "topk_idx",
                topk_idx,
                shape=(num_tokens, "num_topk"),
                dtype=_INDEX_DTYPES,
                device=device,
                why=why,
            )
            _check_topk(topk_idx)
            check(
                "topk_weights",
                topk_weights,
                shape=tuple(topk_idx.shape),
                dtype=torch.float32,
                device=device,
                why="as topk_idx",
            )


def _cpu_event(async_finish: bool) -> EventOverlap:
    """What a call on the CPU returns: its work is done."""
    return EventOverlap(EventHandle() if async_finish else None)


def _torch_fills() -> bool:
    """Whether torch writes to new tensors, on the stream where they are allocated."""
    if not torch.are_deterministic_algorithms_enabled():
        return False
    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def _num_sms(op: str, num_ranks: int, hidden_bytes: int, num_tokens: int) -> int:
    if Buffer._sms_are_set or Buffer.num_sms != _DEFAULT_SMS or not tuned.load():
        return Buffer.num_sms
    gpu = torch.cuda.get_device_name() if _use_gpu() else tuned.CPU
    found = tuned.best(
        op, gpu=gpu, num_ranks=num_ranks, hidden_bytes=hidden_bytes, num_tokens=num_tokens
    )
    return Buffer.num_sms if found is None else found.num_sms


def _use_gpu() -> bool:
    backend = env.backend()
    if backend == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("EPJIT_BACKEND=cuda, but torch finds no GPU; unset it to run on the CPU")
    return backend != "cpu" and torch.cuda.is_available()


def _check_buffer(
    num_ranks: int,
    num_nvl_bytes: int,
    num_rdma_bytes: int,
    low_latency_mode: bool,
    enable_shrink: bool,
) -> None:
    reasons = [
        f"{name} is {value}, but must be a multiple of {_SIZE_ALIGNMENT} and not negative"
        for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes))
        if value < 0 or value % _SIZE_ALIGNMENT
    ]
    if reasons:
        raise ValueError("Buffer: " + "; ".join(reasons))
    absent = []
    if low_latency_mode:
        absent.append("low_latency_mode")
    if enable_shrink:
        absent.append("enable_shrink")
    if num_ranks > MAX_RANKS:
        absent.append(f"{num_ranks} ranks (up to {MAX_RANKS} of one NVLink domain)")
    elif num_rdma_bytes > 0 and not low_latency_mode:
        raise ValueError(
            f"num_rdma_bytes is {num_rdma_bytes}, but {num_ranks} ranks share one NVLink domain "
            "and use none; pass 0 (Config.get_rdma_buffer_size_hint does)"
        )
    if absent:
        raise NotImplementedError(f"this version of epjit does not have: {', '.join(absent)}")


def _check_topk(tensor: torch.Tensor) -> None:
    if not 1 <= tensor.shape[1] <= MAX_TOPK:
        raise ValueError(f"top-k is {tensor.shape[1]}, but must be between 1 and {MAX_TOPK}")


def _check_experts(num_experts: int, num_ranks: int) -> None:
    most = min(MAX_EXPERTS, MAX_LOCAL_EXPERTS * num_ranks)
    if num_experts <= 0 or num_experts % num_ranks or num_experts > most:
        raise ValueError(
            f"num_experts is {num_experts}, but must be a positive multiple of the "
            f"{num_ranks} ranks, at most {most}"
        )


def _check_counts(
    expert_alignment: int, num_worst_tokens: int, topk_idx: torch.Tensor | None
) -> None:
    if expert_alignment < 1:
        raise ValueError(f"expert_alignment is {expert_alignment}, but must be at least 1")
    if num_worst_tokens < 0:
        raise ValueError(f"num_worst_tokens is {num_worst_tokens}, but must not be negative")
    if num_worst_tokens > 0 and topk_idx is None:
        raise ValueError(
            "num_worst_tokens needs topk_idx: without it nothing says which rows arrived"
        )


def _payload(rows: torch.Tensor, scales: torch.Tensor | None) -> Payload:
    return rows if scales is None else (rows, scales)
