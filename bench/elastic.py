"""The cost of DeepEP 2's interface: ElasticBuffer's calls beside those of Buffer, in one run.

All GPUs of this machine (or two ranks of the CPU backend, to try it). Buffer's dispatch has its
layout with it, as ElasticBuffer's has. Then pairs of few tokens in a CUDA graph, beside a pair of
the low-latency mode. Results are compared before a time is taken.

    python bench/elastic.py --tokens 4096 --hidden 7168
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from epjit.bench import normal, timing

PAIRS = 10  # in one CUDA graph


def worker(
    rank: int, args: argparse.Namespace, settings: normal.Settings, port: int, queue: Any
) -> None:
    """One rank: compares and times the calls."""
    torch.set_grad_enabled(False)
    import epjit

    group, say = normal.start(rank, settings, port, queue)
    device, num_ranks, experts = settings.device, settings.ranks, args.experts
    x, idx, weights = tokens_of(rank, args.tokens, args, device)
    common = {"num_experts": experts, "num_max_tokens_per_rank": args.tokens, "num_sms": args.sms}
    config = epjit.Config(args.sms)
    old = epjit.Buffer(group, settings.nvl_bytes, explicitly_destroy=True)
    sizes = {"num_max_tokens_per_rank": args.tokens, "hidden": args.hidden, "num_topk": args.topk}
    new = epjit.ElasticBuffer(group, **sizes, explicitly_destroy=True)
    each = epjit.ElasticBuffer(
        group, **sizes, allow_multiple_reduction=False, explicitly_destroy=True
    )

    def v1(**options: Any) -> Any:
        per_rank, _, per_expert, in_rank, _ = old.get_dispatch_layout(idx, experts)
        return old.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            topk_idx=idx,
            topk_weights=weights,
            config=config,
            **options,
        )

    def v2(**options: Any) -> Any:
        return new.dispatch(x, idx, weights, **common, **options)

    rows, _, _, _, old_handle, _ = v1()
    got, _, _, handle, _ = v2()
    if not torch.equal(got, rows):
        raise RuntimeError(f"rows differ on rank {rank}: nothing was timed")
    by_expert, _, _, expanded, _ = v2(do_expand=True, expert_alignment=128)
    static = {"do_cpu_sync": False}
    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
        "dispatch": (v2, v1),
        "dispatch, no waiting host": (
            lambda: v2(**static),
            lambda: v1(num_worst_tokens=num_ranks * args.tokens),
        ),
        "dispatch, cached": (
            lambda: new.dispatch(x, handle=handle, num_sms=args.sms),
            lambda: old.dispatch(x, handle=old_handle, config=config),
        ),
        "combine": (
            lambda: new.combine(rows, handle),
            lambda: old.combine(rows, old_handle, config=config),
        ),
        "dispatch by expert": (lambda: v2(do_expand=True, expert_alignment=128), v1),
        "combine by expert": (
            lambda: new.combine(by_expert, expanded),
            lambda: old.combine(rows, old_handle, config=config),
        ),
        "combine by expert, each row": (lambda: each.combine(by_expert, expanded), None),
    }
    for name, (ours, theirs) in cases.items():
        us, host = timing.timed(ours, group, device=device)
        row = {"op": name, "us": us, "host_us": host}
        if theirs is not None:
            row["buffer_us"] = timing.timed(theirs, group, device=device)[0]
        say(**row)
    for tokens in (128, 8):
        graphs(rank, tokens, args, settings, group, say)
    for buffer in (each, new, old):
        buffer.destroy()
    torch.distributed.destroy_process_group()


def tokens_of(rank: int, tokens: int, args: argparse.Namespace, device: str) -> tuple[Any, ...]:
    """Tokens of a rank, their choices and weights."""
    torch.manual_seed(rank)
    x = torch.randn((tokens, args.hidden), device=device, dtype=torch.bfloat16)
    scores = torch.randn((tokens, args.experts), device=device, dtype=torch.float32)
    idx = scores.topk(args.topk, dim=1).indices
    return x, idx, torch.rand((tokens, args.topk), device=device, dtype=torch.float32)


def graphs(
    rank: int,
    tokens: int,
    args: argparse.Namespace,
    settings: normal.Settings,
    group: Any,
    say: Any,
) -> None:
    """A dispatch and its combine, captured several times, of both interfaces."""
    import epjit

    device, experts = settings.device, args.experts
    x, idx, weights = tokens_of(rank, tokens, args, device)
    size = epjit.Buffer.get_low_latency_rdma_size_hint(tokens, args.hidden, settings.ranks, experts)
    low = epjit.Buffer(group, 0, size, low_latency_mode=True, explicitly_destroy=True)
    new = epjit.ElasticBuffer(
        group, num_max_tokens_per_rank=tokens, hidden=args.hidden, explicitly_destroy=True
    )

    def elastic(*, do_expand: bool) -> None:
        rows, _, _, handle, _ = new.dispatch(
            x,
            idx,
            weights,
            num_experts=experts,
            num_sms=args.sms,
            do_cpu_sync=False,
            do_expand=do_expand,
        )
        new.combine(rows, handle)

    def low_latency() -> None:
        rows, _, handle, _, _ = low.low_latency_dispatch(x, idx, tokens, experts, use_fp8=False)
        low.low_latency_combine(rows, idx, weights, handle)

    pairs: dict[str, Callable[[], None]] = {
        "pair in a graph": lambda: elastic(do_expand=False),
        "pair in a graph, by expert": lambda: elastic(do_expand=True),
        "pair in a graph, low latency": low_latency,
    }
    for name, pair in pairs.items():
        pair()
        calls, number = pair, 1
        if device != "cpu":
            torch.cuda.synchronize()
            torch.distributed.barrier(group)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(PAIRS):
                    pair()
            calls, number = graph.replay, PAIRS
        us, _ = timing.timed(calls, group, device=device)
        say(op=f"{name}, {tokens} tokens", us=us / number)
    new.destroy()
    low.destroy()


def show(row: timing.Row) -> None:
    """One line."""
    if row["op"] == "run":
        print(f"{row['ranks']} x {row['device']}", flush=True)
        return
    beside = row.get("buffer_us")
    ratio = f", {row['us'] / beside:.2f} x Buffer's {beside:.1f}" if beside else ""
    host = f", host {row['host_us']:.1f} us" if "host_us" in row else ""
    print(f"{row['us']:10.1f} us  {row['op']}{ratio}{host}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, help="by default all GPUs, or two without any")
    parser.add_argument("--tokens", type=int, default=4096, help="a rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sms", type=int, default=24)
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
    print(f"{args.tokens} tokens, {args.sms} SMs, the slowest rank", flush=True)
    timing.run_ranks(worker, ranks, args, settings, timing.free_port(), on_row=show)


if __name__ == "__main__":
    main()
