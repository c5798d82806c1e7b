"""Every precondition of the public interface: the call, the error, and what its text must say.

The table runs on the CPU (tests/cpu) and on the GPU (tests/gpu); both prove that a refused call
reached nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from epjit import Buffer, Config
from epjit.formats import BF16
from epjit.handles import LowLatencyDispatched
from epjit.reference import internode, low_latency
from epjit.reference import intranode as reference
from epjit.runtime.empty import empty_on
from tests.rounds import Round, make_world, to_device

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
        self.handle = tuple(to_device(each, self.device) for each in dispatched.handle)
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

    def layout(self, idx: Any = None, num_experts: int = NUM_EXPERTS, **flags: Any) -> object:
        """get_dispatch_layout."""
        return self.buffer.get_dispatch_layout(
            self.idx if idx is None else idx, num_experts, **flags
        )

    def dispatch(self, **changes: Any) -> object:
        """Dispatch with layout and top-k."""
        given: dict[str, Any] = {
            "x": self.x,
            "num_tokens_per_rank": self.per_rank,
            "is_token_in_rank": self.in_rank,
            "num_tokens_per_expert": self.per_expert,
            "topk_idx": self.idx,
            "topk_weights": self.weights,
        }
        return self.buffer.dispatch(**{**given, **changes})

    def cached(self, **changes: Any) -> object:
        """Dispatch with a handle."""
        return self.buffer.dispatch(**{"x": self.x, "handle": self.handle, **changes})

    def combine(self, **changes: Any) -> object:
        """Combine without anything optional."""
        return self.buffer.combine(**{"x": self.recv_x, "handle": self.handle, **changes})

    def dispatch_between(self, **changes: Any) -> object:
        """Dispatch between NVLink domains."""
        given: dict[str, Any] = {
            "x": self.x,
            "num_tokens_per_rank": self.per_rank,
            "num_tokens_per_rdma_rank": self.per_rdma_rank,
            "is_token_in_rank": self.in_rank,
            "num_tokens_per_expert": self.per_expert,
        }
        return self.between.dispatch(**{**given, **changes})

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
        specs = LowLatencyDispatched.specs(
            BF16,
            num_ranks=NUM_RANKS,
            num_tokens=num_tokens,
            max_tokens=max_tokens,
            num_experts=num_experts,
            num_topk=num_topk,
            hidden=8,
        )
        return LowLatencyDispatched.allocate(specs, empty_on(self.device)).src_info

    def ll_changed(self, index: int, value: object) -> tuple[Any, ...]:
        """The handle of a low-latency dispatch with another entry."""
        return (*self.ll_handle[:index], value, *self.ll_handle[index + 1 :])


@dataclass(frozen=True)
class BadInput:
    """One line of the table.

    Attributes:
        name: Of the test.
        call: What must be refused.
        error: Type of the exception, exactly.
        says: Regular expression of its text: the value that was passed, and what to do.
        gpu_only: The CPU backend has no such thing.
    """

    name: str
    call: Callable[[Bench], object]
    error: type[Exception]
    says: str
    gpu_only: bool = False


def verify(case: BadInput, bench: Bench) -> None:
    """Makes the call and checks the error.

    Raises:
        AssertionError: No error, or another one.
        ReachedError: The call went through the checks.
    """
    try:
        case.call(bench)
    except Exception as error:
        kind, text = type(error), str(error)
    else:
        raise AssertionError(f"{case.name}: accepted")
    assert kind is case.error, f"{case.name}: {kind.__name__}: {text}"
    assert re.search(case.says, text, re.DOTALL), f"{case.name}: {text!r} lacks {case.says!r}"


def _case(num_ranks: int) -> Round:
    return Round(
        num_tokens=(NUM_TOKENS,) * num_ranks,
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS if num_ranks == NUM_RANKS else 6,
        num_topk=NUM_TOPK,
        kind="balanced",
    )


def _misaligned(bench: Bench, rows: int, hidden: int = HIDDEN) -> torch.Tensor:
    return bench.full(rows * hidden + 1)[1:].view(rows, hidden)


def _buffer(size: int = NUM_RANKS, *args: Any, **kwargs: Any) -> Buffer:
    """Refused for what every rank knows by itself."""
    return Buffer(None, *args, comm=StubComm(size), **kwargs)


def _placed(size: int = NUM_RANKS, *args: Any, **kwargs: Any) -> Buffer:
    """Refused once it is known that all ranks are on one host."""
    return Buffer(None, *args, comm=StubComm(size, answers=1), **kwargs)


CONSTRUCTION = [
    BadInput("no group", lambda _: Buffer(None), ValueError, r"group is None.*comm="),
    BadInput(
        "nvl size", lambda _: _buffer(2, 100), ValueError, r"num_nvl_bytes is 100.*multiple of 128"
    ),
    BadInput(
        "negative nvl size",
        lambda _: _buffer(2, -128),
        ValueError,
        r"num_nvl_bytes is -128.*not negative",
    ),
    BadInput(
        "rdma size",
        lambda _: _buffer(2, 0, 77),
        ValueError,
        r"num_rdma_bytes is 77.*multiple of 128",
    ),
    BadInput(
        "negative rdma size",
        lambda _: _buffer(2, 0, -256),
        ValueError,
        r"num_rdma_bytes is -256.*not negative",
    ),
    BadInput(
        "both sizes",
        lambda _: _buffer(2, 1, 2),
        ValueError,
        r"num_nvl_bytes is 1\b.*num_rdma_bytes is 2\b",
    ),
    BadInput(
        "rdma in one domain",
        lambda _: _placed(2, 0, 128),
        ValueError,
        r"num_rdma_bytes is 128, but 2 ranks share.*pass 0.*low_latency_mode=True",
    ),
    BadInput(
        "low latency size",
        lambda _: _buffer(2, 0, 100, low_latency_mode=True),
        ValueError,
        r"num_rdma_bytes is 100.*multiple of 128",
    ),
    BadInput(
        "low latency of nine ranks",
        lambda _: _placed(9, 0, 128, low_latency_mode=True),
        ValueError,
        r"9 ranks are in one NVLink domain.*up to 8.*EPJIT_NVLINK_DOMAIN",
    ),
    BadInput(
        "nine ranks", lambda _: _placed(9, 0), ValueError, r"9 ranks are in one.*nvlink_domain"
    ),
    BadInput(
        "sixteen ranks and rdma",
        lambda _: _placed(16, 0, 128),
        ValueError,
        r"16 ranks are in one.*num_rdma_bytes is 128",
    ),
    BadInput("257 ranks", lambda _: _buffer(257, 0), ValueError, r"257 ranks.*up to 256"),
    BadInput(
        "negative domain",
        lambda _: _buffer(2, 0, nvlink_domain=-1),
        ValueError,
        r"nvlink_domain is -1.*number of ranks",
    ),
    BadInput(
        "uneven domains",
        lambda _: _placed(5, 0, nvlink_domain=2),
        ValueError,
        r"different sizes.*divides.*domain 2: ranks 4",
    ),
    BadInput(
        "33 domains",
        lambda _: _placed(33, 0, nvlink_domain=1),
        ValueError,
        r"are 33, but 32 is the most",
    ),
    BadInput(
        "no queue pair between domains",
        lambda _: _placed(2, 0, nvlink_domain=1, num_qps_per_rank=0),
        ValueError,
        r"num_qps_per_rank is 0.*at least 1",
    ),
    BadInput(
        "no queue pair in low latency",
        lambda _: _placed(2, 0, 128, low_latency_mode=True, num_qps_per_rank=-3),
        ValueError,
        r"num_qps_per_rank is -3.*at least 1",
    ),
]

CONFIG = [
    BadInput("negative sms", lambda _: Config(-2), ValueError, r"num_sms is -2.*not be negative"),
    BadInput(
        "nvl send 0",
        lambda _: Config(20, 0, 256),
        ValueError,
        r"0 \(send\) and 256.*0 < send < receive",
    ),
    BadInput(
        "nvl send = receive",
        lambda _: Config(20, 8, 8),
        ValueError,
        r"8 \(send\) and 8.*send < receive",
    ),
    BadInput(
        "rdma send 0",
        lambda _: Config(20, 6, 256, 0, 128),
        ValueError,
        r"0 \(send\) and 128.*receive / 2",
    ),
    BadInput(
        "rdma send > half",
        lambda _: Config(20, 6, 256, 6, 11),
        ValueError,
        r"6 \(send\) and 11.*receive / 2",
    ),
    BadInput("several", lambda _: Config(-2, 9, 9), ValueError, r"num_sms is -2.*9 \(send\) and 9"),
    BadInput("odd sms", lambda _: Buffer.set_num_sms(7), AssertionError, r"even, got 7"),
    BadInput(
        "dispatch config",
        lambda _: Buffer.get_dispatch_config(257),
        AssertionError,
        r"257 ranks.*1 to 256",
    ),
    BadInput(
        "combine config",
        lambda _: Buffer.get_combine_config(0),
        AssertionError,
        r"0 ranks.*1 to 256",
    ),
    BadInput(
        "rdma hint",
        lambda _: Config().get_rdma_buffer_size_hint(14336, 16, ranks_per_domain=9),
        ValueError,
        r"ranks_per_domain is 9.*1 to 8",
    ),
    BadInput(
        "nvl hint",
        lambda _: Config().get_nvl_buffer_size_hint(14336, 16, ranks_per_domain=0),
        ValueError,
        r"ranks_per_domain is 0.*1 to 8",
    ),
    BadInput(
        "low latency hint",
        lambda _: Buffer.get_low_latency_rdma_size_hint(0, 7168, 2, -8),
        ValueError,
        r"num_max_dispatch_tokens_per_rank is 0, num_experts is -8.*at least 1",
    ),
]

BETWEEN_DOMAINS = [
    BadInput(
        "no counts of domains",
        lambda b: b.dispatch_between(num_tokens_per_rdma_rank=None),
        AssertionError,
        r"needs num_tokens_per_rdma_rank from get_dispatch_layout",
    ),
    BadInput(
        "counts of three domains",
        lambda b: b.dispatch_between(num_tokens_per_rdma_rank=b.full(3, dtype=torch.int32)),
        ValueError,
        r"num_tokens_per_rdma_rank.*\(3,\).*\(2\).*each NVLink domain",
    ),
    BadInput(
        "counts of domains dtype",
        lambda b: b.dispatch_between(num_tokens_per_rdma_rank=b.per_rdma_rank.long()),
        TypeError,
        r"num_tokens_per_rdma_rank.*int64.*int32",
    ),
    BadInput(
        "counts of domains device",
        lambda b: b.dispatch_between(num_tokens_per_rdma_rank=b.per_rdma_rank.to("meta")),
        ValueError,
        r"num_tokens_per_rdma_rank is on meta",
    ),
    BadInput(
        "too many experts",
        lambda b: b.between.get_dispatch_layout(b.idx, 2 * 1025),
        ValueError,
        r"num_experts is 2050.*at most 2048",
    ),
    BadInput(
        "handle of one domain",
        lambda b: b.cached_between(handle=b.handle),
        TypeError,
        r"tuple of 6.*tuple of 10",
    ),
    BadInput(
        "handle of several in one",
        lambda b: b.cached(handle=b.between_handle),
        TypeError,
        r"tuple of 10.*tuple of 6",
    ),
    BadInput(
        "handle ranks",
        lambda b: b.combine_between(handle=b.between_changed(6, b.full(4, dtype=torch.int32))),
        ValueError,
        r"4 ranks.*this Buffer has 2",
    ),
    BadInput(
        "handle domains",
        lambda b: b.combine_between(handle=b.between_changed(8, b.full(6, 1, dtype=torch.int32))),
        ValueError,
        r"of 1 NVLink domains.*this Buffer has 2.*that made it",
    ),
    BadInput(
        "handle tokens",
        lambda b: b.cached_between(x=b.full(4, HIDDEN)),
        ValueError,
        r"x has 4 tokens, but the handle routes 6",
    ),
    BadInput(
        "handle of two dispatches",
        lambda b: b.combine_between(handle=b.between_changed(1, b.full(2, 6, dtype=torch.int32))),
        ValueError,
        r"handle\[1\] has 12 elements, but .* 6 tokens between 2 ranks has 14; pass the handle",
    ),
    BadInput(
        "handle no tensor",
        lambda b: b.cached_between(handle=b.between_changed(9, None)),
        TypeError,
        r"handle\[9\] is a NoneType",
    ),
    BadInput(
        "combine rows",
        lambda b: b.combine_between(x=b.full(3, HIDDEN)),
        ValueError,
        r"x has shape \(3, 64\).*one row for each row of the dispatch",
    ),
    BadInput(
        "combine bias rows",
        lambda b: b.combine_between(bias=b.full(3, HIDDEN)),
        ValueError,
        r"bias_0 has shape \(3, 64\), expected \(6, 64\)",
    ),
]

LAYOUT = [
    BadInput(
        "no tensor", lambda b: b.layout([[1, 2]]), TypeError, r"topk_idx is a list.*torch\.Tensor"
    ),
    BadInput(
        "dim",
        lambda b: b.layout(b.idx[0]),
        ValueError,
        r"topk_idx.*\(4,\).*\(num_tokens, num_topk\)",
    ),
    BadInput(
        "dtype",
        lambda b: b.layout(b.idx.short()),
        TypeError,
        r"topk_idx.*int16.*int64 or torch\.int32.*\.to\(\)",
    ),
    BadInput(
        "device",
        lambda b: b.layout(b.idx.to("meta")),
        ValueError,
        r"topk_idx is on meta.*no values",
    ),
    BadInput(
        "strides",
        lambda b: b.layout(b.idx[:, ::2]),
        ValueError,
        r"topk_idx.*strides \(4, 2\).*\.contiguous\(\)",
    ),
    BadInput(
        "top-k 0", lambda b: b.layout(b.idx[:, :0]), ValueError, r"top-k is 0.*between 1 and 32"
    ),
    BadInput(
        "top-k 33",
        lambda b: b.layout(b.full(6, 33, dtype=torch.int64)),
        ValueError,
        r"top-k is 33.*between 1 and 32",
    ),
    BadInput(
        "experts 0",
        lambda b: b.layout(num_experts=0),
        ValueError,
        r"num_experts is 0.*positive multiple",
    ),
    BadInput(
        "experts negative",
        lambda b: b.layout(num_experts=-2),
        ValueError,
        r"num_experts is -2.*positive multiple",
    ),
    BadInput(
        "experts odd",
        lambda b: b.layout(num_experts=7),
        ValueError,
        r"num_experts is 7.*multiple of the 2 ranks",
    ),
    BadInput(
        "experts many",
        lambda b: b.layout(num_experts=65538),
        ValueError,
        r"num_experts is 65538.*at most",
    ),
    BadInput(
        "allocate without event",
        lambda b: b.layout(async_finish=True, allocate_on_comm_stream=True),
        RuntimeError,
        r"allocate_on_comm_stream=True needs a previous_event.*without an event",
        gpu_only=True,
    ),
    BadInput(
        "allocate and sync",
        lambda b: b.layout(previous_event=Buffer.capture(), allocate_on_comm_stream=True),
        RuntimeError,
        r"allocate_on_comm_stream=True needs.*async_finish=False",
        gpu_only=True,
    ),
]

DISPATCH = [
    BadInput("x no tensor", lambda b: b.dispatch(x=[1]), TypeError, r"x is a list.*torch\.Tensor"),
    BadInput(
        "x dim",
        lambda b: b.dispatch(x=b.x[0]),
        ValueError,
        r"x has shape \(64,\).*\(num_tokens, hidden\)",
    ),
    BadInput(
        "x device", lambda b: b.dispatch(x=b.x.to("meta")), ValueError, r"x is on meta.*no values"
    ),
    BadInput(
        "config a number",
        lambda b: b.dispatch(config=24),
        TypeError,
        r"config is a int, expected a Config",
    ),
    BadInput(
        "x strides",
        lambda b: b.dispatch(x=b.x[:, ::2]),
        ValueError,
        r"x has strides \(64, 2\).*\.contiguous\(\)",
    ),
    BadInput(
        "x row bytes",
        lambda b: b.dispatch(x=b.full(6, 4)),
        ValueError,
        r"rows of 8 bytes.*multiple of 16",
    ),
    BadInput(
        "x empty rows",
        lambda b: b.dispatch(x=b.full(6, 0)),
        ValueError,
        r"rows of 0 bytes.*multiple of 16",
    ),
    BadInput(
        "x long rows",
        lambda b: b.dispatch(x=b.full(6, 16392)),
        ValueError,
        r"rows of 32784 bytes.*most 32768",
    ),
    BadInput(
        "x address",
        lambda b: b.dispatch(x=_misaligned(b, 6)),
        ValueError,
        r"x.*address 0x[0-9a-f]+2\b.*16.*\.clone\(\)",
    ),
    BadInput(
        "x tuple of 3", lambda b: b.dispatch(x=(b.x, b.x, b.x)), TypeError, r"tuple of 3.*(2|two)"
    ),
    BadInput(
        "x wide with scales",
        lambda b: b.dispatch(x=(b.x, b.full(6, 1, dtype=torch.float32))),
        TypeError,
        r"bfloat16.*one byte an element",
    ),
    BadInput(
        "scales dtype",
        lambda b: b.dispatch(x=(_fp8(b), b.full(6, 1, dtype=torch.float64))),
        TypeError,
        r"scales.*float64.*float32 or torch\.int32",
    ),
    BadInput(
        "scales rows",
        lambda b: b.dispatch(x=(_fp8(b), b.full(5, 1, dtype=torch.float32))),
        ValueError,
        r"scales.*\(5, 1\).*\(6, num_scales\).*each token",
    ),
    BadInput(
        "scales dim",
        lambda b: b.dispatch(x=(_fp8(b), b.full(6, dtype=torch.float32))),
        ValueError,
        r"scales.*\(6,\).*\(6, num_scales\)",
    ),
    BadInput(
        "scales device",
        lambda b: b.dispatch(x=(_fp8(b), torch.zeros(6, 1, device="meta", dtype=torch.float32))),
        ValueError,
        r"scales.* is on meta.*no values",
    ),
    *(
        BadInput(
            f"no {name}",
            lambda b, name=name: b.dispatch(**{name: None}),
            AssertionError,
            rf"needs {name} from get_dispatch_layout",
        )
        for name in ("num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert")
    ),
    BadInput(
        "no layout",
        lambda b: b.buffer.dispatch(b.x),
        AssertionError,
        r"num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert",
    ),
    BadInput(
        "per rank shape",
        lambda b: b.dispatch(num_tokens_per_rank=b.full(3, dtype=torch.int32)),
        ValueError,
        r"num_tokens_per_rank.*\(3,\).*\(2\)",
    ),
    BadInput(
        "per rank dtype",
        lambda b: b.dispatch(num_tokens_per_rank=b.per_rank.long()),
        TypeError,
        r"num_tokens_per_rank.*int64.*int32",
    ),
    BadInput(
        "per rank device",
        lambda b: b.dispatch(num_tokens_per_rank=b.per_rank.to("meta")),
        ValueError,
        r"num_tokens_per_rank is on meta.*no values",
    ),
    BadInput(
        "per rank strides",
        lambda b: b.dispatch(num_tokens_per_rank=b.full(4, dtype=torch.int32)[::2]),
        ValueError,
        r"num_tokens_per_rank.*strides \(2,\).*\.contiguous\(\)",
    ),
    BadInput(
        "in rank rows",
        lambda b: b.dispatch(is_token_in_rank=b.in_rank[1:]),
        ValueError,
        r"is_token_in_rank.*\(5, 2\).*\(6, 2\).*each token of x",
    ),
    BadInput(
        "in rank columns",
        lambda b: b.dispatch(is_token_in_rank=b.full(6, 3, dtype=torch.bool)),
        ValueError,
        r"is_token_in_rank.*\(6, 3\).*\(6, 2\)",
    ),
    BadInput(
        "in rank dtype",
        lambda b: b.dispatch(is_token_in_rank=b.in_rank.int()),
        TypeError,
        r"is_token_in_rank.*int32.*bool",
    ),
    BadInput(
        "in rank strides",
        lambda b: b.dispatch(is_token_in_rank=b.full(2, 6, dtype=torch.bool).t()),
        ValueError,
        r"is_token_in_rank.*strides \(1, 6\).*\.contiguous\(\)",
    ),
    BadInput(
        "in rank device",
        lambda b: b.dispatch(is_token_in_rank=b.in_rank.to("meta")),
        ValueError,
        r"is_token_in_rank is on meta.*no values",
    ),
    BadInput(
        "per expert dim",
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert[None]),
        ValueError,
        r"num_tokens_per_expert.*\(1, 8\).*\(num_experts\)",
    ),
    BadInput(
        "per expert dtype",
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert.long()),
        TypeError,
        r"num_tokens_per_expert.*int64.*int32",
    ),
    BadInput(
        "per expert device",
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert.to("meta")),
        ValueError,
        r"num_tokens_per_expert is on meta.*no values",
    ),
    BadInput(
        "per expert odd",
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert[:7]),
        ValueError,
        r"num_experts is 7.*multiple of the 2 ranks",
    ),
    BadInput(
        "per expert none",
        lambda b: b.dispatch(num_tokens_per_expert=b.per_expert[:0]),
        ValueError,
        r"num_experts is 0.*positive",
    ),
    BadInput(
        "per expert many",
        lambda b: b.dispatch(num_tokens_per_expert=b.full(65538, dtype=torch.int32)),
        ValueError,
        r"num_experts is 65538.*at most",
    ),
    BadInput(
        "experts of a rank",
        lambda b: b.dispatch(num_tokens_per_expert=b.full(16386, dtype=torch.int32)),
        ValueError,
        r"num_experts is 16386.*at most (16384|8192)",
    ),
    BadInput(
        "only topk_idx",
        lambda b: b.dispatch(topk_weights=None),
        ValueError,
        r"topk_idx and topk_weights.*together",
    ),
    BadInput(
        "only topk_weights",
        lambda b: b.dispatch(topk_idx=None),
        ValueError,
        r"topk_idx and topk_weights.*together",
    ),
    BadInput(
        "topk_idx rows",
        lambda b: b.dispatch(topk_idx=b.idx[1:]),
        ValueError,
        r"topk_idx.*\(5, 4\).*\(6, num_topk\).*each token of x",
    ),
    BadInput(
        "topk_idx dtype",
        lambda b: b.dispatch(topk_idx=b.idx.short()),
        TypeError,
        r"topk_idx.*int16.*int64",
    ),
    BadInput(
        "topk_idx device",
        lambda b: b.dispatch(topk_idx=b.idx.to("meta")),
        ValueError,
        r"topk_idx is on meta",
    ),
    BadInput(
        "topk_idx strides",
        lambda b: b.dispatch(topk_idx=b.idx[:, ::2]),
        ValueError,
        r"topk_idx.*strides \(4, 2\).*\.contiguous\(\)",
    ),
    BadInput(
        "top-k 0",
        lambda b: b.dispatch(topk_idx=b.idx[:, :0], topk_weights=b.weights[:, :0]),
        ValueError,
        r"top-k is 0.*between 1 and 32",
    ),
    BadInput(
        "top-k 33",
        lambda b: b.dispatch(topk_idx=b.full(6, 33, dtype=torch.int64)),
        ValueError,
        r"top-k is 33.*between 1 and 32",
    ),
    BadInput(
        "weights dtype",
        lambda b: b.dispatch(topk_weights=b.weights.bfloat16()),
        TypeError,
        r"topk_weights.*bfloat16.*float32",
    ),
    BadInput(
        "weights shape",
        lambda b: b.dispatch(topk_weights=b.full(6, 3, dtype=torch.float32)),
        ValueError,
        r"topk_weights.*\(6, 3\).*\(6, 4\).*topk_idx",
    ),
    BadInput(
        "weights strides",
        lambda b: b.dispatch(topk_weights=b.full(4, 6, dtype=torch.float32).t()),
        ValueError,
        r"topk_weights.*strides \(1, 6\).*\.contiguous\(\)",
    ),
    BadInput(
        "alignment 0",
        lambda b: b.dispatch(expert_alignment=0),
        ValueError,
        r"expert_alignment is 0.*at least 1",
    ),
    BadInput(
        "alignment negative",
        lambda b: b.dispatch(expert_alignment=-4),
        ValueError,
        r"expert_alignment is -4.*at least 1",
    ),
    BadInput(
        "worst negative",
        lambda b: b.dispatch(num_worst_tokens=-1),
        ValueError,
        r"num_worst_tokens is -1.*not be negative",
    ),
    BadInput(
        "worst without top-k",
        lambda b: b.dispatch(num_worst_tokens=9, topk_idx=None, topk_weights=None),
        ValueError,
        r"num_worst_tokens needs topk_idx",
    ),
    BadInput(
        "sms odd", lambda b: b.dispatch(config=Config(3)), ValueError, r"num_sms is 3\b.*even"
    ),
    BadInput(
        "sms 0", lambda b: b.dispatch(config=Config(0)), ValueError, r"num_sms is 0\b.*between 2"
    ),
    BadInput(
        "sms many",
        lambda b: b.dispatch(config=Config(10000)),
        ValueError,
        r"num_sms is 10000\b.*between 2 and \d+",
    ),
    BadInput(
        "destroyed",
        lambda b: b.destroyed.dispatch(b.x, handle=b.handle),
        RuntimeError,
        r"destroyed",
    ),
    BadInput(
        "allocate without event",
        lambda b: b.dispatch(async_finish=True, allocate_on_comm_stream=True),
        RuntimeError,
        r"allocate_on_comm_stream=True needs a previous_event",
        gpu_only=True,
    ),
]

CACHED = [
    BadInput(
        "with topk_idx",
        lambda b: b.cached(topk_idx=b.idx),
        ValueError,
        r"cached dispatch.*no topk_idx",
    ),
    BadInput(
        "with topk_weights",
        lambda b: b.cached(topk_weights=b.weights),
        ValueError,
        r"no topk_weights",
    ),
    BadInput(
        "other tokens", lambda b: b.cached(x=b.x[1:]), ValueError, r"x has 5 tokens.*routes 6"
    ),
    BadInput(
        "handle type",
        lambda b: b.cached(handle="handle"),
        TypeError,
        r"handle is a str.*tuple of 6",
    ),
    BadInput(
        "handle length",
        lambda b: b.cached(handle=b.handle[:5]),
        TypeError,
        r"tuple of 5.*tuple of 6",
    ),
    BadInput(
        "handle ranks",
        lambda b: b.cached(handle=b.handle_of_3),
        ValueError,
        r"3 ranks.*this Buffer has 2",
    ),
    BadInput(
        "handle of two dispatches",
        lambda b: b.cached(handle=(*b.handle[:1], b.handle[1][:1], *b.handle[2:])),
        ValueError,
        r"handle\[1\] has 1 elements, but .* 6 tokens between 2 ranks has 2; pass the handle",
    ),
    BadInput(
        "handle of no tensors",
        lambda b: b.cached(handle=(1, 2, 3, 4, 5, 6)),
        TypeError,
        r"handle\[0\].*int",
    ),
    BadInput(
        "handle device",
        lambda b: b.cached(handle=tuple(each.to("meta") for each in b.handle)),
        ValueError,
        r"handle\[0\] is on meta",
    ),
    BadInput(
        "row bytes",
        lambda b: b.cached(x=b.full(6, 12)),
        ValueError,
        r"rows of 24 bytes.*multiple of 16",
    ),
    BadInput("sms odd", lambda b: b.cached(config=Config(5)), ValueError, r"num_sms is 5\b.*even"),
]

COMBINE = [
    BadInput(
        "rows",
        lambda b: b.combine(x=b.full(1, HIDDEN)),
        ValueError,
        r"x has shape \(1, 64\).*row of the dispatch",
    ),
    BadInput(
        "dim",
        lambda b: b.combine(x=b.recv_x[0]),
        ValueError,
        r"x has shape \(64,\).*\(\d+, hidden\)",
    ),
    BadInput(
        "dtype",
        lambda b: b.combine(x=b.recv_x.float()),
        TypeError,
        r"float32.*bfloat16 or torch\.float16",
    ),
    BadInput(
        "device", lambda b: b.combine(x=b.recv_x.to("meta")), ValueError, r"x is on meta.*no values"
    ),
    BadInput(
        "strides",
        lambda b: b.combine(x=b.recv_x[:, ::2]),
        ValueError,
        r"x has strides.*\.contiguous\(\)",
    ),
    BadInput(
        "row bytes",
        lambda b: b.combine(x=b.full(len(b.recv_x), 4)),
        ValueError,
        r"rows of 8 bytes.*multiple of 16",
    ),
    BadInput(
        "long rows",
        lambda b: b.combine(x=b.full(len(b.recv_x), 16392)),
        ValueError,
        r"rows of 32784 bytes",
    ),
    BadInput(
        "address",
        lambda b: b.combine(x=_misaligned(b, len(b.recv_x))),
        ValueError,
        r"x.*address 0x.*\.clone\(\)",
    ),
    BadInput(
        "weights rows",
        lambda b: b.combine(topk_weights=b.full(1, 4, dtype=torch.float32)),
        ValueError,
        r"topk_weights.*\(1, 4\).*each row of x",
    ),
    BadInput(
        "weights dim",
        lambda b: b.combine(topk_weights=b.recv_weights[:, 0].contiguous()),
        ValueError,
        r"topk_weights.*num_topk",
    ),
    BadInput(
        "weights dtype",
        lambda b: b.combine(topk_weights=b.recv_weights.half()),
        TypeError,
        r"topk_weights.*float16.*float32",
    ),
    BadInput(
        "weights top-k 33",
        lambda b: b.combine(topk_weights=b.full(len(b.recv_x), 33, dtype=torch.float32)),
        ValueError,
        r"top-k is 33.*between 1 and 32",
    ),
    BadInput(
        "bias rows",
        lambda b: b.combine(bias=b.full(5, HIDDEN)),
        ValueError,
        r"bias_0.*\(5, 64\).*\(6, 64\).*each token of this rank",
    ),
    BadInput(
        "bias hidden",
        lambda b: b.combine(bias=b.full(6, 32)),
        ValueError,
        r"bias_0.*\(6, 32\).*\(6, 64\)",
    ),
    BadInput(
        "bias dtype", lambda b: b.combine(bias=b.x.float()), TypeError, r"bias_0.*float32.*bfloat16"
    ),
    BadInput(
        "second bias",
        lambda b: b.combine(bias=(b.x, b.full(7, HIDDEN))),
        ValueError,
        r"bias_1.*\(7, 64\)",
    ),
    BadInput(
        "three biases",
        lambda b: b.combine(bias=(b.x, b.x, b.x)),
        ValueError,
        r"tuple of 3.*tuple of two",
    ),
    BadInput("bias list", lambda b: b.combine(bias=[b.x, b.x]), TypeError, r"bias.* list.*Tensor"),
    BadInput(
        "bias address",
        lambda b: b.combine(bias=_misaligned(b, 6)),
        ValueError,
        r"bias_0.*address 0x.*\.clone\(\)",
    ),
    BadInput(
        "no handle",
        lambda b: b.combine(handle=None),
        TypeError,
        r"handle is a NoneType.*tuple of 6",
    ),
    BadInput(
        "handle length",
        lambda b: b.combine(handle=(*b.handle, None)),
        TypeError,
        r"tuple of 7.*tuple of 6",
    ),
    BadInput(
        "handle ranks",
        lambda b: b.combine(handle=b.handle_of_3),
        ValueError,
        r"3 ranks.*this Buffer has 2",
    ),
    BadInput("sms odd", lambda b: b.combine(config=Config(7)), ValueError, r"num_sms is 7\b.*even"),
    BadInput(
        "sms 0", lambda b: b.combine(config=Config(0)), ValueError, r"num_sms is 0\b.*between 2"
    ),
    BadInput(
        "sms many",
        lambda b: b.combine(config=Config(10000)),
        ValueError,
        r"num_sms is 10000\b.*between 2 and \d+",
    ),
    BadInput(
        "destroyed", lambda b: b.destroyed.combine(b.recv_x, b.handle), RuntimeError, r"destroyed"
    ),
    BadInput(
        "allocate without event",
        lambda b: b.combine(async_finish=True, allocate_on_comm_stream=True),
        RuntimeError,
        r"allocate_on_comm_stream=True needs a previous_event",
        gpu_only=True,
    ),
]

MEMBERS = [
    BadInput(
        "destroyed layout",
        lambda b: b.destroyed.get_dispatch_layout(b.idx, 8),
        RuntimeError,
        r"destroyed",
    ),
    BadInput(
        "destroyed view",
        lambda b: b.destroyed.get_local_buffer_tensor(torch.int8),
        RuntimeError,
        r"destroyed",
    ),
    BadInput("destroyed reset", lambda b: b.destroyed.reset(), RuntimeError, r"destroyed"),
    BadInput("destroyed warmup", lambda b: b.destroyed.warmup(1024), RuntimeError, r"destroyed"),
    BadInput("destroyed check", lambda b: b.destroyed.check_fault(), RuntimeError, r"destroyed"),
    BadInput(
        "destroyed twice", lambda b: b.destroyed.destroy(), AssertionError, r"destroyed already"
    ),
    BadInput(
        "view offset",
        lambda b: b.buffer.get_local_buffer_tensor(torch.int32, offset=2),
        ValueError,
        r"offset is 2 bytes.*multiple of 4",
    ),
    BadInput(
        "view negative",
        lambda b: b.buffer.get_local_buffer_tensor(torch.int8, offset=-1),
        ValueError,
        r"offset is -1 bytes",
    ),
    BadInput(
        "view behind",
        lambda b: b.buffer.get_local_buffer_tensor(torch.int8, offset=b.buffer.num_nvl_bytes + 1),
        ValueError,
        r"offset is \d+ bytes.*up to \d+",
    ),
    BadInput(
        "view size",
        lambda b: b.buffer.get_local_buffer_tensor(torch.int8, torch.Size((1 << 16, 1 << 16))),
        ValueError,
        r"size \(65536, 65536\) has 4294967296 elements.*only \d+ are there",
    ),
    BadInput(
        "view of rdma",
        lambda b: b.normal.get_local_buffer_tensor(torch.int8, torch.Size((1,)), 0, True),
        ValueError,
        r"size \(1,\) has 1 elements.*only 0",
    ),
    BadInput(
        "view behind rdma",
        lambda b: b.buffer.get_local_buffer_tensor(
            torch.int8, offset=NUM_RDMA_BYTES + 1, use_rdma_buffer=True
        ),
        ValueError,
        r"offset is \d+ bytes.*up to 262144",
    ),
]

LOW_LATENCY_DISPATCH = [
    BadInput(
        "destroyed",
        lambda b: b.destroyed.low_latency_dispatch(b.ll_x, b.idx, MAX_TOKENS, NUM_EXPERTS),
        RuntimeError,
        r"destroyed",
    ),
    BadInput(
        "normal buffer",
        lambda b: b.normal.low_latency_dispatch(b.ll_x, b.idx, MAX_TOKENS, NUM_EXPERTS),
        RuntimeError,
        r"low_latency_dispatch needs.*low_latency_mode=True.*get_low_latency_rdma_size_hint",
    ),
    BadInput(
        "event and hook",
        lambda b: b.ll_dispatch(async_finish=True, return_recv_hook=True),
        ValueError,
        r"async_finish and return_recv_hook exclude",
    ),
    BadInput(
        "ue8m0 alone",
        lambda b: b.ll_dispatch(use_fp8=True, use_ue8m0=True),
        ValueError,
        r"use_ue8m0=True.*pass round_scale=True",
    ),
    BadInput(
        "quantization",
        lambda b: b.ll_dispatch(use_fp8=True, quantization="fp4"),
        ValueError,
        r"quantization is 'fp4'.*'mxfp8', 'nvfp4'",
    ),
    BadInput(
        "quantization and bf16",
        lambda b: b.ll_dispatch(use_fp8=False, quantization="mxfp8"),
        ValueError,
        r"quantization='mxfp8'.*use_fp8=False.*defaults",
    ),
    BadInput(
        "quantization and rounding",
        lambda b: b.ll_dispatch(quantization="mxfp8", round_scale=True),
        ValueError,
        r"quantization='mxfp8'.*round_scale=True.*defaults",
    ),
    BadInput("x no tensor", lambda b: b.ll_dispatch(x=[1]), TypeError, r"x is a list.*Tensor"),
    BadInput(
        "x dim",
        lambda b: b.ll_dispatch(x=b.ll_x[0]),
        ValueError,
        r"x has shape \(512,\).*\(num_tokens, hidden\)",
    ),
    BadInput(
        "x dtype",
        lambda b: b.ll_dispatch(x=b.ll_x.half()),
        TypeError,
        r"x has dtype torch.float16.*bfloat16.*\.to\(\)",
    ),
    BadInput(
        "x device",
        lambda b: b.ll_dispatch(x=b.ll_x.to("meta")),
        ValueError,
        r"x is on meta.*no values",
    ),
    BadInput(
        "x strides",
        lambda b: b.ll_dispatch(x=b.ll_x[:, ::2]),
        ValueError,
        r"x has strides \(512, 2\).*\.contiguous\(\)",
    ),
    BadInput(
        "x address",
        lambda b: b.ll_dispatch(x=_misaligned(b, NUM_TOKENS, LL_HIDDEN)),
        ValueError,
        r"x.*address 0x[0-9a-f]+2\b.*16.*\.clone\(\)",
    ),
    *(
        BadInput(
            f"hidden {hidden} {name}",
            lambda b, hidden=hidden, flags=flags: b.ll_dispatch(
                x=b.full(NUM_TOKENS, hidden), **flags
            ),
            ValueError,
            rf"hidden is {hidden}\b.*{name} must have a multiple of {granularity} channels.*16384",
        )
        for hidden, name, granularity, flags in (
            (0, "bf16", 8, {}),
            (12, "bf16", 8, {}),
            (16392, "bf16", 8, {}),
            (192, "fp8", 128, {"use_fp8": True}),
            (640, "fp8_ue8m0", 512, {"use_fp8": True, "round_scale": True, "use_ue8m0": True}),
            (48, "mxfp8", 32, {"quantization": "mxfp8"}),
            (48, "nvfp4", 32, {"quantization": "nvfp4"}),
        )
    ),
    *(
        BadInput(
            f"max tokens {value}",
            lambda b, value=value: b.ll_dispatch(num_max_dispatch_tokens_per_rank=value),
            ValueError,
            rf"num_max_dispatch_tokens_per_rank is {value}, .*between 1 and 131072 for 2 ranks",
        )
        for value in (0, -1, 131073)
    ),
    BadInput(
        "more tokens than the maximum",
        lambda b: b.ll_dispatch(num_max_dispatch_tokens_per_rank=5),
        ValueError,
        r"has 6 tokens, more than num_max_dispatch_tokens_per_rank=5; pass a larger",
    ),
    *(
        BadInput(
            f"experts {value}",
            lambda b, value=value: b.ll_dispatch(num_experts=value),
            ValueError,
            rf"num_experts is {value}, .*multiple of the 2 ranks, at most 8192",
        )
        for value in (0, -2, 7, 8194)
    ),
    BadInput(
        "topk_idx rows",
        lambda b: b.ll_dispatch(topk_idx=b.idx[1:]),
        ValueError,
        r"topk_idx.*\(5, 4\).*\(6, num_topk\).*each token of x",
    ),
    BadInput(
        "topk_idx dtype",
        lambda b: b.ll_dispatch(topk_idx=b.idx.short()),
        TypeError,
        r"topk_idx.*int16.*int64 or torch.int32",
    ),
    BadInput(
        "topk_idx device",
        lambda b: b.ll_dispatch(topk_idx=b.idx.to("meta")),
        ValueError,
        r"topk_idx is on meta",
    ),
    BadInput(
        "topk_idx strides",
        lambda b: b.ll_dispatch(topk_idx=b.idx[:, ::2]),
        ValueError,
        r"topk_idx.*strides \(4, 2\).*\.contiguous\(\)",
    ),
    BadInput(
        "top-k 0",
        lambda b: b.ll_dispatch(topk_idx=b.idx[:, :0]),
        ValueError,
        r"top-k is 0.*between 1 and 32",
    ),
    BadInput(
        "top-k 33",
        lambda b: b.ll_dispatch(topk_idx=b.full(NUM_TOKENS, 33, dtype=torch.int64)),
        ValueError,
        r"top-k is 33.*between 1 and 32",
    ),
    BadInput(
        "choices",
        lambda b: b.ll_dispatch(
            topk_idx=b.full(NUM_TOKENS, 32, dtype=torch.int64),
            num_max_dispatch_tokens_per_rank=4097,
        ),
        ValueError,
        r"4097 tokens with 32 choices are 131104 rows.*at most 131072; pass a smaller",
    ),
    BadInput(
        "no global scale",
        lambda b: b.ll_dispatch(quantization="nvfp4"),
        ValueError,
        r"nvfp4.*needs global_scale.*\(1,\)",
    ),
    BadInput(
        "global scale shape",
        lambda b: b.ll_dispatch(quantization="nvfp4", global_scale=b.full(2, dtype=torch.float32)),
        ValueError,
        r"global_scale has shape \(2,\), expected \(1\)",
    ),
    BadInput(
        "global scale dtype",
        lambda b: b.ll_dispatch(quantization="nvfp4", global_scale=b.full(1)),
        TypeError,
        r"global_scale.*bfloat16.*float32",
    ),
    BadInput(
        "global scale device",
        lambda b: b.ll_dispatch(
            quantization="nvfp4",
            global_scale=torch.ones(1, dtype=torch.float32, device="meta"),
        ),
        ValueError,
        r"global_scale is on meta",
    ),
    BadInput(
        "global scale of another format",
        lambda b: b.ll_dispatch(global_scale=b.full(1, dtype=torch.float32)),
        ValueError,
        r"global_scale is given.*bf16.*'nvfp4' only",
    ),
    BadInput(
        "stats shape",
        lambda b: b.ll_dispatch(
            cumulative_local_expert_recv_stats=b.full(NUM_EXPERTS, dtype=torch.int32)
        ),
        ValueError,
        r"cumulative_local_expert_recv_stats.*\(8,\), expected \(4\).*each local expert",
    ),
    BadInput(
        "stats dtype",
        lambda b: b.ll_dispatch(cumulative_local_expert_recv_stats=b.full(4, dtype=torch.int64)),
        TypeError,
        r"cumulative_local_expert_recv_stats.*int64.*int32",
    ),
    BadInput(
        "wait cost shape",
        lambda b: b.ll_dispatch(dispatch_wait_recv_cost_stats=b.full(2, 2, dtype=torch.int64)),
        ValueError,
        r"dispatch_wait_recv_cost_stats.*\(2, 2\), expected \(2\).*each rank",
    ),
    BadInput(
        "wait cost dtype",
        lambda b: b.ll_dispatch(dispatch_wait_recv_cost_stats=b.full(2, dtype=torch.int32)),
        TypeError,
        r"dispatch_wait_recv_cost_stats.*int32.*int64",
    ),
    BadInput(
        "room",
        lambda b: b.ll_dispatch(num_max_dispatch_tokens_per_rank=64),
        ValueError,
        r"dispatch in bf16 of 64 tokens a rank, hidden 512 and 8 experts needs num_rdma_bytes >= "
        r"720896, but this Buffer has 262144; make it with "
        r"Buffer.get_low_latency_rdma_size_hint\(64, 512, 2, 8\), which is \d+",
    ),
]

LOW_LATENCY_COMBINE = [
    BadInput(
        "destroyed",
        lambda b: b.destroyed.low_latency_combine(b.ll_y, b.idx, b.weights, b.ll_handle),
        RuntimeError,
        r"destroyed",
    ),
    BadInput(
        "normal buffer",
        lambda b: b.normal.low_latency_combine(b.ll_y, b.idx, b.weights, b.ll_handle),
        RuntimeError,
        r"low_latency_combine needs.*low_latency_mode=True",
    ),
    BadInput(
        "event and hook",
        lambda b: b.ll_combine(async_finish=True, return_recv_hook=True),
        ValueError,
        r"async_finish and return_recv_hook exclude",
    ),
    BadInput("handle type", lambda b: b.ll_combine(handle=3), TypeError, r"is a int.*tuple of 5"),
    BadInput(
        "handle of the normal mode",
        lambda b: b.ll_combine(handle=b.handle),
        TypeError,
        r"tuple of 6, expected the tuple of 5 that low_latency_dispatch",
    ),
    BadInput(
        "handle numbers",
        lambda b: b.ll_combine(handle=b.ll_changed(3, "512")),
        TypeError,
        r"handle\[3\] is '512', a str, but must be an int",
    ),
    BadInput(
        "handle tokens",
        lambda b: b.ll_combine(handle=b.ll_changed(2, 9)),
        ValueError,
        r"handle\[0\].*\(4, 16\), expected \(4, 18\).*8 experts and 9 tokens on 2 ranks",
    ),
    BadInput(
        "handle experts",
        lambda b: b.ll_combine(handle=b.ll_changed(4, 9)),
        ValueError,
        r"num_experts is 9.*2 ranks",
    ),
    BadInput(
        "handle hidden",
        lambda b: b.ll_combine(handle=b.ll_changed(3, 4)),
        ValueError,
        r"hidden is 4\b.*multiple of 8",
    ),
    BadInput(
        "handle of no tensors",
        lambda b: b.ll_combine(handle=b.ll_changed(0, None)),
        TypeError,
        r"handle\[0\] \(src_info\) is a NoneType",
    ),
    BadInput(
        "handle ranges",
        lambda b: b.ll_combine(handle=b.ll_changed(1, b.full(4, 3, dtype=torch.int64))),
        ValueError,
        r"handle\[1\] \(layout_range\).*\(4, 3\), expected \(4, 2\)",
    ),
    BadInput(
        "handle range dtype",
        lambda b: b.ll_combine(handle=b.ll_changed(1, b.ll_handle[1].int())),
        TypeError,
        r"layout_range.*int32.*int64",
    ),
    BadInput(
        "handle device",
        lambda b: b.ll_combine(handle=b.ll_changed(0, b.ll_handle[0].to("meta"))),
        ValueError,
        r"src_info.* is on meta",
    ),
    BadInput(
        "handle that is a copy",
        lambda b: b.ll_combine(handle=b.ll_changed(0, b.ll_handle[0].clone())),
        ValueError,
        r"src_info\) is a copy.*pass the handle as it was returned",
    ),
    BadInput(
        "x rows",
        lambda b: b.ll_combine(x=b.ll_y[:, 1:].contiguous()),
        ValueError,
        r"x has shape \(4, 15, 512\), expected \(4, 16, 512\).*received or not",
    ),
    BadInput(
        "x hidden",
        lambda b: b.ll_combine(x=b.full(4, 16, 256)),
        ValueError,
        r"x has shape \(4, 16, 256\), expected \(4, 16, 512\)",
    ),
    BadInput(
        "x dtype",
        lambda b: b.ll_combine(x=b.ll_y.float()),
        TypeError,
        r"x has dtype torch.float32.*bfloat16",
    ),
    BadInput("x device", lambda b: b.ll_combine(x=b.ll_y.to("meta")), ValueError, r"x is on meta"),
    BadInput(
        "x strides",
        lambda b: b.ll_combine(x=b.full(16, 4, 512).transpose(0, 1)),
        ValueError,
        r"x has strides.*\.contiguous\(\)",
    ),
    BadInput(
        "x address",
        lambda b: b.ll_combine(x=_misaligned(b, 64, LL_HIDDEN).view(4, 16, LL_HIDDEN)),
        ValueError,
        r"x.*address 0x.*\.clone\(\)",
    ),
    BadInput(
        "topk_idx dtype",
        lambda b: b.ll_combine(topk_idx=b.idx.float()),
        TypeError,
        r"topk_idx.*float32.*int64",
    ),
    BadInput(
        "topk_idx strides",
        lambda b: b.ll_combine(topk_idx=b.idx[:, ::2]),
        ValueError,
        r"topk_idx.*\.contiguous\(\)",
    ),
    BadInput(
        "top-k 33",
        lambda b: b.ll_combine(topk_idx=b.full(NUM_TOKENS, 33, dtype=torch.int64)),
        ValueError,
        r"top-k is 33",
    ),
    BadInput(
        "tokens",
        lambda b: b.ll_combine(topk_idx=b.full(9, 4, dtype=torch.int64)),
        ValueError,
        r"has 9 tokens, more than num_max_dispatch_tokens_per_rank=8",
    ),
    BadInput(
        "other top-k",
        lambda b: b.ll_combine(topk_idx=b.full(6, 2, dtype=torch.int64)),
        ValueError,
        r"topk_idx has 2 choices a token, but the handle is of a dispatch with 4; pass the",
    ),
    BadInput(
        "more tokens than were dispatched",
        lambda b: b.ll_combine(topk_idx=b.full(7, 4, dtype=torch.int64)),
        ValueError,
        r"topk_idx has 7 tokens, but the handle is of a dispatch of 6 by this rank; pass the",
    ),
    BadInput(
        "fewer tokens than were dispatched",
        lambda b: b.ll_combine(topk_idx=b.full(0, 4, dtype=torch.int64)),
        ValueError,
        r"topk_idx has 0 tokens, but the handle is of a dispatch of 6 by this rank; pass the",
    ),
    BadInput(
        "weights dtype",
        lambda b: b.ll_combine(topk_weights=b.weights.bfloat16()),
        TypeError,
        r"topk_weights.*bfloat16.*float32",
    ),
    BadInput(
        "weights shape",
        lambda b: b.ll_combine(topk_weights=b.weights[1:]),
        ValueError,
        r"topk_weights.*\(5, 4\).*\(6, 4\).*as topk_idx",
    ),
    BadInput(
        "logfmt and zero copy",
        lambda b: b.ll_combine(use_logfmt=True, zero_copy=True),
        ValueError,
        r"only one of use_logfmt and zero_copy",
    ),
    BadInput(
        "logfmt of short blocks",
        lambda b: b.ll_combine(x=b.full(4, 16, 192), handle=b.ll_changed(3, 192), use_logfmt=True),
        ValueError,
        r"hidden is 192, but use_logfmt takes blocks of 128.*use_logfmt=False",
    ),
    BadInput(
        "out shape",
        lambda b: b.ll_combine(out=b.full(5, LL_HIDDEN)),
        ValueError,
        r"out has shape \(5, 512\), expected \(6, 512\).*each token of topk_idx",
    ),
    BadInput(
        "out dtype",
        lambda b: b.ll_combine(out=b.full(6, LL_HIDDEN, dtype=torch.float32)),
        TypeError,
        r"out.*float32.*bfloat16",
    ),
    BadInput(
        "out strides",
        lambda b: b.ll_combine(out=b.full(6, 2 * LL_HIDDEN)[:, ::2]),
        ValueError,
        r"out has strides.*\.contiguous\(\)",
    ),
    BadInput(
        "out address",
        lambda b: b.ll_combine(out=_misaligned(b, 6, LL_HIDDEN)),
        ValueError,
        r"out.*address 0x.*\.clone\(\)",
    ),
    BadInput(
        "wait cost shape",
        lambda b: b.ll_combine(combine_wait_recv_cost_stats=b.full(3, dtype=torch.int64)),
        ValueError,
        r"combine_wait_recv_cost_stats.*\(3,\), expected \(2\)",
    ),
    BadInput(
        "room",
        lambda b: b.ll_combine(
            topk_idx=b.full(6, 32, dtype=torch.int64),
            topk_weights=b.full(6, 32, dtype=torch.float32),
            handle=b.ll_changed(0, b.src_info(MAX_TOKENS, NUM_EXPERTS, 32)),
        ),
        ValueError,
        r"low_latency_combine of top-32 of 8 tokens a rank.*num_rdma_bytes >= 1048576, but this "
        r"Buffer has 262144; make it with.*\(8, 512, 2, 8\)",
    ),
]

LOW_LATENCY_MEMBERS = [
    BadInput(
        "room to send",
        lambda b: b.buffer.get_next_low_latency_combine_buffer(
            (
                b.src_info(16, 40, 8),
                b.full(20, 2, dtype=torch.int64),
                16,
                LL_HIDDEN,
                40,
            )
        ),
        ValueError,
        r"the send buffer of 16 tokens a rank.*num_rdma_bytes >= 1310720.*\(16, 512, 2, 40\)",
    ),
    BadInput(
        "send buffer of another handle",
        lambda b: b.buffer.get_next_low_latency_combine_buffer(b.handle),
        TypeError,
        r"tuple of 6, expected the tuple of 5",
    ),
    BadInput(
        "send buffer of a normal buffer",
        lambda b: b.normal.get_next_low_latency_combine_buffer(b.ll_handle),
        RuntimeError,
        r"get_next_low_latency_combine_buffer needs.*low_latency_mode=True",
    ),
    BadInput(
        "clean of a normal buffer",
        lambda b: b.normal.clean_low_latency_buffer(MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS),
        RuntimeError,
        r"clean_low_latency_buffer needs.*low_latency_mode=True",
    ),
    BadInput(
        "clean tokens", lambda b: b.ll_clean(0, 512, 8), ValueError, r"tokens_per_rank is 0.*1 and"
    ),
    BadInput(
        "clean hidden", lambda b: b.ll_clean(8, 12, 8), ValueError, r"hidden is 12\b.*multiple of 8"
    ),
    BadInput(
        "clean experts", lambda b: b.ll_clean(8, 512, 3), ValueError, r"num_experts is 3.*2 ranks"
    ),
    BadInput(
        "warmup of a normal buffer",
        lambda b: b.normal.low_latency_warmup(MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS, num_topk=8),
        RuntimeError,
        r"low_latency_warmup needs.*low_latency_mode=True",
    ),
    BadInput(
        "warmup top-k",
        lambda b: b.buffer.low_latency_warmup(MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS, num_topk=33),
        ValueError,
        r"num_topk is 33.*between 1 and 32",
    ),
    *(
        BadInput(
            f"mask rank {rank}",
            lambda b, rank=rank: b.buffer.low_latency_update_mask_buffer(rank, True),
            ValueError,
            rf"rank_to_mask is {rank}, but must be between 0 and 1",
        )
        for rank in (-1, 2)
    ),
    BadInput(
        "query shape",
        lambda b: b.buffer.low_latency_query_mask_buffer(b.full(3, dtype=torch.int32)),
        ValueError,
        r"mask_status.*\(3,\), expected \(2\).*each rank",
    ),
    BadInput(
        "query dtype",
        lambda b: b.buffer.low_latency_query_mask_buffer(b.full(2, dtype=torch.int64)),
        TypeError,
        r"mask_status.*int64.*int32",
    ),
    *(
        BadInput(
            f"{name} without shrink",
            lambda b, name=name, args=args: getattr(b.normal, name)(*args),
            RuntimeError,
            rf"{name} needs.*enable_shrink=True",
        )
        for name, args in (
            ("low_latency_update_mask_buffer", (0, True)),
            ("low_latency_query_mask_buffer", (None,)),
            ("low_latency_clean_mask_buffer", ()),
        )
    ),
]


def _fp8(bench: Bench) -> torch.Tensor:
    return bench.full(NUM_TOKENS, HIDDEN, dtype=torch.uint8).view(torch.float8_e4m3fn)


def _named(group: str, cases: list[BadInput]) -> list[BadInput]:
    return [
        BadInput(f"{group}: {case.name}", case.call, case.error, case.says, case.gpu_only)
        for case in cases
    ]


CASES: list[BadInput] = [
    *_named("Buffer", CONSTRUCTION),
    *_named("Config", CONFIG),
    *_named("layout", LAYOUT),
    *_named("dispatch", DISPATCH),
    *_named("cached dispatch", CACHED),
    *_named("combine", COMBINE),
    *_named("between domains", BETWEEN_DOMAINS),
    *_named("members", MEMBERS),
    *_named("low latency dispatch", LOW_LATENCY_DISPATCH),
    *_named("low latency combine", LOW_LATENCY_COMBINE),
    *_named("low latency members", LOW_LATENCY_MEMBERS),
]
