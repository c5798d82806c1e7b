"""A dispatch that ends between its two kernels, and a Buffer that is not made to its end."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from epjit import Buffer, CommunicationError
from epjit.intranode import Intranode
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


def test_what_was_made_is_freed_when_the_rest_cannot_be() -> None:
    """A caller may catch that there is no memory, and try a smaller size."""
    buffer: Any = Buffer.__new__(Buffer)
    mode = mock.Mock()

    def make(self: Any, *_: object) -> None:
        self._mode = mode
        raise RuntimeError("no memory for num_rdma_bytes")

    alone = mock.Mock(Get_rank=lambda: 0, Get_size=lambda: 1, allgather=lambda each: [each])
    with (
        mock.patch.multiple(
            "epjit.buffer",
            use_gpu=lambda: True,
            find_topology=mock.MagicMock(),
            _check_topology=mock.Mock(),
        ),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch("epjit.scope.is_current", return_value=True),
        mock.patch.object(Buffer, "_make_on_gpu", make),
        pytest.raises(RuntimeError, match="no memory for num_rdma_bytes"),
    ):
        buffer.__init__(None, 1024, comm=alone)
    assert mode.close.called


def test_shared_memory_is_freed_when_a_peer_does_not_come() -> None:
    group: Any = mock.Mock(rank=0, size=2, allgather=mock.Mock(side_effect=CommunicationError("")))
    with (
        mock.patch.object(SymmetricMemory, "_share"),
        mock.patch.object(SymmetricMemory, "close") as close,
        pytest.raises(CommunicationError),
    ):
        SymmetricMemory(1024, group=group, device=0)
    assert close.called
