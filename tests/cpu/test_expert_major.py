"""Rows in the order of the experts: the reference against brute force, the kernels emulated."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from epjit.formats import CASTS
from epjit.handles import Placement, row_bound
from epjit.kernels.expert_major import (
    BlankConfig,
    CastConfig,
    PermuteConfig,
    PlaceConfig,
    UnpermuteConfig,
    WeighConfig,
)
from epjit.modes import expert_major
from epjit.reference import expert_major as reference
from epjit.reference.low_latency import encode
from epjit.runtime.kernel import KernelConfig
from epjit.runtime.params import params_type
from tests.emulation import build
from tests.emulation.build import Launch, emulate, guarded
from tests.rounds.low_latency import rough_rows

needs_gxx = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")

# tokens, top-k, experts, alignment, rows (0 = always enough)
SHAPES = [
    (0, 2, 3, 4, 0),
    (1, 1, 1, 1, 0),
    (13, 3, 5, 8, 0),
    (70, 4, 3, 16, 0),
    (200, 8, 7, 1, 0),
    (60, 2, 4, 8, 40),  # too few rows: the rest is dropped
]


def selections(num_tokens: int, num_topk: int, num_experts: int, *, seed: int = 0) -> Tensor:
    """Random experts; some choices select nothing, and some experts get nothing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, num_topk)
    idx = torch.randint(-2, num_experts + 2, shape, generator=generator)
    return idx.masked_fill(idx == 1, 0)


