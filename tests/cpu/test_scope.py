"""On which stream a call runs and what that waits for, with fakes of the streams."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from epjit import Buffer, EventOverlap
from epjit.calls import Dispatch, Routing
from epjit.event import EventHandle, next_number
from epjit.handles import Dispatched, IntranodeHandle
from epjit.runtime import stream as streams
from epjit.runtime.stream import BlockedStreamError, CommStream
from epjit.scope import CpuStreams, CurrentStream, KeepingOverlap, Scope, Streams, Turns

COMM = 99


class FakeComm:
    """Says which stream was told to follow which."""

    device, handle, torch_stream = 0, COMM, "comm"

    def __init__(self) -> None:
        self.followed: list[tuple[int, int]] = []
        self.waited: list[str] = []
        self.last_call = 0

    def is_current(self) -> bool:
        return torch._C._cuda_getCurrentRawStream(0) == COMM

    def wait_for(self, stream_handle: int) -> None:
        self.waited.append(f"all of {stream_handle}")

    def make_wait(self, stream_handle: int) -> None:
        self.waited.append(f"{stream_handle} waits")

    def follow(self, last: int, stream_handle: int) -> None:
        self.followed.append((last, stream_handle))


class World:
    """A Buffer that has streams and nothing else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 1
        monkeypatch.setattr(
            torch._C, "_cuda_getCurrentRawStream", lambda device: self.current, raising=False
        )
        self.comm = FakeComm()
        self.buffer: Any = Buffer.__new__(Buffer)
        self.buffer._streams = self.streams = Streams(self.comm)  # type: ignore[arg-type]
        self.buffer._entered, self.buffer.runtime = Turns(None), None
        monkeypatch.setattr(torch.cuda, "stream", self.allocating_on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "current")
        monkeypatch.setattr(EventHandle, "stream_wait", self.stream_wait)

    def allocating_on(self, stream: object) -> Any:
        assert stream == "comm"
        self.comm.waited.append("allocates")
        return contextlib.nullcontext()

    def stream_wait(self, stream: object) -> None:
        assert stream == "comm"
        self.comm.waited.append("event")

    def scope(
        self, *, previous: EventOverlap | None = None, is_async: bool = False, on_comm: bool = False
    ) -> Any:
        return self.streams.scope(previous, is_async, on_comm)


class FakeEvent(EventOverlap):
    """Holds an event, recorded on a stream."""

    def __init__(self, stream: int = 1, device: int = 0) -> None:
        self.event: Any = EventHandle.__new__(EventHandle)
        self.event._event, self.event._stream = mock.Mock(), stream
        self.event._device, self.event._number = device, next_number()


class FakeTensor(torch.Tensor):
    """Says which streams the allocator was told of."""

    def __init__(self) -> None:
        self.streams: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.streams.append(stream)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events can be recorded, though there is no GPU."""

    def make(self: Any, stream: object = None) -> None:
        self._event, self._stream, self._device = mock.Mock(), COMM, 0
        self._number = next_number()

    monkeypatch.setattr(EventHandle, "__init__", make)


def test_only_what_overlaps_runs_on_the_communication_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    for previous in (None, EventOverlap()):
        scope = world.scope(previous=previous)
        assert isinstance(scope, CurrentStream)
        assert scope.stream == 1
    for scope in (
        world.scope(is_async=True),
        world.scope(previous=FakeEvent()),
        world.scope(previous=FakeEvent(), is_async=True, on_comm=True),
    ):
        assert isinstance(scope, Scope)
        assert scope.stream == COMM


def test_calls_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    for current, is_async in ((1, False), (1, False), (2, False), (2, True), (3, True), (1, False)):
        world.current = current
        world.scope(is_async=is_async)
    assert world.comm.followed == [(1, 2), (2, COMM), (COMM, 1)]


def test_the_communication_stream_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.current = COMM
    assert world.scope().stream == COMM
    with pytest.raises(RuntimeError, match="cannot wait for itself"):
        world.scope(is_async=True)


def test_an_event_that_stands_for_the_last_call_is_all_that_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Work that was queued on the caller's stream after the event shall overlap."""
    for captured_before, stream, follows in (
        (False, 1, []),
        (True, 1, [(1, COMM)]),
        (False, 2, [(1, COMM)]),
    ):
        world = World(monkeypatch)
        event = FakeEvent(stream)
        world.scope().finish(())
        if not captured_before:
            event = FakeEvent(stream)
        world.scope(previous=event)
        assert world.comm.followed == follows


