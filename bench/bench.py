"""Times of every operation on N GPUs, beside the link ceiling of the same run and the same SMs.

One process a GPU. Each result is compared with exact index arithmetic before its time is taken; a
wrong one ends the run. A table for people at the end, JSON lines with `--json`, GB/s against SMs
as a picture with `--plot`. Times are medians of the slowest rank.

    python bench/bench.py --ranks 4 --json out.jsonl --plot out.png
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ceiling
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Payload = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Row = dict[str, Any]

SWEEP = [4, 8, 12, 16, 20, 24, 32]
TIMED_CALLS, EAGER_CALLS, WARMUP_CALLS = 20, 50, 5
SPIN_CYCLES = 400_000  # about 0.2 ms: hides the host's launch time
FLUSH_WORDS = 64 << 20  # int32 words: 256 MiB, several times the L2


def slowest(values: list[float], group: dist.ProcessGroup) -> list[float]:
    """Each value's maximum over the ranks."""
    out = torch.tensor(values, device="cuda", dtype=torch.float64)
    dist.all_reduce(out, op=dist.ReduceOp.MAX, group=group)
    return [float(value) for value in out.tolist()]


def timed(fn: Callable[[], Any], group: dist.ProcessGroup) -> tuple[float, float]:
    """Device and host microseconds a call: medians, the slowest rank's, the L2 cold."""
    for _ in range(WARMUP_CALLS):
        fn()
    torch.cuda.synchronize()
    dist.barrier(group)
    device_us, host_us = [], []
    flush = torch.empty(FLUSH_WORDS, dtype=torch.int32, device="cuda")
    for _ in range(TIMED_CALLS):
        flush.zero_()
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)  # lines the ranks up
        torch.cuda._sleep(SPIN_CYCLES)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        begin = time.perf_counter()
        fn()
        host_us.append((time.perf_counter() - begin) * 1e6)
        end.record()
        torch.cuda.synchronize()
        device_us.append(start.elapsed_time(end) * 1e3)
    device, host = slowest([statistics.median(device_us), statistics.median(host_us)], group)
    return device, host


def eager(fn: Callable[[], Any], group: dist.ProcessGroup) -> float:
    """Microseconds a call, back to back: what an eager user sees."""
    for _ in range(WARMUP_CALLS):
        fn()
    torch.cuda.synchronize()
    dist.barrier(group)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(EAGER_CALLS):
        fn()
    torch.cuda.synchronize()
    return slowest([(time.perf_counter() - begin) / EAGER_CALLS * 1e6], group)[0]


def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn `[T, H]` and a float32 scale for each 128 columns."""
    blocks = x.view(x.shape[0], -1, 128).float()
    scales = blocks.abs().amax(2).clamp(1e-4) / 448.0
    values = (blocks / scales.unsqueeze(2)).to(torch.float8_e4m3fn)
    return values.view(x.shape), scales.contiguous()


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensors of all ranks, which have one shape, as bytes or in their own dtype."""
    wire = x.view(torch.uint8) if x.element_size() == 1 else x
    parts = [torch.empty_like(wire) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, wire.contiguous(), group=group)
    return [part.view(x.dtype) for part in parts]


def tensors(payload: Payload) -> tuple[torch.Tensor, ...]:
    """The payload and its scales, if it has them."""
    return payload if isinstance(payload, tuple) else (payload,)


def row_bytes(payload: Payload) -> int:
    """Bytes that one token's row and scales have."""
    return sum(part.shape[1] * part.element_size() for part in tensors(payload))


def require(what: str, is_right: bool) -> None:
    """Ends the run if a result is wrong."""
    if not is_right:
        raise RuntimeError(f"{what} is wrong on rank {dist.get_rank()}: nothing was timed")


