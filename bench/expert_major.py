"""The cost of rows by expert: dispatch(expert_major=True) beside dispatch and torch's own permute.

All GPUs of this machine (or two ranks of the CPU backend, to try it). Results are compared before a
time is taken. Calls that are timed by SMs stand beside two ceilings of as many SMs in the same run:
a plain copy over the links, and one load with several stores (`python -m epjit bench --stores`);
`ratio` is the time of the slower one, over that of the call. With --virtual so many ranks share one
GPU, as threads, and what is timed is rows by expert beside rows by source.

    python bench/expert_major.py --tokens 4096 --hidden 7168 --json rows.jsonl
    python bench/expert_major.py --virtual 4
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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

    first, of_first = normal.to_fp8(matrices.mT.contiguous(), args.hidden)
    second, of_second = normal.to_fp8(matrices, args.intermediate)

    def fp8_products(got: moe.ExpertRows) -> Tensor:
        product = partial(moe.grouped_mm, ends=got.ends)
        inner = product(got.x, first.mT, scales=got.scales, weight_scales=of_first)
        rows, scales = normal.to_fp8(inner, args.intermediate)
        return product(rows, second.mT, scales=scales, weight_scales=of_second)

    def layer() -> Tensor:
        got = fused()
        return moe.combine(products(got), got.handle, weights=got.weights, group=group)

    def fp8_layer() -> Tensor:
        got = fused(cast="fp8_row")
        return moe.combine(fp8_products(got), got.handle, weights=got.weights, group=group)

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
        "dispatch, expert_major, cast": lambda: fused(cast="fp8_row"),
    }
    cast, products_of = fused(cast="fp8_row"), {layer: "two products"}
    try:
        fp8_products(cast)
    except RuntimeError as error:  # torch has none here; all ranks have the same GPUs
        say(op="layer in FP8", us=0, why=str(error))
    else:
        in_fp8, in_bf16 = fp8_layer().float(), layer().float()
        is_near = bool((in_fp8 - in_bf16).norm() < 2.0**-3 * in_bf16.norm())  # e4m3 has 4 bits
        normal.require("layer in FP8", is_near)
        parts |= {
            "two products in FP8, a cast between": lambda: fp8_products(cast),
            "layer in FP8: dispatch with cast, two products, combine": fp8_layer,
        }
        products_of[fp8_layer] = "two products in FP8, a cast between"
    found = {}
    for name, part in parts.items():
        us = found[name] = timing.eager(part, group, device=device)
        config = configs.get(name.split(",")[0])
        sent = (cast.x, cast.scales) if name.endswith(", cast") else x
        rates = case.rates(sent, us, max(ceilings[config.num_sms].values())) if config else {}
        more: timing.Row = {"products_us": found[products_of[part]]} if part in products_of else {}
        if part is fp8_layer:
            beside = "layer: dispatch, two products, combine"
            more |= {"beside": beside, "times": round(us / found[beside], 2)}
        say(op=name, us=us, **rates, **more)
    if normal.domain_size(settings.ranks) == settings.ranks:
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
        row_bytes: Of a token, as it travels.
        stored: Rows that are written here; 0 where these are not what is looked at.
        beside: Name of the call before it that is its measure.
    """

    name: str
    call: Callable[..., Any]
    row_bytes: int
    stored: int = 0
    beside: str = ""


