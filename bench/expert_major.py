"""The cost of rows by expert: dispatch(expert_major=True) beside dispatch and torch's own permute.

All GPUs of this machine (or two ranks of the CPU backend, to try it). Results are compared before a
time is taken. Calls that are timed by SMs stand beside two ceilings of as many SMs in the same run:
a plain copy over the links, and one load with several stores (`python -m epjit bench --stores`);
`ratio` is the time of the slower one, over that of the call.

    python bench/expert_major.py --tokens 4096 --hidden 7168 --json rows.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epjit.bench import normal, timing


def torch_permute(
    x: Tensor, idx: Tensor, weights: Tensor, num_experts: int, alignment: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their weights and the ends of the experts, by sorting; the host waits for the sizes."""
    token, column = torch.nonzero(idx >= 0, as_tuple=True)
    order = torch.argsort(idx[token, column], stable=True)
    token, column = token[order], column[order]
    counts = torch.bincount(idx[token, column], minlength=num_experts)
    padded = (counts + alignment - 1) // alignment * alignment
    ends = padded.cumsum(0)
    first = torch.repeat_interleave((ends - padded) - (counts.cumsum(0) - counts), counts)
    at = first + torch.arange(token.shape[0], device=x.device)
    rows = x.new_zeros((int(ends[-1]), x.shape[1]))
    rows[at] = x[token]
    row_weights = weights.new_zeros(rows.shape[0])
    row_weights[at] = weights[token, column]
    return rows, row_weights, ends.to(torch.int32)


def worker(
    rank: int, args: argparse.Namespace, settings: normal.Settings, port: int, queue: Any
) -> None:
    """One rank: compares both ways and times their parts, as inference runs them."""
    torch.set_grad_enabled(False)
    import epjit
    from epjit import moe

    group, say = normal.start(rank, settings, port, queue)
    device = settings.device
    case = normal.Case(epjit, None, group, settings, args.tokens)
    x, idx, weights = case.payloads["bf16"], case.topk_idx, case.weights
    assert isinstance(x, Tensor)
    shape = {"hidden_bytes": normal.row_bytes(x), "num_tokens": args.tokens}
    configs = {
        "dispatch": epjit.Buffer.get_dispatch_config(settings.ranks, **shape),
        "combine": epjit.Buffer.get_combine_config(settings.ranks, **shape),
    }
    all_sms = sorted({config.num_sms for config in configs.values()})
    ceilings = normal.measure_ceilings(group, settings, all_sms, say)
    local = args.experts // settings.ranks
    matrices = torch.randn(
        local, args.hidden, args.intermediate, device=device, dtype=torch.bfloat16
    )
    matrices *= args.hidden**-0.5
    common = {"num_experts": args.experts, "group": group}
    worst = {"num_worst_tokens": settings.ranks * args.tokens}
    by_expert = {"expert_major": True, "expert_alignment": args.alignment}

    def fused(**options: Any) -> Any:
        return moe.dispatch(x, idx, weights, **common, **by_expert, **options)

    def separate() -> tuple[Tensor, Tensor, Tensor]:
        got = moe.dispatch(x, idx, weights, **common)
        return torch_permute(got.x, got.topk_idx, got.topk_weights, local, args.alignment)

    got, wanted = fused(), separate()
    for name, mine, theirs in zip(("rows", "weights", "ends"), got[:3], wanted, strict=True):
        if not torch.equal(mine[: len(theirs)], theirs):
            raise RuntimeError(f"{name} differ on rank {rank}: nothing was timed")

    received = moe.dispatch(x, idx, weights, **common)

    def products(got: moe.ExpertRows) -> Tensor:
        inner = moe.grouped_mm(got.x, matrices, got.ends)
        return moe.grouped_mm(inner, matrices.transpose(1, 2), got.ends)

    def layer() -> Tensor:
        got = fused()
        return moe.combine(products(got), got.handle, weights=got.weights, group=group)

    parts: dict[str, Callable[[], Any]] = {
        "dispatch": lambda: moe.dispatch(x, idx, weights, **common),
        "dispatch, expert_major": fused,
        "dispatch, expert_major, static": lambda: fused(**worst),
        "dispatch + torch permute": separate,
        "permute": lambda: moe.permute(
            received.x,
            received.topk_idx,
            received.topk_weights,
            num_experts=local,
            alignment=args.alignment,
        ),
        "torch permute": lambda: torch_permute(
            received.x, received.topk_idx, received.topk_weights, local, args.alignment
        ),
        "unpermute": lambda: moe.unpermute(got.x, got.handle.placement),
        "combine, expert_major": lambda: moe.combine(got.x, got.handle, group=group),
        "two products": lambda: products(got),
        "layer: dispatch, two products, combine": layer,
    }
    found = {}
    for name, part in parts.items():
        us = found[name] = timing.eager(part, group, device=device)
        config = configs.get(name.split(",")[0])
        rates = case.rates(x, us, max(ceilings[config.num_sms].values())) if config else {}
        more = {"products_us": found["two products"]} if part is layer else {}
        say(op=name, us=us, **rates, **more)
    by_sms(case, settings, args, say, got=got)
    moe.free_buffers()
    torch.distributed.destroy_process_group()


