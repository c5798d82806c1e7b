"""`warmup`: compile ahead, on any machine, for any architecture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from enum import Enum
from itertools import compress
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from epjit.cli import show

if TYPE_CHECKING:
    from epjit.formats import RowFormat
    from epjit.runtime.kernel import KernelConfig


class Dtype(str, Enum):
    """Rows of dispatch: the first three of the normal mode, all but fp16 of low-latency calls."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"
    fp8_round = "fp8_round"
    fp8_ue8m0 = "fp8_ue8m0"
    mxfp8 = "mxfp8"
    nvfp4 = "nvfp4"


_NORMAL = (Dtype.bf16, Dtype.fp16, Dtype.fp8)


def warmup(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as sm_90a, once for each. Default: TORCH_CUDA_ARCH_LIST, else the GPUs here."
        ),
    ] = None,
    ranks: Annotated[list[int], typer.Option(help="Group sizes.")] = [8],  # noqa: B006
    domains: Annotated[
        int, typer.Option(help="NVLink domains that the ranks of a group are in.")
    ] = 1,
    hidden: Annotated[list[int], typer.Option(help="Elements a row.")] = [7168],  # noqa: B006
    topk: show.Topk = 8,
    experts: Annotated[
        int,
        typer.Option(help="Over all ranks: also rows by expert, and what epjit.moe has; 0 = not."),
    ] = 0,
    dtype: Annotated[list[Dtype], typer.Option(help="Rows of dispatch.")] = [  # noqa: B006
        Dtype.bf16,
        Dtype.fp8,
    ],
    cast: Annotated[
        list[str] | None,
        typer.Option(help="Also dispatches that cast bf16 and fp16 rows to this format."),
    ] = None,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Also the calls of ElasticBuffer; see --experts.")
    ] = False,
    low_latency: Annotated[
        bool, typer.Option("--low-latency", help="The low-latency kernels instead; see --experts.")
    ] = False,
    logfmt: Annotated[
        bool, typer.Option("--logfmt", help="With --low-latency: also combine with use_logfmt.")
    ] = False,
    weights_sent: Annotated[
        bool,
        typer.Option(
            "--weights-sent",
            help="With --low-latency: also combine when the dispatch was given the weights.",
        ),
    ] = False,
    topk_bits: Annotated[int, typer.Option(help="64 or 32: width of a choice.")] = 64,
) -> None:
    """Compile the kernels of given shapes into the cache; needs no GPU."""
    if topk_bits not in (32, 64):
        raise ValueError(f"--topk-bits is {topk_bits}, but must be 32 or 64")
    gpus = dict.fromkeys(map(_full_name, arch), "") if arch else _default_archs()
    if low_latency and not experts:
        raise ValueError("--low-latency needs --experts: its kernels are compiled for their number")
    if elastic and not experts:
        raise ValueError("--elastic needs --experts: its calls have rows by expert")
    if low_latency and (cast or elastic):
        raise ValueError(
            "--cast and --elastic are of the normal mode; --dtype names the formats that "
            "low-latency calls cast rows to"
        )
    casts = _casts(cast or (), dtype)
    calls = [
        Calls(elements, each, topk, experts, topk_bits == 64, logfmt, weights_sent, casts, elastic)
        for elements in hidden
        for each in dtype
    ]
    kernels = _low_latency if low_latency else _normal
    jobs = dict.fromkeys(
        (config, each)
        for each, gpu in gpus.items()
        for num_ranks in ranks
        for config in kernels(Group(num_ranks, domains, each, gpu), calls)
    )
    compiled = _compile(list(jobs))
    typer.echo(
        f"{len(jobs)} kernels for {', '.join(gpus)}: {compiled} compiled, "
        f"{len(jobs) - compiled} were in the cache"
    )


class Group(NamedTuple):
    """The ranks that make Buffers, and their GPUs."""

    num_ranks: int
    domains: int
    arch: str
    gpu: str

    @property
    def num_local(self) -> int:
        """Ranks of an NVLink domain."""
        return self.num_ranks // self.domains

    def check(self) -> None:
        """Refuses domains of unequal size."""
        from epjit.config import MAX_DOMAINS

        if not 1 <= self.domains <= MAX_DOMAINS or self.num_ranks % self.domains:
            raise ValueError(
                f"--domains is {self.domains}, but must be 1 to {MAX_DOMAINS} and divide "
                f"{self.num_ranks} ranks: all NVLink domains have the same number"
            )


