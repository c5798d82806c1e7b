"""The Buffer of a group: made at the first call, grown with the rows, found by a name."""

from __future__ import annotations

import functools
import itertools
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from epjit.buffer import Buffer
from epjit.config import MAX_RANKS
from epjit.modes.make import use_gpu
from epjit.numbers import as_int
from epjit.runtime.group import Group, as_process_group
from epjit.runtime.topology import Topology, find_topology

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_log = logging.getLogger(__name__)

GroupLike: TypeAlias = "dist.ProcessGroup | DeviceMesh | str"


_managed: dict[str, Buffer] = {}
_in_graphs: dict[Buffer, None] = {}  # a CUDA graph may use them; a dict, for its order
_registered: dict[str, Buffer] = {}
_topologies: dict[str, tuple[dist.ProcessGroup, Topology]] = {}
_numbers = itertools.count()


def get_buffer(group: dist.ProcessGroup | DeviceMesh, hidden_bytes: int) -> Buffer:
    """The Buffer of a group, made or grown so that rows of `hidden_bytes` travel well.

    Collective when it is the first for this group, or when rows are longer than all before (or
    `Buffer.set_num_sms` asks for more). Then the one before is destroyed, unless a CUDA graph may
    use it: one that was asked for during a capture, as every call of `epjit.moe` asks, stays
    beside its successor until `free_buffers`.

    Args:
        group: The ranks.
        hidden_bytes: Bytes of one row.

    Raises:
        RuntimeError: A Buffer would have to be made while a CUDA graph is captured.
    """
    if not isinstance(group, dist.ProcessGroup):
        group = as_process_group(group)
    num_local = min(_topology(group).num_local, MAX_RANKS)
    needed, rdma = _bytes_needed(group.size(), num_local, hidden_bytes, Buffer.num_sms)
    found = _managed.get(group.group_name)
    # A group that was destroyed and made again has the same name and needs a Buffer of its own.
    is_usable = found is not None and found.group is group and found.runtime is not None
    has_room = found is not None and found.num_nvl_bytes >= needed and found.num_rdma_bytes >= rdma
    if found is not None and is_usable and has_room:
        if _is_capturing():
            _in_graphs[found] = None
        return found
    _refuse_in_capture(group)
    if found is not None:
        del _managed[group.group_name]
        if found not in _in_graphs:
            _destroy(found)
    made = Buffer(group, needed, rdma)
    _managed[group.group_name] = made
    _log.info(
        "%s the Buffer of group %r: rank %d of %d, rows of %d bytes, num_nvl_bytes=%d, "
        "num_rdma_bytes=%d",
        "grew" if is_usable else "made",
        group.group_name,
        made.rank,
        made.group_size,
        hidden_bytes,
        needed,
        rdma,
    )
    return made


def worst_tokens(num_tokens: int, *, group: GroupLike) -> int:
    """Rows that are enough on every rank: a `num_worst_tokens` that all ranks agree on.

    Collective, and the host waits, so call it once, outside of what is compiled or captured.

    Args:
        num_tokens: The most tokens that this rank will pass to a `dispatch`; other ranks may pass
            another number.
        group: As in `dispatch`.

    Returns:
        The largest `num_tokens` of all ranks times the number of ranks, the same on all of them.

    Raises:
        CommunicationError: A rank did not come (of a Buffer's own group; a process group raises
            what it does).
    """
    mine, name = as_int("num_tokens", num_tokens, least=0), name_of(group)
    buffer = _registered.get(name)
    if buffer is not None:
        return max(buffer._links.allgather(mine)) * buffer.group_size
    process_group = _resolve(name)
    everybodys: list[Any] = [None] * process_group.size()
    dist.all_gather_object(everybodys, mine, group=process_group)
    return int(max(everybodys)) * len(everybodys)


