"""Low-latency calls of `Buffer` on the CPU backend; ranks are processes, threads, or one alone."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from typing import Any

import pytest
import torch

from epjit import Buffer, CommunicationError
from epjit.checks import match
from epjit.config import (
    MAX_LOW_LATENCY_CHOICES,
    MAX_LOW_LATENCY_EXPERTS,
    MAX_LOW_LATENCY_TOKENS,
)
from epjit.handles import routes
from epjit.kernels.low_latency import LowLatencyCombineShape, LowLatencyReducedCombineConfig
from epjit.modes.low_latency import _Arena
from epjit.reference import low_latency as reference
from epjit.runtime import sources
from tests.harness import launch
from tests.harness.data import ROUTING_KINDS, assert_rows_equal, payload
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
from tests.scenarios import low_latency, normal

CPU = {"EPJIT_BACKEND": "cpu"}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")


def make(comm: Any, num_rdma_bytes: int = ROOM, **options: Any) -> Buffer:
    return Buffer(None, 0, num_rdma_bytes, low_latency_mode=True, comm=comm, **options)


def run(body: Any, num_ranks: int, **options: Any) -> list[Any]:
    """Runs ``body(buffer)`` on every rank, a thread each."""
    return launch.run_threads(lambda comm: body(make(comm, **options)), num_ranks, timeout=120)


# ---- results ---------------------------------------------------------------------------


@pytest.mark.parametrize("row_format", list(BY_NAME))
@pytest.mark.parametrize("how", ["sync", "async", "hook"])
def test_formats(row_format: str, how: Any) -> None:
    """Every format with every flag, over every routing; NaN lies where nothing arrived."""

    def body(buffer: Buffer) -> None:
        for seed, kind in enumerate(ROUTING_KINDS):
            check_low_latency_round(
                buffer,
                LowLatencyRound(
                    num_tokens=(9, 0, 13),
                    num_experts=12,
                    kind=kind,
                    seed=seed,
                    row_format=row_format,
                    num_dispatches=1 + seed % 2,
                    zero_copy=seed % 3 == 1,
                    use_logfmt=seed % 3 == 2,
                    with_extras=seed % 2 == 0,
                    how=how,
                ),
            )

    run(body, 3)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_random_rounds_of_threads(num_ranks: int) -> None:
    def body(buffer: Buffer) -> None:
        low_latency.rounds(buffer, 30, 32)

    run(body, num_ranks)


@pytest.mark.parametrize(("num_ranks", "domain"), [(2, 1), (8, 2), (16, 8), (15, 5)])
def test_random_rounds_between_domains(num_ranks: int, domain: int) -> None:
    def body(buffer: Buffer) -> None:
        assert buffer.runtime is not None
        assert buffer.runtime.get_num_rdma_ranks() == num_ranks // domain
        low_latency.rounds(buffer, 12, 16)

    run(body, num_ranks, nvlink_domain=domain)


@pytest.mark.parametrize(
    ("op", "variant", "options", "message"),
    [
        ("COMBINE", "reduced", {"nvlink_domain": 2}, "=reduced works in one NVLink domain only"),
        ("COMBINE", "lines", {"nvlink_domain": 2}, "=lines works in one NVLink domain only"),
        ("DISPATCH", "lines", {"nvlink_domain": 2}, "=lines works in one NVLink domain only"),
        ("COMBINE", "lines", {"enable_shrink": True}, "=lines works without enable_shrink only"),
        ("DISPATCH", "lines", {"enable_shrink": True}, "=lines works without enable_shrink only"),
    ],
)
def test_variants_that_do_not_serve_a_buffer(
    op: str, variant: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"EPJIT_LOW_LATENCY_{op}_VARIANT"
    monkeypatch.setenv(name, variant)
    with pytest.raises(launch.RankFailedError, match=name + message):
        run(lambda buffer: None, 4, **options)


@pytest.mark.parametrize("num_ranks", [1, 3, 4, 8])
@pytest.mark.parametrize("num_topk", [1, 8, 32])
def test_words_of_sums_before_the_links(num_ranks: int, num_topk: int) -> None:
    """One a piece of a row and one a weight: there is room, or the call says that there is not."""
    shape = LowLatencyCombineShape(8 * num_ranks, 7168, num_topk, True, False)
    config = LowLatencyReducedCombineConfig.choose(shape, num_ranks=num_ranks)
    most = min(MAX_LOW_LATENCY_TOKENS // num_ranks, MAX_LOW_LATENCY_CHOICES // num_topk)
    for max_tokens in (1, 8, 128, 300, 2048, most):
        num_words = num_ranks * max_tokens * num_topk  # and at least one a row
        room = _Arena(num_ranks, 0).words_stride - num_words
        if room < num_ranks * max_tokens:
            with pytest.raises(ValueError, match=f"{max_tokens} tokens with top-{num_topk} have"):
                config.num_parts(max_tokens)
        else:
            assert num_ranks * max_tokens * config.num_parts(max_tokens) <= room


def test_a_selection_travels_in_one_word() -> None:
    """Its expert above its position: of the most there may be none looks like another, or none."""
    text = sources.read("low_latency/dispatch.cu")
    (bits,) = re.findall(r"kPositionBits = (\d+);", text)
    assert 1 << int(bits) >= MAX_LOW_LATENCY_CHOICES
    assert MAX_LOW_LATENCY_EXPERTS < 1 << 32 - int(bits)


def test_sent_weights_need_no_words() -> None:
    """Only pieces of rows do, and for these there is room however many tokens there are."""
    for num_ranks in (1, 3, 8):
        shape = LowLatencyCombineShape(8 * num_ranks, 7168, 32, True, False, weights_sent=True)
        config = LowLatencyReducedCombineConfig.choose(shape, num_ranks=num_ranks)
        for max_tokens in (1, 128, 2048, MAX_LOW_LATENCY_TOKENS // num_ranks):
            num_words = num_ranks * max_tokens * config.num_parts(max_tokens)
            assert num_words <= _Arena(num_ranks, 0).words_stride


@pytest.mark.parametrize(
    ("variant", "changes", "domain", "reduces"),
    [
        ("auto", {}, None, True),
        ("auto", {"how": "hook"}, None, True),
        ("auto", {"weights_sent": False}, None, False),
        ("auto", {"use_logfmt": True}, None, False),
        ("auto", {}, 1, False),
        ("ldst", {}, None, False),
        ("lines", {}, None, False),
        ("reduced", {"weights_sent": False}, None, True),
    ],
)
def test_where_sums_are_made_before_the_links(
    variant: str,
    changes: dict[str, Any],
    domain: int | None,
    reduces: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By auto where the dispatch was given the weights: each rank's sum is rounded."""
    if domain is None:
        monkeypatch.setenv("EPJIT_LOW_LATENCY_COMBINE_VARIANT", variant)
    case = LowLatencyRound((9, 12), hidden=128, **{"weights_sent": True, **changes})

    def body(buffer: Buffer) -> None:
        ranked = RankRound(buffer, case)
        ranked.dispatch(0)
        ranked.combine(0)
        made, rank = ranked.made.exchanges[0], buffer.rank
        returned = [
            reference.collect(output, each.src_info, 2)
            for output, each in zip(made.outputs, made.dispatched, strict=True)
        ]
        given = (returned, rank, made.inputs[rank].topk_idx, made.weights[rank])
        flags = {"num_experts": case.num_experts, "use_logfmt": case.use_logfmt}
        want, other = (
            reference.combine(*given, **flags, reduced=way) for way in (reduces, not reduces)
        )
        combined = ranked.queued[0].combined
        assert combined is not None
        assert torch.equal(combined, want)
        assert not torch.equal(combined, other)

    run(body, 2, nvlink_domain=domain)


