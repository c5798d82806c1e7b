"""The rounds that tests run, themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from epjit import Buffer, ElasticBuffer
from epjit.formats import CASTS
from tests.harness import launch
from tests.harness.data import ROUTING_KINDS, SCALE_LAYOUTS
from tests.rounds import elastic, expert_major, low_latency, normal

SIZE = 4 << 20
SIZES: dict[str, Any] = {"num_sms": 4, "max_tokens": 8}


def elastic_round(buffer: Buffer, seed: int) -> None:
    beside = ElasticBuffer(None, SIZE, comm=buffer.group)
    elastic.check_round(beside, elastic.random_round(2, seed, **SIZES))


def expert_round(buffer: Buffer, seed: int) -> None:
    case = expert_major.random_expert_round(2, seed, **SIZES)
    expert_major.check_expert_round(buffer, case)


def low_latency_round(buffer: Buffer, seed: int) -> None:
    case = low_latency.LowLatencyRound((5, 8), seed=seed)
    low_latency.check_low_latency_round(buffer, case)


def normal_round(buffer: Buffer, seed: int) -> None:
    normal.check_round(buffer, normal.random_round(2, seed, **SIZES))


@pytest.mark.parametrize(
    ("rounds", "check"),
    [
        (elastic, elastic_round),
        (expert_major, expert_round),
        (low_latency, low_latency_round),
        (normal, normal_round),
    ],
)
def test_nothing_is_copied_between_launches(
    rounds: ModuleType, check: Callable[[Buffer, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `tests.harness.ranks.line_up` asks of virtual ranks."""
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")
    this = threading.local()
    line_up, settle, to_device = rounds.line_up, rounds.settle, rounds.to_device

    def start(buffer: Buffer) -> None:
        this.launches = True
        line_up(buffer)

    def end(buffer: Buffer) -> None:
        this.launches = False
        settle(buffer)

    def copy(*args: Any) -> Any:
        assert not this.launches, "a copy between the first launch and the last"
        return to_device(*args)

    for name, function in (("line_up", start), ("settle", end), ("to_device", copy)):
        monkeypatch.setattr(rounds, name, function)

    def worker(comm: Any) -> None:
        this.launches = False
        buffer = Buffer(None, SIZE, SIZE, low_latency_mode=True, comm=comm)
        for seed in range(12):
            check(buffer, seed)

    launch.run_threads(worker, 2)


def test_random_rounds_of_rows_by_expert_have_every_kind() -> None:
    """Those that tests/gpu/test_expert_dispatch.py runs with each variant."""
    drawn = [
        expert_major.random_expert_round(num_ranks, 1000 + seed, num_sms=4, max_tokens=333)
        for num_ranks in (1, 2, 3, 4, 8)
        for seed in range(70 if num_ranks < 8 else 23)
    ]
    assert len(drawn) >= 300
    for name, values in (
        ("kind", ROUTING_KINDS),
        ("alignment", (1, 8, 128)),
        ("cast", (None, *CASTS)),
        ("fp8", (None, *SCALE_LAYOUTS)),
    ):
        assert {getattr(case, name) for case in drawn} == set(values)
    assert sum(0 in case.num_tokens for case in drawn) > 20
    assert sum(0 < case.num_rows for case in drawn) > 20, "static sizes that are too small"
