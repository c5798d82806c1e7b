"""`ElasticBuffer` on the CPU backend, ranks being threads, against the brute-force reference."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epjit import Buffer, ElasticBuffer, EPBuffer, EventHandle, EventOverlap, elastic
from epjit.calls import Describe, ElasticDispatch
from epjit.handles import EPHandle, IntranodeHandle
from epjit.kernels.elastic import DescribeConfig, SumConfig
from epjit.modes.cpu import CpuNormal
from epjit.modes.elastic import Elastic
from epjit.reference import elastic as reference
from epjit.reference import intranode
from epjit.reference.expert_major import unpermute as reference_unpermute
from epjit.scope import CpuScope, _tensors
from epjit.sizes import align
from tests.cpu.test_expert_major import copied
from tests.cpu.test_expert_major import run as run_emulated
from tests.emulation import build
from tests.emulation.build import guarded
from tests.harness import launch
from tests.rounds.elastic import EDGES, check_round, defined_rows, random_round
from tests.scenarios.elastic import (
    PUBLIC,
    from_public_fields,
    in_turns,
    of_one_rounding,
    public_copy,
    replays,
)

SIZE = 2 << 20


def rounds_of(comm: Any, first: int, num_rounds: int, multiple_reduction: bool = True) -> None:
    buffer = ElasticBuffer(None, SIZE, comm=comm, allow_multiple_reduction=multiple_reduction)
    for seed in range(first, first + num_rounds):
        check_round(buffer, random_round(buffer.num_ranks, seed, num_sms=4, max_tokens=24))


@pytest.mark.parametrize(("num_ranks", "num_rounds"), [(1, 60), (2, 300), (3, 60), (8, 20)])
def test_random_rounds(num_ranks: int, num_rounds: int) -> None:
    launch.run_threads(rounds_of, num_ranks, 100 * num_ranks, num_rounds, timeout=200)


@pytest.mark.parametrize(("num_ranks", "num_rounds"), [(1, 20), (2, 30), (4, 30)])
def test_random_rounds_in_which_each_row_travels(num_ranks: int, num_rounds: int) -> None:
    launch.run_threads(rounds_of, num_ranks, 7000 + 100 * num_ranks, num_rounds, False, timeout=200)


def test_rows_that_are_undefined_are_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU rows of an earlier call lie there; the CPU's backend happens to have zeros."""
    dispatch = Elastic.dispatch

    def dirty(self: Elastic, scope: Any, call: ElasticDispatch) -> Any:
        received, used = dispatch(self, scope, call)
        if call.do_expand:
            undefined = ~defined_rows(received.handle, zero_padding=call.zero_padding)
            for tensor in (received.recv_x, received.recv_topk_weights):
                if tensor is not None:
                    tensor[undefined] = 7.0
        return received, used

    monkeypatch.setattr(Elastic, "dispatch", dirty)

    def worker(comm: Any) -> None:
        buffer = ElasticBuffer(None, SIZE, comm=comm)
        for seed in range(30):
            case = random_round(2, 12000 + seed, num_sms=4, max_tokens=24)
            check_round(buffer, replace(case, expand=True, alignment=8, fp8=None))
        replays(buffer, 5, 16, 4, expand=True)

    launch.run_threads(worker, 2)


