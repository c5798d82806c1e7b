"""Needs of several NVLink domains: NVSHMEM, a linker, the transport, and IBGDA's own things."""

from __future__ import annotations

import re
from collections.abc import Iterator

from epjit.cli import show
from epjit.cli.doctor import probe
from epjit.cli.doctor.check import Check, Section, only_one
from epjit.remedy import upgrade_command
from epjit.runtime import machine, network
from epjit.runtime.network import Network, Port

NVSHMEM_PACKAGES = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_IBGDA = "NVSHMEM_IB_ENABLE_IBGDA"
_TRANSPORT = "NVSHMEM_REMOTE_TRANSPORT"
_EFA_VERSION = (3, 6, 5)  # puts with signals are in flight together, over several NICs
_RDMA = Section("between NVLink domains (RDMA)")


def check_rdma() -> Iterator[Check]:
    """NVSHMEM; with a NIC, or where IBGDA is wanted, what they need of this host."""
    from epjit.runtime import nvshmem

    yield _nvshmem()
    yield _nvshmem_kernels()
    ports, version = network.ports(), probe.nvshmem_version() or nvshmem.MIN_VERSION
    try:
        found = network.look(version=version, no_device_code=probe.no_device_code())
    except (RuntimeError, ValueError) as error:
        yield _RDMA.wrong("transport", "refused", str(error))
        return
    if not ports and not found.ibgda:
        return
    is_wanted = network.use_ibgda([found], num_hosts=2)
    yield _transport(found, is_wanted, any(port.active and port.is_mlx5 for port in ports))
    yield from _efa(found, any(port.driver == "efa" for port in ports))
    yield _peer_memory()
    yield from _writes_of_nics()
    remedy = "signals without IBGDA want it: modprobe gdrdrv; in a container pass the device"
    yield _RDMA.expect("gdrcopy", found.has_gdrcopy, "/dev/gdrdrv", "no /dev/gdrdrv", remedy=remedy)
    yield _ordering(found, is_wanted)
    yield from _ibgda(ports, is_wanted)
    yield _locked_memory()
    yield _cores()


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
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _only_between_nodes(name, "cannot be linked", str(error))
    value = f"nvJitLink {linker[0]}.{linker[1]} ({probe.mapped('nvJitLink')})"
    if linker >= compiler:
        return _RDMA.ok(name, value)
    older = f"it is older than NVRTC {compiler[0]}.{compiler[1]}"
    return _RDMA.wrong(name, value, f"{older}: {upgrade_command('nvidia-nvjitlink')}")


def _only_between_nodes(name: str, value: str, remedy: str) -> Check:
    """A missing part: it matters with a NIC, or with an NVSHMEM of one's own."""
    from epjit import env

    if network.ports() or env.nvshmem_dir():
        return _RDMA.warning(name, value, f"only between nodes: {remedy}")
    return _RDMA.info(name, f"{value}; it is only needed between nodes")


def _peer_memory() -> Check:
    """How the NIC reaches memory of the GPU."""
    module = "nvidia_peermem" in machine.read("/proc/modules")
    open_driver = "Open Kernel Module" in machine.read("/proc/driver/nvidia/version")
    return _RDMA.expect(
        "GPU memory for the NIC",
        module or open_driver,
        "nvidia_peermem" if module else "DMA-BUF (open driver)",
        "neither nvidia_peermem nor the open driver, which has DMA-BUF",
        remedy="modprobe nvidia_peermem, or install the open kernel modules",
    )


def _transport(found: Network, is_ibgda: bool, has_mlx5: bool) -> Check:
    """The transport that NVSHMEM is asked for, why, and what is in the way of IBGDA."""
    asked, told = "IBGDA, else IBRC" if is_ibgda else found.transport or "IBRC", ""
    if found.ibgda is not None:
        told = f"{asked}: {_IBGDA}={int(found.ibgda)}"
    elif found.transport:
        told = f"{asked}: {_TRANSPORT} says so"
    is_missed = found.no_ibgda and (found.ibgda or (has_mlx5 and not told))
    value = told or f"{asked}: {found.no_ibgda or 'where all ranks can'}"
    return _RDMA.expect("transport", not is_missed, value, told or asked, remedy=found.no_ibgda)


def _efa(found: Network, has_efa: bool) -> Iterator[Check]:
    """Needs of Amazon's NICs, which only libfabric drives."""
    if has_efa and found.transport != "libfabric":
        remedy = f"{_TRANSPORT}=libfabric NVSHMEM_LIBFABRIC_PROVIDER=efa, on all ranks"
        yield _RDMA.warning("EFA", "IBRC and IBGDA cannot drive it", remedy)
    if not has_efa and found.transport != "libfabric":
        return
    version = probe.nvshmem_version()
    if version is None:
        return
    text = ".".join(map(str, version))
    yield _RDMA.expect(
        "NVSHMEM over libfabric",
        version >= _EFA_VERSION,
        f"NVSHMEM {text}",
        f"NVSHMEM {text}: before 3.5 one put with a signal is in flight at a time, and before "
        "3.6.5 there is one NIC a rank",
        remedy="NVSHMEM_DIR=(one of 3.6.5 or newer), and epjit before torch loads its own",
    )


