"""Which ranks share an NVLink domain: found out from hosts, peer access and fabric."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from epjit import env
from epjit.runtime import device as gpu
from epjit.runtime.group import Group, host_id

MAX_DOMAINS = 32
MAX_LOCAL = 8
"""Ranks of one domain, when there is more than one."""


@dataclass(frozen=True)
class Topology:
    """The ranks of a group by NVLink domain, as one of them sees it.

    Attributes:
        rank: This rank.
        domains: Ranks of each domain, ascending; domains are ordered by their first rank and have
            the same number of ranks.
    """

    rank: int
    domains: tuple[tuple[int, ...], ...]

    @property
    def num_domains(self) -> int:
        """Number of domains."""
        return len(self.domains)

    @property
    def spans_domains(self) -> bool:
        """Whether there are several domains, so that the ranks of others are reached by RDMA."""
        return len(self.domains) > 1

    @property
    def num_local(self) -> int:
        """Ranks of each domain."""
        return len(self.domains[0])

    @property
    def domain(self) -> int:
        """Index of this rank's domain."""
        return next(i for i, ranks in enumerate(self.domains) if self.rank in ranks)

    @property
    def local(self) -> int:
        """Index of this rank inside its domain."""
        return self.domains[self.domain].index(self.rank)


class _Place(NamedTuple):
    """The place of a rank: its host and its GPU, as the others are told."""

    host: str
    fabric: bytes  # of the GPU's NVLink fabric and clique; empty: it belongs to none
    uuid: bytes  # of the GPU; empty: there is none
    unreachable: frozenset[bytes]  # GPUs seen here that this one cannot access
    domain_size: int


def find_topology(
    group: Group, *, device: int | None, domain_size: int | None = None, use_fabric: bool = False
) -> Topology:
    """Finds the NVLink domains of a group. Collective.

    Two ranks share a domain when they are on one host (with `use_fabric`: in one NVLink fabric and
    clique) and their GPUs can access each other's memory. A GPU that a process does not see is
    taken for accessible; mapping its memory will tell.

    Args:
        group: The ranks.
        device: GPU of this rank; None on the CPU backend, where only hosts count.
        domain_size: Cuts each domain into pieces of so many consecutive ranks; None takes
            ``EPJIT_NVLINK_DOMAIN``.
        use_fabric: Whether memory is shared by fabric handles, which work between hosts.

    Raises:
        ValueError: There are several domains, and not all of the same size, or too many, or too
            large; lists them. The same on all ranks.
    """
    if domain_size is None:
        domain_size = env.nvlink_domain()
    if domain_size < 0:
        raise ValueError(f"nvlink_domain is {domain_size}, expected a number of ranks")
    places = group.allgather(_own_place(device, domain_size, use_fabric=use_fabric))
    sizes = [place.domain_size for place in places]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the ranks disagree on nvlink_domain (EPJIT_NVLINK_DOMAIN): {sizes} by rank; 0 means "
            "not to cut"
        )
    domains = _cut(_find_domains(places), domain_size)
    _check(domains)
    return Topology(group.rank, domains)


def _own_place(device: int | None, domain_size: int, *, use_fabric: bool) -> _Place:
    if device is None:
        return _Place(host_id(), b"", b"", frozenset(), domain_size)
    uuid = gpu.uuid(device)
    unreachable = frozenset(
        gpu.uuid(peer) for peer in range(gpu.count()) if not gpu.can_access_peer(device, peer)
    )
    return _Place(host_id(), fabric_id(uuid) if use_fabric else b"", uuid, unreachable, domain_size)


def _joined(a: _Place, b: _Place) -> bool:
    """Whether two ranks can load from and store to each other's memory."""
    if a.host != b.host:
        return bool(a.fabric) and a.fabric == b.fabric
    return b.uuid not in a.unreachable and a.uuid not in b.unreachable


def _find_domains(places: Sequence[_Place]) -> list[list[int]]:
    """Each rank joins the first domain of which it reaches every rank."""
    domains: list[list[int]] = []
    for rank, place in enumerate(places):
        for ranks in domains:
            if all(_joined(places[other], place) for other in ranks):
                ranks.append(rank)
                break
        else:
            domains.append([rank])
    return domains


def _cut(domains: list[list[int]], size: int) -> tuple[tuple[int, ...], ...]:
    pieces = [
        tuple(ranks[at : at + (size or len(ranks))])
        for ranks in domains
        for at in range(0, len(ranks), size or len(ranks))
    ]
    return tuple(sorted(pieces))


def _check(domains: tuple[tuple[int, ...], ...]) -> None:
    if len(domains) == 1:
        return
    sizes = {len(ranks) for ranks in domains}
    problem = ""
    if len(sizes) > 1:
        problem = "have different sizes"
    elif len(domains) > MAX_DOMAINS:
        problem = f"are {len(domains)}, but {MAX_DOMAINS} is the most"
    elif max(sizes) > MAX_LOCAL:
        problem = f"have {max(sizes)} ranks each, but {MAX_LOCAL} is the most"
    if problem:
        listed = "\n  ".join(
            f"domain {index}: ranks {', '.join(map(str, ranks))}"
            for index, ranks in enumerate(domains)
        )
        raise ValueError(
            f"the NVLink domains of this group {problem}; start as many ranks on every host, or "
            "cut the domains with nvlink_domain (EPJIT_NVLINK_DOMAIN), a number of ranks that "
            f"divides each:\n  {listed}"
        )


# ---- the fabric ---------------------------------------------------------------------------------

_UUID_BYTES = 16
_FABRIC_COMPLETED = 3  # NVML_GPU_FABRIC_STATE_COMPLETED


class _FabricInfo(ctypes.Structure):
    """nvmlGpuFabricInfo_t."""

    _fields_ = (
        ("cluster", ctypes.c_ubyte * _UUID_BYTES),
        ("status", ctypes.c_int),
        ("clique", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    )


def fabric_id(uuid: bytes) -> bytes:
    """Names the NVLink fabric and the clique of a GPU, the same on all hosts.

    NVML alone knows it; CUDA does not.

    Args:
        uuid: 16 bytes that name the GPU.

    Returns:
        Empty when the GPU belongs to no fabric that spans hosts, or NVML cannot say.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return b""
    digits = uuid.hex()
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    handle, info = ctypes.c_void_p(), _FabricInfo()
    if nvml.nvmlInit_v2():
        return b""
    try:
        name = f"GPU-{'-'.join(parts)}".encode()
        if (
            nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle))
            or nvml.nvmlDeviceGetGpuFabricInfo(handle, ctypes.byref(info))
            or info.status
            or info.state != _FABRIC_COMPLETED
        ):
            return b""
    except AttributeError:  # a driver that is older than fabrics
        return b""
    finally:
        nvml.nvmlShutdown()
    cluster = bytes(info.cluster)
    return cluster + info.clique.to_bytes(4, "little") if any(cluster) else b""
