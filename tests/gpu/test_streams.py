"""Streams, and how long memory lives that queued kernels use, on one GPU with virtual ranks."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from typing import Any
from unittest import mock
from unittest.mock import DEFAULT

import pytest
import torch

from epjit import Buffer, CommunicationError, Config
from epjit.modes.normal import Room
from epjit.runtime import driver
from tests.harness.launch import RankFailedError
from tests.harness.ranks import line_up, meet, run_ranks, settle
from tests.rounds.normal import Round, check_round, layout_of, variant_environ

HIDDEN = 4096
TOKENS = 256
LONG = 400_000_000  # cycles, 0.2 s: much more than the host takes to queue what follows


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers write the outputs where they belong."""
    for name, value in variant_environ("direct").items():
        monkeypatch.setenv(name, value)


class Calls:
    """Tokens that all go to all ranks, and the calls of a rank with them."""

    def __init__(self, buffer: Buffer) -> None:
        ranks = buffer.group_size
        self.buffer, self.num_experts = buffer, 2 * ranks
        values = torch.arange(TOKENS, device=buffer.device) % 100 + 1
        self.x = values[:, None].expand(TOKENS, HIDDEN).bfloat16().contiguous()
        self.idx = torch.arange(0, 2 * ranks, 2, device=buffer.device).repeat(TOKENS, 1)
        self.weights = torch.ones((TOKENS, ranks), device=buffer.device)
        # Loaded now: what is first loaded while a kernel spins for a peer waits for that kernel.
        negative = torch.cat([-self.x, torch.full_like(self.x, -7)])
        assert not torch.equal(negative, negative.clone() + 1)
        ints = torch.full((4,), 1, dtype=torch.int32, device=buffer.device)
        assert bool((ints == 1).all())
        assert bool((negative != 7).all())
        line_up(buffer)
        self.layout = layout_of(buffer, self.idx, self.num_experts)
        rows, _, _, _, handle, _ = self.dispatch(self.x)  # compiles
        assert handle is not None
        self.handle = handle
        self.combine(rows)
        meet(buffer)

    def dispatch(self, x: torch.Tensor, **flags: Any) -> Any:
        return self.buffer.dispatch(x, config=Config(4), **self.layout, **flags)

    def combine(self, rows: Any, **flags: Any) -> Any:
        return self.buffer.combine(rows, self.handle, config=Config(4), **flags)


