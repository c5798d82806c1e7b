"""Transports carry bytes between NVLink domains: memory of all ranks, and how kernels reach it.

A kernel whose config says ``needs_transport = True`` calls the functions of transport.cuh. It is
built by ``Kernel(config, device=..., body=transport.body)`` and gets `Transport.context` and the
numbers of `Transport.pes` among its parameters.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from epjit import env
from epjit.runtime import driver, nvshmem, params
from epjit.runtime.group import Group, process_id
from epjit.runtime.heap import HeapMemory
from epjit.runtime.symmetric import SymmetricMemory, fill_zero, own_stream, tensor_over
from epjit.runtime.topology import Topology

if TYPE_CHECKING:
    import torch

DEFAULT_QPS = 24
"""V1's default of `num_qps_per_rank`."""
_log = logging.getLogger(__name__)


class RemoteMemory(ABC):
    """Zero-filled symmetric memory of all ranks of a group.

    Attributes:
        ptr: Address of this rank's memory.
        nbytes: Size in bytes.
        peer_ptrs: Address of each rank's memory for loads and stores; 0 for ranks of other NVLink
            domains, which only the transport reaches.
    """

    ptr: int
    nbytes: int
    peer_ptrs: list[int]

    @abstractmethod
    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """This rank's memory as a one-dimensional tensor; not to be used after `close`."""

    @abstractmethod
    def close(self) -> None:
        """Hands the memory back. Not collective, and idempotent.

        No kernel of this rank may still use a peer's memory, and no peer this rank's.
        """


class Transport(ABC):
    """How one rank reaches the others.

    Attributes:
        body: Body of transport.cuh: ``"nvshmem"`` or ``"loopback"``.
        context: Argument of kernels to the functions of transport.cuh.
        pes: The transport's number of each rank.
        through_proxy: Whether a thread of the CPU posts what kernels put: then it is the number of
            puts that takes time, more than their bytes.
    """

    body: str
    context: int
    pes: list[int]
    through_proxy: bool = False

    @abstractmethod
    def allocate(self, nbytes: int) -> RemoteMemory:
        """Makes symmetric memory. Collective.

        Raises:
            RuntimeError: Some rank cannot; the same reasons on all ranks.
            ValueError: The ranks disagree on `nbytes`.
        """

    def expect(self, num_puts: int) -> None:  # noqa: B027 - most have no queues
        """Says in the log when this transport cannot hold what kernels put at once.

        Args:
            num_puts: Puts with a signal from one rank to another.
        """

    def quiet(self) -> None:  # noqa: B027 - loopback's puts are complete when they return
        """Waits until all that this rank has put has left its memory. Not collective.

        Not to be called when a peer may be dead: what is on its way to it might never leave.
        """

    def close(self) -> None:  # noqa: B027 - NVSHMEM has nothing to free
        """Frees what kernels used. Not collective, and idempotent; memory has its own `close`."""


def make_transport(
    group: Group,
    topology: Topology,
    *,
    device: int,
    num_qps_per_rank: int = DEFAULT_QPS,
    use_fabric: bool = False,
    may_lose_ranks: bool = False,
) -> Transport:
    """Makes what ``EPJIT_TRANSPORT`` says. Collective.

    Args:
        group: The ranks.
        topology: Their NVLink domains.
        device: GPU of this rank.
        num_qps_per_rank: Queue pairs to each rank, for IBGDA.
        use_fabric: Whether memory of an NVLink domain is shared by fabric handles.
        may_lose_ranks: Whether the group goes on without a rank that is gone.

    Raises:
        ImportError: NVSHMEM is wanted and not installed.
        RuntimeError: NVSHMEM cannot be used; in words.
        ValueError: The ranks disagree on the transport.
    """
    found = group.allgather((env.transport(), process_id()))
    wanted = {each for each, _ in found}
    if len(wanted) > 1:
        raise ValueError(f"the ranks disagree on EPJIT_TRANSPORT: {[each for each, _ in found]}")
    name = wanted.pop()
    if name == "auto":
        one_process = len({process for _, process in found}) == 1
        name = "loopback" if one_process else "nvshmem"
    if name == "loopback":
        return LoopbackTransport(group, topology, device=device, use_fabric=use_fabric)
    return NvshmemTransport(
        group,
        topology,
        device=device,
        num_qps_per_rank=num_qps_per_rank,
        use_fabric=use_fabric,
        may_lose_ranks=may_lose_ranks,
    )


