"""Formats of the rows that a dispatch delivers: sizes, dtypes, formulas, `dequantize`.

A row of `H` bfloat16 (in `expert_dispatch` also float16) channels is cast by the sender. Blocks of
neighbouring channels share a scale; `amax` is the largest magnitude of a block, NaNs left out, 0
where nothing is left. Every step below is one IEEE operation in float32 (round to nearest even,
subnormals kept), so a result is defined bit for bit, whatever the row has:

- `e4m3(v)` and `e2m1(v)` round to nearest even and saturate at 448 and 6; zeros keep their sign.
  NaNs, of either sign, become what NVIDIA's GPUs make of them: the code 0x7F, which is a NaN, and
  6, for e2m1 has none. An infinity makes NaNs as well, for its block's factor is 0; not with
  `nvfp4`, whose scales saturate.
- `up(v)` is the least power of two that is not below `v`: bits `(b + 0x7fffff) & 0x7f800000`.

The formulas of `fp8`, `fp8_round` and `fp8_ue8m0` are DeepEP V1's; `mxfp8` and `nvfp4` are the
block formats of the OCP MX specification and of Blackwell's tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from epjit.runtime.empty import TensorSpec
from epjit.sizes import align

LOGFMT_BLOCK = 128  # channels that share the range of their codes: `use_logfmt` of combine
_SLOT_METADATA_BYTES = 384  # beside a row: its token, and up to 32 choices of 8 bytes


@dataclass(frozen=True, eq=False)  # there is one object of each: told apart by identity
class RowFormat:
    """How a row of `H` channels travels and arrives.

    Attributes:
        name: As users write it.
        code: Number of the format in the kernels.
        granularity: `H` must be a multiple of it.
        block: Channels that share a scale; 0 without scales, -1 for all of a row.
        bits: Of one channel.
        x_dtype: Of `recv_x`.
        scale_dtype: Of the scales; None without.
        bytes_a_scale: Bytes of one block's scale.
        column_major: Whether the scales of an expert lie channel block by channel block (memory
            `[E // R, S, R * M]`), as DeepGEMM reads them, rather than row by row.
    """

    name: str
    code: int
    granularity: int
    block: int
    bits: int
    x_dtype: torch.dtype
    scale_dtype: torch.dtype | None = None
    bytes_a_scale: int = 0
    column_major: bool = False

    def row_bytes(self, hidden: int) -> int:
        """Bytes of the channels of one row."""
        return hidden * self.bits // 8

    def num_scales(self, hidden: int) -> int:
        """Scales of one row."""
        return hidden // self.block if self.block > 0 else -self.block

    def num_scale_bytes(self, hidden: int) -> int:
        """Bytes of the scales of one row."""
        return self.num_scales(hidden) * self.bytes_a_scale

    def slot_bytes(self, hidden: int) -> int:
        """Bytes that are enough for a row, its scales and what travels with them."""
        return align(self.row_bytes(hidden) + self.num_scale_bytes(hidden) + _SLOT_METADATA_BYTES)

    def num_columns(self, hidden: int) -> int:
        """Elements of one row of `recv_x`."""
        return self.row_bytes(hidden) // self.x_dtype.itemsize

    def num_scale_columns(self, hidden: int) -> int:
        """Elements of one row of the scales, `S`."""
        if self.scale_dtype is None:
            return 0
        return self.num_scale_bytes(hidden) // self.scale_dtype.itemsize

    def specs(
        self, num_local_experts: int, num_rows: int, hidden: int
    ) -> tuple[TensorSpec, TensorSpec | None]:
        """Of `recv_x` and of its scales.

        Args:
            num_local_experts: `E // R`.
            num_rows: Rows of an expert, `R * M`.
            hidden: `H`.

        Returns:
            `x_dtype` `[E // R, R * M, num_columns]`; `scale_dtype` `[E // R, R * M, S]`, with
            `column_major` transposed in memory, or None.
        """
        slabs, columns = (num_local_experts, num_rows), self.num_columns(hidden)
        x = ((*slabs, columns), (columns * num_rows, columns, 1), self.x_dtype)
        if self.scale_dtype is None:
            return x, None
        columns = self.num_scale_columns(hidden)
        inner = (1, num_rows) if self.column_major else (columns, 1)
        return x, ((*slabs, columns), (columns * num_rows, *inner), self.scale_dtype)


BF16 = RowFormat("bf16", 0, granularity=8, block=0, bits=16, x_dtype=torch.bfloat16)
"""The rows as they are."""

FP8 = RowFormat(
    "fp8",
    1,
    granularity=128,
    block=128,
    bits=8,
    x_dtype=torch.float8_e4m3fn,
    scale_dtype=torch.float32,
    bytes_a_scale=4,
    column_major=True,
)
"""`a = max(amax, 1e-4)`; `scale = a / 448`; `q = e4m3(x * (448 / a))`; value `q * scale`."""

FP8_ROUND = replace(FP8, name="fp8_round", code=2)
"""`scale = up(max(amax, 1e-4) / 448)`; `q = e4m3(x * (1 / scale))`; value `q * scale`."""

FP8_UE8M0 = replace(
    FP8, name="fp8_ue8m0", code=3, granularity=512, scale_dtype=torch.int32, bytes_a_scale=1
)
"""As `FP8_ROUND`, the scale stored as its exponent byte; an int32 has four, the first lowest."""

MXFP8 = RowFormat(
    "mxfp8",
    4,
    granularity=32,
    block=32,
    bits=8,
    x_dtype=torch.float8_e4m3fn,
    scale_dtype=torch.float8_e8m0fnu,
    bytes_a_scale=1,
)
"""`scale = up(amax / 448)`, stored as its exponent byte; `q = e4m3(x * (1 / scale))`; value
`q * scale`. A block of zeros has byte 0 and `q = e4m3(x * 0)`."""

NVFP4 = RowFormat(
    "nvfp4",
    5,
    granularity=32,
    block=16,
    bits=4,
    x_dtype=torch.uint8,
    scale_dtype=torch.float8_e4m3fn,
    bytes_a_scale=1,
)
"""With one global scale `g > 0`: `s = e4m3(g * (amax / 6))`; `q = e2m1(x * (g / s))`, or
`e2m1(x * 0)` where `s` is 0; value `q * s / g`. A byte has two channels, the even one lowest."""

FP8_ROW = replace(FP8, name="fp8_row", code=6, granularity=16, block=-1, column_major=False)
"""As `FP8`, with one scale for the whole row, as torch's grouped products take it; a cast only."""

