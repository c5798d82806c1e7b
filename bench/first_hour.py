"""The first hour on a cluster: what works, what is wrong, how fast it is; in one file to send.

On each node, as docs/first_hour.md has it:

    torchrun --nnodes 2 --node-rank $NODE --nproc-per-node 8 --master-addr node0 \
        bench/first_hour.py

Each stage runs in a process a rank of its own (`cluster_stage.py`), for NVSHMEM may end it. The
report, which rank 0 writes, has a summary in lines that begin with "#", then JSON lines. The exit
code is 1 when a row was wrong, or a stage failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

import epjit
from epjit.bench.timing import free_port

ROOT = Path(__file__).resolve().parents[1]
DEATHS = ("kill", "kill_low_latency")  # stages in which a rank ends, and nothing is judged
STAGES = ("check", "soak", "times", *DEATHS, "graph")
KILL_LIMIT = 900.0  # seconds that survivors get: a GPU's wait for a NIC may have no end
TAIL = 30  # lines of what a rank wrote before it failed

Row: TypeAlias = dict[str, Any]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--report", type=Path, default=Path("first_hour.txt"), help="of rank 0")
    parser.add_argument("--rounds", type=int, default=100_000, help="of the soak, in each mode")
    parser.add_argument("--tokens", type=int, default=511, help="most of a rank in a round")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256, help="over all ranks")
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--times", type=int, nargs=2, default=[4096, 128], help="tokens timed")
    parser.add_argument("--replays", type=int, default=10_000, help="of a CUDA graph")
    parser.add_argument("--qps", type=int, default=24, help="queue pairs to each rank")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument(
        "--with",
        dest="variables",
        action="append",
        metavar="NAME=VALUE,...",
        help="runs all stages with these variables; several: one run after the other",
    )
    parser.add_argument("--baseline", help="command that measures the link, run by rank 0")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds of a stage")
    args = parser.parse_args()
    args.variables = args.variables or [""]
    for text in filter(None, args.variables):
        if not all(re.fullmatch(r"\w+=[^,]*", each) for each in text.split(",")):
            parser.error(f"--with {text}: not NAME=VALUE,NAME=VALUE")
    return args


class Hour:
    """The stages, one after the other, on all ranks."""

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.args, self.progress = args, progress
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.rows: list[Row] = []

    def run(self) -> list[Row]:
        """Everything; all rows, on rank 0."""
        self.add(op="run", epjit=epjit.__version__, ranks=self.size, **self.plan())
        self.gather([self.doctor()] if self.local_rank == 0 else [])
        nodes = self.everyone(platform.node())
        self.baseline(list(dict.fromkeys(nodes)))
        for variables in self.args.variables:
            for stage in self.args.stages:
                self.stage(stage, variables)
        return self.rows

    def plan(self) -> Row:
        """Arguments of every stage."""
        names = ("rounds", "tokens", "hidden", "experts", "topk", "times", "replays", "qps")
        return {name: getattr(self.args, name) for name in names}

    def add(self, **row: Any) -> None:
        """A row of rank 0's own."""
        if self.rank == 0:
            self.rows.append({"at": round(time.time(), 3), **row})

    def everyone(self, value: Any) -> list[Any]:
        """The report of each rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def gather(self, rows: Sequence[Row]) -> None:
        """Rows of all ranks, to rank 0."""
        for each in self.everyone(rows):
            for row in each:
                self.add(**row)

    def doctor(self) -> Row:
        """Of this node."""
        command = [sys.executable, "-m", "epjit", "doctor", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environ())
        try:
            checks = json.loads(done.stdout)["checks"]
        except ValueError:
            checks = [{"status": "wrong", "name": "doctor", "value": done.stderr[-2000:]}]
        return {"op": "doctor", "node": platform.node(), "checks": checks}

    def baseline(self, nodes: Sequence[str]) -> None:
        """NVSHMEM's own measurement between two GPUs, where it is found."""
        if self.rank == 0:
            command = shlex.split(self.args.baseline or "") or _put_bandwidth(nodes)
            if not command:
                self.add(op="baseline", skipped="no shmem_put_bw, or no nvshmrun; see --baseline")
            else:
                try:
                    done = subprocess.run(
                        command, capture_output=True, text=True, check=False, timeout=300
                    )
                    text, code = done.stdout + done.stderr, done.returncode
                except (OSError, subprocess.TimeoutExpired) as error:
                    text, code = str(error), -1
                self.add(
                    op="baseline",
                    command=shlex.join(command),
                    exit_code=code,
                    GBps=max(_bandwidths(text), default=None),
                    text=text[-6000:],
                )
        dist.barrier()

    def stage(self, name: str, variables: str) -> None:
        """One stage on all ranks."""
        ports = self.everyone(free_port())
        added = dict(each.split("=", 1) for each in variables.split(",") if each)
        environ = {**_environ(), **added, "MASTER_PORT": str(ports[0])}
        command = [sys.executable, str(ROOT / "bench/cluster_stage.py"), name]
        command.append(json.dumps(self.plan()))
        if name == "check":
            sizes = (f"--hidden={self.args.hidden}", f"--topk={min(4, self.args.topk)}")
            tokens = f"--tokens={self.args.times[0]}"
            command = [sys.executable, str(ROOT / "examples/two_nodes.py"), *sizes, tokens]
        label = f"{name} {variables}".strip()
        totals = {"soak": 2 * self.args.rounds, "graph": self.args.replays}
        task = self.progress.add_task(label, total=totals.get(name))
        rows, began = [], time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            child = subprocess.Popen(
                command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True
            )
            seconds = min(self.args.limit, KILL_LIMIT if name in DEATHS else math.inf)
            limit = threading.Timer(seconds, child.kill)
            limit.start()
            assert child.stdout is not None
            last = began
            for line in child.stdout:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = {"op": "said", "text": line.strip()}
                if row["op"] == "round":
                    last = time.monotonic()
                elif row["op"] == "progress":
                    self.progress.update(task, advance=1)
                else:
                    rows.append({"stage": name, "with": variables, **row})
            code = child.wait()
            limit.cancel()
            end: Row = {"op": "end", "stage": name, "with": variables, "rank": self.rank}
            end |= {"exit_code": code, "seconds": round(time.monotonic() - began, 1)}
            if name in DEATHS:
                end["seconds_after_last_round"] = round(time.monotonic() - last, 1)
            if code:
                log.seek(0)
                end["log"] = log.read().splitlines()[-TAIL:]
        self.progress.update(task, total=1, completed=1)
        self.gather([*rows, end])


