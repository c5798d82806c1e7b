"""`Buffer`: DeepEP V1's interface. Checks everything once; owns stream, events and outputs."""

from __future__ import annotations

import functools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch

from epjit import env, signatures, tuned
from epjit.checks.low_latency import (
    LowLatencyChecks,
    as_low_latency_handle,
    check_forms,
    check_variant,
)
from epjit.checks.match import (
    as_handle,
    check,
    check_aligned,
    check_experts,
    check_runs,
    check_topk,
    remember,
    signature,
)
from epjit.checks.values import ValueChecks
from epjit.config import (
    MAX_EXPERTS,
    MAX_GROUP,
    MAX_LOCAL_EXPERTS,
    MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS,
    MAX_RANKS,
    MAX_ROW_BYTES,
    MAX_TOKENS,
    MAX_TOPK,
    Config,
    default_combine_config,
    default_dispatch_config,
    low_latency_size_hint,
)
from epjit.event import EventHandle, EventOverlap, event_of, next_number
from epjit.formats import choose_format
from epjit.handles import (
    GivenHandle,
    GivenLowLatencyHandle,
    Handle,
    LowLatencyHandle,
    handle_type,
)
from epjit.life import Resources, give_back_left, is_capturing, is_ending, watch
from epjit.modes.cpu import CpuBackend, CpuLowLatency, CpuMemory
from epjit.numbers import as_int, as_seconds
from epjit.runtime.empty import empty_on, matrix, vector
from epjit.runtime.group import Group, as_process_group
from epjit.runtime.interrupt import synchronize
from epjit.runtime.topology import Topology, find_topology
from epjit.scope import AnyScope, CpuScope, CurrentStream, GpuScope, Scope, Turns

if TYPE_CHECKING:
    from epjit.modes.internode import Internode
    from epjit.modes.intranode import Intranode
    from epjit.modes.low_latency import LowLatency
    from epjit.runtime.stream import CommStream

Payload: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
Bias: TypeAlias = "torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None"
Hook: TypeAlias = Callable[[], None]

_SIZE_ALIGNMENT = 128
_DEFAULT_SMS = 20
_DEFAULT_ROW_BYTES, _DEFAULT_TOKENS = 14336, 4096  # what V1's default configs were made for
_CPU = torch.device("cpu")
_CPU_SMS = 132  # the CPU backend checks a config as an H200 would
_INDEX_DTYPES = (torch.int64, torch.int32)


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
        return self._buffer.topology.num_domains

    def get_rdma_rank(self) -> int:
        """This rank's NVLink domain."""
        return self._buffer.topology.domain

    def get_root_rdma_rank(self, is_global: bool) -> int:
        """The rank that makes the RDMA unique id in V1: the first of the group or of a rail.

        Args:
            is_global: Its number in the group; else its NVLink domain, which is 0.
        """
        topology = self._buffer.topology
        return topology.domains[0][topology.local] if is_global else 0

    def get_local_device_id(self) -> int:
        """Index of the GPU; -1 without one."""
        return self._buffer.device.index if self._buffer.device.type == "cuda" else -1

    def get_comm_stream(self) -> torch.cuda.Stream:
        """See `Buffer.get_comm_stream`."""
        return self._buffer.get_comm_stream()

    def destroy(self) -> None:
        """As `Buffer.destroy`, whatever the Buffer was made with."""
        self._buffer._release()

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, offset: int, use_rdma_buffer: bool
    ) -> torch.Tensor:
        """See `Buffer.get_local_buffer_tensor`."""
        return self._buffer.get_local_buffer_tensor(
            dtype, offset=offset, use_rdma_buffer=use_rdma_buffer
        )


class Unreceived(NamedTuple):
    """A low-latency operation whose hook has not been called; told from others by identity."""

    op: str


