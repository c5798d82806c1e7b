"""The fault record: what kernels tell the host of a rank about waits and rows that failed."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any, NamedTuple

import numpy as np

from epjit import env
from epjit.errors import CommunicationError
from epjit.runtime import driver, sources
from epjit.runtime.host import PinnedArray, view_of
from epjit.runtime.symmetric import own_stream

_RECORD_WORDS = 8  # state, tag, rank, peer, index, expected, seen, epoch
NUM_WORDS = 2 * _RECORD_WORDS  # of a wait that failed, then of an overflow
OVERFLOW_AT = _RECORD_WORDS
_TAGS_SOURCE = "epjit/sync.cuh"


class Overflow(NamedTuple):
    """More came to a rank than it has room for; what did not fit was left out.

    Attributes:
        op: The operation, such as ``"dispatch"``.
        what: The things that came, and how, such as ``"rows come to"``.
        rank: The rank.
        came: How many.
        room: How many fit.
        epoch: Number of the call on that rank, or None.
    """

    op: str
    what: str
    rank: int
    came: int
    room: int
    epoch: int | None = None


class FaultRecord:
    """One rank's fault record, in host memory that kernels write.

    Args:
        words: int64 ``[16]`` to read; by default page-locked memory of its own.

    Attributes:
        device_ptr: Address for kernels; 0 when `words` was given.
        state: The words, for a look in every call: the first tells of a wait, `OVERFLOW_AT` of an
            overflow. None when it is closed.
    """

    def __init__(self, words: np.ndarray[Any, np.dtype[np.int64]] | None = None) -> None:
        self._memory = PinnedArray(NUM_WORDS) if words is None else None
        self._words = words if self._memory is None else self._memory.array
        self.state = None if self._words is None else view_of(self._words)
        self.device_ptr = 0 if self._memory is None else self._memory.device_ptr

    @property
    def is_set(self) -> bool:
        """Whether a wait has failed since the record was cleared."""
        return self.state is not None and self.state[0] != 0

    def raise_if_set(self) -> None:
        """Raises what a wait left behind.

        Raises:
            CommunicationError: Names the operation, the ranks and what was waited for.
        """
        if self.state is not None and self.state[0]:
            assert self._words is not None
            raise decode([int(word) for word in self._words[:_RECORD_WORDS]])

    def take_overflow(self) -> Overflow | None:
        """The first overflow since the last call; None when there was none."""
        state = self.state
        if state is None or not state[OVERFLOW_AT]:
            return None
        _, tag, rank, _, _, room, came, epoch = state[OVERFLOW_AT:].tolist()
        state[OVERFLOW_AT] = 0  # last: the device writes the next one when it sees this
        return Overflow(*_name(tag), rank=rank, came=came, room=room, epoch=epoch)

    def clear(self) -> None:
        """Forgets a fault. Nothing that may write the record must run."""
        if self._words is not None:
            self._words[:] = 0

    def close(self) -> None:
        """Frees the memory. Idempotent."""
        if self._memory is not None:
            self._words, self.state, self.device_ptr = None, None, 0
            self._memory.close()


def raise_abort(word: int, device: int) -> None:
    """Ends the waits of kernels: sets their abort word (sync.cuh) while they run.

    Args:
        word: Its address in device memory.
        device: Number of the GPU.
    """
    one = ctypes.c_uint32(1)
    with driver.using(device), own_stream() as stream:
        driver.call("cuMemcpyHtoDAsync", word, ctypes.addressof(one), ctypes.sizeof(one), stream)


def decode(words: list[int]) -> CommunicationError:
    """Puts a record into words.

    Args:
        words: The eight words of a record that is set.

    Returns:
        The error that says it.
    """
    _, tag, rank, peer, index, expected, seen, epoch = words
    op, text = _name(tag)
    if text.startswith("no room"):
        return CommunicationError(
            f"{op}: rank {rank} has {text} {index}: more rows of a rank than "
            "num_max_dispatch_tokens_per_rank came to one of its experts, so some were left out. "
            "No token may name an expert twice",
            op=op,
            rank=rank,
            index=index,
            epoch=epoch,
        )
    return CommunicationError(
        f"{op} timed out: rank {rank} waits for rank {peer} ({text} {index}): expected "
        f"{_stamp(expected)}, seen {_stamp(seen)}. Either rank {peer} failed or did not make the "
        f"same call, or it needs more time than {env.timeout_seconds.name} gives",
        op=op,
        rank=rank,
        peer=peer,
        index=index,
        expected=expected,
        seen=seen,
        epoch=epoch,
    )


def _name(tag: int) -> tuple[str, str]:
    return tags().get(tag, (f"wait {tag}", "an unknown wait"))


def tags() -> dict[int, tuple[str, str]]:
    """Waits by number: operation, and what is waited for; read from `enum WaitTag` of sync.cuh."""
    return _parse_tags(sources.read(_TAGS_SOURCE))


@functools.cache
def _parse_tags(text: str) -> dict[int, tuple[str, str]]:
    body = re.search(r"enum\s+(?:class\s+)?WaitTag\b[^{]*\{(.*?)\}", text, re.DOTALL)
    lines = re.findall(r"=\s*(\d+)\s*,?\s*//\s*([^:\n]+):\s*(.+)", body[1] if body else "")
    return {int(value): (op.strip(), what.strip()) for value, op, what in lines}


def _stamp(value: int) -> str:
    """Every signal and word holds the epoch in its upper half."""
    epoch, rest = value >> 32 & 0xFFFFFFFF, value & 0xFFFFFFFF
    return f"epoch {epoch}" + (f" ({rest:#x})" if rest else "")
