"""EPJIT_CHECK=1 on the CPU backend: what it refuses, and that it refuses nothing else."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epjit import Buffer, calls
from epjit.checks.values import ValueChecks
from epjit.runtime.topology import Topology
from tests.harness import launch
from tests.rounds.low_latency import ROOM
from tests.scenarios import value_checks

WORLDS = pytest.mark.parametrize(("num_ranks", "domain"), [(3, None), (4, 2)], ids=["3", "2x2"])


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")


def run(body: Any, num_ranks: int, domain: int | None) -> None:
    """Runs ``body(buffer)`` on every rank, a thread each, in both modes."""

    def make(comm: Any) -> None:
        body(Buffer(None, 1 << 24, ROOM, low_latency_mode=True, comm=comm, nvlink_domain=domain))

    launch.run_threads(make, num_ranks, timeout=120)


@WORLDS
def test_what_is_right_goes_through(
    num_ranks: int, domain: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPJIT_CHECK", "1")
    run(value_checks.accepts, num_ranks, domain)


@WORLDS
def test_what_is_wrong_is_refused(
    num_ranks: int, domain: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPJIT_CHECK", "1")
    run(value_checks.refuses, num_ranks, domain)


def test_nothing_is_looked_at_without_it() -> None:
    """As in V1: an expert that there is not is no choice."""

    def body(buffer: Buffer) -> None:
        idx = torch.tensor([[0, 99]])
        assert buffer.get_dispatch_layout(idx, 2)[2].tolist() == [1, 0]

    run(body, 2, None)


def test_a_capture_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning; then silence."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class Owner:
        def in_order(self) -> Any:
            raise AssertionError("the stream must be left alone")

    owner = Owner()
    checks = ValueChecks(Topology(0, ((0,),)), owner.in_order)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    with pytest.warns(RuntimeWarning, match="EPJIT_CHECK is set, but what a CUDA graph captures"):
        checks.layout(calls.Layout(on_gpu, 8), after=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.combine(calls.Combine(on_gpu, None, None, None, (on_gpu,), 2), after=None)