class Buffer:
    """Expert-parallel communication between the ranks of a group, with DeepEP V1's interface.

    Words in the shapes below: `R` ranks, `T` tokens of this rank, `M` the most that a rank may have
    in a low-latency call, `H` elements a row, `K` top-k choices, `E` experts (expert `e` lives on
    rank `e // (E // R)`), `S` scales a token, `n` received rows, `D` NVLink domains.

    Calls come from any thread, whichever GPU is current there, and from any stream, by which the
    current stream of the Buffer's GPU is meant; on the GPU each runs after the one before. Only
    replays of a CUDA graph are not seen by the Buffer. They use what the calls use, so replay a
    graph that has captured calls on the stream of the other calls, or make that stream wait for the
    replay, and the replay for the calls before it; out of order, each takes the other's rows.

    Construction is collective. On a machine with a GPU the buffer lives on the current device;
    without one (or with ``EPJIT_BACKEND=cpu``) the same interface works on CPU tensors with the
    same results, and refuses what a GPU refuses. ``with Buffer(...) as buffer:`` destroys the
    buffer at the end of the block, whatever `explicitly_destroy` says.

    Ranks that reach each other over NVLink are a domain. With several domains (several hosts, or
    `nvlink_domain`) rows travel between them by RDMA, and the normal mode's handles have ten
    tensors instead of six.

    Args:
        group: `torch.distributed` process group of any backend, or a DeviceMesh of one dimension.
            Only its rank, its size and one ``all_gather_object`` are used.
        num_nvl_bytes: Bytes of the NVLink buffer, a multiple of 128.
            `Config.get_nvl_buffer_size_hint` gives a good value; with less (or more) everything
            works too, in more (or fewer) rounds. About 5 MB are added.
        num_rdma_bytes: Bytes of the RDMA buffer, a multiple of 128. With several domains the normal
            mode needs what `Config.get_rdma_buffer_size_hint` says; the low-latency calls need what
            `get_low_latency_rdma_size_hint` says, the larger of both with both. Must be 0 when
            nothing uses it.
        low_latency_mode: Whether the low-latency calls can be made. The normal mode works beside
            it, with memory of its own.
        num_qps_per_rank: Queue pairs to each rank of another domain.
        allow_nvlink_for_low_latency_mode: Accepted for V1's sake.
        allow_mnnvl: Accepted for V1's sake.
        use_fabric: Share memory by fabric handles instead of CUDA IPC.
        explicitly_destroy: Whether `destroy` will be called; else resources go with the object.
        enable_shrink: Whether a rank that does not answer in a low-latency call in time is masked,
            and the others go on without it, instead of a `CommunicationError`.
        comm: Communicator with mpi4py's `Get_rank`, `Get_size` and `allgather`, when `group` is
            None.
        timeout_seconds: How long a wait of the GPU for a peer lasts; None reads
            ``EPJIT_TIMEOUT_SECONDS``, which is also how long the hosts wait for each other.
        allow_nvlink_for_normal_mode: Accepted for the sake of a branch of V1.
        num_nvl_peers: Accepted likewise; the domains are found out.
        nvlink_domain: Cuts each NVLink domain that is found into domains of this many ranks; 0
            cuts none, None reads ``EPJIT_NVLINK_DOMAIN``. Meant for tests.

    Attributes:
        group: The process group (`comm` when there is none).
        rank: This rank.
        group_size: `R`.
        num_nvl_bytes: As passed.
        num_rdma_bytes: As passed.
        low_latency_mode: As passed.
        explicitly_destroy: As passed.
        enable_shrink: As passed.
        runtime: V1's inner object; None after `destroy`.
        device: Where the tensors live.
        topology: NVLink domains of the ranks.

    Raises:
        TypeError: A number that is no int.
        ValueError: Sizes or ranks that cannot work; all reasons at once.
        RuntimeError: The ranks make different Buffers, which says what each has; or two ranks' GPUs
            cannot reach each other, which names the pair. Whatever is raised, nothing is left
            behind.
    """

    num_sms: ClassVar[int] = _DEFAULT_SMS
    _sms_are_set: ClassVar[bool] = False

    @torch.inference_mode(False)  # memory that is made there could not be written to elsewhere
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
        allow_nvlink_for_normal_mode: bool = True,
        num_nvl_peers: int | None = None,
        timeout_seconds: float | None = None,
        nvlink_domain: int | None = None,
    ) -> None:
        del allow_nvlink_for_low_latency_mode, allow_mnnvl
        del allow_nvlink_for_normal_mode, num_nvl_peers
        self.runtime: BufferRuntime | None = None
        self.explicitly_destroy = explicitly_destroy
        check_runs("making a Buffer")
        if group is None and comm is not None:
            links = Group.from_comm(comm)
            self.group = comm
        else:
            self.group = as_process_group(group)
            links = Group.from_torch(self.group)
        self.rank, self.group_size = links.rank, links.size
        num_nvl_bytes = as_int("num_nvl_bytes", num_nvl_bytes)
        num_rdma_bytes = as_int("num_rdma_bytes", num_rdma_bytes)
        num_qps_per_rank = as_int("num_qps_per_rank", num_qps_per_rank)
        if nvlink_domain is not None:
            nvlink_domain = as_int("nvlink_domain", nvlink_domain)
        if timeout_seconds is not None:
            timeout_seconds = as_seconds("timeout_seconds", timeout_seconds)
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink
        if num_rdma_bytes or low_latency_mode:
            self.nvshmem_qp_depth = env.nvshmem_qp_depth()
        _check_buffer(links.size, num_nvl_bytes, num_rdma_bytes, nvlink_domain)

        self._links = links
        self._cpu: CpuBackend | None = None
        self._comm: CommStream | None = None
        self._low_latency: LowLatency | CpuLowLatency | None = None
        self._unreceived: Unreceived | None = None
        self._last_stream: int | None = None  # of the last call
        self._shows_comm = False  # get_comm_stream() was called
        on_gpu = use_gpu()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else _CPU
        self._entered = Turns(self.device.index)
        self._resources = Resources(self._entered)
        give_back_left()
        self.topology = find_topology(
            links, device=self.device.index, domain_size=nvlink_domain, use_fabric=use_fabric
        )
        self._num_domains = self.topology.num_domains
        _check_topology(self.topology, num_rdma_bytes, num_qps_per_rank, low_latency_mode)
        if low_latency_mode:
            check_variant(self._num_domains)
        self._agree(use_fabric, num_qps_per_rank)
        self._empty = empty_on(self.device)
        self._passed: dict[Hashable, bool] = {}  # arguments of the normal mode, see `signature`
        self._handle_type: Any = handle_type(self._num_domains)
        self._low_latency_checks = LowLatencyChecks(
            links.size, num_rdma_bytes, self.device, self._num_domains
        )
        if on_gpu:
            try:
                self._make_on_gpu(timeout_seconds, use_fabric, num_qps_per_rank)
            except BaseException as error:  # whoever catches it may try a smaller size
                self._let_go().abandon(error)
                raise
        else:
            from epjit.modes.chosen import ChosenKernels

            self._available_sms = _CPU_SMS
            self._chosen = ChosenKernels(
                links,
                self.topology,
                num_nvl_bytes=num_nvl_bytes,
                num_rdma_bytes=num_rdma_bytes,
            )
            domains = self.topology.domains
            self._cpu = CpuBackend(links, domains if len(domains) > 1 else None)
            self._cpu_memory = CpuMemory(num_nvl_bytes)
            self._cpu_rdma_memory = CpuMemory(num_rdma_bytes)
            if low_latency_mode:
                self._low_latency = CpuLowLatency(
                    links,
                    self._chosen,
                    num_rdma_bytes=num_rdma_bytes,
                    enable_shrink=enable_shrink,
                )
        self._values: ValueChecks | None = None
        if env.check_values():
            self._values = ValueChecks(links.rank, self.topology.domains, self._in_order)
        self.runtime = BufferRuntime(self)

    def _agree(self, use_fabric: bool, num_qps_per_rank: int) -> None:
        """All ranks make the same Buffer; collective."""
        variant = env.low_latency_combine_variant
        values = {
            "num_nvl_bytes": self.num_nvl_bytes,
            "num_rdma_bytes": self.num_rdma_bytes,
            "low_latency_mode": bool(self.low_latency_mode),
            "enable_shrink": bool(self.enable_shrink),
            "use_fabric": bool(use_fabric),
            "num_qps_per_rank": num_qps_per_rank,
            "NVLink domains": self.topology.domains,
            variant.name: variant() if self.low_latency_mode else None,
        }
        self._links.agree_on(
            {f"values of {name}": value for name, value in values.items()},
            remedy="make Buffers with the same arguments and environment on all ranks",
        )

    def _make_on_gpu(
        self, timeout_seconds: float | None, use_fabric: bool, num_qps_per_rank: int
    ) -> None:
        """Streams, memory and kernels."""
        from epjit.modes.layout import Layout
        from epjit.runtime.stream import CommStream

        properties = torch.cuda.get_device_properties(self.device)
        self._available_sms = properties.multi_processor_count
        self._comm = CommStream(self.device.index)
        watch(self)
        spans_domains = self.topology.spans_domains
        self._layout = Layout(
            self.group_size, self.device, self.topology.domains if spans_domains else None
        )
        self._resources.hold(self._comm, self._layout)
        if timeout_seconds is None:
            timeout_seconds = env.timeout_seconds()
        self._mode: Intranode | Internode
        if spans_domains:
            from epjit.modes.internode import Internode

            self._mode = Internode(
                self._links,
                self.topology,
                self._resources,
                num_nvl_bytes=self.num_nvl_bytes,
                num_rdma_bytes=self.num_rdma_bytes,
                device=self.device,
                timeout_seconds=timeout_seconds,
                use_fabric=use_fabric,
                num_qps_per_rank=num_qps_per_rank,
            )
        else:
            from epjit.modes.intranode import Intranode

            self._mode = Intranode(
                self._links,
                self._resources,
                num_nvl_bytes=self.num_nvl_bytes,
                device=self.device,
                timeout_seconds=timeout_seconds,
                use_fabric=use_fabric,
            )
        if self.low_latency_mode:
            from epjit.modes.low_latency import LowLatency

            self._low_latency = LowLatency(
                self._links,
                self.topology,
                self._resources,
                num_rdma_bytes=self.num_rdma_bytes,
                device=self.device,
                timeout_seconds=timeout_seconds,
                use_fabric=use_fabric,
                enable_shrink=self.enable_shrink,
                num_qps_per_rank=num_qps_per_rank,
            )

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
        new_num_sms = as_int("num_sms", new_num_sms)
        if new_num_sms % 2:
            raise AssertionError(f"num_sms must be even, got {new_num_sms}")
        Buffer.num_sms, Buffer._sms_are_set = new_num_sms, True

    @staticmethod
    def capture() -> EventOverlap:
        """An event recorded on the current stream, with the GPU of the Buffer current."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(
        num_ranks: int, *, hidden_bytes: int = 0, num_tokens: int = 0
    ) -> Config:
        """The config of dispatch for 1 to 256 ranks; `AssertionError` for others.

        `num_sms` is what `set_num_sms` said, else what ``python -m epjit tune`` found for this GPU
        and a shape like the given one (`epjit.tuned`; 0 = 14336 bytes, 4096 tokens), else V1's 20.
        """
        num_ranks = as_int("num_ranks", num_ranks)
        num_sms = _num_sms("dispatch", num_ranks, hidden_bytes, num_tokens)
        return default_dispatch_config(num_ranks, num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int, *, hidden_bytes: int = 0, num_tokens: int = 0) -> Config:
        """The config of combine for 1 to 256 ranks; `AssertionError` for others.

        `num_sms` is what `set_num_sms` said, else what ``python -m epjit tune`` found for this GPU
        and a shape like the given one (`epjit.tuned`; 0 = 14336 bytes, 4096 tokens), else V1's 20.
        """
        num_ranks = as_int("num_ranks", num_ranks)
        num_sms = _num_sms("combine", num_ranks, hidden_bytes, num_tokens)
        return default_combine_config(num_ranks, num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes for `num_rdma_bytes` that low-latency calls of these sizes need.

        Enough for every format, any top-k and `get_next_low_latency_combine_buffer`. With 32
        experts or more it is less than V1's hint, so that a size from there works too.

        Args:
            num_max_dispatch_tokens_per_rank: `M`.
            hidden: `H`.
            num_ranks: `R`.
            num_experts: `E`.

        Returns:
            A multiple of 128 that grows with each argument.

        Raises:
            ValueError: An argument is not positive.
        """
        sizes = {
            "num_max_dispatch_tokens_per_rank": num_max_dispatch_tokens_per_rank,
            "hidden": hidden,
            "num_ranks": num_ranks,
            "num_experts": num_experts,
        }
        numbers = {name: as_int(name, value) for name, value in sizes.items()}
        reasons = [f"{name} is {value}" for name, value in numbers.items() if value <= 0]
        if reasons:
            raise ValueError(f"{', '.join(reasons)}, but must be at least 1")
        return low_latency_size_hint(*numbers.values())

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
        """The communication stream.

        Once somebody has asked for it, all calls of the normal mode run there, as in V1; before,
        only those with `async_finish` or a `previous_event`, and others on the current stream.

        Raises:
            RuntimeError: The buffer lives on the CPU, where there are no streams.
        """
        if self._comm is None:
            self._check_alive()
            raise RuntimeError(
                "this Buffer lives on the CPU, where there is no communication stream"
            )
        self._shows_comm = True
        return self._comm.torch_stream

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """This rank's own NVLink or RDMA buffer as a tensor.

        It may be read and written between operations, when all ranks have ended the one before:
        peers may read until then. An operation uses all of it. Nothing that is written there can
        break a later operation.

        Args:
            dtype: Element type of the view.
            size: Shape; None is one dimension of everything from `offset` on.
            offset: Bytes from the start of the buffer.
            use_rdma_buffer: That of `num_rdma_bytes`; in low-latency mode, the one of its calls.

        Raises:
            ValueError: `size` does not fit.
        """
        self._check_alive()
        offset = as_int("offset", offset)
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        with self._entered():
            whole = self._memory(use_rdma_buffer).tensor(torch.uint8)
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

    def _memory(self, use_rdma_buffer: bool) -> Any:
        """What a user may look at; nothing but `num_nvl_bytes` or `num_rdma_bytes` of it."""
        if use_rdma_buffer and self._low_latency is not None:
            return self._low_latency.memory
        if self._cpu is not None:
            return self._cpu_rdma_memory if use_rdma_buffer else self._cpu_memory
        mode: Any = self._mode
        # In one domain num_rdma_bytes is 0, and nothing of the memory is seen.
        return mode.rdma_memory if use_rdma_buffer and self._num_domains > 1 else mode.memory

    # ---- life ------------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Frees everything; collective, but none waits long for a rank that does not call it.

        What a dispatch of the variant ``direct`` returned stays usable, and keeps the memory.

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
        if not self._resources.is_ours():  # a forked child has a copy of the Buffer alone
            self._let_go()
            return
        with self._entered():
            if self._cpu is None:
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "a Buffer cannot be destroyed while a CUDA graph is captured, for nothing "
                        "may be freed meanwhile; destroy it after the capture"
                    )
                with suppress(RuntimeError):  # which comes again below, where all is freed
                    synchronize(self.device)  # before anything is freed: here Ctrl-C may end it
            self._let_go().close()

    def _let_go(self) -> Resources:
        """Ends the use of what was made; the caller gives it back."""
        self.runtime, self._low_latency, self._comm = None, None, None
        vars(self).pop("_mode", None)
        vars(self).pop("_layout", None)
        return self._resources

    def _drop(self) -> None:
        """Frees everything, if need be after the capture of a CUDA graph."""
        with self._entered():
            captures = is_capturing()  # looks at the streams, too, which go next
            resources = self._let_go()
            if captures:
                resources.leave()
            else:
                resources.close()

    def __enter__(self) -> Buffer:
        """The Buffer itself, to be destroyed at the end of the block, however it was made."""
        self._check_alive()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Destroys the Buffer; after an exception, without a wait for peers that may not come."""
        if self.runtime is None:
            return
        if kind is None:
            self._release()
            return
        for mode in (vars(self).get("_mode"), self._low_latency):
            if mode is not None:
                with suppress(Exception):  # the exception of the block is the one to see
                    mode.give_up()
        with suppress(Exception):
            self._drop()

    def __repr__(self) -> str:
        if not hasattr(self, "_handle_type"):
            return "<Buffer, not made>"
        facts = [
            f"rank {self.rank} of {self.group_size} on {self.device}",
            f"num_nvl_bytes={self.num_nvl_bytes}",
            f"num_rdma_bytes={self.num_rdma_bytes}",
        ]
        if self._num_domains > 1:
            facts.append(f"{self._num_domains} NVLink domains")
        if self.low_latency_mode:
            facts.append("low_latency_mode" + ", enable_shrink" * self.enable_shrink)
        if self.runtime is None:
            facts.append("destroyed")
        return f"<Buffer: {', '.join(facts)}>"

    def __del__(self) -> None:
        """Frees what is left, if need be after a graph capture; waits for no peer that is gone."""
        if getattr(self, "runtime", None) is None or not self._resources.is_ours():
            return
        if sys.is_finalizing():  # what could be freed has been, see `epjit.life`
            return
        if self.explicitly_destroy:
            if not is_ending():
                warnings.warn(
                    "a Buffer with explicitly_destroy=True was never destroyed; its memory leaks",
                    RuntimeWarning,
                    stacklevel=1,
                )
            return
        try:
            self._drop()
        except Exception as error:  # nothing may leave a destructor
            warnings.warn(f"a Buffer could not be freed: {error}", RuntimeWarning, stacklevel=1)

    def _is_captured(self) -> bool:
        """Whether a graph is being captured, by any thread, on a stream that a call ran on."""
        return self._comm is not None and self._comm.is_captured(self._last_stream)

    def reset(self) -> None:
        """Makes the buffer usable again after a `CommunicationError`; collective.

        What was under way is lost, a hook that was not called must not be called any more, and all
        masks are taken away.

        Raises:
            CommunicationError: A rank does not come; names it.
        """
        self._check_alive(fault=False)
        with self._entered():
            self._unreceived = None
            if self._cpu is not None:
                self._cpu.reset()
            else:
                self._mode.reset()
            if self._low_latency is not None:
                self._low_latency.reset()

    def check_fault(self) -> None:
        """Raises what an operation on the device left behind, as the next one would.

        A host that only replays CUDA graphs calls this where it synchronises.

        Raises:
            CommunicationError: A peer did not come: names operation, rank and peer. Or more rows
                came than `num_worst_tokens`: names operation, rank, how many came and how many fit.
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

        For the kernels of the low-latency calls see `low_latency_warmup`.

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
        hidden_bytes = as_int("hidden_bytes", hidden_bytes)
        num_topk, num_scales = as_int("num_topk", num_topk), as_int("num_scales", num_scales)
        if hidden_bytes <= 0 or hidden_bytes % 16 or hidden_bytes > MAX_ROW_BYTES:
            raise ValueError(
                f"hidden_bytes is {hidden_bytes}, but must be a multiple of 16, "
                f"at most {MAX_ROW_BYTES}"
            )
        if not 0 <= num_topk <= MAX_TOPK or num_scales < 0:
            raise ValueError(
                f"num_topk is {num_topk} (0 to {MAX_TOPK}) and num_scales {num_scales} (0 or more)"
            )
        from epjit.kernels.shapes import warmup_shapes

        shapes = warmup_shapes(
            hidden_bytes,
            num_topk=num_topk,
            num_scales=num_scales,
            topk_is_int64=topk_idx_dtype == torch.int64,
            is_f16=combine_dtype == torch.float16,
        )
        if self._cpu is not None:
            for shape in shapes:
                self._chosen.launch(shape)
            return
        with self._entered():
            self._mode.warmup(shapes, env.torch_cuda_arch_list())

    def _check_alive(self, *, fault: bool = True) -> None:
        check_runs("a call of a Buffer")
        if self.runtime is None:
            raise RuntimeError("this Buffer is destroyed")
        give_back_left()
        if not fault:
            return
        if self._cpu is not None:
            self._cpu.raise_fault()
            return
        self._mode.raise_fault()
        if self._low_latency is not None:
            self._low_latency.raise_fault()

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
            previous_event: What to wait for instead of the current stream. Outputs then belong to
                the communication stream, and torch's allocator knows who else uses them.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: V1's flag, which `previous_event` includes.

        Returns:
            `num_tokens_per_rank` int32 `[R]`, `num_tokens_per_rdma_rank` int32 `[D]` (None in one
            NVLink domain), `num_tokens_per_expert` int32 `[E]`, `is_token_in_rank` bool `[T, R]`,
            the event.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            CommunicationError: An earlier operation of this buffer failed.
        """
        self._check_alive()
        num_experts = as_int("num_experts", num_experts)
        arguments = (signature(topk_idx), num_experts)
        if arguments not in self._passed:
            check(
                "topk_idx",
                topk_idx,
                shape=("num_tokens", "num_topk"),
                dtype=_INDEX_DTYPES,
                device=self.device,
            )
            check_topk(topk_idx)
            self._check_experts(num_experts)
            remember(self._passed, arguments, True)
        if self._values is not None:
            self._values.get_dispatch_layout(topk_idx, num_experts, after=previous_event)
        if self._cpu is not None:
            cpu_scope = CpuScope.of_call(previous_event, async_finish, allocate_on_comm_stream)
            return *self._cpu.layout(topk_idx, num_experts), cpu_scope.finish()
        specs = (
            vector(torch.int32, self.group_size),
            vector(torch.int32, self._num_domains) if self._num_domains > 1 else None,
            vector(torch.int32, num_experts),
            matrix(torch.bool, topk_idx.shape[0], self.group_size),
        )
        with (
            self._entered(),
            self._scope(previous_event, async_finish, allocate_on_comm_stream) as scope,
        ):
            with scope.allocating():
                per_rank, per_rdma_rank, per_expert, in_rank = self._empty(specs)
            scope.start()
            self._layout(scope.stream, topk_idx, per_rank, per_rdma_rank, per_expert, in_rank)
            event = scope.finish((topk_idx,), (per_rank, per_rdma_rank, per_expert, in_rank))
        return per_rank, per_rdma_rank, per_expert, in_rank, event

    @signatures.dispatch
    def dispatch(
        self,
        x: Payload,
        handle: GivenHandle | None = None,
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

        With ``EPJIT_DISPATCH_VARIANT=direct`` outputs lie in memory of the Buffer, where peers
        write them, if there is room (``EPJIT_DIRECT_BYTES``), and are used again when the last
        tensor over one is gone and what was queued until then is done: on the stream that was
        current in this call, and on the one that is current where the last tensor goes. So they
        are used like tensors that torch has allocated on this stream, but `Tensor.record_stream`
        does nothing for them: before the last tensor goes, work of any other stream (that of
        another Buffer's ``async_finish`` call too) must be done, or one of these two wait for it.
        They may be kept beyond `destroy`; then the memory goes with the last of them.

        Args:
            x: `[T, H]` of any dtype, rows a multiple of 16 bytes up to 32 KB; or a tuple of that
                with one byte an element and scales `[T, S]`, float32 or int32, of any strides.
            handle: From an earlier dispatch.
            num_tokens_per_rank: int32 `[R]` from `get_dispatch_layout`.
            num_tokens_per_rdma_rank: int32 `[D]`; not used in one NVLink domain.
            is_token_in_rank: bool `[T, R]`.
            num_tokens_per_expert: int32 `[E]`.
            topk_idx: int64 or int32 `[T, K]`, `K <= 32`, with `topk_weights` or not at all.
            topk_weights: float32 `[T, K]`.
            expert_alignment: Counts in the returned list are rounded up to a multiple of it.
            num_worst_tokens: Rows of every output, at least what arrives: `R` times the most tokens
                of any rank. The host then does not wait (capturable), and the list is empty; rows
                that nothing arrived for are -1 in `recv_topk_idx`, undefined elsewhere. If more
                arrive, the last ones are left out here and in the sums of `combine`, all else goes
                on, on the other ranks too, and the next call of this rank (or `check_fault`) raises
                a `CommunicationError` that says how many came. The Buffer needs no `reset`.
            config: Only `num_sms` matters; None is `get_dispatch_config`.
            previous_event: What to wait for instead of the current stream. Outputs then belong to
                the communication stream, and torch's allocator knows who else uses them.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: V1's flag, which `previous_event` includes.

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
            routing = self._check_handle(handle, num_tokens=rows.shape[0])
            if self._values is not None:
                self._values.handle(routing, after=previous_event)
            if self._cpu is not None:
                cpu_scope = CpuScope.of_call(previous_event, async_finish, allocate_on_comm_stream)
                self._chosen.check_dispatch(rows, scales, None, num_sms=config.num_sms)
                recv_x, recv_scales = self._cpu.cached_dispatch(rows, scales, routing)
                event = cpu_scope.finish()
            else:
                with (
                    self._entered(),
                    self._scope(previous_event, async_finish, allocate_on_comm_stream) as scope,
                ):
                    recv_x, recv_scales = self._mode.cached_dispatch(
                        scope, rows, scales, routing, num_sms=config.num_sms
                    )
                    event = scope.finish((rows, scales, *routing), (recv_x, recv_scales))
            return _payload(recv_x, recv_scales), None, None, None, None, event

        per_rdma_rank = num_tokens_per_rdma_rank if self._num_domains > 1 else None
        self._check_routing(
            rows.shape[0],
            num_tokens_per_rank,
            per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
        )
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        expert_alignment = as_int("expert_alignment", expert_alignment, least=1)
        num_worst_tokens = as_int("num_worst_tokens", num_worst_tokens, least=0)
        if num_worst_tokens > 0 and topk_idx is None:
            raise ValueError(
                "num_worst_tokens needs topk_idx: without it nothing says which rows arrived"
            )
        layout = (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
        if self._values is not None:
            self._values.dispatch(
                topk_idx,
                topk_weights,
                num_tokens_per_rank,
                is_token_in_rank,
                num_tokens_per_expert,
                per_rdma_rank,
                after=previous_event,
            )
        if self._cpu is not None:
            cpu_scope = CpuScope.of_call(previous_event, async_finish, allocate_on_comm_stream)
            self._chosen.check_dispatch(rows, scales, topk_idx, num_sms=config.num_sms)
            result = self._cpu.dispatch(
                rows,
                scales,
                topk_idx,
                topk_weights,
                *layout,
                num_tokens_per_rdma_rank=per_rdma_rank,
                expert_alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
            )
            event = cpu_scope.finish()
        else:
            counts = [num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert]
            if per_rdma_rank is not None:
                counts.insert(1, per_rdma_rank)
            with (
                self._entered(),
                self._scope(previous_event, async_finish, allocate_on_comm_stream) as scope,
            ):
                if num_worst_tokens == 0 and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "dispatch must read the number of received rows on the host, which a CUDA "
                        "graph cannot; pass num_worst_tokens (rows enough for the worst case), or "
                        "a handle"
                    )
                result = self._mode.dispatch(
                    scope,
                    rows,
                    scales,
                    topk_idx,
                    topk_weights,
                    *counts,
                    expert_alignment=expert_alignment,
                    num_worst_tokens=num_worst_tokens,
                    num_sms=config.num_sms,
                )
                outputs = (
                    result.recv_x,
                    result.recv_scales,
                    result.recv_topk_idx,
                    result.recv_topk_weights,
                    *result.handle,
                )
                event = scope.finish((rows, scales, topk_idx, topk_weights, *counts), outputs)
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
        handle: GivenHandle,
        topk_weights: torch.Tensor | None = None,
        bias: Bias = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Brings the rows of a dispatch back to the ranks of their tokens and sums them.

        The sum is in fp32, biases first, then source ranks in ascending order, rounded once;
        nothing is weighted. With several NVLink domains the rows of each are summed and rounded
        first, and these sums are added. The host does not wait.

        Args:
            x: bfloat16 or float16 `[n, H]`, one row for each received row.
            handle: From the dispatch; it stays valid.
            topk_weights: float32 `[n, K]`, summed over ranks as well, or None.
            bias: `[T, H]` of x's dtype, or a pair of them, or None.
            config: Only `num_sms` matters; None is `get_combine_config`.
            previous_event: What to wait for instead of the current stream. Outputs then belong to
                the communication stream, and torch's allocator knows who else uses them.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: V1's flag, which `previous_event` includes.

        Returns:
            `combined_x` `[T, H]`, `combined_topk_weights` float32 `[T, K]` or None, the event.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            CommunicationError: An earlier operation of this buffer failed.
        """
        self._check_alive()
        routing = self._check_handle(handle, num_tokens=None)
        num_rows, num_tokens = routing.num_rows, routing.num_tokens
        bias_0, bias_1 = self._unpack_bias(bias)
        self._check_returned(x, topk_weights, bias_0, bias_1, num_rows, num_tokens)
        if config is None:
            config = self.get_combine_config(
                self.group_size,
                hidden_bytes=x.shape[1] * x.element_size(),
                num_tokens=num_tokens,
            )
        self._check_config(config)
        if self._values is not None:
            self._values.handle(routing, after=previous_event)
        if self._cpu is not None:
            cpu_scope = CpuScope.of_call(previous_event, async_finish, allocate_on_comm_stream)
            self._chosen.check_combine(x, topk_weights, num_sms=config.num_sms)
            combined_x, combined_weights = self._cpu.combine(
                x, routing, topk_weights, (bias_0, bias_1)
            )
            return combined_x, combined_weights, cpu_scope.finish()
        with (
            self._entered(),
            self._scope(previous_event, async_finish, allocate_on_comm_stream) as scope,
        ):
            combined_x, combined_weights = self._mode.combine(
                scope, x, routing, topk_weights, (bias_0, bias_1), num_sms=config.num_sms
            )
            event = scope.finish(
                (x, topk_weights, bias_0, bias_1, *routing), (combined_x, combined_weights)
            )
        return combined_x, combined_weights, event

    # V1's names for a group that spans nodes; there `dispatch` and `combine` lead to them.
    internode_dispatch = dispatch
    internode_combine = combine

    # ---- low latency -----------------------------------------------------------------------------

    @signatures.low_latency_dispatch
    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        quantization: str | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> tuple[Payload, torch.Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Sends each token to each expert it chose, cast on the way; the host does not wait.

        Every choice arrives as a row of its own, also a repeated one. The rows of a local expert
        lie packed at the front of its `R * M`, by source rank, then by token, then by choice:
        always in the same order. What lies behind them is undefined.

        With `return_recv_hook` only the sending is queued, on the current stream, and no SM is
        held afterwards; the outputs are valid once the returned hook has been called, which queues
        the receiving on that same stream. One operation of a buffer can wait for its hook at a
        time.

        Args:
            x: bfloat16 `[T, H]`, `T <= M`, rows a multiple of 16 bytes up to 32 KB; `H` a multiple
                of 128 with `use_fp8`, 512 with `use_ue8m0`, 32 for mxfp8 and nvfp4. Finite.
            topk_idx: int64 or int32 `[T, K]`, `K <= 32`; anything outside `[0, E)` is no selection.
            num_max_dispatch_tokens_per_rank: `M`, the same on all ranks.
            num_experts: `E`, a multiple of `R`.
            cumulative_local_expert_recv_stats: int32 `[E // R]`, to which the received rows of each
                expert are added.
            dispatch_wait_recv_cost_stats: int64 `[R]`, to which the cycles are added that this rank
                waited for each source.
            use_fp8: Rows arrive as float8_e4m3fn with a scale for each 128 channels.
            round_scale: With `use_fp8`: scales are powers of two.
            use_ue8m0: With `round_scale`: scales are exponents, four in an int32.
            async_finish: Return an event instead of making the current stream wait.
            return_recv_hook: Return a hook that receives.
            quantization: ``"mxfp8"`` or ``"nvfp4"`` instead of what the three flags say.
            global_scale: float32 `[1]`, greater than 0, with nvfp4 only, the same on all ranks.

        Returns:
            `recv_x`: bfloat16 `[E // R, R * M, H]`, or a tuple with scales, whose formulas
            `epjit.formats` has: float8_e4m3fn and float32 `[E // R, R * M, H / 128]` (int32
            `[E // R, R * M, H / 512]` with `use_ue8m0`), a transposed view, strides
            `(S * R * M, 1, R * M)`; mxfp8: float8_e4m3fn and float8_e8m0fnu
            `[E // R, R * M, H / 32]`, row-major; nvfp4: uint8 `[E // R, R * M, H / 2]`, two
            channels a byte, and float8_e4m3fn `[E // R, R * M, H / 16]`, row-major.
            `recv_count` int32 `[E // R]`: rows of each local expert.
            The handle: `src_info` int32 `[E // R, R * M]` (token of each row on its source rank),
            `layout_range` int64 `[E // R, R]` (``begin << 32 | count`` of each source rank), `M`,
            `H`, `E`. The event. The hook, or None.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            RuntimeError: Not in low-latency mode, or a hook has not been called.
            CommunicationError: An earlier operation of this buffer failed.
        """
        mode = self._ready_low_latency("low_latency_dispatch")
        check_forms(async_finish=async_finish, return_recv_hook=return_recv_hook)
        max_tokens = as_int("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
        num_experts = as_int("num_experts", num_experts)
        row_format = choose_format(
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            quantization=quantization,
        )
        call = self._low_latency_checks.dispatch(
            x,
            topk_idx,
            max_tokens,
            num_experts,
            row_format,
            global_scale=global_scale,
            recv_stats=cumulative_local_expert_recv_stats,
            wait_cost=dispatch_wait_recv_cost_stats,
        )
        if self._values is not None:
            self._values.low_latency_dispatch(x, topk_idx, num_experts)
        with self._entered(), self._low_latency_scope(async_finish) as scope:
            received, receive = mode.dispatch(
                scope,
                call,
                x,
                topk_idx,
                global_scale=global_scale,
                recv_stats=cumulative_local_expert_recv_stats,
                wait_cost=dispatch_wait_recv_cost_stats,
                split=return_recv_hook,
            )
            hook = self._hook("low_latency_dispatch", receive, scope.stream)
            event = scope.finish_keeping(
                (
                    x,
                    topk_idx,
                    global_scale,
                    cumulative_local_expert_recv_stats,
                    dispatch_wait_recv_cost_stats,
                    *received,
                )
            )
        handle = LowLatencyHandle(
            received.src_info,
            received.layout_range,
            max_tokens,
            call.hidden,
            num_experts,
        )
        recv_x = _payload(received.recv_x, received.recv_scales)
        return recv_x, received.recv_count, handle, event, hook

    @signatures.low_latency_combine
    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: GivenLowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Brings the rows of a low-latency dispatch back and sums them with weights.

        `combined_x[t]` is the sum over `k`, ascending, of `topk_weights[t, k]` times the row that
        the expert `topk_idx[t, k]` made of the token: float32 from +0.0, products and sums rounded
        one by one, then rounded once to bfloat16. No selection and masked ranks add nothing. Only
        the rows that the handle's `layout_range` names are read. The host does not wait.

        Args:
            x: bfloat16 `[E // R, R * M, H]`, a row for each row of the dispatch.
            topk_idx: `[T, K]`, as dispatched. With a hook it and the weights are read until then.
            topk_weights: float32 `[T, K]`.
            handle: From the dispatch; it stays valid.
            use_logfmt: Rows travel in 10 bits a channel, with less precision: see
                `epjit.reference.low_latency.logfmt_round_trip`. `H` a multiple of 128.
            zero_copy: The rows were written to `get_next_low_latency_combine_buffer(handle)`; of
                `x` only the shape counts. Not with `use_logfmt`.
            async_finish: Return an event instead of making the current stream wait.
            return_recv_hook: Return a hook that receives; see `low_latency_dispatch`.
            out: bfloat16 `[T, H]` to write to, or None.
            combine_wait_recv_cost_stats: int64 `[R]`, to which the cycles are added that this rank
                waited for each peer.

        Returns:
            `combined_x` bfloat16 `[T, H]` (`out` if given), the event, the hook or None.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            RuntimeError: Not in low-latency mode, or a hook has not been called.
            CommunicationError: An earlier operation of this buffer failed.
        """
        mode = self._ready_low_latency("low_latency_combine")
        check_forms(async_finish=async_finish, return_recv_hook=return_recv_hook)
        routes = as_low_latency_handle(handle)
        call = self._low_latency_checks.combine(
            x,
            topk_idx,
            topk_weights,
            routes,
            use_logfmt=use_logfmt,
            zero_copy=zero_copy,
            out=out,
            wait_cost=combine_wait_recv_cost_stats,
        )
        src_info = routes.src_info
        if self._values is not None:
            self._values.low_latency_combine(topk_idx, topk_weights, src_info, call.num_experts)
        with self._entered(), self._low_latency_scope(async_finish) as scope:
            combined_x, receive = mode.combine(
                scope,
                call,
                x,
                topk_idx,
                topk_weights,
                src_info,
                out=out,
                wait_cost=combine_wait_recv_cost_stats,
                split=return_recv_hook,
            )
            hook = self._hook("low_latency_combine", receive, scope.stream)
            event = scope.finish_keeping(
                (
                    x,
                    topk_idx,
                    topk_weights,
                    src_info,
                    combined_x,
                    combine_wait_recv_cost_stats,
                )
            )
        return combined_x, event, hook

    def get_next_low_latency_combine_buffer(self, handle: GivenLowLatencyHandle) -> torch.Tensor:
        """Where `low_latency_combine(zero_copy=True)` finds its rows.

        Write all received rows there (``buffer[:, :, :] = y``) on the stream of that combine, with
        no other operation of this buffer in between.

        Args:
            handle: From the dispatch that will be combined.

        Returns:
            bfloat16 `[E // R, R * M, H]`, a view of the low-latency buffer.

        Raises:
            TypeError, ValueError: Not a handle, or the buffer is too small.
            RuntimeError: Not in low-latency mode, or destroyed.
        """
        mode = self._ready_low_latency("get_next_low_latency_combine_buffer", received=False)
        max_tokens, hidden, num_experts = self._low_latency_checks.send_buffer(
            as_low_latency_handle(handle)
        )
        with self._entered():
            return mode.send_buffer(num_experts=num_experts, max_tokens=max_tokens, hidden=hidden)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Meets the peers on the current stream, so that low-latency calls can follow anything.

        V1 needs it after anything else wrote to the low-latency buffer. Here nothing can be broken
        there, but with `enable_shrink` it is where a rank that was masked joins again. Collective;
        the host does not wait.

        Args:
            num_max_dispatch_tokens_per_rank: `M`.
            hidden: `H`.
            num_experts: `E`.

        Raises:
            ValueError: Sizes that no low-latency call can have.
            RuntimeError: Not in low-latency mode, or a hook has not been called.
            CommunicationError: An earlier operation of this buffer failed.
        """
        mode = self._ready_low_latency("clean_low_latency_buffer")
        self._low_latency_checks.sizes(num_max_dispatch_tokens_per_rank, num_experts)
        self._low_latency_checks.hidden(hidden)
        with self._in_order() as stream:
            mode.clean(stream)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Masks a rank in the low-latency calls of this rank, or takes the mask away.

        Nothing is sent to a masked rank, and it is not waited for. Local, on the current stream.

        Args:
            rank_to_mask: The rank.
            mask: Whether it is masked from now on.

        Raises:
            ValueError: There is no such rank.
            RuntimeError: The buffer was made without `enable_shrink`.
        """
        mode = self._masking_mode("low_latency_update_mask_buffer")
        rank_to_mask = as_int("rank_to_mask", rank_to_mask)
        if not 0 <= rank_to_mask < self.group_size:
            raise ValueError(
                f"rank_to_mask is {rank_to_mask}, but must be between 0 and {self.group_size - 1}"
            )
        with self._in_order():
            mode.mask[rank_to_mask].fill_(int(mask))

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Copies the mask of this rank, which also has the ranks that did not answer in time.

        Args:
            mask_status: int32 `[R]` that is written to, on the current stream: 1 = masked.

        Raises:
            TypeError, ValueError: Not such a tensor.
            RuntimeError: The buffer was made without `enable_shrink`.
        """
        mode = self._masking_mode("low_latency_query_mask_buffer")
        check(
            "mask_status",
            mask_status,
            shape=(self.group_size,),
            dtype=torch.int32,
            device=self.device,
            why="one word for each rank",
        )
        with self._in_order():
            mask_status.copy_(mode.mask)

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes all masks of this rank away. Local, on the current stream.

        Raises:
            RuntimeError: The buffer was made without `enable_shrink`.
        """
        mode = self._masking_mode("low_latency_clean_mask_buffer")
        with self._in_order():
            mode.mask.zero_()

    def low_latency_warmup(
        self,
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_experts: int,
        *,
        num_topk: int,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        quantization: str | None = None,
        use_logfmt: bool = False,
        topk_idx_dtype: torch.dtype = torch.int64,
    ) -> None:
        """Compiles and loads the low-latency kernels of these sizes ahead; collective.

        As `warmup` does for the normal mode, ``TORCH_CUDA_ARCH_LIST`` included.

        Args:
            num_max_dispatch_tokens_per_rank: `M`.
            hidden: `H`.
            num_experts: `E`.
            num_topk: `K`.
            use_fp8: As in `low_latency_dispatch`, as are the three that follow.
            round_scale: See there.
            use_ue8m0: See there.
            quantization: See there.
            use_logfmt: As in `low_latency_combine`.
            topk_idx_dtype: int64 or int32.

        Raises:
            ValueError: Sizes that no low-latency call can have.
            RuntimeError: Not in low-latency mode, or a hook has not been called.
        """
        mode = self._ready_low_latency("low_latency_warmup")
        max_tokens = as_int("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
        hidden, num_experts = as_int("hidden", hidden), as_int("num_experts", num_experts)
        num_topk = as_int("num_topk", num_topk)
        row_format = choose_format(
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            quantization=quantization,
        )
        self._low_latency_checks.sizes(num_max_dispatch_tokens_per_rank, num_experts)
        self._low_latency_checks.hidden(hidden, row_format)
        if not 1 <= num_topk <= MAX_TOPK:
            raise ValueError(f"num_topk is {num_topk}, but must be between 1 and {MAX_TOPK}")
        if isinstance(mode, CpuLowLatency):
            return
        from epjit.kernels.low_latency import warmup_shapes

        shapes = warmup_shapes(
            hidden=hidden,
            num_experts=num_experts,
            num_topk=num_topk,
            topk_is_int64=topk_idx_dtype == torch.int64,
            row_format=row_format,
            use_logfmt=use_logfmt,
        )
        with self._entered():
            mode.warmup(
                shapes,
                env.torch_cuda_arch_list(),
                num_max_dispatch_tokens_per_rank=max_tokens,
            )

    def _ready_low_latency(self, op: str, *, received: bool = True) -> LowLatency | CpuLowLatency:
        """The low-latency mode, ready for `op`; `received`: no hook may be left to call."""
        self._check_alive()
        if self._low_latency is None:
            raise RuntimeError(
                f"{op} needs a Buffer that was made with low_latency_mode=True and num_rdma_bytes "
                "from Buffer.get_low_latency_rdma_size_hint"
            )
        if received and self._unreceived is not None:
            raise RuntimeError(
                f"{op} cannot start: the hook that {self._unreceived.op} returned has not been "
                "called, and one operation can be under way at a time; call that hook first"
            )
        return self._low_latency

    def _low_latency_scope(self, async_finish: bool) -> AnyScope:
        """The scope of a low-latency call. To be called in its turn."""
        if self._comm is None:
            return CpuScope(async_finish=async_finish)
        return self._scope(None, async_finish, False, is_low_latency=True)

    @contextmanager
    def _in_order(self) -> Iterator[int]:
        """What is queued on the current stream meanwhile follows the calls before, on any stream.

        Yields:
            Handle of the current stream.
        """
        with self._entered(), self._low_latency_scope(False) as scope:
            yield scope.stream
            scope.finish()

    def _hook(self, op: str, receive: Hook | None, stream: int) -> Hook | None:
        """What the caller gets for `receive`: it can be called once, and until reset()."""
        if receive is None:
            return None
        unreceived = self._unreceived = Unreceived(op)

        def hook() -> None:
            self._check_alive()
            with self._entered():
                if self._unreceived is not unreceived:
                    raise RuntimeError(
                        f"this hook of {op} was called already, or the Buffer was reset since; "
                        "each call returns a hook of its own, to be called once"
                    )
                self._unreceived = None
                self._follow(stream)
                try:
                    receive()
                finally:
                    if self._comm is not None:
                        self._comm.last_call = next_number()

        return hook

    def _masking_mode(self, op: str) -> LowLatency | CpuLowLatency:
        """What runs the low-latency calls, with masks."""
        self._check_alive(fault=False)
        if self._low_latency is None or not self.enable_shrink:
            raise RuntimeError(
                f"{op} needs a Buffer that was made with low_latency_mode=True and "
                "enable_shrink=True"
            )
        return self._low_latency

    # ---- checks ----------------------------------------------------------------------------------

    def _scope(
        self,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
        *,
        is_low_latency: bool = False,
    ) -> GpuScope:
        """Where a call runs: only what overlaps with the caller needs a stream of its own.

        (From one stream to another and back costs the GPU 3 us, and 20 to 35 on slow hosts.) Calls
        follow each other on the device, whatever streams they are made from. To be called in the
        turn in which the call is queued.
        """
        assert self._comm is not None
        event = event_of(previous_event)
        shows = self._shows_comm and not is_low_latency and not self._comm.is_current()
        scope: GpuScope
        if async_finish or allocate_on_comm_stream or event is not None or shows:
            scope = Scope(
                self._comm,
                previous_event,
                async_finish=async_finish,
                allocate_on_comm_stream=allocate_on_comm_stream,
            )
        else:
            scope = CurrentStream(self._comm)
        self._follow(scope.stream, event)
        return scope

    def _follow(self, stream: int, event: EventHandle | None = None) -> None:
        """What a call queues on `stream` waits for the call before, unless `event` says enough."""
        last, self._last_stream = self._last_stream, stream
        if self._comm is None or last in (None, stream):
            return
        # An event that was recorded there since stands for the call, and not for what came later.
        if event is None or not event.covers(last, self._comm.last_call):
            self._comm.follow(last, stream)

    def _check_experts(self, num_experts: int) -> None:
        several = self._num_domains > 1
        of_a_rank = MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS if several else MAX_LOCAL_EXPERTS
        most = min(MAX_EXPERTS, of_a_rank * self.group_size)
        check_experts(num_experts, self.group_size, most)

    def _check_config(self, config: Config) -> None:
        if not isinstance(config, Config):
            raise TypeError(
                f"config is a {type(config).__name__}, expected a Config such as "
                "Buffer.get_dispatch_config(num_ranks)"
            )
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
        arguments = signature(rows, scales)
        if arguments in self._passed:
            check_aligned("x", rows)
            return rows, scales
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
        remember(self._passed, arguments, True)
        return rows, scales

    def _check_returned(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        bias_0: torch.Tensor | None,
        bias_1: torch.Tensor | None,
        num_rows: int,
        num_tokens: int,
    ) -> None:
        """What a combine gets along with a handle of so many rows and tokens."""
        arguments = (signature(x, topk_weights, bias_0, bias_1), num_rows, num_tokens)
        biases = (("bias_0", bias_0), ("bias_1", bias_1))
        if arguments in self._passed:
            check_aligned("x", x)
            for name, value in biases:
                if value is not None:
                    check_aligned(name, value)
            return
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
            check_topk(topk_weights)
        for name, value in biases:
            if value is not None:
                why = "one row for each token of this rank"
                self._check_rows(name, value, num_tokens, (x.dtype,), why, x.shape[1])
        remember(self._passed, arguments, True)

    def _check_handle(self, handle: GivenHandle, *, num_tokens: int | None) -> Any:
        """The handle with names, of the type of this Buffer's mode."""
        device, named = self.device, as_handle(handle, self._handle_type, "dispatch")
        for index, tensor in enumerate(named):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"handle[{index}] is a {type(tensor).__name__}, expected what dispatch returned"
                )
            if tensor.device != device:
                raise ValueError(
                    f"handle[{index}] is on {tensor.device}, but this Buffer is on {device}; "
                    f"move it with .to({str(device)!r})"
                )
        ranks, domains, tokens = named.num_ranks, named.num_domains, named.num_tokens
        if ranks != self.group_size:
            raise ValueError(f"handle is of {ranks} ranks, but this Buffer has {self.group_size}")
        if domains != self._num_domains:
            raise ValueError(
                f"handle is of {domains} NVLink domains, but this Buffer has "
                f"{self._num_domains}; use it with the Buffer that made it"
            )
        if num_tokens is not None and tokens != num_tokens:
            raise ValueError(
                f"x has {num_tokens} tokens, but the handle routes {tokens}: "
                "a cached dispatch sends a row for each token of the first one"
            )
        for index, size in _handle_sizes(tokens, ranks, domains):
            if named[index].numel() != size:
                raise ValueError(
                    f"handle[{index}] has {named[index].numel()} elements, but that of a dispatch "
                    f"of {tokens} tokens between {ranks} ranks has {size}; pass the handle as "
                    "dispatch returned it"
                )
        return named

    def _check_routing(
        self,
        num_tokens: int,
        num_tokens_per_rank: torch.Tensor | None,
        num_tokens_per_rdma_rank: torch.Tensor | None,
        is_token_in_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
    ) -> None:
        arguments = (
            signature(
                num_tokens_per_rank,
                num_tokens_per_rdma_rank,
                is_token_in_rank,
                num_tokens_per_expert,
                topk_idx,
                topk_weights,
            ),
            num_tokens,
        )
        if arguments in self._passed:
            return
        given = {
            "num_tokens_per_rank": num_tokens_per_rank,
            "is_token_in_rank": is_token_in_rank,
            "num_tokens_per_expert": num_tokens_per_expert,
        }
        if self._num_domains > 1:
            given["num_tokens_per_rdma_rank"] = num_tokens_per_rdma_rank
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
        if self._num_domains > 1:
            check(
                "num_tokens_per_rdma_rank",
                num_tokens_per_rdma_rank,
                shape=(self._num_domains,),
                dtype=torch.int32,
                device=device,
                why="one count for each NVLink domain",
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
        self._check_experts(experts.shape[0])
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
            check_topk(topk_idx)
            check(
                "topk_weights",
                topk_weights,
                shape=tuple(topk_idx.shape),
                dtype=torch.float32,
                device=device,
                why="as topk_idx",
            )
        remember(self._passed, arguments, True)


@functools.lru_cache(maxsize=1024)  # asked in every call with a handle
def _handle_sizes(num_tokens: int, num_ranks: int, num_domains: int) -> list[tuple[int, int]]:
    """Elements of a handle's tensors, with their places, as far as the routing says them."""
    kind = handle_type(num_domains)
    specs = kind.specs(
        num_tokens=num_tokens, num_ranks=num_ranks, num_domains=num_domains, experts_per_rank=0
    )
    return [
        (index, math.prod(spec[0]))
        for index, (name, spec) in enumerate(zip(kind._fields, specs, strict=True))
        if spec is not None and name != "recv_expert_counts"
    ]


def _num_sms(op: str, num_ranks: int, hidden_bytes: int, num_tokens: int) -> int:
    if Buffer._sms_are_set or Buffer.num_sms != _DEFAULT_SMS or not tuned.load() or not use_gpu():
        return Buffer.num_sms
    found = tuned.best(
        op,
        gpu=torch.cuda.get_device_name(),
        num_ranks=num_ranks,
        hidden_bytes=as_int("hidden_bytes", hidden_bytes, least=0) or _DEFAULT_ROW_BYTES,
        num_tokens=as_int("num_tokens", num_tokens, least=0) or _DEFAULT_TOKENS,
    )
    return Buffer.num_sms if found is None else found.num_sms


def use_gpu() -> bool:
    """Whether Buffers live on a GPU.

    Raises:
        RuntimeError: ``EPJIT_BACKEND`` asks for one, and torch finds none.
    """
    backend = env.backend()
    if backend == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("EPJIT_BACKEND=cuda, but torch finds no GPU; unset it to run on the CPU")
    return backend != "cpu" and torch.cuda.is_available()


def _check_buffer(
    num_ranks: int,
    num_nvl_bytes: int,
    num_rdma_bytes: int,
    nvlink_domain: int | None,
) -> None:
    reasons = [
        f"{name} is {value}, but must be a multiple of {_SIZE_ALIGNMENT} and not negative"
        for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes))
        if value < 0 or value % _SIZE_ALIGNMENT
    ]
    if num_ranks > MAX_GROUP:
        reasons.append(f"the group has {num_ranks} ranks, but may have up to {MAX_GROUP}")
    if nvlink_domain is not None and nvlink_domain < 0:
        reasons.append(f"nvlink_domain is {nvlink_domain}, but must be a number of ranks, or 0")
    if reasons:
        raise ValueError("Buffer: " + "; ".join(reasons))


