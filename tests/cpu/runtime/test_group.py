"""Groups of ranks: threads, and processes that meet through torch."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from epjit.errors import CommunicationError
from epjit.runtime import group as groups
from epjit.runtime.group import Group, ThreadGroup
from tests.harness import launch


def run_threads(size: int, work: Callable[[Group], Any], absent: tuple[int, ...] = ()) -> list[Any]:
    """Results, or what was raised, of each rank that takes part."""
    results: dict[int, Any] = {}

    def rank_main(comm: groups.ThreadComm) -> None:
        try:
            results[comm.Get_rank()] = work(Group.from_comm(comm))
        except Exception as error:
            results[comm.Get_rank()] = error

    comms = [comm for comm in ThreadGroup.create(size) if comm.Get_rank() not in absent]
    threads = [threading.Thread(target=rank_main, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[rank] for rank in sorted(results)]


def test_threads_allgather_many_rounds() -> None:
    def work(group: Group) -> list[list[Any]]:
        rounds = []
        for index in range(50):
            if index % 7 == group.rank:
                time.sleep(0.001)
            rounds.append(group.allgather((group.rank, index)))
        group.barrier()
        return rounds

    results = run_threads(3, work)
    assert results == [[[(rank, index) for rank in range(3)] for index in range(50)]] * 3


def test_threads_name_the_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "0.2")
    results = run_threads(4, lambda group: group.barrier(), absent=(1, 3))
    assert [type(result) for result in results] == [CommunicationError] * 2
    assert results[0].missing == (1, 3)
    assert "rank 0 waited 0.2 s for ranks 1, 3, which did not come" in str(results[0])
    assert results[1].missing == (1, 3)


def test_a_thread_that_comes_late_does_not_go_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "0.2")

    def work(group: Group) -> None:
        if group.rank == 1:
            time.sleep(0.6)
        group.barrier()

    first, second = run_threads(2, work)
    assert first.peer == 1
    assert isinstance(second, CommunicationError)


def test_comm_of_another_library() -> None:
    class Comm:
        def Get_rank(self) -> int:
            return 1

        def Get_size(self) -> int:
            return 3

        def allgather(self, obj: Any) -> list[Any]:
            return ["a", obj, "c"]

    group = Group.from_comm(Comm())
    assert (group.rank, group.size, group.allgather("b")) == (1, 3, ["a", "b", "c"])


# ---- processes


def run_processes(
    size: int, tmp_path: Path, work: Callable[[int, int, str, Any], None]
) -> list[Any]:
    context = mp.get_context("forkserver")  # imports torch once, not once a process
    context.set_forkserver_preload(["torch", "torch.distributed"])
    queue = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, size, str(tmp_path / "rendezvous"), queue))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return [results[rank] for rank in range(size)]


def make_group(rank: int, size: int, file: str) -> Group:
    """A group whose torch process group is gone."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    everyone = dist.group.WORLD
    assert everyone is not None
    group = Group.from_torch(everyone)
    dist.destroy_process_group()
    return group


def exchange(rank: int, size: int, file: str, queue: Any) -> None:
    groups._CHUNK_BYTES = 1000
    group = make_group(rank, size, file)
    seen = []
    for index in range(20):
        objects = group.allgather(
            {"rank": rank, "index": index, "data": bytes([rank]) * 3000 * index}
        )
        seen.append(
            all(
                item == {"rank": r, "index": index, "data": bytes([r]) * 3000 * index}
                for r, item in enumerate(objects)
            )
        )
    assert isinstance(group, groups._StoreGroup)
    assert group._store is not None
    group.barrier()
    # Only rank 0 knows that all have read, so it alone can count what is left.
    left = group._store.num_keys() if rank == 0 else 0
    queue.put((rank, (seen, left)))


def test_torch_group_after_its_process_group_is_destroyed(tmp_path: Path) -> None:
    results = run_processes(3, tmp_path, exchange)
    assert all(all(seen) and len(seen) == 20 for seen, _ in results)
    assert results[0][1] <= 4  # the store's own key, and those of ranks that have left


def stay_away(rank: int, size: int, file: str, queue: Any) -> None:
    import os

    group = make_group(rank, size, file)
    os.environ["EPJIT_TIMEOUT_SECONDS"] = "1"
    if rank == 2:
        time.sleep(2)
        try:
            group.barrier()
        except CommunicationError as error:
            queue.put((rank, (error.missing, str(error))))
        return
    try:
        group.barrier()
    except CommunicationError as error:
        queue.put((rank, (error.missing, str(error))))
    time.sleep(2)  # rank 0 hosts the store that rank 1 asks


