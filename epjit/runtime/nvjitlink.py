"""nvJitLink: LTO-IR and libraries to one cubin, in this process and without a GPU."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epjit.errors import CompileError, missing_package, require

_PACKAGE = "nvidia-nvjitlink (CUDA 12: nvidia-nvjitlink-cu12)"


def version() -> tuple[int, int]:
    """Version (major, minor) of the nvJitLink that is loaded.

    Raises:
        ImportError: cuda-bindings or the nvJitLink library is not installed.
    """
    major, minor = _nvjitlink().version()
    return int(major), int(minor)


def link(
    ltoirs: Mapping[str, bytes], *, arch: str, what: str, libraries: Sequence[Path] = ()
) -> tuple[bytes, str]:
    """Links LTO-IR and generates code for all of it at once.

    Args:
        ltoirs: Name to LTO-IR.
        arch: Architecture, such as ``"sm_90a"``; that of the LTO-IR.
        what: The result in words, for messages.
        libraries: Archives of device code that complete it.

    Returns:
        The cubin and the linker's log, which has what ptxas reports.

    Raises:
        CompileError: The linker refused; the message holds its log.
        ImportError: cuda-bindings or the nvJitLink library is not installed.
    """
    nvjitlink = _nvjitlink()
    options = [f"-arch={arch}", "-lto", "-lineinfo", "-Xptxas=-v"]
    handle = nvjitlink.create(len(options), options)
    try:
        for name, code in ltoirs.items():
            nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, code, len(code), name)
        for library in libraries:
            nvjitlink.add_file(handle, nvjitlink.InputType.LIBRARY, str(library))
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        return bytes(cubin), _log(nvjitlink, handle, "info")
    except nvjitlink.nvJitLinkError as error:
        log = _log(nvjitlink, handle, "error")
        raise CompileError(
            f"nvJitLink {'.'.join(map(str, version()))} cannot link {what} for {arch} ({error}; "
            f"CUDA 12 writes more to stderr):\n{log}",
            log=log,
        ) from None
    finally:
        nvjitlink.destroy(handle)


def _log(nvjitlink: Any, handle: int, kind: str) -> str:
    buffer = bytearray(max(1, getattr(nvjitlink, f"get_{kind}_log_size")(handle)))
    getattr(nvjitlink, f"get_{kind}_log")(handle, buffer)
    return buffer.rstrip(b"\0 \n").decode(errors="replace")


def _nvjitlink() -> Any:
    nvjitlink = require("cuda.bindings.nvjitlink", package="cuda-bindings")
    try:
        nvjitlink.version()
    except Exception as error:  # the loader's classes differ between cuda-bindings 12 and 13
        raise missing_package(_PACKAGE, reason=str(error), extra="cu*-rdma") from error
    return nvjitlink


# ---- what a linked cubin says -------------------------------------------------------------------

_ELF_HEADER = struct.Struct("<40xQ10xHHH")  # e_shoff, e_shentsize, e_shnum, e_shstrndx
_SECTION = struct.Struct("<I20xQQ")  # sh_name, sh_offset, sh_size
_SYMBOL_BYTES = 24
_ATTRIBUTE = struct.Struct("<BBH")  # of .nv.info: format, attribute, size or value
_SIZED = 4  # format: a value of `size` bytes follows
_REGISTERS = 0x2F  # attribute: index of a symbol, its registers


def registers(cubin: bytes, symbol: str) -> int:
    """Registers of a thread of one kernel, from the cubin itself; 0 when it does not say.

    For kernels that call functions of a library: ptxas does not know their registers yet, so its
    report has none.
    """
    at, entry_bytes, num_sections, names = _ELF_HEADER.unpack_from(cubin)
    sections = [_SECTION.unpack_from(cubin, at + i * entry_bytes) for i in range(num_sections)]

    def text(start: int) -> str:
        return cubin[start : cubin.index(b"\0", start)].decode()

    by_name = {text(sections[names][1] + name): (start, size) for name, start, size in sections}
    if not {".nv.info", ".symtab", ".strtab"} <= by_name.keys():
        return 0
    position, size = by_name[".nv.info"]
    end = position + size
    while position < end:
        kind, attribute, value_bytes = _ATTRIBUTE.unpack_from(cubin, position)
        position += _ATTRIBUTE.size
        if kind != _SIZED:
            continue
        if attribute == _REGISTERS:
            index, count = struct.unpack_from("<II", cubin, position)
            entry = by_name[".symtab"][0] + index * _SYMBOL_BYTES
            if text(by_name[".strtab"][0] + struct.unpack_from("<I", cubin, entry)[0]) == symbol:
                return int(count)
        position += value_bytes
    return 0
