"""NVSHMEM's device code: the body of transport.cuh, compiled once and linked with each kernel.

Two ways:

- inline: everything comes from NVSHMEM's headers. All transports but IBGDA.
- with the device library (``NVSHMEM_IB_ENABLE_IBGDA=1``, which `nvshmem.initialize` sets where it
  has begun IBGDA): that one's functions come from libnvshmem_device.a, as calls.

Nothing here needs a GPU or loads NVSHMEM's host library.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from pathlib import Path

from epjit import env
from epjit.errors import CompileError, missing_package
from epjit.runtime import nvjitlink, nvrtc, nvshmem, sources
from epjit.runtime.cache import CubinCache, Entry

SOURCE = "transport/nvshmem.cu"

# NVSHMEM finds these two by name in the loaded kernel, and they are `static` in its header.
_STATE_HEADER = "non_abi/device/threadgroup/nvshmemi_common_device_defines.cuh"

# NVRTC's uint64_t is `unsigned long long`; the device library was built with `unsigned long`, and
# one function of it has the type in its mangled name. These headers define it, not all in every
# version.
_CCCL_INTEGERS = ("cuda/std/cstdint", "cuda/std/__cuda/cstdint_prelude.h")
_CUDA_INTEGERS = ("cuda_awbarrier_helpers.h", "cuda_pipeline_helpers.h")
_LONG_LONG = re.compile(
    r"^(\s*(?:typedef\s+(?:un)?signed|using\s+u?int64_t\s*=\s*(?:un)?signed)\s+long) long"
    r"(\s+u?int64_t)?;",
    re.MULTILINE,
)


def target(arch: str) -> str:
    """Architecture to compile and link for, where the GPU is `arch`.

    The device library has no code for sm_103; that of its family, sm_100f, runs there.
    """
    return "sm_100f" if arch == "sm_103a" and env.nvshmem_ib_enable_ibgda() else arch


def key() -> bytes:
    """Everything but kernel and architecture that decides what `link` gives, for the cache.

    Raises:
        ImportError: NVSHMEM, nvJitLink or CUDA's headers are not installed.
        RuntimeError: See `nvshmem.find_installation`.
    """
    found = nvshmem.find_installation()
    with_library = env.nvshmem_ib_enable_ibgda()
    parts = (
        found.version,
        nvjitlink.version(),
        with_library,
        # Its size, not its time: entries may travel between machines.
        found.device_library.stat().st_size if with_library else 0,
        sources.digest(SOURCE),
        _tree_digest(found.include),
        *(_tree_digest(folder, names) for folder, names in _cuda_headers()),
    )
    return repr(parts).encode()


def link(kernel: bytes, *, arch: str, name: str) -> tuple[bytes, str]:
    """Links a kernel's LTO-IR with the body of transport.cuh.

    Args:
        kernel: Compiled for `target` of the architecture.
        arch: The architecture, such as ``"sm_90a"``.
        name: The kernel in words, for messages.

    Returns:
        The cubin and the linker's log.

    Raises:
        CompileError: Compiler or linker refuses.
        ImportError: NVSHMEM, nvJitLink or CUDA's headers are not installed.
    """
    if nvjitlink.version() < nvrtc.version():
        from epjit.remedy import upgrade_command

        linker, compiler = (".".join(map(str, each.version())) for each in (nvjitlink, nvrtc))
        raise CompileError(
            f"nvJitLink {linker} is older than NVRTC {compiler} and cannot read its output: "
            f"{upgrade_command('nvidia-nvjitlink')}"
        )
    libraries = []
    if env.nvshmem_ib_enable_ibgda():
        libraries.append(nvshmem.find_installation().device_library)
    return nvjitlink.link(
        {name: kernel, SOURCE: _body(target(arch))},
        arch=target(arch),
        what=name,
        libraries=libraries,
    )


def _body(arch: str) -> bytes:
    """LTO-IR of the body, from the cache."""
    options = nvrtc.options(arch, linked=True)
    cache_key = CubinCache.key(repr((nvrtc.version(), options)).encode(), key())
    version = ".".join(map(str, nvshmem.find_installation().version))

    def compile_entry() -> Entry:
        code, _, log = nvrtc.compile_unit(
            sources.read(SOURCE),
            f"{SOURCE} of NVSHMEM {version}",
            arch=arch,
            headers={**sources.closure(SOURCE), **_changed_headers()},
            linked=True,
            more_options=_more_options(),
        )
        return Entry(SOURCE, f"LTO-IR for '{arch}'\n{log}", code)

    entry, _ = CubinCache().get_or_compile(
        cache_key, compile_entry, what=f"{SOURCE} of NVSHMEM {version} for {arch}"
    )
    return entry.cubin


def _more_options() -> list[str]:
    folders = [nvshmem.find_installation().include, *(folder for folder, _ in _cuda_headers())]
    inline = [] if env.nvshmem_ib_enable_ibgda() else ["-DEPJIT_NVSHMEM_INLINE"]
    return [*inline, *(f"-I{folder}" for folder in folders)]


def _changed_headers() -> dict[str, str]:
    """Headers that the compiler gets with another text than on disk: name to text."""
    if not env.nvshmem_ib_enable_ibgda():
        text = (nvshmem.find_installation().include / _STATE_HEADER).read_text()
        return {_STATE_HEADER: text.replace("static __constant__", "__constant__")}
    return {
        name: _LONG_LONG.sub(r"\1\2;", (folder / name).read_text())
        for folder, _ in _cuda_headers()
        for name in (*_CCCL_INTEGERS, *_CUDA_INTEGERS)
        if (folder / name).is_file()
    }


def _cuda_headers() -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """Folders of CUDA's headers and of CCCL's, each with the files that tell its version.

    Raises:
        ImportError: A package is missing.
    """
    major = nvrtc.version()[0]
    cuda = _folder_with("cuda_runtime.h", f"cu{major}/include", "cuda_runtime/include")
    if cuda is None:
        raise missing_package(
            "nvidia-cuda-runtime (CUDA 12: nvidia-cuda-runtime-cu12)",
            reason="no cuda_runtime.h in this environment",
            extra="cu*-rdma",
        )
    cccl = _folder_with("cuda/std/cstdint", f"cu{major}/include/cccl", "cuda_cccl/include")
    cccl = cccl or _bundled_cccl()
    if cccl is None:
        raise missing_package(
            "nvidia-cuda-cccl (CUDA 12: nvidia-cuda-cccl-cu12)",
            reason="no cuda/std/cstdint in this environment",
            extra="cu*-rdma",
        )
    return (cuda, ("cuda_runtime_api.h", *_CUDA_INTEGERS)), (cccl, ("cuda/std/version",))


def _folder_with(header: str, *names: str) -> Path | None:
    found = (folder for name in names for folder in nvshmem.package_folders(name))
    return next((folder for folder in found if (folder / header).is_file()), None)


def _bundled_cccl() -> Path | None:
    """CuPy brings CCCL for its own kernels."""
    spec = importlib.util.find_spec("cupy")
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(root) / "_core" / "include" / "cupy" / "_cccl" / "libcudacxx"
        if (folder / "cuda" / "std" / "cstdint").is_file():
            return folder
    return None


@functools.cache
def _tree_digest(folder: Path, names: tuple[str, ...] = ()) -> str:
    """Digest of some files, or of all below a folder: names and bytes."""
    files = [folder / name for name in names] or sorted(folder.rglob("*"))
    whole = hashlib.sha256()
    for file in files:
        if file.is_file():
            whole.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
            whole.update(file.read_bytes())
    return whole.hexdigest()
