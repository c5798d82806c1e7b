"""The reference of DeepEP 2's interface against cases worked out by hand from its spec."""

from __future__ import annotations

from typing import Any

import torch

from epjit.handles import ElasticDispatched
from epjit.reference import elastic
from epjit.reference.elastic import RankInput

# Two ranks with two experts each, M = 4. Rank 0 has three tokens, rank 1 has two.
CHOICES = ([[0, 2, 1], [3, -1, 2], [-1, -1, -1]], [[1, 3, -1], [0, -1, -1]])


def inputs(*, weights: bool = True) -> list[RankInput]:
    """Row `r, t` of x is full of `10 * r + t`; weight `k` of it is `r + t / 10 + k / 100`."""
    given = []
    for rank, choices in enumerate(CHOICES):
        idx = torch.tensor(choices, dtype=torch.int64)
        token = torch.arange(len(choices))
        x = (10 * rank + token)[:, None].expand(-1, 2).to(torch.bfloat16).contiguous()
        k = torch.arange(3)
        w = rank + token[:, None] / 10 + k / 100
        given.append(RankInput(x, None, idx, w.float() if weights else None))
    return given


def dispatch(rank: int, **options: Any) -> ElasticDispatched:
    return elastic.dispatch(inputs(), rank, num_experts=4, max_tokens=4, **options)


def test_compact() -> None:
    """Rank 0 has experts 0 and 1: token 0 of rank 0 with two choices, both tokens of rank 1."""
    got = dispatch(0, expert_alignment=4)
    handle = got.handle
    assert got.recv_x[:, 0].tolist() == [0, 10, 11]
    assert got.recv_topk_idx is not None
    assert got.recv_topk_weights is not None
    assert got.recv_topk_idx.tolist() == [[0, -1, 1], [1, -1, -1], [0, -1, -1]]
    want = torch.tensor([[0, 0, 0.02], [1, 0, 0], [1.1, 0, 0]])
    assert torch.equal(got.recv_topk_weights, want)
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == [1, 3]
    assert handle.num_unaligned_recv_tokens_per_expert.tolist() == [2, 2]
    assert handle.psum_num_recv_tokens_per_expert.tolist() == [4, 8]
    assert handle.num_recv_tokens_per_expert_list == [4, 4]
    # Number of the token, rank * K + last k here; local experts.
    assert handle.recv_src_metadata.tolist() == [
        [0, 2, 0, -1, 1],
        [4, 3, 1, -1, -1],
        [5, 3, 0, -1, -1],
    ]
    assert handle.dst_buffer_slot_idx.tolist() == [[-1, 0, 0], [-1, -1, 1], [-1, -1, -1]]
    assert (handle.num_recv_tokens, handle.num_expanded_tokens) == (3, 0)
    assert dispatch(1).handle.dst_buffer_slot_idx.tolist() == [[4, 4, -1], [5, -1, -1]]


def test_expanded() -> None:
    """Expert 0 has tokens 0.0 and 1.1; expert 1 has 0.0 and 1.0, from row 4 on."""
    got = dispatch(0, do_expand=True, expert_alignment=4)
    handle = got.handle
    assert got.recv_topk_idx is None
    assert got.recv_x[:, 0].tolist() == [0, 11, 0, 0, 0, 10, 0, 0]
    assert got.recv_topk_weights is not None
    want = torch.tensor([0, 1.1, 0, 0, 0.02, 1, 0, 0])
    assert torch.equal(got.recv_topk_weights, want)
    # Ends of the valid rows: their alignment is where the next expert begins.
    assert handle.psum_num_recv_tokens_per_expert.tolist() == [2, 6]
    assert handle.num_recv_tokens_per_expert_list == [4, 4]
    assert handle.recv_src_metadata.tolist() == [
        [0, 2, 0, -1, 4],
        [4, 3, 5, -1, -1],
        [5, 3, 1, -1, -1],
    ]
    assert (handle.num_recv_tokens, handle.num_expanded_tokens) == (3, 8)


def test_without_a_waiting_host_outputs_have_room_for_everything() -> None:
    got = dispatch(0, do_cpu_sync=False)
    assert got.recv_x.shape == (8, 2)
    assert got.handle.num_recv_tokens_per_expert_list == []
    assert got.handle.recv_src_metadata.shape == (8, 5)
    assert got.handle.psum_num_recv_tokens_per_scaleup_rank[-1] == 3
    # R * M * min(K, E // R) choices, and 3 rows of padding for each expert, aligned.
    got = dispatch(0, do_expand=True, do_cpu_sync=False, expert_alignment=4)
    assert got.recv_x.shape == (24, 2)
    assert got.handle.num_expanded_tokens == 24


def test_weights_are_optional() -> None:
    got = elastic.dispatch(inputs(weights=False), 0, num_experts=4, max_tokens=4)
    assert got.recv_topk_weights is None
    assert got.recv_topk_idx is not None