def test_several_domains_take_memory_for_what_leaves() -> None:
    """Twice as much as the send buffer, behind all that there is in one domain."""
    one, several = (_Arena(4, 1 << 20, remote=remote) for remote in (False, True))
    assert one.total == one.staging == one.words + 2 * one.words_stride * 8
    assert several.staging >= several.words + 2 * several.words_stride * 8
    assert several.staging_half_bytes >= (1 << 20) - several.send_buffer
    assert several.total == several.staging + 2 * several.staging_half_bytes


def test_rows_to_other_domains_need_the_send_buffer() -> None:
    """Also without zero_copy: a buffer that one domain could do with is too small."""
    tokens, hidden, experts = 8, 128, 64
    # What arrives takes less than what is sent, since each rank has many experts.
    needed = 2 * experts * tokens * 2 * hidden
    small = needed // 2

    def body(buffer: Buffer) -> str:
        x = torch.zeros((tokens, hidden), dtype=torch.bfloat16)
        idx = torch.zeros((tokens, 1), dtype=torch.int64)
        weights = torch.ones((tokens, 1))
        rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, tokens, experts, use_fp8=False)
        assert isinstance(rows, torch.Tensor)
        try:
            buffer.low_latency_combine(rows, idx, weights, handle)
        except ValueError as error:
            return str(error)
        return ""

    def run_with(domain: int | None) -> list[str]:
        return launch.run_threads(
            lambda comm: body(make(comm, small, nvlink_domain=domain)), 2, timeout=60
        )

    assert run_with(None) == ["", ""]
    assert all(f"num_rdma_bytes >= {needed}" in text for text in run_with(1))


