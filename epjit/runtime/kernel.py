"""Kernels: from a config to text, to a cubin, to a function of one GPU.

The value of a config is the text of the unit and the key of the cache; nothing that changes code
travels by another way. A kernel's parameters are one C struct in its source; Python reads it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import logging
import os
import re
import time
import typing
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from epjit import env
from epjit.arch import arch_number
from epjit.errors import CompileError, require
from epjit.runtime import driver, nvjitlink, nvrtc, nvshmem, nvshmem_device, sources
from epjit.runtime.cache import CubinCache, Entry
from epjit.runtime.device import arch_of, shared_bytes_per_block
from epjit.runtime.params import field_types, params_type

_CONFIG_TYPES = {int: ctypes.c_int32.__name__, bool: ctypes.c_bool.__name__}
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_log = logging.getLogger(__name__)


class KernelConfig:
    """Base of the configs of kernels: frozen dataclasses whose fields are ints and bools.

    The class `XConfig` goes with the C++ structs `XConfig`, which has the same fields in the same
    order, and `XParams`; the functions are called `op`, `op_threads`, `op_shared_bytes` and, if
    there are slots, `op_slot_bytes`.
    """

    source: ClassVar[str]
    """File below `cuda_src`."""
    op: ClassVar[str]
    """Name of the device function."""
    tag_template: ClassVar[str]
    """Of `tag`; ``{0.num_ranks}`` stands for a field, or another attribute."""
    starts_early: ClassVar[bool] = False
    """Whether its blocks take their places while the kernel ahead in the stream still runs, and
    wait there until that has ended (programmatic dependent launch, sm_90 and newer). `op` calls
    ``ptx::griddepcontrol_wait()`` before it touches global memory, and itself lets the next kernel
    in (sync.cuh, "blocks that leave")."""

    num_warps: int
    """Warps a block; a config that has no such field has `threads` of its own."""

    def __init_subclass__(cls, *, source: str = "", op: str = "", tag: str = "") -> None:
        """Takes what a class statement says beside the fields.

        Args:
            source: As the attribute; empty in a base.
            op: As the attribute; by default the name of the file.
            tag: `tag_template`.
        """
        super().__init_subclass__()
        if source:
            cls.source, cls.op = source, op or PurePosixPath(source).stem
            cls.tag_template = tag

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes."""
        return 0

    @property
    def slot_bytes(self) -> int | None:
        """Bytes of a slot of shared memory between ranks, `op_slot_bytes`; None: it has none."""
        return None

    @property
    def needs_transport(self) -> bool:
        """Whether it calls what transport.cuh declares, so that it needs a body for that."""
        return False

    @property
    def tag(self) -> str:
        """Namespace of the kernel below `epjit`: tells specialisations apart in a profile."""
        return self.tag_template.format(self)

    @property
    def kernel_name(self) -> str:
        """In C++, with its namespaces.

        In the low-latency mode, too, profiles are searched for ``::dispatch`` and ``::combine``:
        `bench_kineto` of DeepEP's tests does.
        """
        return f"epjit::{self.tag}::{self.op.removeprefix('low_latency_')}"


C = TypeVar("C", bound=KernelConfig)


class Compiled(NamedTuple):
    """A compiled kernel."""

    cubin: bytes
    symbol: str
    log: str
    registers: int
    spill_bytes: int
    from_cache: bool


BODIES = ("nvshmem", "loopback")
"""Bodies of transport.cuh: nvshmem is linked with the unit, loopback is included by it."""
_LOOPBACK = "transport/loopback.cuh"


def unit_sources(config: KernelConfig, body: str = "nvshmem") -> tuple[str, ...]:
    """Sources that the unit of a kernel includes.

    Raises:
        CompileError: There is no such body.
    """
    if body not in BODIES:
        raise CompileError(f"body is {body!r}, expected one of {BODIES}")
    included = config.needs_transport and body == "loopback"
    return (_LOOPBACK, config.source) if included else (config.source,)


