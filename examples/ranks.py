"""The ranks of an example: processes of torchrun, or of our own where it was started plainly."""

import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Main = Callable[[dist.ProcessGroup], None]


def start(main: Main, ranks: int = 0) -> None:
    """Runs `main(group)` on every rank: on GPUs if there are any (ranks may share one), or the CPU.

    `ranks` processes are started; 0 means one for each GPU, or four where there are fewer than two.
    Under torchrun this process is one of them already.
    """
    if "LOCAL_RANK" in os.environ:
        _run(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), None, main)
        return
    ranks = ranks or (torch.cuda.device_count() if torch.cuda.device_count() >= 2 else 4)
    with tempfile.TemporaryDirectory(prefix="epjit-example-") as folder:
        mp.spawn(_run, (ranks, f"file://{folder}/rendezvous", main), ranks)


def _run(rank: int, ranks: int, url: str | None, main: Main) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    gpus = torch.cuda.device_count()
    if gpus > 0:
        torch.cuda.set_device(rank * min(gpus, ranks) // ranks)
    backend = "nccl" if gpus >= ranks else "gloo"  # NCCL wants a GPU for each rank
    where = (rank, ranks) if url else (-1, -1)  # -1: torchrun has said it in the environment
    dist.init_process_group(backend, init_method=url, rank=where[0], world_size=where[1])
    assert dist.group.WORLD is not None
    main(dist.group.WORLD)
    dist.destroy_process_group()
