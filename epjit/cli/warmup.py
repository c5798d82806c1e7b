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
    from epjit.runtime.jit import KernelConfig


class Dtype(str, Enum):
    """Rows of dispatch."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"


def warmup(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as sm_90a, once for each. Default: TORCH_CUDA_ARCH_LIST, else the GPUs here."
        ),
    ] = None,
    ranks: Annotated[list[int], typer.Option(help="Group sizes.")] = [8],  # noqa: B006
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
    topk_bits: Annotated[int, typer.Option(help="64 or 32: width of a choice.")] = 64,
) -> None:
    """Compile the kernels of given shapes into the cache; needs no GPU."""
    from epjit.runtime.jit import compile_kernel
    from epjit.runtime.nvrtc import version

    if topk_bits not in (32, 64):
        raise ValueError(f"--topk-bits is {topk_bits}, but must be 32 or 64")
    gpus = dict.fromkeys(arch, "") if arch else _default_archs()
    archs = list(gpus)
    jobs = [
        (config, each)
        for each, gpu in gpus.items()
        for config in configs(
            each,
            gpu,
            ranks=ranks,
            hidden=hidden,
            topk=topk,
            experts=experts,
            dtypes=dtype,
            wide=topk_bits == 64,
            low_latency=low_latency,
        )
    ]
    version()  # NVRTC is missing: say so once, before anything starts
    compiled = 0
    workers = ThreadPoolExecutor(os.cpu_count() or 1)
    with show.steps(len(jobs)) as steps, workers:
        pending = {
            workers.submit(compile_kernel, config, arch=each): (config, each)
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
    hidden: Iterable[int],
    topk: int,
    experts: int,
    dtypes: Iterable[Dtype],
    wide: bool,
    low_latency: bool = False,
) -> list[KernelConfig]:
    """What Buffers of these shapes compile on an architecture, each kernel once.

    Raises:
        ValueError: A shape that no Buffer takes.
    """
    from epjit import expert_major
    from epjit.config import MAX_RANKS, MAX_ROW_BYTES, MAX_TOPK
    from epjit.intranode import warmup_configs
    from epjit.normal_mode import warmup_shapes

    found: dict[KernelConfig, None] = {}
    if low_latency and not experts:
        raise ValueError("--low-latency needs --experts: its kernels are compiled for their number")
    for num_ranks in ranks:
        for elements in hidden:
            for dtype in dtypes:
                row_bytes = elements * (1 if dtype is Dtype.fp8 else 2)
                if not 1 <= num_ranks <= MAX_RANKS or not 0 <= topk <= MAX_TOPK:
                    raise ValueError(
                        f"{num_ranks} ranks and top-{topk}: there are kernels for 1 to "
                        f"{MAX_RANKS} ranks and up to top-{MAX_TOPK}"
                    )
                if row_bytes <= 0 or row_bytes % 16 or row_bytes > MAX_ROW_BYTES:
                    raise ValueError(
                        f"a row of {elements} {dtype.value} has {row_bytes} bytes, but must have a "
                        f"multiple of 16, at most {MAX_ROW_BYTES}"
                    )
                if experts < 0 or experts % num_ranks:
                    raise ValueError(f"--experts is {experts}, no multiple of {num_ranks} ranks")
                if low_latency:
                    found |= dict.fromkeys(
                        _low_latency(
                            num_ranks, arch, elements, experts, topk, dtype=dtype, wide=wide
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
                made = warmup_configs(shapes, num_ranks=num_ranks, arch=arch, gpu=gpu)
                found |= dict.fromkeys(made)
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


def _low_latency(
    num_ranks: int, arch: str, hidden: int, experts: int, topk: int, *, dtype: Dtype, wide: bool
) -> list[KernelConfig]:
    """What low-latency calls compile; their rows arrive as bf16 or FP8."""
    from epjit import low_latency
    from epjit.formats import BF16, FP8

    row_format = FP8 if dtype is Dtype.fp8 else BF16
    if dtype is Dtype.fp16 or topk < 1 or hidden % row_format.granularity:
        raise ValueError(
            f"low-latency rows of {hidden} {dtype.value} with top-{topk}: they are bf16 with a "
            f"multiple of {BF16.granularity} channels or fp8 with one of {FP8.granularity}, and "
            "top-k is at least 1"
        )
    shapes = low_latency.warmup_shapes(
        hidden=hidden,
        num_experts=experts,
        num_topk=topk,
        topk_is_int64=wide,
        row_format=row_format,
    )
    return list(low_latency.warmup_configs(shapes, num_ranks=num_ranks, arch=arch))


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
