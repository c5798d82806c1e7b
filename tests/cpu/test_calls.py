"""Every call of a Buffer: its surroundings of the kernels, with fakes of the GPUs.

From a thread in which another GPU is current, and when it is interrupted.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from epjit import Buffer
from epjit.buffer_runtime import BufferRuntime
from epjit.checks.expert_major import ExpertChecks
from epjit.checks.low_latency import LowLatencyChecks
from epjit.handles import Dispatched, IntranodeHandle, LowLatencyDispatched
from epjit.life import Resources
from epjit.runtime import driver
from epjit.runtime.topology import Topology
from epjit.scope import Streams, Turns

OURS = 1
RANKS, EXPERTS, TOKENS, HIDDEN, TOPK = 2, 4, 3, 128, 2


class Gpus(threading.local):
    """The current GPU of a thread, for torch and for the driver; a fresh thread has no context."""

    torch_device = 0
    context: int | None = None


class World:
    """A Buffer on a GPU; whatever it is made of wants that GPU to be current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpus = gpus = Gpus()
        self.asked: list[str] = []

        class TorchDevice:
            def __init__(self, device: int) -> None:
                self.device = device

            def __enter__(self) -> None:
                self.before, gpus.torch_device = gpus.torch_device, self.device

            def __exit__(self, *_: object) -> None:
                gpus.torch_device = self.before

        class Context(TorchDevice):
            def __enter__(self) -> None:
                self.before, gpus.context = gpus.context, self.device

            def __exit__(self, *_: object) -> None:
                gpus.context = self.before

        def fake(name: str, value: Any) -> None:
            monkeypatch.setattr(torch._C, name, value, raising=False)

        fake("_cuda_getDevice", lambda: gpus.torch_device)
        fake("_cuda_getCurrentRawStream", lambda device: 7 + device)
        monkeypatch.setattr(torch.cuda, "device", TorchDevice)
        monkeypatch.setattr(driver, "using", Context)
        monkeypatch.setattr(driver, "bind", self.bind)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", self.is_capturing)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr("epjit.scope.synchronize", self.wants("synchronize"))

        self.buffer = buffer = Buffer.__new__(Buffer)
        buffer.device = torch.device("cuda", OURS)
        buffer._entered = Turns(OURS)
        buffer._resources = Resources(buffer._entered)
        buffer._resources.callback(self.wants("resources.close"))
        buffer.rank, buffer.group_size = 0, RANKS
        buffer.topology = Topology(0, (tuple(range(RANKS)),))
        buffer.num_nvl_bytes = buffer.num_rdma_bytes = 1 << 20
        buffer.explicitly_destroy, buffer.enable_shrink = True, True
        buffer._unreceived = None
        ints = torch.zeros(RANKS, dtype=torch.int32)
        received = LowLatencyDispatched(
            torch.zeros(1), None, ints, ints, torch.zeros(1, dtype=torch.int64)
        )
        self.received = mock.Mock()
        parts: dict[str, Any] = {
            "layout": (ints, None, ints, ints),
            "dispatch": Dispatched(ints, None, None, None, [], IntranodeHandle(*[ints] * 6)),
            "combine": (ints, None),
            "expert_dispatch": ((ints, None, None, mock.Mock()), ()),
            "expert_combine": ((ints, None), ()),
        }
        buffer._mode = self.part("mode", **parts, memory=self.part("memory"))
        buffer._low_latency = self.part(
            "low_latency",
            dispatch=(received, self.wants("hook")),
            combine=(ints, None),
            memory=self.part("memory"),
            mask=self.part("mask"),
        )
        self.comm = mock.Mock(device=OURS, handle=99, last_call=0)
        buffer._streams = Streams(self.comm, buffer._resources)
        call = mock.Mock(sizes=mock.Mock(hidden=HIDDEN), given=())
        checks: Any = mock.Mock(spec=LowLatencyChecks)
        checks.dispatch.return_value = checks.combine.return_value = call
        checks.send_buffer.return_value = (TOKENS, HIDDEN, EXPERTS)
        buffer._low_latency_checks = checks
        normal_checks: Any = mock.Mock(spec=ExpertChecks)
        for operation in ("layout", "dispatch", "combine", "expert_dispatch", "expert_combine"):
            getattr(normal_checks, operation).return_value = call
        buffer._checks = normal_checks
        buffer.runtime = BufferRuntime(buffer)

    def bind(self, device: int) -> None:
        if self.gpus.context is None:
            self.gpus.context = device

    def is_capturing(self) -> bool:
        self.ask("is_current_stream_capturing")
        return False

    def ask(self, name: str) -> None:
        self.asked.append(name)
        current = (self.gpus.torch_device, self.gpus.context)
        assert current == (OURS, OURS), f"{name} with {current}"

    def wants(self, name: str, value: Any = None) -> Callable[..., Any]:
        def called(*args: object, **kwargs: object) -> Any:
            self.ask(name)
            return value

        return called

    def part(self, name: str, **values: Any) -> Any:
        """Of the Buffer; all of its methods want the GPU, but those that look at host memory."""
        world = self

        class Part:
            def __getattr__(self, attribute: str) -> Any:
                if attribute == "raise_fault":
                    return lambda: None
                value = values.get(attribute, mock.MagicMock())
                is_part = type(value).__name__ == "Part"
                return value if is_part else world.wants(f"{name}.{attribute}", value)

            def __getitem__(self, index: object) -> Any:
                return self

        return Part()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Leaves nothing for `__del__` of its Buffer, which would find no fakes any more."""
    world = World(monkeypatch)
    yield world
    world.buffer.runtime = None


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


X, IDX, WEIGHTS = torch.zeros((TOKENS, HIDDEN)), ints(TOKENS, TOPK), torch.zeros((TOKENS, TOPK))
HANDLE = IntranodeHandle(*[ints(RANKS, RANKS)] * 6)
LAYOUT: Any = {
    "num_tokens_per_rank": ints(RANKS),
    "is_token_in_rank": ints(TOKENS, RANKS).bool(),
    "num_tokens_per_expert": ints(EXPERTS),
}
LOW_LATENCY_HANDLE: Any = (ints(2, 6), torch.zeros((2, RANKS), dtype=torch.int64), 3, HIDDEN, 4)


class Call(NamedTuple):
    """One way to call a method, and what that asks of the GPU at least."""

    call: Callable[[Buffer], object]
    asks: str


def _hook(buffer: Buffer) -> None:
    *_, hook = buffer.low_latency_dispatch(X, IDX, TOKENS, EXPERTS, return_recv_hook=True)
    assert hook is not None
    thread = threading.Thread(target=hook)
    thread.start()
    thread.join()


def _finalize(buffer: Buffer) -> None:
    buffer.explicitly_destroy = False
    buffer.__del__()


CALLS: dict[str, list[Call]] = {
    "get_dispatch_layout": [Call(lambda b: b.get_dispatch_layout(IDX, EXPERTS), "mode.layout")],
    "dispatch": [
        Call(lambda b: b.dispatch(X, **LAYOUT), "mode.dispatch"),
        Call(lambda b: b.dispatch(X, HANDLE), "mode.dispatch"),
    ],
    "combine": [Call(lambda b: b.combine(X, HANDLE), "mode.combine")],
    "expert_dispatch": [
        Call(lambda b: b.expert_dispatch(X, IDX, num_experts=EXPERTS), "mode.expert_dispatch")
    ],
    "expert_combine": [Call(lambda b: b.expert_combine(X, [HANDLE, []]), "mode.expert_combine")],
    "low_latency_dispatch": [
        Call(lambda b: b.low_latency_dispatch(X, IDX, TOKENS, EXPERTS), "low_latency.dispatch"),
        Call(_hook, "hook"),
    ],
    "low_latency_combine": [
        Call(
            lambda b: b.low_latency_combine(X, IDX, WEIGHTS, LOW_LATENCY_HANDLE),
            "low_latency.combine",
        )
    ],
    "get_next_low_latency_combine_buffer": [
        Call(
            lambda b: b.get_next_low_latency_combine_buffer(LOW_LATENCY_HANDLE),
            "low_latency.send_buffer",
        )
    ],
    "clean_low_latency_buffer": [
        Call(lambda b: b.clean_low_latency_buffer(TOKENS, HIDDEN, EXPERTS), "low_latency.clean")
    ],
    "low_latency_update_mask_buffer": [
        Call(lambda b: b.low_latency_update_mask_buffer(1, True), "mask.fill_")
    ],
    "low_latency_query_mask_buffer": [
        Call(lambda b: b.low_latency_query_mask_buffer(mock.Mock()), "")
    ],
    "low_latency_clean_mask_buffer": [
        Call(lambda b: b.low_latency_clean_mask_buffer(), "mask.zero_")
    ],
    "low_latency_warmup": [
        Call(
            lambda b: b.low_latency_warmup(TOKENS, HIDDEN, EXPERTS, num_topk=TOPK),
            "low_latency.warmup",
        )
    ],
    "warmup": [Call(lambda b: b.warmup(2 * HIDDEN), "mode.warmup")],
    "reset": [
        Call(lambda b: b.reset(), "mode.reset"),
        Call(lambda b: b.reset(), "low_latency.reset"),
    ],
    "destroy": [
        Call(lambda b: b.destroy(), "synchronize"),
        Call(lambda b: b.destroy(), "resources.close"),
        Call(_finalize, "resources.close"),
        Call(_finalize, "is_current_stream_capturing"),
    ],
    "get_local_buffer_tensor": [
        Call(lambda b: b.get_local_buffer_tensor(torch.uint8, torch.Size((0,))), "memory.tensor")
    ],
}
# The host's memory and numbers, and what has no Buffer.
ELSEWHERE = {
    "check_fault",
    "get_comm_stream",
    "capture",
    "get_combine_config",
    "get_dispatch_config",
    "get_low_latency_rdma_size_hint",
    "is_sm90_compiled",
    "set_num_sms",
    "internode_dispatch",  # dispatch
    "internode_combine",  # combine
}


def test_every_method_is_looked_at() -> None:
    """A new one is to be added to the calls here, or to those that need no GPU."""
    methods = {
        name
        for name, member in inspect.getmembers(Buffer)
        if callable(member) and not name.startswith("_")
    }
    assert methods == set(CALLS) | ELSEWHERE
    assert not set(CALLS) & ELSEWHERE


@pytest.mark.parametrize("thread_has", [0, OURS, None])
@pytest.mark.parametrize(
    ("name", "at"), [(name, i) for name in CALLS for i in range(len(CALLS[name]))]
)
def test_the_buffers_gpu_is_current_in_every_call(
    world: World, name: str, at: int, thread_has: int | None
) -> None:
    """Whichever the calling thread had, and has again afterwards; None is a fresh thread on 0."""
    errors: list[BaseException] = []

    def body() -> None:
        world.gpus.torch_device, world.gpus.context = thread_has or 0, thread_has
        try:
            CALLS[name][at].call(world.buffer)
            assert (world.gpus.torch_device, world.gpus.context) == (thread_has or 0, thread_has)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    asks = CALLS[name][at].asks
    assert not asks or asks in world.asked, world.asked


INTERRUPTED: dict[str, tuple[str, str, Callable[[Buffer], object]]] = {
    "layout": ("_mode", "layout", lambda b: b.get_dispatch_layout(IDX, EXPERTS, async_finish=True)),
    "dispatch": ("_mode", "dispatch", lambda b: b.dispatch(X, **LAYOUT, async_finish=True)),
    "cached": ("_mode", "dispatch", lambda b: b.dispatch(X, HANDLE, async_finish=True)),
    "combine": ("_mode", "combine", lambda b: b.combine(X, HANDLE, async_finish=True)),
    "expert_dispatch": (
        "_mode",
        "expert_dispatch",
        lambda b: b.expert_dispatch(X, IDX, num_experts=EXPERTS, async_finish=True),
    ),
    "expert_combine": (
        "_mode",
        "expert_combine",
        lambda b: b.expert_combine(X, [HANDLE, []], async_finish=True),
    ),
    "low_latency_dispatch": (
        "_low_latency",
        "dispatch",
        lambda b: b.low_latency_dispatch(X, IDX, TOKENS, EXPERTS, async_finish=True),
    ),
    "low_latency_combine": (
        "_low_latency",
        "combine",
        lambda b: b.low_latency_combine(X, IDX, WEIGHTS, LOW_LATENCY_HANDLE, async_finish=True),
    ),
}


@pytest.mark.parametrize("op", INTERRUPTED)
def test_an_interrupted_call_lets_the_current_stream_wait(world: World, op: str) -> None:
    """For what it has queued, whose tensors nobody keeps; then the next one can come."""
    part, name, call = INTERRUPTED[op]
    buffer: Any = world.buffer
    world.gpus.torch_device = world.gpus.context = OURS

    def interrupted(scope: Any, *args: object, **kwargs: object) -> None:
        scope.start()
        raise KeyboardInterrupt

    setattr(getattr(buffer, part), name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(buffer)
    assert world.comm.make_wait.call_args_list == [mock.call(7 + OURS)]
    thread = threading.Thread(target=lambda: buffer._entered().__enter__())
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_fresh_thread_of_gpu_0_has_no_context(world: World) -> None:
    """torch says that the GPU is current, but the driver refuses what names no stream."""
    turns = Turns(0)
    assert world.gpus.torch_device == 0
    assert turns() is turns._lock
    assert world.gpus.context == 0


def test_a_thread_is_bound_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def call(*args: object) -> int:
        calls.append(args)
        return 0

    monkeypatch.setattr(driver, "_thread", driver._Thread())
    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(driver, "primary_context", lambda device: f"context {device}")
    driver.bind(2)
    driver.bind(2)
    assert calls == [("cuCtxGetCurrent",), ("cuCtxSetCurrent", "context 2")]


def test_one_call_at_a_time_and_a_thread_may_come_twice() -> None:
    turns, inside = Turns(None), threading.Event()
    with turns(), turns():
        thread = threading.Thread(target=lambda: turns().__enter__() and inside.set())
        thread.start()
        assert not inside.wait(0.1)
    thread.join()
    assert inside.is_set()
