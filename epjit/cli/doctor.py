"""`doctor`: is this machine ready? One line a check, with the remedy; the last is the verdict."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.text import Text

from epjit.cli import show
from epjit.remedy import cuda_major, install_command, upgrade_command


class Status(str, Enum):
    """What a check found."""

    ok = "ok"
    info = "info"  # not there, and nothing is to be done about it on this machine
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


_STYLES = {
    Status.ok: "green",
    Status.info: "cyan",
    Status.warning: "yellow",
    Status.wrong: "bold red",
}
_RDMA = "between NVLink domains (RDMA)"
_FABRIC = "fabric (only for use_fabric=True)"
_NO_DRIVER = (
    "none, so everything runs on the CPU backend; should there be a GPU, install NVIDIA's driver "
    "(in a container: docker run --gpus all)"
)
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
    checks.append(verdict(checks))
    if as_json:
        typer.echo(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        print_checks(checks)
    if any(check.status is Status.wrong for check in checks):
        raise typer.Exit(1)


def print_checks(checks: list[Check]) -> None:
    """A line a check, the remedy below it; never broken, so that a command can be copied."""
    out = show.console()
    section = ""
    *lines, last = checks
    for check in lines:
        if check.section != section:
            section = check.section
            out.print(section, style="bold")
        _print(check, indent="  ")
    counts = {status: sum(check.status is status for check in lines) for status in Status}
    out.print(", ".join(f"{count} {status.value}" for status, count in counts.items()))
    _print(last)


def _print(check: Check, indent: str = "") -> None:
    out = show.console()
    mark = Text(f"{check.status.value:8}", style=_STYLES[check.status])
    out.print(Text.assemble(indent, mark, f" {check.name}: {check.value}"), soft_wrap=True)
    if check.remedy:
        out.print(Text(f"{indent:9} -> {check.remedy}"), soft_wrap=True)


def verdict(checks: list[Check]) -> Check:
    """The verdict: the devices that a Buffer would run on, after all other checks."""
    from epjit import env

    section, name = "verdict", "a Buffer here"
    try:
        from epjit.kernels import intranode, variants
        from epjit.modes.make import use_gpu
        from epjit.runtime import device

        if not use_gpu():
            why = "EPJIT_BACKEND=cpu" if env.backend() == "cpu" else "torch finds no GPU"
            value = f"runs on the CPU backend ({why}): the same results, and not fast"
            return Check(section, name, Status.ok, value)
        count, arch = device.count(), device.arch_of(0)
        preferred = intranode.preferred_variant(count)
        taken = [
            f"{op} {variants.resolve(op, arch, preferred=preferred if op == 'dispatch' else None)}"
            for op in ("dispatch", "combine", "low_latency_combine")
        ]
        value = f"runs on {' and '.join(_gpu_names())} ({', '.join(taken)})"
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        remedy = "do what the lines above that are wrong say"
        return Check(section, name, Status.wrong, f"cannot be made: {error}", remedy)
    if any(check.status is Status.wrong for check in checks):
        return Check(section, name, Status.wrong, f"{value} once what is wrong above is put right")
    return Check(section, name, Status.ok, value)


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
        Status.ok if system == "Linux" else Status.info,
        f"{system} {platform.release()} {platform.machine()}"
        f"{'' if system == 'Linux' else ': GPUs are only used on Linux'}",
    )


def check_packages() -> Iterator[Check]:
    """What epjit stands on: version, and the file that is loaded."""
    yield _module("torch", "torch", Status.wrong, install_command("torch"))
    yield _module("numpy", "numpy", Status.wrong, install_command(""))
    yield _gpu_module("cuda.bindings", "cuda-bindings")
    installed = [name for name in _CUPY_PACKAGES if _version(name)]
    if len(installed) > 1:
        yield Check(
            "packages", "cupy", Status.wrong, " and ".join(installed), _one_of(installed, "cu*")
        )
    else:
        yield _gpu_module("cupy", installed[0] if installed else f"cupy-cuda{cuda_major() or 13}x")
    yield _cuda_versions()


def check_compiler() -> Iterator[Check]:
    """NVRTC: which file, and whether it compiles."""
    from epjit.runtime import nvrtc

    try:
        version = nvrtc.version()
    except ImportError as error:
        if _has_gpu():
            yield Check("compiler", "NVRTC", Status.wrong, "not found", str(error))
        else:
            value = "not found; it is only needed for a GPU, and for `warmup`"
            yield Check("compiler", "NVRTC", Status.info, value)
        return
    yield Check("compiler", "NVRTC", Status.ok, f"{version[0]}.{version[1]} ({_mapped('nvrtc')})")
    arch = _arch()
    start = time.perf_counter()
    try:
        nvrtc.compile_cubin(
            "__global__ void probe() {}", "probe.cu", arch=arch, headers={}, name_expression="probe"
        )
    except RuntimeError as error:
        remedy = f"an NVRTC that knows {arch}: {upgrade_command('nvidia-cuda-nvrtc')}"
        yield Check("compiler", "compiles", Status.wrong, str(error), remedy)
        return
    ms = (time.perf_counter() - start) * 1e3
    yield Check("compiler", "compiles", Status.ok, f"for {arch}, in {ms:.0f} ms")
    driver = _driver_cuda()
    if driver is not None and version[0] > driver[0]:
        yield Check(
            "compiler",
            "fits the driver",
            Status.wrong,
            f"NVRTC is of CUDA {version[0]}.{version[1]}, the driver of {driver[0]}.{driver[1]}",
            f"update the driver, or take torch and all packages of CUDA {driver[0]}: "
            f"{install_command(f'cu{driver[0]}')}",
        )


# ---- GPUs ---------------------------------------------------------------------------------------


def check_gpus() -> Iterator[Check]:
    """Driver and GPUs."""
    from epjit.arch import arch_number
    from epjit.runtime import device, driver

    try:
        count = device.count()
    except ImportError as error:
        if _has_gpu():
            yield Check("GPUs", "driver", Status.wrong, "cannot be asked", str(error))
        else:
            yield Check("GPUs", "driver", Status.info, _NO_DRIVER)
        return
    except RuntimeError as error:
        if Path("/dev/nvidiactl").exists():
            remedy = (
                "unset CUDA_VISIBLE_DEVICES if it hides the GPU, else install the libraries of "
                "NVIDIA's driver, in the version that is loaded"
            )
            yield Check("GPUs", "driver", Status.warning, f"there is a GPU, but {error}", remedy)
        else:
            yield Check("GPUs", "driver", Status.info, _NO_DRIVER)
        return
    major, minor = divmod(int(driver.call("cuDriverGetVersion")), 1000)
    yield Check("GPUs", "driver", Status.ok, f"{_driver_version()}, CUDA {major}.{minor // 10}")
    for index in range(count):
        arch = device.arch_of(index)
        text = f"{device.name(index)}, {arch}, {device.num_sms(index)} SMs"
        supported = arch_number(arch) >= 80
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
        _FABRIC,
        "allocation with a fabric handle",
        Status.ok if works else Status.info,
        "works" if works else f"{reason}; without use_fabric CUDA IPC is used, within one host",
    )
    yield Check(
        _FABRIC,
        "IMEX channels",
        Status.ok if channels else Status.info,
        ", ".join(channel.name for channel in channels)
        or "none; between hosts of one NVLink domain: start nvidia-imex, then "
        "nvidia-modprobe -c 0 -i",
    )


def check_rdma() -> Iterator[Check]:
    """What several NVLink domains need: NVSHMEM, a linker, NICs, and IBGDA's own things."""
    from epjit import env

    nics = _nics()
    yield _nvshmem()
    yield _nvshmem_kernels()
    yield Check(
        _RDMA,
        "NICs",
        Status.ok if nics else Status.info,
        ", ".join(nics)
        or "none in /sys/class/infiniband; between nodes install the NIC's driver (rdma-core)",
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
    from epjit.kernels import variants

    # They register their variants, and need torch, whose absence another line says.
    with contextlib.suppress(ImportError):
        from epjit.kernels import expert_major, intranode, low_latency  # noqa: F401

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


def _has_gpu() -> bool:
    """Whether there is a GPU; without the package that asks the driver, whether it has one."""
    from epjit.runtime import device

    try:
        return device.count() > 0
    except ImportError:
        return _loads("libcuda.so.1")
    except RuntimeError:
        return False


def _gpu_names() -> list[str]:
    """Product names with their numbers, such as ``"4 x NVIDIA H200"``."""
    from epjit.runtime import device

    names = [device.name(index) for index in range(device.count())]
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]