# ---- NVSHMEM ------------------------------------------------------------------------------------

_ENTRIES_A_PUT = 4  # of a queue pair of IBGDA, with its signal: write 1, masked atomic 2, no-op 1


class NvshmemTransport(Transport):
    """Puts of NVSHMEM. The arguments are those of `make_transport`; collective to make."""

    body = "nvshmem"
    context = 0

    def __init__(
        self,
        group: Group,
        topology: Topology,
        *,
        device: int,
        num_qps_per_rank: int,
        use_fabric: bool,
        may_lose_ranks: bool,
    ) -> None:
        self._group, self._topology, self._device = group, topology, device
        # What V1 sets, too. NVLS (multicast) serves collectives that nothing here calls. They hold
        # for the whole process, also for torch's symmetric memory when that joins NVSHMEM later.
        settings = {
            "NVSHMEM_DISABLE_NVLS": "1",
            "NVSHMEM_MAX_TEAMS": "7",
            "NVSHMEM_CUMEM_GRANULARITY": str(1 << 29),
            env.nvshmem_num_qps.name: str(num_qps_per_rank),
            env.nvshmem_qp_depth.name: str(env.nvshmem_qp_depth.default),
        }
        if not use_fabric:
            settings["NVSHMEM_DISABLE_MNNVL"] = "1"
        world = nvshmem.initialize(
            group, device=device, settings=settings, may_lose_ranks=may_lose_ranks
        )
        self.pes, self.through_proxy = world.pes, world.transport not in ("", "ibgda")

    def allocate(self, nbytes: int) -> RemoteMemory:
        """See `Transport.allocate`."""
        heap = nvshmem.allocate(self._group, nbytes, device=self._device)
        try:
            memory = _NvshmemMemory(heap, self, self._topology)
            with driver.using(self._device):
                fill_zero(memory.ptr, nbytes)
            # Nobody writes before all are zero.
            lines = [line for line in self._group.allgather(memory.problem) if line]
            if lines:
                raise RuntimeError("symmetric memory cannot be made:\n  " + "\n  ".join(lines))
        except BaseException:
            heap.close()
            raise
        return memory

    def expect(self, num_puts: int) -> None:
        """See `Transport.expect`."""
        depth, num_qps = env.nvshmem_qp_depth(), env.nvshmem_num_qps()
        needed = -(-num_puts // num_qps) * _ENTRIES_A_PUT
        if self._group.rank == 0 and env.nvshmem_ib_enable_ibgda() and depth < needed:
            # NVSHMEM waits for room in a queue by itself, so this costs time and nothing else.
            _log.warning(
                "queue shorter than a call: expect stalls (%d puts to a rank over %d queue pairs "
                "take %d entries of each, %s=%d)",
                num_puts,
                num_qps,
                needed,
                env.nvshmem_qp_depth.name,
                depth,
            )

    def quiet(self) -> None:
        """See `Transport.quiet`."""
        with driver.using(self._device), own_stream() as stream:
            nvshmem.load().nvshmemx_quiet_on_stream(int(stream))


class _NvshmemMemory(RemoteMemory):
    def __init__(self, memory: HeapMemory, transport: NvshmemTransport, topology: Topology) -> None:
        self._memory, self._device = memory, transport._device
        self.ptr, self.nbytes = memory.ptr, memory.nbytes
        peers = topology.domains[topology.domain]
        self.peer_ptrs = [
            nvshmem.address_at(self.ptr, pe) if rank in peers else 0
            for rank, pe in enumerate(transport.pes)
        ]
        missing = [rank for rank in peers if not self.peer_ptrs[rank]]
        self.problem = ""
        if missing:
            self.problem = (
                f"rank {topology.rank} (device {self._device}) cannot map the memory of ranks "
                f"{missing} of its NVLink domain; is NVSHMEM_DISABLE_P2P set, do the GPUs lack "
                "peer access, or do containers of one host have different hostnames? "
                "(nvlink_domain or EPJIT_NVLINK_DOMAIN cuts the domains)"
            )

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        if not self.ptr:
            raise RuntimeError("this symmetric memory is closed")
        return tensor_over(self.ptr, (self.nbytes,), owner=self, device=self._device).view(dtype)

    def close(self) -> None:
        self._memory.close()
        self.ptr, self.peer_ptrs = 0, []


# ---- loopback -----------------------------------------------------------------------------------


class LoopbackTransport(Transport):
    """Loads and stores between ranks that share a host or a process, with delays for tests.

    The arguments are those of `make_transport`; collective to make.
    """

    body = "loopback"

    def __init__(
        self, group: Group, topology: Topology, *, device: int, use_fabric: bool = False
    ) -> None:
        self._record: Any = params.params_type("transport/loopback.cuh", "Record")()
        max_ranks = len(self._record.regions[0].bases)
        if group.size > max_ranks:
            raise ValueError(
                f"loopback serves up to {max_ranks} ranks, this group has {group.size}"
            )
        self._group, self._topology, self._device = group, topology, device
        self._use_fabric = use_fabric
        self._lock = threading.Lock()
        seed = env.loopback_seed()
        self._record.seed = seed and (seed << 8 | group.rank)  # ranks draw different delays
        with driver.using(device):
            self.context = int(driver.call("cuMemAlloc", ctypes.sizeof(self._record)))
        try:
            self._write(self._record)
        except BaseException:
            with contextlib.suppress(RuntimeError):
                self.close()
            raise
        self.pes = list(range(group.size))

    def allocate(self, nbytes: int) -> RemoteMemory:
        """See `Transport.allocate`."""
        memory = SymmetricMemory(
            nbytes, group=self._group, device=self._device, fabric=self._use_fabric
        )
        return _LoopbackMemory(memory, self, self._topology)

    def add(self, memory: SymmetricMemory) -> int:
        """Lets kernels reach a region; returns its place."""
        with self._lock:
            places = [i for i, region in enumerate(self._record.regions) if not region.bytes]
            if not places:
                most = len(self._record.regions)
                raise RuntimeError(f"loopback serves up to {most} allocations at a time")
            region = self._record.regions[places[0]]
            region.base, region.bytes = memory.ptr, memory.nbytes
            region.bases[: self._group.size] = memory.peer_ptrs
            self._write(region)
            return places[0]

    def remove(self, place: int) -> None:
        """Undoes `add`: the addresses may be another allocation's later."""
        with self._lock:
            region = self._record.regions[place]
            region.bytes = 0
            if self.context:
                self._write(region)

    def close(self) -> None:
        """See `Transport.close`."""
        with self._lock:
            context, self.context = self.context, 0
        if context:
            with driver.using(self._device):
                driver.call("cuMemFree", context)

    def _write(self, part: ctypes.Structure) -> None:
        """Copies the record, or a part of it, to the GPU."""
        source = ctypes.addressof(part)
        to = self.context + source - ctypes.addressof(self._record)
        with driver.using(self._device), own_stream() as stream:
            driver.call("cuMemcpyHtoDAsync", to, source, ctypes.sizeof(part), stream)


class _LoopbackMemory(RemoteMemory):
    def __init__(
        self, memory: SymmetricMemory, transport: LoopbackTransport, topology: Topology
    ) -> None:
        self._memory, self._transport = memory, transport
        self.ptr, self.nbytes = memory.ptr, memory.nbytes
        peers = topology.domains[topology.domain]
        self.peer_ptrs = [ptr if rank in peers else 0 for rank, ptr in enumerate(memory.peer_ptrs)]
        try:
            self._place: int | None = transport.add(memory)
        except BaseException:
            with contextlib.suppress(RuntimeError):
                memory.close()
            raise

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        return self._memory.tensor(dtype)

    def close(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            self._transport.remove(place)
        self._memory.close()
        self.ptr, self.peer_ptrs = 0, []
