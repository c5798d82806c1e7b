"""Real files of frameworks on compat/; `python tests/frameworks/fetch.py` brings them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.frameworks import bodies
from tests.frameworks.fetch import FOLDER, MARK
from tests.launch import run

NUM_RANKS = int(os.environ.get("EPJIT_TEST_RANKS") or 2)


def needs(framework: str) -> None:
    """Skips where the framework's files are not there."""
    if not (FOLDER / framework / MARK).exists():
        pytest.skip(f"no {framework}: python tests/frameworks/fetch.py {framework}")


@pytest.mark.parametrize(
    ("framework", "body"),
    [
        ("megatron-core", bodies.megatron_fused_a2a),
        ("megatron-core", bodies.megatron_flex_dispatcher),
        ("vllm", bodies.vllm_high_throughput),
        ("vllm", bodies.vllm_low_latency),
        ("sglang", bodies.sglang_normal),
        ("sglang", bodies.sglang_auto),
        ("lmdeploy", bodies.lmdeploy_normal),
        ("lmdeploy", bodies.lmdeploy_low_latency),
        ("xtuner", bodies.xtuner_op),
    ],
)
def test_calls(framework: str, body: Callable[..., None]) -> None:
    needs(framework)
    run(body, NUM_RANKS)
