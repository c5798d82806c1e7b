"""The base of the normal modes: dispatch and combine in one NVLink domain, and between several.

Outputs, counts that the host waits for, dispatches that end half-way, and the end.
"""

from __future__ import annotations

import operator
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from epjit import calls
from epjit.calls import (
    Combine,
    Counts,
    Dispatch,
    ExpertCombine,
    ExpertDispatch,
    Order,
    Setup,
    Sums,
)
from epjit.errors import CommunicationError
from epjit.handles import Dispatched, ExpertDispatched
from epjit.kernels.shapes import (
    CombineShape,
    DispatchShape,
    ExpertCombineShape,
    ExpertDispatchShape,
)
from epjit.kernels.variants import CHOICES
from epjit.modes.base import Mode, Shape
from epjit.modes.layout import Layout
from epjit.runtime.device import num_sms
from epjit.runtime.empty import TensorSpec, by_columns, matrix, shorten, vector
from epjit.runtime.fault import OVERFLOW_AT, Overflow
from epjit.runtime.host import PinnedArray, nap
from epjit.runtime.kernel import KernelConfig

if TYPE_CHECKING:
    from epjit.runtime.group import Group
    from epjit.runtime.symmetric import SymmetricMemory
    from epjit.scope import AnyScope, Record

SIGNALS_BYTES = 512
GIVE_UP_SECONDS = 1.0  # that a rank which ends by an exception waits for its peers
# The counts come within 50 us, or when the dispatch before is done: 540 us with 4096 tokens. A
# longer poll without naps starves other threads: giving the GIL away and taking it back at once
# leaves them it only every 5 ms.
_SPIN_SECONDS = 1e-3
# Outputs up to this size may be of any guessed size; larger ones must be 4/5 full.
_SMALL_BYTES = 64 << 20


class Room(NamedTuple):
    """Room for what a dispatch receives.

    Attributes:
        sizes: Rows; between NVLink domains also tokens that pass through this rank.
        least: Of a guess: the fewest rows that it is for; -1 = the rows are known, or bounded.
    """

    sizes: tuple[int, ...]
    least: int = -1

    def fits(self, came: tuple[int, ...]) -> bool:
        """Whether the launch with this guess goes on, by the rule of the kernels."""
        return self.least <= came[0] and all(map(operator.ge, self.sizes, came))


