"""`epjit.moe` on one GPU: the kernels that order rows against the reference, a layer of a rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epjit import moe
from epjit.formats import FP8_ROW, MXFP8, RowFormat
from epjit.handles import row_bound
from epjit.modes import expert_major
from epjit.moe import scaled
from epjit.reference import expert_major as reference
from epjit.reference.low_latency import encode
from tests.harness.launch import run
from tests.harness.ranks import SMALL
from tests.scenarios import moe as scenarios

SHAPES = ((333, 8, 32, 128), (1, 1, 1, 1), (0, 4, 7, 16), (5000, 8, 3, 1), (64, 32, 256, 8))


@pytest.mark.parametrize(("tokens", "topk", "experts", "alignment"), SHAPES)
@pytest.mark.parametrize("wide", [True, False])
def test_place(tokens: int, topk: int, experts: int, alignment: int, wide: bool) -> None:
    idx = torch.randint(-2, experts + 2, (tokens, topk), dtype=torch.int64 if wide else torch.int32)
    for num_rows in (row_bound(tokens, topk, experts, alignment), tokens * topk // 3):
        wanted = reference.place(idx, experts, alignment=alignment, num_rows=num_rows)
        got = expert_major.place(idx.cuda(), experts, alignment=alignment, num_rows=num_rows)
        for name, mine, theirs in zip(wanted._fields, got, wanted, strict=True):
            assert torch.equal(mine.cpu(), theirs), name


@pytest.mark.parametrize("variant", ["tma", "ldst"])
@pytest.mark.parametrize("hidden", [64] if SMALL else [7168, 2880, 16384, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_permute_and_unpermute(
    variant: str, hidden: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPJIT_PERMUTE_VARIANT", variant)
    for tokens, topk, experts, alignment in SHAPES[: 2 if SMALL else None]:
        idx = torch.randint(-2, experts + 2, (tokens, topk))
        placed = reference.place(
            idx,
            experts,
            alignment=alignment,
            num_rows=row_bound(tokens, topk, experts, alignment),
        )
        x = torch.randn(tokens, hidden).to(dtype)
        rows = reference.permute(x, placed.source, topk)
        on_gpu = [each.cuda() for each in placed]
        got = expert_major.permute(x.cuda(), *on_gpu[:3])
        last = int(placed.ends[-1])
        assert torch.equal(got[:last].cpu(), rows[:last])
        y = torch.randn(rows.shape).to(dtype)
        wanted = reference.unpermute(y, placed.row_of)
        assert torch.equal(expert_major.unpermute(y.cuda(), on_gpu[0]).cpu(), wanted)


@pytest.mark.parametrize("hidden", [64] if SMALL else [7168, 16384, 8, 28672])
def test_blank(hidden: int) -> None:
    for num_rows, count in ((0, 0), (1, 0), (333, 333), (1000, 17)):
        rows = torch.randn(num_rows, hidden).bfloat16()
        got, arrived = rows.cuda(), torch.tensor([count], dtype=torch.int32)
        expert_major.blank(got, arrived.cuda())
        expert_major.blank(rows, arrived)
        assert torch.equal(got.cpu(), rows)


def test_place_and_permute_in_a_graph() -> None:
    idx = torch.randint(0, 8, (100, 4), device="cuda")
    x = torch.randn(100, 256, device="cuda", dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        placed = expert_major.place(idx, 8, alignment=16, num_rows=row_bound(100, 4, 8, 16))
        rows = expert_major.permute(x, *placed[:3])
        return expert_major.unpermute(rows, placed.row_of)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, (4 * x.float()).bfloat16())


@pytest.mark.parametrize("row_format", [FP8_ROW, MXFP8], ids=lambda each: each.name)
@pytest.mark.parametrize("hidden", [128] if SMALL else [128, 2880, 7168])
def test_grouped_mm_of_rows_with_scales(row_format: RowFormat, hidden: int) -> None:
    """torch's product beside that of the values; one expert has no rows, and memory goes on."""
    try:
        scaled.check_product(row_format, torch.device("cuda"))
    except RuntimeError as error:
        pytest.skip(str(error))
    ends = torch.tensor([128, 128, 384], dtype=torch.int32)
    x, scales = encode(torch.randn(400, hidden).bfloat16(), row_format)
    matrices, of_matrices = encode(torch.randn(3 * 256, hidden).bfloat16(), row_format)
    assert scales is not None
    assert of_matrices is not None
    given = x, matrices.view(3, 256, hidden), ends, scales, of_matrices.view(3, 256, -1)

    def product(x: Tensor, matrices: Tensor, ends: Tensor, scales: Tensor, more: Tensor) -> Tensor:
        with torch.no_grad():
            return moe.grouped_mm(x, matrices.mT, ends, scales=scales, weight_scales=more)[:384]

    wanted = product(*given).float()
    error = product(*[each.cuda() for each in given]).cpu().float() - wanted
    assert error.norm() < 2.0**-7 * wanted.norm()


@pytest.mark.parametrize(
    "body",
    [
        *("eager", "watched", "odd_addresses", "replayed", "checkpointed", "exported", "inferred"),
        *("cast_on_the_way", "trained_in_fp8", "trained_in_a_graph"),
    ],
)
def test_a_layer_of_one_rank(body: str) -> None:
    run(getattr(scenarios, body), 1, timeout=240)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_of_one_rank(compiled: bool) -> None:
    run(scenarios.autocasted, 1, compiled, timeout=240)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_pass_casts_of_one_rank(compiled: bool) -> None:
    run(scenarios.straight_through, 1, compiled, timeout=400)


def test_compiled_layer_of_one_rank() -> None:
    run(scenarios.compiled, 1, "inductor", timeout=400)
