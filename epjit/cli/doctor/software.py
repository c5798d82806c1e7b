"""Software that epjit stands on: system, Python, packages, compiler; variables that it reads."""

from __future__ import annotations

import importlib
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path

from epjit.cli.doctor import probe
from epjit.cli.doctor.check import Check, Section, Status, only_one
from epjit.remedy import cuda_major, install_command, upgrade_command

_PLATFORM, _PACKAGES = Section("platform"), Section("packages")
_COMPILER, _ENVIRONMENT = Section("compiler"), Section("environment")
_CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
_OWNERS_OF_DEEP_EP = ("epjit-deep-ep", "deep_ep", "sgl-deep-ep", "deepinfer-ep")
_OF_TESTS = ("EPJIT_TEST_", "EPJIT_DEEPEP_TESTS")


def check_platform() -> Iterator[Check]:
    """Operating system, Python, epjit."""
    import epjit

    yield _PLATFORM.ok("epjit", f"{epjit.__version__} ({Path(epjit.__file__).parent})")
    yield _PLATFORM.ok("Python", platform.python_version())
    system = platform.system()
    kind = f"{system} {platform.release()} {platform.machine()}"
    other = f"{kind}: GPUs are only used on Linux"
    yield _PLATFORM.expect("system", system == "Linux", kind, other, severity=Status.info)


def check_packages() -> Iterator[Check]:
    """Packages: version, and the file that is loaded."""
    yield _module("torch", "torch", install_command("torch"))
    yield _module("numpy", "numpy", install_command(""))
    yield _gpu_module("cuda.bindings", "cuda-bindings")
    installed = [name for name in _CUPY_PACKAGES if probe.version(name)]
    if len(installed) > 1:
        yield _PACKAGES.wrong("cupy", " and ".join(installed), only_one(installed, "cu*"))
    else:
        yield _gpu_module("cupy", installed[0] if installed else f"cupy-cuda{cuda_major() or 13}x")
    yield _cuda_versions()
    owners = [name for name in _OWNERS_OF_DEEP_EP if probe.version(name)]
    if len(owners) > 1 and "epjit-deep-ep" in owners:  # pip has put one's files over the other's
        remedy = f"pip uninstall {' '.join(owners)}; then install one, or see compat/README.md"
        yield _PACKAGES.wrong("deep_ep", " and ".join(owners), remedy)


def check_compiler() -> Iterator[Check]:
    """NVRTC: which file, and whether it compiles."""
    from epjit.runtime import device, nvrtc

    try:
        version = nvrtc.version()
    except ImportError as error:
        missing = _COMPILER.wrong("NVRTC", "not found", str(error))
        unused = "not found; it is only needed for a GPU, and for `warmup`"
        yield missing if probe.has_gpu() else _COMPILER.info("NVRTC", unused)
        return
    yield _COMPILER.ok("NVRTC", f"{version[0]}.{version[1]} ({probe.mapped('nvrtc')})")
    arch = device.arch_of(0) if probe.num_gpus() else "sm_90a"
    start = time.perf_counter()
    try:
        nvrtc.compile_unit(
            "__global__ void probe() {}", "probe.cu", arch=arch, headers={}, name_expression="probe"
        )
    except RuntimeError as error:
        remedy = f"an NVRTC that knows {arch}: {upgrade_command('nvidia-cuda-nvrtc')}"
        yield _COMPILER.wrong("compiles", str(error), remedy)
        return
    ms = (time.perf_counter() - start) * 1e3
    yield _COMPILER.ok("compiles", f"for {arch}, in {ms:.0f} ms")
    driver = probe.driver_cuda()
    if driver is not None and version[0] > driver[0]:
        value = f"NVRTC is of CUDA {version[0]}.{version[1]}, the driver of {driver[0]}.{driver[1]}"
        older = f"take torch and all packages of CUDA {driver[0]}"
        remedy = f"update the driver, or {older}: {install_command(f'cu{driver[0]}')}"
        yield _COMPILER.wrong("fits the driver", value, remedy)


def check_environment() -> Iterator[Check]:
    """Every variable that is set, and whether it can be read."""
    from epjit import env
    from epjit.kernels.variants import CHOICES

    known = {variable.name for variable in env.VARIABLES}
    for name in sorted(os.environ):
        if name.startswith("EPJIT_") and name not in known and not name.startswith(_OF_TESTS):
            yield _ENVIRONMENT.warning(name, "no variable of epjit", "is it misspelt?")
    choices = {choice.variable.name: choice.allowed for choice in CHOICES.values()}
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
            yield _ENVIRONMENT.wrong(variable.name, str(error), remedy)
        else:
            yield _ENVIRONMENT.ok(variable.name, text)


def _module(module: str, distribution: str, remedy: str) -> Check:
    """Version and file of a package; an import that fails is told in its own words."""
    try:
        loaded = importlib.import_module(module)
    except (ImportError, OSError) as error:  # torch without one of its libraries: OSError
        return _PACKAGES.wrong(distribution, f"not there: {error}", remedy)
    version = getattr(loaded, "__version__", "") or probe.version(distribution)
    where = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", [])), "")
    return _PACKAGES.ok(distribution, f"{version} ({where})")


def _gpu_module(module: str, distribution: str) -> Check:
    """`_module`, for a package that only GPUs need."""
    found = _module(module, distribution, install_command("cu*"))
    if found.status is Status.ok or probe.has_gpu():
        return found
    return _PACKAGES.info(distribution, "not there; it is only needed with a GPU")


def _cuda_versions() -> Check:
    """Whether torch, CuPy and cuda-bindings are of one CUDA."""
    found: dict[str, int] = {}
    torch = probe.torch()
    if torch is not None and torch.version.cuda:
        found["torch"] = int(torch.version.cuda.partition(".")[0])
    for name in (*_CUPY_PACKAGES, "cuda-bindings"):
        version = probe.version(name)
        if version:
            suffix = re.search(r"cuda(\d+)x", name)
            if suffix or name == "cuda-bindings":
                found[name] = int(suffix[1] if suffix else version.partition(".")[0])
    value = ", ".join(f"{name}: {major}" for name, major in found.items())
    if len(set(found.values())) <= 1:
        return _PACKAGES.ok("CUDA versions", value or "no package of CUDA's")
    if not probe.has_gpu():
        return _PACKAGES.info("CUDA versions", value)
    strangers = [name for name in found if name.startswith("cupy") and found[name] != cuda_major()]
    first = f"pip uninstall -y {' '.join(strangers)}, then " if strangers else ""
    remedy = f"take those of CUDA {cuda_major() or 13}: {first}{install_command('cu*')}"
    return _PACKAGES.warning("CUDA versions", value, remedy)
