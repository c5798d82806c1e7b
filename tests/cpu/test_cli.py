"""`python -m epjit`: every command, on a machine without a GPU."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from epjit import tuned
from epjit.bench import low_latency
from epjit.bench.normal import Settings
from epjit.cli import app, doctor, show
from epjit.cli.cache import readable
from epjit.cli.doctor import gpus, nics, probe, rdma, software
from epjit.cli.doctor.check import Check, Status
from epjit.cli.warmup import Calls, Dtype, Group, _normal
from epjit.runtime import machine, network
from epjit.runtime.cache import CubinCache, Entry
from epjit.runtime.network import Port

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--hidden", "256", "--experts", "8", "--topk", "2", "--tokens", "16", "--sms", "4"]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("EPJIT_CACHE_DIR", str(tmp_path / "cache"))
    tuned.load.cache_clear()
    tuned.best.cache_clear()
    return tmp_path / "cache"


def invoke(*arguments: object, code: int = 0) -> str:
    """Runs a command in this process; returns what it wrote to stdout."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def run(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user does."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'compat'}"
    done = subprocess.run(
        [sys.executable, "-m", "epjit", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


# ---- doctor -------------------------------------------------------------------------------------


def test_doctor_says_what_is_there() -> None:
    checks = json.loads(invoke("doctor", "--json", "--no-peers"))["checks"]
    assert {"platform", "packages", "compiler", "GPUs", "cache"} <= {c["section"] for c in checks}
    assert all(check["remedy"] for check in checks if check["status"] == "wrong")
    found = {check["name"]: check for check in checks}
    assert found["torch"]["status"] == "ok"
    assert "torch/__init__.py" in found["torch"]["value"]
    assert re.search(r"libnvrtc\.so", found["NVRTC"]["value"])
    if any(map(probe.version, rdma.NVSHMEM_PACKAGES)):  # of the extras -rdma
        assert re.match(r"3\.\d+\.\d+ \(/.*libnvshmem_host", found["NVSHMEM"]["value"])
        assert re.search(r"libnvJitLink\.so", found["kernels with NVSHMEM"]["value"])


def test_doctor_without_nvshmem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Missing is a warning where it was asked for; two packages in one folder are wrong."""
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    found = {check.name: check for check in rdma.check_rdma()}
    for name in ("NVSHMEM", "kernels with NVSHMEM"):
        assert found[name].status is Status.warning
        assert f"NVSHMEM_DIR={tmp_path}" in found[name].remedy
        assert f"pip install -e '{ROOT}[cu13-rdma]'" in found[name].remedy
    monkeypatch.setattr(probe, "version", lambda name: "3.4.5")
    found = {check.name: check for check in rdma.check_rdma()}
    assert found["NVSHMEM"].status is Status.wrong


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    """A machine as it is on a good cluster; a test changes what it is about."""
    from epjit.runtime import device

    found = Node()
    for name in vars(Node):
        if name[0] != "_" and hasattr(probe, name):
            monkeypatch.setattr(probe, name, lambda name=name: getattr(found, name))
    monkeypatch.setattr(network, "can_load", lambda library: library in found.files)
    monkeypatch.setattr(network, "ports", lambda *root: found.ports)
    look = network.look
    monkeypatch.setattr(
        network,
        "look",
        lambda **known: look(**known)._replace(has_gdrcopy="/dev/gdrdrv" in found.files),
    )
    monkeypatch.setattr(machine, "read", lambda path: found.files.get(path, ""))
    monkeypatch.setattr(device, "rdma_ordering", lambda index: found.ordering)
    monkeypatch.setattr(device, "rdma_flushes", lambda index: 1)
    for name in [each for each in os.environ if each.startswith("NVSHMEM_")]:
        monkeypatch.delenv(name)
    return found


class Node:
    """The answers of `probe` there."""

    num_gpus = 8
    ports = (*(Port(f"mlx5_{i}", rate="400 Gb/sec (4X NDR)") for i in range(8)),)
    verbs: Mapping[str, bool] = MappingProxyType({f"/dev/infiniband/uverbs{i}": True for i in "01"})
    cores = 96
    locked_memory = -1
    translated_groups = 0
    nvshmem_version: tuple[int, int, int] | None = (3, 4, 5)
    no_device_code = ""
    ordering = 100
    files: Mapping[str, str] = MappingProxyType(
        {
            "/dev/gdrdrv": "",
            "libmlx5.so.1": "",
            "/proc/driver/nvidia/version": "NVIDIA UNIX Open Kernel Module for x86_64 580.159",
            "/proc/driver/nvidia/params": "EnableStreamMemOPs: 1\nRegistryDwords: "
            '"PeerMappingOverride=1;"\n',
        }
    )

    @property
    def lines(self) -> dict[str, Check]:
        """The lines of `doctor` for it."""
        return {check.name: check for check in [*rdma.check_rdma(), *nics.check_nics()]}


def test_doctor_on_a_good_node(node: Node) -> None:
    mine = {"NVSHMEM", "kernels with NVSHMEM"}  # of this machine
    lines = {name: check for name, check in node.lines.items() if name not in mine}
    assert {check.status for check in lines.values()} == {Status.ok}
    assert not [check for check in lines.values() if check.remedy]
    assert lines["mlx5_0:1"].value == "InfiniBand, 400 Gb/sec (4X NDR), mlx5_core"
    assert lines["GPU memory for the NIC"].value == "DMA-BUF (open driver)"
    assert lines["transport"].value == "IBGDA, else IBRC: where all ranks can"
    assert "as epjit assumes" in lines["writes of NICs"].value


@pytest.mark.parametrize(
    ("variable", "found", "name", "status", "said"),
    [
        ("NVSHMEM_IB_ENABLE_IBGDA=0", {}, "transport", "ok", "IBRC: NVSHMEM_IB_ENABLE_IBGDA=0"),
        ("NVSHMEM_IB_ENABLE_IBGDA=no", {}, "transport", "ok", "IBRC: NVSHMEM_IB_ENABLE_IBGDA=0"),
        ("NVSHMEM_IB_ENABLE_IBGDA=1", {}, "transport", "ok", "IBGDA, else IBRC: .*IBGDA=1"),
        ("NVSHMEM_IB_ENABLE_IBGDA=1", {"files": {}}, "transport", "warning", "IBGDA, .*IBGDA=1"),
        ("NVSHMEM_IB_ENABLE_IBGDA=off", {}, "transport", "wrong", "refused"),
        ("NVSHMEM_GPUNETIO_ENABLE_GDAKI=1", {}, "transport", "wrong", "refused"),
        ("NVSHMEM_IB_ENABLE_IBGDA=2", {}, "kernels with NVSHMEM", "warning", "cannot be linked"),
        ("NVSHMEM_IB_ENABLE_IBGDA=", {}, "transport", "ok", "IBGDA, else IBRC: where all"),
        ("NVSHMEM_REMOTE_TRANSPORT=UCX", {}, "transport", "ok", "ucx: NVSHMEM_REMOTE_TRANSPORT"),
        ("", {"no_device_code": "no code"}, "transport", "warning", "^IBRC$"),
        ("", {"files": {}}, "transport", "warning", "^IBRC$"),
        ("", {"ports": [Port("rocep24s0")]}, "transport", "warning", "^IBRC$"),
        ("NVSHMEM_HCA_PREFIX=roce", {"ports": [Port("rocep24s0")]}, "transport", "ok", "^IBGDA"),
        ("", {"ports": [Port("bnxt_re0", driver="bnxt_en")]}, "transport", "ok", "IBRC: no mlx5"),
        ("", {"files": {}}, "GPU memory for the NIC", "warning", "neither"),
        ("", {"files": {}}, "IBGDA: driver parameters", "warning", "PeerMappingOverride=0"),
        ("", {"files": {}}, "gdrcopy", "warning", "no /dev/gdrdrv"),
        ("", {"locked_memory": 65536}, "locked memory", "warning", "64"),
        ("", {"cores": 8}, "CPU cores", "warning", "8 for 8 ranks"),
        ("", {"ordering": 0}, "writes of NICs", "warning", "in no order .*118: 0, 117: 1"),
        ("", {"ordering": 200}, "writes of NICs", "ok", "in order for all GPUs"),
        ("", {}, "relaxed ordering", "ok", "on; signals are atomics .*PCI_ATOMIC_MODE=4"),
        ("NVSHMEM_IB_ENABLE_IBGDA=0", {}, "relaxed ordering", "ok", "on; the CPU writes a signal"),
        (
            "NVSHMEM_IB_ENABLE_IBGDA=0",
            {"files": {}},
            "relaxed ordering",
            "ok",
            "off: epjit sets it so",
        ),
        (
            "NVSHMEM_IB_ENABLE_RELAXED_ORDERING=1",
            {"files": {}},
            "relaxed ordering",
            "wrong",
            "on: 1",
        ),
        ("NVSHMEM_IB_ENABLE_RELAXED_ORDERING=0", {}, "relaxed ordering", "ok", "off: NVSHMEM_IB"),
        (
            "",
            {"ports": [Port("mlx5_0", is_virtual=True)]},
            "IBGDA: atomics",
            "warning",
            "virtual functions: mlx5_0:1",
        ),
        ("", {"ports": [Port("mlx5_0", active=False)]}, "mlx5_0:1", "info", "link is down"),
        (
            "",
            {"ports": [Port("mlx5_0", link="Ethernet")]},
            "mlx5_0:1",
            "warning",
            "no GID of RoCE v2 with an IPv4 address",
        ),
        (
            "",
            {"ports": [Port("mlx5_0", link="Ethernet", routable=True)]},
            "mlx5_0:1",
            "ok",
            "Ethernet",
        ),
        ("", {"verbs": {}}, "/dev/infiniband", "wrong", "no file uverbs"),
        ("", {"verbs": {"/dev/infiniband/uverbs0": False}}, "/dev/infiniband", "wrong", "uverbs0"),
        ("", {"translated_groups": 40}, "IOMMU", "warning", "40 groups"),
        (
            "NVSHMEM_HCA_PE_MAPPING=mlx5_0:1:1",
            {},
            "NVSHMEM_HCA_PE_MAPPING",
            "warning",
            "maps no ranks without NVSHMEM_ENABLE_NIC_PE_MAPPING=1",
        ),
        (
            "",
            {"ports": [Port("mlx5_0"), Port("mlx5_9", link="Ethernet", routable=True)]},
            "NICs of one kind",
            "warning",
            "no: Ethernet and InfiniBand, and all would be taken",
        ),
        (
            "NVSHMEM_IBGDA_ENABLE_MULTI_PORT=1",
            {},
            "NVSHMEM_IBGDA_ENABLE_MULTI_PORT",
            "wrong",
            "forgets the queue pairs",
        ),
        ("", {"ports": [Port("efa0", driver="efa")]}, "EFA", "warning", "cannot drive"),
        (
            "NVSHMEM_REMOTE_TRANSPORT=libfabric",
            {"ports": [Port("efa0", driver="efa")]},
            "NVSHMEM over libfabric",
            "warning",
            "NVSHMEM 3.4.5: before 3.5 one put",
        ),
        (
            "NVSHMEM_REMOTE_TRANSPORT=libfabric",
            {"ports": [Port("efa0", driver="efa")], "nvshmem_version": (3, 8, 0)},
            "NVSHMEM over libfabric",
            "ok",
            "NVSHMEM 3.8.0",
        ),
    ],
)
def test_doctor_on_a_node(
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    found: dict[str, Any],
    name: str,
    status: str,
    said: str,
) -> None:
    """One thing is as it should not be, or as it may be."""
    if variable:
        monkeypatch.setenv(*variable.split("=", 1))
    for key, value in found.items():
        setattr(node, key, value)
    check = node.lines[name]
    assert check.status.value == status, check
    assert re.search(said, check.value), check
    assert bool(check.remedy) == (status in ("warning", "wrong"))


@pytest.mark.parametrize(
    ("variable", "found", "name"),
    [
        ("NVSHMEM_ENABLE_NIC_PE_MAPPING=1", {}, "NVSHMEM_HCA_PE_MAPPING"),
        ("NVSHMEM_HCA_LIST=mlx5_0", {}, "NICs of one kind"),
        ("", {"nvshmem_version": (3, 8, 0)}, "NICs of one kind"),
        ("NVSHMEM_IBGDA_ENABLE_MULTI_PORT=0", {}, "NVSHMEM_IBGDA_ENABLE_MULTI_PORT"),
    ],
)
def test_doctor_keeps_still(
    node: Node, monkeypatch: pytest.MonkeyPatch, variable: str, found: dict[str, Any], name: str
) -> None:
    """A part that is as it should be needs no line of its own here."""
    monkeypatch.setenv("NVSHMEM_HCA_PE_MAPPING", "mlx5_0:1:1")
    node.ports = (Port("mlx5_0"), Port("mlx5_9", link="Ethernet", routable=True))
    if variable:
        monkeypatch.setenv(*variable.split("=", 1))
    for key, value in found.items():
        setattr(node, key, value)
    assert name not in node.lines


def test_the_quota_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    for text, cores in (("", 32), ("max 100000", 32), ("350000 100000", 4)):
        monkeypatch.setattr(machine, "read", lambda path, text=text: text)
        assert probe.cores() == cores


@pytest.mark.parametrize(
    ("text", "is_on"),
    [("0", False), ("no", False), ("False", False), ("1", True), ("off", True), ("", True)],
)
def test_flags_are_read_as_nvshmem_reads_them(
    monkeypatch: pytest.MonkeyPatch, text: str, is_on: bool
) -> None:
    from epjit import env

    monkeypatch.setenv("NVSHMEM_FLAG", text)
    assert env.nvshmem_flag("NVSHMEM_FLAG", default=not is_on) is is_on
    assert env.nvshmem_flag("NVSHMEM_OTHER", default=is_on) is is_on


def test_doctor_fails_when_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "soon")
    text = invoke("doctor", "--no-peers", code=1)
    assert "EPJIT_TIMEOUT_SECONDS='soon' is not a number greater than 0" in text
    assert "-> unset EPJIT_TIMEOUT_SECONDS" in text


def test_doctor_names_a_cache_that_others_can_write(cache_dir: Path) -> None:
    (cache_dir / "cubins").mkdir(parents=True, mode=0o777)
    (cache_dir / "cubins").chmod(0o777)
    text = invoke("doctor", "--no-peers", code=1)
    assert "is open to others (mode 777); run: chmod 700" in text


def test_warmup_needs_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EPJIT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    result = CliRunner().invoke(app, ["warmup", "--arch", "sm_90a"])
    assert isinstance(result.exception, NotADirectoryError)


def test_doctor_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = {check.name: check for check in software.check_packages()}
    assert found["torch"].status is Status.wrong
    assert found["torch"].remedy.startswith(f"pip install -e '{ROOT}[torch]'")
    for name in ("epjit.modes.make", "epjit.kernels.intranode"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    last = doctor.verdict([])
    assert last.status is Status.wrong
    assert "cannot be made: " in last.value


def test_doctor_on_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of GPUs and links, with what a driver would say."""
    from epjit.bench import peers
    from epjit.runtime import device, driver

    links = [
        peers.PeerLink(0, 1, accessible=True, gigabytes_per_second=388.0, latency_us=1.3),
        peers.PeerLink(1, 0, accessible=True, gigabytes_per_second=12.0, latency_us=4.0),
        peers.PeerLink(1, 2, accessible=False),
    ]
    monkeypatch.setattr(device, "count", lambda: 2)
    monkeypatch.setattr(device, "arch_of", lambda index: ("sm_90a", "sm_75")[index])
    monkeypatch.setattr(device, "name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(device, "num_sms", lambda index: 132)
    monkeypatch.setattr(driver, "call", lambda name, *args: 12080)
    monkeypatch.setattr(peers, "measure", lambda: iter(links))
    found = {check.name: check for check in [*gpus.check_gpus(), *gpus.check_peers()]}
    assert found["driver"].value.endswith("CUDA 12.8")
    assert found["GPU 0"].value == "NVIDIA H200, sm_90a, 132 SMs"
    assert found["GPU 1"].status is Status.wrong
    assert found["torch"].status is Status.wrong, "torch sees no GPU here"
    assert "built for the CPU: take the one for CUDA" in found["torch"].remedy
    assert found["GPU 0 reads GPU 1"].value == "388.0 GB/s, 1.3 us a load"
    assert found["GPU 1 reads GPU 0"].status is Status.warning
    assert "CUDA_VISIBLE_DEVICES" in found["GPU 1 reads GPU 2"].remedy
    fits = {check.name: check for check in software.check_compiler()}["fits the driver"]
    assert fits.status is Status.wrong
    assert "[cu12]" in fits.remedy


def test_doctor_has_nothing_to_say_against_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The packages that only GPUs and nodes need may be missing: nothing is to be done."""
    from epjit.runtime import nvshmem

    monkeypatch.delenv("EPJIT_BACKEND", raising=False)
    monkeypatch.setattr(network, "ports", lambda *root: [])
    monkeypatch.setattr(probe, "version", lambda name: "")
    monkeypatch.setattr(nvshmem, "package_folders", lambda name: [])
    for module in ("cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc", "cupy"):
        monkeypatch.setitem(sys.modules, module, None)
    checks = json.loads(invoke("doctor", "--json"))["checks"]
    todo = [check for check in checks if check["status"] not in ("ok", "info") or check["remedy"]]
    assert not todo
    absent = {check["name"] for check in checks if check["status"] == "info"}
    assert {"cuda-bindings", "cupy-cuda13x", "NVRTC", "driver", "NVSHMEM", "NICs"} <= absent
    assert checks[-1]["section"] == "verdict"
    assert checks[-1]["value"].startswith("runs on the CPU backend (torch finds no GPU)")


def test_doctor_stays_with_the_cuda_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing it says would bring packages of CUDA 13 beside a torch for CUDA 12."""
    from epjit.runtime import device

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(device, "count", lambda: 1)
    monkeypatch.setattr(probe, "version", {"cuda-bindings": "12.9"}.get)
    for module in ("cuda.bindings", "cupy"):
        monkeypatch.setitem(sys.modules, module, None)
    found = {check.name: check for check in software.check_packages()}
    for name in ("cuda-bindings", "cupy-cuda12x"):
        assert found[name].status is Status.wrong
        assert found[name].remedy == f"pip install -e '{ROOT}[cu12]'"
    assert found["CUDA versions"].status is Status.ok
    versions = {"cuda-bindings": "12.9", "cupy-cuda13x": "14.2"}
    monkeypatch.setattr(probe, "version", versions.get)
    mixed = {check.name: check for check in software.check_packages()}["CUDA versions"]
    assert mixed.status is Status.warning
    assert mixed.remedy.startswith("take those of CUDA 12: pip uninstall -y cupy-cuda13x, then ")


def test_doctor_sees_two_owners_of_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has the other's files over its own, whichever came last."""
    installed = {"epjit-deep-ep": "0.1.0"}
    version = probe.version
    monkeypatch.setattr(
        probe,
        "version",
        lambda name: installed.get(name) or (None if "deep" in name else version(name)),
    )
    assert "deep_ep" not in {check.name for check in software.check_packages()}
    installed["sgl-deep-ep"] = "0.1.2"
    found = {check.name: check for check in software.check_packages()}["deep_ep"]
    assert found.value == "epjit-deep-ep and sgl-deep-ep"
    assert found.remedy.startswith("pip uninstall epjit-deep-ep sgl-deep-ep")


def test_the_verdict_names_gpus_and_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    from epjit.modes import make
    from epjit.runtime import device

    monkeypatch.setattr(make, "use_gpu", lambda: True)
    monkeypatch.setattr(device, "count", lambda: 2)
    monkeypatch.setattr(device, "arch_of", lambda index: "sm_90a")
    monkeypatch.setattr(device, "name", lambda index: "NVIDIA H200")
    last = doctor.verdict([])
    assert last.status is Status.ok
    assert last.value.startswith("runs on 2 x NVIDIA H200 (dispatch push, combine tma")
    wrong = doctor.verdict([Check("s", "n", Status.wrong, "v", "r")])
    assert wrong.status is Status.wrong


def test_the_verdict_on_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_BACKEND", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = invoke("doctor", "--no-peers", code=1)
    assert text.splitlines()[-2].startswith("wrong    a Buffer here: cannot be made: EPJIT_BACKEND")


def test_no_line_of_doctor_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command can be copied from a narrow terminal."""
    from rich.console import Console

    monkeypatch.setattr(show, "console", lambda: Console(width=20, color_system=None))
    remedy = "pip install -e '/a/very/long path/to a/checkout[cu13-rdma]' and more words behind it"
    value = "a value of several words"
    check = Check("section", "a long name of it", Status.wrong, value, remedy)
    doctor.print_checks([check, check])
    text = capsys.readouterr().out
    assert text.count(remedy) == 2
    assert text.count(f"wrong    a long name of it: {value}\n") == 2


# ---- warmup and cache ---------------------------------------------------------------------------


def test_warmup_compiles_once_and_the_cache_travels(cache_dir: Path, tmp_path: Path) -> None:
    shape = [
        "--arch",
        "sm_90a",
        "--ranks",
        "2",
        "--hidden",
        "256",
        "--topk",
        "2",
        "--dtype",
        "bf16",
    ]
    assert "7 compiled, 0 were in the cache" in invoke("warmup", *shape)
    assert "0 compiled, 7 were in the cache" in invoke("warmup", *shape)
    entries = json.loads(invoke("cache", "list", "--json"))["entries"]
    kernels = {entry["kernel"] for entry in entries}
    assert "epjit::intranode_r2_h512_s0_k2::dispatch" in kernels
    assert {entry["arch"] for entry in entries} == {"sm_90a"}
    assert json.loads(invoke("cache", "size", "--json"))["entries"] == 7

    archive = tmp_path / "kernels.tar"
    assert "17 compiled, 7 were in the cache" in invoke("warmup", *shape, "--experts", 8)
    assert "moe.place" in CliRunner().invoke(app, ["warmup", *shape, "--experts", "8"]).output
    assert "24 kernels written" in invoke("cache", "export", archive)
    assert "24 kernels deleted" in invoke("cache", "clear", "--yes")
    assert "0 kernels" in invoke("cache", "size")
    assert "24 kernels added" in invoke("cache", "import", archive)
    assert "0 compiled" in invoke("warmup", *shape)
    assert (cache_dir / "cubins").stat().st_mode & 0o077 == 0


def test_low_latency_warmup() -> None:
    shape = ("--low-latency", "--arch", "sm_80", "--ranks", 2, "--hidden", 128, "--topk", 2)
    with pytest.raises(ValueError, match="--low-latency needs --experts"):
        invoke("warmup", *shape)
    with pytest.raises(ValueError, match=r"64 fp8 with top-2.*multiple of 128 channels"):
        invoke("warmup", *shape, "--experts", 8, "--hidden", 64)
    assert "7 compiled" in invoke("warmup", *shape, "--experts", 8)


@pytest.mark.parametrize(
    ("variable", "value", "chunks"),
    [
        ("NVSHMEM_IB_ENABLE_IBGDA", "1", {4}),
        ("NVSHMEM_IB_ENABLE_IBGDA", "0", {4, 16}),
        ("EPJIT_TRANSPORT", "loopback", {4}),
    ],
)
def test_warmup_for_who_posts(
    variable: str, value: str, chunks: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without IBGDA a thread of the CPU may post what kernels put: it gets larger chunks."""
    monkeypatch.setenv(variable, value)
    group = Group(16, 2, "sm_90a", "")
    calls = [Calls(7168, Dtype.bf16, 8, 0, topk_is_int64=True, logfmt=False)]
    found = [vars(config).get("tokens_per_chunk") for config in _normal(group, calls)]
    assert set(filter(None, found)) == chunks


def test_warmup_of_every_low_latency_format(cache_dir: Path) -> None:
    """And by the name that a GPU asks for, whatever the user writes."""
    options = ("warmup", "--low-latency", "--ranks", "2", "--hidden", "512", "--topk", "2")
    shape = (*options, "--experts", "8")
    for dtype in ("bf16", "fp8", "fp8_round", "fp8_ue8m0", "mxfp8", "nvfp4"):
        invoke(*shape, "--arch", "sm_90", "--dtype", dtype, "--logfmt")
    said = invoke(*shape, "--arch", "sm_90a", "--dtype", "nvfp4", "--logfmt")
    assert "0 compiled" in said
    with pytest.raises(ValueError, match="rows of mxfp8 are of the low-latency mode"):
        invoke("warmup", "--arch", "sm_90a", "--dtype", "mxfp8")


def test_doctor_names_what_is_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TIMEOUT", "5")
    monkeypatch.setenv("EPJIT_DISPATCH_VARIANT", "fast")
    found = {each.name: each for each in software.check_environment()}
    assert found["EPJIT_TIMEOUT"].status is Status.warning
    assert found["EPJIT_DISPATCH_VARIANT"].status is Status.wrong
    assert "none of auto, push, tma, ldst, direct" in found["EPJIT_DISPATCH_VARIANT"].value


def test_variants_and_the_environment_are_looked_at_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from epjit.cli.doctor.software import check_environment\n"
        "from epjit.cli.variants import variants\n"
        "variants('sm_90a', as_json=True)\n"
        "print([check.value for check in check_environment()])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EPJIT_TIMEOUT_SECONDS": "soon"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "EPJIT_DISPATCH_VARIANT=push" in done.stdout
    assert "EPJIT_TIMEOUT_SECONDS='soon' is not" in done.stdout


def test_warmup_takes_the_archs_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    text = invoke("warmup", "--ranks", 1, "--hidden", 64, "--topk", 0, "--dtype", "fp16")
    assert "for sm_80, sm_90a" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "9"], "9 ranks and top-8: there are kernels for 1 to 8 ranks"),
        (["--hidden", "7"], "a row of 7 bf16 has 14 bytes, but must have a multiple of 16"),
        (["--topk-bits", "16"], "--topk-bits is 16"),
        (["--experts", "9"], "--experts is 9, no multiple of 8 ranks"),
        (["--experts", "80000"], "--experts is 80000, no multiple of 8 ranks up to 65536"),
        (["--arch", "hopper"], "arch is 'hopper'"),
        (["--arch", ""], "arch is ''"),
    ],
)
def test_warmup_refuses(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        invoke("warmup", "--arch", "sm_90a", *arguments)


def test_import_refuses_what_is_no_entry(tmp_path: Path, cache_dir: Path) -> None:
    cache = CubinCache()
    cache.prepare()
    cache.put("a" * 64, Entry("symbol", "log", b"cubin"))
    sound = tmp_path / "sound.tar"
    assert cache.export(sound) == 1
    with tarfile.open(sound) as tar:
        member = tar.getmembers()[0]
        data = bytearray(tar.extractfile(member).read())  # type: ignore[union-attr]
    data[-1] ^= 1
    cases: dict[str, tuple[str, bytes, str]] = {
        "damaged": (member.name, bytes(data), "is damaged"),
        "outside": ("../" + member.name, bytes(data), "which is no entry of this cache"),
        "other": ("notes.txt", b"hello", "which is no entry of this cache"),
    }
    cache.clear()
    for name, (inside, content, said) in cases.items():
        (tmp_path / "content").write_bytes(content)
        archive = tmp_path / f"{name}.tar"
        with tarfile.open(sound) as tar, tarfile.open(archive, "w") as out:
            good = tar.getmembers()[0]
            good.name = "b" * 64 + ".cubin"
            out.addfile(good, tar.extractfile(good))
            out.add(tmp_path / "content", inside)
        with pytest.raises(ValueError, match=said):
            cache.import_archive(archive)
        assert cache.stored() == [], "an archive that is refused must leave nothing"


def test_import_of_what_is_no_archive_is_one_line(tmp_path: Path, cache_dir: Path) -> None:
    cache = CubinCache()
    cache.prepare()
    for key in "ab":
        cache.put(key * 64, Entry("symbol", "log", b"cubin"))
    whole = tmp_path / "whole.tar"
    assert cache.export(whole) == 2
    cache.clear()
    content = whole.read_bytes()
    cases = {
        "empty": b"",
        "foreign": b"no archive at all " * 100,
        "compressed": gzip.compress(content),
        "cut in a header": content[:100],
        "cut in an entry": content[: tarfile.BLOCKSIZE + 20],
        "cut between two": content[: 2 * tarfile.BLOCKSIZE],
        "cut in the second header": content[: 2 * tarfile.BLOCKSIZE + 20],
        "without its end": content[: 4 * tarfile.BLOCKSIZE],
    }
    for name, data in cases.items():
        archive = tmp_path / name
        archive.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is not what .* writes"):
            cache.import_archive(archive)
        assert cache.stored() == []
    done = run("cache", "import", tmp_path / "compressed", code=2)
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(FileNotFoundError):
        invoke("cache", "import", tmp_path / "nothing")
    assert "2 kernels added" in invoke("cache", "import", whole)


def test_an_entry_that_is_no_text_is_damaged(tmp_path: Path) -> None:
    cache = CubinCache()
    cache.prepare()
    payload = struct.pack("<III", 1, 1, 1) + b"\xff\xff\xff"
    file = cache.directory / ("a" * 64 + ".cubin")
    file.write_bytes(hashlib.sha256(payload).digest() + payload)
    assert cache.get("a" * 64) is None


def test_a_damaged_entry_is_listed_and_not_exported(tmp_path: Path) -> None:
    cache = CubinCache()
    cache.prepare()
    cache.put("a" * 64, Entry("symbol", "log", b"cubin"))
    (cache.directory / ("b" * 64 + ".cubin")).write_bytes(b"half of it")
    assert sorted(each.entry is None for each in cache.stored()) == [False, True]
    assert "damaged" in invoke("cache", "list")
    assert cache.export(tmp_path / "x.tar") == 1


def test_readable() -> None:
    assert readable("_ZN5epjit12intranode_r86layoutENS_12LayoutParamsE") == (
        "epjit::intranode_r8::layout"
    )
    assert readable("probe") == "probe"


def test_variants_names_every_one() -> None:
    found = json.loads(invoke("variants", "--arch", "sm_80", "--json"))["variants"]
    taken = {each["op"]: each["variant"] for each in found if each["chosen"]}
    assert taken["dispatch"] == taken["combine"] == "ldst"
    assert {each["set"] for each in found} >= {"EPJIT_DISPATCH_VARIANT=push"}


# ---- bench and tune -----------------------------------------------------------------------------


def test_bench_on_the_cpu_backend(tmp_path: Path) -> None:
    out, plot = tmp_path / "out.jsonl", tmp_path / "out.png"
    done = run("bench", *SMALL, "--compare", "deep_ep", "--json", out, EPJIT_BACKEND="cpu")
    assert "the CPU backend, whose times say nothing" in done.stderr
    assert "epjit faster" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["op"] == "run"
    assert rows[0]["ranks"] == 2
    results = {(row["module"], row["op"], row.get("dtype")) for row in rows[1:]}
    for module in ("epjit", "deep_ep"):
        assert (module, "dispatch cached", "fp8") in results
        assert (module, "combine", "bf16") in results
    from epjit.cli.bench import draw

    draw(rows, plot)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_low_latency_bench_on_the_cpu_backend(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = [*SMALL, "--low-latency", "--tokens", 4, "--compare", "deep_ep", "--json", out]
    run("bench", *arguments, EPJIT_BACKEND="cpu")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    results = {(row["module"], row["op"], row["dtype"]) for row in rows[1:]}
    for module in ("epjit", "deep_ep"):
        for dtype in ("fp8", "bf16"):
            assert (module, "low-latency dispatch", dtype) in results
            assert (module, "low-latency combine", dtype) in results
            assert (module, "low-latency pair, eager", dtype) in results
            sent = (module, "low-latency combine, weights sent", dtype)
            assert (sent in results) is (module == "epjit")


def test_elastic_bench_on_the_cpu_backend(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run("bench", *SMALL, "--elastic", "--tokens", 4, "--json", out, EPJIT_BACKEND="cpu")
    assert "of Buffer" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    results = {(row["op"], row["dtype"]) for row in rows[1:]}
    assert {row["tokens"] for row in rows[1:] if row["of_buffer"] > 0} == {16, 4}
    for order in ("", " by expert"):
        assert (f"combine{order}", "bf16") in results
        for dtype in ("fp8", "bf16"):
            for kind in ("", ", host waits", ", cached"):
                assert (f"dispatch{order}{kind}", dtype) in results


def test_bench_says_what_a_rank_died_of() -> None:
    settings = Settings(
        ranks=1,
        hidden=128,
        experts=1,
        topk=1,
        tokens=(1,),
        compare=("no_such_module",),
        device="cpu",
    )
    with pytest.raises(RuntimeError, match=r"rank 0 failed(?s:.*)no_such_module"):
        low_latency.run(settings, on_row=len)


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_times_need_a_gpu_for_each_rank(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPJIT_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"--ranks is 4, but times need .* and there are 2"):
        invoke(command, "--ranks", 4)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses to start processes: a command must refuse before it starts any."""
    from epjit.bench import timing

    def spawn(*args: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setenv("EPJIT_BACKEND", "cpu")
    monkeypatch.setattr(timing.mp, "spawn", spawn)


@pytest.mark.parametrize("command", ["bench", "tune"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", 0], "ranks is 0, but must be at least 1"),
        (["--ranks", -1], "ranks is -1, but must be at least 1"),
        (["--ranks", 9, "--experts", 9], "9 ranks in NVLink domains of 9, but a domain has up to"),
        (["--ranks", 3, "--sms", 5], "3 ranks do not divide 8 experts; numbers of SMs are [5]"),
        (["--hidden", 0], "hidden is 0, but must be a multiple of 128"),
        (["--hidden", 7], "hidden is 7, but must be a multiple of 128"),
        (["--hidden", 16512], "hidden is 16512, but must be"),
        (["--tokens", 0], "tokens are [0], but must be 1 to"),
        (["--topk", 99], "topk is 99, but must be 1 to 8"),
        (["--experts", 7], "2 ranks do not divide 7 experts"),
        (["--experts", 0], "experts is 0, but must be 1 to 65536"),
    ],
)
@pytest.mark.usefixtures("no_processes")
def test_sizes_are_refused_before_it_starts(
    command: str, arguments: list[object], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        invoke(command, "--experts", 8, "--topk", 2, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nvl-bytes", 10], "nvl_bytes is 10, but must be a multiple of 128"),
        (["--ceiling-mb", 0], "ceiling_mb is 0, but must be at least 1"),
        (["--seed", -1], "seed is -1, but must be 0 to 2^63 - 1"),
        (["--compare", "nosuchmodule"], "--compare nosuchmodule: it cannot be imported"),
        (["--compare", ".x"], "--compare .x: it cannot be imported"),
        (["--compare", "json"], "--compare json: it has no Buffer and no topk_idx_t"),
        (["--json", "/proc/nothing.json"], "No such file or directory"),
        (["--plot", "/proc/nothing.png"], "No such file or directory"),
        (["--plot", "out.nothing"], "is not supported"),
        (["--plot", "x.png", "--low-latency"], "which this does not measure"),
        (["--plot", "x.png", "--elastic"], "which this does not measure"),
        (["--stores", "--low-latency"], "--low-latency and --stores are several runs; pass one"),
        (["--elastic", "--stores"], "--stores and --elastic are several runs; pass one of them"),
        (["--elastic", "--compare", "deep_ep"], "--elastic compares with Buffer of the same run"),
        (["--stores"], "measures GPUs, and this is the CPU backend"),
        (["--low-latency", "--tokens", 1 << 20], "num_max_dispatch_tokens_per_rank is 1048576"),
    ],
)
@pytest.mark.usefixtures("no_processes")
def test_bench_refuses_before_it_starts(
    arguments: list[object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((OSError, ValueError), match=re.escape(said)):
        invoke("bench", *SMALL, *arguments)


@pytest.mark.usefixtures("no_processes")
def test_a_plot_without_matplotlib_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"package matplotlib.*\[bench\]'"):
        invoke("bench", *SMALL, "--plot", tmp_path / "out.png")


@pytest.mark.parametrize("command", ["bench", "tune"])
@pytest.mark.usefixtures("no_processes")
def test_times_of_a_gpu_that_is_not_there(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_BACKEND", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="EPJIT_BACKEND=cuda, but torch finds no GPU"):
        invoke(command)


def noisy(rank: int, queue: Any) -> None:
    """A rank whose libraries write to stdout, as Gloo does, from C++."""
    os.write(1, b"[Gloo] Rank is connected\n")
    queue.put({"op": "run", "rank": rank})


def test_what_a_rank_prints_is_no_result(capfd: pytest.CaptureFixture[str]) -> None:
    from epjit.bench import timing

    rows = timing.run_ranks(noisy, 1, on_row=len)
    assert rows == [{"op": "run", "rank": 0}]
    said = capfd.readouterr()
    assert said.out == ""
    assert "[Gloo]" in said.err


# ---- what tune keeps ----------------------------------------------------------------------------


def test_tune_keeps_nothing_of_the_cpu(cache_dir: Path) -> None:
    done = run("tune", *SMALL, "--sms", "6", "--json", EPJIT_BACKEND="cpu")
    found = json.loads(done.stdout)
    assert [each["op"] for each in found["winners"]] == ["dispatch", "combine"]
    assert found["file"] == ""
    assert not (cache_dir / "tuned.json").exists()


@pytest.fixture
def fake_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two GPUs, whose times are made up."""
    from epjit.bench import timing
    from epjit.bench import tune as search

    rows: list[dict[str, Any]] = [{"op": "run", "device": "G", "ranks": 2, "hidden": 7168}]
    for op in ("dispatch", "combine"):
        rows.append({"op": op, "variant": "tma", "tokens": 4096, "sms": 16, "us": 1.0})
    monkeypatch.setattr(timing, "ranks_and_device", lambda ranks: (2, "cuda"))
    monkeypatch.setattr(search, "run", lambda settings, *, on_row: rows)


@pytest.mark.usefixtures("fake_search")
def test_tune_keeps_what_it_found_and_shows_and_forgets_it(cache_dir: Path) -> None:
    file = cache_dir / "tuned.json"
    assert f"{file} does not exist" in invoke("tune", "--clear")
    assert "nothing was kept: --sms left out the others" in invoke("tune", "--sms", 16)
    assert "nothing was kept: --dry-run" in invoke("tune", "--dry-run")
    assert json.loads(invoke("tune", "--show", "--json"))["winners"] == []
    assert f"kept in {file}" in invoke("tune")
    shown = json.loads(invoke("tune", "--show", "--json"))
    assert shown["file"] == str(file)
    assert [(each["op"], each["num_sms"]) for each in shown["winners"]] == [
        ("dispatch", 16),
        ("combine", 16),
    ]
    assert "14336" in invoke("tune", "--show")
    assert f"{file} is kept; `python -m epjit tune --clear`" in invoke("cache", "clear", "--yes")
    with pytest.raises(ValueError, match="exclude each other"):
        invoke("tune", "--show", "--clear")
    assert f"{file} is deleted" in invoke("tune", "--clear")
    assert tuned.load() == ()


@pytest.mark.usefixtures("fake_search")
def test_tune_knows_first_whether_it_can_keep_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    from epjit.bench import tune as search

    monkeypatch.setenv("EPJIT_CACHE_DIR", "/proc/nothing")
    monkeypatch.setattr(search, "run", lambda *args, **options: pytest.fail("it searched"))
    with pytest.raises(OSError, match="/proc/nothing"):
        invoke("tune")


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_buffer_uses_what_was_tuned_for_such_shapes(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of a toy for everything; without a shape, V1's own is taken."""
    from epjit import Buffer, buffer

    monkeypatch.setattr(buffer, "use_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "G")
    config = getattr(Buffer, f"get_{op}_config")
    tuned.store([winner(op=op, hidden_bytes=512, num_tokens=16, num_sms=4)])
    assert config(2).num_sms == 20
    assert config(2, hidden_bytes=14336, num_tokens=4096).num_sms == 20
    assert config(2, hidden_bytes=512, num_tokens=16).num_sms == 4
    tuned.store([winner(op=op, num_sms=24), winner(op=op, num_tokens=128, num_sms=8)])
    assert config(2).num_sms == 24
    assert config(4).num_sms == 20
    assert config(2, hidden_bytes=7168, num_tokens=2048).num_sms == 24
    assert config(2, hidden_bytes=14336, num_tokens=100).num_sms == 8
    assert config(2, hidden_bytes=14336, num_tokens=700).num_sms == 20
    monkeypatch.setattr(Buffer, "_sms_are_set", True)
    assert config(2).num_sms == 20
    monkeypatch.setattr(Buffer, "_sms_are_set", False)
    monkeypatch.setattr(buffer, "use_gpu", lambda: False)
    assert config(2).num_sms == 20, "the CPU backend has nothing to tune"


def test_a_tuned_config_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tuned.store([winner(gpu="logged")])
    with caplog.at_level("INFO", logger="epjit"):
        for tokens in (4096, 4000, 0):
            used = tuned.best(
                "dispatch", gpu="logged", num_ranks=2, hidden_bytes=14336, num_tokens=tokens
            )
            assert used is not None
    (record,) = caplog.records
    assert record.name == "epjit.tuned"
    assert "24 SMs, variant push" in record.message


def test_the_version() -> None:
    import epjit

    assert run("--version").stdout == f"epjit {epjit.__version__}\n"


def test_an_error_is_one_line() -> None:
    done = run("warmup", "--arch", "sm_90a", "--hidden", "7", code=2)
    assert done.stderr.startswith("error: a row of 7 bf16 has 14 bytes")
    assert "Traceback" not in done.stderr


def winner(**values: Any) -> tuned.Tuned:
    """A winner whose other values do not matter."""
    given = {
        "gpu": "G",
        "op": "dispatch",
        "num_ranks": 2,
        "hidden_bytes": 14336,
        "num_tokens": 4096,
        "num_sms": 24,
        "variant": "push",
        "us": 1.0,
        "version": "0",
    }
    return tuned.Tuned(**{**given, **values})


def test_winners_prefers_fewer_sms_within_the_slack() -> None:
    from epjit.bench.tune import winners

    rows: list[dict[str, Any]] = [{"op": "run", "device": "G", "ranks": 2, "hidden": 64}]
    times = {("tma", 4): 300.0, ("tma", 12): 101.0, ("push", 12): 100.5, ("tma", 24): 100.0}
    for op in ("dispatch", "combine"):
        for (variant, sms), us in times.items():
            rows.append({"op": op, "variant": variant, "tokens": 8, "sms": sms, "us": us})
    best = winners(rows, slack=0.02)[0]
    assert (best.num_sms, best.variant, best.hidden_bytes) == (12, "push", 128)
    assert winners(rows, slack=0.0)[0].num_sms == 24


def test_tuned_finds_the_nearest_shape() -> None:
    few = winner(num_tokens=128, num_sms=8)
    narrow = winner(hidden_bytes=4096, num_sms=12)
    many = winner()
    tuned.store([few, narrow])
    tuned.store([many, winner(gpu="H", num_sms=2)])
    assert len(tuned.load()) == 4
    best = tuned.best
    group = {"gpu": "G", "num_ranks": 2}
    assert best("dispatch", **group, hidden_bytes=16384) == many, "the most tokens decide"
    assert best("dispatch", **group, hidden_bytes=16384, num_tokens=200) == few
    assert best("dispatch", **group, hidden_bytes=16384, num_tokens=9999) == many
    assert best("dispatch", **group, hidden_bytes=4000, num_tokens=9999) == narrow
    assert best("combine", **group, hidden_bytes=14336) is None
    for far in ({"hidden_bytes": 1024}, {"hidden_bytes": 32768}):
        assert best("dispatch", **group, **far, num_tokens=4096) is None
    for tokens in (1, 700, 1 << 16):
        assert best("dispatch", **group, hidden_bytes=14336, num_tokens=tokens) is None
    tuned.store([winner(num_sms=16)])
    assert len(tuned.load()) == 4, "the winner of a shape is replaced"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"format": 1, "winners": [{}]}'])
def test_a_damaged_tuned_file_is_a_warning(cache_dir: Path, text: str) -> None:
    cache_dir.mkdir()
    (cache_dir / "tuned.json").write_text(text)
    with pytest.warns(UserWarning, match=r"tuned\.json cannot be used"):
        assert tuned.load() == ()


def test_auto_takes_the_tuned_variant_where_it_runs() -> None:
    from epjit.kernels import variants

    assert variants.resolve("dispatch", "sm_90a", preferred="tma") == "tma"
    assert variants.resolve("dispatch", "sm_80", preferred="push") == "ldst"
    assert variants.resolve("dispatch", "sm_90a", preferred="gone") == "push"


def test_auto_pulls_where_there_are_many_ranks(cache_dir: Path) -> None:
    from epjit.kernels import intranode
    from epjit.kernels.shapes import DispatchShape

    assert not cache_dir.exists()
    shape = DispatchShape(14336, 0, 8, True)
    for num_ranks, push in ((2, True), (3, False), (8, False)):
        configs = intranode.kernels_of([shape], num_ranks=num_ranks, arch="sm_90a")
        (config,) = (each for each in configs if isinstance(each, intranode.DispatchConfig))
        assert config.push is push