def report(
    timed: Iterable[Timed],
    say: normal.Say,
    clock: Callable[[Callable[..., Any]], timing.Row],
    ceilings: Callable[[Timed], timing.Row],
    **common: Any,
) -> None:
    """Times calls; `clock` gives `us` of one, `ceilings` the microseconds of what bounds it."""
    found: dict[str, float] = {}
    for each in timed:
        row, facts = clock(each.call), ceilings(each)
        us = found[each.name] = row["us"]
        if facts:
            facts["ratio"] = round(max(facts.values()) / us, 3)
        if each.beside:
            facts |= {"beside": each.beside, "times": round(us / found[each.beside], 2)}
        say(op=f"{each.name}, cached", **common, **row, **facts)


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

    def clock(call: Callable[[], Any]) -> timing.Row:
        us, host_us = timing.timed(call, group)
        return {"us": us, "host_us": host_us}

    for sms in args.sms:
        config = epjit.Config(sms)
        rate = fan.stored_bytes(stores) / fan.us(stores, min(settings.ranks - 1, 1), sms)
        by_source = partial(buffer.dispatch, handle=handle.routing, config=config)
        by_expert = partial(buffer.expert_dispatch, handle=handle, config=config)
        sums = partial(buffer.expert_combine, rows, handle, config=config)
        of_x, of_fp8 = normal.row_bytes(x), sum(each.shape[1] * each.element_size() for each in fp8)
        sent, cast = "dispatch by expert", {"cast": "fp8"}
        plain_fp8, sent_fp8 = "dispatch of fp8 rows", f"{sent} of fp8 rows"
        zeros = partial(by_expert, x, zero_padding=True)
        weighted = partial(sums, row_weights=weights)
        timed = [
            Timed("dispatch", partial(by_source, x), of_x),
            Timed(plain_fp8, partial(by_source, fp8), of_fp8),
            Timed("dispatch, cast", partial(by_source, x, **cast), of_fp8, 0, plain_fp8),
            Timed(sent, partial(by_expert, x), of_x, num_selected, "dispatch"),
            Timed(f"{sent}, zeros", zeros, of_x, num_padded, "dispatch"),
            Timed(sent_fp8, partial(by_expert, fp8), of_fp8, num_selected),
            Timed(f"{sent}, cast", partial(by_expert, x, **cast), of_fp8, num_selected, sent_fp8),
            Timed("combine", partial(buffer.combine, plain, handle.routing, config=config), of_x),
            Timed("combine by expert", sums, of_x, 0, "combine"),
            Timed("combine by expert, weights", weighted, of_x, 0, "combine"),
        ]

        def bounds(
            each: Timed, rate: float = rate, best: float = max(ceilings[sms].values())
        ) -> timing.Row:
            stores = {"stores_us": each.stored * each.row_bytes / rate} if each.stored else {}
            sent_bytes = case.remote_rows * each.row_bytes
            return stores | ({"links_us": sent_bytes / best / 1e3} if best else {})

        report(timed, say, clock, bounds, sms=sms)
    fan.close()


class VirtualRanks:
    """Ranks that share a GPU: threads of this process, each with a stream and a Buffer.

    Args:
        num_ranks: `R`.
        device: "cuda" or "cpu".
        nvl_bytes: `num_nvl_bytes` of each Buffer.
    """

    def __init__(self, num_ranks: int, device: str, nvl_bytes: int) -> None:
        from epjit import Buffer
        from epjit.runtime.group import ThreadGroup

        self._ranks = range(num_ranks)
        self._threads = ThreadPoolExecutor(num_ranks)
        self._streams = [torch.cuda.Stream() for _ in self._ranks] if device == "cuda" else []
        comms = ThreadGroup.create(num_ranks)
        self.buffers = self.each(
            lambda rank: Buffer(None, nvl_bytes, comm=comms[rank], explicitly_destroy=True)
        )

    def each(self, call: Callable[[int], Any], *, wait: bool = True) -> list[Any]:
        """Runs `call(rank)` on all ranks at once, each on its stream; their results."""

        def run(rank: int) -> Any:
            on = torch.cuda.stream(self._streams[rank]) if self._streams else None
            with on or contextlib.nullcontext(), torch.no_grad():
                return call(rank)

        found = list(self._threads.map(run, self._ranks))
        if wait and self._streams:
            torch.cuda.synchronize()
        return found

    def us(self, call: Callable[..., Any]) -> float:
        """Microseconds of the slowest rank: a median, the L2 cold, the host's time hidden."""
        for _ in range(timing.WARMUP_CALLS):
            self.each(call)
        found = []
        flush = torch.empty(timing.FLUSH_WORDS, dtype=torch.int32, device="cuda")
        for _ in range(timing.TIMED_CALLS):
            flush.zero_()
            torch.cuda._sleep(len(self._ranks) * timing.SPIN_CYCLES)  # one interpreter for all
            start = torch.cuda.Event(enable_timing=True)
            start.record()

            def timed(rank: int, start: torch.cuda.Event = start) -> torch.cuda.Event:
                self._streams[rank].wait_event(start)
                call(rank)
                end = torch.cuda.Event(enable_timing=True)
                end.record()
                return end

            ends = self.each(timed, wait=False)
            torch.cuda.synchronize()
            found.append(max(start.elapsed_time(end) for end in ends) * 1e3)
        return statistics.median(found)

    def close(self) -> None:
        """Ends the Buffers and the threads."""
        self.each(lambda rank: self.buffers[rank].destroy())
        self._threads.shutdown()


