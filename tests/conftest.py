"""Nothing that a test keeps lies outside of temporary folders: epjit's cache is one of the session.

The workers of pytest-xdist, and processes that tests start, inherit it and share it. Who sets
EPJIT_CACHE_DIR keeps compiled kernels from one session to the next.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

_FOLDER = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the folder, before a test or a fork server starts."""
    if "EPJIT_CACHE_DIR" not in os.environ:
        config.stash[_FOLDER] = tempfile.mkdtemp(prefix="epjit-tests-")
        os.environ["EPJIT_CACHE_DIR"] = config.stash[_FOLDER]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Deletes it; where the workers of pytest-xdist have inherited it, the one that chose it."""
    folder = config.stash.get(_FOLDER, None)
    if folder is not None:
        del os.environ["EPJIT_CACHE_DIR"]
        shutil.rmtree(folder, ignore_errors=True)
