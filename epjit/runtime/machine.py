"""The machine as its kernel and loader show it: files of /proc and /sys, and libraries."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path


def read(path: str | Path) -> str:
    """Text of a file; empty when it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def mapped(name: str, maps: str | Path = "/proc/self/maps") -> list[Path]:
    """Files that this process has mapped, in order, whose names begin with `name`."""
    files = re.findall(rf"\s(/\S*/{re.escape(name)}[^/\s]*)$", read(maps), re.MULTILINE)
    return sorted({Path(file).resolve() for file in files})


def can_load(library: str) -> bool:
    """Whether the loader finds a library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
