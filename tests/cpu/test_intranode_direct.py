"""Places of the outputs of a dispatch with the variant "direct", with fakes of GPU and streams."""

from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epjit.calls import Dispatch
from epjit.handles import Dispatched
from epjit.kernels import variants
from epjit.kernels.intranode import DispatchConfig
from epjit.kernels.shapes import DispatchShape
from epjit.modes import intranode
from epjit.modes.intranode import Intranode
from epjit.runtime.empty import empty_on
from epjit.runtime.pool import BlockPool

BASE = 1 << 40  # where the symmetric memory seems to lie
ROWS, HIDDEN, TOPK = 8, 64, 2
# Blocks of 128 bytes: rows of bf16, 64-bit choices, weights, the index of each row's token.
BLOCKS = ROWS * HIDDEN * 2 // 128 + 3


class FakeScope:
    """Says what the communication stream was told to wait for."""

    owners: tuple[int, ...] = (7,)

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def allocating(self) -> Any:
        return nullcontext()

    def wait_for(self, event: Any) -> None:
        self.waited.append(event)


class World:
    """An `Intranode` that has only what allocating needs."""

    def __init__(self, num_blocks: int) -> None:
        self.scope = FakeScope()
        self.mode = Intranode.__new__(Intranode)
        self.mode._device = torch.device("cpu")
        self.mode._empty = empty_on(self.mode._device)
        self.mode._pool = BlockPool(128 * num_blocks, current_stream=lambda: 7, record=str)
        self.mode._arena = intranode._Arena(2, 1 << 20, 128 * num_blocks)
        self.mode.memory = SimpleNamespace(ptr=BASE)  # type: ignore[assignment]

    def allocate(self, *, variant: str = "direct", rows: int = ROWS, cached: bool = False) -> Any:
        x = torch.empty((ROWS, HIDDEN), dtype=torch.bfloat16)
        idx = None if cached else torch.empty((ROWS, TOPK), dtype=torch.int64)
        shape = DispatchShape(2 * HIDDEN, 0, 0 if cached else TOPK, True)
        config = DispatchConfig.choose(shape, num_ranks=2, variant=variant, limit=200 << 10)
        launch: Any = SimpleNamespace(kernel=SimpleNamespace(config=config))
        tensors, has_room = self.mode._allocate_outputs(
            self.scope,  # type: ignore[arg-type]
            launch,
            rows,
            Dispatch(x, None, idx, None, (), 1, 0, 2),
            with_src_idx=not cached,
        )
        *received, src_idx = tensors
        return SimpleNamespace(received=Dispatched(*received), src_idx=src_idx, has_room=has_room)


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the blocks that were made; they are memory of the host, and keep their owner."""
    found: list[int] = []

    def tensor_over(
        ptr: int, shape: tuple[int, ...], *, owner: object, device: int | None
    ) -> torch.Tensor:
        found.append(ptr)
        nbytes = math.prod(shape)
        assert nbytes, "an empty tensor comes from CuPy with strides of 0, and has no other views"
        array = (ctypes.c_char * nbytes)()
        array.owner = owner  # type: ignore[attr-defined]
        return torch.frombuffer(array, dtype=torch.uint8).view(shape)

    monkeypatch.setattr(intranode, "tensor_over", tensor_over)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def test_each_output_is_a_block_of_the_region_behind_the_control_words(places: list[int]) -> None:
    world = World(BLOCKS)
    outputs = world.allocate()
    assert outputs.has_room
    assert outputs.received.recv_x.shape == (ROWS, HIDDEN)
    assert outputs.received.recv_x.dtype == torch.bfloat16
    assert outputs.received.recv_topk_idx.dtype == torch.int64
    assert outputs.received.recv_topk_weights.dtype == torch.float32
    assert outputs.src_idx.shape == (ROWS,)
    start = BASE + world.mode._arena.outputs
    assert places == [start, *(start + 128 * i for i in range(8, BLOCKS))]
    assert start % 128 == 0
    assert world.scope.waited == []


def test_without_room_for_all_every_output_is_torchs(places: list[int]) -> None:
    world = World(BLOCKS - 1)
    outputs = world.allocate()
    assert not outputs.has_room
    assert outputs.src_idx.shape == (ROWS,)
    places.clear()
    assert world.allocate(cached=True).has_room  # what the first attempt took is free again
    assert places == [BASE + world.mode._arena.outputs]


def test_a_view_keeps_the_memory_and_its_end_is_waited_for() -> None:
    world = World(BLOCKS)
    outputs = world.allocate()
    row = outputs.received.recv_x[3:4].view(torch.uint8)[0, :2]
    del outputs
    assert not world.allocate(cached=True).has_room
    assert world.allocate(cached=True, rows=2).has_room  # what a handle keeps keeps no rows
    assert world.scope.waited == ["7"]
    del row
    assert world.allocate().has_room
    assert set(world.scope.waited) == {"7"}


def test_a_block_is_guarded_by_the_stream_of_the_call_as_well() -> None:
    """With a previous event another stream is current while the outputs are allocated."""
    world = World(BLOCKS)
    world.scope.owners = (5, 99)
    world.allocate()
    assert world.allocate().has_room
    assert set(world.scope.waited) == {"5", "7", "99"}


def test_a_cached_dispatch_returns_all_that_it_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    """ElasticBuffer sends choices and weights along the routing of a handle, too."""
    world = World(0)
    config = SimpleNamespace(direct=False)
    launch = SimpleNamespace(kernel=SimpleNamespace(config=config))
    for name, value in (("launch", launch), ("_routing", {}), ("_dispatch_rows", None)):
        monkeypatch.setattr(world.mode, name, lambda *_, value=value, **__: value)
    x = torch.empty((ROWS, HIDDEN), dtype=torch.bfloat16)
    idx, weights = torch.empty((ROWS, TOPK), dtype=torch.int64), torch.empty((ROWS, TOPK))
    handle: Any = SimpleNamespace(num_rows=3)
    call = Dispatch(x, None, idx, weights, handle, 1, 0, 2)
    received = world.mode._cached_dispatch(world.scope, call, handle)  # type: ignore[arg-type]
    tensors = received.recv_x, received.recv_topk_idx, received.recv_topk_weights
    assert [tuple(each.shape) for each in tensors] == [(3, HIDDEN), (3, TOPK), (3, TOPK)]


def test_no_rows() -> None:
    outputs = World(BLOCKS).allocate(rows=0)
    assert outputs.has_room
    assert outputs.received.recv_x.shape == (0, HIDDEN)


def test_graphs_and_other_variants_take_torchs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(BLOCKS)
    assert not world.allocate(variant="push").has_room
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not world.allocate().has_room
    world.mode._pool = None  # the Buffer was made before the variant was asked for
    assert not world.allocate().has_room


def test_only_its_name_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPJIT_DISPATCH_VARIANT", raising=False)
    assert variants.resolve("dispatch", "sm_90a", preferred="direct") == "push"
    monkeypatch.setenv("EPJIT_DISPATCH_VARIANT", "direct")
    assert variants.resolve("dispatch", "sm_90a", preferred="tma") == "direct"
    with pytest.raises(ValueError, match="needs sm_90 or later"):
        variants.resolve("dispatch", "sm_89")


def test_all_warps_stage_where_nothing_is_pulled() -> None:
    shape = DispatchShape(14336, 0, 0, True)
    config = DispatchConfig.choose(shape, num_ranks=4, variant="direct", limit=220 << 10)
    assert config.stage_warps(24, has_room=True) == config.num_warps
    assert config.stage_warps(24) < config.num_warps
