"""Real GPUs, one process each, against the reference; ``make test-dist N=4``.

``EPJIT_BACKEND=cpu EPJIT_TEST_RANKS=2`` runs the same scenarios without a GPU, to try them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from epjit.bench.timing import free_port
from tests.harness import launch
from tests.scenarios import normal
from tests.rounds.normal import DISPATCH_VARIANTS, variant_environ

ROOT = Path(__file__).parents[2]
SHAPES = ((7168, 256), (2880, 128), (8192, 64), (16384, 32), (16, 32))
TIMEOUT_SECONDS = 2.0

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(params=DISPATCH_VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, str]:
    """Environment of the ranks: every variant of dispatch, with the combine that goes with it."""
    return variant_environ(request.param)


@pytest.fixture
def two_or_more(num_ranks: int) -> int:
    """A rank alone waits for nobody."""
    if num_ranks < 2:
        pytest.skip("needs two ranks")
    return num_ranks


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one rank has died the others still have something to say."""
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 60.0)


def test_random_rounds(num_ranks: int, variant: dict[str, str]) -> None:
    """100 fresh rounds on two buffers in turn, with a rank that is late now and then."""
    done = launch.run(normal.random_rounds, num_ranks, variant, 100, 160, timeout=600)
    assert done == [100] * num_ranks


@pytest.mark.needs_own_gpu
@pytest.mark.needs_gpu
def test_random_rounds_with_a_nccl_group(num_ranks: int) -> None:
    """The process group may be of any backend; nothing of ours goes through it later."""
    done = launch.run(normal.random_rounds, num_ranks, {}, 12, 160, timeout=300, backend="nccl")
    assert done == [12] * num_ranks


def test_model_shapes(num_ranks: int, variant: dict[str, str]) -> None:
    """Rows of real models, and the longest and the shortest row there is."""
    launch.run(normal.shapes, num_ranks, variant, SHAPES, 333, timeout=600)


@pytest.mark.parametrize("num_rows", [4, 32])
def test_small_buffers(num_ranks: int, num_rows: int, variant: dict[str, str]) -> None:
    """Buffers of a few rows: hundreds of windows, and nothing gets stuck."""
    launch.run(normal.small_buffers, num_ranks, variant, num_rows, 333, timeout=300)


def test_graph(num_ranks: int, variant: dict[str, str]) -> None:
    """Captured once, replayed 100 times with changed inputs and eager calls between."""
    done = launch.run(normal.graph, num_ranks, variant, 101, 100, 12, timeout=400)
    assert done == [101] * num_ranks


def test_withheld_peer(two_or_more: int, variant: dict[str, str]) -> None:
    """A rank does not come: the others name it in time, live on, and work again after reset()."""
    cases = normal.cases_of(("notify", "dispatch", "combine"), two_or_more)
    texts = launch.run(normal.withheld, two_or_more, variant, cases, TIMEOUT_SECONDS, timeout=200)
    normal.assert_all_but_the_absent(texts, cases)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("op", ["notify", "dispatch", "combine"])
@pytest.mark.parametrize("which", ["first", "last"])
def test_killed_peer(two_or_more: int, op: str, which: str) -> None:
    """A rank dies before it makes a call: the others name it, compute on and end in good order."""
    victim = 0 if which == "first" else two_or_more - 1
    with pytest.raises(launch.RankFailedError) as caught:
        launch.run(normal.killed, two_or_more, {}, op, victim, TIMEOUT_SECONDS, timeout=200)
    assert list(caught.value.errors) == [victim], str(caught.value)
    assert f"exit code {-signal.SIGKILL}" in caught.value.errors[victim]


@pytest.mark.needs_gpu
def test_fabric_handles(num_ranks: int) -> None:
    """The same over memory that is shared by fabric handles, where the driver gives them out."""
    reasons = launch.run(normal.fabric, num_ranks, {}, timeout=200)
    if any(reasons):
        pytest.skip(f"no fabric handles here: {reasons[0]}")


def test_buffer_is_replaced_by_a_bigger_one(num_ranks: int) -> None:
    """As frameworks do: the old one goes after the new one has come."""
    launch.run(normal.replaced, num_ranks, {}, timeout=200)


@pytest.mark.needs_own_gpu
def test_buffers_come_and_go(num_ranks: int) -> None:
    """Ten times; the device has as much free memory as before, give or take the driver's own."""
    grown = launch.run(normal.recreated, num_ranks, {}, 10, timeout=200)
    assert max(grown) < 32 * normal.MB, grown


def test_buffer_outlives_the_process_group(num_ranks: int) -> None:
    """Nothing but the constructor uses torch.distributed."""
    launch.run(normal.outlives_group, num_ranks, {}, timeout=200)


@pytest.mark.parametrize("script", ["train.py", "infer.py"])
def test_example(num_ranks: int, script: str) -> None:
    """They compare themselves with a dense layer."""
    torchrun = ["-m", "torch.distributed.run", f"--master-port={free_port()}"]
    command = [sys.executable, *torchrun, f"--nproc-per-node={num_ranks}", f"examples/{script}"]
    _succeeds(command, cwd=ROOT, seconds=400)


@pytest.mark.needs_own_gpu
@pytest.mark.needs_gpu
def test_deepeps_own_test(two_or_more: int) -> None:
    """DeepEP's `test_intranode.py`, unmodified, through the package `deep_ep` of compat/."""
    folder = os.environ.get("EPJIT_DEEPEP_TESTS")
    if not folder:
        pytest.skip("EPJIT_DEEPEP_TESTS names no folder that holds DeepEP's test_intranode.py")
    script = Path(folder).resolve() / "test_intranode.py"
    assert script.is_file(), f"EPJIT_DEEPEP_TESTS={folder} holds no test_intranode.py"
    num_experts = 256 // two_or_more * two_or_more  # the script's own number, if the ranks divide it
    _succeeds(
        [sys.executable, str(script), f"--num-processes={two_or_more}", f"--num-experts={num_experts}"],
        cwd=script.parent,
        seconds=800,
    )


def _succeeds(command: list[str], *, cwd: Path, seconds: float) -> None:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=launch.script_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, (
        f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout[-6000:]}"
    )
