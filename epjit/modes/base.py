"""The base of all modes on a GPU: memory, own words, launches by shape, faults, and the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from epjit import env
from epjit.calls import Setup
from epjit.config import MAX_RANKS
from epjit.runtime.device import arch_of
from epjit.runtime.empty import empty_on
from epjit.runtime.fault import FaultRecord, raise_abort
from epjit.runtime.interrupt import interruptible, synchronize
from epjit.runtime.kernel import C, Kernel, KernelConfig, compile_kernel
from epjit.runtime.launch import Launch
from epjit.runtime.transport import RemoteMemory, Transport, make_transport

if TYPE_CHECKING:
    from epjit.runtime.symmetric import SymmetricMemory

Shape = TypeVar("Shape")


class Mode(ABC, Generic[Shape]):
    """Everything one rank needs for the operations of one mode. Collective to make.

    A constructor ends with `_meet`, and gives what has to be freed to the resources as soon as it
    is made.

    Args:
        setup: All that it is made from.

    Attributes:
        memory: Symmetric memory; what users may see comes first.
    """

    memory: SymmetricMemory | RemoteMemory
    _signals_at: int
    """Offset of the signals in `memory`, in bytes: from there on nothing is the user's."""
    _warmup: ClassVar[str]
    """The method of Buffer that compiles ahead."""

    def __init__(self, setup: Setup) -> None:
        settings, group, topology, device, resources = setup
        self._group, self._topology, self._device = group, topology, device
        self._timeout_seconds = settings.timeout_seconds
        self._transport: Transport | None = None  # reaches the ranks of other NVLink domains
        if topology.spans_domains:
            self._transport = make_transport(
                group,
                topology,
                device=device.index,
                num_qps_per_rank=settings.num_qps_per_rank,
                use_fabric=settings.use_fabric,
                may_lose_ranks=settings.enable_shrink,
            )
            resources.callback(self._transport.close)
        self._arch = arch_of(device.index)
        self._empty = empty_on(device)
        self._words: list[torch.Tensor] = []
        self._epoch, self._abort = self._own_words(2).split(1)
        self._fault = FaultRecord()
        resources.callback(self._fault.close)
        # By type and value: shapes are tuples, and those of two operations may be equal.
        self._launches: dict[tuple[type, Shape], Launch[Any]] = {}

    def _own_words(self, num_words: int) -> torch.Tensor:
        """Words of this rank that no peer reaches: int32 `[num_words]`, 0 here and after `reset`.

        They share no cache line with others: some are polled while others are counted in.
        """
        words = torch.zeros(num_words, dtype=torch.int32, device=self._device)
        self._words.append(words)
        return words

    def _meet(self, resources: ExitStack) -> None:
        """Ends a constructor: from here on peers may write to the memory. Collective.

        Raises:
            CommunicationError: A rank does not come; names it.
        """
        torch.cuda.synchronize(self._device)
        self._group.barrier()
        resources.callback(self._leave)

    def _everywhere(
        self, offset: int, memory: SymmetricMemory | RemoteMemory | None = None
    ) -> list[int]:
        """The address of the same part of `memory` on every rank of this NVLink domain.

        What ranks of other domains have is at 0 in `peer_ptrs`.
        """
        pointers = (self.memory if memory is None else memory).peer_ptrs
        found = [pointer + offset for pointer in pointers if pointer]
        return found + [0] * (MAX_RANKS - len(found))

    def _common(self) -> dict[str, object]:
        """Parameters that all kernels which meet a peer have."""
        return {
            "signals": self._everywhere(self._signals_at),
            "epoch": self._epoch.data_ptr(),
            "abort": self._abort.data_ptr(),
            "fault": self._fault.device_ptr,
            "timeout_ns": int(self._timeout_seconds * 1e9),
            "rank": self._group.rank,
        }

    # ---- launches --------------------------------------------------------------------------------

    @abstractmethod
    def _config(self, shape: Shape) -> KernelConfig:
        """The kernel of a shape on this GPU. Not collective; compiles nothing.

        Raises:
            ValueError: The variant that was asked for does not exist, or not for this GPU.
        """

    @abstractmethod
    def _bind(self, config: Any) -> Launch[Any]:
        """Compiles and loads; binds what stays the same from call to call. Not collective.

        Raises:
            ValueError: The buffer is too small.
            CompileError, ImportError: As `compile_kernel`.
        """

    @abstractmethod
    def _agree(self, config: KernelConfig, **sizes: int) -> None:
        """All ranks have chosen this kernel for calls of these sizes. Collective.

        A mode that goes on without lost ranks must not wait for them, and returns at once.

        Raises:
            RuntimeError: They have not; says what each has.
            CommunicationError: A rank does not come; names it.
        """

    @abstractmethod
    def _configs_on(self, arch: str, shapes: Iterable[Shape]) -> Iterable[KernelConfig]:
        """The kernels of a buffer that makes calls of these shapes, for another architecture.

        Raises:
            ValueError: As `_config`.
        """

    def launch(self, shape: Shape, **sizes: int) -> Launch[Any]:
        """The launch of a shape; collective when it is the first of its kind.

        Args:
            shape: All that its kernel is chosen by.
            sizes: All else that the first call must have in common with that of the other ranks.

        Raises:
            RuntimeError: It would have to be compiled while a CUDA graph is captured, or the ranks
                chose different kernels or `sizes`.
            ValueError: As `_config` and `_bind`.
            CommunicationError: A rank does not come; names it.
        """
        found = self._launches.get((type(shape), shape))
        return found if found is not None else self._build(shape, **sizes)

    def _build(self, shape: Shape, **sizes: int) -> Launch[Any]:
        """Compiles and loads, then meets the group: nobody may wait for a peer that compiles."""
        config = self._config(shape)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{config.op} needs a kernel for {config} that is not compiled yet, and nothing "
                "can be compiled while a CUDA graph is captured; run the call once before the "
                f"capture, or call Buffer.{self._warmup}()"
            )
        launch = self._load(shape, config)
        self._agree(config, **sizes)
        self._launches[type(shape), shape] = launch
        return launch

    def _load(self, shape: Shape, config: KernelConfig) -> Launch[Any]:
        """Compiles and loads all that calls of a shape launch; returns the launch of `config`."""
        del shape
        return self._bind(config)

    def warmup(self, shapes: Iterable[Shape], **sizes: int) -> None:
        """Makes the launches of shapes, and compiles for ``TORCH_CUDA_ARCH_LIST`` into the cache.

        Collective, as `launch`, whose errors it raises.
        """
        shapes = tuple(shapes)
        for shape in shapes:
            self.launch(shape, **sizes)
        for arch in env.torch_cuda_arch_list():
            for config in self._configs_on(arch, shapes):
                compile_kernel(config, arch=arch, body=self._body)

    def _kernel(self, config: C) -> Kernel[C]:
        """Compiled and loaded, and linked with the transport when it needs one."""
        return Kernel(config, device=self._device.index, body=self._body)

    @property
    def _body(self) -> str:
        """Which body of transport.cuh kernels get; without a transport none of them needs one."""
        return "nvshmem" if self._transport is None else self._transport.body

    # ---- faults, the end -------------------------------------------------------------------------

    def raise_fault(self) -> None:
        """Raises what a wait on the device left behind.

        Raises:
            CommunicationError: Names operation, rank and peer.
        """
        if self._fault.state is not None and self._fault.state[0]:
            self._fault.raise_if_set()

    def reset(self) -> None:
        """Forgets everything that was under way; collective.

        Raises:
            CommunicationError: A rank does not come; names it.
            KeyboardInterrupt: In a wait; the reset has to be made again.
        """
        synchronize(self._device)
        self._group.reset()
        if self._transport is not None:
            interruptible(self._transport.quiet)  # what is on its way must not come after the zeros
            self._group.barrier(op="reset")
        for words in (*self._control(), *self._words):
            words.zero_()
        torch.cuda.synchronize(self._device)
        self._fault.clear()
        self._group.barrier(op="reset")

    def _control(self) -> list[torch.Tensor]:
        """Control areas of the symmetric memory, as bytes; the first begins with the signals."""
        return [self.memory.tensor(torch.uint8)[self._signals_at :]]

    def give_up(self) -> None:
        """Ends the waits of what is queued, as a fault does; `_leave` will wait for less."""
        raise_abort(self._abort.data_ptr(), self._device.index)

    def _leave(self) -> None:
        """Waits until the memory can be given away; not collective, and for no lost peer."""
        torch.cuda.synchronize(self._device)
        is_whole = self._wait_for_peers()
        self._launches.clear()
        if is_whole and self._transport is not None:
            self._transport.quiet()  # the memory may be another Buffer's next

    @abstractmethod
    def _wait_for_peers(self) -> bool:
        """Waits until no peer reads or writes here, when this rank's own work is done.

        Not collective. Bounded by the timeout, and short after `give_up`. Raises nothing of its
        own: a peer that is lost is told by the result.

        Returns:
            Whether all peers are there; what was sent to one that is lost might never leave.
        """
