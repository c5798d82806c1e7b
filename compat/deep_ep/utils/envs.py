"""Start-up of DeepEP's own test scripts."""

import os

import torch
import torch.distributed as dist

__all__ = ["init_dist"]


def init_dist(
    local_rank: int, num_local_ranks: int, seed: int = 0
) -> tuple[int, int, dist.ProcessGroup]:
    """Joins the NCCL world of `WORLD_SIZE` nodes and sets torch's defaults to bfloat16 on CUDA.

    Args:
        local_rank: this process on its node, also its GPU.
        num_local_ranks: processes of each node.
        seed: of torch's generators; the rank is added.

    Returns:
        The rank, the number of ranks, and a group of all of them.
    """
    node, num_nodes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT", "8361")
    rank, size = node * num_local_ranks + local_rank, num_nodes * num_local_ranks
    torch.cuda.set_device(local_rank)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda")
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=size,
        device_id=torch.device("cuda", local_rank),
    )
    torch.manual_seed(seed + rank)
    group = dist.new_group(list(range(size)))
    assert isinstance(group, dist.ProcessGroup)
    return rank, size, group
