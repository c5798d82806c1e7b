"""On which stream a call runs and what that waits for, with fakes of the streams."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from epjit import Buffer, EventOverlap
from epjit.scope import CurrentStream, Scope

COMM = 99


class FakeComm:
    """Says which stream was told to follow which."""

    device, handle, torch_stream = 0, COMM, None

    def __init__(self) -> None:
        self.followed: list[tuple[int, int]] = []

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
        self.buffer._lock, self.buffer.runtime = threading.RLock(), None

    def scope(
        self, *, previous: EventOverlap | None = None, is_async: bool = False, on_comm: bool = False
    ) -> Any:
        return self.buffer._scope(previous, is_async, on_comm)


class FakeEvent(EventOverlap):
    """Holds an event."""

    def __init__(self) -> None:
        self.event: Any = object()


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
