"""The parts of a Buffer: on a GPU, or on the CPU with the same methods."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from epjit import env
from epjit.scope import CpuStreams, Streams

if TYPE_CHECKING:
    from epjit.calls import Settings
    from epjit.modes.cpu import CpuLowLatency, CpuNormal
    from epjit.modes.internode import Internode
    from epjit.modes.intranode import Intranode
    from epjit.modes.low_latency import LowLatency
    from epjit.runtime.group import Group
    from epjit.runtime.topology import Topology

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


class Parts(NamedTuple):
    """The parts of a Buffer; `low_latency` is None unless it was asked for."""

    streams: AnyStreams
    normal: AnyNormal
    low_latency: AnyLowLatency | None


def make_parts(
    settings: Settings,
    group: Group,
    topology: Topology,
    resources: ExitStack,
    device: torch.device,
) -> Parts:
    """The parts of a Buffer whose tensors live on `device`; collective.

    Args:
        settings: Of the Buffer.
        group: The ranks.
        topology: Their NVLink domains.
        resources: Gets what is made; its owner closes it, also when not all can be made.
        device: A GPU, or the CPU.
    """
    if device.index is None:
        return _on_cpu(settings, group, topology)
    from epjit.modes.internode import Internode
    from epjit.modes.intranode import Intranode
    from epjit.modes.low_latency import LowLatency
    from epjit.runtime.stream import CommStream

    comm = CommStream(device.index)
    resources.callback(lambda _: None, comm)  # freed with its last reference
    mode: Intranode | Internode
    if topology.spans_domains:
        mode = Internode(settings, group, topology, resources, device)
    else:
        mode = Intranode(settings, group, resources, device)
    low_latency = None
    if settings.low_latency_mode:
        low_latency = LowLatency(settings, group, topology, resources, device)
    return Parts(Streams(comm), mode, low_latency)


def _on_cpu(settings: Settings, group: Group, topology: Topology) -> Parts:
    from epjit.modes.chosen import ChosenKernels
    from epjit.modes.cpu import CpuLowLatency, CpuNormal

    chosen = ChosenKernels(settings, group, topology)
    mode = CpuNormal(settings, group, topology, chosen)
    low_latency = CpuLowLatency(settings, group, chosen) if settings.low_latency_mode else None
    return Parts(CpuStreams(), mode, low_latency)
