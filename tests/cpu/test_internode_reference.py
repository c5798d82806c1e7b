"""The reference between NVLink domains, against brute force in plain Python."""

from __future__ import annotations

import itertools

import pytest
import torch

from epjit.handles import Dispatched, Handle
from epjit.reference import internode, intranode
from epjit.reference.intranode import RankInput
from tests.cpu.test_intranode_reference import brute_layout, f32, make_inputs
from tests.harness import data

DOMAINS = {
    "2x2": ((0, 1), (2, 3)),
    "3x5": tuple(tuple(range(5 * n, 5 * n + 5)) for n in range(3)),
    "4x1": ((0,), (1,), (2,), (3,)),
    "2x8": (tuple(range(8)), tuple(range(8, 16))),
    "1x3": ((0, 1, 2),),
    "scattered": ((0, 4, 5), (1, 2, 7), (3, 6, 8)),
}
ALL_DOMAINS = pytest.mark.parametrize("domains", DOMAINS.values(), ids=DOMAINS)


def make_world(
    domains: internode.Domains,
    kind: data.RoutingKind = "random",
    *,
    num_tokens: tuple[int, ...] = (13, 0, 21),
    dtype: torch.dtype = torch.bfloat16,
    worst: int = 0,
    **kwargs: object,
) -> tuple[list[RankInput], list[Dispatched]]:
    """Inputs and results of all ranks, with two experts a rank."""
    num_ranks = sum(map(len, domains))
    inputs = make_inputs(
        kind,
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        num_experts=2 * num_ranks,
        num_topk=3,
        dtype=dtype,
        **kwargs,  # type: ignore[arg-type]
    )
    world = [
        internode.dispatch(inputs, rank, domains, num_experts=2 * num_ranks, num_worst_tokens=worst)
        for rank in range(num_ranks)
    ]
    return inputs, world


def check_handle(
    inputs: list[RankInput], rank: int, domains: internode.Domains, handle: Handle
) -> None:
    """Each slot by loops over channels, tokens and receivers."""
    goes = [each.is_token_in_rank.tolist() for each in inputs]  # [source][token][rank]
    num_ranks, num_tokens = len(inputs), len(goes[rank])
    ((domain, local),) = [
        (n, i) for n, each in enumerate(domains) for i, one in enumerate(each) if one == rank
    ]

    def channel(source: int, to: int) -> list[int]:
        return [
            token
            for token, receivers in enumerate(goes[source])
            if any(receivers[receiver] for receiver in domains[to])
        ]

    def segment(source: int, receiver: int) -> list[int]:
        return [token for token, receivers in enumerate(goes[source]) if receivers[receiver]]

    def index(tokens: list[int], token: int) -> int:
        return tokens.index(token) if token in tokens else -1

    ints = torch.int32
    assert [each.dtype for each in handle] == [torch.bool, *[ints] * 6, torch.uint8, ints, ints]
    assert all(each.device.type == "cpu" for each in handle)
    assert handle[0] is inputs[rank].is_token_in_rank
    assert handle[1].shape == (len(domains), num_tokens + 1)
    for number in range(len(domains)):
        tokens = channel(rank, number)
        rest = [0] * (num_tokens - len(tokens))
        assert handle[1][number].tolist() == [*tokens, *rest, len(tokens)]
    lengths = [[len(channel(source, domain)) for source in each] for each in domains]
    assert handle[2].tolist() == lengths
    assert handle[3].tolist() == [
        [index(segment(rank, receiver), token) for receiver in range(num_ranks)]
        for token in range(num_tokens)
    ]
    passing = [(source, channel(source, domain)) for source in (each[local] for each in domains)]
    assert handle[4].tolist() == list(itertools.accumulate(len(tokens) for _, tokens in passing))
    segments = [segment(source, rank) for source in range(num_ranks)]
    assert handle[6].tolist() == list(itertools.accumulate(map(len, segments)))
    meta = [
        [channel(source, domain).index(token), token]
        for source, tokens in enumerate(segments)
        for token in tokens
    ]
    assert handle[7].shape[1:] == (8,)
    got_meta = handle[7].contiguous().view(torch.int32)
    assert got_meta[: len(meta)].tolist() == meta
    assert not got_meta[len(meta) :].any()
    assert handle[8].tolist() == [
        [index(channel(rank, number), token) for number in range(len(domains))]
        for token in range(num_tokens)
    ]
    heads = []
    for source, tokens in passing:
        for token in tokens:
            gets = [goes[source][token][receiver] for receiver in domains[domain]]
            place = segment(source, rank).index(token) if gets[local] else 0
            heads.append(sum(bit << i for i, bit in enumerate(gets)) + place * 256)
    assert handle[9][: len(heads)].tolist() == heads
    assert not handle[9][len(heads) :].any()


