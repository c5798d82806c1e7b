"""Rows by expert between ranks: the reference against brute force, and the CPU backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epjit import Buffer, CommunicationError
from epjit.kernels.intranode import DispatchConfig, config_of
from epjit.kernels.shapes import ExpertDispatchShape
from epjit.reference import Normal
from epjit.reference import expert_major as reference
from epjit.reference.intranode import RankInput
from tests.harness import launch
from tests.harness.data import ROUTING_KINDS, RoutingKind, assert_rows_equal, topk_weights
from tests.rounds.expert_major import (
    ExpertRound,
    as_bias,
    check_expert_round,
    make_experts,
    random_expert_round,
)
from tests.scenarios import expert_major

TOKENS = (11, 0, 6, 9)


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")


# ---- the reference against loops over single selections -----------------------------------------


def selections(
    world: list[RankInput], rank: int, num_experts: int
) -> list[tuple[int, int, int, int]]:
    """Local expert, source rank, token and choice of each row that a rank gets, in order."""
    local = num_experts // len(world)
    found = []
    for source, given in enumerate(world):
        assert given.topk_idx is not None
        for token, chosen in enumerate(given.topk_idx.tolist()):
            for choice, expert in enumerate(chosen):
                if rank * local <= expert < (rank + 1) * local:
                    found.append((expert - rank * local, source, token, choice))
    return sorted(found)


def check_dispatched(case: ExpertRound, room: int, num_rows: int) -> None:
    """One rank after the other, one selection after the other."""
    num_ranks = len(case.num_tokens)
    oracle = Normal((range(num_ranks),))
    world = make_experts(case, oracle).world
    local = case.num_experts // num_ranks
    for rank in range(num_ranks):
        got = reference.dispatch(
            oracle,
            world,
            rank,
            num_experts=case.num_experts,
            expert_alignment=case.alignment,
            num_worst_tokens=room,
            num_rows=num_rows,
        )
        found = selections(world, rank, case.num_experts)
        tokens = sorted({(source, token) for _, source, token, _ in found})
        counts = [sum(each[0] == expert for each in found) for expert in range(local)]
        starts, row = [], 0
        for count in counts:
            starts.append(row)
            row += -(-count // case.alignment) * case.alignment
        most = num_rows or row
        wanted: dict[int, tuple[int, int, int]] = {}
        numbers = [0] * local
        for expert, source, token, choice in found:
            at = starts[expert] + numbers[expert]
            numbers[expert] += 1
            if at < most and (not room or tokens.index((source, token)) < room):
                wanted[at] = source, token, choice
        routing, placed = got.handle
        assert placed.counts.tolist() == counts
        assert placed.ends.tolist() == [min(each, most) for each in [*starts[1:], row]]
        assert got.rows.shape[0] == placed.source.shape[0] == most
        assert routing.num_rows == placed.row_of.shape[0] == (room or len(tokens))
        named = {}
        for compact, rows in enumerate(placed.row_of.tolist()):
            for choice, at in enumerate(rows):
                if at >= 0:
                    assert int(placed.source[at]) == compact * case.num_topk + choice
                    named[at] = (*tokens[compact], choice)
        assert named == wanted
        assert int((placed.source >= 0).sum()) == len(wanted)
        for at in range(most):
            if at not in wanted:
                assert not got.rows[at].any()
                assert got.weights is not None
                assert float(got.weights[at]) == 0.0
                continue
            source, token, choice = wanted[at]
            given = world[source]
            assert given.topk_weights is not None
            assert got.weights is not None
            assert torch.equal(got.rows[at], given.x[token])
            assert float(got.weights[at]) == float(given.topk_weights[token, choice])


@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("alignment", [1, 8])
def test_reference_against_brute_force(kind: RoutingKind, alignment: int) -> None:
    case = ExpertRound(TOKENS, hidden=16, num_topk=3, kind=kind, alignment=alignment)
    for room, num_rows in ((0, 0), (40, 200), (40, 13), (7, 200)):
        check_dispatched(case, room, num_rows)


@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_against_brute_force(kind: RoutingKind, weighted: bool) -> None:
    case = ExpertRound(
        TOKENS, hidden=16, num_topk=3, kind=kind, alignment=4, weighted=weighted, num_biases=1
    )
    oracle = Normal((range(len(TOKENS)),))
    made = make_experts(case, oracle)
    for owner in range(len(TOKENS)):
        bias = made.biases[owner][0]
        got, back = made.combined[owner]
        assert back is not None
        for token in range(TOKENS[owner]):
            total, weights = bias[token].float(), torch.zeros(case.num_topk)
            for rank in range(len(TOKENS)):
                found = selections(made.world, rank, case.num_experts)
                compact = sorted({each[1:3] for each in found})
                if (owner, token) not in compact:
                    continue
                rows = (
                    made.dispatched[rank]
                    .handle.placement.row_of[compact.index((owner, token))]
                    .tolist()
                )
                part = torch.zeros(case.hidden)
                for choice, row in enumerate(rows):
                    if row < 0:
                        continue
                    value = made.outputs[rank][row].float()
                    part += value * made.row_weights[rank][row] if weighted else value
                    weights[choice] += made.back[rank][row]
                total = total + part.to(case.combine_dtype).float()
            assert torch.equal(got[token], total.to(case.combine_dtype))
            assert torch.equal(back[token], weights)


def test_gradients_of_weighted_sums() -> None:
    """Against autograd on the same sums in double precision, and the order of a warp's sum."""
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(-1, 4, (13, 3), generator=generator)
    placed = reference.place(idx, 4, alignment=8, num_rows=64)
    rows = torch.randn(64, 300, generator=generator).bfloat16()
    weights = torch.rand(64, generator=generator)
    grads = torch.randn(13, 300, generator=generator).bfloat16()
    unused = placed.source < 0
    grad = reference.permute(grads, placed.source, 3)
    of_rows, of_weights = reference.weigh_backward(
        grad.masked_fill(unused[:, None], torch.nan), rows, weights, placed.source
    )
    wide = rows.double().requires_grad_(), weights.double().requires_grad_()
    (reference.unpermute(wide[0], placed.row_of, wide[1]) * grads.double()).sum().backward()
    assert torch.allclose(of_rows.double(), wide[0].grad, rtol=2**-8)
    assert torch.allclose(of_weights.double(), wide[1].grad, rtol=1e-4, atol=1e-4)
    assert not of_rows[unused].any()
    assert not of_weights[unused].any()
    row = int((~unused).nonzero()[3])
    lanes = [torch.zeros(()) for _ in range(32)]
    for at in range(300):
        lane = at // 8 % 32
        lanes[lane] = lanes[lane] + grad[row, at].float() * rows[row, at].float()
    for distance in (16, 8, 4, 2, 1):
        lanes = [lanes[lane] + lanes[lane + distance] for lane in range(distance)]
    assert torch.equal(of_weights[row], lanes[0])


