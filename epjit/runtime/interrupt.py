"""Waits of the host that Ctrl-C ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def interruptible(function: Callable[[], T], *, seconds: float | None = None) -> T:
    """Runs a function that blocks outside Python in a thread, so that Ctrl-C comes through at once.

    After an interrupt, or when the time is over, the function goes on in its thread, which nobody
    waits for. What belongs to the caller's thread does not hold there: the current device, and
    every mode of torch.

    Args:
        function: To be run.
        seconds: How long to wait for it; None is for ever.

    Returns:
        What the function returns; what it raises is raised here.

    Raises:
        TimeoutError: The time is over.
    """
    result: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    try:
        threading.Thread(target=run, name="epjit wait", daemon=True).start()
    except RuntimeError:  # the interpreter ends, or there are too many
        run()
    try:
        return result.result(seconds)
    except futures.TimeoutError:  # before Python 3.11 not the TimeoutError of the language
        if result.done():
            raise
        raise TimeoutError(f"not done within {seconds:g} s") from None


def synchronize(device: torch.device) -> None:
    """Waits until all that is queued on a GPU has run, which may wait for a peer until its timeout.

    Not for destructors: they run anywhere, where the start of a thread could wait for itself.
    """
    from torch import cuda

    interruptible(lambda: cuda.synchronize(device))
