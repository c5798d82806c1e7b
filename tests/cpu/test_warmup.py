"""What `python -m epjit warmup` compiles is what a Buffer of that topology then asks the cache for.

The compilers are fakes, the cache is not: what is real is compiled in tests/cpu/test_compile.py.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from epjit.cli import app
from epjit.formats import BF16
from epjit.kernels import shapes
from epjit.modes import internode, intranode, layout, low_latency, normal
from epjit.runtime import nvjitlink, nvrtc
from epjit.runtime.group import Group
from epjit.runtime.kernel import KernelConfig, compile_kernel
from epjit.runtime.topology import Topology

ARCH, RANKS, HIDDEN, TOPK, EXPERTS = "sm_90a", 4, 512, 2, 8
SHAPE = ["--arch", ARCH, "--ranks", RANKS, "--hidden", HIDDEN, "--topk", TOPK, "--dtype", "bf16"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fake_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, filled by compilers that say only that they were asked."""
    monkeypatch.setenv("EPJIT_CACHE_DIR", str(tmp_path))

    def compile_unit(*args: Any, **options: Any) -> tuple[bytes, str, str]:
        return b"code", "symbol", "Used 8 registers"

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_unit)
    monkeypatch.setattr(nvrtc, "compile_ltoir", compile_unit)
    monkeypatch.setattr(nvjitlink, "link", lambda *args, **options: (b"linked", "Used 8 registers"))


def warm_up(*arguments: object) -> str:
    """What the command said."""
    result = CliRunner().invoke(app, ["warmup", *map(str, [*SHAPE, *arguments])])
    if result.exception is not None:
        raise result.exception
    return result.stdout


class FakeGroup(Group):
    """Rank 0, whose peers agree with it."""

    rank, size = 0, RANKS

    def allgather(self, obj: Any, *, op: str = "Buffer") -> list[Any]:
        return [obj] * self.size

    def barrier(self, *, op: str = "Buffer") -> None:
        """Nobody is missing."""


def asked_by_buffer(
    topology: Topology, transport: str, patch: pytest.MonkeyPatch, *, is_low_latency: bool
) -> list[tuple[KernelConfig, str]]:
    """The kernels that a Buffer makes, at once and for the calls of SHAPE, with their transport."""
    asked = []

    def kernel(config: KernelConfig, *, device: int, transport: str = "nvshmem") -> Any:
        asked.append((config, transport))
        return SimpleNamespace(config=config)

    def memory(*args: Any, **options: Any) -> Any:
        return SimpleNamespace(ptr=0, peer_ptrs=[0] * RANKS, close=None)

    def fake(*args: Any, **options: Any) -> Any:
        return SimpleNamespace(device_ptr=0, close=None)

    reach = SimpleNamespace(
        name=transport, context=0, pes=list(range(RANKS)), allocate=memory, close=None
    )
    for module in (layout, normal, low_latency, intranode, internode):
        for name, value in {
            "Kernel": kernel,
            "Launch": lambda kernel, **bound: SimpleNamespace(kernel=kernel),
            "FaultRecord": fake,
            "PinnedArray": fake,
            "SymmetricMemory": memory,
            "arch_of": lambda device: ARCH,
            "num_sms": lambda device: 132,
            "make_transport": lambda *args, **options: reach,
        }.items():
            patch.setattr(module, name, value, raising=False)
    patch.setattr(torch.cuda, "synchronize", lambda device: None)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "")
    several = topology.num_domains > 1
    options: dict[str, Any] = {"device": CPU, "timeout_seconds": 1.0, "use_fabric": False}
    group: Any = FakeGroup()
    layout.Layout(RANKS, CPU, topology.domains if several else None)
    mode: Any
    if several:
        options["num_qps_per_rank"] = 1
        mode = internode.Internode(
            group, topology, ExitStack(), num_nvl_bytes=1 << 30, num_rdma_bytes=1 << 30, **options
        )
    else:
        mode = intranode.Intranode(group, ExitStack(), num_nvl_bytes=1 << 30, **options)
    if not is_low_latency:
        for shape in shapes.warmup_shapes(
            2 * HIDDEN, num_topk=TOPK, num_scales=0, topk_is_int64=True, is_f16=False
        ):
            mode.launch(shape)
        return asked
    options["num_qps_per_rank"] = 1
    low_latency.LowLatency(
        group, topology, ExitStack(), num_rdma_bytes=1 << 30, enable_shrink=False, **options
    ).warmup(
        max_tokens=8,
        hidden=HIDDEN,
        num_experts=EXPERTS,
        num_topk=TOPK,
        topk_is_int64=True,
        row_format=BF16,
        use_logfmt=False,
        archs=(),
    )
    return asked


@pytest.mark.parametrize("is_low_latency", [False, True], ids=["normal", "low_latency"])
@pytest.mark.parametrize(
    ("domains", "transport"),
    [(((0, 1, 2, 3),), "nvshmem"), (((0, 1), (2, 3)), "nvshmem"), (((0, 1), (2, 3)), "loopback")],
    ids=["one_domain", "nvshmem", "loopback"],
)
def test_what_is_warmed_is_what_a_buffer_asks_for(
    domains: tuple[tuple[int, ...], ...],
    transport: str,
    is_low_latency: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EPJIT_TRANSPORT", "auto" if transport == "nvshmem" else transport)
    more = ["--low-latency", "--experts", EXPERTS] if is_low_latency else []
    said = warm_up("--domains", len(domains), *more)
    with monkeypatch.context() as patch:
        asked = asked_by_buffer(
            Topology(0, domains), transport, patch, is_low_latency=is_low_latency
        )
    monkeypatch.setenv("EPJIT_ASSERT_COMPILE", "1")
    for config, body in asked:
        assert compile_kernel(config, arch=ARCH, transport=body).from_cache, config
    assert f"{len(asked)} kernels for {ARCH}: {len(asked)} compiled" in said, "and no other"
    assert any(config.transport for config, _ in asked) is (len(domains) > 1)


def test_rows_by_expert_come_too() -> None:
    alone = int(warm_up("--domains", 2).split()[0])
    assert f"{alone + 4} kernels" in warm_up("--domains", 2, "--experts", EXPERTS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--domains", "3"], r"--domains is 3, but must be 1 to 32 and divide 4 ranks"),
        (["--domains", "0"], r"--domains is 0, but"),
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
    """What to install, before anything is compiled; loopback needs none."""
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    with pytest.raises((ImportError, RuntimeError), match=r"cu13-rdma|NVSHMEM_DIR"):
        warm_up("--domains", 2)
    assert not os.listdir(tmp_path)
    monkeypatch.setenv("EPJIT_TRANSPORT", "loopback")
    assert "7 compiled" in warm_up("--domains", 2)
