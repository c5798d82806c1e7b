"""Two ranks on hosts of their own: real NVSHMEM, and every row and signal over a (TCP) network.

``EPJIT_TEST_UCX`` names a folder that `tests/transport/ucx/bundle.py` has made. With
``EPJIT_BACKEND=cpu EPJIT_TEST_RANKS=2`` the scenarios run on such hosts without a GPU, to try them.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import launch
from tests.scenarios import internode, low_latency, normal
from tests.scenarios import nvshmem
from tests.transport import ucx

MIB = 1 << 20
TIMEOUT_SECONDS = 3.0
SIZES = {"num_tokens": 64, "hidden": 1024, "num_topk": 8, "num_topk_groups": 2, "num_experts": 32}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of the ranks."""
    reason = ucx.why_not()
    if reason:
        pytest.skip(reason)
    return ucx.unpack(tmp_path_factory.mktemp("ucx"))


@pytest.fixture
def on_hosts(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs ``body(group, {}, *args)`` on both hosts and returns what each returned."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return lambda body, *args: launch.run(body, 2, {}, *args, executable=ucx.HOST)


def bytes_received() -> int:
    """Through the loopback interface, since it is there."""
    found = re.search(r"\blo:\s*(\d+)", Path("/proc/net/dev").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.needs_gpu
def test_ring(on_hosts: Callable[..., list[Any]]) -> None:
    before = bytes_received()
    found = on_hosts(nvshmem.ring, "epjit", 10, 1)
    assert [(pes, joined) for pes, _, joined in found] == [([0, 1], False)] * 2
    # The longest rows alone: two ranks, four warps, ten rounds, once by put and once by put_signal.
    assert bytes_received() - before > 2 * 4 * 10 * 2 * MIB


def test_random_rounds(on_hosts: Callable[..., list[Any]]) -> None:
    assert on_hosts(normal.random_rounds, 20, 160) == [20, 20]


def test_low_latency(on_hosts: Callable[..., list[Any]]) -> None:
    assert on_hosts(low_latency.random_rounds, 20, 64) == [20, 20]


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_killed_host(
    op: str,
    on_hosts: Callable[..., list[Any]],
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A host dies between rounds; what the other one does is said, for it is NVSHMEM's to choose.

    Its thread may end the process when it cannot send; else there is a CommunicationError, as
    inside a domain. That it waits for ever is neither.
    """
    # As long as `killed` gives the operation and the buffer's end together.
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 2 * TIMEOUT_SECONDS + 15)
    start = time.monotonic()
    with pytest.raises(launch.RankFailedError) as caught:
        on_hosts(normal.killed, op, 1, TIMEOUT_SECONDS)
    seconds = time.monotonic() - start
    errors = caught.value.errors
    assert f"exit code {-signal.SIGKILL}" in errors[1], str(caught.value)
    survivor = errors.get(0, "CommunicationError, and goes on").strip()
    record_property("survivor", survivor)
    with capsys.disabled():
        print(f"\n{op}: the survivor: {survivor} ({seconds:.0f} s with start and end)")
    assert 0 not in errors or survivor.startswith("died with exit code"), str(caught.value)


def test_as_v1(on_hosts: Callable[..., list[Any]]) -> None:
    """The checks of DeepEP's tests/test_internode.py, twice with the same hash."""
    assert on_hosts(internode.as_v1, SIZES | {"seed": 1}, 24, 1) == [(2, 0), (2, 1)]