@pytest.mark.usefixtures("direct")
def test_a_block_of_direct_waits_for_the_stream_of_the_call() -> None:
    """Also with `allocate_on_comm_stream`, and if the last tensor goes on a third stream."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        side = torch.cuda.Stream()
        flags = {"async_finish": True, "allocate_on_comm_stream": True}
        early = Buffer.capture()
        rows, *_, done = calls.dispatch(calls.x, previous_event=early, **flags)
        place, want = rows.data_ptr(), torch.cat([calls.x] * buffer.group_size)
        copy = torch.empty_like(rows)
        other = -calls.x
        done.current_stream_wait()
        early = Buffer.capture()
        torch.cuda._sleep(LONG)
        copy.copy_(rows)
        with torch.cuda.stream(side):
            del rows
        again, *_, done = calls.dispatch(other, previous_event=early, **flags)
        assert again.data_ptr() == place, "not what is to be tested"
        done.current_stream_wait()
        settle(buffer)
        assert torch.equal(copy, want)
        assert torch.equal(again, -want)

    run_ranks(2, body)


@pytest.mark.parametrize("guess", [None, Room((1,), 0)], ids=["right guess", "wrong guess"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_an_interrupted_dispatch_writes_to_nobodys_memory(
    num_ranks: int, guess: Room | None
) -> None:
    """Its kernels run when the peers come; by then the memory of its tensors is others'.

    With a right guess its rows are sent, and the peers do not notice.
    """
    pattern = 0x5A5A5A5A

    def interrupt(calls: Calls) -> list[torch.Tensor]:
        """Returns what was allocated afterwards."""
        mode: Any = calls.buffer._mode
        places: list[int] = []
        sizes: list[int] = []
        empty = mode._empty

        def noting(specs: Any) -> list[Any]:
            tensors = empty(specs)
            made = [tensor for tensor in tensors if tensor is not None]
            places.extend(tensor.data_ptr() for tensor in made)
            sizes.extend(tensor.nbytes // 4 for tensor in made)
            return list(tensors)

        with (
            mock.patch.object(mode, "_empty", noting),
            mock.patch.object(mode, "_wait_for_counts", side_effect=KeyboardInterrupt),
            mock.patch.object(mode, "_guess", wraps=mode._guess, return_value=guess or DEFAULT),
        ):
            try:
                calls.dispatch(calls.x, async_finish=True)
            except KeyboardInterrupt:  # whose traceback keeps the tensors until here
                pass
        ints: dict[str, Any] = {"dtype": torch.int32, "device": calls.buffer.device}
        others = [torch.full((size,), pattern, **ints) for size in sizes for _ in range(8)]
        for place in places:
            within = any(0 <= place - each.data_ptr() < each.nbytes for each in others)
            assert within, "not what is to be tested"
        return others

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        if buffer.rank == 0:
            others = interrupt(calls)
            buffer.group.allgather(None)
            streams: Any = buffer._streams
            streams._comm.torch_stream.synchronize()
            torch.cuda.current_stream().synchronize()
            assert all(bool((each == pattern).all()) for each in others)
            with pytest.raises(CommunicationError, match="half way"):
                buffer.check_fault()
        else:
            buffer.group.allgather(None)
            with pytest.raises(CommunicationError) if guess else nullcontext():
                calls.dispatch(calls.x)
                settle(buffer)
        line_up(buffer)
        buffer.reset()
        case = Round((30,) * num_ranks, num_experts=2 * num_ranks, num_sms=4, seed=2)
        check_round(buffer, case)

    run_ranks(num_ranks, body, timeout_seconds=2)


@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("is_async", [False, True])
def test_outputs_are_not_what_work_behind_the_event_still_reads(op: str, is_async: bool) -> None:
    """The kernels wait for the event only, and the allocator knows of the stream's own order."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        method = getattr(calls, op)
        copy = torch.empty_like(calls.x)
        event = Buffer.capture()
        other = torch.full_like(calls.x, 7)  # as large as the output
        torch.cuda._sleep(LONG)
        copy.copy_(other)
        del other
        out, *_, done = method(calls.x, previous_event=event, async_finish=is_async)
        if is_async:
            done.current_stream_wait()
        settle(buffer)
        assert bool((copy == 7).all())
        assert torch.equal(out, calls.x)

    run_ranks(1, body)


