"""Groups of ranks: who takes part, and how they exchange small objects on the host.

Everything here runs on the CPU and is used while something is set up, never on the path of a call.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import os
import pickle
import secrets
import socket
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from epjit import env
from epjit.errors import CommunicationError, require
from epjit.runtime import line
from epjit.runtime.interrupt import interruptible
from epjit.runtime.machine import read

if TYPE_CHECKING:
    import torch.distributed as dist

BUFFER = "Buffer"
"""Name, in messages, of the operation of ranks that make a Buffer."""

_DIGEST_BYTES = 32
_CHUNK_BYTES = 4 << 20  # the store refuses very large values
_LEAST_NAP_SECONDS = 50e-6
_LOOK_SECONDS = 0.1  # between two looks at who is gone


class Group(ABC):
    """The ranks that work together, as one of them sees it. One thread uses it at a time.

    Attributes:
        rank: This rank.
        size: Number of ranks.
    """

    rank: int
    size: int

    @abstractmethod
    def allgather(self, obj: Any, *, op: str = BUFFER) -> list[Any]:
        """Gives every rank the objects of all ranks, in rank order. Collective.

        Ctrl-C ends the wait; `reset` makes the group usable again.

        Args:
            obj: Of this rank.
            op: Operation that this is a part of, for messages.

        Raises:
            CommunicationError: Ranks have ended, or did not come within ``EPJIT_TIMEOUT_SECONDS``;
                names them and the operation.
        """

    def barrier(self, *, op: str = BUFFER) -> None:
        """Returns when all ranks have called it. Collective.

        Args:
            op: Operation that this is a part of, for messages.

        Raises:
            CommunicationError: As `allgather`.
        """
        self.allgather(None, op=op)

    def agree(self, values: Mapping[str, object], *, remedy: str, op: str = BUFFER) -> None:
        """Returns when all ranks have called it with the same values. Collective.

        Args:
            values: The choices of this rank, by their names in the plural.
            remedy: Advice for ranks that have chosen differently.
            op: Operation that this is a part of, for messages.

        Raises:
            RuntimeError: They have; says what each has.
            CommunicationError: Ranks did not come within ``EPJIT_TIMEOUT_SECONDS``; names them.
        """
        everyone = self.allgather(dict(values), op=op)
        for what, value in values.items():
            chosen = [each.get(what) for each in everyone]
            if any(each != value for each in chosen):
                lines = "\n  ".join(f"rank {rank}: {each}" for rank, each in enumerate(chosen))
                raise RuntimeError(f"the ranks chose different {what}:\n  {lines}\n{remedy}")

    def reset(self) -> None:
        """Meets again after a collective call that not all ranks made. Collective.

        Raises:
            CommunicationError: As `allgather`.
        """
        self.barrier(op="reset")

    @staticmethod
    def from_comm(comm: Comm) -> Group:
        """Wraps a communicator with `Get_rank`, `Get_size` and `allgather`."""
        return _CommGroup(comm)

    @staticmethod
    def from_torch(process_group: dist.ProcessGroup) -> Group:
        """Makes a group of the ranks of a torch process group. Collective.

        Uses the process group once, to agree on a store that rank 0 hosts, the same for all groups
        that are made of it; all else goes through that store, so the group still works after
        `destroy_process_group`.

        Args:
            process_group: Any backend whose ranks are there; this process must be a member.

        Raises:
            ValueError: Its backend is ``"fake"``: there is nobody to meet.
            CommunicationError: The store cannot be reached, or a rank does not come.
        """
        return _StoreGroup(process_group)


def as_process_group(group: object) -> dist.ProcessGroup:
    """The torch process group that users mean by `group`.

    Args:
        group: A process group, or a DeviceMesh of one dimension.

    Raises:
        TypeError: It is neither; says what it is and what to pass.
        ValueError: torch.distributed is not initialised, this rank is no member, or the mesh has
            several dimensions.
    """
    require("torch", package="torch")
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, dist.ProcessGroup):
        return group
    if group is None:
        raise ValueError(
            "group is None, expected a process group (or comm=..., an mpi4py-like communicator)"
            if dist.is_initialized()
            else "group is None, and torch.distributed is not initialised (dist.group.WORLD is "
            "None before): call torch.distributed.init_process_group first, or pass an mpi4py-like "
            "communicator as comm=..."
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group is GroupMember.NON_GROUP_MEMBER: this rank is not among the ranks that were "
            "passed to torch.distributed.new_group; only those may take part"
        )
    if not isinstance(group, DeviceMesh):
        raise TypeError(
            f"group is {group!r} of type {type(group).__name__}, expected a torch.distributed "
            "process group, such as torch.distributed.group.WORLD or what new_group returned, or "
            "a DeviceMesh of one dimension (for a communicator like mpi4py's: Buffer(None, "
            "comm=...))"
        )
    if group.ndim != 1:
        names = group.mesh_dim_names
        one = f"mesh[{names[-1]!r}]" if names else f"mesh.get_group({group.ndim - 1})"
        raise ValueError(
            f"group is a DeviceMesh of {group.ndim} dimensions; pass the one whose ranks share "
            f"the experts, such as {one}"
        )
    if group.get_coordinate() is None:
        raise ValueError(f"group is {group!r}, and this rank is not in it")
    return group.get_group()


class Comm(Protocol):
    """A communicator for `Group.from_comm`: mpi4py's are such, and those of `ThreadGroup`."""

    def Get_rank(self) -> int:
        """This rank."""

    def Get_size(self) -> int:
        """Number of ranks."""

    def allgather(self, obj: Any) -> list[Any]:
        """Objects of all ranks."""


