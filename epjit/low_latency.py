"""`LowLatencyCalls`: the low-latency half of `Buffer`, as its base class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from epjit import signatures
from epjit.calls import CombineTensors, DispatchTensors, Payload, payload_of
from epjit.checks.low_latency import LowLatencyChecks, check_flags, check_positive, check_rank
from epjit.config import low_latency_size_hint
from epjit.event import EventOverlap
from epjit.formats import choose_format
from epjit.handles import GivenLowLatencyHandle, LowLatencyHandle
from epjit.kernels.low_latency import warmup_shapes
from epjit.life import Life
from epjit.modes.make import AnyLowLatency
from epjit.numbers import as_int

Hook: TypeAlias = Callable[[], None]


class Unreceived(NamedTuple):
    """A low-latency operation whose hook has not been called; told from others by identity."""

    op: str


class LowLatencyCalls(Life):
    """The low-latency calls of a `Buffer`, whose docstring explains the words in the shapes.

    Attributes:
        group_size: Number of ranks.
        enable_shrink: Whether a rank that does not answer is masked.
    """

    group_size: int
    enable_shrink: bool
    _low_latency_checks: LowLatencyChecks
    _unreceived: Unreceived | None

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
        sizes = check_positive(
            num_max_dispatch_tokens_per_rank=num_max_dispatch_tokens_per_rank,
            hidden=hidden,
            num_ranks=num_ranks,
            num_experts=num_experts,
        )
        return low_latency_size_hint(*sizes)

    @signatures.low_latency_dispatch
    def low_latency_dispatch(
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
    ) -> tuple[Payload, Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
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
            topk_weights: float32 `[T, K]` of the combine to come, on all ranks or on none. They
                travel with the rows and allow that combine to add the rows of a token that are on
                one rank there, and to round this sum to bfloat16 once more: by at most 2^-8 of it.
                Then one row a rank travels back, not one an expert.

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
        check_flags(async_finish=async_finish, return_recv_hook=return_recv_hook)
        max_tokens = as_int("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
        num_experts = as_int("num_experts", num_experts)
        row_format = choose_format(
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            quantization=quantization,
        )
        call = self._low_latency_checks.dispatch(
            DispatchTensors(
                x,
                topk_idx,
                topk_weights,
                global_scale,
                cumulative_local_expert_recv_stats,
                dispatch_wait_recv_cost_stats,
            ),
            max_tokens,
            num_experts,
            row_format,
            split=return_recv_hook,
        )
        with self._entered(), self._streams.low_latency_scope(async_finish) as scope:
            received, receive = mode.dispatch(scope, call)
            hook = receive and self._hook("low_latency_dispatch", receive, scope.stream)
            event = scope.finish(call.given, received)
        recv_x, recv_scales, recv_count, src_info, layout_range = received
        hidden = call.sizes.hidden
        handle = LowLatencyHandle(src_info, layout_range, max_tokens, hidden, num_experts)
        return payload_of(recv_x, recv_scales), recv_count, handle, event, hook

    @signatures.low_latency_combine
    def low_latency_combine(
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
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Brings the rows of a low-latency dispatch back and sums them with weights.

        `combined_x[t]` is the sum over `k`, ascending, of `topk_weights[t, k]` times the row that
        the expert `topk_idx[t, k]` made of the token: float32 from +0.0, products and sums rounded
        one by one, then rounded once to bfloat16. No selection and masked ranks add nothing. Only
        the rows that the handle's `layout_range` names are read. The host does not wait.

        If the dispatch was given the weights, in one NVLink domain and without `use_logfmt`, each
        rank first sums its rows of a token so, and these sums, ranks ascending, are added likewise;
        unless `EPJIT_LOW_LATENCY_COMBINE_VARIANT` names another kernel.

        Args:
            x: bfloat16 `[E // R, R * M, H]`, a row for each row of the dispatch.
            topk_idx: `[T, K]`, as dispatched. With a hook it and the weights are read until then.
            topk_weights: float32 `[T, K]`; those of the dispatch, if it was given any.
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
        check_flags(async_finish=async_finish, return_recv_hook=return_recv_hook)
        call = self._low_latency_checks.combine(
            CombineTensors(x, topk_idx, topk_weights, out, combine_wait_recv_cost_stats),
            handle,
            use_logfmt=use_logfmt,
            zero_copy=zero_copy,
            split=return_recv_hook,
        )
        with self._entered(), self._streams.low_latency_scope(async_finish) as scope:
            combined_x, receive = mode.combine(scope, call)
            hook = receive and self._hook("low_latency_combine", receive, scope.stream)
            event = scope.finish((*call.given, call.src_info), (combined_x,))
        return combined_x, event, hook

    def get_next_low_latency_combine_buffer(self, handle: GivenLowLatencyHandle) -> Tensor:
        """The buffer that `low_latency_combine(zero_copy=True)` takes its rows from.

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
        own = self._low_latency_checks.send_buffer(handle)
        with self._entered():
            return mode.send_buffer(own)

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
        check_rank(rank_to_mask, self.group_size)
        with self._in_order():
            mode.mask[rank_to_mask].fill_(int(mask))

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Copies the mask of this rank, which also has the ranks that did not answer in time.

        Args:
            mask_status: int32 `[R]` that is written to, on the current stream: 1 = masked.

        Raises:
            TypeError, ValueError: Not such a tensor.
            RuntimeError: The buffer was made without `enable_shrink`.
        """
        mode = self._masking_mode("low_latency_query_mask_buffer")
        self._low_latency_checks.mask(mask_status)
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
        weights_sent: bool = False,
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
            weights_sent: Whether `low_latency_dispatch` is given `topk_weights`.

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
        self._low_latency_checks.warmup(max_tokens, hidden, num_experts, num_topk, row_format)
        shapes = warmup_shapes(
            hidden=hidden,
            num_experts=num_experts,
            num_topk=num_topk,
            topk_is_int64=topk_idx_dtype == torch.int64,
            row_format=row_format,
            use_logfmt=use_logfmt,
            weights_sent=weights_sent,
        )
        with self._entered():
            mode.warmup(shapes, num_max_dispatch_tokens_per_rank=max_tokens)

    def _ready_low_latency(self, op: str, *, received: bool = True) -> AnyLowLatency:
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

    @contextmanager
    def _in_order(self) -> Iterator[int]:
        """Lets work that is queued on the current stream meanwhile follow the calls before it.

        Yields:
            Handle of the current stream.
        """
        with self._entered(), self._streams.low_latency_scope(False) as scope:
            yield scope.stream
            scope.finish()

    def _hook(self, op: str, receive: Hook, stream: int) -> Hook:
        """The hook around `receive`, for the caller: to be called once, and before any reset()."""
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
                with self._streams.scope_on(stream) as scope:
                    receive()
                    scope.finish()

        return hook

    def _masking_mode(self, op: str) -> AnyLowLatency:
        """The low-latency mode of a Buffer that masks ranks (`enable_shrink`)."""
        self._check_alive(fault=False)
        if self._low_latency is None or not self.enable_shrink:
            raise RuntimeError(
                f"{op} needs a Buffer that was made with low_latency_mode=True and "
                "enable_shrink=True"
            )
        return self._low_latency
