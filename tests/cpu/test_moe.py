"""`epjit.moe` on the CPU: gradients against the dense layer, compile, checkpoint, export."""

from __future__ import annotations

import itertools
import logging
import re
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from epjit import Buffer, moe
from epjit.formats import CASTS, FP8_ROW, MXFP8, dequantize
from epjit.handles import handle_type, row_bound
from epjit.modes import expert_major
from epjit.moe import scaled
from epjit.reference.low_latency import encode
from epjit.runtime.group import ThreadGroup
from tests.harness.launch import run
from tests.scenarios import moe as scenarios


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_eager_against_the_dense_layer(num_ranks: int) -> None:
    run(scenarios.eager, num_ranks)


@pytest.mark.parametrize(("backend", "quick"), [("aot_eager", False), ("inductor", True)])
def test_compiled_in_one_graph(backend: str, quick: bool) -> None:
    run(scenarios.compiled, 2, backend, quick, timeout=240)


def spoil() -> None:
    """Rows that nothing arrived for or that no expert has are NaN, as they may be on a GPU."""
    real, real_permute, real_grouped_mm = Buffer.dispatch, expert_major.permute, F.grouped_mm
    real_expert_dispatch = Buffer.expert_dispatch

    def dispatch(self: Buffer, *args: Any, **kwargs: Any) -> Any:
        rows, *rest = real(self, *args, **kwargs)
        handle: Any = kwargs.get("handle") or rest[3]
        kind = handle_type(self.runtime.get_num_rdma_ranks())
        rows[int(kind(*handle).num_received(self.rank)) :] = torch.nan  # type: ignore[index]
        return rows, *rest

    def expert_dispatch(self: Buffer, *args: Any, **kwargs: Any) -> Any:
        rows, weights, handle, event = real_expert_dispatch(self, *args, **kwargs)
        if isinstance(rows, torch.Tensor):  # rows that were cast have no gradient
            rows[int(handle.placement.ends[-1]) :] = torch.nan
        return rows, weights, handle, event

    def permute(x: Any, row_of: Any, source: Any, ends: Any) -> Any:
        rows = real_permute(x, row_of, source, ends)
        rows[int(ends[-1]) :] = torch.nan
        return rows

    def grouped_mm(x: Any, weights: Any, *, offs: Any) -> Any:
        rows = real_grouped_mm(x, weights, offs=offs)
        if weights.dim() == 3:
            rows[int(offs[-1]) :] = torch.nan
        return rows

    # Of this process, which ends.
    Buffer.dispatch = dispatch  # type: ignore[method-assign]
    Buffer.expert_dispatch = expert_dispatch  # type: ignore[method-assign]
    expert_major.permute, F.grouped_mm = permute, grouped_mm


def watched_among_nans(group: Any) -> None:
    spoil()
    scenarios.watched(group)


def between_domains_among_nans(group: Any) -> None:
    spoil()
    scenarios.between_domains(group, 2)


def test_what_did_not_arrive_spoils_no_gradient() -> None:
    run(watched_among_nans, 2)


def test_between_domains() -> None:
    run(between_domains_among_nans, 4)


def checkpointed_and_registered(group: Any) -> None:
    scenarios.checkpointed(group)
    scenarios.registered(group)


def test_rows_and_gradients_at_odd_addresses() -> None:
    run(scenarios.odd_addresses, 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool) -> None:
    run(scenarios.autocasted, 2, compiled, timeout=240)


def test_worst_tokens() -> None:
    run(scenarios.agreed, 3)


def test_checkpointed_and_a_buffer_of_ones_own() -> None:
    run(checkpointed_and_registered, 2)


