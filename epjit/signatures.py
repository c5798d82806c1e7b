"""Types of `Buffer`'s methods whose results depend on their arguments: a decorator for each.

At run time a decorator returns the method as it is. For type checkers it lists, from the special to
the general, what comes back: rows as they were passed, a handle unless one was passed, a hook if
one was asked for. The general one takes arguments by position as V1 has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, cast

if TYPE_CHECKING:
    from typing import TypedDict, overload

    from torch import Tensor
    from typing_extensions import Unpack

    from epjit.calls import Bias
    from epjit.config import Config
    from epjit.event import EventOverlap
    from epjit.handles import (
        ExpertHandle,
        GivenExpertHandle,
        GivenHandle,
        GivenLowLatencyHandle,
        Handle,
        LowLatencyHandle,
    )

    Pair: TypeAlias = tuple[Tensor, Tensor]
    Hook: TypeAlias = Callable[[], None]
    Rows = TypeVar("Rows", Tensor, Pair)

    class _CallOptions(TypedDict, total=False):
        config: Config | None
        previous_event: EventOverlap | None
        async_finish: bool
        allocate_on_comm_stream: bool

    class _DispatchOptions(_CallOptions, total=False):
        num_tokens_per_rank: Tensor | None
        num_tokens_per_rdma_rank: Tensor | None
        is_token_in_rank: Tensor | None
        num_tokens_per_expert: Tensor | None
        expert_alignment: int
        num_worst_tokens: int

    class _ExpertOptions(_CallOptions, total=False):
        global_scale: Tensor | None
        num_experts: int | None
        handle: GivenExpertHandle | None
        expert_alignment: int
        num_worst_tokens: int
        num_expert_rows: int
        zero_padding: bool
        column_major_scales: bool

    class _ExpertCombineOptions(_CallOptions, total=False):
        row_weights: Tensor | None
        bias: Bias

    class _LowLatencyOptions(TypedDict, total=False):
        cumulative_local_expert_recv_stats: Tensor | None
        dispatch_wait_recv_cost_stats: Tensor | None
        async_finish: bool
        topk_weights: Tensor | None

    class _CastOptions(_LowLatencyOptions, total=False):
        round_scale: bool
        use_ue8m0: bool
        quantization: str | None
        global_scale: Tensor | None

    class _CombineOptions(TypedDict, total=False):
        use_logfmt: bool
        zero_copy: bool
        async_finish: bool
        out: Tensor | None
        combine_wait_recv_cost_stats: Tensor | None

    class Dispatch(Protocol):
        """`Buffer.dispatch`."""

        @overload
        def __call__(
            self,
            x: Rows,
            handle: None = None,
            *,
            topk_idx: Tensor,
            topk_weights: Tensor,
            **options: Unpack[_DispatchOptions],
        ) -> tuple[Rows, Tensor, Tensor, list[int], Handle, EventOverlap]: ...
        @overload
        def __call__(
            self, x: Rows, handle: None = None, **options: Unpack[_DispatchOptions]
        ) -> tuple[Rows, None, None, list[int], Handle, EventOverlap]: ...
        @overload
        def __call__(
            self, x: Rows, handle: GivenHandle, **options: Unpack[_CallOptions]
        ) -> tuple[Rows, None, None, None, None, EventOverlap]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            handle: None = None,
            *,
            topk_idx: Tensor,
            topk_weights: Tensor,
            cast: str,
            global_scale: Tensor | None = None,
            **options: Unpack[_DispatchOptions],
        ) -> tuple[Pair, Tensor, Tensor, list[int], Handle, EventOverlap]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            handle: None = None,
            *,
            cast: str,
            global_scale: Tensor | None = None,
            **options: Unpack[_DispatchOptions],
        ) -> tuple[Pair, None, None, list[int], Handle, EventOverlap]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            handle: GivenHandle,
            *,
            cast: str,
            global_scale: Tensor | None = None,
            **options: Unpack[_CallOptions],
        ) -> tuple[Pair, None, None, None, None, EventOverlap]: ...
        @overload
        def __call__(
            self,
            x: Tensor | Pair,
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
            Tensor | Pair,
            Tensor | None,
            Tensor | None,
            list[int] | None,
            Handle | None,
            EventOverlap,
        ]: ...

    # Calls without weights fit the second overload too, but find the first.
    class ExpertDispatch(Protocol):
        """`Buffer.expert_dispatch`."""

        @overload
        def __call__(
            self,
            x: Rows,
            topk_idx: Tensor | None = None,
            topk_weights: None = None,
            *,
            cast: None = None,
            **options: Unpack[_ExpertOptions],
        ) -> tuple[Rows, None, ExpertHandle, EventOverlap]: ...
        @overload
        def __call__(
            self,
            x: Rows,
            topk_idx: Tensor | None = None,
            topk_weights: Tensor = ...,
            *,
            cast: None = None,
            **options: Unpack[_ExpertOptions],
        ) -> tuple[Rows, Tensor, ExpertHandle, EventOverlap]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor | None = None,
            topk_weights: None = None,
            *,
            cast: str,
            **options: Unpack[_ExpertOptions],
        ) -> tuple[Pair, None, ExpertHandle, EventOverlap]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor | None = None,
            topk_weights: Tensor = ...,
            *,
            cast: str,
            **options: Unpack[_ExpertOptions],
        ) -> tuple[Pair, Tensor, ExpertHandle, EventOverlap]: ...
        @overload
        def __call__(
            self,
            x: Tensor | Pair,
            topk_idx: Tensor | None = None,
            topk_weights: Tensor | None = None,
            *,
            cast: str | None = None,
            **options: Unpack[_ExpertOptions],
        ) -> tuple[Tensor | Pair, Tensor | None, ExpertHandle, EventOverlap]: ...

    class ExpertCombine(Protocol):
        """`Buffer.expert_combine`."""

        @overload
        def __call__(
            self,
            rows: Tensor,
            handle: GivenExpertHandle,
            *,
            topk_weights: None = None,
            **options: Unpack[_ExpertCombineOptions],
        ) -> tuple[Tensor, None, EventOverlap]: ...
        @overload
        def __call__(
            self,
            rows: Tensor,
            handle: GivenExpertHandle,
            *,
            topk_weights: Tensor,
            **options: Unpack[_ExpertCombineOptions],
        ) -> tuple[Tensor, Tensor, EventOverlap]: ...
        @overload
        def __call__(
            self,
            rows: Tensor,
            handle: GivenExpertHandle,
            *,
            topk_weights: Tensor | None = None,
            **options: Unpack[_ExpertCombineOptions],
        ) -> tuple[Tensor, Tensor | None, EventOverlap]: ...

    class LowLatencyDispatch(Protocol):
        """`Buffer.low_latency_dispatch`."""

        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor,
            num_max_dispatch_tokens_per_rank: int,
            num_experts: int,
            *,
            use_fp8: Literal[False],
            return_recv_hook: Literal[True],
            **options: Unpack[_LowLatencyOptions],
        ) -> tuple[Tensor, Tensor, LowLatencyHandle, EventOverlap, Hook]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor,
            num_max_dispatch_tokens_per_rank: int,
            num_experts: int,
            *,
            use_fp8: Literal[False],
            return_recv_hook: Literal[False] = False,
            **options: Unpack[_LowLatencyOptions],
        ) -> tuple[Tensor, Tensor, LowLatencyHandle, EventOverlap, None]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor,
            num_max_dispatch_tokens_per_rank: int,
            num_experts: int,
            *,
            use_fp8: Literal[True] = True,
            return_recv_hook: Literal[True],
            **options: Unpack[_CastOptions],
        ) -> tuple[Pair, Tensor, LowLatencyHandle, EventOverlap, Hook]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor,
            num_max_dispatch_tokens_per_rank: int,
            num_experts: int,
            *,
            use_fp8: Literal[True] = True,
            return_recv_hook: Literal[False] = False,
            **options: Unpack[_CastOptions],
        ) -> tuple[Pair, Tensor, LowLatencyHandle, EventOverlap, None]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor,
            num_max_dispatch_tokens_per_rank: int,
            num_experts: int,
            cumulative_local_expert_recv_stats: Tensor | None = None,
            dispatch_wait_recv_cost_stats: Tensor | None = None,
            use_fp8: bool = True,
            round_scale: bool = False,
            use_ue8m0: bool = False,
            async_finish: bool = False,
            return_recv_hook: bool = False,
            *,
            quantization: str | None = None,
            global_scale: Tensor | None = None,
            topk_weights: Tensor | None = None,
        ) -> tuple[Tensor | Pair, Tensor, LowLatencyHandle, EventOverlap, Hook | None]: ...

    class LowLatencyCombine(Protocol):
        """`Buffer.low_latency_combine`."""

        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor,
            topk_weights: Tensor,
            handle: GivenLowLatencyHandle,
            *,
            return_recv_hook: Literal[True],
            **options: Unpack[_CombineOptions],
        ) -> tuple[Tensor, EventOverlap, Hook]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor,
            topk_weights: Tensor,
            handle: GivenLowLatencyHandle,
            *,
            return_recv_hook: Literal[False] = False,
            **options: Unpack[_CombineOptions],
        ) -> tuple[Tensor, EventOverlap, None]: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            topk_idx: Tensor,
            topk_weights: Tensor,
            handle: GivenLowLatencyHandle,
            use_logfmt: bool = False,
            zero_copy: bool = False,
            async_finish: bool = False,
            return_recv_hook: bool = False,
            out: Tensor | None = None,
            combine_wait_recv_cost_stats: Tensor | None = None,
        ) -> tuple[Tensor, EventOverlap, Hook | None]: ...


F_co = TypeVar("F_co", covariant=True)


class Method(Protocol[F_co]):
    """A method that is called as `F_co` says."""

    def __get__(self, instance: Any, owner: Any = None) -> F_co:
        """The bound method."""


def dispatch(method: Callable[..., Any]) -> Method[Dispatch]:
    """Types `Buffer.dispatch`."""
    return cast("Method[Dispatch]", method)


def expert_dispatch(method: Callable[..., Any]) -> Method[ExpertDispatch]:
    """Types `Buffer.expert_dispatch`."""
    return cast("Method[ExpertDispatch]", method)


def expert_combine(method: Callable[..., Any]) -> Method[ExpertCombine]:
    """Types `Buffer.expert_combine`."""
    return cast("Method[ExpertCombine]", method)


def low_latency_dispatch(method: Callable[..., Any]) -> Method[LowLatencyDispatch]:
    """Types `Buffer.low_latency_dispatch`."""
    return cast("Method[LowLatencyDispatch]", method)


def low_latency_combine(method: Callable[..., Any]) -> Method[LowLatencyCombine]:
    """Types `Buffer.low_latency_combine`."""
    return cast("Method[LowLatencyCombine]", method)
