"""Naps between two looks at host memory."""

from __future__ import annotations

import ctypes
import threading

from epjit.runtime.host import nap

_PR_GET_TIMERSLACK = 30  # linux/prctl.h


def test_a_thread_that_naps_is_woken_in_time() -> None:
    """Without that a sleep of 10 us takes 65, and the GPU waits for the rest."""
    slacks = []

    def body() -> None:
        for _ in range(2):
            nap()
            slacks.append(ctypes.CDLL(None).prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert slacks == [1, 1]
