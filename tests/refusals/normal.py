"""Refused calls of the normal mode in one NVLink domain, and of other members of `Buffer`."""

from __future__ import annotations

import torch
from torch import float32, int32, int64

from epjit import Buffer, Config
from tests.refusals.table import (
    HIDDEN,
    NUM_RDMA_BYTES,
    NUM_TOKENS,
    Refusal,
    assertion_error,
    runtime_error,
    type_error,
    value_error,
)

LAYOUT: dict[str, Refusal] = {
    "no tensor": type_error(lambda b: b.layout([[1, 2]]), r"topk_idx is a list.*torch\.Tensor"),
    "dim": value_error(lambda b: b.layout(b.idx[0]), r"topk_idx.*\(4,\).*\(num_tokens, num_topk\)"),
    "dtype": type_error(
        lambda b: b.layout(b.idx.short()), r"topk_idx.*int16.*int64 or torch\.int32.*\.to\(\)"
    ),
    "device": value_error(lambda b: b.layout(b.idx.to("meta")), r"topk_idx is on meta.*no values"),
    "strides": value_error(
        lambda b: b.layout(b.idx[:, ::2]), r"topk_idx.*strides \(4, 2\).*\.contiguous\(\)"
    ),
    "top-k 0": value_error(lambda b: b.layout(b.idx[:, :0]), r"top-k is 0.*between 1 and 32"),
    "top-k 33": value_error(
        lambda b: b.layout(b.full(6, 33, dtype=int64)), r"top-k is 33.*between 1 and 32"
    ),
    "experts 0": value_error(
        lambda b: b.layout(num_experts=0), r"num_experts is 0.*positive multiple"
    ),
    "experts negative": value_error(
        lambda b: b.layout(num_experts=-2), r"num_experts is -2.*positive multiple"
    ),
    "experts odd": value_error(
        lambda b: b.layout(num_experts=7), r"num_experts is 7.*multiple of the 2 ranks"
    ),
    "experts many": value_error(
        lambda b: b.layout(num_experts=65538), r"num_experts is 65538.*at most"
    ),
    "allocate without event": runtime_error(
        lambda b: b.layout(async_finish=True, allocate_on_comm_stream=True),
        r"allocate_on_comm_stream=True needs a previous_event.*without an event",
        gpu_only=True,
    ),
    "allocate and sync": runtime_error(
        lambda b: b.layout(previous_event=Buffer.capture(), allocate_on_comm_stream=True),
        r"allocate_on_comm_stream=True needs.*async_finish=False",
        gpu_only=True,
    ),
}


