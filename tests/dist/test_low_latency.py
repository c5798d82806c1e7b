"""The low-latency mode on real GPUs, one process each, against the reference.

Also cut into NVLink domains, between which bytes travel by NVSHMEM, or by the loopback transport
with delays. ``EPJIT_BACKEND=cpu EPJIT_TEST_RANKS=2`` runs the same scenarios without a GPU, to try
them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.harness import launch
from tests.scenarios import low_latency, normal

SHAPES = ((7168, 256), (2880, 128), (8192, 64), (16384, 32), (16, 32))
TIMEOUT_SECONDS = 2.0

# Environment of the ranks.
WORLDS = {
    "one-domain": {},
    "lines": {
        "EPJIT_LOW_LATENCY_DISPATCH_VARIANT": "lines",
        "EPJIT_LOW_LATENCY_COMBINE_VARIANT": "lines",
    },
    "nvshmem": {"EPJIT_NVLINK_DOMAIN": "1", "EPJIT_TRANSPORT": "nvshmem"},
    "nvshmem-ibgda": {
        "EPJIT_NVLINK_DOMAIN": "1",
        "EPJIT_TRANSPORT": "nvshmem",
        "NVSHMEM_IB_ENABLE_IBGDA": "1",
    },
    "nvshmem-by-two": {"EPJIT_NVLINK_DOMAIN": "2", "EPJIT_TRANSPORT": "nvshmem"},
    "loopback-by-two": {
        "EPJIT_NVLINK_DOMAIN": "2",
        "EPJIT_TRANSPORT": "loopback",
        "EPJIT_LOOPBACK_SEED": "1",
    },
}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, num_ranks: int) -> dict[str, str]:
    """The NVLink domains, and what carries bytes between them."""
    environ = WORLDS[request.param]
    size = int(environ.get("EPJIT_NVLINK_DOMAIN", "0"))
    if size and (num_ranks % size or num_ranks == size):
        pytest.skip(f"{num_ranks} ranks are no domains of {size}")
    return environ


@pytest.fixture
def two_or_more(num_ranks: int) -> int:
    """A rank alone waits for nobody."""
    if num_ranks < 2:
        pytest.skip("needs two ranks")
    return num_ranks


def test_random_rounds(num_ranks: int, world: dict[str, str]) -> None:
    """Fresh rounds, 1000 or between domains 300, with a rank that is late now and then."""
    num_rounds = 300 if world else 1000
    done = launch.run(
        low_latency.random_rounds, num_ranks, world, num_rounds, 64, timeout=850
    )
    assert done == [num_rounds] * num_ranks


def test_random_rounds_beside_the_normal_mode(num_ranks: int, world: dict[str, str]) -> None:
    """Rounds of both modes on one buffer."""
    done = launch.run(low_latency.random_rounds, num_ranks, world, 100, 64, 12, timeout=600)
    assert done == [100] * num_ranks


@pytest.mark.needs_own_gpu
def test_calls_from_fresh_threads(num_ranks: int) -> None:
    """There GPU 0 is current, which on all ranks but the first is not the Buffer's."""
    launch.run(low_latency.fresh_threads, num_ranks, {}, timeout=300)


@pytest.mark.needs_own_gpu
@pytest.mark.needs_gpu
def test_random_rounds_with_a_nccl_group(num_ranks: int) -> None:
    """The process group may be of any backend; nothing of ours goes through it later."""
    done = launch.run(
        low_latency.random_rounds, num_ranks, {}, 12, 64, timeout=300, backend="nccl"
    )
    assert done == [12] * num_ranks


def test_model_shapes(num_ranks: int, world: dict[str, str]) -> None:
    """Rows of real models, and the longest and the shortest row there is, in every format."""
    launch.run(low_latency.model_shapes, num_ranks, world, SHAPES, 32, timeout=800)


@pytest.mark.parametrize("use_hooks", [False, True])
@pytest.mark.parametrize("weights_sent", [False, True])
def test_graph(
    num_ranks: int, world: dict[str, str], use_hooks: bool, weights_sent: bool
) -> None:
    """Three operations, captured once, replayed 100 times with changed inputs."""
    how = (use_hooks, weights_sent)
    done = launch.run(low_latency.graph, num_ranks, world, 101, 32, *how, timeout=400)
    assert done == [101] * num_ranks


def test_scratch_over_the_whole_buffer(num_ranks: int, world: dict[str, str]) -> None:
    """Whatever a user writes to the exposed memory, nothing breaks."""
    launch.run(low_latency.overwritten, num_ranks, world, timeout=200)


