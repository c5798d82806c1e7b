"""Every precondition: the error names the value and the remedy, and nothing communicates."""

from __future__ import annotations

from typing import Any

import pytest

from epjit import Buffer
from tests.bad_input import (
    CASES,
    NUM_RANKS,
    BadInput,
    Bench,
    ReachedError,
    StubComm,
    Unreachable,
    verify,
)


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")


@pytest.fixture
def bench() -> Bench:
    """A buffer of two ranks of which nothing but the checks works."""
    destroyed = Buffer(None, 1024, comm=StubComm(NUM_RANKS), explicitly_destroy=True)
    destroyed.destroy()
    buffer = Buffer(None, 1 << 16, comm=StubComm(NUM_RANKS, rank=1))
    made = Bench(buffer, destroyed)
    unreachable: Any = Unreachable()
    buffer._cpu = unreachable
    return made


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.gpu_only], ids=lambda case: case.name
)
def test_refused(case: BadInput, bench: Bench) -> None:
    verify(case, bench)


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_right_arguments_reach_the_backend(bench: Bench) -> None:
    """Else the table would prove nothing: each call is refused for what was changed in it."""
    for call in (bench.layout, bench.dispatch, bench.cached, bench.combine):
        with pytest.raises(ReachedError):
            call()
    with pytest.raises(ReachedError):
        bench.combine(topk_weights=bench.recv_weights, bias=(bench.x, bench.x))