DISPATCH: dict[str, Refusal] = {
    "x no tensor": type_error(lambda b: b.dispatch(x=[1]), r"x is a list.*torch\.Tensor"),
    "x dim": value_error(
        lambda b: b.dispatch(x=b.x[0]), r"x has shape \(64,\).*\(num_tokens, hidden\)"
    ),
    "x device": value_error(lambda b: b.dispatch(x=b.x.to("meta")), r"x is on meta.*no values"),
    "config a number": type_error(
        lambda b: b.dispatch(config=24), r"config is a int, expected a Config"
    ),
    "x strides": value_error(
        lambda b: b.dispatch(x=b.x[:, ::2]), r"x has strides \(64, 2\).*\.contiguous\(\)"
    ),
    "x row bytes": value_error(
        lambda b: b.dispatch(x=b.full(6, 4)), r"rows of 8 bytes.*multiple of 16"
    ),
    "x empty rows": value_error(
        lambda b: b.dispatch(x=b.full(6, 0)), r"rows of 0 bytes.*multiple of 16"
    ),
    "x long rows": value_error(
        lambda b: b.dispatch(x=b.full(6, 16392)), r"rows of 32784 bytes.*most 32768"
    ),
    "x address": value_error(
        lambda b: b.dispatch(x=b.misaligned(6)), r"x.*address 0x[0-9a-f]+2\b.*16.*\.clone\(\)"
    ),
    "x tuple of 3": type_error(lambda b: b.dispatch(x=(b.x, b.x, b.x)), r"tuple of 3.*(2|two)"),
    "x wide with scales": type_error(
        lambda b: b.dispatch(x=(b.x, b.full(6, 1, dtype=float32))), r"bfloat16.*one byte an element"
    ),
    "scales dtype": type_error(
        lambda b: b.dispatch(x=(b.fp8(), b.full(6, 1, dtype=torch.float64))),
        r"scales.*float64.*float32 or torch\.int32",
    ),
    "scales rows": value_error(
        lambda b: b.dispatch(x=(b.fp8(), b.full(5, 1, dtype=float32))),
        r"scales.*\(5, 1\).*\(6, num_scales\).*each token",
    ),
    "scales dim": value_error(
        lambda b: b.dispatch(x=(b.fp8(), b.full(6, dtype=float32))),
        r"scales.*\(6,\).*\(6, num_scales\)",
    ),
    "scales device": value_error(
        lambda b: b.dispatch(x=(b.fp8(), torch.zeros(6, 1, device="meta", dtype=float32))),
        r"scales.* is on meta.*no values",
    ),
    **{
        f"no {name}": assertion_error(
            lambda b, name=name: b.dispatch(**{name: None}),
            rf"needs {name} from get_dispatch_layout",
        )
        for name in ("num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert")
    },
    "no layout": assertion_error(
        lambda b: b.buffer.dispatch(b.x),
        r"num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert",
    ),
    "per rank shape": value_error(
        lambda b: b.dispatch(num_tokens_per_rank=b.full(3, dtype=int32)),
        r"num_tokens_per_rank.*\(3,\).*\(2\)",
    ),
    "per rank dtype": type_error(
        lambda b: b.dispatch(num_tokens_per_rank=b.per_rank.long()),
        r"num_tokens_per_rank.*int64.*int32",
    ),
    "per rank device": value_error(
        lambda b: b.dispatch(num_tokens_per_rank=b.per_rank.to("meta")),
        r"num_tokens_per_rank is on meta.*no values",
    ),
    "per rank strides": value_error(
        lambda b: b.dispatch(num_tokens_per_rank=b.full(4, dtype=int32)[::2]),
        r"num_tokens_per_rank.*strides \(2,\).*\.contiguous\(\)",
    ),
    "in rank rows": value_error(
        lambda b: b.dispatch(is_token_in_rank=b.in_rank[1:]),
        r"is_token_in_rank.*\(5, 2\).*\(6, 2\).*each token of x",
    ),
    "in rank columns": value_error(
        lambda b: b.dispatch(is_token_in_rank=b.full(6, 3, dtype=torch.bool)),
        r"is_token_in_rank.*\(6, 3\).*\(6, 2\)",
    ),
    "in rank dtype": type_error(
        lambda b: b.dispatch(is_token_in_rank=b.in_rank.int()), r"is_token_in_rank.*int32.*bool"
    ),
    "in rank strides": value_error(
        lambda b: b.dispatch(is_token_in_rank=b.full(2, 6, dtype=torch.bool).t()),
        r"is_token_in_rank.*strides \(1, 6\).*\.contiguous\(\)",
    ),
    "in rank device": value_error(
        lambda b: b.dispatch(is_token_in_rank=b.in_rank.to("meta")),
        r"is_token_in_rank is on meta.*no values",
    ),
    "per expert dim": value_error(
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert[None]),
        r"num_tokens_per_expert.*\(1, 8\).*\(num_experts\)",
    ),
    "per expert dtype": type_error(
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert.long()),
        r"num_tokens_per_expert.*int64.*int32",
    ),
    "per expert device": value_error(
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert.to("meta")),
        r"num_tokens_per_expert is on meta.*no values",
    ),
    "per expert odd": value_error(
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert[:7]),
        r"num_experts is 7.*multiple of the 2 ranks",
    ),
    "per expert none": value_error(
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert[:0]), r"num_experts is 0.*positive"
    ),
    "per expert many": value_error(
        lambda b: b.dispatch(num_tokens_per_expert=b.full(65538, dtype=int32)),
        r"num_experts is 65538.*at most",
    ),
    "experts of a rank": value_error(
        lambda b: b.dispatch(num_tokens_per_expert=b.full(16386, dtype=int32)),
        r"num_experts is 16386.*at most (16384|8192)",
    ),
    "only topk_idx": value_error(
        lambda b: b.dispatch(topk_weights=None), r"topk_idx and topk_weights.*together"
    ),
    "only topk_weights": value_error(
        lambda b: b.dispatch(topk_idx=None), r"topk_idx and topk_weights.*together"
    ),
    "topk_idx rows": value_error(
        lambda b: b.dispatch(topk_idx=b.idx[1:]),
        r"topk_idx.*\(5, 4\).*\(6, num_topk\).*each token of x",
    ),
    "topk_idx dtype": type_error(
        lambda b: b.dispatch(topk_idx=b.idx.short()), r"topk_idx.*int16.*int64"
    ),
    "topk_idx device": value_error(
        lambda b: b.dispatch(topk_idx=b.idx.to("meta")), r"topk_idx is on meta"
    ),
    "topk_idx strides": value_error(
        lambda b: b.dispatch(topk_idx=b.idx[:, ::2]),
        r"topk_idx.*strides \(4, 2\).*\.contiguous\(\)",
    ),
    "top-k 0": value_error(
        lambda b: b.dispatch(topk_idx=b.idx[:, :0], topk_weights=b.weights[:, :0]),
        r"top-k is 0.*between 1 and 32",
    ),
    "top-k 33": value_error(
        lambda b: b.dispatch(topk_idx=b.full(6, 33, dtype=int64)), r"top-k is 33.*between 1 and 32"
    ),
    "weights dtype": type_error(
        lambda b: b.dispatch(topk_weights=b.weights.bfloat16()), r"topk_weights.*bfloat16.*float32"
    ),
    "weights shape": value_error(
        lambda b: b.dispatch(topk_weights=b.full(6, 3, dtype=float32)),
        r"topk_weights.*\(6, 3\).*\(6, 4\).*topk_idx",
    ),
    "weights strides": value_error(
        lambda b: b.dispatch(topk_weights=b.full(4, 6, dtype=float32).t()),
        r"topk_weights.*strides \(1, 6\).*\.contiguous\(\)",
    ),
    "alignment 0": value_error(
        lambda b: b.dispatch(expert_alignment=0), r"expert_alignment is 0.*at least 1"
    ),
    "alignment negative": value_error(
        lambda b: b.dispatch(expert_alignment=-4), r"expert_alignment is -4.*at least 1"
    ),
    "cast unknown": value_error(
        lambda b: b.dispatch(cast="int8"), r"cast is 'int8'.*fp8, fp8_round, .*nvfp4"
    ),
    "cast of bytes": type_error(
        lambda b: b.dispatch(x=b.fp8(), cast="fp8"), r"cast='fp8' takes.*float8_e4m3fn"
    ),
    "cast of rows with scales": type_error(
        lambda b: b.dispatch(x=(b.fp8(), b.full(NUM_TOKENS, 1, dtype=float32)), cast="fp8"),
        r"cast='fp8' takes.*rows with scales",
    ),
    "cast hidden": value_error(
        lambda b: b.dispatch(cast="fp8_ue8m0"), r"hidden is 64.*multiple of 512 for fp8_ue8m0"
    ),
    "scale missing": value_error(
        lambda b: b.dispatch(cast="nvfp4"), r"global_scale is missing.*nvfp4 have one"
    ),
    "scale given": value_error(
        lambda b: b.dispatch(global_scale=b.full(1, dtype=float32)),
        r"global_scale is given.*cast to None have none",
    ),
    "worst negative": value_error(
        lambda b: b.dispatch(num_worst_tokens=-1), r"num_worst_tokens is -1.*not be negative"
    ),
    "worst without top-k": value_error(
        lambda b: b.dispatch(num_worst_tokens=9, topk_idx=None, topk_weights=None),
        r"num_worst_tokens needs topk_idx",
    ),
    "sms odd": value_error(lambda b: b.dispatch(config=Config(3)), r"num_sms is 3\b.*even"),
    "sms 0": value_error(lambda b: b.dispatch(config=Config(0)), r"num_sms is 0\b.*between 2"),
    "sms many": value_error(
        lambda b: b.dispatch(config=Config(10000)), r"num_sms is 10000\b.*between 2 and \d+"
    ),
    "destroyed": runtime_error(lambda b: b.destroyed.dispatch(b.x, handle=b.handle), r"destroyed"),
    "allocate without event": runtime_error(
        lambda b: b.dispatch(async_finish=True, allocate_on_comm_stream=True),
        r"allocate_on_comm_stream=True needs a previous_event",
        gpu_only=True,
    ),
}


