"""On which stream a call runs and what that waits for, with fakes of the streams."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from epjit import Buffer, EventOverlap
from epjit.event import EventHandle, next_number
from epjit.scope import CpuScope, CurrentStream, Scope

COMM = 99


class FakeComm:
    """Says which stream was told to follow which."""

    device, handle, torch_stream = 0, COMM, None

    def __init__(self) -> None:
        self.followed: list[tuple[int, int]] = []
        self.waited: list[str] = []
        self.last_call = 0

    def is_current(self) -> bool:
        return torch._C._cuda_getCurrentRawStream(0) == COMM

    def wait_for(self, stream_handle: int) -> None:
        self.waited.append(f"all of {stream_handle}")

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
        self.buffer._comm, self.buffer._last_stream = self.comm, None
        self.buffer._shows_comm = False
        self.buffer._lock, self.buffer.runtime = threading.RLock(), None

    def scope(
        self, *, previous: EventOverlap | None = None, is_async: bool = False, on_comm: bool = False
    ) -> Any:
        return self.buffer._scope(previous, is_async, on_comm)


class FakeEvent(EventOverlap):
    """Holds an event, recorded on a stream."""

    def __init__(self, stream: int = 1) -> None:
        self.event: Any = EventHandle.__new__(EventHandle)
        self.event._event, self.event._stream = object(), stream
        self.event._number = next_number()


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
    """What was queued on the caller's stream after the event shall overlap."""
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
    world.buffer.get_comm_stream()
    assert world.scope().stream == COMM
    assert world.buffer._low_latency_scope(False).stream == 1  # a hook's stream is the caller's
    world.current = COMM
    assert isinstance(world.scope(), CurrentStream)


def test_a_hook_follows_the_calls_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    monkeypatch.setattr(Buffer, "_check_alive", lambda self: None)
    scope = world.buffer._low_latency_scope(False)
    hook = world.buffer._hook("low_latency_dispatch", lambda: None, scope.stream)
    world.current = 2
    world.scope()
    before = FakeEvent(1)
    hook()
    world.scope(previous=before)
    assert world.comm.followed == [(1, 2), (2, 1), (1, COMM)]


def test_outputs_on_the_communication_stream_are_allocated_after_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A capture has reached the stream then, and the allocator takes the graph's own pool."""
    world = World(monkeypatch)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: world.comm.waited.append("allocates"))
    event = FakeEvent()
    monkeypatch.setattr(
        EventHandle, "stream_wait", lambda self, stream: world.comm.waited.append("event")
    )
    scope = world.scope(previous=event, is_async=True, on_comm=True)
    scope.allocating()
    scope.start()
    assert world.comm.waited == ["event", "allocates"]


def test_flags_must_go_together_on_the_cpu_too() -> None:
    with pytest.raises(RuntimeError, match="allocate_on_comm_stream=True needs a previous_event"):
        CpuScope.of_call(None, True, True)
    CpuScope.of_call(FakeEvent(), True, True)
