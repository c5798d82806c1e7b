"""The low-latency reference against brute force in plain Python, formats and casts included."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from torch import Tensor

from epjit import Buffer
from epjit.config import low_latency_size_hint
from epjit.formats import (
    BF16,
    FORMATS,
    FP8,
    FP8_ROUND,
    FP8_UE8M0,
    MXFP8,
    NVFP4,
    RowFormat,
    choose_format,
    dequantize,
)
from epjit.handles import LowLatencyDispatched, routes
from epjit.reference import low_latency as reference
from epjit.reference.low_latency import RankInput
from epjit.runtime.empty import empty_on
from tests.harness import data
from tests.rounds.low_latency import expert_outputs, rough_rows

QUANTIZED = [each for each in FORMATS if each is not BF16]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def f32(value: float) -> float:
    """Rounded to float32; infinite where it is too large."""
    if abs(value) > 3.5e38:
        return math.copysign(math.inf, value)
    return struct.unpack("f", struct.pack("f", value))[0]


def bits_of(value: float) -> int:
    return struct.unpack("I", struct.pack("f", value))[0]


def from_bits(bits: int) -> float:
    return struct.unpack("f", struct.pack("I", bits))[0]


def e4m3_value(code: int) -> float:
    """The number that an e4m3 code stands for."""
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if code & 0x80 else magnitude


E4M3 = tuple(e4m3_value(code) for code in range(0x7F))


def nearest(value: float, table: tuple[float, ...], sign_bit: int) -> int:
    """Code of the nearest entry, ties to the even code, beyond the last one the last; of NaN the
    highest code without a sign."""
    if math.isnan(value):
        return sign_bit - 1
    magnitude = min(abs(value), table[-1])
    best = min(range(len(table)), key=lambda code: (abs(table[code] - magnitude), code % 2))
    return best | (sign_bit if math.copysign(1.0, value) < 0 else 0)


# ---- casts -----------------------------------------------------------------------------


def all_bfloat16() -> Tensor:
    """Every finite bfloat16 value."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.bfloat16)
    return values[values.isfinite()]


def test_e4m3_cast_is_torchs_where_that_does_not_overflow() -> None:
    values = torch.cat(
        [all_bfloat16().float(), torch.randn(50_000) * torch.exp2(torch.randn(50_000) * 5)]
    )
    inside = values[values.abs() <= 448]
    data.assert_rows_equal(
        reference._e4m3(inside).view(torch.uint8),
        inside.to(torch.float8_e4m3fn).view(torch.uint8),
        "e4m3",
    )
    outside = values[values.abs() > 448]
    assert (reference._e4m3(outside).float() == 448 * outside.sign()).all()


def test_e4m3_cast_is_the_nearest_value() -> None:
    """Also half way between two neighbours, and just beside that."""
    halves = [(low + high) / 2 for low, high in itertools.pairwise(E4M3)]
    values = [*E4M3, *halves]
    values += [f32(half * (1 + sign * 2.0**-20)) for half in halves for sign in (1, -1)]
    values += [-value for value in values]
    got = reference._e4m3(torch.tensor(values, dtype=torch.float32)).view(torch.uint8).tolist()
    assert got == [nearest(value, E4M3, 0x80) for value in values]


def test_nan_has_one_code() -> None:
    """As NVIDIA's conversions have it, whatever the sign; a product of the CPU may have either."""
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1], dtype=torch.int32)
    values = nans.view(torch.float32)
    assert values.isnan().all()
    assert reference._e4m3(values).view(torch.uint8).tolist() == [0x7F] * 4
    assert reference._e2m1(values).tolist() == [7] * 4


def test_e2m1_cast_is_the_nearest_value() -> None:
    values = [step / 64 for step in range(-8 * 64, 8 * 64 + 1)] + [-0.0, 1e30, -1e30, 1e-40]
    values += [f32(tie * (1 + 2.0**-22)) for tie in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)]
    got = reference._e2m1(torch.tensor(values, dtype=torch.float32)).tolist()
    assert got == [nearest(value, E2M1, 8) for value in values]


