"""The reference against brute force in plain Python, and the properties a user relies on."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epjit.handles import Dispatched
from epjit.reference import intranode
from epjit.reference.intranode import RankInput
from tests.harness import data

RANKS = (1, 2, 3, 4, 8)


def make_inputs(
    kind: data.RoutingKind,
    *,
    num_ranks: int,
    num_tokens: Sequence[int],
    num_experts: int,
    num_topk: int,
    hidden: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    idx_dtype: torch.dtype = torch.int64,
    with_topk: bool = True,
    scale_layout: data.ScaleLayout | None = None,
) -> list[RankInput]:
    """One input a rank; `num_tokens[rank % len]` tokens each."""
    inputs = []
    for rank in range(num_ranks):
        count = num_tokens[rank % len(num_tokens)]
        idx = data.routing(
            kind,
            num_tokens=count,
            num_experts=num_experts,
            num_topk=num_topk,
            num_ranks=num_ranks,
            seed=rank,
            dtype=idx_dtype,
        )
        _, per_expert, in_rank = intranode.layout(idx, num_experts, num_ranks)
        x, scales = data.payload(rank, count, hidden, dtype), None
        if scale_layout is not None:
            x, scales = data.fp8_payload(rank, count, hidden, layout=scale_layout, group_size=4)
        inputs.append(
            RankInput(
                x=x,
                scales=scales,
                topk_idx=idx if with_topk else None,
                topk_weights=data.topk_weights(count, num_topk, seed=rank) if with_topk else None,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )
        )
    return inputs


def dispatch_all(
    inputs: list[RankInput], num_experts: int, *, alignment: int = 1, worst: int = 0
) -> list[Dispatched]:
    """The result of every rank."""
    return [
        intranode.dispatch(
            inputs,
            rank,
            num_experts=num_experts,
            expert_alignment=alignment,
            num_worst_tokens=worst,
        )
        for rank in range(len(inputs))
    ]


def brute_layout(
    idx: list[list[int]], num_experts: int, num_ranks: int
) -> tuple[list[int], list[int], list[list[bool]]]:
    """Counts by looking at one selection after the other."""
    per_rank, per_expert = [0] * num_ranks, [0] * num_experts
    in_rank = []
    for choices in idx:
        ranks = set()
        for expert in choices:
            if 0 <= expert < num_experts:
                per_expert[expert] += 1
                ranks.add(expert * num_ranks // num_experts)
        for rank in ranks:
            per_rank[rank] += 1
        in_rank.append([rank in ranks for rank in range(num_ranks)])
    return per_rank, per_expert, in_rank


def check_dispatch(inputs: list[RankInput], rank: int, got: Dispatched, num_experts: int) -> None:
    """Compare one rank's result with loops over sources, tokens and choices."""
    num_ranks, num_local = len(inputs), num_experts // len(inputs)
    rows = [
        (source, token)
        for source, each in enumerate(inputs)
        for token in range(each.x.shape[0])
        if each.is_token_in_rank[token, rank]
    ]
    assert got.recv_x.shape == (len(rows), inputs[0].x.shape[1])
    want_x = torch.empty_like(got.recv_x)
    for row, (source, token) in enumerate(rows):
        want_x[row] = inputs[source].x[token]
    data.assert_rows_equal(got.recv_x, want_x, f"rank {rank}: recv_x")

    if inputs[rank].scales is None:
        assert got.recv_scales is None
    else:
        assert got.recv_scales is not None
        assert got.recv_scales.is_contiguous()
        for row, (source, token) in enumerate(rows):
            scales = inputs[source].scales
            assert scales is not None
            assert got.recv_scales[row].tolist() == scales[token].tolist()

    counts = [0] * num_local
    if inputs[rank].topk_idx is None:
        assert got.recv_topk_idx is None
        assert got.recv_topk_weights is None
        for each in inputs:
            for local in range(num_local):
                counts[local] += int(each.num_tokens_per_expert[rank * num_local + local])
    else:
        assert got.recv_topk_idx is not None
        assert got.recv_topk_weights is not None
        assert got.recv_topk_idx.dtype == inputs[rank].topk_idx.dtype
        for row, (source, token) in enumerate(rows):
            idx, weights = inputs[source].topk_idx, inputs[source].topk_weights
            assert idx is not None
            assert weights is not None
            for column, (expert, weight) in enumerate(
                zip(idx[token].tolist(), weights[token].tolist(), strict=True)
            ):
                local = expert - rank * num_local
                mine = 0 <= local < num_local
                if mine:
                    counts[local] += 1
                assert got.recv_topk_idx[row, column] == (local if mine else -1)
                assert got.recv_topk_weights[row, column] == (weight if mine else 0.0)
    assert got.num_recv_tokens_per_expert_list == counts

    prefix, source_tokens, expert_counts, src_idx, in_rank, send_head = got.handle
    assert [each.dtype for each in got.handle] == [torch.int32] * 4 + [torch.bool, torch.int32]
    running = [0] * num_ranks
    for source, each in enumerate(inputs):
        for peer in range(num_ranks):
            running[peer] += sum(each.is_token_in_rank[:, peer].tolist())
        assert prefix[source].tolist() == running
    assert source_tokens.tolist() == [each.x.shape[0] for each in inputs]
    assert expert_counts.tolist() == counts
    assert src_idx.tolist() == [token for _, token in rows]
    assert in_rank is inputs[rank].is_token_in_rank
    heads = [0] * num_ranks
    for token in range(in_rank.shape[0]):
        for peer in range(num_ranks):
            if in_rank[token, peer]:
                assert send_head[token, peer] == heads[peer]
                heads[peer] += 1
            else:
                assert send_head[token, peer] == -1


