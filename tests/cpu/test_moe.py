"""`epjit.moe` on the CPU: gradients against the dense layer, compile, checkpoint, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from epjit import Buffer, expert_major, moe
from epjit.runtime.group import ThreadGroup
from tests import moe_bodies
from tests.launch import run


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_eager_against_the_dense_layer(num_ranks: int) -> None:
    run(moe_bodies.eager, num_ranks)


@pytest.mark.parametrize(("backend", "quick"), [("aot_eager", False), ("inductor", True)])
def test_compiled_in_one_graph(backend: str, quick: bool) -> None:
    run(moe_bodies.compiled, 2, backend, quick, timeout=240)


def spoil() -> None:
    """Rows that nothing arrived for are NaN, as they may be on a GPU."""
    real = Buffer.dispatch

    def dispatch(self: Buffer, *args: Any, **kwargs: Any) -> Any:
        rows, *rest = real(self, *args, **kwargs)
        handle: Any = kwargs.get("handle") or rest[3]
        arrived = handle[0][-1, self.rank] if len(handle) == 6 else handle[6][-1]
        rows[int(arrived) :] = torch.nan  # type: ignore[index]
        return rows, *rest

    Buffer.dispatch = dispatch  # type: ignore[method-assign]  # of this process, which ends


def eager_among_nans(group: Any) -> None:
    spoil()
    moe_bodies.eager(group)


def between_domains_among_nans(group: Any) -> None:
    spoil()
    moe_bodies.between_domains(group, 2)


def test_what_did_not_arrive_spoils_no_gradient() -> None:
    run(eager_among_nans, 2)


def test_between_domains() -> None:
    run(between_domains_among_nans, 4)


def checkpointed_and_registered(group: Any) -> None:
    moe_bodies.checkpointed(group)
    moe_bodies.registered(group)


def test_checkpointed_and_a_buffer_of_ones_own() -> None:
    run(checkpointed_and_registered, 2)


def test_compiled_once_for_all_numbers_of_tokens() -> None:
    run(moe_bodies.compiled_once, 2)


def test_exported() -> None:
    run(moe_bodies.exported, 2)


def test_buffers_are_managed() -> None:
    run(moe_bodies.managed, 2)


# ---- one rank, in this process ------------------------------------------------------------------


@pytest.fixture
def name() -> Any:
    """The name of a Buffer of one rank."""
    buffer = Buffer(None, 1 << 20, comm=ThreadGroup.create(1)[0], explicitly_destroy=True)
    name = moe.register_buffer(buffer)
    yield name
    moe.unregister_buffer(name)
    buffer.destroy()


def tensors(requires_grad: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(6, 16).bfloat16().requires_grad_(requires_grad)
    idx = torch.tensor([[0, 2], [1, -1], [3, 1], [-1, -1], [2, 0], [3, 3]])
    weights = torch.rand(6, 2).requires_grad_(requires_grad)
    return x, idx, weights


@pytest.mark.parametrize("worst", [0, 8])
@pytest.mark.parametrize("alignment", [0, 4])
def test_opcheck_of_dispatch(name: str, worst: int, alignment: int) -> None:
    x, idx, weights = tensors()
    opcheck(torch.ops.epjit.dispatch, (x, idx, weights, 4, worst, alignment, 0, 1, name))


def test_opcheck_of_the_other_operators(name: str) -> None:
    x, idx, weights = tensors()
    got = moe.dispatch(x, idx, weights, num_experts=4, group=name, expert_major=True)
    routing, placement = got.handle
    recv = torch.randn(routing[3].shape[0], 16).bfloat16()
    row_of, source, ends, _ = placement
    rows = torch.randn(source.shape[0], 16).bfloat16()
    padded = (*routing, *[None] * 4)
    opcheck(torch.ops.epjit.combine, (recv.requires_grad_(), *padded, name))
    opcheck(torch.ops.epjit.combine_backward, (torch.randn(6, 16).bfloat16(), *padded, name))
    opcheck(
        torch.ops.epjit.dispatch_backward,
        (recv.detach(), torch.rand(recv.shape[0], 2), *padded, name),
    )
    opcheck(torch.ops.epjit.place, (idx, 4, 8, 64))
    opcheck(torch.ops.epjit.permute, (recv.detach().requires_grad_(), row_of, source, ends))
    opcheck(torch.ops.epjit.unpermute, (rows.requires_grad_(), row_of, source, ends))
    opcheck(
        torch.ops.epjit.permute_weights,
        (torch.rand(recv.shape[0], 2).requires_grad_(), row_of, source),
    )


def test_gradcheck_of_permute_and_unpermute() -> None:
    _, idx, _ = tensors()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)

    def layer(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        got = moe.permute(x, idx, weights, num_experts=4, alignment=4)
        return moe.unpermute(got.x.sin() * got.weights[:, None], got.handle)

    assert torch.autograd.gradcheck(layer, (x, weights))
    assert torch.autograd.gradgradcheck(lambda x: layer(x, weights.detach()), (x,)), (
        "each is the other's gradient, twice as well"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_is_the_loop(dtype: torch.dtype) -> None:
    x, weights = torch.randn(24, 16).to(dtype), torch.randn(3, 16, 8).to(dtype)
    ends = torch.tensor([8, 8, 16], dtype=torch.int32)
    got = moe.grouped_mm(x, weights, ends)
    assert torch.allclose(got[:8], x[:8] @ weights[0], atol=0.1)
    assert torch.allclose(got[8:16], x[8:16] @ weights[2], atol=0.1)
    assert got.shape == (24, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"expert_alignment": 0}, "expert_alignment is 0"),
        ({"num_expert_rows": 8}, "num_expert_rows is 8, which needs expert_major=True"),
        ({"num_expert_rows": 8, "expert_major": True}, "and num_worst_tokens"),
    ],
)
def test_dispatch_refuses(name: str, options: dict[str, Any], said: str) -> None:
    x, idx, weights = tensors()
    with pytest.raises(ValueError, match=said):
        moe.dispatch(x, idx, weights, num_experts=4, group=name, **options)


def test_rows_that_do_not_fit_are_dropped_and_told(name: str) -> None:
    x, idx, weights = tensors(requires_grad=False)
    got = moe.dispatch(
        x,
        idx,
        weights,
        num_experts=4,
        group=name,
        num_worst_tokens=8,
        expert_major=True,
        num_expert_rows=4,
    )
    assert got.x.shape[0] == 4
    assert got.ends.tolist() == [2, 4, 4, 4]
    assert got.tokens_per_expert.tolist() == [2, 2, 2, 3]


def test_import_does_not_touch_cuda() -> None:
    assert expert_major.row_bound(10, 8, 4, 16) == 144
    assert not torch.cuda.is_initialized()


def test_a_token_that_names_an_expert_twice_loses_no_row() -> None:
    """Also where the sizes are static, and there are fewer experts than choices."""
    x = torch.ones((3, 16), dtype=torch.bfloat16)
    idx, weights = torch.zeros((3, 2), dtype=torch.int64), torch.full((3, 2), 0.5)
    rows = moe.permute(x, idx, weights, num_experts=1)
    total = moe.unpermute(rows.x * rows.weights[:, None].to(x.dtype), rows.handle)
    assert torch.equal(total, x)


def test_mistakes_of_callers() -> None:
    x = torch.ones((3, 16), dtype=torch.bfloat16)
    idx, weights = torch.zeros((4, 2), dtype=torch.int64), torch.full((4, 2), 0.5)
    with pytest.raises(
        ValueError, match=r"x has shape \(3, 16\), expected \(4, hidden\): one row for each"
    ):
        moe.permute(x, idx, weights, num_experts=1)
    rows = moe.permute(torch.ones((4, 16), dtype=torch.bfloat16), idx, weights, num_experts=1)
    with pytest.raises(
        ValueError, match=r"x has shape \(3, 16\), expected \(8, hidden\): the rows by expert"
    ):
        moe.unpermute(rows.x[:3], rows.handle)
    with pytest.raises(ValueError, match="group is None"):
        moe.dispatch(x, idx[:3], weights[:3], num_experts=1, group=None)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"handle is a NoneType, expected the \.handle"):
        moe.combine(x, None, group="nobody")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expert_alignment is 16, which needs expert_major"):
        moe.dispatch(x, idx[:3], weights[:3], num_experts=1, group="nobody", expert_alignment=16)
