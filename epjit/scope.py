"""Streams and order of calls: what kernels wait for, where outputs lie, what the caller gets."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch

from epjit.event import EventHandle, EventOverlap, event_of, next_number
from epjit.runtime import driver
from epjit.runtime.host import nap
from epjit.runtime.interrupt import synchronize
from epjit.runtime.stream import is_capturing, is_current, on_device

if TYPE_CHECKING:
    from contextlib import ExitStack

    from epjit.runtime.stream import CommStream, Event

Record: TypeAlias = tuple[object, ...]
"""Tensors, records and anything else; often a NamedTuple of `epjit.calls`."""
_NOWHERE = nullcontext()
_MOST_KEPT = 64  # calls under way
_FEW_KEPT, _SMALL_BYTES = 16, 4 << 20  # that are not asked for: small batches, where it would count
S = TypeVar("S")


class Turns:
    """The way into a Buffer: one call at a time, with its GPU current in the calling thread.

    A thread can come with any GPU current: a fresh one has GPU 0, and a finalizer runs wherever the
    last reference went. Driver and torch take streams, events and memory for those of the current
    GPU.

    Args:
        device: Number of the GPU; None without one.
    """

    def __init__(self, device: int | None) -> None:
        self._device, self._lock = device, threading.RLock()

    def __call__(self) -> AbstractContextManager[object]:
        """Holds the turn for as long as a ``with`` statement lasts; a thread may hold it twice."""
        # All calls come by here, nearly all from threads that are where they should be: for these
        # it is the bare lock, so that no more Python runs.
        if self._device is None or is_current(self._device):
            return self._lock
        return self._from_elsewhere(self._device)

    @contextmanager
    def _from_elsewhere(self, device: int) -> Iterator[None]:
        with self._lock, on_device(device):
            yield


class Kept:
    """Tensors of calls under way whose events nobody has waited for, until these have happened.

    In place of `Tensor.record_stream`, by which the allocator learns that a stream uses memory of
    another: 1.5 us a tensor, an event when it dies, and queries in every allocation until that has
    happened; this is a query a call, or less. It is as safe: memory goes back when the work *is
    done*, as there, whatever stream a tensor is of; later at most, with a later call of the Buffer.

    Tensors go where `take_done`'s result is dropped, which must not be within a Buffer's turn: what
    they run as they go, such as finalizers, may take other locks.

    Attributes:
        calls: Event and tensors of each.
    """

    def __init__(self) -> None:
        self.calls: deque[tuple[EventHandle, object]] = deque()

    def keep(self, event: EventHandle, tensors: object) -> None:
        """Keeps whatever tensors are in an object, until an event of the Buffer's stream.

        From any thread, and in any order: a call is kept when its event is dropped.
        """
        if event.raw is not None:
            self.calls.append((event, tensors))

    def take_done(self) -> list[object]:
        """Tensors that are not used any more; one thread at a time, with the events' GPU current.

        Waits when too many calls are under way, so that a host that runs far ahead of its GPU does
        not gather all the memory that there is.

        Raises:
            RuntimeError: The GPU is lost.
        """
        calls, done = self.calls, list[object]()
        while calls:
            with driver.relaxed():
                # One after another on one stream: what has happened covers all that is older.
                newest = calls[-1][0]
                number = newest.number if newest.has_happened() else 0
                while calls and (calls[0][0].number <= number or calls[0][0].has_happened()):
                    done.append(calls.popleft())
            if len(calls) + 1 < _MOST_KEPT:  # with the one that is being made
                break
            nap()
        return done

    def clear(self) -> None:
        """Lets everything go, also what is yet to come: nothing is under way any more."""
        self.calls = deque(maxlen=0)


class Scope:
    """The streams of one call: what kernels wait for, where outputs lie, what is returned.

    Order of a call, within a ``with`` statement: allocate; `start`; queue kernels on `stream`;
    `finish`. Outputs are allocated before the communication stream waits for the current one, so
    that a fill which torch launches for them (deterministic mode) comes first.

    With a previous event, outputs come from the communication stream's memory, whatever
    `allocate_on_comm_stream` says. Memory of the current stream is free again in the order of that
    stream, and the kernels do not wait for what was queued there after the event: it may still use
    what the allocator hands out.

    Args:
        comm: Communication stream.
        kept: Gets the tensors of an asynchronous call that nobody waits for.
        previous: Waited for by the kernels; None: everything queued on the current stream.
        async_finish: Whether the current stream is left alone and an event is returned.
        allocate_on_comm_stream: V1's flag; with a previous event outputs are allocated there
            anyway, and without one it is refused.

    Raises:
        RuntimeError: Flags that do not go together, the communication stream is current, or the
            event is of another GPU.
    """

    def __init__(
        self,
        comm: CommStream,
        kept: Kept,
        previous: EventHandle | None,
        *,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> None:
        self._comm, self._kept, self._previous, self._async = comm, kept, previous, async_finish
        self._done: list[object] = []  # goes with this object, when the Buffer's turn is over
        self._waits_for_event = self._is_started = False
        # The raw handle: torch.cuda.current_stream() makes a stream object, 2.5 us of a call of 25.
        self._current = torch._C._cuda_getCurrentRawStream(comm.device)
        self.stream = comm.handle
        if allocate_on_comm_stream:
            _check_flags(previous, async_finish)
        if previous is not None:
            previous.check_device(comm.device)
        elif self._current == self.stream:
            raise RuntimeError(
                "the communication stream is current, and a stream cannot wait for itself; call "
                "from another stream, or pass previous_event"
            )

    @property
    def owners(self) -> tuple[int, ...]:
        """The streams that outputs belong to: work there may use them until they are dropped."""
        return (self._current,) if self._previous is None else (self._current, self.stream)

    def __enter__(self) -> Scope:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets the current stream wait when the call has not come to its end.

        An interrupt, a host that waited for too long, no memory for the outputs: kernels are queued
        then whose inputs and outputs nobody keeps. The allocator gives memory of the current stream
        away in the order of that stream.
        """
        if kind is not None and self._is_started:
            with suppress(RuntimeError):  # the first error says why
                self._comm.make_wait(self._current)

    def allocating(self) -> AbstractContextManager[object]:
        """Surrounds the allocation of outputs, and decides whose memory they are."""
        if self._previous is None:
            return _NOWHERE
        # Now: from the first wait on, a capture of the event's stream captures this one, too, and
        # the allocator gives what a graph writes to no one else.
        self._wait_for_event(self._previous)
        return torch.cuda.stream(self._comm.torch_stream)

    def running(self) -> AbstractContextManager[object]:
        """Surrounds work of torch among the kernels, after `start`."""
        return torch.cuda.stream(self._comm.torch_stream)

    def start(self) -> None:
        """Makes the communication stream wait for the inputs and the outputs.

        Again for outputs that were allocated since: another thread may have queued work on their
        memory and dropped it, or torch fills them. An uncached dispatch does so, for its outputs
        are allocated while notify runs already; before it, they would delay notify.
        """
        self._is_started = True
        if self._previous is None:
            self._comm.wait_for(self._current)
        else:
            self._wait_for_event(self._previous)

    def _wait_for_event(self, event: EventHandle) -> None:
        if not self._waits_for_event:
            event.raw_stream_wait(self.stream, self._comm.device)
            self._waits_for_event = True

    def wait_for(self, event: Event) -> None:
        """Makes the kernels wait for an event."""
        event.make_wait(self.stream)

    def finish(self, inputs: Record = (), outputs: Record = ()) -> EventOverlap:
        """Ends the call: an event, or the current stream waits.

        With an event, that keeps the tensors (`KeepingOverlap`), for their memory belongs to a
        stream that does not wait for the kernels. Outputs that belong to the communication stream
        are used again in its order; the allocator learns that they are of use on the caller's.

        Args:
            inputs: Read by the kernels, allocated by the caller.
            outputs: Written by them, allocated by this call.
        """
        event, is_captured = self._end()
        if self._previous is not None:
            _record(outputs, torch.cuda.current_stream(self._comm.device))
        if event is None:
            return EventOverlap()
        tensors = (*inputs, *outputs) if self._previous is None else (*inputs,)
        kept = None if is_captured else self._kept
        overlap = KeepingOverlap(event, tensors, self._comm, self._current, kept)
        if kept is not None and kept.calls:
            if len(kept.calls) >= _FEW_KEPT or _is_large(inputs) or _is_large(outputs):
                self._done = kept.take_done()
        return overlap

    def _end(self) -> tuple[EventHandle | None, bool]:
        """The event of the call, if it has one, and whether that is captured."""
        comm = self._comm
        if not self._async:
            comm.make_wait(self._current)
            return None, False
        # Without a previous event, this stream has just been made to wait for the current one, and
        # to ask torch for that takes half of the time.
        if self._previous is None:
            is_captured = torch.cuda.is_current_stream_capturing()
        else:
            is_captured = is_capturing(comm.handle)
        event = comm.events.take_for_capture() if is_captured else comm.events.take()
        return EventHandle.on(comm.handle, event, comm.device), is_captured


