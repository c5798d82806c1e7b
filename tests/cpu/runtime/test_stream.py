"""Events of the driver, used again and again."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from epjit import EventHandle
from epjit.runtime import driver
from epjit.runtime.stream import Events
from tests.cpu.fake_gpu import FakeGpu, fake_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as fake:
        yield fake


def num_in_use(gpu: FakeGpu) -> int:
    return len(gpu.in_use)


def test_an_event_is_used_again_when_the_last_handle_is_gone(gpu: FakeGpu) -> None:
    events = Events(0)
    first = EventHandle.on(5, events.take(), 0)
    second = copy.copy(first)
    del first
    third = EventHandle.on(5, events.take(), 0)
    assert num_in_use(gpu) == 2, "a copy was still held"
    del second
    fourth = EventHandle.on(5, events.take(), 0)
    assert num_in_use(gpu) == 2
    assert gpu.calls.count("cuEventCreate") == 2
    del events, third
    assert num_in_use(gpu) == 2, "another is still held"
    del fourth
    assert num_in_use(gpu) == 0


def test_what_a_graph_may_hold_on_to_is_not_used_again(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events(0)
    event = events.take_for_capture()
    del event
    assert num_in_use(gpu) == 0
    event = events.take()
    del event
    assert num_in_use(gpu) == 1
    monkeypatch.setattr("epjit.event.shared_events", lambda device: events)
    for captures in (True, False):
        monkeypatch.setattr("epjit.event.is_capturing", lambda stream, now=captures: now)
        handle = EventHandle()
        assert num_in_use(gpu) == 1 + captures
        del handle
        assert num_in_use(gpu) == 1


def test_a_forked_child_destroys_no_event(gpu: FakeGpu) -> None:
    events = Events(0)
    handles = [EventHandle.on(5, events.take(), 0) for _ in range(3)]
    handles.pop()
    gpu.calls.clear()
    with mock.patch.object(os, "getpid", return_value=1):
        handles.clear()
        del events
        gc.collect()
    assert gpu.calls == []


@pytest.mark.parametrize(
    ("status", "expected"), [(0, True), (600, False), (700, "cannot be asked")]
)
def test_an_event_is_asked(gpu: FakeGpu, status: int, expected: Any) -> None:
    """600: not ready; 700: an illegal address, after which no event happens any more."""
    event = Events(0).take()
    gpu.load().cuEventQuery = lambda handle: (status,)
    if isinstance(expected, bool):
        assert event.has_happened() is expected
        return
    with (
        mock.patch.object(driver, "describe", return_value="illegal address"),
        pytest.raises(RuntimeError, match=expected),
    ):
        event.has_happened()
