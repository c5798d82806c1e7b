"""NVSHMEM's symmetric heap, shared by all Buffers: which of its blocks are used again, and when.

To allocate or to free, all ranks must be here. So a block that a rank hands back stays allocated,
until all have handed it back and it, or a larger one, is wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from epjit.runtime.group import Group


class _Block(NamedTuple):
    ptr: int
    nbytes: int


class Heap:
    """The blocks of one process.

    All ranks make the same blocks in the same order, so a block's number means the same memory on
    each. One that is free here may still be in use elsewhere.

    Args:
        replace: Called on all ranks at once with group, addresses, bytes and GPU: frees what lies
            at the addresses, allocates the bytes, and returns their address, or 0 without room.
    """

    def __init__(self, replace: Callable[[Group, Sequence[int], int, int], int]) -> None:
        self._replace = replace
        # A thread can come back to it: the collector runs anywhere, and what it finds hands blocks
        # back.
        self._lock = threading.RLock()
        self._blocks: dict[int, _Block] = {}
        self._free: set[int] = set()
        self._num_blocks = 0

    @property
    def num_in_use(self) -> int:
        """Blocks that this process has not handed back."""
        with self._lock:
            return len(self._blocks) - len(self._free)

    def allocate(self, group: Group, nbytes: int, *, device: int) -> HeapMemory:
        """Takes a block that was handed back everywhere, else a new one. Collective.

        Its contents are undefined.

        Args:
            group: All processes of the heap.
            nbytes: Size, the same on all ranks.
            device: GPU of this rank.

        Raises:
            ValueError: The ranks disagree on `nbytes`.
            RuntimeError: There is not enough memory. Both the same on all ranks.
            CommunicationError: A rank does not come.
        """
        with self._lock:
            free = {number: self._blocks[number].nbytes for number in tuple(self._free)}
        offers: list[tuple[int, dict[int, int]]] = group.allgather((nbytes, free))
        sizes = [size for size, _ in offers]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"the ranks ask for different sizes of symmetric memory: {sizes} by rank"
            )
        number, useless = choose_block([offer for _, offer in offers], nbytes)
        if number is not None:
            with self._lock:
                self._free.discard(number)
                return HeapMemory(self, number, self._blocks[number].ptr, nbytes)
        small = []  # gives way, so that sizes that grow do not add up
        for each in useless:
            with self._lock:
                small.append(self._blocks.pop(each).ptr)
                self._free.discard(each)
        ptr = self._replace(group, small, nbytes, device)
        with self._lock:  # whoever got memory: a number means the same memory on each rank
            number, self._num_blocks = self._num_blocks, self._num_blocks + 1
        without = [rank for rank, ok in enumerate(group.allgather(bool(ptr))) if not ok]
        if without:
            # What some ranks got stays theirs, for to free it all would have to have it.
            raise RuntimeError(
                f"NVSHMEM has no {nbytes} bytes of symmetric memory for ranks "
                f"{', '.join(map(str, without))}; is the GPU full? (NVSHMEM_SYMMETRIC_SIZE bounds "
                "the heap only with NVSHMEM_DISABLE_CUDA_VMM=1)"
            )
        with self._lock:
            self._blocks[number] = _Block(ptr, nbytes)
        return HeapMemory(self, number, ptr, nbytes)

    def hand_back(self, number: int) -> None:
        """Ends this process's use of a block. Not collective."""
        with self._lock:
            self._free.add(number)

    def clear(self) -> list[int]:
        """Forgets all blocks, none of which is in use; returns their addresses in order."""
        with self._lock:
            pointers = [self._blocks[number].ptr for number in sorted(self._blocks)]
            self._blocks.clear()
            self._free.clear()
        return pointers


class HeapMemory:
    """A piece of the heap that is this process's until `close`.

    Attributes:
        ptr: Address.
        nbytes: Size in bytes, as asked for.
    """

    def __init__(self, heap: Heap, number: int, ptr: int, nbytes: int) -> None:
        self._heap, self._number = heap, number
        self.ptr, self.nbytes = ptr, nbytes

    def close(self) -> None:
        """Hands the memory back. Not collective, and idempotent."""
        ptr, self.ptr = self.ptr, 0
        if ptr:
            self._heap.hand_back(self._number)


def choose_block(offers: Sequence[Mapping[int, int]], nbytes: int) -> tuple[int | None, list[int]]:
    """Which free block all ranks take: the smallest that is large enough, of those free on all.

    Args:
        offers: Free blocks of each rank: number to size.
        nbytes: Size that is asked for.

    Returns:
        Its number, or None; and the blocks that are free on all ranks, in order.
    """
    common = sorted(set(offers[0]).intersection(*offers))
    fitting = [(offers[0][number], number) for number in common if offers[0][number] >= nbytes]
    return (min(fitting)[1] if fitting else None), common
