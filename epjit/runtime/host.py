"""Host memory that kernels write and the CPU polls."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from typing import Any

import numpy as np

from epjit.runtime import driver

_WORD_BYTES = 8
_NAP_SECONDS = 10e-6
_PR_SET_TIMERSLACK = 29  # linux/prctl.h
_thread = threading.local()


def nap() -> None:
    """Lets other threads run for some 15 us.

    Linux wakes a thread up to 50 us late unless it asks for less, so that even the shortest sleep
    takes 56 us; each thread asks once.
    """
    if not getattr(_thread, "is_prompt", False):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # ns; refused, naps are longer
        _thread.is_prompt = True
    time.sleep(_NAP_SECONDS)


def view_of(words: np.ndarray[Any, np.dtype[np.int64]]) -> memoryview:
    """Words as a memoryview; cast, for it cannot read the format that ctypes gives to memory."""
    return words.data.cast("B").cast("q")


class PinnedArray:
    """Zero-filled page-locked host memory, mapped for the device.

    The context of the device must be current (`torch.cuda.set_device`), or `device` given.

    Args:
        num_words: Number of 64-bit words.
        device: GPU whose context is used to allocate; None is the current one. All GPUs reach it.

    Attributes:
        array: The words, int64 ``[num_words]``.
        view: The same as a memoryview, which gives an int in a third of numpy's time.
        device_ptr: Address of the words for kernels.
    """

    def __init__(self, num_words: int, *, device: int | None = None) -> None:
        if device is not None:
            with driver.using(device):
                self._allocate(num_words)
        elif int(driver.call("cuCtxGetCurrent")):
            self._allocate(num_words)
        else:
            raise RuntimeError(
                "this thread has no current CUDA device: call torch.cuda.set_device, or pass device"
            )

    def _allocate(self, num_words: int) -> None:
        cuda = driver.load()
        self._host_ptr = int(
            driver.call(
                "cuMemHostAlloc",
                num_words * _WORD_BYTES,
                cuda.CU_MEMHOSTALLOC_PORTABLE | cuda.CU_MEMHOSTALLOC_DEVICEMAP,
            )
        )
        try:
            self.device_ptr = int(driver.call("cuMemHostGetDevicePointer", self._host_ptr, 0))
        except BaseException:
            with contextlib.suppress(RuntimeError):
                driver.call("cuMemFreeHost", self._host_ptr)
            raise
        words = (ctypes.c_int64 * num_words).from_address(self._host_ptr)
        self.array = np.ctypeslib.as_array(words)
        self.array[:] = 0
        self.view = view_of(self.array)

    def close(self) -> None:
        """Frees the memory; the array must not be used any more. Idempotent."""
        if self._host_ptr:
            pointer, self._host_ptr, self.device_ptr = self._host_ptr, 0, 0
            self.array = np.empty(0, np.int64)
            self.view = view_of(self.array)
            driver.call("cuMemFreeHost", pointer)
