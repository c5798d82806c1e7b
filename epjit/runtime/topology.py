"""Stand-in until branch nvshmem is merged: that branch's file replaces this one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epjit.reference.internode import check_domains, place_of
from epjit.runtime.group import host_id

if TYPE_CHECKING:
    from epjit.runtime.group import Group


@dataclass(frozen=True)
class Topology:
    """Which ranks share an NVLink domain."""

    rank: int
    domains: tuple[tuple[int, ...], ...]

    @property
    def domain(self) -> int:
        """Of this rank."""
        return place_of(self.rank, self.domains)[0]

    @property
    def local(self) -> int:
        """Index of this rank in its domain."""
        return place_of(self.rank, self.domains)[1]

    @property
    def num_domains(self) -> int:
        """How many."""
        return len(self.domains)

    @property
    def num_local(self) -> int:
        """Ranks of a domain."""
        return len(self.domains[0])


def find_topology(
    group: Group, *, device: torch.device, domain_size: int | None = None, use_fabric: bool = False
) -> Topology:
    """Finds out which ranks share a host; collective."""
    del device, use_fabric
    if domain_size is None:
        domain_size = int(os.environ.get("EPJIT_NVLINK_DOMAIN") or 0)
    hosts = group.allgather(host_id())
    domains = []
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, each in enumerate(hosts) if each == host]
        step = domain_size or len(ranks)
        domains += [tuple(ranks[at : at + step]) for at in range(0, len(ranks), step)]
    check_domains(domains, group.size)
    return Topology(group.rank, tuple(domains))
