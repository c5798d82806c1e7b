"""`Buffer`, `Config` and events on the CPU backend; ranks are processes, threads, or one alone."""

from __future__ import annotations

import os
import signal
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import epjit
from epjit import Buffer, Config, EventHandle, EventOverlap
from epjit.formats import CASTS
from tests.harness import launch
from tests.harness.data import assert_rows_equal, payload, routing, topk_weights
from tests.rounds.normal import (
    Round,
    cast_round,
    check_no_room,
    check_round,
    layout_of,
    random_round,
)
from tests.scenarios import normal

CPU = {"EPJIT_BACKEND": "cpu"}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also where there is a GPU; `Buffer.num_sms` and torch's defaults come back as they were."""
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")
    monkeypatch.setattr(Buffer, "num_sms", Buffer.num_sms)
    monkeypatch.setattr(Buffer, "_sms_are_set", False)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


def alone(num_nvl_bytes: int = 1024, **options: Any) -> Buffer:
    return Buffer(None, num_nvl_bytes, comm=launch.Alone(), **options)


# ---- members ---------------------------------------------------------------------------


def test_attributes_echo_the_arguments() -> None:
    """Callers compare them with what they need: rounded ones would have buffers made for ever."""
    comm = launch.Alone()
    for size in (0, 128, int(1e9), 640):
        buffer = Buffer(None, size, 0, comm=comm, explicitly_destroy=size == 0)
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (size, 0)
        assert buffer.explicitly_destroy is (size == 0)
        assert buffer.group is comm
        assert (buffer.rank, buffer.group_size) == (0, 1)
        assert (buffer.low_latency_mode, buffer.enable_shrink) == (False, False)
        runtime = buffer.runtime
        assert runtime is not None
        assert runtime.is_available()
        assert (
            runtime.get_num_rdma_ranks(),
            runtime.get_rdma_rank(),
            runtime.get_root_rdma_rank(True),
        ) == (1, 0, 0)
        assert runtime.get_local_device_id() == -1
        if buffer.explicitly_destroy:
            buffer.destroy()
            assert not runtime.is_available()


def test_v1_keywords_are_accepted() -> None:
    buffer = Buffer(
        group=None,
        num_nvl_bytes=128,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=12,
        allow_nvlink_for_low_latency_mode=False,
        allow_mnnvl=True,
        use_fabric=True,
        explicitly_destroy=False,
        enable_shrink=False,
        comm=launch.Alone(),
    )
    assert buffer.runtime is not None


def test_is_sm90_compiled_and_num_sms() -> None:
    assert Buffer.is_sm90_compiled() is (
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    )
    assert Buffer.num_sms == 20
    alone().set_num_sms(24)  # through an instance, as frameworks do
    assert Buffer.num_sms == 24
    assert alone().num_sms == 24
    for num_ranks in range(1, 9):
        assert Buffer.get_dispatch_config(num_ranks).num_sms == 24
        assert Buffer.get_combine_config(num_ranks).num_sms == 24
    with pytest.raises(AssertionError, match="got 25"):
        Buffer.set_num_sms(25)
    assert Buffer.num_sms == 24


def test_default_configs() -> None:
    """V1's table."""
    for num_ranks, dispatch_send, combine_send in ((2, 24, 10), (4, 6, 9), (8, 6, 4)):
        assert Buffer.get_dispatch_config(num_ranks) == Config(20, dispatch_send, 256, 6, 128)
        assert Buffer.get_combine_config(num_ranks) == Config(20, combine_send, 256, 6, 128)


def test_capture_and_events() -> None:
    buffer = alone()
    for event in (Buffer.capture(), buffer.capture()):
        assert isinstance(event, EventOverlap)
        assert isinstance(event.event, EventHandle)
        for _ in range(2):  # any number of times
            event.current_stream_wait()
            event.event.current_stream_wait()
        with event as entered:
            assert entered is event
    kept = (torch.zeros(1),)
    empty = EventOverlap(None, kept)
    assert empty.extra_tensors is kept
    with empty:
        pass
    with pytest.raises(AssertionError, match="async_finish=True"):
        empty.current_stream_wait()
    with pytest.raises(KeyError), Buffer.capture():
        raise KeyError  # not swallowed


