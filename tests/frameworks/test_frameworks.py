"""Real files of frameworks on compat/; `python tests/frameworks/fetch.py` brings them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

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
        ("megatron-dev", scenarios.megatron_elastic),
        ("nemo-automodel", scenarios.automodel_flex_dispatcher),
        ("deepspeed", scenarios.deepspeed_elastic),
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


OF_DEEPEP_2 = pytest.mark.parametrize(
    ("framework", "test"),
    [("deepep", "tests/elastic/test_ep.py"), ("deepep-2.5", "tests/ep/test_ep.py")],
)


def run_deepep_2(framework: str, test: str, options: str) -> None:
    """Runs DeepEP's own test, every case of it."""
    needs(framework)
    run(scenarios.deepep_2, NUM_RANKS, f"{framework}/{test}", options.split(), timeout=600)


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
@OF_DEEPEP_2
def test_deepep_2_runs_its_own_test(framework: str, test: str, options: str) -> None:
    """144 cases each (2.5: 36), of which every tensor is compared bit for bit."""
    run_deepep_2(framework, test, f"--skip-perf-test {options}")


@pytest.mark.timeout(900)
def test_deepep_2_5_runs_its_own_test_at_once() -> None:
    """Calls that return their results, not an event whose wait does; synchronous ones too: 72."""
    run_deepep_2("deepep-2.5", "tests/ep/test_ep.py", "--skip-perf-test --defer-epilogue 0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it profiles kernels")
@OF_DEEPEP_2
def test_deepep_2_runs_its_own_measurement(framework: str, test: str) -> None:
    """Its kernels are found by the names that it looks for."""
    run_deepep_2(framework, test, "--test-first-only")
