"""One round of all operations through the public `Buffer`, compared bit for bit with the reference.

In one NVLink domain or between several: the reference is that of the Buffer's topology.

Every rank builds the inputs of all ranks from a seed, so that it knows what must arrive; nothing
but the operations under test communicates. On the GPU only copies are used beside them: with
virtual ranks a torch kernel that is loaded while another rank's kernel spins would wait for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch

from epjit import Buffer, CommunicationError, Config
from epjit.formats import CASTS, NVFP4
from epjit.handles import Dispatched, Handle, InternodeHandle
from epjit.modes.normal import Room
from epjit.reference import Normal
from epjit.reference import intranode as reference
from epjit.reference.expert_major import cast as cast_rows
from tests.harness.data import (
    ROUTING_KINDS,
    SCALE_LAYOUTS,
    RoutingKind,
    ScaleLayout,
    assert_rows_equal,
    fp8_payload,
    made_once,
    payload,
    random_payload,
    routing,
    to_device,
    topk_weights,
)
from tests.harness.ranks import line_up, settle
from tests.rounds.low_latency import rough_rows


@dataclass(frozen=True)
class Round:
    """Sizes and choices of one round; the same on all ranks.

    Attributes:
        num_tokens: Of each rank.
        hidden: Elements a row.
        num_experts: Over all ranks.
        num_topk: Choices a token.
        kind: Routing.
        seed: Of everything random.
        fp8: Rows of one byte with scales of this layout, or None for bfloat16 or a cast.
        cast: Name of a format that rows of `combine_dtype` are cast to on the way, or None.
        scale_dtype: Of the scales.
        index_dtype: Of topk_idx.
        with_topk: Whether top-k travels with the tokens.
        worst: Whether num_worst_tokens is used.
        alignment: expert_alignment.
        combine_dtype: Of the rows that come back.
        num_biases: 0, 1 or 2.
        num_sms: Of dispatch and combine.
        how: sync, async (events), or comm (events, outputs on the communication stream).
        guess_wrong: Ranks that first launch dispatch with room for another number of rows.
    """

    num_tokens: tuple[int, ...]
    hidden: int = 256
    num_experts: int = 16
    num_topk: int = 4
    kind: RoutingKind = "random"
    seed: int = 0
    fp8: ScaleLayout | None = None
    cast: str | None = None
    scale_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    with_topk: bool = True
    worst: bool = False
    alignment: int = 1
    combine_dtype: torch.dtype = torch.bfloat16
    num_biases: int = 0
    num_sms: int = 4
    how: str = "sync"
    guess_wrong: tuple[int, ...] = ()


def _defined(
    got: Sequence[torch.Tensor], want: Handle, rank: int
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The parts of a handle that have a meaning: name, got, wanted."""
    arrived = slice(0, int(want.num_received(rank)))
    for name, whole, wanted in zip(want._fields, got, want, strict=True):
        whole = whole.cpu()  # a strided part would be gathered by a kernel
        parts: list[Any] = [slice(None)]
        if name in ("recv_src_idx", "recv_src_meta"):
            parts = [arrived]
        elif name == "send_tokens":
            lengths = wanted[:, -1].tolist()
            parts = [(n, slice(0, length)) for n, length in enumerate(lengths)]
            parts.append((slice(None), -1))
        elif name == "send_nvl_head":
            assert isinstance(want, InternodeHandle)
            parts = [slice(0, int(want.recv_rdma_rank_prefix_sum[-1]))]
        for part in parts:
            yield name, whole[part], wanted[part]


# (hidden, num_topk, fp8, index_dtype, combine_dtype): what kernels are compiled for. A few, since
# 300 rounds of ever new ones spend their time in the compiler; the rest of a round is always new.
_SHAPES = (
    (128, 1, True, torch.int64, torch.bfloat16),
    (256, 2, False, torch.int32, torch.float16),
    (512, 5, True, torch.int32, torch.bfloat16),
    (1024, 8, False, torch.int64, torch.bfloat16),
)


