"""The kernels on one GPU with virtual ranks, bit for bit against the reference."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from epjit import Buffer, Config
from epjit.formats import CASTS
from epjit.modes import normal as normal_mode
from tests.emulation.world import LONG_RUNS
from tests.harness.data import ROUTING_KINDS, payload, routing, topk_weights
from tests.harness.ranks import (
    SMALL,
    SMS,
    capture,
    line_up,
    meet,
    num_random_rounds,
    run_ranks,
    settle,
    start_at,
)
from tests.rounds.normal import (
    DISPATCH_VARIANTS,
    Round,
    cast_round,
    check_no_room,
    check_round,
    layout_of,
    random_round,
    variant_environ,
)
from tests.scenarios.normal import check_withheld_peer, replays, rounds, small_rounds

RANKS = (1, 2, 3, 4, 8)
TOKENS = 16 if SMALL else 333


@pytest.fixture(params=DISPATCH_VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every variant of dispatch, with the combine that goes with it."""
    for name, value in variant_environ(request.param).items():
        monkeypatch.setenv(name, value)
    return str(request.param)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_routings(num_ranks: int, variant: str) -> None:
    """Every kind of routing, payload and flag on some round."""

    def body(buffer: Buffer) -> None:
        for seed, kind in enumerate(ROUTING_KINDS):
            case = random_round(num_ranks, seed, num_sms=SMS, max_tokens=TOKENS)
            check_round(buffer, dataclasses.replace(case, kind=kind))

    run_ranks(num_ranks, body)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_model_shapes(num_ranks: int, variant: str) -> None:
    """Rows of real models, and the longest and the shortest row there is."""
    shapes = (
        ((256, 32), (64, 8))
        if SMALL
        else ((7168, 256), (2880, 128), (8192, 64), (16384, 32), (16, 32))
    )

    def body(buffer: Buffer) -> None:
        for seed, (hidden, num_experts) in enumerate(shapes):
            case = Round(
                num_tokens=(TOKENS,) * num_ranks,
                hidden=hidden,
                num_experts=num_experts,
                num_topk=8,
                seed=seed,
                num_sms=SMS,
                num_biases=1,
            )
            check_round(buffer, case)  # half of `hidden` is the row of the cached payload
            if hidden >= 128:
                check_round(buffer, dataclasses.replace(case, fp8="column_major"))

    run_ranks(num_ranks, body, num_nvl_bytes=64 << 20)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast: str, num_ranks: int, variant: str) -> None:
    """Random rounds, and rows of a model from both dtypes."""
    rounds, hidden = (1, 512) if SMALL else (60 if num_ranks < 8 else 15, 7168)

    def body(buffer: Buffer) -> None:
        for seed in range(rounds):
            case = cast_round(num_ranks, 5000 + seed, cast, num_sms=SMS, max_tokens=TOKENS)
            check_round(buffer, case)
        for dtype in (torch.bfloat16, torch.float16):
            tokens = (TOKENS,) * num_ranks
            case = Round(tokens, hidden=hidden, num_experts=8 * num_ranks, num_topk=8, num_sms=SMS)
            check_round(buffer, dataclasses.replace(case, cast=cast, combine_dtype=dtype))

    run_ranks(num_ranks, body)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("num_rows", [4, 32])
