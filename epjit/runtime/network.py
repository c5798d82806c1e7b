"""The network under NVSHMEM: what a rank has and wants, and what all ranks can agree on.

NVSHMEM takes for granted that every process begins the same transports. Where one leaves out IBGDA,
the others wait for it for ever; so ranks tell each other beforehand what they would find, and
afterwards what they have got.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from epjit import env
from epjit.runtime.machine import can_load, mapped, read

ORDERING = "NVSHMEM_IB_ENABLE_RELAXED_ORDERING"
_REMOTE_TRANSPORT = "NVSHMEM_REMOTE_TRANSPORT"
_NEW_TIMEOUTS = (3, 8)
"""NVSHMEM's version from which on NVSHMEM_IB_TIMEOUT and NVSHMEM_IB_RETRY_CNT exist."""
_ANY_NAME = (3, 5)
"""NVSHMEM's version from which on a NIC of NVIDIA's may have any name."""
_IPV4 = re.compile(r"0000:0000:0000:0000:0000:ffff:(?!0000:0000)[0-9a-f]{4}:[0-9a-f]{4}")


# ---- what a host has ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Port:
    """One port of a NIC.

    Attributes:
        nic: Name of the NIC, such as ``"mlx5_0"``, or ``"rocep24s0"`` where names are persistent.
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

    @property
    def is_mlx5(self) -> bool:
        """Whether NVIDIA's driver drives it: functions of a NIC have `mlx5_core.sf`."""
        return self.driver.partition(".")[0] == "mlx5_core"


def ports(root: Path = Path("/")) -> list[Port]:
    """Ports of the NICs that RDMA could use.

    Args:
        root: Folder of ``sys``.
    """
    return [_port(path) for path in sorted(root.glob("sys/class/infiniband/*/ports/*"))]


def _port(path: Path) -> Port:
    nic = path.parents[1]
    link = read(path / "link_layer").strip()
    gids = path.glob("gids/*") if link == "Ethernet" else ()
    return Port(
        nic=nic.name,
        number=int(path.name),
        active="ACTIVE" in read(path / "state"),
        link=link,
        rate=read(path / "rate").strip(),
        driver=(nic / "device/driver").resolve().name,
        is_virtual=(nic / "device/physfn").exists(),
        routable=any(
            _IPV4.match(read(gid)) and "RoCE v2" in read(path / "gid_attrs/types" / gid.name)
            for gid in gids
        ),
    )


class Network(NamedTuple):
    """NICs and wishes of one rank, before NVSHMEM begins.

    Attributes:
        ibgda: ``NVSHMEM_IB_ENABLE_IBGDA``; None when it is unset.
        transport: ``NVSHMEM_REMOTE_TRANSPORT``; empty when it is unset.
        links: Kinds of the active ports that NVSHMEM may take, such as ``InfiniBand``, in order.
        no_ibgda: Reason why IBGDA cannot begin here; empty when, as far as is known, it can.
        has_gdrcopy: Whether the CPU can write to memory of the GPU, through GDRCopy.
        num_qps: ``NVSHMEM_IBGDA_NUM_RC_PER_PE``; empty when it is unset.
    """

    ibgda: bool | None = None
    transport: str = ""
    links: tuple[str, ...] = ()
    no_ibgda: str = ""
    has_gdrcopy: bool = False
    num_qps: str = ""


def look(
    root: Path = Path("/"), *, version: tuple[int, int, int], no_device_code: str = ""
) -> Network:
    """Looks at the NICs of this host, and at the variables of this rank.

    Args:
        root: Folder of ``sys`` and ``dev``.
        version: NVSHMEM's.
        no_device_code: Reason why no kernel can be linked with IBGDA's device code, or empty.

    Raises:
        RuntimeError: NVSHMEM is told to use what the kernels cannot.
        ValueError: A variable is malformed.
    """
    gdaki = "NVSHMEM_GPUNETIO_ENABLE_GDAKI"
    if env.nvshmem_flag(gdaki, default=False):
        raise RuntimeError(
            f"{gdaki}={env.foreign(gdaki)} lets the GPU drive the NIC in a way that kernels of "
            f"epjit do not know; unset it ({env.nvshmem_ib_enable_ibgda.name}=1 is the way they do)"
        )
    usable = [port for port in ports(root) if port.active and _is_listed(port)]
    flag = env.nvshmem_ib_enable_ibgda
    return Network(
        ibgda=flag() if flag.text() else None,
        transport=(env.foreign(_REMOTE_TRANSPORT) or "").lower(),
        links=tuple(sorted({port.link for port in usable})),
        no_ibgda=_no_nic_for_ibgda(usable, version) or no_device_code,
        has_gdrcopy=(root / "dev/gdrdrv").exists(),
        num_qps=env.nvshmem_num_qps.text(),
    )