DISPATCH_VARIANTS = ("tma", "push", "ldst", "direct", "scarce")


def variant_environ(name: str) -> dict[str, str]:
    """Environment of one of `DISPATCH_VARIANTS`, with the combine that goes with it.

    "scarce" is direct with so few bytes that one rank has room in an operation and another has not.
    """
    environ = {
        "EPJIT_DISPATCH_VARIANT": "direct" if name == "scarce" else name,
        "EPJIT_COMBINE_VARIANT": "ldst" if name == "ldst" else "tma",
    }
    if name in ("direct", "scarce"):
        environ["EPJIT_DIRECT_BYTES"] = str(256 << 20 if name == "direct" else 300_000)
    return environ


def random_round(num_ranks: int, seed: int, *, num_sms: int, max_tokens: int) -> Round:
    """A round that differs from others in its routing and in much else; deterministic in `seed`."""
    rng = random.Random(seed)
    hidden, num_topk, is_fp8, index_dtype, combine_dtype = rng.choice(_SHAPES)
    with_topk = rng.random() < 0.8
    return Round(
        num_tokens=tuple(
            0 if rng.random() < 0.1 else rng.randint(1, max_tokens) for _ in range(num_ranks)
        ),
        hidden=hidden,
        num_experts=num_ranks * rng.choice((1, 2, 8)),
        num_topk=num_topk,
        kind=rng.choice(ROUTING_KINDS),
        seed=seed,
        fp8=rng.choice(SCALE_LAYOUTS) if is_fp8 else None,
        scale_dtype=rng.choice((torch.float32, torch.int32)),
        index_dtype=index_dtype,
        with_topk=with_topk,
        worst=with_topk and rng.random() < 0.3,
        alignment=rng.choice((1, 4, 128)),
        combine_dtype=combine_dtype,
        num_biases=rng.randrange(3),
        num_sms=num_sms,
        how=rng.choice(("sync", "async", "comm")),
        guess_wrong=tuple(rank for rank in range(num_ranks) if rng.random() < 0.4),
    )


def cast_round(num_ranks: int, seed: int, cast: str, *, num_sms: int, max_tokens: int) -> Round:
    """A random round whose rows are cast on the way."""
    case = random_round(num_ranks, seed, num_sms=num_sms, max_tokens=max_tokens)
    hidden = 512 if cast == "fp8_ue8m0" else 384
    return replace(case, fp8=None, cast=cast, hidden=hidden)


def make_world(case: Round) -> list[reference.RankInput]:
    """Inputs of every rank to dispatch, on the CPU."""
    world = []
    for rank, tokens in enumerate(case.num_tokens):
        idx = _topk_idx(case, rank)
        _, per_expert, in_rank = reference.layout(idx, case.num_experts, len(case.num_tokens))
        if case.cast is not None:
            x = rough_rows(tokens, case.hidden, seed=case.seed * 64 + rank)
            x, scales = x.to(case.combine_dtype), None
        elif case.fp8 is None:
            x, scales = payload(rank, tokens, case.hidden, torch.bfloat16), None
        else:
            x, scales = fp8_payload(
                rank, tokens, case.hidden, layout=case.fp8, scale_dtype=case.scale_dtype
            )
        weights = topk_weights(tokens, case.num_topk, seed=case.seed * 64 + rank)
        world.append(
            reference.RankInput(
                x,
                scales,
                idx if case.with_topk else None,
                weights if case.with_topk else None,
                in_rank,
                per_expert,
            )
        )
    return world