@ALL_DOMAINS
@pytest.mark.parametrize("kind", ["random", "holes", "out_of_range"])
def test_layout(domains: internode.Domains, kind: data.RoutingKind) -> None:
    num_ranks = sum(map(len, domains))
    idx = data.routing(
        kind, num_tokens=29, num_experts=3 * num_ranks, num_topk=4, num_ranks=num_ranks, seed=5
    )
    layout = internode.layout(idx, 3 * num_ranks, domains)
    per_rank, per_domain, per_expert, in_rank = (each.tolist() for each in layout)
    assert (per_rank, per_expert, in_rank) == brute_layout(idx.tolist(), 3 * num_ranks, num_ranks)
    assert layout[1].dtype == torch.int32
    assert per_domain == [
        sum(any(row[rank] for rank in domain) for row in in_rank) for domain in domains
    ]


@ALL_DOMAINS
@pytest.mark.parametrize("kind", data.ROUTING_KINDS)
def test_dispatch(domains: internode.Domains, kind: data.RoutingKind) -> None:
    inputs, world = make_world(domains, kind)
    for rank, got in enumerate(world):
        want = intranode.dispatch(inputs, rank, num_experts=2 * len(inputs))
        data.assert_rows_equal(got.recv_x, want.recv_x, f"rank {rank}: recv_x")
        assert got.num_recv_tokens_per_expert_list == want.num_recv_tokens_per_expert_list
        assert torch.equal(got.handle[5], want.handle[2])
        check_handle(inputs, rank, domains, got.handle)


@ALL_DOMAINS
def test_num_worst_tokens_pads_what_depends_on_arrivals(domains: internode.Domains) -> None:
    _, plain = make_world(domains, num_tokens=(7, 4))
    worst = 7 * len(plain)
    inputs, world = make_world(domains, num_tokens=(7, 4), worst=worst)
    for rank, (got, want) in enumerate(zip(world, plain, strict=True)):
        check_handle(inputs, rank, domains, got.handle)
        assert got.handle[7].shape == (worst, 8)
        assert got.handle[9].shape == (len(domains[0]) * worst,)
        assert got.recv_x.shape[0] == worst
        assert got.recv_topk_idx is not None
        assert (got.recv_topk_idx[len(want.recv_x) :] == -1).all()
        data.assert_rows_equal(got.recv_x[: len(want.recv_x)], want.recv_x, f"rank {rank}: recv_x")


@ALL_DOMAINS
@pytest.mark.parametrize("worst", [False, True])
def test_cached_dispatch(domains: internode.Domains, worst: bool) -> None:
    num_ranks = sum(map(len, domains))
    inputs, world = make_world(domains, worst=21 * num_ranks if worst else 0)
    again = [
        data.fp8_payload(rank, len(each.x), 32, layout="column_major", group_size=16)
        for rank, each in enumerate(inputs)
    ]
    handles = [each.handle for each in world]
    for rank, got in enumerate(world):
        recv_x, recv_scales = internode.cached_dispatch(
            [x for x, _ in again], [scales for _, scales in again], handles, rank
        )
        fresh = [
            RankInput(x, scales, None, None, each.is_token_in_rank, each.num_tokens_per_expert)
            for (x, scales), each in zip(again, inputs, strict=True)
        ]
        want = intranode.dispatch(
            fresh, rank, num_experts=2 * num_ranks, num_worst_tokens=21 * num_ranks * worst
        )
        assert recv_scales is not None
        assert want.recv_scales is not None
        assert len(recv_x) == len(got.recv_x)
        data.assert_rows_equal(recv_x, want.recv_x, "recv_x")
        data.assert_rows_equal(recv_scales, want.recv_scales, "recv_scales")


