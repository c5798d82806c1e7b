"""What dispatch and combine of one NVLink domain and of several share on the host.

Launches by shape, outputs, counts that the host waits for, faults, and the end.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from epjit.config import MAX_RANKS
from epjit.errors import CommunicationError
from epjit.kernels.shapes import CombineShape, DispatchShape
from epjit.kernels.variants import CHOICES
from epjit.reference.intranode import no_room
from epjit.runtime.device import arch_of
from epjit.runtime.empty import Form, empty_on, matrix
from epjit.runtime.fault import FaultRecord, raise_abort
from epjit.runtime.host import PinnedArray, nap
from epjit.runtime.interrupt import synchronize
from epjit.runtime.kernel import C, Kernel, KernelConfig, compile_kernel
from epjit.runtime.launch import Launch

if TYPE_CHECKING:
    from epjit.runtime.group import Group
    from epjit.runtime.symmetric import SymmetricMemory
    from epjit.scope import GpuScope

SIGNALS_BYTES = 512
GIVE_UP_SECONDS = 1.0  # that a rank which ends by an exception waits for its peers
_EPOCH, _ABORT, _COUNTERS = 0, 1, 32  # places in the local words
# The counts come within 50 us, or when the dispatch before is done: 540 us with 4096 tokens. A
# longer poll without naps starves other threads: giving the GIL away and taking it back at once
# leaves them it only every 5 ms.
_SPIN_SECONDS = 1e-3


class Received(NamedTuple):
    """Outputs of a dispatch."""

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None


class NormalMode(ABC):
    """Base of the modes. Collective to make.

    Args:
        group: The ranks.
        resources: Gets what this makes; its owner closes it, also when this cannot be made.
        device: The GPU of this rank.
        timeout_seconds: Of one wait for a peer.
        num_counters: Words that kernels count in.
        num_counts: Words that notify leaves for the host.

    Attributes:
        memory: Memory that the ranks of an NVLink domain share; what users may see comes first.
    """

    memory: SymmetricMemory

    def __init__(
        self,
        group: Group,
        resources: ExitStack,
        *,
        device: torch.device,
        timeout_seconds: float,
        num_counters: int,
        num_counts: int,
    ) -> None:
        self._group = group
        self._device = device
        self._timeout_seconds = self._patience = timeout_seconds
        self._arch = arch_of(device.index)
        self._local = torch.zeros(_COUNTERS + num_counters, dtype=torch.int32, device=device)
        self._empty = empty_on(device)
        self._fault = FaultRecord()
        resources.callback(self._fault.close)
        # The first half is read by a host that waits for counts; the second takes those that nobody
        # waits for.
        self._num_counts = num_counts
        self._host_counts = PinnedArray(2 * num_counts, device=device.index)
        resources.callback(self._host_counts.close)
        self._launches: dict[DispatchShape | CombineShape, Launch[Any]] = {}
        self._half_way = ""  # why a dispatch ended between its two kernels
        self._is_lost = False  # a peer, when this rank closes

    def _everywhere(self, offset: int) -> list[int]:
        """The address of the same part on every rank that shares `memory`."""
        pointers = [pointer + offset for pointer in self.memory.peer_ptrs]
        return pointers + [0] * (MAX_RANKS - len(pointers))

    def _common(self) -> dict[str, object]:
        """Parameters that all kernels which meet a peer have."""
        return {
            "counters": self._local[_COUNTERS:].data_ptr(),
            "epoch": self._local[_EPOCH:].data_ptr(),
            "abort": self._local[_ABORT:].data_ptr(),
            "fault": self._fault.device_ptr,
            "timeout_ns": int(self._timeout_seconds * 1e9),
            "rank": self._group.rank,
        }

    # ---- launches --------------------------------------------------------------------------------

    @abstractmethod
    def _config(self, shape: DispatchShape | CombineShape) -> KernelConfig:
        """The kernel of a shape on this GPU."""

    @abstractmethod
    def _bind(self, shape: DispatchShape | CombineShape, config: Any) -> Launch[Any]:
        """Compiles and loads; binds what stays the same from call to call.

        Raises:
            ValueError: The buffer is too small.
        """

    @abstractmethod
    def _ahead(self, arch: str) -> Iterable[tuple[KernelConfig, str]]:
        """All kernels of this buffer for an architecture, each with its transport."""

    def launch(self, shape: DispatchShape | CombineShape) -> Launch[Any]:
        """The launch of a shape; collective when it is the first of its kind.

        Raises:
            RuntimeError: It would have to be compiled while a CUDA graph is captured.
            ValueError: The buffer cannot hold two tokens.
            CommunicationError: A rank does not come; names it.
        """
        found = self._launches.get(shape)
        return found if found is not None else self._build(shape)

    def _build(self, shape: DispatchShape | CombineShape) -> Launch[Any]:
        """Compiles and loads, then meets the group: nobody may wait for a peer that compiles."""
        config = self._config(shape)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{config.op} needs a kernel for {config} that is not compiled yet, and nothing "
                "can be compiled while a CUDA graph is captured; run the call once before the "
                "capture, or call Buffer.warmup()"
            )
        launch = self._bind(shape, config)
        agree_on_kernel(self._group, config)
        self._launches[shape] = launch
        return launch

    def compile_ahead(self, archs: Iterable[str]) -> None:
        """Compiles the kernels of this buffer into the cache, for other architectures."""
        for arch in archs:
            for config, transport in self._ahead(arch):
                compile_kernel(config, arch=arch, transport=transport)

    def _kernel(self, config: C, transport: str = "nvshmem") -> Kernel[C]:
        return Kernel(config, device=self._device.index, transport=transport)

    # ---- outputs ---------------------------------------------------------------------------------

    @staticmethod
    def _forms(
        num_rows: int,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
    ) -> tuple[Form | None, ...]:
        """Outputs of a dispatch of `num_rows` rows, in the order of `Received`."""
        rows = matrix(x.dtype, num_rows, x.shape[1])
        row_scales = None if scales is None else matrix(scales.dtype, num_rows, scales.shape[1])
        if topk_idx is None:
            return rows, row_scales, None, None
        num_topk = topk_idx.shape[1]
        choices = matrix(topk_idx.dtype, num_rows, num_topk)
        return rows, row_scales, choices, matrix(torch.float32, num_rows, num_topk)

    @staticmethod
    def _inputs(
        x: torch.Tensor,
        scales: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
    ) -> dict[str, int]:
        """Parameters for what a dispatch reads."""
        return {
            "x": x.data_ptr(),
            "scales": pointer(scales),
            "scale_token_stride": 0 if scales is None else scales.stride(0),
            "scale_stride": 0 if scales is None else scales.stride(1),
            "topk_idx": pointer(topk_idx),
            "topk_weights": pointer(topk_weights),
            "num_tokens": x.shape[0],
        }

    @staticmethod
    def _outputs(received: Received) -> dict[str, int]:
        """Parameters for what a dispatch writes."""
        recv_x, recv_scales, recv_topk_idx, recv_topk_weights = received
        return {
            "recv_x": recv_x.data_ptr(),
            "recv_scales": pointer(recv_scales),
            "recv_topk_idx": pointer(recv_topk_idx),
            "recv_topk_weights": pointer(recv_topk_weights),
            "num_recv_rows": recv_x.shape[0],
        }

    def _combined(
        self,
        scope: GpuScope,
        x: torch.Tensor,
        num_tokens: int,
        topk_weights: torch.Tensor | None,
        bias: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], dict[str, int]]:
        """Outputs of a combine, and parameters for what it sums."""
        forms = (
            matrix(x.dtype, num_tokens, x.shape[1]),
            None
            if topk_weights is None
            else matrix(torch.float32, num_tokens, topk_weights.shape[1]),
        )
        with scope.allocating():
            combined_x, combined_weights = self._empty(forms)
        values = {
            "x": x.data_ptr(),
            "topk_weights": pointer(topk_weights),
            "bias_0": pointer(bias[0]),
            "bias_1": pointer(bias[1]),
            "combined_x": combined_x.data_ptr(),
            "combined_topk_weights": pointer(combined_weights),
            "num_rows": x.shape[0],
            "num_tokens": num_tokens,
        }
        return (combined_x, combined_weights), values

    # ---- the host's waits, faults, the end -------------------------------------------------------

    def _ask_for_counts(self, waits: bool) -> int:
        """Where notify shall leave its counts; with `waits`, `_wait_for_counts` reads them."""
        if waits:
            self._host_counts.array[0] = -1
        return self._host_counts.device_ptr + (0 if waits else 8 * self._num_counts)

    def _wait_for_counts(self, num_counts: int) -> list[int]:
        """Polls host memory for the counts of notify; other threads run meanwhile."""
        counts = self._host_counts.array
        start = time.monotonic()
        deadline = start + 2 * self._timeout_seconds + 10
        while counts[0] < 0:
            self._raise_failed_wait()
            now = time.monotonic()
            if now > deadline:
                raise CommunicationError(
                    f"dispatch: the counts did not reach the host of rank {self._group.rank} "
                    f"within {2 * self._timeout_seconds + 10:g} s: its stream does not get to "
                    "run",
                    op="dispatch",
                    rank=self._group.rank,
                )
            if now > start + _SPIN_SECONDS:
                nap()  # the GPU idles until this thread has seen the counts
        return counts[:num_counts].tolist()

    def raise_fault(self) -> None:
        """Raises what an operation on the device left behind; rows without room once.

        Raises:
            CommunicationError: Names operation, rank and peer; or operation, rank, how many rows
                came, and how many fit.
        """
        self._raise_failed_wait()
        overflow = self._fault.take_overflow()
        if overflow is not None:
            raise no_room(overflow)

    def _raise_failed_wait(self) -> None:
        """Raises what makes the buffer unusable until `reset`."""
        self._fault.raise_if_set()
        if self._half_way:
            raise CommunicationError(
                f"a dispatch of rank {self._group.rank} ended half way ({self._half_way}), so that "
                "its peers are ahead of it; call reset() on all ranks",
                op="dispatch",
                rank=self._group.rank,
            )

    @contextmanager
    def _between_kernels(self) -> Iterator[None]:
        """The part of a dispatch from its notify on: who leaves it early wants a reset()."""
        try:
            yield
        except BaseException as error:  # also an interrupt, or no memory for the outputs
            self._half_way = repr(error)
            raise

    @abstractmethod
    def _control(self) -> list[torch.Tensor]:
        """What of the symmetric memory is not the user's: bytes; the first starts with signals."""

    def reset(self) -> None:
        """Forgets everything that was under way; collective."""
        synchronize(self._device)
        self._group.reset()
        self._drain()
        for control in self._control():
            control.zero_()
        self._local.zero_()
        torch.cuda.synchronize(self._device)
        self._fault.clear()
        self._half_way = ""
        self._group.barrier(op="reset")

    def _drain(self) -> None:
        """Nothing of what this rank has sent is on its way afterwards; collective."""
        return

    def give_up(self) -> None:
        """Ends the waits of what is queued, as a fault does, and those of the end soon."""
        self._patience = min(self._patience, GIVE_UP_SECONDS)
        raise_abort(self._local[_ABORT:].data_ptr(), self._device.index)

    def _leave(self) -> None:
        """Waits until the peers have finished the last operation; not collective.

        A peer may still read this rank's slots when this rank is done. Its `finish` signal says
        when it is not; a peer that never sends it is not waited for longer than the timeout.
        """
        torch.cuda.synchronize(self._device)
        signals = self._control()[0][: 8 * len(self.memory.peer_ptrs)].view(torch.int64)
        own = self.memory.peer_ptrs.index(self.memory.ptr)
        epoch = int(self._local[_EPOCH]) & 0xFFFFFFFF
        deadline = time.monotonic() + self._patience
        while not self._fault.is_set and time.monotonic() < deadline:
            finished = [value >> 32 & 0xFFFFFFFF for value in signals.tolist()]
            # A peer may be one ahead (has_reached of sync.cuh): it does not wait for a rank that
            # has no rows for it.
            ahead = [(value - epoch) & 0xFFFFFFFF for value in finished]
            if all(steps <= 1 for rank, steps in enumerate(ahead) if rank != own):
                break
            time.sleep(0.001)
        else:
            self._is_lost = True
        self._launches.clear()