def up(value: float) -> int:
    """Bits of the least power of two that is not below a float32."""
    return bits_of(value) + 0x7FFFFF & 0x7F800000


def brute_block(x: list[float], row_format: RowFormat, g: float) -> tuple[list[int], int]:
    """Codes and scale (its bits as stored) of one block, one float32 operation after the other."""
    amax = max((abs(value) for value in x if not math.isnan(value)), default=0.0)
    if row_format is NVFP4:
        s = nearest(f32(g * f32(amax / 6)), E4M3, 0)
        inverse = f32(g / E4M3[s]) if E4M3[s] else 0.0
        return [nearest(f32(value * inverse), E2M1, 8) for value in x], s
    if row_format is not MXFP8:
        amax = max(amax, f32(1e-4))
    if row_format is FP8:
        factor = f32(448 / amax)
        return [nearest(f32(value * factor), E4M3, 0x80) for value in x], bits_of(f32(amax / 448))
    bits = up(f32(amax / 448))
    inverse = f32(1 / from_bits(bits)) if bits else 0.0
    codes = [nearest(f32(value * inverse), E4M3, 0x80) for value in x]
    return codes, bits if row_format is FP8_ROUND else bits >> 23


def rows_to_cast(hidden: int) -> Tensor:
    """Rows of every kind: rough, zeros of both signs, tiny, huge, amax just at a power of two, not
    all finite."""
    rows = rough_rows(6, hidden, seed=1)
    special = torch.zeros((11, hidden), dtype=torch.bfloat16)
    special[1] = -0.0
    special[2, ::3] = 1e-5
    special[3] = torch.finfo(torch.bfloat16).smallest_normal / 64  # subnormal
    special[4, ::2] = torch.finfo(torch.bfloat16).max
    special[5] = 448 * 2.0**5
    special[6] = 450 * 2.0**-7
    special[7, ::5] = -6.0
    special[8] = torch.nan
    special[9, 3], special[9, 40] = torch.inf, -torch.inf
    special[10].view(torch.int16)[::17] = 0x7FC0 - 0x8000  # negative NaNs
    special[10, ::3] = 5.0
    return torch.cat([rows, special])


