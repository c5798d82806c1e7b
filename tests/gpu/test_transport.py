"""The loopback transport between virtual ranks of one GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epjit.runtime.group import Group
from epjit.runtime.kernel import compile_kernel
from epjit.runtime.topology import find_topology
from epjit.runtime.transport import make_transport
from tests.harness.launch import run_threads
from tests.transport.ring import Ring, RingConfig, ring_sources


def ring(comm: Any, rounds: int, domain_size: int) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        group = Group.from_comm(comm)
        topology = find_topology(group, device=0, domain_size=domain_size)
        transport = make_transport(group, topology, device=0)
        assert transport.body == "loopback"
        for row_bytes in (16, 7168, 14352, 1 << 18):
            one = Ring(group, transport, device=0, row_bytes=row_bytes)
            for peer, address in enumerate(one.memory.peer_ptrs):
                assert bool(address) == (peer in topology.domains[topology.domain])
            for _ in range(rounds):
                one.round(torch.cuda.current_stream().cuda_stream)
            one.close()
            del one  # unloads the kernel, while no other one runs
        transport.close()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ring_over_loopback(num_ranks: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that come late and in pieces; with seed 0 at once."""
    from epjit.runtime.device import arch_of

    monkeypatch.setenv("EPJIT_LOOPBACK_SEED", str(seed))
    with ring_sources():
        compile_kernel(RingConfig(), arch=arch_of(0), body="loopback")
        run_threads(ring, num_ranks, 20, num_ranks // 2, timeout=120)
