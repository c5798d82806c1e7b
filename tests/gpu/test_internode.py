"""The kernels between NVLink domains on one GPU with virtual ranks, bit for bit.

The ranks are threads of one process, so the transport is loopback; a seed gives it delays before
the bytes, between their pieces and before the signal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from epjit import Buffer
from tests.emulation.world import LONG_RUNS
from tests.harness.data import ROUTING_KINDS
from tests.harness.ranks import (
    SMALL,
    capture,
    meet,
    num_random_rounds,
    run_ranks,
    start_at,
)
from tests.rounds.normal import Round, check_no_room, check_round, random_round
from tests.scenarios import internode
from tests.scenarios.normal import check_withheld_peer, replays, rounds, small_rounds

WORLDS = ((2, 2), (4, 2), (2, 4), (8, 2))  # domains, ranks of each
SMS = {4: 12, 8: 8, 16: 6}  # of a rank: the blocks of all run at once
TOKENS = 16 if SMALL else 250
NUM_BYTES = 16 << 20

EVERY_WORLD = pytest.mark.parametrize(
    ("num_domains", "num_local"), WORLDS, ids=[f"{n}x{each}" for n, each in WORLDS]
)


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport is late, by a seed."""
    monkeypatch.setenv("EPJIT_LOOPBACK_SEED", "7")


def run_domains(num_domains: int, num_local: int, body: Any, *args: Any, **options: Any) -> None:
    """`run_ranks` with NVLink domains."""
    options.setdefault("num_nvl_bytes", NUM_BYTES)
    options.setdefault("num_rdma_bytes", NUM_BYTES)
    run_ranks(num_domains * num_local, body, *args, nvlink_domain=num_local, **options)


