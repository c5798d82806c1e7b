"""`tune`: find the fastest settings for this machine, and keep them where `Buffer` looks."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from epjit.cli import show
from epjit.cli.bench import default_nvl_bytes


def tune(
    ranks: Annotated[int, typer.Option(help="Processes; 0 = all GPUs, or 2 without any.")] = 0,
    hidden: Annotated[int, typer.Option(help="Elements a row of bfloat16.")] = 7168,
    topk: Annotated[int, typer.Option(help="Choices a token.")] = 8,
    experts: Annotated[int, typer.Option(help="Over all ranks.")] = 256,
    tokens: Annotated[list[int], typer.Option(help="A rank; once for each.")] = [4096, 128],  # noqa: B006
    sms: Annotated[list[int] | None, typer.Option(help="Even; default 4 to 32.")] = None,
    slack: Annotated[
        float, typer.Option(help="Fewer SMs win when they are slower by at most this part.")
    ] = 0.02,
    dry_run: Annotated[bool, typer.Option(help="Keep nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Search SMs and variants; `Buffer.get_dispatch_config` and `get_combine_config` use them."""
    from epjit import tuned
    from epjit.bench import normal
    from epjit.bench import tune as search
    from epjit.bench.timing import ranks_and_device

    if slack < 0:
        raise ValueError(f"--slack is {slack}, but must not be negative")
    ranks, device = ranks_and_device(ranks)
    settings = normal.Settings(
        ranks=ranks,
        hidden=hidden,
        topk=topk,
        experts=experts,
        tokens=tuple(tokens),
        sms=tuple(sms or normal.SWEEP),
        nvl_bytes=default_nvl_bytes(device),
        device=device,
    )
    with show.steps(None) as steps:

        def on_row(row: dict[str, Any]) -> None:
            steps.next("  ".join(f"{key}={value}" for key, value in row.items()))

        rows = search.run(settings, on_row=on_row)
    winners = search.winners(rows, slack=slack)
    file = None if dry_run else tuned.store(winners)
    if as_json:
        typer.echo(
            json.dumps({"file": str(file or ""), "winners": [asdict(each) for each in winners]})
        )
        return
    show.table(
        f"{ranks} x {winners[0].gpu}, hidden {hidden}, top-{topk} of {experts}",
        ("operation", "variant", "tokens", "SMs", "us"),
        [(each.op, each.variant, each.num_tokens, each.num_sms, each.us) for each in winners],
        text_columns=2,
    )
    typer.echo("nothing was kept" if file is None else f"kept in {file}")
