"""Waits of the host: who is named, a peer that has ended, Ctrl-C, and what a group may be."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epjit import Buffer
from epjit.errors import CommunicationError
from epjit.runtime import line, nvshmem
from epjit.runtime.group import Group, ThreadGroup, as_process_group
from epjit.runtime.interrupt import interruptible, synchronize
from tests.harness import launch

_SOON = 15.0  # seconds; the waits themselves would last 60
_FAR = "60"


def caught(call: Callable[[], Any]) -> CommunicationError:
    """The error of a call, which came long before the timeout."""
    start = time.monotonic()
    with pytest.raises(CommunicationError) as error:
        call()
    assert time.monotonic() - start < _SOON
    return error.value


# ---- a peer that has ended -----------------------------------------------------------------------


def left_alone(process_group: Any, victim: int, op: str) -> None:
    os.environ["EPJIT_TIMEOUT_SECONDS"] = _FAR
    group = Group.from_torch(process_group)
    group.barrier()
    if group.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    error = caught(group.reset if op == "reset" else lambda: group.allgather(0, op=op))
    assert (error.op, error.rank, error.peer) == (op, group.rank, victim)
    assert str(error).startswith(f"{op}: rank {group.rank} "), str(error)
    assert f"rank {victim}" in str(error), str(error)
    assert "has ended" in str(error), str(error)
    if victim and group.rank == 0:  # the store is here: the other one has yet to look
        time.sleep(2.0)


@pytest.mark.parametrize(("victim", "op"), [(2, "combine"), (0, "dispatch"), (1, "reset")])
def test_a_peer_that_has_ended_is_noticed(
    victim: int, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_GRACE_SECONDS", _SOON)
    with pytest.raises(launch.RankFailedError) as failed:
        launch.run(left_alone, 3, victim, op)
    assert list(failed.value.errors) == [victim], str(failed.value)


def peer_that_refuses(process_group: Any) -> None:
    """A rank whose arguments are wrong does not let the others wait for it."""
    os.environ.update(EPJIT_TIMEOUT_SECONDS=_FAR, EPJIT_BACKEND="cpu")
    if process_group.rank() == 1:
        with pytest.raises(ValueError, match="num_nvl_bytes is 100"):
            Buffer(process_group, 100)
        return
    error = caught(lambda: Buffer(process_group, 0))
    assert (error.op, error.rank, error.peer) == ("Buffer", 0, 1)


def test_a_peer_that_refuses_its_arguments() -> None:
    launch.run(peer_that_refuses, 2)


def test_threads_name_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "0.1")
    comm, _ = ThreadGroup.create(2)
    group = Group.from_comm(comm)
    error = caught(lambda: group.allgather(0, op="low_latency_combine"))
    assert (error.op, error.rank, error.peer) == ("low_latency_combine", 0, 1)
    assert caught(group.barrier).op == "Buffer"
    assert caught(group.reset).op == "reset"


def dispatches_alone(process_group: Any) -> None:
    os.environ.update(EPJIT_TIMEOUT_SECONDS="2", EPJIT_BACKEND="cpu")
    buffer = Buffer(process_group, 1 << 20)
    if process_group.rank() == 0:
        layout = buffer.get_dispatch_layout(torch.tensor([[0, 1]]), 2)
        error = caught(
            lambda: buffer.dispatch(
                torch.zeros((1, 8), dtype=torch.bfloat16),
                num_tokens_per_rank=layout[0],
                is_token_in_rank=layout[3],
                num_tokens_per_expert=layout[2],
            )
        )
        assert (error.op, error.rank, error.peer) == ("dispatch", 0, 1)
    dist.barrier(process_group)


def test_an_operation_names_itself() -> None:
    launch.run(dispatches_alone, 2)


# ---- Ctrl-C --------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupt_soon() -> Iterator[None]:
    """Ctrl-C for this process in half a second, which must come through in another one."""
    start = time.monotonic()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    timer.join()
    assert time.monotonic() - start < _SOON


def interrupted_and_reset(process_group: Any, waits: int) -> None:
    """Rank `waits` is interrupted in an operation and then in a reset."""
    os.environ["EPJIT_TIMEOUT_SECONDS"] = _FAR
    group = Group.from_torch(process_group)
    if group.rank == waits:
        with interrupt_soon():
            group.allgather("early", op="dispatch")
        with interrupt_soon():
            group.reset()
    else:
        time.sleep(2.0)
        assert "others had given up" in str(caught(lambda: group.allgather("late", op="dispatch")))
    group.reset()
    assert group.allgather(group.rank) == [0, 1]


@pytest.mark.parametrize("waits", [0, 1])
def test_an_interrupt_comes_through_and_reset_works(waits: int) -> None:
    launch.run(interrupted_and_reset, 2, waits)


def interrupted_while_all_pass(process_group: Any) -> None:
    """A rank that leaves a reset which the others went through is not behind them in the next."""
    os.environ["EPJIT_TIMEOUT_SECONDS"] = "2"
    group: Any = Group.from_torch(process_group)
    if group.rank == 0:
        wait = group._wait

        def interrupt(*args: Any) -> None:
            wait(*args)
            raise KeyboardInterrupt

        group._wait = interrupt
        with pytest.raises(KeyboardInterrupt):
            group.reset()
        group._wait = wait
        time.sleep(1.0)
    else:
        with pytest.raises(CommunicationError, match="rank 0"):
            group.reset()
    os.environ["EPJIT_TIMEOUT_SECONDS"] = "20"
    group.reset()
    assert group.allgather(group.rank) == [0, 1]


def test_an_interrupt_at_the_end_of_a_reset() -> None:
    launch.run(interrupted_while_all_pass, 2)


_ALONE_IN_A_PROCESS_GROUP = """
import os, signal, sys, threading, time
import torch.distributed as dist
from epjit import Buffer
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
if rank == 1:
    time.sleep(60)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    Buffer(dist.group.WORLD)
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - start < 15, flush=True)
os._exit(0)
"""


def test_an_interrupt_while_the_process_group_waits(tmp_path: Any) -> None:
    """In processes of their own: what was interrupted goes on in its thread."""
    commands = [
        [sys.executable, "-c", _ALONE_IN_A_PROCESS_GROUP, str(tmp_path / "rendezvous"), str(rank)]
        for rank in range(2)
    ]
    environ = {**launch.script_environ(), "EPJIT_BACKEND": "cpu"}
    with subprocess.Popen(commands[1], env=environ) as peer:
        try:
            done = subprocess.run(
                commands[0], env=environ, check=True, capture_output=True, text=True, timeout=50
            )
        finally:
            peer.kill()
    assert done.stdout == "interrupted True\n", done.stdout + done.stderr


def interrupted_elsewhere(process_group: Any) -> None:
    """In NVSHMEM, and while a kernel waits for a peer: both block outside Python."""
    os.environ["EPJIT_TIMEOUT_SECONDS"] = _FAR
    group = Group.from_torch(process_group)

    def block(*_: Any) -> None:
        """Unlike time.sleep, no signal ends it."""
        dist.HashStore().wait(["never"], timedelta(seconds=20))

    with interrupt_soon():
        nvshmem._together(group, "nvshmem_malloc", None, block)
    torch.cuda.synchronize = block  # type: ignore[assignment]
    with interrupt_soon():
        synchronize(torch.device("cuda", 0))


def interrupted_thread(process_group: Any) -> None:
    os.environ["EPJIT_TIMEOUT_SECONDS"] = _FAR
    first, second = ThreadGroup.create(2)
    with interrupt_soon():
        first.allgather("early")
    assert caught(lambda: second.allgather("late")).peer == 0
    late = threading.Thread(target=second.reset)
    late.start()
    first.reset()
    late.join()
    late = threading.Thread(target=second.allgather, args=(1,))
    late.start()
    assert first.allgather(0) == [0, 1]
    late.join()


def test_an_interrupt_of_a_rank_that_is_a_thread() -> None:
    launch.run(interrupted_thread, 1)


def test_an_interrupt_while_something_else_blocks() -> None:
    launch.run(interrupted_elsewhere, 1)


def test_interruptible() -> None:
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match=r"not done within 0\.1 s"):
        interruptible(lambda: time.sleep(5), seconds=0.1)


# ---- lines ---------------------------------------------------------------------------------------


def test_a_stranger_at_the_address_is_not_taken_for_rank_0() -> None:
    """One that says nothing, one that says something else, and then rank 0."""
    key = b"k" * 32
    lines: dict[int, socket.socket] = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with (
            socket.create_server(("127.0.0.2", port)),
            socket.create_server(("127.0.0.3", port)) as liar,
        ):

            def lie() -> None:
                connection, _ = liar.accept()
                connection.sendall(b"x" * 32)

            def accept() -> None:
                lines.update(line.accept(listener, key, size=2, seconds=_SOON))

            threads = [threading.Thread(target=each) for each in (lie, accept)]
            for thread in threads:
                thread.start()
            hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
            own = line.connect(hosts, port, key, rank=1, seconds=_SOON)
            for thread in threads:
                thread.join()
    assert own.getpeername() == ("127.0.0.1", port)
    assert list(lines) == [1]
    assert not line.is_closed(lines[1])
    own.close()
    time.sleep(0.1)
    assert line.is_closed(lines[1])


def test_a_stranger_is_not_taken_for_a_rank() -> None:
    with line.listen() as listener, socket.socket() as stranger:
        stranger.connect(("127.0.0.1", listener.getsockname()[1]))
        stranger.sendall(b"\1\0\0\0" + b"x" * 33)
        assert line.accept(listener, b"k" * 32, size=2, seconds=0.5) == {}
        assert stranger.recv(1) == b""


def test_nobody_at_the_addresses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = caught(lambda: line.connect(["127.0.0.1"], port, b"k", rank=3, seconds=60))
    assert (error.op, error.rank, error.peer) == ("Buffer", 3, 0)
    assert f"does not find rank 0 at 127.0.0.1, port {port}" in str(error)


# ---- what a group may be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "error", "says"),
    [
        (None, ValueError, "call torch.distributed.init_process_group first"),
        (dist.GroupMember.NON_GROUP_MEMBER, ValueError, "not among the ranks.*new_group"),
        (3, TypeError, "group is 3 of type int, expected a torch.distributed process group"),
        ("tp", TypeError, "group is 'tp' of type str, expected"),
    ],
)
def test_what_is_no_group(group: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        as_process_group(group)
    with pytest.raises(error, match=says):
        Buffer(group)


def meshes(process_group: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from epjit import moe

    os.environ["EPJIT_BACKEND"] = "cpu"
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    with pytest.raises(ValueError, match=r"of 2 dimensions.*such as mesh\['ep'\]"):
        Buffer(mesh)
    buffer = Buffer(mesh["ep"])
    assert buffer.group is mesh.get_group("ep")
    assert (buffer.rank, buffer.group_size) == (mesh.get_local_rank("ep"), 2)
    got = moe.dispatch(
        torch.zeros((3, 8), dtype=torch.bfloat16),
        torch.zeros((3, 1), dtype=torch.int64),
        torch.ones((3, 1), dtype=torch.float32),
        num_experts=2,
        group=mesh["ep"],
    )
    assert got.x.shape == (0 if buffer.rank else 6, 8)
    some = dist.new_group([0, 1])
    if process_group.rank() > 1:
        with pytest.raises(ValueError, match="not among the ranks"):
            Buffer(some)
        with pytest.raises(ValueError, match="not among the ranks"):
            moe.dispatch(
                *[torch.zeros((0, 8), dtype=torch.bfloat16)] * 3, num_experts=2, group=some
            )  # type: ignore[call-overload]
    moe.free_buffers()


def test_a_device_mesh_and_a_rank_outside() -> None:
    launch.run(meshes, 4)
