"""A kernel that calls every function of transport.cuh, and what ranks do with it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from epjit.runtime import sources
from epjit.runtime.kernel import KernelConfig

HERE = Path(__file__).parent
CUDA_SRC = Path(__file__).parents[2] / "epjit" / "cuda_src"


@dataclass(frozen=True)
class RingConfig(KernelConfig, source="ring.cu", tag="ring_w{0.num_warps}"):
    needs_transport: ClassVar[bool] = True

    num_warps: int = 4

    def memory_bytes(self, row_bytes: int) -> int:
        """Symmetric memory of a rank."""
        return 3 * self.num_warps * row_bytes + 2 * self.num_warps * 8


def write_tree(root: Path) -> Path:
    """epjit's own headers, and the kernel beside them."""
    shutil.copytree(CUDA_SRC / "epjit", root / "epjit", dirs_exist_ok=True)
    shutil.copytree(CUDA_SRC / "transport", root / "transport", dirs_exist_ok=True)
    shutil.copy(HERE / "ring.cu", root)
    return root


@contextmanager
def ring_sources() -> Iterator[None]:
    """Lets this process compile the kernel."""
    before = sources.ROOT
    with tempfile.TemporaryDirectory(prefix="epjit-ring-") as folder:
        sources.ROOT = write_tree(Path(folder))
        try:
            yield
        finally:
            sources.ROOT = before


class Ring:
    """One rank of the ring, on a GPU. Collective to make.

    Args:
        group: The ranks.
        transport: Theirs.
        device: GPU of this rank.
        row_bytes: Of each warp.
    """

    def __init__(self, group: Any, transport: Any, *, device: int, row_bytes: int) -> None:
        import torch

        from epjit.runtime.kernel import Kernel
        from epjit.runtime.launch import Launch

        config = RingConfig()
        self.group, self.transport = group, transport
        self._shape = (config.num_warps, row_bytes)
        rows = config.num_warps * row_bytes
        kernel = Kernel(config, device=device, body=transport.body)
        self.compiled = kernel.compiled
        self.memory = transport.allocate(config.memory_bytes(row_bytes))
        everything = self.memory.tensor(torch.uint8)
        assert not everything.any(), "symmetric memory is not filled with zeros"
        self._send = everything[:rows]
        self._out = torch.empty((2, *self._shape), dtype=torch.uint8, device=f"cuda:{device}")
        self._failed = torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")
        self._launch = Launch(
            kernel,
            transport=transport.context,
            memory=self.memory.ptr,
            out=self._out.data_ptr(),
            failed=self._failed.data_ptr(),
            timeout_ns=20 * 10**9,
            row_bytes=row_bytes,
            next_pe=transport.pes[(group.rank + 1) % group.size],
        )
        self._epoch = 0
        group.barrier()

    def _rows(self, rank: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(self._epoch * 1000 + rank)
        return torch.randint(0, 256, self._shape, dtype=torch.uint8, generator=generator)

    def round(self, stream: int) -> None:
        """Sends rows that are new in each round, and compares what has come."""
        import torch

        group = self.group
        self._epoch += 1
        self._send.copy_(self._rows(group.rank).flatten())
        torch.cuda.current_stream().synchronize()
        group.barrier()  # whoever compiles or allocates is through with it
        self._launch(stream, 1, epoch=self._epoch)
        group.barrier()  # as `tests.rounds.normal.line_up` says
        torch.cuda.current_stream().synchronize()
        assert not self._failed.item(), f"rank {group.rank} waited in vain, round {self._epoch}"
        expected = self._rows((group.rank - 1) % group.size)
        for kind, got in zip(("put", "put_signal"), self._out.cpu(), strict=True):
            wrong = (got != expected).nonzero()
            assert not len(wrong), (
                f"rank {group.rank}, round {self._epoch}, {kind}: byte {wrong[0].tolist()} is wrong"
            )
        group.barrier()  # nobody sends the next rows before all have looked at these

    def close(self) -> None:
        """Hands the memory back; all ranks are through with it."""
        self.group.barrier()
        self.memory.close()