@dataclass(frozen=True)
class Made:
    """Inputs of all ranks, and the routing that follows; read only, for threads share it.

    Attributes:
        world: Inputs of every rank to dispatch, not cast.
        global_scale: Of the cast.
        topk_idx: Of every rank, also where it does not travel.
        num_worst: num_worst_tokens.
        dispatched: Results of every rank.
        handles: The same, of it the handles.
        others: Payload of the cached dispatch, not cast.
        cached: Results of every rank of that.
        outputs: Rows of every rank for combine.
        weights: The same, with `case.with_topk`.
    """

    world: list[reference.RankInput]
    global_scale: torch.Tensor | None
    topk_idx: list[torch.Tensor]
    num_worst: int
    dispatched: list[Dispatched]
    handles: list[Handle]
    others: list[torch.Tensor]
    cached: list[tuple[torch.Tensor, torch.Tensor | None]]
    outputs: list[torch.Tensor]
    weights: list[torch.Tensor] | None


@made_once
def make(case: Round, oracle: Normal) -> Made:
    """Inputs and expected results of all ranks."""
    world = make_world(case)
    num_worst = sum(case.num_tokens) + 3 if case.worst else 0
    num_ranks = len(case.num_tokens)
    scale = None
    if case.cast == NVFP4.name:
        scale = torch.tensor([0.05], dtype=torch.float32, device="cpu")
    dispatched = [
        oracle.dispatch(
            [_sent(case, each, scale) for each in world],
            rank,
            num_experts=case.num_experts,
            expert_alignment=case.alignment,
            num_worst_tokens=num_worst,
        )
        for rank in range(num_ranks)
    ]
    handles = [each.handle for each in dispatched]
    seed = case.seed * 64
    num_rows = [len(each.recv_x) for each in dispatched]
    others = [
        random_payload(tokens, case.hidden // 2, torch.float16, seed=seed + rank)
        if case.cast is None
        else rough_rows(tokens, case.hidden, seed=seed + 32 + rank).to(case.combine_dtype)
        for rank, tokens in enumerate(case.num_tokens)
    ]
    again = [
        _sent(case, replace(each, x=other, scales=None), scale)
        for each, other in zip(world, others, strict=True)
    ]
    xs = [each.x for each in again]
    all_scales = None if case.cast is None else [each.scales for each in again]
    return Made(
        world,
        scale,
        [_topk_idx(case, rank) for rank in range(num_ranks)],
        num_worst,
        dispatched,
        handles,
        others,
        [oracle.cached_dispatch(xs, all_scales, handles, rank) for rank in range(num_ranks)],
        [
            random_payload(rows, case.hidden, case.combine_dtype, seed=seed + 32 + rank)
            for rank, rows in enumerate(num_rows)
        ],
        [
            topk_weights(rows, case.num_topk, seed=seed + 32 + rank)
            for rank, rows in enumerate(num_rows)
        ]
        if case.with_topk
        else None,
    )


def layout_of(buffer: Buffer, topk_idx: torch.Tensor, num_experts: int) -> dict[str, Any]:
    """The arguments of dispatch that get_dispatch_layout finds."""
    per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(
        topk_idx, num_experts
    )
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_rdma_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }


def _sent(
    case: Round, given: reference.RankInput, global_scale: torch.Tensor | None
) -> reference.RankInput:
    """The rows of a rank as they travel."""
    return given if case.cast is None else cast_rows(given, CASTS[case.cast], global_scale)


