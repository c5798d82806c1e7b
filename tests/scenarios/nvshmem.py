"""Scenarios over real NVSHMEM, of one rank each; run by tests/dist/test_nvshmem.py."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch

from epjit.runtime import nvshmem
from epjit.runtime.group import Group, process_id
from epjit.runtime.symmetric import tensor_over
from epjit.runtime.topology import find_topology
from epjit.runtime.transport import make_transport
from tests.harness import launch
from tests.transport.ring import Ring, ring_sources

SKIPPED = "skipped"


def begin(process_group: Any, environment: dict[str, str]) -> tuple[Group, int]:
    """The group of ranks, and the GPU of this one."""
    # NVLS (multicast) stays off, whoever begins NVSHMEM.
    os.environ.update({"NVSHMEM_DISABLE_NVLS": "1", **environment})
    device = launch.take_gpu(process_group.rank(), process_group.size()).index
    torch.zeros(1, device="cuda")
    return Group.from_torch(process_group), device


def ring(
    process_group: Any, environment: dict[str, str], first: str, rounds: int, domain_size: int
) -> Any:
    """Rows go round; `first` says who begins NVSHMEM: "epjit", "torch" or "ctypes".

    Returns:
        PEs by rank, registers of the kernel, and whether NVSHMEM was joined.
    """
    group, device = begin(process_group, environment)
    if first == "torch" and not begin_by_torch(process_group):
        return SKIPPED
    if first == "ctypes":
        problem = nvshmem._bootstrap(
            group, [group.size - 1 - rank for rank in range(group.size)], device
        )
        assert not problem, problem
        nvshmem._begun_here = False
    topology = find_topology(group, device=device, domain_size=domain_size)
    assert topology.num_local == domain_size
    transport = make_transport(group, topology, device=device)
    assert transport.body == "nvshmem"
    registers = 0
    with ring_sources():
        for row_bytes in (16, 7168, 7168 * 2 + 16, 1 << 20):
            one = Ring(group, transport, device=device, row_bytes=row_bytes)
            check_peers(group, topology, one, device)
            for _ in range(rounds):
                one.round(torch.cuda.current_stream().cuda_stream)
            registers = one.compiled.registers
            one.close()
    return transport.pes, registers, not nvshmem._begun_here


def begin_by_torch(process_group: Any) -> bool:
    """Lets torch's symmetric memory begin NVSHMEM; False where torch cannot."""
    import torch.distributed._symmetric_memory as symmetric_memory

    if not symmetric_memory.is_nvshmem_available():
        return False
    symmetric_memory.set_backend("NVSHMEM")
    memory = symmetric_memory.empty(1024, dtype=torch.uint8, device="cuda")
    symmetric_memory.rendezvous(memory, group=process_group.group_name)
    assert nvshmem.is_initialized()
    return True


def check_peers(group: Group, topology: Any, one: Ring, device: int) -> None:
    """Peers of the own domain are read through their addresses; others have none."""
    memory = one.memory
    own = memory.tensor(torch.uint8)
    own[:8] = group.rank + 1
    torch.cuda.synchronize()
    group.barrier()
    for rank, address in enumerate(memory.peer_ptrs):
        assert bool(address) == (rank in topology.domains[topology.domain])
        if address:
            peer = tensor_over(address, (8,), owner=memory, device=device)
            assert peer.tolist() == [rank + 1] * 8
    group.barrier()


def create_again(process_group: Any, environment: dict[str, str], times: int) -> Any:
    """Transport, memory and kernel are made again and again; two are alive at a time.

    Returns:
        Free bytes of the GPU after each time, and how many kernels are still attached.
    """
    group, device = begin(process_group, environment)
    free = []
    with ring_sources():
        for index in range(times):
            rings = []
            for row_bytes in (4096, 1 << 20):
                topology = find_topology(group, device=device, domain_size=1)
                transport = make_transport(group, topology, device=device)
                rings.append(Ring(group, transport, device=device, row_bytes=row_bytes))
            for one in rings[:: 1 if index % 2 else -1]:
                one.round(torch.cuda.current_stream().cuda_stream)
            for one in rings:
                one.close()
            del one, rings, transport
            gc.collect()
            torch.cuda.empty_cache()
            group.barrier()
            free.append(torch.cuda.mem_get_info()[0])
    attached = len(nvshmem._attached)
    group.barrier()
    nvshmem.finalize()
    assert not nvshmem.is_initialized(), process_id()
    return free, attached


def collect_in_a_capture(process_group: Any, environment: dict[str, str]) -> tuple[int, ...]:
    """A kernel goes while a CUDA graph is captured, and the graph stays whole.

    Returns:
        Kernels that are attached before the capture, in it, and after the next one has gone.
    """
    group, device = begin(process_group, environment)
    topology = find_topology(group, device=device, domain_size=1)
    transport = make_transport(group, topology, device=device)
    with ring_sources():
        rings = [Ring(group, transport, device=device, row_bytes=4096) for _ in range(2)]
    for one in rings:
        one.round(torch.cuda.current_stream().cuda_stream)
        one.close()
    torch.cuda.synchronize()
    del one
    attached = [len(nvshmem._attached)]
    x, graph = torch.zeros(8, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        rings.pop()
        gc.collect()
        attached.append(len(nvshmem._attached))
        x.add_(1)
    graph.replay()
    assert x.tolist() == [2.0] * 8
    rings.pop()
    gc.collect()
    group.barrier()
    return (*attached, len(nvshmem._attached))