def test_compiled_once_for_all_numbers_of_tokens() -> None:
    run(scenarios.compiled_once, 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_pass_casts(compiled: bool) -> None:
    run(scenarios.straight_through, 2, compiled, timeout=240)


def test_exported() -> None:
    run(scenarios.exported, 2)


def test_inferred() -> None:
    run(scenarios.inferred, 2)


def test_every_cast_beside_the_dense_layer() -> None:
    run(scenarios.cast_on_the_way, 2, timeout=240)


def test_trained_in_fp8() -> None:
    run(scenarios.trained_in_fp8, 2, timeout=240)


def test_buffers_are_managed() -> None:
    run(scenarios.managed, 2)


def test_what_a_graph_captured_outlives_its_successor() -> None:
    run(scenarios.outgrown, 2)


def told_of_growth(group: Any) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("epjit")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    for hidden_bytes in (64, 64, 14336):
        moe.get_buffer(group, hidden_bytes)
    moe.free_buffers()
    return said


def test_growth_is_logged() -> None:
    for rank, said in enumerate(run(told_of_growth, 2)):
        assert len(said) == 2
        assert re.fullmatch(
            rf"made the Buffer of group '\w+': rank {rank} of 2, rows of 64 bytes, .*", said[0]
        )
        assert re.fullmatch(
            r"grew the Buffer of .* rows of 14336 bytes, num_nvl_bytes=\d+, .*", said[1]
        )


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
def test_opcheck_of_dispatch(name: str, worst: int) -> None:
    x, idx, weights = tensors()
    opcheck(torch.ops.epjit.dispatch, (x, idx, weights, 4, worst, None, None, 1, name))


@pytest.mark.parametrize("worst", [0, 8])
def test_opcheck_of_dispatch_by_expert(name: str, worst: int) -> None:
    x, idx, weights = tensors()
    more = (True, worst > 0, None, None, False, 1, name)
    opcheck(torch.ops.epjit.expert_dispatch, (x, idx, weights, 4, worst, 4, 0, *more))


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("worst", [0, 8])
def test_rows_are_cast_on_the_way(name: str, cast: str, worst: int) -> None:
    hidden = CASTS[cast].granularity * 4
    _, idx, weights = tensors(requires_grad=False)
    x = torch.randn(6, hidden).bfloat16()
    scale = torch.tensor([0.5]) if cast == "nvfp4" else None
    by_column = cast.startswith("fp8")  # of 4 bytes
    sizes = {"num_worst_tokens": worst, "expert_alignment": 4}
    options = {"cast": cast, "global_scale": scale, "column_major_scales": by_column}
    with torch.no_grad():
        got = moe.dispatch(
            x, idx, weights, num_experts=4, group=name, expert_major=True, **sizes, **options
        )
    wanted, wanted_scales = encode(x, CASTS[cast], scale)
    assert got.scales is not None
    source = got.handle.placement.source
    tokens = got.handle.routing.recv_src_idx[source[source >= 0].long() // 2].long()
    mine, theirs = (each.view(torch.uint8) for each in (got.x, wanted))
    assert torch.equal(mine[source >= 0], theirs[tokens])
    assert got.scales.dtype == wanted_scales.dtype
    assert got.scales.stride(0) == (1 if by_column else wanted_scales.shape[1])
    for row, token in zip((source >= 0).nonzero().flatten(), tokens, strict=True):
        assert got.scales[row].tolist() == wanted_scales[token].tolist()
    more = (True, False, cast, scale, by_column, 1, name)
    opcheck(
        torch.ops.epjit.expert_dispatch,
        (x, idx, weights, 4, worst, 4, 0, *more),
        test_utils=("test_schema", "test_faketensor"),
    )
    # Not all of it, which multiplies such rows, or adds them up.
    quick = {"test_utils": ("test_autograd_registration", "test_faketensor")}
    leaves = x.requires_grad_(), idx, weights.requires_grad_()
    opcheck(torch.ops.epjit.dispatch, (*leaves, 4, worst, cast, scale, 1, name), **quick)
    values = torch.randn(6, hidden).bfloat16().requires_grad_()
    opcheck(torch.ops.epjit.dequantize, (wanted, wanted_scales, scale, values), **quick)
    for changes, said in (
        ({"cast": "int8"}, "cast is 'int8'"),
        (
            {"expert_major": False, "expert_alignment": 1, "column_major_scales": True},
            "column_major_scales=True needs expert_major",
        ),
    ):
        given = {"x": x.detach(), "expert_major": True, **sizes, **options, **changes}
        with pytest.raises(ValueError, match=said):
            moe.dispatch(given.pop("x"), idx, weights, num_experts=4, group=name, **given)


@pytest.mark.parametrize("expert_major", [False, True])
def test_a_gradient_that_would_be_rounded_is_refused(name: str, expert_major: bool) -> None:
    """Autograd would cast what rows of one byte get to their dtype."""
    x, (_, idx, weights) = torch.randn(6, 256).bfloat16().requires_grad_(), tensors()
    options: Any = {"num_experts": 4, "group": name, "expert_major": expert_major}
    got = moe.dispatch(x, idx, weights, cast="fp8", **options)
    by_hand = (got.x.float().unflatten(1, (2, 128)) * got.scales[:, :, None]).flatten(1)
    with pytest.raises(RuntimeError, match=r"cast to fp8, .*epjit\.moe\.dequantize"):
        by_hand.sum().backward()
    with pytest.raises(TypeError, match="were not cast"):
        moe.dequantize(moe.dispatch(x, idx, weights, **options))


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
    by_expert = (row_of, source, ends, *padded, name)
    factors = torch.rand(source.shape[0])
    for given in (None, factors.clone().requires_grad_()):
        opcheck(torch.ops.epjit.expert_combine, (rows.clone().requires_grad_(), given, *by_expert))
    sums = torch.randn(6, 16).bfloat16()
    opcheck(torch.ops.epjit.expert_combine_backward, (sums, rows, factors, *by_expert))
    opcheck(torch.ops.epjit.expert_dispatch_backward, (rows, factors, *by_expert))
    opcheck(torch.ops.epjit.place, (idx, 4, 8, 64))
    for blank in (False, True):
        leaf = recv.detach().requires_grad_()
        opcheck(torch.ops.epjit.permute, (leaf, row_of, source, ends, blank))
    opcheck(torch.ops.epjit.unpermute, (rows.requires_grad_(), row_of, source, ends))
    experts = torch.randn(4, 16, 8).bfloat16().requires_grad_()
    opcheck(torch.ops.epjit.grouped_mm, (rows, experts, ends, True))
    opcheck(torch.ops.epjit.grouped_mm_of_rows, (rows, rows.detach(), ends))
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
    assert torch.equal(got[16:], torch.zeros(8, 8).to(dtype))


def test_gradcheck_of_grouped_mm() -> None:
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([3, 3, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(moe.grouped_mm, (x, weights, ends))
    assert torch.autograd.gradgradcheck(moe.grouped_mm, (x, weights, ends))


def test_grouped_mm_takes_any_gradient_and_matrices_transposed() -> None:
    ends = torch.tensor([8, 8, 16], dtype=torch.int32)
    wanted, got = [], []
    for dtype, found in ((torch.float64, wanted), (torch.bfloat16, got)):
        torch.manual_seed(0)
        x = torch.randn(24, 16).to(dtype).requires_grad_()
        weights = torch.randn(3, 8, 16).to(dtype).requires_grad_()
        with torch.autograd.detect_anomaly(check_nan=True):
            moe.grouped_mm(x, weights.transpose(1, 2), ends).sum().backward()
        found += [x.grad, weights.grad]
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(mine.double(), theirs, atol=0.3)
    assert torch.equal(got[0][16:], torch.zeros(8, 16).bfloat16())


def scaled_matrices(cast: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, or matrices that lie transposed, and their scales."""
    values, scales = encode(torch.randn(shape).flatten(0, -2).bfloat16(), CASTS[cast])
    assert scales is not None
    return values.view(shape), scales.view(*shape[:-1], -1)


@pytest.mark.parametrize("cast", ["fp8_row", "mxfp8"])
def test_grouped_mm_of_rows_with_scales_is_that_of_their_values(cast: str) -> None:
    step = 128 if cast == "mxfp8" else 3
    ends = torch.tensor([step, step, 3 * step], dtype=torch.int32)
    x, scales = scaled_matrices(cast, 3 * step + 2, 128)
    weights, of_weights = scaled_matrices(cast, 3, 32, 128)
    given = (x, weights.transpose(1, 2), ends)
    got = moe.grouped_mm(*given, scales=scales, weight_scales=of_weights)
    rows, matrices = dequantize(x, scales), dequantize(weights, of_weights)
    wanted = torch.cat([rows[:step] @ matrices[0].t(), rows[step : 3 * step] @ matrices[2].t()])
    assert torch.equal(got[: 3 * step], wanted.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = moe.grouped_mm(*given, scales=scales, weight_scales=of_weights)
    assert torch.equal(again, got)
    assert got.shape == (len(x), 32)
    only = ("test_faketensor",)  # torch multiplies no FP8 on the CPU, as other utilities do
    opcheck(
        torch.ops.epjit.scaled_grouped_mm,
        (*given, scales, of_weights, None, None, False),
        test_utils=only,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["fp8_row", "mxfp8"])
def test_gradients_of_rows_with_scales_are_those_of_their_values(
    cast: str, dtype: torch.dtype
) -> None:
    """The stand-ins hold nothing; behind the last expert's rows there are zeros, or anything."""
    step = 128 if cast == "mxfp8" else 3
    ends = torch.tensor([step, step, 3 * step], dtype=torch.int32)
    x, scales = scaled_matrices(cast, 3 * step + 2, 128)
    weights, of_weights = scaled_matrices(cast, 3, 32, 128)
    scales.view(torch.uint8)[3 * step :] = 0xFF
    values = torch.full((3 * step + 2, 128), torch.nan, dtype=dtype, requires_grad=True)
    matrices = torch.full((3, 128, 32), torch.nan, dtype=dtype, requires_grad=True)
    got = moe.grouped_mm(
        *(x, weights.mT, ends),
        scales=scales,
        weight_scales=of_weights,
        values=values,
        weight_values=matrices,
    )
    grad = torch.randn(got.shape).bfloat16()
    got.backward(grad)
    rows = dequantize(x, scales, dtype=torch.bfloat16).requires_grad_()
    of_values = dequantize(weights, of_weights, dtype=torch.bfloat16).mT.requires_grad_()
    wanted = moe.grouped_mm(rows, of_values, ends)
    wanted.backward(grad)
    assert torch.equal(got[3 * step :], torch.zeros(2, 32).bfloat16())
    for mine, theirs in ((values, rows), (matrices, of_values)):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad.to(dtype))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"scales": None}, ValueError, "^scales are missing"),
        ({"weight_scales": None}, ValueError, "^weight_scales are missing"),
        ({"scales": torch.ones(9, 2)}, ValueError, r"\(sm_100\)\. epjit\.formats\.dequantize"),
        ({"scales": torch.ones(8, 1)}, ValueError, r"scales has shape \(8, 1\), expected \(9, 1\)"),
        (
            {"weight_scales": torch.ones(3, 8)},
            ValueError,
            r"expected \(3, 32, 1\): scales in fp8_row",
        ),
        ({"weights": torch.ones(3, 256, 32)}, TypeError, "weights"),
        ({"scales": torch.ones(9, 1).requires_grad_()}, ValueError, "^values are missing: a grad"),
        ({"weight_scales": torch.ones(3, 32, 1).requires_grad_()}, ValueError, "^weight_values ar"),
        (
            {"values": torch.ones(9, 128)},
            ValueError,
            r"values has shape \(9, 128\), expected",
        ),
        ({"weight_values": torch.ones(3, 256, 32).double()}, TypeError, "^weight_values"),
        ({"flip": True}, ValueError, r"pass \.transpose\(1, 2\)"),
        ({"columns": 8}, ValueError, "multiples of 16"),
        ({"cast": "mxfp8"}, ValueError, "dispatch with expert_alignment=128"),
    ],
)
def test_grouped_mm_refuses(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    cast, columns = changes.get("cast", "fp8_row"), changes.get("columns", 32)
    x, scales = scaled_matrices(cast, 9, 256)
    weights, of_weights = scaled_matrices(cast, 3, columns, 256)
    weights = weights.transpose(1, 2)
    given = {"x": x, "weights": weights, "scales": scales, "weight_scales": of_weights, **changes}
    if "flip" in changes:
        given["weights"] = weights.contiguous()
    with pytest.raises(error, match=said):
        moe.grouped_mm(
            given["x"],
            given["weights"],
            torch.tensor([3, 3, 9], dtype=torch.int32),
            scales=given["scales"],
            weight_scales=given["weight_scales"],
            values=given.get("values"),
            weight_values=given.get("weight_values"),
        )


def test_a_gpu_without_the_product_says_what_to_do() -> None:
    device = torch.device("cuda:0")
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)):
        scaled.check_product(FP8_ROW, device)
        with pytest.raises(RuntimeError, match=r"mxfp8 from 2\.10 on, on sm_100, but .* on sm_90"):
            scaled.check_product(MXFP8, device)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(12, 0)):
        with pytest.raises(RuntimeError, match=r"on sm_90 and sm_100, .* sm_120\. .*dequantize"):
            scaled.check_product(FP8_ROW, device)


