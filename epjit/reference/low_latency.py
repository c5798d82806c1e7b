"""Low-latency dispatch and combine, as index arithmetic over all ranks at once.

As in `epjit.reference.intranode`, every function takes what the ranks of the whole group have and
returns what one rank gets, bit for bit. The casts of the formats are written down in
`epjit.formats`.

Words: `R` ranks, `E` experts (expert `e` lives on rank `e // (E // R)`), `M` tokens that a rank
may send at most, `T <= M` tokens of this rank, `K` choices a token, `H` channels a row. Every
choice of a token is a row of its own. An expert's rows lie packed at the front of its slab of
`R * M` rows, by source rank, then by token, then by choice. All tensors are CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epjit.calls import DispatchSizes
from epjit.formats import BF16, FP8, FP8_ROUND, FP8_ROW, LOGFMT_BLOCK, MXFP8, NVFP4, RowFormat
from epjit.handles import LowLatencyDispatched, routes
from epjit.reference.intranode import experts_per_rank
from epjit.runtime.empty import empty_on

_FP8_MAX = 448.0
_FP4_MAX = 6.0
_MIN_AMAX = 1e-4
# Where the next magnitude of e2m1 begins; a tie goes to the neighbour with an even code.
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LOGFMT_STEPS = 510  # between the least and the greatest code of a magnitude, 1 and 511
_LOGFMT_RANGE = 1024  # bfloat16 patterns below the greatest that still have a code


class RankInput(NamedTuple):
    """Inputs of one rank to `dispatch`.

    Attributes:
        x: bfloat16 `[T, H]`.
        topk_idx: int32 or int64 `[T, K]`; a value outside `[0, E)` selects nothing. An expert that
            a token chose twice gets two rows.
        global_scale: float32 `[1]`, for `NVFP4` only.
        topk_weights: float32 `[T, K]`, or None; of all ranks or of none.
    """

    x: Tensor
    topk_idx: Tensor
    global_scale: Tensor | None = None
    topk_weights: Tensor | None = None


class Returned(NamedTuple):
    """The rows that one rank gives to `combine`: those which `layout_range` names, no others.

    Attributes:
        rows: bfloat16 `[n, H]`.
        source: int64 `[n]`: rank that each goes back to.
        token: int64 `[n]`: its token there.
        choice: int64 `[n]`: which of the token's choices it answers.
    """

    rows: Tensor
    source: Tensor
    token: Tensor
    choice: Tensor


def dispatch(
    inputs: Sequence[RankInput],
    rank: int,
    *,
    max_tokens: int,
    num_experts: int,
    row_format: RowFormat,
    masked: Tensor | None = None,
    out: LowLatencyDispatched | None = None,
) -> LowLatencyDispatched:
    """Results of `rank`.

    Args:
        inputs: One entry a rank.
        rank: The receiver.
        max_tokens: `M`.
        num_experts: `E`.
        row_format: How rows arrive.
        masked: `[R]`, not 0 where nothing is taken from a rank; None for nowhere.
        out: From `LowLatencyDispatched.allocate`, to be written to; None makes new tensors.

    Returns:
        See `LowLatencyDispatched`.

    Raises:
        ValueError: `num_experts` does not fit the ranks; a rank has more than `M` tokens; an
            expert gets more rows than its slab has, which takes duplicate choices.
    """
    num_ranks, hidden = len(inputs), inputs[rank].x.shape[1]
    num_local_experts, num_rows = experts_per_rank(num_experts, num_ranks), num_ranks * max_tokens
    if out is None:
        own, wide = inputs[rank].topk_idx.shape, inputs[rank].topk_idx.dtype == torch.int64
        sent = inputs[rank].topk_weights is not None
        numbers = (max_tokens, num_experts, row_format, sent)
        sizes = DispatchSizes(own[0], hidden, own[1], wide, *numbers)
        specs = LowLatencyDispatched.specs(sizes, num_ranks)
        out = LowLatencyDispatched.allocate(specs, empty_on(torch.device("cpu")))
    experts, sources, tokens, choices = _rows_for(
        inputs, rank, num_local_experts, max_tokens, masked
    )
    counts = torch.bincount(experts * num_ranks + sources, minlength=num_local_experts * num_ranks)
    counts = counts.view(num_local_experts, num_ranks)
    totals = counts.sum(dim=1)
    if int(totals.max()) > num_rows:
        expert = int(totals.argmax())
        raise ValueError(
            f"expert {rank * num_local_experts + expert} gets {int(totals[expert])} rows, but its "
            f"slab has {num_rows} ({num_ranks} ranks x {max_tokens} tokens): tokens chose it "
            "several times; pass a larger num_max_dispatch_tokens_per_rank"
        )
    out.recv_count.copy_(totals)
    out.layout_range.copy_((counts.cumsum(dim=1) - counts) << 32 | counts)

    first_rows = totals.cumsum(dim=0) - totals
    positions = torch.arange(len(experts), dtype=torch.int64, device="cpu") - first_rows[experts]
    out.src_info[experts, positions] = tokens.to(torch.int32)
    num_tokens = [each.x.shape[0] for each in inputs]
    source_tokens, source_rows, source_weights = routes(out.src_info, num_ranks)
    for source, tokens_sent in enumerate(num_tokens):
        count = 0 if masked is not None and bool(masked[source]) else tokens_sent
        source_tokens[source] = count
        source_rows[source, :count] = -1
    source_rows[sources, tokens, choices] = (experts * num_rows + positions).to(torch.int32)
    source_weights[sources, tokens, choices] = 0.0
    for source, each in enumerate(inputs):
        if each.topk_weights is not None:
            mine = sources == source
            at = tokens[mine], choices[mine]
            source_weights[source][at] = each.topk_weights[at]

    encoded = [encode(each.x, row_format, each.global_scale) for each in inputs]
    ends = torch.tensor(num_tokens, dtype=torch.int64, device="cpu").cumsum(dim=0)
    rows = tokens + ends[sources] - ends.new_tensor(num_tokens)[sources]
    # As bytes, since not every dtype has an indexing kernel.
    values = torch.cat([_bytes(value) for value, _ in encoded])
    _bytes(out.recv_x)[experts, positions] = values[rows]
    if out.recv_scales is not None:
        scales = torch.cat([_indexable(_given(scale)) for _, scale in encoded])
        _indexable(out.recv_scales)[experts, positions] = scales[rows]
    return out


def collect(x: Tensor, src_info: Tensor, num_ranks: int) -> Returned:
    """Rows that a rank gives to `combine`, with the selections that they are of.

    Args:
        x: bfloat16 `[E // R, R * M, H]`; only received rows are read.
        src_info: From the dispatch.
        num_ranks: `R`.
    """
    source_tokens, source_rows, _ = routes(src_info, num_ranks)
    tokens = torch.arange(source_rows.shape[1], dtype=torch.int32, device="cpu")
    is_token = tokens[None, :] < source_tokens[:, None]
    sources, token, choices = torch.nonzero(
        is_token[:, :, None] & (source_rows >= 0), as_tuple=True
    )
    rows = source_rows[sources, token, choices].to(torch.int64)
    return Returned(x.flatten(0, 1)[rows], sources, token, choices)


def combine(
    returned: Sequence[Returned],
    rank: int,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    use_logfmt: bool = False,
    reduced: bool = False,
    masked: Tensor | None = None,
) -> Tensor:
    """Sums for the tokens of `rank`: of each, weighted over its choices.

    The sum is float32, from +0.0, choices in ascending order; the product is rounded, then the
    sum (no fused multiply-add); the result is rounded once, to nearest even. A choice outside
    `[0, E)` or of an expert of a masked rank adds nothing.

    Args:
        returned: Of each rank, all of one dispatch.
        rank: The owner of the tokens.
        topk_idx: The owner's `[T, K]`, as dispatched.
        topk_weights: The owner's float32 `[T, K]`.
        num_experts: `E`.
        use_logfmt: Whether rows go through `logfmt_round_trip` first.
        reduced: Whether the choices of each rank are summed first, each of these sums is rounded
            to bfloat16, and they are added in float32 from +0.0, ranks in ascending order.
        masked: `[R]`, not 0 where nothing is taken from a rank, and where a rank may miss rows;
            None for nowhere.

    Returns:
        bfloat16 `[T, H]`.

    Raises:
        ValueError: A choice has no row: `topk_idx` is not that of the dispatch.
    """
    num_local_experts = experts_per_rank(num_experts, len(returned))
    idx = topk_idx.to(torch.int64)
    selected = (idx >= 0) & (idx < num_experts)
    row_of = torch.full(idx.shape, -1, dtype=torch.int64, device="cpu")
    rows = torch.cat([each.rows[each.source == rank] for each in returned])
    first = 0
    for each in returned:
        mine = torch.nonzero(each.source == rank).flatten()
        row_of[each.token[mine], each.choice[mine]] = first + torch.arange(
            len(mine), dtype=torch.int64, device="cpu"
        )
        first += len(mine)
    if masked is None:
        if bool((selected & (row_of < 0)).any()):
            token, choice = torch.nonzero(selected & (row_of < 0))[0].tolist()
            raise ValueError(
                f"rank {rank} chose expert {int(idx[token, choice])} for token {token} (choice "
                f"{choice}), but the handle's dispatch sent no such row; pass the topk_idx of that "
                "dispatch"
            )
    else:
        owners = (idx // num_local_experts).masked_fill(~selected, 0)
        selected &= (masked[owners] == 0) & (row_of >= 0)
    values = logfmt_round_trip(rows) if use_logfmt else rows.to(torch.float32)
    shape = (idx.shape[0], rows.shape[1])
    owners = (idx // num_local_experts).masked_fill(~selected, -1)

    def sum_of(taken: Tensor) -> Tensor:
        acc = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for choice in range(idx.shape[1]):
            token = torch.nonzero(taken[:, choice]).flatten()
            product = topk_weights[token, choice][:, None] * values[row_of[token, choice]]
            acc[token] = acc[token] + product
        return acc.to(torch.bfloat16)

    if not reduced:
        return sum_of(selected)
    acc = torch.zeros(shape, dtype=torch.float32, device="cpu")
    for source in range(len(returned)):
        token = torch.nonzero((owners == source).any(dim=1)).flatten()
        acc[token] = acc[token] + sum_of(owners == source)[token].to(torch.float32)
    return acc.to(torch.bfloat16)


def encode(
    x: Tensor, row_format: RowFormat, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Casts rows; the formulas are those of `epjit.formats`.

    Args:
        x: bfloat16 `[T, H]`.
        row_format: Format of the result.
        global_scale: float32 `[1]`, for `NVFP4` only.

    Returns:
        `x_dtype` `[T, columns]` and `scale_dtype` `[T, S]` (row-major) or None.
    """
    if row_format is BF16:
        return x, None
    num_scales = row_format.num_scales(x.shape[1])
    blocks = x.to(torch.float32).unflatten(1, (num_scales, -1))
    amax = blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=2, keepdim=True)
    if row_format is NVFP4:
        scale_of_all = _given(global_scale)
        scales = _e4m3(scale_of_all * _divide(amax, _FP4_MAX))
        known = scales.to(torch.float32)
        inverse = _divide(scale_of_all, known).masked_fill(known == 0, 0.0)
        codes = _e2m1(blocks * inverse).view(x.shape)
        return codes[:, 0::2] | codes[:, 1::2] << 4, scales.squeeze(2)
    if row_format is not MXFP8:
        amax = amax.clamp(min=_MIN_AMAX)
    if row_format in (FP8, FP8_ROW):
        values = _e4m3(blocks * _divide(_FP8_MAX, amax))
        return values.view(x.shape), _divide(amax, _FP8_MAX).squeeze(2)
    bits = (_divide(amax, _FP8_MAX).view(torch.int32) + 0x7FFFFF) & 0x7F800000
    scale = bits.view(torch.float32)
    inverse = _divide(1.0, scale).masked_fill(bits == 0, 0.0)
    values = _e4m3(blocks * inverse).view(x.shape)
    if row_format is FP8_ROUND:
        return values, scale.squeeze(2)
    exponents = (bits.squeeze(2) >> 23).to(torch.uint8)
    assert row_format.scale_dtype is not None
    return values, exponents.view(row_format.scale_dtype)


