"""The CUDA driver, through cuda-bindings: checked calls and the context of a device."""

from __future__ import annotations

import functools
import threading
from contextlib import AbstractContextManager
from typing import Any

from epjit.errors import require

_contexts: dict[int, Any] = {}
_contexts_lock = threading.RLock()  # a finalizer may come back to it


class _Thread(threading.local):
    """Facts of one thread."""

    is_bound = False


_thread = _Thread()


@functools.cache
def load() -> Any:
    """The initialised driver module.

    Raises:
        ImportError: cuda-bindings is not installed.
        RuntimeError: There is no driver, or it finds no GPU.
    """
    driver = require("cuda.bindings.driver", package="cuda-bindings")
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # the loader's classes differ between cuda-bindings 12 and 13
        raise RuntimeError(f"the CUDA driver cannot be loaded: {error}") from error
    if int(status):
        raise RuntimeError(
            f"the CUDA driver does not start (cuInit: {status.name}); is there a GPU?"
        )
    return driver


def describe(status: Any) -> str:
    """A status in words, such as ``"CUDA_ERROR_OUT_OF_MEMORY: out of memory"``."""
    _, text = load().cuGetErrorString(status)
    return f"{status.name}: {text.decode()}" if text else str(status.name)


def call(name: str, *args: Any) -> Any:
    """Calls a driver function.

    Args:
        name: Function, such as ``"cuMemAlloc"``.
        *args: Its arguments, as cuda-bindings takes them.

    Returns:
        What it returns beside the status: nothing, one value, or a tuple.

    Raises:
        RuntimeError: The status is not success; names the function, its arguments and the status.
    """
    status, *values = getattr(load(), name)(*args)
    if int(status):
        # A struct of cuda-bindings prints all of its fields, a line each.
        shown = ", ".join(
            str(arg) if isinstance(arg, int | str) else type(arg).__name__ for arg in args
        )
        raise RuntimeError(f"{name}({shown}) failed with {describe(status)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def primary_context(device: int) -> Any:
    """The context that torch and CuPy use on a device; created when it does not exist yet."""
    with _contexts_lock:
        if device not in _contexts:
            # Retained for the life of the process, as the CUDA runtime does.
            _contexts[device] = call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", device))
        return _contexts[device]


def bind(device: int) -> None:
    """Makes the context of `device` current for good in a thread that has none.

    So does the first use of a GPU, which may be a call of ours: until then the driver refuses what
    names no stream. Looked up once a thread, as calls come by here.
    """
    if not _thread.is_bound:
        if not int(call("cuCtxGetCurrent")):
            call("cuCtxSetCurrent", primary_context(device))
        _thread.is_bound = True


class _Relaxed:
    """The context manager of `relaxed`; a class, as `_Using`."""

    def __enter__(self) -> None:
        mode = load().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._before = call("cuThreadExchangeStreamCaptureMode", mode)

    def __exit__(self, *_: object) -> None:
        call("cuThreadExchangeStreamCaptureMode", self._before)


def relaxed() -> AbstractContextManager[None]:
    """Lets this thread copy and allocate while others capture CUDA graphs, and break none.

    Else the driver fails their capture, for it cannot know that the graph needs none of it.
    """
    return _Relaxed()


class _Using:
    """The context manager of `using`: a class, for a generator takes the host twice as long."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __enter__(self) -> None:
        call("cuCtxPushCurrent", self._context)

    def __exit__(self, *_: object) -> None:
        call("cuCtxPopCurrent")


def using(device: int) -> AbstractContextManager[None]:
    """Makes the primary context of `device` current in this thread, and restores what was."""
    return _Using(primary_context(device))
