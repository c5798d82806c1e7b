"""Symmetric memory: a region on every rank that the peers load from and store to."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from epjit.errors import require
from epjit.runtime import device as gpu
from epjit.runtime import driver
from epjit.runtime.group import Group, host_id, process_id
from epjit.sizes import align

if TYPE_CHECKING:
    import torch


_IPC_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE; cuda-bindings shows no field of the struct


class _Region(NamedTuple):
    """The memory of a rank, as its peers are told; `error` says why it has none."""

    error: str = ""
    nbytes: int = 0
    fabric: bool = False
    host: str = ""
    process: str = ""
    device: int = 0
    uuid: bytes = b""
    ptr: int = 0
    handle: bytes = b""


@contextmanager
def own_stream() -> Iterator[Any]:
    """A stream for one copy or fill, synchronised at the end.

    Not the default stream: that would wait for kernels of other ranks on this device.
    """
    flag = driver.load().CUstream_flags.CU_STREAM_NON_BLOCKING
    stream = driver.call("cuStreamCreate", flag)
    try:
        yield stream
        driver.call("cuStreamSynchronize", stream)
    finally:
        driver.call("cuStreamDestroy", stream)


def fill_zero(ptr: int, nbytes: int) -> None:
    """Fills device memory with zeros, which have landed on return; its context is current."""
    with own_stream() as stream:
        driver.call("cuMemsetD8Async", ptr, 0, nbytes, stream)


def tensor_over(ptr: int, shape: tuple[int, ...], *, owner: object, device: int) -> torch.Tensor:
    """Device memory as a tensor of bytes, which keeps `owner` alive.

    Raises:
        ImportError: torch or CuPy is not installed.
    """
    cupy, from_dlpack = _tensor_makers()
    with driver.using(device):
        memory = cupy.cuda.UnownedMemory(ptr, math.prod(shape), owner, device)
        array = cupy.ndarray(shape, cupy.uint8, memptr=cupy.cuda.MemoryPointer(memory, 0))
        # -1: no stream waits for another. torch.from_dlpack(array) would ask for that.
        return from_dlpack(array.__dlpack__(stream=-1))


@functools.cache
def _tensor_makers() -> tuple[Any, Any]:
    """CuPy and torch's half of DLPack, looked up once: each call of `direct` makes tensors."""
    torch = require("torch", package="torch", extra="torch")
    return require("cupy", package="cupy-cuda13x (cupy-cuda12x)"), torch.utils.dlpack.from_dlpack