@ALL_DOMAINS
@pytest.mark.parametrize("num_biases", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_combine(domains: internode.Domains, num_biases: int, dtype: torch.dtype) -> None:
    hidden = 6
    inputs, world = make_world(domains, "holes", num_tokens=(9, 0, 12))
    handles = [each.handle for each in world]
    xs = [
        data.random_payload(len(each.recv_x), hidden, dtype, seed=rank)
        for rank, each in enumerate(world)
    ]
    weights = [data.topk_weights(len(each.recv_x), 3, seed=rank) for rank, each in enumerate(world)]
    where = {}  # (receiver, source, token) -> row
    for receiver in range(len(inputs)):
        rows = [
            (receiver, source, token)
            for source, each in enumerate(inputs)
            for token in range(len(each.x))
            if each.is_token_in_rank[token, receiver]
        ]
        where.update({key: row for row, key in enumerate(rows)})

    def rounded(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float32).to(dtype))

    for owner, each in enumerate(inputs):
        num_tokens = len(each.x)
        biases = tuple(
            data.random_payload(num_tokens, hidden, dtype, seed=100 + index)
            for index in range(num_biases)
        )
        got, got_weights = internode.combine(
            xs,
            handles,
            owner,
            domains,
            weights,
            {0: None, 1: biases[0] if biases else None, 2: biases}[num_biases],
        )
        assert got.dtype == dtype
        assert got_weights is not None
        want = torch.zeros((num_tokens, hidden), dtype=torch.float32)
        want_weights = torch.zeros((num_tokens, 3), dtype=torch.float32)

        def nested(token: int, rows: list[torch.Tensor], column: int) -> list[float]:
            """The sums of the domains that got the token."""
            sums = []
            for domain in domains:
                terms = [
                    float(rows[peer][where[peer, owner, token], column])  # noqa: B023
                    for peer in domain
                    if (peer, owner, token) in where  # noqa: B023
                ]
                acc = 0.0
                for term in terms:
                    acc = f32(acc + term)
                sums += [acc] if terms else []
            return sums

        for token in range(num_tokens):
            for column in range(hidden):
                acc = 0.0
                for bias in biases:
                    acc = f32(acc + float(bias[token, column]))
                for partial in nested(token, xs, column):
                    acc = f32(acc + rounded(partial))
                want[token, column] = acc
            for column in range(3):
                acc = 0.0
                for partial in nested(token, weights, column):
                    acc = f32(acc + partial)
                want_weights[token, column] = acc
        data.assert_rows_equal(got, want.to(dtype), f"rank {owner}: combined_x")
        data.assert_rows_equal(got_weights, want_weights, f"rank {owner}: combined_topk_weights")


def test_combine_rounds_each_domain() -> None:
    """A sum that comes out differently without the rounding inside a domain."""
    domains = ((0, 1), (2, 3))
    inputs = make_inputs(
        "balanced", num_ranks=4, num_tokens=(2,), num_experts=4, num_topk=4, hidden=8
    )
    handles = [internode.dispatch(inputs, rank, domains, num_experts=4).handle for rank in range(4)]
    values = (256.0, 1.0, -256.0, 0.0)  # bfloat16 has 8 bits: 257 rounds to 256
    xs = [torch.full((8, 8), value, dtype=torch.bfloat16) for value in values]
    assert (internode.combine(xs, handles, 0, domains)[0] == 0.0).all()
    flat = [intranode.dispatch(inputs, rank, num_experts=4).handle for rank in range(4)]
    assert (intranode.combine(xs, flat, 0)[0] == 1.0).all()


def test_combine_keeps_the_sign_of_a_bias_where_no_domain_adds() -> None:
    domains = ((0,), (1,))
    inputs = make_inputs("all_holes", num_ranks=2, num_tokens=(3,), num_experts=2, num_topk=1)
    inputs[0].is_token_in_rank[0, 1] = True
    handles = [internode.dispatch(inputs, rank, domains, num_experts=2).handle for rank in range(2)]
    xs = [torch.full((len(each[7]), 8), -0.0, dtype=torch.bfloat16) for each in handles]
    assert not torch.signbit(internode.combine(xs, handles, 0, domains)[0]).any()
    bias = torch.full((3, 8), -0.0, dtype=torch.bfloat16)
    combined, _ = internode.combine(xs, handles, 0, domains, bias=bias)
    assert torch.signbit(combined).all(dim=1).tolist() == [False, True, True]


def test_combine_of_the_wrong_number_of_rows() -> None:
    domains = DOMAINS["2x2"]
    _, world = make_world(domains, "balanced", num_tokens=(4,))
    xs = [each.recv_x for each in world]
    xs[1] = xs[1][:-1]
    with pytest.raises(ValueError, match=r"rank 1 passes x with \d+ rows, but its handle has"):
        internode.combine(xs, [each.handle for each in world], 0, domains)


@ALL_DOMAINS
@pytest.mark.parametrize("kind", data.ROUTING_KINDS)
def test_roundtrip(domains: internode.Domains, kind: data.RoutingKind) -> None:
    """Experts that do nothing give back each token times the number of ranks that got it."""
    inputs, world = make_world(domains, kind, num_tokens=(17, 3))
    for owner, each in enumerate(inputs):
        combined, _ = internode.combine(
            [one.recv_x for one in world], [one.handle for one in world], owner, domains
        )
        copies = each.is_token_in_rank.sum(dim=1, keepdim=True)
        want = (each.x.to(torch.float32) * copies.to(torch.float32)).to(each.x.dtype)
        data.assert_rows_equal(combined, want, f"rank {owner}: roundtrip")


@pytest.mark.parametrize(
    ("domains", "words"),
    [
        (((0, 1), (2,)), "must have the same number of ranks"),
        (((0, 1), (1, 2)), "do not hold each of 4 ranks once"),
        ((tuple(range(9)), tuple(range(9, 18))), "up to 8 ranks each"),
        (tuple((n,) for n in range(33)), "up to 32 of"),
    ],
)
def test_domains_that_cannot_be(domains: internode.Domains, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        internode.check_domains(domains, sum(map(len, domains)))
