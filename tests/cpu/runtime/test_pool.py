"""The pool of blocks: who gets which memory, and what must have happened before."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Collection
from typing import Any

import pytest

from epjit.runtime.pool import Block, BlockPool, NoRoomError
from epjit.runtime.stream import BlockedStreamError


class Pool(BlockPool):
    """A pool whose blocks are used on the stream that is current when they are taken."""

    def take(self, nbytes: int, streams: Collection[Any] | None = None) -> Block:
        return super().take(nbytes, (self._current_stream(),) if streams is None else streams)


class Streams:
    """Fakes of streams: a number is current, and an event says which work it covers."""

    def __init__(self) -> None:
        self.current = 1
        self.captured: set[int] = set()
        self.blocked: set[int] = set()
        self.clock = 0

    def record(self, stream: int) -> tuple[int, int] | None:
        if stream in self.blocked:
            raise BlockedStreamError
        if stream in self.captured:
            return None
        self.clock += 1
        return (stream, self.clock)

    def pool(self, nbytes: int) -> Pool:
        return Pool(nbytes, current_stream=lambda: self.current, record=self.record)


def test_blocks_do_not_overlap_and_are_aligned() -> None:
    pool = Streams().pool(1000)  # of which 896 are whole units
    blocks = [pool.take(size) for size in (1, 128, 129, 0)]
    assert [(block.offset, block.nbytes) for block in blocks] == [
        (0, 128),
        (128, 128),
        (256, 256),
        (512, 128),
    ]
    with pytest.raises(NoRoomError, match=r"of 896 bytes, no 384 in one piece"):
        pool.take(257)
    assert pool.take(256).offset == 640


def test_no_bytes_are_no_room() -> None:
    with pytest.raises(NoRoomError):
        Streams().pool(0).take(1)


def test_memory_comes_back_with_the_last_reference() -> None:
    pool = Streams().pool(256)
    block = pool.take(256)
    view = [block]
    del block
    with pytest.raises(NoRoomError):
        pool.take(1)
    view.clear()
    assert pool.take(256).offset == 0


def test_events_are_those_of_taking_and_collecting() -> None:
    streams = Streams()
    pool = streams.pool(256)
    block = pool.take(256)
    assert block.events == []
    streams.current = 2
    del block
    again = pool.take(128)  # a part of it
    assert sorted(stream for stream, _ in again.events) == [1, 2]
    rest = pool.take(128)  # the other part waits for the same work
    assert sorted(rest.events) == sorted(again.events)


def test_events_are_on_all_streams_that_a_block_was_taken_for() -> None:
    streams = Streams()
    pool = streams.pool(128)
    block = pool.take(128, (1, 99))
    streams.current = 2
    del block
    assert sorted(stream for stream, _ in pool.take(128).events) == [1, 2, 99]


def test_a_block_stays_in_use_while_an_event_cannot_be_recorded() -> None:
    """The default stream, while a blocking stream is captured."""
    streams = Streams()
    pool = streams.pool(128)
    block = pool.take(128)
    streams.current, streams.blocked = 2, {1}
    del block
    with pytest.raises(NoRoomError):
        pool.take(128)
    streams.blocked = set()
    assert sorted(stream for stream, _ in pool.take(128).events) == [1, 2]


def test_one_event_where_taking_and_collecting_are_on_one_stream() -> None:
    pool = Streams().pool(128)
    block = pool.take(128)
    del block
    assert pool.take(128).events == [(1, 1)]


def test_joined_pieces_keep_the_last_event_of_a_stream() -> None:
    streams = Streams()
    pool = streams.pool(3 * 128)
    blocks: list[Any] = [pool.take(128) for _ in range(3)]
    for i in (1, 0, 2):
        blocks[i] = None
    assert pool.take(3 * 128).events == [(1, 3)]


def test_no_event_on_a_stream_that_is_captured() -> None:
    streams = Streams()
    pool = streams.pool(128)
    block = pool.take(128)
    streams.current, streams.captured = 2, {2}
    del block
    assert [stream for stream, _ in pool.take(128).events] == [1]


def test_collected_on_another_thread_and_by_the_collector() -> None:
    pool = Streams().pool(256)
    held: list[Any] = [pool.take(128)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    held = [pool.take(256)]
    held.append(held)  # a cycle: only the collector ends it
    del held
    gc.collect()
    assert pool.take(256).offset == 0


def test_pool_lives_as_long_as_a_block() -> None:
    pool = Streams().pool(256)
    ended: list[bool] = []
    weakref.finalize(pool, ended.append, True)
    block = pool.take(1)
    del pool
    assert not ended
    del block
    assert ended


@pytest.mark.parametrize("seed", range(20))
def test_random_histories(seed: int) -> None:
    """Blocks in use never overlap, and whoever gets memory waits for all who had it before."""
    rng = random.Random(seed)
    streams = Streams()
    pool = streams.pool(64 * 128)
    blocks: list[Block] = []
    last_use: dict[int, dict[int, int]] = {}  # unit of memory: stream: time of the last free
    taken_on: dict[int, int] = {}
    for _ in range(400):
        streams.current = rng.randrange(3)
        if blocks and rng.random() < 0.5:
            block = blocks.pop(rng.randrange(len(blocks)))
            units = range(block.offset // 128, (block.offset + block.nbytes) // 128)
            freed_on = {taken_on.pop(block.offset), streams.current}
            before = streams.clock
            del block
            for unit in units:
                last_use.setdefault(unit, {}).update(dict.fromkeys(freed_on, before + 1))
            continue
        try:
            block = pool.take(rng.randrange(1, 1500))
        except NoRoomError:
            continue
        units = range(block.offset // 128, (block.offset + block.nbytes) // 128)
        ends = [(other.offset, other.offset + other.nbytes) for other in blocks]
        assert all(end <= units.start * 128 or units.stop * 128 <= start for start, end in ends)
        events = dict(block.events)
        for unit in units:
            for stream, time in last_use.pop(unit, {}).items():
                assert events[stream] >= time
        taken_on[block.offset] = streams.current
        blocks.append(block)
        del block
    blocks.clear()
    assert pool.take(64 * 128).offset == 0
