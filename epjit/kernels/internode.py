"""Kernels of dispatch and combine between NVLink domains: their configs, by shape and GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from epjit.config import MAX_DOMAINS, MAX_RANKS
from epjit.kernels import variants
from epjit.kernels.expert_major import passes_of
from epjit.kernels.layout import LayoutConfig
from epjit.kernels.shapes import (
    AnyShape,
    CombineShape,
    DispatchShape,
    ExpertCombineShape,
    ExpertDispatchShape,
    copier_bytes,
    copier_shape,
)
from epjit.runtime.device import shared_limit
from epjit.runtime.kernel import KernelConfig
from epjit.sizes import ALIGNMENT, align

_FORWARD_WARPS = 2  # kForwardWarps of dispatch.cu
_TOKENS_PER_CHUNK, _TOKENS_PER_PROXY_CHUNK = 4, 16
_MIN_CHUNKS = 8  # in a ring, for those of a proxy: one half is written while the other is read
MAX_WORDS = 1 << 18  # of all channels into a domain: 2 MB


@dataclass(frozen=True)
class InternodeNotifyConfig(
    KernelConfig, source="internode/notify.cu", tag="internode_{0.num_domains}x{0.num_local}"
):
    """Config of the notify kernel."""

    threads: ClassVar[int] = 512
    starts_early: ClassVar[bool] = True
    needs_transport: ClassVar[bool] = True

    num_domains: int
    num_local: int

    @property
    def shared_bytes(self) -> int:
        """A sum a warp; the rows of each source for each local rank."""
        return 4 * (self.threads // 32 + (self.num_domains * self.num_local + 1) * self.num_local)


@dataclass(frozen=True)
class InternodeDispatchConfig(
    KernelConfig,
    source="internode/dispatch.cu",
    tag="internode_{0.num_domains}x{0.num_local}_h{0.hidden_bytes}_s{0.num_scales}_k{0.num_topk}",
):
    """Config of the dispatch kernel; its fields are explained in dispatch.cu."""

    starts_early: ClassVar[bool] = True
    needs_transport: ClassVar[bool] = True

    num_domains: int
    num_local: int
    hidden_bytes: int
    num_scales: int
    num_topk: int
    topk_is_int64: bool
    tma: bool
    num_copy_warps: int
    num_put_warps: int
    rows_per_warp: int
    tokens_per_chunk: int

    @classmethod
    def choose(
        cls, shape: DispatchShape, *, num_domains: int, num_local: int, variant: str, limit: int
    ) -> InternodeDispatchConfig:
        """Shape of the block for `limit` bytes of shared memory."""
        tma = variant != "ldst"
        warps, rows = copier_shape(tma, 14 if tma else 5, shape.hidden_bytes, limit)
        put = 5 if tma else 4
        return cls(num_domains, num_local, *shape[:4], tma, warps, put, rows, _TOKENS_PER_CHUNK)

    @property
    def send_warps(self) -> int:
        """Warps of a block that send tokens first; the others pull from the start."""
        return max(1, self.num_copy_warps * 3 // 4)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return (self.num_copy_warps + self.num_put_warps + _FORWARD_WARPS + 1) * 32

    @property
    def shared_bytes(self) -> int:
        """Rows on their way."""
        return copier_bytes(self.tma, self.num_copy_warps, self.rows_per_warp, self.hidden_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in a ring."""
        beside = self.num_scales + 2 * self.num_topk + self.num_local + 1
        return align(self.hidden_bytes + 4 * beside)


