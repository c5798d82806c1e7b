"""NICs of this host: ports, addresses, files, and the variables that choose among them."""

from __future__ import annotations

from collections.abc import Iterator

from epjit.cli.doctor import probe
from epjit.cli.doctor.check import Check, Section, Status
from epjit.runtime import network
from epjit.runtime.network import Port

_NICS = Section("NICs")
_LIST, _MAPPING = "NVSHMEM_HCA_LIST", "NVSHMEM_HCA_PE_MAPPING"
_ENABLE_MAPPING = "NVSHMEM_ENABLE_NIC_PE_MAPPING"
_MULTI_PORT = "NVSHMEM_IBGDA_ENABLE_MULTI_PORT"
_TAKES_ALL_BEFORE = (3, 8, 0)


def check_nics() -> Iterator[Check]:
    """Ports and what they need; a line alone where there is no NIC."""
    ports = network.ports()
    names = ", ".join(dict.fromkeys(port.nic for port in ports))
    none = "none in /sys/class/infiniband; between nodes install the NIC's driver (rdma-core)"
    yield _NICS.expect("NICs", ports, names, none, severity=Status.info)
    if not ports:
        return
    for port in ports:
        yield _port(port)
    yield _verbs()
    yield from _choice([port for port in ports if port.active])
    yield _iommu()


def _port(port: Port) -> Check:
    """Link, speed, and for RoCE the address by which routers know it."""
    value = f"{port.link}, {port.rate}, {port.driver}"
    if not port.active:
        return _NICS.info(port.name, f"{value}: its link is down")
    if port.link == "Ethernet" and not port.routable:
        remedy = "give its interface an IPv4 address (NVSHMEM_IB_GID_INDEX chooses among several)"
        return _NICS.warning(port.name, f"{value}: no GID of RoCE v2 with an IPv4 address", remedy)
    return _NICS.ok(port.name, value)


def _verbs() -> Check:
    files = probe.verbs()
    closed = [path for path, opens in files.items() if not opens]
    return _NICS.expect(
        "/dev/infiniband",
        files and not closed,
        f"{len(files)} files, which this user may open",
        f"{', '.join(closed)} may not be opened" if files else "no file uverbs*",
        remedy="docker run --device /dev/infiniband; modprobe ib_uverbs; read and write for all",
        severity=Status.wrong,
    )


def _choice(active: list[Port]) -> Iterator[Check]:
    """Which of the ports NVSHMEM takes."""
    from epjit import env

    version = probe.nvshmem_version()
    takes_all = version is None or version < _TAKES_ALL_BEFORE
    if env.foreign(_MAPPING) and not env.nvshmem_flag(_ENABLE_MAPPING, default=False):
        remedy = f"{_ENABLE_MAPPING}=1, or {_LIST}"
        yield _NICS.warning(_MAPPING, f"maps no ranks without {_ENABLE_MAPPING}=1", remedy)
    kinds = {(port.driver, port.link) for port in active}
    if len(kinds) > 1 and takes_all and not env.foreign(_LIST):
        words = " and ".join(sorted({port.link for port in active}))
        fabric = [port.name for port in active if port.link == "InfiniBand"]
        remedy = f"{_LIST}={','.join(fabric or ['(those of the fabric)'])}, on all ranks"
        yield _NICS.warning("NICs of one kind", f"no: {words}, and all would be taken", remedy)
    if takes_all and env.nvshmem_flag(_MULTI_PORT, default=False):
        value = "a fence of NVSHMEM before 3.8 forgets the queue pairs of the further ports"
        yield _NICS.wrong(_MULTI_PORT, value, f"unset {_MULTI_PORT}")


def _iommu() -> Check:
    """NICs and GPUs reach each other's memory without a detour through the root complex."""
    groups = probe.translated_groups()
    return _NICS.expect(
        "IOMMU",
        not groups,
        "translates nothing",
        f"translates addresses of {groups} groups of devices, which sends a NIC's writes to a GPU "
        "through the root complex",
        remedy="iommu=pt on the kernel's command line (and ACS off on PCIe switches: lspci -vvv "
        "shows SrcValid- in ACSCtl); in a virtual machine the host does it",
    )
