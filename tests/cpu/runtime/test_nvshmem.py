"""NVSHMEM without a GPU: found, linked with a kernel, bootstrapped, and its blocks agreed upon.

Its host library is only loaded in processes of their own: it calls exit() when it does not like
something.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from epjit.errors import CommunicationError, CompileError
from epjit.formats import BF16
from epjit.kernels import internode, low_latency
from epjit.kernels.shapes import CombineShape, DispatchShape
from epjit.runtime import driver, nvrtc, nvshmem, nvshmem_device, stream
from epjit.runtime import group as groups
from epjit.runtime.heap import Heap, choose_block
from epjit.runtime.kernel import KernelConfig, compile_kernel
from epjit.runtime.network import Network
from tests.cpu.runtime.test_group import run_threads
from tests.cpu.runtime.test_kernel import CU12
from tests.harness import launch
from tests.transport.ring import RingConfig, ring_sources

ROOT = Path(__file__).resolve().parents[3]
COPIES = CU12.parents[1] / "nvshmem"
"""Versions that the Makefile puts beside CUDA 12's NVRTC: <version>-cu<major>/nvidia/nvshmem."""
ARCHS = {
    (12, "3.4.5"): ["sm_80", "sm_90a", "sm_103a"],
    (12, "3.8.0"): ["sm_90a", "sm_100a", "sm_120a"],
    (13, "3.4.5"): ["sm_90a", "sm_100a", "sm_120a"],
    (13, "3.8.0"): ["sm_80", "sm_90a", "sm_103a"],
}
"""Each architecture meets both CUDAs and both versions, sm_90a all four pairs: a link takes 3 s."""


def copy_of(version: str, cuda: int) -> Path:
    """Root of one NVSHMEM; skips, but not in CI, where it is missing."""
    folder = COPIES / f"{version}-cu{cuda}" / "nvidia" / "nvshmem"
    if not folder.is_dir() or not CU12.exists():
        reason = f"no {folder}: make .venv-cu12/.ready"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    return folder


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVSHMEM_DIR", "NVSHMEM_IB_ENABLE_IBGDA"):
        monkeypatch.delenv(name, raising=False)


def run_python(code: str | Path, *args: object, python: Path | None = None, **env: object) -> str:
    """Standard output of an interpreter."""
    done = subprocess.run(
        [python or sys.executable, *(["-c", code] if isinstance(code, str) else [code]), *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in env.items()}},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- linking


@pytest.mark.parametrize("ibgda", [0, 1], ids=["inline", "ibgda"])
@pytest.mark.parametrize("version", ["3.4.5", "3.8.0"])
@pytest.mark.parametrize("cuda", [12, 13])
def test_a_kernel_is_linked(cuda: int, version: str, ibgda: int, tmp_path: Path) -> None:
    """CUDA 12's library has no code for Blackwell: linking PTX takes minutes there, so not here."""
    archs = ARCHS[cuda, version]
    if ibgda:
        archs = ["sm_90a", "sm_103a"] if cuda == 13 else ["sm_90a"]
    out = run_python(
        Path(__file__).with_name("link_ring.py"),
        *archs,
        python=CU12 if cuda == 12 else None,
        NVSHMEM_DIR=copy_of(version, cuda),
        NVSHMEM_IB_ENABLE_IBGDA=ibgda,
        EPJIT_CACHE_DIR=tmp_path,
    )
    found = json.loads(out)
    assert found["versions"]["nvrtc"][0] == cuda
    assert found["versions"]["nvshmem"] == [int(number) for number in version.split(".")]
    wanted = {"nvshmemi_device_state_d", "nvshmemi_device_lib_version_d"}
    wanted |= {"nvshmemi_ibgda_device_state_d"} if ibgda else set()
    for arch, result in found["archs"].items():
        if arch == "sm_103a" and found["versions"]["nvrtc"] < [12, 9]:
            assert "a newer one may know this architecture" in result["error"]
            continue
        assert not result["error"]
        assert 16 < result["registers"] <= 128
        assert result["spill_bytes"] == 0 or ibgda  # functions of the library save registers
        assert wanted <= set(result["symbols"]), arch
        assert len(set(result["symbols"])) == len(result["symbols"])