class KeepingOverlap(EventOverlap):
    """The event of a call, which keeps the call's tensors until it is waited for.

    Once the stream of the call waits for it, they go: whatever is queued there from then on comes
    behind the kernels, and the allocator uses memory of a stream again in the order of that stream.
    It is as if the call had been made on that stream at the wait; so a tensor of a third stream is
    the caller's to keep, as with any work on a stream that it is not of. (torch's NCCL lets go of
    its tensors at a wait, too.) If another stream waits, or this object goes before anyone has, the
    tensors live until the event has happened, or, in a capture, where no event can be asked, the
    allocator is told that the communication stream uses them.

    A storage that the caller empties in place (``resize_(0)``) goes at once, so that this has to
    follow a wait.

    Args:
        event: On the communication stream, behind the kernels.
        tensors: Read and written by the kernels, and whatever else the records of them hold.
        comm: The communication stream.
        current: Handle of the stream that was current in the call.
        kept: Gets the tensors of which no wait is known; None in a capture.
    """

    def __init__(
        self,
        event: EventHandle,
        tensors: Record,
        comm: CommStream,
        current: int,
        kept: Kept | None,
    ) -> None:
        self.event, self.extra_tensors = event, tensors  # not by super(): 0.2 us
        self._comm, self._current, self._kept = comm, current, kept
        if kept is None:
            self._pid = os.getpid()

    def _let_go(self) -> None:
        """The current stream waits for the event."""
        if torch._C._cuda_getCurrentRawStream(self._comm.device) != self._current:
            self._keep()
        self.extra_tensors = None

    def _keep(self) -> None:
        """The tensors are about to go, and the event may not have happened."""
        if self._kept is not None:
            if self.event is not None:
                self._kept.keep(self.event, self.extra_tensors)
        elif not sys.is_finalizing() and os.getpid() == self._pid:
            _record(self.extra_tensors or (), self._comm.torch_stream)

    def __del__(self) -> None:
        if self.extra_tensors is not None:
            self._keep()


