"""The checks of DeepEP's tests/test_internode.py (at 567632d), for NVLink domains of any size.

The body runs on processes of the CPU backend, on GPUs (tests/dist) and with virtual ranks of one
GPU (tests/gpu). What is computed beside the operations is computed on the CPU, from seeds, so that
a rank knows the inputs of the others; with virtual ranks a torch kernel of one would wait for the
spinning kernel of another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deep_ep.utils.math import (
    calc_diff,
    create_grouped_scores,
    hash_tensor,
    inplace_unique,
    per_token_cast_back,
    per_token_cast_to_fp8,
)
from epjit import Buffer, Config
from tests.harness.data import assert_rows_equal, to_device
from tests.harness.ranks import line_up, settle
from tests.scenarios import normal

# What bfloat16 (8 bits) and FP8 (4 bits) lose, as `calc_diff` measures it. V1's script means to ask
# for 5e-6 of bfloat16, but by the precedence of its `if` asks for nothing.
_BF16_DIFF, _FP8_DIFF = 5e-5, 5e-4


class Inputs:
    """Inputs of the ranks; every rank makes those of all.

    Args:
        domains: Ranks of each NVLink domain.
        num_tokens: Of every rank.
        hidden: Elements a row, a multiple of 128.
        num_topk: Choices a token.
        num_experts: Over all ranks.
        num_topk_groups: Domains that a token's choices fall into.
        seed: Of everything random.
    """

    def __init__(
        self,
        domains: tuple[tuple[int, ...], ...],
        *,
        num_tokens: int,
        hidden: int,
        num_topk: int,
        num_experts: int,
        num_topk_groups: int,
        seed: int,
    ) -> None:
        self.num_tokens, self.hidden, self.num_topk = num_tokens, hidden, num_topk
        self.num_ranks, self.num_experts = sum(map(len, domains)), num_experts
        self.domain_of = torch.empty(self.num_ranks, dtype=torch.int64, device="cpu")
        for number, domain in enumerate(domains):
            self.domain_of[list(domain)] = number
        self.num_domains, self.num_topk_groups, self.seed = len(domains), num_topk_groups, seed
        self.topk_idx = [self._topk_idx(rank) for rank in range(self.num_ranks)]
        each_expert = torch.arange(num_experts, device="cpu")[:, None]
        self.per_expert = sum(
            (idx.flatten() == each_expert).sum(dim=1) for idx in self.topk_idx
        )  # of all ranks
        self.per_rank = sum(self.in_rank(rank).sum(dim=0) for rank in range(self.num_ranks))

    def _generator(self, what: int, rank: int) -> torch.Generator:
        generator = torch.Generator(device="cpu")
        return generator.manual_seed((self.seed * 8 + what) * self.num_ranks + rank)

    def random(self, what: int, rank: int, *shape: int) -> Tensor:
        """Normally distributed float32."""
        generator = self._generator(what, rank)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def _topk_idx(self, rank: int) -> Tensor:
        """The best experts of the best domains, as grouped routing chooses them."""
        scores = self.random(0, rank, self.num_tokens, self.num_experts).abs() + 1
        # Experts in the order of domains, so that those of a domain lie together.
        experts_a_rank = self.num_experts // self.num_ranks
        rank_of = torch.arange(self.num_experts, device="cpu") // experts_a_rank
        order = self.domain_of[rank_of].argsort(stable=True)
        scores = scores[:, order]
        group_scores = scores.view(self.num_tokens, self.num_domains, -1).amax(dim=-1)
        groups = group_scores.topk(self.num_topk_groups, dim=-1, sorted=False).indices
        masked = create_grouped_scores(scores, groups, self.num_domains)
        return order[masked.topk(self.num_topk, dim=-1, sorted=False).indices]

    def in_rank(self, rank: int) -> Tensor:
        """The ranks of each token, by V1's way."""
        rank_idx = self.topk_idx[rank] // (self.num_experts // self.num_ranks)
        inplace_unique(rank_idx, self.num_ranks)
        return (rank_idx[:, :, None] == torch.arange(self.num_ranks, device="cpu")).any(dim=1)

    def per_domain(self, rank: int) -> Tensor:
        """Tokens of this rank to each domain, by V1's way."""
        ranks = self.topk_idx[rank] // (self.num_experts // self.num_ranks)
        domain_idx = self.domain_of[ranks]
        inplace_unique(domain_idx, self.num_domains)
        return (domain_idx[:, :, None] == torch.arange(self.num_domains, device="cpu")).sum((0, 1))


