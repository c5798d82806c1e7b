"""The device sources: text of `epjit/cuda_src`, and what each file includes."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Hashable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeVar, cast

from epjit.errors import CompileError

if TYPE_CHECKING:
    import sys

    if sys.version_info >= (3, 11):
        from importlib.resources.abc import Traversable
    else:
        from importlib.abc import Traversable

ROOT: Traversable | None = None
"""Folder that holds the sources; None is `epjit/cuda_src` of this package."""

F = TypeVar("F", bound=Callable[..., Any])

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def root() -> Traversable:
    """Folder that `#include "..."` is relative to."""
    return resources.files("epjit") / "cuda_src" if ROOT is None else ROOT


def remembered(function: F) -> F:
    """Calls a function of sources once a process; of another `ROOT` (tests) always anew."""
    remembers = functools.cache(function)

    @functools.wraps(function)
    def call(*args: Hashable) -> object:
        return (remembers if ROOT is None else function)(*args)

    return cast("F", call)


@remembered
def read(path: str) -> str:
    """Text of one source.

    Args:
        path: Path below the root, with forward slashes.

    Raises:
        CompileError: There is no such file.
    """
    file = root().joinpath(path)
    if not file.is_file():
        raise CompileError(f"there is no device source {path!r} under {root()}")
    return file.read_bytes().decode("utf-8")


@remembered
def closure(*paths: str) -> Mapping[str, str]:
    """Sources and everything that they include, directly or not.

    Args:
        *paths: Paths below the root.

    Returns:
        Path to text, `paths` first. An include that the root does not hold is left out: either it
        stands behind an `#ifdef` (the emulation's header), or the compiler will name it.

    Raises:
        CompileError: One of `paths` is no file.
    """
    texts = {path: read(path) for path in paths}
    pending = [name for text in texts.values() for name in _INCLUDE.findall(text)]
    while pending:
        name = pending.pop(0)
        if name not in texts and root().joinpath(name).is_file():
            texts[name] = read(name)
            pending += _INCLUDE.findall(texts[name])
    return texts


@remembered
def digest(*paths: str) -> str:
    """SHA-256 (hexadecimal) over the names and bytes of sources and all they include."""
    whole = hashlib.sha256()
    for name, text in sorted(closure(*paths).items()):
        for part in (name.encode(), text.encode()):
            whole.update(len(part).to_bytes(8, "little"))
            whole.update(part)
    return whole.hexdigest()
