"""One round of all operations through the public `Buffer`, compared bit for bit with the reference.

Every rank builds the inputs of all ranks from a seed, so that it knows what must arrive; nothing
but the operations under test communicates. On the GPU only copies are used beside them: with
virtual ranks a torch kernel that is loaded while another rank's kernel spins would wait for it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from epjit import Buffer, Config
from epjit.reference import intranode as reference
from tests.data import (
    ROUTING_KINDS,
    SCALE_LAYOUTS,
    RoutingKind,
    ScaleLayout,
    assert_rows_equal,
    fp8_payload,
    payload,
    random_payload,
    routing,
    topk_weights,
)


@dataclass(frozen=True)
class Round:
    """What one round moves; the same on all ranks.

    Attributes:
        num_tokens: Of each rank.
        hidden: Elements a row.
        num_experts: Over all ranks.
        num_topk: Choices a token.
        kind: Routing.
        seed: Of everything random.
        fp8: Rows of one byte with scales of this layout, or None for bfloat16.
        scale_dtype: Of the scales.
        index_dtype: Of topk_idx.
        with_topk: Whether top-k travels with the tokens.
        worst: Whether num_worst_tokens is used.
        alignment: expert_alignment.
        combine_dtype: Of the rows that come back.
        num_biases: 0, 1 or 2.
        num_sms: Of dispatch and combine.
        how: sync, async (events), or comm (events, outputs on the communication stream).
    """

    num_tokens: tuple[int, ...]
    hidden: int = 256
    num_experts: int = 16
    num_topk: int = 4
    kind: RoutingKind = "random"
    seed: int = 0
    fp8: ScaleLayout | None = None
    scale_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    with_topk: bool = True
    worst: bool = False
    alignment: int = 1
    combine_dtype: torch.dtype = torch.bfloat16
    num_biases: int = 0
    num_sms: int = 4
    how: str = "sync"
    world: list[reference.RankInput] = field(default_factory=list, compare=False, repr=False)


# (hidden, num_topk, fp8, index_dtype, combine_dtype): what kernels are compiled for. A few, since
# 300 rounds of ever new ones spend their time in the compiler; the rest of a round is always new.
_SHAPES = (
    (128, 1, True, torch.int64, torch.bfloat16),
    (256, 2, False, torch.int32, torch.float16),
    (512, 5, True, torch.int32, torch.bfloat16),
    (1024, 8, False, torch.int64, torch.bfloat16),
)


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
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy with the same strides, by one plain copy of the storage."""
    storage = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def make_world(case: Round) -> list[reference.RankInput]:
    """What every rank gives to dispatch, on the CPU."""
    world = []
    for rank, tokens in enumerate(case.num_tokens):
        idx = routing(
            case.kind,
            num_tokens=tokens,
            num_experts=case.num_experts,
            num_topk=case.num_topk,
            num_ranks=len(case.num_tokens),
            seed=case.seed * 64 + rank,
            dtype=case.index_dtype,
        )
        _, per_expert, in_rank = reference.layout(idx, case.num_experts, len(case.num_tokens))
        if case.fp8 is None:
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


