"""NVLink domains of groups whose hosts, GPUs and fabrics are made up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from epjit.runtime import topology
from epjit.runtime.topology import Topology, find_topology
from tests.cpu.runtime.test_group import run_threads


class World:
    """Rank r is on ``hosts[r]`` with GPU r; GPUs are only seen on their own host."""

    def __init__(self, hosts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts = list(hosts)
        self.fabrics = [b""] * len(hosts)
        self.apart: set[frozenset[int]] = set()  # pairs of GPUs without peer access
        self.local = threading.local()
        monkeypatch.delenv("EPJIT_NVLINK_DOMAIN", raising=False)
        monkeypatch.setattr(topology, "host_id", lambda: self.hosts[self.local.rank])
        monkeypatch.setattr(topology, "gpu", self)
        monkeypatch.setattr(topology, "fabric_id", lambda uuid: self.fabrics[uuid[0]])

    def seen(self) -> list[int]:
        host = self.hosts[self.local.rank]
        return [rank for rank, each in enumerate(self.hosts) if each == host]

    def uuid(self, device: int) -> bytes:
        return bytes([self.seen()[device]]) * 16

    def count(self) -> int:
        return len(self.seen())

    def can_access_peer(self, device: int, peer: int) -> bool:
        seen = self.seen()
        return frozenset((seen[device], seen[peer])) not in self.apart

    def find(self, **options: Any) -> list[Any]:
        def work(group: Any) -> Topology:
            self.local.rank = group.rank
            return find_topology(group, device=self.seen().index(group.rank), **options)

        return run_threads(len(self.hosts), work)


def domains(found: list[Any]) -> tuple[tuple[int, ...], ...]:
    """The same on all ranks; what was raised is raised."""
    for each in found:
        if isinstance(each, Exception):
            raise each
    assert [each.rank for each in found] == list(range(len(found)))
    assert len({each.domains for each in found}) == 1
    return found[0].domains


def test_one_host_is_one_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    found = World("aaaa", monkeypatch).find()
    assert domains(found) == ((0, 1, 2, 3),)
    assert [each.local for each in found] == [0, 1, 2, 3]
    assert (found[3].num_domains, found[3].num_local, found[3].domain) == (1, 4, 0)


def test_hosts_need_not_be_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    found = World("abcabc", monkeypatch).find()
    assert domains(found) == ((0, 3), (1, 4), (2, 5))
    assert [(each.domain, each.local) for each in found] == [
        (0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("by", ["keyword", "environment"])
def test_domains_are_cut(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("abababab", monkeypatch)
    if by == "environment":
        monkeypatch.setenv("EPJIT_NVLINK_DOMAIN", "2")
    found = world.find(**{"domain_size": 2} if by == "keyword" else {})
    assert domains(found) == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_a_host_splits_where_gpus_do_not_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("aaaa", monkeypatch)
    world.apart = {frozenset(pair) for pair in ((0, 1), (0, 3), (2, 1), (2, 3))}
    assert domains(world.find()) == ((0, 2), (1, 3))


def test_a_fabric_joins_hosts_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("aabbccdd", monkeypatch)
    world.fabrics = [b"x"] * 4 + [b"y"] * 4
    assert domains(world.find(use_fabric=True)) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert domains(world.find()) == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_without_a_device_only_hosts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPJIT_NVLINK_DOMAIN", raising=False)
    found = run_threads(3, lambda group: find_topology(group, device=None, domain_size=1))
    assert domains(found) == ((0,), (1,), (2,))


@pytest.mark.parametrize(
    ("hosts", "size", "message"),
    [
        ("aab", 0, r"have different sizes; .*\n  domain 0: ranks 0, 1\n  domain 1: ranks 2$"),
        ("aaa", 2, r"have different sizes; .*\n  domain 0: ranks 0, 1\n  domain 1: ranks 2$"),
        ("a" * 33, 1, r"are 33, but 32 is the most; .*EPJIT_NVLINK_DOMAIN"),
        ("ab" * 9, 0, r"have 9 ranks each, but 8 is the most"),
    ],
)
def test_what_cannot_be_served(
    hosts: str, size: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = World(hosts, monkeypatch).find(domain_size=size)
    assert len({str(each) for each in found}) == 1
    with pytest.raises(ValueError, match=message):
        raise found[0]


def test_a_disagreement_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPJIT_NVLINK_DOMAIN", raising=False)
    found = run_threads(
        2, lambda group: find_topology(group, device=None, domain_size=group.rank + 1)
    )
    for error in found:
        with pytest.raises(ValueError, match=r"disagree on nvlink_domain .*: \[1, 2\] by rank"):
            raise error


def test_fabric_id_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(topology.ctypes, "CDLL", missing)
    assert topology.fabric_id(bytes(16)) == b""
