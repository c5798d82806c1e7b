"""`bench`: every operation is checked, then timed beside the link ceiling of the same run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from epjit.cli import show

_COLUMNS = {
    "module": "module",
    "op": "operation",
    "dtype": "dtype",
    "tokens": "tokens",
    "sms": "SMs",
    "us": "us",
    "host_us": "host us",
    "buffer_us": "Buffer us",
    "of_buffer": "of Buffer",
    "remote_GBps": "NVLink GB/s",
    "stored_GBps": "stored GB/s",
    "stored_GBps_an_sm": "an SM",
    "ratio": "of ceiling",
    "speedup": "epjit faster",
}


def bench(
    ranks: show.Ranks = None,
    hidden: Annotated[int, typer.Option(help="Elements a row.")] = 7168,
    topk: show.Topk = 8,
    experts: show.Experts = 256,
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="A rank; once for each. 4096 (not low latency), 128, 8 (not normal)."),
    ] = None,
    low_latency: Annotated[
        bool, typer.Option("--low-latency", help="The low-latency calls instead.")
    ] = False,
    stores: Annotated[
        bool,
        typer.Option("--stores", help="The ceiling of rows by expert instead: several stores."),
    ] = False,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="ElasticBuffer's calls instead, beside Buffer's.")
    ] = False,
    sms: Annotated[list[int], typer.Option(help="Even; once for each.")] = [24, 12],  # noqa: B006
    sweep: Annotated[bool, typer.Option(help="4 to 32 SMs at the most tokens.")] = False,
    nvl_bytes: Annotated[int, typer.Option(help="num_nvl_bytes of Buffer; 0 = enough.")] = 0,
    ceiling_mb: Annotated[int, typer.Option(help="MiB that the ceiling copies to a peer.")] = 52,
    seed: Annotated[int, typer.Option(help="Of the tokens.")] = 0,
    compare: Annotated[
        list[str] | None, typer.Option(help="Module with the V1 interface, timed as well.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File that gets one JSON line a result.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG of GB/s against SMs; implies --sweep.")
    ] = None,
) -> None:
    """Time every operation; on the CPU backend where there is no GPU."""
    from epjit.bench import elastic as elastic_bench
    from epjit.bench import low_latency as low_latency_bench
    from epjit.bench import normal
    from epjit.bench import stores as stores_bench
    from epjit.bench.timing import ranks_and_device

    runs = {
        "--low-latency": (low_latency, low_latency_bench.run, (128, 8)),
        "--stores": (stores, stores_bench.run, (4096, 128)),
        "--elastic": (elastic, elastic_bench.run, (4096, 128, 8)),
    }
    chosen = [name for name, (is_asked, *_) in runs.items() if is_asked]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are several runs; pass one of them")
    _, run, sizes = runs[chosen[0]] if chosen else (True, normal.run, (4096, 128))
    num_ranks, device = ranks_and_device(ranks)
    settings = normal.Settings(
        ranks=num_ranks,
        hidden=hidden,
        topk=topk,
        experts=experts,
        tokens=tuple(tokens or sizes),
        sms=tuple(sms),
        sweep=normal.SWEEP if sweep or plot else (),
        nvl_bytes=nvl_bytes or default_nvl_bytes(device),
        ceiling_mb=ceiling_mb,
        seed=seed,
        compare=tuple(compare or ()),
        device=device,
    )
    # Whatever a run of minutes would end with is tried before it starts.
    check_modules(settings.compare)
    if plot is not None:
        if chosen:
            raise ValueError("--plot draws what the normal mode sends, which this does not measure")
        new_figure()[0].savefig(plot)
    if json_file is not None:
        json_file.write_text("")
    if device == "cpu":
        typer.echo("this is the CPU backend, whose times say nothing", err=True)
    rows = measured(run, settings, json_file)
    print_table(rows)
    if plot is not None:
        draw(rows, plot)
        typer.echo(f"plot in {plot}")


def default_nvl_bytes(device: str) -> int:
    """Enough for every shape; the CPU backend only allocates it."""
    return 2_000_000_000 if device == "cuda" else 1 << 20


def measured(
    run: Callable[..., list[dict[str, Any]]], settings: object, json_file: Path | None = None
) -> list[dict[str, Any]]:
    """The rows of a run; each is shown when it comes, and added to a file."""
    with show.steps(None) as steps:

        def on_row(row: dict[str, Any]) -> None:
            steps.next("  ".join(f"{k}={v}" for k, v in row.items() if v is not None))
            if json_file is not None:
                with json_file.open("a") as file:
                    file.write(json.dumps(row) + "\n")

        return run(settings, on_row=on_row)


def print_table(rows: list[dict[str, Any]]) -> None:
    """All results; with `--compare` also how they relate."""
    run, *results = rows
    ours = {_case(row): row["us"] for row in results if row.get("module") == "epjit"}
    for row in results:
        if row.get("module", "epjit") != "epjit" and _case(row) in ours:
            row["speedup"] = f"{row['us'] / ours[_case(row)]:.2f} x"
    shown = [key for key in _COLUMNS if any(row.get(key) is not None for row in results)]
    if not run["compare"]:
        shown = [key for key in shown if key != "module"]
    show.table(
        f"{run['ranks']} x {run['device']}, {run['module']}, hidden {run['hidden']}, "
        f"top-{run['topk']} of {run['experts']}",
        [_COLUMNS[key] for key in shown],
        [[row.get(key) for key in shown] for row in results],
        text_columns=sum(key in ("module", "op", "dtype") for key in shown),
    )


def check_modules(names: Iterable[str]) -> None:
    """Imports what is to be compared, and looks for the names of V1's interface.

    Raises:
        ValueError: A module is missing, or has another interface.
    """
    for name in names:
        try:
            module = importlib.import_module(name)
        except (ImportError, TypeError) as error:  # TypeError: a relative name
            raise ValueError(f"--compare {name}: it cannot be imported ({error})") from error
        missing = [each for each in ("Buffer", "topk_idx_t") if not hasattr(module, each)]
        if missing:
            raise ValueError(
                f"--compare {name}: it has no {' and no '.join(missing)}, so it does not have the "
                "interface of DeepEP V1"
            )


def new_figure() -> tuple[Any, Any]:
    """An empty picture: matplotlib's figure and its axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    from epjit.errors import require

    require("matplotlib", package="matplotlib", extra="bench").use("Agg")
    pyplot = require("matplotlib.pyplot", package="matplotlib", extra="bench")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    pyplot.close(figure)  # pyplot forgets it; it can still be drawn and written
    return figure, axes


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes a picture: NVLink GB/s against SMs, for the largest number of tokens.

    Raises:
        ImportError: matplotlib is missing.
    """
    run, *results = rows
    tokens = max(row.get("tokens", 0) for row in results)
    lines: dict[str, dict[int, float]] = {}
    for row in results:
        if "remote_GBps" in row and row.get("tokens", tokens) == tokens:
            names = [row["op"], row.get("dtype", "")]
            names += [row["module"]] if run["compare"] and "module" in row else []
            lines.setdefault(" ".join(filter(None, names)), {})[row["sms"]] = row["remote_GBps"]
    figure, axes = new_figure()
    for name, points in lines.items():
        is_ceiling = name.startswith("ceiling")
        axes.plot(
            *zip(*sorted(points.items()), strict=True),
            marker=None if is_ceiling else "o",
            linestyle="--" if is_ceiling else "-",
            color={"ceiling push": "0.35", "ceiling pull": "0.65"}.get(name),
            label=name.replace("ceiling push", "link ceiling, writes").replace(
                "ceiling pull", "link ceiling, reads"
            ),
        )
    axes.set_xlabel("SMs")
    axes.set_ylabel("GB/s sent over NVLink by each GPU")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{run['ranks']} x {run['device']}, {tokens} tokens x {run['hidden']}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    """The case of a row: rows of two modules with the same are compared."""
    return tuple(row.get(key) for key in ("op", "dtype", "tokens", "sms"))
