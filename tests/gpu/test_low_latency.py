"""The low-latency kernels on one GPU with virtual ranks, bit for bit against the reference.

Where they are cut into NVLink domains the transport is loopback, late by a seed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from epjit import Buffer
from epjit.handles import routes
from tests.harness.data import ROUTING_KINDS, assert_rows_equal
from tests.harness.ranks import (
    SMALL,
    line_up,
    meet,
    next_stream,
    num_random_rounds,
    run_ranks,
    settle,
)
from tests.rounds.low_latency import (
    BY_NAME,
    FLAGS,
    ROOM,
    LowLatencyRound,
    RankRound,
    check_low_latency_round,
    make_low_latency,
    random_low_latency_round,
)
from tests.scenarios import low_latency

# Ranks, and how many of them share an NVLink domain (None: all).
WORLDS = (
    *((1, None), (2, None), (3, None), (4, None), (8, None)),
    *((2, 1), (4, 2), (8, 2), (8, 4), (15, 5), (16, 2)),
)
TOKENS = 8 if SMALL else 48
HIDDEN = 512


def worlds(*num_ranks: int) -> pytest.MarkDecorator:
    """Every world of so many ranks."""
    chosen = [world for world in WORLDS if world[0] in num_ranks]
    ids = [f"{ranks}" if each is None else f"{ranks // each}x{each}" for ranks, each in chosen]
    return pytest.mark.parametrize(("num_ranks", "domain"), chosen, ids=ids)


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport between domains is late, by a seed."""
    monkeypatch.setenv("EPJIT_LOOPBACK_SEED", "7")


def run_low_latency(
    num_ranks: int,
    body: Callable[..., Any],
    *,
    num_nvl_bytes: int = 0,
    domain: int | None = None,
    **options: Any,
) -> list[Any]:
    """`run_ranks` with buffers in low-latency mode, cut into domains of `domain` ranks."""
    given: dict[str, Any] = {"num_rdma_bytes": ROOM, "low_latency_mode": True, **options}
    given["nvlink_domain"] = domain
    return run_ranks(num_ranks, body, num_nvl_bytes=num_nvl_bytes, **given)