def render(config: KernelConfig, body: str = "nvshmem") -> str:
    """The unit that is compiled: one kernel, with every size that both sides compute held together.

    Args:
        config: The specialisation.
        body: Which body of transport.cuh, for kernels that need one.

    Raises:
        CompileError: A field is neither int nor bool, or the source has no struct with the same
            fields.
    """
    config_name = type(config).__name__
    names = _field_names(type(config))
    if not _IDENTIFIER.fullmatch(config.tag):
        raise CompileError(f"{config_name}.tag is {config.tag!r}, which is no C++ name")
    params_name = _params_name(config)
    op = config.op
    fields = ", ".join(
        f".{name} = {_literal(config_name, name, getattr(config, name))}" for name in names
    )
    size = ctypes.sizeof(params_type(config.source, params_name))
    sizes = {"threads": config.threads, "shared_bytes": config.shared_bytes}
    if config.slot_bytes is not None:
        sizes["slot_bytes"] = config.slot_bytes
    included = unit_sources(config, body)
    kernel = config.kernel_name.rpartition("::")[2]
    return (
        f"// Generated by epjit. Sources: {sources.digest(*included)[:16]}\n"
        + "".join(f'#include "{path}"\n' for path in included)
        + "namespace epjit {\n"
        f"constexpr {config_name} kConfig{{{fields}}};\n"
        + "".join(
            f"static_assert({op}_{name}(kConfig) == {value});\n" for name, value in sizes.items()
        )
        + f"static_assert(sizeof({params_name}) == {size});\n"
        f"namespace {config.tag} {{\n"
        f"__global__ void __launch_bounds__({config.threads}, 1)\n"
        f"{kernel}(const __grid_constant__ {params_name} params) {{ "
        f"epjit::{op}<kConfig>(params); }}\n"
        f"}}  // namespace {config.tag}\n"
        "}  // namespace epjit\n"
    )


@sources.remembered
def _field_names(config: type[KernelConfig]) -> tuple[str, ...]:
    """Fields of the dataclass, held against the C++ struct, where one that it lacks would be 0.

    Raises:
        CompileError: It is no dataclass, or their fields differ in name, order or type; names the
            first that do.
    """
    name = config.__name__
    if not name.endswith("Config") or not dataclasses.is_dataclass(config):
        raise CompileError(f"{name} must be a dataclass whose name ends in 'Config'")
    types, names = typing.get_type_hints(config), [each.name for each in dataclasses.fields(config)]
    here = [f"{_CONFIG_TYPES.get(types[each])} {each}" for each in names]
    struct = field_types(params_type(config.source, name))
    there = [f"{c_type.__name__} {each}" for each, c_type in struct.items()]
    for mine, theirs in itertools.zip_longest(here, there):
        if mine != theirs:
            raise CompileError(
                f"the dataclass {name} has the field `{mine}` where struct {name} of "
                f"{config.source} has `{theirs}`; both must have the same fields in the same order"
            )
    return tuple(names)


def compile_kernel(config: KernelConfig, *, arch: str, body: str = "nvshmem") -> Compiled:
    """Compiles a kernel, or takes it from the cache. Needs no GPU, and is safe from any thread.

    Args:
        config: The specialisation.
        arch: Architecture, such as ``"sm_90a"``.
        body: Which body of transport.cuh, for kernels that need one.

    Raises:
        CompileError: The compiler refuses, or must not be asked (``EPJIT_ASSERT_COMPILE``).
        ImportError: NVRTC, or what links with NVSHMEM, is not installed.
        RuntimeError: The NVSHMEM that is found cannot be used.
    """
    unit = render(config, body)
    headers = sources.closure(*unit_sources(config, body))
    name = f"{config.tag}.{config.op}.{arch}"
    linked = config.needs_transport and body == "nvshmem"
    target = nvshmem_device.target(arch) if linked else arch
    key = CubinCache.key(
        repr((nvrtc.version(), nvrtc.options(target, linked=linked))).encode(),
        *([nvshmem_device.key()] if linked else []),
        unit.encode(),
        *(part.encode() for item in headers.items() for part in item),
    )

    def compile_entry() -> Entry:
        code, symbol, log = nvrtc.compile_unit(
            unit,
            f"{name}.cu",
            arch=target,
            headers=headers,
            name_expression=config.kernel_name,
            linked=linked,
        )
        if linked:
            code, link_log = nvshmem_device.link(code, arch=arch, name=name)
            log = f"{log}\n{link_log}"
        return Entry(symbol, log, code)

    start = time.perf_counter()
    entry, from_cache = CubinCache().get_or_compile(key, compile_entry, what=f"{config} for {arch}")
    _log.info(
        "%s for %s %s in %.2f s: %s",
        config.op,
        arch,
        "taken from the cache" if from_cache else "compiled",
        time.perf_counter() - start,
        config,
    )
    if (folder := env.dump()) is not None:
        _dump(folder, f"{name}.{key[:8]}", unit, entry)
    registers, spill_bytes = nvrtc.usage(entry.log)
    registers = registers or nvjitlink.registers(entry.cubin, entry.symbol)
    return Compiled(entry.cubin, entry.symbol, entry.log, registers, spill_bytes, from_cache)


