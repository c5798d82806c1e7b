"""The streams of one call: what kernels wait for, where outputs lie, what the caller gets."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

import torch

from epjit.event import EventHandle, EventOverlap, next_number

if TYPE_CHECKING:
    from epjit.runtime.stream import CommStream, Event

_NOWHERE = nullcontext()


class Scope:
    """The streams of one call: what kernels wait for, where outputs lie, what is returned.

    Order of a call: allocate; `start`; queue kernels on `stream`; `finish`. Outputs are allocated
    before the communication stream waits, so that a fill which torch launches for them
    (deterministic mode) comes first.

    Args:
        comm: Communication stream.
        previous_event: What the kernels wait for; everything queued on the current stream when it
            holds no event.
        async_finish: Whether the current stream is left alone and an event is returned.
        allocate_on_comm_stream: Whether outputs belong to the communication stream.

    Raises:
        RuntimeError: Flags that do not go together, or the communication stream is current.
    """

    def __init__(
        self,
        comm: CommStream,
        previous_event: EventOverlap | None,
        *,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> None:
        self._comm = comm
        self._previous = previous_event.event if previous_event is not None else None
        self._async = async_finish
        self._allocate_on_comm = allocate_on_comm_stream
        # The raw handle: torch.cuda.current_stream() makes a stream object, 2.5 us of a call of 25.
        self._current = torch._C._cuda_getCurrentRawStream(comm.device)
        self.stream = comm.handle
        _check_flags(self._previous, async_finish, allocate_on_comm_stream)
        if self._previous is None and self._current == self.stream:
            raise RuntimeError(
                "the communication stream is current, and a stream cannot wait for itself; call "
                "from another stream, or pass previous_event"
            )

    def allocating(self) -> AbstractContextManager[object]:
        """Where outputs are allocated."""
        if not self._allocate_on_comm:
            return _NOWHERE
        # Now: from the first wait on, a capture of the event's stream captures this one, too, and
        # the allocator gives what a graph writes to no one else.
        assert self._previous is not None
        self._previous.stream_wait(self._comm.torch_stream)
        return torch.cuda.stream(self._comm.torch_stream)

    def start(self) -> None:
        """Makes the communication stream wait for the inputs and the outputs."""
        if self._previous is not None and not self._allocate_on_comm:
            self._previous.stream_wait(self._comm.torch_stream)
        if self._previous is None or (_torch_fills() and not self._allocate_on_comm):
            self._comm.wait_for(self._current)

    def wait_for(self, event: Event) -> None:
        """Makes the kernels wait for an event."""
        self._comm.wait_event(self.stream, event)

    def finish(self, tensors: Iterable[torch.Tensor | None]) -> EventOverlap:
        """Ends the call: an event, or the current stream waits.

        Args:
            tensors: Inputs and outputs, which the allocator must not hand out before the kernels
                are done.
        """
        event = self._end()
        for tensor in tensors if event is not None else ():
            if tensor is not None:
                tensor.record_stream(self._comm.torch_stream)
                if self._allocate_on_comm:
                    tensor.record_stream(torch.cuda.current_stream(self._comm.device))
        return EventOverlap(event)

    def finish_keeping(self, tensors: Iterable[torch.Tensor | None]) -> EventOverlap:
        """Like `finish`, but the returned object keeps the tensors; the allocator is told nothing.

        So do V1's low-latency calls: memory comes back when the caller lets go of the event, not
        when the allocator happens to ask the stream.
        """
        event = self._end()
        return EventOverlap(event, tuple(tensors) if event is not None else None)

    def _end(self) -> EventHandle | None:
        if self._async:
            return EventHandle(self._comm.torch_stream)
        self._comm.make_wait(self._current)
        return None


class CurrentStream:
    """The scope of a call on the stream that is current when it is made: nothing waits.

    Args:
        comm: Communication stream of the Buffer.
    """

    def __init__(self, comm: CommStream) -> None:
        self._comm = comm
        self.stream = torch._C._cuda_getCurrentRawStream(comm.device)

    def allocating(self) -> AbstractContextManager[object]:
        """Where outputs are allocated."""
        return _NOWHERE

    def start(self) -> None:
        """Nothing to wait for."""

    def wait_for(self, event: Event) -> None:
        """Makes the kernels wait for an event."""
        self._comm.wait_event(self.stream, event)

    def finish(self, tensors: Iterable[torch.Tensor | None]) -> EventOverlap:
        """Nothing waits; the caller's own references keep the tensors."""
        del tensors
        self._comm.last_call = next_number()
        return EventOverlap()

    finish_keeping = finish


class CpuScope:
    """The scope of a call without a GPU, where the work is done when a call returns.

    Args:
        async_finish: Whether an event is returned.
    """

    stream = 0

    def __init__(self, *, async_finish: bool) -> None:
        self._async = async_finish

    @classmethod
    def of_call(
        cls, previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
    ) -> CpuScope:
        """The scope of a call with these flags, which must go together as on a GPU.

        Raises:
            RuntimeError: They do not.
        """
        previous = None if previous_event is None else previous_event.event
        _check_flags(previous, async_finish, allocate_on_comm_stream)
        return cls(async_finish=async_finish)

    def start(self) -> None:
        """Nothing to wait for."""

    def finish(self, tensors: Iterable[torch.Tensor | None] = ()) -> EventOverlap:
        """Ends the call."""
        del tensors
        return EventOverlap(EventHandle() if self._async else None)

    def finish_keeping(self, tensors: Iterable[torch.Tensor | None]) -> EventOverlap:
        """Ends the call; with an event, the returned object keeps the tensors."""
        if not self._async:
            return EventOverlap()
        return EventOverlap(EventHandle(), tuple(tensors))


GpuScope: TypeAlias = Scope | CurrentStream
AnyScope: TypeAlias = GpuScope | CpuScope


def _check_flags(
    previous: EventHandle | None, async_finish: bool, allocate_on_comm_stream: bool
) -> None:
    if allocate_on_comm_stream and not (previous is not None and async_finish):
        raise RuntimeError(
            "allocate_on_comm_stream=True needs a previous_event that holds an event, and "
            "async_finish=True; got previous_event "
            f"{'with' if previous is not None else 'without'} an event, {async_finish=}"
        )


def _torch_fills() -> bool:
    """Whether torch writes to new tensors, on the stream where they are allocated."""
    if not torch.are_deterministic_algorithms_enabled():
        return False
    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]