FORMATS = (BF16, FP8, FP8_ROUND, FP8_UE8M0, MXFP8, NVFP4)
"""All formats of the low-latency mode, by code."""

CASTS = {each.name: each for each in (*FORMATS, FP8_ROW) if each is not BF16}
"""The formats that a dispatch casts rows to on the way, by name."""

SUM_DTYPES = (torch.bfloat16, torch.float16)
"""Of rows that kernels add, or cast."""

_QUANTIZATIONS = {each.name: each for each in (MXFP8, NVFP4)}


def choose_format(
    *, use_fp8: bool, round_scale: bool, use_ue8m0: bool, quantization: str | None
) -> RowFormat:
    """The format that the flags of `low_latency_dispatch` ask for.

    Args:
        use_fp8: V1's flag. Without it the other two mean nothing, as in V1.
        round_scale: V1's flag: scales are powers of two.
        use_ue8m0: V1's flag: scales are stored as exponents.
        quantization: ``"mxfp8"``, ``"nvfp4"``, or None for what the flags say.

    Raises:
        ValueError: Flags that do not go together, or an unknown format.
    """
    if quantization is not None:
        if quantization not in _QUANTIZATIONS:
            raise ValueError(
                f"quantization is {quantization!r}, but must be None or one of "
                f"{', '.join(map(repr, _QUANTIZATIONS))}"
            )
        if (use_fp8, round_scale, use_ue8m0) != (True, False, False):
            raise ValueError(
                f"quantization={quantization!r} says the whole format, but came with {use_fp8=}, "
                f"{round_scale=}, {use_ue8m0=}; leave these at their defaults"
            )
        return _QUANTIZATIONS[quantization]
    if not use_fp8:
        return BF16
    if use_ue8m0 and not round_scale:
        raise ValueError(
            "use_ue8m0=True stores scales as exponents, so they must be powers of two; "
            "pass round_scale=True too"
        )
    return FP8_UE8M0 if use_ue8m0 else FP8_ROUND if round_scale else FP8