def test_a_dropped_output_is_not_written_before_it_was_read() -> None:
    """It is memory of the communication stream, which is told that the caller's reads it."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        negative, copy = -calls.x, torch.empty_like(calls.x)
        event = Buffer.capture()
        out, *_ = calls.dispatch(calls.x, previous_event=event)
        torch.cuda._sleep(LONG)
        copy.copy_(out)
        del out
        again, *_ = calls.dispatch(negative, previous_event=event)
        settle(buffer)
        assert torch.equal(copy, calls.x)
        assert torch.equal(again, negative)

    run_ranks(1, body)


def test_a_low_latency_event_may_go_before_it_was_waited_for() -> None:
    """It keeps the tensors; from then on the allocator knows who reads them."""

    def body(buffer: Buffer) -> None:
        want = torch.arange(1, TOKENS + 1, device=buffer.device) % 100
        want = want[:, None].expand(TOKENS, HIDDEN).bfloat16().contiguous()
        idx = torch.zeros((TOKENS, 1), dtype=torch.int64, device=buffer.device)

        def dispatch(x: torch.Tensor) -> torch.Tensor:
            rows, *_ = buffer.low_latency_dispatch(
                x, idx, TOKENS, 2, use_fp8=False, async_finish=True
            )
            assert isinstance(rows, torch.Tensor)
            return rows

        dispatch(want)  # compiles
        torch.cuda.synchronize()
        streams: Any = buffer._streams
        comm = streams._comm
        x = want.clone()
        with torch.cuda.stream(comm.torch_stream):
            torch.cuda._sleep(LONG)
        rows = dispatch(x)
        del x
        others = [torch.full_like(want, 7) for _ in range(4)]
        comm.torch_stream.synchronize()
        settle(buffer)
        assert torch.equal(rows[0], want)
        assert all(bool((other == 7).all()) for other in others)

    hint = Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, 1, 2)
    run_ranks(1, body, num_nvl_bytes=0, num_rdma_bytes=hint, low_latency_mode=True)


@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("with_event", [False, True])
def test_tensors_of_an_asynchronous_call_may_be_dropped_at_once(op: str, with_event: bool) -> None:
    """The event keeps them, or else the Buffer until it has happened; the allocator is not told."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        method = getattr(calls, op)
        streams: Any = buffer._streams
        comm = streams._comm.torch_stream
        results = []
        for sign in (1, -1, 1, -1):
            x = sign * calls.x
            with torch.cuda.stream(comm):
                torch.cuda._sleep(LONG // 20)
            with mock.patch.object(torch.Tensor, "record_stream", side_effect=AssertionError):
                if op == "dispatch":
                    out, *_, done = buffer.dispatch(x, calls.handle, async_finish=True)
                else:
                    out, _, done = method(x, async_finish=True)
            del x
            others = [torch.full_like(calls.x, 7) for _ in range(8)]
            results.append((sign, out, others, None if with_event else done))
        del done
        assert bool(streams._kept.calls) == with_event
        comm.synchronize()  # where nobody has kept an event to wait for
        settle(buffer)
        for sign, out, others, done in results:
            if done is not None:
                done.current_stream_wait()
            assert torch.equal(out, sign * calls.x)
            assert all(bool((other == 7).all()) for other in others)

    run_ranks(1, body)


@pytest.mark.parametrize("op", ["layout", "dispatch", "cached dispatch", "combine"])
def test_memory_of_an_asynchronous_call_is_back_after_the_wait(op: str) -> None:
    """On the stream of the call, with no later call; what comes there then comes behind it."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        streams: Any = buffer._streams
        comm, want = streams._comm.torch_stream, calls.x.clone()

        def call() -> tuple[torch.Tensor, Any]:
            """Its first output and its event; the event alone holds the input."""
            if op == "layout":
                out, *_, done = buffer.get_dispatch_layout(
                    calls.idx.clone(), calls.num_experts, async_finish=True
                )
            elif op == "dispatch":
                out, *_, done = calls.dispatch(
                    calls.x.clone(),
                    topk_idx=calls.idx,
                    topk_weights=calls.weights,
                    num_worst_tokens=TOKENS,  # the host does not wait
                    async_finish=True,
                )
            elif op == "combine":
                out, *_, done = calls.combine(calls.x.clone(), async_finish=True)
            else:
                out, *_, done = buffer.dispatch(calls.x.clone(), calls.handle, async_finish=True)
            return out, done

        call()[1].current_stream_wait()  # compiles
        settle(buffer)
        assert not streams._kept.calls
        before = torch.cuda.memory_allocated()
        with torch.cuda.stream(comm):
            torch.cuda._sleep(LONG)
        out, done = call()
        held = torch.cuda.memory_allocated() - before
        assert held > out.nbytes
        copy = torch.empty_like(out)
        of_copy = torch.cuda.memory_allocated() - before - held
        done.current_stream_wait()
        copy.copy_(out)
        del out
        assert torch.cuda.memory_allocated() - before == of_copy
        others = [torch.full_like(want, 7) for _ in range(4)]  # in that memory
        assert not done.event.raw.has_happened(), "not what is to be tested"
        settle(buffer)
        assert all(bool((other == 7).all()) for other in others)
        if op != "layout":
            assert torch.equal(copy, want)

    run_ranks(1, body)


@pytest.mark.parametrize("waits", [False, True])
def test_memory_after_many_asynchronous_calls_of_changing_sizes(waits: bool) -> None:
    """The memory of the tensors comes back, whether the events are waited for or not."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        generator = torch.Generator().manual_seed(1)
        streams: Any = buffer._streams

        def call(num_tokens: int) -> None:
            x, idx = calls.x[:num_tokens].clone(), calls.idx[:num_tokens].clone()
            per_rank, _, per_expert, in_rank, early = buffer.get_dispatch_layout(
                idx, calls.num_experts, async_finish=True
            )
            rows, _, _, _, handle, event = buffer.dispatch(
                x,
                None,
                per_rank,
                None,
                in_rank,
                per_expert,
                previous_event=early,
                async_finish=True,
                config=Config(4),
            )
            event.current_stream_wait()
            assert isinstance(rows, torch.Tensor)
            assert handle is not None
            out, _, event = buffer.combine(rows, handle, async_finish=True, config=Config(4))
            if waits:
                event.current_stream_wait()
                assert out.shape == x.shape

        sizes = torch.randint(1, TOKENS + 1, (1000,), generator=generator).tolist()
        call(TOKENS)
        settle(buffer)
        call(1)
        settle(buffer)
        before, most = torch.cuda.memory_allocated(), 0
        for size in sizes:
            call(size)
            most = max(most, torch.cuda.memory_allocated())
            assert len(streams._kept.calls) <= 64
        settle(buffer)
        call(1)
        settle(buffer)
        # What small calls have used is looked at now and then: 16 calls of 4 MB for either tensor.
        row_bytes = calls.x[0].numel() * calls.x.element_size()
        assert torch.cuda.memory_allocated() <= before + 17 * 4 * TOKENS * row_bytes
        assert most <= before + 64 * 4 * TOKENS * row_bytes
        x = calls.x.repeat(4, 1)  # 8 MB: more than that
        idx = calls.idx.repeat(4, 1)
        layout = buffer.get_dispatch_layout(idx, calls.num_experts)
        per_rank, _, per_expert, in_rank, _ = layout
        for _ in range(2):
            buffer.dispatch(
                x, None, per_rank, None, in_rank, per_expert, config=Config(4), async_finish=True
            )
            settle(buffer)
        assert len(streams._kept.calls) <= 1

    run_ranks(1, body)


def test_an_asynchronous_call_breaks_no_capture_of_another_thread() -> None:
    """To ask for an event is refused while a thread captures in the global mode, unless relaxed."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        buffer.dispatch(calls.x, calls.handle, async_finish=True)
        settle(buffer)
        spare = [torch.empty_like(calls.x) for _ in range(8)]
        del spare  # for the outputs: nothing can be allocated during such a capture
        word, side = torch.zeros(1, device=buffer.device), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        begun, may_end = threading.Event(), threading.Event()
        errors: list[Exception] = []

        def capture() -> None:
            try:
                with torch.cuda.stream(side):  # torch.cuda.graph would empty the allocator's cache
                    graph.capture_begin(capture_error_mode="global")
                    word.add_(1)
                    begun.set()
                    may_end.wait(30)
                    graph.capture_end()
            except Exception as error:
                errors.append(error)
                begun.set()

        thread = threading.Thread(target=capture)
        thread.start()
        begun.wait(30)
        try:
            with mock.patch("epjit.scope._FEW_KEPT", 0):
                for _ in range(3):
                    rows, *_ = buffer.dispatch(calls.x, calls.handle, async_finish=True)
        finally:
            may_end.set()
            thread.join()
        assert not errors
        settle(buffer)
        assert torch.equal(rows, calls.x)
        graph.replay()
        torch.cuda.synchronize()
        assert word.item() == 1

    run_ranks(1, body)


def test_asynchronous_calls_in_a_graph() -> None:
    """No event that a capture records can be asked; memory is used again in the graph's order."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        x, copies = calls.x.clone(), [torch.empty_like(calls.x) for _ in range(2)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in copies:
                rows, *_, done = buffer.dispatch(x + 1, calls.handle, async_finish=True)
                done.current_stream_wait()
                out, _, done = calls.combine(rows, async_finish=True)
                del rows
                done.current_stream_wait()
                copy.copy_(out)
                del out, done
        for sign in (1, -1):
            x.copy_(sign * calls.x)
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(copy, x + 1) for copy in copies)
        rows, *_, done = buffer.dispatch(calls.x, calls.handle, async_finish=True)
        done.current_stream_wait()
        settle(buffer)
        assert torch.equal(rows, calls.x)

    run_ranks(1, body)


