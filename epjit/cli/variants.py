"""`variants`: the implementations there are, and which one this machine would take."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from epjit.cli import show


def variants(
    arch: Annotated[
        str | None, typer.Option(help="Such as sm_90a; default: the first GPU, if there is one.")
    ] = None,
    as_json: show.Json = False,
) -> None:
    """List the implementations of each operation and how to choose one."""
    from epjit.kernels.variants import CHOICES

    arch = arch or _arch_of_gpu()
    rows = [
        {
            "op": op,
            "variant": each.name,
            "from": f"sm_{each.min_arch}",
            "chosen": (taken := "" if arch is None else _taken(op, each.name, arch)) != "",
            "taken": taken,
            "set": f"{choice.variable.name}={each.name}",
            "description": each.description,
        }
        for op, choice in CHOICES.items()
        for each in choice.variants
    ]
    if as_json:
        typer.echo(json.dumps({"arch": arch, "variants": rows}))
        return
    title = f"on {arch}" if arch else "no GPU here: --arch sm_90a shows what one would take"
    heads = ("operation", "variant", "from", "taken", "what it does")
    show.table(
        title,
        heads,
        [(r["op"], r["variant"], r["from"], r["taken"], r["description"]) for r in rows],
        text_columns=len(heads),
    )
    typer.echo(f"another one is chosen by a variable, such as {rows[0]['set']}")


def _taken(op: str, name: str, arch: str) -> str:
    """For which groups `auto`, or the environment, takes a variant; nothing: for none."""
    from epjit.kernels.variants import CHOICES, MOST_PUSHING_RANKS, resolve

    most = MOST_PUSHING_RANKS
    few = resolve(op, arch) == name
    many = resolve(op, arch, preferred=CHOICES[op].preferred(most + 1)) == name
    if few and many:
        return "yes"
    return f"up to {most} ranks" if few else f"more than {most}" if many else ""


def _arch_of_gpu() -> str | None:
    from epjit.runtime import device

    try:
        return device.arch_of(0) if device.count() else None
    except (ImportError, RuntimeError):  # no cuda-bindings, or no driver
        return None