def virtual_worker(
    rank: int, args: argparse.Namespace, settings: normal.Settings, port: int, queue: Any
) -> None:
    """The process of all virtual ranks; as a rank of its own it measures what the SMs store."""
    import epjit
    from epjit.bench.stores import Fan

    group, say = normal.start(rank, settings, port, queue)
    device, size, experts = settings.device, args.virtual, args.experts
    ranks = VirtualRanks(size, device, settings.nvl_bytes)

    def tokens_of(rank: int) -> Any:
        generator = torch.Generator(device).manual_seed(rank)
        on: dict[str, Any] = {"device": device, "generator": generator}
        x = torch.randn((args.tokens, args.hidden), **on).bfloat16()
        idx = torch.rand((args.tokens, experts), **on).topk(args.topk).indices
        return x, idx, torch.rand((args.tokens, args.topk), **on)

    def by_source(rank: int) -> Any:
        (x, idx, weights), buffer = inputs[rank], ranks.buffers[rank]
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, experts)
        return buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            topk_idx=idx,
            topk_weights=weights,
        )

    def by_expert(rank: int) -> Any:
        x, idx, weights = inputs[rank]
        alignment = {"expert_alignment": args.alignment, "zero_padding": True}
        return ranks.buffers[rank].expert_dispatch(
            x, idx, weights, num_experts=experts, **alignment
        )

    def check(rank: int) -> Any:
        plain, idx, weights, _, routing, _ = sent[rank]
        rows, of_rows, handle, _ = placed[rank]
        wanted = torch_permute(plain, idx, weights, experts // size, args.alignment)
        for mine, theirs in zip((rows, of_rows, handle.placement.ends), wanted, strict=True):
            normal.require("dispatch by expert", torch.equal(mine, theirs))
        return inputs[rank][0], plain, routing, rows, handle

    # One after the other: no kernel waits for a rank that still makes or compares tensors.
    inputs = ranks.each(tokens_of)
    sent = ranks.each(by_source)
    placed = ranks.each(by_expert)
    made = ranks.each(check)

    def on_rank(name: str, rank: int, **options: Any) -> Any:
        x, plain, routing, rows, handle = made[rank]
        call = getattr(ranks.buffers[rank], name)
        if name.endswith("dispatch"):
            return call(x, handle=handle if name == "expert_dispatch" else routing, **options)
        return call(*((rows, handle) if name == "expert_combine" else (plain, routing)), **options)

    num_plain = sum(len(plain) for _, plain, *_ in made)
    num_rows = sum(int(each[4].placement.counts.sum()) for each in made)
    num_padded = sum(len(rows) for *_, rows, _ in made)
    say(op="rows here, with padding", us=0, rows=num_rows, padded=num_padded, plain=num_plain)
    if device == "cuda":
        row_bytes = normal.row_bytes(made[0][0])
        fan, stores = Fan(group, row_bytes), max(1, min(4, round(num_rows / num_plain)))
        for sms in [each for each in args.sms if size * each <= fan.num_sms]:
            config = epjit.Config(sms)
            at = {n: fan.stored_bytes(n) / fan.us(n, 0, size * sms) for n in {1, stores}}
            calls = {
                name: partial(on_rank, name, config=config)
                for name in ("dispatch", "expert_dispatch", "combine", "expert_combine")
            }
            zeros = partial(calls["expert_dispatch"], zero_padding=True)
            there, back = "dispatch by expert", "combine by expert"
            timed = [
                Timed("dispatch", calls["dispatch"], row_bytes, num_plain),
                Timed(there, calls["expert_dispatch"], row_bytes, num_rows, "dispatch"),
                Timed(f"{there}, zeros", zeros, row_bytes, num_padded, "dispatch"),
                Timed("combine", calls["combine"], row_bytes, num_plain),
                Timed(back, calls["expert_combine"], row_bytes, num_plain, "combine"),
            ]

            def bounds(each: Timed, at: dict[int, float] = at, stores: int = stores) -> timing.Row:
                rate = at[1 if each.stored == num_plain else stores]
                return {"stores_us": each.stored * each.row_bytes / rate}

            report(timed, say, lambda call: {"us": ranks.us(call)}, bounds, virtual=size, sms=sms)
        fan.close()
    made.clear()
    ranks.close()
    torch.distributed.destroy_process_group()


def show(row: timing.Row) -> None:
    """One line."""
    if row["op"] == "run":
        print(f"{row['ranks']} x {row['device']}", flush=True)
        return
    if "why" in row:
        print(f"{'':13}  {row['op']}: {row['why']}", flush=True)
        return
    sms = f", {row['sms']} SMs" if "sms" in row else ""
    sms += f", each of {row['virtual']} virtual ranks" if "virtual" in row else ""
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
    parser.add_argument("--virtual", type=int, default=0, help="ranks that share one GPU")
    parser.add_argument("--json", type=Path, help="file that gets one JSON line a result")
    args = parser.parse_args()
    if args.virtual:
        if args.virtual < 0 or args.experts % args.virtual:
            parser.error(f"--virtual is {args.virtual}, but must divide {args.experts} experts")
        args.ranks = 1
        # Kernels of one rank wait for those of another: as in tests/gpu/conftest.py.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
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
    body = virtual_worker if args.virtual else worker
    timing.run_ranks(body, ranks, args, settings, timing.free_port(), on_row=on_row)


if __name__ == "__main__":
    main()
