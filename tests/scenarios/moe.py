"""Scenarios of tests/cpu/test_moe.py (and of tests/dist): layers against a dense one."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from epjit import Buffer, env, moe
from epjit.formats import CASTS, NVFP4, dequantize
from epjit.moe import buffers
from epjit.reference.low_latency import encode
from tests.harness import launch

HIDDEN, EXPERTS_A_RANK, TOPK = 32, 3, 2
# bfloat16 has 8 significant bits; a result is rounded about six times on its way, a gradient twice
# as often. A lost or misplaced row errs by about 1, relative to the length of a row.
TOLERANCE = 2.0**-5
# Of rows that were cast, to 4 significant bits or 2; measured were 0.08 and 0.19.
OF_E4M3, OF_E2M1 = 0.2, 0.4


def device_of(group: Any) -> torch.device:
    """The GPU of this rank, if there is one; made current."""
    if not torch.cuda.is_available() or env.backend() == "cpu":
        return torch.device("cpu")
    return launch.take_gpu(group.rank(), group.size())


class Case:
    """One rank's tokens, the experts of all ranks, and what the dense layer gives."""

    def __init__(
        self,
        group: Any,
        num_tokens: int,
        *,
        seed: int = 0,
        holes: bool = True,
        hidden: int = HIDDEN,
    ) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.device = device_of(group)
        self.num_experts = EXPERTS_A_RANK * self.size
        generator = torch.Generator().manual_seed(100 * seed + self.rank)
        everywhere = torch.Generator().manual_seed(seed)
        shape = (self.num_experts, hidden, hidden)
        weights = torch.randn(shape, generator=everywhere) * hidden**-0.5
        self.all_experts = weights.bfloat16().float()
        x = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
        self.grad_out = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
        probabilities = torch.rand(num_tokens, self.num_experts, generator=generator)
        topk_weights, self.topk_idx = probabilities.topk(TOPK, dim=1)
        if holes:
            hole = torch.rand(self.topk_idx.shape, generator=generator) < 0.2
            self.topk_idx = self.topk_idx.masked_fill(hole, -1)
        self.topk_idx = self.topk_idx.to(self.device)
        self.grad_out = self.grad_out.to(self.device)
        self.x = x.to(self.device).requires_grad_()
        self.topk_weights = topk_weights.to(self.device).requires_grad_()
        mine = weights[self.rank * EXPERTS_A_RANK :][:EXPERTS_A_RANK].bfloat16()
        self.experts = mine.to(self.device).requires_grad_()

    def dense(self) -> dict[str, Tensor]:
        """The same layer with all experts here, in float32."""
        x = self.x.detach().cpu().float().requires_grad_()
        topk_weights = self.topk_weights.detach().cpu().requires_grad_()
        experts = self.all_experts.clone().requires_grad_()
        # Depends on everything, also when there are no tokens.
        out = x * 0 + (topk_weights.sum() + experts.sum()) * 0
        for token, column in torch.nonzero(self.topk_idx.cpu() >= 0).tolist():
            expert = int(self.topk_idx[token, column])
            row = (x[token] @ experts[expert]).tanh() * topk_weights[token, column]
            out = out.index_add(0, torch.tensor([token]), row[None])
        out.backward(self.grad_out.cpu().float())
        assert experts.grad is not None
        dist.all_reduce(experts.grad, group=self.group)
        first = self.rank * EXPERTS_A_RANK
        found = {
            "output": out.detach(),
            "grad of x": x.grad,
            "grad of weights": topk_weights.grad,
            "grad of experts": experts.grad[first : first + EXPERTS_A_RANK].flatten(1),
        }
        return {name: value for name, value in found.items() if value is not None}

    def check(
        self, layer: Callable[..., Tensor], *, tolerance: float = TOLERANCE, **options: Any
    ) -> None:
        """Runs a layer forward and backward and compares everything with the dense one."""
        for tensor in (self.x, self.topk_weights, self.experts):
            tensor.grad = None
        out = layer(self.x, self.topk_idx, self.topk_weights, self.experts, **options)
        out.backward(self.grad_out)
        got = {
            "output": out.detach(),
            "grad of x": self.x.grad,
            "grad of weights": self.topk_weights.grad,
            "grad of experts": None if self.experts.grad is None else self.experts.grad.flatten(1),
        }
        for name, wanted in self.dense().items():
            value = got[name]
            assert value is not None, name
            length = wanted.norm(dim=1)
            typical = float(length.square().mean().sqrt()) if length.numel() else 0.0
            distance = (value.cpu().float() - wanted).norm(dim=1)
            error = (distance / length.clamp(min=typical or 1.0)).max() if length.numel() else 0.0
            assert float(error) < tolerance, f"rank {self.rank}: {name}: {float(error)}"


