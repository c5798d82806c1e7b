"""Times of layout, dispatch and combine on N ranks, beside the link ceiling of the same SMs.

One process a rank. Each result is compared with exact index arithmetic before its time is taken; a
wrong one ends the run. Times are medians of the slowest rank.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from epjit.bench import ceiling
from epjit.bench.timing import Row, eager, free_port, join, run_ranks, timed
from epjit.config import MAX_DOMAINS, MAX_EXPERTS, MAX_RANKS, MAX_ROW_BYTES, MAX_TOKENS, MAX_TOPK

Payload: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Say: TypeAlias = Callable[..., None]

SWEEP = (4, 8, 12, 16, 20, 24, 32)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and choices of a run.

    Attributes:
        ranks: Processes, a GPU each.
        hidden: Elements a row of bfloat16; a multiple of 128.
        topk: Choices a token.
        experts: Over all ranks.
        tokens: Numbers of tokens a rank.
        sms: SMs for each number of tokens.
        sweep: More SMs, for the largest number of tokens.
        nvl_bytes: `num_nvl_bytes` of every Buffer; a multiple of 128.
        ceiling_mb: MiB that the ceiling copies to each peer.
        seed: Of the tokens and their experts.
        compare: Modules with the V1 interface, timed with the same tokens.
        device: "cuda" or "cpu".

    Raises:
        ValueError: Values that do not go together; all reasons at once.
    """

    ranks: int
    hidden: int = 7168
    topk: int = 8
    experts: int = 256
    tokens: tuple[int, ...] = (4096, 128)
    sms: tuple[int, ...] = (24, 12)
    sweep: tuple[int, ...] = ()
    nvl_bytes: int = 2_000_000_000
    ceiling_mb: int = 52
    seed: int = 0
    compare: tuple[str, ...] = ()
    device: str = "cuda"

    def __post_init__(self) -> None:
        """Checks the values."""
        reasons = []
        local = min(domain_size(self.ranks), self.ranks)
        if self.ranks < 1:
            reasons.append(f"ranks is {self.ranks}, but must be at least 1")
        elif local > MAX_RANKS or self.ranks % local or self.ranks // local > MAX_DOMAINS:
            reasons.append(
                f"{self.ranks} ranks in NVLink domains of {local}, but a domain has up to "
                f"{MAX_RANKS}, all the same number, and there are up to {MAX_DOMAINS} "
                "(EPJIT_NVLINK_DOMAIN cuts them)"
            )
        if not 1 <= self.experts <= MAX_EXPERTS:
            reasons.append(f"experts is {self.experts}, but must be 1 to {MAX_EXPERTS}")
        elif self.experts % max(self.ranks, 1):
            reasons.append(f"{self.ranks} ranks do not divide {self.experts} experts")
        most = max(1, min(self.experts, MAX_TOPK))
        if not 1 <= self.topk <= most:
            reasons.append(f"topk is {self.topk}, but must be 1 to {most}")
        widest = MAX_ROW_BYTES // 2
        if not 128 <= self.hidden <= widest or self.hidden % 128:
            reasons.append(
                f"hidden is {self.hidden}, but must be a multiple of 128 (FP8 blocks), at most "
                f"{widest}"
            )
        odd = [sms for sms in (*self.sms, *self.sweep) if sms < 2 or sms % 2]
        if odd:
            reasons.append(f"numbers of SMs are {odd}, but must be even")
        if not all(1 <= each <= MAX_TOKENS for each in self.tokens):
            reasons.append(f"tokens are {list(self.tokens)}, but must be 1 to {MAX_TOKENS}")
        if self.nvl_bytes < 1 or self.nvl_bytes % 128:
            reasons.append(f"nvl_bytes is {self.nvl_bytes}, but must be a multiple of 128")
        if self.ceiling_mb < 1:
            reasons.append(f"ceiling_mb is {self.ceiling_mb}, but must be at least 1")
        if not 0 <= self.seed < 1 << 63:
            reasons.append(f"seed is {self.seed}, but must be 0 to 2^63 - 1")
        if reasons:
            raise ValueError("; ".join(reasons))

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are timed: epjit first."""
        return ("epjit", *self.compare)


def run(settings: Settings, *, on_row: Callable[[Row], None]) -> list[Row]:
    """Times every operation of every module.

    Args:
        settings: Of the run.
        on_row: Called with each row when it is measured.

    Returns:
        Rows; the first (`op` "run") says where they were measured.

    Raises:
        RuntimeError: A result is wrong, or a rank failed.
    """
    return run_ranks(worker, settings.ranks, settings, free_port(), on_row=on_row)


def to_fp8(x: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn `[..., H]` and a float32 scale for each `block` columns."""
    blocks = x.unflatten(-1, (-1, block)).float()
    scales = blocks.abs().amax(-1).clamp(1e-4) / 448.0
    values = (blocks / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values.flatten(-2), scales.contiguous()


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


def domain_size(ranks: int) -> int:
    """Ranks of an NVLink domain: all, or as many as ``EPJIT_NVLINK_DOMAIN`` says."""
    from epjit import env

    return env.nvlink_domain() or ranks


def require(what: str, is_right: bool) -> None:
    """Ends the run if a result is wrong."""
    if not is_right:
        raise RuntimeError(f"{what} is wrong on rank {dist.get_rank()}: nothing was timed")


class Case:
    """One routing of `num_tokens` tokens a rank, and what each operation must return for it."""

    def __init__(
        self, ep: Any, buffer: Any, group: dist.ProcessGroup, settings: Settings, tokens: int
    ) -> None:
        self.ep, self.buffer, self.group = ep, buffer, group
        self.num_tokens, self.num_experts = tokens, settings.experts
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = device = settings.device
        torch.manual_seed(settings.seed + self.rank)  # every module gets the same tokens
        shape = (tokens, settings.experts)
        scores = torch.randn(shape, device=device, dtype=torch.float32).abs() + 1
        self.topk_idx = torch.topk(scores, settings.topk, dim=1, sorted=False)[1].to(ep.topk_idx_t)
        self.weights = torch.rand((tokens, settings.topk), device=device, dtype=torch.float32)
        x = torch.randn((tokens, settings.hidden), device=device, dtype=torch.bfloat16)
        self.payloads: dict[str, Payload] = {"bf16": x, "fp8": to_fp8(x)}

        owner = self.topk_idx.long() // (settings.experts // self.size)
        self.in_rank = torch.zeros((tokens, self.size), dtype=torch.bool, device=device)
        self.in_rank.scatter_(1, owner, True)
        self.sources = [part[:, self.rank] for part in gathered(self.in_rank, group)]
        rows = [int(part.sum()) for part in self.sources]
        self.num_rows = sum(rows)
        # What crosses a link: the rows of other ranks, or with several NVLink domains a row for
        # each token and other domain, and the rows that a rank of the own domain hands on.
        local = domain_size(self.size)
        remote = self.num_rows - rows[self.rank]
        if local < self.size:
            to_domain = self.in_rank.view(tokens, -1, local).any(2).sum(0)
            remote = int(to_domain.sum() - to_domain[self.rank // local])
            remote += sum(n for s, n in enumerate(rows) if (s - self.rank) % local)
        total = torch.tensor([remote, self.num_rows], device=device, dtype=torch.float64)
        dist.all_reduce(total, group=group)
        self.remote_rows, self.logical_rows = (total / self.size).tolist()  # means over the ranks

    def rates(self, payload: Payload, us: float, best: float) -> Row:
        """GB/s of a call that took `us`, and its part of a ceiling of `best` GB/s (0 = none)."""
        remote, logical = (
            rows * row_bytes(payload) / us / 1e3 for rows in (self.remote_rows, self.logical_rows)
        )
        return {
            "remote_GBps": round(remote, 1),
            "logical_GBps": round(logical, 1),
            "ceiling_GBps": best or None,
            "ratio": round(remote / best, 3) if best else None,
        }

    def layout(self) -> Any:
        """The layout call."""
        return self.buffer.get_dispatch_layout(self.topk_idx, self.num_experts)

    def full_dispatch(self, payload: Payload, **options: Any) -> Any:
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
            **options,
        )

    def expected_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The rows that dispatch of x must deliver: by source rank, then by token."""
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


def bench_tokens(case: Case, sms_list: list[int], ceilings: dict[int, Row], say: Say) -> None:
    """Every operation for one number of tokens."""
    clock = functools.partial(timed, group=case.group, device=case.device)
    with_layout = True
    for sms in sms_list:
        case.ep.Buffer.set_num_sms(sms)
        common = {"tokens": case.num_tokens, "sms": sms}
        best = max(ceilings[sms].values())

        for name, payload in case.payloads.items():
            received, idx, weights, counts, handle, _ = case.full_dispatch(payload)
            case.check_dispatch(received, payload, name)
            case.check_topk(idx, weights, counts)
            cached = functools.partial(case.buffer.dispatch, payload, handle=handle)
            case.check_dispatch(cached()[0], payload, f"{name} cached")
            us, host = clock(cached)
            rate = case.rates(payload, us, best)
            say(op="dispatch cached", dtype=name, **common, us=us, host_us=host, **rate)
            us = eager(
                functools.partial(case.full_dispatch, payload), case.group, device=case.device
            )
            say(op="dispatch eager", dtype=name, **common, us=us)
            if name != "bf16":
                continue
            if with_layout:
                with_layout = False
                case.check_layout()
                us, host = clock(case.layout)
                say(op="layout", tokens=case.num_tokens, us=us, host_us=host)
            case.check_combine(tensors(payload)[0], weights, handle)
            us, host = clock(functools.partial(case.buffer.combine, received, handle))
            rate = case.rates(payload, us, best)
            say(op="combine", dtype=name, **common, us=us, host_us=host, **rate)


def measure_ceilings(
    group: dist.ProcessGroup, settings: Settings, sms_list: list[int], say: Say
) -> dict[int, Row]:
    """GB/s that each GPU sends when all copy to all peers at once, by writes and by reads."""
    from epjit.runtime.group import Group
    from epjit.runtime.symmetric import SymmetricMemory

    found: dict[int, Row] = {sms: {"push_GBps": 0.0, "pull_GBps": 0.0} for sms in sms_list}
    if settings.ranks == 1 or settings.device == "cpu":
        return found
    ep_group, device = Group.from_torch(group), torch.cuda.current_device()
    per_peer = settings.ceiling_mb << 20
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

            def run_copy(copy: ceiling.LinkCopy = copy, sms: int = sms) -> None:
                copy(torch.cuda.current_stream().cuda_stream, sms)

            copy.check(run_copy, barrier)
            us, _ = timed(run_copy, group)
            found[sms][f"{way}_GBps"] = round(copy.sent_bytes / us / 1e3, 1)
            say(op=f"ceiling {way}", sms=sms, us=us, remote_GBps=found[sms][f"{way}_GBps"])
    barrier()
    memory.close()
    return found


def start(rank: int, settings: Settings, port: int, queue: Any) -> tuple[dist.ProcessGroup, Say]:
    """Meets the other ranks; returns the group, and what reports a row (of rank 0)."""
    from epjit import __version__, env
    from epjit.kernels.variants import CHOICES

    on_cpu = settings.device == "cpu"
    if on_cpu:
        os.environ[env.backend.name] = "cpu"  # also where there are GPUs
    group = join(rank, settings.ranks, port, device=settings.device)

    def say(**row: Any) -> None:
        if rank == 0:
            queue.put({k: round(v, 1) if k.endswith("us") else v for k, v in row.items()})

    say(
        op="run",
        module=f"epjit {__version__}",
        compare=list(settings.compare),
        device="CPU backend" if on_cpu else torch.cuda.get_device_name(),
        ranks=settings.ranks,
        hidden=settings.hidden,
        topk=settings.topk,
        experts=settings.experts,
        nvl_bytes=settings.nvl_bytes,
        nvlink_domain=domain_size(settings.ranks),
        torch=torch.__version__,
        variants={op: choice.variable() for op, choice in CHOICES.items()},
    )
    return group, say


def worker(rank: int, settings: Settings, port: int, queue: Any) -> None:
    """One rank: measures, and rank 0 reports."""
    group, say = start(rank, settings, port, queue)
    all_sms = sorted({*settings.sms, *settings.sweep})
    ceilings = measure_ceilings(group, settings, all_sms, say)
    for name in settings.modules:
        ep = importlib.import_module(name)
        several = domain_size(settings.ranks) < settings.ranks
        rdma_bytes = settings.nvl_bytes if several else 0
        buffer = ep.Buffer(group, settings.nvl_bytes, rdma_bytes, explicitly_destroy=True)
        for tokens in settings.tokens:
            extra = [sms for sms in settings.sweep if sms not in settings.sms]
            sms_list = [*settings.sms, *(extra if tokens == max(settings.tokens) else [])]
            case = Case(ep, buffer, group, settings, tokens)
            bench_tokens(case, sms_list, ceilings, functools.partial(say, module=name))
        buffer.destroy()
        dist.barrier(group)
    dist.destroy_process_group()