def can_start_early(config: KernelConfig, arch: str, *, driver_version: int) -> bool:
    """Whether a kernel is launched as its `starts_early` says.

    Not with a driver, by cuDriverGetVersion, of before CUDA 12.3, whose graphs have no such edges.
    """
    wanted = config.starts_early and not env.disable_sm90_features()
    return wanted and arch_number(arch) >= 90 and driver_version >= 12030


class Kernel(Generic[C]):
    """A kernel that is compiled and loaded on one device.

    Args:
        config: The specialisation.
        device: Number of the GPU.
        body: Which body of transport.cuh, for kernels that need one; NVSHMEM must work
            already.

    Attributes:
        function: The CUfunction, as an integer.
        starts_early: Whether it is launched so, as its config says.
        params: Type of the parameter record.
        compiled: Results of the compiler.

    Raises:
        CompileError: The compiler refuses.
        ImportError: NVRTC or CuPy is not installed.
        RuntimeError: The block does not fit the device, or the driver refuses the kernel.
    """

    def __init__(self, config: C, *, device: int, body: str = "nvshmem") -> None:
        self.config = config
        self.device = device
        limit = shared_bytes_per_block(device)
        if config.shared_bytes > limit:
            raise RuntimeError(
                f"{config} needs {config.shared_bytes} bytes of shared memory a block, device "
                f"{device} has {limit}"
            )
        arch = arch_of(device)
        version = driver.call("cuDriverGetVersion")
        self.starts_early = can_start_early(config, arch, driver_version=version)
        self.params = params_type(config.source, _params_name(config))
        self.compiled = compile_kernel(config, arch=arch, body=body)
        cupy_function = require("cupy.cuda.function", package="cupy-cuda13x (cupy-cuda12x)")
        with driver.using(device):
            self._module = cupy_function.Module()  # unloads the code when it is collected
            _keep_in_children()
            _kernels.add(self)
            self._module.load(self.compiled.cubin)
            if config.needs_transport and body == "nvshmem":
                nvshmem.attach(self._module.ptr)
                # Keeps the module until NVSHMEM has left it; at exit it need not.
                weakref.finalize(self, nvshmem.detach, self._module, device).atexit = False
            self.function = int(self._module.get_function(self.compiled.symbol).ptr)
            attribute = driver.load().CUfunction_attribute
            driver.call(
                "cuFuncSetAttribute",
                self.function,
                attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                config.shared_bytes,
            )
            # Else the driver may put it off until the first launch, which then waits for every
            # kernel that runs; one that spins for a peer of the same GPU would wait for that
            # launch.
            driver.call("cuFuncLoad", self.function)


_kernels: weakref.WeakSet[Kernel[Any]] = weakref.WeakSet()


@functools.cache
def _keep_in_children() -> None:
    """Lets a forked child never collect its copies of modules, as when a data loader ends.

    CuPy would unload them, and tell of each on stderr that the child has no CUDA.
    """

    def keep() -> None:
        for kernel in list(_kernels):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kernel))

    os.register_at_fork(after_in_child=keep)


def _params_name(config: KernelConfig) -> str:
    return type(config).__name__.removesuffix("Config") + "Params"


def _literal(owner: str, name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    raise CompileError(f"{owner}.{name} is {value!r}, expected an int or a bool")


def _dump(folder: Path, name: str, unit: str, entry: Entry) -> None:
    """Writes what is looked at; the call goes on without it."""
    files: Mapping[str, bytes] = {
        "cu": unit.encode(),
        "log": entry.log.encode(),
        "cubin": entry.cubin,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, data in files.items():
            (folder / f"{name}.{suffix}").write_bytes(data)
    except OSError as error:
        warnings.warn(f"{env.dump.name}={folder} cannot be written: {error}", stacklevel=2)
