"""Times of DeepEP 2's interface on N ranks: ElasticBuffer's calls beside Buffer's of the same run.

Buffer's dispatch has its layout with it, as ElasticBuffer's has. Pairs of few tokens are timed in a
CUDA graph, beside one of the low-latency mode in the same process. One process a rank; each result
is compared with exact arithmetic before its time is taken. Times are medians of the slowest rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from epjit.bench import low_latency, normal
from epjit.bench.normal import Payload, Say, Settings, require, start, tensors
from epjit.bench.timing import Row, eager, free_port, in_graph, run_ranks, timed
from epjit.handles import EPHandle

Call: TypeAlias = Callable[[], Any]

MOST_IN_GRAPH = 1024  # tokens of a rank that decodes
_ALIGNMENT = 128  # of rows by expert, as DeepGEMM asks for


def run(settings: Settings, *, on_row: Callable[[Row], None]) -> list[Row]:
    """Times the calls for every number of tokens and of SMs.

    Args:
        settings: Of the run; `sweep` and `compare` mean nothing here.
        on_row: Called with each row when it is measured.

    Returns:
        Rows; the first (`op` "run") says where they were measured. `of_buffer` is the time as a
        part of Buffer's.

    Raises:
        ValueError: There are other modules to compare.
        RuntimeError: A result is wrong, or a rank failed.
    """
    if settings.compare:
        raise ValueError("--elastic compares with Buffer of the same run; leave --compare out")
    return run_ranks(worker, settings.ranks, settings, free_port(), on_row=on_row)


class Case(normal.Case):
    """The calls of both interfaces for one routing; `Buffer`'s are those of the base.

    Attributes:
        new: `ElasticBuffer`.
        each: The same without `allow_multiple_reduction`.
        num_sms: Of its calls, see `set_sms`.
    """

    def __init__(
        self, buffer: Any, group: dist.ProcessGroup, settings: Settings, tokens: int
    ) -> None:
        import epjit

        super().__init__(epjit, buffer, group, settings, tokens)
        sizes: dict[str, Any] = {
            "num_max_tokens_per_rank": tokens,
            "hidden": settings.hidden,
            "num_topk": settings.topk,
            "explicitly_destroy": True,
        }
        self.new = epjit.ElasticBuffer(group, **sizes)
        self.each = epjit.ElasticBuffer(group, **sizes, allow_multiple_reduction=False)
        self.num_sms = settings.sms[0]

    def dispatch(self, payload: Payload, **options: Any) -> Any:
        """ElasticBuffer's call, for new choices."""
        return self.new.dispatch(
            payload,
            self.topk_idx,
            self.weights,
            num_experts=self.num_experts,
            expert_alignment=_ALIGNMENT if options.get("do_expand") else 1,
            num_sms=self.num_sms,
            **options,
        )

    def pair(self, payload: Payload, **options: Any) -> None:
        """Both calls, for which no host waits."""
        rows, _, _, handle, _ = self.dispatch(payload, do_cpu_sync=False, **options)
        self.new.combine(rows, handle)

    def buffer_pair(self, payload: Payload) -> None:
        """Buffer's."""
        worst = self.size * self.num_tokens
        rows, _, _, _, handle, _ = self.full_dispatch(payload, num_worst_tokens=worst)
        self.buffer.combine(rows, handle)

    def set_sms(self, sms: int) -> None:
        """SMs of all calls that follow."""
        self.num_sms = sms
        self.ep.Buffer.set_num_sms(sms)

    def check_rows(self, payload: Payload) -> tuple[Any, EPHandle, Any, EPHandle]:
        """Compares both orders of rows; returns rows and handle of each."""
        rows, idx, weights, handle, _ = self.dispatch(payload)
        self.check_dispatch(rows, payload, "of ElasticBuffer")
        counts = handle.num_recv_tokens_per_expert_list
        self.check_topk(idx, weights.masked_fill(idx < 0, 0.0), counts)
        by_expert, _, expert_weights, expanded, _ = self.dispatch(payload, do_expand=True)
        place = expanded.recv_src_metadata[:, 2:].long()
        token, choice = torch.nonzero(idx >= 0, as_tuple=True)
        at = place[token, choice]
        is_right = torch.equal(place >= 0, idx >= 0)
        for got, sent in zip(tensors(by_expert), tensors(rows), strict=True):
            is_right &= torch.equal(got.view(torch.uint8)[at], sent.view(torch.uint8)[token])
        is_right &= torch.equal(expert_weights[at], weights[token, choice])
        require("dispatch by expert", is_right)
        return rows, handle, by_expert, expanded

    def check_sums(self, rows: Any, handle: EPHandle, by_expert: Any, expanded: EPHandle) -> None:
        """Rows that come back unchanged add up to what float32 holds exactly."""
        x = self.payloads["bf16"]
        assert isinstance(x, torch.Tensor)
        choices = torch.zeros((len(x), self.size), dtype=torch.float32, device=x.device)
        owner = self.topk_idx.long() // (self.num_experts // self.size)
        choices.scatter_add_(1, owner, torch.ones_like(owner, dtype=torch.float32))
        of_ranks = sum((n * x.float()).to(x.dtype).float() for n in choices.t()[:, :, None])
        assert isinstance(of_ranks, torch.Tensor)
        for name, buffer, sent, of_handle, wanted in (
            ("combine", self.new, rows, handle, self.in_rank.sum(1, keepdim=True) * x.float()),
            ("combine by expert", self.new, by_expert, expanded, of_ranks),
            ("combine by expert, each row", self.each, by_expert, expanded, owner.shape[1] * x),
        ):
            out = buffer.combine(sent, of_handle, num_sms=self.num_sms)[0]
            require(name, torch.equal(out, wanted.to(x.dtype)))

    def destroy(self) -> None:
        """Ends the two that were made here; collective."""
        self.new.destroy()
        self.each.destroy()