def test_kernels_that_are_linked_spill_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kernels between NVLink domains, as an H200 gets them."""
    copy_of("3.8.0", 13)  # skips where there is none
    monkeypatch.setenv("EPJIT_CACHE_DIR", str(tmp_path))
    kernels = [config for config in internode.example_configs("sm_90a") if config.needs_transport]
    low = [config for config in low_latency.example_configs("sm_90a") if config.needs_transport]
    kernels += {type(config): config for config in low}.values()  # one of each
    assert {kernel.op for kernel in kernels} >= {"notify", "dispatch", "combine", "clean"}
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(lambda config: compile_kernel(config, arch="sm_90a"), kernels)
    wrong = {
        repr(config): (result.registers, result.spill_bytes)
        for config, result in zip(kernels, compiled, strict=True)
        if result.spill_bytes or result.registers * config.threads > 65536
    }
    assert not wrong, wrong


def kernels_between_domains(arch: str, sizes: Sequence[int]) -> Iterator[KernelConfig]:
    """The kernels of DeepEP's shapes between so many hosts with eight GPUs each."""
    bf16, fp8 = DispatchShape(14336, 0, 8, True), DispatchShape(7168, 56, 8, True)
    for num_domains in sizes:
        yield internode.InternodeNotifyConfig(num_domains, 8)
        for shape in (bf16, fp8, CombineShape(14336, 8, is_f16=False)):
            yield internode.config_of(shape, num_domains, 8, arch)
    shapes = low_latency.warmup_shapes(
        hidden=7168,
        num_experts=256,
        num_topk=8,
        topk_is_int64=True,
        row_format=BF16,
        use_logfmt=False,
    )
    for num_domains in sizes:
        yield low_latency.CleanConfig(8 * num_domains, True)
        for each in shapes:
            yield low_latency.config_of(each, 8 * num_domains, arch, remote=True)