@pytest.mark.parametrize(("num_ranks", "num_rounds"), [(2, 40), (3, 30), (4, 20)])
def test_random_rounds_of_processes(num_ranks: int, num_rounds: int) -> None:
    """Rounds of the normal mode lie between them, on the same buffers."""
    done = launch.run(low_latency.random_rounds, num_ranks, CPU, num_rounds, 32, 4)
    assert done == [num_rounds] * num_ranks


def test_hidden_sizes() -> None:
    """Sizes that V1's list has not: 16 bytes a row, odd multiples, the longest row."""

    def body(buffer: Buffer) -> None:
        for seed, (hidden, row_format) in enumerate(
            (
                (8, "bf16"),
                (24, "bf16"),
                (1000, "bf16"),
                (16384, "bf16"),
                (384, "fp8"),
                (1536, "fp8_ue8m0"),
                (32, "mxfp8"),
                (32, "nvfp4"),
                (2880, "nvfp4"),
            )
        ):
            check_low_latency_round(
                buffer,
                LowLatencyRound(
                    num_tokens=(4, 7),
                    hidden=hidden,
                    num_experts=6,
                    num_topk=3,
                    seed=seed,
                    row_format=row_format,
                ),
            )

    run(body, 2)


def test_32_choices() -> None:
    def body(buffer: Buffer) -> None:
        for how in ("sync", "hook"):
            check_low_latency_round(
                buffer,
                LowLatencyRound(
                    num_tokens=(6, 5, 0), num_experts=48, num_topk=32, zero_copy=True, how=how
                ),
            )

    run(body, 3)


def test_no_tokens_anywhere() -> None:
    def body(buffer: Buffer) -> None:
        for row_format in BY_NAME:
            check_low_latency_round(
                buffer, LowLatencyRound(num_tokens=(0, 0), row_format=row_format)
            )

    run(body, 2)


def test_the_hint_is_enough() -> None:
    sizes = (5, 256, 2, 8)
    hint = Buffer.get_low_latency_rdma_size_hint(*sizes)

    def body(buffer: Buffer) -> None:
        case = LowLatencyRound(
            num_tokens=(5, 5), hidden=256, num_experts=8, num_topk=8, zero_copy=True
        )
        assert make_low_latency(case).max_tokens == 5
        check_low_latency_round(buffer, case)

    run(body, 2, num_rdma_bytes=hint)


def test_graph_steps_run_eagerly() -> None:
    """The scenarios of the GPU tier, without a GPU."""
    for use_hooks in (False, True):
        run(lambda buffer, use=use_hooks: low_latency.replays(buffer, 8, 6, use_hooks=use), 2)


