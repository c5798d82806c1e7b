"""The cost of rows by expert: dispatch(expert_major=True) beside dispatch and torch's own permute.

All GPUs of this machine (or two ranks of the CPU backend, to try it). Results of both ways are
compared before a time is taken. What crosses the links has its part of the link ceiling, that of a
plain copy with as many SMs in the same run.

    python bench/expert_major.py --tokens 4096 --hidden 7168
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

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

    def layer() -> Tensor:
        got = fused()
        inner = moe.grouped_mm(got.x, matrices, got.ends)
        outer = moe.grouped_mm(inner, matrices.transpose(1, 2), got.ends)
        return moe.combine(outer, got.handle, group=group)

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
        "grouped product": lambda: moe.grouped_mm(got.x, matrices, got.ends),
        "unpermute": lambda: moe.unpermute(got.x, got.handle.placement),
        "combine, expert_major": lambda: moe.combine(got.x, got.handle, group=group),
        "dispatch, two products, combine": layer,
    }
    for name, part in parts.items():
        us = timing.eager(part, group, device=device)
        config = configs.get(name.split(",")[0]) if part is not layer else None
        rates = case.rates(x, us, max(ceilings[config.num_sms].values())) if config else {}
        say(op=name, us=us, **rates)
    if device == "cuda":
        by_sms(case, settings, args, say, rows=got.x, handle=got.handle)
    moe.free_buffers()
    torch.distributed.destroy_process_group()


def by_sms(
    case: normal.Case,
    settings: normal.Settings,
    args: argparse.Namespace,
    say: normal.Say,
    *,
    rows: Tensor,
    handle: Any,
) -> None:
    """Cached dispatches by expert and combines, by SMs, beside both ceilings of the same run."""
    import epjit
    from epjit import moe
    from epjit.bench.stores import Fan

    group = case.group
    buffer = moe.get_buffer(group, normal.row_bytes(rows))
    x = torch.randn((args.tokens, args.hidden), device=rows.device, dtype=rows.dtype)
    plain = buffer.dispatch(x, handle=handle.routing)[0]
    ceilings = normal.measure_ceilings(group, settings, args.sms, say)
    fan = Fan(group, normal.row_bytes(rows))
    placed = handle.placement
    num_selected, num_padded = int(placed.counts.sum()), int(placed.ends[-1])
    say(op="rows here, with padding", us=0, rows=num_selected, padded=num_padded)
    stores = max(1, min(4, round(num_selected / max(len(plain), 1))))
    fp8 = normal.to_fp8(x)
    weights = torch.rand(len(rows), device=rows.device, dtype=torch.float32)
    for sms in args.sms:
        config = epjit.Config(sms)
        rate = fan.stored_bytes(stores) / fan.us(stores, min(settings.ranks - 1, 1), sms)
        calls: dict[str, Callable[[], Any]] = {
            "dispatch": partial(buffer.dispatch, x, handle=handle.routing, config=config),
            "combine": partial(buffer.combine, plain, handle.routing, config=config),
            "combine by expert": partial(buffer.expert_combine, rows, handle, config=config),
            "combine by expert, weights": partial(
                buffer.expert_combine, rows, handle, row_weights=weights, config=config
            ),
        }
        by_expert = partial(buffer.expert_dispatch, handle=handle, config=config)
        calls["dispatch by expert, cached, cast=fp8"] = partial(by_expert, x, cast="fp8")
        calls["dispatch by expert, cached, of fp8 rows"] = partial(by_expert, fp8)
        for zeros in (True, False):
            calls[f"dispatch by expert, cached, zero_padding={zeros}"] = partial(
                by_expert, x, zero_padding=zeros
            )
        for name, call in calls.items():
            us, host_us = timing.timed(call, group)
            facts = {"sms": sms, "us": us, "host_us": host_us}
            if "zero_padding" in name:
                number = num_padded if "True" in name else num_selected
                facts["stores_us"] = number * normal.row_bytes(rows) / rate
            best = max(ceilings[sms].values())
            if best and "fp8" not in name:
                facts["links_us"] = case.remote_rows * normal.row_bytes(rows) / best / 1e3
            say(op=f"{name}, timed", **facts)
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
    print(f"{args.tokens} tokens, eager, the slowest rank", flush=True)
    timing.run_ranks(worker, ranks, args, settings, timing.free_port(), on_row=show)


if __name__ == "__main__":
    main()
