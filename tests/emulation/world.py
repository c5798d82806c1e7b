"""A world for emulated kernels: ranks with memory, launches queued on each, checks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from epjit.config import MAX_RANKS
from epjit.runtime.params import field_types, params_type
from tests.emulation import build
from tests.emulation.build import Launch, emulate, guarded

FOREVER = 10**15  # a timeout in emulated nanoseconds that no test reaches


class WriteParams(ctypes.Structure):
    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("num_words", ctypes.c_int64),
    )


@dataclass(frozen=True)
class WriteConfig:
    source: ClassVar[str] = "write.cu"
    op: ClassVar[str] = "write"
    shared_bytes: ClassVar[int] = 0
    num_warps: int = 2

    @property
    def threads(self) -> int:
        return self.num_warps * 32


class PauseParams(ctypes.Structure):
    _fields_ = (("nanoseconds", ctypes.c_uint64), ("word", ctypes.c_uint64))


@dataclass(frozen=True)
class PauseConfig:
    source: ClassVar[str] = "pause.cu"
    op: ClassVar[str] = "pause"
    shared_bytes: ClassVar[int] = 0
    threads: ClassVar[int] = 32
    num_warps: int = 1


@dataclass(kw_only=True)
class Rank:
    """One rank's memory, what is queued on it, and what that must give."""

    local: Tensor  # counters, then epoch and abort
    fault: Tensor
    launches: list[Launch] = field(default_factory=list)
    checks: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)


