"""Compiled kernels on disk.

An entry is a file that is written under another name and renamed, so readers see all of it or
nothing. It starts with the digest of the rest: a damaged entry counts as absent. The folder is the
user's alone, and so is each entry: who may write to a parent could put another folder in its place.

The cache saves time and nothing else: where it cannot be used, kernels are compiled without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import struct
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from epjit import env
from epjit.errors import CompileError, require
from epjit.sizes import align

_FORMAT = b"epjit cubin 1"
_LENGTHS = struct.Struct("<III")
_DIGEST_BYTES = 32
_SUFFIX = ".cubin"
_WRITING_SECONDS = 600  # no longer does a process write an entry
_KEY = re.compile("[0-9a-f]{64}")
_MAX_ENTRY_BYTES = 256 << 20


class Entry(NamedTuple):
    """Results of a compilation."""

    symbol: str
    log: str
    cubin: bytes


class StoredEntry(NamedTuple):
    """An entry as it lies in the folder."""

    key: str
    num_bytes: int
    modified: float
    """Seconds since the epoch."""
    entry: Entry | None
    """None when the file is damaged."""


def cache_folder() -> Path:
    """Folder of everything epjit keeps: ``EPJIT_CACHE_DIR``, or `epjit` in the user's cache.

    Raises:
        FileNotFoundError: The user has no home folder, and the variable is not set.
    """
    chosen = env.cache_dir()
    if chosen is not None:
        return chosen
    platformdirs = require("platformdirs", package="platformdirs", extra="")
    try:
        found = Path(platformdirs.user_cache_dir("epjit", appauthor=False))
    except RuntimeError:
        found = Path("~")  # what older versions leave as it is
    if not found.is_absolute():
        raise FileNotFoundError(f"this user has no home folder; set {env.cache_dir.name}")
    return found


@contextlib.contextmanager
def lock(file: Path, *, seconds: float) -> Iterator[None]:
    """Holds a lock file; goes on without it where there are no locks, or when the time is over.

    What is written under it is renamed into place, so that without it work may be done twice and
    nothing breaks. Some network file systems have no locks.
    """
    filelock = require("filelock", package="filelock", extra="")
    held = filelock.FileLock(file)
    with contextlib.suppress(OSError, NotImplementedError):  # its Timeout is an OSError
        held.acquire(timeout=seconds)
    try:
        yield
    finally:
        held.release()


def publish(file: Path, data: bytes) -> None:
    """Writes a file under another name and renames it: readers see all of it, or what was there."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem[:16]}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class CubinCache:
    """Compiled kernels of one folder.

    Args:
        directory: The folder; by default `cache_folder()`.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        """The folder.

        Raises:
            FileNotFoundError: See `cache_folder`.
        """
        return (self._directory or cache_folder()) / "cubins"

    @staticmethod
    def key(*parts: bytes) -> str:
        """Name of an entry: a digest of everything that decides what is compiled."""
        digest = hashlib.sha256()
        for part in (_FORMAT, *parts):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def get(self, key: str) -> Entry | None:
        """The entry, or None when it is absent or damaged.

        Raises:
            OSError: It cannot be read, or is another user's.
        """
        try:
            return _decode(_read(self._path(key)))
        except FileNotFoundError:
            return None

    def put(self, key: str, entry: Entry) -> None:
        """Publishes an entry; replaces what was there."""
        publish(self._path(key), _encode(entry))

    def stored(self) -> list[StoredEntry]:
        """All entries, damaged ones too, the newest first."""
        found = []
        for path in self.directory.glob(f"*{_SUFFIX}") if self.directory.is_dir() else ():
            # Another process may clear the folder; nobody is to run what another user left.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                data, modified = _read(path), path.stat().st_mtime
                found.append(StoredEntry(path.stem, len(data), modified, _decode(data)))
        return sorted(found, key=lambda each: -each.modified)

    def clear(self) -> int:
        """Deletes all entries, and locks and temporary files that a crash left.

        A process that compiles right now publishes its entry all the same.

        Returns:
            How many entries there were.
        """
        removed = 0
        for path in list(self.directory.iterdir()) if self.directory.is_dir() else ():
            if path.suffix == "":  # a temporary file, perhaps of a process that is writing it
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime < _WRITING_SECONDS:
                        continue
            path.unlink(missing_ok=True)
            removed += path.suffix == _SUFFIX
        return removed

    def export(self, archive: Path) -> int:
        """Writes all sound entries to a tar file.

        Returns:
            How many there are.
        """
        count = 0
        with tarfile.open(archive, "w") as tar:
            for each in self.stored():
                if each.entry is not None:
                    data = _encode(each.entry)
                    member = tarfile.TarInfo(each.key + _SUFFIX)
                    member.size, member.mtime, member.mode = len(data), int(each.modified), 0o600
                    tar.addfile(member, io.BytesIO(data))
                    count += 1
        return count

    def import_archive(self, archive: Path) -> int:
        """Adds the entries of a tar file that `export` wrote; all of them, or none.

        The digests show damage, not who made the archive: it holds code that the GPU will run, so
        import only what you trust.

        Returns:
            How many entries the archive holds.

        Raises:
            ValueError: It is no tar file, or not all of one; or a member is no entry, or is
                damaged, and is named. Nothing was added.
            PermissionError: The folder is not this user's alone.
        """
        try:
            found = _read_archive(archive)
        except (tarfile.TarError, OverflowError) as error:
            raise ValueError(
                f"{archive} is not what `python -m epjit cache export` writes, a tar file that is "
                f"not compressed, or not all of it ({error}); export it again"
            ) from error
        self.prepare()
        for key, entry in found.items():
            self.put(key, entry)
        return len(found)

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
            CompileError: It has none, or cannot be used, and ``EPJIT_ASSERT_COMPILE`` is set; or
                the compiler refuses.
        """
        try:
            self.prepare()
            entry = self.get(key)
        except OSError as error:
            if env.assert_compile():
                raise CompileError(
                    f"{what} cannot be taken from the cache ({error}) and EPJIT_ASSERT_COMPILE=1 "
                    "forbids to compile it now; set EPJIT_CACHE_DIR to the folder that has it"
                ) from error
            _warn(error)
            return compile_entry(), False
        if entry is not None:
            return entry, True
        if env.assert_compile():
            raise CompileError(
                f"{what} is not in the cache {self.directory} and EPJIT_ASSERT_COMPILE=1 forbids "
                "to compile it now; compile it before, with the same EPJIT_CACHE_DIR"
            )
        with lock(self.directory / f"{key}.lock", seconds=env.timeout_seconds()):
            with contextlib.suppress(OSError):
                if (entry := self.get(key)) is not None:
                    return entry, True
            entry = compile_entry()
            try:
                self.put(key, entry)
            except OSError as error:
                _warn(error)
            return entry, False

    def _path(self, key: str) -> Path:
        return self.directory / (key + _SUFFIX)

    def prepare(self) -> None:
        """Creates the folder; refuses one where others could leave code for this user to run.

        Raises:
            PermissionError: The folder is not this user's alone; the text has the remedy.
        """
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


