"""One record a call: everything that it carries, once checked.

`epjit.checks` makes the records, `epjit.modes` take them, and a scope finds the tensors in them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from epjit.formats import RowFormat

if TYPE_CHECKING:
    from epjit.handles import EPHandle
    from epjit.runtime.group import Group
    from epjit.runtime.topology import Topology

Payload: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
"""Rows, or rows and their scales, as users pass them and get them."""
Bias: TypeAlias = "Tensor | tuple[Tensor | None, Tensor | None] | None"
OwnHandle: TypeAlias = Any
"""An `epjit.handles.Handle` of the one type that all handles of a Buffer have."""


def payload_of(rows: Tensor, scales: Tensor | None) -> Payload:
    """The rows, with their scales if there are any."""
    return rows if scales is None else (rows, scales)


class Settings(NamedTuple):
    """Arguments of a Buffer that its parts are made with; `Buffer` explains them."""

    num_nvl_bytes: int
    num_rdma_bytes: int
    low_latency_mode: bool
    enable_shrink: bool
    use_fabric: bool
    num_qps_per_rank: int
    timeout_seconds: float


class Setup(NamedTuple):
    """All that the parts of a Buffer are made from.

    Attributes:
        settings: Arguments of the Buffer.
        group: The ranks.
        topology: Their NVLink domains.
        device: A GPU, or the CPU.
        resources: Gets what is made; its owner closes it, also when not all can be made.
    """

    settings: Settings
    group: Group
    topology: Topology
    device: torch.device
    resources: ExitStack


# ---- normal mode --------------------------------------------------------------------------------


class Layout(NamedTuple):
    """`get_dispatch_layout`."""

    topk_idx: Tensor
    num_experts: int


Counts: TypeAlias = tuple[Tensor, "Tensor | None", Tensor, Tensor]
"""The results of `get_dispatch_layout`: the tensors of a `Routing`."""
Sums: TypeAlias = tuple[Tensor, "Tensor | None"]
"""The results of `combine`: rows and weights."""


class Routing(NamedTuple):
    """The counts of `get_dispatch_layout`, in its order, as a dispatch takes them."""

    num_tokens_per_rank: Tensor
    num_tokens_per_rdma_rank: Tensor | None  # between NVLink domains
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


class Dispatch(NamedTuple):
    """`dispatch`, along new counts or along a handle (cached: in V1 without choices, weights)."""

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    routing: Routing | OwnHandle
    expert_alignment: int
    num_worst_tokens: int
    num_sms: int
    row_format: RowFormat | None = None  # that rows are cast to; None: they stay as they are
    global_scale: Tensor | None = None


class Combine(NamedTuple):
    """`combine`; with `order`, in DeepEP 2's order of additions."""

    x: Tensor
    topk_weights: Tensor | None
    bias_0: Tensor | None
    bias_1: Tensor | None
    handle: OwnHandle
    num_sms: int
    order: Order | None = None


class Order(NamedTuple):
    """Ranks are added by the last choice that a token has there, not by their numbers.

    Attributes:
        topk_idx: `[T, K]`, of the owner of the tokens.
        num_experts: `E`.
    """

    topk_idx: Tensor
    num_experts: int


# ---- DeepEP 2's interface ------------------------------------------------------------------------


class ElasticDispatch(NamedTuple):
    """`ElasticBuffer.dispatch`: cached exactly when there is a handle, whose choices are taken."""

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor | None
    recv_stats: Tensor | None
    handle: EPHandle | None
    num_experts: int
    max_tokens: int
    expert_alignment: int
    num_sms: int
    waits: bool
    do_expand: bool
    zero_padding: bool
    copies_choices: bool
    column_major_scales: bool


