"""The preconditions of the low-latency calls, checked before anything is launched."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from epjit import env
from epjit.calls import (
    CombineSizes,
    CombineTensors,
    DispatchSizes,
    DispatchTensors,
    LowLatencyCombine,
    LowLatencyDispatch,
)
from epjit.checks.match import (
    Checks,
    as_handle,
    check_aligned,
    check_experts,
    remember,
    signature,
)
from epjit.config import (
    MAX_LOW_LATENCY_CHOICES,
    MAX_LOW_LATENCY_EXPERTS,
    MAX_LOW_LATENCY_TOKENS,
    MAX_ROW_BYTES,
    MAX_TOPK,
    low_latency_size_hint,
)
from epjit.formats import BF16, LOGFMT_BLOCK, NVFP4, RowFormat
from epjit.handles import (
    DispatchedSizes,
    GivenLowLatencyHandle,
    LowLatencyHandle,
    dispatched_sizes,
)
from epjit.numbers import as_int

_QUARTERS = 4  # two of them take turns to receive; the other two are the send buffer


@dataclass(frozen=True, kw_only=True)
class LowLatencyChecks(Checks):
    """Checks of the low-latency calls. To remember takes 10 us of the host from a pair of them.

    Attributes:
        num_rdma_bytes: Of the buffer.
    """

    num_rdma_bytes: int
    _dispatches: dict[Hashable, DispatchSizes] = field(default_factory=dict, repr=False)
    _combines: dict[Hashable, CombineSizes] = field(default_factory=dict, repr=False)

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

    def warmup(
        self, max_tokens: int, hidden: int, num_experts: int, num_topk: int, row_format: RowFormat
    ) -> None:
        """Everything that `low_latency_warmup` takes."""
        self.sizes(max_tokens, num_experts)
        self.hidden(hidden, row_format)
        if not 1 <= num_topk <= MAX_TOPK:
            raise ValueError(f"num_topk is {num_topk}, but must be between 1 and {MAX_TOPK}")

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
        given: DispatchTensors,
        max_tokens: int,
        num_experts: int,
        row_format: RowFormat,
        *,
        split: bool,
    ) -> LowLatencyDispatch:
        """Everything that `low_latency_dispatch` takes."""
        arguments = (signature(*given), max_tokens, num_experts, row_format)
        sizes = self._dispatches.get(arguments)
        if sizes is None:
            sizes = self._check_dispatch(given, max_tokens, num_experts, row_format)
            remember(self._dispatches, arguments, sizes)
        else:
            check_aligned("x", given.x)
        call = LowLatencyDispatch(given, sizes, split)
        if self.values is not None:
            self.values.low_latency_dispatch(call)
        return call

    def _check_dispatch(
        self, given: DispatchTensors, max_tokens: int, num_experts: int, row_format: RowFormat
    ) -> DispatchSizes:
        x, topk_idx, topk_weights, global_scale, recv_stats, cycles = given
        self.sizes(max_tokens, num_experts)
        self._check("x", x, ("num_tokens", "hidden"), torch.bfloat16)
        num_tokens, hidden = x.shape
        self.hidden(hidden, row_format)
        check_aligned("x", x)
        self._choices(topk_idx, max_tokens, x=x)
        if topk_weights is not None:
            shape = (num_tokens, topk_idx.shape[1])
            self._check("topk_weights", topk_weights, shape, torch.float32, "as topk_idx")
        if row_format is NVFP4:
            if global_scale is None:
                raise ValueError(
                    "quantization='nvfp4' needs global_scale, a float32 tensor of shape (1,), the "
                    "same on all ranks; 448 * 6 / (largest magnitude) uses the whole range"
                )
            self._check("global_scale", global_scale, (1,), torch.float32)
        elif global_scale is not None:
            raise ValueError(
                f"global_scale is given, but rows in {row_format.name} have none; pass it with "
                "quantization='nvfp4' only"
            )
        if recv_stats is not None:
            name, counts = "cumulative_local_expert_recv_stats", (num_experts // self.num_ranks,)
            why = "one count for each local expert"
            self._check(name, recv_stats, counts, torch.int32, why)
        self._cycles("dispatch_wait_recv_cost_stats", cycles)
        self._room(
            f"low_latency_dispatch in {row_format.name}",
            self.num_ranks * max_tokens * row_format.slot_bytes(hidden),
            (max_tokens, hidden, num_experts),
        )
        return DispatchSizes(
            num_tokens,
            hidden,
            topk_idx.shape[1],
            topk_idx.dtype == torch.int64,
            max_tokens,
            num_experts,
            row_format,
            topk_weights is not None,
        )

    def combine(
        self,
        given: CombineTensors,
        handle: GivenLowLatencyHandle,
        *,
        use_logfmt: bool,
        zero_copy: bool,
        split: bool,
    ) -> LowLatencyCombine:
        """Everything that `low_latency_combine` takes."""
        own = as_low_latency_handle(handle)
        src_info, layout_range, *numbers = own
        arguments = (
            signature(*given, src_info, layout_range),
            _end(src_info),
            *numbers,
            use_logfmt,
            zero_copy,
        )
        sizes = self._combines.get(arguments)
        if sizes is None:
            sizes = self._check_combine(given, own, use_logfmt, zero_copy)
            remember(self._combines, arguments, sizes)
        else:
            check_aligned("x", given.x)
            if given.out is not None:
                check_aligned("out", given.out)
        call = LowLatencyCombine(given, src_info, sizes, split)
        if self.values is not None:
            self.values.low_latency_combine(call)
        return call

    def _check_combine(
        self, given: CombineTensors, handle: LowLatencyHandle, use_logfmt: bool, zero_copy: bool
    ) -> CombineSizes:
        x, topk_idx, topk_weights, out, cycles = given
        _, _, max_tokens, hidden, num_experts = handle
        dispatched = self._handle(handle)
        shape = (num_experts // self.num_ranks, self.num_ranks * max_tokens, hidden)
        why = "one row for each row of the dispatch, received or not"
        self._check("x", x, shape, torch.bfloat16, why)
        check_aligned("x", x)
        self._choices(topk_idx, max_tokens)
        num_tokens, num_topk = topk_idx.shape
        _check_as_dispatched((num_tokens, num_topk), dispatched[:2])
        shape_of_idx = (num_tokens, num_topk)
        self._check("topk_weights", topk_weights, shape_of_idx, torch.float32, "as topk_idx")
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
            why = "one row for each token of topk_idx"
            self._check("out", out, (num_tokens, hidden), torch.bfloat16, why)
            check_aligned("out", out)
        self._cycles("combine_wait_recv_cost_stats", cycles)
        self._room(
            f"low_latency_combine of top-{num_topk}",
            # One row a choice; or, in the variant `reduced`, one a rank.
            max_tokens * 2 * hidden * max(num_topk, self.num_ranks),
            (max_tokens, hidden, num_experts),
        )
        if zero_copy or self.spans_domains:  # rows to other domains are staged in as much
            self._room_to_send((max_tokens, hidden, num_experts))
        return CombineSizes(
            num_tokens,
            hidden,
            num_topk,
            topk_idx.dtype == torch.int64,
            max_tokens,
            num_experts,
            use_logfmt,
            zero_copy,
            dispatched.weights_sent,
        )

    def mask(self, mask_status: torch.Tensor) -> None:
        """Everything that `low_latency_query_mask_buffer` takes."""
        why = "one word for each rank"
        self._check("mask_status", mask_status, (self.num_ranks,), torch.int32, why)

    def send_buffer(self, handle: GivenLowLatencyHandle) -> LowLatencyHandle:
        """Everything that `get_next_low_latency_combine_buffer` takes."""
        own = as_low_latency_handle(handle)
        self._handle(own)
        self._room_to_send((own.max_tokens, own.hidden, own.num_experts))
        return own

    def _handle(self, handle: LowLatencyHandle) -> DispatchedSizes:
        """Checks what `low_latency_dispatch` returned, and gives what it says of that call."""
        src_info, layout_range, max_tokens, hidden, num_experts = handle
        self.sizes(max_tokens, num_experts)
        self.hidden(hidden)
        local, ranks = num_experts // self.num_ranks, self.num_ranks
        why = f"of {num_experts} experts and {max_tokens} tokens on {ranks} ranks"
        shape = (local, ranks * max_tokens)
        self._check("handle[0] (src_info)", src_info, shape, torch.int32, why)
        self._check("handle[1] (layout_range)", layout_range, (local, ranks), torch.int64, why)
        return dispatched_sizes(src_info, self.num_ranks)

    def _choices(
        self, topk_idx: torch.Tensor, max_tokens: int, *, x: torch.Tensor | None = None
    ) -> None:
        self._check_topk_idx(topk_idx, x=x)
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

    def _cycles(self, name: str, sums: torch.Tensor | None) -> None:
        if sums is not None:
            self._check(name, sums, (self.num_ranks,), torch.int64, "one sum for each rank")

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


def _check_as_dispatched(choices: tuple[int, int], dispatched: tuple[int, int]) -> None:
    """Tokens and top-k of a combine are those of the dispatch.

    Raises:
        ValueError: They are not.
    """
    (num_tokens, num_topk), (dispatched_tokens, dispatched_topk) = choices, dispatched
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


def _end(src_info: object) -> object:
    """Size of the storage of `src_info` and its place there, for the signature."""
    if not isinstance(src_info, torch.Tensor):
        return None
    return src_info.untyped_storage().nbytes(), src_info.storage_offset()


def check_variants(*, num_domains: int, enable_shrink: bool) -> None:
    """The variants that the environment asks for.

    Raises:
        ValueError: One does not serve so many NVLink domains, or ranks that come and go.
    """
    for variable in (env.low_latency_dispatch_variant, env.low_latency_combine_variant):
        if num_domains > 1 and variable() in ("reduced", "lines"):
            raise ValueError(
                f"{variable.name}={variable()} works in one NVLink domain only, and these ranks "
                f"span {num_domains}; unset it"
            )
        if enable_shrink and variable() == "lines":
            raise ValueError(
                f"{variable.name}=lines works without enable_shrink only; unset one of them"
            )


def check_rank(rank_to_mask: int, num_ranks: int) -> None:
    """The rank of `low_latency_update_mask_buffer`.

    Raises:
        ValueError: There is no such rank.
    """
    if not 0 <= rank_to_mask < num_ranks:
        raise ValueError(
            f"rank_to_mask is {rank_to_mask}, but must be between 0 and {num_ranks - 1}"
        )


def check_positive(**sizes: int) -> list[int]:
    """The sizes of a hint, as plain numbers.

    Raises:
        ValueError: One is not positive.
    """
    numbers = {name: as_int(name, value) for name, value in sizes.items()}
    reasons = [f"{name} is {value}" for name, value in numbers.items() if value <= 0]
    if reasons:
        raise ValueError(f"{', '.join(reasons)}, but must be at least 1")
    return list(numbers.values())


def check_flags(*, async_finish: bool, return_recv_hook: bool) -> None:
    """The two flags that say when a low-latency call returns.

    Raises:
        ValueError: Both are set.
    """
    if async_finish and return_recv_hook:
        raise ValueError(
            "async_finish and return_recv_hook exclude each other: a call returns an event or a "
            "hook; pass one of them"
        )