class Normal(Mode[Shape]):
    """Base of the normal modes. Collective to make.

    Args:
        setup: As for `Mode`.
        num_counters: Words that kernels count in.
        num_counts: Words that notify leaves for the host.

    Attributes:
        num_sms: Of the GPU.
        memory: Memory that the ranks of an NVLink domain share; what users may see comes first.
    """

    memory: SymmetricMemory
    _warmup: ClassVar[str] = "warmup"

    def __init__(self, setup: Setup, *, num_counters: int, num_counts: int) -> None:
        super().__init__(setup)
        topology, device = setup.topology, setup.device
        self.num_sms = num_sms(device.index)
        self._patience = self._timeout_seconds
        self._layout = Layout(topology, device)
        per_domain = vector(torch.int32, topology.num_domains) if topology.spans_domains else None
        self._counts = vector(torch.int32, self._group.size), per_domain
        self._counters = self._own_words(num_counters)
        # The first half is read by a host that waits for counts; the second takes those that nobody
        # waits for.
        self._num_counts = num_counts
        self._host_counts = PinnedArray(2 * num_counts, device=device.index)
        setup.resources.callback(self._host_counts.close)
        self._half_way = ""  # why a dispatch ended between its two kernels
        # What came to the last dispatch of about as many tokens (by the length of that number in
        # bits), and an eighth more.
        self._expected: dict[int, tuple[int, ...]] = {}

    def _common(self) -> dict[str, object]:
        return {**super()._common(), "counters": self._counters.data_ptr()}

    def _agree(self, config: KernelConfig, **sizes: int) -> None:
        agree_on_kernel(self._group, config)

    # ---- operations ------------------------------------------------------------------------------

    def layout(self, scope: AnyScope, call: calls.Layout) -> Counts:
        """Counts where tokens go."""
        topk_idx, num_experts = call
        specs = (
            *self._counts,
            vector(torch.int32, num_experts),
            matrix(torch.bool, topk_idx.shape[0], self._group.size),
        )
        with scope.allocating():
            per_rank, per_rdma_rank, per_expert, in_rank = self._empty(specs)
        scope.start()
        counts = (per_rank, per_rdma_rank, per_expert, in_rank)
        self._layout(scope.stream, topk_idx, counts)
        return counts

    @abstractmethod
    def dispatch(self, scope: AnyScope, call: Dispatch) -> Dispatched:
        """Sends rows along new counts or along a handle.

        Raises:
            RuntimeError: Needs the host to wait, while a CUDA graph is captured.
        """

    @abstractmethod
    def combine(self, scope: AnyScope, call: Combine) -> Sums:
        """Brings rows back and sums them."""

    @abstractmethod
    def expert_dispatch(
        self, scope: AnyScope, call: ExpertDispatch
    ) -> tuple[ExpertDispatched, Record]:
        """Sends a row for each choice, along new choices or along a handle.

        Returns:
            The results, and tensors that only the kernels use.
        """

    @abstractmethod
    def expert_combine(self, scope: AnyScope, call: ExpertCombine) -> tuple[Sums, Record]:
        """Brings rows by expert back and sums them; the sums, and what only the kernels use."""

    @staticmethod
    def _waits(call: Dispatch | ExpertDispatch) -> bool:
        """Whether the host has to wait for counts, which it cannot in a capture."""
        waits = call.num_worst_tokens == 0
        if waits and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dispatch must read the number of received rows on the host, which a CUDA "
                "graph cannot; pass num_worst_tokens (rows enough for the worst case), or "
                "a handle"
            )
        return waits

    @staticmethod
    def _specs(num_rows: int, call: Dispatch) -> tuple[TensorSpec | None, ...]:
        """Outputs of a dispatch of `num_rows` rows, in the order of `Dispatched`."""
        topk_idx = call.topk_idx
        (dtype, columns), of_scales = delivered(call)
        rows = matrix(dtype, num_rows, columns)
        row_scales = None if of_scales is None else matrix(of_scales[0], num_rows, of_scales[1])
        if topk_idx is None:
            return rows, row_scales, None, None
        num_topk = topk_idx.shape[1]
        choices = matrix(topk_idx.dtype, num_rows, num_topk)
        return rows, row_scales, choices, matrix(torch.float32, num_rows, num_topk)

    @staticmethod
    def _rows(
        call: Dispatch | ExpertDispatch, received: Sequence[torch.Tensor | None]
    ) -> dict[str, int]:
        """Parameters for the rows that a dispatch reads and writes, scales, choices, weights.

        Not by `pointer`: to call it for what is mostly None takes half of this function's time.
        """
        x, scales, topk_idx, topk_weights, *_ = call
        recv_x, recv_scales, recv_topk_idx, recv_topk_weights = received
        assert recv_x is not None
        return {
            "x": x.data_ptr(),
            "scales": 0 if scales is None else scales.data_ptr(),
            "scale_token_stride": 0 if scales is None else scales.stride(0),
            "scale_stride": 0 if scales is None else scales.stride(1),
            "topk_idx": 0 if topk_idx is None else topk_idx.data_ptr(),
            "topk_weights": 0 if topk_weights is None else topk_weights.data_ptr(),
            "num_tokens": x.shape[0],
            "recv_x": recv_x.data_ptr(),
            "recv_scales": 0 if recv_scales is None else recv_scales.data_ptr(),
            "recv_topk_idx": 0 if recv_topk_idx is None else recv_topk_idx.data_ptr(),
            "recv_topk_weights": 0 if recv_topk_weights is None else recv_topk_weights.data_ptr(),
        }

    def _sums(self, scope: AnyScope, x: torch.Tensor, num_tokens: int, num_topk: int) -> Sums:
        """Outputs of a combine of rows as x; without weights `num_topk` is 0."""
        specs = (
            matrix(x.dtype, num_tokens, x.shape[1]),
            matrix(torch.float32, num_tokens, num_topk) if num_topk else None,
        )
        with scope.allocating():
            combined_x, combined_weights = self._empty(specs)
        return combined_x, combined_weights

    def _rows_by_expert(
        self, num_rows: int, call: ExpertDispatch
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """New rows, scales and weights."""
        (dtype, columns), of_scales = delivered(call)
        ordered = by_columns if call.column_major_scales else matrix
        rows, row_scales, weights = self._empty(
            (
                matrix(dtype, num_rows, columns),
                None if of_scales is None else ordered(of_scales[0], num_rows, of_scales[1]),
                None if call.topk_weights is None else vector(torch.float32, num_rows),
            )
        )
        return rows, row_scales, weights

    def _receive(
        self,
        shape: DispatchShape,
        num_tokens: int,
        start: Callable[[Room], list[Any]],
        *,
        likely: tuple[int, ...],
        experts_per_rank: int,
    ) -> tuple[list[Any], list[int]]:
        """Dispatches with guessed room before the counts of notify are here; again if it is wrong.

        So the GPU does not wait for the host: dispatch is launched right behind notify. A launch
        whose guess is wrong leaves at once (`cuda_src/intranode/dispatch.cu`), and peers wait for
        the second one as for any late rank.

        Args:
            shape: Of a call with new counts, whose notify is queued.
            num_tokens: `T`.
            start: Allocates outputs and launches; returns them: five of as many rows as come, or
                None, then one for what passes.
            likely: Sizes of the room, were there as many tokens on every rank as on this one.
            experts_per_rank: `E // R`.

        Returns:
            Outputs, as long as what has come, and the counts of the experts.
        """
        guess, outputs = self._guess(shape, num_tokens, likely), None
        if guess is not None:
            try:
                outputs = start(guess)
            except torch.OutOfMemoryError:  # what comes may need less
                guess = None
        counts = self._wait_for_counts(len(likely) + experts_per_rank)
        came, per_expert = tuple(counts[: len(likely)]), counts[len(likely) :]
        self._expected[num_tokens.bit_length()] = tuple(n + n // 8 for n in came)
        if guess is None or outputs is None or not guess.fits(came):
            outputs = None  # the launch that has left does not touch them
            return start(Room(came)), per_expert
        for i, tensor in enumerate(outputs):
            if tensor is not None:
                shorten(tensor, came[i // 5])
        return outputs, per_expert

    def _guess(self, shape: DispatchShape, num_tokens: int, likely: tuple[int, ...]) -> Room | None:
        """Room for a dispatch whose counts nobody knows yet; None: there is nothing to go by.

        Outputs of more than 64 MB are a quarter larger than what they hold at most.
        """
        small = _SMALL_BYTES // shape.bytes_a_row
        sizes = self._expected.get(num_tokens.bit_length())
        if likely[0] <= small:
            sizes = likely if sizes is None else tuple(map(max, likely, sizes))
        if sizes is None:
            return None
        return Room(sizes, 0 if sizes[0] <= small else -(-4 * sizes[0] // 5))

    # ---- the host's waits, faults, the end -------------------------------------------------------

    def _ask_for_counts(self, waits: bool) -> int:
        """Address for the counts of notify; with `waits`, `_wait_for_counts` reads them."""
        if waits:
            self._host_counts.view[0] = -1
        return self._host_counts.device_ptr + (0 if waits else 8 * self._num_counts)

    def _wait_for_counts(self, num_counts: int) -> list[int]:
        """Polls host memory for the counts of notify; other threads run meanwhile."""
        counts = self._host_counts.view
        start = time.monotonic()
        deadline = start + 2 * self._timeout_seconds + 10
        while counts[0] < 0:
            self._raise_failed_wait()
            now = time.monotonic()
            if now > deadline:
                raise CommunicationError(
                    f"dispatch: the counts did not reach the host of rank {self._group.rank} "
                    f"within {2 * self._timeout_seconds + 10:g} s: its stream does not get to "
                    "run",
                    op="dispatch",
                    rank=self._group.rank,
                )
            if now > start + _SPIN_SECONDS:
                nap()  # the GPU may idle until this thread has seen the counts
        return counts[:num_counts].tolist()

    def raise_fault(self) -> None:
        """Raises what an operation on the device left behind; rows without room once.

        Raises:
            CommunicationError: Names operation, rank and peer; or operation, rank, how many rows
                came, and how many fit.
        """
        state = self._fault.state
        if state is None or not (state[0] or state[OVERFLOW_AT] or self._half_way):
            return  # as in all calls but the last
        self._raise_failed_wait()
        overflow = self._fault.take_overflow()
        if overflow is not None:
            raise no_room(overflow)

    def _raise_failed_wait(self) -> None:
        """Raises what makes the buffer unusable until `reset`."""
        self._fault.raise_if_set()
        if self._half_way:
            raise CommunicationError(
                f"a dispatch of rank {self._group.rank} ended half way ({self._half_way}), so that "
                "its peers may be ahead of it; call reset() on all ranks",
                op="dispatch",
                rank=self._group.rank,
            )

    def _between_kernels(self) -> _BetweenKernels:
        """Marks this rank as out of step if its dispatch fails in here; only reset() clears it."""
        return _BetweenKernels(self)

    def reset(self) -> None:
        """Forgets everything that was under way; collective. See `Mode.reset`."""
        super().reset()
        self._half_way = ""

    def give_up(self) -> None:
        """Ends the waits of what is queued, as a fault does, and those of the end soon."""
        self._patience = min(self._patience, GIVE_UP_SECONDS)
        super().give_up()

    def _wait_for_peers(self) -> bool:
        """Waits until the peers have finished the last operation.

        A peer may still read this rank's slots when this rank is done. Its `finish` signal says
        when it is not; a peer that never sends it is not waited for longer than the timeout.
        """
        signals = self._control()[0][: 8 * len(self.memory.peer_ptrs)].view(torch.int64)
        own = self.memory.peer_ptrs.index(self.memory.ptr)
        epoch = int(self._epoch) & 0xFFFFFFFF
        deadline = time.monotonic() + self._patience
        while not self._fault.is_set and time.monotonic() < deadline:
            finished = [value >> 32 & 0xFFFFFFFF for value in signals.tolist()]
            # A peer may be one ahead (has_reached of sync.cuh): it does not wait for a rank that
            # has no rows for it.
            ahead = [(value - epoch) & 0xFFFFFFFF for value in finished]
            if all(steps <= 1 for rank, steps in enumerate(ahead) if rank != own):
                return True
            time.sleep(0.001)
        return False


class _BetweenKernels:
    """The context manager of `_between_kernels`; a generator takes the host 1 us."""

    def __init__(self, mode: Normal[Any]) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        """Nothing is out of step yet."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:  # also an interrupt, or no memory for the outputs
            self._mode._half_way = repr(error)


def agree_on_kernel(group: Group, config: KernelConfig) -> None:
    """All ranks have chosen the same kernel; collective.

    Raises:
        RuntimeError: They have not.
        CommunicationError: A rank does not come; names it.
    """
    group.agree(
        {f"kernels for {config.op}": config},
        remedy=f"set {CHOICES[config.op].variable.name} to the same value everywhere, or give all "
        "ranks the same EPJIT_CACHE_DIR (tuned.json is in it)",
        op=config.op,
    )


def no_room(overflow: Overflow) -> CommunicationError:
    """The error of a rank that more came to than it had room for, on every backend."""
    op, what, rank, came, room, epoch = overflow
    return CommunicationError(
        f"{op}: {came} {what} rank {rank}, which has room for {room}; what did not fit was left "
        "out, all else has arrived. num_worst_tokens must be at least the number of ranks times "
        "the most tokens of any of them, and a handle must be passed on as dispatch returned it",
        op=op,
        rank=rank,
        expected=room,
        seen=came,
        epoch=epoch,
    )


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of a tensor, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def row_bytes(rows: torch.Tensor) -> int:
    """Bytes of one row."""
    return rows.shape[1] * rows.element_size()


def delivered(
    call: Dispatch | ExpertDispatch,
) -> tuple[tuple[torch.dtype, int], tuple[torch.dtype, int] | None]:
    """Dtype and columns of the rows that a dispatch delivers, and of their scales."""
    x, scales, row_format = call.x, call.scales, call.row_format
    columns = x.shape[1]
    if row_format is None:
        return (x.dtype, columns), None if scales is None else (scales.dtype, scales.shape[1])
    assert row_format.scale_dtype is not None
    of_scales = row_format.scale_dtype, row_format.num_scale_columns(columns)
    return (row_format.x_dtype, row_format.num_columns(columns)), of_scales


def word_strides(scales: torch.Tensor | None) -> tuple[int, int]:
    """Strides of scales in words of 4 bytes; those of one byte lie row by row, four a word."""
    if scales is None:
        return 0, 0
    if scales.element_size() == 1:
        return scales.shape[1] // 4, 1
    return scales.stride(0), scales.stride(1)


def dispatch_shape(call: Dispatch) -> DispatchShape:
    """The shape of a dispatch."""
    topk_idx = call.topk_idx
    num_topk, is_int64 = 0, True
    if topk_idx is not None:
        num_topk, is_int64 = topk_idx.shape[1], topk_idx.dtype == torch.int64
    (hidden_bytes, num_scales), cast = _sent(call)
    return DispatchShape(hidden_bytes, num_scales, num_topk, is_int64, *cast)


def _sent(call: Dispatch | ExpertDispatch) -> tuple[tuple[int, int], tuple[int, bool]]:
    """Bytes of a row as it travels and words of its scales; the cast, as a shape has it."""
    x, scales, row_format = call.x, call.scales, call.row_format
    if row_format is None:
        num_scales = 0 if scales is None else scales.shape[1]
        return (x.shape[1] * x.element_size(), num_scales), (0, False)
    hidden = x.shape[1]
    of_rows = row_format.row_bytes(hidden), row_format.num_scale_bytes(hidden) // 4
    return of_rows, (row_format.code, x.dtype == torch.float16)


def combine_shape(call: Combine) -> CombineShape:
    """The shape of a combine."""
    x, weights = call.x, call.topk_weights
    num_topk = 0 if weights is None else weights.shape[1]
    bits = _choice_bits(call.order)
    return CombineShape(row_bytes(x), num_topk, x.dtype == torch.float16, bits)


def _choice_bits(order: Order | None) -> int:
    """Width of the choices that order the ranks; 0 = none do."""
    return 0 if order is None else 8 * order.topk_idx.element_size()


def expert_dispatch_shape(call: ExpertDispatch) -> ExpertDispatchShape:
    """The shape of a dispatch by expert."""
    _, _, topk_idx, topk_weights, handle, *_ = call
    choices = topk_idx if handle is None else handle.placement.row_of
    assert choices is not None
    of_rows, cast = _sent(call)
    return ExpertDispatchShape(
        *of_rows,
        choices.shape[1],
        topk_idx is None or topk_idx.dtype == torch.int64,
        handle is not None,
        topk_weights is not None,
        *cast,
    )


def expert_combine_shape(call: ExpertCombine) -> ExpertCombineShape:
    """The shape of a combine of rows by expert."""
    rows, row_weights, topk_weights, _, _, handle, _, order = call
    return ExpertCombineShape(
        row_bytes(rows),
        handle.placement.row_of.shape[1],
        rows.dtype == torch.float16,
        row_weights is not None,
        topk_weights is not None,
        _choice_bits(order),
    )
