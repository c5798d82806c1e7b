"""Dispatch and combine with gradients, for eager torch, `torch.compile` and `torch.export`.

`dispatch` sends tokens to the ranks of their experts, `combine` brings the results back and sums
them; each is the other's gradient. They are `torch.library` operators with fake kernels: sizes are
static with `num_worst_tokens`, and symbols that only the run knows without it. What a dispatch
leaves for its combine is tensors, so autograd, activation checkpointing and graphs carry it like
any other value. `expert_major=True` orders the rows by expert, padded, with the counts on the
device, as grouped matrix products take them.

A group travels by its name: `group` is a torch process group, its name, or the name that
`register_buffer` gave. The `Buffer` behind it is made at the first call, grows with the rows, and
is freed at exit or by `free_buffers`.

Rows are bfloat16 or float16. Under `torch.autocast` rows of either, or of float32, are cast to its
dtype first, as `torch.nn.Linear` does; `topk_weights` stay float32. A tensor that is not
contiguous, or does not start at a multiple of 16 bytes, is copied, gradients too.

Words in the shapes: `T` tokens of this rank, `H` elements a row, `K` choices a token, `E` experts
over all ranks, `L` experts of this rank, `R` ranks, `n` received tokens, `M` rows by expert.
"""

from __future__ import annotations

import functools
import itertools
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from epjit import expert_major as by_expert
from epjit.buffer import SLOTS, SLOTS_BETWEEN_DOMAINS, Buffer, Slots, use_gpu
from epjit.check import check, check_dry_rows, check_no_transform, is_dry
from epjit.config import MAX_RANKS
from epjit.numbers import as_int
from epjit.reference.expert_major import Placement
from epjit.reference.intranode import Handle
from epjit.runtime.group import Group, as_process_group
from epjit.runtime.topology import find_topology

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Dispatched",
    "ExpertHandle",
    "ExpertRows",
    "combine",
    "dispatch",
    "free_buffers",
    "fused_combine",
    "fused_dispatch",
    "get_buffer",
    "grouped_mm",
    "permute",
    "register_buffer",
    "unpermute",
    "unregister_buffer",
    "worst_tokens",
]

_log = logging.getLogger(__name__)

GroupLike: TypeAlias = "dist.ProcessGroup | DeviceMesh | str"

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # torch leaves float64 alone


class Dispatched(NamedTuple):
    """What `dispatch` returns.

    Attributes:
        x: `[n, H]`, by source rank, then by token.
        topk_idx: `[n, K]`, local experts, -1 for those of other ranks.
        topk_weights: float32 `[n, K]`, 0 where the index is -1.
        tokens_per_expert: int32 `[L]` on the device, not padded.
        handle: For `combine`.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    tokens_per_expert: Tensor
    handle: Handle


class ExpertHandle(NamedTuple):
    """What an expert-major dispatch leaves for `combine`."""

    routing: Handle
    placement: Placement


class ExpertRows(NamedTuple):
    """Rows in the order of the experts.

    Attributes:
        x: `[M, H]`: expert 0's rows, zeros up to a multiple of the alignment, expert 1's rows, ...
            Behind `ends[-1]` there are zeros where gradients are recorded
            (`torch.is_grad_enabled()`), so that none becomes NaN; else it is undefined there.
        weights: float32 `[M]`, 0 for padding.
        ends: int32 `[L]`: where each expert's rows end, padding included; `offs` of a grouped
            matrix product.
        tokens_per_expert: int32 `[L]`, without padding.
        handle: For `combine` (of `dispatch`) or `unpermute` (of `permute`).
    """

    x: Tensor
    weights: Tensor
    ends: Tensor
    tokens_per_expert: Tensor
    handle: Any


# ---- buffers ------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """How the NVLink domains cut a group."""

    group: dist.ProcessGroup
    num_domains: int
    num_local: int


_managed: dict[str, Buffer] = {}
_in_graphs: dict[Buffer, None] = {}  # a CUDA graph may use them; a dict, for its order
_registered: dict[str, Buffer] = {}
_cuts: dict[str, _Cut] = {}
_numbers = itertools.count()


def get_buffer(group: dist.ProcessGroup | DeviceMesh, hidden_bytes: int) -> Buffer:
    """The Buffer of a group, made or grown so that rows of `hidden_bytes` travel well.

    Collective when it is the first for this group, or when rows are longer than all before (or
    `Buffer.set_num_sms` asks for more). Then the one before is destroyed, unless a CUDA graph may
    use it: one that was asked for during a capture, as every call of this module asks, stays
    beside its successor until `free_buffers`.

    Args:
        group: The ranks.
        hidden_bytes: Bytes of one row.

    Raises:
        RuntimeError: A Buffer would have to be made while a CUDA graph is captured.
    """
    if not isinstance(group, dist.ProcessGroup):
        group = as_process_group(group)
    num_local = min(_cut(group).num_local, MAX_RANKS)
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
    mine, name = as_int("num_tokens", num_tokens, least=0), _name(group)
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
    graphs that captured calls of this module must not be replayed afterwards.
    """
    _cuts.clear()
    buffers = dict.fromkeys((*_in_graphs, *_managed.values()))
    _in_graphs.clear()
    _managed.clear()
    for buffer in buffers:
        _destroy(buffer)


