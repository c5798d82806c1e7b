"""Kernels of dispatch and combine inside one NVLink domain: their configs, by shape and GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from epjit import tuned
from epjit.config import MAX_RANKS
from epjit.formats import CASTS, FP8, NVFP4
from epjit.kernels import variants
from epjit.kernels.layout import LayoutConfig
from epjit.kernels.shapes import (
    AnyShape,
    CombineShape,
    DispatchShape,
    ExpertCombineShape,
    ExpertDispatchShape,
    copier_bytes,
    copier_shape,
    slices_bytes,
    slices_shape,
)
from epjit.runtime.device import shared_limit
from epjit.runtime.kernel import KernelConfig
from epjit.sizes import align

MAX_SLOTS = 65536  # of one source rank: bounds the words to 4 MiB
# SMs x bytes of a row from which pushing is held by the links: measured with two H200s.
_LINK_BOUND_BYTES = 300_000
_CAST_ROWS = 4  # whose scales a warp has in shared memory

NOTIFY_OF_EXPERTS = dict.fromkeys(
    ("ends", "row_base", "block_base", "num_blocks", "num_expert_rows"), 0
)
"""Parameters that only a notify for rows by expert uses."""
DISPATCH_OF_EXPERTS = dict.fromkeys(
    (
        *("local_position", "block_base", "row_base", "ends", "expert_counts", "row_of", "source"),
        *("recv_scale_row_stride", "recv_scale_stride", "num_expert_rows", "zero_padding"),
        "row_of_stride",
    ),
    0,
)
"""Parameters that only a dispatch by expert uses."""
COMBINE_OF_EXPERTS = dict.fromkeys(("row_of", "row_of_stride", "row_weights", "num_expert_rows"), 0)
"""Parameters that only a combine of rows by expert uses."""


class _Ordered(KernelConfig):
    """Base of the configs of kernels for both orders of rows."""

    by_expert: bool

    @property
    def order(self) -> str:
        """Of the rows, in the namespace of the kernel."""
        return "by_expert" if self.by_expert else "intranode"


@dataclass(frozen=True)
class NotifyConfig(_Ordered, source="intranode/notify.cu", tag="{0.order}_r{0.num_ranks}"):
    """Config of the notify kernel."""

    starts_early: ClassVar[bool] = True
    threads: ClassVar[int] = 512

    num_ranks: int
    by_expert: bool = False

    @property
    def shared_bytes(self) -> int:
        """One sum a warp."""
        return self.threads // 32 * 4


@dataclass(frozen=True)
class DispatchConfig(
    _Ordered,
    source="intranode/dispatch.cu",
    tag="{0.order}_r{0.num_ranks}_h{0.hidden_bytes}_s{0.num_scales}_k{0.num_topk}",
):
    """Config of the dispatch kernel; its fields are explained in dispatch.cu."""

    starts_early: ClassVar[bool] = True

    num_ranks: int
    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool
    push: bool
    direct: bool
    tma: bool
    num_warps: int
    rows_per_warp: int
    by_expert: bool = False
    is_cached: bool = False
    has_weights: bool = False
    format: int = 0
    is_f16: bool = False

    @classmethod
    def choose_by_expert(
        cls, shape: ExpertDispatchShape, *, num_ranks: int, variant: str, limit: int
    ) -> DispatchConfig:
        """The same for rows by expert; `direct` falls back to pushing to slots."""
        variant = "push" if variant == "direct" else variant
        of_rows = DispatchShape(*shape[:4], shape.format, shape.is_f16)
        config = cls.choose(of_rows, num_ranks=num_ranks, variant=variant, limit=limit)
        return replace(
            config, by_expert=True, is_cached=shape.is_cached, has_weights=shape.has_weights
        )

    @classmethod
    def choose(
        cls, shape: DispatchShape, *, num_ranks: int, variant: str, limit: int
    ) -> DispatchConfig:
        """Shape of the block for `limit` bytes of shared memory."""
        tma, casts = variant != "ldst", shape.format != 0
        warps, rows = 16, 1
        if casts:
            warps = 15  # have two rows of 7168 bytes each
            scale_bytes = warps * _CAST_ROWS * 4 * shape.num_scales
            warps, rows = copier_shape(True, warps, shape.hidden_bytes, limit - scale_bytes)
            rows = min(rows, _CAST_ROWS)
        elif tma:
            warps, rows = copier_shape(tma, 16, shape.hidden_bytes, limit)
        direct = variant == "direct"
        return cls(
            *(num_ranks, *shape[:4], direct or variant == "push", direct, tma, warps, rows),
            format=shape.format,
            is_f16=shape.is_f16,
        )

    def stage_warps(self, num_sms: int, *, has_room: bool = False) -> int:
        """Warps of a block that stage tokens first; the others pull from the start.

        All of them where peers write the rows (`has_room`), so that there is nothing to pull.

        Pushing wants most of the warps while the SMs hold it. Where the links do, more rows on
        their way only slow the words behind them: with 24 SMs and rows of 14336 bytes, 12 of 16
        warps take 234 us, 8 take 225, 4 take 206; with 12 SMs 306, 314 and 328. A cast keeps a warp
        longer than a copy, so it takes two of them.
        """
        if self.num_ranks == 1 or has_room:
            return self.num_warps
        quarters = 2
        if self.push:
            link_bound = num_sms * self.hidden_bytes > _LINK_BOUND_BYTES
            quarters = 3 if not link_bound else 1 if self.format == 0 else 2
        return max(1, self.num_warps * quarters // 4)

    @property
    def shared_bytes(self) -> int:
        """Rows on their way; those that are cast, and their scales."""
        casts = self.format != 0
        shape = self.num_warps, self.rows_per_warp, self.hidden_bytes
        scale_bytes = casts * self.num_warps * _CAST_ROWS * 4 * self.num_scales
        return copier_bytes(self.tma or casts, *shape) + scale_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in a slot."""
        words = 2  # that travel with a choice
        if self.by_expert:
            words = 2 * (not self.is_cached) + self.has_weights
        return align(self.hidden_bytes + 4 * (self.num_scales + words * self.num_topk))

    @property
    def bytes_a_token(self) -> int:
        """Bytes of slots for one token of every rank that shares them."""
        return self.num_ranks * self.slot_bytes if self.push else self.slot_bytes


