"""The commands that a message names as the remedy; worked out only when one is needed."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import shlex
from pathlib import Path

_CUDA_MAJORS = (12, 13)
_TORCH_FOR_CPU = "https://download.pytorch.org/whl/cpu"


def install_command(extra: str) -> str:
    """The command that brings what an extra of epjit holds, into the environment of this process.

    epjit is on no index, so a checkout is named by its path; for a copy that was installed, which
    pip could not find again, the packages themselves are.

    Args:
        extra: Name of the extra, ``""`` for what epjit always needs. ``"cu*"`` and ``"cu*-rdma"``
            stand for those of CUDA 12 or 13, whichever `cuda_major` says; for both when it does
            not know.
    """
    if "*" in extra:
        known = cuda_major()
        command = _install_command(extra.replace("*", str(known or _CUDA_MAJORS[-1])))
        other = extra.replace("*", str(_CUDA_MAJORS[0]))
        return command if known else f"{command} (for CUDA 12: {_install_command(other)})"
    command = _install_command(extra)
    if extra == "torch" and _driver() is None:  # the build for GPUs has 20 times the size
        command += f" --extra-index-url {_TORCH_FOR_CPU}"
    return command


def upgrade_command(package: str) -> str:
    """The command that brings a newer version of one of NVIDIA's packages.

    Args:
        package: Its name for CUDA 13, such as ``"nvidia-nvjitlink"``.
    """
    command = f"pip install --upgrade {package}"
    known = cuda_major()
    if known is None:
        return f"{command} (for CUDA 12: {command}-cu12)"
    return f"{command}-cu12" if known == 12 else command


def cuda_major() -> int | None:
    """12 or 13: the CUDA that torch was built for, else the driver's; None without either."""
    try:
        import torch

        version = torch.version.cuda
    except Exception:  # missing, or broken in its own way, which the caller need not hear of
        version = None
    if version:
        found = int(version.partition(".")[0])
    else:
        driver = _driver()
        if driver is None:
            return None
        number = ctypes.c_int()
        driver.cuDriverGetVersion(ctypes.byref(number))
        found = number.value // 1000
    return min(max(found, _CUDA_MAJORS[0]), _CUDA_MAJORS[-1])


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _install_command(extra: str) -> str:
    root = Path(__file__).resolve().parents[1]
    project = root / "pyproject.toml"
    if project.is_file() and 'name = "epjit"' in project.read_text():
        return f"pip install -e {shlex.quote(f'{root}[{extra}]' if extra else str(root))}"
    try:
        needed = _requirements(extra)
    except importlib.metadata.PackageNotFoundError:  # a folder that somebody copied
        return f"install epjit's own requirements{f' of its extra {extra}' if extra else ''}"
    return " ".join(["pip install", *map(shlex.quote, needed)])


def _requirements(extra: str) -> list[str]:
    """Requirements of an extra of the installed epjit, those that it is made of resolved."""
    found = []
    for line in importlib.metadata.requires("epjit") or ():
        needed, _, marker = line.partition(";")
        of = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if (of[1] if of else "") != extra:
            continue
        own = re.fullmatch(r"epjit\[([\w,-]+)\]", needed.strip())
        if own:
            found += [each for name in own[1].split(",") for each in _requirements(name)]
        else:
            found.append(needed.strip())
    return found
