"""Rows by expert between NVLink domains: the mode's own calls and kernels, those emulated.

What they follow, a dispatch or combine in the order of the sources, is the CPU backend's; in the
last test it is emulated as well.
"""

from __future__ import annotations

import shutil
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from epjit import Buffer, CommunicationError, ElasticBuffer
from epjit.config import Config
from epjit.formats import CASTS
from epjit.handles import InternodeHandle, row_bound
from epjit.kernels.expert_major import PermuteConfig, PlaceConfig
from epjit.kernels.shapes import DispatchShape, ExpertCombineShape, ExpertDispatchShape
from epjit.modes import expert_major
from epjit.modes.cpu import CpuNormal
from epjit.modes.internode import Internode
from epjit.reference import Normal
from epjit.reference import expert_major as reference
from epjit.runtime.empty import empty_on
from tests.cpu.test_emulated_internode import Routing, Shape, World, tokens_of
from tests.cpu.test_expert_major import run
from tests.emulation import build
from tests.emulation.build import guarded
from tests.emulation.normal import ALIGNMENT, EXPERTS_A_RANK, HIDDEN_BYTES
from tests.harness import launch
from tests.harness.data import assert_rows_equal
from tests.rounds import elastic
from tests.rounds.expert_major import (
    ExpertRound,
    check_expert_round,
    make_experts,
    random_expert_round,
)

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")

SIZE = 4 << 20
_one_at_a_time = threading.Lock()


def spoiled(specs: Any) -> list[Any]:
    """New tensors that hold anything."""
    made = empty_on(torch.device("cpu"))(specs)
    for each in made:
        if each is not None:
            each.untyped_storage().fill_(0xEE)
    return made


class SecondPass(Internode):
    """The calls on rows by expert of a rank between domains; other calls are the CPU's."""

    def __init__(self, beneath: CpuNormal) -> None:
        self._launches, self._arch, self._device = {}, "sm_90a", torch.device("cpu")
        self._empty = spoiled
        for name in ("layout", "dispatch", "combine", "raise_fault", "reset", "give_up"):
            setattr(self, name, getattr(beneath, name))
        vars(self).update(launch=beneath._chosen.launch, num_sms=2)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of the second pass are emulated."""

    def launch_of(config: Any, device: int | None) -> Any:
        def start(stream: int, grid: int, **values: Any) -> None:
            with _one_at_a_time:
                run(config, grid, grid, **values)

        return start

    monkeypatch.setenv("EPJIT_BACKEND", "cpu")
    monkeypatch.setattr(expert_major, "_launch", launch_of)
    monkeypatch.setattr(expert_major, "num_sms", lambda device: 2)
    monkeypatch.setattr(expert_major, "arch_of", lambda device: "sm_90a")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def make_buffer(comm: Any, nvlink_domain: int) -> Buffer:
    """A Buffer between domains whose rows by expert are those of a GPU."""
    buffer = Buffer(None, SIZE, SIZE, comm=comm, nvlink_domain=nvlink_domain)
    assert isinstance(buffer._mode, CpuNormal)
    buffer._mode = SecondPass(buffer._mode)
    return buffer


@pytest.mark.parametrize(("num_ranks", "nvlink_domain"), [(2, 1), (4, 2), (3, 1), (6, 3)])
def test_random_rounds(num_ranks: int, nvlink_domain: int) -> None:
    def body(comm: Any) -> None:
        buffer = make_buffer(comm, nvlink_domain)
        for seed in range(12):
            case = random_expert_round(num_ranks, 300 + seed, num_sms=4, max_tokens=20)
            check_expert_round(buffer, case)

    launch.run_threads(body, num_ranks, timeout=300)


@pytest.mark.parametrize("variant", ["tma", "ldst"])
def test_rows_that_nobody_casts(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales row by row and column by column, padding with zeros, too few rows."""
    monkeypatch.setenv("EPJIT_PERMUTE_VARIANT", variant)

    def body(comm: Any) -> None:
        buffer = make_buffer(comm, 2)
        for seed, worst in enumerate((False, True, True)):
            case = ExpertRound(
                (9, 0, 14, 7),
                hidden=128,
                num_topk=3,
                seed=seed,
                fp8="padded" if seed else None,
                column_major=seed == 1,
                worst=worst,
                num_rows=31 if seed == 2 else 0,
                alignment=8,
                zero_padding=True,
            )
            check_expert_round(buffer, case)

    launch.run_threads(body, 4, timeout=300)