def test_all_calls_run_on_a_communication_stream_that_somebody_has_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.streams.communication_stream()
    assert world.scope().stream == COMM
    assert world.streams.low_latency_scope(False).stream == 1  # a hook's stream is the caller's
    world.current = COMM
    assert isinstance(world.scope(), CurrentStream)


def test_a_hook_follows_the_calls_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    monkeypatch.setattr(Buffer, "_check_alive", lambda self: None)
    scope = world.streams.low_latency_scope(False)
    hook = world.buffer._hook("low_latency_dispatch", lambda: None, scope.stream)
    world.current = 2
    world.scope()
    before = FakeEvent(1)
    hook()
    world.scope(previous=before)
    assert world.comm.followed == [(1, 2), (2, 1), (1, COMM)]


@pytest.mark.parametrize(("is_async", "on_comm"), [(False, False), (True, False), (True, True)])
def test_with_a_previous_event_outputs_are_allocated_on_the_communication_stream(
    monkeypatch: pytest.MonkeyPatch, events: None, is_async: bool, on_comm: bool
) -> None:
    """Memory that work behind the event still uses is free on the caller's stream, and only there.

    Allocated after the wait: a capture has reached the stream then, and the allocator takes the
    graph's own pool.
    """
    world = World(monkeypatch)
    with world.scope(previous=FakeEvent(), is_async=is_async, on_comm=on_comm) as scope:
        for _ in range(2):
            with scope.allocating():
                pass
            scope.start()
        assert world.comm.waited == ["event", "allocates", "allocates"]
        assert scope.owners == (1, COMM)
        given, made = FakeTensor(), FakeTensor()
        scope.finish((given, None), (made, None))
    # The stream of the call is waited for before their memory is used again, each way round.
    assert made.streams == ["current"]
    assert given.streams == (["comm"] if is_async else [])


@pytest.mark.parametrize("has_event", [False, True])
def test_the_allocator_is_told_of_every_tensor_of_a_call(
    monkeypatch: pytest.MonkeyPatch, events: None, has_event: bool
) -> None:
    """Those of its counts or handle, too; ints, lists of counts and None are none."""
    world = World(monkeypatch)
    made: list[Any] = [FakeTensor() for _ in range(18)]
    x, scales, idx, weights, *rest = made
    new = Dispatch(x, scales, idx, weights, Routing(*rest[:4]), 1, 0, 4)
    cached = Dispatch(x, None, None, None, tuple(rest[4:8]), 1, 0, 4)
    received = Dispatched(*rest[8:12], [3, 4], IntranodeHandle(*[None] * 4, *rest[12:]))
    for call in (new, cached):
        with world.scope(previous=FakeEvent() if has_event else None, is_async=True) as scope:
            scope.finish(call, received)
    outputs = ["current" if has_event else "comm"] * 2
    assert [each.streams for each in rest[8:]] == [outputs] * 6
    assert x.streams == ["comm"] * 2
    assert [each.streams for each in made[1:12]] == [["comm"]] * 11


@pytest.mark.parametrize("is_async", [False, True])
def test_without_one_they_are_allocated_on_the_callers(
    monkeypatch: pytest.MonkeyPatch, events: None, is_async: bool
) -> None:
    world = World(monkeypatch)
    world.streams.communication_stream()
    with world.scope(is_async=is_async) as scope:
        with scope.allocating():
            scope.start()
        tensors = FakeTensor(), FakeTensor()
        scope.finish(tensors[:1], tensors[1:])
    assert world.comm.waited == ["all of 1"] + ["1 waits"] * (not is_async)
    assert [tensor.streams for tensor in tensors] == [["comm"] if is_async else []] * 2
    assert scope.owners == (1,)


