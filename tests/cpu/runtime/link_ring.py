"""Compiles and links the ring kernel with the CUDA of the interpreter that runs this.

Arguments: architectures. NVSHMEM_DIR and NVSHMEM_IB_ENABLE_IBGDA say with what. Writes one JSON
object, by architecture: {registers, spill_bytes, symbols, error}; symbols are what the driver can
find by name.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from epjit.errors import CompileError
from epjit.runtime import nvjitlink, nvrtc, nvshmem
from epjit.runtime.kernel import compile_kernel
from tests.transport.ring import RingConfig, ring_sources


def link(arch: str) -> dict[str, object]:
    """A refusal is a result, not an exception."""
    try:
        compiled = compile_kernel(RingConfig(), arch=arch)
    except CompileError as error:
        return {"error": str(error)}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        table = subprocess.run(
            ["readelf", "-sW", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {
        "error": "",
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "symbols": re.findall(r"OBJECT +GLOBAL .* (nvshmemi_\w+_d)$", table, re.MULTILINE),
    }


if __name__ == "__main__":
    with ring_sources(), ThreadPoolExecutor(2) as workers:
        results = dict(zip(sys.argv[1:], workers.map(link, sys.argv[1:]), strict=True))
    versions = {
        "nvrtc": nvrtc.version(),
        "nvjitlink": nvjitlink.version(),
        "nvshmem": nvshmem.find_installation().version,
    }
    json.dump({"versions": versions, "archs": results}, sys.stdout)