def register_buffer(buffer: Buffer) -> str:
    """Gives a Buffer of your own a name that the functions of this module take as `group`.

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


def _cut(group: dist.ProcessGroup) -> _Cut:
    """The NVLink domains of a group; collective when nobody has asked before."""
    found = _cuts.get(group.group_name)
    if found is None or found.group is not group:
        _refuse_in_capture(group)
        device = torch.cuda.current_device() if use_gpu() else None
        topology = find_topology(Group.from_torch(group), device=device)
        found = _Cut(group, topology.num_domains, topology.num_local)
        _cuts[group.group_name] = found
    return found


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


def _name(group: GroupLike) -> str:
    name = group if isinstance(group, str) else getattr(group, "group_name", None)
    return name if isinstance(name, str) else as_process_group(group).group_name


def _resolve(name: str) -> dist.ProcessGroup:
    # What torch's own functional collectives do; there is no public way from a name to a group.
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _buffer(name: str, x: Tensor) -> Buffer:
    found = _registered.get(name)
    if found is not None:
        return found
    # A Buffer lives on the GPU that is current where it is made: that of x, in any thread.
    with nullcontext() if x.device.type == "cpu" else torch.cuda.device(x.device):
        return get_buffer(_resolve(name), x.shape[1] * x.element_size())


def _num_ranks(name: str) -> int:
    found = _registered.get(name)
    return _resolve(name).size() if found is None else found.group_size


def _num_domains(name: str, *, dry: bool) -> int:
    """NVLink domains of a group: what its handles look like. Collective the first time.

    Not where one rank may be alone, under `torch.export` or when only shapes are asked for (`dry`):
    there, one domain when nobody has asked before; the run notices if that was wrong.
    """
    registered = _registered.get(name)
    if registered is not None:
        return 1 if registered.runtime is None else registered.runtime.get_num_rdma_ranks()
    group = _resolve(name)
    found = _cuts.get(name)
    is_known = found is not None and found.group is group
    alone = dry or torch.compiler.is_exporting()
    return 1 if alone and not is_known else _cut(group).num_domains


# torch.compiler.assume_constant_result without its import of the compiler, which takes a second.
_num_domains._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- arguments ----------------------------------------------------------------------------------


def _moved(x: Tensor) -> Tensor:
    """Rows as the kernels take them: x, or a copy where it is not contiguous or at an odd address.

    In the operators, so that it sees the addresses of the run, those of gradients too.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _autocast(x: Tensor) -> Tensor:
    """Rows as a matrix product under torch.autocast takes them.

    Not torch.library.register_autocast: it has one dtype for all time, and casts weights too.
    """
    kind = x.device.type
    if x.dtype not in _AUTOCAST_DTYPES or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _rows(x: Tensor) -> Tensor:
    """A matrix of rows, cast under torch.autocast."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x is a {type(x).__name__}, expected a torch.Tensor (rows with scales travel by "
            "Buffer.dispatch)"
        )
    if not torch.compiler.is_compiling():
        check_no_transform("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (number of rows, hidden)")
    return _autocast(x)


def _check_comes_back(x: Tensor, weights: Tensor, *, is_combined: bool) -> None:
    """Checks that rows are of a dtype that is summed: by combine, and by the gradient of a copy."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    if x.dtype not in by_expert.SUM_DTYPES and (is_combined or needs_grad):
        raise TypeError(
            f"x has dtype {x.dtype}, but what comes back is summed in bfloat16 or float16; convert "
            "it with .to(torch.bfloat16), or run the layer under torch.autocast"
        )