def test_event_is_none_unless_asynchronous() -> None:
    """TRT-LLM asserts it, vLLM branches on it; an EventOverlap(None) counts as no event."""
    buffer = alone()
    idx, weights = (
        routing("random", num_tokens=5, num_experts=4, num_topk=2, num_ranks=1, seed=0),
        topk_weights(5, 2, seed=0),
    )
    x = payload(0, 5, 32, torch.bfloat16)
    for flag in (False, True):
        flags: dict[str, Any] = {"async_finish": flag, "previous_event": EventOverlap(None)}
        if flag:
            flags = {
                "async_finish": True,
                "previous_event": Buffer.capture(),
                "allocate_on_comm_stream": True,
            }
        per_rank, none, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, 4, **flags)
        assert none is None
        events = [event]
        recv_x, _, recv_weights, _, handle, event = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=idx,
            topk_weights=weights,
            **flags,
        )
        events.append(event)
        *nothing, event = buffer.dispatch(x, handle=handle, **flags)
        assert nothing[1:] == [None, None, None, None]
        events.append(event)
        _, _, event = buffer.combine(recv_x, handle, topk_weights=recv_weights, **flags)
        events.append(event)
        for event in events:
            assert (event.event is not None) is flag
            with event:
                pass


def test_no_stream_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="lives on the CPU"):
        alone().get_comm_stream()


def test_get_local_buffer_tensor() -> None:
    buffer = alone(1024)
    whole = buffer.get_local_buffer_tensor(torch.uint8)
    assert (whole.shape, whole.dtype) == ((1024,), torch.uint8)
    assert buffer.get_local_buffer_tensor(torch.bfloat16).shape == (512,)
    assert buffer.get_local_buffer_tensor(torch.int64, offset=16).shape == (126,)
    whole.copy_(torch.arange(1024, dtype=torch.int32).to(torch.uint8))
    shaped = buffer.get_local_buffer_tensor(torch.uint8, torch.Size((3, 5)), offset=64)
    assert shaped.shape == (3, 5)
    assert shaped.data_ptr() == whole.data_ptr() + 64
    assert shaped[0, 0] == 64
    assert buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).numel() == 0
    assert buffer.runtime.get_local_buffer_tensor(torch.int8, 24, False).numel() == 1000
    with pytest.raises(ValueError, match="offset is 3 bytes"):
        buffer.get_local_buffer_tensor(torch.int16, offset=3)
    with pytest.raises(ValueError, match="offset is 1032"):
        buffer.get_local_buffer_tensor(torch.int64, offset=1032)
    with pytest.raises(ValueError, match=r"257 elements.*only 256"):
        buffer.get_local_buffer_tensor(torch.float32, torch.Size((257,)))


def test_destroy() -> None:
    with pytest.raises(AssertionError, match="explicitly_destroy=True"):
        alone().destroy()
    buffer = alone(explicitly_destroy=True)
    buffer.destroy()
    assert buffer.runtime is None
    with pytest.raises(AssertionError, match="destroyed already"):
        buffer.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        buffer.get_local_buffer_tensor(torch.int8)


def test_the_last_reference_frees_and_warns() -> None:
    """At once, without the cyclic collector: device memory must not wait for that."""
    gone = weakref.ref(alone())
    assert gone() is None
    buffers = [alone(explicitly_destroy=True)]
    with pytest.warns(RuntimeWarning, match="never destroyed"):
        buffers.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffers.append(alone())
        buffers.clear()


# ---- Config ----------------------------------------------------------------------------


