"""Start-up of DeepEP's own test scripts, and what they ask of the machine."""

import os
import random
import re
import subprocess
from typing import Any

import torch
import torch.distributed as dist

from epjit.modes.make import new_device
from epjit.runtime.group import Group, as_process_group
from epjit.runtime.topology import find_topology

__all__ = [
    "dist_print",
    "get_global_seed",
    "get_local_seed",
    "get_logical_domain_size",
    "get_nvlink_gbs",
    "get_physical_domain_size",
    "get_rdma_gbs",
    "init_dist",
    "init_seed",
]

_seeds = {"global": 0, "local": 0}
_ranks_per_node = 8


def init_dist(
    local_rank: int, num_local_ranks: int, seed: int = 0
) -> tuple[int, int, dist.ProcessGroup]:
    """Joins the world of `WORLD_SIZE` nodes and sets torch's defaults to bfloat16 on CUDA.

    NCCL's, or Gloo's where processes share a GPU, which NCCL refuses.

    Args:
        local_rank: this process on its node, also its GPU; where there are fewer, they are shared.
        num_local_ranks: processes of each node.
        seed: of torch's generators; the rank is added.

    Returns:
        The rank, the number of ranks, and a group of all of them.
    """
    global _ranks_per_node
    _ranks_per_node = num_local_ranks
    node, num_nodes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT", "8361")
    rank, size = node * num_local_ranks + local_rank, num_nodes * num_local_ranks
    num_gpus = torch.cuda.device_count()
    own, is_shared = local_rank % num_gpus, num_local_ranks > num_gpus
    torch.cuda.set_device(own)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda")
    dist.init_process_group(
        "gloo" if is_shared else "nccl",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=size,
        device_id=None if is_shared else torch.device("cuda", own),
    )
    init_seed(seed)
    group = dist.new_group(list(range(size)))
    assert isinstance(group, dist.ProcessGroup)
    return rank, size, group


def init_seed(global_seed: int) -> None:
    """Seeds all generators of this rank with the global seed plus its number."""
    _seeds["global"], _seeds["local"] = global_seed, global_seed + dist.get_rank()
    torch.manual_seed(_seeds["local"])
    random.seed(_seeds["local"])


def get_global_seed() -> int:
    """The seed of `init_seed`, the same on all ranks."""
    return _seeds["global"]


def get_local_seed() -> int:
    """The seed of this rank's generators."""
    return _seeds["local"]


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Prints, then waits for all ranks.

    Args:
        s: the text.
        once_in_node: only the first rank of each node prints.
    """
    if not once_in_node or dist.get_rank() % _ranks_per_node == 0:
        print(s, flush=True)  # noqa: T201
    dist.barrier()


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """NVLink domains, and ranks of one; collective.

    Args:
        group: a process group, or an ElasticBuffer.
    """
    if hasattr(group, "get_physical_domain_size"):
        sizes: tuple[int, int] = group.get_physical_domain_size()
        return sizes
    links = Group.from_torch(as_process_group(group))
    topology = find_topology(links, device=new_device().index)
    return topology.num_domains, topology.num_local


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """The same: epjit has one way between domains."""
    del allow_hybrid_mode
    return get_physical_domain_size(group)


def get_nvlink_gbs(factor: float = 0.9) -> float:
    """Bandwidth of GPU 0's links in GB/s, as nvidia-smi says it, times a factor; 0 without any."""
    command = ["nvidia-smi", "nvlink", "-s", "-i", "0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0.0
    return factor * sum(float(each) for each in re.findall(r"([\d.]+) GB/s", said))


def get_rdma_gbs(nic_name: str = "mlx5_0") -> float:
    """Bandwidth of a NIC in GB/s, as the system says it; 0 without one."""
    try:
        with open(f"/sys/class/infiniband/{nic_name}/ports/1/rate") as file:
            return float(file.read().split()[0]) / 8
    except (OSError, ValueError, IndexError):
        return 0.0
