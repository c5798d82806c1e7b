"""The command line. One file a command; nothing heavy is imported before a command needs it."""

from __future__ import annotations

import typer

from epjit.cli import bench, cache, doctor, tune, variants, warmup

app = typer.Typer(
    name="epjit",
    help="Expert-parallel dispatch and combine: is this machine ready, and how fast is it?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("tune")(tune.tune)
app.command("warmup")(warmup.warmup)
app.command("variants")(variants.variants)
app.add_typer(cache.app, name="cache")