@dataclass(frozen=True)
class InternodeCombineConfig(
    KernelConfig,
    source="internode/combine.cu",
    tag="internode_{0.num_domains}x{0.num_local}_h{0.hidden_bytes}_k{0.num_topk}",
):
    """Config of the combine kernel; its fields are explained in combine.cu."""

    starts_early: ClassVar[bool] = True
    needs_transport: ClassVar[bool] = True

    num_domains: int
    num_local: int
    hidden_bytes: int
    num_topk: int
    is_f16: bool
    tma: bool
    num_warps: int
    num_push_warps: int
    num_sum_warps: int
    num_put_warps: int
    rows_per_warp: int
    tokens_per_chunk: int

    @classmethod
    def choose(
        cls, shape: CombineShape, *, num_domains: int, num_local: int, variant: str, limit: int
    ) -> InternodeCombineConfig:
        """Shape of the block for `limit` bytes of shared memory."""
        tma = variant != "ldst"
        push, rows = copier_shape(tma, 4 if tma else 2, shape.hidden_bytes, limit)
        if num_local == 1:
            push, rows = 1, 1  # nothing is pushed
        # Copies through registers, and many rows in hand, need more registers.
        warps, sums, put = (8, 2, 2) if not tma else (20, 4, 4) if num_local <= 2 else (16, 3, 3)
        return cls(
            num_domains, num_local, *shape[:3], tma, warps, push, sums, put, rows, _TOKENS_PER_CHUNK
        )

    @property
    def shared_bytes(self) -> int:
        """Rows on their way."""
        return copier_bytes(self.tma, self.num_push_warps, self.rows_per_warp, self.hidden_bytes)

    @property
    def reduce_warps(self) -> int:
        """Warps of a block that reduce from the start."""
        return self.num_warps - self.num_push_warps - self.num_sum_warps - self.num_put_warps

    @property
    def slot_bytes(self) -> int:
        """Bytes of one row in a slot or a ring."""
        return align(self.hidden_bytes + 4 * self.num_topk)


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels of every variant that an architecture can run, over shapes that differ in kind.

    Args:
        arch: Such as ``"sm_90a"``.
    """
    variant = variants.names("combine", arch)[0]
    for num_domains, num_local, row_bytes, num_scales, num_topk in (
        (2, 1, 14336, 0, 8),
        (4, 8, 7168, 56, 8),
        (3, 5, 32768, 0, 32),
        (MAX_DOMAINS, MAX_RANKS, 14336, 0, 0),
    ):
        yield InternodeNotifyConfig(num_domains, num_local)
        yield LayoutConfig(num_domains * num_local, True, num_domains)
        shapes: list[DispatchShape | CombineShape] = [
            DispatchShape(row_bytes, num_scales, num_topk, num_local != 5)
        ]
        if num_scales == 0:
            shapes.append(CombineShape(row_bytes, num_topk, is_f16=num_local == 1))
        for shape in shapes:
            for each in {variant, "ldst" if num_local == 5 else variant}:
                yield config_of(shape, num_domains, num_local, arch, variant=each)


def config_of(
    shape: AnyShape,
    num_domains: int,
    num_local: int,
    arch: str,
    *,
    variant: str | None = None,
) -> InternodeDispatchConfig | InternodeCombineConfig:
    """The kernel of a shape, of the variant that the environment asks for.

    Args:
        shape: Of the call; rows by expert go as those of the sources do.
        num_domains: NVLink domains, more than one.
        num_local: Ranks of each.
        arch: Such as ``"sm_90a"``.
        variant: Takes this one instead. ``push`` is not told from ``tma``: tokens are pulled here.
    """
    if isinstance(shape, ExpertDispatchShape | ExpertCombineShape):
        shape = shape.by_source
    op = "dispatch" if isinstance(shape, DispatchShape) else "combine"
    if variant is None:
        variant = variants.resolve(op, arch)
    limit = shared_limit(arch)
    if isinstance(shape, DispatchShape):
        return InternodeDispatchConfig.choose(
            shape, num_domains=num_domains, num_local=num_local, variant=variant, limit=limit
        )
    return InternodeCombineConfig.choose(
        shape, num_domains=num_domains, num_local=num_local, variant=variant, limit=limit
    )


def for_proxy(config: KernelConfig, num_rdma_bytes: int | None = None) -> KernelConfig:
    """The same kernel, with fewer and larger puts if it makes any: a thread of the CPU posts them.

    Args:
        config: Of any operation.
        num_rdma_bytes: Of the Buffer, whose rings may be too short for them; None: they are not.
    """
    if not isinstance(config, InternodeDispatchConfig | InternodeCombineConfig):
        return config
    large = replace(config, tokens_per_chunk=_TOKENS_PER_PROXY_CHUNK)
    if num_rdma_bytes is None:
        return large
    has_room = ring_slots(config, num_rdma_bytes) >= _MIN_CHUNKS * _TOKENS_PER_PROXY_CHUNK
    return large if has_room else config


def kernels_of(
    shapes: Iterable[AnyShape], *, num_domains: int, num_local: int, arch: str
) -> list[KernelConfig]:
    """Every kernel that a Buffer compiles: when it is made, and for calls of these shapes.

    Args:
        shapes: Of the calls.
        num_domains: NVLink domains, more than one.
        num_local: Ranks of each.
        arch: Such as ``"sm_90a"``.
    """
    configs: list[KernelConfig] = [InternodeNotifyConfig(num_domains, num_local)]
    configs += [LayoutConfig(num_domains * num_local, wide, num_domains) for wide in (True, False)]
    for shape in shapes:
        configs += [config_of(shape, num_domains, num_local, arch), *passes_of(shape, arch)]
    return configs


def max_slots(num_domains: int, num_local: int) -> int:
    """Slots of a channel that there are words for."""
    return MAX_WORDS // (num_domains * num_local)


def ring_bytes(num_domains: int, num_rdma_bytes: int) -> int:
    """Bytes of each ring of the inbox and of the stage: the same for all kernels of a Buffer."""
    return num_rdma_bytes // (2 * num_domains) // ALIGNMENT * ALIGNMENT


def ring_slots(
    config: InternodeDispatchConfig | InternodeCombineConfig, num_rdma_bytes: int
) -> int:
    """Slots of a ring.

    Raises:
        ValueError: There is no room for two chunks.
    """
    step = 2 * config.tokens_per_chunk
    most = max_slots(config.num_domains, config.num_local)
    fitting = ring_bytes(config.num_domains, num_rdma_bytes) // config.slot_bytes
    number = min(fitting, most) // step * step
    if number == 0:
        raise ValueError(
            f"{config.op} of {config.hidden_bytes}-byte rows between {config.num_domains} NVLink "
            f"domains needs num_rdma_bytes >= "
            f"{2 * config.num_domains * step * config.slot_bytes}, but this Buffer has "
            f"{num_rdma_bytes}; pass Config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks, "
            f"ranks_per_domain={config.num_local})"
        )
    return number


def combine_slots(config: InternodeCombineConfig, num_nvl_bytes: int) -> int:
    """Slots of a channel for rows on their way inside a domain.

    Raises:
        ValueError: There is no room for two.
    """
    most = max_slots(config.num_domains, config.num_local)
    if config.num_local == 1:
        return most  # nothing is pushed
    bytes_a_token = config.num_domains * config.num_local * config.slot_bytes
    number = min(num_nvl_bytes // bytes_a_token, most) // 2 * 2
    if number < 2:
        raise ValueError(
            f"combine of {config.hidden_bytes}-byte rows between {config.num_domains} NVLink "
            f"domains of {config.num_local} needs num_nvl_bytes >= {2 * bytes_a_token}, but "
            f"this Buffer has {num_nvl_bytes}; pass "
            "Config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks)"
        )
    return number


def check_warps(config: InternodeDispatchConfig | InternodeCombineConfig, num_sms: int) -> None:
    """Each channel needs warps of its own, or a wait in one could hold up another for ever."""
    others = config.num_domains - 1
    channels = [(others, config.num_put_warps)]
    if isinstance(config, InternodeCombineConfig):
        channels.append((others, config.num_sum_warps))
        channels.append((config.num_domains * (config.num_local - 1), config.num_push_warps))
    needed = max(-(-count // warps) for count, warps in channels)
    if num_sms < needed:
        raise ValueError(
            f"config.num_sms is {num_sms}, but {config.op} of rows of {config.hidden_bytes} bytes "
            f"between {config.num_domains} NVLink domains of {config.num_local} needs {needed}: "
            "each channel has warps of its own"
        )
