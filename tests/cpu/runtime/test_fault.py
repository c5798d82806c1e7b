"""Fault records, decoded on the host."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from epjit.errors import CommunicationError
from epjit.runtime import fault, sources
from epjit.runtime.fault import FaultRecord

SYNC = """
// What a fault record calls the wait.
enum WaitTag : int32_t {
  kWaitOne = 1,    // first: the word of a token
  kWaitTwelve = 12, // second: the end
  kRoomThird = 13   // third: no room in a slab for selection
};
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "epjit").mkdir()
    (tmp_path / "epjit" / "sync.cuh").write_text(SYNC)
    monkeypatch.setattr(sources, "ROOT", tmp_path)


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize("is_ctypes", [False, True])
def test_record_in_words(is_ctypes: bool) -> None:
    words = np.zeros(fault.NUM_WORDS, np.int64)
    if is_ctypes:  # as page-locked memory is made into an array
        words = np.ctypeslib.as_array((ctypes.c_int64 * fault.NUM_WORDS)())
    record = FaultRecord(words)
    record.raise_if_set()
    assert not record.is_set
    words[:8] = [1, 1, 3, 5, 17, (12 << 32) | 1, -1, 12]
    with pytest.raises(CommunicationError) as caught:
        record.raise_if_set()
    error = caught.value
    assert str(error).startswith(
        "first timed out: rank 3 waits for rank 5 (the word of a token 17): "
        "expected epoch 12 (0x1), seen epoch 4294967295 (0xffffffff). "
    )
    assert "EPJIT_TIMEOUT_SECONDS" in str(error)
    assert (error.op, error.rank, error.peer, error.missing) == ("first", 3, 5, (5,))
    assert (error.index, error.expected, error.epoch) == (17, (12 << 32) | 1, 12)
    assert record.is_set
    record.clear()
    record.raise_if_set()
    record.close()
    assert not record.is_set


@pytest.mark.usefixtures("tree")
def test_what_a_rank_has_no_room_for_blames_no_peer() -> None:
    error = fault.decode([1, 13, 3, 3, 440, 2 << 32, 0, 2])
    assert str(error).startswith("third: rank 3 has no room in a slab for selection 440: ")
    assert "name an expert twice" in str(error)
    assert (error.op, error.rank, error.peer, error.missing) == ("third", 3, None, ())


@pytest.mark.usefixtures("tree")
def test_an_overflow_is_told_once_and_is_no_fault() -> None:
    words = np.zeros(fault.NUM_WORDS, np.int64)
    record = FaultRecord(words)
    assert record.take_overflow() is None
    for epoch in (4, 9):
        words[8:] = [1, 12, 3, 3, 0, 20, 34, epoch]
        assert not record.is_set
        record.raise_if_set()
        overflow = record.take_overflow()
        assert overflow == fault.Overflow("second", "the end", 3, came=34, room=20, epoch=epoch)
        assert words[8] == 0  # the device may write the next one
        assert record.take_overflow() is None
    words[8:] = 1
    record.clear()
    assert record.take_overflow() is None


@pytest.mark.usefixtures("tree")
def test_tags() -> None:
    assert fault.tags() == {
        1: ("first", "the word of a token"),
        12: ("second", "the end"),
        13: ("third", "no room in a slab for selection"),
    }
    assert str(fault.decode([1, 99, 0, 1, 0, 4, 3, 2])).startswith(
        "wait 99 timed out: rank 0 waits for rank 1 (an unknown wait 0): "
        "expected epoch 0 (0x4), seen epoch 0 (0x3)"
    )


def test_tags_of_the_real_kernels() -> None:
    tags = fault.tags()
    assert set(tags) == set(range(1, len(tags) + 1))
    assert {"dispatch", "combine"} <= {op for op, _ in tags.values()}
