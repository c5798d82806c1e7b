"""A pool of blocks of device memory that is not torch's: who may use a block, and until when."""

from __future__ import annotations

import itertools
import os
import sys
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from epjit.runtime.stream import BlockedStreamError
from epjit.sizes import ALIGNMENT, align


class NoRoomError(Exception):
    """No free piece of the pool is large enough."""


class _Mark(NamedTuple):
    """An event on a stream. Of two on one stream, the one with the higher number covers both.

    For its number was drawn before it was recorded, and after all that the other must cover.
    """

    number: int
    event: Any


class _Piece(NamedTuple):
    """A free piece, and what must have happened before it is written: a mark a stream."""

    offset: int
    nbytes: int
    marks: Mapping[Hashable, _Mark]


class _Returned:
    """A piece that was in use, on its way back.

    Args:
        offset: Bytes from the start of the pool.
        nbytes: Its size.
        streams: Whose work may use it.
    """

    def __init__(self, offset: int, nbytes: int, streams: set[Hashable]) -> None:
        self.offset, self.nbytes = offset, nbytes
        self.unmarked = streams
        self.marks: dict[Hashable, _Mark] = {}

    def mark(self, numbers: Iterator[int], record: Callable[[Any], Any | None]) -> None:
        """Records what is not recorded yet, where that can be done."""
        for stream in tuple(self.unmarked):
            number = next(numbers)
            with suppress(BlockedStreamError):
                event = record(stream)
                if event is not None:
                    self.marks[stream] = _Mark(number, event)
                self.unmarked.remove(stream)


class Block:
    """Memory that is in use while this object lives.

    Attributes:
        offset: Bytes from the start of the pool.
        nbytes: Its size, a multiple of 128.
        events: To be waited for before it is written.
    """

    def __init__(self, pool: BlockPool, piece: _Piece, streams: Collection[Hashable]) -> None:
        self._pool = pool  # which lives as long as any of its blocks
        self._streams = streams
        self.offset, self.nbytes = piece.offset, piece.nbytes
        self.events = [mark.event for mark in piece.marks.values()]

    def __del__(self) -> None:
        # At the end the driver may be gone, and a forked child has none.
        if not sys.is_finalizing() and os.getpid() == self._pool.pid:
            self._pool.give_back(self.offset, self.nbytes, self._streams)


class BlockPool:
    """Hands out blocks of one region, first fit.

    A block is in use until its `Block` has been collected, on whatever thread that happens. Work
    queued before may still use the memory then. So an event is recorded at that time on the streams
    that `take` was told and on the one that is current where the block is collected. Whoever takes
    the memory next lets the stream that it writes on wait for these events, at once, whether it
    comes to write or not.

    That is what torch's allocator does for the stream of an allocation. Of any other stream nothing
    is known here, as `Tensor.record_stream` does nothing for memory that is not torch's: its work
    must be done, or one of these streams wait for it, before the last reference goes. On a stream
    that is being captured no event is recorded: what a graph reads must be kept by whoever replays
    it, as with torch's memory from outside the graph. Where none can be recorded yet, the block
    stays in use until one can.

    One thread takes at a time; blocks may be collected on any.

    Args:
        nbytes: Size of the region.
        current_stream: The current stream of the calling thread, equal each time.
        record: Records an event on a stream and returns it, None if that is being captured;
            `BlockedStreamError` when that cannot be done now.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        current_stream: Callable[[], Hashable],
        record: Callable[[Any], Any | None],
    ) -> None:
        self.nbytes = nbytes // ALIGNMENT * ALIGNMENT
        self._current_stream, self._record = current_stream, record
        self.pid = os.getpid()
        self._numbers = itertools.count()
        self._free = [_Piece(0, self.nbytes, {})]  # ascending, no two adjacent
        # The collector runs anywhere, even within `take`, so it only appends here.
        self._returned: deque[_Returned] = deque()

    def take(self, nbytes: int, streams: Collection[Hashable]) -> Block:
        """A block of at least `nbytes` bytes.

        Args:
            nbytes: Its size.
            streams: Streams whose work may use it until it is collected.

        Raises:
            NoRoomError: There is no such piece.
        """
        for _ in range(len(self._returned)):
            returned = self._returned.popleft()
            returned.mark(self._numbers, self._record)
            if returned.unmarked:
                self._returned.append(returned)
            else:
                self._put_back(_Piece(returned.offset, returned.nbytes, returned.marks))
        wanted = max(ALIGNMENT, align(nbytes))
        for i, (offset, size, marks) in enumerate(self._free):
            if size >= wanted:
                rest = _Piece(offset + wanted, size - wanted, marks)
                self._free[i : i + 1] = [rest] if rest.nbytes else []
                return Block(self, _Piece(offset, wanted, marks), streams)
        raise NoRoomError(f"of {self.nbytes} bytes, no {wanted} in one piece are free")

    def give_back(self, offset: int, nbytes: int, streams: Collection[Hashable]) -> None:
        """The end of a block that was taken for these streams."""
        returned = _Returned(offset, nbytes, {*streams, self._current_stream()})
        returned.mark(self._numbers, self._record)
        self._returned.append(returned)

    def _put_back(self, piece: _Piece) -> None:
        """Joins a piece with those that it touches."""
        insort(self._free, piece, key=lambda each: each.offset)
        i = self._free.index(piece)
        if i + 1 < len(self._free) and _touch(self._free[i], self._free[i + 1]):
            self._free[i : i + 2] = [_join(self._free[i], self._free[i + 1])]
        if i > 0 and _touch(self._free[i - 1], self._free[i]):
            self._free[i - 1 : i + 1] = [_join(self._free[i - 1], self._free[i])]


def _touch(left: _Piece, right: _Piece) -> bool:
    return left.offset + left.nbytes == right.offset


def _join(left: _Piece, right: _Piece) -> _Piece:
    marks = dict(left.marks)
    for stream, mark in right.marks.items():
        marks[stream] = max(mark, marks.get(stream, mark), key=lambda each: each.number)
    return _Piece(left.offset, left.nbytes + right.nbytes, marks)
