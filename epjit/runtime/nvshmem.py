"""NVSHMEM's host library: found, initialised or joined, used by kernels, and ended.

A thin layer of ctypes over about a dozen functions; why not nvshmem4py: it takes seconds to import
and its own way with tensors. NVSHMEM is one a process and binds it to one GPU. What goes wrong
inside it often ends the process (it calls exit()), so everything that can be checked is checked
before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import logging
import re
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from epjit import env
from epjit.arch import arch_number
from epjit.errors import CommunicationError, missing_package
from epjit.runtime import device as gpu
from epjit.runtime import driver, network, nvrtc
from epjit.runtime.group import BUFFER, Group, host_id, process_id
from epjit.runtime.heap import Heap, HeapMemory
from epjit.runtime.interrupt import interruptible
from epjit.runtime.machine import mapped
from epjit.runtime.network import Network

T = TypeVar("T")

_log = logging.getLogger(__name__)

MIN_VERSION = (3, 4, 5)
MAX_MAJOR = 3
_FAST_LIBFABRIC = (3, 5)

_PACKAGE = "nvidia-nvshmem-cu13 (CUDA 12: nvidia-nvshmem-cu12)"
_LIBRARY = "libnvshmem_host.so"
_SOCKET = "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"

# ---- which library ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Installation:
    """One NVSHMEM on disk.

    Attributes:
        library: The host library.
        include: Folder of the headers.
        device_library: Archive of device code.
        version: Of the headers: major, minor, patch.
    """

    library: Path
    include: Path
    device_library: Path
    version: tuple[int, int, int]


def find_library() -> Path:
    """The host library to use: the one in this process, else ``NVSHMEM_DIR``, else the package's.

    Raises:
        ImportError: There is none.
        RuntimeError: The process has two, or another than ``NVSHMEM_DIR`` says.
    """
    loaded = mapped(_LIBRARY)
    folder = env.nvshmem_dir()
    if len(loaded) > 1:
        raise RuntimeError(
            "this process has two copies of NVSHMEM loaded, which do not know of each other: "
            f"{' and '.join(map(str, loaded))}; remove one, or set NVSHMEM_DIR to the one that the "
            "other packages load"
        )
    chosen = None
    if folder is not None:
        found = sorted(folder.glob(f"lib*/{_LIBRARY}*"))
        if not found:
            raise missing_package(
                _PACKAGE,
                reason=f"NVSHMEM_DIR={folder} has no lib/{_LIBRARY}; unset it, or correct it",
                extra="cu*-rdma",
            )
        chosen = found[0].resolve()
    if loaded:
        if chosen is not None and chosen != loaded[0]:
            raise RuntimeError(
                f"NVSHMEM_DIR={folder} names another NVSHMEM than the one that is loaded, "
                f"{loaded[0]} (by torch?), and a process can have only one; unset NVSHMEM_DIR"
            )
        return loaded[0]
    if chosen is not None:
        return chosen
    for root in package_folders("nvshmem"):
        for library in sorted(root.glob(f"lib/{_LIBRARY}*")):
            return library.resolve()
    raise missing_package(_PACKAGE, extra="cu*-rdma")


def find_installation() -> Installation:
    """The library that `find_library` finds, with what kernels are compiled against.

    Raises:
        ImportError: There is none, or it has no headers.
        RuntimeError: See `find_library`; or its version is not supported.
    """
    library = find_library()
    include = library.parent.parent / "include"
    header = include / "non_abi" / "nvshmem_version.h"
    if not header.is_file():
        raise missing_package(
            _PACKAGE,
            reason=f"{library} comes without {header}: some packages bring a bare copy",
            extra="cu*-rdma",
        )
    text = header.read_text()
    numbers = re.findall(r"define NVSHMEM_VENDOR_(?:MAJOR|MINOR|PATCH)_VERSION (\d+)", text)
    major, minor, patch = map(int, numbers[:3])
    _check_version((major, minor, patch), library)
    return Installation(
        library, include, library.parent / "libnvshmem_device.a", (major, minor, patch)
    )


def package_folders(name: str) -> list[Path]:
    """Folders of NVIDIA's packages called `name` in this environment, such as ``"nvshmem"``.

    Never those of a toolkit of the system, which may be of another CUDA.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = (spec.submodule_search_locations or []) if spec is not None else []
    return [folder for root in roots if (folder := Path(root) / name).is_dir()]