def _environ() -> dict[str, str]:
    """Of a stage: domains are the nodes, unless they are cut; the store is a rank's own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": path, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    environ.setdefault("EPJIT_NVLINK_DOMAIN", os.environ["LOCAL_WORLD_SIZE"])
    return environ


def _put_bandwidth(nodes: Sequence[str]) -> list[str]:
    """The command that runs NVSHMEM's `shmem_put_bw` on two nodes; empty when it is not found."""
    root = os.environ.get("NVSHMEM_DIR") or os.environ.get("NVSHMEM_HOME") or "/usr/local/nvshmem"
    programs = [*Path(root).rglob("shmem_put_bw"), shutil.which("shmem_put_bw")]
    starters = [*Path(root).rglob("nvshmrun*"), shutil.which("nvshmrun")]
    for program in filter(None, programs):
        for starter in filter(None, starters):
            hosts = ",".join([*nodes, *nodes][:2])
            return [str(starter), "-n", "2", "-ppn", "1", "-hosts", hosts, str(program)]
    return []


def _bandwidths(text: str) -> Iterator[float]:
    """GB/s of the lines that have a size in bytes and a bandwidth."""
    for found in re.finditer(r"^\W*(\d+)[\s|]+(\d+\.\d+)\W*$", text, re.MULTILINE):
        yield float(found[2])


# ---- the report ---------------------------------------------------------------------------------


def failed(rows: Sequence[Row]) -> list[str]:
    """Everything that is not as it should be, a line each."""
    lines = []
    for row in rows:
        run = f"{row.get('stage')} {row.get('with', '')}".strip()
        if row.get("wrong_rows"):
            lines.append(f"{run}: rank {row.get('rank')} has {row['wrong_rows']} wrong rows")
        if row["op"] == "end" and row["exit_code"] and row["stage"] not in DEATHS:
            lines.append(f"{run}: rank {row['rank']} ended with {row['exit_code']}")
    return lines


def summary(rows: Sequence[Row]) -> list[str]:
    """The report for people."""
    lines = []
    for row in rows:
        run = f"{row.get('stage')} {row.get('with', '')}".strip()
        match row["op"]:
            case "run":
                lines.append(f"epjit {row['epjit']}, {row['ranks']} ranks")
            case "doctor":
                bad = [c for c in row["checks"] if c["status"] in ("warning", "wrong")]
                lines.append(f"{row['node']}: {len(bad)} lines of doctor to look at")
                lines += [f"  {c['status']} {c['name']}: {c['value']}" for c in bad]
            case "baseline":
                told = row.get("skipped") or f"{row['GBps']} GB/s at most: {row['command']}"
                lines.append(f"baseline: {told}")
            case "soak":
                over = row["transport"] or "no NIC"
                lines.append(
                    f"{run}: rank {row['rank']}, {row['mode']}, {row['rounds']} rounds over "
                    f"{over}: {row['wrong_rows']} of {row['rows']} rows wrong, {row['seconds']} s"
                )
            case "graph":
                told = row.get("skipped") or f"{row['replays']} replays"
                lines.append(f"{run}: {told}, {row.get('wrong_rows', 0)} rows wrong")
            case "error":
                lines.append(f"{run}: {row['kind']}: {row['message']}")
            case "end" if row["stage"] in DEATHS:
                lines.append(
                    f"{run}: rank {row['rank']} ended with {row['exit_code']}, "
                    f"{row['seconds_after_last_round']} s after its last round began"
                )
            case op if "us" in row:
                rate = f", {row['rdma_GBps']} GB/s over NICs" if "rdma_GBps" in row else ""
                tokens = f"{row['tokens']} tokens " if "tokens" in row else ""
                dtype = row.get("dtype", "")
                lines.append(f"{run}: {op}, {tokens}{dtype}: {row['us']:.1f} us{rate}")
    return [
        *lines,
        *(f"WRONG {line}" for line in failed(rows)),
        "" if failed(rows) else "all right",
    ]


def report(rows: Sequence[Row]) -> str:
    """One file: the summary, then all rows."""
    text = [f"# {line}" for line in summary(rows) if line]
    return "\n".join([*text, *(json.dumps(row) for row in rows)]) + "\n"


def main() -> int:
    """Runs all on this rank; returns the exit code."""
    args = parse()
    dist.init_process_group("gloo", timeout=timedelta(hours=12))
    is_first = dist.get_rank() == 0
    console = Console(stderr=True, quiet=not is_first)
    with Progress(console=console, disable=not is_first) as progress:
        rows = Hour(args, progress).run()
    code = [bool(failed(rows))]
    if is_first:
        args.report.write_text(report(rows))
        for line in summary(rows):
            print(line)
        print(f"written to {args.report}")
    dist.broadcast_object_list(code, src=0)
    dist.destroy_process_group()
    return int(code[0])


if __name__ == "__main__":
    sys.exit(main())