def _writes_of_nics() -> Iterator[Check]:
    """Whether a GPU, and its NVLink peers, read what a NIC wrote as soon as they see its signal."""
    from epjit.runtime import device

    try:
        orders = [device.rdma_ordering(index) for index in range(probe.num_gpus())]
        flushes = [device.rdma_flushes(index) for index in range(len(orders))]
    except (ImportError, RuntimeError) as error:
        yield _RDMA.warning("writes of NICs", f"cannot be asked: {error}", "update the driver")
        return
    if not orders:
        return
    words = {
        0: "in no order",
        100: "in order for the GPU itself, and as epjit assumes for its NVLink peers",
        200: "in order for all GPUs",
    }
    least = min(orders)
    yield _RDMA.expect(
        "writes of NICs",
        least >= 100,
        f"{words.get(least, 'unknown')} (attribute 118: {least}, 117: {min(flushes)})",
        remedy="NVSHMEM_DISABLE_DATA_DIRECT=1, one NIC a rank, and a soak that compares rows: "
        "the page `The first hour on a cluster`",
    )


def _ordering(found: Network, is_ibgda: bool) -> Check:
    """Whether a signal can pass the data before it: relaxed ordering, and who writes the signal."""
    from epjit import env

    name, text = "relaxed ordering", env.foreign(network.ORDERING)
    if not env.nvshmem_flag(network.ORDERING, default=True):
        return _RDMA.ok(name, f"off: {network.ORDERING}={text}")
    if is_ibgda:
        value = "signals are atomics of the NIC, which come after the data"
        unless = f"not with PCI_ATOMIC_MODE=4 in its firmware: then set {network.ORDERING}=0"
        return _RDMA.ok(name, f"on; {value} ({unless})")
    if found.has_gdrcopy:
        return _RDMA.ok(name, "on; the CPU writes a signal after the data have come")
    if text is None:
        return _RDMA.ok(name, "off: epjit sets it so, for without gdrdrv a signal could pass data")
    return _RDMA.wrong(name, f"on: {text}", network.why_unordered([found], "ibrc"))


def _ibgda(ports: list[Port], is_wanted: bool) -> Iterator[Check]:
    """Needs of GPUs that drive the NIC themselves."""
    parameters = machine.read("/proc/driver/nvidia/params")
    mapping = "PeerMappingOverride=1" in parameters
    memops = bool(re.search(r"EnableStreamMemOPs:\s*1", parameters))
    value = f"PeerMappingOverride={int(mapping)}, EnableStreamMemOPs={int(memops)}"
    remedy = (
        "for a GPU that rings the NIC itself: options nvidia NVreg_EnableStreamMemOPs=1 "
        'NVreg_RegistryDwords="PeerMappingOverride=1;" in /etc/modprobe.d, then reboot (without '
        "them NVSHMEM lets the CPU ring: NVSHMEM_IBGDA_NIC_HANDLER=cpu)"
    )
    yield _RDMA.expect("IBGDA: driver parameters", mapping and memops, value, remedy=remedy)
    virtual = [port.name for port in ports if port.active and port.is_virtual]
    if is_wanted and virtual:
        remedy = (
            "signals need extended atomics, which virtual functions often lack: ask the host's "
            "administrator (mlxconfig query PCI_ATOMIC_MODE), or NVSHMEM_IB_ENABLE_IBGDA=0"
        )
        yield _RDMA.warning("IBGDA: atomics", f"virtual functions: {', '.join(virtual)}", remedy)


def _locked_memory() -> Check:
    limit = probe.locked_memory()
    if limit < 0:
        return _RDMA.ok("locked memory", "unlimited")
    remedy = "ulimit -l unlimited (docker run --ulimit memlock=-1)"
    return _RDMA.warning("locked memory", show.size(limit), remedy)


def _cores() -> Check:
    """The proxy of each rank spins on a core, beside the rank's own thread."""
    cores, ranks = probe.cores(), max(1, probe.num_gpus())
    return _RDMA.expect(
        "CPU cores",
        cores >= 2 * ranks,
        f"{cores} for {ranks} ranks, of which each keeps two busy",
        remedy="a rank's proxy thread wants a core of its own, or puts stall for milliseconds: "
        "widen taskset, --cpus-per-task or the cgroup",
    )
