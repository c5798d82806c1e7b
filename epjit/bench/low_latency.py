"""Times of the low-latency calls on N ranks: alone, as a pair in a CUDA graph, beside a GEMM.

One process a rank. Each result of epjit is compared bit for bit with the reference before its time
is taken; of another module, whose order of rows is its own, the counts are. Times are medians of
the slowest rank.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from epjit import env
from epjit.bench.normal import (
    Payload,
    Say,
    Settings,
    gathered,
    measure_ceilings,
    require,
    start,
    tensors,
)
from epjit.bench.timing import (
    FLUSH_WORDS,
    SPIN_CYCLES,
    TIMED_CALLS,
    Row,
    eager,
    free_port,
    in_graph,
    nothing,
    run_ranks,
    slowest,
    timed,
)
from epjit.checks.low_latency import LowLatencyChecks
from epjit.formats import BF16, FP8
from epjit.handles import LowLatencyDispatched
from epjit.reference import low_latency as reference

_GEMM = (4096, 4096, 8192)  # about 350 us on an H200: longer than a call


def run(settings: Settings, *, on_row: Callable[[Row], None]) -> list[Row]:
    """Times the low-latency calls of every module.

    Args:
        settings: Of the run; `sms` and `sweep` mean nothing here.
        on_row: Called with each row when it is measured.

    Returns:
        Rows; the first (`op` "run") says where they were measured.

    Raises:
        ValueError: Sizes that no low-latency call takes; nothing was started.
        RuntimeError: A result is wrong, or a rank failed.
    """
    device = torch.device(settings.device)
    checks = LowLatencyChecks(num_ranks=settings.ranks, device=device, num_rdma_bytes=0)
    for tokens in settings.tokens:
        checks.sizes(tokens, settings.experts)
    return run_ranks(worker, settings.ranks, settings, free_port(), on_row=on_row)


class Case:
    """The tokens of all ranks, and the two calls for them; M is the number of tokens.

    With `weights_sent` the weights go along with the dispatch: each rank sums its rows first.
    """

    def __init__(
        self,
        buffer: Any,
        group: dist.ProcessGroup,
        settings: Settings,
        tokens: int,
        *,
        use_fp8: bool,
        index_dtype: torch.dtype,
        weights_sent: bool = False,
    ) -> None:
        self.buffer, self.group, self.settings = buffer, group, settings
        self.tokens, self.use_fp8 = tokens, use_fp8
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        device = settings.device
        torch.manual_seed(settings.seed + self.rank)  # every module gets the same tokens
        self.x = torch.randn((tokens, settings.hidden), device=device, dtype=torch.bfloat16)
        scores = torch.randn((tokens, settings.experts), device=device, dtype=torch.float32)
        self.topk_idx = scores.topk(settings.topk, dim=1).indices.to(index_dtype)
        self.weights = torch.rand((tokens, settings.topk), device=device, dtype=torch.float32)
        shape = (settings.experts // self.size, self.size * tokens, settings.hidden)
        self.sent = {"topk_weights": self.weights} if weights_sent else {}
        variant = env.low_latency_combine_variant()
        self.reduced = variant == "reduced" or (variant == "auto" and weights_sent)
        self.y = torch.randn(shape, device=device, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.x)

        owners = self.topk_idx.long() // (settings.experts // self.size)
        remote = owners != self.rank
        pairs = [int(((owners == rank).any(1)).sum()) for rank in range(self.size)]
        sent = torch.tensor(
            [sum(pairs) - pairs[self.rank], int(remote.sum())], device=device, dtype=torch.float64
        )
        dist.all_reduce(sent, group=group)
        rows, choices = (sent / self.size).tolist()  # means over the ranks
        row_format = FP8 if use_fp8 else BF16
        hidden = settings.hidden
        self.sent_bytes = {
            "dispatch": rows * (row_format.row_bytes(hidden) + row_format.num_scale_bytes(hidden)),
            "combine": (rows if self.reduced else choices) * 2 * hidden,
        }

    def dispatch(self, **flags: Any) -> Any:
        """The call."""
        return self.buffer.low_latency_dispatch(
            self.x,
            self.topk_idx,
            self.tokens,
            self.settings.experts,
            use_fp8=self.use_fp8,
            **self.sent,
            **flags,
        )

    def combine(self, handle: Any, **flags: Any) -> Any:
        """The call."""
        return self.buffer.low_latency_combine(
            self.y, self.topk_idx, self.weights, handle, out=self.out, **flags
        )

    def pair(self, before: Callable[[], Any] = nothing) -> None:
        """Both, with something before each."""
        before()
        handle = self.dispatch()[2]
        before()
        self.combine(handle)

    def check(self, *, is_exact: bool) -> Any:
        """Compares a pair with the reference; returns a handle."""
        received, counts, handle, _, _ = self.dispatch()
        combined, _, _ = self.combine(handle)
        inputs = [
            reference.RankInput(x.cpu(), idx.cpu())
            for x, idx in zip(
                gathered(self.x, self.group), gathered(self.topk_idx, self.group), strict=True
            )
        ]
        own = reference.dispatch(
            inputs,
            self.rank,
            max_tokens=self.tokens,
            num_experts=self.settings.experts,
            row_format=FP8 if self.use_fp8 else BF16,
        )
        require("low-latency counts", torch.equal(counts.cpu(), own.recv_count))
        if is_exact:
            self._check_rows(received, own)
            returned: list[Any] = [None] * self.size
            mine = reference.collect(self.y.cpu(), own.src_info, self.size)
            dist.all_gather_object(returned, mine, group=self.group)
            sums = reference.combine(
                returned,
                self.rank,
                inputs[self.rank].topk_idx,
                self.weights.cpu(),
                num_experts=self.settings.experts,
                reduced=self.reduced,
            )
            require("low-latency combine", torch.equal(combined.cpu(), sums))
        return handle

    def _check_rows(self, received: Payload, wanted: LowLatencyDispatched) -> None:
        expected = (wanted.recv_x, wanted.recv_scales)
        for got, want in zip(tensors(received), expected, strict=False):
            assert want is not None
            for expert, count in enumerate(wanted.recv_count.tolist()):
                rows = got[expert, :count].cpu().contiguous(), want[expert, :count].contiguous()
                is_right = (
                    torch.equal(*(each.view(torch.uint8) for each in rows)) if count else True
                )
                require("low-latency dispatch", is_right)


def bench_case(case: Case, best: float, common: Row, say: Say) -> None:
    """The two calls with each of their flags."""
    clock = functools.partial(timed, group=case.group, device=case.settings.device)
    handle = case.check(is_exact=common["module"] == "epjit")
    how = ", weights sent" if case.sent else ""
    for op, call in (
        ("dispatch", case.dispatch),
        ("combine", functools.partial(case.combine, handle)),
    ):
        us, host = clock(call)
        rate = case.sent_bytes[op] / us / 1e3
        say(
            op=f"low-latency {op}{how}",
            **common,
            us=us,
            host_us=host,
            remote_GBps=round(rate, 1),
            ratio=round(rate / best, 3) if best else None,
        )
    us = eager(case.pair, case.group, device=case.settings.device)
    say(op=f"low-latency pair, eager{how}", **common, us=us)
    if case.settings.device == "cpu":
        return
    us = in_graph(case.pair, case.group)
    say(op=f"low-latency pair, graph{how}", **common, us=us)
    # As decoding has it: other kernels run between the two, and leave nothing of them in the L2.
    flush = torch.empty(FLUSH_WORDS, dtype=torch.int32, device="cuda").zero_
    cold = in_graph(functools.partial(case.pair, flush), case.group)
    us = cold - 2 * in_graph(flush, case.group)
    say(op=f"low-latency pair, graph, L2 cold{how}", **common, us=us)
    if case.sent:
        return
    alone, beside = _gemm_times(case)
    say(op="GEMM alone", **common, us=alone)
    say(op="GEMM from send to hook", **common, us=beside)


def _gemm_times(case: Case) -> tuple[float, float]:
    """Microseconds of a GEMM by itself, and between a dispatch's sending and its hook."""
    m, k, n = _GEMM
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (k, n)))

    def gemm() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.mm(a, b)
        end.record()
        return begin, end

    medians = []
    for with_calls in (False, True):
        times = []
        for _ in range(TIMED_CALLS):
            dist.all_reduce(torch.zeros(1, device="cuda"), group=case.group)  # lines the ranks up
            torch.cuda._sleep(SPIN_CYCLES)
            if with_calls:
                _, _, handle, _, hook = case.dispatch(return_recv_hook=True)
            begin, end = gemm()
            if with_calls:
                hook()
                case.combine(handle)
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        medians.append(statistics.median(times))
    alone, beside = slowest(medians, case.group)
    return alone, beside


