"""NVRTC: CUDA C++ text to a cubin, in this process and without a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from epjit.errors import CompileError, missing_package, require


def options(arch: str) -> list[str]:
    """Compiler options for one architecture, such as ``"sm_90a"``."""
    return [
        "-std=c++20",
        f"-arch={arch}",
        "-default-device",
        "--ptxas-options=-v",
        "-lineinfo",
    ]


def version() -> tuple[int, int]:
    """Version (major, minor) of the NVRTC that is loaded.

    Raises:
        ImportError: cuda-bindings or the NVRTC library is not installed.
    """
    major, minor = _check(_nvrtc().nvrtcVersion())
    return int(major), int(minor)


def compile_cubin(
    source_text: str,
    name: str,
    *,
    arch: str,
    headers: Mapping[str, str],
    name_expression: str,
) -> tuple[bytes, str, str]:
    """Compiles one unit.

    Args:
        source_text: The unit.
        name: File name of the unit in messages and line information.
        arch: Architecture, such as ``"sm_90a"``.
        headers: What `#include "..."` finds: name to text. There is no include path beside it.
        name_expression: The kernel, as C++ names it.

    Returns:
        The cubin, the kernel's symbol in it, and the compiler's log (which has the registers and
        the spills of each kernel).

    Raises:
        CompileError: The compiler refused; the message holds its log.
        ImportError: cuda-bindings or the NVRTC library is not installed.
    """
    nvrtc = _nvrtc()
    arguments = [option.encode() for option in options(arch)]
    program = _check(
        nvrtc.nvrtcCreateProgram(
            source_text.encode(),
            name.encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [header.encode() for header in headers],
        )
    )
    try:
        _check(nvrtc.nvrtcAddNameExpression(program, name_expression.encode()))
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        buffer = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, buffer))
        log = buffer.rstrip(b"\0 \n").decode(errors="replace")
        if int(status):
            raise CompileError(
                f"NVRTC {'.'.join(map(str, version()))} cannot compile {name} for {arch} "
                f"({status.name}):\n{log}",
                log=log,
            )
        cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
        symbol = _check(nvrtc.nvrtcGetLoweredName(program, name_expression.encode())).decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin, symbol, log


def usage(log: str) -> tuple[int, int]:
    """Reads what ptxas reports.

    Args:
        log: Log of a compilation.

    Returns:
        Registers of a thread, and bytes spilled (stores and loads); the most of any kernel.
    """
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return max(registers, default=0), max((int(s) + int(loads) for s, loads in spills), default=0)


def _nvrtc() -> Any:
    nvrtc = require("cuda.bindings.nvrtc", package="cuda-bindings")
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # the loader's classes differ between cuda-bindings 12 and 13
        raise missing_package(
            "nvidia-cuda-nvrtc (CUDA 12: nvidia-cuda-nvrtc-cu12)", reason=str(error)
        ) from error
    return nvrtc


def _check(result: tuple[Any, ...]) -> Any:
    if int(result[0]):
        raise CompileError(f"NVRTC reports {result[0].name}")
    return result[1] if len(result) == 2 else result[1:]
