"""Events: how an operation on the communication stream is waited for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from epjit.runtime import driver
from epjit.runtime.stream import Event, is_capturing, is_current, shared_events

next_number = itertools.count(1).__next__  # tells what was queued before from what came after


class EventHandle:
    """An event recorded on a stream when it is made.

    It can be copied, and waited for any number of times and from any stream. Without a GPU there
    are no streams: work is done when a call returns, and waiting does nothing.

    Args:
        stream: Stream to record on; the current stream when None.

    Attributes:
        number: Of two events of one stream, the higher is that of the one that covers the other.
        raw: The driver's event; None without a GPU.
        tensors_to_record: Tensors that must live as long as this object.
    """

    # Streams by their raw handles: a torch.cuda.Stream or Event takes 2 to 8 us of the host.
    __slots__ = ("_device", "_stream", "number", "raw", "tensors_to_record")

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.tensors_to_record: tuple[Any, ...] = ()
        self.raw: Event | None = None
        if torch.cuda.is_available():
            if stream is None:
                device = torch.cuda.current_device()
                handle = torch._C._cuda_getCurrentRawStream(device)
            else:
                device, handle = stream.device_index, stream.cuda_stream
            with driver.using(device):
                events = shared_events(device)
                event = events.take_for_capture() if is_capturing(handle) else events.take()
                self._record(event, handle, device)

    @classmethod
    def on(cls, stream: int, event: Event, device: int) -> EventHandle:
        """The same with an event from elsewhere, on a stream of the GPU that is current."""
        made = cls.__new__(cls)
        made.tensors_to_record = ()
        made._record(event, stream, device)
        return made

    def _record(self, event: Event, stream: int, device: int) -> None:
        self._stream, self._device = stream, device
        # Before it records: of two numbers the higher is that of the event that covers more,
        # also when another thread queues something, and draws, in between.
        self.number = next_number()
        event.record(stream)
        self.raw = event

    def covers(self, stream: int, number: int) -> bool:
        """Whether it stands for all that was on a stream when a number was drawn."""
        return self.raw is not None and self._stream == stream and self.number > number

    def check_device(self, device: int) -> None:
        """Refuses an event of another GPU, where nothing of a call's own GPU was waited for.

        Raises:
            RuntimeError: It is one.
        """
        if self.raw is not None and self._device != device:
            raise RuntimeError(
                f"previous_event was recorded on cuda:{self._device}, but this Buffer is on "
                f"cuda:{device}: a thread starts with cuda:0 as its current device; call "
                f"torch.cuda.set_device({device}) in it before Buffer.capture()"
            )

    def current_stream_wait(self) -> None:
        """Makes the current stream of the event's GPU wait for the event."""
        if self.raw is not None:
            current = torch._C._cuda_getCurrentRawStream(self._device)
            self.raw_stream_wait(current, self._device)

    def stream_wait(self, stream: torch.cuda.Stream | None) -> None:
        """Makes `stream` wait for the event."""
        if stream is not None:
            self.raw_stream_wait(stream.cuda_stream, stream.device_index)

    def raw_stream_wait(self, stream: int, device: int) -> None:
        """Makes a stream of a GPU, of which `stream` is the handle, wait for the event."""
        if self.raw is None:
            return
        if is_current(device):
            self.raw.make_wait(stream)
        else:
            with driver.using(device):  # each GPU has a default stream, all with the same handle
                self.raw.make_wait(stream)

    def has_happened(self) -> bool:
        """Whether it has; see `Event.has_happened`."""
        return self.raw is None or self.raw.has_happened()

    def synchronize(self) -> None:
        """Blocks the host until the event has happened."""
        if self.raw is not None:
            self.raw.synchronize()


def event_of(previous_event: EventOverlap | EventHandle | None) -> EventHandle | None:
    """The event that a call waits for; none in a bare `EventHandle`, which V1 takes for none."""
    return getattr(previous_event, "event", None)


class EventOverlap:
    """The event of an operation, to be waited for; or ``with event:`` around work that overlaps.

    Args:
        event: The event, or None when there is nothing to wait for.
        extra_tensors: Tensors that must live as long as this object.

    Attributes:
        event: As passed.
        extra_tensors: As passed.
        hook_after_wait: Called once, after the next wait, or None.
    """

    hook_after_wait: Callable[[], Any] | None = None
    _releases = False

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[Any, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def register_hook_after_wait(self, hook: Callable[[], Any]) -> None:
        """Sets what the next wait calls when the current stream waits, instead of any before."""
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """This object, for a ``with`` statement whose end waits with `release_handle`."""
        self._releases = release_handle
        return self

    def current_stream_wait(self, release_handle: bool = False) -> Any:
        """Makes the current stream of the event's GPU wait for the event, then calls the hook.

        Args:
            release_handle: Let go of the event and of all tensors that are kept with it.

        Returns:
            What the hook returns; None without one.

        Raises:
            AssertionError: There is no event: the operation was not asynchronous.
        """
        if self.event is None:
            raise AssertionError(
                "this EventOverlap holds no event: the call that returned it was not asynchronous "
                "(pass async_finish=True), so there is nothing to wait for"
            )
        self.event.current_stream_wait()
        self._let_go()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if release_handle:
            self.event = self.extra_tensors = None
        return None if hook is None else hook()

    def _let_go(self) -> None:
        """Lets go of what nobody needs any more, now that the current stream waits."""

    def wait(self, release_handle: bool = False) -> Any:
        """The same, by its name in DeepEP 2.5."""
        return self.current_stream_wait(release_handle)

    def __enter__(self) -> EventOverlap:
        """Starts the overlapped part."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Makes the current stream wait for the event, if there is one."""
        if self.event is not None:
            self.current_stream_wait(self._releases)
