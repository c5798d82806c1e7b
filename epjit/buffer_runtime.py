"""V1's inner object of a Buffer."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from epjit.buffer import Buffer


class BufferRuntime:
    """The members of V1's `Buffer.runtime` that other code reads."""

    def __init__(self, buffer: Buffer) -> None:
        # Weak: in a cycle, device memory would stay until Python's collector happens to run.
        self._weak_buffer = weakref.ref(buffer)

    @property
    def _buffer(self) -> Buffer:
        buffer = self._weak_buffer()
        if buffer is None:
            raise RuntimeError("the Buffer of this runtime is gone; keep a reference to it")
        return buffer

    def is_available(self) -> bool:
        """Whether the buffer can be used."""
        buffer = self._weak_buffer()
        return buffer is not None and buffer.runtime is not None

    def get_num_rdma_ranks(self) -> int:
        """Number of NVLink domains."""
        return self._buffer.topology.num_domains

    def get_rdma_rank(self) -> int:
        """This rank's NVLink domain."""
        return self._buffer.topology.domain

    def get_root_rdma_rank(self, is_global: bool) -> int:
        """The rank that makes the RDMA unique id in V1: the first of the group or of a rail.

        Args:
            is_global: Its number in the group; else its NVLink domain, which is 0.
        """
        topology = self._buffer.topology
        return topology.domains[0][topology.local] if is_global else 0

    def get_local_device_id(self) -> int:
        """Index of the GPU; -1 without one."""
        index = self._buffer.device.index
        return -1 if index is None else index

    def get_comm_stream(self) -> torch.cuda.Stream:
        """See `Buffer.get_comm_stream`."""
        return self._buffer.get_comm_stream()

    def destroy(self) -> None:
        """As `Buffer.destroy`, whatever the Buffer was made with."""
        self._buffer._release()

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, offset: int, use_rdma_buffer: bool
    ) -> torch.Tensor:
        """See `Buffer.get_local_buffer_tensor`."""
        return self._buffer.get_local_buffer_tensor(
            dtype, offset=offset, use_rdma_buffer=use_rdma_buffer
        )