def _size(name: str, value: int, least: int) -> int:
    """A number that a caller passes; sizes that are traced stay symbols."""
    return value if isinstance(value, torch.SymInt) else as_int(name, value, least=least)


# ---- operators: communication -------------------------------------------------------------------

# Between domains a handle has more tensors: in one domain these are None, and empty in the results
# of the operator. (Lists of tensors cost the host 30 to 50 us an operator.)
_MOST, _LEAST = SLOTS_BETWEEN_DOMAINS.number, SLOTS.number
_HANDLE = ", ".join(f"Tensor{'?' * (i >= _LEAST)} h{i}" for i in range(_MOST))
_TENSORS = ", ".join(["Tensor"] * (6 + _MOST))


def _slots(num_domains: int) -> Slots:
    return SLOTS if num_domains == 1 else SLOTS_BETWEEN_DOMAINS


def _padded(handle: Handle) -> tuple[Tensor | None, ...]:
    """A handle as the operators take it."""
    return (*handle, *[None] * (_MOST - len(handle)))


def _as_handle(tensors: Any) -> tuple[Handle, Slots]:
    """A handle as a Buffer takes it."""
    handle = tuple(tensor for tensor in tensors if tensor is not None)
    return handle, SLOTS if len(handle) == _LEAST else SLOTS_BETWEEN_DOMAINS


@torch.library.custom_op(
    "epjit::dispatch",
    mutates_args=(),
    schema="(Tensor x, Tensor topk_idx, Tensor topk_weights, int num_experts, "
    "int num_worst_tokens, int expert_alignment, int num_expert_rows, int num_domains, str group) "
    f"-> ({_TENSORS})",
)
def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_worst_tokens: int,
    expert_alignment: int,
    num_expert_rows: int,
    num_domains: int,
    group: str,
) -> tuple[Tensor, ...]:
    """Received rows, their choices and weights; a placement (or three empty tensors); a handle."""
    x, buffer = _moved(x), _buffer(group, x)
    topk_idx, topk_weights = topk_idx.contiguous(), topk_weights.contiguous()
    if buffer.runtime is not None and buffer.runtime.get_num_rdma_ranks() != num_domains:
        raise RuntimeError(
            f"this was traced for {num_domains} NVLink domains, but the group {group!r} has "
            f"{buffer.runtime.get_num_rdma_ranks()}; call epjit.moe.get_buffer(group, "
            "hidden_bytes) on all ranks, then trace"
        )
    per_rank, per_domain, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_domain,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        expert_alignment=max(expert_alignment, 1),
        num_worst_tokens=num_worst_tokens,
    )
    assert isinstance(recv_x, Tensor)
    assert recv_idx is not None
    assert recv_weights is not None
    assert handle is not None
    placement = [torch.empty(0, dtype=torch.int32, device=x.device) for _ in range(3)]
    if expert_alignment:
        local = num_experts // buffer.group_size
        if num_worst_tokens:
            n, num_topk = recv_idx.shape
            bound = by_expert.row_bound(n, num_topk, local, expert_alignment)
            num_rows = num_expert_rows or bound
        else:
            num_rows = sum(counts or ())
        placed = by_expert.place(recv_idx, local, alignment=expert_alignment, num_rows=num_rows)
        placement = [placed.row_of, placed.source, placed.ends]
    filler = [
        torch.empty(0, dtype=torch.int32, device=x.device) for _ in range(_MOST - len(handle))
    ]
    return (recv_x, recv_idx, recv_weights, *placement, *handle, *filler)


@_dispatch.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_worst_tokens: int,
    expert_alignment: int,
    num_expert_rows: int,
    num_domains: int,
    group: str,
) -> tuple[Tensor, ...]:
    num_topk = topk_idx.shape[1]
    ranks = _num_ranks(group)
    local = num_experts // ranks
    n: Any = num_worst_tokens or torch.library.get_ctx().new_dynamic_size()
    placement = [x.new_empty(0, dtype=torch.int32) for _ in range(3)]
    if expert_alignment:
        num_rows: Any = num_expert_rows or by_expert.row_bound(n, num_topk, local, expert_alignment)
        if not num_worst_tokens:
            num_rows = torch.library.get_ctx().new_dynamic_size()
        placement = [
            x.new_empty(shape, dtype=torch.int32) for shape in ((n, num_topk), num_rows, local)
        ]
    passing: Any = 0
    if num_domains > 1:
        passing = ranks // num_domains * num_worst_tokens
        passing = passing or torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty((n, x.shape[1])),
        topk_idx.new_empty((n, num_topk)),
        topk_weights.new_empty((n, num_topk)),
        *placement,
        *_fake_handle(x, n, passing, ranks, num_domains, local),
    )


