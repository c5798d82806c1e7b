"""Rows in the order of the experts: what place, permute and unpermute mean, in torch.

Words: `n` received tokens, `K` selections each, `E` experts of this rank, `M` rows, `H` elements a
row. The GPU kernels are compared with these lines bit for bit. Works on tensors of any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epjit.handles import Placement


def place(topk_idx: Tensor, num_experts: int, *, alignment: int, num_rows: int) -> Placement:
    """Numbers the selections by expert, then by token, then by `k`.

    Args:
        topk_idx: int32 or int64 `[n, K]`, local experts; outside `[0, num_experts)` is nothing.
        num_experts: `E`.
        alignment: Each expert's rows are padded to a multiple of it.
        num_rows: `M`; selections that do not fit are dropped.
    """
    experts = topk_idx.flatten().to(torch.int64)
    valid = (experts >= 0) & (experts < num_experts)
    experts = experts.masked_fill(~valid, num_experts)
    one_hot = torch.zeros(
        (experts.shape[0], num_experts + 1), dtype=torch.int64, device=topk_idx.device
    )
    one_hot.scatter_(1, experts[:, None], 1)
    count = one_hot.sum(dim=0)[:num_experts]
    end = ((count + alignment - 1) // alignment * alignment).cumsum(dim=0)
    start = torch.cat((end.new_zeros(1), end))
    rank_of = (one_hot.cumsum(dim=0) - 1).gather(1, experts[:, None])[:, 0]
    row_of = rank_of + start[experts]
    row_of = row_of.masked_fill(~valid | (row_of >= num_rows), -1)
    source = torch.full((num_rows,), -1, dtype=torch.int32, device=topk_idx.device)
    (placed,) = torch.nonzero(row_of >= 0, as_tuple=True)
    source[row_of[placed]] = placed.to(torch.int32)
    return Placement(
        row_of.to(torch.int32).view(topk_idx.shape),
        source,
        end.clamp(max=num_rows).to(torch.int32),
        count.to(torch.int32),
    )


def permute(x: Tensor, source: Tensor, num_topk: int) -> Tensor:
    """`[M, H]`: the token of each row's selection, zeros for padding.

    Args:
        x: `[n, H]`, any dtype.
        source: int32 `[M]`, from `place`.
        num_topk: `K`.
    """
    rows = x.new_zeros((source.shape[0], x.shape[1]))
    (taken,) = torch.nonzero(source >= 0, as_tuple=True)
    rows[taken] = x[source[taken].to(torch.int64) // num_topk]
    return rows


def unpermute(rows: Tensor, row_of: Tensor) -> Tensor:
    """`[n, H]`: the sum of each token's rows in fp32, in the order of `k`, rounded once.

    Args:
        rows: `[M, H]`, a floating-point dtype.
        row_of: int32 `[n, K]`, from `place`.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.zeros((row_of.shape[0], rows.shape[1]), dtype=wide, device=rows.device)
    for column in row_of.to(torch.int64).unbind(dim=1):
        (token,) = torch.nonzero(column >= 0, as_tuple=True)
        out[token] += rows[column[token]].to(wide)
    return out.to(rows.dtype)