@pytest.mark.parametrize("multiple_reduction", [True, False])
@pytest.mark.parametrize(("num_ranks", "domain"), [(4, 2), (6, 3), (6, 2)])
def test_random_rounds_between_domains(
    num_ranks: int, domain: int, multiple_reduction: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All as in one domain, but for the order of additions."""
    monkeypatch.setenv("EPJIT_NVLINK_DOMAIN", str(domain))

    def worker(comm: Any) -> None:
        buffer = ElasticBuffer(None, SIZE, comm=comm, allow_multiple_reduction=multiple_reduction)
        sizes = num_ranks // domain, domain
        assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == sizes
        own = buffer.scaleout_rank_idx, buffer.scaleup_rank_idx
        assert own == divmod(buffer.rank_idx, domain)
        for seed in range(20):
            check_round(buffer, random_round(num_ranks, 9000 + seed, num_sms=12, max_tokens=24))

    launch.run_threads(worker, num_ranks, timeout=200)


@pytest.mark.parametrize("multiple_reduction", [True, False])
def test_edges(multiple_reduction: bool) -> None:
    def worker(comm: Any) -> None:
        buffer = ElasticBuffer(None, SIZE, comm=comm, allow_multiple_reduction=multiple_reduction)
        for case in EDGES:
            check_round(buffer, case)

    launch.run_threads(worker, 3)


# ---- the kernel ----------------------------------------------------------------------------------

DESCRIBED = [(1, 1, 40), (3, 5, 4), (8, 32, 5)]  # ranks, choices, experts of a rank


@pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize(
    ("num_ranks", "num_topk", "num_local"), [(1, 1, 40), (3, 5, 4), (8, 32, 5)]
)
def test_describe_kernel(num_ranks: int, num_topk: int, num_local: int, expand: bool) -> None:
    wide, num_experts, max_tokens = num_topk != 5, num_ranks * num_local, 20
    generator = torch.Generator().manual_seed(num_topk)
    inputs = []
    for rank in range(num_ranks):
        num_tokens = (19, 0, 7)[rank % 3]
        scores = torch.rand(num_tokens, num_experts, generator=generator)
        idx = scores.argsort(dim=1)[:, :num_topk].to(torch.int64 if wide else torch.int32)
        idx[torch.rand(idx.shape, generator=generator) < 0.3] = -1
        _, per_expert, in_rank = intranode.layout(idx, num_experts, num_ranks)
        x, weights = torch.zeros(num_tokens, 8), torch.zeros(idx.shape)
        inputs.append(intranode.RankInput(x, None, copied(idx), weights, in_rank, per_expert))
    rank, num_rows = num_ranks - 1, 0 if expand else num_ranks * max_tokens
    sent = intranode.dispatch(inputs, rank, num_experts=num_experts, num_worst_tokens=num_rows)
    handle, recv_idx = sent.handle, sent.recv_topk_idx
    assert isinstance(handle, IntranodeHandle)
    assert recv_idx is not None
    columns = torch.arange(recv_idx.numel(), dtype=torch.int32).view(recv_idx.shape)
    columns.masked_fill_(recv_idx < 0, -1)
    topk_idx = inputs[rank].topk_idx
    assert topk_idx is not None

    def filled() -> Describe:
        ints = {"dtype": torch.int32}
        return Describe(
            topk_idx,
            copied(handle.send_head),
            copied(handle.rank_prefix_matrix)[:, rank],
            copied(handle.recv_src_idx),
            None if expand else copied(recv_idx),
            copied(columns) if expand else None,
            copied(handle.recv_expert_counts),
            guarded(num_ranks, **ints),
            guarded(num_local, **ints),
            copied(torch.arange(num_local, dtype=torch.int32)) if expand else None,
            guarded(len(recv_idx), num_topk + 2, **ints),
            guarded(*topk_idx.shape, **ints),
            guarded(*topk_idx.shape, dtype=topk_idx.dtype) if expand else None,
        )

    want, got = filled(), filled()
    reference.describe(want, rank, max_tokens=max_tokens, alignment=8)
    run_emulated(
        DescribeConfig(num_topk, wide),
        3,
        1,
        **{name: 0 if tensor is None else tensor for name, tensor in got._asdict().items()},
        source_stride=num_ranks,
        token_stride=1,
        num_tokens=len(topk_idx),
        num_rows=len(recv_idx),
        num_ranks=num_ranks,
        num_local=num_local,
        rank=rank,
        max_tokens=max_tokens,
        alignment=8,
    )
    for name, mine, theirs in zip(want._fields, got, want, strict=True):
        assert (mine is None) == (theirs is None), name
        if theirs is not None:
            assert torch.equal(mine, theirs), name


@pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")
@pytest.mark.parametrize(
    ("num_tokens", "num_topk", "hidden", "dtype", "num_biases"),
    [
        (0, 2, 8, torch.bfloat16, 1),
        (1, 1, 8, torch.float16, 0),
        (5, 3, 1104, torch.bfloat16, 1),
        (33, 4, 64, torch.float16, 2),
    ],
)
def test_sum_kernel(
    num_tokens: int, num_topk: int, hidden: int, dtype: torch.dtype, num_biases: int
) -> None:
    """Sums that tell in which order they were added: large numbers cancel."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (num_tokens, 2 + num_topk, hidden)
    values = torch.randn(shape, generator=generator)
    values[..., ::2] = torch.randint(-1, 2, shape, generator=generator)[..., ::2] * 2.0**15
    parts = [copied(part) for part in values.to(dtype).split([1, 1, num_topk], dim=1)]
    biases = [None if i >= num_biases else copied(parts[i][:, 0]) for i in range(2)]
    want, got = (guarded(num_tokens, hidden, dtype=dtype) for _ in range(2))
    reference.add_choices(parts[2], biases, want)
    run_emulated(
        SumConfig(2 * hidden, num_topk, dtype == torch.float16),
        3,
        1,
        rows=parts[2],
        bias_0=0 if biases[0] is None else biases[0],
        bias_1=0 if biases[1] is None else biases[1],
        out=got,
        num_tokens=num_tokens,
    )
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


# ---- the tensors of a handle are its state -------------------------------------------------------


def step(buffer: ElasticBuffer, seed: int = 0, **options: Any) -> Any:
    """A dispatch of ten tokens: what it returns, with the rows of the experts as they came."""
    generator = torch.Generator().manual_seed(seed + buffer.rank_idx)
    x = torch.randn(10, 64, generator=generator).to(torch.bfloat16)
    idx = torch.rand(10, 8, generator=generator).argsort(dim=1)[:, :3].contiguous()
    weights = torch.rand(10, 3, generator=generator)
    options = {"num_experts": 8, "num_max_tokens_per_rank": 16, **options}
    return x, *buffer.dispatch(x, idx, weights, **options)


def with_buffer(body: Callable[[ElasticBuffer], None], num_ranks: int = 2, **options: Any) -> None:
    def worker(comm: Any) -> None:
        body(ElasticBuffer(None, SIZE, comm=comm, **options))

    launch.run_threads(worker, num_ranks)


def test_rows_that_were_moved_are_found_by_the_metadata() -> None:
    """As LightLLM does: its product leaves a row a token, and it rewrites the metadata."""

    def body(buffer: ElasticBuffer) -> None:
        _, rows, _, _, handle, _ = step(buffer, do_expand=True, expert_alignment=8)
        want, _, _ = buffer.combine(rows, handle)
        metadata = handle.recv_src_metadata
        sums = reference_unpermute(rows, metadata[:, 2:].contiguous())
        metadata[:, 2:] = -1
        metadata[:, 2] = torch.arange(len(metadata), dtype=torch.int32)
        assert sums.shape != rows.shape
        got, _, _ = buffer.combine(sums, handle)
        assert torch.equal(got, want)

    with_buffer(body)


def test_a_cached_dispatch_follows_the_metadata() -> None:
    def body(buffer: ElasticBuffer) -> None:
        x, rows, _, weights, handle, _ = step(buffer, do_expand=True)
        places = handle.recv_src_metadata[:, 2:]
        places.copy_(torch.where(places >= 0, len(rows) - 1 - places, -1))
        options = {"topk_weights": torch.ones(10, 3), "handle": handle, "do_expand": True}
        again, _, ones, _, _ = buffer.dispatch(x, **options)
        assert torch.equal(again, rows.flip(0))
        assert ones.shape == weights.shape
        assert bool((ones == 1).all())
        handle.recv_src_metadata = handle.recv_src_metadata.t().contiguous().t()
        with pytest.raises(ValueError, match=r"recv_src_metadata.*contiguous"):
            buffer.combine(rows, handle)

    with_buffer(body)


@pytest.mark.parametrize("expand", [False, True])
def test_a_handle_may_be_cut_copied_and_wrapped(expand: bool) -> None:
    """As DeepEP's test cuts the metadata, and Automodel saves and restores all tensors."""

    class Wrapper:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handle, name)

    def body(buffer: ElasticBuffer) -> None:
        x, rows, _, weights, handle, _ = step(buffer, do_expand=expand, do_cpu_sync=False)
        want, want_weights, _ = buffer.combine(rows, handle, weights)
        again, *_ = buffer.dispatch(x, handle=handle, do_expand=expand)
        num_received = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])

        def same(other: Any) -> None:
            cached, _, _, got, _ = buffer.dispatch(x, handle=other, do_expand=expand)
            assert got is other
            end = num_received if not expand else int(handle.psum_num_recv_tokens_per_expert[-1])
            assert torch.equal(cached[:end], again[:end])
            out, out_weights, _ = buffer.combine(rows, other, weights)
            assert torch.equal(out, want)
            assert torch.equal(out_weights, want_weights)

        same(copy.copy(handle))
        same(Wrapper(handle))
        saved = {name: v for name, v in vars(handle).items() if isinstance(v, torch.Tensor)}
        for name in saved:
            setattr(handle, name, None)
        for name, tensor in saved.items():
            setattr(handle, name, tensor.clone())
        same(handle)
        handle.recv_src_metadata = handle.recv_src_metadata[:num_received]
        same(handle)
        if not expand:  # nor are rows needed that nothing arrived for
            out, _, _ = buffer.combine(rows[:num_received], handle)
            assert torch.equal(out, want)

    with_buffer(body)


