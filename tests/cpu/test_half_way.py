"""A dispatch that ends between its two kernels, and memory whose peer does not come."""

from __future__ import annotations

import contextlib
import operator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from epjit import CommunicationError
from epjit.calls import Dispatch, Routing
from epjit.modes.intranode import Intranode
from epjit.runtime.empty import empty_on
from epjit.runtime.fault import NUM_WORDS, FaultRecord
from epjit.runtime.symmetric import SymmetricMemory


@pytest.mark.parametrize("at", ["_notify.start", "_wait_for_counts"])
def test_an_interrupted_dispatch_leaves_a_buffer_that_wants_reset(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels run later, and the next dispatch would take those counts for its own."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    mode: Any = Intranode.__new__(Intranode)
    mode._group = SimpleNamespace(size=2, rank=1)
    mode._half_way, mode._notify = "", mock.Mock()
    mode._fault = FaultRecord(np.zeros(NUM_WORDS, np.int64))
    mode._empty = empty_on(torch.device("cpu"))
    mode._ask_for_counts, mode._wait_for_counts = mock.Mock(return_value=0), mock.Mock()
    mode._expected, config = {}, mock.Mock(direct=False)
    launch = mock.Mock(kernel=mock.Mock(config=config))
    mode.launch = mock.Mock(return_value=launch)
    operator.attrgetter(at)(mode).side_effect = KeyboardInterrupt
    scope = mock.Mock(allocating=contextlib.nullcontext)
    counts, in_rank = torch.zeros(2, dtype=torch.int32), torch.zeros((4, 2), dtype=torch.bool)
    routing = Routing(counts, None, counts, in_rank)
    call = Dispatch(torch.zeros((4, 8)), None, None, None, routing, 1, 0, 2)
    with pytest.raises(KeyboardInterrupt):
        mode.dispatch(scope, call)
    assert mode._notify.start.called
    assert launch.start.called == (at == "_wait_for_counts")
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