def check_cached(buffer: Any, x: Tensor, fp8: Any, got: Any) -> None:
    """Compares what is timed: rows, rows that are cast in both orders, and sums."""
    from epjit import moe

    routing, placed = got.handle
    last = int(placed.ends[-1])
    rows, *_ = buffer.expert_dispatch(x, handle=got.handle, zero_padding=True)
    normal.require("cached dispatch by expert", torch.equal(rows[:last], got.x[:last]))
    here = placed.source[:last] >= 0
    for order, call, chosen in (
        ("by expert", partial(buffer.expert_dispatch, handle=got.handle), here),
        ("by source", partial(buffer.dispatch, handle=routing), slice(None)),
    ):
        pairs = zip(call(x, cast="fp8")[0], call(fp8)[0], strict=True)
        for mine, theirs in pairs:
            both = [each[: len(here)][chosen].view(torch.uint8) for each in (mine, theirs)]
            normal.require(f"dispatch {order}, cast", torch.equal(*both))
    sums = buffer.combine(moe.unpermute(got.x, placed), routing)[0]
    mine = buffer.expert_combine(got.x, got.handle)[0]
    normal.require("combine by expert", torch.equal(mine, sums))


class Timed(NamedTuple):
    """A call that is timed.

    Attributes:
        row_bytes: That cross the links for a token.
        stored: Rows by expert that are written here.
        beside: Which of the calls before it is its measure, from the last backward; 0 = none.
    """

    name: str
    call: Callable[[], Any]
    row_bytes: int
    stored: int = 0
    beside: int = 0


