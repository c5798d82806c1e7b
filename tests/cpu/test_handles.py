"""Handles are V1's plain tuples; their specs are the shapes and dtypes of what a dispatch made."""

from __future__ import annotations

import pickle

import pytest
import torch

from epjit import Buffer
from epjit.handles import (
    Handle,
    InternodeHandle,
    LowLatencyDispatched,
    LowLatencyHandle,
    Placement,
    handle_type,
)
from epjit.reference import Normal, expert_major
from epjit.runtime.empty import TensorSpec
from epjit.runtime.group import ThreadGroup
from tests.rounds.normal import Round, make_world

DOMAINS = {"one domain": ((0, 1, 2, 3),), "two domains": ((0, 2), (1, 3))}


@pytest.fixture(params=DOMAINS.values(), ids=DOMAINS)
def handles(request: pytest.FixtureRequest) -> list[Handle]:
    """Of four ranks that have one dispatch; 16 experts."""
    world = make_world(Round((5, 0, 9, 2)))
    normal = Normal(request.param)
    return [normal.dispatch(world, rank, num_experts=16).handle for rank in range(4)]


def of(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def wanted(spec: TensorSpec) -> tuple[tuple[int, ...], torch.dtype]:
    return spec[0], spec[2]


def test_specs_are_those_of_a_handle(handles: list[Handle]) -> None:
    for handle in handles:
        specs = type(handle).specs(
            num_tokens=handle.num_tokens,
            num_ranks=handle.num_ranks,
            num_domains=handle.num_domains,
            experts_per_rank=4,
        )
        late = []
        for name, tensor, spec in zip(handle._fields, handle, specs, strict=True):
            if spec is not None:
                assert of(tensor) == wanted(spec), name
            elif name != "is_token_in_rank":
                late.append(tensor)
        sizes = [handle.num_rows]
        if isinstance(handle, InternodeHandle):
            sizes.append(handle.num_passing)
        row_specs = type(handle).row_specs(*sizes)
        assert [of(tensor) for tensor in late] == [wanted(spec) for spec in row_specs]


def test_sizes(handles: list[Handle]) -> None:
    assert [handle.num_tokens for handle in handles] == [5, 0, 9, 2]
    assert {handle.num_ranks for handle in handles} == {4}
    for rank, handle in enumerate(handles):
        assert type(handle) is handle_type(handle.num_domains)
        assert handle.num_received(rank).tolist() == [handle.num_rows]


def test_specs_of_a_placement() -> None:
    idx = torch.tensor([[0, 2], [1, -1], [2, 2]])
    placed = expert_major.place(idx, 3, alignment=4, num_rows=16)
    specs = Placement.specs(num_tokens=3, num_topk=2, num_rows=16, num_experts=3)
    assert [of(tensor) for tensor in placed] == [wanted(spec) for spec in specs]


@pytest.mark.parametrize("kind", [tuple, list, pickle.dumps])
def test_a_caller_may_pass_a_handle_as_v1_has_it(kind: type) -> None:
    """Without names, or after a trip to another process."""
    (group,) = ThreadGroup.create(1)
    buffer = Buffer(None, 1 << 20, comm=group)
    x, idx = torch.arange(8 * 64).view(8, 64).bfloat16(), torch.arange(8)[:, None] % 4
    *layout, _ = buffer.get_dispatch_layout(idx, 4)
    names = ("num_tokens_per_rank", "", "num_tokens_per_expert", "is_token_in_rank")
    given = {name: each for name, each in zip(names, layout, strict=True) if name}
    rows, _, _, _, handle, _ = buffer.dispatch(x, **given)
    assert isinstance(handle, tuple)
    assert len(handle) == 6
    plain = pickle.loads(pickle.dumps(handle)) if kind is pickle.dumps else kind(handle)
    again, *_ = buffer.dispatch(x, handle=plain)
    assert torch.equal(again, rows)
    combined, _, _ = buffer.combine(rows, plain)
    assert torch.equal(combined, x)


def test_low_latency_handle() -> None:
    size = Buffer.get_low_latency_rdma_size_hint(4, 128, 1, 4)
    buffer = Buffer(None, 0, size, low_latency_mode=True, comm=ThreadGroup.create(1)[0])
    x, idx = torch.ones(3, 128).bfloat16(), torch.tensor([[0, 3], [1, -1], [2, 2]])
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 4, 4, use_fp8=False)
    assert isinstance(handle, LowLatencyHandle)
    assert handle[2:] == (4, 128, 4) == (handle.max_tokens, handle.hidden, handle.num_experts)
    assert LowLatencyDispatched._fields[-2:] == LowLatencyHandle._fields[:2]
    weights = torch.ones(3, 2)
    sums = [
        buffer.low_latency_combine(rows, idx, weights, given)[0]
        for given in (handle, tuple(handle), list(handle))  # type: ignore[list-item]
    ]
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    assert sums[0][:, 0].tolist() == [2.0, 1.0, 2.0]
