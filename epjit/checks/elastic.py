"""The preconditions of DeepEP 2's calls, checked before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from epjit.calls import Bias, ElasticCombine, ElasticDispatch, Layout, Payload
from epjit.checks.match import check_aligned, remember, signature
from epjit.checks.normal import INT32_MAX, NormalChecks, pair_of, rows_and_scales
from epjit.config import MAX_TOKENS
from epjit.handles import EPHandle, routing_of, row_bound
from epjit.numbers import as_int

if TYPE_CHECKING:
    from epjit.event import EventOverlap


@dataclass(frozen=True, kw_only=True)
class ElasticChecks(NormalChecks):
    """Checks of an `ElasticBuffer`'s calls; they raise before anything is launched.

    Attributes:
        max_tokens: `M` of calls that are given none; 0 when the buffer was given none either.
    """

    max_tokens: int

    # ---- calls -----------------------------------------------------------------------------------

    def elastic_dispatch(
        self,
        x: Payload,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        recv_stats: torch.Tensor | None,
        handle: EPHandle | None,
        *,
        num_experts: int | None,
        max_tokens: int | None,
        expert_alignment: int | None,
        num_sms: int,
        do_cpu_sync: bool | None,
        do_expand: bool,
        do_zero_padding: bool,
        do_handle_copy: bool,
        column_major_scales: bool,
        after: EventOverlap | None,
    ) -> ElasticDispatch:
        """Everything that `ElasticBuffer.dispatch` takes; `num_sms` is not 0.

        Raises:
            RuntimeError: The host would have to wait, while a CUDA graph is captured.
        """
        rows, scales = rows_and_scales(x)
        if do_zero_padding and not do_expand:
            raise AssertionError("do_zero_padding=True needs do_expand=True: else there is none")
        if handle is not None:
            self._cached(rows, topk_idx, recv_stats, handle, do_cpu_sync, do_expand=do_expand)
            given = (num_experts, max_tokens, expert_alignment)
            num_experts, max_tokens, expert_alignment = self._of_handle(handle, *given)
            topk_idx = handle.topk_idx
        if topk_idx is None:
            raise AssertionError("dispatch without a handle needs topk_idx")
        if num_experts is None:
            raise AssertionError("dispatch without a handle needs num_experts")
        num_experts = as_int("num_experts", num_experts)
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        max_tokens = as_int("num_max_tokens_per_rank", max_tokens)
        expert_alignment = 1 if expert_alignment is None else expert_alignment
        expert_alignment = as_int("expert_alignment", expert_alignment, least=1)
        tensors = rows, scales, topk_idx, topk_weights, recv_stats
        by_expert = expert_alignment if do_expand and handle is None else 0
        arguments = (signature(*tensors), num_experts, max_tokens, by_expert)
        if arguments in self._passed:
            check_aligned("x", rows)
        else:
            self._sent(*tensors, num_experts, max_tokens)
            if by_expert:
                local = num_experts // self.num_ranks
                sizes = self.num_ranks * max_tokens, min(topk_idx.shape[1], local), local
                self._by_expert(num_experts, row_bound(*sizes, expert_alignment))
            remember(self._passed, arguments, True)
        waits = handle is None and (do_cpu_sync is None or bool(do_cpu_sync))
        if waits and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dispatch must read the number of received rows on the host, which a CUDA graph "
                "cannot; pass do_cpu_sync=False, or a handle"
            )
        if self.values is not None and handle is None:
            self.values.layout(Layout(topk_idx, num_experts), after=after)
        return ElasticDispatch(
            rows,
            scales,
            topk_idx,
            topk_weights,
            recv_stats,
            handle,
            num_experts,
            max_tokens,
            expert_alignment,
            self.sms(num_sms),
            waits=waits,
            do_expand=bool(do_expand),
            zero_padding=bool(do_zero_padding),
            copies_choices=bool(do_handle_copy),
            column_major_scales=bool(column_major_scales),
        )

    def elastic_combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None,
        bias: Bias,
        *,
        num_sms: int,
    ) -> ElasticCombine:
        """Everything that `ElasticBuffer.combine` takes."""
        self._tensors_of(handle)
        bias_0, bias_1 = pair_of(bias) if isinstance(bias, tuple) else (bias, None)
        num_tokens, num_topk = handle.topk_idx.shape
        num_rows: Any = "num_rows"
        if not handle.do_expand:
            num_rows = handle.recv_src_metadata.shape[0]
            if x.shape[0] == handle.num_recv_tokens:  # the metadata was cut to what arrived
                num_rows = handle.num_recv_tokens
        self._returned(x, None, bias_0, bias_1, num_rows, num_tokens)
        if topk_weights is not None:
            shape = (x.shape[0],) if handle.do_expand else (x.shape[0], num_topk)
            why = "a weight for each row" if handle.do_expand else "a row for each row of x"
            self._check("topk_weights", topk_weights, shape, torch.float32, why)
        sms = self.sms(num_sms or handle.num_sms)
        return ElasticCombine(x, topk_weights, bias_0, bias_1, handle, sms)

    # ---- their parts -----------------------------------------------------------------------------

    def sms(self, num_sms: int) -> int:
        """A number of SMs that a kernel can take: an odd one is rounded up, as in DeepEP 2.5."""
        num_sms = as_int("num_sms", num_sms, least=1)
        if num_sms > self.num_sms:
            raise ValueError(f"num_sms is {num_sms}, but {self.device} has {self.num_sms}")
        return min(num_sms + num_sms % 2, self.num_sms // 2 * 2)

    def _sent(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        recv_stats: torch.Tensor | None,
        num_experts: int,
        max_tokens: int,
    ) -> None:
        """The tensors of a dispatch, and its sizes."""
        self._payload(rows, scales)
        self._experts(num_experts)
        if not 1 <= max_tokens <= MAX_TOKENS or max_tokens * self.num_ranks > INT32_MAX:
            raise ValueError(
                f"num_max_tokens_per_rank is {max_tokens}, but must be at least 1, at most "
                f"{min(MAX_TOKENS, INT32_MAX // self.num_ranks)}; pass it to the buffer or to "
                "dispatch, the same on all ranks"
            )
        if rows.shape[0] > max_tokens:
            raise ValueError(
                f"x has {rows.shape[0]} tokens, but num_max_tokens_per_rank is {max_tokens}"
            )
        self._check_topk_idx(topk_idx, x=rows)
        if topk_weights is not None:
            shape = tuple(topk_idx.shape)
            self._check("topk_weights", topk_weights, shape, torch.float32, "as topk_idx")
        if recv_stats is not None:
            name, num_local = "cumulative_local_expert_recv_stats", num_experts // self.num_ranks
            self._check(name, recv_stats, (num_local,), torch.int32, "one count a local expert")

    def _cached(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor | None,
        recv_stats: torch.Tensor | None,
        handle: EPHandle,
        do_cpu_sync: bool | None,
        *,
        do_expand: bool,
    ) -> None:
        """Arguments of a dispatch along a handle, and those that it does not take."""
        self._tensors_of(handle)
        if topk_idx is not None:
            raise AssertionError("a cached dispatch (handle=...) takes no topk_idx")
        if recv_stats is not None:
            raise AssertionError(
                "a cached dispatch (handle=...) takes no cumulative_local_expert_recv_stats"
            )
        if do_cpu_sync:
            raise AssertionError(
                "do_cpu_sync=True has nothing to wait for in a cached dispatch (handle=...), whose "
                "rows are those of the first one"
            )
        if do_expand and not handle.do_expand:
            raise ValueError(
                "do_expand=True needs a handle of a dispatch with do_expand=True: this one does "
                "not say where the rows of an expert lie"
            )
        num_tokens = handle.topk_idx.shape[0]
        if rows.shape[0] != num_tokens:
            raise ValueError(
                f"x has {rows.shape[0]} tokens, but the handle routes {num_tokens}: a cached "
                "dispatch sends a row for each token of the first one"
            )

    def _of_handle(self, handle: EPHandle, *given: int | None) -> list[int]:
        names = ("num_experts", "num_max_tokens_per_rank", "expert_alignment")
        values = []
        for name, value in zip(names, given, strict=True):
            own = getattr(handle, name)
            if value is not None and value != own:
                raise ValueError(
                    f"{name} is {value}, but that of the handle is {own}; leave it out in a cached "
                    "dispatch"
                )
            values.append(own)
        return values

    def _tensors_of(self, handle: EPHandle) -> None:
        """The fields of a handle that are read; a wrapper that has them is as good."""
        slots = getattr(handle, "dst_buffer_slot_idx", None)
        if slots is None:
            raise TypeError(
                f"handle is a {type(handle).__name__}, expected what ElasticBuffer.dispatch "
                "returned, or an object that has its fields"
            )
        topk_idx, metadata = handle.topk_idx, handle.recv_src_metadata
        num_rows = handle.num_recv_tokens
        arguments = (signature(topk_idx, metadata, slots), num_rows, handle.num_experts)
        if arguments not in self._passed:
            self._check_topk_idx(topk_idx)
            self._experts(handle.num_experts)
            name, num_topk = "handle.dst_buffer_slot_idx", topk_idx.shape[1]
            self._check(name, slots, tuple(topk_idx.shape), torch.int32, "as handle.topk_idx")
            name, why = "handle.recv_src_metadata", "a row for each received token"
            self._check(name, metadata, ("num_tokens", num_topk + 2), torch.int32, why)
            if metadata.shape[0] > num_rows:
                raise ValueError(
                    f"{name} has {metadata.shape[0]} rows, but {num_rows} were dispatched; it may "
                    "be cut, not grown"
                )
            remember(self._passed, arguments, True)
        routed = routing_of(handle)
        if routed is not None:
            self._handle(routed.handle, num_tokens=topk_idx.shape[0])
        elif handle.do_expand:
            shape = (handle.num_experts // self.num_ranks,)
            why = "one a local expert"
            for name in (
                "psum_num_recv_tokens_per_expert",
                "num_unaligned_recv_tokens_per_expert",
            ):
                self._check(f"handle.{name}", getattr(handle, name), shape, torch.int32, why)
