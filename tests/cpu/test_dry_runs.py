"""Shapes without ranks: FakeTensorMode, meta tensors, the backend "fake"; and transforms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore

from epjit import Buffer, moe
from epjit.checks.match import check
from epjit.runtime.group import Group
from tests.harness import launch

_RANKS, _EXPERTS, _TOKENS, _HIDDEN, _TOPK = 8, 16, 10, 64, 2


def arguments(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, choices and weights."""
    return (
        torch.zeros((_TOKENS, _HIDDEN), dtype=torch.bfloat16, device=device),
        torch.arange(_TOPK, device=device).repeat(_TOKENS, 1),
        torch.ones((_TOKENS, _TOPK), dtype=torch.float32, device=device),
    )


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")
    monkeypatch.setenv("EPJIT_TIMEOUT_SECONDS", "10")


@pytest.fixture
def fake_group() -> Iterator[dist.ProcessGroup]:
    """A group of ranks that are not there."""
    dist.init_process_group("fake", rank=0, world_size=_RANKS, store=FakeStore())
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def shapes(group: dist.ProcessGroup, device: str = "cpu") -> None:
    """A layer with static sizes, forward and backward, in both orders of the rows."""
    rows = _RANKS * _TOKENS
    x, idx, weights = arguments(device)
    x.requires_grad_()
    got = moe.dispatch(x, idx, weights, num_experts=_EXPERTS, group=group, num_worst_tokens=rows)
    assert (got.x.shape, got.x.dtype, got.x.device.type) == ((rows, _HIDDEN), x.dtype, device)
    assert (got.topk_idx.shape, got.topk_idx.dtype) == ((rows, _TOPK), torch.int64)
    assert (got.topk_weights.shape, got.topk_weights.dtype) == ((rows, _TOPK), torch.float32)
    assert (got.tokens_per_expert.shape, got.tokens_per_expert.dtype) == (
        (_EXPERTS // _RANKS,),
        torch.int32,
    )
    out = moe.combine(got.x, got.handle, group=group)
    assert (out.shape, out.dtype, out.device.type) == (x.shape, x.dtype, device)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    by_expert = moe.dispatch(
        x,
        idx,
        weights,
        num_experts=_EXPERTS,
        group=group,
        num_worst_tokens=rows,
        expert_major=True,
        expert_alignment=8,
    )
    assert by_expert.x.shape[1] == _HIDDEN
    assert moe.combine(by_expert.x, by_expert.handle, group=group).shape == x.shape


def test_under_fake_tensor_mode(fake_group: dist.ProcessGroup) -> None:
    with FakeTensorMode():
        shapes(fake_group)


def test_meta_tensors(fake_group: dist.ProcessGroup) -> None:
    shapes(fake_group, "meta")


def test_fake_tensors_outside_of_their_mode(fake_group: dist.ProcessGroup) -> None:
    with FakeTensorMode():
        tensors = arguments()
    got = moe.dispatch(*tensors, num_experts=_EXPERTS, group=fake_group, num_worst_tokens=80)
    assert got.x.shape == (80, _HIDDEN)


def test_sizes_that_depend_on_values(fake_group: dist.ProcessGroup) -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        got = moe.dispatch(*arguments(), num_experts=_EXPERTS, group=fake_group)
        assert isinstance(got.x.shape[0], torch.SymInt)
        assert moe.combine(got.x, got.handle, group=fake_group).shape == (_TOKENS, _HIDDEN)
    with FakeTensorMode(), pytest.raises(ValueError, match="pass num_worst_tokens"):
        moe.dispatch(*arguments(), num_experts=_EXPERTS, group=fake_group)
    with pytest.raises(ValueError, match="pass num_worst_tokens"):
        moe.dispatch(*arguments("meta"), num_experts=_EXPERTS, group=fake_group)


def test_values_for_ranks_that_are_not_there(fake_group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match='backend "fake", whose ranks are not there'):
        moe.dispatch(*arguments(), num_experts=_EXPERTS, group=fake_group)
    with pytest.raises(ValueError, match='backend "fake", whose ranks are not there'):
        Buffer(fake_group)


# ---- ranks that are there ------------------------------------------------------------------------


def first_call(process_group: Any, kind: str) -> None:
    """One rank alone asks for what sends nothing; then all make a real call."""
    os.environ.update(EPJIT_BACKEND="cpu", EPJIT_TIMEOUT_SECONDS="10")
    size = process_group.size()

    def layer(x: torch.Tensor) -> torch.Tensor:
        tensors = (x, *arguments(x.device.type)[1:])
        got = moe.dispatch(
            *tensors, num_experts=size, group=process_group, num_worst_tokens=size * _TOKENS
        )
        return moe.combine(got.x, got.handle, group=process_group)

    if process_group.rank() == 0 and kind == "fake":
        with FakeTensorMode():
            assert layer(arguments()[0]).shape == (_TOKENS, _HIDDEN)
            with pytest.raises(RuntimeError, match="making a Buffer communicates"):
                Buffer(process_group)
    elif process_group.rank() == 0 and kind == "meta":
        assert layer(arguments("meta")[0]).shape == (_TOKENS, _HIDDEN)
    ones = torch.ones_like(arguments()[0])
    if process_group.rank() == 0 and kind == "transforms":
        for transform in (torch.func.vmap, torch.func.jacrev, torch.func.grad):
            with pytest.raises(ValueError, match=r"x belongs to a transform of torch\.func"):
                transform(layer)(torch.stack([ones, ones]))
        out = moe.dispatch(
            *arguments("meta"), num_experts=size, group=process_group, num_worst_tokens=size
        )
        with pytest.raises(ValueError, match=r"x belongs to a transform of torch\.func"):
            torch.func.vjp(lambda x: moe.combine(x, out.handle, group=process_group), out.x)
    dist.barrier(process_group)  # the other rank comes here first, and must not be needed before
    assert torch.equal(layer(ones), 2 * ones)  # each token goes to both
    moe.free_buffers()


@pytest.mark.parametrize("kind", ["fake", "meta", "transforms"])
def test_first_call(kind: str) -> None:
    launch.run(first_call, 2, kind)


def test_a_buffer_refuses_tensors_without_values() -> None:
    """Before anything is sent, also when a real call of this kind has passed."""

    def body(comm: Any) -> None:
        buffer = Buffer(None, 0, 1 << 20, True, comm=comm)
        x, idx, weights = arguments()
        x = x.repeat(1, 2)  # 128 channels
        layout = buffer.get_dispatch_layout(idx, 2)

        def dispatch(x: torch.Tensor) -> Any:
            return buffer.dispatch(
                x,
                num_tokens_per_rank=layout[0],
                is_token_in_rank=layout[3],
                num_tokens_per_expert=layout[2],
                topk_idx=idx,
                topk_weights=weights,
            )

        def low_latency_dispatch(x: torch.Tensor) -> Any:
            return buffer.low_latency_dispatch(x, idx, _TOKENS, 2)

        with FakeTensorMode():
            fake = torch.zeros(x.shape, dtype=x.dtype)
        calls = (dispatch, low_latency_dispatch)
        for call in calls:
            call(x)
            with pytest.raises(ValueError, match=r"x is on meta, .*no values"):
                call(x.to("meta"))
            with pytest.raises(ValueError, match=r"x is a fake tensor, .*epjit\.moe"):
                call(fake)
            with pytest.raises(ValueError, match=r"x belongs to a transform of torch\.func"):
                torch.func.vjp(call, x)
            with (
                FakeTensorMode(allow_non_fake_inputs=True),
                pytest.raises(RuntimeError, match="a call of a Buffer communicates"),
            ):
                call(x)
        with pytest.raises(ValueError, match="topk_idx is on meta"):
            buffer.get_dispatch_layout(idx.to("meta"), 2)
        recv_x, *_, handle, _ = dispatch(x)
        with pytest.raises(ValueError, match="x is on meta"):
            buffer.combine(recv_x.to("meta"), handle)

    launch.run_threads(body, 1)


def test_a_tensor_of_another_device_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"x is on cpu, but.*on cuda:0; move it with \.to\("):
        check("x", torch.zeros(1), shape=(1,), device=torch.device("cuda:0"))


def test_an_error_of_our_own_is_not_a_rank_that_did_not_come() -> None:
    launch.run(send_nothing, 2)


def send_nothing(process_group: Any) -> None:
    class Unsendable:
        def __reduce__(self) -> Any:
            raise RuntimeError("not this one")

    group = Group.from_torch(process_group)
    with pytest.raises(RuntimeError, match="not this one") as error:
        group.allgather(Unsendable())
    assert type(error.value) is RuntimeError
    assert group.allgather(group.rank) == [0, 1]
