"""Rows by expert on one GPU with virtual ranks, bit for bit against the reference.

In one NVLink domain, and between several, where loopback is the transport.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epjit import Buffer, CommunicationError, Config
from epjit.formats import CASTS
from epjit.reference import Normal
from tests.harness.data import ROUTING_KINDS, assert_rows_equal, to_device
from tests.harness.ranks import SMALL, SMS, capture, line_up, meet, run_ranks, settle
from tests.rounds.expert_major import (
    ExpertRound,
    check_expert_round,
    compare_experts,
    make_experts,
    random_expert_round,
)
from tests.rounds.normal import variant_environ

RANKS = (1, 2, 3, 4, 8)
CUTS = ((2, 1), (2, 2), (4, 1), (2, 3), (4, 2))  # domains, ranks of each
EVERY_CUT = pytest.mark.parametrize("cut", CUTS, ids=[f"{n}x{each}" for n, each in CUTS])
VARIANTS = ("tma", "push", "ldst")
TOKENS = 16 if SMALL else 333
ROUNDS = 3 if SMALL else 70  # with 1 to 4 ranks and a third of it with 8: 300 a variant


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every variant of dispatch that places rows by expert, with the combine that goes with it."""
    for name, value in variant_environ(request.param).items():
        monkeypatch.setenv(name, value)
    return str(request.param)


def between(cut: tuple[int, int], **options: Any) -> dict[str, Any]:
    """Options of ranks in NVLink domains, and how many there are."""
    sizes = {"num_nvl_bytes": 16 << 20, "num_rdma_bytes": 16 << 20} | options
    return {"num_ranks": cut[0] * cut[1], "nvlink_domain": cut[1], **sizes}


def sms_of(num_ranks: int) -> int:
    """Of a rank between domains: the blocks of all run at once."""
    return SMS if num_ranks <= 4 else min(SMS, 8)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_random_rounds(num_ranks: int, variant: str) -> None:
    rounds = ROUNDS if num_ranks < 8 else ROUNDS // 3

    def body(buffer: Buffer) -> None:
        for seed in range(rounds):
            case = random_expert_round(num_ranks, 1000 + seed, num_sms=SMS, max_tokens=TOKENS)
            check_expert_round(buffer, case)

    run_ranks(num_ranks, body)


@pytest.mark.parametrize("late", [False, True])
@EVERY_CUT
def test_random_rounds_between_domains(
    cut: tuple[int, int], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pass behind the dispatch, a first one before the combine."""
    if late:
        monkeypatch.setenv("EPJIT_LOOPBACK_SEED", "7")
    num_ranks = cut[0] * cut[1]

    def body(buffer: Buffer) -> None:
        for seed in range(ROUNDS if num_ranks <= 4 else ROUNDS // 3):
            sms = sms_of(num_ranks)
            case = random_expert_round(num_ranks, 2000 + seed, num_sms=sms, max_tokens=TOKENS)
            check_expert_round(buffer, case)

    run_ranks(body=body, **between(cut))


@pytest.mark.parametrize("variant", ["tma", "ldst"])
def test_model_shapes_between_domains(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a model in each format, padded to 128, of both kinds of size."""
    for op in ("DISPATCH", "COMBINE", "PERMUTE"):
        monkeypatch.setenv(f"EPJIT_{op}_VARIANT", variant)
    hidden = 512 if SMALL else 7168

    def body(buffer: Buffer) -> None:
        for seed, cast in enumerate((None, None, *CASTS)):
            case = ExpertRound(
                num_tokens=(TOKENS,) * 4,
                hidden=hidden,
                num_experts=32,
                num_topk=8,
                seed=seed,
                alignment=128,
                zero_padding=True,
                worst=seed % 2 == 1,
                cast=cast,
                column_major=cast in ("fp8", "fp8_ue8m0"),
                combine_dtype=(torch.bfloat16, torch.float16)[seed % 2],
                num_sms=SMS,
            )
            check_expert_round(buffer, case)

    run_ranks(body=body, **between((2, 2), num_nvl_bytes=32 << 20, num_rdma_bytes=32 << 20))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_model_shapes(num_ranks: int, variant: str) -> None:
    """Rows of real models with an expert's rows padded to 128, and the shortest row there is."""
    shapes = ((256, 32), (64, 8)) if SMALL else ((7168, 256), (2880, 128), (16384, 32), (16, 32))

    def body(buffer: Buffer) -> None:
        for seed, (hidden, num_experts) in enumerate(shapes):
            case = ExpertRound(
                num_tokens=(TOKENS,) * num_ranks,
                hidden=hidden,
                num_experts=num_experts,
                num_topk=8,
                seed=seed,
                alignment=128,
                zero_padding=True,
                worst=seed % 2 == 1,
                num_sms=SMS,
            )
            check_expert_round(buffer, case)

    run_ranks(num_ranks, body, num_nvl_bytes=32 << 20)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast: str, num_ranks: int, variant: str) -> None:
    """Rows of a model, from both dtypes."""
    hidden = 512 if SMALL else 7168

    def body(buffer: Buffer) -> None:
        for seed, dtype in enumerate((torch.bfloat16, torch.float16)):
            case = ExpertRound(
                num_tokens=(TOKENS,) * num_ranks,
                hidden=hidden,
                num_experts=8 * num_ranks,
                num_topk=8,
                seed=seed,
                cast=cast,
                column_major=cast in ("fp8", "fp8_ue8m0") and seed == 0,
                combine_dtype=dtype,
                num_sms=SMS,
            )
            check_expert_round(buffer, case)

    run_ranks(num_ranks, body)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_small_buffers(num_ranks: int, variant: str) -> None:
    """Hundreds of windows: nothing gets stuck."""

    def body(buffer: Buffer) -> None:
        for seed in range(4):
            case = ExpertRound(
                num_tokens=(TOKENS, 3, 0, TOKENS)[:num_ranks],
                hidden=256,
                num_experts=2 * num_ranks,
                num_topk=2,
                seed=seed,
                kind=ROUTING_KINDS[seed],
                num_sms=SMS,
            )
            check_expert_round(buffer, case)

    run_ranks(num_ranks, body, num_nvl_bytes=1 << 15)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_deterministic_mode(how: str) -> None:
    """There torch fills new tensors with NaN; the fill must not come after the rows."""

    def body(buffer: Buffer) -> None:
        for seed in range(5):
            case = ExpertRound(
                num_tokens=(TOKENS,),
                hidden=4096,
                num_experts=4,
                num_topk=4,
                seed=seed,
                how=how,
                num_sms=SMS,
            )
            check_expert_round(buffer, case)

    torch.use_deterministic_algorithms(True)
    try:
        run_ranks(1, body)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("cut", [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)])
