"""The CPU backend refuses what a GPU refuses, in the same words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epjit import Buffer, Config
from epjit.kernels.intranode import CombineConfig, DispatchConfig
from epjit.kernels.shapes import DispatchShape, ExpertCombineShape
from tests.harness import launch
from tests.harness.data import payload, routing
from tests.rounds.normal import layout_of


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_BACKEND", "cpu")


def refused(body: Any, num_ranks: int = 2) -> list[str]:
    """The error of each rank when ``body(comm)`` is refused on all of them."""

    def worker(comm: Any) -> str:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            body(comm)
        return f"{caught.type.__name__}: {caught.value}"

    return launch.run_threads(worker, num_ranks)


def dispatch(buffer: Buffer, hidden: int = 512, num_sms: int = 4) -> tuple[Any, ...]:
    ranks = buffer.group_size
    idx = routing("balanced", num_tokens=3, num_experts=ranks, num_topk=1, num_ranks=ranks, seed=0)
    x = payload(0, 3, hidden, torch.bfloat16)
    return buffer.dispatch(x, **layout_of(buffer, idx, ranks), config=Config(num_sms))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_nvl_bytes", {"num_nvl_bytes": (128, 256)}),
        ("num_rdma_bytes", {"num_rdma_bytes": (128, 256), "low_latency_mode": (True, True)}),
        ("low_latency_mode", {"low_latency_mode": (True, False)}),
        ("enable_shrink", {"enable_shrink": (True, False)}),
        ("use_fabric", {"use_fabric": (True, False)}),
        ("num_qps_per_rank", {"num_qps_per_rank": (1, 2)}),
    ],
)
def test_ranks_make_the_same_buffer(name: str, options: dict[str, tuple[Any, Any]]) -> None:
    """Else one rank waits for others that never come there."""

    def make(comm: Any) -> Buffer:
        mine = {key: values[comm.Get_rank()] for key, values in options.items()}
        return Buffer(None, comm=comm, **mine)

    for said in refused(make):
        assert said.startswith(f"RuntimeError: the ranks chose different values of {name}:\n")
        assert "  rank 0: " in said
        assert "  rank 1: " in said


@pytest.mark.parametrize("num_nvl_bytes", [0, 1280])
def test_a_buffer_too_small_for_two_tokens(num_nvl_bytes: int) -> None:
    """Two slots of a row of 1024 bytes for each of two ranks."""

    def body(comm: Any) -> None:
        dispatch(Buffer(None, num_nvl_bytes, comm=comm))

    said = "dispatch of 1024-byte rows needs num_nvl_bytes >= 4096, but this Buffer has"
    assert all(said in each for each in refused(body))

    def warm_up(comm: Any) -> None:
        Buffer(None, num_nvl_bytes, comm=comm).warmup(1024)

    assert all("needs num_nvl_bytes >= " in each for each in refused(warm_up))
    launch.run_threads(lambda comm: dispatch(Buffer(None, 4096, comm=comm)), 2)
    launch.run_threads(lambda comm: dispatch(Buffer(None, num_nvl_bytes, comm=comm)), 1)


def test_a_combine_that_has_no_room() -> None:
    def body(comm: Any) -> None:
        buffer = Buffer(None, 1024, comm=comm)
        recv_x, _, _, _, handle, _ = dispatch(buffer, hidden=16)
        wide = torch.zeros((recv_x.shape[0], 4096), dtype=torch.bfloat16)
        buffer.combine(wide, handle)

    assert all(
        "combine of 8192-byte rows needs num_nvl_bytes >= " in each for each in refused(body)
    )


def test_equal_tuples_of_two_operations_are_two_kernels() -> None:
    def body(comm: Any) -> None:
        mode: Any = Buffer(None, 1 << 20, comm=comm)._mode
        dispatch = DispatchShape(512, 4, 0, True, False, False)
        combine = ExpertCombineShape(512, 4, False, True, False, 0)
        assert dispatch == combine
        found = [type(mode._chosen.launch(shape)) for shape in (dispatch, combine)]
        assert found == [DispatchConfig, CombineConfig]

    launch.run_threads(body, 1)


@pytest.mark.parametrize("sizes", [(1 << 20, 1024), (0, 1 << 20)])
def test_between_domains(sizes: tuple[int, int]) -> None:
    def body(comm: Any) -> None:
        buffer = Buffer(None, *sizes, comm=comm, nvlink_domain=2)
        recv_x, _, _, _, handle, _ = dispatch(buffer)
        buffer.combine(recv_x, handle)

    what = "num_nvl_bytes" if sizes[0] == 0 else "num_rdma_bytes"
    for said in refused(body, 4):
        assert "-byte rows between 2 NVLink domains" in said
        assert f"needs {what} >= " in said


def test_a_variant_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, op in (("DISPATCH", "dispatch"), ("COMBINE", "combine")):
        with monkeypatch.context() as patch:
            patch.setenv(f"EPJIT_{name}_VARIANT", "pull")

            def body(comm: Any) -> None:
                buffer = Buffer(None, 1 << 20, comm=comm)
                recv_x, _, _, _, handle, _ = dispatch(buffer)
                buffer.combine(recv_x, handle)

            said = f"ValueError: EPJIT_{name}_VARIANT='pull' is not a variant of {op}"
            assert all(each.startswith(said) for each in refused(body))
    monkeypatch.setenv("EPJIT_DISPATCH_VARIANT", "tma")
    monkeypatch.setenv("DISABLE_SM90_FEATURES", "1")
    tma = refused(lambda comm: dispatch(Buffer(None, 1 << 20, comm=comm)))
    assert all("which DISABLE_SM90_FEATURES=1 excludes" in each for each in tma)


@pytest.mark.parametrize("variant", ["pull", "reduced"])
def test_a_low_latency_combine_that_no_kernel_runs(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`reduced` has room for 262144 words, and 2 ranks with 16384 tokens and top-8 need more."""
    monkeypatch.setenv("EPJIT_LOW_LATENCY_COMBINE_VARIANT", variant)
    max_tokens = 16384 if variant == "reduced" else 64

    def body(comm: Any) -> None:
        buffer = Buffer(None, 0, 1 << 30, True, comm=comm)
        idx = torch.zeros((1, 8), dtype=torch.int64)
        x = torch.ones((1, 256), dtype=torch.bfloat16)
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, max_tokens, 2, use_fp8=False)
        buffer.low_latency_combine(recv_x, idx, torch.ones((1, 8)), handle)

    said = "is not a variant" if variant == "pull" else "=reduced has room for"
    assert all(said in each for each in refused(body))
