"""`warmup`: compile ahead, on any machine, for any architecture."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from epjit.cli import show

if TYPE_CHECKING:
    from epjit.kernels.shapes import CombineShape, DispatchShape
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
    topk: Annotated[int, typer.Option(help="Choices a token.")] = 8,
    experts: Annotated[
        int, typer.Option(help="Over all ranks: also the kernels of epjit.moe; 0 = not.")
    ] = 0,
    dtype: Annotated[list[Dtype], typer.Option(help="Rows of dispatch.")] = [  # noqa: B006
        Dtype.bf16,
        Dtype.fp8,
    ],
    low_latency: Annotated[
        bool, typer.Option("--low-latency", help="The low-latency kernels instead; see --experts.")
    ] = False,
    logfmt: Annotated[
        bool, typer.Option("--logfmt", help="With --low-latency: also combine with use_logfmt.")
    ] = False,
    topk_bits: Annotated[int, typer.Option(help="64 or 32: width of a choice.")] = 64,
) -> None:
    """Compile the kernels of given shapes into the cache; needs no GPU."""
    from epjit import env
    from epjit.runtime import nvshmem_device
    from epjit.runtime.cache import CubinCache
    from epjit.runtime.kernel import compile_kernel
    from epjit.runtime.nvrtc import version

    if topk_bits not in (32, 64):
        raise ValueError(f"--topk-bits is {topk_bits}, but must be 32 or 64")
    gpus = dict.fromkeys(map(_full_name, arch), "") if arch else _default_archs()
    archs = list(gpus)
    jobs = [
        (config, each)
        for each, gpu in gpus.items()
        for config in configs(
            each,
            gpu,
            ranks=ranks,
            domains=domains,
            hidden=hidden,
            topk=topk,
            experts=experts,
            dtypes=dtype,
            wide=topk_bits == 64,
            low_latency=low_latency,
            logfmt=logfmt,
        )
    ]
    # auto takes loopback only for ranks of one process
    transport = "loopback" if env.transport() == "loopback" else "nvshmem"
    version()  # NVRTC is missing: say so once, before anything starts
    if transport == "nvshmem" and any(config.transport for config, _ in jobs):
        nvshmem_device.key()  # so for NVSHMEM
    CubinCache().prepare()  # a call would do without one, and this would be in vain
    compiled = 0
    workers = ThreadPoolExecutor(os.cpu_count() or 1)
    with show.steps(len(jobs)) as steps, workers:
        pending = {
            workers.submit(compile_kernel, config, arch=each, transport=transport): (config, each)
            for config, each in jobs
        }
        for done in as_completed(pending):
            config, each = pending[done]
            from_cache = done.result().from_cache
            compiled += not from_cache
            steps.next(f"{each} {config.tag}.{config.op}{' (cached)' if from_cache else ''}")
    typer.echo(
        f"{len(jobs)} kernels for {', '.join(archs)}: {compiled} compiled, "
        f"{len(jobs) - compiled} were in the cache"
    )


def configs(
    arch: str,
    gpu: str,
    *,
    ranks: Iterable[int],
    domains: int,
    hidden: Iterable[int],
    topk: int,
    experts: int,
    dtypes: Iterable[Dtype],
    wide: bool,
    low_latency: bool = False,
    logfmt: bool = False,
) -> list[KernelConfig]:
    """What Buffers of these shapes compile on an architecture, each kernel once.

    Raises:
        ValueError: A shape that no Buffer takes.
    """
    from epjit.config import MAX_DOMAINS, MAX_EXPERTS, MAX_RANKS, MAX_ROW_BYTES, MAX_TOPK
    from epjit.kernels import expert_major
    from epjit.kernels.shapes import warmup_shapes

    found: dict[KernelConfig, None] = {}
    if low_latency and not experts:
        raise ValueError("--low-latency needs --experts: its kernels are compiled for their number")
    for num_ranks in ranks:
        if not 1 <= domains <= MAX_DOMAINS or num_ranks % domains:
            raise ValueError(
                f"--domains is {domains}, but must be 1 to {MAX_DOMAINS} and divide {num_ranks} "
                "ranks: all NVLink domains have the same number"
            )
        found |= dict.fromkeys(_normal([], num_ranks, domains, arch, gpu))  # of every Buffer
        for elements in hidden:
            for dtype in dtypes:
                if not low_latency and dtype not in _NORMAL:
                    raise ValueError(
                        f"rows of {dtype.value} are of the low-latency mode: add --low-latency"
                    )
                row_bytes = elements * (1 if dtype is Dtype.fp8 else 2)
                num_local = num_ranks // domains
                if not 1 <= num_local <= MAX_RANKS or not 0 <= topk <= MAX_TOPK:
                    raise ValueError(
                        f"{num_local} ranks and top-{topk}: there are kernels for 1 to "
                        f"{MAX_RANKS} ranks of one NVLink domain and up to top-{MAX_TOPK}; see "
                        "--domains"
                    )
                if row_bytes <= 0 or row_bytes % 16 or row_bytes > MAX_ROW_BYTES:
                    raise ValueError(
                        f"a row of {elements} {dtype.value} has {row_bytes} bytes, but must have a "
                        f"multiple of 16, at most {MAX_ROW_BYTES}"
                    )
                if not 0 <= experts <= MAX_EXPERTS or experts % num_ranks:
                    raise ValueError(
                        f"--experts is {experts}, no multiple of {num_ranks} ranks up to "
                        f"{MAX_EXPERTS}"
                    )
                if low_latency:
                    found |= dict.fromkeys(
                        _low_latency(
                            num_ranks,
                            domains,
                            arch,
                            elements,
                            experts,
                            topk,
                            dtype=dtype,
                            wide=wide,
                            logfmt=logfmt,
                        )
                    )
                    continue
                shapes = warmup_shapes(
                    row_bytes,
                    num_topk=topk,
                    num_scales=elements // 128 if dtype is Dtype.fp8 else 0,
                    topk_is_int64=wide,
                    is_f16=dtype is Dtype.fp16,
                )
                found |= dict.fromkeys(_normal(shapes, num_ranks, domains, arch, gpu))
                if not experts or dtype is Dtype.fp8:
                    continue
                by_expert = expert_major.warmup_configs(
                    row_bytes,
                    num_topk=topk,
                    num_experts=experts // num_ranks,
                    is_f16=dtype is Dtype.fp16,
                    topk_is_int64=wide,
                    arch=arch,
                )
                found |= dict.fromkeys(by_expert)
    return list(found)


def _normal(
    shapes: Iterable[DispatchShape | CombineShape],
    num_ranks: int,
    domains: int,
    arch: str,
    gpu: str,
) -> list[KernelConfig]:
    """What a Buffer compiles when it is made and for these shapes."""
    from epjit.kernels import internode, intranode

    if domains == 1:
        return intranode.warmup_configs(shapes, num_ranks=num_ranks, arch=arch, gpu=gpu)
    return internode.warmup_configs(
        shapes, num_domains=domains, num_local=num_ranks // domains, arch=arch
    )


def _low_latency(
    num_ranks: int,
    domains: int,
    arch: str,
    hidden: int,
    experts: int,
    topk: int,
    *,
    dtype: Dtype,
    wide: bool,
    logfmt: bool,
) -> list[KernelConfig]:
    """What low-latency calls compile."""
    from epjit.checks.low_latency import check_variant
    from epjit.formats import BF16, FORMATS
    from epjit.kernels import low_latency

    check_variant(domains)
    row_format = {each.name: each for each in FORMATS}.get(dtype.value, BF16)
    granularity = max(row_format.granularity, 128 if logfmt else 1)
    if dtype is Dtype.fp16 or topk < 1 or hidden % granularity:
        raise ValueError(
            f"low-latency rows of {hidden} {dtype.value} with top-{topk}: there is no fp16, these "
            f"rows have a multiple of {granularity} channels, and top-k is at least 1"
        )
    shapes = [
        shape
        for use_logfmt in (False, True)[: 1 + logfmt]
        for shape in low_latency.warmup_shapes(
            hidden=hidden,
            num_experts=experts,
            num_topk=topk,
            topk_is_int64=wide,
            row_format=row_format,
            use_logfmt=use_logfmt,
        )
    ]
    return list(
        low_latency.warmup_configs(shapes, num_ranks=num_ranks, arch=arch, remote=domains > 1)
    )


def _full_name(arch: str) -> str:
    """What a GPU asks for: from sm_90 on with an `a`."""
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
