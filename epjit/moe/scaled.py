"""The grouped product of rows with scales: what torch has, on which GPUs, and its layouts.

torch.nn.functional.scaled_grouped_mm (from 2.10 on) multiplies float8_e4m3fn with a scale a row
(sm_90, sm_100) and MXFP8 (sm_100), and nothing with a scale a 128 channels. It has no gradient: the
operator around it gives those of the product of the values (`operators.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epjit.checks.match import check
from epjit.formats import FP8_ROW, MXFP8, RowFormat, dequantize

F: Any = torch.nn.functional  # whose stub has not all of it
_MAJORS = {FP8_ROW: (9, 10), MXFP8: (10,)}  # compute capabilities, by format
_TILE = 128  # rows of MXFP8 whose scales lie together: each expert's begin at a multiple of it
_AS_BF16 = (
    "epjit.formats.dequantize(x, scales, dtype=torch.bfloat16) makes rows for the product of "
    "bfloat16, which every GPU has"
)


def _check(x: Tensor, weights: Tensor, scales: Tensor, of_weights: Tensor) -> RowFormat:
    """Checks rows and matrices with scales, of shapes alone; returns their format."""
    check("x", x, ("num_rows", "hidden"), torch.float8_e4m3fn, contiguous=False)
    num_rows, hidden = x.shape
    shape = ("num_experts", hidden, "columns")
    check("weights", weights, shape, torch.float8_e4m3fn, x.device, contiguous=False)
    num_experts, _, columns = weights.shape
    row_format = _format_of(scales, hidden)
    of_row = row_format.num_scale_columns(hidden)
    dtype, why = row_format.scale_dtype, f"scales in {row_format.name}"
    for name, each, rows in (
        ("scales", scales, (num_rows,)),
        ("weight_scales", of_weights, (num_experts, columns)),
    ):
        check(name, each, (*rows, of_row), dtype, x.device, why=why)
    if hidden % 16 or columns % 16:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, but torch's product of FP8 takes "
            "multiples of 16"
        )
    if weights.stride(1) != 1:
        raise ValueError(
            f"weights have strides {weights.stride()}, but torch's product of FP8 takes matrices "
            "that lie transposed; make them once as [num_experts, columns, hidden] and pass "
            ".transpose(1, 2)"
        )
    return row_format


def check_values(values: Tensor | None, cast: Tensor, name: str) -> None:
    """Checks what takes the gradient of rows or matrices that were cast.

    Raises:
        TypeError, ValueError: It has another shape or device, or takes no gradient.
    """
    if values is not None:
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        shape = tuple(cast.shape)
        why = "for the gradient of what was cast"
        check(name, values, shape, dtypes, cast.device, contiguous=False, why=why)


def _format_of(scales: Tensor, hidden: int) -> RowFormat:
    """The format of rows that torch has a product for."""
    if scales.dtype is MXFP8.scale_dtype:
        return MXFP8
    if scales.dtype is FP8_ROW.scale_dtype and scales.dim() == 2 and scales.shape[1] == 1:
        return FP8_ROW
    raise ValueError(
        f"scales are {scales.dtype} of shape {tuple(scales.shape)} for rows of {hidden} channels, "
        "but torch has a grouped product only of cast='fp8_row' (sm_90, sm_100) and 'mxfp8' "
        f"(sm_100). {_AS_BF16}; DeepGEMM's grouped products take a scale a 128 channels"
    )


def check_product(row_format: RowFormat, device: torch.device) -> None:
    """Checks that torch has a grouped product of a format on a GPU.

    Raises:
        RuntimeError: It has none.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _MAJORS[row_format] or not hasattr(F, "scaled_grouped_mm"):
        where = " and ".join(f"sm_{each}0" for each in _MAJORS[row_format])
        raise RuntimeError(
            f"torch has a grouped product of {row_format.name} from 2.10 on, on {where}, but this "
            f"is torch {torch.__version__} on sm_{major}{minor}. {_AS_BF16}"
        )


def product(x: Tensor, weights: Tensor, ends: Tensor, scales: Tensor, of_weights: Tensor) -> Tensor:
    """Each expert's rows times its matrix; on the CPU of their values, in float32, rounded once.

    Args:
        x: float8_e4m3fn `[M, H]`, contiguous.
        weights: float8_e4m3fn `[L, H, F]`, transposed in memory.
        ends: int32 `[L]`.
        scales: `[M, S]`.
        of_weights: `[L, F, S]`.

    Returns:
        bfloat16 `[M, F]`, undefined behind `ends[-1]`.

    Raises:
        TypeError, ValueError: Arguments that do not fit, or that no torch has a product of.
        RuntimeError: This GPU, or this torch, has none.
    """
    row_format = _check(x, weights, scales, of_weights)
    if not x.is_cuda:
        if row_format is MXFP8 and bool((ends % _TILE).any()):
            raise ValueError(
                f"ends are {ends.tolist()}, but a product of MXFP8 takes multiples of {_TILE}; "
                f"dispatch with expert_alignment={_TILE}"
            )
        rows, matrices = dequantize(x, scales), dequantize(weights.transpose(1, 2), of_weights)
        experts = torch.arange(len(ends)).repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
        out = x.new_zeros((x.shape[0], weights.shape[2]), dtype=torch.bfloat16)
        with torch.autocast("cpu", enabled=False):  # rows and matrices are cast already
            for expert in experts.unique():
                mine = (experts == expert).nonzero().flatten()
                out[mine] = (rows[mine] @ matrices[expert].t()).bfloat16()
        return out
    check_product(row_format, x.device)
    if not x.shape[0]:
        return x.new_empty((0, weights.shape[2]), dtype=torch.bfloat16)
    if row_format is MXFP8:
        recipe, swizzle = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
        tiled = tiles(scales).view(-1, -(-scales.shape[1] // 4) * 4), tiles(of_weights)
    else:
        recipe, swizzle = F.ScalingType.RowWise, F.SwizzleType.NO_SWIZZLE
        tiled = scales.reshape(-1), of_weights.flatten(1)
    found: Tensor = F.scaled_grouped_mm(
        *(x, weights, tiled[0], recipe, tiled[1], recipe, swizzle, swizzle), offs=ends
    )
    return found


def tiles(scales: Tensor) -> Tensor:
    """Scales of one byte in the order of Blackwell's tensor cores, padded with zeros.

    Tiles of 128 rows and 4 blocks follow one another; in a tile, a row lies beside those 32, 64 and
    96 behind it.

    Args:
        scales: `[..., rows, blocks]`, contiguous.

    Returns:
        `[..., bytes]`, contiguous.
    """
    padding = (0, -scales.shape[-1] % 4, 0, -scales.shape[-2] % _TILE)
    padded = F.pad(scales.view(torch.uint8), padding)
    split = padded.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4, 32))  # tile, 4, 32, tile, 4
    return split.movedim(-2, -4).transpose(-3, -2).flatten(-5).view(scales.dtype)
