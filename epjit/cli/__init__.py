"""The command line. One file a command; nothing heavy is imported before a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from epjit import __version__
from epjit.cli import bench, cache, doctor, tune, variants, warmup

app = typer.Typer(
    name="epjit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"epjit {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show it.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Expert-parallel dispatch and combine: is this machine ready, and how fast is it?"""


app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("tune")(tune.tune)
app.command("warmup")(warmup.warmup)
app.command("variants")(variants.variants)
app.add_typer(cache.app, name="cache")
