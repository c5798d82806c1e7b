"""Needs of several NVLink domains: NVSHMEM, a linker, NICs, and IBGDA's own things."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

from epjit.cli import show
from epjit.cli.doctor import probe
from epjit.cli.doctor.check import Check, Section, Status, only_one
from epjit.remedy import upgrade_command

NVSHMEM_PACKAGES = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_RDMA = Section("between NVLink domains (RDMA)")


def check_rdma() -> Iterator[Check]:
    """NVSHMEM and NICs; with a NIC, or where IBGDA is wanted, what they need of this host."""
    from epjit import env

    nics = probe.nics()
    yield _nvshmem()
    yield _nvshmem_kernels()
    none = "none in /sys/class/infiniband; between nodes install the NIC's driver (rdma-core)"
    yield _RDMA.expect("NICs", nics, ", ".join(nics), none, severity=Status.info)
    wants_ibgda = bool(env.nvshmem_ib_enable_ibgda.text())
    if nics or wants_ibgda:
        yield _peer_memory()
        yield _RDMA.expect(
            "gdrcopy",
            Path("/dev/gdrdrv").exists(),
            "/dev/gdrdrv",
            "no /dev/gdrdrv",
            remedy="signals through the CPU's proxy (without IBGDA) want it: install gdrdrv, "
            "modprobe gdrdrv; in a container pass the device",
        )
        yield from _ibgda(wants_ibgda)
        yield _locked_memory()


def _nvshmem() -> Check:
    """Version and file of the library that would be taken."""
    from epjit.runtime import nvshmem

    installed = [name for name in NVSHMEM_PACKAGES if probe.version(name)]
    if len(installed) > 1:
        return _RDMA.wrong("NVSHMEM", " and ".join(installed), only_one(installed, "cu*-rdma"))
    try:
        found = nvshmem.find_installation()
    except ImportError as error:
        return _only_between_nodes("NVSHMEM", "not found", str(error))
    except RuntimeError as error:
        return _RDMA.wrong("NVSHMEM", "cannot be used", str(error))
    return _RDMA.ok("NVSHMEM", f"{'.'.join(map(str, found.version))} ({found.library})")


def _nvshmem_kernels() -> Check:
    """Whether what kernels are linked with is all there: linker, headers, device code."""
    from epjit.runtime import nvjitlink, nvrtc, nvshmem_device

    name = "kernels with NVSHMEM"
    try:
        linker, compiler = nvjitlink.version(), nvrtc.version()
        nvshmem_device.key()
    except (ImportError, OSError, RuntimeError) as error:
        return _only_between_nodes(name, "cannot be linked", str(error))
    value = f"nvJitLink {linker[0]}.{linker[1]} ({probe.mapped('nvJitLink')})"
    if linker >= compiler:
        return _RDMA.ok(name, value)
    older = f"it is older than NVRTC {compiler[0]}.{compiler[1]}"
    return _RDMA.wrong(name, value, f"{older}: {upgrade_command('nvidia-nvjitlink')}")


def _only_between_nodes(name: str, value: str, remedy: str) -> Check:
    """A missing part: it matters with a NIC, or with an NVSHMEM of one's own."""
    from epjit import env

    if probe.nics() or env.nvshmem_dir():
        return _RDMA.warning(name, value, f"only between nodes: {remedy}")
    return _RDMA.info(name, f"{value}; it is only needed between nodes")


def _peer_memory() -> Check:
    """How the NIC reaches memory of the GPU."""
    module = "nvidia_peermem" in probe.read("/proc/modules")
    open_driver = "Open Kernel Module" in probe.read("/proc/driver/nvidia/version")
    return _RDMA.expect(
        "GPU memory for the NIC",
        module or open_driver,
        "nvidia_peermem" if module else "DMA-BUF (open driver)",
        "neither nvidia_peermem nor the open driver, which has DMA-BUF",
        remedy="modprobe nvidia_peermem, or install the open kernel modules",
    )


def _ibgda(is_wanted: bool) -> Iterator[Check]:
    """Needs of GPUs that drive the NIC themselves."""
    loads = probe.loads("libmlx5.so.1")
    remedy = "apt-get install ibverbs-providers (IBGDA works with NVIDIA's NICs only)"
    yield _RDMA.expect("IBGDA: libmlx5.so.1", loads, "loads", "not found", remedy=remedy)
    parameters = probe.read("/proc/driver/nvidia/params")
    mapping = "PeerMappingOverride=1" in parameters
    memops = bool(re.search(r"EnableStreamMemOPs:\s*1", parameters))
    value = f"PeerMappingOverride={int(mapping)}, EnableStreamMemOPs={int(memops)}"
    remedy = (
        "for a GPU that rings the NIC itself: options nvidia NVreg_EnableStreamMemOPs=1 "
        'NVreg_RegistryDwords="PeerMappingOverride=1;" in /etc/modprobe.d, then reboot (without '
        "them NVSHMEM lets the CPU ring: NVSHMEM_IBGDA_NIC_HANDLER=cpu)"
    )
    yield _RDMA.expect("IBGDA: driver parameters", mapping and memops, value, remedy=remedy)
    wanted = "yes" if is_wanted else "no: NVSHMEM_IB_ENABLE_IBGDA=1 turns it on"
    yield _RDMA.ok("IBGDA: wanted", wanted)


def _locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return _RDMA.ok("locked memory", "unlimited")
    remedy = "ulimit -l unlimited (docker run --ulimit memlock=-1)"
    return _RDMA.warning("locked memory", show.size(soft), remedy)