def _check_version(version: tuple[int, int, int], library: Path) -> None:
    if version < MIN_VERSION or version[0] > MAX_MAJOR:
        from epjit.remedy import install_command

        raise RuntimeError(
            f"NVSHMEM {'.'.join(map(str, version))} ({library}) is not supported: epjit takes "
            f"{'.'.join(map(str, MIN_VERSION))} and newer, below {MAX_MAJOR + 1}; "
            f"{install_command('cu*-rdma')}"
        )


# ---- the library --------------------------------------------------------------------------------


class _UniqueId(ctypes.Structure):
    """nvshmemx_uniqueid_t, version 1; the others follow."""

    _fields_ = (("version", ctypes.c_int), ("internal", ctypes.c_char * 124))


class _UniqueIdArgs(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_int),
        ("id", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("size", ctypes.c_int),
    )


class _InitArgs(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_int),
        ("uid_args", _UniqueIdArgs),
        ("content", ctypes.c_char * 96),
    )


class _InitAttributes(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_int),
        ("mpi_comm", ctypes.c_void_p),
        ("args", _InitArgs),
    )


_INITIALIZED = 2  # nvshmemx_init_status: from here on it works
_WITH_UNIQUE_ID = 1 << 3  # NVSHMEMX_INIT_WITH_UNIQUEID
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "nvshmemx_get_uniqueid": (ctypes.c_int, (ctypes.c_void_p,)),
    "nvshmemx_set_attr_uniqueid_args": (
        ctypes.c_int,
        (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
    ),
    "nvshmemx_hostlib_init_attr": (ctypes.c_int, (ctypes.c_uint, ctypes.c_void_p)),
    "nvshmemx_hostlib_finalize": (None, ()),
    "nvshmemx_init_status": (ctypes.c_int, ()),
    "nvshmem_my_pe": (ctypes.c_int, ()),
    "nvshmem_n_pes": (ctypes.c_int, ()),
    "nvshmem_malloc": (ctypes.c_void_p, (ctypes.c_size_t,)),
    "nvshmem_free": (None, (ctypes.c_void_p,)),
    "nvshmemx_quiet_on_stream": (None, (ctypes.c_void_p,)),
    "nvshmem_ptr": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int)),
    "nvshmemx_cumodule_init": (ctypes.c_int, (ctypes.c_void_p,)),
    "nvshmemx_cumodule_finalize": (ctypes.c_int, (ctypes.c_void_p,)),
    "nvshmemx_vendor_get_version_info": (None, (ctypes.c_void_p,) * 3),
}


def _struct_version(struct: type[ctypes.Structure]) -> int:
    """Value of a struct's field `version`, as NVSHMEM wants it: version 1, and the size."""
    return (1 << 16) + ctypes.sizeof(struct)


@functools.cache
def load() -> Any:
    """The host library, with types of arguments and results.

    Raises:
        ImportError: There is none, or it cannot be loaded.
        RuntimeError: See `find_library`; or its version is not supported.
    """
    path = find_library()
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise missing_package(_PACKAGE, reason=f"{path}: {error}", extra="cu*-rdma") from error
    _check_version(_version_of(library), path)
    return library


def _version_of(library: Any) -> tuple[int, int, int]:
    numbers = [ctypes.c_int() for _ in range(3)]
    library.nvshmemx_vendor_get_version_info(*(ctypes.byref(number) for number in numbers))
    major, minor, patch = (number.value for number in numbers)
    return major, minor, patch


def is_initialized() -> bool:
    """Whether NVSHMEM works in this process, whoever began it."""
    return bool(load().nvshmemx_init_status() >= _INITIALIZED)