def host_id() -> str:
    """Names the machine, the same in all its containers."""
    return read("/proc/sys/kernel/random/boot_id").strip() or socket.gethostname()


_process_ids: dict[int, str] = {}
_process_ids_lock = threading.Lock()


def process_id() -> str:
    """Names this process: containers of one host may have equal process numbers.

    Locked: ranks that are threads ask at once and must get the same name, or each would take the
    other for another process.
    """
    pid = os.getpid()
    with _process_ids_lock:
        if pid not in _process_ids:
            _process_ids[pid] = f"{host_id()}/{pid}/{secrets.token_hex(8)}"
        return _process_ids[pid]


class _CommGroup(Group):
    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.rank, self.size = int(comm.Get_rank()), int(comm.Get_size())

    def allgather(self, obj: Any, *, op: str = BUFFER) -> list[Any]:
        if isinstance(self._comm, ThreadComm):
            return self._comm.allgather(obj, op=op)
        return list(self._comm.allgather(obj))

    def reset(self) -> None:
        if isinstance(self._comm, ThreadComm):
            self._comm.reset()
        else:
            super().reset()


class _StoreGroup(Group):
    """Ranks that meet in a `torch.distributed.TCPStore`, which all groups of these ranks share.

    Each group has names of its own there. The store takes values from anybody who reaches its port,
    so each message carries a digest under a secret of these ranks and this group; nothing else is
    unpickled, nor what another group was told. Waits poll the store: to wait inside it would hold
    up an interrupt. A rank that gives up a group leaves that in the store; rank 0 sees by its lines
    whose process has ended, and leaves that there, too.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        require("torch", package="torch", extra="torch")
        import torch.distributed as dist

        self.rank, self.size = process_group.rank(), process_group.size()
        self._round = 0
        self._left: list[str] = []  # keys that this rank wrote in rounds that did not end
        self._gone: tuple[int, ...] = ()
        self._store: dist.PrefixStore | None = None
        self._lost = dist.DistError  # what the store raises when the connection breaks
        if dist.get_backend(process_group) == "fake":
            raise ValueError(
                'the process group has the backend "fake", whose ranks are not there; shapes alone '
                "can be had: call epjit.moe's functions under FakeTensorMode or on meta tensors"
            )
        if self.size == 1:
            return
        self._place, number = _place_of(process_group)
        self._store = dist.PrefixStore(str(number), self._place.store)
        self._key = hmac.digest(self._place.key, str(number).encode(), "sha256")
        if self.rank == 0:
            self._store.set(_RESETS, "0")

    def __del__(self) -> None:
        """Tells ranks that may wait for this one; of a process that has ended, its lines tell."""
        store: Any = vars(self).get("_store")
        if store is None or sys.is_finalizing() or not self._place.is_ours():
            return
        if self.rank and line.is_closed(self._place.lines[0]):  # torch would tell of it at length
            return
        name = f"{_LEFT}/{self.rank}"
        with contextlib.suppress(self._lost):
            store.set(name, self._digest(name, b""))
            store.set(_LEFT, b"")

    def allgather(self, obj: Any, *, op: str = BUFFER) -> list[Any]:
        if self._store is None:
            return [obj]
        data = pickle.dumps(obj)
        self._round += 1
        names = [f"{self._round}/{rank}" for rank in range(self.size)]
        failed = f"{self._round}/failed"
        try:
            self._put(self._store, names[self.rank], data)
            self._wait(self._store, names, names, op)
            if self._store.check([failed]):  # a rank that comes late must not take it for whole
                raise CommunicationError(
                    f"{op}: rank {self.rank} came when others had given up; call reset() on all "
                    "ranks",
                    op=op,
                    rank=self.rank,
                )
            received = [self._get(self._store, name, op) for name in names]
            self._finish(self._store, [key for _, keys in received for key in keys], names, op)
        except self._lost as error:
            raise self._without_store(op, error) from error
        except BaseException:  # also an interrupt
            with contextlib.suppress(self._lost):  # the store may be what was lost
                self._left.append(failed)
                self._store.set(failed, "")
            raise
        self._left.clear()
        return [obj if rank == self.rank else item for rank, (item, _) in enumerate(received)]

    def reset(self) -> None:
        if self._store is None:
            return
        try:
            # In the store, not counted here: a rank that was interrupted in a reset may be behind.
            index = int(self._store.get(_RESETS))
            # Ranks that gave up are some rounds ahead of one that never came: all go on behind
            # the furthest.
            names = [f"reset {index}/{rank}" for rank in range(self.size)]
            left, self._left = self._left, []
            self._put(self._store, names[self.rank], pickle.dumps(self._round))
            self._left += left
            self._wait(self._store, names, names, "reset")
            self._round = max(self._get(self._store, name, "reset")[0] for name in names)
            self._store.compare_set(_RESETS, str(index), str(index + 1))
            left = list(self._left)
            self.barrier(op="reset")  # nobody reads those keys any more
            for key in left:
                self._store.delete_key(key)
        except self._lost as error:
            raise self._without_store("reset", error) from error

    def _without_store(self, op: str, error: Exception) -> CommunicationError:
        self._place.is_lost = True
        return CommunicationError(
            f"{op}: rank {self.rank} lost the store that rank 0 hosts: rank 0 has ended ({error})",
            op=op,
            rank=self.rank,
            peer=0,
        )

    def _put(self, store: Any, name: str, data: bytes) -> None:
        """Writes a message: its parts, then its head, which says how many parts there are."""
        parts = [data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES)]
        self._left += [name, *(f"{name}/{index}" for index in range(len(parts)))]
        for index, part in enumerate(parts):
            store.set(f"{name}/{index}", part)
        store.set(name, self._digest(name, data) + len(parts).to_bytes(8, "little"))

    def _get(self, store: Any, name: str, op: str) -> tuple[Any, list[str]]:
        """Reads a message; returns it and its keys."""
        head: bytes = store.get(name)
        keys = [f"{name}/{i}" for i in range(int.from_bytes(head[_DIGEST_BYTES:], "little"))]
        data = b"".join(store.get(key) for key in keys)
        if not hmac.compare_digest(head[:_DIGEST_BYTES], self._digest(name, data)):
            raise CommunicationError(
                f"{op}: rank {self.rank} found a message {name!r} that is not from its group",
                op=op,
                rank=self.rank,
            )
        return pickle.loads(data), [name, *keys]

    def _digest(self, name: str, data: bytes) -> bytes:
        return hmac.digest(self._key, name.encode() + b"\0" + data, "sha256")

    def _wait(self, store: Any, keys: Sequence[str], by_rank: Sequence[str], op: str) -> None:
        """Waits for keys; `by_rank` has the key that each rank writes, to say who did not come."""
        seconds = env.timeout_seconds()
        start = looked = time.monotonic()
        while not store.check(list(keys)):
            now = time.monotonic()
            if now > looked + _LOOK_SECONDS:
                looked = now
                gone = sorted(self._look_for_gone(store))
                missing = [rank for rank in gone if not store.check([by_rank[rank]])]
                if missing:
                    raise _ended(op, self.rank, missing)
            if now > start + seconds:
                missing = [rank for rank, key in enumerate(by_rank) if not store.check([key])]
                raise _missing(op, self.rank, missing, seconds)
            # The longer it takes, the less a late look matters; many ranks keep the store busy.
            time.sleep(min(max(_LEAST_NAP_SECONDS, (now - start) / 10), max(10, self.size) / 1e3))

    def _look_for_gone(self, store: Any) -> set[int]:
        """Ranks that have given up this group, or whose process has ended, as rank 0 knows."""
        left: set[int] = set()
        if store.check([_LEFT]):
            for rank in range(self.size):
                name = f"{_LEFT}/{rank}"
                if store.check([name]) and store.get(name) == self._digest(name, b""):
                    left.add(rank)
        if self.rank == 0:
            lines = self._place.lines
            gone = tuple(rank for rank, each in lines.items() if line.is_closed(each))
            if gone != self._gone:
                data = pickle.dumps(gone)
                store.set(_GONE, self._digest(_GONE, data) + data)
                self._gone = gone
        elif store.check([_GONE]):
            value: bytes = store.get(_GONE)
            data = value[_DIGEST_BYTES:]
            if hmac.compare_digest(value[:_DIGEST_BYTES], self._digest(_GONE, data)):
                self._gone = pickle.loads(data)
        return left.union(self._gone)

    def _finish(self, store: Any, keys: Sequence[str], names: Sequence[str], op: str) -> None:
        """The last to read deletes everything; rank 0, which hosts the store, stays until then."""
        readers, done = f"{self._round}/readers", f"{self._round}/done"
        store.set(f"{names[self.rank]}/read", b"")
        if store.add(readers, 1) == self.size:
            for key in [*keys, readers]:
                store.delete_key(key)
            store.set(done, b"")
        if self.rank == 0:
            read = [f"{name}/read" for name in names]
            self._wait(store, [done], read, op)
            for key in [*read, done]:
                store.delete_key(key)


_RESETS, _GONE, _LEFT = "resets", "gone", "left"  # keys of the store


class _Invitation(NamedTuple):
    """All that a rank needs to come to where rank 0 is."""

    host: str
    addresses: list[str]
    ports: tuple[int, int]  # of the store and of the lines
    key: bytes


class _Place:
    """A store and lines, by which the ranks of a process group meet for all of their Buffers.

    Args:
        key: A secret of the ranks.
        store: Hosted by rank 0.
        lines: To the other ranks, or to rank 0.

    Attributes:
        key: As passed.
        store: As passed.
        lines: As passed.
        is_lost: Whether the store cannot be reached any more.
    """

    def __init__(
        self, key: bytes, store: dist.TCPStore, lines: Mapping[int, socket.socket]
    ) -> None:
        self.key, self.store, self.lines = key, store, lines
        self.is_lost = False
        self._pid = os.getpid()
        self._numbers = itertools.count(1)

    def is_ours(self) -> bool:
        """Whether this process made it; a forked child shares its connections."""
        return os.getpid() == self._pid

    def is_whole(self) -> bool:
        """Whether everybody is there, as far as this rank can tell."""
        return self.is_ours() and not (
            self.is_lost or any(map(line.is_closed, self.lines.values()))
        )

    def next_number(self) -> int:
        """Number of the next group; rank 0 tells the others."""
        return next(self._numbers)


_places: weakref.WeakKeyDictionary[dist.ProcessGroup, _Place] = weakref.WeakKeyDictionary()


def _place_of(process_group: dist.ProcessGroup) -> tuple[_Place, int]:
    """The place of a process group, and the number there of the group that is being made.

    All say which place they know, and rank 0, if it knows none, where a new one is. So ranks cannot
    come to think differently of it, whatever has gone wrong before: when one of them has lost what
    others still know, all begin anew.

    Raises:
        CommunicationError: The store cannot be reached, or a rank does not come.
    """
    import torch.distributed as dist

    rank, size, seconds = process_group.rank(), process_group.size(), env.timeout_seconds()
    timeout = timedelta(seconds=seconds)
    while True:
        known = _places.get(process_group)
        if known is not None and not known.is_whole():
            known = None
        key, number = (b"", 0) if known is None else (known.key, known.next_number())
        if rank == 0 and known is None:
            store = dist.TCPStore(
                "localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout
            )
            key = secrets.token_bytes(32)
            with line.listen() as listener:
                ports = store.port, listener.getsockname()[1]
                _gather(
                    process_group, (key, 0, _Invitation(host_id(), line.addresses(), ports, key))
                )
                lines = line.accept(listener, key, size=size, seconds=seconds)
            missing = [other for other in range(1, size) if other not in lines]
            if missing:
                raise _missing(BUFFER, 0, missing, seconds)
            _places[process_group] = place = _Place(key, store, lines)
            return place, 0
        words = _gather(process_group, (key, number, None))
        expected, number, invitation = words[0]
        if invitation is not None:
            _places[process_group] = place = _join(invitation, rank=rank, timeout=timeout)
            return place, 0
        if known is not None and all(word[0] == expected for word in words):
            return known, number
        _places.pop(process_group, None)


def _join(invitation: _Invitation, *, rank: int, timeout: timedelta) -> _Place:
    """The place that rank 0 has made, as another rank sees it."""
    import torch.distributed as dist

    host, addresses, ports, key = invitation
    if host == host_id():  # in a container of its own, localhost is another one
        addresses = ["localhost", *addresses]
    own = line.connect(addresses, ports[1], key, rank=rank, seconds=timeout.total_seconds())
    store = interruptible(
        lambda: dist.TCPStore(
            own.getpeername()[0], ports[0], is_master=False, wait_for_workers=False, timeout=timeout
        )
    )
    return _Place(key, store, {0: own})


def _gather(process_group: dist.ProcessGroup, word: Any) -> list[Any]:
    """Gives every rank the words of all, through the process group itself."""
    import torch
    import torch.distributed as dist

    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    words: list[Any] = [None] * process_group.size()

    def gather() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own
        dist.all_gather_object(words, word, group=process_group)

    try:
        interruptible(gather)  # also out of reach of a FakeTensorMode or transform of the caller
    except RuntimeError as error:
        # Gloo has no exception of its own, but names its source.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise CommunicationError(
            f"{BUFFER}: rank {process_group.rank()}: not all ranks came to meet in the process "
            f"group, whose own timeout holds here ({error})",
            op=BUFFER,
            rank=process_group.rank(),
        ) from error
    return words


class ThreadGroup:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._condition = threading.Condition()
        self._rounds: dict[int, dict[int, Any]] = {}
        self._unread: dict[int, int] = {}
        self._failed: tuple[int, ...] = ()
        self._resets: dict[int, dict[int, int]] = {}

    @classmethod
    def create(cls, num_ranks: int) -> list[ThreadComm]:
        """The communicators of `num_ranks` ranks, in rank order; each belongs to one thread."""
        group = cls(num_ranks)
        return [ThreadComm(group, rank) for rank in range(num_ranks)]

    def exchange(self, round_: int, rank: int, obj: Any, *, op: str) -> list[Any]:
        """One allgather; `round_` counts those of this rank."""
        seconds = env.timeout_seconds()
        with self._condition:
            objects = self._rounds.setdefault(round_, {})
            objects[rank] = obj
            self._condition.notify_all()
            try:
                self._condition.wait_for(
                    lambda: self._failed or len(objects) == self._size, seconds
                )
            except BaseException:  # an interrupt: who comes later waits for this rank in vain
                self._failed = self._failed or (rank,)
                self._condition.notify_all()
                raise
            if len(objects) < self._size:
                # Who comes later must not take a round for whole that others have given up.
                self._failed = self._failed or tuple(
                    r for r in range(self._size) if r not in objects
                )
                self._condition.notify_all()
            if self._failed:
                raise _missing(op, rank, self._failed, seconds)
            self._unread[round_] = self._unread.get(round_, self._size) - 1
            if self._unread[round_] == 0:
                del self._unread[round_], self._rounds[round_]
            return [objects[r] for r in range(self._size)]

    def reset(self, index: int, rank: int, round_: int) -> int:
        """Forgets a failure once all ranks are here; `index` counts those of this rank.

        Returns:
            The last round that any rank began.
        """
        seconds = env.timeout_seconds()
        with self._condition:
            arrived = self._resets.setdefault(index, {})
            arrived[rank] = round_
            if len(arrived) == self._size:
                self._failed = ()
                self._rounds.clear()
                self._unread.clear()
                self._condition.notify_all()
            self._condition.wait_for(lambda: len(arrived) == self._size, seconds)
            if len(arrived) < self._size:
                missing = [r for r in range(self._size) if r not in arrived]
                raise _missing("reset", rank, missing, seconds)
            return max(arrived.values())


class ThreadComm:
    """One rank of a `ThreadGroup`; has what mpi4py's communicators have.

    Objects are handed over as they are, not copied.
    """

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group, self._rank, self._round, self._resets = group, rank, 0, 0

    def Get_rank(self) -> int:
        """This rank."""
        return self._rank

    def Get_size(self) -> int:
        """Number of ranks."""
        return self._group._size

    def allgather(self, obj: Any, *, op: str = BUFFER) -> list[Any]:
        """Objects of all ranks, in rank order.

        Args:
            obj: Of this rank.
            op: Operation that this is a part of, for messages.

        Raises:
            CommunicationError: Ranks did not come within ``EPJIT_TIMEOUT_SECONDS``; names them.
        """
        self._round += 1
        return self._group.exchange(self._round, self._rank, obj, op=op)

    def reset(self) -> None:
        """Makes the group usable again after a `CommunicationError`. Collective.

        Raises:
            CommunicationError: Ranks did not come within ``EPJIT_TIMEOUT_SECONDS``; names them.
        """
        self._round = self._group.reset(self._resets, self._rank, self._round)
        self._resets += 1


def _missing(op: str, rank: int, missing: Sequence[int], seconds: float) -> CommunicationError:
    return CommunicationError(
        f"{op}: rank {rank} waited {seconds:g} s for {_ranks(missing)}, which did not come: all "
        "ranks must make the same collective calls in the same order "
        f"({env.timeout_seconds.name} sets the time)",
        op=op,
        rank=rank,
        missing=missing,
    )


def _ended(op: str, rank: int, ended: Sequence[int]) -> CommunicationError:
    return CommunicationError(
        f"{op}: rank {rank} waits for {_ranks(ended)}, which will not come: the process has ended, "
        "or has given up its Buffer; look at what it said last",
        op=op,
        rank=rank,
        missing=ended,
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