@pytest.mark.parametrize("domain", ["", "2"])
@pytest.mark.parametrize("multiple_reduction", [True, False])
@pytest.mark.parametrize("expand", [False, True])
def test_a_handle_is_its_public_fields(
    expand: bool, multiple_reduction: bool, domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call with a handle that was made of copies, and that it is worked out once."""
    if domain:
        monkeypatch.setenv("EPJIT_NVLINK_DOMAIN", domain)

    def body(buffer: ElasticBuffer) -> None:
        for waits in (True, False):
            kept = from_public_fields(buffer, expand=expand, waits=waits, num_sms=8)
            assert kept.routing is not None
            again = kept.routing
            x = torch.zeros(kept.topk_idx.shape[0], 64)
            buffer.dispatch(x, handle=kept)
            assert kept.routing is again  # worked out once

    with_buffer(body, 4, allow_multiple_reduction=multiple_reduction)


def test_a_handle_that_got_the_tensors_of_another_goes_their_way() -> None:
    """As when one object serves several batches, and backward sets their tensors back."""

    def body(buffer: ElasticBuffer) -> None:
        _, rows, _, weights, first, _ = step(buffer, seed=0, do_expand=True)
        x, again, _, _, second, _ = step(buffer, seed=50, do_expand=True)
        want, want_weights, _ = buffer.combine(rows, first, weights)
        for name in PUBLIC:
            setattr(second, name, getattr(first, name))
        got, got_weights, _ = buffer.combine(rows, second, weights)
        assert torch.equal(got, want)
        assert torch.equal(got_weights, want_weights)
        assert rows.shape != again.shape
        cached, *_ = buffer.dispatch(x, handle=second, do_expand=True)
        assert cached.shape == rows.shape

    with_buffer(body)


class Combined(torch.autograd.Function):
    """As Automodel does: autograd keeps the tensors of the handle, and backward sets them back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, buffer: ElasticBuffer, handle: EPHandle) -> Any:
        ctx.buffer, ctx.handle = buffer, handle
        ctx.names = [name for name in PUBLIC if isinstance(getattr(handle, name), torch.Tensor)]
        ctx.save_for_backward(*(getattr(handle, name) for name in ctx.names))
        combined, *_ = buffer.combine(rows, handle)
        for name in ctx.names:
            setattr(handle, name, None)
        return combined

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        for name, tensor in zip(ctx.names, ctx.saved_tensors, strict=True):
            setattr(ctx.handle, name, tensor)
        rows, *_ = ctx.buffer.dispatch(grad, handle=ctx.handle, do_expand=ctx.handle.do_expand)
        return rows, None, None