@pytest.mark.skipif(SMALL, reason="virtual ranks must line up between launches")
@pytest.mark.parametrize("variant", ["ldst", "tma", "reduced", "lines", "auto"])
def test_buffers_in_another_order(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that waits for a peer leaves SMs to the kernel that the peer waits for.

    A kernel of each rank takes all SMs; two of them fill the GPU. With auto the weights are sent.
    """
    monkeypatch.setenv("EPJIT_LOW_LATENCY_COMBINE_VARIANT", variant)
    if variant == "lines":
        monkeypatch.setenv("EPJIT_LOW_LATENCY_DISPATCH_VARIANT", variant)

    def body(*buffers: Buffer) -> None:
        streams = [next_stream() for _ in buffers]
        low_latency.in_another_order(buffers, streams, weights_sent=variant == "auto")

    run_low_latency(2, body, num_buffers=3, low_latency_sms=0, timeout_seconds=10)


@worlds(1, 2, 4, 8)
@pytest.mark.parametrize("row_format", list(BY_NAME))
def test_routings(num_ranks: int, domain: int | None, row_format: str) -> None:
    """Every kind of routing in every format, and every flag of the calls on some round."""

    def body(buffer: Buffer) -> None:
        for seed, kind in enumerate(ROUTING_KINDS):
            rng = random.Random(seed)
            check_low_latency_round(
                buffer,
                LowLatencyRound(
                    num_tokens=tuple(rng.choice((0, 3, TOKENS)) for _ in range(num_ranks)),
                    hidden=HIDDEN,
                    num_experts=4 * num_ranks,
                    num_topk=4,
                    kind=kind,
                    seed=seed,
                    row_format=row_format,
                    num_dispatches=1 + seed % 2,
                    zero_copy=seed % 3 == 1,
                    use_logfmt=seed % 3 == 2,
                    with_extras=seed % 2 == 0,
                    how=("sync", "async", "hook")[seed % 3],
                    weights_sent=seed % 4 > 1,
                ),
            )

    run_low_latency(num_ranks, body, domain=domain)


@worlds(2, 4)
def test_model_shapes(num_ranks: int, domain: int | None) -> None:
    """Rows of real models, and the longest and the shortest row there is, top-8 and top-32."""
    shapes = (
        ((512, 32, 8, "fp8"), (8, 8, 2, "bf16"))
        if SMALL
        else (
            (7168, 256, 8, "fp8"),
            (7168, 256, 8, "bf16"),
            (7168, 64, 8, "fp8_ue8m0"),
            (4096, 128, 8, "nvfp4"),
            (2880, 32, 4, "mxfp8"),
            (8192, 64, 8, "fp8_round"),
            (2048, 128, 32, "fp8"),
            (16384, 32, 4, "bf16"),
            (8, 8, 2, "bf16"),
            (1000, 8, 1, "bf16"),
            (32, 8, 3, "nvfp4"),
        )
    )

    def body(buffer: Buffer) -> None:
        for seed, (hidden, num_experts, num_topk, row_format) in enumerate(shapes):
            for how in ("sync", "hook"):
                check_low_latency_round(
                    buffer,
                    LowLatencyRound(
                        num_tokens=(16,) * num_ranks,
                        hidden=hidden,
                        num_experts=num_experts,
                        num_topk=num_topk,
                        seed=seed,
                        row_format=row_format,
                        use_logfmt=how == "hook" and hidden % 128 == 0,
                        zero_copy=how == "sync",
                        how=how,
                        weights_sent=how == "sync",
                    ),
                )

    run_low_latency(num_ranks, body, domain=domain)


@pytest.mark.timeout(600)
@worlds(2, 3, 4, 8, 15, 16)
def test_random_rounds(num_ranks: int, domain: int | None) -> None:
    """Fresh rounds, some of the normal mode on the same buffer between them."""
    num_rounds = num_random_rounds(num_ranks)

    def body(buffer: Buffer) -> None:
        low_latency.rounds(buffer, num_rounds, TOKENS, num_sms=4)

    run_low_latency(num_ranks, body, domain=domain, num_nvl_bytes=16 << 20, timeout=580)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_random_rounds_in_lines(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of 128 bytes arrive whole, which PTX does not promise, or rows are wrong."""
    for op in ("DISPATCH", "COMBINE"):
        monkeypatch.setenv(f"EPJIT_LOW_LATENCY_{op}_VARIANT", "lines")

    def body(buffer: Buffer) -> None:
        low_latency.rounds(buffer, 10 if SMALL else 300, TOKENS, num_sms=4)

    run_low_latency(num_ranks, body, num_nvl_bytes=16 << 20, timeout=580)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_random_rounds_of_sums_before_the_links(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights that the dispatch has sent, and with others, which combine sends first."""
    monkeypatch.setenv("EPJIT_LOW_LATENCY_COMBINE_VARIANT", "reduced")

    def body(buffer: Buffer) -> None:
        low_latency.rounds(buffer, 10 if SMALL else 150, TOKENS)

    run_low_latency(num_ranks, body, timeout=580)


@worlds(1, 2, 4)
@pytest.mark.parametrize("use_hooks", [False, True])
@pytest.mark.parametrize("weights_sent", [False, True])
def test_graph(num_ranks: int, domain: int | None, use_hooks: bool, weights_sent: bool) -> None:
    """Three operations captured once, replayed with changed inputs between eager calls."""

    def body(buffer: Buffer) -> None:
        num_replays = 5 if SMALL else 101
        low_latency.replays(
            buffer,
            num_replays,
            TOKENS,
            use_hooks=use_hooks,
            weights_sent=weights_sent,
            meet=lambda: buffer.group.allgather(None),
        )

    run_low_latency(num_ranks, body, domain=domain)


@worlds(2, 4)
def test_scratch_over_the_whole_buffer(num_ranks: int, domain: int | None) -> None:
    """Whatever a user writes to the exposed memory, nothing breaks, cleaned up or not."""

    def body(buffer: Buffer) -> None:
        low_latency.overwrite(buffer, functools.partial(meet, buffer))

    run_low_latency(num_ranks, body, domain=domain)


@pytest.mark.parametrize("op", low_latency.OPS)
@worlds(2, 4)
def test_withheld_peer(num_ranks: int, domain: int | None, op: str) -> None:
    """A rank that does not come: the others name it, live on, and work again after reset()."""
    absent = num_ranks - 1

    def body(buffer: Buffer) -> None:
        check_low_latency_round(buffer, low_latency.steady(num_ranks))
        meet(buffer)
        text = low_latency.expect_error(buffer, op, absent, 10)
        assert bool(text) is (buffer.rank != absent)
        meet(buffer)
        buffer.reset()
        for seed in range(2, 5):
            check_low_latency_round(buffer, low_latency.steady(num_ranks, seed))

    run_low_latency(num_ranks, body, domain=domain, timeout_seconds=2)


@pytest.mark.parametrize("op", ["dispatch", "combine", "clean"])
@pytest.mark.parametrize("weights_sent", [False, True])
@worlds(2, 3, 4)
def test_shrink(num_ranks: int, domain: int | None, op: str, weights_sent: bool) -> None:
    """A rank that stops answering is masked, the others go on, and it comes back."""
    absent = num_ranks - 1

    def body(buffer: Buffer) -> None:
        to_meet = functools.partial(meet, buffer)
        low_latency.shrink(buffer, op, absent, 30, to_meet, weights_sent=weights_sent)

    run_low_latency(num_ranks, body, domain=domain, timeout_seconds=2, enable_shrink=True)


def test_masks_by_hand() -> None:
    """A rank that is masked before anything is missing costs no time."""
    masked = torch.tensor([0, 0, 1], dtype=torch.int32, device="cpu")

    def body(buffer: Buffer) -> None:
        case = low_latency.steady(3)
        check_low_latency_round(buffer, case)
        meet(buffer)
        if buffer.rank != 2:
            buffer.low_latency_update_mask_buffer(2, True)
        meet(buffer)  # that is a kernel of torch's, which could not be loaded while a peer's spins
        if buffer.rank != 2:
            low_latency.round_without(buffer, case, masked, 0)
        else:
            line_up(buffer)  # as `round_without` does
        meet(buffer)
        buffer.low_latency_clean_mask_buffer()
        meet(buffer)
        buffer.clean_low_latency_buffer(16, case.hidden, case.num_experts)
        check_low_latency_round(buffer, case)

    run_low_latency(3, body, enable_shrink=True)


def test_hook_runs_on_the_stream_of_the_call() -> None:
    """SGLang calls inside `with torch.cuda.stream(s)`, and the hook outside of it."""

    def body(buffer: Buffer) -> None:
        case = LowLatencyRound(num_tokens=(TOKENS, 3), hidden=HIDDEN, row_format="fp8", how="hook")
        check_low_latency_round(buffer, case)  # compiles
        ranked = RankRound(buffer, case)
        made = make_low_latency(case)
        own = made.exchanges[0].inputs[buffer.rank]
        x, idx = own.x.to(buffer.device), own.topk_idx.to(buffer.device)
        torch.cuda.current_stream().synchronize()
        line_up(buffer)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            *got, _, hook = buffer.low_latency_dispatch(
                x, idx, made.max_tokens, case.num_experts, return_recv_hook=True
            )
        assert hook is not None
        hook()
        line_up(buffer)
        side.synchronize()
        want = made.exchanges[0].dispatched[buffer.rank]
        assert_rows_equal(got[1], want.recv_count, f"rank {buffer.rank}: recv_count")
        line_up(buffer)
        ranked.dispatch(0)
        ranked.combine(0)
        settle(buffer)
        ranked.compare()

    run_low_latency(2, body)


def test_sending_ends_without_the_peer() -> None:
    """After the sending half no kernel waits: the stream runs dry before the peer has come."""

    def body(buffer: Buffer) -> None:
        case = low_latency.steady(2)
        check_low_latency_round(buffer, case)
        made = make_low_latency(case)
        own = made.exchanges[0].inputs[buffer.rank]
        x, idx = own.x.to(buffer.device), own.topk_idx.to(buffer.device)
        meet(buffer)

        def send() -> Any:
            return buffer.low_latency_dispatch(
                x, idx, made.max_tokens, case.num_experts, return_recv_hook=True, **FLAGS["bf16"]
            )

        if buffer.rank == 0:
            results = send()
            torch.cuda.current_stream().synchronize()  # returns, though rank 1 has sent nothing
        meet(buffer)
        if buffer.rank == 1:
            results = send()
        results[-1]()
        settle(buffer)
        want = made.exchanges[0].dispatched[buffer.rank]
        assert_rows_equal(results[1], want.recv_count, f"rank {buffer.rank}: recv_count")

    run_low_latency(2, body)


def test_deterministic_mode() -> None:
    """There torch fills new tensors with NaN; the fill must not come after the rows."""

    def body(buffer: Buffer) -> None:
        for seed, how in enumerate(("sync", "async", "hook")):
            check_low_latency_round(
                buffer, LowLatencyRound(num_tokens=(TOKENS,), seed=seed, how=how)
            )

    torch.use_deterministic_algorithms(True)
    try:
        run_low_latency(1, body)
    finally:
        torch.use_deterministic_algorithms(False)


def test_members() -> None:
    """Memory, strides and handle, as frameworks read them."""

    def body(buffer: Buffer) -> None:
        case = random_low_latency_round(2, 3, max_tokens=TOKENS)
        check_low_latency_round(buffer, case)
        whole = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
        assert whole.is_cuda
        assert whole.numel() == buffer.num_rdma_bytes
        x = torch.zeros((4, HIDDEN), dtype=torch.bfloat16, device="cpu").to(buffer.device)
        idx = torch.zeros((4, 1), dtype=torch.int64, device="cpu").to(buffer.device)
        line_up(buffer)
        (rows, scales), _, handle, event, hook = buffer.low_latency_dispatch(x, idx, 4, 4)
        assert event.event is None
        assert hook is None
        assert rows.shape == (2, 8, HIDDEN)
        assert scales.stride() == (HIDDEN // 128 * 8, 1, 8)
        assert routes(handle[0], num_ranks=2).source_rows.shape == (2, 4, 1)
        send = buffer.get_next_low_latency_combine_buffer(handle)
        assert send.shape == (2, 8, HIDDEN)
        first, last = whole.data_ptr(), whole.data_ptr() + whole.numel()
        assert first <= send.data_ptr() < last

    run_low_latency(2, body)


def test_warmup_allows_a_capture() -> None:
    """Nothing is compiled while a graph is captured."""

    def body(buffer: Buffer) -> None:
        x = torch.zeros((4, HIDDEN), dtype=torch.bfloat16, device="cpu").to(buffer.device)
        idx = torch.zeros((4, 2), dtype=torch.int64, device="cpu").to(buffer.device)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(graph):
            buffer.low_latency_dispatch(x, idx, 8, 4)
        buffer.low_latency_warmup(8, HIDDEN, 4, num_topk=2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = buffer.low_latency_dispatch(x, idx, 8, 4)
        graph.replay()
        torch.cuda.synchronize()
        assert results[1].tolist() == [8, 0, 0, 0]

    run_low_latency(1, body)