def row_major(case: Case, **options: Any) -> Callable[..., Tensor]:
    """Rows as they arrive; each expert picks its own."""

    def layer(x: Tensor, idx: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        got = moe.dispatch(
            x, idx, weights, num_experts=case.num_experts, group=case.group, **options
        )
        y = torch.zeros(got.x.shape, dtype=torch.float32, device=x.device)
        for expert in range(EXPERTS_A_RANK):
            here = got.topk_idx == expert
            # Rows that nothing arrived for hold anything: where(), not a product with zero.
            rows = torch.where(here.any(1, keepdim=True), got.x, 0)
            weight = torch.where(here, got.topk_weights, 0).sum(1, keepdim=True)
            y = y + (rows @ experts[expert]).tanh().float() * weight
        return moe.combine(y.to(x.dtype), got.handle, group=case.group)

    return layer


def by_expert(case: Case, *, weighted: bool = False, **options: Any) -> Callable[..., Tensor]:
    """Rows by expert, one grouped product; with `weighted`, combine multiplies the rows."""
    name = case.group.group_name

    def layer(x: Tensor, idx: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        got = moe.dispatch(
            x,
            idx,
            weights,
            num_experts=case.num_experts,
            group=name,
            expert_major=True,
            expert_alignment=8,
            **options,
        )
        y = moe.grouped_mm(got.x, experts, got.ends).tanh()
        if weighted:
            return moe.combine(y, got.handle, weights=got.weights, group=name)
        return moe.combine((y * got.weights[:, None]).to(x.dtype), got.handle, group=name)

    return layer


weighted_by_expert = functools.partial(by_expert, weighted=True)


def eager(group: Any) -> None:
    """Both orders of the layer's rows; a rank without tokens."""
    for seed, tokens in enumerate((9, 0 if group.rank() == 0 else 5)):
        case = Case(group, tokens, seed=seed)
        worst = 9 * case.size
        for options in ({}, {"num_worst_tokens": worst}):
            case.check(row_major(case, **options))
            for weighted in (False, True):
                case.check(by_expert(case, weighted=weighted, **options))
        case.check(by_expert(case, num_worst_tokens=worst, num_expert_rows=worst * TOPK + 24))

    as_megatron(group)
    moe.free_buffers()


def watched(group: Any) -> None:
    """As `eager`, where torch looks for NaN in every gradient and new memory is full of them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        eager(group)
    torch.use_deterministic_algorithms(False)


def at_odd_address(x: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16, and so arrives its gradient."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def odd_addresses(group: Any) -> None:
    """Rows, and gradients of rows, at addresses that the kernels do not take."""
    case = Case(group, 9)

    def layer(x: Tensor, idx: Tensor, weights: Tensor, experts: Tensor, order: str) -> Tensor:
        options: dict[str, Any] = {"num_experts": case.num_experts, "group": group}
        x = at_odd_address(x)
        if order == "expert_major":
            got: Any = moe.dispatch(x, idx, weights, expert_major=True, **options)
            handle = got.handle
        else:
            sent = moe.dispatch(x, idx, weights, **options)
            of_choices = (sent.topk_idx, at_odd_address(sent.topk_weights))
            got = moe.permute(at_odd_address(sent.x), *of_choices, num_experts=EXPERTS_A_RANK)
            handle = sent.handle
        y = moe.grouped_mm(at_odd_address(got.x), at_odd_address(experts), got.ends).tanh()
        y = at_odd_address((y * at_odd_address(got.weights)[:, None]).to(x.dtype))
        if order != "expert_major":
            y = at_odd_address(moe.unpermute(y, got.handle))
        return at_odd_address(moe.combine(y, handle, group=group))

    case.check(layer, order="expert_major")
    case.check(layer, order="permute")
    # Expanded gradients, as sum() gives them.
    out = moe.dispatch(
        case.x, case.topk_idx, case.topk_weights, num_experts=case.num_experts, group=group
    )
    out.x.sum().backward()
    moe.combine(out.x.detach().requires_grad_(), out.handle, group=group).sum().backward()
    moe.free_buffers()


def autocasted(group: Any, compiled: bool) -> None:
    """float32 tokens and experts under torch.autocast, as of any layer of torch's."""
    case = Case(group, 9)
    case.x = case.x.detach().float().requires_grad_()
    case.experts = case.experts.detach().float().requires_grad_()
    worst = {"num_worst_tokens": 9 * case.size}

    def under(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inner(*tensors: Tensor) -> Tensor:
            with torch.autocast(case.device.type, dtype=torch.bfloat16):
                out = layer(*tensors)
            assert out.dtype is torch.bfloat16
            return out

        return inner

    layer = by_expert(case, **worst)
    if compiled:
        inside = torch.compile(under(layer), fullgraph=True, backend="aot_eager")
        outside = under(torch.compile(layer, fullgraph=True, backend="aot_eager"))
        case.check(inside)
        case.check(outside)
    else:
        case.check(under(layer))
        case.check(under(row_major(case)))
        with pytest.raises(TypeError, match=r"x has dtype torch\.float32, but what comes back"):
            layer(case.x, case.topk_idx, case.topk_weights, case.experts)
    assert case.x.grad is not None
    assert case.x.grad.dtype is torch.float32
    moe.free_buffers()


def straight_through(group: Any, compiled: bool) -> None:
    """Rows that are cast on the way: all is as if their values had been sent, gradients too."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    case, hidden = Case(group, 9), 512
    generator = torch.Generator().manual_seed(case.rank)
    drawn = torch.randn(2, 9, hidden, generator=generator).bfloat16().to(case.device)
    worst = 9 * case.size
    some = (("fp8", False, worst), ("nvfp4", True, worst), ("mxfp8", True, 0))
    every = itertools.product(CASTS, (False, True), (0, worst))
    for cast, expert_major, num_worst in some if compiled else every:
        scale = torch.tensor([0.5], device=case.device) if cast == NVFP4.name else None
        rows, scales = encode(drawn[0].cpu(), CASTS[cast], None if scale is None else scale.cpu())
        values = dequantize(
            rows,
            scales,
            global_scale=None if scale is None else scale.cpu(),
            dtype=torch.bfloat16,
        )

        def layer(
            x: Tensor,
            weights: Tensor,
            cast: str | None,
            scale: Tensor | None,
            by: Any = (expert_major, num_worst),
        ) -> Tensor:
            got: Any = moe.dispatch(
                *(x, case.topk_idx, weights),
                num_experts=case.num_experts,
                group=group.group_name,
                num_worst_tokens=by[1],
                expert_major=by[0],
                cast=cast,
                global_scale=scale,
            )
            y = got.x if cast is None else moe.dequantize(got, global_scale=scale)
            if by[0]:
                return moe.combine(y, got.handle, weights=got.weights, group=group.group_name)
            y = y * got.topk_weights.sum(1, keepdim=True).to(y.dtype)
            return moe.combine(y, got.handle, group=group.group_name)

        found = []
        if compiled:
            torch._dynamo.reset()
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        for x, options in ((values.to(case.device), (None, None)), (drawn[0], (cast, scale))):
            leaves = x.clone().requires_grad_(), case.topk_weights.detach().clone().requires_grad_()
            out = run(*leaves, *options)
            out.backward(drawn[1])
            found.append((out.detach(), *(each.grad for each in leaves)))
        for name, want, got in zip(("output", "of x", "of weights"), *found, strict=True):
            assert torch.equal(want, got), (cast, expert_major, num_worst, name)
    moe.free_buffers()


def cast_on_the_way(group: Any) -> None:
    """A layer of every cast beside the dense one: both orders of rows, and computed twice."""
    for seed, cast in enumerate(CASTS):
        case = Case(group, 9, seed=seed, hidden=512)
        scale = torch.tensor([0.5], device=case.device) if cast == NVFP4.name else None
        static = {"num_worst_tokens": 9 * case.size} if seed % 2 else {}

        def layer(
            x: Tensor,
            idx: Tensor,
            weights: Tensor,
            experts: Tensor,
            of: Any = (case, cast, scale, static),
        ) -> Tensor:
            case, cast, scale, static = of
            got = moe.dispatch(
                *(x, idx, weights),
                num_experts=case.num_experts,
                group=case.group,
                expert_major=True,
                expert_alignment=8,
                cast=cast,
                global_scale=scale,
                **static,
            )
            y = moe.grouped_mm(moe.dequantize(got, global_scale=scale), experts, got.ends).tanh()
            return moe.combine(y, got.handle, weights=got.weights, group=case.group)

        tolerance = OF_E2M1 if cast == NVFP4.name else OF_E4M3
        case.check(layer, tolerance=tolerance)
        case.check(functools.partial(checkpoint, layer, use_reentrant=False), tolerance=tolerance)
    moe.free_buffers()


def agreed(group: Any) -> None:
    """`worst_tokens` where the ranks have unequal numbers; what it says is enough."""
    tokens = 3 + 4 * group.rank()
    case = Case(group, tokens)
    worst = moe.worst_tokens(tokens, group=group)
    assert worst == (3 + 4 * (case.size - 1)) * case.size
    case.topk_idx.zero_()  # all of it to one rank
    moe.dispatch(
        case.x,
        case.topk_idx,
        case.topk_weights,
        num_experts=case.num_experts,
        group=group,
        num_worst_tokens=worst,
    )
    own = Buffer(group, 1 << 20, explicitly_destroy=True)
    name = moe.register_buffer(own)
    assert moe.worst_tokens(tokens, group=name) == worst
    moe.unregister_buffer(name)
    own.destroy()
    moe.free_buffers()


def as_megatron(group: Any) -> None:
    """Megatron's names."""
    case = Case(group, 6, seed=7)
    x, idx, probs, counts, handle = moe.fused_dispatch(
        case.x, case.topk_idx, case.topk_weights, case.num_experts, group, True, True
    )
    assert counts.tolist() == [int((idx == e).sum()) for e in range(EXPERTS_A_RANK)]
    out, event = moe.fused_combine(x, group, handle)
    assert event is None
    (out.sum() + probs.sum()).backward()
    ranks = (case.topk_idx // EXPERTS_A_RANK).masked_fill(case.topk_idx < 0, -1)
    copies = torch.tensor([len({r for r in row if r >= 0}) for row in ranks.tolist()])
    assert torch.equal(case.x.grad[:, 0].cpu(), copies.bfloat16())  # type: ignore[index]
    chosen = (case.topk_idx >= 0).float()
    assert case.topk_weights.grad is not None
    assert torch.equal(case.topk_weights.grad, chosen)


def compiled(group: Any, backend: str, quick: bool = False) -> None:
    """fullgraph, with static sizes and with those that only the run knows (not if `quick`)."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    case = Case(group, 9)
    for options in ({"num_worst_tokens": 9 * case.size}, *([] if quick else [{}])):
        for build in (weighted_by_expert, *([] if quick else [row_major])):
            torch._dynamo.reset()
            layer = torch.compile(build(case, **options), fullgraph=True, backend=backend)
            case.check(layer)
            case.check(layer)
    moe.free_buffers()


def checkpointed(group: Any) -> None:
    """Recomputed in the backward, and with the communication saved instead."""
    case = Case(group, 9)
    calls = []

    def counting(x: Tensor, idx: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        calls.append(0)
        return by_expert(case)(x, idx, weights, experts)

    def whole(*tensors: Tensor) -> Tensor:
        result = checkpoint(counting, *tensors, use_reentrant=False)
        assert isinstance(result, Tensor)
        return result

    case.check(whole)
    assert len(calls) == 2

    dispatched = []
    keep = (torch.ops.epjit.expert_dispatch.default, torch.ops.epjit.expert_combine.default)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in keep and not context.is_recompute:
            dispatched.append(op)
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    def saved(*tensors: Tensor) -> Tensor:
        result = checkpoint(
            by_expert(case),
            *tensors,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        assert isinstance(result, Tensor)
        return result

    case.check(saved)
    assert dispatched == list(keep)
    moe.free_buffers()


class Layer(torch.nn.Module):
    """A layer as a module, as torch.export takes it."""

    def __init__(self, layer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, idx: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return self.layer(x, idx, weights, experts)


def exported(group: Any) -> None:
    """torch.export, static and not; the program runs like the layer."""
    case = Case(group, 9)
    tensors = (case.x, case.topk_idx, case.topk_weights, case.experts)
    arguments = tuple(tensor.detach() for tensor in tensors)
    for options in ({}, {"num_worst_tokens": 9 * case.size}):
        program = torch.export.export(Layer(by_expert(case, **options)), arguments)
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert {"epjit.expert_dispatch.default", "epjit.expert_combine.default"} <= names
        wanted = by_expert(case, **options)(*arguments)
        assert torch.equal(program.module()(*arguments), wanted)
    moe.free_buffers()


def compiled_once(group: Any) -> None:
    """Other numbers of tokens use the graph of the second one, whose sizes are symbols."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    layer = torch.compile(Layer(by_expert(Case(group, 5))), fullgraph=True, backend=backend)
    for tokens in (5, 7, 9, 6, 8):
        case = Case(group, tokens)
        arguments = (case.x, case.topk_idx, case.topk_weights, case.experts)
        with torch.no_grad():
            assert torch.equal(layer(*arguments), by_expert(case)(*arguments))
    assert len(graphs) == 2
    moe.free_buffers()


def managed(group: Any) -> None:
    """Buffers grow, follow a group that was made again, and are freed."""
    device_of(group)
    small = moe.get_buffer(group, 64)
    assert moe.get_buffer(group, 64) is small
    assert moe.get_buffer(group, 32) is small
    large = moe.get_buffer(group, 14336)
    assert large is not small
    assert small.runtime is None
    assert large.num_nvl_bytes > small.num_nvl_bytes
    again = dist.new_group(list(range(group.size())))
    assert moe.get_buffer(again, 64) is not large
    moe.free_buffers()
    assert large.runtime is None
    fresh = moe.get_buffer(group, 64)
    assert fresh is not large
    assert fresh.runtime is not None
    # Left to the end of the process: freed at exit, after the launcher destroyed the group.


def outgrown(group: Any) -> None:
    """A Buffer that a capture has used stays beside its successor; without a GPU by name only."""
    small = moe.get_buffer(group, 64)
    with mock.patch.object(buffers, "_is_capturing", return_value=True):
        assert moe.get_buffer(group, 64) is small
        with pytest.raises(RuntimeError, match="cannot be made while a CUDA graph is captured"):
            moe.get_buffer(group, 14336)
    large = moe.get_buffer(group, 14336)
    assert large is not small
    assert small.runtime is not None
    largest = moe.get_buffer(group, 28672)
    assert largest is not large
    assert large.runtime is None
    moe.free_buffers()
    assert small.runtime is None
    assert largest.runtime is None


def replayed(group: Any) -> None:
    """A graph is replayed after its Buffer was outgrown, twice (on GPUs only)."""
    case = Case(group, 9)
    layer = weighted_by_expert(case, num_worst_tokens=9 * case.size)
    arguments = [case.x, case.topk_idx, case.topk_weights, case.experts]
    arguments = [each.detach().clone() for each in arguments]
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        layer(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = layer(*arguments)
        small = moe.get_buffer(group, 2 * HIDDEN)
        for hidden_bytes in (14336, 28672):
            assert moe.get_buffer(group, hidden_bytes) is not small
            arguments[0].mul_(-2)
            wanted = layer(*arguments)
            for _ in range(3):
                out.zero_()
                graph.replay()
                assert torch.equal(out, wanted)
    small.check_fault()
    moe.free_buffers()
    assert small.runtime is None


def fp8_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 with a scale a row."""
    scales = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-4) / 448
    return (x / scales).to(torch.float8_e4m3fn), scales


def in_fp8(case: Case, **options: Any) -> Callable[..., Tensor]:
    """The layer by expert in FP8 where this device has its product, else in bfloat16."""
    name, fp8 = case.group.group_name, case.device.type == "cpu"
    fp8 = fp8 or torch.cuda.get_device_capability(case.device)[0] in (9, 10)

    def layer(x: Tensor, idx: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        got = moe.dispatch(
            x,
            idx,
            weights,
            num_experts=case.num_experts,
            group=name,
            expert_major=True,
            expert_alignment=16,
            cast="fp8_row" if fp8 else None,
            **options,
        )
        if fp8:
            matrices, scales = fp8_of_rows(experts.detach().mT.contiguous())
            y = moe.grouped_mm(
                *(got.x, matrices.mT, got.ends),
                scales=got.scales,
                weight_scales=scales,
                values=got.values,
                weight_values=experts,
            )
        else:
            y = moe.grouped_mm(got.x, experts, got.ends)
        return moe.combine(y.tanh(), got.handle, weights=got.weights, group=name)

    return layer


def inferred(group: Any) -> None:
    """Without gradients, cast on the way: eager, compiled, exported, and a graph replayed."""
    case = Case(group, 9)
    worst = {"num_worst_tokens": 9 * case.size}
    arguments = [case.x, case.topk_idx, case.topk_weights, case.experts]
    arguments = [each.detach().clone() for each in arguments]
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    with torch.no_grad():
        wanted = by_expert(case)(*arguments).float()
        for options in ({}, worst):
            layer = in_fp8(case, **options)
            eager_out = layer(*arguments)
            # e4m3 has 4 significant bits.
            assert (eager_out.float() - wanted).norm() < 2.0**-3 * wanted.norm()
            torch._dynamo.reset()
            traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
            assert torch.equal(traced(*arguments), eager_out)
            program = torch.export.export(Layer(layer), tuple(arguments))
            assert torch.equal(program.module()(*arguments), eager_out)
        if case.device.type == "cuda":
            replays_with_changed_inputs(case, in_fp8(case, **worst))
            replays_with_changed_inputs(case, weighted_by_expert(case, **worst))
    moe.free_buffers()


def trained_in_fp8(group: Any) -> None:
    """Gradients pass the casts of rows and matrices: eager, compiled, and computed twice."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    case = Case(group, 9)
    for options in ({}, {"num_worst_tokens": 9 * case.size}):
        layer = in_fp8(case, **options)
        torch._dynamo.reset()
        for each in (
            layer,
            torch.compile(layer, fullgraph=True, backend="aot_eager"),
            functools.partial(checkpoint, layer, use_reentrant=False),
        ):
            case.check(each, tolerance=OF_E4M3)
    moe.free_buffers()


def trained_in_a_graph(group: Any) -> None:
    """Forward and backward in one graph, of every layer by expert (on GPUs only)."""
    case = Case(group, 9)
    worst = {"num_worst_tokens": 9 * case.size}
    for layer in (by_expert, weighted_by_expert, in_fp8):
        replays_with_changed_inputs(case, stepping(case, layer(case, **worst)))
    moe.free_buffers()


def stepping(case: Case, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The layer and its gradients, one behind the other."""

    def step(x: Tensor, idx: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        leaves = [each.detach().requires_grad_() for each in (x, weights, experts)]
        out = layer(leaves[0], idx, *leaves[1:])
        found = torch.autograd.grad(out, leaves, case.grad_out)
        return torch.cat([each.detach().float().flatten() for each in (out, *found)])

    return step


def replays_with_changed_inputs(case: Case, layer: Callable[..., Tensor]) -> None:
    """A captured layer gives, 100 times, what the eager one gives for other tokens and choices."""
    arguments = [case.x, case.topk_idx, case.topk_weights, case.experts]
    arguments = [each.detach().clone() for each in arguments]
    x, idx, weights, _ = arguments
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = layer(*arguments)
        for seed in range(100):
            other = Case(case.group, len(x), seed=1 + seed)
            x.copy_(other.x.detach())
            idx.copy_(other.topk_idx)
            weights.copy_(other.topk_weights.detach())
            out.zero_()
            graph.replay()
            again = out.clone()
            assert torch.equal(again, layer(*arguments)), f"replay {seed}"
    torch.cuda.synchronize()


def registered(group: Any) -> None:
    """A Buffer of one's own under a name."""
    case = Case(group, 9)
    with_own = Buffer(group, 1 << 20, explicitly_destroy=True)
    name = moe.register_buffer(with_own)
    out = moe.dispatch(
        case.x, case.topk_idx, case.topk_weights, num_experts=case.num_experts, group=name
    )
    back = moe.combine(out.x, out.handle, group=name)
    assert back.shape == case.x.shape
    moe.unregister_buffer(name)
    with_own.destroy()


def between_domains(group: Any, nvlink_domain: int) -> None:
    """All of it in domains of so many ranks."""
    os.environ["EPJIT_NVLINK_DOMAIN"] = str(nvlink_domain)
    case = Case(group, 9)
    worst = {"num_worst_tokens": 9 * case.size}
    # The domains are found out while one rank traces and the others run.
    layer = by_expert(case, **worst)
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    case.check(traced if case.rank == 0 else layer)
    buffer = moe.get_buffer(group, 2 * HIDDEN)
    assert buffer.runtime is not None
    num_domains = buffer.runtime.get_num_rdma_ranks()
    assert num_domains == case.size // nvlink_domain
    assert buffer.num_rdma_bytes > 0

    case.check(row_major(case))
    case.check(row_major(case, **worst))
    few = Case(group, 0 if case.rank == 0 else 5, seed=1)
    few.check(by_expert(few))
    few.check(weighted_by_expert(few))
    as_megatron(group)

    # The names of tensors and sizes that a trace relies on, and the local rows by expert.
    x, idx, weights = case.x.detach(), case.topk_idx, case.topk_weights.detach()
    got = moe.dispatch(x, idx, weights, num_experts=case.num_experts, group=group)
    rows = moe.permute(got.x, got.topk_idx, got.topk_weights, num_experts=EXPERTS_A_RANK)
    back = moe.unpermute(rows.x, rows.handle)
    assert torch.equal(rows.tokens_per_expert, got.tokens_per_expert)
    assert torch.equal(back.norm(dim=1) > 0, (got.topk_idx >= 0).any(1))
    name = group.group_name
    quick = {"test_utils": ("test_schema", "test_faketensor")}
    unchanged = (False, None, None, False)
    for rows_at_most in (0, 9 * case.size):
        sizes = (case.num_experts, rows_at_most)
        of_dispatch = (*sizes, None, None, num_domains, name)
        opcheck(torch.ops.epjit.dispatch, (x, idx, weights, *of_dispatch), **quick)
        by_expert_sizes = (*sizes, 8, 0, False, *unchanged, num_domains)
        opcheck(torch.ops.epjit.expert_dispatch, (x, idx, weights, *by_expert_sizes, name), **quick)
    opcheck(torch.ops.epjit.combine, (got.x, *got.handle, name), **quick)
    opcheck(torch.ops.epjit.combine_backward, (x, *got.handle, name), **quick)
    grads = (got.x, got.topk_weights, *got.handle, name)
    opcheck(torch.ops.epjit.dispatch_backward, grads, **quick)
    options = {"num_experts": case.num_experts, "expert_alignment": 8, "zero_padding": True}
    by_expert_rows = moe.dispatch(x, idx, weights, group=group, expert_major=True, **options)
    routing, placed = by_expert_rows.handle
    handle = (*placed[:-1], *routing, name)
    sums = by_expert_rows.x, by_expert_rows.weights
    opcheck(torch.ops.epjit.expert_combine, (*sums, *handle), **quick)
    opcheck(torch.ops.epjit.expert_combine_backward, (x, *sums, *handle), **quick)
    opcheck(torch.ops.epjit.expert_dispatch_backward, (*sums, *handle), **quick)
    with torch.no_grad():
        cast = moe.dispatch(
            x.repeat(1, 128 // HIDDEN + 1)[:, :128].contiguous(),
            *(idx, weights),
            group=group,
            expert_major=True,
            cast="mxfp8",
            **options,
        )
    assert cast.scales is not None
    assert torch.equal(cast.handle.placement.source, placed.source)
    sizes = case.num_experts, 0
    with pytest.raises(RuntimeError, match=r"traced for 1 .*get_buffer"):
        torch.ops.epjit.dispatch(x, idx, weights, *sizes, None, None, 1, name)
    with pytest.raises(ValueError, match=rf"cast is 'fp8', but this group spans {num_domains}"):
        moe.dispatch(x, idx, weights, num_experts=case.num_experts, group=group, cast="fp8")
    with pytest.raises(RuntimeError, match=r"traced for 1 .*get_buffer"):
        torch.ops.epjit.expert_dispatch(x, idx, weights, *sizes, 1, 0, False, *unchanged, 1, name)
    checkpointed(group)
