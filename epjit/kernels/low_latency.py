"""Kernels of low-latency dispatch and combine: their configs, by shape and GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from epjit import env
from epjit.calls import CombineSizes, DispatchSizes
from epjit.config import MAX_LOW_LATENCY_CHOICES, MAX_LOW_LATENCY_TOKENS, MAX_RANKS
from epjit.formats import BF16, FORMATS, FP8, LOGFMT_BLOCK, NVFP4, RowFormat
from epjit.kernels import variants
from epjit.kernels.shapes import copier_bytes
from epjit.runtime.device import shared_limit
from epjit.runtime.kernel import KernelConfig
from epjit.sizes import align

_CAST_ELEMENTS = 16
STEP = 256  # channels that a warp adds at a time
LINE_UNIT = 480  # bytes of a row in 4 lines of 128
# Of a half: one a token or a choice; for `reduced` one a piece of a row and one a weight.
NUM_WORDS = max(MAX_LOW_LATENCY_TOKENS, MAX_LOW_LATENCY_CHOICES)


class LowLatencyDispatchShape(NamedTuple):
    """Identifies a dispatch kernel within a Buffer; equal on all ranks."""

    num_experts: int
    hidden: int
    format: int
    num_topk: int
    topk_is_int64: bool

    @classmethod
    def of(cls, of: DispatchSizes) -> LowLatencyDispatchShape:
        """The shape of dispatches of these sizes."""
        return cls(of.num_experts, of.hidden, of.row_format.code, of.num_topk, of.topk_is_int64)


class LowLatencyCombineShape(NamedTuple):
    """Identifies a combine kernel within a Buffer; equal on all ranks."""

    num_experts: int
    hidden: int
    num_topk: int
    topk_is_int64: bool
    logfmt: bool
    weights_sent: bool = False

    @classmethod
    def of(cls, of: CombineSizes) -> LowLatencyCombineShape:
        """The shape of combines of these sizes."""
        wide, sent = of.topk_is_int64, of.weights_sent
        return cls(of.num_experts, of.hidden, of.num_topk, wide, of.use_logfmt, sent)


class _LowLatencyConfig(KernelConfig):
    """Base of kernels whose ranks share one NVLink domain, or with `remote` have several."""

    num_ranks: int
    remote: bool

    @property
    def needs_transport(self) -> bool:
        """Whether other domains are reached."""
        return self.remote

    @property
    def ranks(self) -> str:
        """The ranks, for the tag."""
        return f"r{self.num_ranks}{'_rdma' if self.remote else ''}"


@dataclass(frozen=True)
class LowLatencyDispatchConfig(
    _LowLatencyConfig,
    source="low_latency/dispatch.cu",
    op="low_latency_dispatch",
    tag="low_latency_{0.ranks}_e{0.num_experts}_h{0.hidden}_k{0.num_topk}_{0.row_format.name}",
):
    """Config of the dispatch kernel; its fields are explained in dispatch.cu."""

    starts_early: ClassVar[bool] = True

    num_ranks: int
    num_experts: int
    hidden: int
    format: int
    num_topk: int
    topk_is_int64: bool
    num_warps: int
    remote: bool = False
    shrink: bool = False
    lines: bool = False

    @classmethod
    def choose(
        cls,
        shape: LowLatencyDispatchShape,
        *,
        num_ranks: int,
        remote: bool = False,
        shrink: bool = False,
        variant: str = "words",
    ) -> LowLatencyDispatchConfig:
        """Shape of the block: a thread for each 16 channels of a usual row."""
        lines = variant == "lines" and not (remote or shrink)
        warps = 14 if remote and shrink else 16  # which would spill
        return cls(num_ranks, *shape, warps, remote, shrink, lines)

    @property
    def row_format(self) -> RowFormat:
        """How rows travel."""
        return FORMATS[self.format]

    @property
    def shared_bytes(self) -> int:
        """A counter for each expert, a few words of the block."""
        a_rank = self.num_ranks if self.remote else MAX_RANKS
        words = 4 * (self.num_experts + 4 + 2 * a_rank)
        return align(words, 16) + self._line_bytes if self.lines else words

    @property
    def _line_bytes(self) -> int:
        """Bytes that travel in lines: selections, row, scales."""
        scales = align(self.row_format.num_scale_bytes(self.hidden), 16)
        return align(8 * self.num_topk, 16) + self.row_format.row_bytes(self.hidden) + scales

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's slot."""
        if self.lines:
            return -(-self._line_bytes // LINE_UNIT) * 512
        scales = align(self.row_format.num_scale_bytes(self.hidden), 8)
        return align(self.row_format.row_bytes(self.hidden) + scales + 8 * self.num_topk)


@dataclass(frozen=True)
class LowLatencyCombineConfig(
    _LowLatencyConfig,
    source="low_latency/combine.cu",
    op="low_latency_combine",
    tag="low_latency_{0.ranks}_e{0.num_experts}_h{0.hidden}_k{0.num_topk}",
):
    """Config of the combine kernel; its fields are explained in combine.cu."""

    starts_early: ClassVar[bool] = True

    num_ranks: int
    num_experts: int
    hidden: int
    num_topk: int
    topk_is_int64: bool
    logfmt: bool
    tma: bool
    lines: bool
    num_warps: int
    num_push_warps: int
    rows_per_warp: int
    remote: bool = False
    shrink: bool = False

    @classmethod
    def choose(
        cls,
        shape: LowLatencyCombineShape,
        *,
        num_ranks: int,
        variant: str,
        limit: int,
        remote: bool = False,
        shrink: bool = False,
    ) -> LowLatencyCombineConfig:
        """Shape of the block for `limit` bytes of shared memory."""
        lines = variant == "lines" and not (shape.logfmt or remote or shrink)
        # More rows in hand need more registers, and so do lines.
        warps = 20 if shape.num_topk <= 8 and not lines else 16
        # Two H200s, a pair in a graph (FP8) of 128 and 8 tokens: with 8 pushing warps 49.9 and
        # 22.3 us, with 4 48.6 and 20.1, with 2 50.2 and 24.3.
        push, rows = 4, 1
        tma = variant == "tma" and not shape.logfmt
        if tma:
            push = 8
            held = (limit - 8 * push - 4) // (2 * shape.hidden)
            push = min(push, held)
            rows = min(max(held // push, 1), 2)
        return cls(num_ranks, *shape[:5], tma, lines, warps, push, rows, remote, shrink)

    def push_parts(self, max_tokens: int) -> int:
        """Warps that share a row on its way, the same on all ranks: with few rows there are some.

        A quarter of 7168 channels is one batch of loads.
        """
        if self.tma or self.remote:
            return 1
        return max(1, min(4, 512 // (max_tokens * self.num_topk)))

    @property
    def steps(self) -> int:
        """Into so many parts the sum of a token can be divided."""
        return -(-2 * self.hidden // (LINE_UNIT if self.lines else 2 * STEP))

    @property
    def shared_bytes(self) -> int:
        """Rows on their way, and a word of the block."""
        rows = copier_bytes(self.tma, self.num_push_warps, self.rows_per_warp, 2 * self.hidden)
        return rows + 4

    @property
    def slot_bytes(self) -> int:
        """Bytes of one selection's slot."""
        if self.lines:
            return -(-2 * self.hidden // LINE_UNIT) * 512
        if not self.logfmt:
            return 2 * self.hidden
        return align(self.hidden // _CAST_ELEMENTS * 20 + self.hidden // LOGFMT_BLOCK * 4, 16)


@dataclass(frozen=True)
class LowLatencyReducedCombineConfig(
    KernelConfig,
    source="low_latency/combine_reduced.cu",
    op="low_latency_combine",
    tag="low_latency_reduced_r{0.num_ranks}_e{0.num_experts}_h{0.hidden}_k{0.num_topk}",
):
    """Config of the combine that sums before the links; see combine_reduced.cu."""

    starts_early: ClassVar[bool] = True

    num_ranks: int
    num_experts: int
    hidden: int
    num_topk: int
    topk_is_int64: bool
    weights_sent: bool
    num_warps: int
    shrink: bool = False

    @classmethod
    def choose(
        cls, shape: LowLatencyCombineShape, *, num_ranks: int, shrink: bool = False
    ) -> LowLatencyReducedCombineConfig:
        """Shape of the block: as many warps as registers hold two pieces of four rows of."""
        return cls(num_ranks, *shape[:4], shape.weights_sent, 16, shrink)

    @property
    def shared_bytes(self) -> int:
        """A word of the block."""
        return 4

    def num_parts(self, max_tokens: int) -> int:
        """Pieces of a row, the same on all ranks; each is published by itself, which takes 2 us.

        A pair of calls (four H200s, 128 tokens) takes 61.4 us with 7, 59.2 with 14, 64 with 28.

        Raises:
            ValueError: There is no room for so many weights, which have not been sent.
        """
        steps = -(-self.hidden // STEP)
        steps_a_part = -(-steps // max(1, min(steps, 2048 // max_tokens)))
        num_parts = -(-steps // steps_a_part)
        num_weights = 0 if self.weights_sent else self.num_topk
        num_words = self.num_ranks * max_tokens * (num_parts + num_weights)
        if num_words > NUM_WORDS:
            raise ValueError(
                f"low_latency_combine: {env.low_latency_combine_variant.name}=reduced has room for "
                f"{NUM_WORDS} weights and pieces of rows, but {self.num_ranks} ranks of "
                f"{max_tokens} tokens with top-{self.num_topk} have {num_words}; take fewer tokens "
                "a rank, ldst or tma, or pass topk_weights to low_latency_dispatch"
            )
        return num_parts


@dataclass(frozen=True)
class CleanConfig(_LowLatencyConfig, source="low_latency/clean.cu", tag="low_latency_{0.ranks}"):
    """Config of the clean kernel."""

    num_ranks: int
    remote: bool = False

    @property
    def threads(self) -> int:
        """Threads a block: one a rank, in whole warps."""
        return align(self.num_ranks, 32)

    @property
    def shared_bytes(self) -> int:
        """A word for each warp, when there are several."""
        return self.threads // 8 if self.threads > 32 else 0


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels of every variant that an architecture can run, over shapes that differ in kind.

    Args:
        arch: Such as ``"sm_90a"``.
    """
    names = variants.names("low_latency_combine", arch)
    formats: tuple[RowFormat, ...]
    for num_ranks in range(1, MAX_RANKS + 1):
        yield CleanConfig(num_ranks)
    for num_ranks, num_experts, hidden, num_topk, formats in (
        (4, 256, 7168, 8, FORMATS),
        (3, 6, 512, 32, (BF16, FP8)),
        (8, 8192, 16384, 8, (BF16, NVFP4)),
        (1, 5, 24, 3, (BF16,)),
    ):
        wide = num_ranks != 3
        for row_format in formats:
            shape = LowLatencyDispatchShape(num_experts, hidden, row_format.code, num_topk, wide)
            for variant in variants.names("low_latency_dispatch", arch):
                yield config_of(shape, num_ranks, arch, remote=False, variant=variant)
        for variant in names:
            # The log format has one kernel, whatever the variant.
            for logfmt in (False, True) if variant == "ldst" and hidden != 24 else (False,):
                combine = LowLatencyCombineShape(num_experts, hidden, num_topk, wide, logfmt)
                yield config_of(combine, num_ranks, arch, remote=False, variant=variant)
        sent = LowLatencyCombineShape(num_experts, hidden, num_topk, wide, False, True)
        yield config_of(sent, num_ranks, arch, remote=False, variant="reduced")
    for num_ranks in (2, 16, 40, 256):
        yield CleanConfig(num_ranks, remote=True)
    for num_ranks, num_experts, hidden, num_topk, formats in (
        (4, 256, 7168, 8, (BF16, FP8, NVFP4)),
        (15, 60, 512, 32, (FP8,)),
        (256, 8192, 16384, 8, (BF16,)),
    ):
        wide = num_ranks != 15
        for row_format in formats:
            shape = LowLatencyDispatchShape(num_experts, hidden, row_format.code, num_topk, wide)
            yield LowLatencyDispatchConfig.choose(shape, num_ranks=num_ranks, remote=True)
        for variant in names:
            if variant in ("reduced", "lines"):  # of one domain only
                continue
            for logfmt in (False, True) if (variant, num_ranks) == ("ldst", 4) else (False,):
                combine = LowLatencyCombineShape(num_experts, hidden, num_topk, wide, logfmt)
                yield config_of(combine, num_ranks, arch, remote=True, variant=variant)
    dispatch = LowLatencyDispatchShape(256, 7168, FP8.code, 8, True)
    combine = LowLatencyCombineShape(256, 7168, 8, True, False)
    for remote in (False, True):
        yield config_of(dispatch, 4, arch, remote=remote, shrink=True, variant="words")
        for variant in names:
            if (not remote and variant != "lines") or variant in ("ldst", "tma"):
                yield config_of(combine, 4, arch, remote=remote, shrink=True, variant=variant)
    sent = combine._replace(weights_sent=True)
    yield config_of(sent, 4, arch, remote=False, shrink=True, variant="reduced")


def warmup_shapes(
    *,
    hidden: int,
    num_experts: int,
    num_topk: int,
    topk_is_int64: bool,
    row_format: RowFormat,
    use_logfmt: bool = False,
    weights_sent: bool = False,
) -> tuple[LowLatencyDispatchShape, LowLatencyCombineShape]:
    """The kernels that calls of these sizes need."""
    return (
        LowLatencyDispatchShape(num_experts, hidden, row_format.code, num_topk, topk_is_int64),
        LowLatencyCombineShape(
            num_experts, hidden, num_topk, topk_is_int64, use_logfmt, weights_sent
        ),
    )


def config_of(
    shape: LowLatencyDispatchShape | LowLatencyCombineShape,
    num_ranks: int,
    arch: str,
    *,
    remote: bool,
    shrink: bool = False,
    variant: str | None = None,
) -> LowLatencyDispatchConfig | LowLatencyCombineConfig | LowLatencyReducedCombineConfig:
    """The kernel of a shape, of the variant that the environment asks for.

    ``auto`` sums a rank's rows before they cross the links where the dispatch was given weights, by
    which the caller allows it.

    Args:
        shape: Of the call.
        num_ranks: Size of the group.
        arch: Such as ``"sm_90a"``.
        remote: Whether the group spans several NVLink domains.
        shrink: Whether ranks may be masked.
        variant: Takes this one instead.
    """
    if isinstance(shape, LowLatencyDispatchShape):
        if variant is None:
            variant = variants.resolve("low_latency_dispatch", arch)
        return LowLatencyDispatchConfig.choose(
            shape, num_ranks=num_ranks, remote=remote, shrink=shrink, variant=variant
        )
    # The log format is not added up before it travels: it would have to be encoded anew.
    may_reduce = not remote and not shape.logfmt
    if variant is None:
        preferred = "reduced" if may_reduce and shape.weights_sent else None
        variant = variants.resolve("low_latency_combine", arch, preferred=preferred)
    if variant == "reduced" and may_reduce:
        return LowLatencyReducedCombineConfig.choose(shape, num_ranks=num_ranks, shrink=shrink)
    limit = shared_limit(arch)
    return LowLatencyCombineConfig.choose(
        shape, num_ranks=num_ranks, variant=variant, limit=limit, remote=remote, shrink=shrink
    )


def kernels_of(
    shapes: Iterable[LowLatencyDispatchShape | LowLatencyCombineShape],
    *,
    num_ranks: int,
    arch: str,
    remote: bool,
    shrink: bool = False,
) -> list[KernelConfig]:
    """Every kernel of the mode that a Buffer compiles: when it is made, and for these shapes.

    Args:
        shapes: Of the calls.
        num_ranks: Size of the group.
        arch: Such as ``"sm_90a"``.
        remote: Whether the group spans several NVLink domains.
        shrink: Whether ranks may be masked.
    """
    clean = CleanConfig(num_ranks, remote)
    found = (config_of(each, num_ranks, arch, remote=remote, shrink=shrink) for each in shapes)
    return [clean, *found]
