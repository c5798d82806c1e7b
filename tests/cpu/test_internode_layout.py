"""The layout kernel with several NVLink domains, run on the CPU by the emulation."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
from torch import Tensor

from epjit.kernels.layout import LayoutConfig
from epjit.reference import internode
from epjit.runtime.params import params_type
from tests.cpu.test_internode_reference import DOMAINS
from tests.emulation import build
from tests.emulation.build import Launch, emulate, guarded
from tests.harness import data

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")

WORLDS = {
    **DOMAINS,
    "3x3 apart": tuple(tuple(range(n, 9, 3)) for n in range(3)),
    "32x1": tuple((n,) for n in range(32)),
    "5x8": tuple(tuple(range(8 * n, 8 * n + 8)) for n in range(5)),
    "32x8": tuple(tuple(range(n, 256, 32)) for n in range(32)),
}
del WORLDS["1x3"]


def run_layout(
    idx: Tensor, num_experts: int, domains: internode.Domains, *, seed: int, grid: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch on its own; also that it leaves its counters zero."""
    num_ranks, num_tokens = sum(map(len, domains)), idx.shape[0]
    config = LayoutConfig(num_ranks, idx.dtype == torch.int64, len(domains))
    domain_of = guarded(num_ranks, dtype=torch.int32)
    for number, domain in enumerate(domains):
        domain_of[torch.tensor(domain)] = number
    ints = torch.int32
    given = guarded(*idx.shape, dtype=idx.dtype).copy_(idx)
    per_rank, per_domain = guarded(num_ranks, dtype=ints), guarded(len(domains), dtype=ints)
    per_expert = guarded(num_experts, dtype=ints)
    in_rank = guarded(num_tokens, num_ranks, dtype=torch.bool)
    counters = guarded(1 + num_ranks + len(domains) + num_experts, dtype=ints, fill=0)
    params = params_type(config.source, "LayoutParams")()
    pointers = {
        "topk_idx": given,
        "domain_of": domain_of,
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_domain,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
        "counters": counters,
    }
    for name, tensor in pointers.items():
        setattr(params, name, ctypes.c_uint64(tensor.data_ptr()).value)
    params.num_tokens, params.num_topk = idx.shape
    params.num_experts = num_experts
    launch = Launch(config, params, grid=grid or max(1, -(-num_tokens // 64)), rank=0)
    build.prepare(launch)
    emulate([launch], seed=seed)
    assert not counters.any()
    return per_rank, per_domain, per_expert, in_rank


@pytest.mark.parametrize("domains", WORLDS.values(), ids=WORLDS)
def test_layout(domains: internode.Domains) -> None:
    num_ranks = sum(map(len, domains))
    for seed, kind in enumerate(data.ROUTING_KINDS):
        idx = data.routing(
            kind,
            num_tokens=(150, 0, 7)[seed % 3],
            num_experts=2 * num_ranks,
            num_topk=min(9, 2 * num_ranks),
            num_ranks=num_ranks,
            seed=seed,
        )
        want = internode.layout(idx, 2 * num_ranks, domains)
        got = run_layout(idx, 2 * num_ranks, domains, seed=seed)
        for name, one, other in zip(("rank", "rdma_rank", "expert", "t"), got, want, strict=True):
            data.assert_rows_equal(one, other, f"{kind}: per {name}")


@pytest.mark.parametrize("num_experts", [16, 8192])
def test_few_blocks_and_many_experts(num_experts: int) -> None:
    """A token a thread in several rounds; counts that do not fit shared memory."""
    domains = DOMAINS["2x8"]
    idx = data.routing(
        "out_of_range",
        num_tokens=300,
        num_experts=num_experts,
        num_topk=11,
        num_ranks=16,
        seed=1,
        dtype=torch.int32,
    )
    want = internode.layout(idx, num_experts, domains)
    got = run_layout(idx, num_experts, domains, seed=2, grid=2)
    for name, one, other in zip(("rank", "rdma_rank", "expert", "t"), got, want, strict=True):
        data.assert_rows_equal(one, other, f"per {name}")
