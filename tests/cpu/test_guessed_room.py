"""Dispatches that are launched before their counts are known: the host's part, without a GPU."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from epjit.calls import Dispatch, ExpertDispatch, Routing
from epjit.handles import Dispatched
from epjit.kernels.intranode import DispatchConfig
from epjit.modes.internode import Internode
from epjit.modes.intranode import Intranode
from epjit.modes.normal import Normal, dispatch_shape
from epjit.runtime.empty import TensorSpec, empty_on

RANKS, EXPERTS, TOPK = 2, 4, 2
SMALL_ROWS = 100  # rows whose outputs are small


class Scope:
    """The scope of a call on the communication stream.

    Attributes:
        stream: That.
        is_behind: Whether it waits for all that the allocator, or torch's fills, may have queued.
    """

    stream, is_behind = 7, False

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        self.is_behind = False
        yield

    def start(self) -> None:
        self.is_behind = True


class World:
    """A mode that has only what a dispatch with new counts needs; a rank of two.

    Attributes:
        launches: Parameters of each launch of dispatch, and how many tensors lived then.
        log: "launch" and "wait", in order.
        came: Counts of notify for the host: rows (and tokens that pass through).
        out_of_memory: Whether the next output does not fit.
    """

    def __init__(self, kind: type[Normal]) -> None:
        self.launches: list[dict[str, Any]] = []
        self.log: list[str] = []
        self.came: tuple[int, ...] = ()
        self.out_of_memory = False
        self._tensors: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self._torchs = empty_on(torch.device("cpu"))
        mode: Any = kind.__new__(kind)
        mode._group = SimpleNamespace(size=RANKS, rank=1)
        mode._topology = SimpleNamespace(num_domains=RANKS, num_local=1)
        mode._expected, mode._half_way, mode._notify = {}, "", mock.Mock()
        mode._empty, mode._wait_for_counts = self._empty, self._wait
        mode._ask_for_counts = mock.Mock(return_value=0)
        mode.launch = lambda shape: SimpleNamespace(
            kernel=SimpleNamespace(config=self._config(shape)),
            set=self._set,
            start=self._start,
        )
        self.mode = mode
        self.scope = Scope()

    @staticmethod
    def _config(shape: Any) -> Any:
        chosen = DispatchConfig.choose(shape, num_ranks=RANKS, variant="tma", limit=200 << 10)
        return SimpleNamespace(direct=False, send_warps=1, stage_warps=chosen.stage_warps)

    def _empty(self, specs: Iterable[TensorSpec | None]) -> list[Any]:
        specs = list(specs)
        if self.out_of_memory and any(spec and spec[0][0] > 40 for spec in specs):
            raise torch.OutOfMemoryError
        made = self._torchs(specs)
        self._tensors.update(each for each in made if each is not None)
        return made

    def _set(self, **values: Any) -> None:
        rows = [each for each in self._tensors if each.dtype == torch.bfloat16]
        self.launches.append({**values, "alive": len(rows)})

    def _start(self, stream: Any, grid: int, values: dict[str, Any] | None = None) -> None:
        assert self.scope.is_behind, "outputs may be in use, or be filled afterwards"
        if values is not None:
            self._set(**values)
        self.log.append("launch")
        assert self.log.count("launch") == len(self.launches)

    def _wait(self, num_counts: int) -> list[int]:
        self.log.append("wait")
        return [*self.came, *range(num_counts - len(self.came))]

    def dispatch(self, num_tokens: int, *came: int, worst: int = 0) -> Dispatched:
        self.came = came
        self.launches.clear()
        self.log.clear()
        counts = torch.zeros(RANKS * EXPERTS, dtype=torch.int32)
        in_rank = torch.zeros((num_tokens, RANKS), dtype=torch.bool)
        x = torch.zeros((num_tokens, 8), dtype=torch.bfloat16)
        idx = torch.zeros((num_tokens, TOPK), dtype=torch.int64)
        weights = torch.zeros((num_tokens, TOPK))
        routing = Routing(counts, counts, counts, in_rank)
        call = Dispatch(x, None, idx, weights, routing, 1, worst, 2)
        small = SMALL_ROWS * dispatch_shape(call).bytes_a_row
        with (
            mock.patch("epjit.modes.normal._SMALL_BYTES", small),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
            mock.patch("epjit.modes.internode.check_warps"),
        ):
            received: Dispatched = self.mode.dispatch(self.scope, call)
        self.check(received, *(came or (worst, worst)), per_expert=[] if worst else [0, 1, 2, 3])
        return received

    def check(
        self, received: Dispatched, rows: int, passing: int = -1, *, per_expert: list[int]
    ) -> None:
        """Results are as long as what came, and lie where the last launch wrote them."""
        handle: Any = received.handle
        assert received.num_recv_tokens_per_expert_list == per_expert
        assert handle.num_rows == rows
        if isinstance(self.mode, Internode):
            assert handle.num_passing == passing
        for name in ("recv_x", "recv_topk_idx", "recv_topk_weights"):
            tensor = getattr(received, name)
            assert tensor.shape[0] == rows
            assert tensor.is_contiguous()
            assert not tensor._is_view()  # or autograd refuses operations in place
            assert tensor.data_ptr() in ((self.launches[-1][name],) if rows else (0,))

    @property
    def rooms(self) -> list[tuple[int, int]]:
        """Of each launch: rows that there was room for, and the fewest."""
        return [(each["num_recv_rows"], each["least_rows"]) for each in self.launches]


@pytest.fixture
def world() -> World:
    return World(Intranode)


def test_small_outputs_have_room_for_as_many_tokens_on_every_rank(world: World) -> None:
    received = world.dispatch(30, 41)
    assert world.log == ["launch", "wait"]
    assert world.rooms == [(RANKS * 30, 0)]
    assert received.recv_x.untyped_storage().nbytes() == RANKS * 30 * 16


def test_more_than_the_guess(world: World) -> None:
    """Others hold more tokens: a second launch, and the next guess is better."""
    world.dispatch(30, 65)
    assert world.log == ["launch", "wait", "launch"]
    assert world.rooms == [(60, 0), (65, -1)]
    assert world.launches[-1]["alive"] == 1, "the outputs of the guess should be gone"
    world.dispatch(28, 70)
    assert world.rooms == [(65 + 65 // 8, 0)]
    world.dispatch(2, 4)
    assert world.rooms == [(4, 0)], "of another number of tokens nothing is known"


def test_large_outputs(world: World) -> None:
    """The first one waits; later ones may hold an eighth more and a tenth less than the last."""
    world.dispatch(100, 160)
    assert world.log == ["wait", "launch"]
    assert world.rooms == [(160, -1)]
    for rows in (180, 202, 182, 204):
        expected = world.mode._expected[7][0]
        world.dispatch(100, rows)
        assert world.log == ["launch", "wait"]
        assert world.rooms == [(expected, -(-expected * 4 // 5))]
        assert expected <= rows * 5 / 4
    for rows in (182, 205, 150):  # 229 were expected, then 204, then 230
        world.dispatch(100, rows)
        assert world.log == ["launch", "wait", "launch"]
        assert world.rooms[1] == (rows, -1)
    world.dispatch(100, 10)
    world.dispatch(100, 0)
    assert world.rooms == [(11, 0)], "it is small"


def test_no_rows(world: World) -> None:
    for tokens in (0, 0, 3, 3):
        world.dispatch(tokens, 0)
        assert world.log == ["launch", "wait"]


def test_no_memory_for_a_guess(world: World) -> None:
    """That is no error: the rows that come may need less."""
    world.out_of_memory = True
    world.dispatch(30, 40)
    assert world.log == ["wait", "launch"]
    assert world.rooms == [(40, -1)]


def test_a_worst_case_is_no_guess(world: World) -> None:
    world.dispatch(30, worst=77)
    assert world.log == ["launch"]
    assert world.rooms == [(77, -1)]


@pytest.mark.parametrize("came", [(41, 50), (61, 50), (41, 61)])
def test_between_domains(came: tuple[int, int]) -> None:
    """Rows and tokens that pass through, each with room of its own."""
    world = World(Internode)
    world.dispatch(30, *came)
    fits = max(came) <= 60
    assert world.log == ["launch", "wait"] + ["launch"] * (not fits)
    passing = [each["num_passing"] for each in world.launches]
    assert passing == [60] + [came[1]] * (not fits)
    assert world.rooms == [(60, 0)] + [(came[0], -1)] * (not fits)
    world.dispatch(30, worst=100)
    assert world.rooms == [(100, -1)]


@pytest.mark.parametrize("worst", [0, 40])
def test_rows_by_expert_are_stored_behind_what_used_their_memory(
    world: World, worst: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are allocated when the first kernels of the call are queued."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    world.mode._layout, world.mode._expert_notify = mock.Mock(), mock.Mock()
    world.came = (17,)
    call = ExpertDispatch(
        *(
            torch.zeros((9, 8), dtype=torch.bfloat16),
            None,
            torch.zeros((9, TOPK), dtype=torch.int64),
        ),
        *(None, None, RANKS * EXPERTS, 1, worst, 0),
        zero_padding=False,
        column_major_scales=False,
        row_format=None,
        global_scale=None,
        num_sms=2,
    )
    received, _ = world.mode.expert_dispatch(world.scope, call)
    assert world.log == ["wait"] * (not worst) + ["launch"]
    again = call._replace(topk_idx=None, handle=received.handle)
    world.mode.expert_dispatch(world.scope, again)
    assert world.log.count("launch") == 2