@pytest.mark.parametrize("has_event", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_interrupt_the_callers_stream_waits_for_what_is_queued(
    monkeypatch: pytest.MonkeyPatch, has_event: bool, error: type[BaseException]
) -> None:
    """Nobody keeps the tensors of that call, and their memory is used again in stream order."""
    world = World(monkeypatch)
    for is_started in (False, True):
        previous = FakeEvent() if has_event else None
        with (
            contextlib.suppress(error),
            world.scope(previous=previous, is_async=True) as scope,
        ):
            if is_started:
                scope.start()
            raise error
        assert ("1 waits" in world.comm.waited) == is_started


def test_what_an_interrupted_call_has_queued_is_not_taken_for_covered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    with contextlib.suppress(KeyboardInterrupt), world.scope():
        event = FakeEvent(1)
        raise KeyboardInterrupt
    world.scope(previous=event)
    assert world.comm.followed == [(1, COMM)]


def test_a_low_latency_event_that_goes_before_it_was_waited_for(
    monkeypatch: pytest.MonkeyPatch, events: None
) -> None:
    world = World(monkeypatch)
    for waits_on, expected in ((None, ["comm"]), (2, ["comm"]), (1, [])):
        tensor: Any = FakeTensor()
        world.current = 1
        with world.streams.low_latency_scope(True) as scope:
            scope.start()
            event = scope.finish_keeping((tensor,), (None,))
        assert isinstance(event, KeepingOverlap)
        if waits_on is not None:
            world.current = waits_on
            monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: mock.Mock())
            with event:
                pass
        assert tensor.streams == []
        del event
        assert tensor.streams == expected


def test_an_event_draws_its_number_before_it_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that another thread queues in between is not covered, and must not seem to be."""
    world = World(monkeypatch)
    world.scope().finish()

    class TorchEvent:
        def record(self, stream: object) -> None:
            del stream
            self.recorded_at = next_number()
            thread = threading.Thread(target=lambda: world.scope().finish())
            thread.start()
            thread.join()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", TorchEvent)
    stream: Any = SimpleNamespace(cuda_stream=1, device_index=0)
    handle = EventHandle(stream)
    assert not handle.covers(1, world.comm.last_call)
    world.scope(previous=EventOverlap(handle))
    assert world.comm.followed == [(1, COMM)]


def test_an_event_of_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    with pytest.raises(RuntimeError, match=r"on cuda:1, but .* on cuda:0: .*set_device\(0\)"):
        world.scope(previous=FakeEvent(device=1))


def test_the_current_stream_of_the_events_gpu_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    World(monkeypatch)
    asked: list[object] = []

    def current_stream(device: object = None) -> Any:
        asked.append(device)
        return mock.Mock()

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    FakeEvent(device=3).current_stream_wait()
    assert asked == [3]


class CaptureDriver:
    """A driver of which only captures are asked."""

    def __init__(self, status: int, capturing: set[int]) -> None:
        self.status, self.capturing = status, capturing

    def cuStreamIsCapturing(self, stream: int) -> tuple[int, int]:
        return (self.status if stream == 0 else 0), stream in self.capturing

    def load(self) -> Any:
        return self


@pytest.mark.parametrize(
    ("last", "status", "capturing", "expected"),
    [
        (0, 906, {5}, "none"),  # a blocking stream
        (0, 0, {5}, "none"),
        (1, 0, {5}, "none"),
        (4, 0, {4, 5}, "order"),
        (4, 0, {5}, "none"),
        (4, 0, {4}, "none"),
        (0, 0, set(), "order"),
        (0, 906, {6}, "refused"),  # a blocking stream of another thread
    ],
)
def test_a_capture_does_not_follow_the_default_stream(
    monkeypatch: pytest.MonkeyPatch, last: int, status: int, capturing: set[int], expected: str
) -> None:
    """While a blocking stream is captured, the default stream can not even be asked."""
    monkeypatch.setattr(streams, "driver", CaptureDriver(status, capturing))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: 5 in capturing)
    comm: Any = CommStream.__new__(CommStream)
    comm._before, comm._order = None, mock.Mock()
    refused = pytest.raises(BlockedStreamError, match="cudaStreamNonBlocking")
    with refused if expected == "refused" else contextlib.nullcontext():
        comm.follow(last, 5)
    assert comm._order.called == (expected == "order")


def test_flags_must_go_together_on_the_cpu_too() -> None:
    with pytest.raises(RuntimeError, match="allocate_on_comm_stream=True needs a previous_event"):
        CpuStreams().scope(None, True, True)
    CpuStreams().scope(FakeEvent(), True, True)