@pytest.mark.parametrize("is_packed", [False, True])
def test_autograd_may_keep_the_tensors_of_a_handle(is_packed: bool) -> None:
    """Also where hooks keep copies, as those that save activations on the CPU."""

    def worker(comm: Any) -> None:
        buffer = ElasticBuffer(None, SIZE, comm=comm)
        x, rows, _, _, handle, _ = step(buffer, do_expand=True)
        want, *_ = buffer.dispatch(x, handle=handle, do_expand=True)
        routing = handle.routing
        rows.requires_grad_()
        keeping: Any = contextlib.nullcontext()
        if is_packed:
            pack = torch.Tensor.clone
            keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.enable_grad():
            with keeping:
                combined = Combined.apply(rows, buffer, handle)
            combined.backward(x)
        assert torch.equal(rows.grad, want)
        assert (handle.routing is routing) == (not is_packed)

    launch.run_threads(worker, 2)


def test_public_fields_that_do_not_fit_are_refused() -> None:
    buffer = ElasticBuffer(None, SIZE, comm=launch.Alone())
    _, rows, _, _, handle, _ = step(buffer, do_expand=True)
    for name, value, match in (
        ("topk_idx", handle.topk_idx[:3], "dst_buffer_slot_idx has shape"),
        ("dst_buffer_slot_idx", handle.dst_buffer_slot_idx.long(), "dtype"),
        ("num_recv_tokens", 3, "rows, but 3 were dispatched"),
        ("num_experts", 0, "multiple of the 1 ranks"),
        ("psum_num_recv_tokens_per_expert", handle.topk_idx[0], "psum_num_recv.*has"),
        ("num_unaligned_recv_tokens_per_expert", handle.recv_src_metadata[0], "num_unal.*has"),
    ):
        wrong = public_copy(handle)
        setattr(wrong, name, value)
        with pytest.raises((TypeError, ValueError), match=match):
            buffer.combine(rows, wrong)