def test_small_buffers(num_ranks: int, num_rows: int, variant: str) -> None:
    """Buffers of a few rows: hundreds of windows, and nothing gets stuck."""
    row_bytes = 512 + 128

    def body(buffer: Buffer) -> None:
        small_rounds(buffer, TOKENS, 2 if SMALL else 6)

    run_ranks(num_ranks, body, num_nvl_bytes=num_rows * num_ranks * row_bytes)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_more_rows_than_there_is_room_for(num_ranks: int, variant: str) -> None:
    """Uneven ranks, of which those with the fewest tokens have room for half of their rows."""
    tokens = (TOKENS // 8, TOKENS, TOKENS // 2, TOKENS)[:num_ranks]

    def body(buffer: Buffer) -> None:
        for seed, short in enumerate(((0,), (0, num_ranks - 1), tuple(range(num_ranks)))):
            case = Round(tokens, hidden=1024, num_experts=4 * num_ranks, seed=seed, num_sms=SMS)
            check_no_room(buffer, case, short)

    run_ranks(num_ranks, body)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_no_room_in_a_graph(num_ranks: int, variant: str) -> None:
    """Each replay says so, and everything behind it in the graph goes on."""
    tokens = (TOKENS // 8, TOKENS, TOKENS // 2, TOKENS)[:num_ranks]

    def body(buffer: Buffer) -> None:
        case = Round(tokens, num_experts=4 * num_ranks, seed=1, num_sms=SMS)
        check_no_room(
            buffer, case, (0,), capture=lambda queue: capture(queue, lambda: meet(buffer))
        )

    run_ranks(num_ranks, body)


@pytest.mark.parametrize(("epoch", "stale"), LONG_RUNS)
def test_signals_of_long_ago(epoch: int, stale: int, variant: str) -> None:
    """After billions of operations that tell little, one that needs what they did not tell."""
    num_ranks, row_bytes = 2, 512 + 128

    def body(buffer: Buffer) -> None:
        case = Round((TOKENS,) * num_ranks, num_experts=4, num_topk=2, num_sms=SMS)
        check_round(buffer, case)
        start_at(buffer, epoch, stale=stale)
        for seed in range(3):
            check_round(buffer, dataclasses.replace(case, seed=seed))

    run_ranks(num_ranks, body, num_nvl_bytes=8 * num_ranks * row_bytes, timeout_seconds=5)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_wrong_guesses(num_ranks: int, variant: str) -> None:
    """Dispatches whose first launch leaves at once, on some ranks or on all."""
    tokens = (TOKENS, TOKENS // 8, TOKENS // 2, 0)[:num_ranks]

    def body(buffer: Buffer) -> None:
        for seed, wrong in enumerate(((0,), (0, num_ranks - 1), tuple(range(num_ranks))) * 2):
            case = Round(tokens, hidden=1024, num_experts=4 * num_ranks, seed=seed, num_sms=SMS)
            check_round(buffer, dataclasses.replace(case, guess_wrong=wrong))

    # A few rows, so that nobody's window is free before all ranks have come.
    run_ranks(num_ranks, body, num_nvl_bytes=16 * num_ranks * 2304)


def test_memory_after_calls_of_changing_sizes(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs are a quarter larger than what they hold at most, or small; none is left over."""
    num_calls, small, row_bytes = 20 if SMALL else 1000, 32 << 10, 1024
    monkeypatch.setattr(normal_mode, "_SMALL_BYTES", small)

    def body(buffer: Buffer) -> None:
        num_experts = 2 * buffer.group_size
        x = torch.ones((TOKENS, row_bytes // 2), dtype=torch.bfloat16).cuda()
        idx = torch.arange(num_experts).repeat(TOKENS, 1)[:, ::2].contiguous().cuda()

        def calls(numbers: range) -> None:
            for number in numbers:
                tokens = random.Random(number).choice((0, 1, TOKENS // 4, number % TOKENS, TOKENS))
                line_up(buffer)
                layout = layout_of(buffer, idx[:tokens], num_experts)
                rows, _, _, _, handle, _ = buffer.dispatch(x[:tokens], **layout, config=Config(4))
                assert rows.shape[0] == handle.num_rows == buffer.group_size * tokens
                assert rows.untyped_storage().nbytes() <= max(rows.nbytes * 5 // 4, small)

        line_up(buffer)
        calls(range(5))
        meet(buffer)
        before = torch.cuda.memory_allocated()
        meet(buffer)
        calls(range(num_calls))
        meet(buffer)
        assert torch.cuda.memory_allocated() == before
        meet(buffer)

    run_ranks(2, body)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_random_rounds(num_ranks: int) -> None:
    """Fresh rounds on two buffers in turn, with a rank that is late now and then."""
    num_rounds = num_random_rounds(num_ranks)

    def body(first: Buffer, second: Buffer) -> None:
        num_sms = SMS if num_ranks < 8 else 8
        rounds((first, second), 1000, num_rounds, TOKENS // 2, num_sms)

    run_ranks(num_ranks, body, num_buffers=2, timeout=580)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_outputs_outlive_the_buffer(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct: rows lie in the buffer's memory, which goes with the last tensor over them."""
    for name, value in variant_environ("direct").items():
        monkeypatch.setenv(name, value)

    def body(buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
        x = payload(buffer.rank, TOKENS, 256, torch.bfloat16).cuda()
        idx = torch.arange(2 * num_ranks).repeat(TOKENS, 1)[:, ::2].contiguous().cuda()
        line_up(buffer)
        layout = layout_of(buffer, idx, 2 * num_ranks)
        recv_x, *_ = buffer.dispatch(x, **layout, config=Config(4))
        assert isinstance(recv_x, torch.Tensor)
        settle(buffer)
        return recv_x, recv_x.cpu()

    for rows, before in run_ranks(num_ranks, body):  # buffers are destroyed by now
        assert rows.shape[0] == num_ranks * TOKENS
        assert torch.equal(rows.cpu(), before)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_graph(num_ranks: int) -> None:
    """One capture of all operations; replays with changed inputs, and eager calls between."""

    def body(buffer: Buffer) -> None:
        num_replays = 5 if SMALL else 100
        replays(buffer, num_replays, TOKENS, SMS, meet=lambda: buffer.group.allgather(None))

    run_ranks(num_ranks, body)


def test_capture_that_cannot_work_says_so() -> None:
    """The host must read counts, and nothing may be compiled, while a graph is captured."""

    def body(buffer: Buffer) -> None:
        idx = routing("random", num_tokens=8, num_experts=4, num_topk=2, num_ranks=1, seed=0).cuda()
        x, weights = payload(0, 8, 64, torch.bfloat16).cuda(), topk_weights(8, 2, seed=0).cuda()
        layout = layout_of(buffer, idx, 4)
        for worst, message in ((0, "num_worst_tokens"), (8, "Buffer.warmup")):
            graph = torch.cuda.CUDAGraph()
            with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
                buffer.dispatch(
                    x, topk_idx=idx, topk_weights=weights, num_worst_tokens=worst, **layout
                )
        buffer.warmup(128, num_topk=2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_worst_tokens=8, **layout)

    run_ranks(1, body)


@pytest.mark.parametrize("op", ["notify", "dispatch", "combine"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_withheld_peer(num_ranks: int, op: str, variant: str) -> None:
    """A rank that does not come: the others name it, live on, and work again after reset()."""
    run_ranks(num_ranks, check_withheld_peer, op, num_ranks - 1, timeout_seconds=2)


@pytest.mark.parametrize("how", ["sync", "async", "comm"])
def test_deterministic_mode(how: str) -> None:
    """There torch fills new tensors with NaN; the fill must not come after the rows."""

    def body(buffer: Buffer) -> None:
        for seed in range(5):
            case = Round(num_tokens=(TOKENS,), hidden=4096, num_sms=SMS, seed=seed, how=how)
            check_round(buffer, case)

    torch.use_deterministic_algorithms(True)
    try:
        run_ranks(1, body)
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_buffers_of_different_sizes() -> None:
    """A buffer may be replaced by a bigger one while it lives, as frameworks do."""

    def body(buffer: Buffer) -> None:
        check_round(buffer, Round(num_tokens=(40, 50), seed=3, num_sms=4))
        bigger = Buffer(None, 2 * buffer.num_nvl_bytes, comm=buffer.group)
        check_round(bigger, Round(num_tokens=(50, 0), seed=4, num_sms=4))
        check_round(buffer, Round(num_tokens=(7, 9), seed=5, num_sms=4))
        meet(buffer)
        del bigger  # the destructor frees it
        meet(buffer)  # freeing waits for all that runs on the GPU, also for kernels of other ranks
        check_round(buffer, Round(num_tokens=(7, 9), seed=6, num_sms=4))

    run_ranks(2, body)


def test_local_buffer_tensor_and_streams() -> None:
    """The small members of V1."""

    def body(buffer: Buffer) -> None:
        check_round(buffer, Round(num_tokens=(40, 50), seed=3, num_sms=4))
        view = buffer.get_local_buffer_tensor(torch.int8)
        assert view.numel() == buffer.num_nvl_bytes
        assert view.is_cuda
        shaped = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size((4, 8)), offset=256)
        assert shaped.shape == (4, 8)
        assert shaped.data_ptr() == view.data_ptr() + 256
        meet(buffer)
        view.copy_(torch.full((buffer.num_nvl_bytes,), 0x5A, dtype=torch.int8))  # a user's scratch
        meet(buffer)
        check_round(buffer, Round(num_tokens=(40, 50), seed=4, num_sms=4))
        assert buffer.get_comm_stream().cuda_stream == buffer.runtime.get_comm_stream().cuda_stream
        assert Buffer.is_sm90_compiled() == (torch.cuda.get_device_capability()[0] >= 9)

    run_ranks(2, body)


def test_the_comm_stream_is_current() -> None:
    """A call that the caller waits for runs there; another would wait for its own stream."""

    def body(buffer: Buffer) -> None:
        idx = torch.zeros((4, 1), dtype=torch.int64).cuda()
        torch.cuda.synchronize()
        with torch.cuda.stream(buffer.get_comm_stream()):
            assert buffer.get_dispatch_layout(idx, 2)[0].tolist() == [4]
            with pytest.raises(RuntimeError, match="wait for itself"):
                buffer.get_dispatch_layout(idx, 2, async_finish=True)
        with pytest.raises(RuntimeError, match="allocate_on_comm_stream"):
            buffer.get_dispatch_layout(idx, 2, allocate_on_comm_stream=True)

    run_ranks(1, body)


def test_calls_from_several_streams_follow_each_other() -> None:
    """Also where nothing but the order of the calls says so, between streams and the Buffer's."""

    def body(buffer: Buffer) -> None:
        num_experts = 2 * buffer.group_size
        torch.manual_seed(buffer.rank)
        x = torch.randn((300, 512), dtype=torch.bfloat16, device="cuda")
        idx = torch.rand((300, num_experts), device="cuda").topk(2)[1]
        owners = torch.nn.functional.one_hot(idx // 2, buffer.group_size).sum(1) > 0
        want = x * owners.sum(1, keepdim=True)  # exact: at most two
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        line_up(buffer)
        layout = layout_of(buffer, idx, num_experts)
        kept = []
        for turn in range(12):
            with torch.cuda.stream(streams[turn % 3]):
                rows, _, _, _, handle, event = buffer.dispatch(
                    x, **layout, async_finish=turn % 4 == 3
                )
            with torch.cuda.stream(streams[(turn + 1) % 3]):
                combined, _, _ = buffer.combine(rows, handle)
            kept.append((rows, handle, event, combined))  # torch knows of one stream each
        line_up(buffer)
        torch.cuda.synchronize()
        assert all(torch.equal(combined, want) for *_, combined in kept)

    run_ranks(2, body)
