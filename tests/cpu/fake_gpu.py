"""A GPU that only counts: what of it is in use, and a failure at any step that touches it.

Ranks of one process, alone or as threads; kernels are not compiled, and launch nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from epjit.runtime import driver, kernel, launch, symmetric
from epjit.runtime import stream as streams
from epjit.runtime.symmetric import SymmetricMemory

_FREES = {
    "cuMemAlloc": "cuMemFree",
    "cuMemHostAlloc": "cuMemFreeHost",
    "cuStreamCreate": "cuStreamDestroy",
    "cuEventCreate": "cuEventDestroy",
    "cuIpcOpenMemHandle": "cuIpcCloseMemHandle",
    "cuMemCreate": "cuMemRelease",
    "cuMemImportFromShareableHandle": "cuMemRelease",
    "cuMemAddressReserve": "cuMemAddressFree",
    "cuMemMap": "cuMemUnmap",
}


class _Module:
    ptr = 1

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def load(self, cubin: bytes) -> None:
        self._gpu.step("load")

    def get_function(self, symbol: str) -> _Module:
        return self


class _Driver:
    """The driver's module: other functions work and do nothing, types and enums are mocks."""

    def __init__(self, **others: Any) -> None:
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        found = mock.MagicMock(name=name) if name.startswith("CU") else lambda *_: (0,)
        setattr(self, name, found)
        return found


class FakeGpu:
    """Stands in for the driver, CuPy's modules and the compiler.

    Attributes:
        in_use: All that was made and not freed: the function that frees it, its address or handle.
        modules: Loaded modules that are alive.
        fails_at: Number of the step that fails; None: none does.
        failed: Name of the step that failed.
        num_steps: How many there were.
        calls: Names of the driver's functions, in order.
        on_launch: Called at each launch.
    """

    def __init__(self) -> None:
        self.in_use: set[tuple[str, int]] = set()
        self.modules: weakref.WeakSet[Any] = weakref.WeakSet()
        self.fails_at: int | None = None
        self.failed = ""
        self.num_steps = 0
        self.calls: list[str] = []
        self._handles = itertools.count(0x1000, 0x1000)
        self._host: dict[int, Any] = {}
        self.on_launch: Callable[[], object] = lambda: None
        handle = ctypes.create_string_buffer(64)
        self._cuda = _Driver(
            cuLaunchKernelEx=lambda *_: self._launch(),
            cuStreamIsCapturing=lambda stream: (0, 0),
            CUipcMemHandle=lambda: SimpleNamespace(getPtr=lambda: ctypes.addressof(handle)),
            cuEventDestroy=lambda handle: self.call("cuEventDestroy", handle),
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2),
        )

    def _launch(self) -> tuple[int]:
        self.on_launch()
        return (0,)

    def step(self, what: str) -> None:
        """One that may fail."""
        self.num_steps += 1
        if self.num_steps == self.fails_at:
            self.failed = what
            raise RuntimeError(what)

    def load(self) -> Any:
        """The driver module."""
        return self._cuda

    def call(self, name: str, *args: Any) -> Any:
        """A function of the driver. What frees does not fail."""
        self.calls.append(name)
        if name in _FREES.values():
            self.in_use.remove((name, int(args[0])))
            return None
        self.step(name)
        if name == "cuMemHostAlloc":
            memory = ctypes.create_string_buffer(args[0])
            address = ctypes.addressof(memory)
            self._host[address] = memory
            self.in_use.add((_FREES[name], address))
            return address
        if name in _FREES:
            handle = args[0] if name == "cuMemMap" else next(self._handles)
            self.in_use.add((_FREES[name], handle))
            return handle
        if name == "cuIpcGetMemHandle":
            return SimpleNamespace(getPtr=lambda: next(iter(self._host)))
        if name == "cuMemHostGetDevicePointer":
            return args[0]
        if name == "cuMemExportToShareableHandle":
            return SimpleNamespace(data=bytes(64))
        if name in ("cuMemGetAllocationGranularity", "cuCtxGetCurrent"):
            return 1 << 21
        if name == "cuDeviceGetUuid":
            return SimpleNamespace(bytes=bytes(16))
        if name == "cuDeviceGetCount":
            return 1
        if name == "cuDeviceGetAttribute":
            capability = {"MAJOR": 9, "MINOR": 0}
            return capability.get(str(args[0]).rpartition("CAPABILITY_")[2][:5], 1 << 18)
        return 0

    def compile(self, config: Any, **_: Any) -> kernel.Compiled:
        """An entry, as the compiler gives it."""
        self.step(f"compile {config.op}")
        return kernel.Compiled(b"", "kernel", "", 32, 0, False)

    def module(self) -> Any:
        """A module of CuPy."""
        module = _Module(self)
        self.modules.add(module)
        return module


class Twin:
    """The communicator of a rank whose peers say the same, each in a process of its own.

    Each gather is a step that may fail.
    """

    def __init__(self, gpu: FakeGpu, size: int = 2) -> None:
        self._gpu, self._size = gpu, size

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return self._size

    def allgather(self, obj: Any) -> list[Any]:
        self._gpu.step("allgather")
        is_memory = isinstance(obj, symmetric._Region) and not obj.error
        peers = range(1, self._size)
        return [obj, *(obj._replace(process=f"of {n}") if is_memory else obj for n in peers)]


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Lets Buffers be made on a `FakeGpu`; torch's tensors lie on the CPU."""
    gpu = FakeGpu()

    def on_cpu(make: Any, what: str) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            if torch.device(options.get("device", "cpu")).type == "cuda":
                gpu.step(what)
                options["device"] = "cpu"
            return make(*args, **options)

        return wrapped

    def synchronize(*_: object) -> None:
        gpu.step("synchronize")

    monkeypatch.setattr(driver, "load", gpu.load)
    monkeypatch.setattr(driver, "call", gpu.call)
    monkeypatch.setattr(driver, "using", lambda device: nullcontext())
    of_events = dict.fromkeys(("eventRecord", "streamWaitEvent"), lambda *_: None)
    monkeypatch.setattr(streams, "_runtime", lambda: SimpleNamespace(**of_events))
    monkeypatch.setattr(driver, "primary_context", lambda device: 1)
    monkeypatch.setattr(kernel, "compile_kernel", gpu.compile)
    monkeypatch.setattr(kernel, "can_start_early", lambda *_, **__: False)
    monkeypatch.setattr(launch, "_launch_shape", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(kernel, "require", lambda *_, **__: SimpleNamespace(Module=gpu.module))
    stream = SimpleNamespace(cuda_stream=7, device_index=0)
    monkeypatch.setattr(streams, "high_priority_stream", lambda device: stream)
    monkeypatch.setattr(
        SymmetricMemory,
        "tensor",
        lambda memory, dtype: torch.zeros(memory.nbytes, dtype=torch.uint8).view(dtype),
    )
    monkeypatch.setattr(torch, "zeros", on_cpu(torch.zeros, "zeros"))
    monkeypatch.setattr(torch, "tensor", on_cpu(torch.tensor, "tensor"))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 5, raising=False)
    for module in ("epjit.scope", "epjit.event"):
        monkeypatch.setattr(f"{module}.is_current", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("epjit.modes.base.empty_on", mock.MagicMock())
    monkeypatch.setenv("EPJIT_BACKEND", "cuda")
    yield gpu