class World:
    """All ranks of a test.

    Attributes:
        shape: Choices of the test.
        ranks: A `Rank` each, with the memory of its mode.
        epochs: Operations that were queued since the last reset.
    """

    counters: ClassVar[int]  # words of `local` before epoch and abort
    zeroed: ClassVar[tuple[str, ...]]  # memory that a reset clears, beside local and fault
    shape: Any
    ranks: list[Any]

    def __init__(self, *, seed: int, timeout_ns: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.timeout_ns = timeout_ns
        self.epochs = 0
        self.overflows: dict[int, list[int]] = {}  # of a rank: [tag, rows that fit, rows that came]
        self.keep: list[Any] = []

    def common(self, rank: int, config: Any) -> dict[str, Any]:
        """Parameters that a kernel gets if it has them."""
        mine = self.ranks[rank]
        return {
            "counters": mine.local,
            "epoch": mine.local[self.counters :],
            "abort": mine.local[self.counters + 1 :],
            "fault": mine.fault,
            "timeout_ns": self.timeout_ns,
            "rank": rank,
        }

    def queue(self, rank: int, config: Any, grid: int, **values: Any) -> None:
        """One launch; tensors become addresses, lists of tensors an address a rank of a domain."""
        struct = type(config).__name__.replace("Config", "Params")
        record = params_type(config.source, struct)
        names = field_types(record).keys()
        common = self.common(rank, config)
        values = {name: value for name, value in common.items() if name in names} | values
        assert set(values) == names, f"{struct}: {set(values) ^ names}"
        self.keep.append(values)
        params = record()
        for name, value in values.items():
            if isinstance(value, list):
                pointers = [each.data_ptr() for each in value]
                pointers += [0] * (MAX_RANKS - len(pointers))
                setattr(params, name, (ctypes.c_uint64 * MAX_RANKS)(*pointers))
            else:
                address = value.data_ptr() if isinstance(value, Tensor) else value
                setattr(params, name, 0 if address is None else address)
        self.ranks[rank].launches.append(Launch(config, params, grid=grid, rank=rank))

    def write(self, rank: int, to: Tensor, values: Tensor) -> None:
        """Writes there when what was queued on the rank so far has ended."""
        assert (to.nbytes, to.dtype) == (values.nbytes, values.dtype)
        assert to.nbytes % 8 == 0
        self.keep.append((to, values))
        params = WriteParams(to.data_ptr(), values.data_ptr(), to.nbytes // 8)
        launch = Launch(WriteConfig(), params, grid=1, rank=rank, include=build.HERE)
        self.ranks[rank].launches.append(launch)

    def pause(self, rank: int, nanoseconds: int) -> None:
        """Lets what is queued next start that much later than the end of what was queued so far."""
        params = PauseParams(nanoseconds, self.ranks[rank].fault.data_ptr())
        launch = Launch(PauseConfig(), params, grid=1, rank=rank, include=build.HERE)
        self.ranks[rank].launches.append(launch)

    def expect(self, rank: int, what: str, got: Tensor, expected: Tensor) -> None:
        """Notes the values that a tensor must have after the next run, bit for bit."""
        self.ranks[rank].checks.append((f"rank {rank}: {what}", got, expected))

    def run(self, seed: int, *, compare: bool = True, **options: Any) -> build.Report:
        """Runs what was queued and compares all results."""
        launches = [launch for rank in self.ranks for launch in rank.launches]
        compile_all({launch.config: launch for launch in launches})
        report = emulate(launches, seed=seed, **options)
        if compare:
            self.compare()
        return report

    def compare(self) -> None:
        """Compares all results of what has run."""
        for rank in self.ranks:
            counters, state = rank.local[: self.counters], rank.local[self.counters :][:2]
            assert not rank.fault[:8].any()
            assert not counters.any(), "counters are not zero at the end"
            assert state.tolist() == [_int32(self.epochs), 0]
            check(rank.checks)
            rank.launches.clear()
            rank.checks.clear()
        for number, rank in enumerate(self.ranks):
            record = rank.fault[8:]
            assert record[[1, 5, 6]].tolist() == self.overflows.get(number, [0, 0, 0])
            assert record[[0, 2]].tolist() == ([1, number] if number in self.overflows else [0, 0])
            record.zero_()  # as the host does when it has raised it
        self.overflows.clear()

    def start_at(self, epoch: int, *, stale: int) -> None:
        """As after `epoch` operations, when what is not told in each was last told in `stale`."""
        self.epochs = epoch
        for rank in self.ranks:
            for memory in (getattr(rank, name) for name in self.zeroed):
                if memory.dtype == torch.int64:
                    memory.fill_(stamp(stale, 0x7FFFFFFF))
            self.refresh(rank, epoch)
            rank.local[self.counters] = _int32(epoch)

    def refresh(self, rank: Any, epoch: int) -> None:
        """Writes the signals of a rank that the peers raise in every operation."""
        raise NotImplementedError

    def reset(self) -> None:
        """Does what a collective reset of the buffers does."""
        self.epochs = 0
        for rank in self.ranks:
            rank.launches.clear()
            rank.checks.clear()
            for name in (*self.zeroed, "local", "fault"):
                getattr(rank, name).zero_()


def run_beside(worlds: Sequence[World], seed: int, **options: Any) -> None:
    """Runs what was queued in several worlds of the same GPUs, each on a stream of its own.

    The emulation's rank of rank r of world i is i * num_ranks + r.
    """
    num_ranks = len(worlds[0].ranks)
    launches = [
        replace(launch, rank=i * num_ranks + launch.rank)
        for i, world in enumerate(worlds)
        for rank in world.ranks
        for launch in rank.launches
    ]
    compile_all({launch.config: launch for launch in launches})
    emulate(launches, seed=seed, num_gpus=num_ranks, **options)
    for world in worlds:
        world.compare()


def stamp(epoch: int, rest: int) -> int:
    """A signal or word with the epoch, modulo 2^32, in its upper half; an int64."""
    return _int32(epoch) << 32 | rest


def _int32(value: int) -> int:
    """The same 32 bits, as torch has them in an int32."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


LONG_RUNS = ((2**31 - 1000, 3), (2**31 + 1000, 3), (3 * 2**30, 3), (2**32 + 1000, 2000))
LONG_RUNS += ((2**32 + 2**31 - 1000, 2**31 + 5), (2**32 - 2, 2000))
"""Operations so far, and the last one that told what only some tell: see `World.start_at`."""


def check(checks: Sequence[tuple[str, Tensor, Tensor]]) -> None:
    """Raises AssertionError unless every tensor equals its expectation bit for bit."""
    for what, got, expected in checks:
        assert got.dtype == expected.dtype, what
        assert got.shape == expected.shape, what
        if not torch.equal(_bits(got), _bits(expected)):
            where = (_bits(got) != _bits(expected)).nonzero()[0].tolist()
            raise AssertionError(f"{what}{where}: {got} != {expected}")


def copy(tensor: Tensor) -> Tensor:
    """The same in memory whose bounds are watched."""
    return guarded(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def compile_all(launches: dict[Any, Launch]) -> None:
    """g++ is a process of its own: several at a time."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(build.prepare, launches.values()))


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.dtype.itemsize])