def _fake_handle(
    x: Tensor, n: Any, passing: Any, ranks: int, num_domains: int, experts: int
) -> list[Tensor]:
    def ints(*shape: Any) -> Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    tokens = x.shape[0]
    in_rank = x.new_empty((tokens, ranks), dtype=torch.bool)
    send_head, expert_counts = ints(tokens, ranks), ints(experts)
    if num_domains == 1:
        handle = [ints(ranks, ranks), ints(ranks), expert_counts, ints(n), in_rank, send_head]
        return handle + [ints(0) for _ in range(_MOST - _LEAST)]
    return [
        in_rank,
        ints(num_domains, tokens + 1),
        ints(num_domains, ranks // num_domains),
        send_head,
        ints(num_domains),
        expert_counts,
        ints(ranks),
        x.new_empty((n, 8), dtype=torch.uint8),
        ints(tokens, num_domains),
        ints(passing),
    ]


@torch.library.custom_op(
    "epjit::combine", mutates_args=(), schema=f"(Tensor x, {_HANDLE}, str group) -> Tensor"
)
def _combine(x: Tensor, *handle_and_group: Any) -> Tensor:
    """Rows back to their ranks, summed: `[T, H]`."""
    *tensors, group = handle_and_group
    handle, _ = _as_handle(tensors)
    combined, _, _ = _buffer(group, x).combine(_moved(x), handle)
    return combined


@_combine.register_fake
def _(x: Tensor, *handle_and_group: Any) -> Tensor:
    handle, slots = _as_handle(handle_and_group[:-1])
    return x.new_empty((handle[slots.tokens].shape[0], x.shape[1]))


@torch.library.custom_op(
    "epjit::dispatch_backward",
    mutates_args=(),
    schema=f"(Tensor grad_x, Tensor grad_weights, {_HANDLE}, str group) -> (Tensor, Tensor)",
)
def _dispatch_backward(
    grad_x: Tensor, grad_weights: Tensor, *handle_and_group: Any
) -> tuple[Tensor, Tensor]:
    """A token that went to several ranks gets the sum of the gradients of its copies."""
    *tensors, group = handle_and_group
    handle, _ = _as_handle(tensors)
    x, weights, _ = _buffer(group, grad_x).combine(
        _moved(grad_x), handle, topk_weights=grad_weights.contiguous()
    )
    assert weights is not None
    return x, weights


@_dispatch_backward.register_fake
def _(grad_x: Tensor, grad_weights: Tensor, *handle_and_group: Any) -> tuple[Tensor, Tensor]:
    handle, slots = _as_handle(handle_and_group[:-1])
    num_tokens = handle[slots.tokens].shape[0]
    return (
        grad_x.new_empty((num_tokens, grad_x.shape[1])),
        grad_weights.new_empty((num_tokens, grad_weights.shape[1])),
    )


@torch.library.custom_op(
    "epjit::combine_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_HANDLE}, str group) -> Tensor",
)
def _combine_backward(grad: Tensor, *handle_and_group: Any) -> Tensor:
    """Every row that was added gets the gradient of the sum, the others zeros."""
    *tensors, group = handle_and_group
    handle, slots = _as_handle(tensors)
    buffer = _buffer(group, grad)
    rows, *_ = buffer.dispatch(_moved(grad), handle=handle)
    assert isinstance(rows, Tensor)
    # Rows of all sources; in one domain there are those of every rank, [R, R].
    arrived = handle[slots.ranks][-1:].view(-1)
    by_expert.blank(rows, arrived[buffer.rank :][:1] if arrived.shape[0] > 1 else arrived)
    return rows


@_combine_backward.register_fake
def _(grad: Tensor, *handle_and_group: Any) -> Tensor:
    handle, slots = _as_handle(handle_and_group[:-1])
    return grad.new_empty((handle[slots.rows].shape[0], grad.shape[1]))


def _setup_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, num_domains, ctx.group = inputs
    handle = output[-_MOST:][: _slots(num_domains).number]
    ctx.save_for_backward(output[1], *_padded(handle))


def _grad_dispatch(ctx: Any, grad_x: Tensor, _: Any, grad_weights: Tensor, *others: Any) -> Any:
    recv_topk_idx, *handle = ctx.saved_tensors
    # The zeros that stand for choices of other ranks depend on no weight.
    grad_weights = grad_weights.float().masked_fill(recv_topk_idx < 0, 0.0)
    x, weights = torch.ops.epjit.dispatch_backward(grad_x, grad_weights, *handle, ctx.group)
    return x, None, weights, *[None] * 6


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[-1]
    ctx.save_for_backward(*inputs[1:-1])


def _grad_combine(ctx: Any, grad: Tensor) -> Any:
    rows = torch.ops.epjit.combine_backward(grad, *ctx.saved_tensors, ctx.group)
    return rows, *[None] * (_MOST + 1)


_dispatch.register_autograd(_grad_dispatch, setup_context=_setup_dispatch)
_combine.register_autograd(_grad_combine, setup_context=_setup_combine)


# ---- operators: the order of the experts --------------------------------------------------------


@torch.library.custom_op(
    "epjit::place",
    mutates_args=(),
    schema="(Tensor topk_idx, int num_experts, int alignment, int num_rows) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _place(topk_idx: Tensor, num_experts: int, alignment: int, num_rows: int) -> tuple[Tensor, ...]:
    """See `expert_major.place`."""
    return tuple(by_expert.place(topk_idx, num_experts, alignment=alignment, num_rows=num_rows))


@_place.register_fake
def _(topk_idx: Tensor, num_experts: int, alignment: int, num_rows: int) -> tuple[Tensor, ...]:
    shapes: tuple[Any, ...] = (topk_idx.shape, num_rows, num_experts, num_experts)
    return tuple(topk_idx.new_empty(shape, dtype=torch.int32) for shape in shapes)


@torch.library.custom_op(
    "epjit::permute",
    mutates_args=(),
    schema="(Tensor x, Tensor row_of, Tensor source, Tensor ends, bool blank) -> Tensor",
)
def _permute(x: Tensor, row_of: Tensor, source: Tensor, ends: Tensor, blank: bool) -> Tensor:
    """See `expert_major.permute`; with `blank` there are zeros behind the last expert's rows."""
    why = "one row for each row of topk_idx"
    check("x", x, shape=(row_of.shape[0], "hidden"), contiguous=False, why=why)
    rows = by_expert.permute(_moved(x), source, ends, num_topk=row_of.shape[1])
    if blank:
        by_expert.blank(rows, ends[-1:])
    return rows


@_permute.register_fake
def _(x: Tensor, row_of: Tensor, source: Tensor, ends: Tensor, blank: bool) -> Tensor:
    return x.new_empty((source.shape[0], x.shape[1]))


@torch.library.custom_op(
    "epjit::unpermute",
    mutates_args=(),
    schema="(Tensor rows, Tensor row_of, Tensor source, Tensor ends) -> Tensor",
)
def _unpermute(rows: Tensor, row_of: Tensor, source: Tensor, ends: Tensor) -> Tensor:
    """See `expert_major.unpermute`."""
    why = "the rows by expert that the handle is of"
    check("x", rows, shape=(source.shape[0], "hidden"), contiguous=False, why=why)
    return by_expert.unpermute(_moved(rows), row_of)


@_unpermute.register_fake
def _(rows: Tensor, row_of: Tensor, source: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty((row_of.shape[0], rows.shape[1]))


@torch.library.custom_op(
    "epjit::permute_weights",
    mutates_args=(),
    schema="(Tensor weights, Tensor row_of, Tensor source) -> Tensor",
)
def _permute_weights(weights: Tensor, row_of: Tensor, source: Tensor) -> Tensor:
    """The weight of each row, 0 for padding: `[M]`."""
    return _take(weights.flatten(), source)


@_permute_weights.register_fake
def _(weights: Tensor, row_of: Tensor, source: Tensor) -> Tensor:
    return weights.new_empty(source.shape)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Values by index; -1 is the zero that stands behind them."""
    return torch.cat([values, values.new_zeros(1)])[index]


def _setup_placed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*[each for each in inputs[1:] if isinstance(each, Tensor)])


def _grad_permute(ctx: Any, grad: Tensor) -> Any:
    return torch.ops.epjit.unpermute(grad, *ctx.saved_tensors), None, None, None, None


def _grad_unpermute(ctx: Any, grad: Tensor) -> Any:
    return torch.ops.epjit.permute(grad, *ctx.saved_tensors, True), None, None, None


def _grad_permute_weights(ctx: Any, grad: Tensor) -> Any:
    row_of, _ = ctx.saved_tensors
    return _take(grad, row_of), None, None


_permute.register_autograd(_grad_permute, setup_context=_setup_placed)
_unpermute.register_autograd(_grad_unpermute, setup_context=_setup_placed)
_permute_weights.register_autograd(_grad_permute_weights, setup_context=_setup_placed)


# torch's grouped product leaves what lies behind the last expert's rows as it was, and its gradient
# refuses some strides; so these two are operators as well.


def _has_grouped_mm(x: Tensor, y: Tensor) -> bool:
    return hasattr(F, "grouped_mm") and x.dtype == y.dtype == torch.bfloat16


def _matrices(weights: Tensor) -> Tensor:
    """Matrices as torch's product takes them: of rows or columns that are whole, at even addresses.

    Transposed ones stay as they are.
    """
    for each in (weights, weights.transpose(1, 2)):
        if each.stride(2) == 1 and each.stride(1) >= each.shape[2] and each.data_ptr() % 16 == 0:
            return weights
    return weights.clone(memory_format=torch.contiguous_format)


def _parts(x: Tensor, ends: Tensor) -> list[Tensor]:
    """Each expert's rows, and those behind; the host reads `ends`."""
    starts = [0, *ends.tolist(), x.shape[0]]
    return [x[start:end] for start, end in itertools.pairwise(starts)]


@torch.library.custom_op(
    "epjit::grouped_mm",
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor ends, bool blank) -> Tensor",
)
def _grouped_mm(x: Tensor, weights: Tensor, ends: Tensor, blank: bool) -> Tensor:
    """Each expert's rows times its matrix; with `blank` there are zeros behind the last ones."""
    if not _has_grouped_mm(x, weights):
        *parts, behind = _parts(x, ends)
        products = [rows @ weight for rows, weight in zip(parts, weights, strict=True)]
        return torch.cat([*products, x.new_zeros((behind.shape[0], weights.shape[2]))])
    rows = F.grouped_mm(_moved(x), _matrices(weights), offs=ends)
    if blank:
        by_expert.blank(rows, ends[-1:])
    return rows


@_grouped_mm.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor, blank: bool) -> Tensor:
    return x.new_empty((x.shape[0], weights.shape[2]))


@torch.library.custom_op(
    "epjit::grouped_mm_of_rows",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor ends) -> Tensor",
)
def _grouped_mm_of_rows(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """The sum over each expert's rows of the outer products of x and y: `[L, H, F]`."""
    if not _has_grouped_mm(x, y):
        pairs = zip(_parts(x, ends)[:-1], _parts(y, ends)[:-1], strict=True)
        return torch.stack([rows.t() @ others for rows, others in pairs])
    return F.grouped_mm(_moved(x).t(), _moved(y), offs=ends)


@_grouped_mm_of_rows.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((ends.shape[0], x.shape[1], y.shape[1]))


def _setup_grouped_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _grad_grouped_mm(ctx: Any, grad: Tensor) -> Any:
    x, weights, ends = ctx.saved_tensors
    of_x = of_weights = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.epjit.grouped_mm(grad, weights.transpose(1, 2), ends, True)
    if ctx.needs_input_grad[1]:
        of_weights = torch.ops.epjit.grouped_mm_of_rows(x, grad, ends)
    return of_x, of_weights, None, None


def _grad_grouped_mm_of_rows(ctx: Any, grad: Tensor) -> Any:
    x, y, ends = ctx.saved_tensors
    of_x = torch.ops.epjit.grouped_mm(y, grad.transpose(1, 2), ends, True)
    return of_x, torch.ops.epjit.grouped_mm(x, grad, ends, True), None


_grouped_mm.register_autograd(_grad_grouped_mm, setup_context=_setup_grouped_mm)
_grouped_mm_of_rows.register_autograd(_grad_grouped_mm_of_rows, setup_context=_setup_grouped_mm)


# ---- what users call ----------------------------------------------------------------------------


@overload
def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    group: GroupLike,
    num_worst_tokens: int = ...,
    expert_major: Literal[False] = ...,
) -> Dispatched: ...
@overload
def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    group: GroupLike,
    num_worst_tokens: int = ...,
    expert_major: Literal[True],
    expert_alignment: int = ...,
    num_expert_rows: int = ...,
) -> ExpertRows: ...
def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    group: GroupLike,
    num_worst_tokens: int = 0,
    expert_major: bool = False,
    expert_alignment: int = 1,
    num_expert_rows: int = 0,
) -> Dispatched | ExpertRows:
    """Sends each token to the ranks of its experts; the gradient comes back by a combine.

    Collective, forward and backward. The results are ready on the current stream.

    Args:
        x: bfloat16 or float16 `[T, H]`, rows a multiple of 16 bytes. Without gradients also any
            dtype of one byte, such as float8_e4m3fn.
        topk_idx: int64 or int32 `[T, K]`; anything outside `[0, E)` is no choice.
        topk_weights: float32 `[T, K]`; gets a gradient too.
        num_experts: `E`, a multiple of `R`.
        group: Process group, a DeviceMesh of one dimension, its name, or a name of
            `register_buffer`.
        num_worst_tokens: 0, or the number of rows of every output, the same on all ranks and at
            least what can arrive: `R` times the largest `T` of all ranks, which is what
            `worst_tokens` returns. The host waits for nothing and sizes are static.
            Rows that nothing arrived for have `topk_idx` -1 and are undefined; `combine` gives them
            a gradient of zeros.
        expert_major: Order the rows by expert instead of by source.
        expert_alignment: With `expert_major`: each expert's rows are padded to a multiple of it.
        num_expert_rows: With `expert_major` and `num_worst_tokens`: `M`; choices that do not fit
            are dropped. 0 = always enough.

    Returns:
        `Dispatched`, or `ExpertRows` with `expert_major`.

    Raises:
        TypeError, ValueError: Arguments that do not fit; nothing was sent.
        CommunicationError: A peer did not come.
    """
    x = _rows(x)
    _check_comes_back(x, topk_weights, is_combined=x.element_size() > 1)
    num_experts = _size("num_experts", num_experts, least=1)
    num_worst_tokens = _size("num_worst_tokens", num_worst_tokens, least=0)
    expert_alignment = _size("expert_alignment", expert_alignment, least=1)
    num_expert_rows = _size("num_expert_rows", num_expert_rows, least=0)
    if expert_alignment > 1 and not expert_major:
        raise ValueError(
            f"expert_alignment is {expert_alignment}, which needs expert_major=True: other rows "
            "are in the order of their sources"
        )
    if num_expert_rows and not (expert_major and num_worst_tokens):
        raise ValueError(
            f"num_expert_rows is {num_expert_rows}, which needs expert_major=True and "
            "num_worst_tokens: without them the number of rows is what arrives"
        )
    name = _name(group)
    dry = False
    if not torch.compiler.is_compiling():
        dry = is_dry(x)
        if dry:
            check_dry_rows(x, num_worst_tokens)
    num_domains = _num_domains(name, dry=dry)
    recv_x, recv_idx, recv_weights, row_of, source, ends, *tensors = torch.ops.epjit.dispatch(
        x,
        topk_idx,
        topk_weights,
        num_experts,
        num_worst_tokens,
        expert_alignment if expert_major else 0,
        num_expert_rows,
        num_domains,
        name,
    )
    slots = _slots(num_domains)
    routing = tuple(tensors[: slots.number])
    counts = routing[slots.experts]
    if not expert_major:
        return Dispatched(recv_x, recv_idx, recv_weights, counts, routing)
    placement = Placement(row_of, source, ends, counts)
    return ExpertRows(
        torch.ops.epjit.permute(recv_x, row_of, source, ends, torch.is_grad_enabled()),
        torch.ops.epjit.permute_weights(recv_weights, row_of, source),
        ends,
        counts,
        ExpertHandle(routing, placement),
    )