def test_column_major_scales() -> None:
    scales = torch.arange(30, dtype=torch.float32).view(6, 5)
    got = reference.column_major(scales)
    assert torch.equal(got, scales)
    assert got.stride() == (1, 8)


# ---- the CPU backend -----------------------------------------------------------------------------


def rounds(comm: Any, nvlink_domain: int | None, num_rounds: int) -> None:
    buffer = Buffer(None, 1 << 20, 1 << 20, comm=comm, nvlink_domain=nvlink_domain)
    for seed in range(num_rounds):
        case = random_expert_round(buffer.group_size, seed, num_sms=4, max_tokens=20)
        check_expert_round(buffer, case)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_random_rounds(num_ranks: int) -> None:
    def body(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, comm=comm)
        for seed in range(40):
            case = random_expert_round(num_ranks, 100 + seed, num_sms=4, max_tokens=20)
            check_expert_round(buffer, case)

    launch.run_threads(body, num_ranks)


def test_random_rounds_of_processes() -> None:
    done = launch.run(expert_major.random_rounds, 2, {"EPJIT_BACKEND": "cpu"}, 10, 20)
    assert done == [10] * 2


def test_direct_falls_back_to_slots() -> None:
    """A peer would store each row over the links."""
    shape = ExpertDispatchShape(512, 0, 2, True, False, True)
    config = config_of(shape, 2, "sm_90a", variant="direct")
    assert isinstance(config, DispatchConfig)
    assert config.push
    assert not config.direct


@pytest.mark.parametrize(("num_ranks", "nvlink_domain"), [(4, 2), (6, 3)])
def test_random_rounds_between_domains(num_ranks: int, nvlink_domain: int) -> None:
    launch.run_threads(rounds, num_ranks, nvlink_domain, 15)


def test_buffers_that_are_too_small_between_domains() -> None:
    """As a GPU does: the kernels are those of a dispatch and a combine."""

    def body(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, 1 << 14, comm=comm, nvlink_domain=1)
        x, idx = torch.zeros(3, 1024).bfloat16(), torch.zeros(3, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"dispatch of 2048-byte rows .* num_rdma_bytes >="):
            buffer.expert_dispatch(x, idx, num_experts=2)
        x = x[:, :64].contiguous()
        rows, _, handle, _ = buffer.expert_dispatch(x, idx, num_experts=2)
        wide = torch.zeros(len(rows), 1024).bfloat16()
        with pytest.raises(ValueError, match=r"combine of 2048-byte rows .* num_rdma_bytes >="):
            buffer.expert_combine(wide, handle)
        buffer.expert_combine(wide[:, :64].contiguous(), handle)

    launch.run_threads(body, 2)


