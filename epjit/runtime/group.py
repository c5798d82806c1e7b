"""Groups of ranks: who takes part, and how they exchange small objects on the host.

Everything here runs on the CPU and is used while something is set up, never on the path of a call.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import pickle
import secrets
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from epjit import env
from epjit.errors import CommunicationError, require

if TYPE_CHECKING:
    import torch.distributed as dist

_DIGEST_BYTES = 32
_CHUNK_BYTES = 4 << 20  # the store refuses very large values
_PROBE_SECONDS = 5.0


class Group(ABC):
    """The ranks that work together, as one of them sees it. One thread uses it at a time.

    Attributes:
        rank: This rank.
        size: Number of ranks.
    """

    rank: int
    size: int

    @abstractmethod
    def allgather(self, obj: Any) -> list[Any]:
        """Gives every rank the objects of all ranks, in rank order. Collective.

        Raises:
            CommunicationError: Ranks did not come within ``EPJIT_TIMEOUT_SECONDS``; names them.
        """

    def barrier(self) -> None:
        """Returns when all ranks have called it. Collective.

        Raises:
            CommunicationError: Ranks did not come within ``EPJIT_TIMEOUT_SECONDS``; names them.
        """
        self.allgather(None)

    def reset(self) -> None:
        """Meets again after a collective call that not all ranks made. Collective.

        Raises:
            CommunicationError: Ranks did not come within ``EPJIT_TIMEOUT_SECONDS``; names them.
        """
        self.barrier()

    @staticmethod
    def from_comm(comm: Comm) -> Group:
        """Wraps a communicator with `Get_rank`, `Get_size` and `allgather`."""
        return _CommGroup(comm)

    @staticmethod
    def from_torch(process_group: dist.ProcessGroup) -> Group:
        """Makes a group of the ranks of a torch process group. Collective.

        Uses the process group once, to agree on the address of a store that rank 0 hosts; all else
        goes through that store, so the group still works after `destroy_process_group`.

        Args:
            process_group: Any backend; this process must be a member.

        Raises:
            TypeError: It is no process group.
            CommunicationError: The store cannot be reached, or a rank does not come.
        """
        if not hasattr(process_group, "rank"):
            raise TypeError(
                f"group is a {type(process_group).__name__}, expected a torch.distributed process "
                "group; for a communicator like mpi4py's pass comm=..."
            )
        return _StoreGroup(process_group)


class Comm(Protocol):
    """What `Group.from_comm` takes: mpi4py's communicators have it, and those of `ThreadGroup`."""

    def Get_rank(self) -> int:
        """This rank."""

    def Get_size(self) -> int:
        """Number of ranks."""

    def allgather(self, obj: Any) -> list[Any]:
        """Objects of all ranks."""


