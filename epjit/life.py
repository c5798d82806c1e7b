"""The life of what a Buffer has made on the GPU: who gives it back, and when that may be done."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import traceback
import warnings
import weakref
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from epjit.buffer import Buffer
    from epjit.scope import Turns


class Resources(ExitStack):
    """The parts that one Buffer has made: given back once, in reverse, each whatever others raise.

    A forked child has copies of these objects, and nothing of what they stand for: it gives nothing
    back.

    Args:
        entered: The Buffer's turns: its GPU is current meanwhile.
    """

    def __init__(self, entered: Turns) -> None:
        super().__init__()
        self._entered, self._pid = entered, os.getpid()

    def is_ours(self) -> bool:
        """Whether this process made them."""
        return os.getpid() == self._pid

    def close(self) -> None:
        """Gives everything back.

        Raises:
            RuntimeError: What the last of those that could not be given back has raised.
        """
        if self.is_ours():
            with self._entered():
                super().close()

    def abandon(self, error: BaseException) -> None:
        """Gives everything back because of an error, which is the one that the caller shall see.

        Whoever keeps the error keeps its traceback, and with it the frames that ended; what is held
        by their variables alone, such as kernels, is let go.
        """
        with contextlib.suppress(Exception):
            self.close()
        traceback.clear_frames(error.__traceback__)

    def hold(self, *objects: object) -> None:
        """Keeps objects that free what they have with their last reference."""
        self.callback(lambda *_: None, *objects)

    def leave(self) -> None:
        """Gives everything back later, for now a CUDA graph is captured."""
        _left.append(self)


_left: deque[Resources] = deque()
_buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()


def watch(buffer: Buffer) -> None:
    """Lets `is_capturing` look at the streams of a Buffer on a GPU; at exit it is freed."""
    atexit.unregister(_free_all)
    atexit.register(_free_all)  # last, so that it comes before what others have registered
    _buffers.add(buffer)


def _free_all() -> None:
    """Frees the Buffers that nobody will destroy, while the interpreter still works.

    Later, in their destructors, it does not: torch 2.11 aborts the process where a tensor of a GPU
    goes in Python code that runs then. Where an exception has ended the program, peers that may
    not come are not waited for.
    """
    ended_by = getattr(sys, "last_type", None)
    for buffer in list(_buffers):
        if buffer.explicitly_destroy or not buffer._resources.is_ours():
            continue
        if ended_by is None:
            buffer.__del__()
        else:
            buffer.__exit__(ended_by)


def is_capturing() -> bool:
    """Whether memory must not be freed now: that would break the capture of a CUDA graph.

    Looked at are the current stream of this thread, and those on which any Buffer was called last,
    from whatever thread.
    """
    return torch.cuda.is_initialized() and (
        torch.cuda.is_current_stream_capturing()
        or any(buffer._is_captured() for buffer in list(_buffers))
    )


def give_back_left() -> None:
    """Gives back what destructors have left during a capture, unless there is one now."""
    while _left and not is_capturing():
        with contextlib.suppress(IndexError):  # another thread was faster
            resources = _left.popleft()
            try:
                resources.close()
            except Exception as error:  # of a Buffer that is gone: nobody else could be told
                warnings.warn(f"a Buffer could not be freed: {error}", RuntimeWarning, stacklevel=2)


def is_ending() -> bool:
    """Whether the caller, a destructor, runs because of an error, or where the main script ends.

    A process of multiprocessing lets go of the frames of its target in code of its own; at the end
    of the main script there is no code below any more.
    """
    if sys.exc_info()[0] is not None:
        return True
    below = sys._getframe(1).f_back
    return below is None or below.f_globals.get("__name__") == "multiprocessing.process"
