"""The life of what a Buffer has made on the GPU: who gives it back, and when that may be done."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
import warnings
import weakref
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, TypeVar

import torch

from epjit.checks.match import check_runs

if TYPE_CHECKING:
    from epjit.buffer_runtime import BufferRuntime
    from epjit.modes.make import AnyLowLatency, AnyNormal, AnyStreams
    from epjit.scope import Turns

B = TypeVar("B", bound="Life")


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
            RuntimeError: Raised by the last part that could not be given back.
        """
        if self.is_ours():
            with self._entered():
                super().close()

    def abandon(self, error: BaseException) -> None:
        """Gives everything back because of an error, which is the one that the caller shall see.

        Whoever keeps the error keeps its traceback, and with it the frames that ended; what is held
        by their variables alone, such as kernels, is let go.
        """
        with suppress(Exception):
            self.close()
        traceback.clear_frames(error.__traceback__)

    def leave(self) -> None:
        """Gives everything back later, for now a CUDA graph is captured."""
        _left.append(self)


_left: deque[Resources] = deque()
_buffers: weakref.WeakSet[Life] = weakref.WeakSet()


class Life:
    """The life of a Buffer: from the parts that it is made of to their end, however that comes.

    Attributes:
        explicitly_destroy: Whether `destroy` will be called; else the parts go with the object.
        runtime: V1's inner object; None until all parts are made, and from their end on.
    """

    explicitly_destroy: bool
    runtime: BufferRuntime | None
    _entered: Turns
    _resources: Resources
    _streams: AnyStreams
    _mode: AnyNormal
    _low_latency: AnyLowLatency | None

    def _check_alive(self, *, fault: bool = True) -> None:
        check_runs("a call of a Buffer")
        if self.runtime is None:
            raise RuntimeError("this Buffer is destroyed")
        if _left:
            give_back_left()
        if not fault:
            return
        self._mode.raise_fault()
        if self._low_latency is not None:
            self._low_latency.raise_fault()

    def _release(self) -> None:
        if not self._resources.is_ours():  # a forked child has a copy of the Buffer alone
            self._let_go()
            return
        with self._entered():
            if self.runtime is not None:
                self._streams.settle()
            self._let_go().close()

    def _let_go(self) -> Resources:
        """Ends the use of what was made; the caller gives it back."""
        self.runtime = self._low_latency = None
        for part in ("_mode", "_streams"):
            vars(self).pop(part, None)
        return self._resources

    def _drop(self) -> None:
        """Frees everything, if need be after the capture of a CUDA graph."""
        with self._entered():
            captures = is_capturing()  # looks at the streams, too, which go next
            resources = self._let_go()
            if captures:
                resources.leave()
            else:
                resources.close()

    def __enter__(self: B) -> B:
        """The Buffer itself, to be destroyed at the end of the block, however it was made."""
        self._check_alive()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Destroys the Buffer; after an exception, without a wait for peers that may not come."""
        if self.runtime is None:
            return
        if kind is None:
            self._release()
            return
        for mode in (vars(self).get("_mode"), self._low_latency):
            if mode is not None:
                with suppress(Exception):  # the exception of the block is the one to see
                    mode.give_up()
        with suppress(Exception):
            self._drop()

    def __del__(self) -> None:
        """Frees what is left, if need be after a graph capture; waits for no peer that is gone."""
        if getattr(self, "runtime", None) is None or not self._resources.is_ours():
            return
        if sys.is_finalizing():  # what could be freed has been, see `_free_all`
            return
        if self.explicitly_destroy:
            if not is_ending():
                warnings.warn(
                    "a Buffer with explicitly_destroy=True was never destroyed; its memory leaks",
                    RuntimeWarning,
                    stacklevel=1,
                )
            return
        try:
            self._drop()
        except Exception as error:  # nothing may leave a destructor
            warnings.warn(f"a Buffer could not be freed: {error}", RuntimeWarning, stacklevel=1)

    def _is_captured(self) -> bool:
        """Whether a graph is being captured, by any thread, on a stream that a call ran on."""
        streams = vars(self).get("_streams")
        return streams is not None and streams.is_captured()


def watch(buffer: Life) -> None:
    """Lets `is_capturing` look at the streams of a Buffer; at exit it is freed."""
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
        with suppress(IndexError):  # another thread was faster
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