# ---- beginning and end --------------------------------------------------------------------------

# A thread can come back to it: the collector runs anywhere, and what it finds detaches kernels.
_lock = threading.RLock()
_begun_here = False  # whether `initialize` began NVSHMEM, not torch or the user


class _Member(NamedTuple):
    """A rank as it introduces itself before NVSHMEM begins; `error` says why it cannot."""

    error: str = ""
    version: tuple[int, int, int] = (0, 0, 0)
    initialized: bool = False
    pe: int = -1
    num_pes: int = 0
    host: str = ""
    hostname: str = ""
    process: str = ""
    gpu: bytes = b""
    network: Network = Network()


class World(NamedTuple):
    """NVSHMEM between the ranks of a group.

    Attributes:
        pes: NVSHMEM's number (PE) of each rank.
        transport: Carrier of bytes between hosts, such as ``"ibgda"`` or ``"ibrc"``; empty when
            there is one host, or none that NVSHMEM has begun.
    """

    pes: list[int]
    transport: str


def initialize(
    group: Group,
    *,
    device: int | None,
    settings: Mapping[str, str],
    may_lose_ranks: bool = False,
) -> World:
    """Makes NVSHMEM work between the ranks of a group, or joins it when it does. Collective.

    Args:
        group: The ranks; each must be a process of its own.
        device: GPU of this rank; None only bootstraps, which tests do without a GPU.
        settings: Environment variables that NVSHMEM reads when it begins; those that the user has
            set stay. Without effect when it works already.
        may_lose_ranks: Whether the group goes on without a rank that is gone.

    Raises:
        ImportError: A rank has no NVSHMEM.
        ValueError: Ranks share a process.
        RuntimeError: The ranks' libraries, settings or networks do not go together, or NVSHMEM
            works already with other members, or does not begin. The same reasons on all ranks.
        CommunicationError: A rank does not come.
    """
    members: list[_Member] = group.allgather(_introduce(device))
    _check_members(members)
    # NVSHMEM tells hosts apart by their names: containers of one may be several.
    num_hosts = len({member.hostname for member in members})
    problem, joined = "", members[0].initialized
    if joined:
        pes = [member.pe for member in members]
    else:
        pes = number_ranks([member.host for member in members])
        _check_gpus(members, pes)
        _prepare(members, settings, num_hosts, may_lose_ranks=may_lose_ranks)
        problem = _bootstrap(group, pes, device)
    got = network.loaded()
    if num_hosts > 1:
        problem = problem or network.why_unordered([each.network for each in members], got)
    found: list[tuple[str, str]] = group.allgather((problem, got))
    problems = dict.fromkeys(text for text, _ in found if text)
    if problems:
        raise RuntimeError("NVSHMEM cannot be used:\n  " + "\n  ".join(problems))
    network.check_got([got for _, got in found])
    transport = found[0][1]
    if transport:  # kernels are linked for what was got, whoever asked for it
        env.set_variable(env.nvshmem_ib_enable_ibgda.name, str(int(transport == "ibgda")))
    world = World(pes, transport if num_hosts > 1 else "")
    if group.rank == 0:
        _tell(world, members, num_hosts, joined=joined)
    return world


def _prepare(
    members: Sequence[_Member],
    settings: Mapping[str, str],
    num_hosts: int,
    *,
    may_lose_ranks: bool,
) -> None:
    """Sets what NVSHMEM reads when it begins, but for what the user has set."""
    networks = [member.network for member in members]
    network.check(networks, num_hosts=num_hosts)
    chosen = network.settings(
        networks,
        ibgda=network.use_ibgda(networks, num_hosts=num_hosts),
        version=members[0].version,
        may_lose_ranks=may_lose_ranks,
    )
    for name, value in {**settings, **chosen}.items():
        env.set_default(name, value)
    if len({member.host for member in members}) == 1:
        env.set_default(_SOCKET, "lo")  # else it takes an interface that may not loop back


