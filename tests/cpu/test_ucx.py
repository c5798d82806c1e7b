"""Foundations of tests/dist/test_ucx.py, as far as they can be tried without GPU and NVSHMEM."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from tests.transport import ucx
from tests.transport.ucx import bundle


def test_stand_in_maps_memory_to_itself(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the stand-in")
    library = tmp_path / "libgdrapi.so.2"
    bundle.compile_gdrapi(library)
    gdr = ctypes.CDLL(str(library))
    others = ("open", "close", "driver_get_version", "runtime_get_version", "unmap", "unpin_buffer")
    assert all(hasattr(gdr, f"gdr_{name}") for name in others)  # NVSHMEM wants all of them
    memory = ctypes.create_string_buffer(b"01234567")
    address = ctypes.c_uint64(ctypes.addressof(memory))
    handle, mapped, info = ctypes.c_uint64(), ctypes.c_uint64(), (ctypes.c_uint64 * 8)()
    assert gdr.gdr_pin_buffer(None, address, ctypes.c_size_t(8), None, 0, ctypes.byref(handle)) == 0
    assert gdr.gdr_map(None, handle, ctypes.byref(mapped), ctypes.c_size_t(8)) == 0
    assert gdr.gdr_get_info(None, handle, info) == 0
    assert (mapped.value, info[0]) == (address.value, address.value)
    assert gdr.gdr_copy_to_mapping(handle, mapped, b"abcd", ctypes.c_size_t(4)) == 0
    assert memory.value == b"abcd4567"
    assert gdr.gdr_copy_from_mapping(handle, memory, b"xy", ctypes.c_size_t(2)) == 0
    assert memory.value == b"xycd4567"


def test_code_of_one_architecture_stays() -> None:
    def entry(sm: int, code: bytes) -> bytes:
        words = (2, 64, len(code), 0, 0, 0, 0, sm)  # 4 bytes each: kind, own size, size (8), ...
        return b"".join(word.to_bytes(4, "little") for word in words).ljust(64, b"-") + code

    def binary(*entries: bytes) -> bytes:
        body = b"".join(entries)
        header = bytes.fromhex("50ed55ba01001000") + len(body).to_bytes(8, "little")
        return b"other" + header + body + b"bytes"

    data = bytearray(binary(entry(80, b"a" * 24), entry(90, b"b" * 8)) * 2)
    bundle.slim(data, 90)
    assert data == binary(entry(80, bytes(24)), entry(90, b"b" * 8)) * 2


def test_why_there_are_no_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "`python -m tests.transport.ucx.bundle FOLDER` makes one"
    monkeypatch.delenv("EPJIT_TEST_UCX", raising=False)
    assert ucx.why_not().endswith(remedy)
    monkeypatch.setenv("EPJIT_TEST_UCX", str(tmp_path))
    assert f"EPJIT_TEST_UCX={tmp_path} names no folder with ucx.tar.xz" in ucx.why_not()
    (tmp_path / ucx.ARCHIVE).touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ucx.why_not() == "there is no `unshare`; install util-linux"
    unshare = tmp_path / "unshare"
    unshare.write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2; exit 1")
    unshare.chmod(0o755)
    assert ucx.why_not() == ("needs root (CAP_SYS_ADMIN): unshare failed: Operation not permitted")
    unshare.write_text("#!/bin/sh\nexit 0")
    assert ucx.why_not() == ""