def check_round(buffer: Buffer, case: Round) -> None:
    """Layout, dispatch, cached dispatch and combine, queued in one go; then every result.

    Raises:
        AssertionError: Names rank, tensor, row and column of the first difference.
    """
    rank, device, oracle = buffer.rank, buffer.device, Normal(buffer.topology.domains)
    made = make(case, oracle)
    own = made.world[rank]
    config = Config(case.num_sms)
    flags: dict[str, Any] = {
        "async_finish": case.how != "sync",
        "allocate_on_comm_stream": case.how == "comm",
    }

    def call(method: Any, *args: Any, **kwargs: Any) -> Any:
        previous = Buffer.capture() if case.how != "sync" else None
        results = method(*args, previous_event=previous, **flags, **kwargs)
        if case.how != "sync":
            assert results[-1].event is not None
            results[-1].current_stream_wait()
        else:
            assert results[-1].event is None
        return results[:-1]

    def on_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else to_device(tensor, device)

    casting = {"cast": case.cast, "global_scale": on_device(made.global_scale)}
    idx = to_device(made.topk_idx[rank], device)
    x, scales, weights = (on_device(each) for each in (own.x, own.scales, own.topk_weights))
    other, output = to_device(made.others[rank], device), to_device(made.outputs[rank], device)
    output_weights = None if made.weights is None else to_device(made.weights[rank], device)
    biases = tuple(
        random_payload(
            case.num_tokens[rank], case.hidden, case.combine_dtype, seed=case.seed * 64 + 48 + i
        )
        for i in range(case.num_biases)
    )
    biases_on_device = tuple(to_device(each, device) for each in biases)

    line_up(buffer)
    layout = call(buffer.get_dispatch_layout, idx, case.num_experts)
    per_rank, per_rdma_rank, per_expert, in_rank = layout
    with _guessing_wrong(buffer, case, made) if rank in case.guess_wrong else nullcontext():
        dispatched = call(
            buffer.dispatch,
            x if scales is None else (x, scales),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=idx if case.with_topk else None,
            topk_weights=weights,
            expert_alignment=case.alignment,
            num_worst_tokens=made.num_worst,
            config=config,
            **casting,
        )
    handle = dispatched[4]
    cached = call(buffer.dispatch, other, handle=handle, config=config, **casting)
    combined = call(
        buffer.combine,
        output,
        handle,
        topk_weights=output_weights,
        bias=_as_bias(biases_on_device),
        config=config,
    )
    settle(buffer)

    prefix = f"rank {rank}, seed {case.seed}"
    want_layout = oracle.layout(made.topk_idx[rank], case.num_experts)
    for name, got, want in zip(("R", "D", "E", "t"), layout, want_layout, strict=True):
        assert (got is None) == (want is None), name
        if want is not None:
            assert_rows_equal(got, want, f"{prefix}: layout {name}")
    _compare_dispatch(prefix, made.dispatched[rank], rank, dispatched)
    assert cached[1:] == (None, None, None, None)
    want_cached = Dispatched(*made.cached[rank])
    num_rows = int(made.handles[rank].num_received(rank))
    _compare_rows(f"{prefix}: cached", want_cached, num_rows, cached[0])
    want_combined, want_weights = oracle.combine(
        made.outputs, made.handles, rank, made.weights, _as_bias(biases)
    )
    assert_rows_equal(combined[0], want_combined, f"{prefix}: combined_x")
    assert (combined[1] is None) == (want_weights is None)
    if want_weights is not None:
        assert_rows_equal(combined[1], want_weights, f"{prefix}: combined_topk_weights")


@contextmanager
def _guessing_wrong(buffer: Buffer, case: Round, made: Made) -> Iterator[None]:
    """On a GPU: the first launch of a dispatch with new counts leaves at once, as one that follows.

    It has room for a row less than comes, or a token less that passes through, or for many more.
    """
    mode: Any = buffer._mode
    if buffer.device.type == "cpu" or case.worst:
        yield
        return
    handle = made.handles[buffer.rank]
    came = [int(handle.num_received(buffer.rank))]
    if isinstance(handle, InternodeHandle):
        came.append(handle.num_passing)
    sizes, least = list(came), 0
    short = case.seed % (1 + len(came))
    if short < len(came) and came[short]:
        sizes[short] -= 1
    else:
        sizes[0], least = came[0] + 100, came[0] + 1
    room = Room(tuple(sizes), least)
    with (
        mock.patch.object(mode, "_guess", return_value=room),
        mock.patch.object(mode, "_dispatch_rows", wraps=mode._dispatch_rows) as launches,
    ):
        yield
    assert [each.kwargs["least_rows"] for each in launches.call_args_list] == [least, -1]