def _tell(world: World, members: Sequence[_Member], num_hosts: int, *, joined: bool) -> None:
    """Says in the log what carries bytes, and what makes that slow."""
    version, transport = members[0].version, world.transport
    _log.info(
        "NVSHMEM %s, %s, between %d ranks on %d hosts: %s",
        ".".join(map(str, version)),
        "begun before epjit, with settings of its own" if joined else "begun by epjit",
        len(members),
        num_hosts,
        transport or ("no transport" if num_hosts > 1 else "NVLink alone"),
    )
    if num_hosts == 1:
        return
    if transport != "ibgda":
        reasons = sorted({member.network.no_ibgda for member in members} - {""})
        _log.log(
            logging.WARNING if members[0].network.ibgda else logging.INFO,
            "IBGDA was not begun: expect low rates (%s)",
            "; ".join(reasons) or "NVSHMEM_DEBUG=INFO says more",
        )
    if transport == "libfabric" and version < _FAST_LIBFABRIC:
        _log.warning(
            "NVSHMEM before %d.%d waits for each put over libfabric before its signal, and is ten "
            "times slower; NVSHMEM_DIR names another, where torch has not loaded its own before",
            *_FAST_LIBFABRIC,
        )


def number_ranks(hosts: Sequence[str]) -> list[int]:
    """PE of each rank: the ranks of a host follow one another, as NVSHMEM wants it."""
    order = sorted(range(len(hosts)), key=lambda rank: (hosts.index(hosts[rank]), rank))
    return [order.index(rank) for rank in range(len(hosts))]


def _introduce(device: int | None) -> _Member:
    try:
        library = load()
        begun = is_initialized()
        version = _version_of(library)
        no_device_code = "" if begun else why_no_device_code(device)
        found = network.look(version=version, no_device_code=no_device_code)
    except (ImportError, RuntimeError, ValueError) as error:
        return _Member(error=str(error))
    return _Member(
        version=version,
        initialized=begun,
        pe=library.nvshmem_my_pe() if begun else -1,
        num_pes=library.nvshmem_n_pes() if begun else 0,
        host=host_id(),
        hostname=socket.gethostname(),
        process=process_id(),
        gpu=b"" if device is None else gpu.uuid(device),
        network=found,
    )


def why_no_device_code(device: int | None) -> str:
    """Why no kernel for a GPU can be linked with the functions of IBGDA; empty when one can."""
    library = find_installation().device_library
    if not library.is_file():
        return f"there is no {library}"
    if nvrtc.version()[0] < 13 and device is not None and arch_number(gpu.arch_of(device)) >= 100:
        return f"CUDA 12's {library.name} has no code for {gpu.arch_of(device)}, only slow PTX"
    return ""


def _check_members(members: Sequence[_Member]) -> None:
    """Refuses ranks that cannot form one NVSHMEM; all ranks see the same and raise the same."""
    errors = [f"rank {rank}: {each.error}" for rank, each in enumerate(members) if each.error]
    if errors:
        raise ImportError("NVSHMEM cannot be used:\n  " + "\n  ".join(errors))
    if len({member.process for member in members}) < len(members):
        raise ValueError(
            "some ranks are threads of one process, and NVSHMEM wants a process for each; "
            "EPJIT_TRANSPORT=loopback serves ranks of one host"
        )
    versions = {member.version for member in members}
    if len(versions) > 1:
        raise RuntimeError(
            "the ranks have different versions of NVSHMEM, by rank: "
            + ", ".join(".".join(map(str, member.version)) for member in members)
        )
    begun = [rank for rank, member in enumerate(members) if member.initialized]
    if not begun:
        _check_hosts(members)
        return
    if len(begun) < len(members):
        raise RuntimeError(
            f"NVSHMEM works already on ranks {begun}, but not on the other ones of this group of "
            f"{len(members)}; begin it on all of them, or on none"
        )
    pes = [member.pe for member in members]
    if any(member.num_pes != len(members) for member in members) or len(set(pes)) < len(pes):
        raise RuntimeError(
            f"NVSHMEM works already between {members[0].num_pes} processes, and this group has "
            f"{len(members)} ranks (PEs {pes}); it can only serve a group of all its processes, so "
            "make the Buffer with that group first"
        )


