"""A dispatch that ends between its two kernels, and memory whose peer does not come."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from epjit import CommunicationError
from epjit.modes.intranode import Intranode
from epjit.runtime.empty import empty_on
from epjit.runtime.symmetric import SymmetricMemory


@pytest.mark.parametrize("at", ["_notify", "_wait_for_counts"])
def test_an_interrupted_dispatch_leaves_a_buffer_that_wants_reset(at: str) -> None:
    """Its notify runs later, and the next dispatch would take those counts for its own."""
    mode: Any = Intranode.__new__(Intranode)
    mode._group = SimpleNamespace(size=2, rank=1)
    mode._fault, mode._half_way, mode._notify = mock.Mock(), "", mock.Mock()
    mode._empty = empty_on(torch.device("cpu"))
    mode.launch, mode._ask_for_counts = mock.Mock(), mock.Mock(return_value=0)
    mode._wait_for_counts = mock.Mock()
    getattr(mode, at).side_effect = KeyboardInterrupt
    scope = mock.Mock(allocating=contextlib.nullcontext)
    counts = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(KeyboardInterrupt):
        mode.dispatch(
            scope,
            torch.zeros((4, 8)),
            None,
            None,
            None,
            counts,
            torch.zeros((4, 2), dtype=torch.bool),
            counts,
            expert_alignment=1,
            num_worst_tokens=0,
            num_sms=2,
        )
    assert mode._notify.called
    with pytest.raises(CommunicationError, match=r"of rank 1 ended half way \(KeyboardInterrupt"):
        mode.raise_fault()


def test_shared_memory_is_freed_when_a_peer_does_not_come() -> None:
    group: Any = mock.Mock(rank=0, size=2, allgather=mock.Mock(side_effect=CommunicationError("")))
    with (
        mock.patch.object(SymmetricMemory, "_share"),
        mock.patch.object(SymmetricMemory, "close") as close,
        pytest.raises(CommunicationError),
    ):
        SymmetricMemory(1024, group=group, device=0)
    assert close.called
