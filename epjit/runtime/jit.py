"""Kernels: from a config to text, to a cubin, to a launch.

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
import threading
import time
import typing
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from epjit import env
from epjit.arch import arch_number
from epjit.errors import CompileError, require
from epjit.runtime import driver, nvjitlink, nvrtc, nvshmem, nvshmem_device, sources
from epjit.runtime.cache import CubinCache, Entry
from epjit.runtime.device import arch_of, shared_bytes_per_block

_C_TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "bool": ctypes.c_bool,
    "int": ctypes.c_int32,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_FORMATS: dict[Any, Any] = {
    ctypes.c_bool: "?",
    ctypes.c_int32: "i",
    ctypes.c_uint32: "I",
    ctypes.c_int64: "q",
    ctypes.c_uint64: "Q",
    ctypes.c_float: "f",
    ctypes.c_double: "d",
}  # of a memoryview
_CONFIG_TYPES = {int: ctypes.c_int32, bool: ctypes.c_bool}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_FIELD = re.compile(
    r"(?:const\s+)?(?P<type>\w+)(?P<pointer>(?:\s*(?:const\s*)?\*)+(?:\s*const\b)?)?\s*\b(?P<name>[A-Za-z_]\w*)"
    r"(?:\s*\[\s*(?P<count>\w+)\s*\])?"
)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_log = logging.getLogger(__name__)


class KernelConfig:
    """What a kernel is compiled for: base of frozen dataclasses whose fields are ints and bools.

    The class `XConfig` goes with the C++ structs `XConfig`, which has the same fields in the same
    order, and `XParams`; the functions are called `op`, `op_threads`, `op_shared_bytes` and, if
    there are slots, `op_slot_bytes`.
    """

    source: ClassVar[str]
    """File below `cuda_src`."""
    op: ClassVar[str]
    """Name of the device function, and of the kernel."""
    transport: ClassVar[bool] = False
    """Whether the source includes transport.cuh, so that the kernel needs a body for it."""
    starts_early: ClassVar[bool] = False
    """Whether its blocks take their places while the kernel ahead in the stream still runs, and
    wait there until that has ended (programmatic dependent launch, sm_90 and newer)."""

    @property
    def threads(self) -> int:
        """Threads a block."""
        raise NotImplementedError

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes."""
        raise NotImplementedError

    @property
    def slot_bytes(self) -> int | None:
        """Bytes of a slot of shared memory between ranks, `op_slot_bytes`; None: it has none."""
        return None

    @property
    def tag(self) -> str:
        """Namespace of the kernel below `epjit`: tells specialisations apart in a profile."""
        raise NotImplementedError


class Compiled(NamedTuple):
    """A compiled kernel."""

    cubin: bytes
    symbol: str
    log: str
    registers: int
    spill_bytes: int
    from_cache: bool


TRANSPORTS = ("nvshmem", "loopback")
"""Bodies of transport.cuh: nvshmem is linked with the unit, loopback is included by it."""
_LOOPBACK = "transport/loopback.cuh"


def sources_digest(*paths: str) -> str:
    """SHA-256 (hexadecimal) over sources and everything they include."""
    return sources.digest(*paths)


def unit_sources(config: KernelConfig, transport: str = "nvshmem") -> tuple[str, ...]:
    """What the unit of a kernel includes.

    Raises:
        CompileError: There is no such transport.
    """
    if transport not in TRANSPORTS:
        raise CompileError(f"transport is {transport!r}, expected one of {TRANSPORTS}")
    included = config.transport and transport == "loopback"
    return (_LOOPBACK, config.source) if included else (config.source,)


