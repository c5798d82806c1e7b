"""NVRTC: CUDA C++ text to a cubin or to LTO-IR, in this process and without a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from epjit.errors import CompileError, missing_package, require


def options(arch: str, *, linked: bool = False) -> list[str]:
    """Compiler options.

    Args:
        arch: Architecture, such as ``"sm_90a"``.
        linked: For LTO-IR, which nvJitLink makes a cubin of, instead of a cubin.
    """
    return [
        "-std=c++20",
        "-default-device",
        "-lineinfo",
        *(
            [f"-arch={arch.replace('sm_', 'compute_')}", "-dlto", "-rdc=true"]
            if linked
            else [f"-arch={arch}", "--ptxas-options=-v"]
        ),
    ]


def version() -> tuple[int, int]:
    """Version (major, minor) of the NVRTC that is loaded.

    Raises:
        ImportError: cuda-bindings or the NVRTC library is not installed.
    """
    major, minor = _check(_nvrtc().nvrtcVersion())
    return int(major), int(minor)


def compile_unit(
    source_text: str,
    name: str,
    *,
    arch: str,
    headers: Mapping[str, str],
    name_expression: str = "",
    linked: bool = False,
    more_options: Sequence[str] = (),
) -> tuple[bytes, str, str]:
    """Compiles one unit.

    Args:
        source_text: The unit.
        name: File name of the unit in messages and line information.
        arch: Architecture, such as ``"sm_90a"``.
        headers: Files that `#include` finds before any include path: name to text.
        name_expression: The kernel, as C++ names it; empty when there is none.
        linked: To LTO-IR, for `nvjitlink.link`, instead of a cubin.
        more_options: Beside `options`, such as include paths.

    Returns:
        The cubin or LTO-IR, the kernel's symbol in it, and the compiler's log (which for a cubin
        has the registers and the spills of each kernel).

    Raises:
        CompileError: The compiler refused; the message holds its log.
        ImportError: cuda-bindings or the NVRTC library is not installed.
    """
    kind = "LTOIR" if linked else "CUBIN"
    nvrtc = _nvrtc()
    program = _check(
        nvrtc.nvrtcCreateProgram(
            source_text.encode(),
            name.encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [header.encode() for header in headers],
        )
    )
    symbol = ""
    try:
        if name_expression:
            _check(nvrtc.nvrtcAddNameExpression(program, name_expression.encode()))
        encoded = [each.encode() for each in (*options(arch, linked=linked), *more_options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        buffer = _buffer(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, buffer))
        log = buffer.rstrip(b"\0 \n").decode(errors="replace")
        if int(status):
            hint = "; a newer one may know this architecture" * ("--gpu-architecture" in log)
            raise CompileError(
                f"NVRTC {'.'.join(map(str, version()))} cannot compile {name} for {arch} "
                f"({status.name}{hint}):\n{log}",
                log=log,
            )
        code = _buffer(_check(getattr(nvrtc, f"nvrtcGet{kind}Size")(program)))
        _check(getattr(nvrtc, f"nvrtcGet{kind}")(program, code))
        if name_expression:
            symbol = _check(nvrtc.nvrtcGetLoweredName(program, name_expression.encode())).decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code, symbol, log


def _buffer(size: int) -> bytes:
    """Bytes for NVRTC to write to.

    Never a single one: Python shares those with all code of the process, and an empty log has one.
    """
    return bytes(max(size, 2))


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
