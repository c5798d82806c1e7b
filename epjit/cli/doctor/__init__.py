"""`doctor`: is this machine ready? One line a check, with the remedy; the last is the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from epjit.cli import show
from epjit.cli.doctor import cache, gpus, nics, rdma, software
from epjit.cli.doctor.check import Check, Section, Status

_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "wrong": "bold red"}
_VERDICT = Section("verdict")


def doctor(
    as_json: show.Json = False,
    peers: Annotated[bool, typer.Option(help="Measure the links between GPUs.")] = True,
) -> None:
    """Check this machine; the exit code is 1 when something is wrong."""
    sections: list[Callable[[], Iterator[Check]]] = [
        software.check_platform,
        software.check_packages,
        software.check_compiler,
        gpus.check_gpus,
        *([gpus.check_peers] if peers else []),
        gpus.check_fabric,
        rdma.check_rdma,
        nics.check_nics,
        cache.check_cache,
        software.check_environment,
    ]
    checks: list[Check] = []
    with show.steps(len(sections)) as steps:
        for section in sections:
            checks += section()
            if not as_json:
                steps.next(section.__name__.replace("_", " "))
    checks.append(verdict(checks))
    if as_json:
        typer.echo(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        print_checks(checks)
    if any(check.status is Status.wrong for check in checks):
        raise typer.Exit(1)


def print_checks(checks: list[Check]) -> None:
    """A line a check, the remedy below it; never broken, so that a command can be copied."""
    out = show.console()
    section = ""
    *lines, last = checks
    for check in lines:
        if check.section != section:
            section = check.section
            out.print(section, style="bold")
        _print(check, indent="  ")
    counts = {status: sum(check.status is status for check in lines) for status in Status}
    out.print(", ".join(f"{count} {status.value}" for status, count in counts.items()))
    _print(last)


def _print(check: Check, indent: str = "") -> None:
    out = show.console()
    mark = Text(f"{check.status.value:8}", style=_STYLES[check.status.value])
    out.print(Text.assemble(indent, mark, f" {check.name}: {check.value}"), soft_wrap=True)
    if check.remedy:
        out.print(Text(f"{indent:9} -> {check.remedy}"), soft_wrap=True)


def verdict(checks: list[Check]) -> Check:
    """The verdict: the devices that a Buffer would run on, after all other checks."""
    from epjit import env

    name = "a Buffer here"
    try:
        from epjit.kernels import variants
        from epjit.modes.make import use_gpu
        from epjit.runtime import device

        if not use_gpu():
            why = "EPJIT_BACKEND=cpu" if env.backend() == "cpu" else "torch finds no GPU"
            value = f"runs on the CPU backend ({why}): the same results, and not fast"
            return _VERDICT.ok(name, value)
        count, arch = device.count(), device.arch_of(0)
        taken = [
            f"{op} {variants.resolve(op, arch, preferred=variants.CHOICES[op].preferred(count))}"
            for op in ("dispatch", "combine", "low_latency_combine")
        ]
        gpus = [device.name(index) for index in range(count)]
        names = " and ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus))
        value = f"runs on {names} ({', '.join(taken)})"
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        remedy = "do what the lines above that are wrong say"
        return _VERDICT.wrong(name, f"cannot be made: {error}", remedy)
    return _VERDICT.expect(
        name,
        all(check.status is not Status.wrong for check in checks),
        value,
        f"{value} once what is wrong above is put right",
        severity=Status.wrong,
    )