def check_no_room(
    buffer: Buffer,
    case: Round,
    short: Sequence[int],
    *,
    capture: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]] | None = None,
) -> None:
    """Dispatches to ranks of which some have less room than rows come, and what follows.

    They say so, once a dispatch; nothing beside the outputs is touched; all that fits arrives and
    is combined, and the buffer works on without a reset.

    Args:
        buffer: Of this rank.
        case: Of the round; with top-k.
        short: Ranks that have room for half of their rows. Of the others some let the host wait.
        capture: Captures what a function queues; returns the replay, and what the function did.

    Raises:
        AssertionError: Names rank, tensor, row and column of the first difference.
    """
    rank, device, oracle = buffer.rank, buffer.device, Normal(buffer.topology.domains)
    world, config = make_world(case), Config(case.num_sms)
    came = sum(each.is_token_in_rank.sum(dim=0) for each in world).tolist()
    rooms = [
        rows // 2 if r in short else rows + 5 if r % 2 or capture is not None else 0
        for r, rows in enumerate(came)
    ]
    want = [
        oracle.dispatch(world, r, num_experts=case.num_experts, num_worst_tokens=rooms)
        for r in range(buffer.group_size)
    ]
    handles = [each.handle for each in want]
    own, n, num_rows = world[rank], int(handles[rank].num_received(rank)), len(want[rank].recv_x)
    x, idx, weights = (to_device(each, device) for each in (own.x, own.topk_idx, own.topk_weights))
    # What torch gives for recv_x is one of the holes; a canary lies behind it.
    rows = torch.full((num_rows, case.hidden), 7, dtype=torch.bfloat16)
    holes, canaries = zip(*[(rows.to(device), rows.to(device)) for _ in range(4)], strict=True)
    del holes

    def step() -> Any:
        layout = layout_of(buffer, idx, case.num_experts)
        return buffer.dispatch(
            x,
            **layout,
            topk_idx=idx,
            topk_weights=weights,
            num_worst_tokens=rooms[rank],
            config=config,
        )[:-1]

    def follow(recv_x: Any, _: Any, recv_weights: Any, counts: Any, handle: Any) -> Any:
        del counts
        cached, *_ = buffer.dispatch(x, handle=handle, config=config)
        combined, combined_weights, _ = buffer.combine(
            recv_x, handle, topk_weights=recv_weights, config=config
        )
        return cached, combined, combined_weights

    def hear() -> None:
        """The error, on a rank without room; the operations behind went on."""
        with pytest.raises(CommunicationError) if rank in short else nullcontext() as caught:
            settle(buffer)
        if rank in short:
            error = caught.value
            text = f"dispatch: {came[rank]} rows come to rank {rank}, which has room for {n};"
            assert str(error).startswith(text), error
            assert (error.op, error.rank, error.peer) == ("dispatch", rank, None)
            assert (error.seen, error.expected) == (came[rank], n)
        buffer.check_fault()  # once

    def compare(received: Any, followed: Any) -> None:
        prefix = f"rank {rank}, seed {case.seed}"
        cached, combined, combined_weights = followed
        settle(buffer)
        _compare_dispatch(prefix, want[rank], rank, received)
        assert_rows_equal(cached[:n], want[rank].recv_x[:n], f"{prefix}: cached recv_x")
        want_x, want_weights = oracle.combine(
            [each.recv_x for each in want],
            handles,
            rank,
            [each.recv_topk_weights for each in want if each.recv_topk_weights is not None],
        )
        assert_rows_equal(combined, want_x, f"{prefix}: combined_x")
        assert_rows_equal(combined_weights, want_weights, f"{prefix}: combined_topk_weights")
        for canary in canaries:
            assert_rows_equal(canary, rows, f"{prefix}: memory of another")

    line_up(buffer)
    received = step()
    hear()
    line_up(buffer)
    compare(received, follow(*received))
    if capture is not None:
        replay, outputs = capture(lambda: (received := step(), follow(*received)))
        for _ in range(3):
            line_up(buffer)
            replay()
            hear()
            compare(*outputs)
    check_round(buffer, case)


