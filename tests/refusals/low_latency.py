"""Refused low-latency calls."""

from __future__ import annotations

import torch
from torch import float32, int32, int64

from tests.refusals.table import (
    LL_HIDDEN,
    MAX_TOKENS,
    NUM_EXPERTS,
    NUM_TOKENS,
    Refusal,
    runtime_error,
    type_error,
    value_error,
)

LOW_LATENCY_DISPATCH: dict[str, Refusal] = {
    "destroyed": runtime_error(
        lambda b: b.destroyed.low_latency_dispatch(b.ll_x, b.idx, MAX_TOKENS, NUM_EXPERTS),
        r"destroyed",
    ),
    "normal buffer": runtime_error(
        lambda b: b.normal.low_latency_dispatch(b.ll_x, b.idx, MAX_TOKENS, NUM_EXPERTS),
        r"low_latency_dispatch needs.*low_latency_mode=True.*get_low_latency_rdma_size_hint",
    ),
    "event and hook": value_error(
        lambda b: b.ll_dispatch(async_finish=True, return_recv_hook=True),
        r"async_finish and return_recv_hook exclude",
    ),
    "ue8m0 alone": value_error(
        lambda b: b.ll_dispatch(use_fp8=True, use_ue8m0=True),
        r"use_ue8m0=True.*pass round_scale=True",
    ),
    "quantization": value_error(
        lambda b: b.ll_dispatch(use_fp8=True, quantization="fp4"),
        r"quantization is 'fp4'.*'mxfp8', 'nvfp4'",
    ),
    "quantization and bf16": value_error(
        lambda b: b.ll_dispatch(use_fp8=False, quantization="mxfp8"),
        r"quantization='mxfp8'.*use_fp8=False.*defaults",
    ),
    "quantization and rounding": value_error(
        lambda b: b.ll_dispatch(quantization="mxfp8", round_scale=True),
        r"quantization='mxfp8'.*round_scale=True.*defaults",
    ),
    "x no tensor": type_error(lambda b: b.ll_dispatch(x=[1]), r"x is a list.*Tensor"),
    "x dim": value_error(
        lambda b: b.ll_dispatch(x=b.ll_x[0]), r"x has shape \(512,\).*\(num_tokens, hidden\)"
    ),
    "x dtype": type_error(
        lambda b: b.ll_dispatch(x=b.ll_x.half()), r"x has dtype torch.float16.*bfloat16.*\.to\(\)"
    ),
    "x device": value_error(
        lambda b: b.ll_dispatch(x=b.ll_x.to("meta")), r"x is on meta.*no values"
    ),
    "weights": value_error(
        lambda b: b.ll_dispatch(topk_weights=b.weights[:, :1]),
        r"topk_weights has shape \(\d+, 1\).*as topk_idx",
    ),
    "weights dtype": type_error(
        lambda b: b.ll_dispatch(topk_weights=b.weights.half()),
        r"topk_weights has dtype torch.float16.*float32",
    ),
    "x strides": value_error(
        lambda b: b.ll_dispatch(x=b.ll_x[:, ::2]), r"x has strides \(512, 2\).*\.contiguous\(\)"
    ),
    "x address": value_error(
        lambda b: b.ll_dispatch(x=b.misaligned(NUM_TOKENS, LL_HIDDEN)),
        r"x.*address 0x[0-9a-f]+2\b.*16.*\.clone\(\)",
    ),
    **{
        f"hidden {hidden} {name}": value_error(
            lambda b, hidden=hidden, flags=flags: b.ll_dispatch(
                x=b.full(NUM_TOKENS, hidden), **flags
            ),
            rf"hidden is {hidden}\b.*{name} must have a multiple of {granularity} channels.*16384",
        )
        for hidden, name, granularity, flags in (
            (0, "bf16", 8, {}),
            (12, "bf16", 8, {}),
            (16392, "bf16", 8, {}),
            (192, "fp8", 128, {"use_fp8": True}),
            (640, "fp8_ue8m0", 512, {"use_fp8": True, "round_scale": True, "use_ue8m0": True}),
            (48, "mxfp8", 32, {"quantization": "mxfp8"}),
            (48, "nvfp4", 32, {"quantization": "nvfp4"}),
        )
    },
    **{
        f"max tokens {value}": value_error(
            lambda b, value=value: b.ll_dispatch(num_max_dispatch_tokens_per_rank=value),
            rf"num_max_dispatch_tokens_per_rank is {value}, .*between 1 and 131072 for 2 ranks",
        )
        for value in (0, -1, 131073)
    },
    "more tokens than the maximum": value_error(
        lambda b: b.ll_dispatch(num_max_dispatch_tokens_per_rank=5),
        r"has 6 tokens, more than num_max_dispatch_tokens_per_rank=5; pass a larger",
    ),
    **{
        f"experts {value}": value_error(
            lambda b, value=value: b.ll_dispatch(num_experts=value),
            rf"num_experts is {value}, .*multiple of the 2 ranks, at most 8192",
        )
        for value in (0, -2, 7, 8194)
    },
    "topk_idx rows": value_error(
        lambda b: b.ll_dispatch(topk_idx=b.idx[1:]),
        r"topk_idx.*\(5, 4\).*\(6, num_topk\).*each token of x",
    ),
    "topk_idx dtype": type_error(
        lambda b: b.ll_dispatch(topk_idx=b.idx.short()), r"topk_idx.*int16.*int64 or torch.int32"
    ),
    "topk_idx device": value_error(
        lambda b: b.ll_dispatch(topk_idx=b.idx.to("meta")), r"topk_idx is on meta"
    ),
    "topk_idx strides": value_error(
        lambda b: b.ll_dispatch(topk_idx=b.idx[:, ::2]),
        r"topk_idx.*strides \(4, 2\).*\.contiguous\(\)",
    ),
    "top-k 0": value_error(
        lambda b: b.ll_dispatch(topk_idx=b.idx[:, :0]), r"top-k is 0.*between 1 and 32"
    ),
    "top-k 33": value_error(
        lambda b: b.ll_dispatch(topk_idx=b.full(NUM_TOKENS, 33, dtype=int64)),
        r"top-k is 33.*between 1 and 32",
    ),
    "choices": value_error(
        lambda b: b.ll_dispatch(
            topk_idx=b.full(NUM_TOKENS, 32, dtype=int64),
            num_max_dispatch_tokens_per_rank=4097,
        ),
        r"4097 tokens with 32 choices are 131104 rows.*at most 131072; pass a smaller",
    ),
    "no global scale": value_error(
        lambda b: b.ll_dispatch(quantization="nvfp4"), r"nvfp4.*needs global_scale.*\(1,\)"
    ),
    "global scale shape": value_error(
        lambda b: b.ll_dispatch(quantization="nvfp4", global_scale=b.full(2, dtype=float32)),
        r"global_scale has shape \(2,\), expected \(1\)",
    ),
    "global scale dtype": type_error(
        lambda b: b.ll_dispatch(quantization="nvfp4", global_scale=b.full(1)),
        r"global_scale.*bfloat16.*float32",
    ),
    "global scale device": value_error(
        lambda b: b.ll_dispatch(
            quantization="nvfp4",
            global_scale=torch.ones(1, dtype=float32, device="meta"),
        ),
        r"global_scale is on meta",
    ),
    "global scale of another format": value_error(
        lambda b: b.ll_dispatch(global_scale=b.full(1, dtype=float32)),
        r"global_scale is given.*bf16.*'nvfp4' only",
    ),
    "stats shape": value_error(
        lambda b: b.ll_dispatch(
            cumulative_local_expert_recv_stats=b.full(NUM_EXPERTS, dtype=int32)
        ),
        r"cumulative_local_expert_recv_stats.*\(8,\), expected \(4\).*each local expert",
    ),
    "stats dtype": type_error(
        lambda b: b.ll_dispatch(cumulative_local_expert_recv_stats=b.full(4, dtype=int64)),
        r"cumulative_local_expert_recv_stats.*int64.*int32",
    ),
    "wait cost shape": value_error(
        lambda b: b.ll_dispatch(dispatch_wait_recv_cost_stats=b.full(2, 2, dtype=int64)),
        r"dispatch_wait_recv_cost_stats.*\(2, 2\), expected \(2\).*each rank",
    ),
    "wait cost dtype": type_error(
        lambda b: b.ll_dispatch(dispatch_wait_recv_cost_stats=b.full(2, dtype=int32)),
        r"dispatch_wait_recv_cost_stats.*int32.*int64",
    ),
    "room": value_error(
        lambda b: b.ll_dispatch(num_max_dispatch_tokens_per_rank=64),
        r"dispatch in bf16 of 64 tokens a rank, hidden 512 and 8 experts needs num_rdma_bytes >= "
        r"720896, but this Buffer has 262144; make it with "
        r"Buffer.get_low_latency_rdma_size_hint\(64, 512, 2, 8\), which is \d+",
    ),
}


