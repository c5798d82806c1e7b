"""Lines: a TCP connection between rank 0 and each other rank, open as long as both use the group.

It serves two ends. Rank 0 is reached by the first of its addresses at which somebody proves to know
the key of the group: where the ranks run in containers, ``localhost`` may be another one. And a
process that has ended is noticed at once, for the system closes its connections.

A rank sends its number and a proof of the key, rank 0 answers with a proof of its own, and the rank
sends one byte over the connection that it takes: it tries all addresses side by side.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import selectors
import socket
import struct
import time
from collections.abc import Sequence

from epjit.errors import CommunicationError
from epjit.runtime.machine import read

_RANK = struct.Struct("<I")
_PROOF_BYTES = 32
_GREETING_BYTES = _RANK.size + _PROOF_BYTES
_TAKEN = b"\1"
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_GLOBAL_SCOPE = "00"  # of /proc/net/if_inet6


def listen() -> socket.socket:
    """A socket for `accept`, at a free port of all interfaces."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def addresses() -> list[str]:
    """Addresses of this host's interfaces, that of the default route first."""
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; picks the interface of the route
            found.append(probe.getsockname()[0])
        except OSError:
            pass
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # the interface has no IPv4 address
                continue
            found.append(socket.inet_ntoa(answer[20:24]))
    for digits, _, _, scope, *_ in map(str.split, read("/proc/net/if_inet6").splitlines()):
        if scope == _GLOBAL_SCOPE:
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return [each for each in dict.fromkeys(found) if not each.startswith("127.") and each != "::1"]


def accept(
    listener: socket.socket, key: bytes, *, size: int, seconds: float
) -> dict[int, socket.socket]:
    """Rank 0's ends of the lines of ranks 1 to `size - 1`, by rank.

    Args:
        listener: From `listen`.
        key: A secret of the ranks.
        size: Number of ranks.
        seconds: How long to wait.

    Returns:
        The lines of the ranks that came in time.
    """
    lines: dict[int, socket.socket] = {}
    received: dict[socket.socket, bytearray] = {}
    deadline = time.monotonic() + seconds
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        try:
            while len(lines) < size - 1 and (left := deadline - time.monotonic()) > 0:
                for selected, _ in selector.select(left):
                    line = selected.fileobj
                    if line is listener:
                        with contextlib.suppress(OSError):  # it may be gone already
                            new, _ = listener.accept()
                            new.setblocking(False)
                            received[new] = bytearray()
                            selector.register(new, selectors.EVENT_READ)
                        continue
                    assert isinstance(line, socket.socket)
                    rank = _serve(line, received[line], key)
                    if rank is None:
                        continue
                    selector.unregister(line)
                    del received[line]
                    if 0 < rank < size:
                        lines[rank] = line
                    else:
                        line.close()
        finally:
            for each in received:
                each.close()
    return lines


def _serve(line: socket.socket, received: bytearray, key: bytes) -> int | None:
    """Takes what has come; returns the rank that takes the line, -1 for none, None for not yet."""
    try:
        data = line.recv(_GREETING_BYTES + len(_TAKEN) - len(received))
        received += data
        rank = bytes(received[: _RANK.size])
        if len(received) - len(data) < _GREETING_BYTES <= len(received):
            if not hmac.compare_digest(
                bytes(received[_RANK.size : _GREETING_BYTES]), _proof(key, b"rank", rank)
            ):
                return -1
            line.sendall(_proof(key, b"rank 0", rank))
    except OSError:
        return -1
    if len(received) > _GREETING_BYTES:
        return int(_RANK.unpack(rank)[0])
    return None if data else -1


def connect(
    candidates: Sequence[str], port: int, key: bytes, *, rank: int, seconds: float
) -> socket.socket:
    """This rank's end of its line to rank 0.

    Args:
        candidates: Addresses at which rank 0 may be.
        port: Of its `listen`.
        key: A secret of the ranks.
        rank: This rank, not 0.
        seconds: How long to wait.

    Raises:
        CommunicationError: Nobody there knows the key.
    """
    greeting = _RANK.pack(rank) + _proof(key, b"rank", _RANK.pack(rank))
    answers: dict[socket.socket, bytearray] = {}
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        try:
            for candidate in candidates:
                for started in _start(candidate, port):
                    answers[started] = bytearray()
                    selector.register(started, selectors.EVENT_WRITE)
            while answers and (left := deadline - time.monotonic()) > 0:
                for selected, events in selector.select(left):
                    line = selected.fileobj
                    assert isinstance(line, socket.socket)
                    try:
                        if events & selectors.EVENT_WRITE:
                            line.sendall(greeting)
                            selector.modify(line, selectors.EVENT_READ)
                            continue
                        data = line.recv(_PROOF_BYTES - len(answers[line]))
                    except OSError:
                        data = b""
                    answer = answers[line]
                    answer += data
                    is_whole = len(answer) == _PROOF_BYTES
                    if is_whole and hmac.compare_digest(
                        bytes(answer), _proof(key, b"rank 0", greeting[: _RANK.size])
                    ):
                        line.setblocking(True)
                        line.sendall(_TAKEN)
                        del answers[line]
                        return line
                    if is_whole or not data:
                        selector.unregister(line)
                        line.close()
                        del answers[line]
        finally:
            for each in answers:
                each.close()
    raise CommunicationError(
        f"Buffer: rank {rank} does not find rank 0 at {', '.join(candidates)}, port {port}; can "
        "their hosts or containers reach each other at TCP ports of any number?",
        op="Buffer",
        rank=rank,
        peer=0,
    )


def _start(candidate: str, port: int) -> list[socket.socket]:
    """Connections on their way to every address of a name."""
    try:
        found = socket.getaddrinfo(candidate, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    lines = []
    for family, kind, protocol, _, address in found:
        try:
            line = socket.socket(family, kind, protocol)
        except OSError:  # a family that this kernel lacks
            continue
        line.setblocking(False)
        line.connect_ex(address)  # what goes wrong, sending will tell
        lines.append(line)
    return lines


def is_closed(line: socket.socket) -> bool:
    """Whether the other end is gone."""
    try:
        return line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _proof(key: bytes, role: bytes, rank: bytes) -> bytes:
    return hmac.digest(key, role + b"\0" + rank, "sha256")
