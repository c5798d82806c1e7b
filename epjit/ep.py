"""`EPBuffer`: the interface of DeepEP 2.5, which renames arguments of 2.1's `ElasticBuffer`."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor

from epjit.calls import Bias, Payload
from epjit.elastic import AnyEvent, ElasticBuffer, Received
from epjit.event import EventOverlap
from epjit.handles import EPHandle

Combined: TypeAlias = tuple[Tensor, "Tensor | None", EventOverlap]


class EPBuffer(ElasticBuffer):
    """Expert-parallel communication with the interface of DeepEP 2.5: an `ElasticBuffer`.

    Args:
        group: As for `ElasticBuffer`, as are all that are not named here.
        num_bytes: See there.
        num_max_tokens_per_rank: See there.
        hidden: See there.
        num_topk: See there.
        use_fp8_dispatch: See there.
        lb_allocation_plan_or_num_bytes: Must be 0: epjit moves no experts.
        deterministic: See `ElasticBuffer`.
        allow_hybrid_mode: See there.
        allow_multiple_reduction: See there.
        prefer_overlap_with_compute: See there.
        sl_idx: See there.
        num_allocated_qps: See there.
        num_cpu_timeout_secs: See there.
        num_gpu_timeout_secs: See there.
        explicitly_destroy: See there.
        comm: See there.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        lb_allocation_plan_or_num_bytes: Any = 0,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int | None = None,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
        *,
        comm: Any = None,
    ) -> None:
        if lb_allocation_plan_or_num_bytes != 0:
            raise NotImplementedError(
                "lb_allocation_plan_or_num_bytes must be 0: epjit does not move the weights of "
                "experts; broadcast them with torch.distributed"
            )
        super().__init__(
            group,
            num_bytes,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            hidden=hidden,
            num_topk=num_topk,
            use_fp8_dispatch=use_fp8_dispatch,
            deterministic=deterministic,
            allow_hybrid_mode=allow_hybrid_mode,
            allow_multiple_reduction=allow_multiple_reduction,
            prefer_overlap_with_compute=prefer_overlap_with_compute,
            sl_idx=sl_idx,
            num_allocated_qps=num_allocated_qps,
            num_cpu_timeout_secs=num_cpu_timeout_secs,
            num_gpu_timeout_secs=num_gpu_timeout_secs,
            explicitly_destroy=explicitly_destroy,
            comm=comm,
        )

    def barrier(  # type: ignore[override]
        self,
        wait_comm_stream: bool = True,
        with_cpu_sync: bool = False,
        sequential: bool = True,
        context_idx: int = 0,
    ) -> None:
        """Meets all ranks on the current stream, see `ElasticBuffer.barrier`.

        Args:
            wait_comm_stream: Accepted; what this buffer has queued there comes first.
            with_cpu_sync: The host waits for the device, before and after.
            sequential: Accepted.
            context_idx: Accepted.
        """
        del wait_comm_stream, context_idx
        super().barrier(with_cpu_sync=with_cpu_sync, sequential=sequential)

    def dispatch(  # type: ignore[override]
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
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = False,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        defer_epilogue: bool = False,
    ) -> Received | EventOverlap:
        """`ElasticBuffer.dispatch`; the handle holds `topk_idx` itself.

        Args:
            x: As there, as are all that are not named here.
            topk_idx: See there; must not be written to while the handle is in use.
            topk_weights: See there.
            cumulative_local_expert_recv_stats: See there.
            num_experts: See there.
            num_max_tokens_per_rank: See there.
            expert_alignment: See there.
            num_sms: See there.
            num_qps: See there.
            previous_event: See there.
            async_with_compute_stream: See there.
            allocate_on_comm_stream: See there.
            handle: See there.
            do_handle_copy: Must be False.
            do_cpu_sync: See `ElasticBuffer.dispatch`.
            do_expand: See there.
            do_zero_padding: See there.
            use_tma_aligned_col_major_sf: See there.
            defer_epilogue: Return the event alone, whose wait returns the rest. It needs
                `async_with_compute_stream`. (A host that waits for counts does so in the call.)

        Raises:
            AssertionError: `do_handle_copy`, or `defer_epilogue` of a synchronous call.
        """
        if do_handle_copy:
            raise AssertionError("do_handle_copy must be False; pass topk_idx.clone() instead")
        _check_deferral(defer_epilogue, async_with_compute_stream)
        received = super().dispatch(
            x,
            topk_idx,
            topk_weights,
            cumulative_local_expert_recv_stats,
            num_experts,
            num_max_tokens_per_rank,
            expert_alignment,
            num_sms,
            num_qps,
            previous_event,
            None,
            async_with_compute_stream,
            allocate_on_comm_stream,
            handle,
            False,
            do_cpu_sync,
            do_expand,
            do_zero_padding,
            use_tma_aligned_col_major_sf,
        )
        return _deferred(received) if defer_epilogue else received

    def combine(  # type: ignore[override]
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Bias = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: AnyEvent = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        defer_epilogue: bool = False,
    ) -> Combined | EventOverlap:
        """`ElasticBuffer.combine`.

        Args:
            x: As there, as are all that are not named here.
            handle: See there.
            topk_weights: See there.
            bias: See there.
            num_sms: See there.
            num_qps: See there.
            previous_event: See there.
            async_with_compute_stream: See there.
            allocate_on_comm_stream: See there.
            defer_epilogue: As in `dispatch`.
        """
        _check_deferral(defer_epilogue, async_with_compute_stream)
        combined = super().combine(
            x,
            handle,
            topk_weights,
            bias,
            num_sms,
            num_qps,
            previous_event,
            None,
            async_with_compute_stream,
            allocate_on_comm_stream,
        )
        return _deferred(combined) if defer_epilogue else combined


def _check_deferral(defers: bool, is_async: bool) -> None:
    if defers and not is_async:
        raise AssertionError("defer_epilogue=True needs async_with_compute_stream=True")


def _deferred(results: tuple[Any, ...]) -> EventOverlap:
    """The event of a call, whose wait returns what else the call has returned."""
    *rest, event = results
    event.register_hook_after_wait(lambda: tuple(rest))
    return event