CACHED: dict[str, Refusal] = {
    "cast": value_error(lambda b: b.cached(cast="fp8"), r"hidden is 64.*multiple of 128 for fp8"),
    "with topk_idx": value_error(
        lambda b: b.cached(topk_idx=b.idx), r"cached dispatch.*no topk_idx"
    ),
    "with topk_weights": value_error(
        lambda b: b.cached(topk_weights=b.weights), r"no topk_weights"
    ),
    "other tokens": value_error(lambda b: b.cached(x=b.x[1:]), r"x has 5 tokens.*routes 6"),
    "handle type": type_error(lambda b: b.cached(handle="handle"), r"handle is a str.*tuple of 6"),
    "handle length": type_error(lambda b: b.cached(handle=b.handle[:5]), r"tuple of 5.*tuple of 6"),
    "handle ranks": value_error(
        lambda b: b.cached(handle=b.handle_of_3), r"3 ranks.*this Buffer has 2"
    ),
    "handle of two dispatches": value_error(
        lambda b: b.cached(handle=(*b.handle[:1], b.handle[1][:1], *b.handle[2:])),
        r"handle\[1\] has 1 elements, but .* 6 tokens between 2 ranks has 2; pass the handle",
    ),
    "handle of no tensors": type_error(
        lambda b: b.cached(handle=(1, 2, 3, 4, 5, 6)), r"handle\[0\].*int"
    ),
    "handle device": value_error(
        lambda b: b.cached(handle=tuple(each.to("meta") for each in b.handle)),
        r"handle\[0\] is on meta",
    ),
    "row bytes": value_error(
        lambda b: b.cached(x=b.full(6, 12)), r"rows of 24 bytes.*multiple of 16"
    ),
    "sms odd": value_error(lambda b: b.cached(config=Config(5)), r"num_sms is 5\b.*even"),
}


