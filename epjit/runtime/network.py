"""The network under NVSHMEM: what a rank has and wants, and what all ranks can agree on.

NVSHMEM takes for granted that every process begins the same transports. Where one leaves out IBGDA,
the others wait for it for ever; so ranks tell each other beforehand what they would find, and
afterwards what they have got.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from epjit import env

_REMOTE_TRANSPORT = "NVSHMEM_REMOTE_TRANSPORT"
_NEW_TIMEOUTS = (3, 8)
"""NVSHMEM's version from which on NVSHMEM_IB_TIMEOUT and NVSHMEM_IB_RETRY_CNT exist."""


class Network(NamedTuple):
    """NICs and wishes of one rank, before NVSHMEM begins.

    Attributes:
        ibgda: ``NVSHMEM_IB_ENABLE_IBGDA``; None when it is unset.
        transport: ``NVSHMEM_REMOTE_TRANSPORT``; empty when it is unset.
        links: Kinds of the NICs' active ports, such as ``InfiniBand``, in order; None when
            ``NVSHMEM_HCA_LIST`` chooses among them.
        no_ibgda: Reason why IBGDA cannot begin here; empty when, as far as is known, it can.
        has_gdrcopy: Whether the CPU can write to memory of the GPU, through GDRCopy.
    """

    ibgda: bool | None = None
    transport: str = ""
    links: tuple[str, ...] | None = ()
    no_ibgda: str = ""
    has_gdrcopy: bool = False


def look(
    root: Path = Path("/"), *, no_device_code: str = "", loads: Callable[[str], bool] | None = None
) -> Network:
    """Looks at the NICs of this host, and at the variables of this rank.

    Args:
        root: Folder of ``sys`` and ``dev``.
        no_device_code: Reason why no kernel can be linked with IBGDA's device code, or empty.
        loads: Whether the loader finds a library.

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
    active = _active_ports(root)
    no_ibgda = no_device_code
    if not any("mlx5" in nic for nic, _ in active):
        no_ibgda = "no mlx5 NIC has an active port"
    elif not (loads or can_load)("libmlx5.so.1"):
        no_ibgda = "libmlx5.so.1 cannot be loaded"
    flag = env.nvshmem_ib_enable_ibgda
    return Network(
        ibgda=flag() if flag.text() else None,
        transport=(env.foreign(_REMOTE_TRANSPORT) or "").lower(),
        links=None if env.foreign("NVSHMEM_HCA_LIST") else tuple(sorted({k for _, k in active})),
        no_ibgda=no_ibgda,
        has_gdrcopy=(root / "dev/gdrdrv").exists(),
    )


def _active_ports(root: Path) -> list[tuple[str, str]]:
    """NIC and kind of link of each port that is up."""
    ports = sorted(root.glob("sys/class/infiniband/*/ports/*"))
    return [
        (port.parents[1].name, _read(port / "link_layer").strip())
        for port in ports
        if "ACTIVE" in _read(port / "state")
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def can_load(library: str) -> bool:
    """Whether the loader finds a library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


# ---- what all agree on --------------------------------------------------------------------------


def check(networks: Sequence[Network], *, num_hosts: int) -> None:
    """Refuses what would let ranks begin different transports; all see and raise the same.

    Raises:
        RuntimeError: Names ranks, values and the remedy.
    """
    flag = env.nvshmem_ib_enable_ibgda.name
    _check_alike(flag, ["unset" if n.ibgda is None else str(int(n.ibgda)) for n in networks])
    _check_alike(_REMOTE_TRANSPORT, [n.transport or "unset" for n in networks])
    if num_hosts == 1:
        return
    reasons = [network.no_ibgda for network in networks]
    if networks[0].ibgda and any(reasons) and not all(reasons):
        raise RuntimeError(
            f"IBGDA would begin on some ranks only, and those would wait for ever for the other "
            f"ones: {_by_value([reason or 'it can begin' for reason in reasons])}; mend that, or "
            f"set {flag}=0 on all ranks"
        )
    known = [set(network.links) for network in networks if network.links is not None]
    uses_ports = bool(networks[0].ibgda) or networks[0].transport in ("", "ibrc")
    if uses_ports and any(known) and not set.intersection(*known):
        chosen = ("chosen by NVSHMEM_HCA_LIST",)
        shown = [" and ".join(chosen if n.links is None else n.links) for n in networks]
        raise RuntimeError(
            "the ranks have no kind of NIC in common; active ports: "
            f"{_by_value([each or 'none' for each in shown])}; bring the missing links up "
            "(ibstat shows them), or set NVSHMEM_HCA_LIST on each host, or "
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
    if not ibgda and not all(network.has_gdrcopy for network in networks):
        # There a signal is a plain write, which the receiver's PCIe may let pass the data before
        # it. It is the receiver's memory that says so, so one rank decides for all.
        found["NVSHMEM_IB_ENABLE_RELAXED_ORDERING"] = "0"
    if may_lose_ranks and ibgda and version >= _NEW_TIMEOUTS:
        # 0.27 s a try and 4 tries, not 4.3 s and 8: so long a queue to a peer that is gone may hold
        # up its users. Where a CPU thread posts, NVSHMEM then ends the process, and not sooner.
        found |= {"NVSHMEM_IB_TIMEOUT": "16", "NVSHMEM_IB_RETRY_CNT": "3"}
    return found


# ---- what was got -------------------------------------------------------------------------------


def loaded(maps: Path = Path("/proc/self/maps")) -> str:
    """The transport that NVSHMEM has begun in this process, such as ``"ibrc"``; empty without one.

    It unloads those that do not begin. IBGDA has another one beside it, which kernels do not use.
    """
    found = sorted(set(re.findall(r"/nvshmem_transport_(\w+)\.so", _read(maps))))
    return "ibgda" if "ibgda" in found else "+".join(found)


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
