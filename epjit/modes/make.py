"""The parts of a Buffer: on a GPU, or on the CPU with the same methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from epjit import env
from epjit.scope import CpuStreams, Streams

if TYPE_CHECKING:
    from epjit.calls import Setup
    from epjit.modes.cpu import CpuLowLatency, CpuNormal
    from epjit.modes.internode import Internode
    from epjit.modes.intranode import Intranode
    from epjit.modes.low_latency import LowLatency

AnyStreams: TypeAlias = Streams | CpuStreams
AnyNormal: TypeAlias = "Intranode | Internode | CpuNormal"
AnyLowLatency: TypeAlias = "LowLatency | CpuLowLatency"


def use_gpu() -> bool:
    """Whether Buffers live on a GPU.

    Raises:
        RuntimeError: ``EPJIT_BACKEND`` asks for one, and torch finds none.
    """
    backend = env.backend()
    if backend == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("EPJIT_BACKEND=cuda, but torch finds no GPU; unset it to run on the CPU")
    return backend != "cpu" and torch.cuda.is_available()


def new_device() -> torch.device:
    """The device of a new Buffer."""
    if use_gpu():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def make_parts(setup: Setup) -> tuple[AnyStreams, AnyNormal, AnyLowLatency | None]:
    """The parts of a Buffer, the low-latency one if it was asked for; collective."""
    device, wants_low_latency = setup.device, setup.settings.low_latency_mode
    if device.index is None:
        from epjit.modes.chosen import ChosenKernels
        from epjit.modes.cpu import CpuLowLatency, CpuNormal

        chosen = ChosenKernels(setup)
        on_cpu = CpuLowLatency(setup, chosen) if wants_low_latency else None
        return CpuStreams(), CpuNormal(setup, chosen), on_cpu
    from epjit.runtime.stream import CommStream

    comm = CommStream(device.index)
    setup.resources.callback(lambda _: None, comm)  # freed with its last reference
    streams = Streams(comm, setup.resources)  # first, so that its tensors go when modes are done
    mode: Internode | Intranode
    if setup.topology.spans_domains:  # each loads kernels of its own
        from epjit.modes.internode import Internode

        mode = Internode(setup)
    else:
        from epjit.modes.intranode import Intranode

        mode = Intranode(setup)
    if not wants_low_latency:
        return streams, mode, None
    from epjit.modes.low_latency import LowLatency

    return streams, mode, LowLatency(setup)