@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast: str) -> None:
    def body(comm: Any) -> None:
        buffer = make_buffer(comm, 1)
        for seed, dtype in enumerate((torch.bfloat16, torch.float16)):
            case = ExpertRound(
                (11, 6),
                hidden=512,
                num_topk=4,
                seed=seed,
                cast=cast,
                column_major=cast in ("fp8", "fp8_ue8m0") and seed == 0,
                combine_dtype=dtype,
            )
            check_expert_round(buffer, case)

    launch.run_threads(body, 2, timeout=300)


def test_cached_rows_with_scales_and_weights() -> None:
    """Both travel as words beside a row."""

    def body(comm: Any) -> None:
        buffer = make_buffer(comm, 1)
        case = ExpertRound((8, 5), hidden=256, num_experts=4, num_topk=2, fp8="column_major")
        made = make_experts(case, Normal(buffer.topology.domains))
        own, want = made.world[buffer.rank], made.dispatched[buffer.rank]
        assert own.scales is not None
        payload = own.x, own.scales
        _, _, handle, _ = buffer.expert_dispatch(payload, own.topk_idx, num_experts=4)
        (rows, scales), weights, _, _ = buffer.expert_dispatch(
            payload, None, own.topk_weights, handle=handle
        )
        assert want.scales is not None
        assert torch.equal(rows.view(torch.uint8), want.rows.view(torch.uint8))
        assert torch.equal(scales, want.scales)
        assert weights is not None
        assert want.weights is not None
        assert torch.equal(weights, want.weights)

    launch.run_threads(body, 2, timeout=300)


def test_tokens_without_room() -> None:
    """The rows of those that had room are where they would be with room for all."""

    def body(comm: Any) -> None:
        buffer = make_buffer(comm, 1)
        case = ExpertRound((12, 12), hidden=64, num_experts=4, kind="balanced", alignment=8)
        made = make_experts(case, Normal(buffer.topology.domains))
        own, want = made.world[buffer.rank], made.dispatched[buffer.rank]
        rows, weights, handle, _ = buffer.expert_dispatch(
            own.x,
            own.topk_idx,
            own.topk_weights,
            num_experts=4,
            expert_alignment=8,
            num_worst_tokens=15,
            config=Config(4),
        )
        with pytest.raises(CommunicationError, match="has room for 15"):
            buffer.check_fault()
        placed, wanted = handle.placement, want.handle.placement
        assert isinstance(handle.routing, InternodeHandle)
        assert_rows_equal(placed.row_of, wanted.row_of[:15], "row_of")
        assert torch.equal(placed.counts, wanted.counts)
        assert torch.equal(placed.ends, wanted.ends)
        here = placed.row_of[placed.row_of >= 0].long()
        assert isinstance(rows, torch.Tensor)
        assert_rows_equal(rows[here], want.rows[here], "rows")
        assert int((placed.source >= 0).sum()) == len(here) < int((wanted.source >= 0).sum())
        assert weights is not None
        assert not weights[placed.source < 0].any()

    launch.run_threads(body, 2, timeout=300)


