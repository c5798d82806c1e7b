"""Calls on the stubbed GPU of bench/host.py: Python as on a GPU, and kernels that do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from bench import host
from epjit.modes.intranode import Intranode
from epjit.runtime.launch import Launch


@pytest.mark.parametrize("is_async", [False, True])
def test_every_call_sets_all_parameters_by_its_setter(
    is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which refuses a call that lacks one, and takes a third of the time of a dict."""
    start, by_dict = Launch.start, list[str]()

    def counted(self: Launch[Any], stream: int, grid: int, values: Any = None) -> None:
        if values is not None:
            by_dict.append(self.kernel.config.op)
        start(self, stream, grid, values)

    monkeypatch.setattr(Launch, "start", counted)
    with host.stubbed() as buffer:
        assert isinstance(buffer._mode, Intranode)
        calls = host.calls_of(buffer)
        assert {"dispatch by expert", "cached dispatch by expert", "combine by expert"} < set(calls)
        for call in calls.values():
            call(async_finish=is_async)
            call(async_finish=is_async)
    assert not by_dict