def test_config_forms() -> None:
    """Positional with 3 and 5 arguments, keywords (SGLang makes it from JSON), defaults."""
    assert Config() == Config(20, 6, 256, 6, 256)
    assert Config(20, 6, 256) == Config(
        num_sms=20, num_max_nvl_chunked_send_tokens=6, num_max_nvl_chunked_recv_tokens=256
    )
    assert Config(24, 8, 128, 4, 16).num_max_rdma_chunked_recv_tokens == 16
    from_json = {
        "num_sms": 24,
        "num_max_nvl_chunked_send_tokens": 8,
        "num_max_nvl_chunked_recv_tokens": 128,
        "num_max_rdma_chunked_send_tokens": 5,
        "num_max_rdma_chunked_recv_tokens": 128,
    }
    assert Config(**from_json) == Config(24, 8, 128, 5, 128)
    assert (
        Config(**from_json).num_max_rdma_chunked_recv_tokens == 130
    )  # a multiple of the send chunk
    assert Config(0).num_sms == 0
    assert Config(21).num_sms == 21  # an operation refuses it, not the constructor


@pytest.mark.parametrize(
    ("num_ranks", "num_bytes", "megabytes"),
    [(2, 83_927_040, 83.9), (4, 167_854_080, 167.9), (8, 335_708_160, 335.7)],
)
def test_nvl_hint_is_v1s(num_ranks: int, num_bytes: int, megabytes: float) -> None:
    """Rows of 7168 bfloat16, 20 SMs, chunk 256."""
    hint = Config(20, 6, 256).get_nvl_buffer_size_hint(7168 * 2, num_ranks)
    assert hint == num_bytes
    assert round(hint / 1e6, 1) == megabytes


def test_hints_are_multiples_monotone_and_accepted() -> None:
    previous = 0
    for hidden_bytes in (16, 32, 1000, 1024, 14336, 32768):
        hint = Config().get_nvl_buffer_size_hint(hidden_bytes, 2)
        assert hint % 128 == 0
        assert hint > previous
        previous = hint
    by_ranks = [Config().get_nvl_buffer_size_hint(14336, num_ranks) for num_ranks in range(1, 9)]
    by_sms = [
        Config(num_sms).get_nvl_buffer_size_hint(14336, 4) for num_sms in (0, 4, 8, 20, 24, 132)
    ]
    by_chunk = [
        Config(20, 6, chunk).get_nvl_buffer_size_hint(14336, 4) for chunk in (7, 32, 256, 512)
    ]
    for values in (by_ranks, by_sms, by_chunk):
        assert values == sorted(set(values))
    for num_ranks in range(1, 9):
        assert Config().get_rdma_buffer_size_hint(14336, num_ranks) == 0
    for config in (Buffer.get_dispatch_config(8), Buffer.get_combine_config(8)):
        size = config.get_nvl_buffer_size_hint(2048, 8)
        assert (
            alone(size, num_rdma_bytes=config.get_rdma_buffer_size_hint(2048, 8)).num_nvl_bytes
            == size
        )


def test_topk_idx_t() -> None:
    assert epjit.topk_idx_t == (
        torch.int32 if os.environ.get("TOPK_IDX_BITS") == "32" else torch.int64
    )


# ---- operations ------------------------------------------------------------------------