def check_as_v1(buffer: Buffer, inputs: Inputs, *, num_sms: int) -> int:
    """V1's loops and checks on one rank.

    Returns:
        A hash of all results; the same call gives it again.
    """
    script = _Script(buffer, inputs, num_sms)
    script.check_layout()
    return sum(
        script.check_round(given, _How(previous, is_async, with_topk))
        for previous in (False, True)
        for is_async in (False, True)
        for given in script.payloads
        for with_topk in (False, True)
    )


@dataclass(frozen=True)
class _Payload:
    """Rows of one rank, random or all of them its number; with weights alike."""

    x: Tensor | tuple[Tensor, Tensor]  # what is passed
    rows: Tensor  # what it stands for, in bfloat16
    weights: Tensor
    is_random: bool
    most_diff: float = _BF16_DIFF


@dataclass(frozen=True)
class _How:
    """How the operations of one round are called."""

    previous: bool  # with an event to wait for
    is_async: bool
    with_topk: bool


class _Script:
    """V1's script on one rank: what it passes, and its checks."""

    def __init__(self, buffer: Buffer, inputs: Inputs, num_sms: int) -> None:
        self.buffer, self.inputs, self.rank = buffer, inputs, buffer.rank
        self.config = Config(num_sms, 8, 512, 16, 128)
        self.num_local = inputs.num_experts // inputs.num_ranks
        self.num_recv = int(inputs.per_rank[self.rank])
        self.idx, self.in_rank = inputs.topk_idx[self.rank], inputs.in_rank(self.rank)
        self.copies = self.in_rank.sum(dim=1, keepdim=True)
        self.layout: dict[str, Tensor] = {}
        shape = (inputs.num_tokens, inputs.hidden)
        x = torch.full(shape, self.rank, dtype=torch.bfloat16, device="cpu")
        x_random = inputs.random(1, self.rank, *shape).to(torch.bfloat16)
        x_fp8, scales = per_token_cast_to_fp8(x)
        weights = torch.full(self.idx.shape, self.rank, dtype=torch.float32, device="cpu")
        weights_random = inputs.random(2, self.rank, *self.idx.shape)
        random_fp8 = per_token_cast_to_fp8(x_random)
        self.payloads = (
            _Payload(x_random, x_random, weights_random, True),
            _Payload(x, x, weights, False),
            _Payload(random_fp8, x_random, weights_random, True, _FP8_DIFF),
            _Payload((x_fp8, scales.T.contiguous().T), x, weights, False),
        )
        self.biases = (
            torch.ones(shape, dtype=torch.bfloat16, device="cpu"),
            inputs.random(3, self.rank, *shape).to(torch.bfloat16),
        )
        self.biases_on_device = tuple(self._on_device(each) for each in self.biases)

    def check_layout(self) -> None:
        """The counts and ranks of each token; kept for all dispatches."""
        num_experts = self.inputs.num_experts
        results = self.buffer.get_dispatch_layout(self._on_device(self.idx), num_experts)
        layout = self._on_cpu(results, False)
        own_experts = (self.idx.flatten() == torch.arange(num_experts, device="cpu")[:, None]).sum(
            1
        )
        wanted = {
            "num_tokens_per_rank": self.in_rank.sum(dim=0).to(torch.int32),
            "num_tokens_per_rdma_rank": self.inputs.per_domain(self.rank).to(torch.int32),
            "num_tokens_per_expert": own_experts.to(torch.int32),
            "is_token_in_rank": self.in_rank,
        }
        for (name, want), got in zip(wanted.items(), layout, strict=True):
            assert_rows_equal(got, want, f"rank {self.rank}: {name}")
            self.layout[name] = self._on_device(got)

    def check_round(self, given: _Payload, how: _How) -> int:
        """Dispatch, the same again (for the worst case, or cached), and combine.

        Returns:
            A hash of the results.
        """
        x = given.x
        payload = tuple(map(self._on_device, x)) if isinstance(x, tuple) else self._on_device(x)
        routing = dict(self.layout)
        if how.with_topk:
            routing["topk_idx"] = self._on_device(self.idx)
            routing["topk_weights"] = self._on_device(given.weights)
        received, recv_idx, recv_weights, counts, handle = self._call(
            how, self.buffer.dispatch, payload, **routing
        )
        parts = received if isinstance(received, tuple) else (received,)
        total: int = sum(hash_tensor(each.cpu()) for each in parts)
        rows, ends = _rows_of(received), handle[-4].cpu()
        assert len(rows) == self.num_recv
        assert counts == self.inputs.per_expert.view(self.inputs.num_ranks, -1)[self.rank].tolist()
        if not given.is_random:
            self._check_sources(rows, ends)
        filled = None
        if how.with_topk:
            assert ((recv_idx >= -1) & (recv_idx < self.num_local)).all()
            assert [int((recv_idx == i).sum()) for i in range(self.num_local)] == counts
            filled = recv_weights
            if not given.is_random:
                most = recv_weights.amax(dim=1, keepdim=True).expand_as(recv_weights)
                filled = torch.where(recv_idx == -1, most, recv_weights)
                self._check_sources(filled, ends)
            self._check_worst_case(how, payload, routing, (rows, recv_idx, recv_weights))
        else:
            again, *nothing = self._call(how, self.buffer.dispatch, payload, handle=handle)
            assert nothing == [None] * 4
            rows = _rows_of(again)
            if not given.is_random:
                self._check_sources(rows, ends)
        return total + self._check_combine(given, how, rows, filled, handle)

    def _check_sources(self, rows: Tensor, ends: Tensor) -> None:
        """Each row is the number of the rank that it comes from."""
        ranks = torch.arange(self.inputs.num_ranks, device="cpu")
        sources = torch.repeat_interleave(ranks, ends.diff(prepend=ends.new_zeros(1)).long())
        assert (rows.float() == sources[:, None].float()).all()

    def _check_worst_case(
        self, how: _How, payload: Any, routing: dict[str, Tensor], wanted: tuple[Tensor, ...]
    ) -> None:
        """The same rows, selections and weights, and none behind them."""
        worst = self.inputs.num_tokens * self.inputs.num_ranks
        x, idx, weights, empty, _ = self._call(
            how, self.buffer.dispatch, payload, **routing, num_worst_tokens=worst
        )
        rows, n = _rows_of(x), self.num_recv
        assert empty == []
        assert len(rows) == len(idx) == len(weights) == worst
        assert_rows_equal(rows[:n], wanted[0], f"rank {self.rank}: worst case, x")
        assert torch.equal(idx[:n], wanted[1])
        assert torch.equal(weights[:n], wanted[2])
        assert (idx[n:] == -1).all()

    def _check_combine(
        self, given: _Payload, how: _How, rows: Tensor, weights: Tensor | None, handle: Any
    ) -> int:
        """The mean of what comes back is what was sent; returns a hash of both."""
        combined, combined_weights = self._call(
            how,
            self.buffer.combine,
            self._on_device(rows),
            handle,
            topk_weights=None if weights is None else self._on_device(weights),
            bias=self.biases_on_device,
        )
        sums = combined.float() - self.biases[0].float() - self.biases[1].float()
        diff = calc_diff(sums / self.copies, given.rows)
        assert diff < given.most_diff, diff
        if weights is not None:
            mean = combined_weights if given.is_random else combined_weights / self.copies
            assert calc_diff(mean, given.weights) < 1e-9
        total: int = hash_tensor(rows) + hash_tensor(combined)
        return total

    def _call(self, how: _How, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        line_up(self.buffer)  # once the arguments are there, before what meets peers
        if how.previous:
            options["previous_event"] = self.buffer.capture()
        results = method(*args, config=self.config, async_finish=how.is_async, **options)
        return self._on_cpu(results, how.is_async)

    def _on_cpu(self, results: tuple[Any, ...], is_async: bool) -> tuple[Any, ...]:
        """Results once the event has come; the handle stays where it is."""
        *values, event = results
        assert (event.event is not None) is is_async
        if is_async:
            event.current_stream_wait()
        settle(self.buffer)
        return tuple(each.cpu() if isinstance(each, Tensor) else each for each in values)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.buffer.device)