def _check_topology(
    topology: Topology, num_rdma_bytes: int, num_qps_per_rank: int, low_latency_mode: bool
) -> None:
    reasons = []
    if topology.num_local > MAX_RANKS:
        reasons.append(
            f"all {topology.num_local} ranks are in one NVLink domain, which may have up to "
            f"{MAX_RANKS}; cut it with nvlink_domain (EPJIT_NVLINK_DOMAIN), a number of ranks"
        )
    if not topology.spans_domains and num_rdma_bytes > 0 and not low_latency_mode:
        reasons.append(
            f"num_rdma_bytes is {num_rdma_bytes}, but {topology.num_local} ranks share one NVLink "
            "domain and use none; pass 0 (Config.get_rdma_buffer_size_hint does), or "
            "low_latency_mode=True, which uses it"
        )
    if num_qps_per_rank < 1 and (topology.spans_domains or low_latency_mode):
        reasons.append(
            f"num_qps_per_rank is {num_qps_per_rank}, but must be at least 1 (V1 takes the number "
            "of SMs, in low-latency mode that of local experts)"
        )
    if reasons:
        raise ValueError("Buffer: " + "; ".join(reasons))


def _payload(rows: torch.Tensor, scales: torch.Tensor | None) -> Payload:
    return rows if scales is None else (rows, scales)
