"""`python -m epjit warmup` compiles what a Buffer of that topology then asks the cache for.

The compilers are fakes, the cache is not: what is real is compiled in tests/cpu/test_compile.py.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from epjit import Buffer, ElasticBuffer
from epjit.cli import app
from epjit.kernels import elastic, expert_major
from epjit.kernels.expert_major import passes_of
from epjit.kernels.shapes import DispatchShape, ExpertCombineShape, ExpertDispatchShape
from epjit.modes.chosen import ChosenKernels
from epjit.runtime import kernel, nvjitlink, nvrtc, nvshmem
from epjit.runtime import transport as transports
from epjit.runtime.kernel import KernelConfig, compile_kernel
from tests.cpu.fake_gpu import Twin, fake_gpu
from tests.harness import launch

ARCH, RANKS, HIDDEN, TOPK, EXPERTS = "sm_90a", 4, 512, 2, 8
SHAPE = ["--arch", ARCH, "--ranks", RANKS, "--hidden", HIDDEN, "--topk", TOPK, "--dtype", "bf16"]


@pytest.fixture(autouse=True)
def fake_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, filled by compilers that say only that they were asked."""
    monkeypatch.setenv("EPJIT_CACHE_DIR", str(tmp_path))

    def compile_unit(*args: Any, **options: Any) -> tuple[bytes, str, str]:
        return b"code", "symbol", "Used 8 registers"

    monkeypatch.setattr(nvrtc, "compile_unit", compile_unit)
    monkeypatch.setattr(nvjitlink, "link", lambda *args, **options: (b"linked", "Used 8 registers"))