# One token, three ranks with an expert each, K = 3. In bfloat16 256 + 1 is rounded to 256.
ORDER = [2, 0, 1]
BIG, ONE = 256.0, 1.0


def one_token(choices: list[int], num_experts: int, num_ranks: int, **options: Any) -> list[Any]:
    token = RankInput(torch.zeros(1, 1, dtype=torch.bfloat16), None, torch.tensor([choices]), None)
    empty = RankInput(token.x[:0], None, token.topk_idx[:0], None)
    given = [token] + [empty] * (num_ranks - 1)
    return [
        elastic.dispatch(given, rank, num_experts=num_experts, max_tokens=2, **options).handle
        for rank in range(num_ranks)
    ]


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)[:, None]


def test_ranks_are_added_in_the_order_of_their_last_choice() -> None:
    """Ranks 2, 0, 1: (1 + 2 ** 24) - 2 ** 24 is 0 in float32; by rank it would be 1."""
    handles = one_token(ORDER, 3, 3)
    xs = [rows(2.0**24), rows(-(2.0**24)), rows(1)]
    out, _ = elastic.combine(xs, handles, 0)
    assert out.tolist() == [[0]]


def test_biases_come_first() -> None:
    """(1 + 2 ** 24) - 2 ** 24."""
    handles = one_token([0, 1], 2, 2)
    xs = [rows(2.0**24), rows(-(2.0**24))]
    assert elastic.combine(xs, handles, 0, bias=rows(1))[0].tolist() == [[0]]
    assert elastic.combine(xs, handles, 0, bias=(rows(2), rows(-1)))[0].tolist() == [[0]]
    assert elastic.combine(xs, handles, 0, bias=(rows(256), rows(256)))[0].tolist() == [[512]]


def test_a_rank_rounds_what_it_sums_if_it_may() -> None:
    """Choices 0 and 1 on rank 0, choice 2 on rank 1: 256 + 1 there, and 3 more here."""
    handles = one_token([0, 1, 2], 4, 2, do_expand=True)
    xs = [rows(BIG, ONE), rows(3.0)]
    assert elastic.combine(xs, handles, 0)[0].tolist() == [[260.0]]  # 256 + 3 = 259
    out, _ = elastic.combine(xs, handles, 0, multiple_reduction=False)
    assert out.tolist() == [[260.0]]  # 256 + 1 + 3
    xs[1] = rows(1.0)
    assert elastic.combine(xs, handles, 0)[0].tolist() == [[256.0]]  # 256 + 1
    out, _ = elastic.combine(xs, handles, 0, multiple_reduction=False)
    assert out.tolist() == [[258.0]]


def test_each_row_travels_in_the_order_of_the_choices_whatever_the_ranks() -> None:
    """Without a second rounding the result does not depend on which rank has which expert."""
    choices, values = [3, 0, 2, 1], [2.0**24, 1.0, -(2.0**24), 3.0]
    results = set()
    for num_ranks in (1, 2, 4):
        handles = one_token(choices, 4, num_ranks, do_expand=True)
        of_expert = {e: v for e, v in zip(choices, values, strict=True)}
        num_local = 4 // num_ranks
        xs = [
            rows(*(of_expert[e] for e in range(r * num_local, (r + 1) * num_local)))
            for r in range(num_ranks)
        ]
        out, _ = elastic.combine(xs, handles, 0, multiple_reduction=False)
        results.add(out.item())
    assert results == {3.0}  # 2 ** 24 + 1 is 2 ** 24


def test_weights_are_those_of_the_rank_of_the_expert() -> None:
    handles = one_token([3, -1, 0], 4, 2)
    weights = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 5.0, 6.0]])]
    _, got = elastic.combine([rows(0), rows(0)], handles, 0, weights)
    assert got is not None
    assert got.tolist() == [[4, 0, 3]]
    handles = one_token([3, -1, 0], 4, 2, do_expand=True)
    weights = [torch.tensor([7.0]), torch.tensor([8.0])]
    _, got = elastic.combine([rows(0), rows(0)], handles, 0, weights)
    assert got is not None
    assert got.tolist() == [[8, 0, 7]]


def test_a_token_without_a_choice_is_its_bias() -> None:
    handles = one_token([-1, -1], 2, 2)
    xs = [rows()[:0]] * 2
    assert elastic.combine(xs, handles, 0)[0].tolist() == [[0]]
    assert elastic.combine(xs, handles, 0, bias=rows(5))[0].tolist() == [[5]]


def test_moved_rows_are_found_where_the_metadata_says() -> None:
    """As LightLLM does: row i of x is row i of the metadata, whatever its experts."""
    handles = one_token([0, 1], 2, 1, do_expand=True)
    (handle,) = handles
    handle.recv_src_metadata[:, 2:] = torch.tensor([[0, -1]], dtype=torch.int32)
    assert elastic.combine([rows(7)], handles, 0)[0].tolist() == [[7]]
