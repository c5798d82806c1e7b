"""Kernels that order received rows by expert: their configs, by shape and GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from epjit.config import MAX_LOCAL_EXPERTS, MAX_ROW_BYTES, MAX_TOPK
from epjit.formats import CASTS
from epjit.kernels import variants
from epjit.kernels.shapes import (
    AnyShape,
    ExpertCombineShape,
    ExpertDispatchShape,
    copier_bytes,
    copier_shape,
)
from epjit.runtime.device import shared_limit
from epjit.runtime.kernel import KernelConfig


@dataclass(frozen=True)
class PlaceConfig(KernelConfig, source="expert_major/place.cu", tag="moe"):
    """Config of the place kernel."""

    threads: ClassVar[int] = 512
    shared_bytes: ClassVar[int] = 4 * (MAX_LOCAL_EXPERTS + threads // 32)  # a counter each

    topk_is_int64: bool


@dataclass(frozen=True)
class PermuteConfig(
    KernelConfig, source="expert_major/permute.cu", tag="moe_h{0.row_bytes}_k{0.num_topk}"
):
    """Config of the permute kernel; its fields are explained in permute.cu."""

    row_bytes: int
    num_topk: int
    tma: bool
    num_warps: int
    rows_per_warp: int

    @classmethod
    def choose(cls, row_bytes: int, num_topk: int, *, variant: str, limit: int) -> PermuteConfig:
        """Shape of the block for `limit` bytes of shared memory."""
        tma = variant == "tma"
        return cls(row_bytes, num_topk, tma, *copier_shape(tma, 16, row_bytes, limit))

    @property
    def shared_bytes(self) -> int:
        """Rows on their way."""
        return copier_bytes(self.tma, self.num_warps, self.rows_per_warp, self.row_bytes)


@dataclass(frozen=True)
class UnpermuteConfig(
    KernelConfig, source="expert_major/unpermute.cu", tag="moe_h{0.row_bytes}_k{0.num_topk}"
):
    """Config of the unpermute kernel."""

    threads: ClassVar[int] = 512

    row_bytes: int
    num_topk: int
    is_f16: bool
    is_weighted: bool = False


@dataclass(frozen=True)
class CastConfig(KernelConfig, source="expert_major/cast.cu", tag="moe_h{0.hidden}_f{0.format}"):
    """Config of the cast kernel."""

    threads: ClassVar[int] = 512

    hidden: int
    format: int
    is_f16: bool


@dataclass(frozen=True)
class WeighConfig(KernelConfig, source="expert_major/weigh.cu", tag="moe_h{0.row_bytes}"):
    """Config of the weigh kernel."""

    threads: ClassVar[int] = 512

    row_bytes: int
    is_f16: bool


@dataclass(frozen=True)
class BlankConfig(KernelConfig, source="expert_major/blank.cu", tag="moe"):
    """Config of the blank kernel."""

    num_warps: int = 16


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels of every variant that an architecture can run, over shapes that differ in kind.

    Args:
        arch: Such as ``"sm_90a"``.
    """
    limit = shared_limit(arch)
    yield from (PlaceConfig(True), PlaceConfig(False), BlankConfig())
    for row_format in CASTS.values():
        yield CastConfig(7168, row_format.code, is_f16=row_format.code == 1)
    for row_bytes in (16, 7168, 14336, MAX_ROW_BYTES):
        yield WeighConfig(row_bytes, is_f16=row_bytes == 7168)
        for num_topk in (1, 8, MAX_TOPK):
            for variant in variants.names("permute", arch):
                yield PermuteConfig.choose(row_bytes, num_topk, variant=variant, limit=limit)
            yield UnpermuteConfig(row_bytes, num_topk, num_topk == 1, is_weighted=num_topk == 8)


def kernels_of(
    row_bytes: int, *, num_topk: int, is_f16: bool, topk_is_int64: bool, arch: str
) -> list[KernelConfig]:
    """Every kernel that rows by expert of one shape need on an architecture.

    Args:
        row_bytes: Bytes of one row of bfloat16 or float16.
        num_topk: Choices a token.
        is_f16: float16 rows, else bfloat16.
        topk_is_int64: Width of the choices.
        arch: Such as ``"sm_90a"``.
    """
    return [
        PlaceConfig(topk_is_int64),
        permute_config(row_bytes, num_topk, arch),
        *[UnpermuteConfig(row_bytes, num_topk, is_f16, weighted) for weighted in (False, True)],
        BlankConfig(),
        WeighConfig(row_bytes, is_f16),
    ]


def passes_of(shape: AnyShape, arch: str) -> list[KernelConfig]:
    """The kernels around a call on rows by expert between NVLink domains; other calls need none.

    Args:
        shape: Of the call.
        arch: Such as ``"sm_90a"``.
    """
    if isinstance(shape, ExpertCombineShape):
        return [UnpermuteConfig(*shape[:4])]
    if not isinstance(shape, ExpertDispatchShape):
        return []
    found: list[KernelConfig] = [permute_config(shape.hidden_bytes, shape.num_topk, arch)]
    if not shape.is_cached:
        found.append(PlaceConfig(shape.topk_is_int64))
    if shape.format:
        (bits,) = (each.bits for each in CASTS.values() if each.code == shape.format)
        hidden = shape.hidden_bytes * 8 // bits
        found.append(CastConfig(hidden, shape.format, shape.is_f16))
    return found


def permute_config(row_bytes: int, num_topk: int, arch: str) -> PermuteConfig:
    """The kernel of a row size, of the variant that the environment asks for."""
    variant = variants.resolve("permute", arch)
    return PermuteConfig.choose(row_bytes, num_topk, variant=variant, limit=shared_limit(arch))
