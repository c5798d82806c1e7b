"""`tune`: find the fastest settings for this machine, and keep them where `Buffer` looks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epjit.cli import show
from epjit.cli.bench import default_nvl_bytes, measured

if TYPE_CHECKING:
    from epjit.tuned import Tuned

_COLUMNS = {
    "op": "operation",
    "gpu": "GPU",
    "variant": "variant",
    "num_ranks": "ranks",
    "hidden_bytes": "row bytes",
    "num_tokens": "tokens",
    "num_sms": "SMs",
    "us": "us",
}


def tune(
    ranks: show.Ranks = None,
    hidden: Annotated[int, typer.Option(help="Elements a row of bfloat16.")] = 7168,
    topk: show.Topk = 8,
    experts: show.Experts = 256,
    tokens: Annotated[list[int], typer.Option(help="A rank; once for each.")] = [4096, 128],  # noqa: B006
    sms: Annotated[
        list[int] | None,
        typer.Option(help="Even; default 4 to 32. With others nothing is kept."),
    ] = None,
    slack: Annotated[
        float, typer.Option(help="Fewer SMs win when they are slower by at most this part.")
    ] = 0.02,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Keep nothing.")] = False,
    show_kept: Annotated[
        bool, typer.Option("--show", help="Show what is kept, and search nothing.")
    ] = False,
    clear: Annotated[
        bool, typer.Option("--clear", help="Forget what is kept, and search nothing.")
    ] = False,
    as_json: show.Json = False,
) -> None:
    """Search SMs and variants; `Buffer.get_dispatch_config` and `get_combine_config` use them."""
    from epjit import tuned

    if show_kept and clear:
        raise ValueError("--show and --clear exclude each other")
    if clear:
        typer.echo(f"{tuned.path()} {'is deleted' if tuned.clear() else 'does not exist'}")
        return
    if show_kept:
        _print(tuned.load(), str(tuned.path()), as_json=as_json, file=tuned.path())
        return
    from epjit.bench import normal
    from epjit.bench import tune as search
    from epjit.bench.timing import ranks_and_device

    if slack < 0:
        raise ValueError(f"--slack is {slack}, but must not be negative")
    num_ranks, device = ranks_and_device(ranks)
    settings = normal.Settings(
        ranks=num_ranks,
        hidden=hidden,
        topk=topk,
        experts=experts,
        tokens=tuple(tokens),
        sms=tuple(sms or normal.SWEEP),
        nvl_bytes=default_nvl_bytes(device),
        device=device,
    )
    if normal.domain_size(num_ranks) < num_ranks:
        raise ValueError("tune searches within one NVLink domain; unset EPJIT_NVLINK_DOMAIN")
    why_not = _why_not(device, sms, dry_run=dry_run)
    if not why_not:
        tuned.store([])  # known before the search: whether the file can be written
    winners = search.winners(measured(search.run, settings), slack=slack)
    file = None if why_not else tuned.store(winners)
    title = f"{num_ranks} x {winners[0].gpu}, hidden {hidden}, top-{topk} of {experts}"
    _print(winners, title, as_json=as_json, file=file)
    if not as_json:
        typer.echo(f"kept in {file}" if file else f"nothing was kept: {why_not}")


def _why_not(device: str, sms: Sequence[int] | None, *, dry_run: bool) -> str:
    """Reasons to keep nothing; empty when there are none."""
    reasons = {
        "this is the CPU backend": device == "cpu",
        "--sms left out the others": sms is not None,
        "--dry-run": dry_run,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def _print(winners: Sequence[Tuned], title: str, *, as_json: bool, file: Path | None) -> None:
    """A line a winner, or one JSON object; `file` holds them."""
    if as_json:
        found = {"file": str(file or ""), "winners": [asdict(each) for each in winners]}
        typer.echo(json.dumps(found))
        return
    show.table(
        title,
        list(_COLUMNS.values()),
        [[getattr(each, name) for name in _COLUMNS] for each in winners],
        text_columns=3,
    )