def _check_hosts(members: Sequence[_Member]) -> None:
    """Refuses what makes NVSHMEM end the process, or take two hosts for one."""
    counts = Counter(member.host for member in members)
    names = {member.host: member.hostname for member in members}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} on {names[host]}" for host, count in counts.items())
        raise RuntimeError(f"NVSHMEM wants as many ranks on every host, and there are {listed}")
    if len(set(names.values())) < len(names):
        raise RuntimeError(
            "NVSHMEM tells hosts apart by their names, and different ones are called "
            f"{', '.join(sorted(set(names.values())))}; give each its own (docker run --hostname)"
        )


def _check_gpus(members: Sequence[_Member], pes: Sequence[int]) -> None:
    """Refuses shared GPUs with which NVSHMEM would wait for ever, or end the process.

    It lets the processes of a GPU meet by barriers of all processes, in which one that is alone on
    its GPU takes no part, and numbers them with one step.
    """
    shared: dict[bytes, list[int]] = {}
    for pe, member in sorted(zip(pes, members, strict=True)):
        shared.setdefault(member.gpu, []).append(pe)
    on_gpus = list(shared.values())
    steps = {after - before for on_gpu in on_gpus for before, after in pairwise(on_gpu)}
    if len({len(on_gpu) for on_gpu in on_gpus}) > 1 or len(steps) > 1:
        listed = "; ".join(", ".join(map(str, on_gpu)) for on_gpu in on_gpus)
        raise RuntimeError(
            "NVSHMEM wants as many processes on every GPU, in even steps, and its PEs are, GPU by "
            f"GPU: {listed}; give each rank a GPU of its own, or rank i GPU i modulo their number"
        )


def _together(group: Group, what: str, device: int | None, call: Callable[[], T]) -> T:
    """A call in which NVSHMEM lets its processes wait for each other: not for ever.

    Raises:
        CommunicationError: It does not come back within ``EPJIT_TIMEOUT_SECONDS``.
    """

    def run() -> T:
        with contextlib.nullcontext() if device is None else driver.using(device):
            return call()

    seconds = env.timeout_seconds()
    try:
        return interruptible(run, seconds=seconds)
    except TimeoutError:
        flag = env.nvshmem_ib_enable_ibgda
        ibgda = f", or IBGDA has begun on some only ({flag.name}=0 on all does without)"
        raise CommunicationError(
            f"{BUFFER}: rank {group.rank} waited {seconds:g} s in {what} for the other ranks: one "
            f"has ended, or the network between them does not work{ibgda if flag() else ''} "
            "(NVSHMEM_DEBUG=INFO says more). NVSHMEM cannot be used in this process any more; "
            f"start the ranks again ({env.timeout_seconds.name} sets the time)",
            op=BUFFER,
            rank=group.rank,
        ) from None


def _bootstrap(group: Group, pes: Sequence[int], device: int | None) -> str:
    """Begins NVSHMEM; returns what went wrong, in words."""
    global _begun_here
    library = load()
    unique_id = _UniqueId(version=_struct_version(_UniqueId))
    root = pes.index(0)
    status = 0
    if group.rank == root:
        with contextlib.nullcontext() if device is None else driver.using(device):
            status = library.nvshmemx_get_uniqueid(ctypes.byref(unique_id))
    status, data = group.allgather((status, bytes(unique_id)))[root]
    if status:
        return f"rank {root}: nvshmemx_get_uniqueid failed with {status}" * (group.rank == root)
    ctypes.memmove(ctypes.byref(unique_id), data, ctypes.sizeof(_UniqueId))
    attributes = _InitAttributes(version=_struct_version(_InitAttributes))
    attributes.args.version = _struct_version(_InitArgs)
    attributes.args.uid_args.version = _struct_version(_UniqueIdArgs)
    library.nvshmemx_set_attr_uniqueid_args(
        pes[group.rank], group.size, ctypes.byref(unique_id), ctypes.byref(attributes)
    )
    status = _together(
        group,
        "nvshmemx_hostlib_init_attr",
        device,
        lambda: library.nvshmemx_hostlib_init_attr(_WITH_UNIQUE_ID, ctypes.byref(attributes)),
    )
    if not is_initialized():
        return (
            f"rank {group.rank}: nvshmemx_hostlib_init_attr returns {status}, and the state is "
            f"{library.nvshmemx_init_status()} (1: the processes have met, but there is no GPU to "
            "use); NVSHMEM_DEBUG=INFO says more, and so does python -m epjit doctor"
        )
    with _lock:
        _begun_here = True
    return ""


