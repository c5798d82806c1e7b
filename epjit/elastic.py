"""`ElasticBuffer`: DeepEP 2's interface, as 2.1 has it, on the modes of a `Buffer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from epjit.buffer import Buffer
from epjit.calls import Bias, Payload, payload_of
from epjit.checks.elastic import ElasticChecks
from epjit.config import MAX_TOPK
from epjit.event import EventHandle, EventOverlap, event_of
from epjit.handles import EPHandle
from epjit.modes.elastic import Elastic
from epjit.modes.make import new_device
from epjit.numbers import as_int
from epjit.runtime.empty import empty_on
from epjit.runtime.group import Group, as_process_group
from epjit.runtime.topology import find_topology
from epjit.sizes import align

if TYPE_CHECKING:
    from epjit.scope import AnyScope

AnyEvent: TypeAlias = "EventHandle | EventOverlap | None"
Received: TypeAlias = tuple[Any, "Tensor | None", "Tensor | None", EPHandle, EventOverlap]
"""Rows as they were passed (a tensor, or a tuple with scales), indices, weights, handle, event."""

_SIZE_UNIT = 2 << 20
_LEAST_SMS_ALONE = 64  # where nothing computes beside
_QPS = 17
_MOST_QPS_OF_A_CALL = 9


class ElasticBuffer:
    """Expert-parallel communication with the interface of DeepEP 2 (its `ElasticBuffer` of 2.1).

    Words in the shapes below: those of `Buffer`, and `M` = `num_max_tokens_per_rank`, `m` rows by
    expert, `a` their alignment. The results of every call are always the same, to the bit, and so
    is the order of rows.

    Construction is collective; without a GPU the same interface works on CPU tensors, as that of
    `Buffer`, which is beneath: what is said there about streams, threads and graphs holds here.
    There may be any number of both in a process.

    With ``allow_multiple_reduction=False`` the sums of `combine` by expert have one rounding,
    whatever the number of ranks: the same bits with 1, 2, 4 and 8, and on the CPU.

    Args:
        group: As for `Buffer`.
        num_bytes: Bytes of GPU memory, a multiple of 2 MiB; None is `get_buffer_size_hint` of the
            sizes that follow. Fewer work too, in more rounds.
        num_cpu_bytes: Accepted for DeepEP's sake, as 0.
        num_max_tokens_per_rank: `M` of calls that are given none.
        hidden: `H`.
        num_topk: `K`; 0 = any.
        use_fp8_dispatch: Whether rows of a dispatch have one byte an element.
        deterministic: Accepted; it always is.
        allow_hybrid_mode: Accepted; with several NVLink domains there is one way.
        allow_multiple_reduction: Whether a rank sums, and rounds, its rows of a token before they
            travel. Without, each row by expert travels.
        prefer_overlap_with_compute: Whether suggested numbers of SMs leave room for others.
        sl_idx: Accepted.
        num_allocated_qps: Accepted, and can be read back; 0 is 17.
        num_cpu_timeout_secs: Accepted; the host waits for as long as the GPU, twice, and 10 s.
        num_gpu_timeout_secs: How long a wait of the GPU for a peer lasts.
        explicitly_destroy: Whether `destroy` will be called; else resources go with the object.
        comm: As for `Buffer`, when `group` is None.

    Attributes:
        group: The process group (`comm` when there is none).
        rank_idx: This rank.
        num_ranks: `R`.
        num_bytes: As passed, or the hint.
        num_max_tokens_per_rank: As passed.
        num_allocated_qps: As passed, or 17.
        scaleup_rank_idx: Number of this rank in its NVLink domain.
        scaleout_rank_idx: Its NVLink domain.
        num_scaleup_ranks: Ranks of a domain, as is `num_nvlink_ranks`.
        num_scaleout_ranks: Domains, as is `num_rdma_ranks`.

    Raises:
        TypeError, ValueError, RuntimeError: As of `Buffer`.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int | None = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
        *,
        comm: Any = None,
    ) -> None:
        if num_cpu_bytes:
            raise NotImplementedError(
                f"num_cpu_bytes is {num_cpu_bytes}, but must be 0: it is memory of the engram "
                "calls, which epjit does not have"
            )
        if group is None and comm is not None:
            links, self.group = Group.from_comm(comm), comm
        else:
            self.group = as_process_group(group)
            links = Group.from_torch(self.group)
        self.rank_idx, self.num_ranks = links.rank, links.size
        self.num_max_tokens_per_rank = as_int(
            "num_max_tokens_per_rank", num_max_tokens_per_rank, least=0
        )
        self._hidden = as_int("hidden", hidden, least=0)
        self.deterministic, self.allow_hybrid_mode = deterministic, allow_hybrid_mode
        self.allow_multiple_reduction = bool(allow_multiple_reduction)
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.sl_idx = sl_idx
        self.num_allocated_qps = as_int("num_allocated_qps", num_allocated_qps, least=0) or _QPS
        self.num_cpu_timeout_secs = num_cpu_timeout_secs
        self.num_gpu_timeout_secs = num_gpu_timeout_secs
        self.explicitly_destroy = explicitly_destroy
        if num_bytes is None:
            num_bytes = _size_hint(
                self.num_ranks,
                self.num_max_tokens_per_rank,
                self._hidden,
                num_topk,
                use_fp8_dispatch=use_fp8_dispatch,
                allow_multiple_reduction=self.allow_multiple_reduction,
            )
        self.num_bytes = _checked_size(num_bytes)
        self._make(links, None if group is None else self.group, comm)

    def _make(self, links: Group, group: Any, comm: Any) -> None:
        """Makes the Buffer beneath, the mode and the checks; collective."""
        topology = find_topology(links, device=new_device().index)
        self.scaleout_rank_idx, self.scaleup_rank_idx = topology.domain, topology.local
        self.num_scaleout_ranks = self.num_rdma_ranks = topology.num_domains
        self.num_scaleup_ranks = self.num_nvlink_ranks = topology.num_local
        self._buffer = buffer = Buffer(
            group,
            self.num_bytes,
            self.num_bytes if topology.spans_domains else 0,
            comm=comm,
            explicitly_destroy=self.explicitly_destroy,
            timeout_seconds=self.num_gpu_timeout_secs,
        )
        self._mode = Elastic(
            buffer._mode,
            rank=self.rank_idx,
            num_ranks=self.num_ranks,
            empty=empty_on(buffer.device),
            multiple_reduction=self.allow_multiple_reduction,
        )
        self._checks = ElasticChecks(
            num_ranks=self.num_ranks,
            num_domains=topology.num_domains,
            device=buffer.device,
            values=buffer._checks.values,
            num_sms=buffer._mode.num_sms,
            dispatch_config=Buffer.get_dispatch_config,
            combine_config=Buffer.get_combine_config,
            max_tokens=self.num_max_tokens_per_rank,
        )

    # ---- small members ---------------------------------------------------------------------------

    @property
    def runtime(self) -> Any:
        """DeepEP's inner object; None after `destroy`."""
        return self._buffer.runtime

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes for `num_bytes`, as DeepEP counts them: of its arguments alone, not collective.

        Args:
            group: Process group; only its size counts.
            num_max_tokens_per_rank: `M`.
            hidden: `H`.
            num_topk: `K`; 0 counts as 32.
            use_fp8_dispatch: As for the buffer.
            allow_hybrid_mode: Accepted.
            allow_multiple_reduction: As for the buffer.

        Returns:
            A multiple of 2 MiB.

        Raises:
            AssertionError: `M` or `H` is not given.
        """
        del allow_hybrid_mode
        return _size_hint(
            as_process_group(group).size(),
            num_max_tokens_per_rank,
            hidden,
            num_topk,
            use_fp8_dispatch=use_fp8_dispatch,
            allow_multiple_reduction=allow_multiple_reduction,
        )

    @staticmethod
    def capture() -> EventHandle:
        """An event recorded on the current stream, for `previous_event`."""
        return EventHandle()

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The communication stream, see `Buffer.get_comm_stream`."""
        return self._buffer.get_comm_stream()

    def get_physical_domain_size(self) -> tuple[int, int]:
        """NVLink domains, and ranks of one."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """The same: there is one way between domains."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """SMs that calls take which name none: what was tuned, as in `Buffer.get_dispatch_config`.

        Args:
            num_experts: Accepted, as is all that follows: nothing is modelled here.
            num_topk: Accepted.
            num_scaleout_topk: Accepted.
            rdma_gbs: Accepted.
            nvlink_gbs: Accepted.
            sm_read_gbs: Accepted.
            sm_write_gbs: Accepted.

        Returns:
            An even number; at least 64, if there are so many, without
            `prefer_overlap_with_compute`.
        """
        del num_experts, num_topk, num_scaleout_topk
        del rdma_gbs, nvlink_gbs, sm_read_gbs, sm_write_gbs
        config = Buffer.get_dispatch_config(
            self.num_ranks, hidden_bytes=2 * self._hidden, num_tokens=self.num_max_tokens_per_rank
        )
        num_sms = max(config.num_sms, 2)
        if not self.prefer_overlap_with_compute:
            num_sms = max(num_sms, _LEAST_SMS_ALONE)
        return self._checks.sms(min(num_sms, self._checks.num_sms))

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Queue pairs for calls of so many SMs, as DeepEP says; the number changes nothing."""
        return min(as_int("num_sms", num_sms, least=1), _MOST_QPS_OF_A_CALL, self.num_allocated_qps)

    # ---- life ------------------------------------------------------------------------------------

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Meets all ranks on the device: what follows comes after what all ranks have queued.

        Args:
            use_comm_stream: Accepted; the current stream meets, as if it waited for the other.
            with_cpu_sync: The host waits for the device, before and after.
            sequential: Accepted.

        Raises:
            CommunicationError: An earlier operation of this buffer failed.
        """
        del use_comm_stream, sequential
        buffer = self._buffer
        buffer._check_alive()
        if with_cpu_sync:
            self._synchronize()
        with buffer._entered(), buffer._streams.scope(None, False, False) as scope:
            used = self._mode.barrier(scope, num_sms=self._checks.sms(2))
            scope.finish(used)
        if with_cpu_sync:
            self._synchronize()

    def _synchronize(self) -> None:
        if self._buffer.device.type == "cuda":
            torch.cuda.synchronize(self._buffer.device)

    def destroy(self) -> None:
        """Frees everything; collective. A second call does nothing.

        Raises:
            AssertionError: The buffer was not made with ``explicitly_destroy=True``.
        """
        if not self.explicitly_destroy:
            raise AssertionError(
                "destroy() needs an ElasticBuffer that was made with explicitly_destroy=True"
            )
        if self.runtime is not None:
            self._buffer.destroy()

    def check_fault(self) -> None:
        """As `Buffer.check_fault`."""
        self._buffer.check_fault()

    def reset(self) -> None:
        """As `Buffer.reset`."""
        self._buffer.reset()

    def __repr__(self) -> str:
        if not hasattr(self, "_checks"):
            return "<ElasticBuffer, not made>"
        facts = [
            f"rank {self.rank_idx} of {self.num_ranks} on {self._buffer.device}",
            f"num_bytes={self.num_bytes}",
            f"num_max_tokens_per_rank={self.num_max_tokens_per_rank}",
        ]
        if self.runtime is None:
            facts.append("destroyed")
        return f"<ElasticBuffer: {', '.join(facts)}>"

    # ---- operations ------------------------------------------------------------------------------

    @torch.no_grad()
    def dispatch(
        self,
        x: Payload,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: AnyEvent = None,
        previous_event_before_epilogue: AnyEvent = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> Received:
        """Sends each token to the ranks of its experts: one row a rank, or one a choice.

        Rows come by source rank, then by token; with `do_expand` by local expert, then by source
        rank and token, those of each expert from a multiple of `expert_alignment` on. Without a
        host that waits (`do_cpu_sync=False`) outputs have room for whatever could come, and a CUDA
        graph can capture the call: `R * M` rows, by expert
        ``align(R * M * min(K, E // R) + (a - 1) * (E // R), a)``. What lies behind the rows that
        arrived is undefined, but for `recv_topk_idx`, which is -1.

        With `handle`, cached, other rows travel as those of an earlier dispatch, and come to lie
        where its metadata says; `topk_idx` is not given then, `do_expand` is given again.

        Args:
            x: `[T, H]` of any dtype, rows a multiple of 16 bytes up to 32 KB, `T <= M`; or a tuple
                of that with one byte an element and scales `[T, S]`, float32 or int32, of any
                strides.
            topk_idx: int64 or int32 `[T, K]`, `K <= 32`; anything outside `[0, E)` is no choice.
                No token may name an expert twice.
            topk_weights: float32 `[T, K]`, or None; never applied.
            cumulative_local_expert_recv_stats: int32 `[E // R]`, to which the choices of each
                local expert are added.
            num_experts: `E`, a multiple of `R`; not needed with a handle.
            num_max_tokens_per_rank: `M`, the same on all ranks; None is that of the buffer.
            expert_alignment: `a`; None is 1.
            num_sms: SMs; 0 = `get_theoretical_num_sms`, with a handle those of its dispatch.
            num_qps: Accepted.
            previous_event: Waited for instead of the current stream.
            previous_event_before_epilogue: Waited for as well.
            async_with_compute_stream: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: Must be True with a `previous_event`.
            handle: From an earlier dispatch.
            do_handle_copy: The handle gets a copy of `topk_idx`, else the tensor itself.
            do_cpu_sync: Whether the host waits for the counts; None is True without a handle.
            do_expand: Rows by expert.
            do_zero_padding: Rows between those of experts, their scales and weights are zeros; else
                undefined.
            use_tma_aligned_col_major_sf: Scales, if there are any, come as `[rows, S]` with strides
                ``(1, align(rows, 4))``, else row-major.

        Returns:
            Rows (with scales: a tuple), `recv_topk_idx` `[n, K]` (local experts, -1 for those of
            other ranks; None by expert), `recv_topk_weights` float32 `[n, K]` (0 where the index
            is -1; by expert `[m]`; None when none were given), the handle (with a handle: that
            object), the event.

        Raises:
            TypeError, ValueError, AssertionError: Arguments that do not fit; nothing was launched.
            RuntimeError: Needs the host to wait, while a CUDA graph is captured.
            CommunicationError: A peer did not come, now or in an earlier operation.
        """
        del num_qps
        buffer = self._buffer
        buffer._check_alive()
        previous = _previous(previous_event, allocate_on_comm_stream)
        call = self._checks.elastic_dispatch(
            x,
            topk_idx,
            topk_weights,
            cumulative_local_expert_recv_stats,
            handle,
            num_experts=num_experts,
            max_tokens=num_max_tokens_per_rank,
            expert_alignment=expert_alignment,
            num_sms=num_sms or self._sms_of(handle),
            do_cpu_sync=do_cpu_sync,
            do_expand=do_expand,
            do_zero_padding=do_zero_padding,
            do_handle_copy=do_handle_copy,
            column_major_scales=use_tma_aligned_col_major_sf,
            after=previous,
        )
        is_async = async_with_compute_stream
        with buffer._entered(), buffer._streams.scope(previous, is_async, False) as scope:
            _wait(scope, previous_event_before_epilogue)
            routed = self._mode.route(scope, call.handle, call.num_sms)
            received, used = self._mode.dispatch(scope, call)
            outputs = (*received, *vars(received.handle).values(), *routed)
            event = scope.finish((call, used), outputs)
        rows, scales, idx, weights, made = received
        return payload_of(rows, scales), idx, weights, made, event

    @torch.no_grad()
    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Bias = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: AnyEvent = None,
        previous_event_before_epilogue: AnyEvent = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Brings the rows of a dispatch back to the ranks of their tokens and sums them.

        The sum is in fp32 and rounded once: biases first, then the ranks of the token in the order
        of its last choice there. By expert a rank sums its rows of a token first, in the order of
        the choices, and rounds; without `allow_multiple_reduction` each row is added by the owner,
        in the order of the choices. Nothing is weighted. The host does not wait.

        Between NVLink domains what is added for a rank is first summed in each domain and rounded,
        in ascending order of ranks, then of domains; what is added without
        `allow_multiple_reduction`, by expert, as in one domain.

        Args:
            x: bfloat16 or float16 `[n, H]`, one row for each row of the dispatch; by expert of any
                number of rows: read are those that `handle.recv_src_metadata` names.
            handle: From the dispatch; it stays valid.
            topk_weights: float32 `[n, K]`, by expert `[rows of x]`, or None.
            bias: `[T, H]` of x's dtype, or a pair of them, or None.
            num_sms: SMs; 0 = those of the dispatch.
            num_qps: Accepted.
            previous_event: As in `dispatch`, as are the three that follow.
            previous_event_before_epilogue: See there.
            async_with_compute_stream: See there.
            allocate_on_comm_stream: See there.

        Returns:
            `combined_x` `[T, H]`; `combined_topk_weights` float32 `[T, K]`, of each choice what the
            rank of its expert passed for it, or None; the event.

        Raises:
            TypeError, ValueError, AssertionError: Arguments that do not fit; nothing was launched.
            CommunicationError: An earlier operation of this buffer failed.
        """
        del num_qps
        buffer = self._buffer
        buffer._check_alive()
        previous = _previous(previous_event, allocate_on_comm_stream)
        call = self._checks.elastic_combine(x, handle, topk_weights, bias, num_sms=num_sms)
        is_async = async_with_compute_stream
        with buffer._entered(), buffer._streams.scope(previous, is_async, False) as scope:
            _wait(scope, previous_event_before_epilogue)
            routed = self._mode.route(scope, handle, call.num_sms)
            combined, used = self._mode.combine(scope, call)
            return *combined, scope.finish((call, used), (*combined, *routed))

    def _sms_of(self, handle: EPHandle | None) -> int:
        return getattr(handle, "num_sms", 0) or self.get_theoretical_num_sms(0, 0)


def _checked_size(num_bytes: int) -> int:
    """`num_bytes` of a buffer.

    Raises:
        ValueError: It is no multiple of 2 MiB, or not positive.
    """
    size = as_int("num_bytes", num_bytes, least=1)
    if size % _SIZE_UNIT:
        raise ValueError(
            f"num_bytes is {size}, but must be a multiple of {_SIZE_UNIT} (2 MiB), as "
            "ElasticBuffer.get_buffer_size_hint gives it"
        )
    return size


def _size_hint(
    num_ranks: int,
    max_tokens: int,
    hidden: int,
    num_topk: int,
    *,
    use_fp8_dispatch: bool,
    allow_multiple_reduction: bool,
) -> int:
    """The larger of what DeepEP takes for a dispatch and for a combine."""
    max_tokens = as_int("num_max_tokens_per_rank", max_tokens)
    hidden, num_topk = as_int("hidden", hidden), as_int("num_topk", num_topk, least=0) or MAX_TOPK
    if max_tokens <= 0 or hidden <= 0:
        raise AssertionError(
            f"num_max_tokens_per_rank is {max_tokens} and hidden {hidden}, but without num_bytes "
            "both must be given"
        )
    row = align(hidden * (1 if use_fp8_dispatch else 2), 32)
    scales = align(4 * -(-hidden // 32), 32) if use_fp8_dispatch else 0
    sent = num_ranks * (row + scales + align(8 * num_topk + 4 * (num_topk + 1), 32))
    rows_back = min(num_ranks, num_topk) if allow_multiple_reduction else num_topk
    returned = rows_back * (align(2 * hidden, 32) + align(8 * num_topk, 32))
    return align(max_tokens * max(sent, returned), _SIZE_UNIT)


def _previous(event: AnyEvent, allocates: bool) -> EventOverlap | None:
    """The event that a call waits for. Where outputs are allocated follows from it."""
    if event is not None and not allocates:
        raise AssertionError("previous_event needs allocate_on_comm_stream=True")
    return EventOverlap(event) if isinstance(event, EventHandle) else event


def _wait(scope: AnyScope, event: AnyEvent) -> None:
    """Makes the stream of the scope wait for one event more."""
    event = event if isinstance(event, EventHandle) else event_of(event)
    if event is not None:
        with scope.running():
            event.current_stream_wait()


def _not_served(name: str, instead: str) -> Callable[..., NoReturn]:
    def method(self: ElasticBuffer, *args: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(f"epjit has no {name}; use {instead}")

    method.__name__ = name
    method.__doc__ = f"Not served: use {instead}."
    return method


_INSTEAD = {
    "torch.distributed.broadcast for weights of experts": (
        "lb_prefetch_weights",
        "lb_reduce_grads",
    ),
    "torch.distributed.all_to_all_single for rows of other ranks": (
        "engram_write",
        "engram_fetch",
        "get_engram_storage_size_hint",
    ),
    "torch.distributed.isend and irecv": (
        "pp_set_config",
        "pp_send",
        "pp_recv",
        "get_pp_buffer_size_hint",
    ),
    "torch.distributed.all_gather_into_tensor": (
        "agrs_set_config",
        "create_agrs_session",
        "destroy_agrs_session",
        "agrs_new_session",
        "agrs_get_inplace_tensor",
        "get_agrs_buffer_size_hint",
        "all_gather",
    ),
}
for _instead, _names in _INSTEAD.items():
    for _name in _names:
        setattr(ElasticBuffer, _name, _not_served(_name, _instead))