def test_scales_in_the_tiles_of_tensor_cores() -> None:
    """Byte by byte as cuBLAS describes them: row r of a tile at 16 (r % 32) + 4 (r / 32)."""
    scales = torch.randint(1, 255, (2, 200, 7), dtype=torch.uint8)
    got = scaled.tiles(scales.view(torch.float8_e8m0fnu)).view(torch.uint8)
    assert got.shape == (2, 2 * 2 * 512)
    wanted = torch.zeros_like(got)
    for row, block in itertools.product(range(200), range(7)):
        tile = row // 128 * 2 + block // 4
        at = 512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + block % 4
        wanted[:, at] = scales[:, row, block]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"expert_alignment": 0}, "expert_alignment is 0"),
        ({"num_worst_tokens": -1}, "num_worst_tokens is -1"),
        ({"num_expert_rows": 8}, "num_expert_rows is 8, which needs expert_major=True"),
        ({"num_expert_rows": 8, "expert_major": True}, "and num_worst_tokens"),
    ],
)
def test_dispatch_refuses(name: str, options: dict[str, Any], said: str) -> None:
    x, idx, weights = tensors()
    with pytest.raises(ValueError, match=said):
        moe.dispatch(x, idx, weights, num_experts=4, group=name, **options)


def test_numbers_of_other_kinds(name: str) -> None:
    x, idx, weights = tensors()
    got = moe.dispatch(
        x,
        idx,
        weights,
        num_experts=np.int32(4),  # type: ignore[arg-type]
        group=name,
        num_worst_tokens=torch.tensor(8),  # type: ignore[arg-type]
        expert_major=True,
        expert_alignment=np.int64(4),  # type: ignore[arg-type]
    )
    assert got.x.shape[0] == row_bound(8, 2, 4, 4)
    for option in ("num_worst_tokens", "expert_alignment", "num_expert_rows"):
        with pytest.raises(TypeError, match=rf"{option} is 2\.5, a float, but must be an int"):
            moe.dispatch(
                x, idx, weights, num_experts=4, group=name, expert_major=True, **{option: 2.5}
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_rows_that_cannot_come_back_are_refused_at_once(
    name: str, dtype: torch.dtype, needs_grad: bool
) -> None:
    x, idx, weights = tensors(requires_grad=False)
    weights.requires_grad_(needs_grad)
    with pytest.raises(TypeError, match=rf"x has dtype {dtype}, but what comes back is summed in"):
        moe.dispatch(x.to(dtype), idx, weights, num_experts=4, group=name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("by_expert", [False, True])
def test_rows_of_one_byte_travel_without_gradients(
    name: str, dtype: torch.dtype, by_expert: bool
) -> None:
    x, idx, weights = tensors(requires_grad=False)
    x = (8 * x).to(dtype)
    got = moe.dispatch(  # type: ignore[call-overload]
        x, idx, weights, num_experts=4, group=name, expert_major=by_expert
    )
    rows = got.x.view(torch.uint8)
    wanted = x.view(torch.uint8)
    order = [0, 1, 2, 4, 5] if not by_expert else [0, 4, 1, 2, 0, 4, 2, 5, 5]
    assert torch.equal(rows, wanted[order])
    weights.requires_grad_()
    with pytest.raises(TypeError, match=rf"x has dtype {dtype}, but"):
        moe.dispatch(x, idx, weights, num_experts=4, group=name)
    with torch.no_grad():
        moe.dispatch(x, idx, weights, num_experts=4, group=name)


def test_received_rows_can_be_written_to(name: str) -> None:
    x, idx, weights = tensors()
    for by_expert in (False, True):
        got = moe.dispatch(  # type: ignore[call-overload]
            x, idx, weights, num_experts=4, group=name, expert_major=by_expert
        )
        out = moe.combine(got.x.mul_(2), got.handle, group=name).add_(1)
        out.sum().backward()


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


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_of_torch_func_are_refused(name: str, transform: Any) -> None:
    """Also where nothing would fail: a jvp would silently be zero."""
    x, idx, weights = tensors(requires_grad=False)

    def sent(x: torch.Tensor) -> torch.Tensor:
        return moe.dispatch(x, idx, weights, num_experts=4, group=name).x.float().sum()

    def ordered(x: torch.Tensor) -> torch.Tensor:
        return moe.permute(x, idx, weights, num_experts=4).x.float().sum()

    for layer in (sent, ordered):
        with pytest.raises(ValueError, match=r"a transform of torch\.func"):
            transform(layer)(x if transform is torch.func.grad else torch.stack([x, x]))
        with pytest.raises(ValueError, match=r"a transform of torch\.func"):
            torch.func.jvp(layer, (x,), (x,))


def test_layer_of_shapes_alone(name: str) -> None:
    """Sizes that only the run knows are symbols for fake tensors, in the backward too."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        x, idx, weights = tensors()
        got = moe.dispatch(x, idx, weights, num_experts=4, group=name, expert_major=True)
        y = moe.grouped_mm(got.x, torch.randn(4, 16, 16).bfloat16(), got.ends)
        out = moe.combine(y * got.weights[:, None].bfloat16(), got.handle, group=name)
        if torch.__version__ >= "2.11":  # the engine of 2.10 wants to know how many rows there are
            out.sum().backward()
            assert weights.grad is not None
    x, idx, weights = (torch.empty_like(each, device="meta") for each in tensors())
    got = moe.dispatch(
        x, idx, weights, num_experts=4, group=name, expert_major=True, num_worst_tokens=6
    )
    assert got.x.shape == (12, 16)
    assert got.x.is_meta


def test_import_does_not_touch_cuda() -> None:
    assert row_bound(10, 8, 4, 16) == 144
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
    with pytest.raises(TypeError, match=r"x is a tuple, .* by Buffer\.dispatch"):
        moe.dispatch((x, x), idx[:3], weights[:3], num_experts=1, group="a")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"x has shape \(16,\), expected \(number of rows, hidden"):
        moe.dispatch(x[0], idx[:3], weights[:3], num_experts=1, group="a")
    with pytest.raises(ValueError, match="group is None"):
        moe.dispatch(x, idx[:3], weights[:3], num_experts=1, group=None)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"handle is a NoneType, expected the \.handle"):
        moe.combine(x, None, group="nobody")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expert_alignment is 16, which needs expert_major"):
        moe.dispatch(x, idx[:3], weights[:3], num_experts=1, group="nobody", expert_alignment=16)
