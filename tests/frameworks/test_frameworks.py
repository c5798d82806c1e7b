"""Real files of frameworks on compat/; `python tests/frameworks/fetch.py` brings them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.frameworks import scenarios
from tests.frameworks.fetch import FOLDER, MARK
from tests.harness.launch import run

NUM_RANKS = int(os.environ.get("EPJIT_TEST_RANKS") or 2)


def needs(framework: str) -> None:
    """Skips where the framework's files are not there."""
    if not (FOLDER / framework / MARK).exists():
        pytest.skip(f"no {framework}: python tests/frameworks/fetch.py {framework}")


@pytest.mark.parametrize(
    ("framework", "body"),
    [
        ("megatron-core", scenarios.megatron_fused_a2a),
        ("megatron-core", scenarios.megatron_flex_dispatcher),
        ("vllm", scenarios.vllm_high_throughput),
        ("vllm", scenarios.vllm_low_latency),
        ("vllm", scenarios.vllm_elastic),
        ("sglang", scenarios.sglang_normal),
        ("sglang", scenarios.sglang_auto),
        ("sglang", scenarios.sglang_elastic),
        ("lmdeploy", scenarios.lmdeploy_normal),
        ("lmdeploy", scenarios.lmdeploy_low_latency),
        ("xtuner", scenarios.xtuner_op),
        ("torchtitan", scenarios.torchtitan_elastic),
        ("lightllm", scenarios.lightllm_elastic),
    ],
)
def test_calls(framework: str, body: Callable[..., None]) -> None:
    needs(framework)
    run(body, NUM_RANKS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "options",
    [
        "",
        "--do-cpu-sync 0",
        "--masked-ratio 0.3",
        "--deterministic",
        "--unbalanced-ratio 4",
        "--allow-multiple-reduction 0",
    ],
)
def test_deepep_2_runs_its_own_test(options: str) -> None:
    """144 cases each, of which every tensor is compared bit for bit."""
    needs("deepep")
    run(scenarios.deepep_elastic, NUM_RANKS, options.split(), timeout=600)
