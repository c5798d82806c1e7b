"""`Buffer`: DeepEP V1's interface. Checks everything once; owns stream, events and outputs.

Its low-latency calls are in `epjit.low_latency`, its end is in `epjit.life`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from epjit import env, signatures, tuned
from epjit.buffer_runtime import BufferRuntime
from epjit.calls import Bias, Payload, Settings, Setup, payload_of
from epjit.checks.construction import agree_on_settings, check_settings, check_topology
from epjit.checks.expert_major import ExpertChecks
from epjit.checks.low_latency import LowLatencyChecks
from epjit.checks.match import check_runs
from epjit.checks.normal import part_of
from epjit.checks.values import ValueChecks
from epjit.config import Config, default_combine_config, default_dispatch_config
from epjit.event import EventHandle, EventOverlap
from epjit.formats import CASTS
from epjit.handles import ExpertHandle, GivenExpertHandle, GivenHandle, Handle
from epjit.kernels.shapes import warmup_shapes
from epjit.life import Resources, give_back_left, watch
from epjit.low_latency import LowLatencyCalls
from epjit.modes.make import make_parts, new_device, use_gpu
from epjit.numbers import as_int, as_seconds
from epjit.runtime.group import Group, as_process_group
from epjit.runtime.topology import find_topology
from epjit.scope import Turns

_DEFAULT_SMS = 20
_DEFAULT_ROW_BYTES, _DEFAULT_TOKENS = 14336, 4096  # what V1's default configs were made for


class Buffer(LowLatencyCalls):
    """Expert-parallel communication between the ranks of a group, with DeepEP V1's interface.

    Words in the shapes below: `R` ranks, `T` tokens of this rank, `M` the most that a rank may have
    in a low-latency call, `H` elements a row, `K` top-k choices, `E` experts (expert `e` lives on
    rank `e // (E // R)`), `S` scales a token, `n` received rows, `D` NVLink domains.

    Calls come from any thread, whichever GPU is current there, and from any stream, by which the
    current stream of the Buffer's GPU is meant; on the GPU each runs after the one before. Only
    replays of a CUDA graph are not seen by the Buffer. They use what the calls use, so replay a
    graph that has captured calls on the stream of the other calls, or make that stream wait for the
    replay, and the replay for the calls before it; out of order, each takes the other's rows.

    The tensors of a call with `async_finish` may be dropped at once: the Buffer keeps them until
    the call is done. (Only a storage that is emptied in place, by ``resize_(0)``, has to wait for
    the event.)

    Construction is collective. On a machine with a GPU the buffer lives on the current device;
    without one (or with ``EPJIT_BACKEND=cpu``) the same interface works on CPU tensors with the
    same results, and refuses what a GPU refuses. ``with Buffer(...) as buffer:`` destroys the
    buffer at the end of the block, whatever `explicitly_destroy` says.

    Ranks that reach each other over NVLink are a domain. With several domains (several hosts, or
    `nvlink_domain`) rows travel between them by RDMA, and the normal mode's handles have ten
    tensors instead of six.

    Args:
        group: `torch.distributed` process group of any backend, or a DeviceMesh of one dimension.
            Only its rank, its size and one ``all_gather_object`` are used; all Buffers of a group
            meet at one store.
        num_nvl_bytes: Bytes of the NVLink buffer, a multiple of 128.
            `Config.get_nvl_buffer_size_hint` gives a good value; with less (or more) everything
            works too, in more (or fewer) rounds. About 5 MB are added.
        num_rdma_bytes: Bytes of the RDMA buffer, a multiple of 128. With several domains the normal
            mode needs what `Config.get_rdma_buffer_size_hint` says; the low-latency calls need what
            `get_low_latency_rdma_size_hint` says (and take twice that with several domains), the
            larger of both with both. Must be 0 when nothing uses it.
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
        device: The device that tensors must be on.
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
        self.runtime = None
        self.explicitly_destroy = explicitly_destroy
        check_runs("making a Buffer")
        if group is None and comm is not None:
            links = Group.from_comm(comm)
            self.group = comm
        else:
            self.group = as_process_group(group)
            links = Group.from_torch(self.group)
        self._links, self.rank, self.group_size = links, links.rank, links.size
        num_nvl_bytes = as_int("num_nvl_bytes", num_nvl_bytes)
        num_rdma_bytes = as_int("num_rdma_bytes", num_rdma_bytes)
        num_qps_per_rank = as_int("num_qps_per_rank", num_qps_per_rank)
        if nvlink_domain is not None:
            nvlink_domain = as_int("nvlink_domain", nvlink_domain)
        if timeout_seconds is None:
            timeout_seconds = env.timeout_seconds()
        else:
            timeout_seconds = as_seconds("timeout_seconds", timeout_seconds)
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink
        if num_rdma_bytes or low_latency_mode:
            self.nvshmem_qp_depth = env.nvshmem_qp_depth()
        settings = Settings(
            num_nvl_bytes,
            num_rdma_bytes,
            bool(low_latency_mode),
            bool(enable_shrink),
            bool(use_fabric),
            num_qps_per_rank,
            timeout_seconds,
        )
        check_settings(settings, links.size, nvlink_domain)
        self._make(settings, nvlink_domain)
        self.runtime = BufferRuntime(self)
        watch(self)

    def _make(self, settings: Settings, nvlink_domain: int | None) -> None:
        """Finds the NVLink domains, and makes the parts and the checks; collective."""
        self._low_latency = None
        self._unreceived = None
        self.device = new_device()
        self._entered = Turns(self.device.index)
        self._resources = Resources(self._entered)
        give_back_left()
        links = self._links
        self.topology = topology = find_topology(
            links,
            device=self.device.index,
            domain_size=nvlink_domain,
            use_fabric=settings.use_fabric,
        )
        check_topology(settings, topology)
        agree_on_settings(settings, topology, links)
        values = None
        if env.check_values():
            values = ValueChecks(topology, self._in_order)
        try:
            setup = Setup(settings, links, topology, self.device, self._resources)
            self._streams, self._mode, self._low_latency = make_parts(setup)
        except BaseException as error:  # whoever catches it may try a smaller size
            self._let_go().abandon(error)
            raise
        common: dict[str, Any] = {
            "num_ranks": links.size,
            "num_domains": topology.num_domains,
            "device": self.device,
            "values": values,
        }
        self._checks = ExpertChecks(
            **common,
            num_sms=self._mode.num_sms,
            dispatch_config=self.get_dispatch_config,
            combine_config=self.get_combine_config,
        )
        self._low_latency_checks = LowLatencyChecks(
            **common, num_rdma_bytes=settings.num_rdma_bytes
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
        """The config of combine, as `get_dispatch_config` is that of dispatch."""
        num_ranks = as_int("num_ranks", num_ranks)
        num_sms = _num_sms("combine", num_ranks, hidden_bytes, num_tokens)
        return default_combine_config(num_ranks, num_sms)

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The communication stream.

        Once somebody has asked for it, all calls of the normal mode run there, as in V1; before,
        only those with `async_finish` or a `previous_event`, and others on the current stream.

        Raises:
            RuntimeError: The buffer lives on the CPU, where there are no streams.
        """
        if self.runtime is None:
            self._check_alive()
        return self._streams.communication_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Tensor:
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
        return part_of(whole, num_bytes, dtype, size, offset)

    def _memory(self, use_rdma_buffer: bool) -> Any:
        """The memory that begins with `num_nvl_bytes` or `num_rdma_bytes` for the user."""
        if use_rdma_buffer and self._low_latency is not None:
            return self._low_latency.memory
        mode: Any = self._mode
        # In one domain num_rdma_bytes is 0, and nothing of the memory is seen.
        return mode.rdma_memory if use_rdma_buffer and self.topology.spans_domains else mode.memory

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

    def __repr__(self) -> str:
        if not hasattr(self, "_checks"):
            return "<Buffer, not made>"
        facts = [
            f"rank {self.rank} of {self.group_size} on {self.device}",
            f"num_nvl_bytes={self.num_nvl_bytes}",
            f"num_rdma_bytes={self.num_rdma_bytes}",
        ]
        if self.topology.spans_domains:
            facts.append(f"{self.topology.num_domains} NVLink domains")
        if self.low_latency_mode:
            facts.append("low_latency_mode" + ", enable_shrink" * self.enable_shrink)
        if self.runtime is None:
            facts.append("destroyed")
        return f"<Buffer: {', '.join(facts)}>"

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
        cast: str | None = None,
        expert_major: bool = False,
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
            cast: Also dispatches that cast rows of `combine_dtype` to this format.
            expert_major: Also `expert_dispatch`, with and without weights and a handle, and
                `expert_combine`; needs `num_topk`.

        Raises:
            ValueError: Sizes that no call can have.
        """
        self._check_alive()
        hidden_bytes = as_int("hidden_bytes", hidden_bytes)
        num_topk, num_scales = as_int("num_topk", num_topk), as_int("num_scales", num_scales)
        self._checks.warmup(
            hidden_bytes, num_topk, num_scales, cast=cast, expert_major=expert_major
        )
        shapes = warmup_shapes(
            hidden_bytes,
            num_topk=num_topk,
            num_scales=num_scales,
            topk_is_int64=topk_idx_dtype == torch.int64,
            is_f16=combine_dtype == torch.float16,
            row_format=None if cast is None else CASTS[cast],
            expert_major=expert_major,
        )
        with self._entered():
            self._mode.warmup(shapes)

    # ---- normal mode -----------------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Counts where tokens go. Local: no peer is waited for, and the host does not wait.

        Args:
            topk_idx: int64 or int32 `[T, K]`; anything outside `[0, E)` is no selection.
            num_experts: `E`, a multiple of `R`.
            previous_event: Waited for instead of the current stream. Outputs then belong to
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
        call = self._checks.layout(topk_idx, num_experts, after=previous_event)
        with (
            self._entered(),
            self._streams.scope(previous_event, async_finish, allocate_on_comm_stream) as scope,
        ):
            routing = self._mode.layout(scope, call)
            return *routing, scope.finish(call, routing)

    @signatures.dispatch
    def dispatch(
        self,
        x: Payload,
        handle: GivenHandle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        cast: str | None = None,
        global_scale: Tensor | None = None,
    ) -> tuple[
        Payload, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap
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
                with one byte an element and scales `[T, S]`, float32 or int32, of any strides;
                bfloat16 or float16 with `cast`.
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
            previous_event: Waited for instead of the current stream. Outputs then belong to
                the communication stream, and torch's allocator knows who else uses them.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: V1's flag, which `previous_event` includes.
            cast: None, or the format that rows are cast to before they cross the links: ``"fp8"``,
                ``"fp8_row"``, ``"fp8_round"``, ``"fp8_ue8m0"``, ``"mxfp8"``, ``"nvfp4"`` (see
                `epjit.formats`). In one NVLink domain.
            global_scale: float32 `[1]`, greater than 0, with nvfp4 only, the same on all ranks.

        Returns:
            `recv_x` `[n, H]` (with scales: a tuple with `[n, S]`, row-major; of a cast as
            `low_latency_dispatch` has them),
            `recv_topk_idx` `[n, K]` (local experts, -1 for those of other ranks),
            `recv_topk_weights` `[n, K]` (0 where the index is -1), list of received selections for
            each local expert, handle, event. Cached: None for everything but `recv_x` and event.
            Outputs begin storages that may be longer: by a quarter, or up to 64 MB in all.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            RuntimeError: Needs the host to wait, while a CUDA graph is captured.
            CommunicationError: A peer did not come, now or in an earlier operation.
        """
        self._check_alive()
        call = self._checks.dispatch(
            x,
            handle,
            (
                num_tokens_per_rank,
                num_tokens_per_rdma_rank,
                num_tokens_per_expert,
                is_token_in_rank,
            ),
            topk_idx,
            topk_weights,
            expert_alignment,
            num_worst_tokens,
            config,
            cast=cast,
            global_scale=global_scale,
            after=previous_event,
        )
        with (
            self._entered(),
            self._streams.scope(previous_event, async_finish, allocate_on_comm_stream) as scope,
        ):
            received = self._mode.dispatch(scope, call)
            event = scope.finish(call, received)
        rows, scales, idx, weights, per_expert, made = received
        return payload_of(rows, scales), idx, weights, per_expert, made, event

    def combine(
        self,
        x: Tensor,
        handle: GivenHandle,
        topk_weights: Tensor | None = None,
        bias: Bias = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
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
            previous_event: Waited for instead of the current stream. Outputs then belong to
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
        call = self._checks.combine(x, handle, topk_weights, bias, config, after=previous_event)
        with (
            self._entered(),
            self._streams.scope(previous_event, async_finish, allocate_on_comm_stream) as scope,
        ):
            combined = self._mode.combine(scope, call)
            return *combined, scope.finish(call, combined)

    # V1's names for a group that spans nodes; there `dispatch` and `combine` lead to them.
    internode_dispatch = dispatch
    internode_combine = combine

    # ---- rows by expert --------------------------------------------------------------------------

    @signatures.expert_dispatch
    def expert_dispatch(
        self,
        x: Payload,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        num_experts: int | None = None,
        handle: GivenExpertHandle | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        num_expert_rows: int = 0,
        zero_padding: bool = False,
        column_major_scales: bool = False,
        cast: str | None = None,
        global_scale: Tensor | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Payload, Tensor | None, ExpertHandle, EventOverlap]:
        """Sends each token to each expert it chose: rows in the order that a grouped product takes.

        The rows of expert 0, padding up to a multiple of the alignment, the rows of expert 1, ...;
        of an expert by source rank, then by token, then by choice. A repeated choice has a row of
        its own. A token still crosses the links once a rank. With `handle` (a cached dispatch)
        another payload goes to the rows of an earlier dispatch, by `handle.placement.row_of`.
        Between NVLink domains a second pass on this GPU orders what a `dispatch` has brought.

        Args:
            x: As in `dispatch`; bfloat16 or float16 `[T, H]` with `cast`.
            topk_idx: int64 or int32 `[T, K]`, `K <= 32`; anything outside `[0, E)` is no choice.
            topk_weights: float32 `[T, K]`, or None on all ranks.
            num_experts: `E`, a multiple of `R`; with `topk_idx`.
            handle: From an earlier expert dispatch; then no `topk_idx` and no sizes.
            expert_alignment: Each expert's rows are padded to a multiple of it.
            num_worst_tokens: 0: the host waits for the number of rows. Or tokens that there is room
                for, as in `dispatch`; then sizes are static and the host does not wait.
            num_expert_rows: With `num_worst_tokens`: rows of the outputs. Choices that do not fit
                are dropped, and `handle.placement.counts` counts them too. 0 = always enough.
            zero_padding: Rows and scales of the padding are zeros; else undefined.
            column_major_scales: Scales of 4 bytes lie column by column, each padded to 16 bytes.
            cast: None, or the format that rows are cast to before they cross the links: ``"fp8"``,
                ``"fp8_row"``, ``"fp8_round"``, ``"fp8_ue8m0"``, ``"mxfp8"``, ``"nvfp4"`` (see
                `epjit.formats`).
            global_scale: float32 `[1]`, greater than 0, with nvfp4 only, the same on all ranks.
            config: Only `num_sms` matters; None is `get_dispatch_config`.
            previous_event: Waited for instead of the current stream. Outputs then belong to
                the communication stream, and torch's allocator knows who else uses them.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: V1's flag, which `previous_event` includes.

        Returns:
            Rows `[m, H]` (with scales: a tuple with `[m, S]`), weights float32 `[m]` (0 where no
            choice is) or None, the handle, the event. Behind the last expert, whose end is
            `handle.placement.ends[-1]`, rows and scales are undefined. A cached one returns the
            handle that it was given.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            RuntimeError: Needs the host to wait, while a CUDA graph is captured.
            CommunicationError: A peer did not come, now or in an earlier operation.
        """
        self._check_alive()
        sizes = (
            as_int("expert_alignment", expert_alignment, least=1),
            as_int("num_worst_tokens", num_worst_tokens, least=0),
            as_int("num_expert_rows", num_expert_rows, least=0),
        )
        call = self._checks.expert_dispatch(
            x,
            handle,
            topk_idx,
            topk_weights,
            None if num_experts is None else as_int("num_experts", num_experts),
            sizes,
            zero_padding=zero_padding,
            column_major_scales=column_major_scales,
            cast=cast,
            global_scale=global_scale,
            config=config,
            after=previous_event,
        )
        with (
            self._entered(),
            self._streams.scope(previous_event, async_finish, allocate_on_comm_stream) as scope,
        ):
            received, used = self._mode.expert_dispatch(scope, call)
            event = scope.finish(call, (received, used))
        rows, scales, weights, made = received[:4]
        return payload_of(rows, scales), weights, made, event

    @signatures.expert_combine
    def expert_combine(
        self,
        rows: Tensor,
        handle: GivenExpertHandle,
        *,
        row_weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        bias: Bias = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Brings rows by expert back to the ranks of their tokens and sums them.

        Each rank adds the rows that a token has there in fp32, in the order of its choices, and
        rounds the sum once; these sums are added as `combine` adds rows. The host does not wait.
        Between NVLink domains a pass of its own makes these sums.

        Args:
            rows: bfloat16 or float16 `[m, H]`, of any length: only the rows that
                `handle.placement.row_of` names are read.
            handle: From the expert dispatch; it stays valid.
            row_weights: float32, one a row, which the rows are multiplied with, or None.
            topk_weights: float32, one a row, which comes back as it is, or None.
            bias: `[T, H]` of the dtype of `rows`, or a pair of them, or None.
            config: Only `num_sms` matters; None is `get_combine_config`.
            previous_event: Waited for instead of the current stream. Outputs then belong to
                the communication stream, and torch's allocator knows who else uses them.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: V1's flag, which `previous_event` includes.

        Returns:
            `[T, H]`; float32 `[T, K]` with what `topk_weights` has for each choice (0 where it has
            no row), or None; the event.

        Raises:
            TypeError, ValueError: Arguments that do not fit; nothing was launched.
            CommunicationError: An earlier operation of this buffer failed.
        """
        self._check_alive()
        call = self._checks.expert_combine(
            rows, handle, row_weights, topk_weights, bias, config, after=previous_event
        )
        with (
            self._entered(),
            self._streams.scope(previous_event, async_finish, allocate_on_comm_stream) as scope,
        ):
            combined, used = self._mode.expert_combine(scope, call)
            return *combined, scope.finish(call, (*combined, used))


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
