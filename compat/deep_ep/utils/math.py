"""Arithmetic of DeepEP's own test scripts."""

from typing import Any

import torch

__all__ = [
    "align",
    "calc_diff",
    "ceil_div",
    "count_bytes",
    "create_grouped_scores",
    "hash_tensor",
    "hash_tensors",
    "inplace_unique",
    "per_token_cast_back",
    "per_token_cast_to_fp8",
    "safe_div",
]

_COLUMNS_PER_SCALE = 128
_FP8_MAX = 448.0


def ceil_div(x: int, y: int) -> int:
    """`x / y`, rounded up."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """The next multiple of `y`."""
    return ceil_div(x, y) * y


def safe_div(a: float, b: float) -> float:
    """`a / b`, where 0 / 0 is 0."""
    return 0.0 if a == b == 0 else a / b


def count_bytes(*tensors: Any) -> int:
    """Bytes of tensors, also in tuples and lists; None has none."""
    total = 0
    for each in tensors:
        if isinstance(each, tuple | list):
            total += count_bytes(*each)
        elif each is not None:
            total += each.numel() * each.element_size()
    return total


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """One minus the cosine-like similarity of x + 1 and y + 1, in float64; 0 means equal."""
    a, b = x.double() + 1, y.double() + 1
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())


def inplace_unique(x: torch.Tensor, num_slots: int) -> None:
    """Leaves each distinct value of a row once; the rest of the row becomes -1.

    Args:
        x: int `[rows, columns]` of values in `[-1, num_slots)`; changed in place.
        num_slots: the bound of the values.

    Raises:
        ValueError: x has a value that is out of range.
    """
    if x.numel() and int(x.max()) >= num_slots:
        raise ValueError(f"a value of x is {int(x.max())}, expected less than {num_slots}")
    ordered = x.sort(dim=1, descending=True).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    ordered[:, 1:] = ordered[:, 1:].masked_fill(repeated, -1)
    x.copy_(ordered.sort(dim=1, descending=True).values)


def create_grouped_scores(
    scores: torch.Tensor, group_idx: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Zeroes the scores of all experts outside each token's groups.

    Args:
        scores: `[tokens, experts]`.
        group_idx: int `[tokens, k]`, the groups a token may use.
        num_groups: equal, contiguous groups of experts.

    Returns:
        `[tokens, experts]` in the dtype of scores.
    """
    tokens, experts = scores.shape
    keep = torch.zeros((tokens, num_groups), dtype=torch.bool, device=scores.device)
    keep.scatter_(1, group_idx, True)
    return scores * keep.repeat_interleave(experts // num_groups, dim=1)


def per_token_cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises each 128 columns of a row to float8_e4m3fn with a scale of their own.

    Args:
        x: floating `[tokens, hidden]`; the last columns may be fewer than 128.

    Returns:
        The values `[tokens, hidden]` and the float32 scales `[tokens, ceil(hidden / 128)]`.
    """
    blocks = _blocks(x.float())
    largest = blocks.abs().amax(dim=2, keepdim=True).clamp(min=1e-4)
    values = (blocks * (_FP8_MAX / largest)).to(torch.float8_e4m3fn)
    return _columns(values, x.shape[1]), (largest / _FP8_MAX).squeeze(2)


def per_token_cast_back(x_fp8: torch.Tensor, x_scales: torch.Tensor) -> torch.Tensor:
    """The bfloat16 values of `per_token_cast_to_fp8`.

    Args:
        x_fp8: float8_e4m3fn `[tokens, hidden]`.
        x_scales: float32 `[tokens, ceil(hidden / 128)]`, or int32 with four exponents packed in
            each.

    Returns:
        bfloat16 `[tokens, hidden]`.
    """
    if x_fp8.numel() == 0:
        return x_fp8.to(torch.bfloat16)
    if x_scales.dtype == torch.int32:
        exponents = x_scales.contiguous().view(torch.uint8).to(torch.int32)
        x_scales = (exponents << 23).view(torch.float32)
    scales = x_scales.reshape(x_fp8.shape[0], -1, 1)
    return _columns(_blocks(x_fp8.float()) * scales, x_fp8.shape[1]).to(torch.bfloat16)


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    """`[tokens, hidden]` as `[tokens, ceil(hidden / 128), 128]`, with zeros at the end."""
    count = -(-rows.shape[1] // _COLUMNS_PER_SCALE)
    padding = count * _COLUMNS_PER_SCALE - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, padding)).view(
        rows.shape[0], count, _COLUMNS_PER_SCALE
    )


def _columns(blocks: torch.Tensor, hidden: int) -> torch.Tensor:
    """The first `hidden` columns of what `_blocks` made."""
    return blocks.flatten(1)[:, :hidden].contiguous()


def hash_tensor(t: torch.Tensor) -> int:
    """A checksum of the bytes that ignores the order of 8-byte words."""
    return int(t.contiguous().view(torch.int64).sum())


def hash_tensors(*tensors: Any) -> int:
    """The exclusive or of the checksums of tensors, also in tuples and lists."""
    total = 0
    for each in tensors:
        if isinstance(each, tuple | list):
            total ^= hash_tensors(*each)
        elif each is not None:
            total ^= hash_tensor(each)
    return total