@pytest.mark.parametrize("multiple_reduction", [True, False])
def test_elastic(multiple_reduction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepEP 2's expanded rows stand on the same path, by the handle's metadata."""
    monkeypatch.setenv("EPJIT_NVLINK_DOMAIN", "1")

    def body(comm: Any) -> None:
        buffer = ElasticBuffer(None, SIZE, comm=comm, allow_multiple_reduction=multiple_reduction)
        beneath = buffer._mode.mode
        assert isinstance(beneath, CpuNormal)
        object.__setattr__(buffer._mode, "mode", SecondPass(beneath))
        for seed in range(20):
            case = elastic.random_round(2, 500 + seed, num_sms=4, max_tokens=12)
            elastic.check_round(buffer, case)

    launch.run_threads(body, 2, timeout=300)


class Placed(Routing):
    """A dispatch between domains, and the second pass behind it."""

    def _outputs(self, rank: int, num_rows: int) -> dict[str, Tensor]:
        self.received = super()._outputs(rank, num_rows)
        return self.received

    def _queue_dispatch(self, rank: int, *, cached: bool, **values: Any) -> None:
        super()._queue_dispatch(rank, cached=cached, **values)
        shape, world, received, counts = self.shape, self.world, self.received, EXPERTS_A_RANK
        bound = row_bound(sum(shape.tokens), shape.num_topk, counts, ALIGNMENT)
        want = reference.dispatch(
            self.reference,
            self.inputs,
            rank,
            num_experts=shape.num_experts,
            expert_alignment=ALIGNMENT,
            num_worst_tokens=shape.num_worst_tokens,
            num_rows=bound,
        )
        placed = want.handle.placement
        row_of, source, ends = (guarded(*each.shape, dtype=torch.int32) for each in placed[:3])
        rows = guarded(*want.rows.shape, dtype=torch.int32)
        weights = guarded(bound, dtype=torch.float32)
        assert want.scales is not None
        scales = guarded(*want.scales.shape, dtype=torch.float32)
        world.queue(
            rank,
            PlaceConfig(shape.topk_is_int64),
            counts,
            topk_idx=received["recv_topk_idx"],
            known=self.handles[rank].recv_expert_counts,
            row_of=row_of,
            source=source,
            end=ends,
            count=None,
            num_selections=row_of.numel(),
            num_experts=counts,
            num_rows=bound,
            alignment=ALIGNMENT,
        )
        world.queue(
            rank,
            PermuteConfig(HIDDEN_BYTES, shape.num_topk, shape.tma, num_warps=3, rows_per_warp=2),
            2,
            x=received["recv_x"],
            scales=received["recv_scales"],
            weights=received["recv_topk_weights"],
            row_of=row_of,
            source=source,
            end=ends[-1:],
            rows=rows,
            row_scales=scales,
            row_weights=weights,
            scale_token_stride=shape.num_scales,
            weight_stride=shape.num_topk,
            row_of_stride=shape.num_topk,
            scale_row_stride=shape.num_scales,
            scale_stride=1,
            num_tokens=len(row_of),
            num_rows=bound,
            num_scales=shape.num_scales,
            zero_padding=True,
        )
        last = int(placed.ends[-1])
        assert want.weights is not None
        for name, got, wanted in (
            *zip(placed._fields, (row_of, source, ends), placed[:3], strict=False),
            ("rows", rows[:last], want.rows[:last]),
            ("scales", scales[:last], want.scales[:last]),
            ("weights", weights, want.weights),
        ):
            world.expect(rank, name, got, wanted)


@pytest.mark.parametrize(
    ("cut", "tma", "room"),
    [((2, 1), True, 0), ((2, 2), True, 0), ((2, 2), False, 200), ((2, 2), True, 30)],
    ids=["2x1", "2x2", "2x2-ldst-static", "2x2-without-room"],
)
def test_behind_the_kernels_of_a_dispatch(cut: tuple[int, int], tma: bool, room: int) -> None:
    """From what these leave, also where there is room for more tokens, or for fewer, than come."""
    shape = Shape(*cut, tma=tma, tokens=tokens_of(cut[0] * cut[1]), num_worst_tokens=room)
    for seed in range(2):
        world = World(shape, seed=seed)
        Placed(world).dispatch()
        world.run(seed)


def test_words_beside_a_row() -> None:
    """Kernels of a second pass stand beside those of a dispatch or combine of these shapes."""
    new = ExpertDispatchShape(512, 4, 3, False, False, True, 1)
    assert new.by_source == DispatchShape(512, 4, 3, False)
    cached = ExpertDispatchShape(512, 4, 3, True, True, True)
    assert cached.by_source == DispatchShape(512, 7, 0, True)
    assert cached._replace(has_weights=False).by_source == DispatchShape(512, 4, 0, True)
    sums = ExpertCombineShape(512, 3, True, True, False, 64)
    assert sums.by_source == (512, 0, True, 0)
    assert sums._replace(has_weights=True).by_source == (512, 3, True, 0)
