"""The stream that communication runs on, events, and the GPU of the calling thread."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from epjit.errors import require
from epjit.runtime import driver

_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_PRIORITY, _MOST_STREAMS = -1, 32  # as torch.cuda.Stream(priority=-1) has it
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_LEGACY = (0, 1)  # the default stream, as torch names it, and CU_STREAM_LEGACY


def is_current(device: int) -> bool:
    """Whether a GPU is current in this thread; if so, it is for the driver from now on, too."""
    if torch._C._cuda_getDevice() != device:
        return False
    driver.bind(device)
    return True


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """Makes a GPU current in this thread meanwhile, for torch and for the driver.

    Not for one of them alone: torch may remember a device that it has yet to set.
    """
    with torch.cuda.device(device), driver.using(device):
        yield


@functools.cache
def _runtime() -> Any:
    """CuPy's calls of the CUDA runtime, which knows the driver's events and streams.

    They take 0.5 us of the host where those of cuda-bindings, which make an object of each status,
    take 0.9.
    """
    return require("cupy_backends.cuda.api.runtime", package="cupy-cuda13x (cupy-cuda12x)")


class Events:
    """A stock of CUevents of one GPU, each used again when nobody holds it any more.

    A wait keeps what its event stood for when it was queued, so nobody has to wait for a CUevent
    that is recorded again. Threads may take at once, and events are collected on any.

    Args:
        device: Number of the GPU.

    Attributes:
        device: As passed.
    """

    def __init__(self, device: int) -> None:
        self.device, self._pid = device, os.getpid()
        self._free: list[Any] = []
        self._is_over = False

    def take(self) -> Event:
        """An event, to be recorded."""
        try:
            handle = self._free.pop()
        except IndexError:
            with driver.using(self.device):
                handle = int(driver.call("cuEventCreate", _DISABLE_TIMING))
        return Event(self, handle)

    def take_for_capture(self) -> Event:
        """An event that is not used again, for a graph that is captured may hold on to it."""
        return Events(self.device).take()

    def give_back(self, handle: Any) -> None:
        """The end of an event."""
        self._free.append(handle)
        if self._is_over:  # of objects that refer to each other, the collector took this one first
            self.__del__()

    def __del__(self) -> None:
        self._is_over = True
        # At the end the driver may be gone, and a forked child has none.
        while self._free and not sys.is_finalizing() and os.getpid() == self._pid:
            driver.load().cuEventDestroy(self._free.pop())


class Event:
    """All that a stream had when it was recorded; its GPU is current in all calls.

    Args:
        events: Which the CUevent goes back to.
        handle: The CUevent.
    """

    __slots__ = ("_events", "_handle")

    def __init__(self, events: Events, handle: Any) -> None:
        self._events, self._handle = events, handle

    def __del__(self) -> None:
        self._events.give_back(self._handle)

    def record(self, stream_handle: int) -> None:
        """Lets it stand for all that a stream has now."""
        try:
            _runtime().eventRecord(self._handle, stream_handle)
        except RuntimeError as error:
            raise RuntimeError(
                f"no event can be recorded on stream {stream_handle:#x}: {error}"
            ) from None

    def make_wait(self, stream_handle: int) -> None:
        """Makes a stream wait for it, from now on."""
        try:
            _runtime().streamWaitEvent(stream_handle, self._handle)
        except RuntimeError as error:
            raise RuntimeError(
                f"stream {stream_handle:#x} cannot be made to wait: {error}"
            ) from None

    def order(self, first: int, then: int) -> None:
        """Makes stream `then` wait, from now on, for all that stream `first` has now."""
        calls = _runtime()
        try:
            calls.eventRecord(self._handle, first)
            calls.streamWaitEvent(then, self._handle)
        except RuntimeError as error:
            raise RuntimeError(
                f"stream {then:#x} cannot be made to wait for stream {first:#x}: {error}"
            ) from None

    def has_happened(self) -> bool:
        """Whether the stream is done with all of it.

        Within `driver.relaxed`, or it breaks the capture of a graph, also of another thread.
        """
        (status,) = driver.load().cuEventQuery(self._handle)
        if status and int(status) != _NOT_READY:
            raise RuntimeError(f"an event cannot be asked: {driver.describe(status)}")
        return not status

    def synchronize(self) -> None:
        """Blocks the host until the stream is done with all of it."""
        driver.call("cuEventSynchronize", self._handle)


@functools.cache
def shared_events(device: int) -> Events:
    """Events that belong to no Buffer."""
    return Events(device)


class BlockedStreamError(RuntimeError):
    """The default stream cannot be used while a blocking stream is captured."""


def record_event(stream_handle: int, device: int) -> Event | None:
    """An event recorded on a stream of a device; None if the stream is being captured.

    Raises:
        BlockedStreamError: It is the default stream, and a blocking one is being captured.
    """
    with driver.using(device):
        _check_not_blocked(stream_handle)
        if is_capturing(stream_handle):
            return None
        event = shared_events(device).take()
        event.record(stream_handle)
    return event


def is_capturing(stream_handle: int) -> bool:
    """Whether a stream is being captured, by any thread."""
    status, capturing = driver.load().cuStreamIsCapturing(stream_handle)
    # The legacy stream gives an error while another one of its context is captured.
    return bool(int(status) or int(capturing))


def captures(device: int) -> bool:
    """Whether a CUDA graph is captured that a synchronous copy of this thread would break.

    On torch's current stream, or on any blocking stream of the GPU. What other threads capture
    elsewhere is safe in `driver.relaxed`.
    """
    current = torch._C._cuda_getCurrentRawStream(device)
    with driver.using(device):
        return is_capturing(_LEGACY[1]) or is_capturing(current)


def _check_not_blocked(stream_handle: int) -> None:
    """Refuses the default stream while a blocking stream of its context is captured.

    It waits for such streams (made without CU_STREAM_NON_BLOCKING, unlike torch's), so whatever is
    queued there, even an event, would end the capture. It is never captured itself.
    """
    if stream_handle in _LEGACY and is_capturing(stream_handle):
        raise BlockedStreamError(
            "a blocking stream is being captured, and until that ends nothing can wait for the "
            "default stream, where the last call was made; capture on a stream of torch or another "
            "one made with cudaStreamNonBlocking, or make the calls before on such a stream"
        )


_numbers = itertools.count()


def high_priority_stream(device: int) -> torch.cuda.Stream:
    """A stream whose kernels start before those of others, one of 32 that are taken in turns.

    As torch's are, which would make all of its own, of each priority, for the first one. They are
    never destroyed: torch's allocator may come back to a stream long after a Buffer has gone.
    """
    return _stream(device, next(_numbers) % _MOST_STREAMS)


@functools.cache
def _stream(device: int, number: int) -> torch.cuda.Stream:
    del number
    with driver.using(device):
        handle = int(driver.call("cuStreamCreateWithPriority", _NON_BLOCKING, _PRIORITY))
    return torch.cuda.ExternalStream(handle, device=device)


class CommStream:
    """A high-priority stream, with cheap waits between it and other streams.

    One thread uses it at a time, with the device current.

    Args:
        device: Number of the GPU.

    Attributes:
        device: As passed.
        torch_stream: The same as a torch stream.
        handle: The CUstream, as an integer.
        events: For calls that return one.
        last_call: A number that was drawn when the last call on another stream was queued.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.torch_stream = high_priority_stream(device)
        self.handle = int(self.torch_stream.cuda_stream)
        self.last_call = 0
        self.events = Events(device)
        self._before, self._after = self.events.take(), self.events.take()

    def is_current(self) -> bool:
        """Whether it is torch's current stream."""
        return bool(torch._C._cuda_getCurrentRawStream(self.device) == self.handle)

    def is_captured(self, last: int | None) -> bool:
        """Whether this stream is being captured, by any thread, or `last`, another one."""
        with driver.using(self.device):
            return any(is_capturing(each) for each in (self.handle, last) if each is not None)

    def wait_for(self, stream_handle: int) -> None:
        """Makes this stream wait, from now on, for all that `stream_handle` has now."""
        self._before.order(stream_handle, self.handle)

    def make_wait(self, stream_handle: int) -> None:
        """Makes `stream_handle` wait, from now on, for all that this stream has now."""
        self._after.order(self.handle, stream_handle)

    def follow(self, last: int, stream_handle: int) -> None:
        """Makes `stream_handle` wait, from now on, for all that `last` has now.

        What a graph captures does not wait for what it does not capture: it runs after what was
        queued before by the caller's own order.

        Raises:
            BlockedStreamError: `last` is the default stream, and another thread captures a
                blocking one.
        """
        captures = torch.cuda.is_current_stream_capturing()
        if not captures:
            _check_not_blocked(last)
        if captures == (last not in _LEGACY and is_capturing(last)):
            self._before.order(last, stream_handle)
