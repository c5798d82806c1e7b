"""Makes the folder that EPJIT_TEST_UCX names, on a machine with a network and a C compiler.

python -m tests.transport.ucx.bundle FOLDER [--sm 90]
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.transport.ucx import ARCHIVE, HERE

PACKAGES = ("nvidia-nvshmem-cu13==3.8.0", "libucx-cu13==1.22.0")
# Folders of the packages, those of the archive, and what goes from one to the other. UCX comes
# without its modules for CUDA: it meets memory of the host only.
FILES = (
    ("nvidia/nvshmem", "nvshmem", ("include",)),
    (
        "nvidia/nvshmem/lib",
        "nvshmem/lib",
        ("libnvshmem_host.so.3", "nvshmem_bootstrap_uid.so.3", "nvshmem_transport_ucx.so.7"),
    ),
    ("libucx/lib", "lib", ("libucm.so.0", "libucs.so.0", "libuct.so.0", "libucp.so.0")),
    ("", "lib", ("libgdrapi.so.2",)),
)


def compile_gdrapi(library: Path) -> None:
    """The stand-in for GDRCopy."""
    options = ("-O2", "-Wall", "-Werror", "-fPIC", "-shared", f"-Wl,-soname,{library.name}")
    subprocess.run(["cc", *options, "-o", str(library), str(HERE / "gdrapi.c")], check=True)


def slim(data: bytearray, sm: int) -> None:
    """Fills the device code for all architectures but one with zeros, which pack well.

    Fat binaries are a header (magic, version, own size, size of the rest) and entries: kind, own
    size, size of the code, ..., architecture at byte 28.
    """
    magic = bytes.fromhex("50ed55ba0100")
    start = data.find(magic)
    while start >= 0:
        header_bytes, nbytes = struct.unpack_from("<HQ", data, start + 6)
        entry = start + header_bytes
        end = entry + nbytes
        while entry < end:
            header_bytes, nbytes = struct.unpack_from("<IQ", data, entry + 4)
            code = entry + header_bytes
            if struct.unpack_from("<I", data, entry + 28) != (sm,):
                data[code : code + nbytes] = bytes(nbytes)
            entry = code + nbytes
        start = data.find(magic, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sm", type=int, default=90, help="architecture of the GPUs")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", scratch]
        subprocess.run([*pip, *PACKAGES], check=True)
        compile_gdrapi(root / "libgdrapi.so.2")
        host = root / "nvidia/nvshmem/lib/libnvshmem_host.so.3"
        data = bytearray(host.read_bytes())
        slim(data, options.sm)
        host.write_bytes(data)
        with tarfile.open(options.folder / ARCHIVE, "w:xz") as archive:
            for source, target, names in FILES:
                for name in names:
                    archive.add(root / source / name, f"{target}/{name}")


if __name__ == "__main__":
    main()