@pytest.mark.parametrize(
    ("row_format", "g"),
    [*((each, 1.0) for each in QUANTIZED), (NVFP4, 0.3), (NVFP4, 448.0)],
    ids=lambda each: getattr(each, "name", each),
)
def test_formats_are_their_formulas(row_format: RowFormat, g: float) -> None:
    hidden = 512 if row_format is FP8_UE8M0 else 2 * row_format.granularity
    x, block = rows_to_cast(hidden), row_format.block
    values, scales = reference.encode(x, row_format, torch.tensor([g], dtype=torch.float32))
    assert scales is not None
    assert (values.dtype, scales.dtype) == (row_format.x_dtype, row_format.scale_dtype)
    assert values.shape == (len(x), row_format.num_columns(hidden))
    assert scales.shape == (len(x), row_format.num_scale_columns(hidden))
    codes = values.view(torch.uint8)
    if row_format is NVFP4:
        codes = torch.stack((codes & 15, codes >> 4), dim=2).view(len(x), hidden)
    if row_format in (FP8, FP8_ROUND):
        stored = scales.view(torch.int32)
    else:
        stored = scales.view(torch.uint8)
    for token in range(len(x)):
        for index in range(hidden // block):
            channels = slice(index * block, (index + 1) * block)
            want, scale = brute_block(x[token, channels].tolist(), row_format, f32(g))
            where = f"token {token}, block {index}"
            assert int(stored[token, index]) == scale, where
            assert codes[token, channels].tolist() == want, where


@pytest.mark.parametrize("row_format", FORMATS, ids=lambda each: each.name)
def test_dequantized_is_close(row_format: RowFormat) -> None:
    """Within half a step of the format."""
    x = torch.randn((5, 512), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    g = torch.tensor([100.0])
    values, scales = reference.encode(x, row_format, g)
    if scales is not None and row_format.column_major:
        scales = scales.t().contiguous().t()
    got = dequantize(values, scales, global_scale=g if row_format is NVFP4 else None)
    error = (got - x.float()).abs() / x.float().abs().amax(dim=1, keepdim=True)
    assert got.dtype == torch.float32
    assert float(error.max()) <= {0: 0.0, 5: 0.2}.get(row_format.code, 0.04)


@pytest.mark.parametrize("row_format", QUANTIZED, ids=lambda each: each.name)
def test_dequantize_is_the_formula(row_format: RowFormat) -> None:
    """Of every code, one float32 operation after the other, in slabs with strides of a dispatch."""
    hidden, block, g = 1024, row_format.block, torch.tensor([0.3])
    rows, scales = empty_on(torch.device("cpu"))(row_format.specs(2, 3, hidden))
    assert scales is not None
    codes = torch.arange(rows.view(torch.uint8).numel()) % 256
    rows.view(torch.uint8).copy_(codes.view(rows.shape))
    stored = torch.rand(scales.shape, generator=torch.Generator().manual_seed(1))
    if scales.dtype == torch.float32:
        scales.copy_(stored)
    elif scales.dtype == torch.int32:
        scales.copy_((stored * 2**31).to(torch.int32) & 0x7E7E7E7E)
    else:  # every scale there is, but for NaN
        numbers = torch.arange(scales.numel()) % 127
        scales.view(torch.uint8).copy_(numbers.view(scales.shape))
    given = g if row_format is NVFP4 else None
    got = dequantize(rows, scales, global_scale=given)
    assert (got.shape, got.dtype) == ((2, 3, hidden), torch.float32)

    def value_of(code: int) -> float:
        table, sign = (E2M1, 8) if row_format is NVFP4 else (E4M3, 0x80)
        magnitude = code & sign - 1
        if magnitude >= len(table):
            return math.nan
        return -table[magnitude] if code & sign else table[magnitude]

    for e, m in itertools.product(range(2), range(3)):
        row = rows[e, m].view(torch.uint8).tolist()
        if row_format is NVFP4:
            row = [code for byte in row for code in (byte & 15, byte >> 4)]
        factors = scales[e, m].contiguous()
        bytes_ = factors.view(torch.uint8).tolist()
        for index, code in enumerate(row):
            if row_format is NVFP4:
                want = f32(f32(value_of(code) * E4M3[bytes_[index // block]]) / f32(0.3))
            elif scales.dtype == torch.float32:
                want = f32(value_of(code) * float(factors[index // block]))
            else:
                want = f32(value_of(code) * 2.0 ** (bytes_[index // block] - 127))
            have = float(got[e, m, index])
            same = bits_of(have) == bits_of(want) or (math.isnan(have) and math.isnan(want))
            assert same, (e, m, index, have, want)
    one = dequantize(rows[1, :2], scales[1, :2], global_scale=given, dtype=torch.bfloat16)
    data.assert_rows_equal(one, got[1, :2].to(torch.bfloat16), "rows of one expert")


def test_dequantize_says_what_does_not_belong_together() -> None:
    fp8 = torch.zeros(2, 256).to(torch.float8_e4m3fn)
    fp4 = torch.zeros(2, 128, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"float8_e4m3fn with scales of None are no format"):
        dequantize(fp8)
    with pytest.raises(ValueError, match=r"scales have shape \(2, 3\).*of shape \(2, 2\)"):
        dequantize(fp8, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"global_scale is given, but rows in fp8 have none"):
        dequantize(fp8, torch.zeros(2, 2), global_scale=torch.ones(1))
    with pytest.raises(ValueError, match=r"global_scale is missing, but rows in nvfp4 have one"):
        dequantize(fp4, torch.zeros(2, 16).to(torch.float8_e4m3fn))


def test_row_formats_say_their_sizes() -> None:
    assert [each.code for each in FORMATS] == list(range(6))
    sizes = [(each.row_bytes(1024), each.num_scale_bytes(1024)) for each in FORMATS]
    assert sizes == [(2048, 0), (1024, 32), (1024, 32), (1024, 8), (1024, 32), (512, 64)]
    for each, (row_bytes, scale_bytes) in zip(FORMATS, sizes, strict=True):
        assert each.slot_bytes(1024) % 128 == 0
        assert row_bytes + scale_bytes < each.slot_bytes(1024) < row_bytes + scale_bytes + 512


@pytest.mark.parametrize("row_format", FORMATS, ids=lambda each: each.name)
def test_allocated_strides(row_format: RowFormat) -> None:
    """DeepGEMM reads scales channel block by channel block; the block formats are row by row."""
    x, scales = empty_on(torch.device("cpu"))(row_format.specs(3, 20, 1024))
    assert x.is_contiguous()
    assert x.shape == (3, 20, row_format.num_columns(1024))
    if scales is None:
        assert row_format is BF16
        return
    columns = row_format.num_scale_columns(1024)
    assert scales.shape == (3, 20, columns)
    transposed = (20 * columns, 1, 20)
    rows = (20 * columns, columns, 1)
    assert scales.stride() == (transposed if row_format in (FP8, FP8_ROUND, FP8_UE8M0) else rows)


def test_choose_format() -> None:
    def choose(
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        quantization: str | None = None,
    ) -> RowFormat:
        return choose_format(
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            quantization=quantization,
        )

    assert choose() is FP8
    assert choose(round_scale=True) is FP8_ROUND
    assert choose(round_scale=True, use_ue8m0=True) is FP8_UE8M0
    assert choose(quantization="mxfp8") is MXFP8
    assert choose(quantization="nvfp4") is NVFP4
    for round_scale, use_ue8m0 in itertools.product((False, True), repeat=2):
        assert choose(False, round_scale, use_ue8m0) is BF16  # SGLang passes them all the same


# ---- logfmt ----------------------------------------------------------------------------


def brute_logfmt(x: list[float]) -> list[int]:
    """Bits of the values of one block after the round trip."""
    patterns = [bits_of(value) >> 16 & 0x7FFF for value in x]
    used = [pattern for pattern in patterns if pattern]
    if not used:
        return [0] * len(x)
    high = max(used)
    low = max(min(used), high - 1024)
    n = high - low
    inverse = f32(510 / n) if n > 510 else 1.0
    step = f32(f32(n * 65536.0) / 510) if n > 510 else 65536.0
    result = []
    for value, pattern in zip(x, patterns, strict=True):
        if pattern == 0 or pattern < low:
            result.append(0)
            continue
        code = 1 + math.floor(f32(f32((pattern - low) * inverse) + 0.5))
        assert 1 <= code <= 511
        bits = (low << 16) + int(f32((code - 1) * step))
        result.append(bits | (1 << 31 if math.copysign(1.0, value) < 0 else 0))
    return result


@pytest.mark.parametrize("hidden", [128, 640])
def test_logfmt_is_its_formula(hidden: int) -> None:
    rows = rows_to_cast(hidden)
    got = reference.logfmt_round_trip(rows).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    for token in range(len(rows)):
        for first in range(0, hidden, 128):
            want = brute_logfmt(rows[token, first : first + 128].tolist())
            assert got[token, first : first + 128].tolist() == want, (token, first)


def test_logfmt_keeps_what_has_codes_enough() -> None:
    """Up to 511 neighbouring patterns: four octaves."""
    rows = torch.rand((50, 256), generator=torch.Generator().manual_seed(1)) * 14 + 1
    rows = (rows * torch.randn((50, 256)).sign()).to(torch.bfloat16)
    data.assert_rows_equal(reference.logfmt_round_trip(rows), rows.float(), "logfmt")


def test_logfmt_error_is_bounded() -> None:
    """Rows of normal numbers lose less than half a step: 1 of 510 of at most eight octaves."""
    rows = torch.randn((64, 512), generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    got = reference.logfmt_round_trip(rows)
    kept = got != 0
    relative = ((got - rows.float()) / rows.float())[kept].abs()
    assert float(relative.max()) < 0.5 * 1024 / 510 * 2**-7 + 2**-9
    largest = rows.float().view(64, 4, 128).abs().amax(dim=2, keepdim=True)
    dropped = rows.float().view(64, 4, 128).abs()[~kept.view(64, 4, 128)]
    assert float(dropped.max()) < float(largest.max()) * 2**-7.9


# ---- dispatch and combine --------------------------------------------------------------


def make_inputs(
    kind: data.RoutingKind,
    *,
    num_ranks: int,
    num_tokens: tuple[int, ...],
    num_experts: int,
    num_topk: int,
    hidden: int = 16,
    dtype: torch.dtype = torch.int64,
) -> list[RankInput]:
    """One input a rank; `num_tokens[rank % len]` tokens each, in rows that name themselves."""
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
            dtype=dtype,
        )
        inputs.append(RankInput(data.payload(rank, count, hidden, torch.bfloat16), idx))
    return inputs


def dispatch_all(
    inputs: list[RankInput],
    max_tokens: int,
    num_experts: int,
    row_format: RowFormat = BF16,
    masked: Tensor | None = None,
) -> list[LowLatencyDispatched]:
    return [
        reference.dispatch(
            inputs,
            rank,
            max_tokens=max_tokens,
            num_experts=num_experts,
            row_format=row_format,
            masked=masked,
        )
        for rank in range(len(inputs))
    ]


Row = tuple[int, int, int]  # source, token, choice


def brute_slabs(inputs: list[RankInput], num_experts: int, masked: set[int]) -> list[list[Row]]:
    """The rows of each expert, in order, by looking at one choice after the other."""
    slabs: list[list[Row]] = [[] for _ in range(num_experts)]
    for source, each in enumerate(inputs):
        for token, row in enumerate(each.topk_idx.tolist()):
            for choice, expert in enumerate(row):
                if 0 <= expert < num_experts and source not in masked:
                    slabs[expert].append((source, token, choice))
    return slabs


def check_dispatched(
    inputs: list[RankInput],
    world: list[LowLatencyDispatched],
    max_tokens: int,
    num_experts: int,
    masked: set[int] = frozenset(),
) -> None:
    num_local = num_experts // len(inputs)
    for expert, rows in enumerate(brute_slabs(inputs, num_experts, masked)):
        got, local = world[expert // num_local], expert % num_local
        assert got.recv_x.shape[1] == len(inputs) * max_tokens
        assert int(got.recv_count[local]) == len(rows)
        assert got.src_info[local, : len(rows)].tolist() == [token for _, token, _ in rows]
        tokens, targets, _ = routes(got.src_info, len(inputs))
        for position, (source, token, choice) in enumerate(rows):
            assert token < tokens[source]
            assert targets[source, token, choice] == local * got.src_info.shape[1] + position
        here = targets // got.src_info.shape[1] == local
        for source in range(len(inputs)):
            # Nothing else claims a row of this expert.
            claimed = here & (targets >= 0)
            assert int(claimed[source, : int(tokens[source])].sum()) == sum(
                other == source for other, _, _ in rows
            )
        sources = [source for source, _, _ in rows]
        for source in range(len(inputs)):
            word = int(got.layout_range[local, source])
            assert word & 0xFFFFFFFF == sources.count(source)
            assert word >> 32 == sum(other < source for other in sources)
        for position, (source, token, _) in enumerate(rows):
            data.assert_rows_equal(
                got.recv_x[local, position][None],
                inputs[source].x[token][None],
                f"expert {expert}, row {position}",
            )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", data.ROUTING_KINDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_dispatch(kind: data.RoutingKind, num_ranks: int, dtype: torch.dtype) -> None:
    num_experts, max_tokens = 3 * num_ranks, 40
    inputs = make_inputs(
        kind,
        num_ranks=num_ranks,
        num_tokens=(7, 0, 12),
        num_experts=num_experts,
        num_topk=3,
        dtype=dtype,
    )
    world = dispatch_all(inputs, max_tokens, num_experts)
    check_dispatched(inputs, world, max_tokens, num_experts)


def test_dispatch_of_32_choices() -> None:
    inputs = make_inputs("random", num_ranks=2, num_tokens=(5,), num_experts=64, num_topk=32)
    check_dispatched(inputs, dispatch_all(inputs, 5, 64), 5, 64)


@pytest.mark.parametrize("row_format", QUANTIZED, ids=lambda each: each.name)
def test_dispatch_of_formats(row_format: RowFormat) -> None:
    """Rows and scales are those of `encode`, wherever they land."""
    hidden, num_experts, scale = 512, 6, torch.tensor([3.0])
    inputs = make_inputs(
        "random", num_ranks=3, num_tokens=(4, 9), num_experts=num_experts, num_topk=2, hidden=hidden
    )
    inputs = [RankInput(rough_rows(len(each.x), hidden, seed=7), each[1], scale) for each in inputs]
    world = dispatch_all(inputs, 9, num_experts, row_format)
    for expert, rows in enumerate(brute_slabs(inputs, num_experts, set())):
        got = world[expert // 2]
        for position, (source, token, _) in enumerate(rows):
            values, scales = reference.encode(inputs[source].x[token][None], row_format, scale)
            assert got.recv_scales is not None
            assert scales is not None
            for have, want in ((got.recv_x, values), (got.recv_scales, scales)):
                row = have[expert % 2, position].clone(memory_format=torch.contiguous_format)
                assert torch.equal(row.view(torch.uint8), want[0].view(torch.uint8))


def test_masked_ranks_are_left_out() -> None:
    inputs = make_inputs("random", num_ranks=4, num_tokens=(6, 8), num_experts=8, num_topk=3)
    masked = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    world = dispatch_all(inputs, 8, 8, masked=masked)
    check_dispatched(inputs, world, 8, 8, {1, 3})
    returned = [
        reference.collect(each.recv_x, each.src_info, each.layout_range.shape[1])
        for each in dispatch_all(inputs, 8, 8)
    ]
    ones = torch.ones((6, 3), dtype=torch.float32)
    combined = reference.combine(
        returned, 0, inputs[0].topk_idx, ones, num_experts=8, masked=masked
    )
    alive = (inputs[0].topk_idx // 2 % 2 == 0).sum(dim=1, keepdim=True)
    data.assert_rows_equal(combined, (inputs[0].x * alive).to(torch.bfloat16), "combined_x")


def brute_combine(
    inputs: list[RankInput],
    outputs: list[Tensor],
    owner: int,
    weights: Tensor,
    num_experts: int,
) -> Tensor:
    """The sum for each token and channel, one rounding after the other."""
    num_local = num_experts // len(inputs)
    rows: dict[tuple[int, int], list[float]] = {}
    for expert, slab in enumerate(brute_slabs(inputs, num_experts, set())):
        for position, (source, token, choice) in enumerate(slab):
            if source == owner:
                row = outputs[expert // num_local][expert % num_local, position]
                rows[token, choice] = row.tolist()
    num_tokens, num_topk = inputs[owner].topk_idx.shape
    hidden = outputs[0].shape[2]
    want = torch.zeros((num_tokens, hidden), dtype=torch.float32)
    for token in range(num_tokens):
        for channel in range(hidden):
            acc = 0.0
            for choice in range(num_topk):
                if (token, choice) in rows:
                    product = f32(float(weights[token, choice]) * rows[token, choice][channel])
                    acc = f32(acc + product)
            want[token, channel] = acc
    return want.to(torch.bfloat16)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["random", "hot_expert", "holes", "all_holes", "out_of_range"])
@pytest.mark.parametrize("use_logfmt", [False, True])
def test_combine(kind: data.RoutingKind, num_ranks: int, use_logfmt: bool) -> None:
    """NaN lies in all rows that nothing arrived for."""
    num_experts, hidden = 4 * num_ranks, 128 if use_logfmt else 24
    inputs = make_inputs(
        kind, num_ranks=num_ranks, num_tokens=(3, 0, 5), num_experts=num_experts, num_topk=4
    )
    world = dispatch_all(inputs, 5, num_experts)
    outputs = [expert_outputs(each, hidden, seed=rank) for rank, each in enumerate(world)]
    returned = [
        reference.collect(output, each.src_info, each.layout_range.shape[1])
        for output, each in zip(outputs, world, strict=True)
    ]
    for owner, each in enumerate(inputs):
        weights = data.topk_weights(len(each.x), 4, seed=owner)
        got = reference.combine(
            returned,
            owner,
            each.topk_idx,
            weights,
            num_experts=num_experts,
            use_logfmt=use_logfmt,
        )
        through = [
            reference.logfmt_round_trip(output.nan_to_num().flatten(0, 1)).view(output.shape)
            if use_logfmt
            else output
            for output in outputs
        ]
        want = brute_combine(inputs, through, owner, weights, num_experts)
        data.assert_rows_equal(got, want, f"rank {owner}: combined_x")
        assert not got.isnan().any()


def test_combine_of_repeated_choices() -> None:
    inputs = make_inputs(
        "duplicate_experts", num_ranks=2, num_tokens=(6,), num_experts=4, num_topk=4
    )
    world = dispatch_all(inputs, 24, 4)
    outputs = [expert_outputs(each, 16, seed=rank) for rank, each in enumerate(world)]
    returned = [
        reference.collect(output, each.src_info, each.layout_range.shape[1])
        for output, each in zip(outputs, world, strict=True)
    ]
    weights = data.topk_weights(6, 4, seed=0)
    got = reference.combine(returned, 1, inputs[1].topk_idx, weights, num_experts=4)
    data.assert_rows_equal(got, brute_combine(inputs, outputs, 1, weights, 4), "combined_x")


def test_combine_of_other_choices() -> None:
    inputs = make_inputs("random", num_ranks=2, num_tokens=(4,), num_experts=4, num_topk=2)
    idx = inputs[0].topk_idx.clone()
    idx[2, 1] = -1
    sent = [RankInput(inputs[0].x, idx), inputs[1]]
    returned = [
        reference.collect(each.recv_x, each.src_info, each.layout_range.shape[1])
        for each in dispatch_all(sent, 4, 4)
    ]
    weights = torch.ones((4, 2), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"token 2 \(choice 1\).*pass the topk_idx of that"):
        reference.combine(returned, 0, inputs[0].topk_idx, weights, num_experts=4)


def test_what_does_not_fit() -> None:
    inputs = make_inputs("random", num_ranks=2, num_tokens=(4,), num_experts=4, num_topk=2)
    with pytest.raises(ValueError, match="rank 0 has 4 tokens, more than max_tokens=3"):
        dispatch_all(inputs, 3, 4)
    same = [RankInput(each.x, torch.zeros((4, 2), dtype=torch.int64)) for each in inputs]
    with pytest.raises(ValueError, match="expert 0 gets 16 rows, but its slab has 8"):
        dispatch_all(same, 4, 4)


# ---- the size hint ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "v1_bytes"),
    [
        ((128, 7168, 8, 256), 1.908e9),
        ((128, 7168, 4, 288), 2.147e9),
        ((256, 7168, 8, 256), 3.817e9),
        ((128, 2048, 4, 128), 272.6e6),
    ],
)
def test_hint_is_below_v1s(sizes: tuple[int, int, int, int], v1_bytes: float) -> None:
    """A buffer whose size came from V1 is large enough."""
    hint = Buffer.get_low_latency_rdma_size_hint(*sizes)
    assert hint == low_latency_size_hint(*sizes)
    assert hint % 128 == 0
    assert hint < v1_bytes
    for index in range(4):
        more = list(sizes)
        more[index] *= 2
        assert Buffer.get_low_latency_rdma_size_hint(*more) >= hint


def test_hint_holds_every_format() -> None:
    for max_tokens, hidden, ranks in itertools.product((1, 128), (512, 7168, 16384), (1, 3, 8)):
        hint = low_latency_size_hint(max_tokens, hidden, ranks, 8 * ranks)
        slots = [ranks * max_tokens * each.slot_bytes(hidden) for each in FORMATS]
        assert max(slots) <= hint // 4
        assert max_tokens * 32 * 2 * hidden <= hint // 4
        assert 8 * ranks * max_tokens * 2 * hidden <= hint // 2