def test_tokens_without_room_are_told_of_once() -> None:
    """The rows of those that had room are where they would be with room for all."""

    def body(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, comm=comm)
        case = ExpertRound((12, 12), hidden=64, num_experts=4, kind="balanced", alignment=8)
        own = make_experts(case, Normal((range(2),))).world[buffer.rank]
        options: dict[str, Any] = {"num_experts": 4, "expert_alignment": 8}
        whole, _, whole_handle, _ = buffer.expert_dispatch(
            own.x, own.topk_idx, own.topk_weights, num_worst_tokens=24, **options
        )
        rows, weights, handle, _ = buffer.expert_dispatch(
            own.x, own.topk_idx, own.topk_weights, num_worst_tokens=15, **options
        )
        with pytest.raises(CommunicationError, match=r"24 rows come to rank .* has room for 15"):
            buffer.check_fault()
        buffer.check_fault()
        placed, wanted = handle.placement, whole_handle.placement
        assert torch.equal(placed.counts, wanted.counts)
        assert torch.equal(placed.row_of, wanted.row_of[:15])
        arrived = placed.row_of[placed.row_of >= 0].long()
        assert torch.equal(rows[arrived], whole[arrived])
        assert weights is not None
        assert int((placed.source >= 0).sum()) == len(arrived) < int((wanted.source >= 0).sum())
        buffer.expert_combine(rows, handle)

    launch.run_threads(body, 2)


def test_addresses_are_looked_at_in_every_call() -> None:
    """Also where a call that looks the same has passed."""

    def body(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, comm=comm)
        idx, odd = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3 * 64 + 1).bfloat16()[1:]
        _, _, handle, _ = buffer.expert_dispatch(odd.view(3, 64).clone(), idx, num_experts=2)
        with pytest.raises(ValueError, match="x starts at address"):
            buffer.expert_dispatch(odd.view(3, 64), idx, num_experts=2)
        buffer.expert_combine(torch.zeros(6, 64).bfloat16(), handle)
        rows = torch.zeros(6 * 64 + 1).bfloat16()[1:].view(6, 64)
        with pytest.raises(ValueError, match="rows starts at address"):
            buffer.expert_combine(rows, handle)

    launch.run_threads(body, 1)


def test_ranks_that_disagree_are_told() -> None:
    def body(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, comm=comm)
        x, idx = torch.zeros(3, 256, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)
        some = topk_weights(3, 2, seed=0)
        for weights in (None, some):  # else the ranks would disagree on a kernel
            buffer.expert_dispatch(x, idx, weights, num_experts=4)
        buffer.expert_dispatch(x, idx, num_experts=4, cast="fp8")
        cast = "fp8" if buffer.rank else None
        with pytest.raises(ValueError, match="disagree on cast: rank 0 has None, rank 1 has fp8"):
            buffer.expert_dispatch(x, idx, num_experts=4, cast=cast)
        weights = some if buffer.rank else None
        with pytest.raises(ValueError, match="disagree on topk_weights"):
            buffer.expert_dispatch(x, idx, weights, num_experts=4)

    launch.run_threads(body, 2)


def test_only_the_rows_that_the_handle_names_are_read() -> None:
    """A user may put rows elsewhere and say so in row_of, with fewer rows than were dispatched."""

    def body(comm: Any) -> None:
        buffer = Buffer(None, 1 << 20, comm=comm)
        case = ExpertRound((9, 5), hidden=64, num_experts=4, alignment=8)
        made = make_experts(case, Normal((range(2),)))
        own = made.world[buffer.rank]
        _, _, handle, _ = buffer.expert_dispatch(
            own.x, own.topk_idx, own.topk_weights, num_experts=4, expert_alignment=8
        )
        placed = handle.placement
        used = (placed.source >= 0).nonzero().flatten()
        moved = torch.full_like(placed.source, -1)
        moved[used] = torch.arange(len(used), dtype=torch.int32)
        placed.row_of.copy_(
            torch.where(placed.row_of >= 0, moved[placed.row_of.long()], placed.row_of)
        )
        combined, _, _ = buffer.expert_combine(
            made.outputs[buffer.rank][used].contiguous(),
            handle,
            row_weights=made.row_weights[buffer.rank][used].contiguous(),
        )
        want, _ = made.combined[buffer.rank]
        assert as_bias(made.biases[buffer.rank]) is None
        assert_rows_equal(combined, want, f"rank {buffer.rank}")

    launch.run_threads(body, 2)


def test_rows_beyond_a_tensor_are_none() -> None:
    rows, row_of = torch.ones(3, 8), torch.tensor([[0, 3], [-1, 2**31 - 1]], dtype=torch.int32)
    got: Tensor = reference.unpermute(rows, row_of)
    assert got.tolist() == [[1.0] * 8, [0.0] * 8]