def dequantize(
    rows: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    global_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The values of rows that a low-latency dispatch delivered; the dtypes say in which format.

    `dequantize(*recv_x)` takes whole slabs, `dequantize(recv_x[0][e, :n], recv_x[1][e, :n])` the
    rows of one expert. Nothing waits for the device, and a CUDA graph may capture it.

    Args:
        rows: `[..., columns]`, any strides: bfloat16, float8_e4m3fn, or uint8 (two channels a
            byte).
        scales: `[..., S]`, any strides: float32, int32 (four exponents each), float8_e8m0fnu, or
            with uint8 rows float8_e4m3fn. None with bfloat16 rows.
        global_scale: float32 `[1]`, what the dispatch was given; with uint8 rows only.
        dtype: Of the result; the values are made in float32 and rounded once.

    Returns:
        `[..., H]`, the `value` of the format's formula, bit for bit.

    Raises:
        TypeError: Dtypes that belong to no format.
        ValueError: Shapes that do not belong together; `global_scale` is missing, or of no use.
    """
    pair = rows.dtype, None if scales is None else scales.dtype
    row_format = next((each for each in FORMATS if (each.x_dtype, each.scale_dtype) == pair), None)
    if row_format is None:
        known = ", ".join(f"{each.x_dtype} and {each.scale_dtype}" for each in FORMATS)
        raise TypeError(
            f"rows of {pair[0]} with scales of {pair[1]} are no format; known are {known}; pass "
            "both as low_latency_dispatch returned them"
        )
    if (row_format is NVFP4) is (global_scale is None):
        raise ValueError(
            f"global_scale is {'missing' if global_scale is None else 'given'}, but rows in "
            f"{row_format.name} have {'one' if row_format is NVFP4 else 'none'}; pass what "
            "low_latency_dispatch was given"
        )
    if scales is None:
        return rows.to(dtype)
    if row_format is FP8 and scales.shape[-1] == 1:
        row_format = FP8_ROW
    hidden = rows.shape[-1] * 8 * rows.element_size() // row_format.bits
    expected = (*rows.shape[:-1], row_format.num_scale_columns(hidden))
    if scales.shape != expected or hidden % row_format.block:
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}, but rows of shape {tuple(rows.shape)} in "
            f"{row_format.name} have scales of shape {expected}"
        )
    if row_format in (FP8_UE8M0, MXFP8):
        bits = scales.contiguous().view(torch.uint8).to(torch.int32) << 23
        factors = bits.masked_fill(bits == 0, 1 << 22).view(torch.float32)  # byte 0 is 2**-127
    else:
        factors = scales.to(torch.float32)
    values = _e2m1_values(rows) if row_format is NVFP4 else rows.to(torch.float32)
    blocks = values.unflatten(-1, (factors.shape[-1], -1)) * factors.unsqueeze(-1)
    if global_scale is not None:
        blocks = blocks / global_scale
    return blocks.flatten(-2).to(dtype)


def _e2m1_values(rows: torch.Tensor) -> torch.Tensor:
    """Two channels a byte, the lower bits first, as float32.

    A code of e2m1 with its bits at the top of those of an e4m3 is the same value over 64.
    """
    codes = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(-2)
    e4m3 = (codes & 7) << 2 | (codes & 8) << 4
    return e4m3.view(torch.float8_e4m3fn).to(torch.float32) * 64