def test_both_modes_on_one_buffer() -> None:
    def body(comm: Any) -> None:
        buffer = Buffer(None, 1 << 16, ROOM, low_latency_mode=True, comm=comm)
        low_latency.rounds(buffer, 12, 16, num_sms=4)

    launch.run_threads(body, 2)


def test_ambient_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        run(lambda buffer: low_latency.rounds(buffer, 6, 16), 2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_scratch_over_the_whole_buffer() -> None:
    launch.run(low_latency.overwritten, 2, CPU)


def test_ranks_that_are_set_up_differently() -> None:
    launch.run(low_latency.set_up_differently, 2, CPU)


def test_cumulative_stats_add_up() -> None:
    def body(buffer: Buffer) -> None:
        case = LowLatencyRound(num_tokens=(5, 8), num_dispatches=2, with_extras=True)
        check_low_latency_round(buffer, case)

    run(body, 2)


def test_gradients_are_not_recorded() -> None:
    def body(buffer: Buffer) -> None:
        x = payload(0, 4, 64, torch.bfloat16).requires_grad_()
        idx = torch.zeros((4, 1), dtype=torch.int64)
        weights = torch.ones((4, 1), dtype=torch.float32).requires_grad_()
        recv_x, _, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, 4, 1, use_fp8=False, return_recv_hook=True
        )
        hook()
        combined, _, hook = buffer.low_latency_combine(
            recv_x, idx, weights, handle, return_recv_hook=True
        )
        hook()
        assert not recv_x.requires_grad
        assert not combined.requires_grad
        assert_rows_equal(combined, x, "combined_x")

    body(make(launch.Alone()))


# ---- members ---------------------------------------------------------------------------


def test_attributes_and_memory() -> None:
    buffer = Buffer(
        None,
        256,
        4096,
        True,
        num_qps_per_rank=72,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=True,
        enable_shrink=True,
        comm=launch.Alone(),
    )
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (256, 4096)
    assert (buffer.low_latency_mode, buffer.enable_shrink) == (True, True)
    whole = buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
    assert whole.numel() == 4096
    assert not whole.any()
    assert buffer.get_local_buffer_tensor(torch.uint8).numel() == 256
    shaped = buffer.runtime.get_local_buffer_tensor(torch.bfloat16, 64, True)
    assert shaped.shape == (2016,)
    assert shaped.data_ptr() == whole.data_ptr() + 64
    whole.fill_(7)
    assert not buffer.get_local_buffer_tensor(torch.uint8).any()


def test_send_buffer_is_part_of_the_memory() -> None:
    """As V1's: a view into the exposed buffer, for index assignment."""
    buffer = make(launch.Alone(), 1 << 20)
    idx = torch.zeros((3, 1), dtype=torch.int64)
    handle = buffer.low_latency_dispatch(
        payload(0, 3, 128, torch.bfloat16), idx, 4, 2, use_fp8=False
    )[2]
    view = buffer.get_next_low_latency_combine_buffer(handle)
    assert view.shape == (2, 4, 128)
    assert view.dtype == torch.bfloat16
    view[:, :, :] = 1.0
    whole = buffer.get_local_buffer_tensor(torch.bfloat16, use_rdma_buffer=True)
    assert int((whole == 1.0).sum()) == view.numel()


def test_event_and_hook_are_none_unless_asked_for() -> None:
    """TRT-LLM asserts it; the event keeps the tensors of the call alive."""
    buffer = make(launch.Alone())
    x, idx = payload(0, 4, 128, torch.bfloat16), torch.zeros((4, 1), dtype=torch.int64)
    recv_x, count, handle, event, hook = buffer.low_latency_dispatch(x, idx, 4, 1)
    assert event.event is None
    assert event.extra_tensors is None
    assert hook is None
    assert isinstance(recv_x, tuple)
    assert isinstance(handle, tuple)
    assert handle[2:] == (4, 128, 1)
    assert count.tolist() == [4]
    recv_x, _, handle, event, hook = buffer.low_latency_dispatch(x, idx, 4, 1, async_finish=True)
    assert event.event is not None
    assert hook is None
    kept = {tensor.data_ptr() for tensor in event.extra_tensors if tensor is not None}
    assert {x.data_ptr(), idx.data_ptr(), recv_x[0].data_ptr(), handle[0].data_ptr()} <= kept
    with event:
        pass


