"""Decoding steps of a mixture-of-experts layer in low-latency mode, compared with a dense one.

    python examples/decode.py
    torchrun --nproc-per-node 4 examples/decode.py

Each rank has a token of each of its sequences, and four experts. Tokens travel as FP8 with scales
and come back as bfloat16. No step waits for the GPU, so a CUDA graph could hold all of them.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import start

from epjit import Buffer
from epjit.formats import dequantize

TOKENS, HIDDEN, INNER, TOPK, STEPS = 16, 512, 256, 4, 8
LIMIT = 0.06  # of the dense result: e4m3 has 4 significant bits, so a channel errs by up to 2**-4


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """One expert or, with a dimension in front of each argument, several."""
    return F.silu(x @ up) @ down


def main(group: dist.ProcessGroup) -> None:
    """One rank: a loop of decoding steps."""
    rank, experts = group.rank(), 4 * group.size()
    num_bytes = Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, group.size(), experts)
    buffer = Buffer(group, 0, num_bytes, low_latency_mode=True, explicitly_destroy=True)

    def random(*shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator) / shape[-2] ** 0.5
        return values.to(buffer.device, torch.bfloat16)

    router, shared = random(HIDDEN, experts), (random(HIDDEN, INNER), random(INNER, HIDDEN))
    up, down = random(experts, HIDDEN, INNER), random(experts, INNER, HIDDEN)
    mine = slice(4 * rank, 4 * rank + 4)
    hidden, seen = random(TOKENS, HIDDEN, seed=1 + rank), []
    load = torch.zeros(4, dtype=torch.int32, device=buffer.device)
    for _ in range(STEPS):
        x = F.rms_norm(hidden, (HIDDEN,))
        weights, idx = (x @ router).float().softmax(dim=1).topk(TOPK)
        slabs, counts, handle, _, receive = buffer.low_latency_dispatch(
            x, idx, TOKENS, experts, return_recv_hook=True
        )
        beside = mlp(x, *shared)  # while tokens travel: until receive() they hold no SM
        receive()
        # A slab an expert, [4, ranks * TOKENS, HIDDEN], with `counts` rows at its front. Behind
        # them lies anything; combine reads none of it. A grouped GEMM in FP8, as DeepGEMM's masked
        # one, takes slabs, scales and counts as they are.
        rows = mlp(dequantize(*slabs, dtype=torch.bfloat16), up[mine], down[mine])
        out, _, receive = buffer.low_latency_combine(
            rows, idx, weights, handle, return_recv_hook=True
        )
        load += counts
        receive()
        # out[t] is the sum over k of weights[t, k] times the row of idx[t, k].
        hidden = hidden + beside + out
        seen.append((x, idx, weights, out))

    x, idx, weights, out = map(torch.cat, zip(*seen, strict=True))
    every = mlp(x, up, down)[idx, torch.arange(len(x), device=x.device)[:, None]]
    dense = (every.float() * weights[:, :, None]).sum(dim=1)
    error = float((out.float() - dense).norm() / dense.norm())
    print(f"rank {rank}: error {error:.4f} (limit {LIMIT}), rows of each expert {load.tolist()}")
    buffer.destroy()
    assert error < LIMIT


if __name__ == "__main__":
    start(main)