def _read_archive(archive: Path) -> dict[str, Entry]:
    """The entries of an archive by key; see `CubinCache.import_archive`."""
    found: dict[str, Entry] = {}
    end = 0
    with archive.open("rb") as whole, tarfile.open(fileobj=whole, mode="r:") as tar:
        for member in tar:
            key = member.name.removesuffix(_SUFFIX)
            file = tar.extractfile(member) if member.isreg() else None
            if file is None or not _KEY.fullmatch(key) or member.name != key + _SUFFIX:
                raise ValueError(
                    f"{archive} holds {member.name!r}, which is no entry of this cache; was it "
                    "made by `python -m epjit cache export`?"
                )
            if member.size > _MAX_ENTRY_BYTES:
                raise ValueError(
                    f"{archive}: {member.name} has {member.size} bytes, more than any entry"
                )
            entry = _decode(file.read())
            if entry is None:
                raise ValueError(f"{archive}: {member.name} is damaged; export it again")
            found[key] = entry
            end = member.offset_data + align(member.size, tarfile.BLOCKSIZE)
        # Where a file is cut between two members, `tarfile` takes it for the end.
        whole.seek(end)
        if whole.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")
    return found


_has_warned = False


def _warn(error: OSError) -> None:
    """Once a process."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"kernels are compiled but not kept: their cache cannot be used ({error}); every "
            f"process compiles anew until {env.cache_dir.name} names a folder of your own that can "
            "be written",
            RuntimeWarning,
            stacklevel=2,
        )


def _read(path: Path) -> bytes:
    """A file of this user.

    Raises:
        OSError: It is another user's, or cannot be read.
    """
    with path.open("rb") as file:
        owner = os.fstat(file.fileno()).st_uid
        if owner != os.geteuid():
            raise PermissionError(
                f"{path} belongs to user {owner}, not to user {os.geteuid()}; remove it"
            )
        return file.read()


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
    try:
        return Entry(
            symbol=payload[_LENGTHS.size : log_at].decode(),
            log=payload[log_at:cubin_at].decode(),
            cubin=payload[cubin_at:],
        )
    except UnicodeDecodeError:
        return None