def free_buffers() -> None:
    """Frees the Buffers of `get_buffer`; as any Buffer, they are freed at exit, too.

    Before or after `destroy_process_group`; a rank that has gone is not waited for long. CUDA
    graphs that captured calls of `epjit.moe` must not be replayed afterwards.
    """
    _topologies.clear()
    buffers = dict.fromkeys((*_in_graphs, *_managed.values()))
    _in_graphs.clear()
    _managed.clear()
    for buffer in buffers:
        _destroy(buffer)


def register_buffer(buffer: Buffer) -> str:
    """Gives a Buffer of your own a name that the functions of `epjit.moe` take as `group`.

    The Buffer stays yours to destroy, and is kept alive until `unregister_buffer`. Between NVLink
    domains it needs `num_rdma_bytes`.
    """
    name = f"epjit-buffer-{next(_numbers)}"
    _registered[name] = buffer
    return name


def unregister_buffer(name: str) -> None:
    """Forgets a name of `register_buffer`."""
    del _registered[name]


@functools.cache
def _bytes_needed(
    num_ranks: int, num_local: int, hidden_bytes: int, num_sms: int
) -> tuple[int, int]:
    """`num_nvl_bytes`, `num_rdma_bytes`; cached by `num_sms`, as the default configs have it."""
    configs = (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks))
    sizes = (hidden_bytes, num_ranks)
    return (
        max(c.get_nvl_buffer_size_hint(*sizes, ranks_per_domain=num_local) for c in configs),
        max(c.get_rdma_buffer_size_hint(*sizes, ranks_per_domain=num_local) for c in configs),
    )


def _topology(group: dist.ProcessGroup) -> Topology:
    """The NVLink domains of a group; collective when nobody has asked before."""
    known, topology = _topologies.get(group.group_name, (None, None))
    if topology is None or known is not group:
        _refuse_in_capture(group)
        device = torch.cuda.current_device() if use_gpu() else None
        topology = find_topology(Group.from_torch(group), device=device)
        _topologies[group.group_name] = group, topology
    return topology


def _refuse_in_capture(group: dist.ProcessGroup) -> None:
    if _is_capturing():
        raise RuntimeError(
            f"the group {group.group_name!r} needs a Buffer, which cannot be made while a CUDA "
            "graph is captured; call epjit.moe.get_buffer(group, hidden_bytes) before"
        )


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _destroy(buffer: Buffer) -> None:
    if buffer.runtime is not None:
        buffer.runtime.destroy()


def name_of(group: GroupLike) -> str:
    """The name by which a group travels."""
    name = group if isinstance(group, str) else getattr(group, "group_name", None)
    return name if isinstance(name, str) else as_process_group(group).group_name


def _resolve(name: str) -> dist.ProcessGroup:
    # What torch's own functional collectives do; there is no public way from a name to a group.
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def buffer_of(name: str, x: Tensor) -> Buffer:
    """The Buffer of a group for rows such as those of `x`; collective when it is the first."""
    found = _registered.get(name)
    if found is not None:
        return found
    # A Buffer lives on the GPU that is current where it is made: that of x, in any thread.
    with nullcontext() if x.device.type == "cpu" else torch.cuda.device(x.device):
        return get_buffer(_resolve(name), x.shape[1] * x.element_size())


def count_ranks(name: str) -> int:
    """Ranks of a group."""
    found = _registered.get(name)
    return _resolve(name).size() if found is None else found.group_size


def count_domains(name: str, *, dry: bool) -> int:
    """NVLink domains of a group: what its handles look like. Collective the first time.

    Not where one rank may be alone, under `torch.export` or when only shapes are asked for (`dry`):
    there, one domain when nobody has asked before; the run notices if that was wrong.
    """
    registered = _registered.get(name)
    if registered is not None:
        return 1 if registered.runtime is None else registered.runtime.get_num_rdma_ranks()
    group = _resolve(name)
    known, _ = _topologies.get(name, (None, None))
    alone = dry or torch.compiler.is_exporting()
    return 1 if alone and known is not group else _topology(group).num_domains


# torch.compiler.assume_constant_result without its import of the compiler, which takes a second.
count_domains._dynamo_marked_constant = True  # type: ignore[attr-defined]