def test_an_event_is_waited_for_from_anywhere_and_after_its_buffer() -> None:
    """Also a copy of it, twice, from the default stream, and when the Buffer is gone."""

    def body(buffer: Buffer) -> tuple[Any, torch.Tensor, torch.Tensor]:
        calls = Calls(buffer)
        streams: Any = buffer._streams
        with torch.cuda.stream(streams._comm.torch_stream):
            torch.cuda._sleep(LONG)
        rows, *_, done = buffer.dispatch(calls.x, calls.handle, async_finish=True)
        handle = copy.copy(done.event)
        del done
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                handle.current_stream_wait()
                handle.current_stream_wait()
                assert torch.equal(rows.clone(), calls.x)
        return handle, rows, calls.x

    (result,) = run_ranks(1, body)  # the Buffer is destroyed by now
    handle, rows, want = result
    handle.synchronize()
    handle.current_stream_wait()
    assert torch.equal(rows, want)


def test_capture_on_a_blocking_stream_after_a_call_on_the_default_stream() -> None:
    """CuPy's streams, and those of cudaStreamCreate, are such; torch's are not."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        worst: dict[str, Any] = {
            "topk_idx": calls.idx,
            "topk_weights": calls.weights,
            "num_worst_tokens": TOKENS,
        }
        with torch.cuda.stream(torch.cuda.default_stream()):
            calls.dispatch(calls.x, **worst)
            torch.cuda.current_stream().synchronize()
        with driver.using(buffer.device.index):
            handle = int(driver.call("cuStreamCreate", 0))
        blocking = torch.cuda.ExternalStream(handle, device=buffer.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=blocking, capture_error_mode="thread_local"):
            rows, _, _, _, routing, _ = calls.dispatch(calls.x, **worst)
            combined, _, _ = buffer.combine(rows, routing, config=Config(4))
        want = calls.x.clone()
        for sign in (-1, 1):
            calls.x.copy_(sign * want)
            torch.cuda.current_stream().synchronize()
            with torch.cuda.stream(blocking):
                graph.replay()
            blocking.synchronize()
            assert torch.equal(rows, sign * want)
            assert torch.equal(combined, sign * want)
        with torch.cuda.stream(torch.cuda.default_stream()):  # and on it goes there
            again, *_ = calls.dispatch(calls.x)
            torch.cuda.current_stream().synchronize()
        assert torch.equal(again, want)
        del graph, blocking

    run_ranks(1, body)


def test_fresh_threads() -> None:
    """A thread has no CUDA context before its first use of CUDA, which a call may be."""

    def body(buffer: Buffer) -> None:
        calls = Calls(buffer)
        results: list[Any] = []
        side = torch.cuda.Stream()

        def step(stream: torch.cuda.Stream) -> None:
            with torch.cuda.stream(stream):
                rows, *_ = calls.dispatch(calls.x)
                results.append((rows, calls.combine(rows)[0]))

        default = torch.cuda.default_stream()
        for before, then in ((default, side), (side, default), (default, default), (side, side)):
            with torch.cuda.stream(before):
                calls.dispatch(calls.x)  # what the thread's call follows
            thread = threading.Thread(target=step, args=(then,))
            thread.start()
            thread.join()
        torch.cuda.synchronize()
        assert len(results) == 4
        for rows, combined in results:
            assert torch.equal(rows, calls.x)
            assert torch.equal(combined, calls.x)
        thread = threading.Thread(target=buffer.reset)
        thread.start()
        thread.join()
        check_round(buffer, Round((30,), num_experts=2, num_topk=2, num_sms=4, seed=2))

    run_ranks(1, body)


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("use_fabric", [False, True])
def test_memory_of_a_destroyed_buffer_goes_when_it_was_read(use_fabric: bool) -> None:
    """Direct: with the last tensor over it, but not before what is queued has ended."""

    def body(buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
        calls = Calls(buffer)
        rows, *_ = calls.dispatch(calls.x)
        settle(buffer)
        return rows, rows.clone()

    try:
        results = run_ranks(2, body, use_fabric=use_fabric)  # buffers are destroyed by now
    except RankFailedError as error:
        if use_fabric and "symmetric memory cannot be made" in str(error):
            pytest.skip("no fabric handles here")
        raise
    while results:
        rows, want = results.pop()
        torch.cuda._sleep(LONG)
        copy = rows.clone()
        del rows
        torch.cuda.synchronize()
        assert torch.equal(copy, want)