def render(config: KernelConfig, transport: str = "nvshmem") -> str:
    """The unit that is compiled: one kernel, with every size that both sides compute held together.

    Args:
        config: The specialisation.
        transport: Which body of transport.cuh, for kernels that need one.

    Raises:
        CompileError: A field is neither int nor bool, or the source has no struct with the same
            fields.
    """
    config_name = type(config).__name__
    if not config_name.endswith("Config") or not dataclasses.is_dataclass(config):
        raise CompileError(f"{config_name} must be a dataclass whose name ends in 'Config'")
    if not _IDENTIFIER.fullmatch(config.tag):
        raise CompileError(f"{config_name}.tag is {config.tag!r}, which is no C++ name")
    params_name = _params_name(config)
    _check_fields(type(config))
    op = config.op
    fields = ", ".join(
        f".{field.name} = {_literal(config_name, field.name, getattr(config, field.name))}"
        for field in dataclasses.fields(config)
    )
    size = ctypes.sizeof(params_type(config.source, params_name))
    sizes = {"threads": config.threads, "shared_bytes": config.shared_bytes}
    if config.slot_bytes is not None:
        sizes["slot_bytes"] = config.slot_bytes
    included = unit_sources(config, transport)
    # Before all else. The kernel itself lets the next one in (sync.cuh, "blocks that leave").
    begin = "ptx::griddepcontrol_wait(); "
    return (
        f"// Generated by epjit. Sources: {sources_digest(*included)[:16]}\n"
        + "".join(f'#include "{path}"\n' for path in included)
        + "namespace epjit {\n"
        f"constexpr {config_name} kConfig{{{fields}}};\n"
        + "".join(
            f"static_assert({op}_{name}(kConfig) == {value});\n" for name, value in sizes.items()
        )
        + f"static_assert(sizeof({params_name}) == {size});\n"
        f"namespace {config.tag} {{\n"
        f"__global__ void __launch_bounds__({config.threads}, 1)\n"
        f"{op}(const __grid_constant__ {params_name} params) {{ "
        f"{begin if config.starts_early else ''}epjit::{op}<kConfig>(params); }}\n"
        f"}}  // namespace {config.tag}\n"
        "}  // namespace epjit\n"
    )


def _check_fields(config: type[KernelConfig]) -> None:
    """Holds the dataclass against the C++ struct, where a field that Python lacks would be 0.

    Raises:
        CompileError: Their fields differ in name, order or type; names the first that do.
    """
    name, types = config.__name__, typing.get_type_hints(config)
    declared = dataclasses.fields(config)  # type: ignore[arg-type]
    here = [(field.name, _CONFIG_TYPES.get(types[field.name])) for field in declared]
    there = params_type(config.source, name)._fields_
    for mine, theirs in itertools.zip_longest(here, there):
        if mine != theirs:
            ours, cpp = (
                f"{each[1].__name__} {each[0]}" if each and each[1] else str(each and each[0])
                for each in (mine, theirs)
            )
            raise CompileError(
                f"the dataclass {name} has the field `{ours}` where struct {name} of "
                f"{config.source} has `{cpp}`; both must have the same fields in the same order"
            )


def params_type(source: str, struct_name: str) -> type[ctypes.Structure]:
    """Reads a struct of parameters, or of a config, from a source.

    Args:
        source: File below `cuda_src`; the struct may stand in what it includes.
        struct_name: Name of the struct. Its fields are numbers, pointers, structs, and arrays of
            these whose length is a number or a ``constexpr int``. It may have bases, whose fields
            come first and are fields of the record, too.

    Returns:
        The record with the same layout. Pointers are integers in it.

    Raises:
        CompileError: The struct is missing, or has a field that cannot be read.
    """
    text = _COMMENT.sub("", "\n".join(sources.closure(source).values()))
    return _read_struct(text, struct_name, source)


def _read_struct(text: str, name: str, source: str) -> type[ctypes.Structure]:
    found = _struct(text, name)
    if found is None:
        raise CompileError(f"{source} has no `struct {name} {{...}};`")
    bases = _IDENTIFIER.findall(found["bases"] or "")
    fields: list[tuple[str, Any]] = [(base, _read_struct(text, base, source)) for base in bases]
    for line in (" ".join(part.split()) for part in found["fields"].split(";")):
        if not line:
            continue
        field = _FIELD.fullmatch(line)
        c_type: Any = None if field is None else _C_TYPES.get(field["type"])
        if field is not None and field["pointer"]:
            c_type = ctypes.c_uint64
        elif field is not None and c_type is None and _struct(text, field["type"]):
            c_type = _read_struct(text, field["type"], source)
        if field is None or c_type is None:
            raise CompileError(f"{source}: struct {name}: cannot read the field `{line};`")
        if field["count"] is None:
            fields.append((field["name"], c_type))
        else:
            length = _array_length(field["count"], text, f"{source}: struct {name}: `{line};`")
            fields.append((field["name"], c_type * length))
    # Without __slots__, a misspelt field would become a new attribute and be lost.
    members = {"_anonymous_": bases, "_fields_": fields, "__slots__": ()}
    return type(name, (ctypes.Structure,), members)


def _struct(text: str, name: str) -> re.Match[str] | None:
    pattern = rf"\bstruct\s+{re.escape(name)}\s*(?::(?P<bases>[^{{]*))?\{{(?P<fields>.*?)\}}\s*;"
    return re.search(pattern, text, re.DOTALL)