@EVERY_WORLD
@pytest.mark.parametrize("variant", ["tma", "ldst"])
def test_routings(
    num_domains: int, num_local: int, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of routing, payload and flag on some round."""
    monkeypatch.setenv("EPJIT_DISPATCH_VARIANT", variant)
    monkeypatch.setenv("EPJIT_COMBINE_VARIANT", variant)
    num_ranks = num_domains * num_local

    def body(buffer: Buffer) -> None:
        for seed, kind in enumerate(ROUTING_KINDS):
            case = random_round(num_ranks, seed, num_sms=SMS[num_ranks], max_tokens=TOKENS)
            check_round(buffer, dataclasses.replace(case, kind=kind))

    run_domains(num_domains, num_local, body)


@pytest.mark.timeout(600)
@EVERY_WORLD
def test_random_rounds(num_domains: int, num_local: int) -> None:
    """Fresh rounds on two buffers in turn, with a rank that is late now and then."""
    num_ranks = num_domains * num_local
    num_rounds = num_random_rounds(num_ranks)

    def body(first: Buffer, second: Buffer) -> None:
        rounds((first, second), 7000, num_rounds, TOKENS // 2, SMS[num_ranks])

    run_domains(num_domains, num_local, body, num_buffers=2, timeout=580)


@pytest.mark.parametrize("captured", [False, True])
def test_more_rows_than_there_is_room_for(captured: bool) -> None:
    """Uneven ranks, of which some have room for half of their rows."""
    tokens = (TOKENS // 2, TOKENS, TOKENS, TOKENS)

    def body(buffer: Buffer) -> None:
        for seed, short in enumerate(((0,), (1, 2), (3,))):
            case = Round(tokens, hidden=1024, num_experts=8, seed=seed, num_sms=SMS[4])
            how = (lambda queue: capture(queue, lambda: meet(buffer))) if captured else None
            check_no_room(buffer, case, short, capture=how)

    run_domains(2, 2, body)


def test_wrong_guesses() -> None:
    """Dispatches whose first launch leaves at once, on some ranks or on all."""

    def body(buffer: Buffer) -> None:
        for seed, wrong in enumerate(((0,), (1, 2), (0, 1, 2, 3)) * 2):
            case = Round((TOKENS, TOKENS // 2, 0, TOKENS), num_experts=8, seed=seed, num_sms=SMS[4])
            check_round(buffer, dataclasses.replace(case, guess_wrong=wrong))

    run_domains(2, 2, body)


@pytest.mark.parametrize(("epoch", "stale"), LONG_RUNS)
def test_signals_of_long_ago(epoch: int, stale: int) -> None:
    """After billions of operations that tell little, one that needs what they did not tell."""

    def body(buffer: Buffer) -> None:
        def make(**sizes: int) -> Buffer:
            return Buffer(
                None,
                comm=buffer.group,
                nvlink_domain=2,
                explicitly_destroy=True,
                timeout_seconds=5,
                **sizes,
            )

        small = make(**internode.smallest_sizes(make, 512, 2))
        small_rounds(small, TOKENS, 1)
        start_at(small, epoch, stale=stale)
        small_rounds(small, TOKENS, 3)
        meet(buffer)
        small.destroy()

    run_domains(2, 2, body)


@EVERY_WORLD
def test_small_buffers(num_domains: int, num_local: int) -> None:
    """The smallest legal buffers: hundreds of windows, and nothing gets stuck."""

    def body(buffer: Buffer) -> None:
        def make(**sizes: int) -> Buffer:
            return Buffer(
                None,
                comm=buffer.group,
                nvlink_domain=num_local,
                explicitly_destroy=True,
                timeout_seconds=20,
                **sizes,
            )

        small = make(**internode.smallest_sizes(make, 512, 2))
        small_rounds(small, TOKENS, 2 if SMALL else 6)
        meet(buffer)
        small.destroy()

    run_domains(num_domains, num_local, body)


def test_model_shapes() -> None:
    """Rows of real models, and the longest and the shortest row there is."""
    shapes = ((256, 32), (64, 8)) if SMALL else ((7168, 256), (2880, 128), (16384, 32), (16, 32))

    def body(buffer: Buffer) -> None:
        for seed, (hidden, num_experts) in enumerate(shapes):
            case = Round(
                num_tokens=(TOKENS,) * 4,
                hidden=hidden,
                num_experts=num_experts,
                num_topk=8,
                seed=seed,
                num_sms=12,
                num_biases=1,
            )
            check_round(buffer, case)
            if hidden >= 128:
                check_round(buffer, dataclasses.replace(case, fp8="column_major"))

    run_domains(2, 2, body, num_nvl_bytes=64 << 20, num_rdma_bytes=64 << 20)


@pytest.mark.parametrize(("num_domains", "num_local"), [(2, 2), (4, 2)])
def test_graph(num_domains: int, num_local: int) -> None:
    """One capture of all operations; replays with changed inputs, and eager calls between."""
    sms = SMS[num_domains * num_local]

    def body(buffer: Buffer) -> None:
        num_replays = 5 if SMALL else 100
        replays(buffer, num_replays, TOKENS, sms, meet=lambda: buffer.group.allgather(None))

    run_domains(num_domains, num_local, body)


@pytest.mark.parametrize(("num_domains", "num_local"), [(2, 2), (2, 4)])
def test_as_v1(num_domains: int, num_local: int) -> None:
    """The checks of DeepEP's tests/test_internode.py."""
    num_ranks = num_domains * num_local

    def body(buffer: Buffer) -> None:
        inputs = internode.Inputs(
            buffer.topology.domains,
            num_tokens=16 if SMALL else 128,
            hidden=256 if SMALL else 1024,
            num_topk=8,
            num_experts=16 * num_ranks,
            num_topk_groups=2,
            seed=1,
        )
        internode.check_as_v1(buffer, inputs, num_sms=SMS[num_ranks])

    run_domains(num_domains, num_local, body)


@pytest.mark.parametrize("op", ["notify", "dispatch", "combine"])
@pytest.mark.parametrize("withheld", [0, 3])
def test_withheld_peer(op: str, withheld: int) -> None:
    """A rank does not come: those that meet it name it, and all work again after reset()."""

    run_domains(2, 2, check_withheld_peer, op, withheld, timeout_seconds=2)


def test_local_buffer_tensors() -> None:
    """Whatever users write into either buffer between operations, none breaks."""

    def body(buffer: Buffer) -> None:
        case = Round(num_tokens=(40, 50, 0, 9), seed=3, num_sms=4)
        check_round(buffer, case)
        for use_rdma_buffer in (False, True):
            view = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=use_rdma_buffer)
            assert view.is_cuda
            assert view.numel() == NUM_BYTES
            meet(buffer)
            view.copy_(torch.full((NUM_BYTES,), 0x5A, dtype=torch.int8))
            meet(buffer)
            check_round(buffer, dataclasses.replace(case, seed=4))

    run_domains(2, 2, body)


def test_two_buffers_of_different_sizes() -> None:
    """A buffer may be replaced by a bigger one while it lives, as frameworks do."""

    def body(buffer: Buffer) -> None:
        check_round(buffer, Round(num_tokens=(40, 50, 1, 0), seed=3, num_sms=4))
        sizes = (2 * buffer.num_nvl_bytes, 2 * buffer.num_rdma_bytes)
        bigger = Buffer(None, *sizes, comm=buffer.group, nvlink_domain=2)
        check_round(bigger, Round(num_tokens=(50, 0, 3, 9), seed=4, num_sms=4))
        check_round(buffer, Round(num_tokens=(7, 9, 0, 2), seed=5, num_sms=4))
        meet(buffer)
        del bigger  # the destructor frees it
        meet(buffer)  # freeing waits for all that runs on the GPU, also for kernels of other ranks
        check_round(buffer, Round(num_tokens=(7, 9, 0, 2), seed=6, num_sms=4))

    run_domains(2, 2, body)
