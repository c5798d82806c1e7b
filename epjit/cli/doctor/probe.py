"""Questions to the machine that several checks ask. None of them fails."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from epjit.runtime import network

loads = network.can_load
_IPV4 = re.compile(r"0000:0000:0000:0000:0000:ffff:(?!0000:0000)[0-9a-f]{4}:[0-9a-f]{4}")


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


@dataclass(frozen=True)
class Port:
    """One port of a NIC.

    Attributes:
        nic: Name of the NIC, such as ``"mlx5_0"``.
        number: Of the port, from 1.
        active: Whether its link is up.
        link: ``"InfiniBand"`` or ``"Ethernet"``, and for EFA ``"Unspecified"``.
        rate: In words, such as ``"400 Gb/sec (4X NDR)"``.
        driver: Of the NIC, such as ``"mlx5_core"`` or ``"efa"``.
        is_virtual: Whether the NIC is a virtual function of another.
        routable: Whether it has a GID of RoCE v2 with an IPv4 address.
    """

    nic: str
    number: int = 1
    active: bool = True
    link: str = "InfiniBand"
    rate: str = ""
    driver: str = "mlx5_core"
    is_virtual: bool = False
    routable: bool = False

    @property
    def name(self) -> str:
        """As NVSHMEM_HCA_LIST has it."""
        return f"{self.nic}:{self.number}"


def ports(root: str = "/sys/class/infiniband") -> list[Port]:
    """Ports of the NICs that RDMA could use."""
    return [_port(path) for path in sorted(Path(root).glob("*/ports/*"))]


def _port(path: Path) -> Port:
    nic = path.parents[1]
    gids = ((each, path / "gid_attrs/types" / each.name) for each in path.glob("gids/*"))
    return Port(
        nic=nic.name,
        number=int(path.name),
        active="ACTIVE" in read(str(path / "state")),
        link=read(str(path / "link_layer")).strip(),
        rate=read(str(path / "rate")).strip(),
        driver=(nic / "device/driver").resolve().name,
        is_virtual=(nic / "device/physfn").exists(),
        routable=any(
            _IPV4.match(read(str(gid))) and "RoCE v2" in read(str(kind)) for gid, kind in gids
        ),
    )


def nvshmem_version() -> tuple[int, int, int] | None:
    """Version of the NVSHMEM that would be taken; None without one that can be used."""
    from epjit.runtime import nvshmem

    try:
        return nvshmem.find_installation().version
    except (ImportError, RuntimeError):
        return None


def transports() -> list[str]:
    """Transports of NVSHMEM that are loaded in this process, such as ``"ibgda"``."""
    return sorted(set(re.findall(r"nvshmem_transport_(\w+)\.so", read("/proc/self/maps"))))


def cores() -> int:
    """CPU cores that this process may use, by its affinity and by the quota of its cgroup."""
    number = len(os.sched_getaffinity(0))
    quota, _, period = read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(number, math.ceil(int(quota) / int(period))) if quota.isdecimal() else number


def locked_memory() -> int:
    """Bytes that this process may lock; -1 means any number."""
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def translated_groups() -> int:
    """Groups of devices whose addresses the IOMMU translates; not those that it lets pass."""
    kinds = (read(str(path)) for path in Path("/sys/kernel/iommu_groups").glob("*/type"))
    return sum(kind.startswith("DMA") for kind in kinds)


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return Path(path).exists()


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
    found = re.search(rf"\S*/lib{word}\.so\S*", read("/proc/self/maps"))
    return found[0] if found else "file not known"


def read(path: str) -> str:
    """Text of a file; empty when it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