def brute_force(
    idx: Tensor, num_experts: int, alignment: int, num_rows: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Place, one selection after the other."""
    flat = idx.flatten().tolist()
    row_of, source = [-1] * len(flat), [-1] * num_rows
    row, end, count = 0, [], []
    for expert in range(num_experts):
        mine = [i for i, chosen in enumerate(flat) if chosen == expert]
        for at, selection in enumerate(mine):
            if row + at < num_rows:
                row_of[selection], source[row + at] = row + at, selection
        row += -(-len(mine) // alignment) * alignment
        end.append(min(row, num_rows))
        count.append(len(mine))
    return row_of, source, end, count


@pytest.mark.parametrize(("tokens", "topk", "experts", "alignment", "rows"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_place_against_brute_force(
    tokens: int, topk: int, experts: int, alignment: int, rows: int, dtype: torch.dtype
) -> None:
    idx = selections(tokens, topk, experts).to(dtype)
    num_rows = rows or row_bound(tokens, topk, experts, alignment)
    placed = expert_major.place(idx, experts, alignment=alignment, num_rows=num_rows)
    wanted = brute_force(idx, experts, alignment, num_rows)
    assert tuple(each.flatten().tolist() for each in placed) == wanted
    if not rows:
        assert int((placed.row_of >= 0).sum()) == sum(wanted[3]), "the bound is always enough"


def test_permute_and_unpermute_are_each_others_transpose() -> None:
    idx = selections(37, 4, 5)
    placed = expert_major.place(idx, 5, alignment=8, num_rows=row_bound(37, 4, 5, 8))
    x = torch.randn(37, 6, dtype=torch.float64)
    y = torch.randn(placed.source.shape[0], 6, dtype=torch.float64)
    rows = expert_major.permute(x, *placed[:3])
    back = expert_major.unpermute(y, placed.row_of)
    assert torch.allclose((rows * y).sum(), (x * back).sum())
    assert torch.equal(rows[placed.source < 0], torch.zeros_like(rows[placed.source < 0]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"alignment": 0}, "alignment is 0"),
        ({"num_rows": -1}, "num_rows -1"),
        ({"alignment": 1 << 30}, "the kernels count to"),
        ({"topk_idx": torch.zeros(4, 40, dtype=torch.int64)}, "top-k is 40"),
        ({"topk_idx": torch.zeros(4, dtype=torch.int64)}, "topk_idx has shape"),
    ],
)
def test_place_refuses(change: dict[str, Any], said: str) -> None:
    given = {
        "topk_idx": torch.zeros(4, 2, dtype=torch.int64),
        "num_experts": 3,
        "alignment": 8,
        "num_rows": 64,
    }
    with pytest.raises(ValueError, match=said):
        expert_major.place(**{**given, **change})


# ---- the kernels --------------------------------------------------------------------------------


def run(config: KernelConfig, grid: int, seed: int, **values: Any) -> None:
    """One launch; tensors become addresses."""
    params = params_type(config.source, type(config).__name__.replace("Config", "Params"))()
    assert {name for name, *_ in params._fields_} == set(values)
    for name, value in values.items():
        setattr(params, name, value.data_ptr() if isinstance(value, Tensor) else value)
    emulate([Launch(config, params, grid=grid)], seed=seed)


def copied(tensor: Tensor) -> Tensor:
    """The same where an access beyond the end is seen."""
    memory = guarded(*tensor.shape, dtype=tensor.dtype)
    return memory.copy_(tensor) if tensor.numel() else memory


@needs_gxx
@pytest.mark.parametrize(("tokens", "topk", "experts", "alignment", "rows"), SHAPES)
@pytest.mark.parametrize("wide", [True, False])
def test_place_kernel(
    tokens: int, topk: int, experts: int, alignment: int, rows: int, wide: bool
) -> None:
    idx = selections(tokens, topk, experts, seed=3).to(torch.int64 if wide else torch.int32)
    num_rows = rows or row_bound(tokens, topk, experts, alignment)
    wanted = reference.place(idx, experts, alignment=alignment, num_rows=num_rows)
    got = run_place(idx, wanted, alignment, known=None)
    for name, mine, theirs in zip(wanted._fields, got, wanted, strict=True):
        assert torch.equal(mine, theirs), name


def run_place(idx: Tensor, wanted: Placement, alignment: int, known: Tensor | None) -> Placement:
    """The kernel's placement, of the sizes of another."""
    got = Placement(*[guarded(*each.shape, dtype=torch.int32) for each in wanted])
    experts = len(wanted.counts)
    run(
        PlaceConfig(idx.dtype == torch.int64),
        experts,
        idx.numel(),
        topk_idx=copied(idx),
        known=0 if known is None else copied(known),
        row_of=got.row_of,
        source=got.source,
        end=got.ends,
        count=got.counts if known is None else 0,
        num_selections=idx.numel(),
        num_experts=experts,
        num_rows=len(wanted.source),
        alignment=alignment,
    )
    return got


@needs_gxx
@pytest.mark.parametrize(("room", "num_rows"), [(40, 500), (7, 500), (0, 500), (40, 60)])
def test_place_kernel_where_tokens_have_no_room(room: int, num_rows: int) -> None:
    """The rows of the others are where they would be with room for all."""
    idx = selections(60, 3, 5, seed=7)
    whole = reference.place(idx, 5, alignment=8, num_rows=num_rows)
    got = run_place(idx[:room], whole._replace(row_of=whole.row_of[:room]), 8, whole.counts)
    assert torch.equal(got.row_of, whole.row_of[:room])
    assert torch.equal(got.source, whole.source.masked_fill(whole.source >= 3 * room, -1))
    assert torch.equal(got.ends, whole.ends)


@needs_gxx
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize(("tokens", "topk", "experts", "alignment", "rows"), SHAPES)
@pytest.mark.parametrize(("row_bytes", "what"), [(16, "alone"), (1040, "rows"), (64, "columns")])
def test_permute_kernel(
    tma: bool,
    tokens: int,
    topk: int,
    experts: int,
    alignment: int,
    rows: int,
    row_bytes: int,
    what: str,
) -> None:
    """Rows alone, and with weights and scales, without zeros and with them."""
    num_rows, num_scales = rows or row_bound(tokens, topk, experts, alignment), 3
    placed = reference.place(
        selections(tokens, topk, experts, seed=4), experts, alignment=alignment, num_rows=num_rows
    )
    has_more, zeros = what != "alone", what != "columns"
    x = copied(torch.randint(1, 256, (tokens, row_bytes), dtype=torch.uint8))
    scales = copied(torch.randint(1, 1 << 30, (tokens, num_scales + 1), dtype=torch.int32))
    weights = copied(torch.rand(tokens, topk + 2))
    # Whose rows lie apart, as in the metadata of DeepEP 2's handles.
    row_of = guarded(tokens, topk + 2, dtype=torch.int32)[:, 2:].copy_(placed.row_of)
    got = guarded(num_rows, row_bytes, dtype=torch.uint8)
    got_scales = guarded(num_rows, num_scales, dtype=torch.int32)
    if what == "columns":
        memory = guarded(num_scales, -(-num_rows // 4) * 4, dtype=torch.int32)
        got_scales = memory[:, :num_rows].t()
    got_weights = guarded(num_rows, dtype=torch.float32)
    untouched = got.clone(), got_scales.clone()
    run(
        PermuteConfig(row_bytes, topk, tma, num_warps=3, rows_per_warp=2),
        2,
        tokens + 1,
        x=x,
        scales=scales,
        weights=weights,
        row_of=row_of,
        source=copied(placed.source),
        end=copied(placed.ends)[-1:],
        rows=got,
        row_scales=got_scales,
        row_weights=got_weights if has_more else 0,
        scale_token_stride=num_scales + 1,
        weight_stride=topk + 2,
        row_of_stride=topk + 2,
        scale_row_stride=got_scales.stride(0),
        scale_stride=got_scales.stride(1),
        num_tokens=tokens,
        num_rows=num_rows,
        num_scales=num_scales if has_more else 0,
        zero_padding=zeros,
    )
    is_written = placed.source >= 0
    if zeros:
        is_written[: int(placed.ends[-1])] = True
    for mine, given, before in zip((got, got_scales), (x, scales), untouched, strict=True):
        wanted = reference.permute(given[:, : mine.shape[1]], placed.source, topk)
        wanted = torch.where(is_written[:, None], wanted, before)
        assert torch.equal(mine, before if given is scales and not has_more else wanted)
    if has_more:
        assert torch.equal(got_weights, reference._taken(weights[:, :topk], placed.source))


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "topk", "experts", "alignment", "rows"), SHAPES)
@pytest.mark.parametrize("hidden", [8, 1032])
@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_kernel(
    dtype: torch.dtype,
    tokens: int,
    topk: int,
    experts: int,
    alignment: int,
    rows: int,
    hidden: int,
    weighted: bool,
) -> None:
    num_rows = rows or row_bound(tokens, topk, experts, alignment)
    placed = reference.place(
        selections(tokens, topk, experts, seed=5), experts, alignment=alignment, num_rows=num_rows
    )
    if weighted:  # rows that the tensor does not have are none
        num_rows = num_rows * 2 // 3
    unused = placed.source[:num_rows] < 0
    values = torch.randn(num_rows, hidden).to(dtype).masked_fill(unused[:, None], torch.nan)
    factors, back = (torch.rand(num_rows).masked_fill(unused, torch.nan) for _ in range(2))
    row_of = guarded(tokens, topk + 2, dtype=torch.int32)[:, 2:].copy_(placed.row_of)
    got = guarded(tokens, hidden, dtype=dtype)
    got_weights = guarded(tokens, topk, dtype=torch.float32)
    run(
        UnpermuteConfig(2 * hidden, topk, dtype == torch.float16, weighted),
        2,
        tokens + 2,
        rows=copied(values),
        row_weights=copied(factors) if weighted else 0,
        topk_weights=copied(back) if weighted else 0,
        row_of=row_of,
        row_of_stride=topk + 2,
        out=got,
        weights=got_weights if weighted else 0,
        num_tokens=tokens,
        num_rows=num_rows,
    )
    wanted = reference.unpermute(values, placed.row_of, factors if weighted else None)
    assert torch.equal(got, wanted)
    if weighted:
        assert torch.equal(got_weights, reference._taken(back, placed.row_of))


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 512), (21, 512), (5, 2560)])
def test_cast_kernel(dtype: torch.dtype, name: str, tokens: int, hidden: int) -> None:
    row_format = CASTS[name]
    x = rough_rows(tokens, hidden, seed=tokens).to(dtype)
    scale = torch.tensor([0.05]) if name == "nvfp4" else None
    wanted = encode(x, row_format, scale)
    got = [guarded(*each.shape, dtype=each.dtype) for each in wanted if each is not None]
    run(
        CastConfig(hidden, row_format.code, dtype == torch.float16),
        2,
        tokens,
        x=copied(x),
        global_scale=0 if scale is None else copied(scale),
        rows=got[0],
        scales=got[1],
        num_tokens=tokens,
    )
    for mine, theirs in zip(got, wanted, strict=True):
        assert theirs is not None
        assert torch.equal(mine.view(torch.uint8), theirs.contiguous().view(torch.uint8))


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "hidden"), [(0, 8), (1, 8), (37, 264), (19, 2048)])
def test_weigh_kernel(dtype: torch.dtype, num_rows: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    grad, rows = (torch.randn(num_rows, hidden, generator=generator).to(dtype) for _ in range(2))
    weights = torch.rand(num_rows, generator=generator)
    source = torch.arange(num_rows, dtype=torch.int32)
    unused = torch.rand(num_rows, generator=generator) < 0.3
    source, grad = source.masked_fill(unused, -1), grad.masked_fill(unused[:, None], 0)
    rows = rows.masked_fill(unused[:, None], torch.nan)
    wanted = expert_major.weigh(grad, rows, weights, source)
    got, got_weights = copied(grad), guarded(num_rows, dtype=torch.float32)
    run(
        WeighConfig(hidden * 2, dtype == torch.float16),
        2,
        num_rows,
        grad=got,
        rows=copied(rows),
        row_weights=copied(weights),
        source=copied(source),
        grad_weights=got_weights,
        num_rows=num_rows,
    )
    assert torch.equal(got, wanted[0])
    assert torch.equal(got_weights, wanted[1])


@needs_gxx
@pytest.mark.parametrize("row_bytes", [16, 8208, 57344])
@pytest.mark.parametrize(
    ("num_rows", "count"), [(0, 0), (1, 0), (7, 7), (9, 4), (40, 0), (5, 9), (5, -3)]
)
def test_blank_kernel(row_bytes: int, num_rows: int, count: int) -> None:
    rows = copied(torch.randint(1, 256, (num_rows, row_bytes), dtype=torch.uint8))
    wanted = rows.clone()
    arrived = torch.tensor([count], dtype=torch.int32)
    expert_major.blank(wanted, arrived)
    arrive = max(count, 0)
    assert torch.equal(wanted[:arrive], rows[:arrive])
    assert int(wanted[arrive:].sum()) == 0
    sizes = {"num_rows": num_rows, "row_bytes": row_bytes}
    run(BlankConfig(), 2, num_rows, rows=rows, count=copied(arrived), **sizes)
    assert torch.equal(rows, wanted)
