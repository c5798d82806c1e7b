"""Links between the GPUs of this process: bandwidth of a copy, latency of a load, for each pair.

One process, one thread a GPU: this is what `doctor` runs, before any group exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from epjit.runtime import device as gpu
from epjit.runtime import driver
from epjit.runtime.group import Group, ThreadComm, ThreadGroup
from epjit.runtime.kernel import Kernel, KernelConfig
from epjit.runtime.launch import Launch
from epjit.runtime.symmetric import SymmetricMemory, own_stream

_COPY_BYTES = 256 << 20
_COPIES = 4
_CHAIN_WORDS = 64
_WORD_STRIDE = 256  # bytes: each word in a sector of its own


class PeerLink(NamedTuple):
    """The link from one GPU to another one's memory.

    Attributes:
        reader: GPU that loads.
        owner: GPU whose memory it is.
        accessible: Whether loads and stores go there at all.
        gigabytes_per_second: Of one large copy from the owner; 0 without access.
        latency_us: Of one load, the one before it done; 0 without access.
    """

    reader: int
    owner: int
    accessible: bool
    gigabytes_per_second: float = 0.0
    latency_us: float = 0.0


@dataclass(frozen=True)
class ChaseConfig(KernelConfig, source="bench/chase.cu", tag="bench"):
    """Compile-time values of `bench/chase.cu`."""

    threads: ClassVar[int] = 32

    num_steps: int = 2048


def measure() -> Iterator[PeerLink]:
    """Measures every pair of GPUs, one after the other.

    Raises:
        RuntimeError: Memory that should be accessible cannot be mapped.
    """
    count = gpu.count()
    for reader in range(count):
        for owner in range(count):
            if reader == owner:
                continue
            if not gpu.can_access_peer(reader, owner):
                yield PeerLink(reader, owner, accessible=False)
            else:
                yield _measure_pair(reader, owner)


def _measure_pair(reader: int, owner: int) -> PeerLink:
    with _shared_pair(reader, owner) as (own, remote):
        return PeerLink(
            reader,
            owner,
            accessible=True,
            gigabytes_per_second=_bandwidth(reader, own, remote),
            latency_us=_latency(reader, own, remote),
        )


@contextmanager
def _shared_pair(reader: int, owner: int) -> Iterator[tuple[int, int]]:
    """Memory of two GPUs, mapped for each other; gives the addresses as the reader sees them."""
    with ExitStack() as memories:

        def allocate(comm: ThreadComm, device: int) -> SymmetricMemory:
            memory = SymmetricMemory(_COPY_BYTES, group=Group.from_comm(comm), device=device)
            memories.callback(memory.close)
            return memory

        with ThreadPoolExecutor(2) as ranks:
            own, _ = ranks.map(allocate, ThreadGroup.create(2), (reader, owner))
        yield own.ptr, own.peer_ptrs[1]


def _bandwidth(reader: int, own: int, remote: int) -> float:
    """GB/s of copies by the copy engine."""
    with driver.using(reader), own_stream() as stream:
        driver.call("cuMemcpyDtoDAsync", own, remote, _COPY_BYTES, stream)  # the first maps
        ms = _elapsed_ms(
            stream,
            lambda: [
                driver.call("cuMemcpyDtoDAsync", own, remote, _COPY_BYTES, stream)
                for _ in range(_COPIES)
            ],
        )
    return round(_COPIES * _COPY_BYTES / ms / 1e6, 1)


def _latency(reader: int, own: int, remote: int) -> float:
    """Microseconds of one load from the owner's memory."""
    import numpy as np

    config = ChaseConfig()
    words = np.zeros(_CHAIN_WORDS * _WORD_STRIDE // 8, np.uint64)
    step = _WORD_STRIDE // 8
    for index in range(_CHAIN_WORDS):
        words[index * step] = remote + (index + 1) % _CHAIN_WORDS * _WORD_STRIDE
    with driver.using(reader):
        driver.call("cuMemcpyHtoD", own, words.ctypes.data, words.nbytes)
        driver.call("cuMemcpyDtoD", remote, own, words.nbytes)
    launch = Launch(Kernel(config, device=reader), chain=remote, out=own)
    with driver.using(reader), own_stream() as stream:
        launch(int(stream), 1)
        ms = _elapsed_ms(stream, lambda: launch(int(stream), 1))
    return round(ms * 1e3 / config.num_steps, 2)


def _elapsed_ms(stream: object, work: Callable[[], object]) -> float:
    events = [driver.call("cuEventCreate", 0) for _ in range(2)]
    driver.call("cuEventRecord", events[0], stream)
    work()
    driver.call("cuEventRecord", events[1], stream)
    driver.call("cuStreamSynchronize", stream)
    ms = float(driver.call("cuEventElapsedTime", *events))
    for event in events:
        driver.call("cuEventDestroy", event)
    return ms