def test_an_expanded_handle_without_do_expand_gives_compact_rows() -> None:
    def body(buffer: ElasticBuffer) -> None:
        x, want, want_idx, _, _, _ = step(buffer)
        *_, handle, _ = step(buffer, do_expand=True)
        rows, idx, weights, _, _ = buffer.dispatch(x, handle=handle)
        assert torch.equal(rows, want)
        assert torch.equal(idx, want_idx)
        assert weights is None

    with_buffer(body)


def test_a_handle_outlives_other_dispatches_and_may_be_used_in_any_order() -> None:
    def body(buffer: ElasticBuffer) -> None:
        kept = [step(buffer, seed=10 * i, do_expand=bool(i % 2)) for i in range(4)]
        want = [buffer.combine(each[1], each[4])[0] for each in kept]
        for i in (2, 0, 3, 1, 2):
            assert torch.equal(buffer.combine(kept[i][1], kept[i][4])[0], want[i])

    with_buffer(body)


def test_sums_with_one_rounding_do_not_depend_on_the_ranks() -> None:
    """24 tokens, cut among 1, 2, 4 and 8 ranks: the same bits."""

    def worker(comm: Any) -> torch.Tensor:
        buffer = ElasticBuffer(None, SIZE, comm=comm, allow_multiple_reduction=False)
        return of_one_rounding(buffer, num_sms=4)

    sums = {n: torch.cat(launch.run_threads(worker, n)) for n in (1, 2, 4, 8)}
    for n in (2, 4, 8):
        assert torch.equal(sums[n], sums[1]), n
    assert bool((sums[1] != 0).any())


# ---- events, streams, the life of a buffer -------------------------------------------------------


def test_events() -> None:
    def body(buffer: ElasticBuffer) -> None:
        event = buffer.capture()
        assert isinstance(event, EventHandle)
        assert isinstance(ElasticBuffer.capture(), EventHandle)
        assert event.tensors_to_record == ()
        for previous in (event, EventOverlap(event), EventOverlap()):
            *_, handle, done = step(
                buffer,
                previous_event=previous,
                previous_event_before_epilogue=event,
                allocate_on_comm_stream=True,
            )
            assert done.event is None
        *_, done = step(buffer, allocate_on_comm_stream=True)
        with pytest.raises(AssertionError, match="holds no event"):
            done.current_stream_wait()
        with pytest.raises(AssertionError, match="allocate_on_comm_stream=True"):
            step(buffer, previous_event=event)
        *_, done = buffer.dispatch(
            torch.zeros(10, 64), handle=handle, async_with_compute_stream=True
        )
        assert isinstance(done.event, EventHandle)
        assert done(release_handle=True) is done
        called = []
        done.register_hook_after_wait(lambda: called.append(1))
        with done:
            assert not called
        assert called == [1]
        assert done.event is None
        assert done.hook_after_wait is None

    with_buffer(body)


