"""On which stream a call runs and what that waits for, with fakes of the streams."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any
from unittest import mock

import pytest
import torch

from epjit import Buffer, EventOverlap
from epjit.calls import Dispatch, Routing
from epjit.event import EventHandle, next_number
from epjit.handles import Dispatched, IntranodeHandle
from epjit.runtime import stream as streams
from epjit.runtime.stream import BlockedStreamError, CommStream, Event
from epjit.scope import CpuStreams, CurrentStream, KeepingOverlap, Scope, Streams, Turns

COMM = 99


class RawEvent:
    """An event of the driver."""

    is_recorded = has_ended = False
    times_asked = 0

    def record(self, stream: int) -> None:
        del stream
        self.is_recorded = True

    def has_happened(self) -> bool:
        self.times_asked += 1
        return self.has_ended


class FakeEvents:
    """Makes events, and says which."""

    def __init__(self) -> None:
        self.taken: list[RawEvent] = []

    def take(self) -> RawEvent:
        self.taken.append(RawEvent())
        return self.taken[-1]

    take_for_capture = take


class FakeComm:
    """Says which stream was told to follow which."""

    device, handle, torch_stream = 0, COMM, "comm"

    def __init__(self) -> None:
        self.events = FakeEvents()
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
        self.resources, self.captures = contextlib.ExitStack(), False
        comm: Any = self.comm
        self.buffer._streams = self.streams = Streams(comm, self.resources)
        self.buffer._entered, self.buffer.runtime = Turns(None), None
        monkeypatch.setattr(torch.cuda, "stream", self.allocating_on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "current")
        monkeypatch.setattr(EventHandle, "raw_stream_wait", self.stream_wait)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.captures)
        monkeypatch.setattr("epjit.scope.is_capturing", lambda stream: self.captures)
        monkeypatch.setattr("epjit.scope._FEW_KEPT", 0)
        monkeypatch.setattr("epjit.scope.driver.relaxed", contextlib.nullcontext)

    def allocating_on(self, stream: object) -> Any:
        assert stream == "comm"
        self.comm.waited.append("allocates")
        return contextlib.nullcontext()

    def stream_wait(self, stream: object, device: int) -> None:
        assert (stream, device) == (COMM, 0)
        self.comm.waited.append("event")

    def scope(
        self, *, previous: EventOverlap | None = None, is_async: bool = False, on_comm: bool = False
    ) -> Any:
        return self.streams.scope(previous, is_async, on_comm)


class FakeEvent(EventOverlap):
    """Holds an event, recorded on a stream."""

    def __init__(self, stream: int = 1, device: int = 0) -> None:
        self.event: Any = EventHandle.__new__(EventHandle)
        self.event.raw, self.event._stream = mock.Mock(), stream
        self.event._device, self.event.number = device, next_number()


class FakeTensor(torch.Tensor):
    """Says which streams the allocator was told of."""

    def __init__(self) -> None:
        self.streams: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.streams.append(stream)


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
    monkeypatch: pytest.MonkeyPatch, is_async: bool, on_comm: bool
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
        event = scope.finish((given, None), (made, None))
    del event
    # The stream of the call is waited for before their memory is used again, each way round.
    assert (made.streams, given.streams) == (["current"], [])
    weak = weakref.ref(given)
    del given
    assert (weak() is not None) == is_async


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("has_event", [False, True])
def test_every_tensor_of_a_call_lives_until_its_event_has_happened(
    monkeypatch: pytest.MonkeyPatch, has_event: bool, captures: bool
) -> None:
    """Those of its counts or handle, too. In a capture the allocator is told instead."""
    for cached in (False, True):
        world = World(monkeypatch)
        world.captures = captures
        made: list[Any] = [FakeTensor() for _ in range(18)]
        x, scales, idx, weights, *rest = made
        call = Dispatch(x, scales, idx, weights, Routing(*rest[:4]), 1, 0, 4)
        if cached:
            call = Dispatch(x, scales, idx, weights, tuple(rest[:4]), 1, 0, 4)
        received = Dispatched._make([*rest[4:8], [3, 4], IntranodeHandle(*rest[8:])])
        with world.scope(previous=FakeEvent() if has_event else None, is_async=True) as scope:
            event = scope.finish(call, received)
        raw = world.comm.events.taken[-1]
        assert event.event.raw is raw
        assert raw.is_recorded
        assert [each.streams for each in made[:8]] == [[]] * 8
        del event
        outputs = ["current"] * has_event + ["comm"] * (captures and not has_event)
        assert [each.streams for each in made[8:]] == [outputs] * 10
        assert [each.streams for each in made[:8]] == [["comm"] * captures] * 8
        weak = [weakref.ref(each) for each in made]
        del x, scales, idx, weights, rest, call, received, scope
        made.clear()
        kept = [each() is not None for each in weak]
        assert kept == [not captures] * 8 + [not captures and not has_event] * 10
        world.captures = False
        for has_ended in (False, True):
            raw.has_ended = has_ended
            with world.scope(is_async=True) as scope:
                scope.finish()
                if has_ended and not captures:  # not in the turn of the Buffer
                    assert any(each() is not None for each in weak)
            del scope
            assert any(each() is not None for each in weak) == (not captures and not has_ended)


@pytest.mark.parametrize("is_async", [False, True])
def test_without_one_they_are_allocated_on_the_callers(
    monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    world = World(monkeypatch)
    world.streams.communication_stream()
    with world.scope(is_async=is_async) as scope:
        with scope.allocating():
            scope.start()
        tensors = FakeTensor(), FakeTensor()
        scope.finish(tensors[:1], tensors[1:])
    assert world.comm.waited == ["all of 1"] + ["1 waits"] * (not is_async)
    assert [tensor.streams for tensor in tensors] == [[], []]
    assert scope.owners == (1,)


def test_a_host_that_runs_far_ahead_waits_for_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would gather all the memory that there is; an interrupt ends the wait."""
    world = World(monkeypatch)
    tensors: list[Any] = []

    def call() -> None:
        tensors.append(weakref.ref(tensor := FakeTensor()))
        with world.scope(is_async=True) as scope:
            scope.start()
            scope.finish((tensor,))

    def num_alive() -> int:
        return sum(tensor() is not None for tensor in tensors)

    for _ in range(63):
        call()
    assert num_alive() == 63
    naps: list[int] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    def later() -> None:
        naps.append(num_alive())
        if len(naps) == 3:
            world.comm.events.taken[0].has_ended = True

    monkeypatch.setattr("epjit.scope.nap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert num_alive() == 64
    assert world.comm.waited[-1] == "1 waits"  # as after any interrupt
    monkeypatch.setattr("epjit.scope.nap", later)
    world.comm.events.taken[1].has_ended = True
    call()
    assert len(naps) == 3
    assert num_alive() == 63
    world.resources.close()  # the end of the Buffer, whose streams are done
    assert num_alive() == 0


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


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize(("small_bytes", "most"), [(0, 16), (-1, 1)])
def test_small_calls_are_asked_for_now_and_then(
    monkeypatch: pytest.MonkeyPatch, small_bytes: int, most: int, is_nested: bool
) -> None:
    """Rows of 0 bytes here. Of large calls the memory comes back with the next."""
    world = World(monkeypatch)
    monkeypatch.setattr("epjit.scope._FEW_KEPT", 16)
    monkeypatch.setattr("epjit.scope._SMALL_BYTES", small_bytes)
    alive: list[Any] = []
    numbers = []
    for _ in range(40):
        alive.append(weakref.ref(tensor := FakeTensor()))
        with world.scope(is_async=True) as scope:
            if is_nested:  # as of rows by expert
                scope.finish((), (((tensor,), [3]), ()))
            else:
                scope.finish((tensor,), (None,))
        del tensor, scope
        numbers.append(sum(each() is not None for each in alive))
        world.comm.events.taken[-1].has_ended = True
    assert max(numbers) == most


def test_what_has_happened_covers_older_calls_and_no_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events may be dropped in any order."""
    world, kept = World(monkeypatch), list[Any]()
    for _ in range(6):
        with world.scope(is_async=True) as scope:
            kept.append(scope.finish((FakeTensor(),)))
    events: Any = world.comm.events.taken
    for event in events[:4]:
        event.has_ended = True
    for number in (0, 1, 4, 2, 5, 3):
        kept[number] = None
    done: Any = world.streams._kept.take_done()
    assert [event.raw for event, _ in done] == events[:2]  # what comes behind a later one waits
    assert [events.index(event.raw) for event, _ in world.streams._kept.calls] == [4, 2, 5, 3]
    assert [event.times_asked for event in events] == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize(("waits_on", "is_safe"), [(None, False), (2, False), (1, True)])
@pytest.mark.parametrize("is_low_latency", [False, True])
def test_an_event_keeps_the_tensors_of_its_call_until_a_wait(
    monkeypatch: pytest.MonkeyPatch,
    waits_on: int | None,
    is_safe: bool,
    captures: bool,
    is_low_latency: bool,
) -> None:
    """On the stream of the call that is all; else they live on until the event has happened.

    In a capture the allocator is told instead.
    """
    world = World(monkeypatch)
    monkeypatch.setattr(EventHandle, "raw_stream_wait", mock.Mock())
    world.captures = captures
    tensor: Any = FakeTensor()
    new_scope = world.streams.low_latency_scope if is_low_latency else world.scope
    with new_scope(**{"async_finish" if is_low_latency else "is_async": True}) as scope:
        scope.start()
        event = scope.finish((tensor, None), (None,))
    del scope
    assert isinstance(event, KeepingOverlap)
    assert (tensor.streams, event.extra_tensors) == ([], (tensor, None, None))
    told, weak = ["comm"] * (captures and not is_safe), weakref.ref(tensor)
    if waits_on is not None:
        world.current = waits_on
        with event:
            pass
        assert tensor.streams == told
        del tensor
        # With the event still there, and no later call of the Buffer.
        assert (weak() is not None) == (not captures and not is_safe)
    else:
        del event
        assert tensor.streams == told
        del tensor
    assert (weak() is not None) == (not captures and not is_safe)
    world.captures = False
    world.comm.events.taken[0].has_ended = True
    with world.scope(is_async=True) as scope:
        scope.finish()
    del scope
    assert weak() is None


@pytest.mark.parametrize("captures", [False, True])
def test_a_wait_that_fails_lets_nothing_go(monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
    world = World(monkeypatch)
    world.captures = captures
    monkeypatch.setattr(EventHandle, "raw_stream_wait", mock.Mock(side_effect=RuntimeError))
    tensor: Any = FakeTensor()
    with world.scope(is_async=True) as scope:
        event = scope.finish((tensor,))
    with pytest.raises(RuntimeError):
        event.current_stream_wait(release_handle=True)
    assert event.extra_tensors == (tensor,)
    weak = weakref.ref(tensor)
    del event, scope, tensor
    assert (weak() is None) == captures


def test_after_the_end_of_a_buffer_an_event_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    weak = weakref.ref(tensor := FakeTensor())
    with world.scope(is_async=True) as scope:
        event = scope.finish((tensor,))
    world.resources.close()
    del event, scope, tensor
    assert weak() is None


def test_an_event_draws_its_number_before_it_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that another thread queues in between is not covered, and must not seem to be."""
    world = World(monkeypatch)
    world.scope().finish()

    class Raw(RawEvent):
        def record(self, stream: int) -> None:
            del stream
            thread = threading.Thread(target=lambda: world.scope().finish())
            thread.start()
            thread.join()

    raw: Any = Raw()
    handle = EventHandle.on(1, raw, 0)
    assert not handle.covers(1, world.comm.last_call)
    world.scope(previous=EventOverlap(handle))
    assert world.comm.followed == [(1, COMM)]


def test_an_event_of_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    with pytest.raises(RuntimeError, match=r"on cuda:1, but .* on cuda:0: .*set_device\(0\)"):
        world.scope(previous=FakeEvent(device=1))


def test_the_current_stream_of_the_events_gpu_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With that GPU current: default streams of all GPUs have one handle."""
    entered: list[object] = []

    def using(device: int) -> Any:
        entered.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda n: 10 * n, raising=False)
    monkeypatch.setattr("epjit.event.driver.using", using)
    for current in (3, 0):
        monkeypatch.setattr("epjit.event.is_current", lambda n, at=current: n == at)
        event = FakeEvent(device=3)
        event.current_stream_wait()
        event.event.raw.make_wait.assert_called_once_with(30)
    assert entered == [3]


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
    comm._before = mock.Mock()
    refused = pytest.raises(BlockedStreamError, match="cudaStreamNonBlocking")
    with refused if expected == "refused" else contextlib.nullcontext():
        comm.follow(last, 5)
    assert comm._before.order.called == (expected == "order")


def test_streams_are_made_one_by_one_and_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []

    def call(*args: object) -> int:
        made.append(args)
        return 100 + len(made)

    monkeypatch.setattr(streams, "driver", mock.MagicMock(call=call))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))
    take: Any = streams.high_priority_stream
    streams._stream.cache_clear()
    try:
        first = [take(3) for _ in range(32)]
        assert sorted(first) == [(101 + n, 3) for n in range(32)]
        assert [take(3) for _ in range(33)] == [*first, first[0]]
        assert made == [("cuStreamCreateWithPriority", 1, -1)] * 32
    finally:
        streams._stream.cache_clear()


def test_a_wait_between_streams_that_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = mock.Mock(side_effect=RuntimeError("status 1"))
    monkeypatch.setattr(streams, "_runtime", lambda: mock.Mock(eventRecord=refusing))
    with pytest.raises(
        RuntimeError, match=r"stream 0x6 cannot be made to wait for .* 0x5: status 1"
    ):
        Event(mock.Mock(), 7).order(5, 6)


def test_flags_must_go_together_on_the_cpu_too() -> None:
    with pytest.raises(RuntimeError, match="allocate_on_comm_stream=True needs a previous_event"):
        CpuStreams().scope(None, True, True)
    CpuStreams().scope(FakeEvent(), True, True)
