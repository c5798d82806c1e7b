"""Choosing a transport; the loopback: its record on the host, its device code on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epjit.calls import DispatchSizes
from epjit.formats import BF16
from epjit.kernels.internode import InternodeNotifyConfig
from epjit.kernels.shapes import CombineShape, DispatchShape
from epjit.modes.internode import Internode
from epjit.modes.low_latency import LowLatency
from epjit.runtime import symmetric
from epjit.runtime import transport as transports
from epjit.runtime.nvshmem import World
from epjit.runtime.params import params_type
from epjit.runtime.topology import Topology
from epjit.runtime.transport import LoopbackTransport, NvshmemTransport, make_transport
from tests.cpu.runtime.test_group import run_threads
from tests.emulation.build import Launch, emulate, guarded
from tests.transport.ring import RingConfig, ring_sources, write_tree

TWO_BY_TWO = ((0, 1), (2, 3))


class Device:
    """Device memory that is host memory; all ranks are threads on one GPU."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.freed: list[int] = []

    def load(self) -> Any:
        return SimpleNamespace(CUstream_flags=SimpleNamespace(CU_STREAM_NON_BLOCKING=1))

    def using(self, device: int) -> Any:
        return contextlib.nullcontext()

    def call(self, name: str, *args: Any) -> Any:
        if name == "cuMemAlloc":
            buffer = ctypes.create_string_buffer(args[0] + 16)
            address = -(-ctypes.addressof(buffer) // 16) * 16
            self.memory[address] = buffer
            return address
        if name == "cuIpcGetMemHandle":
            return SimpleNamespace(
                getPtr=lambda: ctypes.addressof(next(iter(self.memory.values())))
            )
        if name == "cuMemcpyHtoDAsync":
            ctypes.memmove(*args[:3])
        if name == "cuMemsetD8Async":
            ctypes.memset(*args[:3])
        if name == "cuMemFree":
            self.freed.append(args[0])
        return None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    gpu = SimpleNamespace(
        uuid=lambda device: bytes(16), count=lambda: 1, can_access_peer=lambda device, peer: True
    )
    monkeypatch.setattr(symmetric, "driver", fake)
    monkeypatch.setattr(symmetric, "gpu", gpu)
    monkeypatch.setattr(transports, "driver", fake)
    for name in ("EPJIT_TRANSPORT", "EPJIT_LOOPBACK_SEED", "NVSHMEM_QP_DEPTH"):
        monkeypatch.delenv(name, raising=False)
    return fake


def make(size: int, domains: tuple[tuple[int, ...], ...]) -> list[Any]:
    return run_threads(
        size, lambda group: make_transport(group, Topology(group.rank, domains), device=0)
    )


def record_of(transport: LoopbackTransport) -> Any:
    """The record as a kernel sees it."""
    return params_type("transport/loopback.cuh", "Record").from_address(transport.context)


# ---- choosing


def test_threads_get_loopback(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(4, TWO_BY_TWO)
    assert [each.body for each in found] == ["loopback"] * 4
    assert found[0].pes == [0, 1, 2, 3]
    monkeypatch.setenv("EPJIT_TRANSPORT", "nvshmem")
    member = transports.nvshmem._Member(process="this")
    monkeypatch.setattr(transports.nvshmem, "_introduce", lambda device: member)
    for error in make(2, ((0,), (1,))):
        with pytest.raises(ValueError, match="some ranks are threads of one process"):
            raise error


def test_processes_get_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(transports, "process_id", lambda: str(next(numbers)))
    monkeypatch.setattr(transports, "NvshmemTransport", lambda *args, **options: options)
    monkeypatch.delenv("EPJIT_TRANSPORT", raising=False)
    assert [each["num_qps_per_rank"] for each in make(2, ((0,), (1,)))] == [24, 24]


def test_a_disagreement_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["auto", "loopback"])
    monkeypatch.setattr(
        transports, "env", SimpleNamespace(transport=lambda: next(answers)), raising=True
    )
    for error in make(2, ((0,), (1,))):
        with pytest.raises(ValueError, match="the ranks disagree on EPJIT_TRANSPORT"):
            raise error


# ---- NVSHMEM's settings


@pytest.fixture
def nvshmem(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings that NVSHMEM is told when it begins."""
    told: dict[str, str] = {}

    def initialize(group: Any, *, device: int, settings: dict[str, str], **_: bool) -> World:
        told.update(settings)
        monkeypatch.setenv("NVSHMEM_QP_DEPTH", settings["NVSHMEM_QP_DEPTH"])
        return World([0], "")

    monkeypatch.setattr(transports.nvshmem, "initialize", initialize)
    for name in (
        "NVSHMEM_QP_DEPTH",
        "NVSHMEM_IB_ENABLE_IBGDA",
        "NVSHMEM_IBGDA_NUM_RC_PER_PE",
    ):
        monkeypatch.delenv(name, raising=False)
    return told


def nvshmem_transport(*, use_fabric: bool = False) -> NvshmemTransport:
    (found,) = run_threads(
        1,
        lambda group: NvshmemTransport(
            group,
            Topology(0, ((0,),)),
            device=0,
            num_qps_per_rank=8,
            use_fabric=use_fabric,
            may_lose_ranks=False,
        ),
    )
    if isinstance(found, Exception):
        raise found
    return found


def test_what_nvshmem_is_told(nvshmem: dict[str, str]) -> None:
    nvshmem_transport()
    assert nvshmem["NVSHMEM_QP_DEPTH"] == "1024"
    assert nvshmem["NVSHMEM_IBGDA_NUM_RC_PER_PE"] == "8"
    assert (nvshmem["NVSHMEM_DISABLE_NVLS"], nvshmem["NVSHMEM_DISABLE_MNNVL"]) == ("1", "1")


def test_the_fabric_stays_when_it_is_wanted(nvshmem: dict[str, str]) -> None:
    nvshmem_transport(use_fabric=True)
    assert "NVSHMEM_DISABLE_MNNVL" not in nvshmem


@pytest.mark.parametrize(
    ("max_tokens", "num_qps", "ibgda", "told"),
    [(1024, 24, "1", False), (1024, 1, "1", True), (255, 1, "1", False), (1024, 1, "0", False)],
)
def test_any_number_of_tokens_is_sent(
    max_tokens: int,
    num_qps: int,
    ibgda: str,
    told: bool,
    nvshmem: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """NVSHMEM waits for room in a queue, so a short one is no reason to refuse a call."""
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", ibgda)
    mode = object.__new__(LowLatency)
    monkeypatch.setenv("NVSHMEM_IBGDA_NUM_RC_PER_PE", str(num_qps))
    transport = nvshmem_transport()
    config = SimpleNamespace(num_warps=8, lines=False)
    launch = SimpleNamespace(kernel=SimpleNamespace(config=config))
    vars(mode).update(
        _transport=transport,
        _group=SimpleNamespace(size=16),
        _num_sms=132,
        _dispatch_plans={},
        launch=lambda shape, **sizes: launch,
    )
    sizes = DispatchSizes(
        num_tokens=max_tokens,
        hidden=7168,
        num_topk=8,
        topk_is_int64=True,
        max_tokens=max_tokens,
        num_experts=256,
        row_format=BF16,
    )
    assert mode._plan_dispatch(sizes).grid == 132
    assert ("queue shorter than a call: expect stalls" in caplog.text) == told


@pytest.mark.parametrize(
    ("through_proxy", "mib", "tokens"), [(True, 16, 16), (True, 4, 4), (False, 16, 4)]
)
def test_a_proxy_gets_larger_chunks(through_proxy: bool, mib: int, tokens: int) -> None:
    """For it, a put takes time whatever its size; but a ring must hold some of them."""
    mode = object.__new__(Internode)
    vars(mode).update(
        _transport=SimpleNamespace(through_proxy=through_proxy),
        _topology=Topology(0, TWO_BY_TWO),
        _rings=SimpleNamespace(num_rdma_bytes=mib << 20),
        _arch="sm_90a",
    )
    shapes = (DispatchShape(14336, 0, 8, True), CombineShape(14336, 8, is_f16=False))
    assert [mode._config(shape).tokens_per_chunk for shape in shapes] == [tokens] * 2
    notify, *_, dispatch, combine = mode._configs_on("sm_100a", shapes)
    assert notify == InternodeNotifyConfig(2, 2)
    assert (dispatch.tokens_per_chunk, combine.tokens_per_chunk) == (tokens, tokens)


@pytest.mark.parametrize(
    ("world", "through_proxy"), [("ibgda", False), ("ibrc", True), ("libfabric", True), ("", False)]
)
def test_who_posts(world: str, through_proxy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports.nvshmem, "initialize", lambda *a, **o: World([0], world))
    assert nvshmem_transport().through_proxy is through_proxy


class HeapMemory:
    """That of a PE that is host memory."""

    def __init__(self, buffer: Any) -> None:
        self.ptr, self.nbytes = ctypes.addressof(buffer), 64
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("unmapped", [(), (2,)], ids=["mapped", "unmapped"])
def test_memory_of_the_heap(
    unmapped: tuple[int, ...], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEs are not ranks; only the own domain's are asked for; memory is zero on return."""
    pes = [2, 3, 0, 1]
    buffers = [ctypes.create_string_buffer(b"x" * 64) for _ in range(4)]
    heap = [HeapMemory(buffers[pe]) for pe in pes]

    def address_at(ptr: int, pe: int) -> int:
        return 0 if pe in unmapped else ctypes.addressof(buffers[pe])

    monkeypatch.setattr(
        transports.nvshmem, "initialize", lambda *args, **options: World(pes, "ibrc")
    )
    monkeypatch.setattr(transports.nvshmem, "allocate", lambda group, *a, **o: heap[group.rank])
    monkeypatch.setattr(transports.nvshmem, "address_at", address_at)
    monkeypatch.setenv("EPJIT_TRANSPORT", "nvshmem")

    def work(group: Any) -> Any:
        topology = Topology(group.rank, TWO_BY_TWO)
        return make_transport(group, topology, device=0).allocate(64)

    found = run_threads(4, work)
    if unmapped:
        for error in found:
            with pytest.raises(
                RuntimeError, match=r"rank 1 \(device 0\) cannot map .* ranks \[0\]"
            ):
                raise error
        assert all(each.closed for each in heap)
        return
    at = [ctypes.addressof(buffer) for buffer in buffers]
    assert found[0].peer_ptrs == found[1].peer_ptrs == [at[2], at[3], 0, 0]
    assert found[3].peer_ptrs == [0, 0, at[0], at[1]]
    assert all(buffer.raw[:64] == bytes(64) for buffer in buffers)
    found[3].close()
    assert heap[3].closed
    with pytest.raises(RuntimeError, match="closed"):
        found[3].tensor(torch.uint8)


# ---- loopback on the host


def test_memory_of_other_domains_is_hidden(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_LOOPBACK_SEED", "5")
    found = make(4, TWO_BY_TWO)
    group_of = {}

    def work(group: Any) -> Any:
        transport = make_transport(group, Topology(group.rank, TWO_BY_TWO), device=0)
        group_of[group.rank] = transport
        return transport.allocate(256)

    memories = run_threads(4, work)
    pointers = [memory.ptr for memory in memories]
    assert memories[1].peer_ptrs == [pointers[0], pointers[1], 0, 0]
    assert memories[2].peer_ptrs == [0, 0, pointers[2], pointers[3]]
    record = record_of(group_of[1])
    assert (record.regions[0].base, record.regions[0].bytes) == (pointers[1], 256)
    assert list(record.regions[0].bases[:4]) == pointers
    assert len({record_of(each).seed for each in group_of.values()}) == 4
    memories[1].close()
    memories[1].close()
    assert record.regions[0].bytes == 0
    assert memories[1].ptr == 0
    assert device.freed == [pointers[1]]
    assert len({each.context for each in found}) == 4


def test_close_frees_the_record(device: Device) -> None:
    (transport,) = make(1, ((0,),))
    (context,) = device.memory
    transport.close()
    transport.close()
    assert device.freed == [context]


# ---- loopback on the device, emulated


@pytest.fixture(scope="module")
def ring_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ring.cu with the loopback body before it, as `render` puts it.

    Its functions get other names: the emulation has some of the same names, its own body.
    """
    folder = write_tree(tmp_path_factory.mktemp("ring"))
    kernel = folder / "ring.cu"
    renamed = "".join(
        f"#define epjit_{name} loopback_{name}\n"
        for name in ("put", "put_signal", "signal", "fence", "quiet")
    )
    kernel.write_text(f'{renamed}#include "transport/loopback.cuh"\n{kernel.read_text()}')
    return folder


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("row_bytes", [16, 2064, 8192])
def test_ring_over_loopback(
    row_bytes: int, seed: int, ring_folder: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPJIT_LOOPBACK_SEED", str(seed))
    size, config = 3, RingConfig()
    domains = tuple((rank,) for rank in range(size))
    ranks: dict[int, Any] = {}

    def work(group: Any) -> None:
        transport = make_transport(group, Topology(group.rank, domains), device=0)
        transport.allocate(64)  # another region before
        ranks[group.rank] = transport, transport.allocate(config.memory_bytes(row_bytes))

    assert run_threads(size, work) == [None] * size
    with ring_sources():
        record = params_type("ring.cu", "RingParams")
    rows = config.num_warps * row_bytes
    outs = [guarded(2, rows, dtype=torch.uint8) for _ in range(size)]
    failed = torch.zeros(size, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    for epoch in (1, 2):
        launches, sent = [], []
        for rank in range(size):
            transport, memory = ranks[rank]
            row = torch.randint(0, 256, (rows,), dtype=torch.uint8, generator=generator)
            ctypes.memmove(memory.ptr, row.data_ptr(), rows)
            sent.append(row)
            params = record(
                transport=transport.context,
                memory=memory.ptr,
                out=outs[rank].data_ptr(),
                failed=failed[rank:].data_ptr(),
                epoch=epoch,
                timeout_ns=10**12,
                row_bytes=row_bytes,
                next_pe=(rank + 1) % size,
            )
            launches.append(Launch(config, params, grid=1, rank=rank, include=ring_folder))
        emulate(launches, seed=seed)
        assert not failed.any()
        for rank in range(size):
            for got in outs[rank]:
                assert torch.equal(got, sent[rank - 1])
    draws = [record_of(transport).draws for transport, _ in ranks.values()]
    assert draws == [(6 * config.num_warps) * bool(seed)] * size