def field_types(record: type[ctypes.Structure]) -> dict[str, Any]:
    """Fields of a record by name, those of its bases among them."""
    fields: Sequence[Any] = record._fields_
    types: dict[str, Any] = {}
    for name, c_type in fields:
        if name in getattr(record, "_anonymous_", ()):
            types |= field_types(c_type)
        else:
            types[name] = c_type
    return types


def compile_kernel(config: KernelConfig, *, arch: str, transport: str = "nvshmem") -> Compiled:
    """Compiles a kernel, or takes it from the cache. Needs no GPU, and is safe from any thread.

    Args:
        config: The specialisation.
        arch: Architecture, such as ``"sm_90a"``.
        transport: Which body of transport.cuh, for kernels that need one.

    Raises:
        CompileError: The compiler refuses, or must not be asked (``EPJIT_ASSERT_COMPILE``).
        ImportError: NVRTC, or what links with NVSHMEM, is not installed.
        RuntimeError: The NVSHMEM that is found cannot be used.
    """
    unit = render(config, transport)
    headers = sources.closure(*unit_sources(config, transport))
    name = f"{config.tag}.{config.op}.{arch}"
    linked = config.transport and transport == "nvshmem"
    target = nvshmem_device.target(arch) if linked else arch
    key = CubinCache.key(
        repr((nvrtc.version(), nvrtc.options(target, linked=linked))).encode(),
        *([nvshmem_device.key()] if linked else []),
        unit.encode(),
        *(part.encode() for item in headers.items() for part in item),
    )

    def compile_entry() -> Entry:
        compile_unit = nvrtc.compile_ltoir if linked else nvrtc.compile_cubin
        code, symbol, log = compile_unit(
            unit,
            f"{name}.cu",
            arch=target,
            headers=headers,
            name_expression=f"epjit::{config.tag}::{config.op}",
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


class Kernel:
    """A kernel that is compiled and loaded on one device.

    Args:
        config: The specialisation.
        device: Number of the GPU.
        transport: Which body of transport.cuh, for kernels that need one; NVSHMEM must work
            already.

    Attributes:
        function: The CUfunction, as an integer.
        starts_early: Whether it is launched so, as its config says.
        params: Type of the parameter record.
        compiled: What the compiler gave.

    Raises:
        CompileError: The compiler refuses.
        ImportError: NVRTC or CuPy is not installed.
        RuntimeError: The block does not fit the device, or the driver refuses the kernel.
    """

    def __init__(self, config: KernelConfig, *, device: int, transport: str = "nvshmem") -> None:
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
        self.compiled = compile_kernel(config, arch=arch, transport=transport)
        cupy_function = require("cupy.cuda.function", package="cupy-cuda13x (cupy-cuda12x)")
        with driver.using(device):
            self._module = cupy_function.Module()  # unloads the code when it is collected
            _keep_in_children()
            _kernels.add(self)
            self._module.load(self.compiled.cubin)
            if config.transport and transport == "nvshmem":
                nvshmem.attach(self._module.ptr)
                # Keeps the module until NVSHMEM has left it; at exit it need not.
                weakref.finalize(self, _detach, self._module, device).atexit = False
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


class Launch:
    """A kernel with its parameters, to be launched again and again.

    Args:
        kernel: What to launch.
        **bound: Parameters that stay the same from call to call. Arrays take any sequence of their
            length, pointers take integers.

    Raises:
        TypeError: A name is no parameter, or a value has another type.
        ValueError: A value does not fit its field, or a sequence has another length.
    """

    def __init__(self, kernel: Kernel, **bound: Any) -> None:
        self.kernel = kernel
        config = kernel.config
        cuda = driver.load()
        self._cu_launch = cuda.cuLaunchKernelEx
        self._function = cuda.CUfunction(kernel.function)
        self._shape = _launch_shape(config, starts_early=kernel.starts_early)
        self._record = kernel.params()
        self._fields = _fields(self._record)
        self._unset = set(self._fields)
        # The driver takes one pointer for each argument of the kernel: here, the record.
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._record))
        self._arguments = ctypes.addressof(self._pointers)
        self._lock = threading.Lock()
        self._fixed: dict[str, Any] | None = bound
        self._set(bound)

    def __call__(self, stream: int, grid: int, **values: Any) -> None:
        """Sets parameters and launches. A parameter keeps its value until it is set again.

        Args:
            stream: Handle of the CUDA stream.
            grid: Number of blocks.
            **values: Parameters that change.

        Raises:
            TypeError: A name is no parameter, a parameter was never set, or a value has another
                type.
            ValueError: A value does not fit its field.
            RuntimeError: The driver refuses the launch.
        """
        self.start(stream, grid, values)

    def prepare(self, values: dict[str, Any]) -> None:
        """Sets parameters of the next launch that are known before it.

        Raises:
            TypeError: As a launch.
            ValueError: As a launch.
        """
        with self._lock:
            self._set(values)

    def start(
        self,
        stream: int,
        grid: int,
        values: dict[str, Any],
        fixed: dict[str, Any] | None = None,
    ) -> None:
        """The same with the parameters in a dict, which saves the copies that `**` makes.

        Args:
            stream: Handle of the CUDA stream.
            grid: Number of blocks.
            values: Parameters that change.
            fixed: More of them, in a dict that never changes: they are set when it is another one
                than that of the launch before.
        """
        with self._lock:
            if fixed is not None and fixed is not self._fixed:
                self._fixed = None  # an interrupt in between leaves some of both
                self._set(fixed)
                self._fixed = fixed
            self._set(values)
            if self._unset:
                raise TypeError(f"{self.kernel.config.op} was never given {sorted(self._unset)}")
            (status,) = self._launch(stream, grid)
            if status:
                self._recover(status, stream, grid)

    def _set(self, values: dict[str, Any]) -> None:
        fields = self._fields
        name, value = "", None
        try:
            for name, value in values.items():
                fields[name][0] = value
        except KeyError:
            unknown = sorted(values.keys() - fields.keys())
            op = self.kernel.config.op
            raise TypeError(f"{op} has no parameters {unknown}; it has {sorted(fields)}") from None
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.kernel.config.op}: {name}={value!r}: {error}") from None
        if self._unset:
            self._unset -= values.keys()

    def _launch(self, stream: int, grid: int) -> tuple[Any]:
        shape = self._shape
        shape.gridDimX, shape.hStream = grid, stream
        result: tuple[Any] = self._cu_launch(shape, self._function, self._arguments, 0)
        return result

    def _recover(self, status: Any, stream: int, grid: int) -> None:
        """Launches again with the kernel's GPU current, if that may be what was missing.

        A thread has no context before it first uses a GPU, or another GPU is current in it.
        """
        results = driver.load().CUresult
        if status in (results.CUDA_ERROR_INVALID_CONTEXT, results.CUDA_ERROR_INVALID_HANDLE):
            with driver.using(self.kernel.device):
                (status,) = self._launch(stream, grid)
        if status:
            raise RuntimeError(
                f"{self.kernel.config.op} cannot be launched with {grid} blocks of "
                f"{self._shape.blockDimX} threads and {self._shape.sharedMemBytes} bytes of shared "
                f"memory on device {self.kernel.device}: {driver.describe(status)}; "
                f"{self.kernel.config}"
            )


