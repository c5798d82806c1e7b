"""Types of `Buffer`'s results; checked by test_types.py, never run."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_type

import torch
from torch import Tensor

import epjit
from epjit.calls import Payload
from epjit.handles import ExpertHandle, Handle, LowLatencyHandle

Pair = tuple[Tensor, Tensor]


def normal(buffer: epjit.Buffer, x: Tensor, scales: Tensor, idx: Tensor, weights: Tensor) -> None:
    per_rank, _, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, 8)
    rows, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
    )
    assert_type(rows, Tensor)
    assert_type(recv_idx, Tensor)
    assert_type(counts, list[int])
    assert_type(handle, Handle)
    buffer.combine(rows, handle, topk_weights=recv_weights)
    pair, nothing, _, _, _, _ = buffer.dispatch(
        (x, scales),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=event,
        async_finish=True,
    )
    assert_type(pair, Pair)
    assert_type(nothing, None)
    cached, _, _, no_counts, no_handle, _ = buffer.dispatch(x, handle)
    assert_type(cached, Tensor)
    assert_type(no_counts, None)
    assert_type(no_handle, None)
    cached_pair, *_ = buffer.dispatch((x, scales), handle=handle, config=epjit.Config(20))
    assert_type(cached_pair, Pair)

    cast, cast_idx, _, _, cast_handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
        cast="fp8",
    )
    assert_type(cast, Pair)
    assert_type(cast_idx, Tensor)
    assert_type(cast_handle, Handle)
    cast_again, *_ = buffer.dispatch(x, handle, cast="nvfp4", global_scale=scales)
    assert_type(cast_again, Pair)


def by_expert(buffer: epjit.Buffer, x: Tensor, scales: Tensor, idx: Tensor, w: Tensor) -> None:
    rows, weights, handle, _ = buffer.expert_dispatch(x, idx, w, num_experts=8)
    assert_type(rows, Tensor)
    assert_type(weights, Tensor)
    assert_type(handle, ExpertHandle)
    pair, none, _, _ = buffer.expert_dispatch((x, scales), idx, num_experts=8, zero_padding=True)
    assert_type(pair, Pair)
    assert_type(none, None)
    again, of_rows, _, _ = buffer.expert_dispatch(x, handle=handle, topk_weights=w)
    assert_type(again, Tensor)
    assert_type(of_rows, Tensor)
    cast, no_weights, _, _ = buffer.expert_dispatch(x, idx, num_experts=8, cast="mxfp8")
    assert_type(cast, Pair)
    assert_type(no_weights, None)
    combined, nothing, _ = buffer.expert_combine(rows, handle, row_weights=weights)
    assert_type(combined, Tensor)
    assert_type(nothing, None)
    _, back, _ = buffer.expert_combine(rows, handle, topk_weights=weights)
    assert_type(back, Tensor)


def any_by_expert(
    buffer: epjit.Buffer, x: Payload, idx: Tensor, w: Tensor | None, cast: str | None
) -> None:
    rows, weights, _, _ = buffer.expert_dispatch(x, idx, w, num_experts=8, cast=cast)
    assert_type(rows, Tensor | Pair)
    assert_type(weights, Tensor | None)


def general(buffer: epjit.Buffer, x: Payload, handle: Handle | None) -> None:
    rows, _, _, _, made, _ = buffer.dispatch(x, handle, None)
    assert_type(rows, Tensor | Pair)
    assert_type(made, Handle | None)


def low_latency(buffer: epjit.Buffer, x: Tensor, idx: Tensor, weights: Tensor) -> None:
    (_, scales), _, handle, _, hook = buffer.low_latency_dispatch(
        x, idx, 128, 8, return_recv_hook=True
    )
    assert_type(scales, Tensor)
    assert_type(handle, LowLatencyHandle)
    assert_type(hook, Callable[[], None])
    hook()
    plain, _, _, _, none = buffer.low_latency_dispatch(x, idx, 128, 8, use_fp8=False)
    assert_type(plain, Tensor)
    assert_type(none, None)
    cast, *_ = buffer.low_latency_dispatch(x, idx, 128, 8, round_scale=True, use_ue8m0=True)
    assert_type(cast, Pair)
    slabs, _, _, _, wait = buffer.low_latency_dispatch(
        x, idx, 128, 8, use_fp8=False, return_recv_hook=True
    )
    assert_type(slabs, Tensor)
    wait()
    out, _, receive = buffer.low_latency_combine(plain, idx, weights, handle, return_recv_hook=True)
    receive()
    assert_type(out, Tensor)
    _, event, nothing = buffer.low_latency_combine(plain, idx, weights, handle, async_finish=True)
    event.current_stream_wait()
    assert_type(nothing, None)


def either(buffer: epjit.Buffer, x: Tensor, idx: Tensor, use_fp8: bool, hooks: bool) -> None:
    got, _, _, _, hook = buffer.low_latency_dispatch(
        x, idx, 128, 8, use_fp8=use_fp8, return_recv_hook=hooks
    )
    assert_type(got, Tensor | Pair)
    assert_type(hook, Callable[[], None] | None)


def life(group: torch.distributed.ProcessGroup) -> None:
    with epjit.Buffer(group, num_nvl_bytes=1 << 20) as buffer:
        assert_type(buffer, epjit.Buffer)