def _nics() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))


def _torch() -> ModuleType | None:
    """None when it is missing or broken, which the line of the package says."""
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError):
        return None


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
    except (ImportError, OSError) as error:  # torch without one of its libraries: OSError
        return Check("packages", distribution, absent, f"not there: {error}", remedy)
    version = getattr(loaded, "__version__", "") or _version(distribution)
    where = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", [])), "")
    return Check("packages", distribution, Status.ok, f"{version} ({where})")


def _gpu_module(module: str, distribution: str) -> Check:
    """`_module`, for a package that only GPUs need."""
    if _has_gpu():
        return _module(module, distribution, Status.wrong, install_command("cu*"))
    found = _module(module, distribution, Status.info, "")
    if found.status is Status.info:
        found = dataclasses.replace(found, value="not there; it is only needed with a GPU")
    return found


def _one_of(installed: list[str], extra: str) -> str:
    """The remedy when packages overwrite each other's files."""
    return (
        f"two of them overwrite each other: pip uninstall -y {' '.join(installed)}, then "
        f"{install_command(extra)}"
    )


def _cuda_versions() -> Check:
    """Whether torch, CuPy and cuda-bindings are of one CUDA."""
    found: dict[str, int] = {}
    torch = _torch()
    if torch is not None and torch.version.cuda:
        found["torch"] = int(torch.version.cuda.partition(".")[0])
    for name in (*_CUPY_PACKAGES, "cuda-bindings"):
        version = _version(name)
        if version:
            suffix = re.search(r"cuda(\d+)x", name)
            if suffix or name == "cuda-bindings":
                found[name] = int(suffix[1] if suffix else version.partition(".")[0])
    value = ", ".join(f"{name}: {major}" for name, major in found.items())
    if len(set(found.values())) <= 1:
        return Check("packages", "CUDA versions", Status.ok, value or "no package of CUDA's")
    if not _has_gpu():
        return Check("packages", "CUDA versions", Status.info, value)
    strangers = [name for name in found if name.startswith("cupy") and found[name] != cuda_major()]
    first = f"pip uninstall -y {' '.join(strangers)}, then " if strangers else ""
    return Check(
        "packages",
        "CUDA versions",
        Status.warning,
        value,
        f"take those of CUDA {cuda_major() or 13}: {first}{install_command('cu*')}",
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
            _one_of(installed, "cu*-rdma"),
        )
    try:
        found = nvshmem.find_installation()
    except ImportError as error:
        return _only_between_nodes("NVSHMEM", "not found", str(error))
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
        return _only_between_nodes(name, "cannot be linked", str(error))
    fits = linker >= compiler
    return Check(
        _RDMA,
        name,
        Status.ok if fits else Status.wrong,
        f"nvJitLink {linker[0]}.{linker[1]} ({_mapped('nvJitLink')})",
        ""
        if fits
        else f"it is older than NVRTC {compiler[0]}.{compiler[1]}: "
        f"{upgrade_command('nvidia-nvjitlink')}",
    )


def _only_between_nodes(name: str, value: str, remedy: str) -> Check:
    """The severity of a missing part: it matters with a NIC, or with an NVSHMEM of one's own."""
    from epjit import env

    if _nics() or env.nvshmem_dir():
        return Check(_RDMA, name, Status.warning, value, f"only between nodes: {remedy}")
    return Check(_RDMA, name, Status.info, f"{value}; it is only needed between nodes")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _torch_sees(count: int) -> Check:
    torch = _torch()
    if torch is None:
        return Check("GPUs", "torch", Status.wrong, "not there", install_command("torch"))
    seen = torch.cuda.device_count()
    if seen == count:
        return Check("GPUs", "torch", Status.ok, f"sees {count}")
    remedy = (
        f"it was built for CUDA {torch.version.cuda}: update the driver, or take an older one"
        if torch.version.cuda
        else f"it was built for the CPU: take the one for CUDA {cuda_major()} "
        "(https://pytorch.org/get-started/locally)"
    )
    return Check(
        "GPUs", "torch", Status.wrong, f"{torch.__version__} sees {seen} of {count}", remedy
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