def _launch_shape(config: KernelConfig, *, starts_early: bool) -> Any:
    """A CUlaunchConfig that lacks the number of blocks and the stream."""
    cuda = driver.load()
    shape = cuda.CUlaunchConfig()
    shape.gridDimY = shape.gridDimZ = shape.blockDimY = shape.blockDimZ = 1
    shape.blockDimX, shape.sharedMemBytes = config.threads, config.shared_bytes
    if starts_early:
        attribute = cuda.CUlaunchAttribute()
        attribute.id = (
            cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        shape.attrs, shape.numAttrs = [attribute], 1
    return shape


def _detach(module: Any, device: int) -> None:
    nvshmem.detach(module.ptr, device)


_kernels: weakref.WeakSet[Kernel] = weakref.WeakSet()


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


def _array_length(count: str, text: str, where: str) -> int:
    if count.isdigit():
        return int(count)
    found = re.search(rf"\bconstexpr\s+\w+\s+{count}\s*=\s*(\d+)\s*;", text)
    if found is None:
        raise CompileError(f"{where}: there is no `constexpr int {count} = <number>;`")
    return int(found[1])


class _ArrayField:
    """Stores a whole array; `_fields` has one for each array of a record."""

    def __init__(self, array: ctypes.Array[Any]) -> None:
        self._array = array

    def __setitem__(self, index: int, values: Sequence[Any]) -> None:
        self._array[:] = list(values)


def _fields(record: ctypes.Structure) -> dict[str, Any]:
    """Where each field is stored: ``fields[name][0] = value`` does it.

    Half the time of setting attributes, and unlike these it refuses a number that does not fit.
    """
    data = memoryview(record).cast("B")
    fields: dict[str, Any] = {}
    for name, c_type in field_types(type(record)).items():
        if issubclass(c_type, ctypes.Array):
            fields[name] = _ArrayField(getattr(record, name))
        else:
            offset, size = getattr(type(record), name).offset, ctypes.sizeof(c_type)
            fields[name] = data[offset : offset + size].cast(_FORMATS[c_type])
    return fields


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