def combine(x: Tensor, handle: Handle | ExpertHandle, *, group: GroupLike) -> Tensor:
    """Brings rows back to the ranks of their tokens and sums them; nothing is weighted.

    Collective, forward and backward: the gradient travels by a cached dispatch.

    Args:
        x: bfloat16 or float16, one row for each row of the dispatch: `[n, H]`, or `[M, H]` by
            expert.
        handle: From the dispatch.
        group: As in the dispatch.

    Returns:
        `[T, H]`, the sum in fp32 over the ranks of each token, rounded once. By expert the rows of
        a rank are summed first, and rounded.

    Raises:
        TypeError, ValueError: Arguments that do not fit; nothing was sent.
        CommunicationError: A peer did not come.
    """
    if not isinstance(handle, tuple | list) or isinstance(handle, Dispatched | ExpertRows):
        raise TypeError(
            f"handle is a {type(handle).__name__}, expected the .handle of what dispatch returned"
        )
    x = _rows(x)
    if isinstance(handle, ExpertHandle):
        x = unpermute(x, handle.placement)
        handle = handle.routing
    result: Tensor = torch.ops.epjit.combine(x, *_padded(handle), _name(group))
    return result


def permute(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    alignment: int = 1,
    num_rows: int = 0,
) -> ExpertRows:
    """Orders tokens by expert, a row for each choice; local, and the host does not wait.

    Args:
        x: `[n, H]` of any dtype; with gradients bfloat16 or float16 (on the CPU any floating-point
            dtype).
        topk_idx: int32 or int64 `[n, K]`, local experts; outside `[0, num_experts)` is no choice.
        topk_weights: float32 `[n, K]`.
        num_experts: `L`.
        alignment: Each expert's rows are padded to a multiple of it.
        num_rows: `M`; choices that do not fit are dropped. 0 = always enough.

    Returns:
        `ExpertRows`; its handle is for `unpermute`.
    """
    x = _rows(x)
    if x.is_cuda:
        _check_comes_back(x, topk_weights, is_combined=False)
    num_experts = _size("num_experts", num_experts, least=1)
    alignment = _size("alignment", alignment, least=1)
    num_rows = _size("num_rows", num_rows, least=0)
    n, num_topk = topk_idx.shape
    num_rows = num_rows or by_expert.row_bound(n, num_topk, num_experts, alignment)
    placement = Placement(*torch.ops.epjit.place(topk_idx, num_experts, alignment, num_rows))
    row_of, source, ends, counts = placement
    return ExpertRows(
        torch.ops.epjit.permute(x, row_of, source, ends, torch.is_grad_enabled()),
        torch.ops.epjit.permute_weights(topk_weights, row_of, source),
        ends,
        counts,
        placement,
    )


