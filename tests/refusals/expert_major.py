"""Refused calls on rows by expert."""

from __future__ import annotations

from torch import float32, int64

from epjit import Config
from tests.refusals.table import HIDDEN, NUM_TOKENS, Refusal, runtime_error, type_error, value_error

EXPERT_DISPATCH: dict[str, Refusal] = {
    "no tensor": type_error(lambda b: b.expert_dispatch(x=[1]), r"x is a list.*torch\.Tensor"),
    "row bytes": value_error(
        lambda b: b.expert_dispatch(x=b.full(NUM_TOKENS, 12)), r"24 bytes.*multiple of 16"
    ),
    "misaligned": value_error(
        lambda b: b.expert_dispatch(x=b.misaligned(NUM_TOKENS)), r"x starts at address.*\.clone\(\)"
    ),
    "no topk_idx": value_error(
        lambda b: b.expert_dispatch(topk_idx=None), r"needs topk_idx and num_experts, or the handle"
    ),
    "no experts": value_error(
        lambda b: b.expert_dispatch(num_experts=None), r"needs topk_idx and num_experts"
    ),
    "experts odd": value_error(
        lambda b: b.expert_dispatch(num_experts=7), r"num_experts is 7.*multiple of the 2 ranks"
    ),
    "experts many": value_error(
        lambda b: b.expert_dispatch(num_experts=4096), r"num_experts is 4096.*at most 2048"
    ),
    "experts no int": type_error(
        lambda b: b.expert_dispatch(num_experts=8.5), r"num_experts is 8\.5, a float"
    ),
    "topk_idx rows": value_error(
        lambda b: b.expert_dispatch(topk_idx=b.full(5, 4, dtype=int64)),
        r"topk_idx has shape \(5, 4\), expected \(6, num_topk\): one row for each token",
    ),
    "weights shape": value_error(
        lambda b: b.expert_dispatch(topk_weights=b.full(NUM_TOKENS, 3, dtype=float32)),
        r"topk_weights has shape \(6, 3\), expected \(6, 4\)",
    ),
    "alignment": value_error(
        lambda b: b.expert_dispatch(expert_alignment=0), r"expert_alignment is 0.*at least 1"
    ),
    "alignment many": value_error(
        lambda b: b.expert_dispatch(expert_alignment=1 << 30), r"may need \d+ rows.*count to"
    ),
    "rows alone": value_error(
        lambda b: b.expert_dispatch(num_expert_rows=8), r"num_expert_rows is 8.*num_worst_tokens"
    ),
    "cast unknown": value_error(
        lambda b: b.expert_dispatch(cast="int8"), r"cast is 'int8'.*fp8, fp8_round, .*nvfp4"
    ),
    "cast of bytes": type_error(
        lambda b: b.expert_dispatch(x=b.fp8(), cast="fp8"), r"cast='fp8' takes.*float8_e4m3fn"
    ),
    "cast of rows with scales": type_error(
        lambda b: b.expert_dispatch(x=(b.fp8(), b.full(NUM_TOKENS, 1, dtype=float32)), cast="fp8"),
        r"cast='fp8' takes.*rows with scales",
    ),
    "cast hidden": value_error(
        lambda b: b.expert_dispatch(cast="fp8"), rf"hidden is {HIDDEN}.*multiple of 128 for fp8"
    ),
    "cast hidden of mxfp8": value_error(
        lambda b: b.expert_dispatch(cast="mxfp8"), rf"hidden is {HIDDEN}.*multiple of 128 for mxfp8"
    ),
    "scale missing": value_error(
        lambda b: b.expert_dispatch(cast="nvfp4"), r"global_scale is missing.*nvfp4 have one"
    ),
    "scale given": value_error(
        lambda b: b.expert_dispatch(global_scale=b.full(1, dtype=float32)),
        r"global_scale is given.*cast to None have none",
    ),
    "scale shape": value_error(
        lambda b: b.expert_dispatch(cast="nvfp4", global_scale=b.full(2, dtype=float32)),
        r"global_scale has shape \(2,\)",
    ),
    "columns without scales": value_error(
        lambda b: b.expert_dispatch(column_major_scales=True), r"4 bytes.*have no scales"
    ),
    "columns of bytes": value_error(
        lambda b: b.expert_dispatch(x=b.ll_x, cast="mxfp8", column_major_scales=True),
        r"4 bytes.*have 1-byte scales",
    ),
    "sms odd": value_error(lambda b: b.expert_dispatch(config=Config(7)), r"num_sms is 7\b.*even"),
    "destroyed": runtime_error(
        lambda b: b.destroyed.expert_dispatch(b.x, b.idx, num_experts=8), r"destroyed"
    ),
}

EXPERT_CACHED: dict[str, Refusal] = {
    "topk_idx": value_error(
        lambda b: b.expert_cached(topk_idx=b.idx), r"takes no topk_idx.*the handle has them"
    ),
    "alignment": value_error(
        lambda b: b.expert_cached(expert_alignment=8), r"takes no.*expert_alignment"
    ),
    "tokens": value_error(
        lambda b: b.expert_cached(x=b.full(5, HIDDEN)), r"x has 5 tokens.*the handle routes 6"
    ),
    "weights shape": value_error(
        lambda b: b.expert_cached(topk_weights=b.full(NUM_TOKENS, 3, dtype=float32)),
        r"topk_weights has shape \(6, 3\), expected \(6, 4\)",
    ),
    "handle of a dispatch": type_error(
        lambda b: b.expert_cached(handle=b.handle), r"tuple of 6.*tuple of 2 that expert_dispatch"
    ),
    "handle of 3 ranks": value_error(
        lambda b: b.expert_cached(handle=(b.handle_of_3, b.expert_handle[1])), r"of 3 ranks"
    ),
    "placement": type_error(
        lambda b: b.expert_cached(handle=(b.handle, b.expert_handle[1][:3])),
        r"tuple of 3.*tuple of 4 that expert_dispatch",
    ),
}

EXPERT_COMBINE: dict[str, Refusal] = {
    "dtype": type_error(
        lambda b: b.expert_combine(rows=b.rows.float()), r"rows has dtype.*float32"
    ),
    "misaligned": value_error(
        lambda b: b.expert_combine(rows=b.misaligned(6)), r"rows starts at address.*\.clone\(\)"
    ),
    "row_weights": value_error(
        lambda b: b.expert_combine(row_weights=b.full(3, dtype=float32)),
        r"row_weights has shape \(3,\).*one for each row",
    ),
    "topk_weights": value_error(
        lambda b: b.expert_combine(topk_weights=b.weights), r"topk_weights has shape \(6, 4\)"
    ),
    "bias": value_error(
        lambda b: b.expert_combine(bias=b.full(5, HIDDEN)), r"bias_0 has shape \(5, 64\)"
    ),
    "row_of dtype": type_error(
        lambda b: b.expert_combine(handle=b.placed(0, b.expert_handle[1][0].long())),
        r"handle\.placement\.row_of has dtype torch\.int64",
    ),
    "row_of shape": value_error(
        lambda b: b.expert_combine(handle=b.placed(0, b.expert_handle[1][0][:-1])),
        r"handle\.placement\.row_of has shape.*as expert_dispatch returned it",
    ),
    "no handle": type_error(lambda b: b.expert_combine(handle=None), r"handle is a NoneType"),
}
