"""How the commands show things: tables and progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# Options that several commands have.
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]
Ranks = Annotated[
    int | None, typer.Option(help="Processes; by default one for each GPU, or 2 without any.")
]
Topk = Annotated[int, typer.Option(help="Choices a token.")]
Experts = Annotated[int, typer.Option(help="Over all ranks.")]

_PIPE_WIDTH = 120


def console() -> Console:
    """The console on stdout; wide enough for tables when that is a file."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def table(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: int = 1
) -> None:
    """Prints a table.

    Args:
        title: Line above it.
        heads: Column heads.
        rows: Cells; None is left empty.
        text_columns: How many columns hold text, the first ones; the others are numbers.
    """
    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, head in enumerate(heads):
        justify: JustifyMethod = "left" if index < text_columns else "right"
        grid.add_column(head, justify=justify, overflow="fold")
    for row in rows:
        grid.add_row(*("" if cell is None else str(cell) for cell in row))
    console().print(grid)


class Steps:
    """Progress of a long command: a bar on a terminal, else a line a step on stderr."""

    def __init__(self, progress: Progress | None, out: Console, total: int | None) -> None:
        self._progress, self._out = progress, out
        self._task = None if progress is None else progress.add_task("starting", total=total)

    def next(self, text: str) -> None:
        """One more step is done; `text` says which."""
        if self._progress is None or self._task is None:
            self._out.print(text, soft_wrap=True, markup=False)
        else:
            self._progress.update(self._task, advance=1, description=text)


@contextmanager
def steps(total: int | None) -> Iterator[Steps]:
    """Shows progress while the body runs.

    Args:
        total: Number of steps; None when it is not known.
    """
    out = Console(stderr=True, highlight=False)
    if not out.is_terminal:
        yield Steps(None, out, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out, transient=True) as progress:
        yield Steps(progress, out, total)


def size(num_bytes: int) -> str:
    """Bytes for people."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1024 or unit == "TB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
