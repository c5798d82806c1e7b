"""Events: how an operation on the communication stream is waited for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

next_number = itertools.count(1).__next__  # tells what was queued before from what came after


class EventHandle:
    """An event recorded on a stream when it is made.

    It can be copied, and waited for any number of times and from any stream. Without a GPU there
    are no streams: work is done when a call returns, and waiting does nothing.

    Args:
        stream: Stream to record on; the current stream when None.

    Attributes:
        tensors_to_record: Tensors that must live as long as this object.
    """

    __slots__ = ("_device", "_event", "_number", "_stream", "tensors_to_record")

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.tensors_to_record: tuple[Any, ...] = ()
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event()
            stream = stream if stream is not None else torch.cuda.current_stream()
            self._stream, self._device = stream.cuda_stream, stream.device_index
            # Before it records: of two numbers the higher is that of the event that covers more,
            # also when another thread queues something, and draws, in between.
            self._number = next_number()
            self._event.record(stream)

    def covers(self, stream: int, number: int) -> bool:
        """Whether it stands for all that was on a stream when a number was drawn."""
        return self._event is not None and self._stream == stream and self._number > number

    def check_device(self, device: int) -> None:
        """Refuses an event of another GPU, where nothing of a call's own GPU was waited for.

        Raises:
            RuntimeError: It is one.
        """
        if self._event is not None and self._device != device:
            raise RuntimeError(
                f"previous_event was recorded on cuda:{self._device}, but this Buffer is on "
                f"cuda:{device}: a thread starts with cuda:0 as its current device; call "
                f"torch.cuda.set_device({device}) in it before Buffer.capture()"
            )

    def current_stream_wait(self) -> None:
        """Makes the current stream of the event's GPU wait for the event."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def stream_wait(self, stream: torch.cuda.Stream | None) -> None:
        """Makes `stream` wait for the event."""
        if self._event is not None and stream is not None:
            stream.wait_event(self._event)

    def synchronize(self) -> None:
        """Blocks the host until the event has happened."""
        if self._event is not None:
            self._event.synchronize()


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
        hook, self.hook_after_wait = self.hook_after_wait, None
        if release_handle:
            self.event = self.extra_tensors = None
        return None if hook is None else hook()

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
