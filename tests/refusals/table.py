"""A line of the table, the right arguments that each line changes one of, and who runs a line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch

from epjit import Buffer
from epjit.calls import DispatchSizes
from epjit.formats import BF16
from epjit.handles import LowLatencyDispatched
from epjit.reference import Normal, expert_major, internode, low_latency
from epjit.reference import intranode as reference
from epjit.runtime.empty import empty_on
from tests.harness.data import to_device
from tests.rounds.normal import Round, make_world

NUM_RANKS = 2
NUM_TOKENS = 6
HIDDEN = 64
NUM_EXPERTS = 8
NUM_TOPK = 4
MAX_TOKENS = 8  # M, of the low-latency calls
LL_HIDDEN = 512  # what every format takes
NUM_RDMA_BYTES = 1 << 18
BUFFER: dict[str, Any] = {  # of `Bench.buffer`
    "num_rdma_bytes": NUM_RDMA_BYTES,
    "low_latency_mode": True,
    "enable_shrink": True,
}
BETWEEN: dict[str, Any] = {"num_rdma_bytes": 1 << 16, "nvlink_domain": 1}  # of `Bench.between`


class ReachedError(BaseException):
    """A refused call came further than the checks; no `except Exception` may hide that."""


class Unreachable:
    """Stands in for whatever communicates or launches, but for the members it is given."""

    def __init__(self, **members: object) -> None:
        vars(self).update(members)

    def __getattr__(self, name: str) -> NoReturn:
        raise ReachedError(name)


class StubComm:
    """A communicator that knows who takes part and refuses to communicate.

    The first `answers` gathers succeed, as if all ranks had said the same: that is how the ranks
    find out which of them share NVLink, and whether they are set up alike.
    """

    def __init__(self, size: int, rank: int = 0, *, answers: int = 0) -> None:
        self.size, self.rank, self.answers = size, rank, answers

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def allgather(self, obj: Any) -> list[Any]:
        self.answers -= 1
        if self.answers < 0:
            raise ReachedError("allgather")
        return [obj] * self.size


@dataclass
class Bench:
    """Arguments that are right, for a rank of `NUM_RANKS`; the table changes one of them.

    Attributes:
        buffer: Of `NUM_RANKS` ranks, made with `BUFFER`.
        destroyed: Another one, after destroy().
        normal: Another one, without low-latency mode.
        between: Another one, with each rank an NVLink domain of its own (`BETWEEN`).
    """

    buffer: Buffer
    destroyed: Buffer
    normal: Buffer
    between: Buffer
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.buffer.device
        world = make_world(_case(NUM_RANKS))
        own = world[self.buffer.rank]
        per_rank, _, _ = reference.layout(own.topk_idx, NUM_EXPERTS, NUM_RANKS)
        dispatched = reference.dispatch(world, self.buffer.rank, num_experts=NUM_EXPERTS)
        self.x = to_device(own.x, self.device)
        self.idx = to_device(own.topk_idx, self.device)
        self.weights = to_device(own.topk_weights, self.device)
        self.per_rank = to_device(per_rank, self.device)
        self.in_rank = to_device(own.is_token_in_rank, self.device)
        self.per_expert = to_device(own.num_tokens_per_expert, self.device)
        self.counts = {
            "num_tokens_per_rank": self.per_rank,
            "is_token_in_rank": self.in_rank,
            "num_tokens_per_expert": self.per_expert,
        }
        self.handle = tuple(to_device(each, self.device) for each in dispatched.handle)
        by_expert = expert_major.dispatch(
            Normal((range(NUM_RANKS),)), world, self.buffer.rank, num_experts=NUM_EXPERTS
        )
        self.expert_handle = tuple(
            tuple(to_device(each, self.device) for each in part) for part in by_expert.handle
        )
        self.rows = to_device(by_expert.rows, self.device)
        self.row_weights = to_device(by_expert.weights, self.device)
        self.recv_x = to_device(dispatched.recv_x, self.device)
        self.recv_weights = to_device(dispatched.recv_topk_weights, self.device)
        other = reference.dispatch(make_world(_case(3)), 0, num_experts=2 * 3).handle
        self.handle_of_3 = tuple(to_device(each, self.device) for each in other)
        domains = [(rank,) for rank in range(NUM_RANKS)]
        self.per_rdma_rank = self.per_rank.clone()
        passed = internode.dispatch(world, self.buffer.rank, domains, num_experts=NUM_EXPERTS)
        self.between_handle = tuple(to_device(each, self.device) for each in passed.handle)
        self.ll_x = self.full(NUM_TOKENS, LL_HIDDEN)
        self.ll_y = self.full(NUM_EXPERTS // NUM_RANKS, NUM_RANKS * MAX_TOKENS, LL_HIDDEN)
        inputs = [low_latency.RankInput(self.ll_x.cpu(), each.topk_idx) for each in world]
        received = low_latency.dispatch(
            inputs,
            self.buffer.rank,
            max_tokens=MAX_TOKENS,
            num_experts=NUM_EXPERTS,
            row_format=BF16,
        )
        self.ll_handle = (
            to_device(received.src_info, self.device),
            to_device(received.layout_range, self.device),
            MAX_TOKENS,
            LL_HIDDEN,
            NUM_EXPERTS,
        )

    def full(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Zeros on the device."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def fp8(self) -> torch.Tensor:
        """Rows of a byte an element."""
        return self.full(NUM_TOKENS, HIDDEN, dtype=torch.uint8).view(torch.float8_e4m3fn)

    def misaligned(self, rows: int, hidden: int = HIDDEN) -> torch.Tensor:
        """Rows that begin behind an address that kernels take."""
        return self.full(rows * hidden + 1)[1:].view(rows, hidden)

    def layout(self, idx: Any = None, num_experts: int = NUM_EXPERTS, **flags: Any) -> object:
        """get_dispatch_layout."""
        return self.buffer.get_dispatch_layout(
            self.idx if idx is None else idx, num_experts, **flags
        )

    def dispatch(self, **changes: Any) -> object:
        """Dispatch with layout and top-k."""
        choices = {"topk_idx": self.idx, "topk_weights": self.weights}
        return self.buffer.dispatch(**{"x": self.x, **self.counts, **choices, **changes})

    def cached(self, **changes: Any) -> object:
        """Dispatch with a handle."""
        return self.buffer.dispatch(**{"x": self.x, "handle": self.handle, **changes})

    def combine(self, **changes: Any) -> object:
        """Combine without anything optional."""
        return self.buffer.combine(**{"x": self.recv_x, "handle": self.handle, **changes})

    def expert_dispatch(self, **changes: Any) -> object:
        """Dispatch by expert, with top-k."""
        choices = {"topk_idx": self.idx, "topk_weights": self.weights, "num_experts": NUM_EXPERTS}
        return self.buffer.expert_dispatch(**{"x": self.x, **choices, **changes})

    def expert_cached(self, **changes: Any) -> object:
        """The same with a handle."""
        given = {"x": self.x, "handle": self.expert_handle}
        return self.buffer.expert_dispatch(**{**given, **changes})

    def expert_combine(self, **changes: Any) -> object:
        """Combine of rows by expert, without anything optional."""
        given = {"rows": self.rows, "handle": self.expert_handle}
        return self.buffer.expert_combine(**{**given, **changes})

    def placed(self, index: int, value: object) -> tuple[Any, ...]:
        """The handle of an expert dispatch with another entry of its placement."""
        routing, placed = self.expert_handle
        return routing, (*placed[:index], value, *placed[index + 1 :])

    def dispatch_between(self, **changes: Any) -> object:
        """Dispatch between NVLink domains."""
        of_domains = {"num_tokens_per_rdma_rank": self.per_rdma_rank}
        return self.between.dispatch(**{"x": self.x, **self.counts, **of_domains, **changes})

    def cached_between(self, **changes: Any) -> object:
        """Dispatch between NVLink domains, with a handle."""
        return self.between.dispatch(**{"x": self.x, "handle": self.between_handle, **changes})

    def combine_between(self, **changes: Any) -> object:
        """Combine between NVLink domains."""
        given = {"x": self.recv_x, "handle": self.between_handle}
        return self.between.combine(**{**given, **changes})

    def between_changed(self, index: int, value: object) -> tuple[Any, ...]:
        """The handle of a dispatch between NVLink domains with another entry."""
        return (*self.between_handle[:index], value, *self.between_handle[index + 1 :])

    def ll_dispatch(self, **changes: Any) -> object:
        """Low-latency dispatch of bfloat16 rows."""
        given: dict[str, Any] = {
            "x": self.ll_x,
            "topk_idx": self.idx,
            "num_max_dispatch_tokens_per_rank": MAX_TOKENS,
            "num_experts": NUM_EXPERTS,
            "use_fp8": "quantization" in changes,
        }
        return self.buffer.low_latency_dispatch(**{**given, **changes})

    def ll_combine(self, **changes: Any) -> object:
        """Low-latency combine without anything optional."""
        given: dict[str, Any] = {
            "x": self.ll_y,
            "topk_idx": self.idx,
            "topk_weights": self.weights,
            "handle": self.ll_handle,
        }
        return self.buffer.low_latency_combine(**{**given, **changes})

    def ll_clean(self, *sizes: int) -> object:
        """clean_low_latency_buffer."""
        return self.buffer.clean_low_latency_buffer(*sizes or (MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS))

    def src_info(
        self, max_tokens: int, num_experts: int, num_topk: int, num_tokens: int = NUM_TOKENS
    ) -> torch.Tensor:
        """Of a dispatch with other sizes, with nothing in it."""
        sizes = DispatchSizes(num_tokens, 8, num_topk, True, max_tokens, num_experts, BF16)
        specs = LowLatencyDispatched.specs(sizes, NUM_RANKS)
        return LowLatencyDispatched.allocate(specs, empty_on(self.device)).src_info

    def ll_changed(self, index: int, value: object) -> tuple[Any, ...]:
        """The handle of a low-latency dispatch with another entry."""
        return (*self.ll_handle[:index], value, *self.ll_handle[index + 1 :])


@dataclass(frozen=True)
class Refusal:
    """One line of the table.

    Attributes:
        error: Type of the exception, exactly.
        call: It must be refused.
        says: Regular expression of its text: the value that was passed, and what to do.
        gpu_only: The CPU backend has no such thing.
    """

    error: type[Exception]
    call: Callable[[Bench], object]
    says: str
    gpu_only: bool = False


value_error = partial(Refusal, ValueError)
type_error = partial(Refusal, TypeError)
runtime_error = partial(Refusal, RuntimeError)
assertion_error = partial(Refusal, AssertionError)


def verify(name: str, refusal: Refusal, bench: Bench) -> None:
    """Makes the call and checks the error.

    Raises:
        AssertionError: No error, or another one.
        ReachedError: The call went through the checks.
    """
    try:
        refusal.call(bench)
    except Exception as error:
        kind, text = type(error), str(error)
    else:
        raise AssertionError(f"{name}: accepted")
    assert kind is refusal.error, f"{name}: {kind.__name__}: {text}"
    assert re.search(refusal.says, text, re.DOTALL), f"{name}: {text!r} lacks {refusal.says!r}"


def _case(num_ranks: int) -> Round:
    return Round(
        num_tokens=(NUM_TOKENS,) * num_ranks,
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS if num_ranks == NUM_RANKS else 6,
        num_topk=NUM_TOPK,
        kind="balanced",
    )