def _tensors(record: Record) -> Iterator[torch.Tensor]:
    """The tensors of a record, and of the records in it."""
    for each in record:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, tuple):
            yield from _tensors(each)


def _is_large(record: Record) -> bool:
    """Whether the first tensor of a record, or of the record in it, takes much memory: its rows."""
    rows: object = record
    while isinstance(rows, tuple):
        rows = rows[0] if rows else None
    return isinstance(rows, torch.Tensor) and rows.nbytes > _SMALL_BYTES


def _record(record: Record, stream: torch.cuda.Stream) -> None:
    """Tells torch's allocator that a stream uses tensors."""
    for tensor in _tensors(record):
        tensor.record_stream(stream)


class _NoWait:
    """Base of scopes whose kernels wait for nothing and whose outputs are like any tensor."""

    def __enter__(self: S) -> S:
        return self

    def allocating(self) -> AbstractContextManager[object]:
        """Surrounds the allocation of outputs, and decides whose memory they are."""
        return _NOWHERE

    def start(self) -> None:
        """Nothing to wait for."""

    def running(self) -> AbstractContextManager[object]:
        """Surrounds work of torch among the kernels."""
        return _NOWHERE


class CurrentStream(_NoWait):
    """The scope of a call on the caller's own stream, the same for all: nothing waits.

    Args:
        comm: Communication stream of the Buffer.
        stream: Handle of the stream.
    """

    def __init__(self, comm: CommStream, stream: int) -> None:
        self._comm, self.stream = comm, stream

    @property
    def owners(self) -> tuple[int, ...]:
        """The streams that outputs belong to."""
        return (self.stream,)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Counts a call that has not come to its end, too: some of it may be queued."""
        if kind is not None:
            self._comm.last_call = next_number()

    def wait_for(self, event: Event) -> None:
        """Makes the kernels wait for an event."""
        event.make_wait(self.stream)

    def finish(self, inputs: Record = (), outputs: Record = ()) -> EventOverlap:
        """Nothing waits: memory of this stream is used again in its order."""
        del inputs, outputs
        self._comm.last_call = next_number()
        return EventOverlap()


class CpuScope(_NoWait):
    """The scope of a call without a GPU, where the work is done when a call returns.

    Args:
        async_finish: Whether an event is returned.
    """

    stream = 0
    owners: tuple[int, ...] = ()

    def __init__(self, async_finish: bool) -> None:
        self._async = async_finish

    def __exit__(self, *_: object) -> None:
        """Nothing is under way."""

    def wait_for(self, event: Event) -> None:
        """Nothing waits."""

    def finish(self, inputs: Record = (), outputs: Record = ()) -> EventOverlap:
        """Ends the call; with an event, the returned object keeps the tensors."""
        if not self._async:
            return EventOverlap()
        return EventOverlap(EventHandle(), (*inputs, *outputs))


AnyScope: TypeAlias = Scope | CurrentStream | CpuScope


class Streams:
    """The calls of one Buffer on the device: each behind the one before, whatever their streams.

    All methods are to be called in the turn in which the call is queued.

    Args:
        comm: Communication stream.
        resources: Lets go of what calls under way use, when none is any more.
    """

    def __init__(self, comm: CommStream, resources: ExitStack) -> None:
        self._comm, self._kept = comm, Kept()
        resources.callback(self._kept.clear)
        self._last: int | None = None  # stream of the last call
        self._current = CurrentStream(comm, 0)
        self._shows_comm = False  # communication_stream() was called

    def scope(
        self,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> Scope | CurrentStream:
        """The scope of a call: only what overlaps with the caller needs a stream of its own.

        (From one stream to another and back costs the GPU 3 us, and 20 to 35 on slow hosts.)
        """
        comm, event = self._comm, None
        if previous_event is not None:
            event = event_of(previous_event)
        shows = self._shows_comm and not comm.is_current()
        if not (async_finish or allocate_on_comm_stream or event is not None or shows):
            return self.scope_on(torch._C._cuda_getCurrentRawStream(comm.device))
        scope = Scope(
            comm,
            self._kept,
            event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        if scope.stream != self._last:
            self._follow(scope.stream, event)
        return scope

    def low_latency_scope(self, async_finish: bool) -> Scope | CurrentStream:
        """The scope of a low-latency call: on the caller's stream, as its hook, if it can be."""
        if not async_finish:
            return self.scope_on(torch._C._cuda_getCurrentRawStream(self._comm.device))
        scope = Scope(
            self._comm, self._kept, None, async_finish=True, allocate_on_comm_stream=False
        )
        if scope.stream != self._last:
            self._follow(scope.stream)
        return scope

    def scope_on(self, stream: int) -> CurrentStream:
        """The scope of a call on one stream, such as the rest of an earlier one."""
        if stream != self._last:
            self._follow(stream)
        if stream != self._current.stream:
            self._current = CurrentStream(self._comm, stream)
        return self._current

    def _follow(self, stream: int, event: EventHandle | None = None) -> None:
        """Orders a call behind the one before, unless `event` covers it already."""
        last, self._last = self._last, stream
        # An event that was recorded there since stands for the call, and not for what came later.
        if last is not None and (event is None or not event.covers(last, self._comm.last_call)):
            self._comm.follow(last, stream)

    def communication_stream(self) -> torch.cuda.Stream:
        """The communication stream, on which all calls of the normal mode run from now on."""
        self._shows_comm = True
        return self._comm.torch_stream

    def is_captured(self) -> bool:
        """Whether a graph is being captured, by any thread, on a stream that a call ran on."""
        return self._comm.is_captured(self._last)

    def settle(self) -> None:
        """Waits for all that is queued, before anything is freed: here Ctrl-C may end it.

        Raises:
            RuntimeError: A CUDA graph is being captured.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a Buffer cannot be destroyed while a CUDA graph is captured, for nothing "
                "may be freed meanwhile; destroy it after the capture"
            )
        with suppress(RuntimeError):  # which comes again when all is freed
            synchronize(torch.device("cuda", self._comm.device))


class CpuStreams:
    """The same without a GPU, where a call is done when it returns."""

    def scope(
        self,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> CpuScope:
        """The scope of a call, whose flags must go together as on a GPU."""
        if allocate_on_comm_stream:
            _check_flags(event_of(previous_event), async_finish)
        return CpuScope(async_finish)

    def low_latency_scope(self, async_finish: bool) -> CpuScope:
        """The scope of a low-latency call."""
        return CpuScope(async_finish)

    def scope_on(self, stream: int) -> CpuScope:
        """The scope of the rest of an earlier call."""
        del stream
        return CpuScope(async_finish=False)

    def communication_stream(self) -> torch.cuda.Stream:
        """Refused.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("this Buffer lives on the CPU, where there is no communication stream")

    def is_captured(self) -> bool:
        """Never."""
        return False

    def settle(self) -> None:
        """Nothing is under way."""


def _check_flags(previous: EventHandle | None, async_finish: bool) -> None:
    """Of a call with `allocate_on_comm_stream`."""
    if previous is None or not async_finish:
        raise RuntimeError(
            "allocate_on_comm_stream=True needs a previous_event that holds an event, and "
            "async_finish=True; got previous_event "
            f"{'with' if previous is not None else 'without'} an event, {async_finish=}"
        )
