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

    from epjit.config import Config
    from epjit.event import EventOverlap
    from epjit.handles import GivenHandle, GivenLowLatencyHandle, Handle, LowLatencyHandle

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
        ) -> tuple[
            Tensor | Pair,
            Tensor | None,
            Tensor | None,
            list[int] | None,
            Handle | None,
            EventOverlap,
        ]: ...

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


def low_latency_dispatch(method: Callable[..., Any]) -> Method[LowLatencyDispatch]:
    """Types `Buffer.low_latency_dispatch`."""
    return cast("Method[LowLatencyDispatch]", method)


def low_latency_combine(method: Callable[..., Any]) -> Method[LowLatencyCombine]:
    """Types `Buffer.low_latency_combine`."""
    return cast("Method[LowLatencyCombine]", method)