def host_id() -> str:
    """Names the machine, the same in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


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

    def allgather(self, obj: Any) -> list[Any]:
        return list(self._comm.allgather(obj))

    def reset(self) -> None:
        if isinstance(self._comm, ThreadComm):
            self._comm.reset()
        else:
            self.barrier()


class _StoreGroup(Group):
    """Ranks that meet in a `torch.distributed.TCPStore` of their own.

    The store takes values from anybody who reaches its port, so each message carries a digest under
    a key that only the ranks know; nothing else is unpickled.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        require("torch", package="torch", extra="torch")
        import torch.distributed as dist

        self.rank, self.size = process_group.rank(), process_group.size()
        self._round = self._resets = 0
        self._left: list[str] = []  # keys that this rank wrote in rounds that did not end
        self._store: dist.TCPStore | None = None
        if self.size == 1:
            return
        timeout = timedelta(seconds=env.timeout_seconds())
        invitation = None
        if self.rank == 0:
            self._store = dist.TCPStore(
                "localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout
            )
            invitation = (host_id(), _addresses(), self._store.port, secrets.token_bytes(32))
        invitations: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(invitations, invitation, group=process_group)
        except RuntimeError as error:
            raise CommunicationError(
                f"rank {self.rank}: not all ranks came to meet in the process group, whose own "
                f"timeout holds here ({error})",
                rank=self.rank,
            ) from error
        host, addresses, port, self._key = invitations[0]
        if self._store is None:
            candidates = ["localhost"] if host == host_id() else addresses
            self._store = dist.TCPStore(
                _reachable(candidates, port),
                port,
                is_master=False,
                wait_for_workers=False,
                timeout=timeout,
            )
        self.barrier()

    def allgather(self, obj: Any) -> list[Any]:
        if self._store is None:
            return [obj]
        self._round += 1
        names = [f"{self._round}/{rank}" for rank in range(self.size)]
        failed = f"{self._round}/failed"
        try:
            self._put(self._store, names[self.rank], pickle.dumps(obj))
            self._wait(self._store, names, names)
            if self._store.check([failed]):  # a rank that comes late must not take it for whole
                raise CommunicationError(
                    f"rank {self.rank} came when others had given up; call reset() on all ranks",
                    rank=self.rank,
                )
            received = [self._get(self._store, name) for name in names]
            self._finish(self._store, [key for _, keys in received for key in keys], names)
        except CommunicationError:
            with contextlib.suppress(RuntimeError):  # the store may be what was lost
                self._left.append(failed)
                self._store.set(failed, "")
            raise
        except RuntimeError as error:  # what torch raises when the connection breaks
            raise self._lost(error) from error
        self._left.clear()
        return [obj if rank == self.rank else item for rank, (item, _) in enumerate(received)]

    def reset(self) -> None:
        if self._store is None:
            return
        # Ranks that gave up are some rounds ahead of one that never came: all go on behind
        # the furthest.
        names = [f"reset {self._resets}/{rank}" for rank in range(self.size)]
        try:
            left, self._left = self._left, []
            self._put(self._store, names[self.rank], pickle.dumps(self._round))
            self._left += left
            self._wait(self._store, names, names)
            self._round = max(self._get(self._store, name)[0] for name in names)
            self._resets += 1
            left = list(self._left)
            self.barrier()  # nobody reads those keys any more
            for key in left:
                self._store.delete_key(key)
        except CommunicationError:
            raise
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> CommunicationError:
        return CommunicationError(
            f"rank {self.rank} lost the store that rank 0 hosts; did rank 0 end? ({error})",
            rank=self.rank,
            peer=0,
        )

    def _put(self, store: Any, name: str, data: bytes) -> None:
        """Writes a message: its parts, then its head, which says how many parts there are."""
        parts = [data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES)]
        for index, part in enumerate(parts):
            store.set(f"{name}/{index}", part)
        self._left += [name, *(f"{name}/{index}" for index in range(len(parts)))]
        store.set(name, self._digest(name, data) + len(parts).to_bytes(8, "little"))

    def _get(self, store: Any, name: str) -> tuple[Any, list[str]]:
        """Reads a message; returns it and its keys."""
        head: bytes = store.get(name)
        keys = [f"{name}/{i}" for i in range(int.from_bytes(head[_DIGEST_BYTES:], "little"))]
        data = b"".join(store.get(key) for key in keys)
        if not hmac.compare_digest(head[:_DIGEST_BYTES], self._digest(name, data)):
            raise CommunicationError(
                f"rank {self.rank} found a message {name!r} that is not from its group",
                rank=self.rank,
            )
        return pickle.loads(data), [name, *keys]

    def _digest(self, name: str, data: bytes) -> bytes:
        return hmac.digest(self._key, name.encode() + b"\0" + data, "sha256")

    def _wait(self, store: Any, keys: Sequence[str], by_rank: Sequence[str]) -> None:
        """Waits for keys; `by_rank` has the key that each rank writes, to say who did not come."""
        seconds = env.timeout_seconds()
        try:
            store.wait(list(keys), timedelta(seconds=seconds))
        except RuntimeError:
            missing = [rank for rank, key in enumerate(by_rank) if not store.check([key])]
            if not missing:
                raise
            raise _missing(self.rank, missing, seconds) from None

    def _finish(self, store: Any, keys: Sequence[str], names: Sequence[str]) -> None:
        """The last to read deletes everything; rank 0, which hosts the store, stays until then."""
        readers, done = f"{self._round}/readers", f"{self._round}/done"
        store.set(f"{names[self.rank]}/read", b"")
        if store.add(readers, 1) == self.size:
            for key in [*keys, readers]:
                store.delete_key(key)
            store.set(done, b"")
        if self.rank == 0:
            read = [f"{name}/read" for name in names]
            self._wait(store, [done], read)
            for key in [*read, done]:
                store.delete_key(key)


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

    def exchange(self, round_: int, rank: int, obj: Any) -> list[Any]:
        """One allgather; `round_` counts those of this rank."""
        seconds = env.timeout_seconds()
        with self._condition:
            objects = self._rounds.setdefault(round_, {})
            objects[rank] = obj
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._failed or len(objects) == self._size, seconds)
            if len(objects) < self._size:
                # Who comes later must not take a round for whole that others have given up.
                self._failed = self._failed or tuple(
                    r for r in range(self._size) if r not in objects
                )
                self._condition.notify_all()
            if self._failed:
                raise _missing(rank, self._failed, seconds)
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
                raise _missing(rank, missing, seconds)
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

    def allgather(self, obj: Any) -> list[Any]:
        """Objects of all ranks, in rank order.

        Raises:
            CommunicationError: Ranks did not come within ``EPJIT_TIMEOUT_SECONDS``; names them.
        """
        self._round += 1
        return self._group.exchange(self._round, self._rank, obj)

    def reset(self) -> None:
        """Makes the group usable again after a `CommunicationError`. Collective.

        Raises:
            CommunicationError: Ranks did not come within ``EPJIT_TIMEOUT_SECONDS``; names them.
        """
        self._round = self._group.reset(self._resets, self._rank, self._round)
        self._resets += 1


def _missing(rank: int, missing: Sequence[int], seconds: float) -> CommunicationError:
    plural = "s" if len(missing) > 1 else ""
    return CommunicationError(
        f"rank {rank} waited {seconds:g} s for rank{plural} {', '.join(map(str, missing))}, which "
        "did not come: all ranks must make the same collective calls in the same order "
        f"({env.timeout_seconds.name} sets the time)",
        op="allgather",
        rank=rank,
        missing=missing,
    )


def _addresses() -> list[str]:
    """Addresses by which other hosts may reach this one, the likeliest first."""
    found = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(
                ("192.0.2.1", 9)
            )  # sends nothing; picks the interface of the default route
            found.insert(0, probe.getsockname()[0])
        except OSError:
            pass
    return found


def _reachable(candidates: Sequence[str], port: int) -> str:
    for address in candidates:
        try:
            with socket.create_connection((address, port), timeout=_PROBE_SECONDS):
                return address
        except OSError:
            continue
    raise CommunicationError(
        f"the store of rank 0 cannot be reached at {', '.join(candidates)}, port {port}", peer=0
    )
