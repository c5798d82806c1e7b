"""Runs the .cu files of `epjit/cuda_src` on the CPU: g++, fibers, no GPU.

`emulate([Launch(config, params, grid=2, rank=0), ...], seed=7)` compiles what is new, runs the
launches of one rank one after the other (a stream) and those of different ranks at the same time,
and raises `EmulationError` when a kernel deadlocks, traps, or misuses what the hardware would let
pass or not. Pointers in params are addresses of CPU memory. See emulate.h for what is emulated.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

HERE = Path(__file__).resolve().parent
CUDA_SRC = HERE.parents[1] / "epjit" / "cuda_src"

COMPILER = os.environ.get("CXX", "g++")
FLAGS = [
    # -g1: lines and inlined calls, which messages name, but no variables (a fifth of the time).
    *("-std=c++20", "-g1", "-fPIC", "-shared", "-DEPJIT_EMULATE"),
    *("-fvisibility-inlines-hidden", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function"),
    *("-Wno-maybe-uninitialized", "-Wno-ignored-qualifiers"),
]
# Undefined behaviour traps; the signal becomes a message. Each basic block may yield. Accesses are
# shown to emulate.cpp, which stands in for the library of the thread sanitizer.
KERNEL_FLAGS = [
    *("-O1", "-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error"),
    *("-fsanitize-coverage=trace-pc", "-fsanitize=thread", "-nodefaultlibs", "-lc"),
]

ORDERS = {"uniform": 0, "in_turn": 1, "stall": 2}
Order = Literal["auto", "uniform", "in_turn", "stall"]


class EmulationError(RuntimeError):
    """A launch went wrong; the message says which rank, block, thread and source line."""


class Config(Protocol):
    """A kernel's compile-time configuration: a dataclass of ints and bools."""

    source: Any
    op: Any
    threads: Any
    shared_bytes: Any


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel of one rank.

    Attributes:
        config: A `KernelConfig`, or anything with the same attributes.
        params: The record that the kernel gets; copied when the launch is queued.
        grid: Number of blocks.
        rank: Launches of one rank run in the order given.
        include: Folder of `config.source`; None is `epjit/cuda_src`.
    """

    config: Config
    params: ctypes.Structure
    grid: int
    rank: int = 0
    include: Path | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """Cost of a run, and the calls of transport.cuh by all its kernels.

    Attributes:
        passes: Turns of the scheduler.
        switches: Of threads.
        nanoseconds: Emulated.
        puts: Messages with bytes between domains; most bring a signal.
        put_bytes: Their bytes.
        signals: Messages that are a signal alone.
        fences: Calls of `epjit_fence`.
        quiets: Calls of `epjit_quiet`.
        received: Calls of `epjit_received`.
    """

    passes: int
    switches: int
    nanoseconds: int
    puts: int
    put_bytes: int
    signals: int
    fences: int
    quiets: int
    received: int


class _Options(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("order", ctypes.c_int32),
        ("yield_percent", ctypes.c_int32),
        ("basic_blocks", ctypes.c_uint64),
        ("max_passes", ctypes.c_uint64),
        ("nanoseconds_per_pass", ctypes.c_uint64),
        ("latest_message", ctypes.c_uint64),
        ("is_lossy", ctypes.c_int32),
        ("num_gpus", ctypes.c_int32),
        ("places", ctypes.c_int32),
        ("slow_from", ctypes.c_int32),
        ("slow_to", ctypes.c_int32),
    )


class _Report(ctypes.Structure):
    _fields_ = (
        ("passes", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
        ("nanoseconds", ctypes.c_uint64),
        ("puts", ctypes.c_uint64),
        ("put_bytes", ctypes.c_uint64),
        ("signals", ctypes.c_uint64),
        ("fences", ctypes.c_uint64),
        ("quiets", ctypes.c_uint64),
        ("received", ctypes.c_uint64),
    )


_LOCK = threading.Lock()


def emulate(
    launches: Sequence[Launch],
    *,
    seed: int = 0,
    order: Order = "auto",
    delay: Mapping[int, int] | None = None,
    max_passes: int = 20_000_000,
    nanoseconds_per_pass: int = 10,
    yield_percent: int = 20,
    basic_blocks: int = 200,
    latest_message: int = 20_000,
    is_lossy: bool = False,
    num_gpus: int = 1,
    places: int = 0,
    slow_link: tuple[int, int] | None = None,
) -> Report:
    """Runs launches until all have ended.

    Args:
        launches: Kernels; those of one rank follow each other, those of different ranks overlap.
        seed: Decides the order of threads and when bulk copies and messages complete.
        order: How threads take turns; "auto" lets the seed choose.
        delay: Rank to passes before its first launch starts. To withhold a rank, do not launch it.
        max_passes: More is an error (a wait that never ends).
        nanoseconds_per_pass: Emulated time of one turn of one warp.
        yield_percent: Chance to yield at an atomic or a release.
        basic_blocks: Mean number of basic blocks between preemptions; 0 = none.
        latest_message: Passes that a piece of what goes to another rank takes at most.
        is_lossy: A rank is given up, and nobody knows what has come to it. Else it is an error to
            write where such a piece is still read from, and to send to a word again before it has
            landed.
        num_gpus: Of `places`; rank r is a stream of GPU r % num_gpus.
        places: Blocks that one GPU has room for; 0 = any number.
        slow_link: Only what the first of these numbers of the transport sends to the second is
            slow; by default any piece may be.

    Returns:
        What the run took.

    Raises:
        EmulationError: Deadlock, wild access, undefined behaviour, misuse, too many passes.
    """
    core = _core()
    entries = [_entry(launch) for launch in launches]
    chosen = ORDERS[order] if order != "auto" else seed % len(ORDERS)
    options = _Options(
        seed,
        chosen,
        yield_percent,
        basic_blocks,
        max_passes,
        nanoseconds_per_pass,
        latest_message,
        is_lossy,
        num_gpus,
        places,
        *(slow_link or (-1, -1)),
    )
    report = _Report()
    with _LOCK:
        for launch, entry in zip(launches, entries, strict=True):
            core.emulate_launch(
                str(launch.config.op).encode(),
                launch.rank,
                launch.grid,
                launch.config.threads,
                launch.config.shared_bytes,
                entry,
                ctypes.byref(launch.params),
                ctypes.sizeof(launch.params),
            )
        for rank, passes in (delay or {}).items():
            core.emulate_delay(rank, passes)
        failed = core.emulate_run(ctypes.byref(options), ctypes.byref(report))
        message = core.emulate_message().decode()
    if failed:
        raise EmulationError(f"seed {seed}: " + _with_lines(message))
    return Report(*(getattr(report, name) for name, _ in _Report._fields_))


def prepare(launch: Launch) -> None:
    """Compiles the kernel of a launch, if it is new; several threads may do so at once."""
    _entry(launch)


def guarded(*shape: int, dtype: torch.dtype, fill: int = 0xEE) -> torch.Tensor:
    """A tensor whose end is the end of mapped memory: an access beyond it is reported.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        fill: Value of every byte, so that what a kernel leaves out is seen.
    """
    core = _core()
    count = 1
    for each in shape:
        count *= each
    nbytes = max(1, count * dtype.itemsize)
    address = core.emulate_allocate(nbytes)
    if not address:
        raise MemoryError(f"no {nbytes} bytes of guarded memory")
    array = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(array, core.emulate_free, address, nbytes)
    flat = torch.frombuffer(array, dtype=torch.uint8).fill_(fill)
    return flat[: count * dtype.itemsize].view(dtype).view(shape)


def transport(
    memories: Sequence[Sequence[torch.Tensor]], *, pes: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """Records that kernels of each rank get as `transport`, by the address of the first element.

    Args:
        memories: Each a region of symmetric memory, one tensor a rank, of equal sizes. The records
            hold their addresses: keep them.
        pes: The transport's number of each rank; by default the rank.

    Returns:
        int64, one record a rank.
    """
    num_ranks = len(memories[0])
    pes = range(num_ranks) if pes is None else pes
    regions: list[int] = []
    for region in memories:
        sizes = {each.nbytes for each in region}
        if len(sizes) != 1 or len(region) != num_ranks:
            raise ValueError(f"a region of {len(region)} ranks has sizes {sorted(sizes)}")
        addresses = [0] * num_ranks
        for rank, each in enumerate(region):
            addresses[pes[rank]] = each.data_ptr()
        regions += [*sizes, *addresses]
    return [
        torch.tensor([num_ranks, pes[rank], len(memories), *regions], dtype=torch.int64)
        for rank in range(num_ranks)
    ]


def render(config: Config, params_type: type[ctypes.Structure]) -> str:
    """The unit that g++ compiles: like the unit of `epjit.runtime.kernel`, with a C entry."""
    name = type(config).__name__
    params = name.removesuffix("Config") + "Params"
    op = config.op
    values = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        values.append(f".{field.name} = {str(value).lower()}")
    return "\n".join(
        [
            '#include "emulate.h"',
            f'#include "{config.source}"',
            "namespace epjit {",
            f"constexpr {name} kConfig{{{', '.join(values)}}};",
            f"static_assert({op}_threads(kConfig) == {config.threads});",
            f"static_assert({op}_shared_bytes(kConfig) == {config.shared_bytes});",
            f"static_assert(sizeof({params}) == {ctypes.sizeof(params_type)});",
            "}",
            'extern "C" void emulated_kernel(const void* params) {',
            f"  epjit::{op}<epjit::kConfig>(*static_cast<const epjit::{params}*>(params));",
            "}",
            "",
        ]
    )


# ---- compiling ----------------------------------------------------------------------------------


def _cache_dir() -> Path:
    default = Path(tempfile.gettempdir()) / f"epjit-emulation-{os.getuid()}"
    folder = Path(os.environ.get("EPJIT_EMULATION_CACHE", default))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise EmulationError(f"{folder} belongs to another user; set EPJIT_EMULATION_CACHE")
    return folder


@functools.cache
def _digest_of(folder: Path) -> bytes:
    whole = hashlib.sha256()
    for path in sorted([*folder.rglob("*.h"), *folder.rglob("*.cu"), *folder.rglob("*.cuh")]):
        whole.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.digest()


def _compile(text: str, name: str, flags: list[str], digests: bytes = b"") -> Path:
    """Shared library of one translation unit; cached by content."""
    if shutil.which(COMPILER) is None:
        raise EmulationError(f"no {COMPILER}: install g++ or set CXX to run kernels on the CPU")
    key = hashlib.sha256(digests + repr((COMPILER, FLAGS, flags)).encode() + text.encode())
    library = _cache_dir() / f"{name}-{key.hexdigest()[:24]}.so"
    if library.exists():
        return library
    source = library.with_suffix(".cpp")
    source.write_text(text)
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    command = [COMPILER, *FLAGS, *flags, "-o", temporary, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        os.unlink(temporary)
        raise EmulationError(f"{' '.join(command)}\n{result.stderr}")
    os.replace(temporary, library)
    return library


@functools.cache
def _core() -> ctypes.CDLL:
    text = (HERE / "emulate.cpp").read_text()
    path = _compile(text, "emulate", ["-O2", f"-I{HERE}"], _digest_of(HERE))
    core = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    core.emulate_launch.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        *[ctypes.c_uint] * 3,
        *[ctypes.c_void_p] * 2,
        ctypes.c_size_t,
    ]
    core.emulate_launch.restype = None
    core.emulate_delay.argtypes = [ctypes.c_int, ctypes.c_uint64]
    core.emulate_delay.restype = None
    core.emulate_message.restype = ctypes.c_char_p
    core.emulate_allocate.argtypes = [ctypes.c_size_t]
    core.emulate_allocate.restype = ctypes.c_void_p
    core.emulate_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    core.emulate_free.restype = None
    return core


_LIBRARIES: dict[tuple[str, Path], ctypes.CDLL] = {}


def _entry(launch: Launch) -> int | None:
    """Address of the kernel's C entry; compiles it when it is new."""
    folder = launch.include or CUDA_SRC
    text = render(launch.config, type(launch.params))
    key = (text, folder)
    if key not in _LIBRARIES:
        flags = [*KERNEL_FLAGS, f"-I{folder}", f"-I{CUDA_SRC}", f"-I{HERE}"]
        digests = _digest_of(folder) + _digest_of(CUDA_SRC) + _digest_of(HERE)
        _LIBRARIES[key] = ctypes.CDLL(str(_compile(text, str(launch.config.op), flags, digests)))
    return ctypes.cast(_LIBRARIES[key].emulated_kernel, ctypes.c_void_p).value


# ---- messages -----------------------------------------------------------------------------------


def _with_lines(message: str) -> str:
    """Replaces "<library+0x12>" by the source lines, innermost first."""

    def lines(match: re.Match[str]) -> str:
        # The address is that of the return; the call stands before it.
        address = hex(int(match[2], 16) - 1)
        tool = shutil.which("addr2line")
        if tool is None:
            return match[0]
        out = subprocess.run(
            [tool, "-i", "-e", match[1], address], capture_output=True, text=True, check=False
        ).stdout.split("\n")
        own = [line for line in out if line and not re.search(r"/(emulate|emulate_ptx)\.h:", line)]
        return " < ".join(re.sub(r" \(discriminator \d+\)", "", Path(x).name) for x in own)

    seen: dict[str, str] = {}

    def cached(match: re.Match[str]) -> str:
        if match[0] not in seen:
            seen[match[0]] = lines(match)
        return seen[match[0]]

    return re.sub(r"<([^<>]+)\+(0x[0-9a-f]+)>", cached, message)