class RoundTrip(torch.autograd.Function):
    """Dispatch whose backward is a combine with the handle that autograd kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, buffer: Buffer
    ) -> torch.Tensor:
        layout = layout_of(buffer, idx, 2 * buffer.group_size)
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            x, **layout, topk_idx=idx, topk_weights=weights
        )
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)
        return recv_x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        handle = ctx.saved_tensors
        grad, _, _ = ctx.buffer.combine(grads[0], handle)
        again, *_ = ctx.buffer.dispatch(grad, handle=handle)
        assert again.shape == grads[0].shape
        return grad, None, None, None


def autograd_rank(comm: Any) -> None:
    buffer = Buffer(None, 1 << 20, comm=comm)
    leaves = []
    for layer in range(3):  # several handles alive, used in reverse
        idx = routing(
            "holes",
            num_tokens=7,
            num_experts=2 * buffer.group_size,
            num_topk=2,
            num_ranks=buffer.group_size,
            seed=10 * layer + buffer.rank,
        )
        x = payload(buffer.rank, 7, 16, torch.bfloat16).requires_grad_()
        leaves.append((x, idx, RoundTrip.apply(x, idx, topk_weights(7, 2, seed=layer), buffer)))
    for x, idx, out in reversed(leaves):
        out.backward(torch.ones_like(out))
        ranks = [{value // 2 for value in row if value >= 0} for row in idx.tolist()]
        want = torch.tensor(
            [[len(each)] * 16 for each in ranks], dtype=torch.bfloat16, device="cpu"
        )
        assert_rows_equal(x.grad, want, f"rank {buffer.rank}: gradient")


def test_handles_survive_save_for_backward() -> None:
    # One after the other would deadlock: the backward of a rank waits for that of the others.
    launch.run_threads(autograd_rank, 2)


def rounds_of_threads(comm: Any, num_rounds: int) -> None:
    buffer = Buffer(None, 1 << 20, comm=comm)
    for seed in range(num_rounds):
        check_round(buffer, random_round(buffer.group_size, 9000 + seed, num_sms=4, max_tokens=24))


def test_random_rounds_of_eight_threads() -> None:
    launch.run_threads(rounds_of_threads, 8, 30, timeout=120)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast: str, num_ranks: int) -> None:
    """Rows that are cast on the way, along counts and along a handle."""

    def worker(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, comm=comm)
        for seed in range(6):
            check_round(buffer, cast_round(num_ranks, seed, cast, num_sms=4, max_tokens=20))

    launch.run_threads(worker, num_ranks)


def test_ranks_that_cast_otherwise_are_told() -> None:
    def worker(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, comm=comm)
        x, idx = torch.zeros(3, 256, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)
        counts = layout_of(buffer, idx, 4)
        for cast in ("fp8", None):  # else the ranks would disagree on a kernel
            buffer.dispatch(x, **counts, cast=cast)
        cast = "fp8" if buffer.rank else None
        with pytest.raises(ValueError, match="disagree on cast: rank 0 has None, rank 1 has fp8"):
            buffer.dispatch(x, **counts, cast=cast)

    launch.run_threads(worker, 2)


@pytest.mark.parametrize(
    ("tokens", "short"), [((24,), (0,)), ((3, 40), (0,)), ((9, 30, 0, 24), (0, 3))]
)
def test_more_rows_than_there_is_room_for(tokens: tuple[int, ...], short: tuple[int, ...]) -> None:
    """As on a GPU: the rank says so in its next call, and everything else goes on."""

    def worker(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, comm=comm)
        for seed in range(3):
            case = Round(tokens, num_experts=2 * len(tokens), num_topk=2, seed=seed)
            check_no_room(buffer, case, short)

    launch.run_threads(worker, len(tokens))


def test_ambient_default_dtype() -> None:
    """DeepEP's tests set it; no tensor of ours may change its dtype by it."""
    torch.set_default_dtype(torch.bfloat16)
    launch.run_threads(rounds_of_threads, 2, 6)


def no_tokens(comm: Any) -> None:
    buffer = Buffer(None, 1 << 20, comm=comm)
    for fp8 in (None, "column_major"):
        for worst in (False, True):
            check_round(
                buffer,
                Round(
                    num_tokens=(0,) * buffer.group_size,
                    num_experts=12,
                    num_biases=2,
                    fp8=fp8,
                    worst=worst,
                ),
            )


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_no_tokens_anywhere(num_ranks: int) -> None:
    launch.run_threads(no_tokens, num_ranks)


# ---- processes -------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "num_rounds"), [(1, 30), (2, 30), (3, 30), (4, 10)])
def test_random_rounds_of_processes(num_ranks: int, num_rounds: int) -> None:
    assert (
        launch.run(normal.random_rounds, num_ranks, CPU, num_rounds, 24) == [num_rounds] * num_ranks
    )


def gloo_attributes(group: dist.ProcessGroup) -> tuple[int, int]:
    os.environ.update(CPU)
    buffer = Buffer(group, 1 << 20)
    assert buffer.group is group
    return buffer.rank, buffer.group_size