def unpermute(x: Tensor, handle: Placement) -> Tensor:
    """Sums the rows of each token: the transpose of `permute`, so weigh the rows before.

    Args:
        x: `[M, H]`, bfloat16 or float16 (on the CPU any floating-point dtype).
        handle: From `permute`.

    Returns:
        `[n, H]`, the sum in fp32, rounded once; zeros for a token with no choice here.
    """
    row_of, source, ends, _ = handle
    x = _rows(x)
    result: Tensor = torch.ops.epjit.unpermute(x, row_of, source, ends)
    return result


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiplies each expert's rows with its matrix.

    bfloat16 is torch's own grouped product, without a host wait; other dtypes are a loop that reads
    `ends` on the host.

    Args:
        x: `[M, H]`, as `dispatch(expert_major=True)` orders it.
        weights: `[L, H, F]` of x's dtype; any of its strides. Both are cast under torch.autocast.
        ends: int32 `[L]`.

    Returns:
        `[M, F]`. Behind `ends[-1]` there are zeros where gradients are recorded, as in the gradient
        of x; else it is undefined there.
    """
    x, weights = _rows(x), _autocast(weights)
    result: Tensor = torch.ops.epjit.grouped_mm(x, weights, ends, torch.is_grad_enabled())
    return result


def fused_dispatch(
    x: Tensor,
    token_indices: Tensor,
    token_probs: Tensor,
    num_experts: int,
    group: GroupLike,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
    """`dispatch` with the signature of Megatron's `fused_dispatch`.

    Args:
        x: `[T, H]`.
        token_indices: int64 `[T, K]`.
        token_probs: float32 `[T, K]`.
        num_experts: `E`.
        group: Process group or name.
        async_finish: No difference: the result is always ready on the current stream.
        allocate_on_comm_stream: No difference.

    Returns:
        Received rows, choices, weights, `tokens_per_expert` (int32 `[L]`, on the device, where
        Megatron's is on the host), the handle.
    """
    del async_finish, allocate_on_comm_stream
    out = dispatch(x, token_indices, token_probs, num_experts=num_experts, group=group)
    return out.x, out.topk_idx, out.topk_weights, out.tokens_per_expert, out.handle


def fused_combine(
    x: Tensor,
    group: GroupLike,
    handle: Handle,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[Tensor, None]:
    """`combine` with the signature of Megatron's `fused_combine`.

    Returns:
        `[T, H]` and None (Megatron's event).
    """
    del async_finish, allocate_on_comm_stream
    return combine(x, handle, group=group), None