def finalize() -> None:
    """Ends NVSHMEM, if epjit began it. Collective over all its processes.

    Nothing calls this by itself: as with any collective, a rank that is gone would make the others
    wait for ever, and a process may end without it.

    Raises:
        RuntimeError: Memory is still in use, or kernels are still attached.
    """
    global _begun_here
    _detach_left()
    with _lock:
        if not _begun_here:
            return
        if _heap.num_in_use or _attached:
            raise RuntimeError(
                f"NVSHMEM cannot end: {_heap.num_in_use} allocations and {len(_attached)} kernels "
                "are still in use; destroy the Buffers first"
            )
        _begun_here = False
        for ptr in _heap.clear():
            load().nvshmem_free(ptr)
    load().nvshmemx_hostlib_finalize()


# ---- kernels ------------------------------------------------------------------------------------

_attached: set[int] = set()
_left: deque[tuple[Any, int]] = deque()  # modules to detach, and their GPUs


def attach(module: int) -> None:
    """Gives a module (CUmodule) that is linked with NVSHMEM's device code what that needs.

    The context of its device must be current, and NVSHMEM must work.

    Raises:
        RuntimeError: NVSHMEM refuses, for one because its library is older than the headers.
    """
    _detach_left()
    with driver.relaxed():  # it copies to the GPU
        status = load().nvshmemx_cumodule_init(module)
    if status:
        raise RuntimeError(
            f"NVSHMEM refuses a kernel: nvshmemx_cumodule_init returns {status}; is its library "
            f"({find_library()}) older than its headers, or is it not initialised?"
        )
    with _lock:
        _attached.add(module)


def detach(module: Any, device: int) -> None:
    """Undoes `attach`. To be called before the module is unloaded: NVSHMEM writes to it.

    While a CUDA graph is captured, which that would break, it is put off, and `module` kept.

    Args:
        module: Has the CUmodule in `ptr`, and unloads it when it is collected.
        device: Its GPU.
    """
    _left.append((module, device))
    _detach_left()


def _detach_left() -> None:
    from epjit.runtime.stream import captures

    while True:
        try:
            module, device = _left.popleft()
        except IndexError:
            return
        if module.ptr not in _attached:
            continue
        if captures(device):
            _left.append((module, device))
            return
        with _lock:
            _attached.discard(module.ptr)
        if is_initialized():
            with driver.using(device), driver.relaxed():
                load().nvshmemx_cumodule_finalize(module.ptr)


# ---- the heap -----------------------------------------------------------------------------------


def _replace(group: Group, old: Sequence[int], nbytes: int, device: int) -> int:
    """Frees memory and allocates some; see `Heap`."""
    library = load()

    def replace() -> int:
        for ptr in old:
            library.nvshmem_free(ptr)
        return library.nvshmem_malloc(nbytes) or 0

    return _together(group, "nvshmem_malloc", device, replace)


_heap = Heap(_replace)


def allocate(group: Group, nbytes: int, *, device: int) -> HeapMemory:
    """Takes symmetric memory of all processes of NVSHMEM. Collective; see `Heap.allocate`."""
    return _heap.allocate(group, nbytes, device=device)


def address_at(ptr: int, pe: int) -> int:
    """Address here of the same symmetric memory of another PE; 0 when it is not mapped."""
    return load().nvshmem_ptr(ptr, pe) or 0
