"""The bench's copy kernel, run by the emulation: the ceiling counts only bytes that arrived."""

from __future__ import annotations

import shutil

import pytest
import torch

from epjit.bench.ceiling import CopyConfig, FanConfig
from epjit.bench.peers import ChaseConfig
from epjit.runtime.params import params_type
from tests.emulation import build
from tests.emulation.build import Launch, emulate, guarded

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")

ROW_BYTES = 256


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("num_rows", [1, 37])
def test_every_row_arrives_and_nothing_else_changes(
    num_ranks: int, pull: bool, num_rows: int
) -> None:
    config = CopyConfig(num_ranks=num_ranks, num_warps=2, row_bytes=ROW_BYTES, pull=pull)
    record = params_type(config.source, "CopyParams")
    generator = torch.Generator().manual_seed(num_rows)
    memories = []
    for _ in range(num_ranks):
        memory = guarded(2, num_ranks, num_rows, ROW_BYTES, dtype=torch.uint8)
        memory[0] = torch.randint(0, 256, memory[0].shape, generator=generator, dtype=torch.uint8)
        memories.append(memory)
    sent = [memory[0].clone() for memory in memories]
    addresses = [memory.data_ptr() for memory in memories] + [0] * (8 - num_ranks)
    array = dict(record._fields_)["memory"]
    launches = [
        Launch(config, record(array(*addresses), num_rows, rank), grid=2, rank=rank)
        for rank in range(num_ranks)
    ]
    emulate(launches, seed=num_ranks)
    for rank, memory in enumerate(memories):
        assert torch.equal(memory[0], sent[rank])
        for peer in range(num_ranks):
            if peer == rank:
                assert bool((memory[1, peer] == 0xEE).all())
            else:
                assert torch.equal(memory[1, peer], sent[peer][rank])


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("num_stores", [1, 3])
@pytest.mark.parametrize("peer_halves", [0, 1, 2])
def test_every_store_has_its_row(bulk: bool, num_stores: int, peer_halves: int) -> None:
    """Of the rank that it was to come from, by the place of the row in its warp."""
    config = FanConfig(num_warps=2, row_bytes=640, num_stores=num_stores, bulk=bulk)
    generator, num_rows, grid = torch.Generator().manual_seed(1), 29, 3
    sources = []
    for _ in range(2):
        source = guarded(num_rows, config.row_bytes, dtype=torch.uint8)
        source.copy_(torch.randint(0, 256, source.shape, generator=generator, dtype=torch.uint8))
        sources.append(source)
    taken = guarded(num_stores, num_rows, config.row_bytes, dtype=torch.uint8)
    record = params_type(config.source, "FanParams")
    addresses = [each.data_ptr() for each in (*sources, taken)]
    emulate([Launch(config, record(*addresses, num_rows, peer_halves), grid=grid)], seed=3)
    place = torch.arange(num_rows) // (grid * config.num_warps)
    wanted = torch.where((place % 2 < peer_halves)[:, None], sources[1], sources[0])
    for each in taken:
        assert torch.equal(each, wanted)


def test_the_chain_is_followed_to_its_end() -> None:
    """The latency kernel reads every word once, and stops where it should."""
    config = ChaseConfig(num_steps=5)
    chain = guarded(8, dtype=torch.int64)
    for index in range(8):
        chain[index] = chain.data_ptr() + (index + 3) % 8 * 8
    out = guarded(1, dtype=torch.int64)
    params = params_type(config.source, "ChaseParams")(chain.data_ptr(), out.data_ptr())
    emulate([Launch(config, params, grid=1)])
    assert int(out[0]) == chain.data_ptr() + 5 * 3 % 8 * 8