def _no_nic_for_ibgda(usable: Sequence[Port], version: tuple[int, int, int]) -> str:
    """Why NVSHMEM's IBGDA would take none of these ports; empty when it takes one.

    It takes those of NICs that answer a query of the driver mlx5 and whose name contains
    NVSHMEM_HCA_PREFIX, by default `mlx5` (NVSHMEM 3.4.5, `nvshmemt_init` in
    src/modules/transport/ibgda/ibgda.cpp). From 3.5 on that is `^smi`, all names without `smi`
    (read off the libraries of 3.5.19 to 3.8.0). It wants extended atomics, too, which no file says.
    """
    nics = sorted({port.nic for port in usable if port.is_mlx5})
    prefix = env.foreign("NVSHMEM_HCA_PREFIX")
    if prefix is None:
        prefix = "^smi" if version >= _ANY_NAME else "mlx5"
    if not nics:
        return "no mlx5 NIC has an active port"
    if not any((prefix.lstrip("^") in nic) != prefix.startswith("^") for nic in nics):
        return (
            f"NVSHMEM takes NICs by name, and here they are called {', '.join(nics)}: set "
            "NVSHMEM_HCA_PREFIX to what these names begin with, or to nothing for any name"
        )
    if not can_load("libmlx5.so.1"):
        return "libmlx5.so.1 cannot be loaded: apt-get install ibverbs-providers"
    return ""


def _is_listed(port: Port) -> bool:
    """Whether the user lets NVSHMEM take a port: name[:port[:count]],... or ^ and all but those."""
    text = env.foreign("NVSHMEM_HCA_LIST") or env.foreign("NVSHMEM_HCA_PE_MAPPING") or ""
    entries = [each.split(":")[:2] for each in text.removeprefix("^").split(",")]
    is_named = any(each == [port.nic, str(port.number)][: len(each)] for each in entries)
    return not text or is_named != text.startswith("^")


# ---- what all agree on --------------------------------------------------------------------------


def check(networks: Sequence[Network], *, num_hosts: int) -> None:
    """Refuses what would let ranks begin different transports; all see and raise the same.

    Raises:
        RuntimeError: Names ranks, values and the remedy.
    """
    flag = env.nvshmem_ib_enable_ibgda.name
    _check_alike(flag, ["unset" if n.ibgda is None else str(int(n.ibgda)) for n in networks])
    _check_alike(_REMOTE_TRANSPORT, [n.transport or "unset" for n in networks])
    _check_alike(env.nvshmem_num_qps.name, [n.num_qps or "unset" for n in networks])
    if num_hosts == 1:
        return
    reasons = [network.no_ibgda for network in networks]
    if networks[0].ibgda and any(reasons) and not all(reasons):
        raise RuntimeError(
            f"IBGDA would begin on some ranks only, and those would wait for ever for the other "
            f"ones: {_by_value([reason or 'it can begin' for reason in reasons])}; mend that, or "
            f"set {flag}=0 on all ranks"
        )
    known = [set(network.links) for network in networks]
    uses_ports = bool(networks[0].ibgda) or networks[0].transport in ("", "ibrc")
    if uses_ports and any(known) and not set.intersection(*known):
        shown = [" and ".join(network.links) or "none" for network in networks]
        raise RuntimeError(
            f"the ranks have no kind of NIC in common; active ports: {_by_value(shown)}; bring the "
            "missing links up (ibstat shows them), or set NVSHMEM_HCA_LIST on each host, or "
            f"{_REMOTE_TRANSPORT}=none on all ranks where NVLink reaches every rank"
        )


