"""Questions to the machine that several checks ask. None of them fails."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import re
from pathlib import Path
from types import ModuleType


def num_gpus() -> int:
    """GPUs that the driver shows; 0 where it cannot be asked."""
    from epjit.runtime import device

    try:
        return device.count()
    except (ImportError, RuntimeError):
        return 0


def has_gpu() -> bool:
    """Whether there is a GPU; without the package that asks the driver, whether it has one."""
    from epjit.runtime import device

    try:
        return device.count() > 0
    except ImportError:
        return loads("libcuda.so.1")
    except RuntimeError:
        return False


def driver_cuda() -> tuple[int, int] | None:
    """Version of CUDA that the driver is of; None where it cannot be asked."""
    from epjit.runtime import driver

    try:
        major, minor = divmod(int(driver.call("cuDriverGetVersion")), 1000)
    except (ImportError, RuntimeError):
        return None
    return major, minor // 10


def nics() -> list[str]:
    """Names of the NICs that RDMA could use."""
    return sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))


def torch() -> ModuleType | None:
    """None when it is missing or broken, which the line of the package says."""
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError):
        return None


def version(distribution: str) -> str:
    """Version of a package; empty when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def loads(library: str) -> bool:
    """Whether the loader finds a library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def mapped(word: str) -> str:
    """File of a loaded library."""
    found = re.search(rf"\S*/lib{word}\.so\S*", read("/proc/self/maps"))
    return found[0] if found else "file not known"


def read(path: str) -> str:
    """Text of a file; empty when it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
