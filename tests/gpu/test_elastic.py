"""`ElasticBuffer` on one GPU with virtual ranks, against the brute-force reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from epjit import Buffer, ElasticBuffer
from epjit.kernels.elastic import DescribeConfig
from epjit.modes import expert_major
from tests.harness.ranks import SMALL, SMS, meet, num_random_rounds, run_ranks
from tests.rounds.elastic import Round, check_round, random_round
from tests.scenarios.elastic import replays

SIZE = 16 << 20
MAX_TOKENS = 24 if SMALL else 160


def run_elastic(
    num_ranks: int, body: Callable[[ElasticBuffer], None], *, multiple_reduction: bool = True
) -> None:
    """Runs ``body(buffer)`` on every virtual rank."""

    def worker(beneath: Buffer) -> None:
        buffer = ElasticBuffer(
            None,
            SIZE,
            comm=beneath.group,
            explicitly_destroy=True,
            allow_multiple_reduction=multiple_reduction,
            num_gpu_timeout_secs=20,
        )
        body(buffer)
        meet(beneath)
        buffer.destroy()

    run_ranks(num_ranks, worker)


def load(case: Round) -> None:
    """Loads the kernel that describes rows, for which nobody meets.

    What is first loaded while another rank's kernel spins waits for that kernel.
    """
    config = DescribeConfig(case.num_topk, case.index_dtype == torch.int64)
    expert_major._launch(config, torch.cuda.current_device())


@pytest.mark.parametrize("multiple_reduction", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_random_rounds(num_ranks: int, multiple_reduction: bool) -> None:
    def check(num_ranks: int, num_rounds: int) -> None:
        cases = [
            random_round(num_ranks, 1000 + seed, num_sms=SMS, max_tokens=MAX_TOKENS)
            for seed in range(num_rounds)
        ]
        for case in cases:
            load(case)

        def body(buffer: ElasticBuffer) -> None:
            for case in cases:
                check_round(buffer, case)

        run_elastic(num_ranks, body, multiple_reduction=multiple_reduction)

    if num_ranks > 1:
        check(1, 9)  # loads the kernels of torch, as `load` does others
    check(num_ranks, max(5, num_random_rounds(num_ranks) // 2))


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
