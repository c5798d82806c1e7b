"""Dispatch and combine between nodes, with every sum checked; started by torchrun on each node.

    examples/launch_two_nodes.sh 0 ADDRESS    on the first node, whose address it is
    examples/launch_two_nodes.sh 1 ADDRESS    on the second
    examples/launch_two_nodes.sh try          on one host, cut into two NVLink domains

A token has a small whole number in every column, and experts add nothing, so what comes back must
be that number times the ranks that received the token. The exit code is 1 if it is not. With fewer
GPUs than ranks on a node all of it runs on the CPU.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

import torch
import torch.distributed as dist

import epjit


def main() -> int:
    """Runs the rounds on this rank; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of one rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8, help="of one rank")
    parser.add_argument("--topk", type=int, default=4, help="experts of a token")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    logging.basicConfig(level="INFO")  # rank 0 says which transport carries it
    local_rank, local_size = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
    if torch.cuda.device_count() < local_size:
        os.environ["EPJIT_BACKEND"] = "cpu"
    else:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()

    # Bytes for both: NVLink inside a node, RDMA between nodes. The hints suppose eight ranks a node
    # unless they are told.
    config = epjit.Buffer.get_dispatch_config(num_ranks)
    a_node = int(os.environ.get("EPJIT_NVLINK_DOMAIN") or local_size)
    buffer = epjit.Buffer(
        dist.group.WORLD,
        config.get_nvl_buffer_size_hint(args.hidden * 2, num_ranks, ranks_per_domain=a_node),
        config.get_rdma_buffer_size_hint(args.hidden * 2, num_ranks, ranks_per_domain=a_node),
        explicitly_destroy=True,
    )
    runtime, device = buffer.runtime, buffer.device
    assert runtime is not None
    num_experts = args.experts * num_ranks
    shape, number = (args.tokens, args.hidden), 1 + rank % 16
    x = torch.full(shape, number, dtype=torch.bfloat16, device=device)
    wrong = 0
    times = []
    for seed in range(args.rounds):
        torch.manual_seed(seed * num_ranks + rank)
        weights, idx = torch.rand(args.tokens, num_experts).topk(args.topk, dim=1)
        weights, idx = weights.to(device), idx.to(device)
        dist.barrier()
        start = time.perf_counter()
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_experts)
        rows, _, _, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=idx,
            topk_weights=weights,
        )
        out, _, _ = buffer.combine(rows, handle)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        # Whole numbers up to 256 are bfloat16: no sum is rounded.
        wrong += int((out.float() != x.float() * in_rank.sum(dim=1, keepdim=True)).any())
    print(
        f"rank {rank} of {num_ranks}, node {runtime.get_rdma_rank()} of "
        f"{runtime.get_num_rdma_ranks()}, {device}: {args.rounds - wrong} of {args.rounds} rounds "
        f"right, {min(times) * 1e3:.2f} ms the fastest",
        flush=True,
    )
    buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