LOW_LATENCY_COMBINE: dict[str, Refusal] = {
    "destroyed": runtime_error(
        lambda b: b.destroyed.low_latency_combine(b.ll_y, b.idx, b.weights, b.ll_handle),
        r"destroyed",
    ),
    "normal buffer": runtime_error(
        lambda b: b.normal.low_latency_combine(b.ll_y, b.idx, b.weights, b.ll_handle),
        r"low_latency_combine needs.*low_latency_mode=True",
    ),
    "event and hook": value_error(
        lambda b: b.ll_combine(async_finish=True, return_recv_hook=True),
        r"async_finish and return_recv_hook exclude",
    ),
    "handle type": type_error(lambda b: b.ll_combine(handle=3), r"is a int.*tuple of 5"),
    "handle of the normal mode": type_error(
        lambda b: b.ll_combine(handle=b.handle),
        r"tuple of 6, expected the tuple of 5 that low_latency_dispatch",
    ),
    "handle numbers": type_error(
        lambda b: b.ll_combine(handle=b.ll_changed(3, "512")),
        r"handle\[3\] is '512', a str, but must be an int",
    ),
    "handle tokens": value_error(
        lambda b: b.ll_combine(handle=b.ll_changed(2, 9)),
        r"handle\[0\].*\(4, 16\), expected \(4, 18\).*8 experts and 9 tokens on 2 ranks",
    ),
    "handle experts": value_error(
        lambda b: b.ll_combine(handle=b.ll_changed(4, 9)), r"num_experts is 9.*2 ranks"
    ),
    "handle hidden": value_error(
        lambda b: b.ll_combine(handle=b.ll_changed(3, 4)), r"hidden is 4\b.*multiple of 8"
    ),
    "handle of no tensors": type_error(
        lambda b: b.ll_combine(handle=b.ll_changed(0, None)),
        r"handle\[0\] \(src_info\) is a NoneType",
    ),
    "handle ranges": value_error(
        lambda b: b.ll_combine(handle=b.ll_changed(1, b.full(4, 3, dtype=int64))),
        r"handle\[1\] \(layout_range\).*\(4, 3\), expected \(4, 2\)",
    ),
    "handle range dtype": type_error(
        lambda b: b.ll_combine(handle=b.ll_changed(1, b.ll_handle[1].int())),
        r"layout_range.*int32.*int64",
    ),
    "handle device": value_error(
        lambda b: b.ll_combine(handle=b.ll_changed(0, b.ll_handle[0].to("meta"))),
        r"src_info.* is on meta",
    ),
    "handle that is a copy": value_error(
        lambda b: b.ll_combine(handle=b.ll_changed(0, b.ll_handle[0].clone())),
        r"src_info\) is a copy.*pass the handle as it was returned",
    ),
    "x rows": value_error(
        lambda b: b.ll_combine(x=b.ll_y[:, 1:].contiguous()),
        r"x has shape \(4, 15, 512\), expected \(4, 16, 512\).*received or not",
    ),
    "x hidden": value_error(
        lambda b: b.ll_combine(x=b.full(4, 16, 256)),
        r"x has shape \(4, 16, 256\), expected \(4, 16, 512\)",
    ),
    "x dtype": type_error(
        lambda b: b.ll_combine(x=b.ll_y.float()), r"x has dtype torch.float32.*bfloat16"
    ),
    "x device": value_error(lambda b: b.ll_combine(x=b.ll_y.to("meta")), r"x is on meta"),
    "x strides": value_error(
        lambda b: b.ll_combine(x=b.full(16, 4, 512).transpose(0, 1)),
        r"x has strides.*\.contiguous\(\)",
    ),
    "x address": value_error(
        lambda b: b.ll_combine(x=b.misaligned(64, LL_HIDDEN).view(4, 16, LL_HIDDEN)),
        r"x.*address 0x.*\.clone\(\)",
    ),
    "topk_idx dtype": type_error(
        lambda b: b.ll_combine(topk_idx=b.idx.float()), r"topk_idx.*float32.*int64"
    ),
    "topk_idx strides": value_error(
        lambda b: b.ll_combine(topk_idx=b.idx[:, ::2]), r"topk_idx.*\.contiguous\(\)"
    ),
    "top-k 33": value_error(
        lambda b: b.ll_combine(topk_idx=b.full(NUM_TOKENS, 33, dtype=int64)), r"top-k is 33"
    ),
    "tokens": value_error(
        lambda b: b.ll_combine(topk_idx=b.full(9, 4, dtype=int64)),
        r"has 9 tokens, more than num_max_dispatch_tokens_per_rank=8",
    ),
    "other top-k": value_error(
        lambda b: b.ll_combine(topk_idx=b.full(6, 2, dtype=int64)),
        r"topk_idx has 2 choices a token, but the handle is of a dispatch with 4; pass the",
    ),
    "more tokens than were dispatched": value_error(
        lambda b: b.ll_combine(topk_idx=b.full(7, 4, dtype=int64)),
        r"topk_idx has 7 tokens, but the handle is of a dispatch of 6 by this rank; pass the",
    ),
    "fewer tokens than were dispatched": value_error(
        lambda b: b.ll_combine(topk_idx=b.full(0, 4, dtype=int64)),
        r"topk_idx has 0 tokens, but the handle is of a dispatch of 6 by this rank; pass the",
    ),
    "weights dtype": type_error(
        lambda b: b.ll_combine(topk_weights=b.weights.bfloat16()),
        r"topk_weights.*bfloat16.*float32",
    ),
    "weights shape": value_error(
        lambda b: b.ll_combine(topk_weights=b.weights[1:]),
        r"topk_weights.*\(5, 4\).*\(6, 4\).*as topk_idx",
    ),
    "logfmt and zero copy": value_error(
        lambda b: b.ll_combine(use_logfmt=True, zero_copy=True),
        r"only one of use_logfmt and zero_copy",
    ),
    "logfmt of short blocks": value_error(
        lambda b: b.ll_combine(x=b.full(4, 16, 192), handle=b.ll_changed(3, 192), use_logfmt=True),
        r"hidden is 192, but use_logfmt takes blocks of 128.*use_logfmt=False",
    ),
    "out shape": value_error(
        lambda b: b.ll_combine(out=b.full(5, LL_HIDDEN)),
        r"out has shape \(5, 512\), expected \(6, 512\).*each token of topk_idx",
    ),
    "out dtype": type_error(
        lambda b: b.ll_combine(out=b.full(6, LL_HIDDEN, dtype=float32)), r"out.*float32.*bfloat16"
    ),
    "out strides": value_error(
        lambda b: b.ll_combine(out=b.full(6, 2 * LL_HIDDEN)[:, ::2]),
        r"out has strides.*\.contiguous\(\)",
    ),
    "out address": value_error(
        lambda b: b.ll_combine(out=b.misaligned(6, LL_HIDDEN)), r"out.*address 0x.*\.clone\(\)"
    ),
    "wait cost shape": value_error(
        lambda b: b.ll_combine(combine_wait_recv_cost_stats=b.full(3, dtype=int64)),
        r"combine_wait_recv_cost_stats.*\(3,\), expected \(2\)",
    ),
    "room": value_error(
        lambda b: b.ll_combine(
            topk_idx=b.full(6, 32, dtype=int64),
            topk_weights=b.full(6, 32, dtype=float32),
            handle=b.ll_changed(0, b.src_info(MAX_TOKENS, NUM_EXPERTS, 32)),
        ),
        r"low_latency_combine of top-32 of 8 tokens a rank.*num_rdma_bytes >= 1048576, but this "
        r"Buffer has 262144; make it with.*\(8, 512, 2, 8\)",
    ),
}


