"""The search for the fastest SMs and variants of a shape."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from epjit import tuned
from epjit.bench.normal import Case, Settings, start, tensors
from epjit.bench.timing import Row, free_port, run_ranks, timed
from epjit.kernels.variants import CHOICES

OPS = ("dispatch", "combine")


def run(settings: Settings, *, on_row: Callable[[Row], None]) -> list[Row]:
    """Times every variant with every number of SMs; results are checked first.

    Args:
        settings: Its `tokens`, `sms` and shape are searched.
        on_row: Called with each row when it is measured.

    Returns:
        Rows with `op`, `variant`, `sms`, `tokens` and `us`; the first says which GPU it was.

    Raises:
        RuntimeError: A result is wrong, or a rank failed.
    """
    return run_ranks(worker, settings.ranks, settings, free_port(), on_row=on_row)


def winners(rows: list[Row], *, slack: float) -> list[tuned.Tuned]:
    """The best of each operation and number of tokens.

    Args:
        rows: From `run`.
        slack: Of all results within this part of the fastest, the one with the fewest SMs wins:
            SMs that dispatch does not take are left to the experts.
    """
    from epjit import __version__

    machine, *results = rows
    found = []
    for op in OPS:
        for tokens in dict.fromkeys(row["tokens"] for row in results):
            mine = [row for row in results if (row["op"], row["tokens"]) == (op, tokens)]
            limit = min(row["us"] for row in mine) * (1 + slack)
            best = min(
                (row for row in mine if row["us"] <= limit), key=lambda r: (r["sms"], r["us"])
            )
            found.append(
                tuned.Tuned(
                    gpu=machine["device"],
                    op=op,
                    num_ranks=machine["ranks"],
                    hidden_bytes=2 * machine["hidden"],
                    num_tokens=tokens,
                    num_sms=best["sms"],
                    variant=best["variant"],
                    us=best["us"],
                    version=__version__,
                )
            )
    return found


def worker(rank: int, settings: Settings, port: int, queue: Any) -> None:
    """One rank: measures, and rank 0 reports."""
    import epjit

    group, say = start(rank, settings, port, queue)
    for op in OPS:
        for variant in names(op, on_cpu=settings.device == "cpu"):
            with _variant(op, variant):
                buffer = epjit.Buffer(group, settings.nvl_bytes, explicitly_destroy=True)
                for tokens in settings.tokens:
                    case = Case(epjit, buffer, group, settings, tokens)
                    for sms in settings.sms:
                        us = _time(case, op, sms)
                        say(op=op, variant=variant, tokens=tokens, sms=sms, us=us)
                dist.barrier(group)
                buffer.destroy()
    dist.destroy_process_group()


def names(op: str, *, on_cpu: bool) -> list[str]:
    """Variants that can run here."""
    if on_cpu:
        return ["auto"]
    from epjit.runtime.device import arch_of

    arch = arch_of(torch.cuda.current_device())
    known = CHOICES[op].variants
    return [each.name for each in known if each.runs_on(arch) and not each.opt_in]


def _time(case: Case, op: str, sms: int) -> float:
    """Microseconds of the rows' way alone: a cached dispatch, or a combine."""
    case.ep.Buffer.set_num_sms(sms)
    x = tensors(case.payloads["bf16"])[0]
    received, _, weights, _, handle, _ = case.full_dispatch(x)
    case.check_dispatch(received, x, op)
    if op == "dispatch":
        call = functools.partial(case.buffer.dispatch, x, handle=handle)
    else:
        case.check_combine(x, weights, handle)
        call = functools.partial(case.buffer.combine, received, handle)
    return timed(call, case.group, device=case.device)[0]


@contextmanager
def _variant(op: str, name: str) -> Iterator[None]:
    """Asks for a variant, for Buffers that are made in the body."""
    variable = CHOICES[op].variable
    before = variable()
    os.environ[variable.name] = name
    try:
        yield
    finally:
        os.environ[variable.name] = before
