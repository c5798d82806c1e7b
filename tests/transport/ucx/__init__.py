"""Ranks on hosts of their own, and a network between them: NVSHMEM's UCX transport over TCP.

The hosts are namespaces of this one (`host.sh`). NVSHMEM's heap is memory of the host, which TCP
can read, and what NVSHMEM wants of GDRCopy is the identity there (`gdrapi.c`). All else is as
between real hosts: the kernels write to host memory, NVSHMEM's proxy thread gives rows and signals
to UCX, and the other rank's UCX writes them down.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from epjit.runtime.nvshmem import package_folders

HERE = Path(__file__).parent
HOST = HERE / "host.sh"
ARCHIVE = "ucx.tar.xz"

_SETTINGS = {
    "EPJIT_NVLINK_DOMAIN": "1",
    "EPJIT_TRANSPORT": "nvshmem",
    "NVSHMEM_REMOTE_TRANSPORT": "ucx",
    "NVSHMEM_UCX_TLS": "tcp",
    "NVSHMEM_HEAP_KIND": "SYSMEM",
    "NVSHMEM_SYMMETRIC_SIZE": "1G",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_DISABLE_MNNVL": "1",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",  # no address belongs to the hosts' names
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}


def why_not() -> str:
    """Why hosts cannot be had here, with the remedy; nothing when they can."""
    folder = os.environ.get("EPJIT_TEST_UCX")
    if not folder or not Path(folder, ARCHIVE).is_file():
        return (
            f"EPJIT_TEST_UCX={folder or ''} names no folder with {ARCHIVE} (NVSHMEM 3.8.0 "
            "and UCX); `python -m tests.transport.ucx.bundle FOLDER` makes one"
        )
    if shutil.which("unshare") is None:
        return "there is no `unshare`; install util-linux"
    tried = subprocess.run(
        ["unshare", "--mount", "--uts", "true"], check=False, capture_output=True, text=True
    )
    return f"needs root (CAP_SYS_ADMIN): {tried.stderr.strip()}" if tried.returncode else ""


def unpack(folder: Path) -> dict[str, str]:
    """Unpacks what the hosts need; returns the environment that ranks are to be started in."""
    with tarfile.open(Path(os.environ["EPJIT_TEST_UCX"], ARCHIVE)) as archive:
        archive.extractall(folder, filter="data")
    libraries = [str(folder / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    return _SETTINGS | {
        "EPJIT_TEST_UCX": str(folder),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "NVSHMEM_DIR": str((*package_folders("nvshmem"), folder / "nvshmem")[0]),
        "PYTHON": sys.executable,
    }