def test_dispatch_takes_its_inputs_at_the_call() -> None:
    """Between the call and the hook they may be written to, as the next layer does."""

    def body(buffer: Buffer) -> None:
        case = LowLatencyRound(num_tokens=(5, 6))
        made = make_low_latency(case)
        own = made.exchanges[0].inputs[buffer.rank]
        x, idx = own.x.clone(), own.topk_idx.clone()
        recv_x, count, _, _, hook = buffer.low_latency_dispatch(
            x, idx, made.max_tokens, case.num_experts, return_recv_hook=True, **FLAGS["bf16"]
        )
        x.fill_(torch.nan)
        idx.fill_(-1)
        hook()
        want = made.exchanges[0].dispatched[buffer.rank]
        assert torch.equal(count, want.recv_count)
        for expert, rows in enumerate(count.tolist()):
            assert_rows_equal(recv_x[expert, :rows], want.recv_x[expert, :rows], "recv_x")

    run(body, 2)


def test_one_operation_waits_for_its_hook() -> None:
    buffer = make(launch.Alone(), enable_shrink=True)
    x, idx = payload(0, 4, 128, torch.bfloat16), torch.zeros((4, 1), dtype=torch.int64)
    weights = torch.ones((4, 1), dtype=torch.float32)

    def dispatch(**flags: Any) -> Any:
        return buffer.low_latency_dispatch(x, idx, 4, 1, use_fp8=False, **flags)

    recv_x, _, handle, _, hook = dispatch(return_recv_hook=True)
    said = "hook that low_latency_dispatch returned has not been called.*call that hook first"
    for refused in (
        dispatch,
        lambda: buffer.low_latency_combine(recv_x, idx, weights, handle),
        lambda: buffer.clean_low_latency_buffer(4, 128, 1),
    ):
        with pytest.raises(RuntimeError, match=said):
            refused()
    # These start nothing.
    buffer.get_next_low_latency_combine_buffer(handle)
    buffer.low_latency_clean_mask_buffer()
    hook()
    with pytest.raises(RuntimeError, match="called already"):
        hook()
    *_, hook = buffer.low_latency_combine(recv_x, idx, weights, handle, return_recv_hook=True)
    with pytest.raises(RuntimeError, match="hook that low_latency_combine returned"):
        dispatch()
    buffer.reset()
    with pytest.raises(RuntimeError, match="or the Buffer was reset"):
        hook()
    dispatch()


def test_hook_from_another_thread() -> None:
    """As vLLM's micro-batches do."""
    buffer = make(launch.Alone())
    idx = torch.zeros((4, 1), dtype=torch.int64)
    _, count, _, _, hook = buffer.low_latency_dispatch(
        payload(0, 4, 128, torch.bfloat16), idx, 4, 1, return_recv_hook=True
    )
    thread = threading.Thread(target=hook)
    thread.start()
    thread.join()
    assert count.tolist() == [4]


def test_calls_from_fresh_threads() -> None:
    launch.run(low_latency.fresh_threads, 2, CPU)


def test_destroy() -> None:
    buffer = make(launch.Alone(), explicitly_destroy=True)
    idx = torch.zeros((4, 1), dtype=torch.int64)
    *_, hook = buffer.low_latency_dispatch(
        payload(0, 4, 128, torch.bfloat16), idx, 4, 1, return_recv_hook=True
    )
    buffer.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        hook()


def test_the_last_reference_frees() -> None:
    """At once, without the cyclic collector, once hook and results are gone."""
    gc.disable()
    try:
        buffer = make(launch.Alone())
        idx = torch.zeros((4, 1), dtype=torch.int64)
        results = buffer.low_latency_dispatch(
            payload(0, 4, 128, torch.bfloat16), idx, 4, 1, return_recv_hook=True
        )
        results[-1]()
        gone = weakref.ref(buffer)
        del buffer, results
        assert gone() is None
    finally:
        gc.enable()