COMBINE: dict[str, Refusal] = {
    "rows": value_error(
        lambda b: b.combine(x=b.full(1, HIDDEN)), r"x has shape \(1, 64\).*row of the dispatch"
    ),
    "dim": value_error(lambda b: b.combine(x=b.recv_x[0]), r"x has shape \(64,\).*\(\d+, hidden\)"),
    "dtype": type_error(
        lambda b: b.combine(x=b.recv_x.float()), r"float32.*bfloat16 or torch\.float16"
    ),
    "device": value_error(lambda b: b.combine(x=b.recv_x.to("meta")), r"x is on meta.*no values"),
    "strides": value_error(
        lambda b: b.combine(x=b.recv_x[:, ::2]), r"x has strides.*\.contiguous\(\)"
    ),
    "row bytes": value_error(
        lambda b: b.combine(x=b.full(len(b.recv_x), 4)), r"rows of 8 bytes.*multiple of 16"
    ),
    "long rows": value_error(
        lambda b: b.combine(x=b.full(len(b.recv_x), 16392)), r"rows of 32784 bytes"
    ),
    "address": value_error(
        lambda b: b.combine(x=b.misaligned(len(b.recv_x))), r"x.*address 0x.*\.clone\(\)"
    ),
    "weights rows": value_error(
        lambda b: b.combine(topk_weights=b.full(1, 4, dtype=float32)),
        r"topk_weights.*\(1, 4\).*each row of x",
    ),
    "weights dim": value_error(
        lambda b: b.combine(topk_weights=b.recv_weights[:, 0].contiguous()),
        r"topk_weights.*num_topk",
    ),
    "weights dtype": type_error(
        lambda b: b.combine(topk_weights=b.recv_weights.half()), r"topk_weights.*float16.*float32"
    ),
    "weights top-k 33": value_error(
        lambda b: b.combine(topk_weights=b.full(len(b.recv_x), 33, dtype=float32)),
        r"top-k is 33.*between 1 and 32",
    ),
    "bias rows": value_error(
        lambda b: b.combine(bias=b.full(5, HIDDEN)),
        r"bias_0.*\(5, 64\).*\(6, 64\).*each token of this rank",
    ),
    "bias hidden": value_error(
        lambda b: b.combine(bias=b.full(6, 32)), r"bias_0.*\(6, 32\).*\(6, 64\)"
    ),
    "bias dtype": type_error(lambda b: b.combine(bias=b.x.float()), r"bias_0.*float32.*bfloat16"),
    "second bias": value_error(
        lambda b: b.combine(bias=(b.x, b.full(7, HIDDEN))), r"bias_1.*\(7, 64\)"
    ),
    "three biases": value_error(
        lambda b: b.combine(bias=(b.x, b.x, b.x)), r"tuple of 3.*tuple of two"
    ),
    "bias list": type_error(lambda b: b.combine(bias=[b.x, b.x]), r"bias.* list.*Tensor"),
    "bias address": value_error(
        lambda b: b.combine(bias=b.misaligned(6)), r"bias_0.*address 0x.*\.clone\(\)"
    ),
    "no handle": type_error(lambda b: b.combine(handle=None), r"handle is a NoneType.*tuple of 6"),
    "handle length": type_error(
        lambda b: b.combine(handle=(*b.handle, None)), r"tuple of 7.*tuple of 6"
    ),
    "handle ranks": value_error(
        lambda b: b.combine(handle=b.handle_of_3), r"3 ranks.*this Buffer has 2"
    ),
    "sms odd": value_error(lambda b: b.combine(config=Config(7)), r"num_sms is 7\b.*even"),
    "sms 0": value_error(lambda b: b.combine(config=Config(0)), r"num_sms is 0\b.*between 2"),
    "sms many": value_error(
        lambda b: b.combine(config=Config(10000)), r"num_sms is 10000\b.*between 2 and \d+"
    ),
    "destroyed": runtime_error(lambda b: b.destroyed.combine(b.recv_x, b.handle), r"destroyed"),
    "allocate without event": runtime_error(
        lambda b: b.combine(async_finish=True, allocate_on_comm_stream=True),
        r"allocate_on_comm_stream=True needs a previous_event",
        gpu_only=True,
    ),
}


