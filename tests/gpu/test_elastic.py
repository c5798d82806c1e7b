"""`ElasticBuffer` on one GPU with virtual ranks, against the brute-force reference."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from epjit import Buffer, ElasticBuffer
from epjit.kernels.elastic import DescribeConfig, SumConfig
from epjit.modes import expert_major
from tests.harness.data import assert_rows_equal
from tests.harness.launch import run_threads
from tests.harness.ranks import SMALL, SMS, meet, num_random_rounds, run_ranks
from tests.rounds.elastic import EDGES, Round, check_round, random_round
from tests.scenarios.elastic import from_public_fields, in_turns, of_one_rounding, replays

SIZE = 16 << 20
MAX_TOKENS = 24 if SMALL else 160


@contextlib.contextmanager
def elastic_beside(beneath: Buffer, *, multiple_reduction: bool = True) -> Iterator[ElasticBuffer]:
    """One of the same virtual rank; destroyed in the end, when all ranks are there."""
    buffer = ElasticBuffer(
        None,
        SIZE,
        comm=beneath.group,
        explicitly_destroy=True,
        allow_multiple_reduction=multiple_reduction,
        num_gpu_timeout_secs=20,
    )
    yield buffer
    meet(beneath)
    buffer.destroy()


def run_elastic(
    num_ranks: int, body: Callable[[ElasticBuffer], Any], *, multiple_reduction: bool = True
) -> list[Any]:
    """Runs ``body(buffer)`` on every virtual rank."""

    def worker(beneath: Buffer) -> Any:
        with elastic_beside(beneath, multiple_reduction=multiple_reduction) as buffer:
            return body(buffer)

    return run_ranks(num_ranks, worker)


def load(*cases: Round, multiple_reduction: bool = True) -> None:
    """Loads the kernels for which nobody meets: those that describe and add rows, and torch's.

    What is first loaded while another rank's kernel spins waits for that kernel.
    """
    for case in cases:
        describe = DescribeConfig(case.num_topk, case.index_dtype == torch.int64)
        total = SumConfig(2 * case.hidden, case.num_topk, is_f16=False)
        for config in (describe, total):
            expert_major._launch(config, torch.cuda.current_device())
    if not multiple_reduction:
        alone = Round((4,), expand=True, num_biases=2, num_sms=SMS)
        run_elastic(1, lambda buffer: check_round(buffer, alone), multiple_reduction=False)


@pytest.mark.parametrize("multiple_reduction", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_random_rounds(num_ranks: int, multiple_reduction: bool) -> None:
    def check(num_ranks: int, num_rounds: int) -> None:
        cases = [
            random_round(num_ranks, 1000 + seed, num_sms=SMS, max_tokens=MAX_TOKENS)
            for seed in range(num_rounds)
        ]
        load(*cases)

        def body(buffer: ElasticBuffer) -> None:
            for case in cases:
                check_round(buffer, case)

        run_elastic(num_ranks, body, multiple_reduction=multiple_reduction)

    if num_ranks > 1:
        check(1, 9)  # loads the kernels of torch, as `load` does others
    check(num_ranks, max(5, num_random_rounds(num_ranks) // 2))


@pytest.mark.parametrize("multiple_reduction", [True, False])
def test_edges(multiple_reduction: bool) -> None:
    """Ranks without tokens, tokens without experts, ranks without rows."""
    load(*EDGES, multiple_reduction=multiple_reduction)

    def body(buffer: ElasticBuffer) -> None:
        for case in EDGES:
            check_round(buffer, case)

    run_elastic(3, body, multiple_reduction=multiple_reduction)


def test_sums_with_one_rounding_do_not_depend_on_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 tokens, cut among 1, 2, 4 and 8 ranks, and the CPU backend's: the same bits."""
    load(Round((24,), num_topk=6, hidden=128), multiple_reduction=False)
    body = functools.partial(of_one_rounding, num_sms=SMS)
    sums = {n: torch.cat(run_elastic(n, body, multiple_reduction=False)) for n in (1, 2, 4, 8)}

    def on_the_cpu(comm: Any) -> torch.Tensor:
        buffer = ElasticBuffer(None, SIZE, comm=comm, allow_multiple_reduction=False)
        return of_one_rounding(buffer, num_sms=4)

    monkeypatch.setenv("EPJIT_BACKEND", "cpu")
    (wanted,) = run_threads(on_the_cpu, 1)
    for n, got in sums.items():
        assert_rows_equal(got, wanted, f"{n} ranks")


@pytest.mark.parametrize("multiple_reduction", [True, False])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_handle_is_its_public_fields(
    num_ranks: int, expand: bool, multiple_reduction: bool
) -> None:
    """Every call with a handle that was made of copies; rows that LightLLM has moved."""
    load(Round((12,), num_topk=3, hidden=64), multiple_reduction=multiple_reduction)

    def body(buffer: ElasticBuffer) -> None:
        for waits in (True, False):
            from_public_fields(buffer, expand=expand, waits=waits, num_sms=SMS)

    for n in sorted({1, num_ranks}):  # alone first: loads the kernels of torch
        run_elastic(n, body, multiple_reduction=multiple_reduction)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_beside_the_low_latency_mode(num_ranks: int) -> None:
    """A Buffer and an ElasticBuffer, calls in turns and in two graphs."""
    load(Round((10,) * num_ranks, num_topk=3))

    def worker(low_latency: Buffer) -> None:
        with elastic_beside(low_latency) as buffer:
            rounds, group = 8 if SMALL else 60, buffer.group
            in_turns(low_latency, buffer, rounds, num_sms=SMS, meet=lambda: group.allgather(None))

    size = Buffer.get_low_latency_rdma_size_hint(16, 512, num_ranks, 4 * num_ranks)
    run_ranks(num_ranks, worker, num_nvl_bytes=0, num_rdma_bytes=size, low_latency_mode=True)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_graph(num_ranks: int, expand: bool) -> None:
    """One capture of a dispatch and its combine; replays with changed inputs."""
    load(Round((8,) * num_ranks, num_experts=8 * num_ranks))

    def body(buffer: ElasticBuffer) -> None:
        group = buffer.group
        replays(
            buffer, 5 if SMALL else 50, 64, SMS, expand=expand, meet=lambda: group.allgather(None)
        )

    run_elastic(num_ranks, body)


def test_a_barrier_and_an_end() -> None:
    def body(buffer: ElasticBuffer) -> None:
        buffer.barrier()
        buffer.barrier(use_comm_stream=False)
        meet(buffer._buffer)
        assert buffer.get_theoretical_num_sms(64, 8) % 2 == 0
        assert buffer.get_comm_stream().device.index == torch.cuda.current_device()

    run_elastic(2, body)
