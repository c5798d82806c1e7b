"""`cache`: what compiled kernels there are; take them to a machine that shall not compile."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated

import typer

from epjit.cli import show

app = typer.Typer(help="List, clear, export and import compiled kernels.", no_args_is_help=True)

_ARCH = re.compile(r"for '(sm_\w+)'")  # in ptxas's report


@app.command("list")
def list_entries(as_json: show.Json = False) -> None:
    """Show every compiled kernel, the newest first."""
    from epjit.runtime.cache import CubinCache

    cache = CubinCache()
    rows = []
    for each in cache.stored():
        symbol = each.entry.symbol if each.entry else "(damaged: it will be compiled again)"
        archs = _ARCH.findall(each.entry.log) if each.entry else []
        age = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.modified))
        rows.append(
            {
                "kernel": readable(symbol),
                "arch": archs[0] if archs else "",
                "bytes": each.num_bytes,
                "modified": age,
                "key": each.key,
            }
        )
    if as_json:
        typer.echo(json.dumps({"directory": str(cache.directory), "entries": rows}))
        return
    show.table(
        str(cache.directory),
        ("kernel", "arch", "modified", "key", "size"),
        [
            (r["kernel"], r["arch"], r["modified"], str(r["key"])[:12], show.size(int(r["bytes"])))
            for r in rows
        ],
        text_columns=4,
    )


@app.command("size")
def total_size(as_json: show.Json = False) -> None:
    """Show how many kernels there are and how much space they take."""
    from epjit.runtime.cache import CubinCache

    cache = CubinCache()
    stored = cache.stored()
    total = sum(each.num_bytes for each in stored)
    if as_json:
        facts = {"directory": str(cache.directory), "entries": len(stored), "bytes": total}
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{len(stored)} kernels, {show.size(total)} in {cache.directory}")


@app.command("clear")
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete all compiled kernels; they are compiled again when they are needed."""
    from epjit import tuned
    from epjit.runtime.cache import CubinCache

    cache = CubinCache()
    if not yes:
        typer.confirm(f"Delete the kernels in {cache.directory}?", abort=True)
    typer.echo(f"{cache.clear()} kernels deleted")
    if tuned.path().is_file():
        typer.echo(f"{tuned.path()} is kept; `python -m epjit tune --clear` deletes it")


@app.command("export")
def export_entries(archive: Annotated[Path, typer.Argument(help="Tar file to write.")]) -> None:
    """Write all kernels to a tar file, for a machine that shall not compile."""
    from epjit.runtime.cache import CubinCache

    typer.echo(f"{CubinCache().export(archive)} kernels written to {archive}")


@app.command("import")
def import_entries(
    archive: Annotated[Path, typer.Argument(help="Tar file from `cache export`.")],
) -> None:
    """Add the kernels of a tar file; every digest is checked first. Import only what you trust."""
    from epjit.runtime.cache import CubinCache

    cache = CubinCache()
    typer.echo(f"{cache.import_archive(archive)} kernels added to {cache.directory}")


def readable(symbol: str) -> str:
    """``epjit::tag::op`` of a mangled kernel name; other text as it is."""
    if not symbol.startswith("_ZN"):
        return symbol
    names, at = [], len("_ZN")
    while (length := re.match(r"\d+", symbol[at:])) is not None:
        at += length.end()
        names.append(symbol[at : at + int(length[0])])
        at += int(length[0])
    return "::".join(names)