def bench_calls(case: Case, say: Say) -> None:
    """The calls by themselves, with one number of SMs."""
    static, worst = {"do_cpu_sync": False}, {"num_worst_tokens": case.size * case.num_tokens}
    for dtype, payload in case.payloads.items():
        report = partial(_report, case, say, dtype)
        rows, handle, by_expert, expanded = case.check_rows(payload)
        new, old = partial(case.dispatch, payload), partial(case.full_dispatch, payload)
        old_handle = old()[4]
        again = partial(case.new.dispatch, payload, num_sms=case.num_sms)
        old_again = partial(case.buffer.dispatch, payload, handle=old_handle)
        report("dispatch, host waits", new, old, clock=eager)
        report("dispatch", partial(new, **static), partial(old, **worst))
        report("dispatch, cached", partial(again, handle=handle), old_again)
        expand = {"do_expand": True}
        report("dispatch by expert, host waits", partial(new, **expand), old, clock=eager)
        report("dispatch by expert", partial(new, **expand, **static), partial(old, **worst))
        report("dispatch by expert, cached", partial(again, handle=expanded, **expand), old_again)
        if dtype != "bf16":
            continue
        case.check_sums(rows, handle, by_expert, expanded)
        old_combine = partial(case.buffer.combine, rows, old_handle)
        for op, buffer, x, of_handle in (
            ("combine", case.new, rows, handle),
            ("combine by expert", case.new, by_expert, expanded),
            ("combine by expert, each row", case.each, by_expert, expanded),
        ):
            report(op, partial(buffer.combine, x, of_handle, num_sms=case.num_sms), old_combine)


def _report(
    case: Case,
    say: Say,
    dtype: str,
    op: str,
    call: Call,
    of_buffer: Call,
    *,
    clock: Callable[..., tuple[float, float] | float] = timed,
) -> None:
    """Times a call, and Buffer's by the same clock."""
    ours, theirs = (clock(each, case.group, device=case.device) for each in (call, of_buffer))
    us, host = ours if isinstance(ours, tuple) else (ours, None)
    buffer_us = theirs[0] if isinstance(theirs, tuple) else theirs
    say(
        op=op,
        dtype=dtype,
        tokens=case.num_tokens,
        sms=case.num_sms,
        us=us,
        **({} if host is None else {"host_us": host}),
        buffer_us=buffer_us,
        of_buffer=round(us / buffer_us, 3),
    )


def bench_pairs(case: Case, sms_list: tuple[int, ...], settings: Settings, say: Say) -> None:
    """A dispatch and its combine in a CUDA graph, as decoding has them."""
    import epjit

    x, tokens, experts = case.payloads["bf16"], case.num_tokens, case.num_experts
    size = epjit.Buffer.get_low_latency_rdma_size_hint(tokens, settings.hidden, case.size, experts)
    low = epjit.Buffer(case.group, 0, size, low_latency_mode=True, explicitly_destroy=True)
    low_case = low_latency.Case(
        low, case.group, settings, tokens, use_fp8=False, index_dtype=epjit.topk_idx_t
    )
    low_case.check(is_exact=True)
    common = {"dtype": "bf16", "tokens": tokens}
    if settings.device == "cuda":
        us = in_graph(low_case.pair, case.group)
        say(op="low-latency pair, graph", **common, us=us)
        for sms in sms_list:
            case.set_sms(sms)
            buffer_us = in_graph(partial(case.buffer_pair, x), case.group)
            for op, expands in (("pair, graph", False), ("pair by expert, graph", True)):
                us = in_graph(partial(case.pair, x, do_expand=expands), case.group)
                ratio = {"buffer_us": buffer_us, "of_buffer": round(us / buffer_us, 3)}
                say(op=op, **common, sms=sms, us=us, **ratio)
    low.destroy()


def worker(rank: int, settings: Settings, port: int, queue: Any) -> None:
    """One rank: measures, and rank 0 reports."""
    torch.set_grad_enabled(False)
    import epjit

    group, say = start(rank, settings, port, queue)
    buffer = epjit.Buffer(group, settings.nvl_bytes, explicitly_destroy=True)
    for tokens in settings.tokens:
        case = Case(buffer, group, settings, tokens)
        for sms in settings.sms:
            case.set_sms(sms)
            bench_calls(case, say)
        if tokens <= MOST_IN_GRAPH:
            bench_pairs(case, settings.sms, settings, say)
        case.destroy()
    buffer.destroy()
    dist.destroy_process_group()