class Prepared:
    """The arguments of all operations on `buffer`, all compiled, and a good round behind them."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.case = Round(
            num_tokens=(32,) * buffer.group_size,
            hidden=256,
            num_experts=4 * buffer.group_size,
            seed=1,
            num_sms=4,
            kind="balanced",
            with_topk=False,  # the kernels of `queue`, and no more
        )
        check_round(buffer, self.case)
        own = make_world(self.case)[buffer.rank]
        self._config = Config(self.case.num_sms)
        self._x = to_device(own.x, buffer.device)
        idx = to_device(_topk_idx(self.case, buffer.rank), buffer.device)
        line_up(buffer)
        self._layout = layout_of(buffer, idx, self.case.num_experts)
        self._recv_x, _, _, _, self._handle, _ = self.queue("notify")
        # Compiled now: the first call of a kind meets the peers on the host.
        self.queue("combine")
        settle(buffer)

    def queue(self, op: str) -> tuple[Any, ...]:
        """One operation; "notify" is a dispatch that waits for counts on the host."""
        if op == "notify":
            return self.buffer.dispatch(self._x, config=self._config, **self._layout)
        if op == "dispatch":
            return self.buffer.dispatch(self._x, handle=self._handle, config=self._config)
        return self.buffer.combine(self._recv_x, self._handle, config=self._config)

    def complete(self, op: str) -> None:
        """One operation, to its end; what went wrong there is raised."""
        self.queue(op)
        settle(self.buffer)


def _topk_idx(case: Round, rank: int) -> torch.Tensor:
    return routing(
        case.kind,
        num_tokens=case.num_tokens[rank],
        num_experts=case.num_experts,
        num_topk=case.num_topk,
        num_ranks=len(case.num_tokens),
        seed=case.seed * 64 + rank,
        dtype=case.index_dtype,
    )


def _as_bias(biases: tuple[torch.Tensor, ...]) -> Any:
    return None if not biases else biases[0] if len(biases) == 1 else biases


def _compare_rows(prefix: str, want: Dispatched, num_rows: int, got_x: Any) -> None:
    got_rows, got_scales = got_x if isinstance(got_x, tuple) else (got_x, None)
    assert got_rows.shape == want.recv_x.shape
    assert_rows_equal(got_rows[:num_rows], want.recv_x[:num_rows], f"{prefix}: recv_x")
    assert (got_scales is None) == (want.recv_scales is None)
    if got_scales is not None and want.recv_scales is not None:
        assert got_scales.is_contiguous()
        assert_rows_equal(got_scales[:num_rows], want.recv_scales[:num_rows], f"{prefix}: scales")


def _compare_dispatch(prefix: str, want: Dispatched, rank: int, dispatched: Any) -> None:
    got_x, got_idx, got_weights, got_list, handle = dispatched
    num_rows = int(want.handle.num_received(rank))  # behind them only the indices are defined
    _compare_rows(prefix, want, num_rows, got_x)
    assert (got_idx is None) == (want.recv_topk_idx is None) == (got_weights is None)
    if want.recv_topk_idx is not None and want.recv_topk_weights is not None:
        assert_rows_equal(got_idx, want.recv_topk_idx, f"{prefix}: recv_topk_idx")
        assert_rows_equal(
            got_weights[:num_rows],
            want.recv_topk_weights[:num_rows],
            f"{prefix}: recv_topk_weights",
        )
    assert got_list == want.num_recv_tokens_per_expert_list, f"{prefix}: {got_list}"
    assert isinstance(handle, tuple)
    assert [each.shape for each in handle] == [each.shape for each in want.handle]
    for name, got, expected in _defined(handle, want.handle, rank):
        assert_rows_equal(got, expected, f"{prefix}: handle {name}")
