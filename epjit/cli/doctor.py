"""`doctor`: is this machine ready? One line a check: ok, warning or wrong, with the remedy."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from epjit.cli import show


class Status(str, Enum):
    """What a check found."""

    ok = "ok"
    warning = "warning"  # works, though slower or without something
    wrong = "wrong"


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        section: What it belongs to.
        name: What was looked at.
        status: What was found.
        value: In words or numbers.
        remedy: What to do; empty when all is well.
    """

    section: str
    name: str
    status: Status
    value: str
    remedy: str = ""


_STYLES = {Status.ok: "green", Status.warning: "yellow", Status.wrong: "bold red"}
_CUDA_EXTRAS = {12: "cu12", 13: "cu13"}
_RDMA = "between NVLink domains (RDMA)"
_OF_TESTS = ("EPJIT_TEST_", "EPJIT_DEEPEP_TESTS")
_SLOW_LINK = 20.0  # GB/s: less than any NVLink
_NVSHMEM_PACKAGES = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    peers: Annotated[bool, typer.Option(help="Measure the links between GPUs.")] = True,
) -> None:
    """Check this machine; the exit code is 1 when something is wrong."""
    sections: list[Callable[[], Iterator[Check]]] = [
        check_platform,
        check_packages,
        check_compiler,
        check_gpus,
        *([check_peers] if peers else []),
        check_fabric,
        check_rdma,
        check_cache,
        check_environment,
    ]
    checks: list[Check] = []
    with show.steps(len(sections)) as steps:
        for section in sections:
            checks += section()
            if not as_json:
                steps.next(section.__name__.replace("_", " "))
    if as_json:
        typer.echo(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        print_checks(checks)
    if any(check.status is Status.wrong for check in checks):
        raise typer.Exit(1)


def print_checks(checks: list[Check]) -> None:
    """A line a check, the remedy below it."""
    out = show.console()
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            out.print(section, style="bold")
        mark = f"{check.status.value:8}"
        out.print(f"  [{_STYLES[check.status]}]{mark}[/] {check.name}: ", end="")
        out.print(check.value, markup=False, soft_wrap=True)
        if check.remedy:
            out.print(f"           -> {check.remedy}", markup=False, soft_wrap=True)
    counts = {status: sum(check.status is status for check in checks) for status in Status}
    out.print(", ".join(f"{count} {status.value}" for status, count in counts.items()))


# ---- what runs ----------------------------------------------------------------------------------


def check_platform() -> Iterator[Check]:
    """Operating system, Python, epjit."""
    import epjit

    where = Path(epjit.__file__).parent
    yield Check("platform", "epjit", Status.ok, f"{epjit.__version__} ({where})")
    yield Check("platform", "Python", Status.ok, platform.python_version())
    system = platform.system()
    yield Check(
        "platform",
        "system",
        Status.ok if system == "Linux" else Status.warning,
        f"{system} {platform.release()} {platform.machine()}",
        "" if system == "Linux" else "GPUs are only used on Linux",
    )


def check_packages() -> Iterator[Check]:
    """What epjit stands on: version, and the file that is loaded."""
    has_gpu = _num_gpus() > 0
    absent = Status.wrong if has_gpu else Status.warning
    why = "" if has_gpu else " (only needed with a GPU)"
    yield _module("torch", "torch", Status.wrong, "pip install 'epjit[torch]'")
    yield _module("numpy", "numpy", Status.wrong, "pip install numpy")
    yield _module("cuda.bindings", "cuda-bindings", absent, f"pip install 'epjit[cu13]'{why}")
    installed = [name for name in _CUPY_PACKAGES if _version(name)]
    if len(installed) > 1:
        yield Check(
            "packages",
            "cupy",
            Status.wrong,
            " and ".join(installed),
            f"two of them overwrite each other: pip uninstall {' '.join(installed)}, then install "
            "one",
        )
    else:
        name = installed[0] if installed else "cupy-cuda13x"
        yield _module("cupy", name, absent, f"pip install 'epjit[cu13]'{why}")
    yield _cuda_versions()


def check_compiler() -> Iterator[Check]:
    """NVRTC: which file, and whether it compiles."""
    from epjit.runtime import nvrtc

    try:
        version = nvrtc.version()
    except ImportError as error:
        status = Status.wrong if _num_gpus() else Status.warning
        yield Check("compiler", "NVRTC", status, "not found", str(error))
        return
    yield Check("compiler", "NVRTC", Status.ok, f"{version[0]}.{version[1]} ({_mapped('nvrtc')})")
    arch = _arch()
    start = time.perf_counter()
    try:
        nvrtc.compile_cubin(
            "__global__ void probe() {}", "probe.cu", arch=arch, headers={}, name_expression="probe"
        )
    except RuntimeError as error:
        remedy = f"an NVRTC that knows {arch}: pip install --upgrade 'epjit[cu13]'"
        yield Check("compiler", "compiles", Status.wrong, str(error), remedy)
        return
    ms = (time.perf_counter() - start) * 1e3
    yield Check("compiler", "compiles", Status.ok, f"for {arch}, in {ms:.0f} ms")
    driver = _driver_cuda()
    if driver is not None and version[0] > driver[0]:
        extra = _CUDA_EXTRAS.get(driver[0], "cu12")
        yield Check(
            "compiler",
            "fits the driver",
            Status.wrong,
            f"NVRTC is of CUDA {version[0]}.{version[1]}, the driver of {driver[0]}.{driver[1]}",
            f"update the driver, or pip install 'epjit[{extra}]'",
        )


# ---- GPUs ---------------------------------------------------------------------------------------


def check_gpus() -> Iterator[Check]:
    """Driver and GPUs."""
    from epjit.runtime import device, driver

    try:
        count = device.count()
    except ImportError as error:
        yield Check("GPUs", "driver", Status.warning, "cannot be asked", str(error))
        return
    except RuntimeError as error:
        yield Check(
            "GPUs",
            "driver",
            Status.warning,
            f"none: {error}",
            "without a GPU everything runs on the CPU backend; with one, install NVIDIA's driver "
            "(in a container: docker run --gpus all)",
        )
        return
    major, minor = divmod(int(driver.call("cuDriverGetVersion")), 1000)
    yield Check("GPUs", "driver", Status.ok, f"{_driver_version()}, CUDA {major}.{minor // 10}")
    for index in range(count):
        arch = device.arch_of(index)
        text = f"{device.name(index)}, {arch}, {device.num_sms(index)} SMs"
        supported = device.arch_number(arch) >= 80
        yield Check(
            "GPUs",
            f"GPU {index}",
            Status.ok if supported else Status.wrong,
            text,
            "" if supported else "epjit needs sm_80 (Ampere) or newer",
        )
    yield _torch_sees(count)


def check_peers() -> Iterator[Check]:
    """Every pair of GPUs: access, GB/s of a copy, latency of a load."""
    if _num_gpus() < 2:
        return
    try:
        from epjit.bench import peers

        for link in peers.measure():
            name = f"GPU {link.reader} reads GPU {link.owner}"
            if not link.accessible:
                yield Check(
                    "peers",
                    name,
                    Status.wrong,
                    "no peer access",
                    "a Buffer needs it between all its GPUs: leave one out with "
                    "CUDA_VISIBLE_DEVICES, or enable it (PCIe: ACS off, one root complex)",
                )
                continue
            fast = link.gigabytes_per_second >= _SLOW_LINK
            yield Check(
                "peers",
                name,
                Status.ok if fast else Status.warning,
                f"{link.gigabytes_per_second} GB/s, {link.latency_us} us a load",
                "" if fast else "slower than NVLink; see `nvidia-smi topo -m`",
            )
    except (ImportError, RuntimeError) as error:
        yield Check("peers", "measurement", Status.wrong, str(error), "see the lines above")


def check_fabric() -> Iterator[Check]:
    """What `use_fabric=True` needs."""
    if not _num_gpus():
        return
    channels = sorted(Path("/dev/nvidia-caps-imex-channels").glob("channel*"))
    works, reason = _fabric_allocation()
    yield Check(
        "fabric (only for use_fabric=True)",
        "allocation with a fabric handle",
        Status.ok if works else Status.warning,
        "works" if works else reason,
        "" if works else "leave use_fabric off: within one host CUDA IPC is used",
    )
    yield Check(
        "fabric (only for use_fabric=True)",
        "IMEX channels",
        Status.ok if channels else Status.warning,
        ", ".join(channel.name for channel in channels) or "none",
        ""
        if channels
        else "between hosts of one NVLink domain: start nvidia-imex, then nvidia-modprobe -c 0 -i",
    )


def check_rdma() -> Iterator[Check]:
    """What several NVLink domains need: NVSHMEM, a linker, NICs, and IBGDA's own things."""
    from epjit import env

    yield _nvshmem()
    yield _nvshmem_kernels()
    nics = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    yield Check(
        _RDMA,
        "NICs",
        Status.ok if nics else Status.warning,
        ", ".join(nics) or "none in /sys/class/infiniband",
        "" if nics else "nothing to do on one node; else install the NIC's driver (rdma-core)",
    )
    if not nics and not env.nvshmem_ib_enable_ibgda.text():
        return
    modules = _read("/proc/modules")
    parameters = _read("/proc/driver/nvidia/params")
    open_driver = "Open Kernel Module" in _read("/proc/driver/nvidia/version")
    peer_memory = "nvidia_peermem" in modules or open_driver
    yield Check(
        _RDMA,
        "GPU memory for the NIC",
        Status.ok if peer_memory else Status.warning,
        "nvidia_peermem"
        if "nvidia_peermem" in modules
        else "DMA-BUF (open driver)"
        if open_driver
        else "neither nvidia_peermem nor the open driver, which has DMA-BUF",
        "" if peer_memory else "modprobe nvidia_peermem, or install the open kernel modules",
    )
    gdrcopy = Path("/dev/gdrdrv").exists()
    yield Check(
        _RDMA,
        "gdrcopy",
        Status.ok if gdrcopy else Status.warning,
        "/dev/gdrdrv" if gdrcopy else "no /dev/gdrdrv",
        ""
        if gdrcopy
        else "signals through the CPU's proxy (without IBGDA) want it: install gdrdrv, modprobe "
        "gdrdrv; in a container pass the device",
    )
    mlx5 = _loads("libmlx5.so.1")
    yield Check(
        _RDMA,
        "IBGDA: libmlx5.so.1",
        Status.ok if mlx5 else Status.warning,
        "loads" if mlx5 else "not found",
        "" if mlx5 else "apt-get install ibverbs-providers (IBGDA works with NVIDIA's NICs only)",
    )
    mapping = "PeerMappingOverride=1" in parameters
    memops = bool(re.search(r"EnableStreamMemOPs:\s*1", parameters))
    yield Check(
        _RDMA,
        "IBGDA: driver parameters",
        Status.ok if mapping and memops else Status.warning,
        f"PeerMappingOverride={int(mapping)}, EnableStreamMemOPs={int(memops)}",
        ""
        if mapping and memops
        else "for a GPU that rings the NIC itself: options nvidia NVreg_EnableStreamMemOPs=1 "
        'NVreg_RegistryDwords="PeerMappingOverride=1;" in /etc/modprobe.d, then reboot (without '
        "them NVSHMEM lets the CPU ring: NVSHMEM_IBGDA_NIC_HANDLER=cpu)",
    )
    yield Check(
        _RDMA,
        "IBGDA: wanted",
        Status.ok,
        "yes"
        if env.nvshmem_ib_enable_ibgda.text()
        else "no: NVSHMEM_IB_ENABLE_IBGDA=1 turns it on",
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    yield Check(
        _RDMA,
        "locked memory",
        Status.ok if unlimited else Status.warning,
        "unlimited" if unlimited else show.size(soft),
        "" if unlimited else "ulimit -l unlimited (docker run --ulimit memlock=-1)",
    )


# ---- what epjit keeps ---------------------------------------------------------------------------


def check_cache() -> Iterator[Check]:
    """The folder of compiled kernels, and what was tuned."""
    from epjit import tuned
    from epjit.runtime.cache import CubinCache

    cache = CubinCache()
    try:
        cache.prepare()
    except OSError as error:
        remedy = "set EPJIT_CACHE_DIR to a folder of your own that can be written"
        yield Check("cache", "folder", Status.wrong, str(error), remedy)
        return
    stored = cache.stored()
    total = sum(each.num_bytes for each in stored)
    free = shutil.disk_usage(cache.directory).free
    yield Check(
        "cache",
        "folder",
        Status.ok if free > 1 << 30 else Status.warning,
        f"{cache.directory}: {len(stored)} kernels, {show.size(total)}; {show.size(free)} free",
        "" if free > 1 << 30 else "make room, or set EPJIT_CACHE_DIR to another disk",
    )
    damaged = sum(each.entry is None for each in stored)
    if damaged:
        yield Check(
            "cache",
            "damaged entries",
            Status.warning,
            str(damaged),
            "they are compiled again when needed; python -m epjit cache clear removes them",
        )
    winners = tuned.load()
    shapes = sorted({(each.gpu, each.num_ranks) for each in winners})
    yield Check(
        "cache",
        "tuned",
        Status.ok,
        "; ".join(f"{gpu} x {ranks}" for gpu, ranks in shapes) or "nothing: V1's default configs",
    )


def check_environment() -> Iterator[Check]:
    """Every variable that is set, and whether it can be read."""
    from epjit import env
    from epjit.runtime import variants

    # They register their variants, and need torch, whose absence another line says.
    with contextlib.suppress(ImportError):
        from epjit import expert_major, intranode, low_latency  # noqa: F401

    known = {variable.name for variable in env.VARIABLES}
    for name in sorted(os.environ):
        if name.startswith("EPJIT_") and name not in known and not name.startswith(_OF_TESTS):
            yield Check(
                "environment", name, Status.warning, "no variable of epjit", "is it misspelt?"
            )
    choices = {env.variant_name(op): variants.choices(op) for op in variants.operations()}
    for variable in env.VARIABLES:
        text = variable.text()
        if not text:
            continue
        try:
            value = variable()
            allowed = choices.get(variable.name)
            if allowed is not None and value not in allowed:
                raise ValueError(f"{text!r} is none of {', '.join(allowed)}")
        except ValueError as error:
            remedy = f"unset {variable.name}, or correct it: {variable.description}"
            yield Check("environment", variable.name, Status.wrong, str(error), remedy)
        else:
            yield Check("environment", variable.name, Status.ok, text)


# ---- helpers ------------------------------------------------------------------------------------


def _num_gpus() -> int:
    from epjit.runtime import device

    try:
        return device.count()
    except (ImportError, RuntimeError):
        return 0


def _arch() -> str:
    from epjit.runtime import device

    return device.arch_of(0) if _num_gpus() else "sm_90a"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _module(module: str, distribution: str, absent: Status, remedy: str) -> Check:
    """Version and file of a package; an import that fails is told in its own words."""
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        return Check("packages", distribution, absent, f"not there: {error}", remedy)
    version = getattr(loaded, "__version__", "") or _version(distribution)
    where = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", [])), "")
    return Check("packages", distribution, Status.ok, f"{version} ({where})")


def _cuda_versions() -> Check:
    """Whether torch, CuPy and cuda-bindings are of one CUDA."""
    found: dict[str, int] = {}
    try:
        import torch

        if torch.version.cuda:
            found["torch"] = int(torch.version.cuda.partition(".")[0])
    except ImportError:
        pass
    for name in (*_CUPY_PACKAGES, "cuda-bindings"):
        version = _version(name)
        if version:
            suffix = re.search(r"cuda(\d+)x", name)
            if suffix or name == "cuda-bindings":
                found[name] = int(suffix[1] if suffix else version.partition(".")[0])
    agree = len(set(found.values())) <= 1
    return Check(
        "packages",
        "CUDA versions",
        Status.ok if agree else Status.warning,
        ", ".join(f"{name}: {major}" for name, major in found.items()) or "no package of CUDA's",
        "" if agree else "take the extra that torch was built for: epjit[cu12] or epjit[cu13]",
    )


def _nvshmem() -> Check:
    """Version and file of the library that would be taken."""
    from epjit.runtime import nvshmem

    installed = [name for name in _NVSHMEM_PACKAGES if _version(name)]
    if len(installed) > 1:
        return Check(
            _RDMA,
            "NVSHMEM",
            Status.wrong,
            " and ".join(installed),
            f"two of them overwrite each other: pip uninstall {' '.join(installed)}, then install "
            "one",
        )
    try:
        found = nvshmem.find_installation()
    except ImportError as error:
        return Check(_RDMA, "NVSHMEM", Status.warning, "not found", f"only between nodes: {error}")
    except RuntimeError as error:
        return Check(_RDMA, "NVSHMEM", Status.wrong, "cannot be used", str(error))
    version = ".".join(map(str, found.version))
    return Check(_RDMA, "NVSHMEM", Status.ok, f"{version} ({found.library})")


def _nvshmem_kernels() -> Check:
    """Whether what kernels are linked with is all there: linker, headers, device code."""
    from epjit.runtime import nvjitlink, nvrtc, nvshmem_device

    name = "kernels with NVSHMEM"
    try:
        linker, compiler = nvjitlink.version(), nvrtc.version()
        nvshmem_device.key()
    except (ImportError, OSError, RuntimeError) as error:
        return Check(
            _RDMA, name, Status.warning, "cannot be linked", f"only between nodes: {error}"
        )
    fits = linker >= compiler
    return Check(
        _RDMA,
        name,
        Status.ok if fits else Status.wrong,
        f"nvJitLink {linker[0]}.{linker[1]} ({_mapped('nvJitLink')})",
        ""
        if fits
        else f"it is older than NVRTC {compiler[0]}.{compiler[1]}: pip install --upgrade "
        "nvidia-nvjitlink (CUDA 12: nvidia-nvjitlink-cu12)",
    )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _torch_sees(count: int) -> Check:
    try:
        import torch
    except ImportError as error:
        remedy = "pip install 'epjit[torch]'"
        return Check("GPUs", "torch", Status.wrong, f"not there: {error}", remedy)
    if torch.cuda.device_count() == count:
        return Check("GPUs", "torch", Status.ok, f"sees {count}")
    return Check(
        "GPUs",
        "torch",
        Status.wrong,
        f"{torch.__version__} sees {torch.cuda.device_count()} of {count}",
        "install a torch that was built for CUDA (this one may be for the CPU)",
    )


def _driver_cuda() -> tuple[int, int] | None:
    from epjit.runtime import driver

    try:
        major, minor = divmod(int(driver.call("cuDriverGetVersion")), 1000)
    except (ImportError, RuntimeError):
        return None
    return major, minor // 10


def _driver_version() -> str:
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", _read("/proc/driver/nvidia/version"))
    return found[1] if found else "version not known"


def _fabric_allocation() -> tuple[bool, str]:
    """Tries it: the attribute that says so is not to be trusted."""
    from epjit.runtime.group import Group, ThreadGroup
    from epjit.runtime.symmetric import SymmetricMemory

    try:
        group = Group.from_comm(ThreadGroup.create(1)[0])
        SymmetricMemory(1 << 20, group=group, device=0, fabric=True).close()
    except (ImportError, RuntimeError) as error:
        return False, str(error).splitlines()[-1].strip()
    return True, ""


def _mapped(word: str) -> str:
    """File of a loaded library."""
    found: Any = re.search(rf"\S*/lib{word}\.so\S*", _read("/proc/self/maps"))
    return found[0] if found else "file not known"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