def test_warmup_is_accepted() -> None:
    make(launch.Alone()).low_latency_warmup(128, 7168, 256, num_topk=8, quantization="nvfp4")


# ---- masks -----------------------------------------------------------------------------


def test_masks() -> None:
    """Masked ranks' rows are neither used nor counted, until the mask is taken away."""
    case = LowLatencyRound(num_tokens=(6, 7, 5), num_experts=6, num_topk=3)
    masked = torch.tensor([0, 0, 1], dtype=torch.int32)

    def body(buffer: Buffer) -> None:
        status = torch.full((3,), 9, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 0, 0]
        check_low_latency_round(buffer, case)
        if buffer.rank == 2:
            # It takes part, since nothing runs out of time here; whose rows it gets is no matter.
            ranked = RankRound(buffer, case)
            ranked.dispatch(0)
            ranked.combine(0)
            buffer.clean_low_latency_buffer(8, case.hidden, case.num_experts)
        else:
            buffer.low_latency_update_mask_buffer(2, True)
            low_latency.round_without(buffer, case, masked, 0)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0, 0, 1]
            buffer.low_latency_update_mask_buffer(1, True)
            buffer.low_latency_update_mask_buffer(2)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0, 1, 0]
            buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 0, 0]
        check_low_latency_round(buffer, case)

    run(body, 3, enable_shrink=True)


# ---- ranks that do not agree, or do not come -------------------------------------------


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("format", "on format: rank 0 has fp8, rank 1 has bf16"),
        ("max tokens", "on num_max_dispatch_tokens_per_rank: rank 0 has 8, rank 1 has 9"),
        ("experts", "on num_experts: rank 0 has 4, rank 1 has 8"),
        ("topk", "on num_topk: rank 0 has 2, rank 1 has 1"),
        ("weights", "on topk_weights: rank 0 has none, rank 1 has some"),
        ("operation", "operation: rank 0 has low_latency_dispatch, rank 1 has clean_low_latency"),
    ],
)
def test_every_rank_is_told_of_a_mismatch(what: str, text: str) -> None:
    def body(buffer: Buffer) -> None:
        last = buffer.rank == 1
        topk = 1 if last and what == "topk" else 2
        idx = torch.zeros((4, topk), dtype=torch.int64)
        with pytest.raises(ValueError, match=text):  # noqa: PT012
            if last and what == "operation":
                buffer.clean_low_latency_buffer(8, 128, 4)
            else:
                buffer.low_latency_dispatch(
                    payload(buffer.rank, 4, 128, torch.bfloat16),
                    idx,
                    9 if last and what == "max tokens" else 8,
                    8 if last and what == "experts" else 4,
                    use_fp8=not (last and what == "format"),
                    topk_weights=torch.ones(idx.shape) if last and what == "weights" else None,
                )

    run(body, 2)


def test_global_scales_that_differ() -> None:
    def body(buffer: Buffer) -> None:
        with pytest.raises(ValueError, match=r"on global_scale: rank 0 has 1\.0, rank 1 has 2\.0"):
            buffer.low_latency_dispatch(
                payload(buffer.rank, 4, 128, torch.bfloat16),
                torch.zeros((4, 1), dtype=torch.int64),
                8,
                2,
                quantization="nvfp4",
                global_scale=torch.tensor([1.0 + buffer.rank]),
            )

    run(body, 2)


def test_more_rows_than_a_slab() -> None:
    """Only repeated choices can do that."""

    def body(buffer: Buffer) -> None:
        idx = torch.zeros((4, 3), dtype=torch.int64)
        x = payload(buffer.rank, 4, 128, torch.bfloat16)
        if buffer.rank == 0:
            with pytest.raises(ValueError, match="expert 0 gets 24 rows, but its slab has 8"):
                buffer.low_latency_dispatch(x, idx, 4, 2)
        else:
            buffer.low_latency_dispatch(x, idx, 4, 2)

    run(body, 2)


