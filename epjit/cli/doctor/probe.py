"""Questions to the machine that several checks ask. None of them fails."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import resource
from pathlib import Path
from types import ModuleType

from epjit.runtime import machine


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
        return machine.can_load("libcuda.so.1")
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


def nvshmem_version() -> tuple[int, int, int] | None:
    """Version of the NVSHMEM that would be taken; None without one that can be used."""
    from epjit.runtime import nvshmem

    try:
        return nvshmem.find_installation().version
    except (ImportError, RuntimeError):
        return None


def no_device_code() -> str:
    """Why kernels for the GPU here cannot have IBGDA's functions; empty as far as it is known."""
    from epjit.runtime import nvshmem

    try:
        return nvshmem.why_no_device_code(0 if num_gpus() else None)
    except (ImportError, RuntimeError):
        return ""


def cores() -> int:
    """CPU cores that this process may use, by its affinity and by the quota of its cgroup."""
    number = len(os.sched_getaffinity(0))
    quota, _, period = machine.read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(number, math.ceil(int(quota) / int(period))) if quota.isdecimal() else number


def locked_memory() -> int:
    """Bytes that this process may lock; -1 means any number."""
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def translated_groups() -> int:
    """Groups of devices whose addresses the IOMMU translates; not those that it lets pass."""
    kinds = (machine.read(path) for path in Path("/sys/kernel/iommu_groups").glob("*/type"))
    return sum(kind.startswith("DMA") for kind in kinds)


def verbs() -> dict[str, bool]:
    """Files through which processes use NICs, and whether this one may open each."""
    found = sorted(map(str, Path("/dev/infiniband").glob("uverbs*")))
    return {path: os.access(path, os.R_OK | os.W_OK) for path in found}


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


def mapped(word: str) -> str:
    """File of a loaded library."""
    found = machine.mapped(f"lib{word}.so")
    return str(found[0]) if found else "file not known"
