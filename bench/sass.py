"""Machine code of every kernel: written to a file, and two such files compared.

    python bench/sass.py write before.txt      # all that tests/cpu/test_compile.py compiles
    python bench/sass.py compare before.txt after.txt

No GPU is needed. Kernels are compiled without line information, over the loopback body. A line a
kernel: hash of its code, the same without the offsets of constants (parameters lie in a constant
bank, so a struct in another order changes these alone), registers, bytes of stack, bytes spilled,
the config.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import re
import struct
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from epjit.runtime import kernel, nvrtc, sources  # noqa: E402
from epjit.runtime.nvjitlink import _ELF_HEADER, _SECTION  # noqa: E402
from tests.cpu.test_compile import configs  # noqa: E402

_INSTRUCTION_BYTES = 16
_CONSTANT_FORMS = (3, 5)  # bits 9 to 11 of an instruction: an operand is c[bank][offset]
_OFFSET_BITS = 0xFFFF << 38  # of its lower half


class Code(NamedTuple):
    """Code of one kernel."""

    whole: str
    without_offsets: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def code_sections(cubin: bytes) -> bytes:
    """Contents of the sections .text.* of a cubin, one behind the other."""
    at, entry_bytes, num_sections, names = _ELF_HEADER.unpack_from(cubin)
    sections = [_SECTION.unpack_from(cubin, at + i * entry_bytes) for i in range(num_sections)]
    start = sections[names][1]
    return b"".join(
        cubin[offset : offset + size]
        for name, offset, size in sections
        if cubin.startswith(b".text.", start + name)
    )


def without_offsets(code: bytes) -> bytes:
    """The same with 0 as the offset of each constant (sm_70 and newer)."""
    masked = bytearray(code)
    for at in range(0, len(code), _INSTRUCTION_BYTES):
        (lower,) = struct.unpack_from("<Q", code, at)
        if (lower >> 9) % 8 in _CONSTANT_FORMS:
            struct.pack_into("<Q", masked, at, lower & ~_OFFSET_BITS)
    return bytes(masked)


def compile_one(item: tuple[kernel.KernelConfig, str]) -> Code:
    """Compiles one kernel."""
    config, arch = item
    options = nvrtc.options
    nvrtc.options = lambda arch, *, linked=False: [  # type: ignore[assignment]
        option for option in options(arch, linked=linked) if option != "-lineinfo"
    ]
    try:
        cubin, _, log = nvrtc.compile_unit(
            kernel.render(config, "loopback"),
            "unit.cu",
            arch=arch,
            headers=sources.closure(*kernel.unit_sources(config, "loopback")),
            name_expression=config.kernel_name,
        )
    finally:
        nvrtc.options = options
    code = code_sections(cubin)
    registers, spill_bytes = nvrtc.usage(log)
    stack = max(map(int, re.findall(r"(\d+) bytes stack frame", log)), default=0)
    whole, masked = (
        hashlib.sha256(part).hexdigest()[:16] for part in (code, without_offsets(code))
    )
    return Code(whole, masked, registers, stack, spill_bytes)


def write(path: Path, arch: str, only: str) -> None:
    """Compiles all kernels whose config matches `only`, in two processes."""
    chosen = [config for config in configs(arch) if re.search(only, repr(config))]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        codes = pool.map(compile_one, [(config, arch) for config in chosen], chunksize=1)
    lines = {
        f"{config!r}": " ".join(map(str, code)) for config, code in zip(chosen, codes, strict=True)
    }
    path.write_text("".join(f"{lines[name]} {name}\n" for name in sorted(lines)))


def read(path: Path) -> dict[str, Code]:
    """Reads what `write` wrote: config to code."""
    found = {}
    for line in path.read_text().splitlines():
        whole, masked, registers, stack, spill, name = line.split(" ", 5)
        found[name] = Code(whole, masked, int(registers), int(stack), int(spill))
    return found


def compare(before: Path, after: Path) -> None:
    """Prints what differs, then how many kernels of each class are same, moved, changed."""
    old, new = read(before), read(after)
    counts: dict[tuple[str, str], int] = {}
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            verdict = "new" if a is None else "gone"
        elif a.whole == b.whole:
            verdict = "same"
        else:
            verdict = "offsets only" if a.without_offsets == b.without_offsets else "changed"
        kernel = name.partition("(")[0].removesuffix("Config")
        counts[kernel, verdict] = counts.get((kernel, verdict), 0) + 1
        if a and b and (verdict == "changed" or a[2:] != b[2:]):
            print(
                f"{verdict}: registers {a.registers} -> {b.registers}, stack {a.stack_bytes} -> "
                f"{b.stack_bytes}, spilled {a.spill_bytes} -> {b.spill_bytes}: {name}"
            )
        elif verdict in ("new", "gone"):
            print(f"{verdict}: {name}")
    for (kernel, verdict), count in sorted(counts.items()):
        print(f"{kernel:24} {verdict:12} {count:4}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write")
    writer.add_argument("path", type=Path)
    writer.add_argument("--arch", default="sm_90a")
    writer.add_argument("--only", default="", help="a regular expression, of configs")
    comparer = commands.add_parser("compare")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments.path, arguments.arch, arguments.only)
    else:
        compare(arguments.before, arguments.after)


if __name__ == "__main__":
    main()