def test_torch_group_names_the_missing(tmp_path: Path) -> None:
    results = run_processes(3, tmp_path, stay_away)
    assert [result[0] for result in results[:2]] == [(2,), (2,)]
    assert "rank 0 waited 1 s for rank 2, which did not come" in results[0][1]
    assert "rank 2 came when others had given up; call reset()" in results[2][1]


def forge(rank: int, size: int, file: str, queue: Any) -> None:
    group: Any = make_group(rank, size, file)
    if rank == 1:
        group._put(group._store, "2/0", pickle.dumps("forged"))
        head = bytearray(group._store.get("2/0"))
        head[0] ^= 1
        group._store.set("2/0", bytes(head))
        try:
            group._get(group._store, "2/0", "dispatch")
        except CommunicationError as error:
            queue.put((rank, str(error)))
        group._store.set("go", b"")
    else:
        group._store.wait(["go"], timedelta(seconds=30))
        queue.put((rank, ""))


def test_message_from_a_stranger_is_not_unpickled(tmp_path: Path) -> None:
    results = run_processes(2, tmp_path, forge)
    assert "not from its group" in results[1]


def several(process_group: Any) -> None:
    """Groups at once, after one another, and after one that a rank gave up or never came to."""
    rank, size = process_group.rank(), process_group.size()
    first: Any = Group.from_torch(process_group)
    second: Any = Group.from_torch(process_group)
    assert first._place is second._place
    for group in (first, second, first):
        assert group.allgather((rank, id(group) == id(first))) == [
            (r, group is first) for r in range(size)
        ]
    del second
    third: Any = Group.from_torch(process_group)
    assert third._place is first._place
    if rank != 1:  # a round that fails is the affair of its group
        os.environ["EPJIT_TIMEOUT_SECONDS"] = "1"
        with pytest.raises(CommunicationError):
            third.barrier()
    os.environ["EPJIT_TIMEOUT_SECONDS"] = "60"
    assert first.allgather(rank) == list(range(size))
    # A rank that gives up a group is not waited for.
    fourth: Any = Group.from_torch(process_group)
    start = time.monotonic()
    if rank == 2:
        fourth = None
    else:
        with pytest.raises(CommunicationError, match="given up its Buffer") as caught:
            fourth.barrier()
        assert caught.value.missing == (2,)
    assert time.monotonic() - start < 20
    assert first.allgather(rank) == list(range(size))
    # One rank has lost the place: all go to a new one, and groups of the old one go on.
    if rank == 1:
        first._place.is_lost = True
    fifth: Any = Group.from_torch(process_group)
    assert fifth._place is not first._place
    assert fifth.allgather(rank) == list(range(size))
    assert first.allgather(rank) == list(range(size))
    place = weakref.ref(fifth._place)
    del first, third, fifth, group
    assert place() is not None  # for the next
    assert Group.from_torch(process_group).allgather(rank) == list(range(size))


def test_all_groups_of_a_process_group_meet_at_one_place() -> None:
    launch.run(several, 3)


def replayed(process_group: Any) -> None:
    """A message that another group of the same ranks was sent in the same round."""
    first: Any = Group.from_torch(process_group)
    second: Any = Group.from_torch(process_group)
    if process_group.rank() == 1:
        first._put(first._store, "9/1", pickle.dumps("mine"))
        second._store.set("9/1", first._store.get("9/1"))
        second._store.set("9/1/0", first._store.get("9/1/0"))
    first.barrier()
    assert first._get(first._store, "9/1", "dispatch")[0] == "mine"
    with pytest.raises(CommunicationError, match="not from its group"):
        second._get(second._store, "9/1", "dispatch")
    first.barrier()


def test_a_message_to_another_group_is_not_unpickled() -> None:
    launch.run(replayed, 2)


def of_two_process_groups(process_group: Any) -> None:
    """Each has a place of its own, which goes with it, but not before its groups."""
    other: Any = dist.new_group([0, 1], backend="gloo")
    here, there = Group.from_torch(process_group), Group.from_torch(other)
    one: Any = here
    two: Any = there
    assert one._place is not two._place
    place = weakref.ref(two._place)
    dist.destroy_process_group(other)
    del other
    assert there.allgather(there.rank) == here.allgather(here.rank) == [0, 1]
    here.barrier()
    del there, two
    gc.collect()
    assert place() is None
    here.barrier()


def test_a_place_goes_with_its_process_group() -> None:
    launch.run(of_two_process_groups, 2)


def test_group_of_one_needs_no_store(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        everyone = dist.group.WORLD
        assert everyone is not None
        group = Group.from_torch(everyone)
        assert group.allgather("x") == ["x"]
        group.barrier()
    finally:
        dist.destroy_process_group()