MEMBERS: dict[str, Refusal] = {
    "destroyed layout": runtime_error(
        lambda b: b.destroyed.get_dispatch_layout(b.idx, 8), r"destroyed"
    ),
    "destroyed view": runtime_error(
        lambda b: b.destroyed.get_local_buffer_tensor(torch.int8), r"destroyed"
    ),
    "destroyed reset": runtime_error(lambda b: b.destroyed.reset(), r"destroyed"),
    "warmup cast": value_error(
        lambda b: b.buffer.warmup(100 * 16, num_topk=2, cast="fp8"), r"hidden is 800.*for fp8"
    ),
    "warmup cast unknown": value_error(
        lambda b: b.buffer.warmup(1024, cast="int8"), r"cast is 'int8'"
    ),
    "warmup cast of rows with scales": value_error(
        lambda b: b.buffer.warmup(1024, num_scales=8, cast="fp8"), r"num_scales is 8 with cast"
    ),
    "warmup by expert": value_error(
        lambda b: b.buffer.warmup(1024, expert_major=True), r"expert_major=True needs num_topk"
    ),
    "destroyed warmup": runtime_error(lambda b: b.destroyed.warmup(1024), r"destroyed"),
    "destroyed check": runtime_error(lambda b: b.destroyed.check_fault(), r"destroyed"),
    "destroyed twice": assertion_error(lambda b: b.destroyed.destroy(), r"destroyed already"),
    "view offset": value_error(
        lambda b: b.buffer.get_local_buffer_tensor(torch.int32, offset=2),
        r"offset is 2 bytes.*multiple of 4",
    ),
    "view negative": value_error(
        lambda b: b.buffer.get_local_buffer_tensor(torch.int8, offset=-1), r"offset is -1 bytes"
    ),
    "view behind": value_error(
        lambda b: b.buffer.get_local_buffer_tensor(torch.int8, offset=b.buffer.num_nvl_bytes + 1),
        r"offset is \d+ bytes.*up to \d+",
    ),
    "view size": value_error(
        lambda b: b.buffer.get_local_buffer_tensor(torch.int8, torch.Size((1 << 16, 1 << 16))),
        r"size \(65536, 65536\) has 4294967296 elements.*only \d+ are there",
    ),
    "view of rdma": value_error(
        lambda b: b.normal.get_local_buffer_tensor(torch.int8, torch.Size((1,)), 0, True),
        r"size \(1,\) has 1 elements.*only 0",
    ),
    "view behind rdma": value_error(
        lambda b: b.buffer.get_local_buffer_tensor(
            torch.int8, offset=NUM_RDMA_BYTES + 1, use_rdma_buffer=True
        ),
        r"offset is \d+ bytes.*up to 262144",
    ),
}
