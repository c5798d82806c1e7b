"""The order in which every mode builds a launch, starts again and ends, whatever its kernels."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epjit.config import MAX_RANKS
from epjit.kernels import shapes
from epjit.modes import base

BUILD = ["config", "bind config", "agree config"]
RESET = ["synchronize", "group.reset", "quiet", "barrier", "synchronize", "fault.clear", "barrier"]


class Steps(base.Mode[str]):
    """A mode of steps that it tells; each may fail, and one looks at the words."""

    _warmup = "warmup"

    def __init__(self, told: list[str], *, has_transport: bool) -> None:
        self.told, self.fails_at, self.is_whole = told, "", True
        transport: Any = SimpleNamespace(quiet=lambda: self.tell("quiet"), body="loopback")
        group: Any = SimpleNamespace(
            rank=0,
            barrier=lambda op="Buffer": self.tell("barrier"),
            reset=lambda: self.tell("group.reset"),
        )
        setup: Any = (
            SimpleNamespace(timeout_seconds=1.0),
            group,
            SimpleNamespace(spans_domains=False),
            torch.device("cpu"),
            ExitStack(),
        )
        super().__init__(setup)
        self._transport = transport if has_transport else None
        self._signals_at = 128
        self.memory = SimpleNamespace(  # type: ignore[assignment]
            tensor=torch.ones(256, dtype=torch.uint8).view, peer_ptrs=[0x1000, 0, 0x3000]
        )
        self.own = self._own_words(3)

    def tell(self, step: str) -> Any:
        self.told.append(step)
        if step == self.fails_at:
            raise RuntimeError(step)
        return step

    def _config(self, shape: str) -> Any:
        return self.tell("config")

    def _bind(self, config: Any) -> Any:
        return self.tell(f"bind {config}")

    def _agree(self, config: Any, **sizes: int) -> None:
        self.tell(f"agree {config}")

    def _configs_on(self, arch: str, shapes: Any) -> list[Any]:
        return [f"{shape} on {arch}" for shape in shapes]

    def _wait_for_peers(self) -> bool:
        self.tell("wait")
        return self.is_whole


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    told: list[str] = []
    fault = SimpleNamespace(clear=lambda: told.append("fault.clear"), close=None, device_ptr=0)
    monkeypatch.setattr(base, "FaultRecord", lambda: fault)
    monkeypatch.setattr(base, "arch_of", lambda device: "sm_90a")
    monkeypatch.setattr(base, "synchronize", lambda device: told.append("synchronize"))
    monkeypatch.setattr(base, "compile_kernel", lambda config, **_: told.append(config))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def of(*, has_transport: bool = True) -> Steps:
        told.clear()
        return Steps(told, has_transport=has_transport)

    return of


@pytest.mark.parametrize("fails_at", ["", *BUILD])
def test_a_launch_is_kept_once_all_ranks_agree(make: Any, fails_at: str) -> None:
    """Compiled before the ranks meet: nobody waits for a peer that compiles."""
    mode = make()
    mode.fails_at = fails_at
    if fails_at:
        with pytest.raises(RuntimeError, match=fails_at):
            mode.launch("shape")
        assert mode.told == BUILD[: BUILD.index(fails_at) + 1]
        mode.fails_at = ""
        mode.told.clear()
    for _ in range(2):
        assert mode.launch("shape") == "bind config"
    assert mode.told == BUILD


def test_equal_tuples_of_two_operations_have_two_launches(make: Any) -> None:
    """As of a dispatch of scales and a combine of rows by expert, in which a round failed."""
    mode, told = make(), []
    mode._config = lambda shape: told.append(type(shape)) or SimpleNamespace(op="op")
    dispatch = shapes.DispatchShape(512, 4, 0, True, False, False)
    combine = shapes.ExpertCombineShape(512, 4, False, True, False, 0)
    assert dispatch == combine
    for _ in range(2):
        mode.launch(dispatch)
        mode.launch(combine)
    assert told == [shapes.DispatchShape, shapes.ExpertCombineShape]


def test_nothing_is_built_while_a_graph_is_captured(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    mode = make()
    mode._config = lambda shape: SimpleNamespace(op="some_op")
    with pytest.raises(RuntimeError, match=r"^some_op needs .* captured; .*Buffer\.warmup\(\)$"):
        mode.launch("shape")
    assert not mode.told


def test_warmup_takes_shapes_that_come_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0a")
    mode = make()
    mode.warmup(iter(["one", "two"]))
    assert mode.told == BUILD * 2 + ["one on sm_100a", "two on sm_100a"]


@pytest.mark.parametrize("has_transport", [True, False])
def test_reset_zeroes_what_is_not_the_users_when_nothing_is_on_its_way(
    make: Any, has_transport: bool
) -> None:
    mode = make(has_transport=has_transport)
    for words in (mode._epoch, mode._abort, mode.own):
        words.fill_(7)
    memory = mode.memory.tensor(torch.uint8)
    if has_transport:  # what is on its way would come after the zeros
        mode._transport.quiet = lambda: memory.all() and mode.tell("quiet")
    mode.reset()
    assert mode.told == RESET[:2] + (RESET[2:4] if has_transport else []) + RESET[4:]
    assert memory[:128].all()
    assert not memory[128:].any()
    assert not any(bool(words.any()) for words in (mode._epoch, mode._abort, mode.own))


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_end_waits_for_what_was_sent_unless_a_peer_is_lost(make: Any, is_whole: bool) -> None:
    mode = make()
    mode.launch("shape")
    mode.told.clear()
    mode.is_whole = is_whole
    mode._leave()
    assert mode.told == ["synchronize", "wait"] + ["quiet"] * is_whole
    assert not mode._launches


def test_addresses_are_those_of_this_domain(make: Any) -> None:
    """Ranks of other domains are at 0."""
    assert make()._everywhere(0x20) == [0x1020, 0x3020] + [0] * (MAX_RANKS - 2)
