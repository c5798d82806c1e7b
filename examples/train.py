"""Trains a mixture-of-experts layer whose experts are spread over the ranks.

    python examples/train.py --ranks 4
    torchrun --nproc-per-node 4 examples/train.py
    python examples/train.py --fp8

Every rank has tokens of its own, a copy of the router, and four of the experts. At the end the
layer is compared with a dense one: all experts on each rank, in float32. With --fp8 tokens are cast
on their way, and multiplied as they arrive (on sm_90, sm_100 and the CPU); gradients pass the casts
as they are.
"""

import argparse
import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import start
from torch import Tensor, nn

from epjit import moe
from epjit.config import MAX_RANKS

HIDDEN, EXPERTS_A_RANK, TOPK = 256, 4, 2


def cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in FP8 with a scale each."""
    scales = x.detach().float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-4) / 448
    return (x.detach() / scales).to(torch.float8_e4m3fn), scales


class Layer(nn.Module):
    """A router and this rank's experts: `silu(x @ up) @ down`, weighted and summed."""

    def __init__(self, group: dist.ProcessGroup, fp8: bool) -> None:
        super().__init__()
        self.fp8, self.group, self.num_experts = fp8, group, EXPERTS_A_RANK * group.size()
        torch.manual_seed(0)  # all ranks have the same router
        self.router = nn.Linear(HIDDEN, self.num_experts, bias=False)
        torch.manual_seed(1 + group.rank())
        self.up = nn.Parameter(torch.randn(EXPERTS_A_RANK, HIDDEN, 2 * HIDDEN) / 16)
        self.down = nn.Parameter(torch.randn(EXPERTS_A_RANK, 2 * HIDDEN, HIDDEN) / 16)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights."""
        with torch.autocast(x.device.type, enabled=False):  # else rounding chooses the experts
            weights, idx = self.router(x).softmax(-1).topk(TOPK)
        return idx, weights

    def forward(self, x: Tensor, worst: int) -> Tensor:
        """With `num_worst_tokens` the host waits for nothing; without, for the number of rows."""
        static = {"num_worst_tokens": worst, "expert_major": True, "expert_alignment": 16}
        static["cast"] = "fp8_row" if self.fp8 else None
        got = moe.dispatch(
            x, *self.route(x), num_experts=self.num_experts, group=self.group, **static
        )
        if self.fp8:
            y = F.silu(self.product(got.x, got.scales, got.values, self.up, got.ends))
            y = self.product(*cast(y), y, self.down, got.ends)
        else:
            y = F.silu(moe.grouped_mm(got.x, self.up, got.ends))
            y = moe.grouped_mm(y, self.down, got.ends)
        return moe.combine(y, got.handle, weights=got.weights, group=self.group)

    @staticmethod
    def product(x: Tensor, scales: Tensor, values: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Rows in FP8 times matrices that are cast here; `values`, `weights` take the gradients."""
        matrices, of_matrices = cast(weights.mT.contiguous())
        given = {"scales": scales, "weight_scales": of_matrices}
        taking = {"values": values, "weight_values": weights}
        return moe.grouped_mm(x, matrices.mT, ends, **given, **taking)

    def dense(self, x: Tensor) -> Tensor:
        """The same with the experts of all ranks here, one after the other."""
        idx, weights = self.route(x)
        weight_of = weights.new_zeros(len(x), self.num_experts).scatter(1, idx, weights).T
        matrices = []
        for mine in (self.up.detach(), self.down.detach()):
            everybodys = mine.new_zeros(self.group.size(), *mine.shape)
            everybodys[self.group.rank()] = mine
            dist.all_reduce(everybodys)
            matrices.append(everybodys.flatten(0, 1))
        experts = zip(*matrices, weight_of, strict=True)
        return sum(F.silu(x @ up) @ down * weight[:, None] for up, down, weight in experts)


def train(group: dist.ProcessGroup, *, tokens: int, steps: int, fp8: bool) -> None:
    """One rank: a few steps of training, then the comparison."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    layer = Layer(group, fp8).to(device)
    x = torch.randn(max(1, tokens - 8 * group.rank()), HIDDEN, device=device, requires_grad=True)
    wanted = x.detach().roll(1, dims=1).tanh()
    worst = moe.worst_tokens(len(x), group=group)  # ranks may have unequal numbers of tokens
    optimizer, losses = torch.optim.AdamW(layer.parameters(), lr=1e-3), []
    for _ in range(steps):
        with autocast:
            out = layer(x, worst)
        loss = F.mse_loss(out.float(), wanted)
        loss.backward()
        dist.all_reduce(layer.router.weight.grad)  # the experts have seen all ranks' tokens
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    with autocast:
        out = layer(x, worst)
    dense = layer.dense(x)
    errors = [(out - dense).norm() / dense.norm()]
    got, right = (torch.autograd.grad(y, x, wanted.to(y.dtype))[0] for y in (out, dense))
    errors += [(got - right).norm() / right.norm()]
    print(
        f"rank {group.rank()} of {group.size()} on {device.type}, {len(x)} tokens: loss "
        f"{losses[0]:.3f} to {losses[-1]:.3f}; errors of output and gradient, with "
        f"{'FP8' if fp8 else 'bfloat16'} beside dense float32: {errors[0]:.1e}, {errors[1]:.1e}"
    )
    assert losses[-1] < losses[0]
    # A rounding errs by 2**-9, or 2**-5 in FP8; a lost row by about 1.
    assert max(errors) < (2**-3 if fp8 else 2**-6)
    moe.free_buffers()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, choices=range(1, MAX_RANKS + 1), help="processes")
    parser.add_argument("--tokens", type=int, default=512, help="of a rank, at most")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fp8", action="store_true", help="cast tokens and matrices")
    args = parser.parse_args()
    if min(args.tokens, args.steps) < 2:
        parser.error(
            f"--tokens is {args.tokens} and --steps {args.steps}, but at least 2 are needed"
        )
    main = functools.partial(train, tokens=args.tokens, steps=args.steps, fp8=args.fp8)
    start(main, args.ranks or 0)
