"""Which of torch's functions makes outputs, and that it makes what torch.empty does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from epjit.runtime.empty import empty_on, matrix, vector

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(0,), (5,), (3, 4), (0, 4), (3, 0)])
def test_as_torch_empty(shape: tuple[int, ...]) -> None:
    spec = vector(torch.int64, *shape) if len(shape) == 1 else matrix(torch.int64, *shape)
    made, none = empty_on(CPU)([spec, None])
    wanted = torch.empty(shape, dtype=torch.int64)
    assert none is None
    assert (made.shape, made.stride(), made.dtype, made.device) == (
        wanted.shape,
        wanted.stride(),
        wanted.dtype,
        wanted.device,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of either function on a machine whose current GPU is 1."""
    found: list[tuple[Any, ...]] = []
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(guards, "_empty_strided_cuda", lambda *spec: found.append(spec))

    def empty_strided(*args: Any, device: torch.device, **options: Any) -> None:
        found.append((*args, options["dtype"], device.index))

    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    return found


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_quickly_on_the_current_gpu(calls: list[tuple[Any, ...]]) -> None:
    empty_on(torch.device("cuda", 1))([matrix(torch.bfloat16, 3, 4), None, vector(torch.int32, 2)])
    assert calls == [((3, 4), (4, 1), torch.bfloat16), ((2,), (1,), torch.int32)]


def test_by_torch_on_another_gpu(calls: list[tuple[Any, ...]]) -> None:
    empty_on(torch.device("cuda", 0))([vector(torch.int32, 2)])
    assert calls == [((2,), (1,), torch.int32, 0)]


@pytest.mark.usefixtures("deterministic")
def test_by_torch_where_it_fills(calls: list[tuple[Any, ...]]) -> None:
    empty_on(torch.device("cuda", 1))([vector(torch.int32, 2)])
    assert calls == [((2,), (1,), torch.int32, 1)]
