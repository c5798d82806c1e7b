"""The preconditions of the normal mode's calls, checked before anything is launched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from epjit import calls
from epjit.calls import Bias, OwnHandle, Payload
from epjit.checks.match import (
    Checks,
    as_handle,
    check_aligned,
    check_experts,
    check_rows,
    check_topk,
    remember,
    signature,
)
from epjit.config import (
    MAX_EXPERTS,
    MAX_EXPERTS_BY_EXPERT,
    MAX_LOCAL_EXPERTS,
    MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS,
    MAX_TOKENS,
    MAX_TOPK,
    Config,
    check_row_bytes,
)
from epjit.formats import CASTS, NVFP4, SUM_DTYPES, RowFormat
from epjit.handles import GivenHandle, handle_type
from epjit.numbers import as_int

if TYPE_CHECKING:
    from epjit.event import EventOverlap

INT32_MAX = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class NormalChecks(Checks):
    """Checks of the normal mode's calls.

    Attributes:
        num_sms: Of the device.
        dispatch_config: Makes the config of a dispatch that is given none.
        combine_config: Likewise.
    """

    num_sms: int
    dispatch_config: Callable[..., Config]
    combine_config: Callable[..., Config]
    _passed: dict[Hashable, bool] = field(default_factory=dict, repr=False)

    # ---- calls -----------------------------------------------------------------------------------

    def layout(
        self, topk_idx: torch.Tensor, num_experts: int, *, after: EventOverlap | None
    ) -> calls.Layout:
        """Everything that `get_dispatch_layout` takes; `after` is what the call waits for."""
        num_experts = as_int("num_experts", num_experts)
        arguments = (signature(topk_idx), num_experts)
        if arguments not in self._passed:
            self._check_topk_idx(topk_idx)
            self._experts(num_experts)
            remember(self._passed, arguments, True)
        call = calls.Layout(topk_idx, num_experts)
        if self.values is not None:
            self.values.layout(call, after=after)
        return call

    def dispatch(
        self,
        x: Payload,
        handle: GivenHandle | None,
        counts: tuple[Any, Any, Any, Any],
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        expert_alignment: int,
        num_worst_tokens: int,
        config: Config | None,
        *,
        cast: str | None,
        global_scale: torch.Tensor | None,
        after: EventOverlap | None,
    ) -> calls.Dispatch:
        """Everything that `dispatch` takes; `counts` in the order of `calls.Routing`."""
        rows, scales = rows_and_scales(x)
        if handle is None:
            per_rank, per_rdma_rank, per_expert, in_rank = counts
            if not self.spans_domains:
                per_rdma_rank = None
            routing = calls.Routing(per_rank, per_rdma_rank, per_expert, in_rank)
            arguments = signature(rows, scales, topk_idx, topk_weights, *routing)
        else:
            arguments = signature(rows, scales)
        if cast is not None or global_scale is not None:
            arguments = (*arguments, cast, *signature(global_scale))
        has_passed = arguments in self._passed
        if has_passed:
            check_aligned("x", rows)
        else:
            if cast is not None:
                self._check_in_domain(cast, expert_major=False)
            self._rows_to_send(rows, scales, cast, global_scale)
        num_sms = self._sms(config, self.dispatch_config, rows, rows.shape[0])
        row_format = None if cast is None else CASTS[cast]
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError(
                    "a cached dispatch (handle=...) takes no topk_idx and no topk_weights"
                )
            own = self._handle(handle, num_tokens=rows.shape[0])
            call = calls.Dispatch(
                *(rows, scales, None, None, own, 1, 0, num_sms), row_format, global_scale
            )
        else:
            if not has_passed:
                self._routing(rows, routing, topk_idx, topk_weights)
            expert_alignment = as_int("expert_alignment", expert_alignment, least=1)
            num_worst_tokens = as_int("num_worst_tokens", num_worst_tokens, least=0)
            if num_worst_tokens > 0 and topk_idx is None:
                raise ValueError(
                    "num_worst_tokens needs topk_idx: without it nothing says which rows arrived"
                )
            call = calls.Dispatch(
                rows,
                scales,
                topk_idx,
                topk_weights,
                routing,
                expert_alignment,
                num_worst_tokens,
                num_sms,
                row_format,
                global_scale,
            )
        if not has_passed:
            remember(self._passed, arguments, True)
        if self.values is not None:
            self.values.dispatch(call, after=after)
        return call

    def combine(
        self,
        x: torch.Tensor,
        handle: GivenHandle,
        topk_weights: torch.Tensor | None,
        bias: Bias,
        config: Config | None,
        *,
        after: EventOverlap | None,
    ) -> calls.Combine:
        """Everything that `combine` takes."""
        own = self._handle(handle, num_tokens=None)
        num_tokens = own.num_tokens
        bias_0, bias_1 = pair_of(bias) if isinstance(bias, tuple) else (bias, None)
        self._returned(x, topk_weights, bias_0, bias_1, own.num_rows, num_tokens)
        num_sms = self._sms(config, self.combine_config, x, num_tokens)
        call = calls.Combine(x, topk_weights, bias_0, bias_1, own, num_sms)
        if self.values is not None:
            self.values.combine(call, after=after)
        return call

    def warmup(
        self,
        hidden_bytes: int,
        num_topk: int,
        num_scales: int,
        *,
        cast: str | None,
        expert_major: bool,
    ) -> None:
        """Everything that `warmup` takes."""
        check_row_bytes(f"a row has hidden_bytes={hidden_bytes}", hidden_bytes)
        if not 0 <= num_topk <= MAX_TOPK or num_scales < 0:
            raise ValueError(
                f"num_topk is {num_topk} (0 to {MAX_TOPK}) and num_scales {num_scales} (0 or more)"
            )
        if expert_major and not num_topk:
            raise ValueError("expert_major=True needs num_topk: rows by expert follow choices")
        if cast is None:
            return
        if num_scales:
            raise ValueError(
                f"num_scales is {num_scales} with cast={cast!r}, but rows with scales are not cast"
            )
        self._check_in_domain(cast, expert_major=expert_major)
        check_cast(hidden_bytes // 2, format_of(cast))

    # ---- their parts -----------------------------------------------------------------------------

    def _check_in_domain(self, cast: str, *, expert_major: bool) -> None:
        """Rows in the order of the sources are cast in one NVLink domain alone."""
        if self.spans_domains and not expert_major:
            raise ValueError(
                f"cast is {cast!r}, but this Buffer spans {self.num_domains} NVLink domains, "
                "between which rows travel as they are; cast them before and pass (rows, scales), "
                "scales of one byte as int32: .view(torch.int32)"
            )

    def _experts(self, num_experts: int) -> None:
        of_a_rank = MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS if self.spans_domains else MAX_LOCAL_EXPERTS
        most = min(MAX_EXPERTS, of_a_rank * self.num_ranks)
        check_experts(num_experts, self.num_ranks, most)

    def _by_expert(self, num_experts: int, most_rows: int) -> None:
        """Experts of a dispatch by expert, and the rows that a rank may get."""
        if num_experts > MAX_EXPERTS_BY_EXPERT:
            raise ValueError(
                f"num_experts is {num_experts}, but rows by expert are for at most "
                f"{MAX_EXPERTS_BY_EXPERT}; dispatch rows in the order of the sources"
            )
        if most_rows > INT32_MAX:
            raise ValueError(
                f"a rank may need {most_rows} rows, but the kernels count to {INT32_MAX}; dispatch "
                "fewer tokens, or with a smaller expert_alignment"
            )

    def _sms(
        self,
        config: Config | None,
        default: Callable[..., Config],
        x: torch.Tensor,
        num_tokens: int,
    ) -> int:
        if config is None:
            hidden_bytes = x.shape[1] * x.element_size()
            config = default(self.num_ranks, hidden_bytes=hidden_bytes, num_tokens=num_tokens)
        if not isinstance(config, Config):
            raise TypeError(
                f"config is a {type(config).__name__}, expected a Config such as "
                "Buffer.get_dispatch_config(num_ranks)"
            )
        value, available = config.num_sms, self.num_sms
        if value < 2 or value % 2 or value > available:
            raise ValueError(
                f"config.num_sms is {value}, but must be even and between 2 and {available} "
                f"(what {self.device} has: all blocks must run at once)"
            )
        return value

    def _rows(
        self,
        name: str,
        x: torch.Tensor,
        num_rows: int | str,
        dtypes: tuple[torch.dtype, ...] | None,
        why: str,
        hidden: int | str = "hidden",
    ) -> None:
        self._check(name, x, (num_rows, hidden), dtypes, why)
        check_rows(name, x)

    def _payload(self, rows: torch.Tensor, scales: torch.Tensor | None) -> None:
        self._rows("x", rows, "num_tokens", None, "")
        if rows.shape[0] > MAX_TOKENS:
            raise ValueError(f"x has {rows.shape[0]} tokens; one call takes at most {MAX_TOKENS}")
        if scales is not None:
            shape, dtypes = (rows.shape[0], "num_scales"), (torch.float32, torch.int32)
            why = "one row of scales for each token"
            self._check("x[1] (scales)", scales, shape, dtypes, why, contiguous=False)
            if rows.element_size() != 1:
                raise TypeError(
                    f"x[0] has dtype {rows.dtype}; a payload with scales has one byte an element"
                )

    def _rows_to_send(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        cast: str | None,
        global_scale: torch.Tensor | None,
        *,
        column_major_scales: bool = False,
    ) -> None:
        """Rows, their scales, and the cast."""
        self._payload(rows, scales)
        scale_bytes = 0 if scales is None else scales.element_size()
        if cast is not None:
            scale_bytes = self._cast(rows, scales, format_of(cast))
        if (cast == NVFP4.name) is (global_scale is None):
            raise ValueError(
                f"global_scale is {'missing' if global_scale is None else 'given'}, but rows that "
                f"are cast to {cast} have {'one' if cast == NVFP4.name else 'none'}: a float32 "
                "tensor of shape (1,), the same on all ranks"
            )
        if global_scale is not None:
            self._check("global_scale", global_scale, (1,), torch.float32)
        if column_major_scales and scale_bytes != 4:
            raise ValueError(
                "column_major_scales=True is for scales of 4 bytes (float32, or int32 with four "
                f"exponents), but these rows have {f'{scale_bytes}-byte' if scale_bytes else 'no'} "
                "scales"
            )

    def _cast(self, rows: torch.Tensor, scales: torch.Tensor | None, row_format: RowFormat) -> int:
        """Rows that are cast; bytes of a scale."""
        if scales is not None or rows.dtype not in SUM_DTYPES:
            got = "rows with scales" if scales is not None else str(rows.dtype)
            raise TypeError(
                f"cast={row_format.name!r} takes rows of bfloat16 or float16, but x is {got}"
            )
        check_cast(rows.shape[1], row_format)
        assert row_format.scale_dtype is not None
        return row_format.scale_dtype.itemsize

    def _returned(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        bias_0: torch.Tensor | None,
        bias_1: torch.Tensor | None,
        num_rows: int,
        num_tokens: int,
    ) -> None:
        """The tensors of a combine along with a handle of so many rows and tokens."""
        arguments = (signature(x, topk_weights, bias_0, bias_1), num_rows, num_tokens)
        if arguments in self._passed:
            check_aligned("x", x)
            if bias_0 is not None or bias_1 is not None:
                self._addresses(bias_0=bias_0, bias_1=bias_1)
            return
        self._rows("x", x, num_rows, SUM_DTYPES, "one row for each row of the dispatch")
        if topk_weights is not None:
            shape, why = (num_rows, "num_topk"), "one row for each row of x"
            self._check("topk_weights", topk_weights, shape, torch.float32, why)
            check_topk(topk_weights)
        self._biases((bias_0, bias_1), x, num_tokens)
        remember(self._passed, arguments, True)

    def _biases(
        self,
        biases: tuple[torch.Tensor | None, torch.Tensor | None],
        x: torch.Tensor,
        num_tokens: int,
    ) -> None:
        """Biases of sums of rows like those of x."""
        for name, value in zip(("bias_0", "bias_1"), biases, strict=True):
            if value is not None:
                why = "one row for each token of this rank"
                self._rows(name, value, num_tokens, (x.dtype,), why, x.shape[1])

    @staticmethod
    def _addresses(**rows: torch.Tensor | None) -> None:
        """Checks the addresses of rows that have passed: nothing else is looked at again."""
        for name, each in rows.items():
            if each is not None:
                check_aligned(name, each)

    def _handle(self, handle: GivenHandle, *, num_tokens: int | None) -> OwnHandle:
        """The handle with names, of the type of this Buffer's mode."""
        kind: Any = handle_type(self.num_domains)
        named: Any = handle if type(handle) is kind else as_handle(handle, kind, "dispatch")
        gpu = self.device.index
        for tensor in named:  # asked so, in a third of the time: two devices take 0.2 us to compare
            if type(tensor) is not torch.Tensor or tensor.get_device() != gpu:
                self._devices(named)
                break
        ranks, domains, tokens = named.num_ranks, self.num_domains, named.num_tokens
        if ranks != self.num_ranks:
            raise ValueError(f"handle is of {ranks} ranks, but this Buffer has {self.num_ranks}")
        if domains > 1 and domains != named.num_domains:
            raise ValueError(
                f"handle is of {named.num_domains} NVLink domains, but this Buffer has "
                f"{self.num_domains}; use it with the Buffer that made it"
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

    def _devices(self, handle: OwnHandle) -> None:
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

    def _routing(
        self,
        x: torch.Tensor,
        routing: calls.Routing,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
    ) -> None:
        per_rank, per_rdma_rank, per_expert, in_rank = routing
        given: dict[str, object] = {
            "num_tokens_per_rank": per_rank,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
        }
        if self.spans_domains:
            given["num_tokens_per_rdma_rank"] = per_rdma_rank
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise AssertionError(
                f"dispatch without a handle needs {', '.join(missing)} from get_dispatch_layout"
            )
        self._check("num_tokens_per_rank", per_rank, (self.num_ranks,), torch.int32)
        if self.spans_domains:
            name, why = "num_tokens_per_rdma_rank", "one count for each NVLink domain"
            self._check(name, per_rdma_rank, (self.num_domains,), torch.int32, why)
        shape, why = (x.shape[0], self.num_ranks), "one row for each token of x"
        self._check("is_token_in_rank", in_rank, shape, torch.bool, why)
        self._check("num_tokens_per_expert", per_expert, ("num_experts",), torch.int32)
        self._experts(per_expert.shape[0])
        if (topk_idx is None) != (topk_weights is None):
            raise ValueError("topk_idx and topk_weights go together; got only one of them")
        if topk_idx is not None:
            self._check_topk_idx(topk_idx, x=x)
            weights_shape = tuple(topk_idx.shape)
            self._check("topk_weights", topk_weights, weights_shape, torch.float32, "as topk_idx")


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


def format_of(cast: str) -> RowFormat:
    """The format that rows are cast to.

    Raises:
        ValueError: There is no such format.
    """
    if cast not in CASTS:
        raise ValueError(f"cast is {cast!r}, but must be None or one of {', '.join(CASTS)}")
    return CASTS[cast]


def check_cast(hidden: int, row_format: RowFormat) -> None:
    """Rows of so many channels can be cast.

    Raises:
        ValueError: They cannot.
    """
    name = row_format.name
    if hidden % row_format.granularity or row_format.num_scale_bytes(hidden) % 4:
        step = max(row_format.granularity, 4 * row_format.block // row_format.bytes_a_scale)
        raise ValueError(f"hidden is {hidden}, but must be a multiple of {step} for {name}")
    row_bytes = row_format.row_bytes(hidden)
    check_row_bytes(f"{hidden} channels in {name} have {row_bytes} bytes", row_bytes)


def part_of(
    memory: torch.Tensor,
    num_bytes: int,
    dtype: torch.dtype,
    size: torch.Size | None,
    offset: int,
) -> torch.Tensor:
    """The view that `get_local_buffer_tensor` is asked for, in the first `num_bytes`.

    Raises:
        ValueError: It does not fit.
    """
    available = (num_bytes - offset) // dtype.itemsize
    if offset < 0 or offset % dtype.itemsize or available < 0:
        raise ValueError(
            f"offset is {offset} bytes, but must be a multiple of {dtype.itemsize} "
            f"up to {num_bytes}"
        )
    view = memory[offset : offset + available * dtype.itemsize].view(dtype)
    if size is None:
        return view
    if size.numel() > available:
        raise ValueError(
            f"size {tuple(size)} has {size.numel()} elements of {dtype}, "
            f"but only {available} are there"
        )
    return view[: size.numel()].view(size)


def rows_and_scales(x: Payload) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The two parts of a payload."""
    if not isinstance(x, tuple):
        return x, None
    if len(x) != 2:
        raise TypeError(
            f"x is a tuple of {len(x)}, expected a tensor or a tuple of two: rows and scales"
        )
    return x


def pair_of(
    bias: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A tuple of biases, which has two."""
    if len(bias) != 2:
        raise ValueError(f"bias is a tuple of {len(bias)}, expected one tensor or a tuple of two")
    return bias