class Case:
    """One routing of `num_tokens` tokens a rank, and what each operation must return for it."""

    def __init__(
        self, ep: Any, buffer: Any, group: dist.ProcessGroup, args: argparse.Namespace, tokens: int
    ) -> None:
        self.ep, self.buffer, self.group = ep, buffer, group
        self.num_tokens, self.num_experts = tokens, args.experts
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        shape = (tokens, args.experts)
        scores = torch.randn(shape, device="cuda", dtype=torch.float32).abs() + 1
        self.topk_idx = torch.topk(scores, args.topk, dim=1, sorted=False)[1].to(ep.topk_idx_t)
        self.weights = torch.rand((tokens, args.topk), device="cuda", dtype=torch.float32)
        x = torch.randn((tokens, args.hidden), device="cuda", dtype=torch.bfloat16)
        self.payloads: dict[str, Payload] = {"bf16": x, "fp8": to_fp8(x)}

        owner = self.topk_idx.long() // (args.experts // self.size)
        self.in_rank = torch.zeros((tokens, self.size), dtype=torch.bool, device="cuda")
        self.in_rank.scatter_(1, owner, True)
        self.sources = [part[:, self.rank] for part in gathered(self.in_rank, group)]
        rows = [int(part.sum()) for part in self.sources]
        self.num_rows = sum(rows)
        total = torch.tensor(
            [self.num_rows - rows[self.rank], self.num_rows], device="cuda", dtype=torch.float64
        )
        dist.all_reduce(total, group=group)
        self.remote_rows, self.logical_rows = (total / self.size).tolist()  # means over the ranks

    def layout(self) -> Any:
        """The layout call."""
        return self.buffer.get_dispatch_layout(self.topk_idx, self.num_experts)

    def full_dispatch(self, payload: Payload) -> Any:
        """Layout, notify and dispatch with top-k, as an eager user calls them."""
        per_rank, per_node, per_expert, in_rank, _ = self.layout()
        return self.buffer.dispatch(
            payload,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.topk_idx,
            topk_weights=self.weights,
        )

    def expected_rows(self, x: torch.Tensor) -> torch.Tensor:
        """What dispatch of x must deliver: by source rank, then by token."""
        parts = zip(gathered(x, self.group), self.sources, strict=True)
        return torch.cat([part.view(torch.uint8)[mask] for part, mask in parts])

    def check_layout(self) -> None:
        """Compares the counts with those of this file's own arithmetic."""
        per_rank, _, per_expert, in_rank, _ = self.layout()
        require("layout: is_token_in_rank", torch.equal(in_rank, self.in_rank))
        ours = self.in_rank.sum(0, dtype=torch.int32)
        require("layout: tokens per rank", torch.equal(per_rank, ours))
        counts = torch.bincount(self.topk_idx.flatten().long(), minlength=self.num_experts)
        require("layout: tokens per expert", torch.equal(per_expert, counts.int()))

    def check_dispatch(self, received: Payload, payload: Payload, name: str) -> None:
        """Compares every received byte."""
        for got, sent in zip(tensors(received), tensors(payload), strict=True):
            wanted = self.expected_rows(sent)
            require(f"dispatch {name}", torch.equal(got.view(torch.uint8), wanted))

    def check_topk(self, idx: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> None:
        """Compares the selections that came with the rows."""
        per_rank = self.num_experts // self.size
        parts = zip(gathered(self.topk_idx, self.group), self.sources, strict=True)
        local = torch.cat([part[mask] for part, mask in parts]) - self.rank * per_rank
        mine = (local >= 0) & (local < per_rank)
        require("dispatch: top-k indices", torch.equal(idx, local.masked_fill(~mine, -1)))
        parts = zip(gathered(self.weights, self.group), self.sources, strict=True)
        wanted = torch.cat([part[mask] for part, mask in parts]).masked_fill(~mine, 0.0)
        require("dispatch: top-k weights", torch.equal(weights, wanted))
        per_expert = torch.bincount(local[mine].long(), minlength=per_rank)
        require("dispatch: tokens per expert", counts == per_expert.tolist())

    def check_combine(self, x: torch.Tensor, recv_weights: torch.Tensor, handle: Any) -> None:
        """Rows that come back unchanged add up to a multiple of x that float32 holds exactly."""
        rows = self.buffer.dispatch(x, handle=handle)[0]
        out, weights, _ = self.buffer.combine(rows, handle, topk_weights=recv_weights)
        wanted = (x.float() * self.in_rank.sum(1, keepdim=True)).to(x.dtype)
        require("combine", torch.equal(out, wanted))
        require("combine: weights", torch.equal(weights, self.weights))


def bench_tokens(case: Case, sms_list: list[int], ceilings: dict[int, Row], say: Any) -> None:
    """Every operation for one number of tokens."""
    with_layout = True
    for sms in sms_list:
        case.ep.Buffer.set_num_sms(sms)
        common = {"tokens": case.num_tokens, "sms": sms}
        best = max(ceilings[sms].values())

        def rates(payload: Payload, us: float, best: float | None = best) -> Row:
            remote = case.remote_rows * row_bytes(payload) / us / 1e3
            logical = case.logical_rows * row_bytes(payload) / us / 1e3
            ratio = round(remote / best, 3) if best else None
            return {
                "remote_GBps": round(remote, 1),
                "logical_GBps": round(logical, 1),
                "ceiling_GBps": best,
                "ratio": ratio,
            }

        for name, payload in case.payloads.items():
            received, idx, weights, counts, handle, _ = case.full_dispatch(payload)
            case.check_dispatch(received, payload, name)
            case.check_topk(idx, weights, counts)

            def cached(payload: Payload = payload, handle: Any = handle) -> Any:
                return case.buffer.dispatch(payload, handle=handle)

            case.check_dispatch(cached()[0], payload, f"{name} cached")
            us, host = timed(cached, case.group)
            say(
                op="dispatch cached",
                dtype=name,
                **common,
                us=us,
                host_us=host,
                **rates(payload, us),
            )

            def full(payload: Payload = payload) -> Any:
                return case.full_dispatch(payload)

            say(op="dispatch eager", dtype=name, **common, us=eager(full, case.group))
            if name != "bf16":
                continue
            if with_layout:
                with_layout = False
                case.check_layout()
                us, host = timed(case.layout, case.group)
                say(op="layout", tokens=case.num_tokens, us=us, host_us=host)
            case.check_combine(payload, weights, handle)  # type: ignore[arg-type]

            def combine(received: Any = received, handle: Any = handle) -> Any:
                return case.buffer.combine(received, handle)

            us, host = timed(combine, case.group)
            say(op="combine", dtype=name, **common, us=us, host_us=host, **rates(payload, us))


def measure_ceilings(
    ep_group: Any, group: dist.ProcessGroup, sms_list: list[int], megabytes: int, say: Any
) -> dict[int, Row]:
    """GB/s that each GPU sends when all copy to all peers at once, by writes and by reads."""
    from epjit.runtime.symmetric import SymmetricMemory

    found: dict[int, Row] = {sms: {} for sms in sms_list}
    if ep_group.size == 1:
        return {sms: {"push_GBps": 0.0, "pull_GBps": 0.0} for sms in sms_list}
    per_peer, device = megabytes << 20, torch.cuda.current_device()
    memory = SymmetricMemory(
        ceiling.bytes_needed(per_peer, ep_group.size), group=ep_group, device=device
    )

    def barrier() -> None:
        torch.cuda.synchronize()
        dist.barrier(group)
        torch.cuda.synchronize()

    for way in ("push", "pull"):
        copy = ceiling.LinkCopy(
            ep_group, device=device, bytes_per_peer=per_peer, pull=way == "pull", memory=memory
        )
        for sms in sms_list:

            def run(copy: ceiling.LinkCopy = copy, sms: int = sms) -> None:
                copy(torch.cuda.current_stream().cuda_stream, sms)

            copy.check(run, barrier)
            us, _ = timed(run, group)
            found[sms][f"{way}_GBps"] = round(copy.sent_bytes / us / 1e3, 1)
            say(op=f"ceiling {way}", sms=sms, us=us, remote_GBps=found[sms][f"{way}_GBps"])
    barrier()
    memory.close()
    return found


def join(rank: int, num_ranks: int, port: int) -> dist.ProcessGroup:
    """Takes GPU `rank` and meets the other ranks."""
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_ranks,
        device_id=torch.device("cuda", rank),
    )
    group = dist.new_group(list(range(num_ranks)))
    assert isinstance(group, dist.ProcessGroup)
    return group


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    """One rank: measures, and rank 0 reports."""
    import epjit
    from epjit.runtime.group import Group

    group = join(rank, args.ranks, port)
    torch.manual_seed(args.seed + rank)
    rows: list[Row] = []

    def say(**row: Any) -> None:
        row = {k: round(v, 1) if k.endswith("us") else v for k, v in row.items()}
        rows.append(row)
        if rank == 0:
            print(progress(row), file=sys.stderr, flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")

    say(
        op="run",
        module=f"epjit {epjit.__version__}",
        device=torch.cuda.get_device_name(),
        ranks=args.ranks,
        hidden=args.hidden,
        topk=args.topk,
        experts=args.experts,
        nvl_bytes=args.nvl_bytes,
        torch=torch.__version__,
        variants={name: os.environ[name] for name in sorted(os.environ) if "_VARIANT" in name},
    )
    sweep = args.sweep or []
    ceilings = measure_ceilings(
        Group.from_torch(group), group, sorted({*args.sms, *sweep}), args.ceiling_mb, say
    )
    buffer = epjit.Buffer(group, args.nvl_bytes, 0, explicitly_destroy=True)
    for tokens in args.tokens:
        extra = [sms for sms in sweep if sms not in args.sms and tokens == max(args.tokens)]
        case = Case(epjit, buffer, group, args, tokens)
        bench_tokens(case, [*args.sms, *extra], ceilings, say)
    buffer.destroy()
    dist.barrier(group)
    dist.destroy_process_group()
    if rank == 0:
        print_table(rows)
        if args.plot:
            draw(rows, args.plot)


def progress(row: Row) -> str:
    """One line while the run goes on."""
    return "  ".join(f"{key}={value}" for key, value in row.items() if value is not None)


def print_table(rows: list[Row]) -> None:
    """The table for people."""
    from rich.console import Console
    from rich.table import Table

    run, *rows = rows
    table = Table(title=f"{run['ranks']} x {run['device']}, {run['module']}")
    columns = ["op", "dtype", "tokens", "sms", "us", "host_us", "remote_GBps", "ratio"]
    heads = ["operation", "dtype", "tokens", "SMs", "us", "host us", "NVLink GB/s", "of ceiling"]
    for head in heads:
        table.add_column(head, justify="left" if head in ("operation", "dtype") else "right")
    for row in rows:
        cells = [row.get(column) for column in columns]
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    Console(width=100).print(table)


def draw(rows: list[Row], path: Path) -> None:
    """NVLink GB/s against SMs, for the largest number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    run, *rows = rows
    tokens = max(row.get("tokens", 0) for row in rows)
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if "remote_GBps" in row and row.get("tokens", tokens) == tokens:
            name = f"{row['op']} {row.get('dtype', '')}".strip()
            lines.setdefault(name, {})[row["sms"]] = row["remote_GBps"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
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


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="GPUs, one process each")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 128], help="a rank")
    parser.add_argument("--sms", type=int, nargs="+", default=[24, 12], help="even numbers")
    parser.add_argument(
        "--sweep", type=int, nargs="*", help=f"more SMs at the most tokens (default {SWEEP})"
    )
    parser.add_argument("--nvl-bytes", type=int, default=int(2e9), help="num_nvl_bytes of Buffer")
    parser.add_argument("--ceiling-mb", type=int, default=52, help="MiB to each peer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file that gets one JSON line a result")
    parser.add_argument("--plot", type=Path, help="PNG of GB/s against SMs; implies --sweep")
    args = parser.parse_args()
    if args.sweep == [] or (args.sweep is None and args.plot):
        args.sweep = SWEEP
    have = torch.cuda.device_count()
    if have < args.ranks:
        parser.error(f"--ranks {args.ranks} needs {args.ranks} GPUs, this machine has {have}")
    if args.experts % args.ranks:
        parser.error(f"--ranks {args.ranks} does not divide --experts {args.experts}")
    if args.json:
        args.json.unlink(missing_ok=True)
    return args


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    arguments = parse_args()
    mp.spawn(worker, (arguments, free_port()), arguments.ranks)
