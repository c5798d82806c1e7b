"""Numbers of other kinds: what stands for an int is taken as one, what does not is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from epjit import Buffer, Config, EventHandle
from epjit.numbers import MOST_SECONDS, as_int, as_seconds
from epjit.runtime.group import ThreadGroup
from tests.rounds.normal import layout_of

KINDS: dict[str, Callable[[int], Any]] = {
    "numpy": np.int32,
    "array": np.array,
    "tensor": torch.tensor,
}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")
    monkeypatch.setattr(Buffer, "num_sms", Buffer.num_sms)
    monkeypatch.setattr(Buffer, "_sms_are_set", False)


def make(number: Callable[[int], Any] = int, **options: Any) -> Buffer:
    given = {
        "num_nvl_bytes": number(1 << 20),
        "num_rdma_bytes": number(1 << 20),
        "low_latency_mode": True,
        "num_qps_per_rank": number(2),
        "nvlink_domain": number(0),
        "timeout_seconds": number(5),
        "enable_shrink": True,
    }
    return Buffer(None, comm=ThreadGroup.create(1)[0], **{**given, **options})


def dispatch(buffer: Buffer, number: Callable[[int], Any] = int, **options: Any) -> tuple[Any, ...]:
    idx, weights = torch.tensor([[0], [1], [0]]), torch.ones((3, 1))
    return buffer.dispatch(
        torch.ones((3, 16), dtype=torch.bfloat16),
        **layout_of(buffer, idx, number(2)),
        topk_idx=idx,
        topk_weights=weights,
        config=Config(number(4), number(6), number(256)),
        **{
            "expert_alignment": number(4),
            "num_worst_tokens": number(0),
            **options,
        },
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_for_an_int_is_one(kind: str) -> None:
    """Results are plain ints: they are hashed, compared, and written to JSON."""
    number = KINDS[kind]
    buffer = make(number)
    assert [type(each) for each in (buffer.num_nvl_bytes, buffer.num_rdma_bytes)] == [int, int]
    counts = dispatch(buffer, number)[3]
    assert counts == [4, 4]
    assert {type(count) for count in counts} == {int}
    assert dispatch(buffer, number, num_worst_tokens=number(5))[0].shape == (5, 16)

    config = Config(number(4), number(6), number(256), number(6), number(13))
    assert config == Config(4, 6, 256, 6, 13)
    assert type(config.num_max_rdma_chunked_recv_tokens) is int
    for hint in (config.get_nvl_buffer_size_hint, config.get_rdma_buffer_size_hint):
        assert type(hint(number(64), number(4), ranks_per_domain=number(2))) is int
    sizes = (4, 128, 1, 2)
    hint = Buffer.get_low_latency_rdma_size_hint(*map(number, sizes))
    assert (type(hint), hint) == (int, Buffer.get_low_latency_rdma_size_hint(*sizes))
    Buffer.set_num_sms(number(8))
    assert type(Buffer.num_sms) is int
    given = Buffer.get_dispatch_config(
        number(2), hidden_bytes=number(64), num_tokens=number(3)
    ).num_sms
    assert (type(given), given) == (int, 8)
    buffer.warmup(number(64), num_topk=number(2), num_scales=number(0))
    assert buffer.get_local_buffer_tensor(torch.int8, offset=number(8)).numel() == (1 << 20) - 8

    x, idx = torch.ones((3, 128), dtype=torch.bfloat16), torch.tensor([[0], [1], [0]])
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
        x, idx, number(4), number(2), use_fp8=False
    )
    assert [type(each) for each in handle[2:]] == [int] * 3
    other = (*handle[:2], *map(number, handle[2:]))
    weights = torch.ones((3, 1))
    assert torch.equal(buffer.low_latency_combine(recv_x, idx, weights, other)[0], x)
    assert buffer.get_next_low_latency_combine_buffer(other).shape == (2, 4, 128)
    buffer.clean_low_latency_buffer(number(4), number(128), number(2))
    buffer.low_latency_update_mask_buffer(number(0), False)
    buffer.low_latency_warmup(number(4), number(128), number(2), num_topk=number(1))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("num_nvl_bytes", lambda b: make(num_nvl_bytes=2.5)),
        ("num_rdma_bytes", lambda b: make(num_rdma_bytes=2.5)),
        ("num_qps_per_rank", lambda b: make(num_qps_per_rank=2.5)),
        ("nvlink_domain", lambda b: make(nvlink_domain=2.5)),
        ("num_sms", lambda b: Config(2.5)),
        ("num_max_nvl_chunked_send_tokens", lambda b: Config(4, 2.5)),
        ("hidden_bytes", lambda b: Config().get_nvl_buffer_size_hint(2.5, 2)),
        ("num_ranks", lambda b: Config().get_rdma_buffer_size_hint(64, 2.5)),
        (
            "ranks_per_domain",
            lambda b: Config().get_nvl_buffer_size_hint(6, 2, ranks_per_domain=2.5),
        ),
        ("num_sms", lambda b: Buffer.set_num_sms(2.5)),
        ("num_ranks", lambda b: Buffer.get_dispatch_config(2.5)),
        ("hidden", lambda b: Buffer.get_low_latency_rdma_size_hint(1, 2.5, 1, 1)),
        ("offset", lambda b: b.get_local_buffer_tensor(torch.int8, offset=2.5)),
        ("hidden_bytes", lambda b: b.warmup(2.5)),
        (
            "num_experts",
            lambda b: b.get_dispatch_layout(torch.zeros((1, 1), dtype=torch.int64), 2.5),
        ),
        ("expert_alignment", lambda b: dispatch(b, expert_alignment=2.5)),
        ("num_worst_tokens", lambda b: dispatch(b, num_worst_tokens=2.5)),
        ("num_experts", lambda b: b.low_latency_dispatch(None, None, 4, 2.5)),
        ("num_max_dispatch_tokens_per_rank", lambda b: b.low_latency_dispatch(None, None, 2.5, 4)),
        ("hidden", lambda b: b.clean_low_latency_buffer(4, 2.5, 4)),
        ("num_topk", lambda b: b.low_latency_warmup(4, 128, 4, num_topk=2.5)),
        ("rank_to_mask", lambda b: b.low_latency_update_mask_buffer(2.5)),
        (r"handle\[3\]", lambda b: b.get_next_low_latency_combine_buffer((0, 0, 4, 2.5, 2))),
    ],
)
def test_what_is_no_int_is_named(name: str, call: Callable[[Buffer], object]) -> None:
    with pytest.raises(TypeError, match=rf"{name} is 2\.5, a float, but must be an int"):
        call(make())


def test_as_int() -> None:
    assert as_int("n", True) == 1
    assert type(as_int("n", True)) is int
    with pytest.raises(ValueError, match="n is -1, but must not be negative"):
        as_int("n", -1, least=0)
    with pytest.raises(ValueError, match="n is 0, but must be at least 1"):
        as_int("n", np.int64(0), least=1)
    with pytest.raises(TypeError, match=r"n is tensor\(1\.\), a Tensor, but must be an int"):
        as_int("n", torch.tensor(1.0))
    with pytest.raises(TypeError, match="n is None, a NoneType"):
        as_int("n", None)  # type: ignore[arg-type]


def test_as_seconds() -> None:
    assert as_seconds("t", np.float32(2)) == 2.0
    assert as_seconds("t", math.inf) == as_seconds("t", 1e300) == MOST_SECONDS
    assert int(MOST_SECONDS * 1e9) < 1 << 63
    for value in (0, -1, math.nan):
        with pytest.raises(ValueError, match=r"t is .*, but must be greater than 0"):
            as_seconds("t", value)
    for value in ("5", None, [1]):
        with pytest.raises(TypeError, match=r"t is .*but must be a number of seconds"):
            as_seconds("t", value)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_bare_event_is_taken_for_none(is_async: bool) -> None:
    """As in V1, which reads the attribute `event` of whatever it gets."""
    event: Any = EventHandle()
    recv_x, *_, after = dispatch(make(), previous_event=event, async_finish=is_async)
    assert recv_x.shape == (3, 16)
    assert (after.event is not None) is is_async
    with pytest.raises(RuntimeError, match="without an event"):
        dispatch(make(), previous_event=event, async_finish=True, allocate_on_comm_stream=True)