def check_round(buffer: Buffer, case: Round) -> None:
    """Layout, dispatch, cached dispatch and combine of one round; every result is compared.

    Raises:
        AssertionError: Names rank, tensor, row and column of the first difference.
    """
    rank, device = buffer.rank, buffer.device
    num_ranks = len(case.num_tokens)
    world = make_world(case)
    own = world[rank]
    prefix = f"rank {rank}, seed {case.seed}"
    config = Config(case.num_sms)
    idx = routing(
        case.kind,
        num_tokens=case.num_tokens[rank],
        num_experts=case.num_experts,
        num_topk=case.num_topk,
        num_ranks=num_ranks,
        seed=case.seed * 64 + rank,
        dtype=case.index_dtype,
    )
    idx_on_device = to_device(idx, device)
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
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        buffer.check_fault()
        return results[:-1]

    # Layout
    per_rank, per_rdma_rank, per_expert, in_rank = call(
        buffer.get_dispatch_layout, idx_on_device, case.num_experts
    )
    want_layout = reference.layout(idx, case.num_experts, num_ranks)
    assert per_rdma_rank is None
    for name, got, want in zip(
        ("num_tokens_per_rank", "num_tokens_per_expert", "is_token_in_rank"),
        (per_rank, per_expert, in_rank),
        want_layout,
        strict=True,
    ):
        assert_rows_equal(got, want, f"{prefix}: {name}")

    # Dispatch
    num_worst = sum(case.num_tokens) + 3 if case.worst else 0
    want = reference.dispatch(
        world,
        rank,
        num_experts=case.num_experts,
        expert_alignment=case.alignment,
        num_worst_tokens=num_worst,
    )
    num_rows = int(want.handle[0][-1, rank])
    x = to_device(own.x, device)
    scales = None if own.scales is None else to_device(own.scales, device)
    got_x, got_idx, got_weights, got_list, handle = call(
        buffer.dispatch,
        x if scales is None else (x, scales),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx_on_device if case.with_topk else None,
        topk_weights=to_device(own.topk_weights, device) if own.topk_weights is not None else None,
        expert_alignment=case.alignment,
        num_worst_tokens=num_worst,
        config=config,
    )
    got_rows, got_scales = got_x if isinstance(got_x, tuple) else (got_x, None)
    assert got_rows.shape == want.recv_x.shape
    assert_rows_equal(got_rows[:num_rows], want.recv_x[:num_rows], f"{prefix}: recv_x")
    assert (got_scales is None) == (want.recv_scales is None)
    if got_scales is not None and want.recv_scales is not None:
        assert got_scales.is_contiguous()
        assert_rows_equal(got_scales[:num_rows], want.recv_scales[:num_rows], f"{prefix}: scales")
    assert (got_idx is None) == (want.recv_topk_idx is None) == (got_weights is None)
    if got_idx is not None:
        assert_rows_equal(got_idx, want.recv_topk_idx, f"{prefix}: recv_topk_idx")
        assert_rows_equal(
            got_weights[:num_rows],
            want.recv_topk_weights[:num_rows],
            f"{prefix}: recv_topk_weights",
        )
    assert got_list == want.num_recv_tokens_per_expert_list, f"{prefix}: {got_list}"
    assert isinstance(handle, tuple)
    names = (
        "rank_prefix_matrix",
        "source_tokens",
        "recv_expert_counts",
        "recv_src_idx",
        "is_token_in_rank",
        "send_head",
    )
    for slot, name in enumerate(names):
        rows = slice(0, num_rows) if slot == 3 else slice(None)
        assert handle[slot].shape == want.handle[slot].shape
        assert_rows_equal(handle[slot][rows], want.handle[slot][rows], f"{prefix}: handle {name}")

    # Cached dispatch of another payload
    others = [
        random_payload(tokens, case.hidden // 2, torch.float16, seed=case.seed * 64 + source)
        for source, tokens in enumerate(case.num_tokens)
    ]
    handles = [
        reference.dispatch(
            world, source, num_experts=case.num_experts, num_worst_tokens=num_worst
        ).handle
        for source in range(num_ranks)
    ]
    cached = call(buffer.dispatch, to_device(others[rank], device), handle=handle, config=config)
    assert cached[1:] == (None, None, None, None)
    want_cached, _ = reference.cached_dispatch(others, None, handles, rank)
    assert_rows_equal(cached[0][:num_rows], want_cached[:num_rows], f"{prefix}: cached recv_x")

    # Combine
    outputs, weights = [], []
    for source in range(num_ranks):
        rows = handles[source][3].shape[0]
        outputs.append(
            random_payload(rows, case.hidden, case.combine_dtype, seed=case.seed * 64 + 32 + source)
        )
        weights.append(topk_weights(rows, case.num_topk, seed=case.seed * 64 + 32 + source))
    biases = tuple(
        random_payload(
            case.num_tokens[rank], case.hidden, case.combine_dtype, seed=case.seed * 64 + 48 + i
        )
        for i in range(case.num_biases)
    )
    on_device = tuple(to_device(each, device) for each in biases)
    combined, combined_weights = call(
        buffer.combine,
        to_device(outputs[rank], device),
        handle,
        topk_weights=to_device(weights[rank], device) if case.with_topk else None,
        bias=None if not on_device else on_device[0] if len(on_device) == 1 else on_device,
        config=config,
    )
    want_combined, want_weights = reference.combine(
        outputs,
        handles,
        rank,
        weights if case.with_topk else None,
        None if not biases else biases[0] if len(biases) == 1 else biases,
    )
    assert_rows_equal(combined, want_combined, f"{prefix}: combined_x")
    assert (combined_weights is None) == (want_weights is None)
    if combined_weights is not None:
        assert_rows_equal(combined_weights, want_weights, f"{prefix}: combined_topk_weights")