def use_ibgda(networks: Sequence[Network], *, num_hosts: int) -> bool:
    """Whether NVSHMEM is to begin IBGDA: what the user says, else wherever all ranks can.

    A transport that the user has named is let alone, and on one host nothing needs a NIC.
    """
    wanted = networks[0].ibgda
    if wanted is not None:
        return wanted
    return num_hosts > 1 and not any(each.transport or each.no_ibgda for each in networks)


def settings(
    networks: Sequence[Network],
    *,
    ibgda: bool,
    version: tuple[int, int, int],
    may_lose_ranks: bool,
) -> dict[str, str]:
    """Variables that NVSHMEM reads when it begins, for this network; the same on all ranks.

    Args:
        networks: Of all ranks.
        ibgda: Result of `use_ibgda`.
        version: NVSHMEM's.
        may_lose_ranks: Whether the group goes on without a rank that is gone.
    """
    found = {
        env.nvshmem_ib_enable_ibgda.name: str(int(ibgda)),
        # Room for values that come back, 256 KB a queue pair by default. Nothing here fetches; a
        # warp's is the least that NVSHMEM takes.
        "NVSHMEM_IBGDA_NUM_FETCH_SLOTS_PER_RC": "32",
    }
    lacks_ibgda = not ibgda or any(network.no_ibgda for network in networks)
    if lacks_ibgda and not all(network.has_gdrcopy for network in networks):
        # There a signal is a plain write, which the PCIe of the receiver may let pass the data
        # before it: one such receiver decides for all.
        found[ORDERING] = "0"
    if may_lose_ranks and ibgda and version >= _NEW_TIMEOUTS:
        # 0.27 s a try and 4 tries, not 4.3 s and 8: so long a queue to a peer that is gone may hold
        # up its users. Where a CPU thread posts, NVSHMEM then ends the process, and not sooner.
        found |= {"NVSHMEM_IB_TIMEOUT": "16", "NVSHMEM_IB_RETRY_CNT": "3"}
    return found


# ---- what was got -------------------------------------------------------------------------------


def loaded() -> str:
    """The transport that NVSHMEM has begun in this process, such as ``"ibrc"``; empty without one.

    It unloads those that do not begin. IBGDA has another one beside it, which kernels do not use.
    """
    prefix = "nvshmem_transport_"
    found = {file.name.removeprefix(prefix).partition(".")[0] for file in mapped(prefix)}
    return "ibgda" if "ibgda" in found else "+".join(sorted(found))


def why_unordered(networks: Sequence[Network], got: str) -> str:
    """Why a signal could come before its data: NVSHMEM took IBRC in IBGDA's place. Else empty."""
    relaxed = env.nvshmem_flag(ORDERING, default=True)
    if got != "ibrc" or not relaxed or all(network.has_gdrcopy for network in networks):
        return ""
    return (
        "over ibrc, with a rank that has no /dev/gdrdrv, a signal could pass the data before it: "
        f"set {ORDERING}=0 on all ranks, or load gdrdrv"
    )


def check_got(got: Sequence[str]) -> None:
    """Refuses ranks that have begun different transports; all see and raise the same.

    Raises:
        RuntimeError: Names ranks, transports and the remedy.
    """
    if len(set(got)) > 1:
        raise RuntimeError(
            f"NVSHMEM has begun different transports: {_by_value([each or 'none' for each in got])}"
            f"; NVSHMEM_DEBUG=INFO says why; {_REMOTE_TRANSPORT} and "
            f"{env.nvshmem_ib_enable_ibgda.name} choose one, the same on all ranks"
        )


def _check_alike(name: str, values: Sequence[str]) -> None:
    if len(set(values)) > 1:
        raise RuntimeError(
            f"the ranks disagree on {name}: {_by_value(values)}; give it the same value on all "
            "ranks (does the launcher hand the environment on?)"
        )


def _by_value(values: Sequence[str]) -> str:
    """Which ranks have each value, in words."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return "; ".join(
        f"{value} on rank{'s' * (len(on) > 1)} {', '.join(on)}" for value, on in ranks.items()
    )
