"""Refused calls between NVLink domains."""

from __future__ import annotations

from torch import int32

from tests.refusals.table import HIDDEN, Refusal, assertion_error, type_error, value_error

BETWEEN_DOMAINS: dict[str, Refusal] = {
    "no counts of domains": assertion_error(
        lambda b: b.dispatch_between(num_tokens_per_rdma_rank=None),
        r"needs num_tokens_per_rdma_rank from get_dispatch_layout",
    ),
    "cast": value_error(
        lambda b: b.dispatch_between(cast="fp8"),
        r"cast is 'fp8', but this Buffer spans 2 NVLink domains.*pass \(rows, scales\)",
    ),
    "warmup cast": value_error(
        lambda b: b.between.warmup(1024, cast="fp8"), r"cast is 'fp8'.*spans 2 NVLink domains"
    ),
    "counts of three domains": value_error(
        lambda b: b.dispatch_between(num_tokens_per_rdma_rank=b.full(3, dtype=int32)),
        r"num_tokens_per_rdma_rank.*\(3,\).*\(2\).*each NVLink domain",
    ),
    "counts of domains dtype": type_error(
        lambda b: b.dispatch_between(num_tokens_per_rdma_rank=b.per_rdma_rank.long()),
        r"num_tokens_per_rdma_rank.*int64.*int32",
    ),
    "counts of domains device": value_error(
        lambda b: b.dispatch_between(num_tokens_per_rdma_rank=b.per_rdma_rank.to("meta")),
        r"num_tokens_per_rdma_rank is on meta",
    ),
    "too many experts": value_error(
        lambda b: b.between.get_dispatch_layout(b.idx, 2 * 1025),
        r"num_experts is 2050.*at most 2048",
    ),
    "handle of one domain": type_error(
        lambda b: b.cached_between(handle=b.handle), r"tuple of 6.*tuple of 10"
    ),
    "handle of several in one": type_error(
        lambda b: b.cached(handle=b.between_handle), r"tuple of 10.*tuple of 6"
    ),
    "handle ranks": value_error(
        lambda b: b.combine_between(handle=b.between_changed(6, b.full(4, dtype=int32))),
        r"4 ranks.*this Buffer has 2",
    ),
    "handle domains": value_error(
        lambda b: b.combine_between(handle=b.between_changed(8, b.full(6, 1, dtype=int32))),
        r"of 1 NVLink domains.*this Buffer has 2.*that made it",
    ),
    "handle tokens": value_error(
        lambda b: b.cached_between(x=b.full(4, HIDDEN)), r"x has 4 tokens, but the handle routes 6"
    ),
    "handle of two dispatches": value_error(
        lambda b: b.combine_between(handle=b.between_changed(1, b.full(2, 6, dtype=int32))),
        r"handle\[1\] has 12 elements, but .* 6 tokens between 2 ranks has 14; pass the handle",
    ),
    "handle no tensor": type_error(
        lambda b: b.cached_between(handle=b.between_changed(9, None)), r"handle\[9\] is a NoneType"
    ),
    "combine rows": value_error(
        lambda b: b.combine_between(x=b.full(3, HIDDEN)),
        r"x has shape \(3, 64\).*one row for each row of the dispatch",
    ),
    "combine bias rows": value_error(
        lambda b: b.combine_between(bias=b.full(3, HIDDEN)),
        r"bias_0 has shape \(3, 64\), expected \(6, 64\)",
    ),
}
