"""Inputs that all tiers share: routings, rows that name themselves, and comparison in words."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

RoutingKind = Literal[
    "balanced",
    "random",
    "hot_expert",
    "empty_rank",
    "holes",
    "all_holes",
    "duplicate_experts",
    "out_of_range",
]
ROUTING_KINDS: tuple[RoutingKind, ...] = get_args(RoutingKind)

ScaleLayout = Literal["row_major", "column_major", "padded"]
SCALE_LAYOUTS: tuple[ScaleLayout, ...] = get_args(ScaleLayout)


P = ParamSpec("P")
T = TypeVar("T")


def made_once(make: Callable[P, T]) -> Callable[P, T]:
    """`make`, whose last results are shared by the threads of a process: the first to ask makes."""
    making, remembered = threading.Lock(), functools.lru_cache(maxsize=4)(make)

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        with making:
            return remembered(*args, **kwargs)

    return made


def routing(
    kind: RoutingKind,
    *,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    num_ranks: int,
    seed: int,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """One rank's `topk_idx`, the same for the same arguments; give each rank another seed.

    Args:
        kind: `balanced` all experts equally often; `random` distinct experts; `hot_expert` every
            token picks expert 0 among others; `empty_rank` nobody picks the last rank's experts
            (with one rank: nobody picks any); `holes` about a third are -1; `all_holes` all are;
            `duplicate_experts` a token picks the same expert several times; `out_of_range` some
            values are negative or at least `num_experts`, up to the ends of the dtype.
        num_tokens: `T`, may be 0.
        num_experts: `E`.
        num_topk: `K`; with more choices than experts, experts repeat.
        num_ranks: `R`, divides `E`.
        seed: Of the generator.
        dtype: int32 or int64.

    Returns:
        `[T, K]` on the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shape = (num_tokens, num_topk)

    def distinct(count: int) -> Tensor:
        scores = torch.rand(
            (num_tokens, count), generator=generator, dtype=torch.float32, device="cpu"
        )
        order = scores.argsort(dim=1)
        repeats = -(-num_topk // max(count, 1))
        return torch.cat([order] * repeats, dim=1)[:, :num_topk]

    def some(fraction: float) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < fraction

    if kind == "balanced":
        # Neighbouring choices fall on different ranks.
        flat = torch.arange(num_tokens * num_topk, dtype=torch.int64, device="cpu") + seed
        per_rank = num_experts // num_ranks
        idx = (flat % num_ranks * per_rank + flat // num_ranks % per_rank).reshape(shape)
    elif kind == "random":
        idx = distinct(num_experts)
    elif kind == "hot_expert":
        idx = distinct(num_experts - 1) + 1 if num_experts > 1 else distinct(1)
        idx[:, num_topk // 2] = 0
    elif kind == "empty_rank":
        others = num_experts - num_experts // num_ranks
        idx = distinct(others) if others else torch.full_like(distinct(1), -1)
    elif kind == "holes":
        idx = distinct(num_experts).masked_fill(some(1 / 3), -1)
    elif kind == "all_holes":
        idx = torch.full(shape, -1, dtype=torch.int64, device="cpu")
    elif kind == "duplicate_experts":
        idx = distinct(num_experts)
        idx[:, 1:] = torch.where(some(0.6)[:, 1:], idx[:, :1], idx[:, 1:])
    elif kind == "out_of_range":
        info = torch.iinfo(dtype)
        bad = torch.tensor(
            [-1, -2, num_experts, num_experts + 7, info.min, info.max],
            dtype=torch.int64,
            device="cpu",
        )
        drawn = torch.randint(len(bad), shape, generator=generator, device="cpu")
        idx = torch.where(some(1 / 3), bad[drawn], distinct(num_experts))
    else:
        raise ValueError(f"kind={kind!r} is none of {ROUTING_KINDS}")
    return idx.to(dtype).contiguous()


def topk_weights(num_tokens: int, num_topk: int, *, seed: int) -> Tensor:
    """Random float32 `[T, K]` weights in (0, 1]."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shape = (num_tokens, num_topk)
    return 1.0 - torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def payload(rank: int, num_tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Rows that say where they come from: `[T, H]` on the CPU.

    Column `c` holds, by `c % 4`: the rank, the low seven bits of the token, its next seven bits,
    and `c // 4 % 128`. No value exceeds 127, so bfloat16, float16, int8 and uint8 hold them
    exactly; 8-bit floating types get the same bits as uint8.
    """
    token = torch.arange(num_tokens, dtype=torch.int32, device="cpu")[:, None]
    column = torch.arange(hidden, dtype=torch.int32, device="cpu")[None, :]
    field = column % 4
    rows = torch.where(field == 1, token % 128, column // 4 % 128)
    rows = torch.where(field == 2, token // 128 % 128, rows)
    rows = rows.masked_fill(field == 0, rank)
    if dtype.is_floating_point and dtype.itemsize == 1:
        return rows.to(torch.uint8).view(dtype)
    return rows.to(dtype)


def random_payload(num_tokens: int, hidden: int, dtype: torch.dtype, *, seed: int) -> Tensor:
    """Normally distributed rows (random bytes for one-byte dtypes): `[T, H]` on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shape = (num_tokens, hidden)
    if dtype.itemsize == 1:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8, device="cpu").view(
            dtype
        )
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def fp8_payload(
    rank: int,
    num_tokens: int,
    hidden: int,
    *,
    layout: ScaleLayout = "row_major",
    scale_dtype: torch.dtype = torch.float32,
    group_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """FP8 rows with one scale for each group of columns.

    Args:
        rank: In every row and scale.
        num_tokens: `T`.
        hidden: `H`.
        layout: Strides of the scales: `row_major` (S, 1), `column_major` (1, T), `padded`
            (1, T rounded up to 4 and 4 more), as TMA users lay them out.
        scale_dtype: float32 or int32.
        group_size: Columns that share a scale.

    Returns:
        `x` float8_e4m3fn `[T, H]`, and scales `[T, ceil(H / group_size)]` where scale `(t, s)`
        is `rank * 2**20 + t * 2**6 + s` (exact in float32 up to rank 15 and 16384 tokens).
    """
    num_scales = -(-hidden // group_size)
    token = torch.arange(num_tokens, dtype=torch.int32, device="cpu")[:, None]
    column = torch.arange(num_scales, dtype=torch.int32, device="cpu")[None, :]
    scales = (rank * 2**20 + token * 2**6 + column).to(scale_dtype)
    if layout == "column_major":
        scales = scales.t().contiguous().t()
    elif layout == "padded":
        stride = -(-num_tokens // 4) * 4 + 4
        storage = torch.zeros((num_scales, stride), dtype=scale_dtype, device="cpu")
        storage[:, :num_tokens] = scales.t()
        scales = storage.t()[:num_tokens]
    return payload(rank, num_tokens, hidden, torch.float8_e4m3fn), scales


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides, by one plain copy of the storage."""
    storage = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def assert_rows_equal(got: Tensor, want: Tensor, what: str) -> None:
    """Compare bit for bit; the error names the first mismatch and, for `payload` rows, its token.

    Args:
        got: Any device.
        want: Same shape and dtype.
        what: Start of the message, for instance `rank 2: recv_x`.

    Raises:
        AssertionError: Shapes, dtypes or bits differ.
    """
    for name in ("dtype", "shape"):
        if getattr(got, name) != getattr(want, name):
            raise AssertionError(
                f"{what}: {name} is {getattr(got, name)}, expected {getattr(want, name)}"
            )
    if not got.numel():
        return
    got_rows, want_rows = _as_rows(got), _as_rows(want)
    differs = (
        (got_rows.view(torch.uint8) != want_rows.view(torch.uint8))
        .reshape(*got_rows.shape, got_rows.dtype.itemsize)
        .any(dim=2)
    )
    if not differs.any():
        return
    row, column = torch.nonzero(differs)[0].tolist()
    got_value, want_value = (_value(rows[row, column]) for rows in (got_rows, want_rows))
    raise AssertionError(
        f"{what}: row {row}, column {column}: got {got_value} ({_origin(got_rows[row])}), "
        f"expected {want_value} ({_origin(want_rows[row])}); "
        f"{int(differs.any(dim=1).sum())} of {len(got_rows)} rows differ"
    )


def _as_rows(tensor: Tensor) -> Tensor:
    """A contiguous 2-D copy on the CPU."""
    on_cpu = tensor.detach().cpu()
    rows = on_cpu.reshape(on_cpu.shape[0] if on_cpu.dim() else 1, -1)
    return rows.clone(memory_format=torch.contiguous_format)


def _value(element: Tensor) -> float | int:
    """A number to print."""
    return element.float().item() if element.dtype.is_floating_point else element.item()


def _origin(row: Tensor) -> str:
    """Which `payload` row this is, in words."""
    plain = row.view(torch.uint8) if row.dtype.itemsize == 1 else row
    if plain.numel() >= 3:
        fields = [float(each) for each in plain[:3].tolist()]
        if all(field.is_integer() and 0 <= field < 128 for field in fields):
            rank, low, high = (int(field) for field in fields)
            token = high * 128 + low
            named = payload(rank, token + 1, plain.numel(), row.dtype)[token]
            if torch.equal(named.view(torch.uint8), row.contiguous().view(torch.uint8)):
                return f"token {token} of rank {rank}"
    return "no row of payload()"