def by_sms(
    case: normal.Case,
    settings: normal.Settings,
    args: argparse.Namespace,
    say: normal.Say,
    got: Any,
) -> None:
    """Cached dispatches by expert and combines, by SMs, beside both ceilings of the same run."""
    import epjit
    from epjit import moe
    from epjit.bench.stores import Fan
    from epjit.formats import FP8
    from epjit.reference.low_latency import encode

    group, rows, handle = case.group, got.x, got.handle
    buffer = moe.get_buffer(group, normal.row_bytes(rows))
    x = case.payloads["bf16"]
    assert isinstance(x, Tensor)
    fp8 = tuple(each.to(x.device) for each in encode(x.cpu(), FP8) if each is not None)
    check_cached(buffer, x, fp8, got)
    if settings.device == "cpu":
        return
    plain = buffer.dispatch(x, handle=handle.routing)[0]
    ceilings = normal.measure_ceilings(group, settings, args.sms, say)
    fan = Fan(group, normal.row_bytes(rows))
    placed = handle.placement
    num_selected, num_padded = int(placed.counts.sum()), int(placed.ends[-1])
    say(op="rows here, with padding", us=0, rows=num_selected, padded=num_padded)
    stores = max(1, min(4, round(num_selected / max(len(plain), 1))))
    weights = torch.rand(len(rows), device=rows.device, dtype=torch.float32)
    for sms in args.sms:
        config = epjit.Config(sms)
        rate = fan.stored_bytes(stores) / fan.us(stores, min(settings.ranks - 1, 1), sms)
        by_source = partial(buffer.dispatch, handle=handle.routing, config=config)
        by_expert = partial(buffer.expert_dispatch, handle=handle, config=config)
        sums = partial(buffer.expert_combine, rows, handle, config=config)
        of_x, of_fp8 = normal.row_bytes(x), sum(each.shape[1] * each.element_size() for each in fp8)
        sent, cast = "dispatch by expert", {"cast": "fp8"}
        timed = [
            Timed("dispatch", partial(by_source, x), of_x),
            Timed("dispatch of fp8 rows", partial(by_source, fp8), of_fp8),
            Timed("dispatch, cast", partial(by_source, x, **cast), of_fp8, 0, -1),
            Timed(sent, partial(by_expert, x), of_x, num_selected, -3),
            Timed(f"{sent}, zeros", partial(by_expert, x, zero_padding=True), of_x, num_padded, -4),
            Timed(f"{sent} of fp8 rows", partial(by_expert, fp8), of_fp8, num_selected),
            Timed(f"{sent}, cast", partial(by_expert, x, **cast), of_fp8, num_selected, -1),
            Timed("combine", partial(buffer.combine, plain, handle.routing, config=config), of_x),
            Timed("combine by expert", sums, of_x, 0, -1),
            Timed("combine by expert, weights", partial(sums, row_weights=weights), of_x, 0, -2),
        ]
        found: list[float] = []
        for name, call, row_bytes, stored, beside in timed:
            us, host_us = timing.timed(call, group)
            facts: dict[str, Any] = {"stores_us": stored * row_bytes / rate} if stored else {}
            best = max(ceilings[sms].values())
            if best:
                facts["links_us"] = case.remote_rows * row_bytes / best / 1e3
            if facts:
                facts["ratio"] = round(max(facts.values()) / us, 3)
            if beside:
                facts["beside"] = timed[len(found) + beside].name
                facts["times"] = round(us / found[beside], 2)
            found.append(us)
            say(op=f"{name}, cached", sms=sms, us=us, host_us=host_us, **facts)
    fan.close()


def show(row: timing.Row) -> None:
    """One line."""
    if row["op"] == "run":
        print(f"{row['ranks']} x {row['device']}", flush=True)
        return
    sms = f", {row['sms']} SMs" if "sms" in row else ""
    rate = f": {row['remote_GBps']} GB/s" if "remote_GBps" in row else ""
    ratio = f", {row['ratio']} of the ceiling" if row.get("ratio") else ""
    beside = [
        f"{name} {row[key]:.0f} us"
        for name, key in (("stores", "stores_us"), ("links", "links_us"))
        if key in row
    ]
    beside += [f"{row['rows']} rows, {row['padded']} with padding"] if "rows" in row else []
    beside += [f"{row['times']} times {row['beside']}"] if "times" in row else []
    if "products_us" in row:
        beside += [f"{row['us'] - row['products_us']:.0f} us more than its products"]
    ceilings = f"; {', '.join(beside)}" if beside else ""
    print(f"{row['us']:10.1f} us  {row['op']}{sms}{rate}{ratio}{ceilings}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, help="by default all GPUs, or two without any")
    parser.add_argument("--tokens", type=int, default=4096, help="a rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--alignment", type=int, default=128)
    parser.add_argument("--sms", type=int, nargs="+", default=[20, 24, 32, 48])
    parser.add_argument("--json", type=Path, help="file that gets one JSON line a result")
    args = parser.parse_args()
    try:
        ranks, device = timing.ranks_and_device(args.ranks)
        settings = normal.Settings(
            ranks=ranks,
            hidden=args.hidden,
            topk=args.topk,
            experts=args.experts,
            tokens=(args.tokens,),
            device=device,
        )
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    if args.json is not None:
        args.json.write_text("")

    def on_row(row: timing.Row) -> None:
        show(row)
        if args.json is not None:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")

    print(f"{args.tokens} tokens, eager, the slowest rank", flush=True)
    timing.run_ranks(worker, ranks, args, settings, timing.free_port(), on_row=on_row)


if __name__ == "__main__":
    main()
