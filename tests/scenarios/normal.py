"""Scenarios of the normal mode, a process a rank: on the CPU (tests/cpu), on GPUs (tests/dist).

With EPJIT_NVLINK_DOMAIN in the environment that is passed, they do the same between NVLink domains.

Each is called as ``scenario(group, environ, ...)`` by `launch.run`. The environment goes as
an argument: the processes come from a fork server, which has that of the time when it started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epjit import Buffer, CommunicationError, Config
from epjit.reference import Normal
from tests.harness import launch
from tests.harness.data import ROUTING_KINDS, assert_rows_equal
from tests.harness.ranks import capture, line_up, meet, settle
from tests.rounds.normal import (
    Made,
    Prepared,
    Round,
    check_round,
    layout_of,
    make,
    random_round,
)

MB = 1 << 20


def set_up(group: dist.ProcessGroup, environ: Mapping[str, str]) -> bool:
    """First thing in a worker: environment and device.

    Returns:
        Whether this rank has a GPU.
    """
    os.environ.update(environ)
    if os.environ.get("EPJIT_BACKEND") == "cpu" or not torch.cuda.is_available():
        os.environ["EPJIT_BACKEND"] = "cpu"
        return False
    launch.take_gpu(group.rank(), group.size())
    return True


def make_buffer(
    group: dist.ProcessGroup,
    num_nvl_bytes: int = 16 * MB,
    *,
    explicitly_destroy: bool = True,
    **options: Any,
) -> Buffer:
    """A buffer that will be destroyed; between NVLink domains as many bytes for RDMA."""
    size = int(os.environ.get("EPJIT_NVLINK_DOMAIN") or group.size())
    if size < group.size():
        options.setdefault("num_rdma_bytes", num_nvl_bytes)
    return Buffer(group, num_nvl_bytes, explicitly_destroy=explicitly_destroy, **options)


def synchronize(buffer: Buffer) -> None:
    """Waits for the device, if there is one."""
    if buffer.device.type == "cuda":
        torch.cuda.synchronize(buffer.device)


def be_late(buffer: Buffer, rng: random.Random) -> None:
    """Holds one rank up now and then."""
    late = rng.randrange(buffer.group_size)
    if rng.random() < 0.3 and late == buffer.rank:
        if buffer.device.type == "cuda":
            torch.cuda._sleep(rng.randrange(1, 2_000_000))
        else:
            time.sleep(rng.random() / 200)


def rounds(
    buffers: Sequence[Buffer], first_seed: int, num_rounds: int, max_tokens: int, num_sms: int
) -> None:
    """Rounds that differ in everything, on buffers in turn, with a rank late now and then."""
    for seed in range(num_rounds):
        be_late(buffers[0], random.Random(seed))
        num_ranks = buffers[0].group_size
        case = random_round(num_ranks, first_seed + seed, num_sms=num_sms, max_tokens=max_tokens)
        check_round(buffers[seed % len(buffers)], case)


def small_rounds(buffer: Buffer, tokens: int, num_rounds: int) -> None:
    """Rounds of 512-byte rows with two choices a token: hundreds of windows, nothing gets stuck."""
    for seed in range(num_rounds):
        rng = random.Random(seed)
        case = Round(
            num_tokens=tuple(rng.choice((0, 3, tokens)) for _ in range(buffer.group_size)),
            hidden=256,
            num_experts=2 * buffer.group_size,
            num_topk=2,
            seed=seed,
            kind=rng.choice(ROUTING_KINDS),
            num_sms=2 * (1 + seed % 2),
        )
        check_round(buffer, case)


def random_rounds(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    num_rounds: int,
    max_tokens: int,
    num_sms: int = 12,
) -> int:
    """`rounds` on two buffers, one process a rank.

    Returns:
        Rounds that were compared.
    """
    set_up(group, environ)
    buffers = [make_buffer(group) for _ in range(2)]
    rounds(buffers, 5000, num_rounds, max_tokens, num_sms)
    for buffer in buffers:
        buffer.destroy()
    return num_rounds


def shapes(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    sizes: tuple[tuple[int, int], ...],
    tokens: int,
) -> None:
    """Rows of real models: (hidden, experts); bfloat16, and FP8 with column-major scales."""
    set_up(group, environ)
    buffer = make_buffer(group, 64 * MB)
    num_ranks = group.size()
    for seed, (hidden, num_experts) in enumerate(sizes):
        case = Round(
            num_tokens=(tokens,) * num_ranks,
            hidden=hidden,
            num_experts=-(-num_experts // num_ranks) * num_ranks,
            num_topk=8,
            seed=seed,
            num_sms=20,
            num_biases=1,
        )
        if hidden >= 16:  # half of it is the cached payload
            check_round(buffer, case)
        if hidden >= 128:
            check_round(buffer, dataclasses.replace(case, fp8="column_major"))
    buffer.destroy()


def small_buffers(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    num_rows: int,
    tokens: int,
    num_rounds: int = 6,
) -> None:
    """A buffer of a few rows for each rank: hundreds of windows, and nothing gets stuck."""
    set_up(group, environ)
    buffer = make_buffer(group, num_rows * group.size() * (512 + 128))
    small_rounds(buffer, tokens, num_rounds)
    buffer.destroy()


def fabric(group: dist.ProcessGroup, environ: Mapping[str, str]) -> str:
    """Memory shared by fabric handles; returns why that cannot be had here, or nothing."""
    set_up(group, environ)
    try:
        buffer = make_buffer(group, use_fabric=True)
    except RuntimeError as error:
        return str(error)
    for seed in range(5):
        check_round(buffer, random_round(group.size(), seed, num_sms=12, max_tokens=100))
    buffer.destroy()
    return ""


def replaced(group: dist.ProcessGroup, environ: Mapping[str, str]) -> None:
    """A bigger buffer is made while the old one lives; that goes with its last reference."""
    set_up(group, environ)
    ranks = group.size()
    buffer = make_buffer(group, MB, explicitly_destroy=False)
    check_round(buffer, Round(num_tokens=(40,) * ranks, num_experts=2 * ranks, seed=3))
    for seed in range(4, 8):
        # The old one dies after the new one is there.
        buffer = make_buffer(group, 2 * buffer.num_nvl_bytes, explicitly_destroy=False)
        check_round(buffer, Round(num_tokens=(50,) * ranks, num_experts=2 * ranks, seed=seed))


def recreated(group: dist.ProcessGroup, environ: Mapping[str, str], num_times: int = 10) -> int:
    """Destroys and makes again.

    Returns:
        Bytes of device memory that are used more than after the second time; 0 without a GPU.
    """
    on_gpu = set_up(group, environ)
    ranks = group.size()
    before = grown = 0
    for seed in range(2 + num_times):
        buffer = make_buffer(group, 64 * MB)
        check_round(buffer, Round(num_tokens=(40,) * ranks, num_experts=2 * ranks, seed=seed % 2))
        synchronize(buffer)
        buffer.destroy()
        del buffer
        if on_gpu:
            torch.cuda.empty_cache()
            dist.barrier(group)
            free, total = torch.cuda.mem_get_info()
            if seed == 1:
                before = total - free
            grown = total - free - before
            dist.barrier(group)
    return grown


def outlives_group(group: dist.ProcessGroup, environ: Mapping[str, str]) -> None:
    """Operations, and the end of the buffer, after `destroy_process_group`."""
    set_up(group, environ)
    ranks = group.size()
    first, second = make_buffer(group, MB), make_buffer(group, MB, explicitly_destroy=False)
    check_round(first, Round(num_tokens=(9,) * ranks, num_experts=2 * ranks))
    dist.destroy_process_group()
    check_round(first, Round(num_tokens=(7,) * ranks, num_experts=2 * ranks, seed=1))
    check_round(second, Round(num_tokens=(7,) * ranks, num_experts=2 * ranks, seed=1))
    first.destroy()
    del second


def expect_error(
    prepared: Prepared,
    op: str,
    absent: int,
    limit_seconds: float,
    also_absent: tuple[int, ...] = (),
) -> CommunicationError:
    """Calls `op` without the absent: the error names one, in time, and the device computes."""
    buffer = prepared.buffer
    on_gpu = buffer.device.type == "cuda"
    start = time.monotonic()
    with pytest.raises(CommunicationError) as caught:
        prepared.complete(op)
    elapsed = time.monotonic() - start
    error = caught.value
    assert error.rank == buffer.rank, str(error)
    # Between domains a rank meets those of its own and its peers of the same index in the others.
    topology, missing = buffer.topology, (absent, *also_absent)
    met = {*topology.domains[topology.domain], *(each[topology.local] for each in topology.domains)}
    if met.intersection(missing) or not on_gpu:
        named = set(error.missing)
        assert named, str(error)
        assert named <= set(missing), str(error)
        assert all(re.search(rf"ranks? (\d, )*{each}\b", str(error)) for each in named), str(error)
    if on_gpu:
        assert error.op == op, str(error)
    assert elapsed < limit_seconds, elapsed
    ones = torch.ones(1000, dtype=torch.float32, device=buffer.device)
    assert float((ones * 2).sum()) == 2000
    if on_gpu:
        with pytest.raises(CommunicationError):
            prepared.queue("dispatch")  # broken until reset
    return error


def check_withheld_peer(buffer: Buffer, op: str, withheld: int) -> None:
    """Rank `withheld` does not come to `op`: the others name it, and all work after reset()."""
    prepared = Prepared(buffer)
    meet(buffer)
    comes, start = buffer.rank != withheld, time.monotonic()
    with pytest.raises(CommunicationError) if comes else contextlib.nullcontext() as caught:
        if comes:
            prepared.queue(op)
        if op != "notify":  # that one waits on the host
            settle(buffer)
    elapsed = time.monotonic() - start
    line_up(buffer)
    if comes:
        error = caught.value
        assert (error.op, error.rank) == (op, buffer.rank), str(error)
        # Also where a rank waits for one that waits.
        assert error.peer == withheld, str(error)
        assert f"rank {withheld}" in str(error)
        assert elapsed < 10, elapsed
        with pytest.raises(CommunicationError):
            prepared.queue("dispatch")  # broken until reset
    buffer.reset()
    for seed in range(2, 5):
        check_round(buffer, dataclasses.replace(prepared.case, seed=seed))


def withheld_round(buffer: Buffer, absent: int) -> None:
    """Threads without a GPU: one does not come to a round, and all work again after reset()."""
    case = Round((4,) * buffer.group_size, num_experts=4, num_topk=2)
    check_round(buffer, case)
    if buffer.rank != absent:
        with pytest.raises(CommunicationError, match=f"rank {absent}"):
            check_round(buffer, case)
    else:
        time.sleep(0.5)  # so that this rank still waits in reset() when the others have given up
    buffer.reset()
    check_round(buffer, case)


def withheld(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    cases: Sequence[tuple[str, int]],
    seconds: float,
) -> list[str]:
    """A rank that does not come: the others name it, and all work again after reset().

    Args:
        group: The ranks.
        environ: To be set first.
        cases: Operation and absent rank, one after the other on one buffer.
        seconds: Of one wait.

    Returns:
        The text of the error of each case; nothing on the absent rank.
    """
    on_gpu = set_up(group, environ)
    if not on_gpu:
        os.environ["EPJIT_TIMEOUT_SECONDS"] = "30"
    prepared = Prepared(make_buffer(group, timeout_seconds=seconds))
    texts = []
    for op, absent in cases:
        dist.barrier(group)
        text = ""
        if group.rank() != absent:
            if not on_gpu:
                os.environ["EPJIT_TIMEOUT_SECONDS"] = str(seconds)
            text = str(expect_error(prepared, op, absent, seconds + 10))
            if not on_gpu:
                os.environ["EPJIT_TIMEOUT_SECONDS"] = "30"
        texts.append(text)
        dist.barrier(group)
        prepared.buffer.reset()
        for seed in range(2, 5):
            check_round(prepared.buffer, dataclasses.replace(prepared.case, seed=seed))
    prepared.buffer.destroy()
    return texts


def cases_of(ops: Sequence[str], num_ranks: int) -> list[tuple[str, int]]:
    """Each operation without the first rank and without the last."""
    return [(op, absent) for op in ops for absent in (0, num_ranks - 1)]


def assert_all_but_the_absent(texts: list[list[str]], cases: Sequence[tuple[str, int]]) -> None:
    """Every rank has an error for each case in which it was not absent."""
    for rank, of_rank in enumerate(texts):
        assert [text == "" for text in of_rank] == [rank == absent for _, absent in cases], rank


def killed(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    op: str,
    victim: int,
    seconds: float,
    more_victims: tuple[int, ...] = (),
) -> None:
    """A rank dies, or several: the others name one, compute on, free the buffer and end."""
    on_gpu = set_up(group, environ)
    prepared = Prepared(make_buffer(group, timeout_seconds=seconds))
    dist.barrier(group)
    if group.rank() in (victim, *more_victims):
        time.sleep(0.5)  # the others have surely left the barrier
        os.kill(os.getpid(), signal.SIGKILL)
    if not on_gpu:
        os.environ["EPJIT_TIMEOUT_SECONDS"] = str(seconds)
    expect_error(prepared, op, victim, seconds + 10, more_victims)
    if not on_gpu:
        time.sleep(1.0)  # without rank 0, which keeps the store, the others could not say who came
    start = time.monotonic()
    prepared.buffer.destroy()
    assert time.monotonic() - start < seconds + 5
    if on_gpu:
        assert float(torch.ones(1000, dtype=torch.float32, device="cuda").sum()) == 1000


def graph(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    num_replays: int,
    tokens: int,
    num_sms: int,
) -> int:
    """`replays`, one process a rank.

    Returns:
        Replays that were compared.
    """
    on_gpu = set_up(group, environ)
    buffer = make_buffer(group)
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
        replays(buffer, num_replays, tokens, num_sms)
    synchronize(buffer)
    buffer.destroy()
    return num_replays


def replay_of(step: Callable[[], Any], meet: Callable[[], object]) -> Callable[[], Any]:
    """Captures `step`; what is returned replays it and returns what it did."""
    replay, outputs = capture(step, meet)

    def again() -> Any:
        replay()
        return outputs

    return again


def replays(
    buffer: Buffer,
    num_replays: int,
    tokens: int,
    num_sms: int,
    meet: Callable[[], object] = lambda: None,
) -> None:
    """One capture of all operations; replays with changed inputs, eager calls between.

    Without a GPU the same step runs eagerly each time.

    Args:
        buffer: Of this rank.
        num_replays: Replays to compare.
        tokens: Of every rank.
        num_sms: Of dispatch and combine.
        meet: Called before and after the capture, for ranks that share a GPU.
    """
    on_gpu = buffer.device.type == "cuda"
    num_ranks, rank, oracle = buffer.group_size, buffer.rank, Normal(buffer.topology.domains)
    hidden, experts, topk = 512, 4 * num_ranks, 4
    device, config = buffer.device, Config(num_sms)
    x = torch.empty((tokens, hidden), dtype=torch.bfloat16, device=device)
    idx = torch.empty((tokens, topk), dtype=torch.int64, device=device)
    weights = torch.empty((tokens, topk), dtype=torch.float32, device=device)

    def step() -> tuple[torch.Tensor, ...]:
        layout = layout_of(buffer, idx, experts)
        recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
            x,
            **layout,
            topk_idx=idx,
            topk_weights=weights,
            num_worst_tokens=worst,
            config=config,
        )
        cached, *_ = buffer.dispatch(x, handle=handle, config=config)
        combined, combined_weights, _ = buffer.combine(
            recv_x, handle, topk_weights=recv_weights, config=config
        )
        return recv_x, recv_idx, cached, combined, combined_weights

    def made_of(seed: int) -> Made:
        case = Round(
            num_tokens=(tokens,) * num_ranks,
            hidden=hidden,
            num_experts=experts,
            num_topk=topk,
            kind=ROUTING_KINDS[seed % len(ROUTING_KINDS)],
            seed=seed,
            worst=True,
        )
        return make(case, oracle)

    worst = made_of(0).num_worst

    def load(seed: int) -> Made:
        made = made_of(seed)
        assert made.num_worst == worst
        own = made.world[rank]
        for tensor, loaded in ((x, own.x), (idx, own.topk_idx), (weights, own.topk_weights)):
            assert loaded is not None
            tensor.copy_(loaded)
        line_up(buffer)
        return made

    def compare(outputs: tuple[torch.Tensor, ...], seed: int, made: Made) -> None:
        # Not left to the copies below: one that waits for a kernel holds up the copies of other
        # threads of this process, and such a thread may be the rank that the kernel waits for.
        settle(buffer)
        want = made.dispatched
        rows = int(want[rank].handle.num_received(rank))
        recv_x, recv_idx, cached, combined, combined_weights = outputs
        prefix = f"rank {rank}, replay {seed}"
        assert_rows_equal(recv_x[:rows], want[rank].recv_x[:rows], f"{prefix}: recv_x")
        assert_rows_equal(recv_idx, want[rank].recv_topk_idx, f"{prefix}: recv_topk_idx")
        assert_rows_equal(cached[:rows], want[rank].recv_x[:rows], f"{prefix}: cached recv_x")
        want_x, want_weights = oracle.combine(
            [each.recv_x for each in want],
            made.handles,
            rank,
            [each.recv_topk_weights for each in want],
        )
        assert_rows_equal(combined, want_x, f"{prefix}: combined_x")
        assert_rows_equal(combined_weights, want_weights, f"{prefix}: combined_topk_weights")

    made = load(0)
    compare(step(), 0, made)  # compiles
    again = replay_of(step, meet) if on_gpu else step
    for seed in range(1, num_replays):
        made = load(seed)
        compare(again(), seed, made)
        if seed % 10 == 0:
            line_up(buffer)
            compare(step(), seed, made)