@pytest.mark.parametrize("multiple_reduction", [True, False])
@pytest.mark.parametrize("expand", [False, True])
def test_the_allocator_hears_of_all_tensors(
    expand: bool, multiple_reduction: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the mode has made, also where a copy of it is returned, and of the handle."""
    made: list[torch.Tensor] = []
    told: set[int] = set()
    finish = CpuScope.finish

    def noting(dispatch: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            result = dispatch(*args)
            made.extend(each for each in _tensors(result))
            return result

        return noted

    def telling(self: CpuScope, inputs: Any = (), outputs: Any = ()) -> Any:
        told.update(id(each) for each in _tensors((inputs, outputs)))
        return finish(self, inputs, outputs)

    for name in ("dispatch", "expert_dispatch"):
        monkeypatch.setattr(CpuNormal, name, noting(getattr(CpuNormal, name)))
    monkeypatch.setattr(CpuScope, "finish", telling)
    buffer = ElasticBuffer(
        None, SIZE, comm=launch.Alone(), allow_multiple_reduction=multiple_reduction
    )

    def check(*tensors: torch.Tensor) -> None:
        assert not [each.shape for each in (*made, *tensors) if id(each) not in told]
        made.clear()
        told.clear()

    x, rows, _, weights, handle, _ = step(buffer, do_expand=expand)
    fields = [each for each in vars(handle).values() if isinstance(each, torch.Tensor)]
    assert len(fields) == 6
    check(x, rows, weights, *fields)
    again, *_ = buffer.dispatch(x, handle=handle, do_expand=expand)
    check(again, handle.topk_idx, handle.recv_src_metadata)
    out, out_weights, _ = buffer.combine(rows, handle, weights)
    assert out_weights is not None
    check(rows, out, out_weights, handle.topk_idx, handle.recv_src_metadata)


def test_life() -> None:
    def body(buffer: ElasticBuffer) -> None:
        assert buffer.runtime is not None
        assert "rank" in repr(buffer)
        buffer.barrier()
        buffer.barrier(use_comm_stream=False, with_cpu_sync=True, sequential=False)
        if not buffer.explicitly_destroy:
            with pytest.raises(AssertionError, match="explicitly_destroy=True"):
                buffer.destroy()
            return
        buffer.destroy()
        assert buffer.runtime is None
        buffer.destroy()
        with pytest.raises(RuntimeError, match="destroyed"):
            buffer.barrier()

    with_buffer(body)
    with_buffer(body, explicitly_destroy=True)


def test_a_barrier_waits_for_all_ranks() -> None:
    arrived = []

    def body(buffer: ElasticBuffer) -> None:
        buffer.barrier()
        if buffer.rank_idx == 1:
            time.sleep(0.2)
        arrived.append(buffer.rank_idx)
        buffer.barrier()
        assert len(arrived) == 3

    with_buffer(body, 3)


def test_sizes_and_suggestions(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(buffer: ElasticBuffer) -> None:
        assert buffer.num_bytes % SIZE == 0
        assert (buffer.num_ranks, buffer.num_max_tokens_per_rank) == (2, 128)
        assert buffer.get_theoretical_num_sms(64, 8) % 2 == 0
        assert buffer.num_allocated_qps == 17
        assert buffer.get_theoretical_num_qps(24) == 9
        assert buffer.get_theoretical_num_qps(4) == 4
        with pytest.raises(NotImplementedError, match="all_to_all_single"):
            buffer.engram_fetch(None)  # type: ignore[attr-defined]

    with_buffer(body, num_max_tokens_per_rank=128, hidden=512)
    sizes = {"num_max_tokens_per_rank": 128, "hidden": 512, "prefer_overlap_with_compute": False}

    def alone(comm: Any) -> None:
        assert ElasticBuffer(None, comm=comm, **sizes).get_theoretical_num_sms(64, 8) == 64

    launch.run_threads(alone, 1)

    class Group:
        def size(self) -> int:
            return 8

    monkeypatch.setattr(elastic, "as_process_group", lambda group: group)
    # DeepEP's: 8 * 4096 * (14336 + 8 * 8 + 4 * 9, to 32 bytes) for a dispatch.
    hint = ElasticBuffer.get_buffer_size_hint(Group(), 4096, 7168, 8)
    assert hint == align(8 * 4096 * (14336 + 128), SIZE)
    fp8 = ElasticBuffer.get_buffer_size_hint(Group(), 4096, 7168, 8, use_fp8_dispatch=True)
    assert fp8 == align(8 * 4096 * (14336 + 64), SIZE)  # what comes back is larger
    with pytest.raises(AssertionError, match="must be given"):
        ElasticBuffer.get_buffer_size_hint(Group(), 0, 7168)
    with pytest.raises(ValueError, match="multiple of 2097152"):
        ElasticBuffer(None, 1 << 20, comm=launch.Alone())
    with pytest.raises(NotImplementedError, match="engram"):
        ElasticBuffer(None, SIZE, 1, comm=launch.Alone())


# ---- calls that are refused ----------------------------------------------------------------------

X = torch.zeros(4, 64, dtype=torch.bfloat16)
IDX = torch.tensor([[0, 2]] * 4)
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (AssertionError, "needs topk_idx", {"topk_idx": None}),
    (AssertionError, "needs num_experts", {"num_experts": None}),
    (ValueError, "positive multiple of the 1 ranks", {"num_experts": 0}),
    (ValueError, "x has 4 tokens, but num_max_tokens_per_rank is 3", {"m": 3}),
    (ValueError, "num_max_tokens_per_rank is 0, but must be", {"m": 0}),
    (ValueError, "expert_alignment", {"expert_alignment": 0}),
    (ValueError, "topk_idx has shape", {"topk_idx": IDX[:3]}),
    (TypeError, "topk_weights has dtype", {"topk_weights": IDX}),
    (ValueError, "num_sms is 999", {"num_sms": 999}),
    (AssertionError, "do_zero_padding", {"do_zero_padding": True}),
    (
        ValueError,
        "recv_stats has shape",
        {"cumulative_local_expert_recv_stats": torch.zeros(3, dtype=torch.int32)},
    ),
    (TypeError, "one byte an element", {"x": (X, torch.zeros(4, 1))}),
    (ValueError, "experts is 4096, but rows by expert", {"num_experts": 4096, "do_expand": True}),
    (ValueError, "may need", {"expert_alignment": 1 << 30, "do_expand": True}),
]


@pytest.mark.parametrize(("error", "match", "options"), REFUSED, ids=[each[1] for each in REFUSED])
def test_refused(error: type[Exception], match: str, options: dict[str, Any]) -> None:
    buffer = ElasticBuffer(None, SIZE, comm=launch.Alone())
    options = dict(options)
    m = options.pop("m", 8)
    call: dict[str, Any] = {"x": X, "topk_idx": IDX, "num_experts": 4, **options}
    with pytest.raises(error, match=match):
        buffer.dispatch(**call, num_max_tokens_per_rank=m)


def test_refused_with_a_handle() -> None:
    buffer = ElasticBuffer(None, SIZE, comm=launch.Alone(), num_max_tokens_per_rank=8)
    rows, _, _, handle, _ = buffer.dispatch(X, IDX, num_experts=4, expert_alignment=2)
    for error, match, options in (
        (AssertionError, "no topk_idx", {"topk_idx": IDX}),
        (AssertionError, "nothing to wait for", {"do_cpu_sync": True}),
        (ValueError, "num_experts is 8, but that of the handle is 4", {"num_experts": 8}),
        (ValueError, "expert_alignment is 1", {"expert_alignment": 1}),
        (ValueError, "num_max_tokens_per_rank is 9", {"num_max_tokens_per_rank": 9}),
        (ValueError, "do_expand=True needs a handle", {"do_expand": True}),
        (ValueError, "x has 3 tokens, but the handle routes 4", {"x": X[:3]}),
        (TypeError, "handle is a tuple", {"handle": (1, 2)}),
    ):
        with pytest.raises(error, match=match):  # type: ignore[arg-type]
            buffer.dispatch(**{"x": X, "handle": handle, **options})  # type: ignore[dict-item]
    buffer.dispatch(X, handle=handle, num_experts=4, expert_alignment=2, num_max_tokens_per_rank=8)
    for error, match, given in (
        (ValueError, "x has shape", (rows[:3], handle)),
        (TypeError, "x has dtype", (rows.float(), handle)),
        (ValueError, "topk_weights has shape", (rows, handle, torch.zeros(4, 3))),
        (ValueError, "bias_0 has shape", (rows, handle, None, X[:3])),
        (TypeError, "handle is a list", (rows, [])),
    ):
        with pytest.raises(error, match=match):  # type: ignore[arg-type]
            buffer.combine(*given)  # type: ignore[arg-type]


def test_beside_the_low_latency_mode_of_a_buffer() -> None:
    def worker(comm: Any) -> None:
        size = Buffer.get_low_latency_rdma_size_hint(16, 512, 2, 8)
        low_latency = Buffer(None, 0, size, True, comm=comm)
        in_turns(low_latency, ElasticBuffer(None, SIZE, comm=comm), 3, num_sms=4)

    launch.run_threads(worker, 2)


def of_processes(group: dist.ProcessGroup) -> int:
    os.environ["EPJIT_BACKEND"] = "cpu"
    hint = ElasticBuffer.get_buffer_size_hint(group, 24, 1024)
    buffer = ElasticBuffer(group, num_max_tokens_per_rank=24, hidden=1024, explicitly_destroy=True)
    assert buffer.group is group
    assert buffer.num_bytes == hint
    for seed in range(10):
        check_round(buffer, random_round(buffer.num_ranks, seed, num_sms=4, max_tokens=24))
    buffer.destroy()
    return 10


def test_processes() -> None:
    assert launch.run(of_processes, 2) == [10, 10]


# ---- DeepEP 2.5 ----------------------------------------------------------------------------------


def test_the_names_of_2_5() -> None:
    def worker(comm: Any) -> None:
        old = ElasticBuffer(None, SIZE, comm=comm)
        new = EPBuffer(None, SIZE, num_max_tokens_per_rank=16, sl_idx=None, comm=comm)
        x, rows, want_idx, want_weights, handle, _ = step(old)
        want, _, _ = old.combine(rows, handle)
        idx = handle.topk_idx
        options: dict[str, Any] = {"num_experts": 8, "async_with_compute_stream": True}
        event = new.dispatch(x, idx, num_experts=8, defer_epilogue=False)[-1]  # type: ignore[index]
        assert event.event is None
        waiting = new.dispatch(x, idx, defer_epilogue=True, **options)
        assert isinstance(waiting, EventOverlap)
        got, got_idx, got_weights, own = waiting.current_stream_wait()
        assert torch.equal(got, rows)
        assert torch.equal(got_idx, want_idx)
        assert got_weights is None
        assert own.topk_idx is idx
        waiting = new.combine(
            got, own, topk_weights=want_weights, async_with_compute_stream=True, defer_epilogue=True
        )
        assert isinstance(waiting, EventOverlap)
        combined, weights = waiting.wait()
        assert torch.equal(combined, want)
        assert weights.shape == idx.shape
        new.barrier(wait_comm_stream=False, with_cpu_sync=True, sequential=True, context_idx=1)

    launch.run_threads(worker, 2)


def test_refused_by_2_5() -> None:
    buffer = EPBuffer(None, SIZE, 8, comm=launch.Alone())
    with pytest.raises(AssertionError, match="do_handle_copy must be False"):
        buffer.dispatch(X, IDX, num_experts=4, do_handle_copy=True)
    with pytest.raises(AssertionError, match="needs async_with_compute_stream=True"):
        buffer.dispatch(X, IDX, num_experts=4, defer_epilogue=True)
    with pytest.raises(NotImplementedError, match="must be 0"):
        EPBuffer(None, SIZE, lb_allocation_plan_or_num_bytes=1 << 21, comm=launch.Alone())