def agree_on_kernel(group: Group, config: KernelConfig) -> None:
    """All ranks have chosen the same kernel; collective.

    Raises:
        RuntimeError: They have not.
        CommunicationError: A rank does not come; names it.
    """
    group.agree(
        f"kernels for {config.op}",
        config,
        remedy=f"set {CHOICES[config.op].variable.name} to the same value everywhere, or give all "
        "ranks the same EPJIT_CACHE_DIR (tuned.json is in it)",
        op=config.op,
    )


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of a tensor, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def row_bytes(rows: torch.Tensor) -> int:
    """Bytes of one row."""
    return rows.shape[1] * rows.element_size()


def dispatch_shape(
    x: torch.Tensor, scales: torch.Tensor | None, topk_idx: torch.Tensor | None
) -> DispatchShape:
    """The shape of a dispatch of these tensors."""
    return DispatchShape(
        row_bytes(x),
        0 if scales is None else scales.shape[1],
        0 if topk_idx is None else topk_idx.shape[1],
        topk_idx is None or topk_idx.dtype == torch.int64,
    )


def combine_shape(x: torch.Tensor, topk_weights: torch.Tensor | None) -> CombineShape:
    """The shape of a combine of these tensors."""
    num_topk = 0 if topk_weights is None else topk_weights.shape[1]
    return CombineShape(row_bytes(x), num_topk, is_f16=x.dtype == torch.float16)