def test_withheld_process() -> None:
    cases = normal.cases_of(low_latency.OPS, 3)
    texts = launch.run(low_latency.withheld, 3, CPU, cases, 1.0)
    normal.assert_all_but_the_absent(texts, cases)


def test_withheld_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "1")

    def body(buffer: Buffer) -> None:
        if buffer.rank == 0:
            with pytest.raises(CommunicationError, match="rank 1"):
                buffer.clean_low_latency_buffer(8, 128, 2)
        else:
            time.sleep(0.5)  # so that this rank still waits in reset() when the other has given up
        buffer.reset()
        check_low_latency_round(buffer, random_low_latency_round(2, 5, max_tokens=8))

    run(body, 2)


def test_routes_survive_a_view() -> None:
    """The handle's tensor keeps what lies behind it, also on the way through autograd."""
    buffer = make(launch.Alone())
    idx = torch.tensor([[1, 0], [0, -1]])
    *_, handle, _, _ = buffer.low_latency_dispatch(payload(0, 2, 128, torch.bfloat16), idx, 2, 2)
    tokens, rows, _ = routes(handle[0].detach(), num_ranks=1)
    assert handle[0][0].tolist()[:2] == [0, 1]
    assert tokens.tolist() == [2]
    assert rows.tolist() == [[[2, 0], [1, -1]]]


def test_checks_remember_only_what_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of equal calls is not checked in full; one that differs anywhere is."""
    monkeypatch.setattr(match, "MOST_REMEMBERED", 8)  # and forgetting is harmless
    buffer = make(launch.Alone())
    x = payload(0, 4, 512, torch.bfloat16)
    idx, weights = torch.tensor([[0, 1]] * 4), torch.ones(4, 2)
    y, out = torch.zeros((2, 4, 512), dtype=torch.bfloat16), torch.empty_like(x)
    shifted = torch.zeros(2 * 4 * 512 + 1, dtype=torch.bfloat16)[1:]

    def dispatch(
        x: Any = x, idx: Any = idx, tokens: int = 4, experts: int = 2, **flags: Any
    ) -> Any:
        return buffer.low_latency_dispatch(x, idx, tokens, experts, use_fp8=False, **flags)[2]

    handle = dispatch()

    def combine(
        y: Any = y, idx: Any = idx, weights: Any = weights, handle: Any = handle, **flags: Any
    ) -> None:
        buffer.low_latency_combine(y, idx, weights, handle, **{"out": out, **flags})

    src_info, layout_range, *sizes = handle
    for _ in range(20):
        dispatch()
        combine()
        for wrong in (
            lambda: dispatch(x=x.float()),
            lambda: dispatch(x=x.t().contiguous().t()),
            lambda: dispatch(x=shifted[: 4 * 512].view(4, 512)),
            lambda: dispatch(x=None),
            lambda: dispatch(idx=idx[:3]),
            lambda: dispatch(tokens=3),
            lambda: dispatch(experts=0),
            lambda: dispatch(topk_weights=weights.double()),
            lambda: dispatch(topk_weights=weights[:, :1]),
            lambda: dispatch(cumulative_local_expert_recv_stats=torch.zeros(2)),
            lambda: combine(y=y[:, :3]),
            lambda: combine(y=shifted.view(2, 4, 512)),
            lambda: combine(weights=weights.double()),
            lambda: combine(idx=idx.float()),
            lambda: combine(out=shifted[: 4 * 512].view(4, 512)),
            lambda: combine(use_logfmt=True, zero_copy=True),
            lambda: combine(handle=(src_info.clone(), layout_range, *sizes)),
            lambda: combine(handle=(src_info, layout_range.int(), *sizes)),
            lambda: combine(handle=(src_info, layout_range, 4, 512, 3)),
            lambda: combine(handle=None),
        ):
            with pytest.raises((TypeError, ValueError)):
                wrong()
    assert torch.equal(out, torch.zeros_like(out))
