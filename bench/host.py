"""Microseconds of the host that a call takes: on a GPU, or with the driver stubbed, as in CI.

Prints a JSON line for each call: `us`, and `async_us` with ``async_finish``; on a GPU also how many
bare launches (``x.add_(0)``) that is. One rank, few tokens, a hot loop: the fastest slice of each
turn, of these the median. Stubbed, launches, streams and events cost nothing: what is left is
Python, and torch with tensors of the CPU.

    python bench/host.py [--turns N] [--calls N] [--profile "combine"]
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from epjit import Buffer, Config
from epjit.runtime.group import ThreadGroup

# So small that no GPU is waited for, and that memory of the CPU costs no calls of the system.
TOKENS, HIDDEN, TOPK, EXPERTS = 64, 512, 8, 8
SLICE = 50  # calls between two looks at the clock
Call = Callable[..., Any]


def new_buffer() -> Buffer:
    """A Buffer of one rank for all calls."""
    hint = Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, 1, EXPERTS)
    comm = ThreadGroup.create(1)[0]
    return Buffer(None, 64 << 20, hint, comm=comm, low_latency_mode=True)


@contextlib.contextmanager
def stubbed() -> Iterator[Buffer]:
    """A Buffer whose GPU only counts, and has memory of the CPU."""
    import pytest

    from tests.cpu.fake_gpu import fake_gpu

    with (
        pytest.MonkeyPatch.context() as patch,
        fake_gpu(patch) as gpu,
        contextlib.ExitStack() as stack,
    ):
        patch.setattr("epjit.modes.base.empty_on", quick_empty)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        patch.setattr(torch.cuda, "get_device_name", lambda _: "stubbed")
        buffer: Any = stack.enter_context(new_buffer())
        # What is compared with the devices of tensors.
        buffer.device = torch.device("cpu")
        for checks in (buffer._checks, buffer._low_latency_checks):
            object.__setattr__(checks, "device", buffer.device)
        object.__setattr__(buffer._checks, "num_sms", 132)
        counts = buffer._mode._host_counts.array
        counts[1 : 1 + EXPERTS] = TOKENS * TOPK // EXPERTS

        def fill() -> None:
            counts[0] = TOKENS  # for the host that waits for them

        gpu.on_launch = fill
        yield buffer


def quick_empty(device: torch.device) -> Any:
    """As `empty_on` does it on a GPU."""
    del device
    quick: Any = vars(torch._C._dynamo.guards)["_empty_strided_cpu"]
    return lambda specs: [None if spec is None else quick(*spec) for spec in specs]


def calls_of(buffer: Buffer) -> dict[str, Call]:
    """The calls to be timed, by name; each takes flags."""
    device = buffer.device
    x = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    idx = torch.rand(TOKENS, EXPERTS, device=device).topk(TOPK).indices
    weights = torch.rand(TOKENS, TOPK, device=device)
    config = Config(20)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    routing: dict[str, Any] = {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
        "topk_idx": idx,
        "topk_weights": weights,
    }
    rows, _, _, _, handle, _ = buffer.dispatch(x, config=config, **routing)
    assert handle is not None
    of_rank = buffer.expert_dispatch(x, idx, weights, num_experts=EXPERTS, config=config)
    of_experts, row_weights, expert_handle, _ = of_rank
    made = torch.zeros(EXPERTS, TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)

    def pair(**flags: Any) -> None:
        _, _, low, _, _ = buffer.low_latency_dispatch(x, idx, TOKENS, EXPERTS, **flags)
        buffer.low_latency_combine(made, idx, weights, low, **flags)

    return {
        "layout": lambda **flags: buffer.get_dispatch_layout(idx, EXPERTS, **flags),
        "dispatch": lambda **flags: buffer.dispatch(x, config=config, **routing, **flags),
        "cached dispatch": lambda **f: buffer.dispatch(x, handle=handle, config=config, **f),
        "combine": lambda **flags: buffer.combine(rows, handle, config=config, **flags),
        "dispatch by expert": lambda **flags: buffer.expert_dispatch(
            x, idx, weights, num_experts=EXPERTS, config=config, **flags
        ),
        "cached dispatch by expert": lambda **flags: buffer.expert_dispatch(
            x, handle=expert_handle, config=config, **flags
        ),
        "combine by expert": lambda **flags: buffer.expert_combine(
            of_experts, expert_handle, row_weights=row_weights, config=config, **flags
        ),
        "low-latency pair": pair,
    }


def fastest_slice(fn: Callable[[], Any], num_calls: int) -> float:
    """Microseconds a call; between slices a GPU catches up."""
    best = float("inf")
    for _ in range(max(1, num_calls // SLICE)):
        start = time.perf_counter()
        for _ in range(SLICE):
            fn()
        best = min(best, time.perf_counter() - start)
        if torch.version.cuda and torch.cuda.is_available():
            torch.cuda.synchronize()
    return best / SLICE * 1e6


def measure(buffer: Buffer, *, turns: int, num_calls: int) -> list[dict[str, Any]]:
    """A row for each call."""
    timed: dict[tuple[str, bool], Callable[[], Any]] = {}
    for name, call in calls_of(buffer).items():
        timed[name, False] = call
        timed[name, True] = functools.partial(call, async_finish=True)
    if buffer.device.type == "cuda":
        word = torch.zeros(1, device=buffer.device)
        timed["bare launch", False] = lambda: word.add_(0)
    for fn in timed.values():  # compiles
        fn()
    found = [[fastest_slice(fn, num_calls) for fn in timed.values()] for _ in range(turns)]
    us = dict(zip(timed, map(statistics.median, zip(*found, strict=True)), strict=True))
    rows: list[dict[str, Any]] = []
    for (name, is_async), value in us.items():
        if is_async:
            rows[-1]["async_us"] = round(value, 2)
            continue
        rows.append({"op": name, "us": round(value, 2)})
        if bare := us.get(("bare launch", False)):
            rows[-1]["launches"] = round(value / bare, 2)
    return rows


def main() -> None:
    """Measures or profiles."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--calls", type=int, default=500, help="of each kind in a turn")
    parser.add_argument("--profile", default="", help="name of a call, with ' async' behind or not")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        on_gpu = torch.cuda.is_available()
        buffer = new_buffer() if on_gpu else stack.enter_context(stubbed())
        if options.profile:
            profile(buffer, options.profile, options.calls)
            return
        for row in measure(buffer, turns=options.turns, num_calls=options.calls):
            print(json.dumps({**row, "driver": "real" if on_gpu else "stubbed"}), flush=True)


def profile(buffer: Buffer, name: str, num_calls: int) -> None:
    """Says which functions take the time of a call."""
    flags = {"async_finish": True} if name.endswith(" async") else {}
    call = calls_of(buffer)[name.removesuffix(" async")]
    call(**flags)
    with cProfile.Profile() as found:
        for _ in range(num_calls):
            call(**flags)
    pstats.Stats(found).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
