"""One line of `doctor`, and the section that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partialmethod

from epjit.remedy import install_command


class Status(str, Enum):
    """Severity of a finding."""

    ok = "ok"
    info = "info"  # not there, and nothing is to be done about it on this machine
    warning = "warning"  # works, though slower or without something
    wrong = "wrong"


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        section: Subject that it belongs to.
        name: Thing that was looked at.
        status: Severity of the finding.
        value: The finding, in words or numbers.
        remedy: Action to take; empty when all is well.
    """

    section: str
    name: str
    status: Status
    value: str
    remedy: str = ""


@dataclass(frozen=True)
class Section:
    """Makes the lines of one subject.

    Attributes:
        title: Heading of its lines.
    """

    title: str

    def say(self, status: Status, name: str, value: str, remedy: str = "") -> Check:
        """A line of any severity."""
        return Check(self.title, name, status, value, remedy)

    ok = partialmethod(say, Status.ok)
    info = partialmethod(say, Status.info)
    warning = partialmethod(say, Status.warning)
    wrong = partialmethod(say, Status.wrong)

    def expect(
        self,
        name: str,
        holds: object,
        value: str,
        otherwise: str = "",
        *,
        remedy: str = "",
        severity: Status = Status.warning,
    ) -> Check:
        """A line that is well when something holds.

        Args:
            name: Thing that was looked at.
            holds: Whether all is well (or the things found: are there any?).
            value: The finding.
            otherwise: The finding when it does not hold; by default `value` as well.
            remedy: Action to take then.
            severity: Severity then.
        """
        if holds:
            return self.ok(name, value)
        return self.say(severity, name, otherwise or value, remedy)


def only_one(installed: list[str], extra: str) -> str:
    """The remedy when packages overwrite each other's files; `extra` brings one of them."""
    return (
        f"two of them overwrite each other: pip uninstall -y {' '.join(installed)}, then "
        f"{install_command(extra)}"
    )
