"""The operations of one rank without a GPU: gather the inputs of all ranks, compute, keep my part.

Same arguments, results and order of summation as the GPU path. It is meant for tests, for CI and
for a machine without a GPU: every rank receives the inputs of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epjit import env
from epjit.handles import (
    Dispatched,
    Handle,
    InternodeHandle,
    IntranodeHandle,
    LowLatencyDispatched,
)
from epjit.reference import internode, intranode, low_latency
from epjit.reference.internode import Domains
from epjit.reference.intranode import Bias, RankInput
from epjit.runtime.empty import empty_on
from epjit.runtime.fault import Overflow

if TYPE_CHECKING:
    from epjit.checks.low_latency import CombineCall, DispatchCall
    from epjit.modes.chosen import ChosenKernels
    from epjit.runtime.group import Group
    from epjit.scope import AnyScope


class CpuBackend:
    """Layout, dispatch and combine of one rank, on CPU tensors.

    All methods but `layout` are collective: every rank of the group calls them in the same order.

    Args:
        group: The ranks.
        domains: Ranks of each NVLink domain, when there are several: handles and sums are then
            those between domains (`epjit.reference.internode`).

    Raises:
        CommunicationError: From every collective method, when a peer does not arrive in time.
        ValueError: From every collective method, when ranks pass arguments that do not belong
            together; the text names the ranks and their values.
    """

    def __init__(self, group: Group, domains: Domains | None = None) -> None:
        self.group = group
        self.domains = domains
        self._overflow: Overflow | None = None

    def raise_fault(self) -> None:
        """Raises once, as a GPU does in the call after, that more rows came than there is room for.

        Raises:
            CommunicationError: Names operation, rank, how many rows came, and how many fit.
        """
        if self._overflow is not None:
            overflow, self._overflow = self._overflow, None
            raise intranode.no_room(overflow)

    def reset(self) -> None:
        """Forgets what went wrong; collective."""
        self._overflow = None
        self.group.reset()

    def layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Where the tokens of this rank go; not collective.

        Args:
            topk_idx: `[T, K]` int32 or int64.
            num_experts: `E`.

        Returns:
            `num_tokens_per_rank` int32 `[R]`, `num_tokens_per_rdma_rank` int32 `[D]` (None in one
            domain), `num_tokens_per_expert` int32 `[E]`, `is_token_in_rank` bool `[T, R]`.
        """
        if self.domains is not None:
            return internode.layout(topk_idx, num_experts, self.domains)
        per_rank, per_expert, in_rank = intranode.layout(topk_idx, num_experts, self.group.size)
        return per_rank, None, per_expert, in_rank

    @torch.no_grad()
    def dispatch(
        self,
        x: Tensor,
        scales: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_tokens_per_rank: Tensor,
        is_token_in_rank: Tensor,
        num_tokens_per_expert: Tensor,
        *,
        num_tokens_per_rdma_rank: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
    ) -> Dispatched:
        """Send each token to the ranks of `is_token_in_rank` and return what arrives here.

        Args:
            x: `[T, H]`, any dtype.
            scales: `[T, S]`, any strides, or None.
            topk_idx: `[T, K]` int32 or int64, or None.
            topk_weights: `[T, K]` float32, or None.
            num_tokens_per_rank: int32 `[R]`, the column sums of `is_token_in_rank`.
            is_token_in_rank: bool `[T, R]`.
            num_tokens_per_expert: int32 `[E]`.
            num_tokens_per_rdma_rank: int32 `[D]` when there are several domains.
            expert_alignment: Counts of the returned list are rounded up to a multiple of it.
            num_worst_tokens: 0, or the number of rows of every output.

        Returns:
            See `Dispatched`.

        Raises:
            ValueError: Also when the counts contradict `is_token_in_rank`.
        """
        worlds = _exchange(
            self.group,
            "dispatch",
            {
                **_payload_facts(x, scales),
                "num_experts": num_tokens_per_expert.shape[0],
                "num_topk": None if topk_idx is None else topk_idx.shape[1],
                "topk_idx dtype": None if topk_idx is None else topk_idx.dtype,
            },
            (
                *(x, scales, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert),
                torch.tensor(num_worst_tokens, device="cpu"),
            ),
        )
        # After the exchange: a rank that raises before it would leave its peers waiting.
        counts = {"num_tokens_per_rank": (num_tokens_per_rank, is_token_in_rank)}
        if self.domains is not None:
            given = num_tokens_per_rdma_rank
            assert given is not None
            in_domain = internode.in_domain(is_token_in_rank, self.domains)
            counts["num_tokens_per_rdma_rank"] = (given, in_domain)
        for name, (count, sent) in counts.items():
            if count.tolist() != sent.sum(dim=0).tolist():
                raise ValueError(
                    f"{name}={count.tolist()} contradicts is_token_in_rank, which says "
                    f"{sent.sum(dim=0).tolist()}; pass both from one get_dispatch_layout call"
                )
        inputs = [RankInput(*tensors[:-1]) for tensors in worlds]
        options: dict[str, Any] = {
            "num_experts": num_tokens_per_expert.shape[0],
            "expert_alignment": expert_alignment,
            "num_worst_tokens": [int(tensors[-1]) for tensors in worlds],
        }
        rank = self.group.rank
        if self.domains is None:
            received = intranode.dispatch(inputs, rank, **options)
        else:
            received = internode.dispatch(inputs, rank, self.domains, **options)
            handle = received.handle
            assert isinstance(handle, InternodeHandle)
            self._check_room(
                "tokens pass into the NVLink domain through",
                came=int(handle.recv_rdma_rank_prefix_sum[-1]),
                room=handle.num_passing,
            )
        self._check_room(
            "rows come to",
            came=sum(int(each.is_token_in_rank[:, rank].sum()) for each in inputs),
            room=received.recv_x.shape[0],
        )
        return received

    def _check_room(self, what: str, *, came: int, room: int) -> None:
        """Remembers what a kernel would report (`WaitTag` of sync.cuh)."""
        if came > room:
            self._overflow = Overflow("dispatch", what, self.group.rank, came=came, room=room)

    @torch.no_grad()
    def cached_dispatch(
        self, x: Tensor, scales: Tensor | None, handle: Handle
    ) -> tuple[Tensor, Tensor | None]:
        """Send another payload along the routing of `handle`.

        Args:
            x: `[T, H]`, any dtype and `H`.
            scales: `[T, S]`, any strides, or None.
            handle: From `dispatch`.

        Returns:
            `recv_x` `[n or N, H]` and `recv_scales` `[n or N, S]` or None.
        """
        op = "cached dispatch"
        facts = {**_payload_facts(x, scales), **self._handle_facts(handle)}
        worlds = _exchange(self.group, op, facts, (x, scales, *handle))
        handles = self._handles_of_one_dispatch(op, worlds)
        mode = intranode if self.domains is None else internode
        return mode.cached_dispatch(
            [tensors[0] for tensors in worlds],
            None if scales is None else [tensors[1] for tensors in worlds],
            handles,
            self.group.rank,
        )

    @torch.no_grad()
    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Bias = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Bring rows back to the ranks of their tokens and sum them.

        Args:
            x: `[n or N, H]`, bfloat16, float16 or float32; one row for each received row.
            handle: From `dispatch`.
            topk_weights: float32 `[n or N, K]`, or None.
            bias: None, `[T, H]`, or a pair of them; this rank's alone.

        Returns:
            `combined_x` `[T, H]`, and `combined_topk_weights` float32 `[T, K]` or None.
        """
        facts = {
            **_payload_facts(x, None),
            "num_topk": None if topk_weights is None else topk_weights.shape[1],
            **self._handle_facts(handle),
        }
        worlds = _exchange(self.group, "combine", facts, (x, topk_weights, *handle))
        handles = self._handles_of_one_dispatch("combine", worlds)
        xs = [tensors[0] for tensors in worlds]
        weights = None if topk_weights is None else [tensors[1] for tensors in worlds]
        rank = self.group.rank
        if self.domains is None:
            return intranode.combine(xs, handles, rank, weights, bias)
        return internode.combine(xs, handles, rank, self.domains, weights, bias)

    def _handle_facts(self, handle: Handle) -> dict[str, object]:
        """What the handles of one dispatch have in common on all ranks."""
        if isinstance(handle, InternodeHandle):
            return {}  # each has only what concerns its rank
        return {
            "the handle's rank_prefix_matrix": handle.rank_prefix_matrix.tolist(),
            "the handle's source_tokens": handle.source_tokens.tolist(),
        }

    def _handles_of_one_dispatch(self, op: str, worlds: list[tuple[Any, ...]]) -> list[Any]:
        """The handles of all ranks, once they are known to belong together."""
        if self.domains is None:
            return [IntranodeHandle(*tensors[2:]) for tensors in worlds]
        handles = [InternodeHandle(*tensors[2:]) for tensors in worlds]
        # [source, receiver]
        sent = torch.stack([handle.is_token_in_rank.sum(dim=0) for handle in handles])
        for receiver, handle in enumerate(handles):
            ends = handle.recv_gbl_rank_prefix_sum
            received = ends.diff(prepend=ends.new_zeros(1))
            # The last ones may have been left out for want of room.
            fit = sent[:, receiver].cumsum(dim=0).clamp(max=handle.num_rows)
            for source in torch.nonzero(ends != fit).flatten().tolist():
                raise ValueError(
                    f"{op}: by the handle of rank {source} it sends {int(sent[source, receiver])} "
                    f"rows to rank {receiver}, by the handle of rank {receiver} "
                    f"{int(received[source])}; all ranks must pass their handles of one dispatch"
                )
        return handles


class CpuMemory:
    """Bytes of one rank that users may look at; zeros that take no room until they are written to.

    Args:
        num_bytes: How many.
    """

    def __init__(self, num_bytes: int) -> None:
        # torch.zeros would touch every page, and a size hint is about a gigabyte. One byte more,
        # since torch views no empty NumPy array as another dtype.
        self._bytes = torch.from_numpy(np.zeros(num_bytes + 1, dtype=np.uint8))[:num_bytes]

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """All of it, in one dimension."""
        return self._bytes.view(dtype)


class CpuLowLatency:
    """Low-latency operations of one rank, on CPU tensors, called as those of the GPU are.

    All methods but `send_buffer` are collective. A split operation takes its inputs at the call
    and writes its outputs when the returned function is called.

    Args:
        group: The ranks.
        chosen: What a GPU would run.
        num_rdma_bytes: Bytes of `memory`.
        enable_shrink: Whether `mask` counts.

    Attributes:
        memory: What users see; its second half is the send buffer.
        mask: int32 `[R]`; 1 = masked. Rows of a masked rank are not used; the rank still takes
            part, since nothing here runs out of time.

    Raises:
        CommunicationError: From every collective method, when a peer does not arrive in time.
        ValueError: From every collective method, when ranks pass arguments that do not belong
            together; the text names the ranks and their values.
    """

    def __init__(
        self, group: Group, chosen: ChosenKernels, *, num_rdma_bytes: int, enable_shrink: bool
    ) -> None:
        self._group, self._chosen = group, chosen
        self._num_rdma_bytes = num_rdma_bytes
        self._enable_shrink = enable_shrink
        self.memory = CpuMemory(num_rdma_bytes)
        self.mask = torch.zeros(group.size, dtype=torch.int32, device="cpu")

    @torch.no_grad()
    def dispatch(
        self,
        scope: AnyScope,
        call: DispatchCall,
        x: Tensor,
        topk_idx: Tensor,
        *,
        global_scale: Tensor | None,
        recv_stats: Tensor | None,
        wait_cost: Tensor | None,
        split: bool,
    ) -> tuple[LowLatencyDispatched, Callable[[], None] | None]:
        """Send each choice of each token to its expert and return what arrives here.

        Args:
            scope: Of this call.
            call: Its sizes.
            x: bfloat16 `[T, H]`.
            topk_idx: `[T, K]` int32 or int64.
            global_scale: float32 `[1]`, or None.
            recv_stats: int32 `[E // R]`, to which the received rows are added, or None.
            wait_cost: int64 `[R]`, to which nothing is added: nobody counts cycles here.
            split: Whether to return before anything is received.

        Returns:
            See `LowLatencyDispatched`, and what receives, or None.
        """
        del wait_cost
        specs = LowLatencyDispatched.specs(
            call.row_format,
            num_ranks=self._group.size,
            num_tokens=call.num_tokens,
            max_tokens=call.max_tokens,
            num_experts=call.num_experts,
            num_topk=call.num_topk,
            hidden=call.hidden,
        )
        out = LowLatencyDispatched.allocate(specs, empty_on(x.device))
        scope.start()
        if split:
            x, topk_idx = x.clone(), topk_idx.clone()
        worlds = _exchange(
            self._group,
            "low_latency_dispatch",
            {
                "hidden": call.hidden,
                "num_max_dispatch_tokens_per_rank": call.max_tokens,
                "num_experts": call.num_experts,
                "num_topk": call.num_topk,
                "topk_idx dtype": topk_idx.dtype,
                "format": call.row_format.name,
                "global_scale": None if global_scale is None else float(global_scale),
            },
            (x, topk_idx, global_scale),
        )

        @torch.inference_mode()  # outputs of a call made there can be written to there alone
        def receive() -> None:
            low_latency.dispatch(
                [low_latency.RankInput(*tensors) for tensors in worlds],
                self._group.rank,
                max_tokens=call.max_tokens,
                num_experts=call.num_experts,
                row_format=call.row_format,
                masked=self._masked(),
                out=out,
            )
            if recv_stats is not None:
                recv_stats.add_(out.recv_count)

        if split:
            return out, receive
        receive()
        return out, None

    @torch.no_grad()
    def combine(
        self,
        scope: AnyScope,
        call: CombineCall,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        src_info: Tensor,
        *,
        out: Tensor | None,
        wait_cost: Tensor | None,
        split: bool,
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """Bring the rows of a dispatch back to their tokens and sum them with weights.

        Args:
            scope: Of this call.
            call: Its sizes.
            x: bfloat16 `[E // R, R * M, H]`.
            topk_idx: `[T, K]`, as dispatched.
            topk_weights: float32 `[T, K]`.
            src_info: From the dispatch.
            out: bfloat16 `[T, H]` to write to, or None.
            wait_cost: int64 `[R]`, to which nothing is added.
            split: Whether to return before anything is received.

        Returns:
            bfloat16 `[T, H]`, and what receives, or None.
        """
        del wait_cost
        half = self.memory.tensor(torch.uint8)[self._num_rdma_bytes // 2 :]
        self._chosen.check_low_latency_combine(call, x, half)
        combined = out
        if combined is None:
            shape = (call.num_tokens, call.hidden)
            combined = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
        scope.start()
        if call.zero_copy:
            x = self.send_buffer(
                num_experts=call.num_experts, max_tokens=call.max_tokens, hidden=call.hidden
            )
        worlds = _exchange(
            self._group,
            "low_latency_combine",
            {
                "hidden": call.hidden,
                "num_max_dispatch_tokens_per_rank": call.max_tokens,
                "num_experts": call.num_experts,
                "num_topk": call.num_topk,
                "use_logfmt": call.use_logfmt,
                env.low_latency_combine_variant.name: env.low_latency_combine_variant(),
            },
            tuple(low_latency.collect(x, src_info, self._group.size)),
        )

        @torch.inference_mode()  # outputs of a call made there can be written to there alone
        def receive() -> None:
            combined.copy_(
                low_latency.combine(
                    [low_latency.Returned(*tensors) for tensors in worlds],
                    self._group.rank,
                    topk_idx,
                    topk_weights,
                    num_experts=call.num_experts,
                    use_logfmt=call.use_logfmt,
                    reduced=not call.use_logfmt and env.low_latency_combine_variant() == "reduced",
                    masked=self._masked(),
                )
            )

        if split:
            return combined, receive
        receive()
        return combined, None

    def send_buffer(self, *, num_experts: int, max_tokens: int, hidden: int) -> Tensor:
        """Where `combine(zero_copy=True)` finds its rows: bfloat16 `[E // R, R * M, H]`."""
        shape = (num_experts // self._group.size, self._group.size * max_tokens, hidden)
        half = self.memory.tensor(torch.uint8)[self._num_rdma_bytes // 2 :]
        return half[: 2 * num_experts * max_tokens * hidden].view(torch.bfloat16).view(shape)

    def clean(self, stream: int) -> None:
        """Meets the peers: the memory has no words here that a user could have overwritten."""
        del stream
        _exchange(self._group, "clean_low_latency_buffer", {}, ())

    def raise_fault(self) -> None:
        """Nothing: what goes wrong here is raised where it does."""

    def reset(self) -> None:
        """Takes all masks away; no operation is under way here."""
        self.mask.zero_()

    def give_up(self) -> None:
        """Nothing: no wait is queued here."""

    def _masked(self) -> Tensor | None:
        return self.mask if self._enable_shrink else None


def _exchange(
    group: Group, op: str, facts: Mapping[str, object], tensors: tuple[Tensor | None, ...]
) -> list[tuple[Any, ...]]:
    """Every rank's `tensors`, once all ranks are known to agree on `op` and on `facts`."""
    messages = group.allgather((op, dict(facts), [_pack(each) for each in tensors]), op=op)
    _agree(op, "operation", [message[0] for message in messages])
    for name in facts:
        _agree(op, name, [message[1][name] for message in messages])
    worlds = [tuple(_unpack(each) for each in message[2]) for message in messages]
    worlds[group.rank] = tensors  # the handle keeps the caller's own tensor
    return worlds