@pytest.mark.parametrize(
    ("version", "arch"), [("3.4.5", "sm_90a"), ("3.8.0", "sm_90a"), ("3.8.0", "sm_100a")]
)
def test_every_kernel_is_linked_with_ibgda(
    version: str, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its block fits the registers of an SM. Of two sizes once: a kernel takes 1 to 2 s.

    (The older library's calls are linked for Blackwell with a smaller kernel, above.)
    """
    monkeypatch.setenv("NVSHMEM_DIR", str(copy_of(version, 13)))
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "1")
    monkeypatch.setenv("EPJIT_CACHE_DIR", str(tmp_path))
    sizes = (2, 8) if (version, arch) == ("3.8.0", "sm_90a") else (8,)
    kernels = list(kernels_between_domains(arch, sizes))
    assert len(set(kernels)) == 7 * len(sizes)
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda config: compile_kernel(config, arch=arch), kernels))
    wrong = {
        repr(config): result.registers
        for config, result in zip(kernels, compiled, strict=True)
        if not 16 < result.registers <= 65536 // config.threads
    }
    assert not wrong, wrong


def test_body_and_kernel_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_CACHE_DIR", str(tmp_path))
    compiled: list[str] = []
    real = nvrtc.compile_unit

    def counting(text: str, name: str, **options: Any) -> Any:
        compiled.append(name.partition(" ")[0])
        return real(text, name, **options)

    monkeypatch.setattr(nvrtc, "compile_unit", counting)
    with ring_sources():
        assert not compile_kernel(RingConfig(), arch="sm_90a").from_cache
        assert compile_kernel(RingConfig(), arch="sm_90a").from_cache
        assert not compile_kernel(RingConfig(2), arch="sm_90a").from_cache
        assert compiled == [
            "ring_w4.ring.sm_90a.cu",
            nvshmem_device.SOURCE,
            "ring_w2.ring.sm_90a.cu",
        ]
        loopback = compile_kernel(RingConfig(), arch="sm_90a", body="loopback")
        assert not loopback.from_cache
        assert loopback.registers > 16
        with pytest.raises(CompileError, match="body is 'ucx', expected one of"):
            compile_kernel(RingConfig(), arch="sm_90a", body="ucx")
        monkeypatch.setenv("EPJIT_ASSERT_COMPILE", "1")
        assert compile_kernel(RingConfig(), arch="sm_90a").from_cache
        monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "1")  # another kernel
        with pytest.raises(CompileError, match="is not in the cache"):
            compile_kernel(RingConfig(), arch="sm_90a")


def test_a_header_that_changes_is_another_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = nvshmem_device.key()
    assert before == nvshmem_device.key()
    root = nvshmem.find_library().parents[1]
    for name in ("lib", "include"):
        (tmp_path / name).mkdir()
        for path in (root / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    (tmp_path / "lib" / nvshmem.find_library().name).unlink()
    (tmp_path / "lib" / nvshmem.find_library().name).write_bytes(b"")
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    (tmp_path / "include" / "more.h").write_text("// new")
    assert nvshmem_device.key() != before


def test_cupy_brings_the_headers_of_cccl() -> None:
    """A GPU machine may have no package of them."""
    folder = nvshmem_device._bundled_cccl()
    assert folder is not None
    assert (folder / "cuda" / "std" / "version").is_file()


# ---- finding the library


def fake_library(root: Path, version: str = "3.4.5") -> Path:
    """An installation whose library cannot be loaded."""
    (root / "lib").mkdir(parents=True)
    (root / "include" / "non_abi").mkdir(parents=True)
    library = root / "lib" / "libnvshmem_host.so.3"
    library.write_bytes(b"not a library")
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    text = "".join(f"#define NVSHMEM_VENDOR_{name}_VERSION {number}\n" for name, number in numbers)
    (root / "include" / "non_abi" / "nvshmem_version.h").write_text(text)
    return library


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Libraries that this process has loaded, as the tests have it."""
    files: list[Path] = []
    monkeypatch.setattr(nvshmem, "mapped", lambda name: sorted(files))
    return files


def test_the_folder_that_the_user_names(
    tmp_path: Path, loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    with pytest.raises(ImportError, match=r"no lib/libnvshmem_host.so; unset .*cu13-rdma"):
        nvshmem.find_library()
    library = fake_library(tmp_path)
    found = nvshmem.find_installation()
    assert (found.library, found.version) == (library, (3, 4, 5))
    assert found.device_library == tmp_path / "lib" / "libnvshmem_device.a"


def test_the_library_that_is_loaded_is_used(
    tmp_path: Path, loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.append(fake_library(tmp_path / "torch"))
    assert nvshmem.find_library() == loaded[0]
    fake_library(tmp_path / "user")
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path / "user"))
    with pytest.raises(RuntimeError, match=f"NVSHMEM_DIR={tmp_path}/user names another NVSHMEM"):
        nvshmem.find_library()
    loaded.append(fake_library(tmp_path / "other"))
    with pytest.raises(RuntimeError, match="has two copies of NVSHMEM loaded"):
        nvshmem.find_library()


def test_no_library_names_package_and_command(
    loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvshmem, "package_folders", lambda name: [])
    with pytest.raises(
        ImportError, match=r"nvidia-nvshmem-cu13 .*pip install -e '/.*\[cu13-rdma\]'"
    ):
        nvshmem.find_library()


def test_a_bare_copy_and_a_version_that_is_not_supported(
    tmp_path: Path, loaded: list[Path]
) -> None:
    loaded.append(fake_library(tmp_path / "old", "3.3.9"))
    with pytest.raises(RuntimeError, match=r"NVSHMEM 3\.3\.9 .* is not supported: .*3\.4\.5"):
        nvshmem.find_installation()
    loaded[:] = [fake_library(tmp_path / "next", "4.0.0")]
    with pytest.raises(RuntimeError, match=r"NVSHMEM 4\.0\.0 .* is not supported"):
        nvshmem.find_installation()
    loaded[:] = [fake_library(tmp_path / "bare")]
    (tmp_path / "bare" / "include" / "non_abi" / "nvshmem_version.h").unlink()
    with pytest.raises(ImportError, match="some packages bring a bare copy"):
        nvshmem.find_installation()


def test_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    fake_library(tmp_path)
    code = (
        "from epjit.runtime import nvshmem\ntry: nvshmem.load()\nexcept ImportError as e: print(e)"
    )
    assert "libnvshmem_host.so.3: " in run_python(code, NVSHMEM_DIR=tmp_path)


def test_a_process_with_a_loaded_library() -> None:
    """By the real list of mapped files: the one that another package has loaded is taken."""
    mine, other = copy_of("3.4.5", 13), copy_of("3.8.0", 13)
    code = (
        "import ctypes, sys\n"
        "from epjit.runtime import nvshmem\n"
        "ctypes.CDLL(sys.argv[1] + '/lib/libnvshmem_host.so.3')\n"
        "print(nvshmem.find_library(), nvshmem.find_installation().version)\n"
        "print(nvshmem._version_of(nvshmem.load()), nvshmem.is_initialized())\n"
        "ctypes.CDLL(sys.argv[2] + '/lib/libnvshmem_host.so.3')\n"
        "try: nvshmem.find_library()\n"
        "except RuntimeError as error: print(error)\n"
    )
    first, second, *rest = run_python(code, mine, other).splitlines()
    assert first == f"{mine.resolve()}/lib/libnvshmem_host.so.3 (3, 4, 5)"
    assert second == "(3, 4, 5) False"
    assert "two copies of NVSHMEM" in "".join(rest)


# ---- bootstrap


def bootstrapped(process_group: Any, folder: str) -> tuple[str, int, int, int]:
    """Body of a rank: begins NVSHMEM, which has no GPU to go on with."""
    os.environ["NVSHMEM_DIR"] = folder
    group = groups.Group.from_torch(process_group)
    library = nvshmem.load()
    error = ""
    try:
        nvshmem.initialize(group, device=None, settings={"NVSHMEM_DISABLE_NVLS": "1"})
    except RuntimeError as refused:
        error = str(refused)
    assert os.environ["NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"] == "lo"
    status = library.nvshmemx_init_status()
    return error, status, library.nvshmem_my_pe(), library.nvshmem_n_pes()


@pytest.mark.parametrize("version", ["3.4.5", "3.8.0"])
def test_four_processes_bootstrap(version: str) -> None:
    found = launch.run(bootstrapped, 4, str(copy_of(version, 13)), timeout=120)
    assert [each[1:] for each in found] == [(1, rank, 4) for rank in range(4)]
    assert len({error for error, *_ in found}) == 1
    assert "the state is 1 (1: the processes have met, but there is no GPU to use)" in found[0][0]


def test_numbers_follow_hosts() -> None:
    assert nvshmem.number_ranks("aabb") == [0, 1, 2, 3]
    assert nvshmem.number_ranks("abab") == [0, 2, 1, 3]
    assert nvshmem.number_ranks("bab") == [0, 2, 1]


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> list[nvshmem._Member]:
    """Four ranks, as they introduce themselves."""
    found = [
        nvshmem._Member(
            version=(3, 4, 5), host="a", hostname="a", process=str(rank), pe=rank, num_pes=4
        )
        for rank in range(4)
    ]
    local = threading.local()
    monkeypatch.setattr(nvshmem, "_introduce", lambda device: found[local.rank])

    def initialize(group: Any) -> nvshmem.World:
        local.rank = group.rank
        return nvshmem.initialize(group, device=None, settings={"NVSHMEM_QP_DEPTH": "1024"})

    monkeypatch.setattr(nvshmem, "run", initialize, raising=False)
    return found


def outcome(members: list[nvshmem._Member]) -> Any:
    """The result of all ranks, or their error; it is the same."""
    found = run_threads(len(members), nvshmem.run)  # type: ignore[attr-defined]
    assert len({str(each) for each in found}) == 1
    return found[0]


def test_nvshmem_that_works_already_is_joined(members: list[nvshmem._Member]) -> None:
    members[:] = [each._replace(initialized=True, pe=3 - each.pe) for each in members]
    assert outcome(members) == ([3, 2, 1, 0], "")


@pytest.mark.parametrize(
    ("rank", "changes", "error", "message"),
    [
        (2, {"error": "no such library"}, ImportError, "rank 2: no such library"),
        (2, {"process": "1"}, ValueError, "threads of one process.*EPJIT_TRANSPORT=loopback"),
        (2, {"version": (3, 8, 0)}, RuntimeError, r"by rank: 3\.4\.5, 3\.4\.5, 3\.8\.0, 3\.4\.5"),
        (2, {"host": "b", "hostname": "b"}, RuntimeError, "there are 3 on a, 1 on b"),
        (2, {"gpu": b"b"}, RuntimeError, "its PEs are, GPU by GPU: 0, 1, 3; 2; give each rank"),
        (2, {"initialized": True}, RuntimeError, r"works already on ranks \[2\], but not on"),
    ],
)
def test_ranks_that_do_not_go_together(
    members: list[nvshmem._Member],
    rank: int,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    members[rank] = members[rank]._replace(**changes)
    with pytest.raises(error, match=message):
        raise outcome(members)


def test_hosts_of_one_name_are_refused(members: list[nvshmem._Member]) -> None:
    members[:] = [each._replace(host=str(rank % 2)) for rank, each in enumerate(members)]
    with pytest.raises(RuntimeError, match="different ones are called a; give each its own"):
        raise outcome(members)


def test_gpus_that_are_shared_in_uneven_steps_are_refused(members: list[nvshmem._Member]) -> None:
    members[:] = [each._replace(gpu=b"abba"[i : i + 1]) for i, each in enumerate(members)]
    with pytest.raises(RuntimeError, match="GPU by GPU: 0, 3; 1, 2; give each"):
        raise outcome(members)


def test_nvshmem_with_other_members_is_refused(members: list[nvshmem._Member]) -> None:
    members[:] = [each._replace(initialized=True, num_pes=8) for each in members]
    with pytest.raises(RuntimeError, match="already between 8 processes, and this group has 4"):
        raise outcome(members)


# ---- the network


@pytest.fixture
def got(members: list[nvshmem._Member], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The transport that NVSHMEM begins on each of four ranks, on two hosts with NICs."""
    found = ["ibgda"] * 4
    links = Network(links=("InfiniBand",), has_gdrcopy=True)
    for rank, each in enumerate(members):
        name = "ab"[rank // 2]
        members[rank] = each._replace(host=name, hostname=name, network=links, gpu=bytes([rank]))
    local = threading.local()

    def bootstrap(group: Any, pes: Any, device: Any) -> str:
        local.rank = group.rank
        return ""

    monkeypatch.setattr(nvshmem, "_bootstrap", bootstrap)
    monkeypatch.setattr(nvshmem.network, "loaded", lambda: found[local.rank])
    saved = dict(os.environ)
    for name in [name for name in saved if name.startswith("NVSHMEM_")]:
        del os.environ[name]
    yield found
    os.environ.clear()
    os.environ.update(saved)


def test_ibgda_is_begun_between_hosts(
    members: list[nvshmem._Member], got: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="epjit")
    assert outcome(members) == ([0, 1, 2, 3], "ibgda")
    assert os.environ["NVSHMEM_IB_ENABLE_IBGDA"] == "1"
    assert os.environ["NVSHMEM_QP_DEPTH"] == "1024"
    (record,) = caplog.records  # of rank 0 alone
    assert record.getMessage() == (
        "NVSHMEM 3.4.5, begun by epjit, between 4 ranks on 2 hosts: ibgda"
    )


def test_one_host_needs_no_nic(members: list[nvshmem._Member], got: list[str]) -> None:
    got[:] = [""] * 4
    members[:] = [each._replace(host="a", hostname="a") for each in members]
    assert outcome(members) == ([0, 1, 2, 3], "")
    assert os.environ["NVSHMEM_IB_ENABLE_IBGDA"] == "0"


def test_containers_of_a_host_have_a_network_between_them(
    members: list[nvshmem._Member], got: list[str]
) -> None:
    got[:] = ["ucx"] * 4
    members[:] = [each._replace(host="a") for each in members]
    assert outcome(members).transport == "ucx"


@pytest.mark.parametrize("flag", ["1", ""])
def test_kernels_are_linked_for_what_was_got(
    flag: str,
    members: list[nvshmem._Member],
    got: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """NVSHMEM leaves out IBGDA by itself where it does not begin."""
    caplog.set_level("INFO", logger="epjit")
    got[:] = ["ibrc"] * 4
    os.environ["NVSHMEM_IB_ENABLE_IBGDA"] = flag
    wanted = bool(flag) or None
    networks = [each.network._replace(ibgda=wanted) for each in members]
    members[:] = [m._replace(network=n) for m, n in zip(members, networks, strict=True)]
    assert outcome(members).transport == "ibrc"
    assert os.environ["NVSHMEM_IB_ENABLE_IBGDA"] == "0"
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "WARNING" if flag else "INFO"]
    assert "IBGDA was not begun: expect low rates (NVSHMEM_DEBUG=INFO says more)" in caplog.text


def test_ibrc_in_the_place_of_ibgda_keeps_signals_behind_their_data(
    members: list[nvshmem._Member], got: list[str]
) -> None:
    """Relaxed ordering is on for IBGDA, and without GDRCopy IBRC writes signals like data."""
    got[:] = ["ibrc"] * 4
    members[2] = members[2]._replace(network=members[2].network._replace(has_gdrcopy=False))
    with pytest.raises(RuntimeError, match="a signal could pass the data before it: set NVSHMEM_I"):
        raise outcome(members)
    os.environ["NVSHMEM_IB_ENABLE_RELAXED_ORDERING"] = "0"
    assert outcome(members).transport == "ibrc"


@pytest.mark.parametrize(("version", "told"), [((3, 4, 5), True), ((3, 8, 0), False)])
def test_slow_libfabric(
    version: Any,
    told: bool,
    members: list[nvshmem._Member],
    got: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    got[:] = ["libfabric"] * 4
    members[:] = [each._replace(version=version) for each in members]
    outcome(members)
    assert ("waits for each put over libfabric" in caplog.text) == told


@pytest.mark.parametrize(
    ("cuda", "arch", "library", "reason"),
    [
        (13, "sm_100a", True, ""),
        (12, "sm_90a", True, ""),
        (12, "sm_100a", True, "CUDA 12's libnvshmem_device.a has no code for sm_100a"),
        (13, "sm_90a", False, "there is no /.*/lib/libnvshmem_device.a"),
    ],
)
def test_kernels_that_cannot_be_linked_with_ibgda(
    cuda: int,
    arch: str,
    library: bool,
    reason: str,
    tmp_path: Path,
    loaded: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded.append(fake_library(tmp_path))
    if library:
        (tmp_path / "lib" / "libnvshmem_device.a").touch()
    monkeypatch.setattr(nvshmem.nvrtc, "version", lambda: (cuda, 0))
    monkeypatch.setattr(nvshmem.gpu, "arch_of", lambda device: arch)
    assert re.match(f"{reason}(, only|$)", nvshmem.why_no_device_code(0))


def test_a_flag_that_nvshmem_reads_otherwise(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks hear of it: one alone would let the others wait."""
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "off")
    monkeypatch.setattr(library, "nvshmemx_init_status", lambda: 0, raising=False)
    monkeypatch.setattr(nvshmem, "_version_of", lambda library: (3, 4, 5))
    assert "'off' is not a flag" in nvshmem._introduce(None).error


def test_transports_that_differ_are_told_to_all(
    members: list[nvshmem._Member], got: list[str]
) -> None:
    got[3] = "ibrc"
    with pytest.raises(RuntimeError, match="ibgda on ranks 0, 1, 2; ibrc on rank 3"):
        raise outcome(members)


def test_networks_that_differ_are_told_to_all(
    members: list[nvshmem._Member], got: list[str]
) -> None:
    members[3] = members[3]._replace(network=Network(ibgda=True))
    with pytest.raises(RuntimeError, match="disagree on NVSHMEM_IB_ENABLE_IBGDA"):
        raise outcome(members)


# ---- kernels


class Kernels:
    """Calls of the driver and of NVSHMEM, with the capture mode of the thread at that time."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.mode = 0
        self.captured: set[int] = set()  # GPUs
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[int, int]:
        before, self.mode = self.mode, mode
        return 0, before

    def nvshmemx_init_status(self) -> int:
        return 2

    def nvshmemx_cumodule_init(self, module: int) -> int:
        self.calls.append(("init", module, self.mode))
        return 0

    def nvshmemx_cumodule_finalize(self, module: int) -> int:
        self.calls.append(("finalize", module, self.mode))
        return 0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    fake = Kernels()
    monkeypatch.setattr(nvshmem, "load", lambda: fake)
    monkeypatch.setattr(nvshmem, "_attached", set())
    monkeypatch.setattr(driver, "load", lambda: fake)
    monkeypatch.setattr(driver, "using", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(stream, "captures", lambda device: device in fake.captured)
    return fake


class Module:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def test_a_kernel_that_is_collected_during_a_capture(kernels: Kernels) -> None:
    """NVSHMEM copies to the GPU then, which would break the capture: it is left for later."""
    for ptr in (1, 2, 3):
        nvshmem.attach(ptr)
    kernels.calls.clear()
    kernels.captured.add(0)
    module = Module(1)
    kept = weakref.ref(module)
    nvshmem.detach(module, 0)
    del module
    assert kernels.calls == []
    assert kept() is not None  # not unloaded before NVSHMEM has left it
    nvshmem.detach(Module(2), 0)
    assert kernels.calls == []
    kernels.captured.clear()
    nvshmem.detach(Module(3), 0)  # any of these calls looks for what was left
    assert sorted(kernels.calls) == [("finalize", ptr, 2) for ptr in (1, 2, 3)]
    assert kept() is None
    nvshmem.detach(Module(3), 0)
    assert len(kernels.calls) == 3


def test_other_threads_may_capture_meanwhile(kernels: Kernels) -> None:
    """The driver would fail their capture, unless this thread is relaxed."""
    nvshmem.attach(1)
    assert (kernels.calls, kernels.mode) == ([("init", 1, 2)], 0)
    kernels.captured.add(0)
    nvshmem.detach(Module(1), 0)
    kernels.captured.clear()
    nvshmem.attach(2)
    assert kernels.calls[1:] == [("finalize", 1, 2), ("init", 2, 2)]
    assert kernels.mode == 0


@pytest.mark.parametrize(
    ("legacy", "current", "captured"), [((0, 0), 0, False), ((0, 0), 1, True), ((906, 0), 0, True)]
)
def test_what_a_copy_would_break(
    legacy: tuple[int, int], current: int, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver answers for the default stream with an error while a blocking one is captured."""
    answers = {1: legacy, 77: (0, current)}
    fake = SimpleNamespace(cuStreamIsCapturing=answers.__getitem__)
    monkeypatch.setattr(driver, "load", lambda: fake)
    monkeypatch.setattr(driver, "using", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        stream.torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False
    )
    assert stream.captures(0) is captured


# ---- the heap


@pytest.mark.parametrize(
    ("offers", "nbytes", "number", "common"),
    [
        ([{}, {}], 10, None, []),
        ([{0: 10}, {0: 10}], 10, 0, [0]),
        ([{0: 10}, {}], 10, None, []),  # rank 1 still uses it
        ([{0: 10, 1: 30, 2: 20}, {0: 10, 1: 30, 2: 20}], 15, 2, [0, 1, 2]),
        ([{1: 20, 2: 20}, {2: 20, 1: 20, 3: 15}], 15, 1, [1, 2]),
        ([{0: 10}, {0: 10}], 11, None, [0]),
    ],
)
def test_ranks_choose_the_same_block(
    offers: list[dict[int, int]], nbytes: int, number: int | None, common: list[int]
) -> None:
    assert choose_block(offers, nbytes) == (number, common)
    assert choose_block(offers[::-1], nbytes) == (number, common)


class Library:
    """One process's NVSHMEM as far as memory goes."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.live: dict[int, int] = {}
        self.calls: list[str] = []
        self.room = room

    def nvshmem_malloc(self, nbytes: int) -> int | None:
        self.calls.append(f"malloc {nbytes}")
        if sum(self.live.values()) + nbytes > self.room:
            return None
        ptr = 0x1000 * len(self.calls)
        self.live[ptr] = nbytes
        return ptr

    def nvshmem_free(self, ptr: int) -> None:
        self.calls.append(f"free {self.live.pop(ptr)}")

    def nvshmem_ptr(self, ptr: int, pe: int) -> int | None:
        return None if pe == 1 else ptr + pe

    def nvshmemx_hostlib_finalize(self) -> None:
        self.calls.append("finalize")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    monkeypatch.setattr(nvshmem, "load", lambda: fake)
    using = SimpleNamespace(using=lambda device: contextlib.nullcontext())
    monkeypatch.setattr(nvshmem, "driver", using)
    monkeypatch.setattr(nvshmem, "_heap", Heap(nvshmem._replace))
    monkeypatch.setattr(nvshmem, "_attached", set())
    monkeypatch.setattr(nvshmem, "_begun_here", True)
    return fake


def alone() -> groups.Group:
    return groups.Group.from_comm(groups.ThreadGroup.create(1)[0])


def test_memory_is_used_again(library: Library) -> None:
    first = nvshmem.allocate(alone(), 100, device=0)
    assert [nvshmem.address_at(first.ptr, pe) for pe in (0, 1)] == [first.ptr, 0]
    second = nvshmem.allocate(alone(), 50, device=0)
    ptr = first.ptr
    first.close()
    first.close()
    assert first.ptr == 0
    third = nvshmem.allocate(alone(), 60, device=0)
    assert third.ptr == ptr
    for _ in range(20):
        second.close()
        second = nvshmem.allocate(alone(), 50, device=0)
    assert library.calls == ["malloc 100", "malloc 50"]


def test_sizes_that_grow_do_not_add_up(library: Library) -> None:
    for nbytes in (10, 20, 30):
        nvshmem.allocate(alone(), nbytes, device=0).close()
    assert library.calls == ["malloc 10", "free 10", "malloc 20", "free 20", "malloc 30"]


def test_a_full_gpu_is_said(library: Library) -> None:
    library.room = 100
    with pytest.raises(RuntimeError, match="no 101 bytes of symmetric memory for ranks 0;"):
        nvshmem.allocate(alone(), 101, device=0)


@pytest.mark.parametrize("ibgda", ["0", "1"])
def test_a_rank_that_ends_is_not_waited_for_inside_nvshmem(
    ibgda: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", ibgda)
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "0.2")
    monkeypatch.setattr(library, "nvshmem_malloc", lambda nbytes: time.sleep(5))
    with pytest.raises(
        CommunicationError, match=r"rank 0 waited 0\.2 s in nvshmem_malloc"
    ) as error:
        nvshmem.allocate(alone(), 100, device=0)
    assert (error.value.op, error.value.rank) == ("Buffer", 0)
    assert ("NVSHMEM_IB_ENABLE_IBGDA=0 on all" in str(error.value)) == (ibgda == "1")


def test_numbers_mean_the_same_memory_where_only_some_got_it() -> None:
    """A block that one rank has and the others have not is offered to nobody."""
    room = {0: 1 << 30, 1: 100}

    def replace(group: groups.Group, old: Any, nbytes: int, device: int) -> int:
        return 0x1000 if nbytes <= room[group.rank] else 0

    heaps = [Heap(replace), Heap(replace)]

    def allocate(nbytes: int) -> Any:
        return run_threads(
            2, lambda group: heaps[group.rank].allocate(group, nbytes, device=0)._number
        )

    for error in allocate(101):
        with pytest.raises(RuntimeError, match="no 101 bytes of symmetric memory for ranks 1;"):
            raise error
    assert allocate(50) == [1, 1]
    assert [heap.num_in_use for heap in heaps] == [1, 1]
    for heap in heaps:
        heap.hand_back(1)
    assert allocate(40) == [1, 1]


def test_a_block_is_handed_back_while_the_lock_is_held(library: Library) -> None:
    """The collector may find a Buffer in the middle of `allocate`."""
    memory = nvshmem.allocate(alone(), 10, device=0)
    with nvshmem._heap._lock:
        memory.close()
    assert memory.ptr == 0


def test_ranks_that_ask_for_different_sizes(library: Library) -> None:
    found = run_threads(2, lambda group: nvshmem.allocate(group, 10 + group.rank, device=0))
    for error in found:
        with pytest.raises(ValueError, match=r"different sizes .*: \[10, 11\] by rank"):
            raise error


def test_the_end_comes_after_all_users(library: Library) -> None:
    memory = nvshmem.allocate(alone(), 10, device=0)
    with pytest.raises(RuntimeError, match="1 allocations and 0 kernels are still in use"):
        nvshmem.finalize()
    memory.close()
    nvshmem.finalize()
    nvshmem.finalize()
    assert library.calls == ["malloc 10", "free 10", "finalize"]
