"""Launches on the fake driver of fake_cuda.c, in the process that test_launch.py starts."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from epjit.runtime import sources
from epjit.runtime.launch import Launch
from epjit.runtime.params import params_type


class LastLaunch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("grid", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("starts_early", ctypes.c_uint32),
        ("record", ctypes.c_uint8 * 4096),
    )


def raises(kind: type[Exception], *words: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def main(root: Path) -> None:
    sources.ROOT = root
    params = params_type("toy/scale.cu", "ScaleParams")
    fake = ctypes.CDLL("libcuda.so.1")
    last = LastLaunch.in_dll(fake, "fake_last")
    next_status = ctypes.c_uint32.in_dll(fake, "fake_next_status")
    ctypes.c_uint32.in_dll(fake, "fake_record_bytes").value = ctypes.sizeof(params)
    config = SimpleNamespace(op="scale", threads=64, shared_bytes=512)
    kernel: Any = SimpleNamespace(
        config=config, params=params, function=0x1234, device=3, starts_early=False
    )

    raises(TypeError, "['y']", "factor", call=lambda: Launch(kernel, y=1))
    raises(ValueError, "peers", call=lambda: Launch(kernel, peers=[1, 2]))
    launch = Launch(kernel, peers=[2**63 + i for i in range(4)], factor=1.5, wide=True)
    raises(TypeError, "never given ['num', 'x']", call=lambda: launch(7, 2, stamp=-5))
    raises(TypeError, "['typo']", call=lambda: launch(7, 2, typo=1))
    raises(ValueError, "num=2147483648", call=lambda: launch(7, 2, x=0, num=2**31))
    raises(TypeError, "num='a'", call=lambda: launch(7, 2, x=0, num="a"))
    assert last.count == 0
    launch(7, 2, x=2**64 - 1, num=-3, stamp=-5)
    seen = params.from_buffer_copy(last.record)
    assert (last.function, last.stream, last.grid) == (0x1234, 7, 2)
    assert (last.block, last.shared_bytes, last.starts_early) == (64, 512, 0)
    assert (seen.x, seen.num, seen.stamp, seen.factor, seen.wide) == (2**64 - 1, -3, -5, 1.5, True)
    assert list(seen.peers) == [2**63 + i for i in range(4)]
    launch(8, 1, num=4)  # the others keep their values
    seen = params.from_buffer_copy(last.record)
    assert (last.count, last.stream, seen.num, seen.x) == (2, 8, 4, 2**64 - 1)

    other = Launch(kernel, peers=[2**63 + i for i in range(4)], factor=1.5)
    raises(TypeError, "never given ['num', 'stamp', 'wide', 'x']", call=lambda: other.start(7, 2))
    for missing in ({}, {"num": 1, "stamp": 2, "wide": True}, {"typo": 1}):
        raises(TypeError, "scale() ", call=lambda given=missing: other.set(**given))
    given = {"x": 2**64 - 1, "num": -3, "stamp": -5, "wide": True}
    raises(ValueError, "scale: num=2147483648", call=lambda: other.set(**{**given, "num": 2**31}))
    raises(TypeError, "scale: num='a'", call=lambda: other.set(**{**given, "num": "a"}))
    assert last.count == 2
    other.set(**given)
    other.start(7, 2)
    seen = params.from_buffer_copy(last.record)
    assert (seen.x, seen.num, seen.stamp, seen.factor, seen.wide) == (2**64 - 1, -3, -5, 1.5, True)
    assert list(seen.peers) == [2**63 + i for i in range(4)]
    last.count = 2
    # This thread has no context, or one of another GPU: the fake is content once one is pushed.
    for count, status in ((3, 201), (4, 400)):
        next_status.value = status
        launch(8, 1, num=5)
        assert last.count == count
    next_status.value = 1
    raises(RuntimeError, "CUDA_ERROR_INVALID_VALUE", "9 blocks of 64", call=lambda: launch(8, 9))
    next_status.value = 0
    kernel.starts_early = True
    Launch(kernel, **dict.fromkeys(("x", "num", "stamp"), 1), peers=[0] * 4, factor=1, wide=0)(9, 5)
    assert (last.stream, last.grid, last.block, last.starts_early) == (9, 5, 64, 1)

    rounds = 20000
    start = time.perf_counter()
    for _ in range(rounds):
        launch(7, 2, x=1, num=2, stamp=3)
    print(f"{(time.perf_counter() - start) / rounds * 1e6:.2f} us a launch with 3 fields")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