def _rows_of(received: Any) -> Tensor:
    """Received rows, in bfloat16 where they came as FP8."""
    if isinstance(received, tuple):
        received = per_token_cast_back(*(each.cpu() for each in received))
    rows: Tensor = received.cpu()
    return rows


def smallest_sizes(
    make: Callable[..., Buffer], row_bytes: int, num_topk: int, num_scales: int = 0
) -> dict[str, int]:
    """The least num_nvl_bytes and num_rdma_bytes for these rows, as the refusals name them.

    Args:
        make: Called on all ranks with the two sizes.
        row_bytes: Of one row.
        num_topk: Choices a token.
        num_scales: Scales a token.
    """
    sizes = {"num_nvl_bytes": 128, "num_rdma_bytes": 128}
    while True:
        buffer, refusal = make(**sizes), ""
        try:
            buffer.warmup(row_bytes, num_topk=num_topk, num_scales=num_scales)
        except ValueError as error:
            refusal = str(error)
        finally:
            buffer.destroy()
        if not refusal:
            return sizes
        found = re.findall(r"(num_(?:nvl|rdma)_bytes) >= (\d+)", refusal)
        needed = {name: -(-int(value) // 128) * 128 for name, value in found}
        assert any(value > sizes[name] for name, value in needed.items()), refusal
        sizes |= {name: max(value, sizes[name]) for name, value in needed.items()}


def small_buffers(
    group: dist.ProcessGroup, environ: Mapping[str, str], tokens: int, num_rounds: int
) -> dict[str, int]:
    """The smallest legal buffers.

    Returns:
        Their sizes.
    """
    normal.set_up(group, environ)

    def make(**sizes: int) -> Buffer:
        return Buffer(group, explicitly_destroy=True, **sizes)

    sizes = smallest_sizes(make, 512, 2)
    buffer = make(**sizes)
    normal.small_rounds(buffer, tokens, num_rounds)
    buffer.destroy()
    return sizes


def as_v1(
    group: dist.ProcessGroup,
    environ: Mapping[str, str],
    sizes: Mapping[str, int],
    num_sms: int,
    num_repeats: int,
) -> tuple[int, int]:
    """`check_as_v1` in one process a rank, again and again with the same result.

    Args:
        group: All ranks.
        environ: With EPJIT_NVLINK_DOMAIN.
        sizes: Of `Inputs`.
        num_sms: Of dispatch and combine.
        num_repeats: Runs that must give the hash of the first.

    Returns:
        Number of NVLink domains, and of this rank's.
    """
    normal.set_up(group, environ)
    buffer = normal.make_buffer(group, 64 * normal.MB)
    assert buffer.runtime is not None
    place = buffer.runtime.get_num_rdma_ranks(), buffer.runtime.get_rdma_rank()
    inputs = Inputs(buffer.topology.domains, **sizes)
    first = check_as_v1(buffer, inputs, num_sms=num_sms)
    for _ in range(num_repeats):
        assert check_as_v1(buffer, inputs, num_sms=num_sms) == first
    buffer.destroy()
    return place