def test_graph(cut: tuple[int, int]) -> None:
    """One capture of dispatch, cached dispatch and combine; replays with changed inputs."""
    num_ranks = cut[0] * cut[1]
    tokens, hidden, topk = (16, 64, 2) if SMALL else (64, 512, 4)
    replays, experts = (3, 2 * num_ranks) if SMALL else (100, 4 * num_ranks)

    def body(buffer: Buffer) -> None:
        device, rank, oracle = buffer.device, buffer.rank, Normal(buffer.topology.domains)
        config = Config(SMS)
        x = torch.empty((tokens, hidden), dtype=torch.bfloat16, device=device)
        idx = torch.empty((tokens, topk), dtype=torch.int64, device=device)
        weights = torch.empty((tokens, topk), dtype=torch.float32, device=device)

        def load(seed: int) -> Any:
            case = ExpertRound(
                num_tokens=(tokens,) * num_ranks,
                hidden=hidden,
                num_experts=experts,
                num_topk=topk,
                seed=seed,
                kind=ROUTING_KINDS[seed % len(ROUTING_KINDS)],
                worst=True,
                alignment=8,
                zero_padding=True,
            )
            made = make_experts(case, oracle)
            own = made.world[rank]
            for tensor, loaded in ((x, own.x), (idx, own.topk_idx), (weights, own.topk_weights)):
                assert loaded is not None
                tensor.copy_(loaded)
            line_up(buffer)
            return made

        def step(num_worst: int) -> Any:
            rows, row_weights, handle, _ = buffer.expert_dispatch(
                x,
                idx,
                weights,
                num_experts=experts,
                num_worst_tokens=num_worst,
                expert_alignment=8,
                zero_padding=True,
                config=config,
            )
            combined, back, _ = buffer.expert_combine(
                rows, handle, row_weights=row_weights, topk_weights=row_weights, config=config
            )
            return rows, row_weights, handle, combined, back

        num_worst = load(0).num_worst
        step(num_worst)
        settle(buffer)
        replay, outputs = capture(lambda: step(num_worst), lambda: meet(buffer))
        for seed in range(replays):
            made = load(seed)
            replay()
            settle(buffer)
            rows, row_weights, handle, _, back = outputs
            got, want = (rows, row_weights, handle), made.dispatched[rank]
            compare_experts(f"rank {rank}, replay {seed}", rank, got, want, zero_padding=True)
            selected = (made.world[rank].topk_idx >= 0) & (made.world[rank].topk_idx < experts)
            wanted = made.world[rank].topk_weights.masked_fill(~selected, 0.0)
            assert_rows_equal(back, wanted, f"rank {rank}, replay {seed}: weights")

    run_ranks(body=body, **(between(cut) if cut[0] > 1 else {"num_ranks": num_ranks}))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_more_tokens_than_there_is_room_for(num_ranks: int, variant: str) -> None:
    run_ranks(num_ranks, body_without_room)


def test_more_tokens_than_there_is_room_for_between_domains() -> None:
    run_ranks(body=body_without_room, **between((2, 2)))


def body_without_room(buffer: Buffer) -> None:
    """Their rows stay empty, all others are where they would be; the rank is told once."""
    num_ranks = buffer.group_size
    case = ExpertRound((40,) * num_ranks, num_experts=2 * num_ranks, alignment=8)
    made = make_experts(case, Normal(buffer.topology.domains))
    own, want = made.world[buffer.rank], made.dispatched[buffer.rank]
    came = want.handle.routing.num_rows
    x, idx, weights = (
        to_device(each, buffer.device)
        for each in (own.x, own.topk_idx, own.topk_weights)
        if each is not None
    )
    line_up(buffer)
    rows, _, handle, _ = buffer.expert_dispatch(
        x,
        idx,
        weights,
        num_experts=case.num_experts,
        expert_alignment=8,
        num_worst_tokens=came - 7,
        config=Config(SMS),
    )
    with pytest.raises(CommunicationError, match=rf"has room for {came - 7}"):
        settle(buffer)
    line_up(buffer)
    assert isinstance(rows, torch.Tensor)
    kept = want.handle.placement.row_of[: came - 7]
    placed = handle.placement
    assert_rows_equal(placed.row_of, kept, f"rank {buffer.rank}: row_of")
    arrived = kept[kept >= 0].long()
    assert_rows_equal(rows.cpu()[arrived], want.rows[arrived], f"rank {buffer.rank}: rows")
    assert int((placed.source.cpu() >= 0).sum()) == len(arrived)
    buffer.expert_combine(rows, handle, config=Config(SMS))
    settle(buffer)