def test_group_is_kept_as_passed() -> None:
    assert launch.run(gloo_attributes, 2) == [(0, 2), (1, 2)]


def test_buffer_outlives_the_process_group() -> None:
    launch.run(normal.outlives_group, 2, CPU)


def test_buffers_come_and_go() -> None:
    launch.run(normal.replaced, 2, CPU)
    launch.run(normal.recreated, 2, CPU, 3)


@pytest.mark.parametrize(("num_ranks", "victim", "op"), [(3, 2, "dispatch"), (3, 0, "combine")])
def test_killed_process(
    num_ranks: int, victim: int, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 hosts what the others meet in, so it is a case of its own."""
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 20.0)  # the survivors still have something to say
    with pytest.raises(launch.RankFailedError) as caught:
        launch.run(normal.killed, num_ranks, CPU, op, victim, 2.0)
    assert list(caught.value.errors) == [victim], str(caught.value)
    assert f"exit code {-signal.SIGKILL}" in caught.value.errors[victim]


def test_withheld_process() -> None:
    cases = normal.cases_of(("dispatch",), 3)
    texts = launch.run(normal.withheld, 3, CPU, cases, 1.0)
    normal.assert_all_but_the_absent(texts, cases)
    for of_rank in texts:
        for text, (_, absent) in zip(of_rank, cases, strict=True):
            assert text == "" or (f"rank {absent}" in text and "1 s" in text)


def withheld_thread(comm: Any) -> None:
    normal.withheld_round(Buffer(None, 1 << 20, comm=comm), absent=1)


def test_withheld_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "1")
    launch.run_threads(withheld_thread, 2)


def test_keywords_and_members_of_branches_of_v1() -> None:
    def body(comm: Any) -> None:
        buffer = Buffer(
            None, 1 << 20, comm=comm, allow_nvlink_for_normal_mode=False, num_nvl_peers=8
        )
        assert not hasattr(buffer, "nvshmem_qp_depth")
        assert buffer.runtime is not None
        buffer.runtime.destroy()
        assert buffer.runtime is None
        buffer = Buffer(None, 0, 1 << 20, True, comm=comm)
        assert buffer.nvshmem_qp_depth == 1024

    launch.run_threads(body, 1)


def test_a_buffer_that_is_made_in_inference_mode() -> None:
    """Warm-ups make it there, and what they allocate must be written to elsewhere, too."""

    def body(comm: Any) -> None:
        with torch.inference_mode():
            buffer = Buffer(None, 0, 1 << 20, True, enable_shrink=True, comm=comm)
            x, idx = (
                torch.zeros((2, 128), dtype=torch.bfloat16),
                torch.zeros((2, 1), dtype=torch.int64),
            )
            *_, hook = buffer.low_latency_dispatch(x, idx, 2, 1, return_recv_hook=True)
        hook()
        buffer.low_latency_clean_mask_buffer()
        buffer.reset()

    launch.run_threads(body, 1)


def test_numbers_of_numpy() -> None:
    def body(comm: Any) -> None:
        buffer = Buffer(None, 0, 1 << 20, True, comm=comm)
        x, idx = torch.zeros((2, 128), dtype=torch.bfloat16), torch.zeros((2, 1), dtype=torch.int64)
        _, _, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, np.int64(2), np.int64(1), use_fp8=False
        )
        assert [type(each) for each in handle[2:]] == [int, int, int]
        y = torch.zeros((1, 2, 128), dtype=torch.bfloat16)
        buffer.low_latency_combine(y, idx, torch.ones((2, 1)), handle)

    launch.run_threads(body, 1)


def test_a_group_and_a_size_that_are_none() -> None:
    with pytest.raises(
        TypeError, match=r"group is 3 of type int, expected a torch\.distributed process"
    ):
        Buffer(3, 1024)
    with pytest.raises(
        launch.RankFailedError, match=r"num_nvl_bytes is 2000000000\.0, a float, but must be an int"
    ):
        launch.run_threads(lambda comm: Buffer(None, 2e9, comm=comm), 1)  # type: ignore[arg-type]
