"""The exceptions of epjit, and the one way to say that a package is missing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any


class CommunicationError(RuntimeError):
    """A peer did not come, or did not answer in time; or more rows came than there was room for.

    Attributes:
        op: Operation that waited, such as ``"dispatch"``; None when it is not known.
        rank: Rank that waited, or None.
        peer: Rank that was waited for, or None when there was not exactly one.
        missing: All ranks that were waited for.
        index: The token, expert, ... of the peer that was waited for, or None.
        expected: Value that the wait expected, or how many rows there was room for; or None.
        seen: Value that the wait saw last, or how many rows came; or None.
        epoch: Number of the call on the waiting rank, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        rank: int | None = None,
        peer: int | None = None,
        missing: Sequence[int] = (),
        index: int | None = None,
        expected: int | None = None,
        seen: int | None = None,
        epoch: int | None = None,
    ) -> None:
        super().__init__(message)
        self.op = op
        self.rank = rank
        self.peer = missing[0] if peer is None and len(missing) == 1 else peer
        self.missing = tuple(missing) if missing or peer is None else (peer,)
        self.index = index
        self.expected = expected
        self.seen = seen
        self.epoch = epoch


class CompileError(RuntimeError):
    """A kernel could not be rendered or compiled.

    Attributes:
        log: Output of the compiler, in full; empty when it was not reached.
    """

    def __init__(self, message: str, *, log: str = "") -> None:
        super().__init__(message)
        self.log = log


def missing_package(package: str, *, reason: str = "", extra: str = "cu*") -> ImportError:
    """Builds the error for a package that is not installed.

    Args:
        package: Name of the distribution, such as ``"cuda-bindings"``.
        reason: Message of the import system.
        extra: The extra that brings it, as for `remedy.install_command`.

    Returns:
        An ImportError that names the package and the command that installs it.
    """
    from epjit.remedy import install_command

    detail = f" ({reason})" if reason else ""
    return ImportError(
        f"epjit needs the package {package}, which cannot be imported{detail}: "
        f"{install_command(extra)}"
    )


def require(module: str, *, package: str, extra: str = "cu*") -> Any:
    """Imports a module that only some installations have.

    Args:
        module: Dotted name of the module.
        package: Distribution that holds it, for the message.
        extra: The extra that brings it, as for `remedy.install_command`.

    Returns:
        The module.

    Raises:
        ImportError: It is missing; names the package and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_package(package, reason=str(error), extra=extra) from error
