"""Inference of a mixture-of-experts layer with rows by expert, compared with a dense one.

    python examples/infer.py
    torchrun --nproc-per-node 4 examples/infer.py

Each rank has tokens of its own, and four experts. Tokens are cast to FP8 on their way and
multiplied as they arrive where torch has that product (sm_90 and sm_100; the CPU takes their
values), and stay bfloat16 elsewhere. All sizes are static: on a GPU the step is a CUDA graph.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import start
from torch import Tensor

from epjit import moe

TOKENS, HIDDEN, INNER, TOPK, STEPS = 64, 256, 512, 2, 4


def cast(x: Tensor, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Rows in FP8 with a scale each, or as they are."""
    if not fp8:
        return x, None
    scales = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-4) / 448
    return (x / scales).to(torch.float8_e4m3fn), scales


@torch.no_grad()
def main(group: dist.ProcessGroup) -> None:
    """One rank: some steps, each compared."""
    rank, experts, on_gpu = group.rank(), 4 * group.size(), torch.cuda.is_available()
    device, fp8, limit = "cuda" if on_gpu else "cpu", True, 0.08  # e4m3 has 4 significant bits
    if on_gpu and torch.cuda.get_device_capability()[0] not in (9, 10):
        fp8, limit = False, 0.01

    def random(*shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return values.to(device, torch.bfloat16)

    router = random(experts, HIDDEN, seed=0)  # the same on all ranks, as all experts
    ups, downs = random(experts, INNER, HIDDEN, seed=1), random(experts, HIDDEN, INNER, seed=2)
    mine = slice(4 * rank, 4 * rank + 4)
    (up, of_up), (down, of_down) = cast(ups[mine], fp8), cast(downs[mine], fp8)
    worst = moe.worst_tokens(TOKENS, group=group)
    x = torch.zeros(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        weights, idx = (x @ router.mT).float().softmax(dim=1).topk(TOPK)
        by_expert = {"expert_major": True, "expert_alignment": 16, "num_worst_tokens": worst}
        by_expert["cast"] = "fp8_row" if fp8 else None
        got = moe.dispatch(x, idx, weights, num_experts=experts, group=group, **by_expert)
        # Behind got.ends[-1] rows hold anything; combine reads none of them.
        y = moe.grouped_mm(got.x, up.mT, got.ends, scales=got.scales, weight_scales=of_up)
        y, scales = cast(F.silu(y), fp8)
        y = moe.grouped_mm(y, down.mT, got.ends, scales=scales, weight_scales=of_down)
        out = moe.combine(y, got.handle, weights=got.weights, group=group)
        return out, idx, weights, got.tokens_per_expert

    results = step()  # makes the Buffer, and compiles its kernels
    graph = torch.cuda.CUDAGraph() if on_gpu else None
    if graph is not None:
        with torch.cuda.graph(graph):
            results = step()
    for seed in range(3, 3 + STEPS):
        x.copy_(F.rms_norm(random(TOKENS, HIDDEN, seed=seed * experts + rank), (HIDDEN,)))
        if graph is None:
            results = step()
        else:
            graph.replay()
        out, idx, weights, load = results
        every = F.silu(x.float() @ ups.mT.float()) @ downs.mT.float()
        dense = every[idx, torch.arange(TOKENS, device=device)[:, None]] * weights[:, :, None]
        error = float((out.float() - dense.sum(dim=1)).norm() / dense.sum(dim=1).norm())
        assert error < limit, error
    print(
        f"rank {rank} of {group.size()} on {device}, {'FP8' if fp8 else 'bfloat16'}: error "
        f"{error:.4f} (limit {limit}), rows of each expert {load.tolist()}"
    )
    moe.free_buffers()


if __name__ == "__main__":
    start(main)