def warm_up(*arguments: object) -> str:
    """Runs the command; returns what it said."""
    result = CliRunner().invoke(app, ["warmup", *map(str, [*SHAPE, *arguments])])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def asked_by_buffer(
    num_domains: int,
    patch: pytest.MonkeyPatch,
    *,
    is_low_latency: bool,
    through_proxy: bool,
    **calls: Any,
) -> list[tuple[KernelConfig, str]]:
    """The kernels that a Buffer makes, at once and for `calls` of SHAPE, with their transport."""
    asked: dict[tuple[KernelConfig, str], None] = {}

    def stands_in(*args: Any, num_qps_per_rank: int, may_lose_ranks: bool, **options: Any) -> Any:
        made = transports.LoopbackTransport(*args, **options)
        made.body, made.through_proxy = "nvshmem", through_proxy
        return made

    patch.setattr(transports, "NvshmemTransport", stands_in)
    patch.setattr(nvshmem, "attach", lambda module: None)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "")
    with fake_gpu(patch) as gpu:

        def compile_for(config: KernelConfig, *, arch: str, body: str) -> kernel.Compiled:
            assert arch == ARCH
            asked[config, body] = None
            return gpu.compile(config)

        patch.setattr(kernel, "compile_kernel", compile_for)
        options: dict[str, Any] = {"comm": Twin(gpu, RANKS), "nvlink_domain": RANKS // num_domains}
        if num_domains > 1 or is_low_latency:
            options["num_rdma_bytes"] = 1 << 24
        with Buffer(None, 1 << 24, low_latency_mode=is_low_latency, **options) as buffer:
            if is_low_latency:
                for sent in (False, True):
                    buffer.low_latency_warmup(
                        8, HIDDEN, EXPERTS, num_topk=TOPK, use_fp8=False, weights_sent=sent
                    )
            else:
                buffer.warmup(2 * HIDDEN, num_topk=TOPK, **calls)
    return list(asked)


@pytest.mark.parametrize("is_low_latency", [False, True], ids=["normal", "low_latency"])
@pytest.mark.parametrize(
    ("domains", "transport", "ibgda"),
    [(1, "nvshmem", "0"), (2, "nvshmem", "0"), (2, "nvshmem", "1"), (2, "loopback", "0")],
    ids=["one_domain", "nvshmem", "ibgda", "loopback"],
)
def test_what_is_warmed_is_what_a_buffer_asks_for(
    domains: int,
    transport: str,
    ibgda: str,
    is_low_latency: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without IBGDA a Buffer may find, between hosts, that a thread of the CPU posts, or not."""
    monkeypatch.setenv("EPJIT_TRANSPORT", transport)
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", ibgda)
    more = ["--low-latency", "--weights-sent", "--experts", EXPERTS] if is_low_latency else []
    said = warm_up("--domains", domains, *more)
    asked: set[tuple[KernelConfig, str]] = set()
    for through_proxy in {False, transport == "nvshmem" and ibgda == "0"}:
        with monkeypatch.context() as patch:
            asked |= set(
                asked_by_buffer(
                    domains, patch, is_low_latency=is_low_latency, through_proxy=through_proxy
                )
            )
    monkeypatch.setenv("EPJIT_ASSERT_COMPILE", "1")
    for config, body in asked:
        assert compile_kernel(config, arch=ARCH, body=body).from_cache, config
    assert f"{len(asked)} kernels for {ARCH}: {len(asked)} compiled" in said, "and no other"
    assert any(config.needs_transport for config, _ in asked) is (domains > 1)


@pytest.mark.parametrize("cast", [None, "mxfp8"])
def test_calls_by_expert_and_casts_compile_nothing_once_warm(
    cast: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all kinds that `warmup` names; new kernels would be refused in a capture."""
    options: dict[str, Any] = {"cast": cast, "expert_major": True}
    with monkeypatch.context() as patch, fake_gpu(patch) as gpu:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "")
        asked: list[KernelConfig] = []

        def compile_for(config: KernelConfig, **_: Any) -> kernel.Compiled:
            asked.append(config)
            return gpu.compile(config)

        patch.setattr(kernel, "compile_kernel", compile_for)
        with Buffer(None, 1 << 24, comm=Twin(gpu, RANKS)) as buffer:
            buffer.warmup(2 * HIDDEN, num_topk=TOPK, **options)
            mode: Any = buffer._mode
            found = set(asked)
            assert len(found) == len(asked), "none twice"
            for num_scales, code in ((0, 0), *([(HIDDEN // 128, 4)] if cast else ())):
                row_bytes = HIDDEN if code else 2 * HIDDEN
                for topk in (0, TOPK):
                    mode.launch(DispatchShape(row_bytes, num_scales, topk, True, code))
                for cached, weights in itertools.product((False, True), repeat=2):
                    of_rows = row_bytes, num_scales, TOPK, True, cached, weights, code
                    mode.launch(ExpertDispatchShape(*of_rows))
            for weighted, weights in itertools.product((False, True), repeat=2):
                mode.launch(ExpertCombineShape(2 * HIDDEN, TOPK, False, weighted, weights))
            assert set(asked) == found
            assert {each.order for each in found if each.op == "notify"} == {
                "by_expert",
                "intranode",
            }


@pytest.mark.parametrize("cast", [None, "fp8_row"])
@pytest.mark.parametrize("domains", [1, 2])
def test_rows_by_expert_and_casts_come_too(
    domains: int, cast: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between domains with their second pass; beside them there is only what `epjit.moe` has."""
    monkeypatch.setenv("EPJIT_TRANSPORT", "loopback")
    options = [] if cast is None else ["--cast", cast]
    said = warm_up("--domains", domains, "--experts", EXPERTS, *options)
    with monkeypatch.context() as patch:
        flags = {"is_low_latency": False, "through_proxy": False}
        asked = asked_by_buffer(domains, patch, **flags, expert_major=True, cast=cast)
    monkeypatch.setenv("EPJIT_ASSERT_COMPILE", "1")
    for config, body in asked:
        assert compile_kernel(config, arch=ARCH, body=body).from_cache, config
    shape: dict[str, Any] = {"num_topk": TOPK, "is_f16": False, "topk_is_int64": True}
    local = expert_major.kernels_of(2 * HIDDEN, **shape, arch=ARCH)
    assert any(isinstance(config, expert_major.CastConfig) for config, _ in asked) is (
        cast is not None and domains > 1
    )
    assert int(said.split()[0]) == len({config for config, _ in asked} | set(local))


@pytest.mark.parametrize("domains", [1, 2])
def test_calls_of_an_elastic_buffer_come_too(domains: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls run on the CPU backend, which knows the kernels that a GPU would run."""
    monkeypatch.setenv("EPJIT_TRANSPORT", "loopback")
    warm_up("--domains", domains, "--experts", EXPERTS, "--elastic")
    choose, shapes = ChosenKernels.launch, dict[Any, None]()

    def chosen(self: ChosenKernels, shape: Any) -> Any:
        shapes[choose(self, shape)] = None
        for config in passes_of(shape, ARCH) if domains > 1 else ():
            shapes[config] = None
        return choose(self, shape)

    monkeypatch.setattr(ChosenKernels, "launch", chosen)
    monkeypatch.setenv("EPJIT_NVLINK_DOMAIN", str(RANKS // domains))
    launch.run_threads(elastic_calls, RANKS)
    own = elastic.kernels_of(2 * HIDDEN, num_topk=TOPK, topk_is_int64=True, is_f16=False)
    monkeypatch.setenv("EPJIT_ASSERT_COMPILE", "1")
    assert len(shapes) > 6
    for config in (*shapes, *own):
        assert compile_kernel(config, arch=ARCH, body="loopback").from_cache, config


def elastic_calls(comm: Any) -> None:
    """A call of each kind; ranks may sum their rows of a token before they travel, or not."""
    for sums in (False, True):
        buffer = ElasticBuffer(None, 1 << 24, comm=comm, allow_multiple_reduction=sums)
        x = torch.randn(8, HIDDEN).bfloat16()
        idx = torch.rand(8, EXPERTS).topk(TOPK).indices
        weights = torch.rand(8, TOPK)
        buffer.barrier()
        for expand in (False, True):
            for each in (None, weights):
                got, _, of_rows, handle, _ = buffer.dispatch(
                    x,
                    topk_idx=idx,
                    topk_weights=each,
                    num_experts=EXPERTS,
                    do_expand=expand,
                    num_max_tokens_per_rank=8,
                )
                buffer.dispatch(x, topk_weights=each, handle=handle)
                buffer.combine(got, handle, topk_weights=of_rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--domains", "3"], r"--domains is 3, but must be 1 to 32 and divide 4 ranks"),
        (["--domains", "0"], r"--domains is 0, but"),
        (["--cast", "fp6"], r"cast is 'fp6', but must be None or one of fp8"),
        (["--cast", "fp8", "--hidden", "64"], r"64"),
        (["--cast", "fp8", "--domains", "2"], r"only rows by expert are cast; add --experts"),
        (["--cast", "fp8", "--low-latency", "--experts", "8"], r"--cast and --elastic are of the"),
        (["--elastic"], r"--elastic needs --experts"),
        (["--elastic", "--experts", "8", "--topk", "0"], r"top-0: there are rows by expert for"),
        (["--domains", "2", "--ranks", "18"], r"9 ranks and top-2: there are kernels for 1 to 8"),
    ],
)
def test_refuses(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        warm_up(*arguments)


def test_refuses_a_variant_of_one_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_LOW_LATENCY_COMBINE_VARIANT", "reduced")
    with pytest.raises(ValueError, match="works in one NVLink domain only"):
        warm_up("--domains", 2, "--low-latency", "--experts", EXPERTS)


def test_without_nvshmem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An error says what to install, before anything is compiled; loopback needs none."""
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    with pytest.raises((ImportError, RuntimeError), match=r"cu13-rdma|NVSHMEM_DIR"):
        warm_up("--domains", 2)
    assert not os.listdir(tmp_path)
    monkeypatch.setenv("EPJIT_TRANSPORT", "loopback")
    assert "7 compiled" in warm_up("--domains", 2)