def worker(rank: int, settings: Settings, port: int, queue: Any) -> None:
    """One rank: measures, and rank 0 reports."""
    group, say = start(rank, settings, port, queue)
    best = 0.0
    if settings.device == "cuda":
        sms = torch.cuda.get_device_properties(rank).multi_processor_count // 2 * 2
        best = max(measure_ceilings(group, settings, [sms], say)[sms].values())
    for name in settings.modules:
        ep = importlib.import_module(name)
        for tokens in settings.tokens:
            size = ep.Buffer.get_low_latency_rdma_size_hint(
                tokens, settings.hidden, settings.ranks, settings.experts
            )
            buffer = ep.Buffer(
                group,
                0,
                size,
                low_latency_mode=True,
                num_qps_per_rank=settings.experts // settings.ranks,
                explicitly_destroy=True,
            )
            may_send = name == "epjit" and not buffer.topology.spans_domains
            for use_fp8, sent in itertools.product((True, False), (False, True)[: 1 + may_send]):
                case = Case(
                    buffer,
                    group,
                    settings,
                    tokens,
                    use_fp8=use_fp8,
                    index_dtype=ep.topk_idx_t,
                    weights_sent=sent,
                )
                common = {"module": name, "dtype": "fp8" if use_fp8 else "bf16", "tokens": tokens}
                bench_case(case, best, common, say)
            buffer.destroy()
            dist.barrier(group)
    dist.destroy_process_group()