LOW_LATENCY_MEMBERS: dict[str, Refusal] = {
    "room to send": value_error(
        lambda b: b.buffer.get_next_low_latency_combine_buffer(
            (
                b.src_info(16, 40, 8),
                b.full(20, 2, dtype=int64),
                16,
                LL_HIDDEN,
                40,
            )
        ),
        r"the send buffer of 16 tokens a rank.*num_rdma_bytes >= 1310720.*\(16, 512, 2, 40\)",
    ),
    "send buffer of another handle": type_error(
        lambda b: b.buffer.get_next_low_latency_combine_buffer(b.handle),
        r"tuple of 6, expected the tuple of 5",
    ),
    "send buffer of a normal buffer": runtime_error(
        lambda b: b.normal.get_next_low_latency_combine_buffer(b.ll_handle),
        r"get_next_low_latency_combine_buffer needs.*low_latency_mode=True",
    ),
    "clean of a normal buffer": runtime_error(
        lambda b: b.normal.clean_low_latency_buffer(MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS),
        r"clean_low_latency_buffer needs.*low_latency_mode=True",
    ),
    "clean tokens": value_error(lambda b: b.ll_clean(0, 512, 8), r"tokens_per_rank is 0.*1 and"),
    "clean hidden": value_error(lambda b: b.ll_clean(8, 12, 8), r"hidden is 12\b.*multiple of 8"),
    "clean experts": value_error(lambda b: b.ll_clean(8, 512, 3), r"num_experts is 3.*2 ranks"),
    "warmup of a normal buffer": runtime_error(
        lambda b: b.normal.low_latency_warmup(MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS, num_topk=8),
        r"low_latency_warmup needs.*low_latency_mode=True",
    ),
    "warmup top-k": value_error(
        lambda b: b.buffer.low_latency_warmup(MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS, num_topk=33),
        r"num_topk is 33.*between 1 and 32",
    ),
    **{
        f"mask rank {rank}": value_error(
            lambda b, rank=rank: b.buffer.low_latency_update_mask_buffer(rank, True),
            rf"rank_to_mask is {rank}, but must be between 0 and 1",
        )
        for rank in (-1, 2)
    },
    "query shape": value_error(
        lambda b: b.buffer.low_latency_query_mask_buffer(b.full(3, dtype=int32)),
        r"mask_status.*\(3,\), expected \(2\).*each rank",
    ),
    "query dtype": type_error(
        lambda b: b.buffer.low_latency_query_mask_buffer(b.full(2, dtype=int64)),
        r"mask_status.*int64.*int32",
    ),
    **{
        f"{name} without shrink": runtime_error(
            lambda b, name=name, args=args: getattr(b.normal, name)(*args),
            rf"{name} needs.*enable_shrink=True",
        )
        for name, args in (
            ("low_latency_update_mask_buffer", (0, True)),
            ("low_latency_query_mask_buffer", (None,)),
            ("low_latency_clean_mask_buffer", ()),
        )
    },
}