class Calls(NamedTuple):
    """Calls of one kind, as the options describe them."""

    hidden: int
    dtype: Dtype
    topk: int
    experts: int
    topk_is_int64: bool
    logfmt: bool
    weights_sent: bool
    casts: tuple[RowFormat, ...] = ()
    elastic: bool = False

    @property
    def is_by_expert(self) -> bool:
        """Whether there are kernels of rows by expert for them."""
        from epjit.config import MAX_EXPERTS_BY_EXPERT

        return self.topk > 0 and 0 < self.experts <= MAX_EXPERTS_BY_EXPERT

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the normal mode."""
        return self.hidden * (1 if self.dtype is Dtype.fp8 else 2)

    def check(self, group: Group) -> None:
        """Refuses calls that no Buffer of these ranks takes."""
        from epjit.config import (
            MAX_EXPERTS,
            MAX_EXPERTS_BY_EXPERT,
            MAX_RANKS,
            MAX_TOPK,
            check_row_bytes,
        )

        if not 1 <= group.num_local <= MAX_RANKS or not 0 <= self.topk <= MAX_TOPK:
            raise ValueError(
                f"{group.num_local} ranks and top-{self.topk}: there are kernels for 1 to "
                f"{MAX_RANKS} ranks of one NVLink domain and up to top-{MAX_TOPK}; see --domains"
            )
        what = f"a row of {self.hidden} {self.dtype.value} has {self.row_bytes} bytes"
        check_row_bytes(what, self.row_bytes)
        if not 0 <= self.experts <= MAX_EXPERTS or self.experts % group.num_ranks:
            raise ValueError(
                f"--experts is {self.experts}, no multiple of {group.num_ranks} ranks up to "
                f"{MAX_EXPERTS}"
            )
        if self.elastic and not self.is_by_expert:
            raise ValueError(
                f"--elastic with {self.experts} experts and top-{self.topk}: there are rows by "
                f"expert for 1 to {MAX_EXPERTS_BY_EXPERT} experts, and top-k is at least 1"
            )
        if self.casts and group.domains > 1 and not self.is_by_expert:
            raise ValueError(
                f"--cast {self.casts[0].name} with {group.domains} NVLink domains: between them "
                "only rows by expert are cast; add --experts"
            )


def _casts(names: Sequence[str], dtypes: Sequence[Dtype]) -> tuple[RowFormat, ...]:
    """The formats of these names."""
    from epjit.checks.normal import format_of

    if names and not {Dtype.bf16, Dtype.fp16} & set(dtypes):
        raise ValueError(
            f"--cast {names[0]} with --dtype {' '.join(each.value for each in dtypes)}: only bf16 "
            "and fp16 rows are cast"
        )
    return tuple(map(format_of, names))


def _normal(group: Group, calls: Sequence[Calls]) -> Iterator[KernelConfig]:
    """Kernels that a Buffer compiles when it is made, and for calls of the normal mode."""
    from epjit import env
    from epjit.checks.normal import check_cast
    from epjit.kernels import elastic, expert_major, internode, intranode
    from epjit.kernels.shapes import AnyShape, warmup_shapes

    group.check()
    ranks, domains, arch, gpu = group
    shapes: list[AnyShape] = []
    for each in calls:
        if each.dtype not in _NORMAL:
            name = each.dtype.value
            raise ValueError(f"rows of {name} are of the low-latency mode: add --low-latency")
        each.check(group)
        is_f16, is_fp8 = each.dtype is Dtype.fp16, each.dtype is Dtype.fp8
        for row_format in (None, *(() if is_fp8 else each.casts)):
            if row_format is not None:
                check_cast(each.hidden, row_format)
            shapes += warmup_shapes(
                each.row_bytes,
                num_topk=each.topk,
                num_scales=each.hidden // 128 if is_fp8 else 0,
                topk_is_int64=each.topk_is_int64,
                is_f16=is_f16,
                row_format=row_format,
                expert_major=each.is_by_expert,
            )
        if each.elastic and not is_fp8:
            shapes += elastic.warmup_shapes(
                each.row_bytes,
                num_topk=each.topk,
                topk_is_int64=each.topk_is_int64,
                is_f16=is_f16,
            )
    if domains == 1:
        yield from intranode.kernels_of(shapes, num_ranks=ranks, arch=arch, gpu=gpu)
    else:
        local = group.num_local
        found = internode.kernels_of(shapes, num_domains=domains, num_local=local, arch=arch)
        yield from found
        if env.transport() != "loopback" and not env.nvshmem_ib_enable_ibgda():
            yield from (each for each in map(internode.for_proxy, found) if each not in found)
    for each in calls:
        if each.experts and each.dtype is not Dtype.fp8:
            yield from expert_major.kernels_of(
                each.row_bytes,
                num_topk=each.topk,
                is_f16=each.dtype is Dtype.fp16,
                topk_is_int64=each.topk_is_int64,
                arch=arch,
            )
        if each.elastic and each.dtype is not Dtype.fp8:
            yield from elastic.kernels_of(
                each.row_bytes,
                num_topk=each.topk,
                is_f16=each.dtype is Dtype.fp16,
                topk_is_int64=each.topk_is_int64,
            )


def _low_latency(group: Group, calls: Sequence[Calls]) -> Iterator[KernelConfig]:
    """Kernels that a Buffer compiles when it is made, and for low-latency calls."""
    from epjit.checks.low_latency import check_variants
    from epjit.formats import BF16, FORMATS, LOGFMT_BLOCK
    from epjit.kernels import low_latency

    yield from _normal(group, ())
    formats = {each.name: each for each in FORMATS}
    for each in calls:
        each.check(group)
        check_variants(num_domains=group.domains, enable_shrink=False)
        row_format = formats.get(each.dtype.value, BF16)
        granularity = max(row_format.granularity, LOGFMT_BLOCK if each.logfmt else 1)
        if each.dtype is Dtype.fp16 or each.topk < 1 or each.hidden % granularity:
            raise ValueError(
                f"low-latency rows of {each.hidden} {each.dtype.value} with top-{each.topk}: there "
                f"is no fp16, these rows have a multiple of {granularity} channels, and top-k is "
                "at least 1"
            )
        ways = [(False, False), (True, False), (False, True)]  # logfmt, weights sent
        for use_logfmt, sent in compress(ways, (True, each.logfmt, each.weights_sent)):
            shapes = low_latency.warmup_shapes(
                hidden=each.hidden,
                num_experts=each.experts,
                num_topk=each.topk,
                topk_is_int64=each.topk_is_int64,
                row_format=row_format,
                use_logfmt=use_logfmt,
                weights_sent=sent,
            )
            yield from low_latency.kernels_of(
                shapes, num_ranks=group.num_ranks, arch=group.arch, remote=group.domains > 1
            )


def _compile(jobs: Sequence[tuple[KernelConfig, str]]) -> int:
    """Compiles each kernel for its architecture; returns how many were not in the cache."""
    from epjit import env
    from epjit.runtime import nvshmem_device
    from epjit.runtime.cache import CubinCache
    from epjit.runtime.kernel import compile_kernel
    from epjit.runtime.nvrtc import version

    # auto takes loopback only for ranks of one process
    body = "loopback" if env.transport() == "loopback" else "nvshmem"
    version()  # NVRTC is missing: say so once, before anything starts
    if body == "nvshmem" and any(config.needs_transport for config, _ in jobs):
        nvshmem_device.key()  # so for NVSHMEM
    CubinCache().prepare()  # a call would do without one, and this would be in vain
    compiled = 0
    workers = ThreadPoolExecutor(os.cpu_count() or 1)
    with show.steps(len(jobs)) as steps, workers:
        pending = {
            workers.submit(compile_kernel, config, arch=each, body=body): (config, each)
            for config, each in jobs
        }
        for done in as_completed(pending):
            config, each = pending[done]
            from_cache = done.result().from_cache
            compiled += not from_cache
            steps.next(f"{each} {config.tag}.{config.op}{' (cached)' if from_cache else ''}")
    return compiled


def _full_name(arch: str) -> str:
    """The name by which a GPU asks: from sm_90 on with an `a`."""
    from epjit.arch import arch_name, arch_number

    number = arch_number(arch)
    return arch_name(*divmod(number, 10)) if arch[-1].isdigit() else arch


def _default_archs() -> dict[str, str]:
    """Architectures, with the product name where it is that of a GPU here."""
    from epjit import env
    from epjit.runtime import device

    if env.torch_cuda_arch_list():
        return dict.fromkeys(env.torch_cuda_arch_list(), "")
    try:
        archs = {device.arch_of(index): device.name(index) for index in range(device.count())}
    except RuntimeError as error:
        raise ValueError(f"no GPU to compile for ({error}); name one: --arch sm_90a") from error
    if not archs:
        raise ValueError("no GPU to compile for; name one: --arch sm_90a")
    return archs