@dataclass(frozen=True)
class CombineConfig(
    _Ordered,
    source="intranode/combine.cu",
    tag="{0.order}_r{0.num_ranks}_h{0.hidden_bytes}_k{0.num_topk}",
):
    """Config of the combine kernel; its fields are explained in combine.cu."""

    starts_early: ClassVar[bool] = True

    num_ranks: int
    hidden_bytes: int
    num_topk: int
    is_f16: bool
    tma: bool
    num_warps: int
    num_push_warps: int
    rows_per_warp: int
    choice_bits: int = 0
    by_expert: bool = False
    is_weighted: bool = False
    has_weights: bool = False
    slice_bytes: int = 0

    @classmethod
    def choose_by_expert(
        cls, shape: ExpertCombineShape, *, num_ranks: int, variant: str, limit: int
    ) -> CombineConfig:
        """The same for rows by expert, which all variants push by 16-byte stores."""
        hidden_bytes, num_topk, is_f16, is_weighted, has_weights, choice_bits = shape
        tma, warps, slices, slice_bytes = variant != "ldst", 16, 0, 0
        if tma:
            warps, slices, slice_bytes = slices_shape(16, num_topk + num_ranks - 1, limit)
        return cls(
            *(num_ranks, hidden_bytes, num_topk, is_f16, tma, warps, warps // 2, slices),
            choice_bits=choice_bits,
            by_expert=True,
            is_weighted=is_weighted,
            has_weights=has_weights,
            slice_bytes=slice_bytes,
        )

    @classmethod
    def choose(
        cls, shape: CombineShape, *, num_ranks: int, variant: str, limit: int
    ) -> CombineConfig:
        """Shape of the block for `limit` bytes of shared memory."""
        tma = variant != "ldst"
        push, rows = copier_shape(tma, 6, shape.hidden_bytes, limit)
        # Many warps hide the latency of a token's sum; more ranks and copies through registers need
        # more of these (28 warps leave 72 a thread, 24 leave 80, 20 leave 96, 16 leave 128; sm_120
        # spills with 72).
        warps = 16 if not tma else 20 if num_ranks > 4 else 24 if limit < 160 << 10 else 28
        return cls(num_ranks, *shape[:3], tma, warps, push, rows, shape.choice_bits)

    @property
    def shared_bytes(self) -> int:
        """Rows on their way."""
        if self.by_expert:
            return slices_bytes(self.tma, self.num_warps, self.rows_per_warp, self.slice_bytes)
        return copier_bytes(self.tma, self.num_push_warps, self.rows_per_warp, self.hidden_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one row in a slot."""
        num_weights = self.num_topk if self.has_weights or not self.by_expert else 0
        return align(self.hidden_bytes + 4 * num_weights)

    @property
    def bytes_a_token(self) -> int:
        """Bytes of slots that a token takes: one row from each rank."""
        return self.num_ranks * self.slot_bytes


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels of every variant that an architecture can run, over shapes that differ in kind.

    Args:
        arch: Such as ``"sm_90a"``.
    """
    for num_ranks in range(1, MAX_RANKS + 1):
        for by_expert in (False, True) if num_ranks in (1, MAX_RANKS) else (False,):
            yield NotifyConfig(num_ranks, by_expert)
            for wide in (True, False):
                yield LayoutConfig(num_ranks, wide, by_expert=by_expert)
    rows = (
        (1, 4096, 0, 0),
        (2, 14336, 0, 8),
        (4, 7168, 56, 8),
        (8, 14336, 0, 0),
        (8, 32768, 0, 32),
        (3, 32, 1, 2),
    )
    for num_ranks, hidden_bytes, num_scales, num_topk in rows:
        for variant in variants.names("dispatch", arch):
            dispatch = DispatchShape(hidden_bytes, num_scales, num_topk, num_ranks != 8)
            yield config_of(dispatch, num_ranks, arch, variant=variant)
        for variant in variants.names("combine", arch) if num_scales == 0 else ():
            combine = CombineShape(hidden_bytes, num_topk, is_f16=num_ranks == 2)
            for bits in (0, 32 if num_ranks == 3 else 64):
                ordered = combine._replace(choice_bits=bits)
                yield config_of(ordered, num_ranks, arch, variant=variant)
    for num_ranks, hidden_bytes, num_scales, num_topk in rows:
        if num_topk == 0:
            continue
        for variant in ("tma", "push", "ldst"):
            if variant not in variants.names("dispatch", arch):
                continue
            for is_cached in (False, True) if num_ranks == 4 else (False,):
                rows_of = ExpertDispatchShape(
                    *(hidden_bytes, num_scales, num_topk, True, is_cached), num_ranks != 3
                )
                yield config_of(rows_of, num_ranks, arch, variant=variant)
        for row_format in CASTS.values() if num_ranks == 4 else ():
            of_rows = row_format.row_bytes(7168), row_format.num_scale_bytes(7168) // 4
            cast, first = (row_format.code, row_format is FP8), variants.names("dispatch", arch)[0]
            shape = ExpertDispatchShape(*of_rows, num_topk, True, False, True, *cast)
            yield config_of(shape, num_ranks, arch, variant=first)
            plain = DispatchShape(*of_rows, num_topk, True, *cast)
            direct = row_format is NVFP4 and "direct" in variants.names("dispatch", arch)
            yield config_of(plain, num_ranks, arch, variant="direct" if direct else first)
        if num_scales == 0:
            for is_weighted, bits in ((False, 0), (True, 0), (False, 64)):
                sums = ExpertCombineShape(
                    *(hidden_bytes, num_topk, num_ranks == 2, is_weighted), not is_weighted, bits
                )
                for variant in variants.names("combine", arch):
                    yield config_of(sums, num_ranks, arch, variant=variant)


def config_of(
    shape: AnyShape,
    num_ranks: int,
    arch: str,
    *,
    gpu: str = "",
    variant: str | None = None,
) -> DispatchConfig | CombineConfig:
    """The kernel of a shape, of the variant that the environment asks for or that was tuned.

    Args:
        shape: Of the call.
        num_ranks: Size of the group.
        arch: Such as ``"sm_90a"``.
        gpu: Product name, for the variants that were tuned there.
        variant: Takes this one instead.
    """
    op = "combine" if isinstance(shape, CombineShape | ExpertCombineShape) else "dispatch"
    if variant is None:
        best = tuned.best(op, gpu=gpu, num_ranks=num_ranks, hidden_bytes=shape.hidden_bytes)
        preferred = variants.CHOICES[op].preferred(num_ranks) if best is None else best.variant
        variant = variants.resolve(op, arch, preferred=preferred)
    limit = shared_limit(arch)
    if isinstance(shape, ExpertDispatchShape):
        return DispatchConfig.choose_by_expert(
            shape, num_ranks=num_ranks, variant=variant, limit=limit
        )
    if isinstance(shape, DispatchShape):
        return DispatchConfig.choose(shape, num_ranks=num_ranks, variant=variant, limit=limit)
    if isinstance(shape, ExpertCombineShape):
        return CombineConfig.choose_by_expert(
            shape, num_ranks=num_ranks, variant=variant, limit=limit
        )
    return CombineConfig.choose(shape, num_ranks=num_ranks, variant=variant, limit=limit)


def kernels_of(
    shapes: Iterable[AnyShape], *, num_ranks: int, arch: str, gpu: str = ""
) -> list[KernelConfig]:
    """Every kernel that a Buffer compiles: when it is made, and for calls of these shapes.

    Args:
        shapes: Of the calls.
        num_ranks: Size of the group.
        arch: Such as ``"sm_90a"``.
        gpu: Product name, for the variants that were tuned there.
    """
    shapes = list(shapes)
    configs: list[KernelConfig] = []
    for by_expert in (False, True):
        if not by_expert or any(isinstance(shape, ExpertDispatchShape) for shape in shapes):
            configs.append(NotifyConfig(num_ranks, by_expert))
            configs += [
                LayoutConfig(num_ranks, wide, by_expert=by_expert) for wide in (True, False)
            ]
    return configs + [config_of(shape, num_ranks, arch, gpu=gpu) for shape in shapes]


def num_slots(config: DispatchConfig | CombineConfig, num_nvl_bytes: int) -> int:
    """Slots of one source rank.

    Raises:
        ValueError: There is no room for two.
    """
    if config.num_ranks == 1:
        return MAX_SLOTS  # nothing is staged
    number = min(num_nvl_bytes // config.bytes_a_token, MAX_SLOTS) // 2 * 2
    if number < 2:
        raise ValueError(
            f"{config.op} of {config.hidden_bytes}-byte rows needs num_nvl_bytes >= "
            f"{2 * config.bytes_a_token}, but this Buffer has {num_nvl_bytes}; pass "
            "Config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks)"
        )
    return number


def num_parts(config: CombineConfig, num_sms: int, num_tokens: int) -> int:
    """Warps that share a token's sum, unless there are many tokens a warp.

    Shorter units end closer together (4 parts instead of 1: 128 tokens on 12 SMs 26.7 us, not 31.4,
    512 on 24 SMs 42.6, not 47.4; 4096 on 12 SMs 310, not 276).
    """
    return max(1, min(4, 6 * config.num_warps * num_sms // max(num_tokens, 1)))


def check_warps(config: CombineConfig, num_sms: int) -> None:
    """Each peer needs a warp that pushes.

    Raises:
        ValueError: There are fewer.
    """
    push_warps, num_peers = config.num_push_warps * num_sms, config.num_ranks - 1
    if push_warps < num_peers:
        raise ValueError(
            f"config.num_sms is {num_sms}, which gives combine {push_warps} warps that push "
            f"rows of {config.hidden_bytes} bytes, but it needs one for each of the "
            f"{num_peers} peers; use more SMs"
        )
