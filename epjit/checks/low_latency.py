"""The preconditions of the low-latency calls, checked before anything is launched."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from epjit import env
from epjit.checks.match import (
    as_handle,
    check,
    check_aligned,
    check_experts,
    check_topk,
    remember,
    signature,
)
from epjit.config import (
    MAX_LOW_LATENCY_CHOICES,
    MAX_LOW_LATENCY_EXPERTS,
    MAX_LOW_LATENCY_TOKENS,
    MAX_ROW_BYTES,
    low_latency_size_hint,
)
from epjit.formats import BF16, LOGFMT_BLOCK, NVFP4, RowFormat
from epjit.handles import LowLatencyHandle, dispatched_sizes
from epjit.numbers import as_int

_QUARTERS = 4  # two of them take turns to receive; the other two are the send buffer


@dataclass(frozen=True, eq=False)  # equal calls have the same object: told apart by identity
class _Call:
    """What is known of a call that passed the checks.

    Attributes:
        num_tokens: `T`.
        hidden: `H`.
        num_topk: `K`.
        topk_is_int64: Width of the choices.
        max_tokens: `M`.
        num_experts: `E`.
    """

    num_tokens: int
    hidden: int
    num_topk: int
    topk_is_int64: bool
    max_tokens: int
    num_experts: int


@dataclass(frozen=True, eq=False)
class DispatchCall(_Call):
    """A dispatch.

    Attributes:
        row_format: How rows arrive.
    """

    row_format: RowFormat


@dataclass(frozen=True, eq=False)
class CombineCall(_Call):
    """A combine.

    Attributes:
        use_logfmt: Whether rows travel in the logarithmic format.
        zero_copy: Whether the rows are in the send buffer.
    """

    use_logfmt: bool
    zero_copy: bool


@dataclass(frozen=True)
class LowLatencyChecks:
    """Checks for one Buffer; every method raises TypeError or ValueError, with value and remedy.

    Calls repeat: what passed is remembered by all that the checks look at, and then only addresses
    are looked at again. That takes 10 us of the host's time from a pair of calls.

    Attributes:
        num_ranks: `R`.
        num_rdma_bytes: Of the buffer.
        device: Of the buffer.
        num_domains: NVLink domains that the ranks span.
    """

    num_ranks: int
    num_rdma_bytes: int
    device: torch.device
    num_domains: int = 1
    _dispatches: dict[Hashable, DispatchCall] = field(default_factory=dict, repr=False)
    _combines: dict[Hashable, CombineCall] = field(default_factory=dict, repr=False)

    def sizes(self, max_tokens: int, num_experts: int) -> None:
        """`M` and `E`."""
        max_tokens = as_int("num_max_dispatch_tokens_per_rank", max_tokens)
        num_experts = as_int("num_experts", num_experts)
        if max_tokens < 1 or max_tokens * self.num_ranks > MAX_LOW_LATENCY_TOKENS:
            raise ValueError(
                f"num_max_dispatch_tokens_per_rank is {max_tokens}, but must be between 1 and "
                f"{MAX_LOW_LATENCY_TOKENS // self.num_ranks} for {self.num_ranks} ranks"
            )
        check_experts(num_experts, self.num_ranks, MAX_LOW_LATENCY_EXPERTS)

    def hidden(self, hidden: int, row_format: RowFormat = BF16) -> None:
        """`H`, for a format."""
        hidden = as_int("hidden", hidden)
        if hidden <= 0 or hidden % row_format.granularity or 2 * hidden > MAX_ROW_BYTES:
            raise ValueError(
                f"hidden is {hidden}, but rows in {row_format.name} must have a multiple of "
                f"{row_format.granularity} channels, at most {MAX_ROW_BYTES // 2}; pad them, or "
                "use another format"
            )

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        max_tokens: int,
        num_experts: int,
        row_format: RowFormat,
        *,
        global_scale: torch.Tensor | None,
        recv_stats: torch.Tensor | None,
        wait_cost: torch.Tensor | None,
    ) -> DispatchCall:
        """Everything that `low_latency_dispatch` takes."""
        arguments = (
            signature(x, topk_idx, global_scale, recv_stats, wait_cost),
            max_tokens,
            num_experts,
            row_format,
        )
        passed = self._dispatches.get(arguments)
        if passed is not None:
            check_aligned("x", x)
            return passed
        self.sizes(max_tokens, num_experts)
        shape = ("num_tokens", "hidden")
        check("x", x, shape=shape, dtype=torch.bfloat16, device=self.device)
        num_tokens, hidden = x.shape
        self.hidden(hidden, row_format)
        check_aligned("x", x)
        self._choices(topk_idx, max_tokens, num_tokens, "one row for each token of x")
        if row_format is NVFP4:
            if global_scale is None:
                raise ValueError(
                    "quantization='nvfp4' needs global_scale, a float32 tensor of shape (1,), the "
                    "same on all ranks; 448 * 6 / (largest magnitude) uses the whole range"
                )
            check(
                "global_scale",
                global_scale,
                shape=(1,),
                dtype=torch.float32,
                device=self.device,
            )
        elif global_scale is not None:
            raise ValueError(
                f"global_scale is given, but rows in {row_format.name} have none; pass it with "
                "quantization='nvfp4' only"
            )
        if recv_stats is not None:
            check(
                "cumulative_local_expert_recv_stats",
                recv_stats,
                shape=(num_experts // self.num_ranks,),
                dtype=torch.int32,
                device=self.device,
                why="one count for each local expert",
            )
        self._wait_cost("dispatch_wait_recv_cost_stats", wait_cost)
        self._room(
            f"low_latency_dispatch in {row_format.name}",
            self.num_ranks * max_tokens * row_format.slot_bytes(hidden),
            (max_tokens, hidden, num_experts),
        )
        call = DispatchCall(
            num_tokens,
            hidden,
            topk_idx.shape[1],
            topk_idx.dtype == torch.int64,
            max_tokens,
            num_experts,
            row_format,
        )
        return remember(self._dispatches, arguments, call)

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        *,
        use_logfmt: bool,
        zero_copy: bool,
        out: torch.Tensor | None,
        wait_cost: torch.Tensor | None,
    ) -> CombineCall:
        """Everything that `low_latency_combine` takes."""
        src_info, layout_range, max_tokens, hidden, num_experts = handle
        sizes = max_tokens, hidden, num_experts
        arguments = (
            signature(x, topk_idx, topk_weights, src_info, layout_range, out, wait_cost),
            _end(src_info),
            sizes,
            use_logfmt,
            zero_copy,
        )
        passed = self._combines.get(arguments)
        if passed is not None:
            check_aligned("x", x)
            if out is not None:
                check_aligned("out", out)
            return passed
        dispatched_tokens, dispatched_topk = self._handle(handle)
        shape = (num_experts // self.num_ranks, self.num_ranks * max_tokens, hidden)
        why = "one row for each row of the dispatch, received or not"
        check("x", x, shape=shape, dtype=torch.bfloat16, device=self.device, why=why)
        check_aligned("x", x)
        self._choices(topk_idx, max_tokens, "num_tokens", "")
        num_tokens, num_topk = topk_idx.shape
        if num_topk != dispatched_topk:
            raise ValueError(
                f"topk_idx has {num_topk} choices a token, but the handle is of a dispatch with "
                f"{dispatched_topk}; pass the topk_idx of that dispatch"
            )
        if num_tokens != dispatched_tokens:
            raise ValueError(
                f"topk_idx has {num_tokens} tokens, but the handle is of a dispatch of "
                f"{dispatched_tokens} by this rank; pass the topk_idx of that dispatch"
            )
        check(
            "topk_weights",
            topk_weights,
            shape=(num_tokens, num_topk),
            dtype=torch.float32,
            device=self.device,
            why="as topk_idx",
        )
        if use_logfmt and zero_copy:
            raise ValueError(
                "use_logfmt encodes rows on their way, so they cannot be sent as they lie in the "
                "buffer; pass only one of use_logfmt and zero_copy"
            )
        if use_logfmt and hidden % LOGFMT_BLOCK:
            raise ValueError(
                f"hidden is {hidden}, but use_logfmt takes blocks of {LOGFMT_BLOCK} channels; "
                "pass use_logfmt=False"
            )
        if out is not None:
            check(
                "out",
                out,
                shape=(num_tokens, hidden),
                dtype=torch.bfloat16,
                device=self.device,
                why="one row for each token of topk_idx",
            )
            check_aligned("out", out)
        self._wait_cost("combine_wait_recv_cost_stats", wait_cost)
        self._room(
            f"low_latency_combine of top-{num_topk}",
            # One row a choice; or, in the variant `reduced`, one a rank.
            max_tokens * 2 * hidden * max(num_topk, self.num_ranks),
            sizes,
        )
        if zero_copy or self.num_domains > 1:  # to other domains rows are sent from there
            self._room_to_send(sizes)
        call = CombineCall(
            num_tokens,
            hidden,
            num_topk,
            topk_idx.dtype == torch.int64,
            max_tokens,
            num_experts,
            use_logfmt,
            zero_copy,
        )
        return remember(self._combines, arguments, call)

    def send_buffer(self, handle: LowLatencyHandle) -> tuple[int, int, int]:
        """Checks what `get_next_low_latency_combine_buffer` takes; gives `M`, `H` and `E`."""
        self._handle(handle)
        sizes = handle.max_tokens, handle.hidden, handle.num_experts
        self._room_to_send(sizes)
        return sizes

    def _handle(self, handle: LowLatencyHandle) -> tuple[int, int]:
        """Checks what `low_latency_dispatch` returned; gives tokens and top-k of that call."""
        src_info, layout_range, max_tokens, hidden, num_experts = handle
        self.sizes(max_tokens, num_experts)
        self.hidden(hidden)
        shape = (num_experts // self.num_ranks, self.num_ranks * max_tokens)
        why = f"of {num_experts} experts and {max_tokens} tokens on {self.num_ranks} ranks"
        check(
            "handle[0] (src_info)",
            src_info,
            shape=shape,
            dtype=torch.int32,
            device=self.device,
            why=why,
        )
        check(
            "handle[1] (layout_range)",
            layout_range,
            shape=(shape[0], self.num_ranks),
            dtype=torch.int64,
            device=self.device,
            why=why,
        )
        return dispatched_sizes(src_info, self.num_ranks)

    def _choices(
        self, topk_idx: torch.Tensor, max_tokens: int, num_tokens: int | str, why: str
    ) -> None:
        check(
            "topk_idx",
            topk_idx,
            shape=(num_tokens, "num_topk"),
            dtype=(torch.int64, torch.int32),
            device=self.device,
            why=why,
        )
        check_topk(topk_idx)
        tokens, num_topk = topk_idx.shape
        if tokens > max_tokens:
            raise ValueError(
                f"this rank has {tokens} tokens, more than num_max_dispatch_tokens_per_rank="
                f"{max_tokens}; pass a larger one, the same on all ranks"
            )
        if max_tokens * num_topk > MAX_LOW_LATENCY_CHOICES:
            raise ValueError(
                f"{max_tokens} tokens with {num_topk} choices are {max_tokens * num_topk} rows, "
                f"but one call takes at most {MAX_LOW_LATENCY_CHOICES}; pass a smaller "
                "num_max_dispatch_tokens_per_rank"
            )

    def _wait_cost(self, name: str, wait_cost: torch.Tensor | None) -> None:
        if wait_cost is not None:
            check(
                name,
                wait_cost,
                shape=(self.num_ranks,),
                dtype=torch.int64,
                device=self.device,
                why="one sum for each rank",
            )

    def _room(self, what: str, num_bytes: int, sizes: tuple[int, int, int]) -> None:
        """Whether a quarter of the buffer holds what arrives; `sizes` are `M`, `H` and `E`."""
        if num_bytes > self.num_rdma_bytes // _QUARTERS:
            self._refuse(what, _QUARTERS * num_bytes, sizes)

    def _room_to_send(self, sizes: tuple[int, int, int]) -> None:
        """Whether half of the buffer holds a row for each row of a dispatch."""
        max_tokens, hidden, num_experts = sizes
        num_bytes = num_experts * max_tokens * 2 * hidden
        if num_bytes > self.num_rdma_bytes // 2:
            self._refuse("the send buffer", 2 * num_bytes, sizes)

    def _refuse(self, what: str, needed: int, sizes: tuple[int, int, int]) -> None:
        max_tokens, hidden, num_experts = sizes
        hint = low_latency_size_hint(max_tokens, hidden, self.num_ranks, num_experts)
        raise ValueError(
            f"{what} of {max_tokens} tokens a rank, hidden {hidden} and {num_experts} experts "
            f"needs num_rdma_bytes >= {needed}, but this Buffer has {self.num_rdma_bytes}; make it "
            f"with Buffer.get_low_latency_rdma_size_hint({max_tokens}, {hidden}, "
            f"{self.num_ranks}, {num_experts}), which is {hint}"
        )


def as_low_latency_handle(handle: Any) -> LowLatencyHandle:
    """The handle that a caller gives.

    Raises:
        TypeError: It is none.
    """
    named = as_handle(handle, LowLatencyHandle, "low_latency_dispatch")
    if named is handle:
        return named
    src_info, layout_range, *sizes = named
    numbers = (as_int(f"handle[{index}]", size) for index, size in enumerate(sizes, start=2))
    return LowLatencyHandle(src_info, layout_range, *numbers)


def _end(src_info: object) -> object:
    """What tells how much lies behind `src_info`."""
    if not isinstance(src_info, torch.Tensor):
        return None
    return src_info.untyped_storage().nbytes(), src_info.storage_offset()


def check_source(x: torch.Tensor, begin: int, end: int, *, use_logfmt: bool) -> None:
    """The rows of a combine between domains, which are staged in the send buffer.

    Args:
        x: The rows.
        begin: Address of the send buffer.
        end: The address behind it.
        use_logfmt: Whether they are encoded there.

    Raises:
        ValueError: They lie there already, and not each where it would be staged.
    """
    first = x.data_ptr()
    if first >= end or first + x.nbytes <= begin or (first == begin and not use_logfmt):
        return
    raise ValueError(
        "x overlaps the buffer of get_next_low_latency_combine_buffer, which between NVLink "
        "domains the rows are sent from; pass another tensor, or that buffer with "
        "zero_copy=True and without use_logfmt"
    )


def check_variant(num_domains: int) -> None:
    """The variant of combine that the environment asks for.

    Raises:
        ValueError: It does not work between NVLink domains.
    """
    variable = env.low_latency_combine_variant
    if num_domains > 1 and variable() == "reduced":
        raise ValueError(
            f"{variable.name}=reduced works in one NVLink domain only, and these ranks span "
            f"{num_domains}; unset it, or take ldst or tma"
        )


def check_forms(*, async_finish: bool, return_recv_hook: bool) -> None:
    """The two flags that say when a low-latency call returns.

    Raises:
        ValueError: Both are set.
    """
    if async_finish and return_recv_hook:
        raise ValueError(
            "async_finish and return_recv_hook exclude each other: a call returns an event or a "
            "hook; pass one of them"
        )