def logfmt_round_trip(rows: Tensor) -> Tensor:
    """Rows after 10-bit logarithmic transport: what `combine(use_logfmt=True)` adds up.

    In each block of 128 channels, magnitudes are taken as the 15-bit patterns `p` of bfloat16,
    which grow nearly as their logarithm. `hi` is the greatest, `lo` the least that is not 0 but at
    most 1024 below `hi`. The patterns from `lo` to `hi` have the codes 1 to at most 511, all of
    them while there are no more than 511; 0 stands for +0.0, also for what lies below `lo`.

    Args:
        rows: bfloat16 `[n, H]`, `H` a multiple of 128.

    Returns:
        float32 `[n, H]`; each operation is one in float32, rounded.
    """
    blocks = (rows.shape[1] // LOGFMT_BLOCK, LOGFMT_BLOCK)
    signed = rows.contiguous().view(torch.int16).unflatten(1, blocks)
    patterns = signed.to(torch.int32) & 0x7FFF
    highest = patterns.amax(dim=2, keepdim=True)
    lowest = patterns.masked_fill(patterns == 0, 0x7FFF).amin(dim=2, keepdim=True)
    lowest = torch.minimum(torch.maximum(lowest, highest - _LOGFMT_RANGE), highest)
    width = highest - lowest
    is_wide, span = width > _LOGFMT_STEPS, width.to(torch.float32)
    per_pattern = _divide(_LOGFMT_STEPS, span).masked_fill(~is_wide, 1.0)
    per_code = _divide(span * 65536.0, _LOGFMT_STEPS).masked_fill(~is_wide, 65536.0)
    # Codes less one; those below `lowest` are not used.
    steps = ((patterns - lowest).to(torch.float32) * per_pattern + 0.5).floor()
    bits = (lowest << 16) + (steps * per_code).to(torch.int32)
    bits = bits.masked_fill((patterns < lowest) | (patterns == 0), 0)
    values = bits.view(torch.float32)
    return torch.where((signed < 0) & (bits != 0), -values, values).view(rows.shape)


def _rows_for(
    inputs: Sequence[RankInput],
    rank: int,
    num_local_experts: int,
    max_tokens: int,
    masked: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Local expert, source rank, token and choice of each row that `rank` gets, in order."""
    parts = []
    for source, each in enumerate(inputs):
        if each.x.shape[0] > max_tokens:
            raise ValueError(
                f"rank {source} has {each.x.shape[0]} tokens, more than max_tokens={max_tokens}"
            )
        idx = each.topk_idx.to(torch.int64) - rank * num_local_experts
        is_mine = (idx >= 0) & (idx < num_local_experts)
        if masked is not None and int(masked[source]):
            is_mine = torch.zeros_like(is_mine)
        token, choice = torch.nonzero(is_mine, as_tuple=True)
        parts.append((idx[token, choice], torch.full_like(token, source), token, choice))
    experts, sources, tokens, choices = (torch.cat(each) for each in zip(*parts, strict=True))
    order = experts.argsort(stable=True)
    return experts[order], sources[order], tokens[order], choices[order]


def _divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """IEEE division of float32 tensors: with a scalar, torch may multiply by the reciprocal."""
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    a, b = (
        each if isinstance(each, Tensor) else torch.full_like(like, float(each)) for each in (a, b)
    )
    return torch.div(a, b)


def _e4m3(values: Tensor) -> Tensor:
    """Rounds to nearest even, as torch does; saturates and has one NaN, as torch does not."""
    bounded = values.clamp(-_FP8_MAX, _FP8_MAX).masked_fill(values.isnan(), torch.nan)
    return bounded.to(torch.float8_e4m3fn)


def _e2m1(values: Tensor) -> Tensor:
    """Codes 0 to 15 of the nearest e2m1 values, ties to even codes; the sign is the highest bit.

    NaN becomes the largest value, 6.
    """
    values = values.nan_to_num(nan=_E2M1_VALUES[-1])
    magnitudes = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8, device="cpu")
    for code in range(1, len(_E2M1_VALUES)):
        border = (_E2M1_VALUES[code - 1] + _E2M1_VALUES[code]) / 2
        codes += magnitudes > border if code % 2 else magnitudes >= border
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def _bytes(rows: Tensor) -> Tensor:
    """A contiguous tensor with its last dimension as bytes."""
    return rows.view(torch.uint8)


def _indexable(scales: Tensor) -> Tensor:
    """Scales as a dtype that has indexing kernels, whatever their strides."""
    return scales.view(torch.uint8) if scales.element_size() == 1 else scales


def _given(tensor: Tensor | None) -> Tensor:
    """A tensor that the format has."""
    assert tensor is not None
    return tensor