class SymmetricMemory:
    """Zero-filled device memory that all ranks of a group reach. Collective to make, not to close.

    Args:
        nbytes: Size in bytes, the same on all ranks.
        group: The ranks.
        device: GPU of this rank.
        fabric: Share by fabric handles, which work between hosts of one NVLink domain.

    Attributes:
        nbytes: Size in bytes.
        ptr: Address of this rank's memory.
        peer_ptrs: Address, on this device, of each rank's memory; the own entry is `ptr`.

    Raises:
        RuntimeError: Some rank cannot allocate, or cannot reach a peer; the same reasons on all
            ranks, with both ranks and devices.
        ValueError: The ranks disagree on `nbytes` or `fabric`.
    """

    def __init__(self, nbytes: int, *, group: Group, device: int, fabric: bool = False) -> None:
        if nbytes <= 0:
            raise ValueError(f"nbytes is {nbytes}, expected more than 0")
        self.nbytes = nbytes
        self.ptr = 0
        self.peer_ptrs: list[int] = []
        self._rank, self._device, self._fabric = group.rank, device, fabric
        self._ipc_opened: list[int] = []
        self._mapped: list[tuple[int, int, Any]] = []  # address, size, allocation: fabric only
        self._closed, self._pid = False, os.getpid()
        try:
            regions = group.allgather(self._share())
            # Each rank tells the others what went wrong; none waits for a peer that gave up.
            everyone = group.allgather(self._map(regions))
            if any(everyone):
                kind = ValueError if any(self._disagreements(regions)) else RuntimeError
                lines = dict.fromkeys(line for rank_problems in everyone for line in rank_problems)
                raise kind("symmetric memory cannot be made:\n  " + "\n  ".join(lines))
        except BaseException:  # also a peer that does not come
            with contextlib.suppress(RuntimeError):  # the first error is the one to see
                self.close()
            raise

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """This rank's memory as a one-dimensional tensor.

        Args:
            dtype: Its size must divide `nbytes`.

        Returns:
            A tensor over the memory itself; it must not be used after `close`.
        """
        if self._closed:
            raise RuntimeError("this symmetric memory is closed")
        return tensor_over(self.ptr, (self.nbytes,), owner=self, device=self._device).view(dtype)

    def close(self) -> None:
        """Unmaps the peers' memory and frees the own. Not collective, and idempotent.

        No kernel of this rank may still use a peer's memory, and no peer this rank's.

        Raises:
            RuntimeError: The driver refuses; everything else has been freed all the same.
        """
        if self._closed or os.getpid() != self._pid:  # a forked child has only a copy of this
            return
        self._closed = True
        errors: list[str] = []

        def attempt(name: str, *args: Any) -> None:
            try:
                driver.call(name, *args)
            except RuntimeError as error:
                errors.append(str(error))

        with driver.using(self._device):
            if self._mapped:
                # cuMemFree waits for what is queued; cuMemUnmap does not, and a kernel that still
                # reads would fault. (The last tensor over the memory may go at any time.)
                attempt("cuCtxSynchronize")
            for pointer in self._ipc_opened:
                attempt("cuIpcCloseMemHandle", pointer)
            for pointer, size, allocation in reversed(self._mapped):
                attempt("cuMemUnmap", pointer, size)
                attempt("cuMemAddressFree", pointer, size)
                attempt("cuMemRelease", allocation)
            if self.ptr and not self._fabric:
                attempt("cuMemFree", self.ptr)
        self.ptr, self.peer_ptrs, self._ipc_opened, self._mapped = 0, [], [], []
        if errors:
            raise RuntimeError("symmetric memory: " + "; ".join(errors))

    def _share(self) -> _Region:
        """Allocates, fills with zeros, and describes the memory to the peers."""
        try:
            with driver.using(self._device):
                handle = self._allocate_fabric() if self._fabric else self._allocate()
                fill_zero(self.ptr, self.nbytes)
        except RuntimeError as error:
            return _Region(error=f"rank {self._rank} (device {self._device}): {error}")
        return _Region(
            nbytes=self.nbytes,
            fabric=self._fabric,
            host=host_id(),
            process=process_id(),
            device=self._device,
            uuid=gpu.uuid(self._device),
            ptr=self.ptr,
            handle=handle,
        )

    def _allocate(self) -> bytes:
        self.ptr = int(driver.call("cuMemAlloc", self.nbytes))
        handle = driver.call("cuIpcGetMemHandle", self.ptr)
        return ctypes.string_at(handle.getPtr(), _IPC_HANDLE_BYTES)

    def _allocate_fabric(self) -> bytes:
        cuda = driver.load()
        size, properties = self._fabric_size()
        allocation = driver.call("cuMemCreate", size, properties, 0)
        self.ptr = self._map_allocation(allocation, size)
        kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC
        exported = driver.call("cuMemExportToShareableHandle", allocation, kind, 0)
        return bytes(exported.data)

    def _fabric_size(self) -> tuple[int, Any]:
        """Size of the allocation, a multiple of what the driver maps, and its properties."""
        cuda = driver.load()
        properties = cuda.CUmemAllocationProp()
        properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC
        properties.location = self._location()
        granularity = int(
            driver.call(
                "cuMemGetAllocationGranularity",
                properties,
                cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
            )
        )
        return align(self.nbytes, granularity), properties

    def _location(self) -> Any:
        cuda = driver.load()
        location = cuda.CUmemLocation()
        location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self._device
        return location

    def _map_allocation(self, allocation: Any, size: int) -> int:
        """Maps an allocation for this device; `close` undoes it."""
        cuda = driver.load()
        try:
            address = driver.call("cuMemAddressReserve", size, 0, 0, 0)
        except BaseException:
            driver.call("cuMemRelease", allocation)
            raise
        try:
            driver.call("cuMemMap", address, size, 0, allocation, 0)
        except BaseException:
            driver.call("cuMemAddressFree", address, size)
            driver.call("cuMemRelease", allocation)
            raise
        self._mapped.append((address, size, allocation))
        access = cuda.CUmemAccessDesc()
        access.location = self._location()
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        driver.call("cuMemSetAccess", address, size, [access], 1)
        return int(address)

    def _disagreements(self, regions: list[_Region]) -> list[str]:
        return [
            f"rank {self._rank} asks for nbytes={self.nbytes} and fabric={self._fabric}, rank "
            f"{rank} for nbytes={region.nbytes} and fabric={region.fabric}"
            for rank, region in enumerate(regions)
            if not region.error and (region.nbytes, region.fabric) != (self.nbytes, self._fabric)
        ]

    def _map(self, regions: list[_Region]) -> list[str]:
        """Fills `peer_ptrs`; returns what went wrong, in words."""
        problems = [region.error for region in regions if region.error]
        problems = problems or self._disagreements(regions)
        if problems:
            return problems
        own = regions[self._rank]
        for rank, region in enumerate(regions):
            try:
                with driver.using(self._device):
                    self.peer_ptrs.append(self._reach(own, region, rank))
            except RuntimeError as error:
                problems.append(
                    f"rank {self._rank} (device {self._device}) cannot reach the memory of rank "
                    f"{rank} (device {region.device}): {error}"
                )
        return problems

    def _reach(self, own: _Region, region: _Region, rank: int) -> int:
        """Address of a rank's memory on this device."""
        same_process = own.process == region.process
        if rank == self._rank or (same_process and own.device == region.device):
            return region.ptr
        if own.host != region.host and not self._fabric:
            raise RuntimeError(
                "they are on different hosts; only fabric handles (use_fabric=True) cross hosts"
            )
        if own.host == region.host:
            self._check_peer_access(region)
        if self._fabric:
            size, _ = self._fabric_size()
            kind = driver.load().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC
            allocation = driver.call("cuMemImportFromShareableHandle", region.handle, kind)
            return self._map_allocation(allocation, size)
        if same_process:
            _enable_peer_access(region.device)
            return region.ptr
        cuda = driver.load()
        handle = cuda.CUipcMemHandle()
        ctypes.memmove(handle.getPtr(), region.handle, _IPC_HANDLE_BYTES)
        flag = cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        pointer = int(driver.call("cuIpcOpenMemHandle", handle, flag))
        self._ipc_opened.append(pointer)
        return pointer

    def _check_peer_access(self, region: _Region) -> None:
        """Asks where this process sees the peer's GPU; elsewhere mapping itself must tell."""
        for device in range(gpu.count()):
            if gpu.uuid(device) == region.uuid and not gpu.can_access_peer(self._device, device):
                raise RuntimeError(
                    "the two GPUs cannot access each other's memory (cuDeviceCanAccessPeer is 0): "
                    "they share neither NVLink nor a PCIe path that allows it"
                )


def _enable_peer_access(device: int) -> None:
    """Lets the current context reach the memory of another device's."""
    cuda = driver.load()
    (status,) = cuda.cuCtxEnablePeerAccess(driver.primary_context(device), 0)
    if status and status != cuda.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
        raise RuntimeError(f"cuCtxEnablePeerAccess failed with {driver.describe(status)}")
