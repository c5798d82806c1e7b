"""Scenarios of the low-latency mode, on one buffer: for processes, threads, virtual ranks.

Those of processes are called as ``scenario(group, environ, ...)`` by `launch.run`; those that take
a `Buffer` are shared with tests/gpu.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epjit import Buffer, CommunicationError, moe
from epjit.reference import low_latency as reference
from tests.harness.data import ROUTING_KINDS, assert_rows_equal, to_device
from tests.harness.ranks import line_up, settle
from tests.rounds.low_latency import (
    BY_NAME,
    FLAGS,
    ROOM,
    LowLatencyRound,
    MadeLowLatency,
    RankRound,
    check_low_latency_round,
    compare_dispatched,
    expert_outputs,
    make_low_latency,
    random_low_latency_round,
    sums_before_links,
)
from tests.rounds.normal import check_round, random_round
from tests.scenarios import normal

OPS = ("low_latency_dispatch", "low_latency_combine")
# Without those that choose an expert twice: with them M would differ from the number of tokens.
_PLAIN_KINDS = [kind for kind in ROUTING_KINDS if kind != "duplicate_experts"]


def make_buffer(group: dist.ProcessGroup, num_nvl_bytes: int = 0, **options: Any) -> Buffer:
    """A buffer with room for the random rounds, which will be destroyed."""
    return normal.make_buffer(
        group, num_nvl_bytes, num_rdma_bytes=ROOM, low_latency_mode=True, **options
    )


def rounds(buffer: Buffer, num_rounds: int, max_tokens: int, *, num_sms: int = 0) -> int:
    """Random rounds, with `num_sms` some of the normal mode in between.

    Returns:
        Rounds that were compared.
    """
    for seed in range(num_rounds):
        rng = random.Random(seed)
        is_mixed = num_sms and rng.random() < 0.3
        normal.be_late(buffer, rng)
        if is_mixed:
            ranks = buffer.group_size
            check_round(buffer, random_round(ranks, seed, num_sms=num_sms, max_tokens=max_tokens))
        case = random_low_latency_round(buffer.group_size, 3000 + seed, max_tokens=max_tokens)
        check_low_latency_round(buffer, case)
    return num_rounds


def random_rounds(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    num_rounds: int,
    max_tokens: int,
    num_sms: int = 0,
) -> int:
    """`rounds`, one process a rank."""
    normal.set_up(group, environ)
    buffer = make_buffer(group, 16 * normal.MB if num_sms else 0)
    done = rounds(buffer, num_rounds, max_tokens, num_sms=num_sms)
    normal.synchronize(buffer)
    buffer.destroy()
    return done


def model_shapes(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    sizes: tuple[tuple[int, int], ...],
    tokens: int,
) -> None:
    """Rows of real models, (hidden, experts), in every format; the hint is all that they get."""
    normal.set_up(group, environ)
    ranks = group.size()
    for seed, (hidden, num_experts) in enumerate(sizes):
        num_experts = -(-num_experts // ranks) * ranks
        hint = Buffer.get_low_latency_rdma_size_hint(tokens, hidden, ranks, num_experts)
        buffer = normal.make_buffer(group, 0, num_rdma_bytes=hint, low_latency_mode=True)
        for name, row_format in BY_NAME.items():
            if hidden % row_format.granularity:
                continue
            case = LowLatencyRound(
                num_tokens=(tokens,) * ranks,
                hidden=hidden,
                num_experts=num_experts,
                num_topk=8,
                seed=seed,
                row_format=name,
                use_logfmt=name == "fp8",
                zero_copy=name == "bf16",
            )
            check_low_latency_round(buffer, case)
        normal.synchronize(buffer)
        buffer.destroy()


def overwrite(buffer: Buffer, meet: Callable[[], object]) -> None:
    """A user's scratch over all of the exposed memory, before `clean_low_latency_buffer` and not.

    Args:
        buffer: Of this rank.
        meet: All ranks are through with what they queued.
    """
    num_ranks = buffer.group_size
    scratch = torch.full((buffer.num_rdma_bytes,), 0xA5, dtype=torch.uint8, device="cpu")
    for seed, clean in enumerate((True, False, True)):
        case = random_low_latency_round(num_ranks, 700 + seed, max_tokens=24)
        check_low_latency_round(buffer, case)
        meet()
        buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True).copy_(scratch)
        normal.synchronize(buffer)
        meet()
        if clean:
            buffer.clean_low_latency_buffer(24, 512, 8 * num_ranks)
        check_low_latency_round(buffer, case)


def overwritten(group: dist.ProcessGroup, environ: Mapping[str, str]) -> None:
    """`overwrite`, one process a rank."""
    normal.set_up(group, environ)
    buffer = make_buffer(group)
    overwrite(buffer, lambda: dist.barrier(group))
    normal.synchronize(buffer)
    buffer.destroy()


# ---- graphs ------------------------------------------------------------------------------


def replays(
    buffer: Buffer,
    num_replays: int,
    tokens: int,
    *,
    use_hooks: bool = False,
    weights_sent: bool = False,
    meet: Callable[[], object] = lambda: None,
) -> None:
    """One capture of three operations, replayed with changed inputs between eager calls.

    Three, since with V1 a graph had to hold an even number. Each reads what the one before it has
    written, with nothing in between: kernels start early. Without a GPU they run eagerly.

    Args:
        buffer: Of this rank.
        num_replays: Replays to compare.
        tokens: Of every rank, `M`.
        use_hooks: Whether the operations are split.
        weights_sent: Whether the weights go along with the first dispatch.
        meet: Called before and after the capture, for ranks that share a GPU.
    """
    on_gpu = buffer.device.type == "cuda"
    num_ranks, rank, device = buffer.group_size, buffer.rank, buffer.device
    hidden, experts, topk = 512, 8 * num_ranks, 4
    rows = (experts // num_ranks, num_ranks * tokens, hidden)
    x = torch.empty((tokens, hidden), dtype=torch.bfloat16, device=device)
    idx = torch.empty((tokens, topk), dtype=torch.int64, device=device)
    weights = torch.empty((tokens, topk), dtype=torch.float32, device=device)
    outputs = torch.empty(rows, dtype=torch.bfloat16, device=device)

    def call(method: Any, *args: Any, **flags: Any) -> tuple[Any, ...]:
        *results, _, hook = method(*args, return_recv_hook=use_hooks, **flags)
        if hook is not None:
            hook()
        return tuple(results)

    def step() -> tuple[tuple[Any, ...], torch.Tensor, tuple[Any, ...]]:
        sent = {"topk_weights": weights} if weights_sent else {}
        first = call(buffer.low_latency_dispatch, x, idx, tokens, experts, use_fp8=False, **sent)
        (combined,) = call(buffer.low_latency_combine, outputs, idx, weights, first[2])
        second = call(buffer.low_latency_dispatch, combined, idx, tokens, experts)
        return first, combined, second

    def load(seed: int) -> list[MadeLowLatency]:
        case = LowLatencyRound(
            num_tokens=(tokens,) * num_ranks,
            hidden=hidden,
            num_experts=experts,
            num_topk=topk,
            kind=_PLAIN_KINDS[seed % len(_PLAIN_KINDS)],
            seed=seed,
        )
        domains = buffer.topology.num_domains
        made = [
            make_low_latency(dataclasses.replace(case, **changes), num_domains=domains)
            for changes in ({"weights_sent": weights_sent}, {"row_format": "fp8"})
        ]
        assert made[0].max_tokens == tokens
        own = made[0].exchanges[0]
        x.copy_(own.inputs[rank].x)
        idx.copy_(own.inputs[rank].topk_idx)
        weights.copy_(own.weights[rank])
        outputs.copy_(own.outputs[rank])
        line_up(buffer)
        return made

    def compare(results: Any, seed: int, made: list[MadeLowLatency]) -> None:
        settle(buffer)
        first, combined, second = results
        prefix, sizes = f"rank {rank}, replay {seed}", (tokens, hidden, experts)
        exchange = made[0].exchanges[0]
        want = exchange.dispatched[rank]
        compare_dispatched(f"{prefix}, first", first, want, BY_NAME["bf16"], sizes)
        assert_rows_equal(combined, exchange.combined[rank], f"{prefix}: combined_x")
        inputs = [
            reference.RankInput(rows, given.topk_idx)
            for rows, given in zip(exchange.combined, exchange.inputs, strict=True)
        ]
        want = reference.dispatch(
            inputs, rank, max_tokens=tokens, num_experts=experts, row_format=BY_NAME["fp8"]
        )
        compare_dispatched(f"{prefix}, second", second, want, BY_NAME["fp8"], sizes)

    made = load(0)
    compare(step(), 0, made)  # compiles
    again = normal.replay_of(step, meet) if on_gpu else step
    for seed in range(1, num_replays):
        made = load(seed)
        compare(again(), seed, made)
        if seed % 3 == 0:
            # An odd number of eager calls, so that parity cannot hold by luck.
            name = "fp8" if seed % 2 else "bf16"
            line_up(buffer)
            sent = {"topk_weights": weights} if weights_sent and name == "bf16" else {}
            flags = {**FLAGS[name], **sent}
            got = call(buffer.low_latency_dispatch, x, idx, tokens, experts, **flags)
            settle(buffer)
            want = made[seed % 2].exchanges[0].dispatched[rank]
            sizes = (tokens, hidden, experts)
            compare_dispatched(f"rank {rank}, eager {seed}", got, want, BY_NAME[name], sizes)
    buffer.check_fault()


def graph(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    num_replays: int,
    tokens: int,
    use_hooks: bool,
    weights_sent: bool = False,
) -> int:
    """`replays`, one process a rank.

    Returns:
        Replays that were compared.
    """
    on_gpu = normal.set_up(group, environ)
    buffer = make_buffer(group)
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
        replays(buffer, num_replays, tokens, use_hooks=use_hooks, weights_sent=weights_sent)
    normal.synchronize(buffer)
    buffer.destroy()
    return num_replays


# ---- kernels that wait beside others ---------------------------------------------------------


def in_another_order(
    buffers: Sequence[Buffer], streams: Sequence[Any], *, weights_sent: bool = False
) -> None:
    """Each rank begins with another one of its Buffers, whose kernels wait when the next ones come.

    Of 160 tokens a kernel takes all SMs. What follows it at once starts early.

    Args:
        buffers: Of this rank.
        streams: Of this rank, one for each of them.
        weights_sent: Whether the weights go along with the dispatch.
    """
    ranks, first = buffers[0].group_size, buffers[0].rank
    sizes = {"num_tokens": (160,) * ranks, "num_topk": 8, "num_experts": 16 * ranks}
    cases = [
        steady(ranks, seed, weights_sent=weights_sent, **sizes) for seed in range(len(buffers))
    ]
    for buffer, case, stream in zip(buffers, cases, streams, strict=True):
        with torch.cuda.stream(stream):
            check_low_latency_round(buffer, case)
    for ops in (("dispatch", "combine"), ("dispatch",), ("combine",)):
        if ops[0] == "dispatch":
            rounds = [RankRound(*each) for each in zip(buffers, cases, strict=True)]
        buffers[0]._links.barrier()
        for i in range(len(buffers)):
            index = (first + i) % len(buffers)
            with torch.cuda.stream(streams[index]):
                for op in ops:
                    getattr(rounds[index], op)(0)
            time.sleep(0.1)  # until it waits
        for buffer, stream, ranked in zip(buffers, streams, rounds, strict=True):
            with torch.cuda.stream(stream):
                settle(buffer)
            ranked.compare()


def crossed(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    num_buffers: int,
    weights_sent: bool = False,
) -> None:
    """`in_another_order`, one process a rank."""
    normal.set_up(group, environ)
    options = {"num_rdma_bytes": ROOM, "low_latency_mode": True}
    buffers = [
        normal.make_buffer(group, 0, timeout_seconds=10, **options) for _ in range(num_buffers)
    ]
    streams = [torch.cuda.Stream() for _ in buffers]
    in_another_order(buffers, streams, weights_sent=weights_sent)
    for buffer in buffers:
        normal.synchronize(buffer)
        buffer.destroy()


# ---- ranks that are set up differently --------------------------------------------------------

_DISPATCH_VARIANT = "EPJIT_LOW_LATENCY_DISPATCH_VARIANT"
_VARIANT = "EPJIT_LOW_LATENCY_COMBINE_VARIANT"


def set_up_differently(group: dist.ProcessGroup, environ: Mapping[str, str]) -> None:
    """The ranks have other variants when they make a Buffer, or only when they use it."""
    on_gpu = normal.set_up(group, environ)
    theirs = {_DISPATCH_VARIANT: ("words", "lines"), _VARIANT: ("ldst", "reduced")}
    for name, values in theirs.items():
        mine = os.environ[name] = values[group.rank() % 2]
        both = rf"rank 0: {values[0]}\n +rank 1: {values[1]}\n"
        for enable_shrink in (False, True)[: 1 if "lines" in values else 2]:
            with pytest.raises(RuntimeError, match=f"different values of {name}:\n +{both}"):
                make_buffer(group, enable_shrink=enable_shrink)
        os.environ[name] = values[0]
    buffer = make_buffer(group)
    ranked = RankRound(buffer, steady(group.size())) if not on_gpu else None
    os.environ[_VARIANT] = mine
    if ranked is None:
        both = "LowLatencyCombineConfig.*\n.*LowLatencyReducedCombineConfig"
        with pytest.raises(RuntimeError, match=f"kernels for low_latency_combine(?s:.*){both}"):
            RankRound(buffer, steady(group.size()))
        different = 8 + group.rank() % 2
        both = "tokens_per_rank=8(?s:.*)tokens_per_rank=9"
        with pytest.raises(RuntimeError, match=f"kernels for low_latency_dispatch(?s:.*){both}"):
            buffer.low_latency_warmup(different, 1024, 4 * group.size(), num_topk=2)
    else:
        ranked.dispatch(0)
        with pytest.raises(ValueError, match=rf"disagree on {_VARIANT}: rank 0 has ldst, rank 1"):
            ranked.combine(0)
    normal.synchronize(buffer)
    buffer.destroy()


# ---- ranks that do not come --------------------------------------------------------------


def steady(num_ranks: int, seed: int = 1, **changes: Any) -> LowLatencyRound:
    """A round in which every rank has rows for every other."""
    case = LowLatencyRound(
        num_tokens=(16,) * num_ranks, num_experts=4 * num_ranks, kind="balanced", seed=seed
    )
    return dataclasses.replace(case, **changes)


def expect_error(buffer: Buffer, op: str, absent: int, limit_seconds: float) -> str:
    """Runs a round up to `op`, which rank `absent` does not call: the error names it, in time.

    Returns:
        The text of the error.
    """
    on_gpu = buffer.device.type == "cuda"
    ranked = RankRound(buffer, steady(buffer.group_size))
    if op == "low_latency_combine":
        ranked.dispatch(0)
        settle(buffer)
        line_up(buffer)
    if buffer.rank == absent:
        if on_gpu:
            line_up(buffer)  # as `settle` does
        return ""
    start = time.monotonic()
    with pytest.raises(CommunicationError) as caught:  # noqa: PT012
        if op == "low_latency_combine":
            ranked.combine(0)
        else:
            ranked.dispatch(0)
        settle(buffer)
    elapsed = time.monotonic() - start
    error = caught.value
    assert (error.rank, error.peer) == (buffer.rank, absent), str(error)
    assert f"rank {absent}" in str(error)
    assert elapsed < limit_seconds, elapsed
    if on_gpu:
        assert error.op == op, str(error)
        with pytest.raises(CommunicationError):
            ranked.dispatch(0)  # broken until reset
    return str(error)


def withheld(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    cases: Sequence[tuple[str, int]],
    seconds: float,
) -> list[str]:
    """`tests.scenarios.normal.withheld` for low-latency operations."""
    on_gpu = normal.set_up(group, environ)
    buffer = make_buffer(group, timeout_seconds=seconds)
    check_low_latency_round(buffer, steady(group.size()))
    texts = []
    for op, absent in cases:
        dist.barrier(group)
        if not on_gpu and group.rank() != absent:
            os.environ["EPJIT_TIMEOUT_SECONDS"] = str(seconds)
        texts.append(expect_error(buffer, op, absent, seconds + 10))
        if not on_gpu:
            os.environ["EPJIT_TIMEOUT_SECONDS"] = "30"
        dist.barrier(group)
        buffer.reset()
        for seed in range(2, 5):
            case = steady(group.size(), seed, how=("sync", "hook")[seed % 2])
            check_low_latency_round(buffer, case)
    normal.synchronize(buffer)
    buffer.destroy()
    return texts


def shrink(
    buffer: Buffer,
    op: str,
    absent: int,
    limit_seconds: float,
    meet: Any,
    *,
    weights_sent: bool = False,
) -> None:
    """A rank stops answering in `op` (dispatch, combine or clean), is masked, and comes back.

    Args:
        buffer: Of this rank, made with `enable_shrink`.
        op: Operation before which rank `absent` stops.
        absent: The rank.
        limit_seconds: For the first call that meets nobody.
        meet: All ranks are here, on the host.
        weights_sent: Whether the weights go along with the dispatch.
    """
    num_ranks, rank = buffer.group_size, buffer.rank
    case = steady(num_ranks, weights_sent=weights_sent)
    # A rank that compiles while the others run would be masked.
    sizes = (max(case.num_tokens), case.hidden, case.num_experts)
    flags = {"use_fp8": False, "weights_sent": weights_sent}
    buffer.low_latency_warmup(*sizes, num_topk=case.num_topk, **flags)
    meet()
    check_low_latency_round(buffer, case)
    masked = torch.zeros(num_ranks, dtype=torch.int32, device="cpu")
    everybody = masked.clone()
    masked[absent] = 1
    status = to_device(everybody, buffer.device)
    buffer.low_latency_query_mask_buffer(status)
    normal.synchronize(buffer)
    assert_rows_equal(status, everybody, f"rank {rank}: mask before")
    meet()

    start = time.monotonic()
    for seed in range(2, 5):  # the first round loses the rank, the others are without it
        at = {"dispatch": 0, "combine": 1, "clean": 2}[op] if seed == 2 else 0
        if rank != absent:
            round_without(buffer, dataclasses.replace(case, seed=seed), masked, at)
        elif seed == 2:
            round_up_to(buffer, dataclasses.replace(case, seed=seed), at)
        else:
            line_up(buffer)  # as `round_without` does
    assert time.monotonic() - start < limit_seconds
    if rank != absent:
        buffer.low_latency_query_mask_buffer(status)
        normal.synchronize(buffer)
        assert_rows_equal(status, masked, f"rank {rank}: mask after")
        buffer.check_fault()  # a masked rank is no fault
    meet()

    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    normal.synchronize(buffer)
    assert_rows_equal(status, everybody, f"rank {rank}: mask cleaned")
    meet()
    buffer.clean_low_latency_buffer(*sizes)
    for seed in range(5, 9):
        check_low_latency_round(buffer, dataclasses.replace(case, seed=seed))
    buffer.low_latency_query_mask_buffer(status)
    normal.synchronize(buffer)
    assert_rows_equal(status, everybody, f"rank {rank}: mask at the end")


def round_up_to(buffer: Buffer, case: LowLatencyRound, num_ops: int) -> None:
    """The first operations of a round, of which nothing is compared."""
    ranked = RankRound(buffer, case)
    if num_ops > 0:
        ranked.dispatch(0)
    if num_ops > 1:
        ranked.combine(0)
    normal.synchronize(buffer)


def round_without(
    buffer: Buffer, case: LowLatencyRound, masked: torch.Tensor, num_with: int
) -> None:
    """Dispatch, combine, clean; rank `masked` takes part in the first `num_with` of them."""
    rank, domains = buffer.rank, buffer.topology.num_domains
    made = make_low_latency(case, num_domains=domains)
    nobody = torch.zeros_like(masked)
    (exchange,) = made.exchanges
    dispatched = [
        reference.dispatch(
            exchange.inputs,
            each,
            max_tokens=made.max_tokens,
            num_experts=case.num_experts,
            row_format=BY_NAME[case.row_format],
            masked=masked if num_with < 1 else nobody,
        )
        for each in range(buffer.group_size)
    ]
    # Where the rank takes part it combines what `round_up_to` gives it.
    outputs = (
        exchange.outputs
        if num_with > 0
        else [
            expert_outputs(each, case.hidden, seed=source) for source, each in enumerate(dispatched)
        ]
    )
    returned = [
        reference.collect(output, each.src_info, each.layout_range.shape[1])
        for output, each in zip(outputs, dispatched, strict=True)
    ]
    own = exchange.inputs[rank]
    want = reference.combine(
        returned,
        rank,
        own.topk_idx,
        exchange.weights[rank],
        num_experts=case.num_experts,
        reduced=sums_before_links(case, domains),
        masked=masked if num_with < 2 else nobody,
    )
    device = buffer.device
    x, idx, weights, output = (
        to_device(each, device)
        for each in (own.x, own.topk_idx, exchange.weights[rank], outputs[rank])
    )
    line_up(buffer)
    sent = {"topk_weights": weights} if case.weights_sent else {}
    *got, _, _ = buffer.low_latency_dispatch(
        x, idx, made.max_tokens, case.num_experts, **FLAGS[case.row_format], **sent
    )
    combined, _, _ = buffer.low_latency_combine(output, idx, weights, got[2])
    buffer.clean_low_latency_buffer(made.max_tokens, case.hidden, case.num_experts)
    normal.synchronize(buffer)
    prefix = f"rank {rank}, seed {case.seed}, without rank {int(masked.argmax())}"
    sizes = (made.max_tokens, case.hidden, case.num_experts)
    compare_dispatched(prefix, tuple(got), dispatched[rank], BY_NAME[case.row_format], sizes)
    assert_rows_equal(combined, want, f"{prefix}: combined_x")


def shrunk(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    cases: Sequence[tuple[str, int]],
    seconds: float,
) -> None:
    """`shrink`, one process a rank; each case on the same buffer."""
    normal.set_up(group, environ)
    buffer = make_buffer(group, timeout_seconds=seconds, enable_shrink=True)
    for (op, absent), sent in itertools.product(cases, (False, True)):
        limit = 3 * seconds + 10
        shrink(buffer, op, absent, limit, lambda: dist.barrier(group), weights_sent=sent)
    normal.synchronize(buffer)
    buffer.destroy()


def fresh_threads(group: dist.ProcessGroup, environ: Mapping[str, str]) -> None:
    """Each step in a thread of its own, where GPU 0 is current: on other ranks, not the Buffer's.

    Both modes, hooks, `epjit.moe` with gradients on autograd's threads, and the end.
    """
    on_gpu = normal.set_up(group, environ)
    ranks = group.size()
    buffer = make_buffer(group, 16 * normal.MB)
    name = moe.register_buffer(buffer)

    def in_thread(step: Callable[..., Any], *args: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(step, *args).result()

    def layer() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(group.rank())
        x = torch.randn((40, 256), generator=generator).bfloat16()
        idx = torch.rand((40, 2 * ranks), generator=generator).topk(2)[1].to(buffer.device)
        weights = torch.rand((40, 2), generator=generator).to(buffer.device).requires_grad_()
        x = x.to(buffer.device).requires_grad_()
        rows = moe.dispatch(x, idx, weights, num_experts=2 * ranks, group=name, expert_major=True)
        weighted = rows.x * rows.weights[:, None].bfloat16()
        out = moe.combine(weighted, rows.handle, group=name)
        out.float().square().sum().backward()
        assert x.grad is not None
        assert weights.grad is not None
        return [tensor.detach().cpu() for tensor in (out, x.grad, weights.grad)]

    def previous_event() -> None:
        idx = torch.zeros((4, 1), dtype=torch.int64).to(buffer.device)
        expected: Any = contextlib.nullcontext()
        if on_gpu and torch.cuda.current_device() != buffer.device.index:
            expected = pytest.raises(RuntimeError, match="set_device")
        with expected:
            buffer.get_dispatch_layout(idx, ranks, previous_event=Buffer.capture())

    for seed in range(4):
        case = random_round(ranks, seed, num_sms=4, max_tokens=60)
        in_thread(check_round, buffer, dataclasses.replace(case, how="sync"))
    for seed, how in enumerate(("sync", "async", "hook")):
        few = random_low_latency_round(ranks, seed, max_tokens=16)
        in_thread(check_low_latency_round, buffer, dataclasses.replace(few, how=how))
    want = layer()
    normal.synchronize(buffer)
    got = in_thread(layer)
    assert all(torch.equal(each, other) for each, other in zip(got, want, strict=True))
    in_thread(previous_event)
    view = in_thread(buffer.get_local_buffer_tensor, torch.uint8)
    assert view.device == buffer.device
    in_thread(buffer.reset)
    in_thread(check_round, buffer, dataclasses.replace(case, how="sync"))
    moe.unregister_buffer(name)
    in_thread(buffer.destroy)
