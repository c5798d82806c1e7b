"""One rank of one stage of `first_hour.py`, in a process of its own: NVSHMEM can end it.

    cluster_stage.py STAGE PLAN    under the environment of torchrun; PLAN is JSON

Writes JSON lines to stdout; what libraries print goes to stderr.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
import torch.distributed as dist

import epjit
from epjit.bench import low_latency, normal
from epjit.runtime import network

ROW, COLUMN, MIX = 2_654_435_761, 40_503, 2_246_822_519  # odd, so that no bits are lost
MOST_SITES = 5  # wrong rows of a rank that are told one by one


@dataclass(frozen=True)
class Plan:
    """A run of all stages, the same on all ranks.

    Attributes:
        rounds: Of the soak, in each mode.
        tokens: Most tokens of a rank in a round.
        hidden: Elements a row; half of it and eight more take turns with it.
        experts: Over all ranks.
        topk: Choices a token.
        times: Numbers of tokens that are timed: in the normal mode, in the low-latency mode.
        replays: Of a CUDA graph.
        qps: Queue pairs to each rank.
    """

    rounds: int
    tokens: int
    hidden: int
    experts: int
    topk: int
    times: tuple[int, int]
    replays: int
    qps: int

    @property
    def low_latency_tokens(self) -> int:
        """Most tokens of a rank in a round of the low-latency mode."""
        return min(self.tokens, 127)


class Wrong:
    """Rows that are not what they must be: how many of how many, and where the first ones lie."""

    def __init__(self) -> None:
        self.rows, self.of = 0, 0
        self.sites: list[dict[str, Any]] = []

    def compare(self, got: torch.Tensor, wanted: torch.Tensor, **where: Any) -> None:
        """Counts rows that differ; tensors in `where` have an entry a row."""
        self.of += len(wanted)
        if got.shape != wanted.shape:
            self.rows += max(len(got), len(wanted))
            self.sites.append({"rows": len(got), "wanted": len(wanted), **_numbers(where, None)})
            return
        differs = got != wanted
        bad = differs.any(dim=1).nonzero().flatten().tolist()
        self.rows += len(bad)
        for row in bad[: max(0, MOST_SITES - len(self.sites))]:
            columns = differs[row].nonzero().flatten()
            site = {"columns": [int(columns[0]), int(columns[-1])], "differ": len(columns)}
            self.sites.append(site | _numbers(where, row))


def _numbers(where: dict[str, Any], row: int | None) -> dict[str, Any]:
    tensors = {name for name, value in where.items() if isinstance(value, torch.Tensor)}
    at = {name: int(where[name][row]) for name in tensors} if row is not None else {}
    return {name: value for name, value in where.items() if name not in tensors} | at


class Stage:
    """A rank that has met the others."""

    def __init__(self, plan: Plan, out: TextIO) -> None:
        self.plan, self.out = plan, out
        local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        gpus = torch.cuda.device_count() if os.environ.get("EPJIT_BACKEND") != "cpu" else 0
        self.on_gpu = gpus >= local_size
        if self.on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:
            os.environ["EPJIT_BACKEND"] = "cpu"
            torch.set_num_threads(1)
        dist.init_process_group("nccl" if self.on_gpu else "gloo")
        assert dist.group.WORLD is not None
        self.group = dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.per_rank = plan.experts // self.size

    def say(self, **row: Any) -> None:
        """Reports a row."""
        print(json.dumps(row), file=self.out, flush=True)

    # ---- buffers ---------------------------------------------------------------------------------

    def normal_buffer(self, *, explicitly_destroy: bool = True) -> epjit.Buffer:
        """For rows of the normal mode."""
        config = epjit.Buffer.get_dispatch_config(self.size)
        row_bytes, domain = self.plan.hidden * 2, int(os.environ["EPJIT_NVLINK_DOMAIN"])
        return epjit.Buffer(
            self.group,
            config.get_nvl_buffer_size_hint(row_bytes, self.size, ranks_per_domain=domain),
            config.get_rdma_buffer_size_hint(row_bytes, self.size, ranks_per_domain=domain),
            num_qps_per_rank=self.plan.qps,
            explicitly_destroy=explicitly_destroy,
        )

    def low_latency_buffer(self) -> epjit.Buffer:
        """For the low-latency mode."""
        plan = self.plan
        num_bytes = epjit.Buffer.get_low_latency_rdma_size_hint(
            max(plan.low_latency_tokens, plan.times[1]), plan.hidden, self.size, plan.experts
        )
        return epjit.Buffer(
            self.group,
            0,
            num_bytes,
            low_latency_mode=True,
            num_qps_per_rank=max(self.per_rank, 1),
            explicitly_destroy=True,
        )

    # ---- rounds ----------------------------------------------------------------------------------

    def hidden_of(self, number: int) -> int:
        """Elements a row; every other round has rows that no power of two divides."""
        return self.plan.hidden if number % 2 == 0 else self.plan.hidden // 2 + 8

    def lengths(self, number: int, most: int) -> list[int]:
        """Tokens of each rank: odd numbers, and now and then none."""
        rng = random.Random(number)
        odd = (rng.randrange(1, most + 1, 2) for _ in range(self.size))
        return [0 if rng.random() < 0.1 else tokens for tokens in odd]

    def choices(self, number: int, lengths: Sequence[int]) -> torch.Tensor:
        """Experts of all ranks' tokens `[R, T, K]`, -1 behind the tokens of a rank."""
        generator = torch.Generator(self.device).manual_seed(number)
        shape = (self.size, max(lengths), self.plan.experts)
        scores = torch.rand(shape, generator=generator, device=self.device)
        chosen = scores.topk(self.plan.topk, dim=2).indices
        ends = torch.tensor(lengths, device=self.device)[:, None]
        there = torch.arange(max(lengths), device=self.device) < ends
        return chosen.masked_fill(~there[:, :, None], -1)

    def rows(
        self, number: int, sources: torch.Tensor, tokens: torch.Tensor, hidden: int
    ) -> torch.Tensor:
        """Rows of tokens: whole numbers from -8 to 8, of which bfloat16 adds eight exactly."""
        row = ((number % 4096) * self.size + sources) * 4096 + tokens
        columns = torch.arange(hidden, device=self.device)
        mixed = row[:, None] * ROW + columns * COLUMN
        mixed = (mixed ^ mixed >> 15) * MIX  # int64, which wraps
        return ((mixed ^ mixed >> 13) % 17 - 8).to(torch.bfloat16)

    def own(self, number: int, num_tokens: int, hidden: int) -> torch.Tensor:
        """The rows of this rank's tokens."""
        tokens = torch.arange(num_tokens, device=self.device)
        return self.rows(number, torch.full_like(tokens, self.rank), tokens, hidden)

    def normal_round(self, buffer: epjit.Buffer, number: int, wrong: Wrong) -> None:
        """Dispatch and combine of new tokens, with every row compared."""
        lengths = self.lengths(number, self.plan.tokens)
        if not any(lengths):
            return
        hidden, num_tokens = self.hidden_of(number), lengths[self.rank]
        chosen = self.choices(number, lengths)
        there = chosen[:, :, :1] >= 0
        in_rank = torch.zeros((*chosen.shape[:2], self.size), dtype=torch.bool, device=self.device)
        in_rank = in_rank.scatter(2, chosen.clamp(min=0) // self.per_rank, True) & there
        x, idx = self.own(number, num_tokens, hidden), chosen[self.rank, :num_tokens].contiguous()
        per_rank, per_domain, per_expert, mask, _ = buffer.get_dispatch_layout(
            idx, self.plan.experts
        )
        received, _, _, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_domain,
            is_token_in_rank=mask,
            num_tokens_per_expert=per_expert,
            topk_idx=idx,
            topk_weights=torch.ones_like(idx, dtype=torch.float32),
        )
        combined, _, _ = buffer.combine(received, handle)
        sources, tokens = in_rank[:, :, self.rank].nonzero(as_tuple=True)
        wanted = self.rows(number, sources, tokens, hidden)
        assert isinstance(received, torch.Tensor)
        at = {"round": number, "source": sources, "token": tokens}
        wrong.compare(received, wanted, op="dispatch", **at)
        sums = x.float() * in_rank[self.rank, :num_tokens].sum(dim=1, keepdim=True)
        at = {"round": number, "source": self.rank, "token": torch.arange(num_tokens)}
        wrong.compare(combined.float(), sums, op="combine", **at)

    def low_latency_round(self, buffer: epjit.Buffer, number: int, wrong: Wrong) -> None:
        """The same in the low-latency mode."""
        plan, most = self.plan, self.plan.low_latency_tokens
        lengths = self.lengths(number, most)
        if not any(lengths):
            return
        hidden, num_tokens = self.hidden_of(number), lengths[self.rank]
        chosen = self.choices(number, lengths)
        x, idx = self.own(number, num_tokens, hidden), chosen[self.rank, :num_tokens].contiguous()
        slabs, counts, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, most, plan.experts, use_fp8=False
        )
        assert isinstance(slabs, torch.Tensor)
        combined, _, _ = buffer.low_latency_combine(
            slabs, idx, torch.ones_like(idx, dtype=torch.float32), handle
        )
        for local, count in enumerate(counts.tolist()):
            expert = self.rank * self.per_rank + local
            sources, tokens = (chosen == expert).any(dim=2).nonzero(as_tuple=True)
            wanted = self.rows(number, sources, tokens, hidden)
            at = {"round": number, "expert": expert, "source": sources, "token": tokens}
            wrong.compare(slabs[local, :count], wanted, op="low-latency dispatch", **at)
        at = {"round": number, "source": self.rank, "token": torch.arange(num_tokens)}
        wrong.compare(combined.float(), x.float() * plan.topk, op="low-latency combine", **at)

    # ---- stages ----------------------------------------------------------------------------------

    def soak(self) -> None:
        """Rounds of both modes."""
        modes: dict[str, tuple[Callable[[], epjit.Buffer], Callable[..., None]]] = {
            "normal": (self.normal_buffer, self.normal_round),
            "low-latency": (self.low_latency_buffer, self.low_latency_round),
        }
        for mode, (make, one_round) in modes.items():
            buffer, wrong = make(), Wrong()
            runtime = buffer.runtime
            assert runtime is not None
            begin = time.perf_counter()
            for number in range(self.plan.rounds):
                one_round(buffer, number, wrong)
                self.say(op="progress", done=number + 1)
            self.say(
                op="soak",
                mode=mode,
                rank=self.rank,
                domain=runtime.get_rdma_rank(),
                rounds=self.plan.rounds,
                wrong_rows=wrong.rows,
                rows=wrong.of,
                sites=wrong.sites,
                seconds=round(time.perf_counter() - begin, 3),
                transport=network.loaded(),
            )
            buffer.destroy()
            dist.barrier()

    def times(self) -> None:
        """As `python -m epjit bench` has them; and what of it a NIC carries."""
        plan, device = self.plan, self.device.type
        settings = normal.Settings(
            ranks=self.size,
            hidden=plan.hidden,
            topk=plan.topk,
            experts=plan.experts,
            tokens=plan.times,
            device=device,
        )
        domain = int(os.environ["EPJIT_NVLINK_DOMAIN"])

        def say(**row: Any) -> None:
            if self.rank == 0:
                self.say(**row)

        sms, buffer = 24, self.normal_buffer()
        case = normal.Case(epjit, buffer, self.group, settings, plan.times[0])
        to_domains = case.in_rank.view(plan.times[0], -1, domain).any(2).sum(0)
        away = to_domains.sum() - to_domains[self.rank // domain]
        rows = torch.tensor([float(away)], device=self.device, dtype=torch.float64)
        dist.all_reduce(rows)

        def say_rdma(**row: Any) -> None:
            if row.get("dtype") in case.payloads:
                num_bytes = float(rows) / self.size * normal.row_bytes(case.payloads[row["dtype"]])
                row["rdma_GBps"] = round(num_bytes / row["us"] / 1e3, 2)
            say(**row)

        normal.bench_tokens(case, [sms], {sms: {"none": 0.0}}, say_rdma)
        buffer.destroy()
        dist.barrier()
        buffer = self.low_latency_buffer()
        small = low_latency.Case(
            buffer,
            self.group,
            settings,
            plan.times[1],
            use_fp8=True,
            index_dtype=torch.int64,
        )
        common = {"module": "epjit", "tokens": small.tokens, "dtype": "fp8"}
        low_latency.bench_case(small, 0.0, common, say)
        buffer.destroy()
        dist.barrier()

    def kill(self) -> None:
        """The last rank kills itself in a round; what do the others see, and when?"""
        self._rounds_with_a_death(self.normal_buffer(), self.normal_round)

    def kill_low_latency(self) -> None:
        """The same in the low-latency mode, where each rank sends to all."""
        self._rounds_with_a_death(self.low_latency_buffer(), self.low_latency_round)

    def _rounds_with_a_death(self, buffer: epjit.Buffer, one_round: Callable[..., None]) -> None:
        for number in range(6):
            if number == 3 and self.rank == self.size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            self.say(op="round", number=number)
            one_round(buffer, number, Wrong())

    def graph(self) -> None:
        """Replays of a captured pair, while what other Buffers leave is collected."""
        if not self.on_gpu:
            self.say(op="graph", skipped="there is no GPU")
            return
        plan, number, wrong = self.plan, 0, Wrong()
        most = plan.low_latency_tokens
        buffer = self.low_latency_buffer()
        chosen = self.choices(number, [most] * self.size)[self.rank].contiguous()
        x, weights = self.own(number, most, plan.hidden), torch.ones(chosen.shape, device="cuda")
        left = [self.normal_buffer(explicitly_destroy=False)]
        self.normal_round(left[0], number, wrong)
        cycle: list[Any] = [left.pop()]  # a Buffer that is collected while the graph is captured
        cycle.append(cycle)

        def pair() -> torch.Tensor:
            slabs, _, handle, _, _ = buffer.low_latency_dispatch(
                x, chosen, most, plan.experts, use_fp8=False
            )
            return buffer.low_latency_combine(slabs, chosen, weights, handle)[0]

        pair()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        gc.disable()
        with torch.cuda.graph(graph):
            del cycle
            gc.collect()
            out = pair()
        for replay in range(plan.replays):
            out.zero_()
            graph.replay()
            if replay % 100 == 0:
                gc.collect()
                sums = x.float() * plan.topk
                at = {"round": replay, "token": torch.arange(most)}
                wrong.compare(out.float(), sums, op="graph", **at)
            self.say(op="progress", done=replay + 1)
        torch.cuda.synchronize()
        self.say(op="graph", replays=plan.replays, wrong_rows=wrong.rows, sites=wrong.sites)
        dist.barrier()


def main() -> int:
    """Runs the stage; returns the exit code: 3 for an error that epjit has raised."""
    name, text = sys.argv[1:]
    fields = json.loads(text)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level="INFO", stream=sys.stderr)
    stage = Stage(Plan(**{**fields, "times": tuple(fields["times"])}), out)
    try:
        getattr(stage, name)()
        if not name.startswith("kill"):
            dist.barrier()  # rank 0 has the store
    except Exception as error:
        logging.exception("stage %s", name)
        stage.say(op="error", kind=type(error).__name__, message=str(error))
        return 3
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # ranks may be gone, for which the ends of libraries would wait