def test_withheld_peer(two_or_more: int, world: dict[str, str]) -> None:
    """A rank does not come: the others name it in time, live on, and work again after reset()."""
    cases = normal.cases_of(low_latency.OPS, two_or_more)
    texts = launch.run(
        low_latency.withheld, two_or_more, world, cases, TIMEOUT_SECONDS, timeout=200
    )
    normal.assert_all_but_the_absent(texts, cases)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("variant", ["ldst", "tma", "reduced", "lines", "auto"])
@pytest.mark.parametrize("num_buffers", [2, 3])
def test_buffers_in_another_order(two_or_more: int, num_buffers: int, variant: str) -> None:
    """A kernel that waits for a peer leaves SMs to the kernel that the peer waits for.

    With auto the weights are sent.
    """
    environ = {
        **(WORLDS["lines"] if variant == "lines" else {}),
        "EPJIT_LOW_LATENCY_COMBINE_VARIANT": variant,
    }
    sent = variant == "auto"
    launch.run(low_latency.crossed, two_or_more, environ, num_buffers, sent, timeout=200)


def test_ranks_that_are_set_up_differently(two_or_more: int) -> None:
    """They say so, with both values, instead of waiting for each other."""
    launch.run(low_latency.set_up_differently, two_or_more, {}, timeout=120)


@pytest.mark.needs_gpu
def test_shrink(two_or_more: int, world: dict[str, str]) -> None:
    """A rank that stops answering is masked, the others go on, and it comes back."""
    if world is WORLDS["lines"]:
        pytest.skip("lines serve no group whose ranks come and go")
    cases = normal.cases_of(("dispatch", "combine", "clean"), two_or_more)
    launch.run(
        low_latency.shrunk, two_or_more, world, cases, TIMEOUT_SECONDS, timeout=400
    )


# ---- DeepEP's own test -----------------------------------------------------------------

_SEED = "Testing with seed"


@pytest.fixture
def script() -> Path:
    """DeepEP's `test_low_latency.py` at 567632d."""
    folder = os.environ.get("EPJIT_DEEPEP_TESTS")
    if not folder:
        pytest.skip("EPJIT_DEEPEP_TESTS names no folder that holds DeepEP's test_low_latency.py")
    path = Path(folder).resolve() / "test_low_latency.py"
    assert path.is_file(), f"EPJIT_DEEPEP_TESTS={folder} holds no test_low_latency.py"
    return path


@pytest.mark.needs_own_gpu
@pytest.mark.needs_gpu
@pytest.mark.parametrize("options", [(), ("--use-logfmt",)], ids=["plain", "logfmt"])
def test_deepeps_own_test(two_or_more: int, script: Path, options: tuple[str, ...]) -> None:
    """Unmodified, through the package `deep_ep` of compat/, its profiler lines included."""
    text, code = _run_script(script, two_or_more, options, seconds=800)
    assert code == 0, f"exit code {code}:\n{text[-6000:]}"


@pytest.mark.needs_own_gpu
@pytest.mark.needs_gpu
def test_deepeps_pressure_test(two_or_more: int, script: Path) -> None:
    """It never ends by itself, only by an error: stopped after 20 seeds of 20 repeats each.

    Or after ten minutes, and then it must have finished one seed at least.
    """
    options = ("--pressure-test",)
    text, code = _run_script(script, two_or_more, options, seconds=600, until=(_SEED, 21))
    assert code is None, f"ended by itself with exit code {code}:\n{text[-6000:]}"
    assert "Traceback" not in text, text[-6000:]
    assert text.count(_SEED) >= 2, text[-6000:]


def _run_script(
    script: Path,
    num_ranks: int,
    options: tuple[str, ...],
    *,
    seconds: float,
    until: tuple[str, int] | None = None,
) -> tuple[str, int | None]:
    """Runs a script of DeepEP to its end, or until its output has a text so many times.

    Returns:
        What it said, and its exit code; None when it was stopped: at `until`, or with that, late.
    """
    process = subprocess.Popen(
        [sys.executable, str(script), "--num-processes", str(num_ranks), *options],
        cwd=script.parent,
        env={**launch.script_environ(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its ranks can be stopped with it
    )
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda out: lines.extend(out), args=(process.stdout,))
    reader.start()
    deadline = time.monotonic() + seconds
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if until is not None and sum(until[0] in line for line in list(lines)) >= until[1]:
                break
            time.sleep(0.2)
        code = process.poll()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=10)
    text = "".join(lines)
    assert code is not None or until is not None, (
        f"did not finish within {seconds} s:\n{text[-6000:]}"
    )
    return text, code