class Describe(NamedTuple):
    """A dispatch of the normal mode, and the tensors of the handle that is to be filled from it.

    Attributes:
        topk_idx: `[T, K]`.
        send_head: int32 `[T, R]`, of the mode's handle.
        source_ends: int32 `[R]`, likewise, with a stride.
        recv_tokens: int32 `[n or N]`, likewise.
        recv_topk_idx: `[n or N, K]`, local experts; None by expert.
        columns: int32 `[n or N, K]`, rows by expert, or None; -1 = not here.
        counts: int32 `[E // R]`, choices of each expert.
        rank_ends: int32 `[R]`, to be filled, as are all that follow.
        expert_ends: int32 `[E // R]`.
        recv_stats: int32 `[E // R]`, to which the counts are added, or None.
        metadata: int32 `[n or N, K + 2]`.
        slots: int32 `[T, K]`.
        choices: As `topk_idx`, a copy, or None.
    """

    topk_idx: Tensor
    send_head: Tensor
    source_ends: Tensor
    recv_tokens: Tensor
    recv_topk_idx: Tensor | None
    columns: Tensor | None
    counts: Tensor
    rank_ends: Tensor
    expert_ends: Tensor
    recv_stats: Tensor | None
    metadata: Tensor
    slots: Tensor
    choices: Tensor | None


class ElasticCombine(NamedTuple):
    """`ElasticBuffer.combine`."""

    x: Tensor
    topk_weights: Tensor | None
    bias_0: Tensor | None
    bias_1: Tensor | None
    handle: EPHandle
    num_sms: int


class ExpertDispatch(NamedTuple):
    """`expert_dispatch`, along new choices or, with `handle`, cached: without `topk_idx`."""

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    handle: OwnHandle | None
    num_experts: int
    expert_alignment: int
    num_worst_tokens: int
    num_expert_rows: int
    zero_padding: bool
    column_major_scales: bool
    row_format: RowFormat | None  # as of `Dispatch`
    global_scale: Tensor | None
    num_sms: int


class ExpertCombine(NamedTuple):
    """`expert_combine`; `order` as of `Combine`."""

    rows: Tensor
    row_weights: Tensor | None
    topk_weights: Tensor | None
    bias_0: Tensor | None
    bias_1: Tensor | None
    handle: OwnHandle
    num_sms: int
    order: Order | None = None


# ---- low latency --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # equal calls have the same object: told apart by identity
class _Sizes:
    """Sizes of low-latency calls that look alike.

    Attributes:
        num_tokens: `T`.
        hidden: `H`.
        num_topk: `K`.
        topk_is_int64: Width of the choices.
        max_tokens: `M`.
        num_experts: `E`.
    """

    num_tokens: int
    hidden: int
    num_topk: int
    topk_is_int64: bool
    max_tokens: int
    num_experts: int


@dataclass(frozen=True, eq=False)
class DispatchSizes(_Sizes):
    """Of dispatches.

    Attributes:
        row_format: How rows arrive.
        weights_sent: Whether weights go along with them.
    """

    row_format: RowFormat
    weights_sent: bool = False


@dataclass(frozen=True, eq=False)
class CombineSizes(_Sizes):
    """Of combines.

    Attributes:
        use_logfmt: Whether rows travel in the logarithmic format.
        zero_copy: Whether the rows are in the send buffer.
        weights_sent: Whether the weights went along with the dispatch.
    """

    use_logfmt: bool
    zero_copy: bool
    weights_sent: bool


class DispatchTensors(NamedTuple):
    """Tensors of a low-latency dispatch, named as the kernel's parameters."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor | None
    global_scale: Tensor | None
    recv_stats: Tensor | None
    wait_cost: Tensor | None


class CombineTensors(NamedTuple):
    """Tensors of a low-latency combine, named as the kernel's parameters."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    out: Tensor | None
    wait_cost: Tensor | None


class LowLatencyDispatch(NamedTuple):
    """`low_latency_dispatch`; `split`: nothing is received before the hook is called."""

    given: DispatchTensors
    sizes: DispatchSizes
    split: bool


class LowLatencyCombine(NamedTuple):
    """`low_latency_combine`; `src_info` is of the handle, `split` as in a dispatch."""

    given: CombineTensors
    src_info: Tensor
    sizes: CombineSizes
    split: bool