def _pack(tensor: Tensor | None) -> tuple[torch.dtype, torch.Size, NDArray[np.uint8]] | None:
    """A copy of the elements as bytes.

    A copy, since ranks that are threads get the very object and the caller may write to its tensor
    as soon as its own call is back. Bytes, since torch 2.13 cannot unpickle an FP8 tensor, and a
    pickled view would drag its whole storage along.
    """
    if tensor is None:
        return None
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy()


def _unpack(packed: tuple[torch.dtype, torch.Size, NDArray[np.uint8]] | None) -> Tensor | None:
    """The tensor of `_pack`."""
    if packed is None:
        return None
    dtype, shape, elements = packed
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    # A copy into it: an empty NumPy array has stride 0, which torch does not view as another dtype.
    tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(elements))
    return tensor


def _payload_facts(x: Tensor, scales: Tensor | None) -> dict[str, object]:
    """What the payloads of all ranks have in common."""
    return {
        "hidden": x.shape[1],
        "dtype": x.dtype,
        "number of scales": None if scales is None else scales.shape[1],
        "dtype of scales": None if scales is None else scales.dtype,
    }


def _agree(op: str, name: str, values: list[object]) -> None:
    """Raise unless all ranks have the same value."""
    if any(value != values[0] for value in values):
        each = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
        raise ValueError(
            f"{op}: the ranks disagree on {name}: {each}; "
            "all ranks of a group must make the same call with matching arguments"
        )
