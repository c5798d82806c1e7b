"""The model of `bench/scale.py` counts what the emulated kernels send, and docs show its tables."""

from __future__ import annotations

import shutil
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch

from bench import scale
from bench.scale import Messages
from tests.cpu import test_emulated_internode as between
from tests.cpu import test_emulated_low_latency as low_latency
from tests.emulation import build

ROOT = Path(__file__).resolve().parents[2]
emulated = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")


def sent(report: build.Report) -> Messages:
    """Messages that all ranks have sent."""
    return Messages(report.puts, report.put_bytes, report.signals)


@emulated
@pytest.mark.parametrize(("cut", "ring_slots"), [((2, 2), 16), ((2, 2), 4), ((3, 2), 8)])
def test_the_normal_mode_sends_so_much(cut: tuple[int, int], ring_slots: int) -> None:
    num_domains, num_local = cut
    tokens = (40, 33, 0, 57, 12, 9)[: num_domains * num_local]
    shape = between.Shape(*cut, tokens=tokens, ring_slots=ring_slots)
    world = between.World(shape, seed=ring_slots)
    routing = world.one_round()
    expected = []
    for rank in range(shape.num_ranks):
        (domain,) = (n for n, ranks in enumerate(shape.domains) if rank in ranks)
        rail = [ranks[shape.domains[domain].index(rank)] for ranks in shape.domains]
        in_domain = [
            [int(routing.inputs[s].is_token_in_rank[:, ranks].any(dim=1).sum()) for s in rail]
            for ranks in shape.domains
        ]
        others = [n for n in range(num_domains) if n != domain]
        out = [in_domain[n][domain] for n in others]
        back = [in_domain[domain][n] for n in others]
        expected += [
            scale.notify(num_domains, num_local, between.EXPERTS_A_RANK),
            scale.rings(shape.dispatch, out, back, ring_slots),
            scale.rings(shape.combine, back, out, ring_slots),
        ]
    assert sent(world.run(0)) == reduce(add, expected)


@emulated
@pytest.mark.parametrize("tokens", [(5, 3, 0, 7), (8, 8, 8, 8)])
def test_the_low_latency_mode_sends_so_much(tokens: tuple[int, ...]) -> None:
    shape = low_latency.Shape(num_ranks=4, tokens=tokens, per_domain=2)
    world = low_latency.World(shape, seed=1)
    routing = world.route()
    routing.combine(routing.dispatch())
    num_remote = shape.num_ranks - shape.per_domain
    chosen = [each.topk_idx for each in routing.inputs]  # then the rank of each expert
    chosen = [idx.where(idx < 0, idx // shape.experts_a_rank) for idx in chosen]
    expected = []
    for rank in range(shape.num_ranks):
        remote = [r for r in range(shape.num_ranks) if r not in shape.domain(rank)]
        rows = sum(int((chosen[rank] == r).any(dim=1).sum()) for r in remote)
        back = sum(int((chosen[r] == rank).sum()) for r in remote)
        expected += [
            scale.low_latency_dispatch(shape.dispatch, num_remote, rows, tokens[rank]),
            scale.low_latency_combine(shape.combine, num_remote, back),
        ]
    assert sent(world.run(0)) == reduce(add, expected)


def test_chances() -> None:
    """Against the average of many tokens that choose."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(20_000, 256, generator=generator).topk(8).indices
    for part in (1, 32, 128):
        share = (chosen < part).any(dim=1).float().mean().item()
        assert abs(share - scale.chance(part)) < 0.01


def test_docs_show_what_it_says() -> None:
    page = (ROOT / "docs" / "internode.md").read_text()
    for table in scale.tables([scale.of_group(ranks) for ranks in (16, 64, 256)]).split("\n\n"):
        assert table in page, "docs/internode.md: python bench/scale.py prints another table"