def f32(value: float) -> float:
    """`value` rounded to float32 (of a double: one sum of two float32 is exact enough)."""
    return struct.unpack("f", struct.pack("f", value))[0]


@pytest.fixture(autouse=True)
def _bfloat16_by_default() -> object:
    """DeepEP's tests set this; nothing of ours may depend on the default."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_routings_are_what_their_names_say() -> None:
    def counts(kind: data.RoutingKind) -> tuple[list[int], list[int], list[list[bool]]]:
        idx = data.routing(kind, num_tokens=32, num_experts=8, num_topk=4, num_ranks=4, seed=1)
        return brute_layout(idx.tolist(), 8, 4)

    assert counts("balanced")[1] == [16] * 8
    assert sum(counts("random")[1]) == 32 * 4
    assert counts("hot_expert")[1][0] == 32
    assert counts("empty_rank")[0][3] == 0
    assert min(counts("empty_rank")[0][:3]) > 0
    assert 0 < sum(counts("holes")[1]) < 32 * 4
    assert sum(counts("all_holes")[1]) == 0
    assert sum(counts("duplicate_experts")[1]) == 32 * 4
    assert sum(counts("duplicate_experts")[0]) < sum(counts("random")[0])
    assert 0 < sum(counts("out_of_range")[1]) < 32 * 4


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("kind", data.ROUTING_KINDS)
@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
def test_layout(kind: data.RoutingKind, num_ranks: int, idx_dtype: torch.dtype) -> None:
    num_experts = 3 * num_ranks
    idx = data.routing(
        kind,
        num_tokens=29,
        num_experts=num_experts,
        num_topk=4,
        num_ranks=num_ranks,
        seed=5,
        dtype=idx_dtype,
    )
    per_rank, per_expert, in_rank = intranode.layout(idx, num_experts, num_ranks)
    assert (per_rank.dtype, per_expert.dtype) == (torch.int32, torch.int32)
    assert in_rank.dtype == torch.bool
    got = (per_rank.tolist(), per_expert.tolist(), in_rank.tolist())
    assert got == brute_layout(idx.tolist(), num_experts, num_ranks)


def test_layout_without_tokens() -> None:
    per_rank, per_expert, in_rank = intranode.layout(
        torch.empty((0, 4), dtype=torch.int64), num_experts=6, num_ranks=3
    )
    assert per_rank.tolist() == [0] * 3
    assert per_expert.tolist() == [0] * 6
    assert in_rank.shape == (0, 3)


@pytest.mark.parametrize("num_experts", [0, 7])
def test_layout_names_the_experts_that_do_not_fit(num_experts: int) -> None:
    with pytest.raises(ValueError, match=rf"num_experts={num_experts} .* 4 ranks"):
        intranode.layout(torch.empty((1, 1), dtype=torch.int64), num_experts, 4)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("kind", data.ROUTING_KINDS)
@pytest.mark.parametrize("with_topk", [True, False])
def test_dispatch(kind: data.RoutingKind, num_ranks: int, with_topk: bool) -> None:
    num_experts = 4 * num_ranks
    inputs = make_inputs(
        kind,
        num_ranks=num_ranks,
        num_tokens=(13, 0, 21),
        num_experts=num_experts,
        num_topk=3,
        idx_dtype=torch.int32 if num_ranks % 2 else torch.int64,
        with_topk=with_topk,
    )
    for rank, got in enumerate(dispatch_all(inputs, num_experts)):
        check_dispatch(inputs, rank, got, num_experts)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int8, torch.float8_e4m3fn],
)
def test_dispatch_moves_any_dtype(dtype: torch.dtype) -> None:
    inputs = make_inputs(
        "random", num_ranks=3, num_tokens=(140,), num_experts=6, num_topk=2, dtype=dtype
    )
    for rank, got in enumerate(dispatch_all(inputs, 6)):
        check_dispatch(inputs, rank, got, 6)


@pytest.mark.parametrize("layout", data.SCALE_LAYOUTS)
@pytest.mark.parametrize("hidden", [4, 16])  # one scale a token is a stride of its own
def test_dispatch_of_strided_scales(layout: data.ScaleLayout, hidden: int) -> None:
    inputs = make_inputs(
        "holes",
        num_ranks=2,
        num_tokens=(9, 5),
        num_experts=4,
        num_topk=2,
        hidden=hidden,
        scale_layout=layout,
    )
    for rank, got in enumerate(dispatch_all(inputs, 4)):
        check_dispatch(inputs, rank, got, 4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(draw=st.data())
def test_dispatch_of_arbitrary_routing(draw: st.DataObject) -> None:
    num_ranks = draw.draw(st.integers(1, 5), label="num_ranks")
    num_local = draw.draw(st.integers(1, 3), label="num_local")
    num_topk = draw.draw(st.integers(1, 4), label="num_topk")
    num_experts = num_ranks * num_local
    choice = st.integers(-2, num_experts + 1)
    inputs = []
    for rank in range(num_ranks):
        rows = draw.draw(
            st.lists(st.lists(choice, min_size=num_topk, max_size=num_topk), max_size=6)
        )
        idx = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), num_topk)
        _, per_expert, in_rank = intranode.layout(idx, num_experts, num_ranks)
        inputs.append(
            RankInput(
                x=data.payload(rank, len(rows), 8, torch.bfloat16),
                scales=None,
                topk_idx=idx,
                topk_weights=data.topk_weights(len(rows), num_topk, seed=rank),
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )
        )
    world = dispatch_all(inputs, num_experts)
    for rank, got in enumerate(world):
        check_dispatch(inputs, rank, got, num_experts)
    check_roundtrip(inputs, world)


@pytest.mark.parametrize("alignment", [1, 16, 128])
def test_expert_alignment_rounds_each_count(alignment: int) -> None:
    inputs = make_inputs("random", num_ranks=2, num_tokens=(40,), num_experts=8, num_topk=3)
    plain = dispatch_all(inputs, 8)
    for rank, got in enumerate(dispatch_all(inputs, 8, alignment=alignment)):
        exact = plain[rank].num_recv_tokens_per_expert_list
        assert got.num_recv_tokens_per_expert_list == [
            (count + alignment - 1) // alignment * alignment for count in exact
        ]
        assert all(type(count) is int for count in got.num_recv_tokens_per_expert_list)
        assert got.handle[2].tolist() == exact
        assert torch.equal(got.recv_x, plain[rank].recv_x)


def test_num_worst_tokens_pads_every_output() -> None:
    num_ranks, num_tokens = 3, 11
    inputs = make_inputs(
        "holes",
        num_ranks=num_ranks,
        num_tokens=(num_tokens,),
        num_experts=6,
        num_topk=2,
        scale_layout="padded",
    )
    worst = num_ranks * num_tokens
    for plain, got in zip(
        dispatch_all(inputs, 6), dispatch_all(inputs, 6, worst=worst), strict=True
    ):
        received = plain.recv_x.shape[0]
        assert received < worst
        assert got.num_recv_tokens_per_expert_list == []
        for name in ("recv_x", "recv_scales", "recv_topk_idx", "recv_topk_weights"):
            padded = getattr(got, name)
            assert padded.shape[0] == worst
            data.assert_rows_equal(padded[:received], getattr(plain, name), name)
        assert got.recv_topk_idx is not None
        assert (got.recv_topk_idx[received:] == -1).all()
        assert got.handle[3].shape == (worst,)
        assert torch.equal(got.handle[3][:received], plain.handle[3])


@pytest.mark.parametrize("worst", [1, 8, 11])
def test_num_worst_tokens_that_do_not_suffice(worst: int) -> None:
    """The first rows of all, in their order; handle and combine know of no others."""
    inputs = make_inputs("hot_expert", num_ranks=2, num_tokens=(6,), num_experts=4, num_topk=1)
    plain, cut = dispatch_all(inputs, 4), dispatch_all(inputs, 4, worst=worst)
    assert plain[0].recv_x.shape[0] == 12
    for name in ("recv_x", "recv_topk_idx", "recv_topk_weights"):
        data.assert_rows_equal(getattr(cut[0], name), getattr(plain[0], name)[:worst], name)
    assert torch.equal(cut[0].handle[3], plain[0].handle[3][:worst])
    for each in cut:
        assert each.handle[0][:, 0].tolist() == [min(worst, 6), worst]
    for rank in range(2):
        handles = [each.handle for each in cut]
        combined, _ = intranode.combine([each.recv_x for each in cut], handles, rank)
        kept = min(max(worst - 6 * rank, 0), 6)
        data.assert_rows_equal(combined[:kept], inputs[rank].x[:kept], "combined")
        assert not combined[kept:].any()


@pytest.mark.parametrize("worst", [0, 64])
def test_cached_dispatch_carries_another_payload(worst: int) -> None:
    num_ranks = 4
    inputs = make_inputs(
        "random", num_ranks=num_ranks, num_tokens=(13, 16), num_experts=8, num_topk=2
    )
    world = dispatch_all(inputs, 8, worst=worst)
    again = [
        data.fp8_payload(rank, each.x.shape[0], 32, layout="column_major", group_size=16)
        for rank, each in enumerate(inputs)
    ]
    handles = [each.handle for each in world]
    for rank, first in enumerate(world):
        recv_x, recv_scales = intranode.cached_dispatch(
            [x for x, _ in again], [scales for _, scales in again], handles, rank
        )
        assert recv_scales is not None
        fresh = [
            RankInput(x, scales, None, None, each.is_token_in_rank, each.num_tokens_per_expert)
            for (x, scales), each in zip(again, inputs, strict=True)
        ]
        want = intranode.dispatch(fresh, rank, num_experts=8, num_worst_tokens=worst)
        assert want.recv_scales is not None
        assert recv_x.shape[0] == first.recv_x.shape[0]
        data.assert_rows_equal(recv_x, want.recv_x, "recv_x")
        data.assert_rows_equal(recv_scales, want.recv_scales, "recv_scales")


def test_cached_dispatch_of_other_tokens() -> None:
    inputs = make_inputs("random", num_ranks=2, num_tokens=(5,), num_experts=4, num_topk=2)
    handles = [each.handle for each in dispatch_all(inputs, 4)]
    xs = [inputs[0].x, inputs[1].x[:4]]
    with pytest.raises(ValueError, match=r"rank 1 passes x with 4 tokens, .* with 5"):
        intranode.cached_dispatch(xs, None, handles, 0)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("num_biases", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_combine(num_ranks: int, num_biases: int, dtype: torch.dtype) -> None:
    num_experts, hidden = 2 * num_ranks, 6
    inputs = make_inputs(
        "holes", num_ranks=num_ranks, num_tokens=(9, 0, 12), num_experts=num_experts, num_topk=3
    )
    world = dispatch_all(inputs, num_experts)
    handles = [each.handle for each in world]
    xs = [
        data.random_payload(each.recv_x.shape[0], hidden, dtype, seed=rank)
        for rank, each in enumerate(world)
    ]
    weights = [each.recv_topk_weights for each in world]
    assert all(each is not None for each in weights)

    for owner, each in enumerate(inputs):
        num_tokens = each.x.shape[0]
        biases = tuple(
            data.random_payload(num_tokens, hidden, dtype, seed=100 + index)
            for index in range(num_biases)
        )
        bias = {0: None, 1: biases[0] if biases else None, 2: biases}[num_biases]
        got, got_weights = intranode.combine(xs, handles, owner, weights, bias)
        assert got.shape == (num_tokens, hidden)
        assert got.dtype == dtype
        assert got_weights is not None

        rows: dict[tuple[int, int], list[float]] = {}  # (receiver, token) -> row
        for peer in range(num_ranks):
            sources = [
                (source, token)
                for source, other in enumerate(inputs)
                for token in range(other.x.shape[0])
                if other.is_token_in_rank[token, peer]
            ]
            for row, (source, token) in enumerate(sources):
                if source == owner:
                    rows[peer, token] = xs[peer][row].tolist()
        want = torch.empty((num_tokens, hidden), dtype=torch.float32)
        for token in range(num_tokens):
            for column in range(hidden):
                terms = [float(one[token, column]) for one in biases]
                terms += [
                    rows[peer, token][column] for peer in range(num_ranks) if (peer, token) in rows
                ]
                acc = terms[0] if biases else 0.0
                for term in terms[1:] if biases else terms:
                    acc = f32(acc + term)
                want[token, column] = acc
        data.assert_rows_equal(got, want.to(dtype), f"rank {owner}: combined_x")

        # Each selection is on exactly one rank, so the weights come back, 0.0 where none was.
        assert each.topk_idx is not None
        assert each.topk_weights is not None
        kept = torch.where(
            each.topk_idx >= 0, each.topk_weights, torch.zeros_like(each.topk_weights)
        )
        data.assert_rows_equal(got_weights, kept, f"rank {owner}: combined_topk_weights")


def test_combine_adds_in_the_stated_order() -> None:
    """Sums that come out differently in another order, or with two roundings."""
    num_ranks = 3
    inputs = make_inputs(
        "balanced", num_ranks=num_ranks, num_tokens=(2,), num_experts=3, num_topk=3, hidden=8
    )
    handles = [each.handle for each in dispatch_all(inputs, 3)]
    values = (2.0**30, 1.0, -(2.0**30))
    xs = [torch.full((6, 8), value, dtype=torch.bfloat16) for value in values]
    plain, _ = intranode.combine(xs, handles, 0)
    assert (plain == 0.0).all()  # (2^30 + 1) rounds to 2^30 in float32
    bias = torch.full((2, 8), -(2.0**30), dtype=torch.bfloat16)
    ahead, _ = intranode.combine(xs, handles, 0, bias=bias)
    assert (ahead == 1.0 - 2.0**30).all()
    pair, _ = intranode.combine(xs, handles, 0, bias=(bias, -bias))
    assert (pair == 0.0).all()


def test_combine_starts_from_positive_zero() -> None:
    inputs = make_inputs("all_holes", num_ranks=2, num_tokens=(3,), num_experts=2, num_topk=1)
    inputs[0].is_token_in_rank[0, 1] = True
    handles = [each.handle for each in dispatch_all(inputs, 2)]
    xs = [torch.full((len(each[3]), 8), -0.0, dtype=torch.bfloat16) for each in handles]
    combined, _ = intranode.combine(xs, handles, 0)
    assert not torch.signbit(combined).any()
    # A bias is the start itself, so its sign stays where no rank adds anything.
    bias = torch.full((3, 8), -0.0, dtype=torch.bfloat16)
    combined, _ = intranode.combine(xs, handles, 0, bias=bias)
    assert torch.signbit(combined).all()
    combined, _ = intranode.combine(xs, handles, 0, bias=(None, bias))
    assert not torch.signbit(combined).any()


def test_combine_of_the_wrong_number_of_rows() -> None:
    inputs = make_inputs("balanced", num_ranks=2, num_tokens=(4,), num_experts=2, num_topk=2)
    world = dispatch_all(inputs, 2)
    xs = [world[0].recv_x, world[1].recv_x[:-1]]
    with pytest.raises(ValueError, match="rank 1 passes x with 7 rows, but its handle has 8"):
        intranode.combine(xs, [each.handle for each in world], 0)


def check_roundtrip(inputs: list[RankInput], world: list[Dispatched]) -> None:
    """Experts that do nothing give back each token times the number of ranks that got it."""
    handles = [each.handle for each in world]
    for owner, each in enumerate(inputs):
        combined, _ = intranode.combine([one.recv_x for one in world], handles, owner)
        copies = each.is_token_in_rank.sum(dim=1, keepdim=True)
        want = (each.x.to(torch.float32) * copies.to(torch.float32)).to(each.x.dtype)
        data.assert_rows_equal(combined, want, f"rank {owner}: roundtrip")


@pytest.mark.parametrize("num_ranks", [*RANKS, 11])
@pytest.mark.parametrize("kind", data.ROUTING_KINDS)
@pytest.mark.parametrize("worst", [False, True])
def test_roundtrip(kind: data.RoutingKind, num_ranks: int, worst: bool) -> None:
    num_experts = 2 * num_ranks
    inputs = make_inputs(
        kind, num_ranks=num_ranks, num_tokens=(17, 3), num_experts=num_experts, num_topk=4
    )
    world = dispatch_all(inputs, num_experts, worst=17 * num_ranks if worst else 0)
    check_roundtrip(inputs, world)


def test_inputs_are_left_alone() -> None:
    inputs = make_inputs("holes", num_ranks=2, num_tokens=(7,), num_experts=4, num_topk=2)
    before = [each.x.clone() for each in inputs]
    biases = torch.ones((7, 16), dtype=torch.bfloat16)
    world = dispatch_all(inputs, 4)
    intranode.combine(
        [each.recv_x for each in world], [each.handle for each in world], 0, bias=biases
    )
    assert all(torch.equal(each.x, old) for each, old in zip(inputs, before, strict=True))
    assert (biases == 1.0).all()


def test_mismatch_report_names_row_and_token() -> None:
    want = data.payload(1, 20, 8, torch.bfloat16)
    got = want.clone()
    got[17] = data.payload(1, 20, 8, torch.bfloat16)[5]
    with pytest.raises(
        AssertionError,
        match=r"recv_x: row 17, column 1: got 5.0 \(token 5 of rank 1\), expected 17.0 "
        r"\(token 17 of rank 1\); 1 of 20 rows differ",
    ):
        data.assert_rows_equal(got, want, "recv_x")
