"""Compiled kernels on disk.

An entry is a file that is written under another name and renamed, so readers see all of it or
nothing. It starts with the digest of the rest: a damaged entry counts as absent. The folder is the
user's alone.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from epjit import env
from epjit.errors import CompileError, require

_FORMAT = b"epjit cubin 1"
_LENGTHS = struct.Struct("<III")
_DIGEST_BYTES = 32


class Entry(NamedTuple):
    """What a compilation gives."""

    symbol: str
    log: str
    cubin: bytes


class CubinCache:
    """Compiled kernels of one folder.

    Args:
        directory: Where; by default ``EPJIT_CACHE_DIR``, or `epjit` in the user's cache folder.
    """

    def __init__(self, directory: Path | None = None) -> None:
        chosen = directory or env.cache_dir()
        if chosen is None:
            chosen = Path(
                require("platformdirs", package="platformdirs").user_cache_dir(
                    "epjit", appauthor=False
                )
            )
        self.directory = chosen / "cubins"

    @staticmethod
    def key(*parts: bytes) -> str:
        """Name of an entry: a digest of everything that decides what is compiled."""
        digest = hashlib.sha256()
        for part in (_FORMAT, *parts):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def get(self, key: str) -> Entry | None:
        """The entry, or None when it is absent or damaged."""
        try:
            return _decode(self._path(key).read_bytes())
        except FileNotFoundError:
            return None

    def put(self, key: str, entry: Entry) -> None:
        """Publishes an entry; replaces what was there."""
        descriptor, temporary = tempfile.mkstemp(dir=self.directory, prefix=f"{key[:16]}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_encode(entry))
            os.replace(temporary, self._path(key))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def get_or_compile(
        self, key: str, compile_entry: Callable[[], Entry], *, what: str
    ) -> tuple[Entry, bool]:
        """The entry; of all processes and threads that ask at once, one compiles, the others wait.

        Args:
            key: From `key`.
            compile_entry: Makes the entry when the cache has none.
            what: The kernel, in words, for messages.

        Returns:
            The entry, and whether the cache had it.

        Raises:
            CompileError: It has none and ``EPJIT_ASSERT_COMPILE`` is set, or the compiler refuses.
            PermissionError: The folder is not this user's alone.
        """
        self._prepare()
        if (entry := self.get(key)) is not None:
            return entry, True
        if env.assert_compile():
            raise CompileError(
                f"{what} is not in the cache {self.directory} and EPJIT_ASSERT_COMPILE=1 forbids "
                "to compile it now; compile it before, with the same EPJIT_CACHE_DIR"
            )
        filelock = require("filelock", package="filelock")
        lock = filelock.FileLock(self.directory / f"{key}.lock")
        try:
            lock.acquire(timeout=env.timeout_seconds())
        except filelock.Timeout:
            return self._compile(key, compile_entry), False  # twice the work, and as good
        try:
            if (entry := self.get(key)) is not None:
                return entry, True
            return self._compile(key, compile_entry), False
        finally:
            lock.release()

    def _compile(self, key: str, compile_entry: Callable[[], Entry]) -> Entry:
        entry = compile_entry()
        self.put(key, entry)
        return entry

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.cubin"

    def _prepare(self) -> None:
        """Creates the folder; refuses one where others could leave code for this user to run."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.directory.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise PermissionError(
                f"the cache {self.directory} is no folder (a link?); remove it or set "
                "EPJIT_CACHE_DIR"
            )
        if found.st_uid != os.geteuid():
            raise PermissionError(
                f"the cache {self.directory} belongs to user {found.st_uid}, not to user "
                f"{os.geteuid()}; set EPJIT_CACHE_DIR to a folder of your own"
            )
        if found.st_mode & 0o077:
            raise PermissionError(
                f"the cache {self.directory} is open to others (mode "
                f"{stat.S_IMODE(found.st_mode):o}); run: chmod 700 {self.directory}"
            )


def _encode(entry: Entry) -> bytes:
    parts = (entry.symbol.encode(), entry.log.encode(), entry.cubin)
    payload = _LENGTHS.pack(*map(len, parts)) + b"".join(parts)
    return hashlib.sha256(payload).digest() + payload


def _decode(data: bytes) -> Entry | None:
    digest, payload = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest or len(payload) < _LENGTHS.size:
        return None
    symbol_bytes, log_bytes, cubin_bytes = _LENGTHS.unpack_from(payload)
    log_at = _LENGTHS.size + symbol_bytes
    cubin_at = log_at + log_bytes
    if cubin_at + cubin_bytes != len(payload):
        return None
    return Entry(
        symbol=payload[_LENGTHS.size : log_at].decode(),
        log=payload[log_at:cubin_at].decode(),
        cubin=payload[cubin_at:],
    )
